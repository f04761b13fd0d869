"""`ldae download`."""

from pathlib import Path
from typing import Annotated

import typer


def download(
    name: Annotated[str, typer.Argument(help="A repository on the Hub, OWNER/NAME, or one of our bare names.")],
    folder: Annotated[Path | None, typer.Argument(help="A new folder. Default: NAME, here.")] = None,
    revision: Annotated[str | None, typer.Option(help="A branch, a tag or a commit; default main.")] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(metavar="PATTERN", help="Only files that match, as 'vit/*' or '*.json'; may be repeated."),
    ] = None,
):
    """Make a folder of a model on the Hub: whole or not at all, and nothing in it is run or unpickled.

    A local folder comes first wherever a name is read, so that afterwards the same name works without a network.

    \b
    ldae download ldae-vit-l                              of LDAE_HUB_OWNER, if that is set
    ldae download you/your-encoder encoders/mine --revision v2
    ldae download you/your-encoder --only 'vit/*'
    """
    from ldae_hf.hub import check_repo_id, download

    check_repo_id(name)
    typer.echo(download(name, folder or Path(name.split("/")[-1]), revision=revision, allow_patterns=only))
