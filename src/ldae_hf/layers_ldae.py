"""The transformer of l-DAE: a ViT whose blocks are conditioned as DiT's (adaLN-Zero). It knows nothing of noise.

B images · N tokens of patches · G global tokens, none in the paper · D width
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .configuration_ldae import LDAEConfig


def sincos_positions(hidden_size: int, grid: tuple[int, int]) -> torch.Tensor:
    """(1,N,D) fixed 2-D sine-cosine positions as in MAE and DiT: columns in the first half of D, rows in the second."""
    quarter = hidden_size // 4
    with torch.device("cpu"):  # also where a model is being built on the meta device
        frequencies = 10000 ** -(torch.arange(quarter, dtype=torch.float64) / quarter)
        rows, columns = (torch.arange(n, dtype=torch.float64)[:, None] * frequencies for n in grid)
    rows, columns = (torch.cat([angles.sin(), angles.cos()], dim=-1) for angles in (rows, columns))
    rows, columns = rows[:, None].expand(-1, grid[1], -1), columns[None].expand(grid[0], -1, -1)
    return torch.cat([columns, rows], dim=-1).flatten(0, 1)[None].float()


def linear(in_features: int, out_features: int, initial_std: float) -> nn.Linear:
    """A linear layer that starts normally distributed, or at zero, where others start Xavier-uniform.

    The layer says so itself because transformers leaves `_init_weights` out for modules without tensors of their own
    (a block, the decoder) in classes that are not transformers' own.
    """
    layer = nn.Linear(in_features, out_features)
    layer.initial_std = initial_std
    return layer


class LDAETimestepEmbedding(nn.Module):
    """t -> 256 sinusoids (cosines, then sines) -> two-layer MLP -> the condition, as in DiT.

    Timesteps (B,) give (B,1,D), one condition for all tokens of an image; (B,N) give (B,N,D).
    """

    num_frequencies = 256

    def __init__(self, config: LDAEConfig):
        super().__init__()
        self.freq_shift = config.timestep_freq_shift
        self.fc1 = linear(self.num_frequencies, config.hidden_size, initial_std=0.02)
        self.fc2 = linear(config.hidden_size, config.hidden_size, initial_std=0.02)

    def forward(self, timesteps: torch.Tensor) -> torch.Tensor:
        half = self.num_frequencies // 2
        exponents = torch.arange(half, dtype=torch.float32, device=timesteps.device)
        exponents = -math.log(10000) * exponents / (half - self.freq_shift)
        angles = timesteps.reshape(len(timesteps), -1, 1).float() * exponents.exp()  # (B, 1 or N, 128)
        sinusoids = torch.cat([angles.cos(), angles.sin()], dim=-1)  # (B, 1 or N, 256)
        return self.fc2(F.silu(self.fc1(sinusoids.to(self.fc1.weight.dtype))))  # (B, 1 or N, D)


class LDAELabelEmbedding(nn.Module):
    """A class -> what it adds to the condition (B,1,D), as in DiT; the last row of the table stands for "no class"."""

    def __init__(self, config: LDAEConfig):
        super().__init__()
        self.num_classes, self.dropout_prob = config.num_classes, config.class_dropout_prob
        self.table = nn.Embedding(config.num_classes + 1, config.hidden_size)

    def forward(self, conditioning: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        """Adds the classes `labels` (B,), None for "no class" in all of the batch, to the condition.

        Raises:
            ValueError: a label is no integer or outside 0 ... num_classes (which is "no class"); an accelerator's
                tensors are not read back.
        """
        if labels is None:
            return conditioning + self.table.weight[-1:]
        if labels.dtype not in (torch.int64, torch.int32) or labels.shape not in ((1,), conditioning.shape[:1]):
            raise ValueError(
                f"labels must be {conditioning.shape[0]} integers, one for each image, "
                f"not {labels.dtype} of shape {tuple(labels.shape)}."
            )
        if labels.device.type == "cpu" and not torch.compiler.is_compiling():
            low, high = int(labels.min()), int(labels.max())
            if low < 0 or high > self.num_classes:
                raise ValueError(
                    f"Labels must lie in 0 ... {self.num_classes - 1} (num_classes={self.num_classes}), "
                    f"but {low if low < 0 else high} was given."
                )
        return conditioning + self.table(labels)[:, None]

    def drop(self, labels: torch.Tensor | None, dropped: torch.Tensor | None) -> torch.Tensor | None:
        """Replaces labels (B,) by "no class" where `dropped` (B,) says so; in training it is drawn if not given."""
        if labels is None:
            return None
        if dropped is None:
            drawn = torch.rand(labels.shape, device=labels.device) < self.dropout_prob
            dropped = drawn if self.training else torch.zeros_like(drawn)
        return torch.where(dropped.to(labels.device), self.num_classes, labels)


class NoLabels(nn.Module):
    """The condition as it is: what every model after the DiT baseline has in the place of a label embedding."""

    def forward(self, conditioning: torch.Tensor, labels: None = None) -> torch.Tensor:
        return conditioning

    def drop(self, labels: torch.Tensor | None, dropped: torch.Tensor | None) -> None:
        if labels is not None:
            raise ValueError("This model has no class labels (num_classes=None); leave `labels` out.")


class LDAEGlobalTokens(nn.Module):
    """Learned tokens before those of the patches (B,N,D) -> (B,G+N,D): they see all, have no place, and no noise."""

    def __init__(self, config: LDAEConfig):
        super().__init__()
        self.count = config.num_global_tokens
        self.weight = nn.Parameter(torch.empty(self.count, config.hidden_size))

    def forward(self, hidden_states: torch.Tensor, conditioning: torch.Tensor) -> torch.Tensor:
        if conditioning.shape[1] != 1:
            raise ValueError("A model with global tokens takes one timestep for an image, not one for each token.")
        tokens = self.weight.to(hidden_states.dtype).expand(len(hidden_states), -1, -1)
        return torch.cat([tokens, hidden_states], dim=1)


class NoGlobalTokens(nn.Module):
    """The tokens of the patches as they are."""

    count = 0

    def forward(self, hidden_states: torch.Tensor, conditioning: torch.Tensor) -> torch.Tensor:
        return hidden_states


def modulation_mlp(config: LDAEConfig, num_chunks: int, width: int) -> nn.Sequential:
    """The condition (B,·,D) -> `num_chunks` shifts, scales and gates of the width of what they modulate. The last layer
    starts at zero (adaLN-Zero)."""
    hidden = config.conditioning_hidden_size
    last = linear(hidden or config.hidden_size, num_chunks * width, initial_std=0)
    if hidden is None:  # DiT
        return nn.Sequential(nn.SiLU(), last)
    return nn.Sequential(nn.Linear(config.hidden_size, hidden), nn.SiLU(), last)  # Appendix A


def modulate(hidden_states: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor, eps: float) -> torch.Tensor:
    """LayerNorm(h) · (1 + scale) + shift, (B,N,D), of a condition for each token (B,N,D), for each image (B,1,D), or
    one that the batch shares (1,1,D), which is the norm's own affine."""
    if shift.shape[:2] == (1, 1):
        weight, bias = ((1 + scale[0, 0]).to(hidden_states.dtype), shift[0, 0].to(hidden_states.dtype))
        return F.layer_norm(hidden_states, weight.shape, weight, bias, eps)
    normalised = F.layer_norm(hidden_states, hidden_states.shape[-1:], eps=eps).to(scale.dtype)
    return torch.addcmul(shift, normalised, 1 + scale)


def eager_attention(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    """softmax(Q Kᵀ · scaling) V written out: (B,heads,N,D/heads) -> (B,N,heads,D/heads), and the weights."""
    # In their own dtype: torch sums in fp32 inside, and a cast there and back costs a tenth of a bf16 step on a CPU.
    weights = torch.matmul(query * scaling, key.transpose(2, 3)).softmax(dim=-1).to(query.dtype)
    return torch.matmul(weights, value).transpose(1, 2), weights


class LDAEAttention(nn.Module):
    """Multi-head self-attention over all tokens, through transformers' attention interface."""

    is_causal = False

    def __init__(self, config: LDAEConfig, width: int):
        super().__init__()
        self.config = config
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.qkv = nn.Linear(width, 3 * width)
        self.projection = nn.Linear(width, width)

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        batch, length, _ = hidden_states.shape
        qkv = self.qkv(hidden_states).view(batch, length, 3, -1, self.head_dim).unbind(2)
        query, key, value = (part.transpose(1, 2) for part in qkv)  # (B, heads, N, D/heads) each
        attend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        context, weights = attend(self, query, key, value, None, scaling=self.scaling, dropout=0.0)
        return self.projection(context.reshape(batch, length, -1)), weights


class LDAEMLP(nn.Module):
    def __init__(self, config: LDAEConfig, width: int):
        super().__init__()
        inner = int(width * config.mlp_ratio)
        self.fc1 = nn.Linear(width, inner)
        self.activation = ACT2FN[config.hidden_act]
        self.fc2 = nn.Linear(inner, width)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.activation(self.fc1(hidden_states)))


class LDAELayer(GradientCheckpointingLayer):
    """A ViT block whose norms and residual gates are set by the condition (adaLN-Zero of DiT)."""

    def __init__(self, config: LDAEConfig, width: int):
        super().__init__()
        self.eps = config.layer_norm_eps
        self.modulation = modulation_mlp(config, 6, width)
        self.attention = LDAEAttention(config, width)
        self.mlp = LDAEMLP(config, width)

    def forward(self, hidden_states: torch.Tensor, conditioning: torch.Tensor) -> torch.Tensor:
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = self.modulation(conditioning).chunk(6, dim=-1)
        attended, _ = self.attention(modulate(hidden_states, shift, scale, self.eps))
        hidden_states = torch.addcmul(hidden_states, gate, attended)
        transformed = self.mlp(modulate(hidden_states, mlp_shift, mlp_scale, self.eps))
        return torch.addcmul(hidden_states, mlp_gate, transformed)  # (B, N, D)


class LDAEDecoder(nn.Module):
    """The second half of the blocks, a modulated norm, and a linear layer to `output_dim` values per token.

    Before them, where the decoder has a width of its own, a linear layer from the encoder's to that.
    """

    def __init__(self, config: LDAEConfig, output_dim: int):
        super().__init__()
        self.eps, width = config.layer_norm_eps, config.decoder_width
        self.num_global_tokens = config.num_global_tokens
        self.embedding = nn.Identity() if width == config.hidden_size else nn.Linear(config.hidden_size, width)
        self.layers = nn.ModuleList([LDAELayer(config, width) for _ in range(config.decoder_num_hidden_layers)])
        self.modulation = modulation_mlp(config, 2, width)
        self.head = linear(width, output_dim, initial_std=0)

    def forward(self, hidden_states: torch.Tensor, conditioning: torch.Tensor) -> torch.Tensor:
        hidden_states = self.embedding(hidden_states)
        for layer in self.layers:
            hidden_states = layer(hidden_states, conditioning)
        hidden_states = hidden_states[:, self.num_global_tokens :]
        shift, scale = self.modulation(conditioning).chunk(2, dim=-1)
        return self.head(modulate(hidden_states, shift, scale, self.eps))  # (B, N, output_dim)
