"""The encoder without what is ours: folded at a fixed timestep into stock classes, and into graphs.

`folding` makes a plain Vision Transformer of it; `transformers_vit`, `timm_vit` and `graphs` write that in the words of
other libraries, and say how it is loaded there; `parity` measures how far each is from the model; `folders` is all of
it for a saved model.
"""

from .folders import export_folder
from .folding import fold
from .graphs import export_program, write_onnx
from .parity import parity, parity_text, write_exports
from .timm_vit import timm_state_dict, write_timm
from .transformers_vit import to_transformers, write_transformers


__all__ = [
    "export_folder",
    "export_program",
    "fold",
    "parity",
    "parity_text",
    "timm_state_dict",
    "to_transformers",
    "write_exports",
    "write_onnx",
    "write_timm",
    "write_transformers",
]
