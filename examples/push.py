"""A trained model to the Hub, and back.

    python examples/push.py runs/mine you/your-encoder --ledger results.jsonl

Builds one repository of a run (the encoder, the same folded into stock classes of transformers and timm, what it takes
to train on, results, card), uploads it, and loads it by its name. `hf auth login` or HF_TOKEN says who you are. The
same from the command line: ldae push; while a run trains: ldae pretrain … --push-to-hub you/your-encoder.
"""

from pathlib import Path

import typer
from transformers import AutoModel

import ldae_hf  # noqa: F401 (AutoModel knows l-DAE then)
from ldae_hf.evaluation.ledger import read_ledger
from ldae_hf.repository import push_repository


def push(source: Path, repo_id: str, ledger: Path | None = None, private: bool = False):
    """Publish a run, or an encoder, with its rows of a ledger on the card."""
    rows = read_ledger(ledger) if ledger else []
    typer.echo(push_repository(source, repo_id, rows=rows, private=private))

    encoder = AutoModel.from_pretrained(repo_id)
    stock = AutoModel.from_pretrained(repo_id, subfolder="vit")  # needs no ldae_hf
    for model in (encoder, stock):
        parameters = sum(parameter.numel() for parameter in model.parameters())
        typer.echo(f"{repo_id}: {type(model).__name__}, {parameters / 1e6:.1f}M parameters")


if __name__ == "__main__":
    typer.run(push)
