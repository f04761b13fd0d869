"""A folded encoder in transformers' own class without a class token, I-JEPA's.

    from transformers import AutoImageProcessor, AutoModel, pipeline
    model, processor = AutoModel.from_pretrained(FOLDER), AutoImageProcessor.from_pretrained(FOLDER)
    features = model(**processor(image, return_tensors="pt")).last_hidden_state.mean(dim=1)
    pipeline("image-feature-extraction", model=FOLDER)(image)

loads it where this package was never installed; from the Hub AutoModel.from_pretrained(REPO, subfolder="vit"). The
model's call needs `interpolate_pos_encoding=True` for images of another size than the training's.

The stock image processor is Perceiver's, which, as ours, cuts the centre square and resizes it then. On 8-bit RGB
images that are square the pixels are equal (with torchvision, which rounds otherwise, within 1 level). On others they
differ by rounding, and by up to 12 levels at the border of the square, because Pillow, asked to cut and resize in
one step, looks past the cut: by 0.01-0.2 in the mean over crops of scikit-learn's two photographs at 32-256 px, and the
features of ldae-cifar10 have a cosine of more than 0.999999. To resize the shortest edge and crop then, as CLIP's
processor does, differs by 0.2-8 levels. EXIF orientation is not applied (transformers' pipelines do that before), and
transparency is dropped, where ours lays it over white.
"""

from pathlib import Path

import torch
from transformers import IJepaConfig, IJepaForImageClassification, IJepaModel, PerceiverImageProcessorPil

from ..configuration_ldae import LDAEConfig
from ..image_processing_ldae import LDAEImageProcessor
from ..modeling_ldae import LDAEForImageClassification, LDAEModel
from ..progress import quietly
from .folding import FoldedClassifier, FoldedViT, fold


def ijepa_config(config: LDAEConfig) -> IJepaConfig:
    """The same shape in transformers' words, with the names of the classes."""
    return IJepaConfig(
        image_size=config.image_size,
        patch_size=config.patch_size,
        num_channels=config.num_channels,
        hidden_size=config.hidden_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        intermediate_size=config.intermediate_size,
        hidden_act=config.hidden_act,
        layer_norm_eps=float(config.layer_norm_eps),
        id2label=config.id2label,
        label2id=config.label2id,
        problem_type=config.problem_type,
    )


NAMES = {
    "norm1": "layernorm_before",
    "projection": "attention.o_proj",
    "norm2": "layernorm_after",
    "fc1": "mlp.fc1",
    "fc2": "mlp.fc2",
}


def ijepa_state_dict(folded: FoldedViT) -> dict[str, torch.Tensor]:
    """The weights under the names that [`~transformers.IJepaModel`] has for them, or the classifier's class."""
    encoder = {
        "embeddings.patch_embeddings.projection.weight": folded.patch_embedding.weight,
        "embeddings.patch_embeddings.projection.bias": folded.patch_embedding.bias,
        "embeddings.position_embeddings": folded.position_embeddings,
        "layernorm.weight": folded.norm.weight,
        "layernorm.bias": folded.norm.bias,
    }
    for number, layer in enumerate(folded.layers):
        for ours, theirs in NAMES.items():
            for name, value in getattr(layer, ours).named_parameters():
                encoder[f"layers.{number}.{theirs}.{name}"] = value
        for name, value in layer.qkv.named_parameters():
            for theirs, part in zip("qkv", value.chunk(3), strict=True):
                encoder[f"layers.{number}.attention.{theirs}_proj.{name}"] = part
    encoder = {name: value.detach().contiguous() for name, value in encoder.items()}
    if not isinstance(folded, FoldedClassifier):
        return encoder
    head = {f"classifier.{name}": value.detach() for name, value in folded.classifier.named_parameters()}
    return {f"ijepa.{name}": value for name, value in encoder.items()} | head


def to_transformers(
    model: LDAEModel | LDAEForImageClassification, timestep: int | None = None, dtype: torch.dtype | None = None
) -> IJepaModel | IJepaForImageClassification:
    """[`fold`] into transformers' [`~transformers.IJepaModel`], of a classifier `IJepaForImageClassification`.

    Its `last_hidden_state` (B,N,D) and `logits` (B,num_labels) are the model's; for the encoder's `pooler_output` take
    the mean over tokens.

    Raises:
        ValueError: what [`fold`] raises.
    """
    return stock_of(fold(model, timestep, dtype))


def stock_of(folded: FoldedViT) -> IJepaModel | IJepaForImageClassification:
    """The stock model with a folded model's weights, which both share."""
    stock_class = IJepaForImageClassification if isinstance(folded, FoldedClassifier) else IJepaModel
    config = ijepa_config(folded.config)
    config.dtype = folded.norm.weight.dtype
    with torch.device("meta"):
        stock = stock_class(config)
    stock.load_state_dict(ijepa_state_dict(folded), assign=True)
    return stock.eval()


def stock_processor(processor: LDAEImageProcessor) -> PerceiverImageProcessorPil:
    """The processor of transformers that comes closest to ours (see above), for images of any kind and size."""
    size = {"height": processor.image_size, "width": processor.image_size}
    return PerceiverImageProcessorPil(
        size=size,
        crop_size=size,  # the share of the centre square that is kept is size / crop_size: all of it
        image_mean=processor.image_mean,
        image_std=processor.image_std,
        do_convert_rgb=True,
    )


def write_transformers(
    folder: str | Path,
    model: LDAEModel | LDAEForImageClassification,
    processor: LDAEImageProcessor,
    timestep: int | None = None,
) -> None:
    """Writes config.json, model.safetensors and preprocessor_config.json into a folder.

    Raises:
        ValueError: what [`fold`] raises.
    """
    with quietly():
        to_transformers(model, timestep).save_pretrained(folder)
    stock_processor(processor).save_pretrained(folder)
