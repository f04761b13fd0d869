"""Pre-training with Accelerate: data, the PCA of a run, the loop, checkpoints. Needs the `train` extra."""

from .checkpointing import checkpoints
from .data import eval_loader, load_images
from .pretrain import Evaluation, pretrain
from .session import EXIT_CODE, Interrupted, RunError
from .tokenizers import train_tokenizer


__all__ = [
    "EXIT_CODE",
    "Evaluation",
    "Interrupted",
    "RunError",
    "checkpoints",
    "eval_loader",
    "load_images",
    "pretrain",
    "train_tokenizer",
]
