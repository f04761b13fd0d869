"""Vision Transformers of timm, which is not installed with this package: pip install timm."""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from transformers.utils import cached_file

from .stock import StockEncoder, keep_fixed_parameters, refuse_other_weights


PREFIX = "timm:"
# How the checkpoints of MoCo v3 (github.com/facebookresearch/moco-v3) name their weights: pre-training, linear probe.
WRAPPERS = ("module.base_encoder.", "module.")
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
MOCO_SMALL = 384  # the width of its ViT-S, which has 12 heads where timm's has 6


class TimmEncoder(StockEncoder):
    """An encoder of timm, without its head.

    Args:
        architecture: timm's name for it, without a tag. arguments: of `timm.create_model`.
        image_size: of the crops; positions are resized by timm where it is not that of the model.

    Raises:
        ValueError: the model is no Vision Transformer, or cannot take images of this size.
    """

    def __init__(
        self, name: str, model: nn.Module, architecture: str, arguments: dict, image_size: int, mean, std, dtype: str
    ):
        blocks, patches = getattr(model, "blocks", None), getattr(model, "patch_embed", None)
        patch_size = getattr(patches, "patch_size", ())
        if blocks is None or len(patch_size) != 2 or patch_size[0] != patch_size[1]:
            raise ValueError(f"{name} is {architecture}, which is no Vision Transformer with square patches.")
        self.architecture, self.arguments = architecture, arguments
        super().__init__(
            name,
            model,
            blocks,
            library="timm",
            architecture={"architecture": architecture, "arguments": arguments, "image_size": image_size},
            image_size=image_size,
            patch_size=patch_size[0],
            dim=model.embed_dim,
            mean=mean,
            std=std,
            dtype=dtype,
        )

    def forward(self, pixel_values: torch.Tensor, sample_ids: torch.Tensor) -> torch.Tensor:
        return self.model.forward_features(pixel_values.to(self.weights_dtype))

    def untrained(self, seed: int) -> "TimmEncoder":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = _build(self.architecture, self.arguments)
        _resize(model, self.image_size)
        keep_fixed_parameters(self.model, model)
        model, shape = model.to(self.device).eval(), (self.architecture, self.arguments, self.image_size)
        return TimmEncoder("untrained encoder", model, *shape, self.mean, self.std, self.dtype)


def load_timm(
    source: str | Path,
    *,
    image_size: int | None = None,
    dtype: str = "float32",
    device: str | torch.device | None = None,
) -> TimmEncoder:
    """An encoder of timm.

    Args:
        source: `"timm:NAME"`, with the weights that timm has for the name; `"timm:NAME@FILE"`, with those of a
            safetensors file in timm's layout, MoCo v3's checkpoints included (`ldae weights convert` makes one of a
            `.pth`); or a folder, or a name on the Hub, in timm's format. Mean and standard deviation are those of the
            name, tag included, or of the folder; of MoCo v3 ImageNet's.
        image_size: of the crops; default the model's. device: as for [`open_encoder`].

    Raises:
        ValueError: timm is not installed or does not know the name, the weights are not those of the model or are no
            safetensors; and what [`TimmEncoder`] raises.
    """
    timm, name = _timm(source), str(source)
    if name.startswith(PREFIX):
        known, _, file = name.removeprefix(PREFIX).partition("@")
        if not timm.is_model(known):
            raise ValueError(f"timm has no model {known!r}; timm.list_models('*{known[:3]}*') names what there is.")
        settings = timm.get_pretrained_cfg(known).to_dict()
        architecture, arguments = known.partition(".")[0], {}
        file = file or _hub_file(settings["hf_hub_id"], known)
    else:
        config = json.loads(Path(cached_file(source, "config.json")).read_text())
        architecture, arguments = config["architecture"], config.get("model_args", {})
        settings, file = config.get("pretrained_cfg", config), _hub_file(source, source)
    weights, is_moco = read_weights(file, settings.get("classifier") or "head")
    mean, std = settings["mean"], settings["std"]
    if is_moco:
        mean, std = IMAGENET_MEAN, IMAGENET_STD
        if weights["pos_embed"].shape[-1] == MOCO_SMALL:
            arguments = arguments | {"num_heads": 12}
    model = _build(architecture, arguments)
    _load(model, weights, file, architecture)
    if is_moco:
        model.pos_embed.requires_grad_(False)  # as it was trained
    size = arguments.get("img_size", settings["input_size"][-1])
    if image_size not in (None, size):
        _resize(model, image_size)
    model = model.to(device or ("cuda" if torch.cuda.is_available() else "cpu")).eval()
    return TimmEncoder(name, model, architecture, arguments, image_size or size, mean, std, dtype)


def _timm(source):
    try:
        import timm
    except ImportError as error:
        raise ValueError(f"{source} is a model of timm, which is not installed; pip install timm.") from error
    return timm


def _build(architecture: str, arguments: dict) -> nn.Module:
    import timm

    return timm.create_model(architecture, pretrained=False, num_classes=0, **arguments)


def _resize(model: nn.Module, image_size: int) -> None:
    if not hasattr(model, "set_input_size"):
        raise ValueError(f"timm cannot give this {type(model).__name__} another image size than its own.")
    model.set_input_size(img_size=image_size)


def _hub_file(repository: str | Path | None, name: str | Path) -> str:
    """The weights of a folder or of a repository; only ever a safetensors file."""
    file = repository and cached_file(repository, "model.safetensors", _raise_exceptions_for_missing_entries=False)
    if not file:
        raise ValueError(
            f"There is no model.safetensors for {name}, and pickles are not read; ldae weights convert makes one of a "
            "checkpoint, to be named timm:ARCHITECTURE@FILE.safetensors."
        )
    return file


def read_weights(file: str | Path, heads: str | tuple[str, ...]) -> tuple[dict[str, torch.Tensor], bool]:
    """The weights of the encoder under timm's names, and whether they are MoCo v3's.

    A checkpoint of a linear probe is known by its fixed positions: those of its class token are zero.
    """
    if not Path(file).is_file():
        raise ValueError(f"There is no file {file} with weights.")
    try:
        weights = load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{file} is no safetensors file; ldae weights convert makes one of a checkpoint.") from error
    wrapper = next((prefix for prefix in WRAPPERS if any(name.startswith(prefix) for name in weights)), "")
    heads = tuple(f"{head}." for head in ([heads] if isinstance(heads, str) else heads))
    weights = {name.removeprefix(wrapper): value for name, value in weights.items() if name.startswith(wrapper)}
    weights = {name: value for name, value in weights.items() if not name.startswith(heads)}
    fixed = "pos_embed" in weights and not weights["pos_embed"][:, 0].any()
    return weights, wrapper == WRAPPERS[0] or (wrapper == WRAPPERS[1] and fixed)


def _load(model: nn.Module, weights: dict[str, torch.Tensor], file: str | Path, architecture: str) -> None:
    """Raises ValueError unless the weights are exactly the model's."""
    try:
        missing, unexpected = model.load_state_dict(weights, strict=False)
    except RuntimeError as error:
        raise ValueError(f"{file} is not the weights of this {architecture}: {error}") from error
    refuse_other_weights(file, architecture, missing, unexpected)
