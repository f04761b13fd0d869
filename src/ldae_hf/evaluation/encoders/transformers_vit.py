"""Vision Transformers of transformers: ViT, DeiT, MAE, DINOv2, DINOv3, I-JEPA and their like."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedModel
from transformers.image_processing_utils import BaseImageProcessor
from transformers.utils import logging

from ...progress import quietly
from .stock import StockEncoder, keep_fixed_parameters, refuse_other_weights


# What a checkpoint may hold beside the encoder.
HEADS = ("decoder.", "classifier.", "cls_classifier.", "distillation_classifier.", "head.", "pooler.")
# What a configuration says of its file and not of the model.
ABOUT_THE_FILE = ("_name_or_path", "architectures", "dtype", "transformers_version", "id2label", "label2id")


class TransformersEncoder(StockEncoder):
    """An encoder of transformers. MAE's sees all patches in their order, whatever its mask ratio.

    Args:
        model: in evaluation mode. processor: with `image_mean` and `image_std`. image_size: of the crops.

    Raises:
        ValueError: the model is no Vision Transformer, or cannot take images of this size.
    """

    def __init__(self, name: str, model: PreTrainedModel, processor, image_size: int, dtype: str = "float32"):
        config = model.config
        patch_size, depth = _side(getattr(config, "patch_size", None)), getattr(config, "num_hidden_layers", None)
        lists = [part for part in model.modules() if isinstance(part, nn.ModuleList) and len(part) == depth]
        if patch_size is None or not lists:
            raise ValueError(
                f"{name} is a {type(model).__name__}, whose configuration does not name the square patches and the "
                "blocks of a Vision Transformer; only these can be evaluated."
            )
        self.processor = processor
        known = inspect.signature(type(model).forward).parameters
        self.masks = "noise" in known and hasattr(config, "mask_ratio")
        self.interpolates = "interpolate_pos_encoding" in known and image_size != _side(config.image_size)
        if getattr(model, "pooler", None) is not None:  # features are pooled here; its weights may be missing
            model.pooler = None
        differences = {key: value for key, value in config.to_diff_dict().items() if key not in ABOUT_THE_FILE}
        super().__init__(
            name,
            model,
            lists[0],
            library="transformers",
            architecture={"class": type(model).__name__} | differences,
            image_size=image_size,
            patch_size=patch_size,
            dim=config.hidden_size,
            mean=processor.image_mean,
            std=processor.image_std,
            dtype=dtype,
        )

    def forward(self, pixel_values: torch.Tensor, sample_ids: torch.Tensor) -> torch.Tensor:
        options = {"interpolate_pos_encoding": True} if self.interpolates else {}
        if self.masks:
            num_patches = (self.image_size // self.patch_size) ** 2
            order = torch.arange(num_patches, device=pixel_values.device, dtype=torch.float32)
            options["noise"] = order.expand(len(pixel_values), -1)
        with self._whole_images():
            return self.model(pixel_values.to(self.weights_dtype), **options).last_hidden_state

    @contextmanager
    def _whole_images(self) -> Iterator[None]:
        """Within it no patch is masked; the model may be one that is being trained with its own ratio."""
        if not self.masks:
            yield
            return
        config = self.model.config
        ratio, config.mask_ratio = config.mask_ratio, 0.0
        try:
            yield
        finally:
            config.mask_ratio = ratio

    def untrained(self, seed: int) -> "TransformersEncoder":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = type(self.model)(deepcopy(self.model.config))
        keep_fixed_parameters(self.model, model)
        model = model.to(self.device, self.weights_dtype).eval()
        return TransformersEncoder("untrained encoder", model, self.processor, self.image_size, self.dtype)


def load_transformers(
    source: str | Path | PreTrainedModel,
    processor=None,
    *,
    image_size: int | None = None,
    dtype: str = "float32",
    device: str | torch.device | None = None,
) -> TransformersEncoder:
    """An encoder of transformers.

    Args:
        source: a folder, a name on the Hub, or a model in evaluation mode; of a head the encoder is taken.
        processor: a folder or a name with a `preprocessor_config.json`, by default `source`; or, for a model, anything
            with `image_size`, `image_mean` and `image_std`.
        image_size: of the crops; default the processor's. device: as for [`open_encoder`].

    Raises:
        ValueError: weights that are missing, superfluous, or kept as a pickle; and what [`TransformersEncoder`] raises.
    """
    if isinstance(source, PreTrainedModel):
        if processor is None:
            raise ValueError("A loaded model needs its processor too; load both from the same folder and give both.")
        name, model = "encoder", source.base_model
    else:
        name, model = str(source), _load_model(source)
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if processor is None or isinstance(processor, str | Path):
        processor = _read_processor(source if processor is None else processor)
    model = model if device is None else model.to(device)
    return TransformersEncoder(name, model, processor, image_size or processor.image_size, dtype)


def _load_model(source: str | Path) -> PreTrainedModel:
    folder = Path(source)
    if folder.is_dir() and not any(folder.glob("*.safetensors")):
        pickles = sorted(file.name for kind in ("*.bin", "*.pth", "*.pt") for file in folder.glob(kind))
        advice = f"; ldae weights convert {folder / pickles[0]} --output {folder / 'model.safetensors'}" * bool(pickles)
        raise ValueError(f"{source} holds no weights in safetensors, and pickles are not read{advice}.")
    options = dict(trust_remote_code=False, use_safetensors=True, dtype=torch.float32, output_loading_info=True)
    # transformers only warns, and goes on with random weights; what is amiss is judged here.
    try:
        with quietly(), _without_warnings():
            config = AutoConfig.from_pretrained(source, trust_remote_code=False)
            model, found = AutoModel.from_pretrained(source, config=config, **options)
    except SafetensorError as error:
        raise ValueError(f"The weights of {source} are damaged ({error}); copy or download them again.") from error
    missing = sorted(key for key in found["missing_keys"] if not key.startswith("pooler."))
    unexpected = sorted(key for key in found["unexpected_keys"] if not key.startswith(HEADS))
    refuse_other_weights(source, type(model).__name__, missing, unexpected)
    return model.eval()


@contextmanager
def _without_warnings() -> Iterator[None]:
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)


def _read_processor(source: str | Path) -> SimpleNamespace:
    """Mean, standard deviation and crop size out of a preprocessor_config.json. Resizing and cropping are ours."""
    settings, _ = BaseImageProcessor.get_image_processor_dict(source)
    size = settings.get("crop_size") if settings.get("do_center_crop", True) else None
    size = _side(size or settings.get("size"))
    if size is None:
        raise ValueError(f"{source}: its preprocessor_config.json names no square size of images; give an image_size.")
    normalized = settings.get("do_normalize", True)
    mean, std = (
        settings.get(key) if normalized else value
        for key, value in (("image_mean", 3 * [0.0]), ("image_std", 3 * [1.0]))
    )
    if not mean or not std or abs(settings.get("rescale_factor", 1 / 255) * 255 - 1) > 1e-6:
        raise ValueError(f"{source}: its preprocessor_config.json does not normalise pixels in 0...1 by mean and std.")
    return SimpleNamespace(image_size=size, image_mean=mean, image_std=std)


def _side(size) -> int | None:
    """The side of a square, out of the forms in which configurations state it; None if it is none."""
    if isinstance(size, dict):
        size = [size["shortest_edge"]] if "shortest_edge" in size else [size.get("height"), size.get("width")]
    if isinstance(size, list | tuple):
        size = size[0] if len(set(size)) == 1 else None
    return size if isinstance(size, int) else None
