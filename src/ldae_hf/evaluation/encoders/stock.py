"""Encoders of other libraries: what is needed of them is found by trying one image, so that a model that works
otherwise is refused and not misread.
"""

from collections.abc import Sequence

import torch
from torch import nn

from ..feature_maps import weights_fingerprint
from .base import Encoder


CLASS_TOKENS = ("cls_token", "class_embedding")


class StockEncoder(Encoder):
    """A Vision Transformer of another library. Its final norm is its own, and is taken after every layer.

    Args:
        library: whose it is. architecture: all that its features depend on but the weights, as JSON values.
        mean, std: of the three channels, in units of 0...1. The others as for [`Encoder`].

    Raises:
        ValueError: the model does not turn images of this size into a grid of tokens, or none of its norms (nor none)
            leads from its last block to what it answers.
    """

    def __init__(
        self,
        name: str,
        model: nn.Module,
        blocks: Sequence[nn.Module],
        *,
        library: str,
        architecture: dict,
        image_size: int,
        patch_size: int,
        dim: int,
        mean: Sequence[float],
        std: Sequence[float],
        dtype: str = "float32",
    ):
        facts = {"encoder": weights_fingerprint(architecture, model), "library": library, "processor": None}
        facts |= {"timestep": None, "noise": "clean"}
        shape = dict(image_size=image_size, patch_size=patch_size, dim=dim)
        super().__init__(name, model, blocks, nn.Identity(), **shape, mean=mean, std=std, facts=facts, dtype=dtype)
        self.has_class_token = any(key.endswith(CLASS_TOKENS) for key, _ in model.named_parameters())
        self._try_an_image()

    @torch.no_grad()
    def _try_an_image(self) -> None:
        """Finds the prefix tokens and the final norm."""
        size, grid = self.image_size, self.image_size // self.patch_size
        pixels = (torch.arange(3 * size**2, device=self.device) % 251).view(1, 3, size, size).to(torch.uint8)
        try:
            [hidden_states] = self.hidden_states(pixels, torch.zeros(1, dtype=torch.int64), [self.num_layers])
            answer = self.forward(self.normalize_pixels(pixels), None).to(hidden_states.dtype)
        # Models refuse what they cannot take in any way: ValueError, AssertionError, a product of wrong shapes.
        except Exception as error:
            raise ValueError(f"{self.name} cannot be given an image of {size}x{size} pixels: {error}") from error
        self.num_prefix_tokens = answer.shape[1] - grid**2 if answer.ndim == 3 else -1
        if self.num_prefix_tokens < 0 or answer.shape != hidden_states.shape:
            raise ValueError(
                f"{self.name} answers an image of {size}x{size} pixels with {tuple(answer.shape)}, which is not "
                f"{grid}x{grid} tokens; only Vision Transformers with one grid of patches can be evaluated."
            )
        inside = {id(module) for block in self.blocks for module in block.modules()}
        norms = [module for module in self.model.modules() if id(module) not in inside and _is_norm(module, self.dim)]
        for norm in [*norms, nn.Identity()]:
            if torch.allclose(norm(hidden_states), answer, rtol=1e-3, atol=1e-4):
                self.norm = norm
                self.facts["norm"] = "no final norm" if isinstance(norm, nn.Identity) else "the model's final norm"
                return
        raise ValueError(f"{self.name}: no norm of the model leads from its last block to its answer.")


def _is_norm(module: nn.Module, dim: int) -> bool:
    weight = getattr(module, "weight", None)
    return "norm" in type(module).__name__.lower() and weight is not None and weight.shape == (dim,)


def keep_fixed_parameters(trained: nn.Module, fresh: nn.Module) -> None:
    """Copies what training does not change, sine-cosine positions: it belongs to the architecture. transformers, which
    forgets on loading what is fixed, leaves MAE's at zero when it builds a model."""
    parameters = dict(fresh.named_parameters())
    with torch.no_grad():
        for name, parameter in trained.named_parameters():
            if not (parameter.requires_grad and parameters[name].requires_grad):
                parameters[name].copy_(parameter)


def refuse_other_weights(source, architecture: str, missing: list[str], unexpected: list[str]) -> None:
    """Raises ValueError, with their names, for weights that a model lacks or does not know: it never goes on with
    random ones."""
    for names, problem in ((missing, "lacks"), (unexpected, "holds, unknown to the model,")):
        if names:
            shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
            raise ValueError(f"{source} is not the weights of this {architecture}: it {problem} {shown}.")
