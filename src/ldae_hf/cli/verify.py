"""`ldae verify`."""

from pathlib import Path
from typing import Annotated

import typer


def verify(
    source: Annotated[
        str,
        typer.Argument(
            help="The folder of an encoder, a checkpoint, a processor, a tokenizer, a run or a repository, or a "
            "repository's name on the Hub."
        ),
    ],
    revision: Annotated[str | None, typer.Option(help="Of a repository on the Hub; default main.")] = None,
    dtype: Annotated[str, typer.Option(help="Precision of the features: float32 or bfloat16.")] = "float32",
):
    """Check that a folder or a repository holds what was written, loads again as it was, and computes what it did.

    \b
      hashes    every file has the sha256 that the manifest notes, and the manifest its own
      weights   the model loads, and every tensor is the file's, bit for bit
      tables    noise schedule and positions are those of the configuration
      basis     the PCA in the weights is the processor's, and a learned tokenizer the one beside it
      features  of fixed images they are what they were: within 1e-3 in float32, 2e-2 in bfloat16
      recipe    recipe.json describes the model
      average   the moving average is one of the model's parameters
      finite    no NaN, no infinity, in the optimizer and the EMA neither

    Of a published repository vit/, timm/ and pretraining/ with its scheduler are looked at too.

    \b
    ldae verify runs/mine
    ldae verify you/your-encoder
    ldae verify runs/mine/encoder --dtype bfloat16

    Exit code 0: nothing has failed. 1: something has. 2: there is no such folder or repository.
    """
    from ldae_hf.verify import FAILED, verify

    folder = Path(source)
    if not folder.is_dir():
        from ldae_hf.hub import fetch

        try:
            folder = fetch(source, revision=revision)
        except (ValueError, OSError) as error:
            raise ValueError(f"There is no folder {source}, and from the Hub: {error}") from error
    checks = verify(folder, dtype)
    for check in checks:
        status = "FAILED" if check.status == FAILED else check.status
        where = "" if check.folder == folder else f"{check.folder.relative_to(folder)}  "
        typer.echo(f"{status:11}  {where}{check.name}: {check.detail}")
    failed = sum(check.status == FAILED for check in checks)
    folders = len({check.folder for check in checks})
    typer.echo(f"{source}: {folders} {'folder' if folders == 1 else 'folders'}, {len(checks)} checks, {failed} failed")
    raise typer.Exit(1 if failed else 0)
