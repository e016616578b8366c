"""``lagless report``: what the studies found."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lagless.cli._console import out


def report(
    studies: Annotated[
        list[Path] | None, typer.Argument(help="Study files, or folders of them; by default experiments/results.")
    ] = None,
    folder: Annotated[
        Path, typer.Option("--out", "-o", help="Where report.html and a Markdown table per study go.")
    ] = Path("report"),
) -> None:
    """Compare the methods of studies by the rule stated in them, and write the report."""
    from lagless.lab.report import load_study, write_reports

    given = studies or [Path("experiments/results")]
    files = [file for path in given for file in (sorted(path.glob("*.json")) if path.is_dir() else [path])]
    if not files:
        raise ValueError(f"no study in {', '.join(map(str, given))}; give the JSON files of studies.")
    page = write_reports([load_study(file) for file in files], folder)
    out.print(f"{len(files)} studies: {page}", highlight=False)
