"""What encoders of all libraries have in common: images in, tokens after any block out, and what stamps a result."""

from collections.abc import Callable, Sequence

import torch
from torch import nn

from ..feature_maps import DTYPES


NOISES = ("clean", "frozen")


class Encoder:
    """A frozen Vision Transformer, whatever library it comes from. A subclass says how it is loaded and called.

    Attributes:
        name: in tables. model: the module itself. device: where its weights are.
        image_size, patch_size: in pixels. dim: D, values of a token. num_layers: blocks.
        num_prefix_tokens: tokens before those of the patches: a class token, registers. has_class_token: whether the
            first of them is a class token.
        mean, std: of the three channels, in units of 0...1.
        facts: what a result is stamped with; all that features depend on but the pixels.

    Args:
        blocks: the model's blocks, in order. norm: its final norm, (B,N,D) -> (B,N,D).
        facts: beside `mean`, `std` and `dtype`, which are added.
        dtype: `"float32"`, or `"bfloat16"` under autocast.
    """

    def __init__(
        self,
        name: str,
        model: nn.Module,
        blocks: Sequence[nn.Module],
        norm: Callable[[torch.Tensor], torch.Tensor],
        *,
        image_size: int,
        patch_size: int,
        dim: int,
        mean: Sequence[float],
        std: Sequence[float],
        facts: dict,
        num_prefix_tokens: int = 0,
        has_class_token: bool = False,
        dtype: str = "float32",
    ):
        if dtype not in DTYPES:
            raise ValueError(f"dtype={dtype!r} must be one of {', '.join(DTYPES)}.")
        if image_size < 1 or image_size % patch_size:
            raise ValueError(f"{name}: image_size={image_size} is not a positive multiple of the patch, {patch_size}.")
        self.name, self.model, self.blocks, self.norm, self.dtype = name, model, blocks, norm, dtype
        self.image_size, self.patch_size, self.dim, self.num_layers = image_size, patch_size, dim, len(blocks)
        self.num_prefix_tokens, self.has_class_token = num_prefix_tokens, has_class_token
        self.mean, self.std = [float(value) for value in mean], [float(value) for value in std]
        self.facts = facts | {"mean": self.mean, "std": self.std, "dtype": dtype}

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def weights_dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype

    def normalize_pixels(self, pixels: torch.Tensor) -> torch.Tensor:
        """(B,C,H,W) grey levels 0...255 to the encoder's normalised float32, on the device of `pixels`."""
        mean, std = (torch.tensor(values, device=pixels.device)[:, None, None] for values in (self.mean, self.std))
        return (pixels.to(torch.float32) / 255).sub_(mean).div_(std)

    @torch.no_grad()
    def hidden_states(
        self, pixels: torch.Tensor, sample_ids: torch.Tensor, layers: Sequence[int]
    ) -> list[torch.Tensor]:
        """The residual stream after each of these blocks, before the final norm, in one forward pass.

        Args:
            pixels: (B,3,S,S) uint8 crops. sample_ids: (B,) of frozen noise. layers: numbers of blocks, from 1.

        Returns:
            One (B, num_prefix_tokens + N, D) for each of the layers, in the precision of the weights.

        Raises:
            ValueError: there is no such block.
        """
        if outside := [layer for layer in layers if layer not in range(1, self.num_layers + 1)]:
            raise ValueError(f"{self.name} has the layers 1 ... {self.num_layers}, not {outside[0]}.")
        found = {}

        def keep(number: int) -> Callable:
            def hook(block, inputs, output):
                found[number] = output[0] if isinstance(output, tuple) else output

            return hook

        hooks = [self.blocks[layer - 1].register_forward_hook(keep(layer)) for layer in set(layers)]
        try:
            with torch.autocast(pixels.device.type, DTYPES[self.dtype], enabled=self.dtype != "float32"):
                self.forward(self.normalize_pixels(pixels), sample_ids)
        finally:
            for hook in hooks:
                hook.remove()
        # Under autocast a model may hand on what its norm, outside of it, does not take.
        return [found[layer].to(self.weights_dtype) for layer in layers]

    @torch.no_grad()
    def tokens(self, pixels: torch.Tensor, sample_ids: torch.Tensor, layers: Sequence[int]) -> list[torch.Tensor]:
        """As [`Encoder.hidden_states`], each after the final norm."""
        return [self.norm(hidden_states) for hidden_states in self.hidden_states(pixels, sample_ids, layers)]

    def forward(self, pixel_values: torch.Tensor, sample_ids: torch.Tensor) -> torch.Tensor:
        """The model's own call: normalised pixels (B,3,S,S) -> its last tokens, after the final norm."""
        raise NotImplementedError

    def untrained(self, seed: int) -> "Encoder":
        """The same architecture with new weights from the seed; leaves torch's generator as it is."""
        raise NotImplementedError
