"""From an encoder of any library to the classifier that is fine-tuned, of a class of transformers, which loads without
this package: average-pooled features, a LayerNorm, a linear head.

    l-DAE (folded), I-JEPA    IJepaForImageClassification         norm, mean over tokens
    ViT, MAE                  BeitForImageClassification          mean over patches, new norm
    DINOv2                    Dinov2ForImageClassification        norm, class token and mean over patches
    timm's ViTs               TimmWrapperForImageClassification   mean over patches, new norm

BEiT's class is the stock one with MAE's head. Its attention keys have no bias; one would only add the same to all of a
query's scores, and softmax takes it out again.
"""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import (
    AutoModelForImageClassification,
    BeitConfig,
    BeitForImageClassification,
    IJepaForImageClassification,
    PretrainedConfig,
    PreTrainedModel,
)

from ...export.folding import exact, fold
from ...export.transformers_vit import ijepa_config, ijepa_state_dict
from ...image_processing_ldae import LDAEImageProcessor
from ...modeling_ldae import LDAEModel
from ..encoders import Encoder


HEAD_STD = 2e-5  # MAE's
NORM_THEN_MEAN = "LayerNorm of tokens, mean over them, linear"
MEAN_THEN_NORM = "mean over the patches' tokens, new LayerNorm, linear"
DINOV2_HEAD = "LayerNorm of tokens, class token and mean over the patches' tokens, linear"
# Of each kind of model: its list of blocks, and in a block the last module of each residual branch.
BLOCKS = {
    "ijepa": ("ijepa.layers", ("attention.o_proj", "mlp")),
    "beit": ("beit.layers", ("attention.o_proj", "mlp")),
    "dinov2": ("dinov2.encoder.layer", ("layer_scale1", "layer_scale2")),
    "timm_wrapper": ("timm_model.blocks", ("attn", "mlp")),
}


@dataclass
class Classifier:
    """A model whose forward takes normalised images (B,3,S,S) and returns an output with `logits` (B,num_labels).

    Attributes:
        blocks: dotted name of the model's list of blocks. head: what it makes of the tokens, in words. dim: D.
        processor: normalises images; its PCA is not used.
        projector: (P,P) onto the inputs that an l-DAE was trained on, None for other encoders.
    """

    model: PreTrainedModel
    blocks: str
    head: str
    dim: int
    processor: LDAEImageProcessor
    projector: torch.Tensor | None = None

    def branch_ends(self) -> list[list[nn.Module]]:
        """For each block the last module of each of its residual branches."""
        _, ends = BLOCKS[self.model.config.model_type]
        return [[block.get_submodule(end) for end in ends] for block in self.model.get_submodule(self.blocks)]

    @torch.no_grad()
    def project_patch_embedding(self) -> None:
        """Takes out of the patch embedding what lies outside of the subspace that the encoder was trained on."""
        weight = self.model.ijepa.embeddings.patch_embeddings.projection.weight
        weight.copy_((weight.flatten(1) @ self.projector.to(weight)).view_as(weight))


def build_classifier(
    encoder: Encoder, label_names: list[str], *, seed: int = 0, from_scratch: bool = False, attention: str = "sdpa"
) -> Classifier:
    """An encoder under a new head, on the CPU, in torch's default dtype.

    Args:
        encoder: as [`open_encoder`] gives it; an l-DAE is folded at its timestep.
        seed: of the head, drawn with MAE's small deviation.
        from_scratch: all other weights are drawn too, as their class draws them. Sine-cosine positions, which no
            training has changed, stay: they belong to the architecture.

    Raises:
        ValueError: there is no fine-tuning for a model of this class, or the l-DAE does not fold.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        labels = {"id2label": dict(enumerate(label_names))}
        labels["label2id"] = {name: number for number, name in labels["id2label"].items()}
        projector = None
        if isinstance(encoder.model, LDAEModel):
            model, classifier, head = _from_ldae(encoder, labels, from_scratch, attention)
            projector = input_projector(encoder.model)
        else:
            encoder = encoder.untrained(seed) if from_scratch else encoder
            build = _from_timm if hasattr(encoder, "architecture") else _from_transformers
            model, classifier, head = build(encoder, labels, attention)
        nn.init.trunc_normal_(classifier.weight, std=HEAD_STD)
        nn.init.zeros_(classifier.bias)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.endswith("mask_token"))  # positions are trained, as in MAE's fine-tuning
    geometry = dict(image_size=encoder.image_size, patch_size=encoder.patch_size, latent_dim=1)
    processor = LDAEImageProcessor(**geometry, image_mean=encoder.mean, image_std=encoder.std)
    blocks, _ = BLOCKS[model.config.model_type]
    return Classifier(model.to("cpu", torch.get_default_dtype()), blocks, head, encoder.dim, processor, projector)


@torch.no_grad()
def input_projector(model: LDAEModel) -> torch.Tensor:
    """(P,P) float64, onto what the tokenizer keeps of a patch; VᵀV for PCA."""
    tokenizer = exact(model.tokenizer)
    patches = torch.eye(model.config.patch_dim, dtype=torch.float64)
    latents = tokenizer.encode_patches(torch.cat([torch.zeros_like(patches[:1]), patches])[None])[0]
    encoding = (latents[1:] - latents[0]).T  # (K, P)
    return torch.linalg.pinv(encoding) @ encoding


def _from_ldae(encoder: Encoder, labels: dict, from_scratch: bool, attention: str):
    folded = fold(encoder.model, encoder.timestep, torch.get_default_dtype())
    if encoder.image_size != folded.config.image_size:
        raise _other_size(encoder, folded.config.image_size)
    config = ijepa_config(folded.config)
    config.update(labels)
    model = IJepaForImageClassification._from_config(config, attn_implementation=attention)
    weights = ijepa_state_dict(folded)
    if from_scratch:
        weights = {name: value for name, value in weights.items() if name.endswith("position_embeddings")}
    model.ijepa.load_state_dict(weights, strict=not from_scratch)
    return model, model.classifier, NORM_THEN_MEAN


def _from_transformers(encoder: Encoder, labels: dict, attention: str):
    source, kind = encoder.model, encoder.model.config.model_type
    if kind not in ("vit", "vit_mae", "ijepa", "dinov2"):
        raise ValueError(
            f"{encoder.name} is a {type(source).__name__}, for which there is no fine-tuning; there is for l-DAE, for "
            "ViT, MAE, I-JEPA and DINOv2 of transformers, and for timm's Vision Transformers."
        )
    if encoder.image_size != source.config.image_size:
        raise _other_size(encoder, source.config.image_size)
    weights = {name: value for name, value in source.state_dict().items() if not name.startswith("pooler.")}
    if kind in ("vit", "vit_mae"):
        config, head = _beit_config(source.config), MEAN_THEN_NORM
        weights = {name: value for name, value in weights.items() if not name.startswith("layernorm.")}
        weights = {name: value for name, value in weights.items() if not name.endswith("k_proj.bias")}
        weights |= {"pooler.layernorm.weight": torch.ones(config.hidden_size)}
        weights |= {"pooler.layernorm.bias": torch.zeros(config.hidden_size)}
    else:
        config, head = type(source.config).from_dict(source.config.to_dict()), NORM_THEN_MEAN
        if kind == "dinov2":
            config.drop_path_rate, head = 0.0, DINOV2_HEAD  # DropPath does it
    config.update(labels)
    kinds = BeitForImageClassification if config.model_type == "beit" else AutoModelForImageClassification
    build = getattr(kinds, "_from_config", None) or kinds.from_config
    model = build(config, attn_implementation=attention)
    _load(encoder, getattr(model, model.base_model_prefix), weights)
    return model, model.classifier, head


def _beit_config(config: PretrainedConfig) -> BeitConfig:
    """A ViT of the same shape, whose pooling is MAE's."""
    shared = "image_size patch_size num_channels hidden_size num_hidden_layers num_attention_heads intermediate_size"
    shared += " hidden_act layer_norm_eps"
    return BeitConfig(
        **{key: getattr(config, key) for key in shared.split()},
        use_absolute_position_embeddings=True,
        use_mean_pooling=True,
        layer_scale_init_value=0.0,
        drop_path_rate=0.0,
    )


def _from_timm(encoder: Encoder, labels: dict, attention: str):
    from transformers import TimmWrapperConfig, TimmWrapperForImageClassification

    arguments = encoder.arguments | {"global_pool": "avg", "img_size": encoder.image_size}
    config = TimmWrapperConfig(architecture=encoder.architecture, model_args=arguments, **labels)
    model = TimmWrapperForImageClassification(config)
    inner, weights = model.timm_model, encoder.model.state_dict()
    has_new_norm = "fc_norm.weight" in inner.state_dict()
    if has_new_norm:
        weights = {name: value for name, value in weights.items() if not name.startswith("norm.")}
    fresh = {name: value for name, value in inner.state_dict().items() if name.startswith(("fc_norm.", "head."))}
    _load(encoder, inner, weights | fresh)
    if not all(hasattr(block, end) for block in inner.blocks for end in BLOCKS["timm_wrapper"][1]):
        raise ValueError(f"{encoder.name}: the blocks of {encoder.architecture} are not those of a ViT.")
    return model, inner.get_classifier(), MEAN_THEN_NORM if has_new_norm else NORM_THEN_MEAN


def _load(encoder: Encoder, model: nn.Module, weights: dict[str, torch.Tensor]) -> None:
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(f"The weights of {encoder.name} do not fit {type(model).__name__}: {error}") from error


def _other_size(encoder: Encoder, size: int) -> ValueError:
    return ValueError(f"{encoder.name} is fine-tuned on its own image size, {size} pixels, not {encoder.image_size}.")
