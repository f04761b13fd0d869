"""How much a frozen encoder knows of the classes of any labelled data set, next to the floors that need no training.

    python examples/linear_probe.py --dataset cifar10
    python examples/linear_probe.py --dataset path/to/imagefolder --train-split "train[:5000]" --epochs 30

A linear layer on the standardised mean over tokens of cached features, its learning rate chosen on held-out training
images. The same from the command line: ldae probe.
"""

from pathlib import Path

import typer

from ldae_hf.evaluation.ledger import result_table
from ldae_hf.evaluation.tasks import run_linear_probe


def probe(
    dataset: str = "cifar10",
    train_split: str = "train",
    test_split: str = "test",
    encoder: str = "model_cards/ldae-cifar10",
    epochs: int = 90,
    output: Path = Path("probe.json"),
):
    """Print top-1 accuracies in percent, and write them with the protocol."""
    splits = dict(train_split=train_split, test_split=test_split)
    result = run_linear_probe(encoder, dataset, epochs=epochs, output=output, **splits)
    typer.echo(result_table(result))
    typer.echo(f"{output}: the same with protocol, machine and versions")


if __name__ == "__main__":
    typer.run(probe)
