"""l-DAE's encoder at one timestep is a plain Vision Transformer: all that conditions it goes into the weights.

    LayerNorm(h) · (1 + scale) + shift           ->  the norm's own weight and bias
    gate · (W x + b)                             ->  the attention's projection, the MLP's second layer
    E shown(encode(patch)) + b                   ->  one convolution (tokenizers of patches are affine)
    C (mean over tokens - m) / sqrt(v + ε) + c   ->  the classifier

B images · C channels · H, W pixels · N tokens · P values of a patch · D width
"""

import copy

import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import ACT2FN

from ..configuration_ldae import CONVOLUTIONAL_TOKENIZERS, LDAEConfig
from ..modeling_ldae import LDAEForImageClassification, LDAEModel, LDAEPreTrainedModel


class FoldedLayer(nn.Module):
    """A pre-norm ViT block."""

    def __init__(self, config: LDAEConfig):
        super().__init__()
        width = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.norm1 = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.qkv = nn.Linear(width, 3 * width)
        self.projection = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.fc1 = nn.Linear(width, config.intermediate_size)
        self.activation = ACT2FN[config.hidden_act]
        self.fc2 = nn.Linear(config.intermediate_size, width)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        query, key, value = self.qkv(self.norm1(hidden_states)).unflatten(-1, (3, self.num_heads, -1)).unbind(2)
        query, key, value = (part.transpose(1, 2) for part in (query, key, value))  # (B, heads, N, D/heads)
        context = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        hidden_states = hidden_states + self.projection(context)
        return hidden_states + self.fc2(self.activation(self.fc1(self.norm2(hidden_states))))  # (B, N, D)


class FoldedViT(nn.Module):
    """The folded encoder in plain torch, from which every target takes its weights.

    forward: `pixel_values` (B,C,H,W), H and W multiples of the patch size -> `last_hidden_state` (B,N,D) and
    `pooler_output` (B,D), its mean over tokens.
    """

    output_names = ("last_hidden_state", "pooler_output")

    def __init__(self, config: LDAEConfig):
        super().__init__()
        self.config, width, size = config, config.hidden_size, config.patch_size
        self.patch_embedding = nn.Conv2d(config.num_channels, width, size, stride=size)
        self.position_embeddings = nn.Parameter(torch.empty(1, config.num_patches, width))
        self.layers = nn.ModuleList([FoldedLayer(config) for _ in range(config.num_hidden_layers)])
        self.norm = nn.LayerNorm(width, eps=config.layer_norm_eps)

    def tokens(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(B,C,H,W) -> (B,N,D)."""
        patches = self.patch_embedding(pixel_values)  # (B, D, rows, columns)
        side = self.config.image_size // self.config.patch_size
        positions = self.position_embeddings.unflatten(1, (side, side)).permute(0, 3, 1, 2)
        # Always resized, without asking: on the training grid it is the identity, and the graph holds for every grid.
        positions = F.interpolate(positions, size=patches.shape[2:], mode="bicubic", align_corners=False)
        hidden_states = (patches + positions).flatten(2).transpose(1, 2)
        for layer in self.layers:
            hidden_states = layer(hidden_states)
        return self.norm(hidden_states)

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        tokens = self.tokens(pixel_values)
        return tokens, tokens.mean(dim=1)


class FoldedClassifier(FoldedViT):
    """The folded encoder with a linear head: `pixel_values` (B,C,H,W) -> `logits` (B,num_labels)."""

    output_names = ("logits",)

    def __init__(self, config: LDAEConfig):
        super().__init__(config)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (self.classifier(self.tokens(pixel_values).mean(dim=1)),)


@torch.no_grad()
def fold(
    model: LDAEModel | LDAEForImageClassification, timestep: int | None = None, dtype: torch.dtype | None = None
) -> FoldedViT:
    """An encoder, or a classifier, at one timestep and as "no class", as a plain Vision Transformer on the CPU.

    Every product is taken in float64 and rounded once, so that it differs from the model by rounding only (in float32
    about 1e-6 relative to the largest feature, in float64 below 1e-12).

    Args:
        timestep: the condition; default `config.feature_timestep`.
        dtype: of the result; default the model's.

    Raises:
        ValueError: the model is neither of the two, its tokenizer is convolutional, it has global tokens, or there is
            no such timestep.
    """
    check_foldable(model)
    weights = {name: value.to(dtype or model.dtype) for name, value in folded_weights(model, timestep)}
    with torch.device("meta"):
        folded = (FoldedClassifier if "classifier.weight" in weights else FoldedViT)(model.config)
    folded.load_state_dict(weights, assign=True)
    return folded.eval().requires_grad_(False)


def check_foldable(model: LDAEPreTrainedModel) -> None:
    """Raises ValueError unless the model is an encoder or a classifier that has the tokens of single patches."""
    if not isinstance(model, (LDAEModel, LDAEForImageClassification)):
        raise ValueError(
            f"Only an encoder or a classifier folds, not a {type(model).__name__}; of a model for pre-training give "
            "the encoder, model.ldae."
        )
    if model.config.tokenizer in CONVOLUTIONAL_TOKENIZERS:
        raise ValueError(
            f"An encoder with tokenizer={model.config.tokenizer!r} does not fold into a Vision Transformer: before its "
            "first layer stands a convolutional autoencoder, which looks beyond a patch. The encoders of the path's "
            "later steps (tokenizer='patch_vae', 'patch_ae', 'patch_pca', 'pixels') do."
        )
    if not model.config.is_plain_vit:
        raise ValueError(
            f"An encoder with num_global_tokens={model.config.num_global_tokens} does not fold into a Vision "
            "Transformer, which has none of them."
        )


def folded_weights(model: LDAEPreTrainedModel, timestep: int | None):
    """Name and float64 value of each of [`FoldedViT`]'s weights, one after the other."""
    encoder, config = model.base_model, model.config
    timestep = config.feature_timestep if timestep is None else timestep
    timesteps = encoder.schedule.as_timesteps(timestep, torch.device("cpu"), batch_size=1)
    conditioning = exact(encoder.label_embedding)(exact(encoder.timestep_embedding)(timesteps))  # (1, 1, D)

    weight, bias = folded_patch_embedding(encoder)
    yield "patch_embedding.weight", weight.unflatten(1, (config.num_channels, config.patch_size, config.patch_size))
    yield "patch_embedding.bias", bias
    yield "position_embeddings", exact(encoder.position_embeddings)
    for number, original in enumerate(encoder.layers):
        layer, name = exact(original), f"layers.{number}."
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = layer.modulation(conditioning)[0, 0].chunk(6)  # (D,) each
        yield name + "norm1.weight", 1 + scale
        yield name + "norm1.bias", shift
        yield name + "qkv.weight", layer.attention.qkv.weight
        yield name + "qkv.bias", layer.attention.qkv.bias
        yield name + "projection.weight", gate[:, None] * layer.attention.projection.weight
        yield name + "projection.bias", gate * layer.attention.projection.bias
        yield name + "norm2.weight", 1 + mlp_scale
        yield name + "norm2.bias", mlp_shift
        yield name + "fc1.weight", layer.mlp.fc1.weight
        yield name + "fc1.bias", layer.mlp.fc1.bias
        yield name + "fc2.weight", mlp_gate[:, None] * layer.mlp.fc2.weight
        yield name + "fc2.bias", mlp_gate * layer.mlp.fc2.bias
    yield "norm.weight", torch.ones(config.hidden_size)
    yield "norm.bias", torch.zeros(config.hidden_size)
    if isinstance(model, LDAEForImageClassification):
        statistics, classifier = exact(model.batch_norm), exact(model.classifier)
        weight = classifier.weight * (statistics.running_var + statistics.eps).rsqrt()
        yield "classifier.weight", weight
        yield "classifier.bias", classifier.bias - weight @ statistics.running_mean


def folded_patch_embedding(encoder: LDAEModel) -> tuple[torch.Tensor, torch.Tensor]:
    """(D,P) and (D,): what the model does to a patch before the positions are added, which is affine in the patch."""
    tokenizer, embedding = exact(encoder.tokenizer), exact(encoder.patch_embedding)
    patches = torch.eye(encoder.config.patch_dim, dtype=torch.float64)
    patches = torch.cat([torch.zeros_like(patches[:1]), patches])[None]  # (1, 1 + P, P)
    shown = encoder.network_input(tokenizer, tokenizer.encode_patches(patches))[0]
    offset, columns = shown[0], shown[1:] - shown[0]
    return embedding.weight @ columns.T, embedding.weight @ offset + embedding.bias


def exact(part: nn.Module | torch.Tensor) -> nn.Module | torch.Tensor:
    """A copy in float64 on the CPU, where every machine has float64."""
    return copy.deepcopy(part).to("cpu", torch.float64)
