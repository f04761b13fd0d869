"""From an encoder's tokens to one feature vector of an image."""

import json
from collections.abc import Sequence

import torch

from .base import Encoder


POOLS = {
    "mean": "mean over tokens",
    "class": "class token",
    "class_mean": "class token and mean over tokens, concatenated",
    "raw_mean": "mean over tokens",
}


class PooledFeatures:
    """One vector for an image: the tokens after one block of an encoder, pooled. A feature map (feature_maps.py).

    Args:
        layer: the number of a block, 1 ... L, or `"last"`.
        pool: `"mean"` over the tokens of patches, the `"class"` token, `"class_mean"`, both (2·D values), each after
            the final norm; or `"raw_mean"`, the mean before it.
        name: in tables and results; default `"{layer}/{pool}"`.

    Raises:
        ValueError: there is no such block or pool, or the encoder has no class token.
    """

    def __init__(self, encoder: Encoder, layer: int | str = "last", pool: str = "mean", name: str | None = None):
        self.encoder, self.pool = encoder, pool
        self.layer = encoder.num_layers if layer == "last" else layer
        if self.layer not in range(1, encoder.num_layers + 1):
            raise ValueError(
                f"layer={layer!r} must be one of 1 ... {encoder.num_layers}, the blocks of {encoder.name}, or 'last'."
            )
        if pool not in POOLS:
            raise ValueError(f"pool={pool!r} must be one of {', '.join(POOLS)}.")
        if pool.startswith("class") and not encoder.has_class_token:
            raise ValueError(f"{encoder.name} has no class token for pool={pool!r}; pool='mean' works for any encoder.")
        self.name = name or f"{layer}/{pool}"
        place = "before" if pool == "raw_mean" else "after"
        norm = encoder.facts["norm"]
        self.protocol = encoder.facts | {
            "layer": "last" if self.layer == encoder.num_layers else self.layer,
            "pool": f"{POOLS[pool]}, {place} {norm}",
        }
        self.fingerprint = json.dumps(self.protocol, sort_keys=True)

    def __call__(self, pixels: torch.Tensor, sample_ids: torch.Tensor) -> torch.Tensor:
        return pooled_together([self], pixels, sample_ids)[0]

    def pooled(self, hidden_states: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """The tokens of its layer before and after the final norm, both (B, num_prefix_tokens + N, D) -> (B,D)."""
        patches = (hidden_states if self.pool == "raw_mean" else tokens)[:, self.encoder.num_prefix_tokens :]
        parts = {
            "mean": lambda: patches.mean(dim=1),
            "raw_mean": lambda: patches.mean(dim=1),
            "class": lambda: tokens[:, 0],
            "class_mean": lambda: torch.cat([tokens[:, 0], patches.mean(dim=1)], dim=1),
        }
        return parts[self.pool]()


@torch.no_grad()
def pooled_together(
    maps: Sequence[PooledFeatures], pixels: torch.Tensor, sample_ids: torch.Tensor
) -> list[torch.Tensor]:
    """The features of several maps of one encoder, in one forward pass."""
    [encoder] = {pooled.encoder for pooled in maps}
    layers = sorted({pooled.layer for pooled in maps})
    hidden_states = dict(zip(layers, encoder.hidden_states(pixels, sample_ids, layers), strict=True))
    tokens = {layer: encoder.norm(states) for layer, states in hidden_states.items()}
    return [pooled.pooled(hidden_states[pooled.layer], tokens[pooled.layer]) for pooled in maps]
