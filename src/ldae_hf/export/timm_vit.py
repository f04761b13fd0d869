"""A folded encoder as timm's VisionTransformer, in the folder format of timm's hub. timm itself is not needed.

    import timm
    model = timm.create_model("local-dir:FOLDER", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    features = model(transform(image.convert("RGB"))[None])  # (1,D), the mean over tokens; of a classifier the logits
    tokens = model.forward_features(transform(image.convert("RGB"))[None])  # (1,N,D)

timm loads no subfolder of a repository on the Hub (`hf-hub:OWNER/NAME` takes the root); download it first:

    folder = huggingface_hub.snapshot_download("OWNER/NAME", allow_patterns="timm/*")
    model = timm.create_model(f"local-dir:{folder}/timm", pretrained=True)

timm resizes the shortest edge and crops then, so the pixels of images that are not square differ by what
`transformers_vit` says of CLIP's processor. At another size (`img_size=...`) timm resizes positions with antialiasing,
which is another interpolation than the model's: features are equal at the training size only.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from ..configuration_ldae import LDAEConfig
from ..image_processing_ldae import LDAEImageProcessor
from ..modeling_ldae import LDAEForImageClassification, LDAEModel
from .folding import FoldedClassifier, FoldedViT, fold


# The activations that timm has too, under its names.
ACTIVATIONS = {
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu": "gelu",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
    "quick_gelu": "quick_gelu",
    "mish": "mish",
    "tanh": "tanh",
    "sigmoid": "sigmoid",
}
LAYER_NORM_EPS = 1e-6  # of timm's LayerNorm; its configuration cannot hold another

NAMES = {"norm1": "norm1", "qkv": "attn.qkv", "projection": "attn.proj", "norm2": "norm2", "fc1": "mlp.fc1"}
NAMES |= {"fc2": "mlp.fc2"}


def timm_arguments(config: LDAEConfig) -> dict:
    """The arguments of timm's VisionTransformer, `num_classes` left out.

    Raises:
        ValueError: an activation or an epsilon that timm does not have.
    """
    if config.hidden_act not in ACTIVATIONS:
        raise ValueError(
            f"timm has no activation for hidden_act={config.hidden_act!r}; it has {', '.join(ACTIVATIONS)}."
        )
    if config.layer_norm_eps != LAYER_NORM_EPS:
        raise ValueError(
            f"timm's layer norms have the epsilon {LAYER_NORM_EPS}, the model has "
            f"layer_norm_eps={config.layer_norm_eps}; export it to transformers or ONNX."
        )
    return dict(
        img_size=config.image_size,
        patch_size=config.patch_size,
        in_chans=config.num_channels,
        embed_dim=config.hidden_size,
        depth=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        mlp_ratio=config.mlp_ratio,
        act_layer=ACTIVATIONS[config.hidden_act],
        class_token=False,
        global_pool="avg",
        fc_norm=False,
    )


def timm_state_dict(folded: FoldedViT) -> dict[str, torch.Tensor]:
    """The weights under timm's names: `load_state_dict(..., strict=True)` takes them."""
    weights = {
        "patch_embed.proj.weight": folded.patch_embedding.weight,
        "patch_embed.proj.bias": folded.patch_embedding.bias,
        "pos_embed": folded.position_embeddings,
        "norm.weight": folded.norm.weight,
        "norm.bias": folded.norm.bias,
    }
    for number, layer in enumerate(folded.layers):
        for ours, theirs in NAMES.items():
            for name, value in getattr(layer, ours).named_parameters():
                weights[f"blocks.{number}.{theirs}.{name}"] = value
    if isinstance(folded, FoldedClassifier):
        weights |= {f"head.{name}": value for name, value in folded.classifier.named_parameters()}
    return {name: value.detach().contiguous() for name, value in weights.items()}


def timm_config(model: LDAEModel | LDAEForImageClassification, processor: LDAEImageProcessor) -> dict:
    """What timm's config.json holds: the architecture, its arguments, and how images are prepared."""
    config, classes = model.config, {}
    if isinstance(model, LDAEForImageClassification):
        classes = {"label_names": [config.id2label[number] for number in range(config.num_labels)]}
    num_classes = len(classes.get("label_names", ()))
    return {
        "architecture": "vit_base_patch16_224",  # timm builds registered names only; the arguments say the shape
        "num_classes": num_classes,
        "num_features": config.hidden_size,
        "global_pool": "avg",
        **classes,
        "model_args": timm_arguments(config),
        "pretrained_cfg": {
            "num_classes": num_classes,
            "input_size": [config.num_channels, config.image_size, config.image_size],
            "fixed_input_size": True,
            "interpolation": "bicubic",
            "crop_pct": 1.0,
            "crop_mode": "center",
            "mean": processor.image_mean,
            "std": processor.image_std,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }


def write_timm(
    folder: str | Path,
    model: LDAEModel | LDAEForImageClassification,
    processor: LDAEImageProcessor,
    timestep: int | None = None,
) -> None:
    """Writes config.json and model.safetensors into a folder, as timm's `local-dir:` takes them.

    Raises:
        ValueError: what [`fold`] raises, or a part that timm does not have.
    """
    folder, config = Path(folder), timm_config(model, processor)
    weights = timm_state_dict(fold(model, timestep))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
