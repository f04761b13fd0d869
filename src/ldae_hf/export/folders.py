"""A saved encoder as the folder of an export, whole or not at all."""

import json
from pathlib import Path

from ..configuration_ldae import LDAEConfig
from ..image_processing_ldae import LDAEImageProcessor
from ..manifest import write_folder, write_text
from ..modeling_ldae import LDAEForImageClassification, LDAEModel
from ..progress import quietly
from .folding import check_foldable
from .graphs import ONNX_FILE, write_onnx
from .parity import EXPORTS, parity
from .timm_vit import write_timm
from .transformers_vit import write_transformers


FORMATS = {"transformers": write_transformers, "timm": write_timm, "onnx": write_onnx}

# What to type then, without this package.
LINES = {
    "transformers": """from transformers import AutoImageProcessor, {auto_class}
model, processor = {auto_class}.from_pretrained({folder!r}), AutoImageProcessor.from_pretrained({folder!r})""",
    "timm": """import timm
model = timm.create_model({location!r}, pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))""",
    "onnx": """import onnxruntime
from transformers import AutoImageProcessor
session, processor = onnxruntime.InferenceSession({file!r}), AutoImageProcessor.from_pretrained({folder!r})""",
}


def load_foldable(source: str | Path) -> tuple[LDAEModel | LDAEForImageClassification, LDAEImageProcessor]:
    """A classifier, or of anything else the encoder, with its processor, in float32 whatever it was saved in.

    Args:
        source: a folder, or a name on the Hub.

    Raises:
        ValueError: the model does not fold, or the processor is another model's.
    """
    config = LDAEConfig.from_pretrained(source)
    is_classifier = LDAEForImageClassification.__name__ in (config.architectures or ())
    with quietly():
        model = (LDAEForImageClassification if is_classifier else LDAEModel).from_pretrained(source, dtype="float32")
    check_foldable(model)
    processor = LDAEImageProcessor.from_pretrained(source)
    model.check_processor(processor)
    return model.eval(), processor


def export_folder(
    source: str | Path, output_dir: str | Path, format: str = "transformers", timestep: int | None = None
) -> tuple[list[dict], str]:
    """Writes a saved encoder, or a classifier, folded, as a folder for another library, whole or not at all.

    Args:
        source: a folder, or a name on the Hub.
        format: `"transformers"`, `"timm"` or `"onnx"`.
        timestep: the condition; default the model's `feature_timestep`.

    Returns:
        The rows of the export's [`parity`], which are also in its exports.json, and the lines that load it.

    Raises:
        ValueError: the output exists, there is no such format, or the model does not fold.
    """
    output_dir = Path(output_dir)
    if format not in FORMATS:
        raise ValueError(f"There is no format {format!r}; choose one of {', '.join(FORMATS)}.")
    if output_dir.exists():
        raise ValueError(f"{output_dir} is there already, and nothing is written over it; name a new folder.")
    model, processor = load_foldable(source)
    rows = []

    def write(folder: Path) -> None:
        FORMATS[format](folder, model, processor, timestep)
        rows.extend(parity(model, timestep, [format]))
        write_text(folder / EXPORTS, json.dumps(rows, indent=2) + "\n")

    write_folder(output_dir, write)
    lines = LINES[format].format(
        auto_class="AutoModelForImageClassification" if isinstance(model, LDAEForImageClassification) else "AutoModel",
        folder=str(output_dir),
        location=f"local-dir:{output_dir}",
        file=str(output_dir / ONNX_FILE),
    )
    return rows, lines
