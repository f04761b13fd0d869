"""Pre-training with Accelerate: data, the PCA of a run, the loop, checkpoints. Needs the `train` extra."""

from .data import load_images
from .pretrain import Evaluation, RunError, pretrain


__all__ = ["Evaluation", "RunError", "load_images", "pretrain"]
