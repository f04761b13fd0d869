"""`ldae push`."""

from pathlib import Path
from typing import Annotated

import typer


def push(
    source: Annotated[Path, typer.Argument(help="A run's folder, finished or not, a checkpoint's, or an encoder's.")],
    repo_id: Annotated[str, typer.Argument(help="The repository, OWNER/NAME; it is made if it is not there.")],
    private: Annotated[bool, typer.Option("--private", help="A repository that is made is private.")] = False,
    revision: Annotated[str | None, typer.Option(help="The branch; default main.")] = None,
    ledger: Annotated[
        Path | None, typer.Option(help="JSON lines that --ledger wrote; the card shows those of this model.")
    ] = None,
    pictures: Annotated[
        bool, typer.Option(help="With the newest picture of the run, which shows images of the data set.")
    ] = True,
    dry_run: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Write the repository to this folder, and push nothing.")
    ] = None,
):
    """Publish a model as one repository: encoder, stock ViTs, what it takes to train on, results, card.

    \b
      AutoModel.from_pretrained("OWNER/NAME")                   after import ldae_hf, or with trust_remote_code
      AutoModel.from_pretrained("OWNER/NAME", subfolder="vit")  everywhere: transformers' own ViT, nothing to install
      ldae pretrain … --start-from OWNER/NAME                   trains on

    Log in with `hf auth login`, or set HF_TOKEN. Broken off, the same command goes on with what is missing. A card that
    was edited on the Hub is replaced; its history keeps it.

    \b
    ldae push runs/mine you/your-encoder --private
    ldae push runs/mine you/your-encoder --ledger results.jsonl
    ldae push runs/mine you/your-encoder --dry-run published
    """
    from ldae_hf.repository import build_repository, push_repository

    rows = ()
    if ledger is not None:
        from ldae_hf.evaluation.ledger import read_ledger

        if not ledger.is_file():
            raise ValueError(f"There is no ledger {ledger}.")
        rows = read_ledger(ledger)
    options = dict(rows=rows, pictures=pictures)
    typer.echo(f"{source}: folding, exporting, comparing; a large model takes minutes", err=True)
    if dry_run is not None:
        typer.echo(build_repository(source, dry_run, repo_id=repo_id, **options))
    else:
        typer.echo(push_repository(source, repo_id, private=private, revision=revision, **options))
