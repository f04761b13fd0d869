"""`ldae card`."""

from pathlib import Path
from typing import Annotated

import typer


def card(
    folders: Annotated[
        list[Path], typer.Argument(help="Folders of models, or named as a planned checkpoint: model_cards/ldae-vit-l.")
    ],
    repo_id: Annotated[str | None, typer.Option(help="OWNER/NAME on the Hub, if the model is there.")] = None,
    ledger: Annotated[
        Path | None,
        typer.Option(help="Results, of which each model's own are shown; default benchmarks/results/ledger.jsonl."),
    ] = None,
):
    """Write the cards of models anew, from what lies in their folders and the rows of a ledger.

    Writes README.md, results.jsonl and .eval_results/. What people have written into a README.md is replaced.

    \b
    ldae card model_cards/ldae-*
    ldae card published --repo-id you/your-encoder --ledger results.jsonl
    """
    from ldae_hf.cards import CARD, write_card
    from ldae_hf.evaluation.ledger import LEDGER, read_ledger

    if ledger is not None and not ledger.is_file():
        raise ValueError(f"There is no ledger {ledger}.")
    if repo_id is not None and len(folders) > 1:
        raise ValueError("One --repo-id is for one folder; give one.")
    rows = read_ledger(ledger or LEDGER)
    for folder in folders:
        write_card(folder, repo_id, rows)
        typer.echo(folder / CARD)
