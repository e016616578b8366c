"""The command line. What commands do lives in the modules they call."""

from __future__ import annotations

import errno
import signal
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from safetensors import SafetensorError

from lagless._version import __version__
from lagless.checkpoints import CheckpointError
from lagless.cli import _theory
from lagless.cli._checkpoints import average, inspect_command
from lagless.cli._console import err, out
from lagless.cli._evaluate import evaluate, tune_command
from lagless.cli._report import report
from lagless.cli._train import recipes, sweep, train
from lagless.execution import RankError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Train for the model you return: averaged weights without the lag.",
)
app.command("average")(average)
app.command("inspect")(inspect_command)
app.command("report")(report)
app.command("recipes")(recipes)
app.command("train")(train)
app.command("sweep")(sweep)
app.command("evaluate")(evaluate)
app.command("tune")(tune_command)
app.add_typer(_theory.app, name="theory")


def main() -> None:
    """Entry point: bad input ends with a message on standard error and exit code 2."""
    signal.signal(signal.SIGTERM, _terminate)  # so that what is half-written is removed, as after Ctrl-C
    try:
        app()
    except (CheckpointError, RankError, ValueError, OSError, ImportError, SafetensorError) as error:
        text = str(error)
        if getattr(error, "errno", None) == errno.ENOSPC or "No space left" in text:
            text = f"the disk is full ({text}). Free some space, or choose another output folder; nothing was kept."
        err.print(f"[bold red]error:[/] {escape(text)}", highlight=False)
        sys.exit(2)


def _terminate(*_: object) -> None:
    sys.exit(143)


def _version(show: bool) -> None:
    if show:
        out.print(f"lagless {__version__}", highlight=False)
        raise typer.Exit


@app.callback()
def _lagless(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
) -> None:
    """Train for the model you return: averaged weights without the lag."""


@app.command()
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
