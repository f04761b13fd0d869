"""Pre-training with Accelerate: data, the PCA of a run, the loop, checkpoints. Needs the `train` extra."""

from .checkpointing import checkpoints
from .data import eval_loader, load_images
from .loop import RunError
from .pretrain import Evaluation, pretrain
from .tokenizers import train_tokenizer


__all__ = ["Evaluation", "RunError", "checkpoints", "eval_loader", "load_images", "pretrain", "train_tokenizer"]
