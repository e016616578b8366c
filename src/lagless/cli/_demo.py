"""``lagless demo``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lagless.cli._console import out


def demo(
    output: Annotated[Path, typer.Option("--out", "-o", metavar="OUT", help="Folder to make.")] = Path("lagless-demo"),
    steps: Annotated[int, typer.Option(help="Optimizer steps; everything else scales with them.")] = 2000,
    seed: Annotated[int, typer.Option(help="Seed of initialisation, data order and samples.")] = 0,
    data: Annotated[
        list[Path] | None, typer.Option(help="Text file to train on; may be repeated. Default: Python's own library.")
    ] = None,
    files: Annotated[list[Path] | None, typer.Argument(metavar="[FILE]...", help="More text files.")] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace OUT.")] = False,
) -> None:
    """Train a small Llama from scratch, follow it with averages, and report what they did. Takes a few minutes."""
    from lagless.lab.demo import run_demo

    if files and not data:
        raise ValueError(f"{files[0]}: text files come after --data.")
    run_demo(output, steps=steps, seed=seed, data=[*(data or []), *(files or [])], overwrite=overwrite, console=out)
