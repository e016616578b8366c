"""``lagless push``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lagless.cli._console import out


def push(
    folder: Annotated[Path, typer.Argument(metavar="AVERAGE", help="Folder of one average.")],
    repository: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="Repository for it; made if it is missing.")],
    private: Annotated[bool, typer.Option(help="Make a new repository private.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch to push to.")] = None,
    base_model: Annotated[
        str | None, typer.Option(help="Model on the hub that training began with, for the card.")
    ] = None,
    message: Annotated[str | None, typer.Option(help="Message of the commit.")] = None,
) -> None:
    """Upload one average, with its card and lagless.json, to a repository of its own on the Hugging Face hub."""
    from lagless.integrations.hub import push_to_hub

    address = push_to_hub(
        folder, repository, private=private or None, revision=revision, commit_message=message, base_model=base_model
    )
    out.print(f"pushed {folder} to {repository} ({address})", highlight=False, markup=False)
