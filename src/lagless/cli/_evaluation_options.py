"""Options that ``lagless evaluate`` and ``lagless tune`` share."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Annotated

import typer

BatchSize = Annotated[int, typer.Option(help="Sequences or responses at a time.")]
Seed = Annotated[int, typer.Option(help="Random seed for prompt selection and sampling.")]
Sequences = Annotated[int, typer.Option(help="Held-out sequences.")]
Length = Annotated[int, typer.Option(help="Most tokens of a held-out sequence.")]
Output = Annotated[Path | None, typer.Option("--output", "-o", metavar="FILE", help="JSON file to write.")]
Device = Annotated[str | None, typer.Option(help="Default: an accelerator if there is one.")]


def check_output(output: Path | None) -> None:
    """Refuse an output file whose folder does not exist, before anything is computed."""
    if output is not None and not output.parent.is_dir():
        raise ValueError(f"--output {output}: there is no folder {output.parent}.")


def require(command: str) -> None:
    """Refuse to go on without the packages that ``command`` needs."""
    for module, extra in (("transformers", "eval"), ("datasets", "eval"), ("scipy", "lab")):
        if importlib.util.find_spec(module) is None:
            raise ImportError(f"lagless {command} needs {module}: pip install 'lagless[{extra}]'")
