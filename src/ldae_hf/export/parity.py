"""How far each export is from the model, measured in this process with the libraries that are installed in it."""

import copy
import json
import tempfile
from collections.abc import Callable, Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from ..configuration_ldae import LDAEConfig
from ..image_processing_ldae import LDAEImageProcessor
from ..manifest import write_text
from ..modeling_ldae import LDAEForImageClassification, LDAEModel
from .folding import FoldedViT, check_foldable, fold
from .graphs import ONNX_FILE, program_of, require, write_onnx_file
from .timm_vit import timm_arguments, timm_state_dict, write_timm
from .transformers_vit import stock_of, write_transformers


TOLERANCE = 1e-5  # of float32, relative to the largest value of the model's answer
EXPORTS = "exports.json"

Forward = Callable[[torch.Tensor], torch.Tensor]  # (B,C,H,W) -> features (B,N,D), of a classifier logits


class NotMeasured(Exception):
    """A target that cannot be tried here; the message says why."""


def write_exports(
    folder: str | Path, model: LDAEModel | LDAEForImageClassification, processor: LDAEImageProcessor
) -> list[dict]:
    """Writes `vit/` and `timm/` (where timm has the model's parts) into a folder, and their [`parity`] as exports.json.

    Returns:
        The rows of exports.json.

    Raises:
        ValueError: what [`fold`] raises; then nothing is written.
    """
    folder = Path(folder)
    check_foldable(model)
    write_transformers(folder / "vit", model, processor)
    try:
        timm_arguments(model.config)
    except ValueError:  # the row of timm says why
        pass
    else:
        write_timm(folder / "timm", model, processor)
    rows = parity(model)
    write_text(folder / EXPORTS, json.dumps(rows, indent=2) + "\n")
    return rows


@torch.no_grad()
def parity(
    model: LDAEModel | LDAEForImageClassification, timestep: int | None = None, targets: Iterable[str] | None = None
) -> list[dict]:
    """Each export's answer against the unfolded model's in float32 on the CPU, for a few images of two or three sizes.

    Args:
        timestep: as [`fold`] takes it.
        targets: some of `transformers`, `timm`, `onnx`, `torch.export`; default all.

    Returns:
        Per target and size a row: `target`, `output` (`last_hidden_state` or `logits`), `size` [height, width],
        `batch`, `relative_difference` (the largest difference over the largest value), `tolerance`, `versions` of the
        packages. For a target that cannot be tried here one row with `target` and `not_measured`, the reason.

    Raises:
        ValueError: what [`fold`] raises.
    """
    folded = fold(model, timestep, torch.float32)
    output = folded.output_names[0]
    reference = copy.deepcopy(model).to("cpu", torch.float32).eval()
    options = {} if timestep is None else {"timesteps": timestep}
    asked = [(pixel_values, reference(pixel_values, **options)[output]) for pixel_values in images_of(model.config)]
    rows = []
    for target in TARGETS if targets is None else targets:
        build, packages = TARGETS[target]
        try:
            forward = build(folded)
        except NotMeasured as reason:
            rows.append({"target": target, "not_measured": str(reason)})
            continue
        versions = {package: version_of(package) for package in packages}
        for pixel_values, expected in asked:
            if not takes(target, pixel_values, model.config):
                continue
            found = forward(pixel_values)
            rows.append(
                {
                    "target": target,
                    "output": output,
                    "size": list(pixel_values.shape[2:]),
                    "batch": len(pixel_values),
                    "relative_difference": relative_difference(found, expected),
                    "tolerance": TOLERANCE,
                    "versions": versions,
                }
            )
    return rows


def relative_difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference over the largest value; the difference itself where all values are 0."""
    return ((found - expected).abs().max() / (expected.abs().max() or 1)).item()


def images_of(config: LDAEConfig) -> list[torch.Tensor]:
    """Uniform noise in [-1, 1]: two images of the training size, a wider one, and three flatter ones."""
    generator, side = torch.Generator().manual_seed(0), config.image_size // config.patch_size
    grids = dict.fromkeys([(2, side, side), (1, side, side + max(1, side // 2)), (3, max(2, side // 2), side)])
    shapes = [(batch, config.num_channels, *(config.patch_size * n for n in grid)) for batch, *grid in grids]
    return [torch.rand(shape, generator=generator) * 2 - 1 for shape in shapes]


def takes(target: str, pixel_values: torch.Tensor, config: LDAEConfig) -> bool:
    """Whether a target is meant for images of this size."""
    height, width = pixel_values.shape[2:]
    if target == "timm":  # which resizes positions in its own way
        return height == width == config.image_size
    return target != "torch.export" or min(height, width) > config.patch_size


# ---- targets: a folded model -> its answer through the other library


def through_transformers(folded: FoldedViT) -> Forward:
    stock = stock_of(folded)
    side = folded.config.image_size

    def forward(pixel_values):
        resized = tuple(pixel_values.shape[2:]) != (side, side)
        return stock(pixel_values, interpolate_pos_encoding=resized)[folded.output_names[0]]

    return forward


def through_timm(folded: FoldedViT) -> Forward:
    try:
        arguments = timm_arguments(folded.config)
        from timm.models.vision_transformer import VisionTransformer
    except ImportError as error:
        raise NotMeasured(f"timm cannot be imported here: {error}") from error
    except (ValueError, RuntimeError) as error:  # no such part; or a torchvision that was built for another torch
        raise NotMeasured(str(error)) from error
    state_dict = timm_state_dict(folded)
    classes = len(state_dict.get("head.bias", ()))
    with torch.device("meta"):
        model = VisionTransformer(**arguments, num_classes=classes)
    model.load_state_dict(state_dict, strict=True, assign=True)
    return model.eval() if classes else model.eval().forward_features


def through_onnx(folded: FoldedViT) -> Forward:
    try:
        require("onnx", "onnxscript", "onnxruntime")
    except ValueError as error:
        raise NotMeasured(str(error)) from error
    import onnxruntime

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / ONNX_FILE
        write_onnx_file(file, folded)
        session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    return lambda pixel_values: torch.from_numpy(session.run(None, {"pixel_values": pixel_values.numpy()})[0])


def through_torch_export(folded: FoldedViT) -> Forward:
    module = program_of(folded).module()
    return lambda pixel_values: module(pixel_values)[0]


TARGETS = {
    "transformers": (through_transformers, ("torch", "transformers")),
    "timm": (through_timm, ("torch", "timm")),
    "onnx": (through_onnx, ("onnx", "onnxruntime")),
    "torch.export": (through_torch_export, ("torch",)),
}


def version_of(package: str) -> str:
    """The version that is installed."""
    try:
        return version(package)
    except PackageNotFoundError:  # its code is found, but nothing that says what it is
        return "unknown"


def parity_text(rows: list[dict]) -> str:
    """The rows, one line each."""
    lines = []
    for row in rows:
        if reason := row.get("not_measured"):
            lines.append(f"{row['target']}: not measured: {reason}")
            continue
        compared = f"{row['batch']} x {row['size'][0]}x{row['size'][1]} px"
        far = f", more than {row['tolerance']:g}" if not row["relative_difference"] <= row["tolerance"] else ""
        lines.append(f"{row['target']}: {row['output']} of {compared} within {row['relative_difference']:.1e}{far}")
    return "\n".join(lines)
