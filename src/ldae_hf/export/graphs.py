"""A folded encoder as a graph, for images of any number and size: ONNX on the disk, torch.export in memory.

    import onnxruntime
    session = onnxruntime.InferenceSession("FOLDER/model.onnx")
    features, pooled = session.run(None, {"pixel_values": processor(images, return_tensors="np")["pixel_values"]})

The graph takes `pixel_values` (batch, C, height, width) in float32 and gives `last_hidden_state` (batch, N, D) and
`pooler_output` (batch, D), its mean over tokens; of a classifier `logits` (batch, num_labels). Positions of another
grid of patches are resized inside it. As in every convolution, pixels beyond whole patches do not count.
"""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import torch

from ..image_processing_ldae import LDAEImageProcessor
from ..modeling_ldae import LDAEForImageClassification, LDAEModel
from .folding import FoldedViT, fold
from .transformers_vit import ijepa_config, stock_processor


ONNX_FILE = "model.onnx"
OPSET = 18  # the first whose Resize and LayerNormalization say all that is needed: runs on ONNX Runtime 1.14 and later


def export_program(
    model: LDAEModel | LDAEForImageClassification, timestep: int | None = None
) -> torch.export.ExportedProgram:
    """[`fold`] as a graph of torch.export: `export_program(model).module()(pixel_values)`.

    Any batch size, and any size of at least two patches each way. What `torch.export.save` writes holds a pickle, so
    this package neither writes nor reads such files; on the disk there is ONNX.

    Raises:
        ValueError: what [`fold`] raises.
    """
    return program_of(fold(model, timestep))


def program_of(folded: FoldedViT) -> torch.export.ExportedProgram:
    """A folded model as a graph, whose batch, rows and columns of patches may change."""
    size = folded.config.patch_size
    rows, columns = torch.export.Dim("rows", min=1), torch.export.Dim("columns", min=1)
    shapes = {"pixel_values": {0: torch.export.Dim("batch", min=1), 2: size * rows, 3: size * columns}}
    # No length is 1 or equal to another: the exporter would take that for a rule.
    example = torch.zeros(2, folded.config.num_channels, 3 * size, 4 * size, dtype=folded.norm.weight.dtype)
    with quiet_exporter():
        return torch.export.export(folded, (example,), dynamic_shapes=shapes)


def write_onnx(
    folder: str | Path,
    model: LDAEModel | LDAEForImageClassification,
    processor: LDAEImageProcessor,
    timestep: int | None = None,
) -> None:
    """Writes model.onnx and the stock config.json and preprocessor_config.json of `write_transformers` into a folder.

    Raises:
        ValueError: what [`fold`] raises, the graph would exceed the 2 GiB that a single file can hold, or onnx is not
            installed.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_onnx_file(folder / ONNX_FILE, fold(model, timestep, torch.float32))
    config = ijepa_config(model.config)
    config.save_pretrained(folder)  # with the names of the classes
    stock_processor(processor).save_pretrained(folder)


def write_onnx_file(file: Path, folded: FoldedViT) -> None:
    """Writes a folded model in float32 as one ONNX file."""
    require("onnx", "onnxscript")
    import onnx

    size = sum(value.numel() * value.element_size() for value in folded.parameters())
    if size > 2**31 - 2**24:
        raise ValueError(f"One ONNX file holds at most 2 GiB, and these weights have {size / 2**30:.1f} GiB.")
    with quiet_exporter():
        names = dict(input_names=["pixel_values"], output_names=list(folded.output_names))
        graph = torch.onnx.export(program_of(folded), opset_version=OPSET, verbose=False, **names).model_proto
    for node in graph.graph.node:  # each says where in whose home folder it comes from
        del node.metadata_props[:]
    onnx.checker.check_model(graph)
    onnx.save(graph, file)


def require(*packages: str) -> None:
    """Raises ValueError unless these packages of the extra `export` are installed."""
    if missing := [package for package in packages if find_spec(package) is None]:
        raise ValueError(f"ONNX needs {' and '.join(missing)}, not installed here; install ldae-hf's extra `export`.")


@contextmanager
def quiet_exporter() -> Iterator[None]:
    """Without what the exporter says of torchvision's absence and of its own deprecated calls."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        logger.setLevel(level)
