"""The command line. What commands do lives in the modules they call, which they import when they run."""

from __future__ import annotations

import errno
import signal
import sys
from typing import Annotated

import typer
from rich.markup import escape

from lagless._version import __version__
from lagless.cli._average import average, inspect_command
from lagless.cli._choose import choose
from lagless.cli._console import err, out
from lagless.cli._demo import demo
from lagless.cli._evaluate import evaluate
from lagless.cli._learn import learn_command
from lagless.cli._push import push
from lagless.cli._report import report
from lagless.cli._theory import app as theory
from lagless.cli._train import recipes, sweep, train
from lagless.cli._tune import tune_command
from lagless.cli._watch import watch_command

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Train for the model you return: averaged weights without the lag.",
)
app.command("demo")(demo)
app.command("average")(average)
app.command("inspect")(inspect_command)
app.command("push")(push)
app.command("choose")(choose)
app.command("report")(report)
app.command("recipes")(recipes)
app.command("train")(train)
app.command("sweep")(sweep)
app.command("evaluate")(evaluate)
app.command("tune")(tune_command)
app.command("learn")(learn_command)
app.command("watch")(watch_command)
app.add_typer(theory, name="theory")


def main() -> None:
    """Run the command line. Bad input ends with one line on standard error and exit code 2."""
    signal.signal(signal.SIGTERM, _terminate)  # so that what is half-written is removed, as after Ctrl-C
    try:
        app()
    except Exception as error:
        if not isinstance(error, _bad_input()):
            raise
        err.print(f"[bold red]error:[/] {escape(_line(error))}", highlight=False)
        sys.exit(2)


def _bad_input() -> tuple[type[Exception], ...]:
    """Errors that are about what the user gave. Those of libraries that are not loaded cannot have been raised."""
    theirs = {
        "lagless.checkpoints": "CheckpointError",
        "lagless.execution": "RankError",
        "safetensors": "SafetensorError",
    }
    loaded = [getattr(sys.modules[module], name) for module, name in theirs.items() if module in sys.modules]
    return (ValueError, OSError, ImportError, *loaded)


def _line(error: Exception) -> str:
    text = " ".join(line.strip() for line in str(error).splitlines()) or type(error).__name__
    if getattr(error, "errno", None) == errno.ENOSPC or "No space left" in text:
        text = f"the disk is full ({text}). Free some space, or choose another output folder; nothing was kept."
    return text


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
