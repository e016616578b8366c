"""Losses passed on to experiment trackers, through the libraries that users have for them."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

Close = Callable[[], None]
_NOT_MEASURED = ("time", "step", "name", "event", "text", "seconds", "n")


class Writer:
    """Writes what is measured under ``eval/NAME/loss``; a sink of a watch.

    Args:
        kind: one of :data:`WRITERS`.
        run: the run folder, after which the tracker's run is named.
        out: the output folder, for trackers that keep files.

    Raises:
        ImportError: if the library is not installed.
    """

    def __init__(self, kind: str, run: Path, out: Path) -> None:
        if kind not in WRITERS:
            raise ValueError(f"--log {kind!r}; there are {', '.join(WRITERS)}.")
        module, make = WRITERS[kind]
        try:
            library = importlib.import_module(module)
        except ImportError as error:
            package = "tensorboard" if kind == "tensorboard" else kind
            raise ImportError(f"lagless watch --log {kind} needs {package}: pip install {package}") from error
        self._log, self._close = make(library, run, out)

    def __call__(self, row: dict[str, Any]) -> None:
        """Pass a row on, if it is a measurement."""
        if row.get("event") or "name" not in row:
            return
        numbers = {
            f"eval/{row['name']}/{key}": float(value)
            for key, value in row.items()
            if key not in _NOT_MEASURED and isinstance(value, int | float) and not isinstance(value, bool)
        }
        if numbers:
            self._log(numbers, row["step"])

    def close(self) -> None:
        """Finish writing."""
        self._close()


Made = tuple[Callable[[dict[str, float], int], None], Close]


def _tensorboard(library: Any, run: Path, out: Path) -> Made:
    writer = library.SummaryWriter(str(out / "tensorboard"))

    def log(numbers: dict[str, float], step: int) -> None:
        for name, value in numbers.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    return log, writer.close


def _wandb(library: Any, run: Path, out: Path) -> Made:
    started = library.init(project="lagless-watch", name=run.name, dir=str(out), resume="allow")
    # W&B's own step only grows, and averages of a run that went back come with smaller ones.
    started.define_metric("train_step")
    started.define_metric("eval/*", step_metric="train_step")
    return lambda numbers, step: started.log({**numbers, "train_step": step}), started.finish


def _mlflow(library: Any, run: Path, out: Path) -> Made:
    library.start_run(run_name=run.name)
    return lambda numbers, step: library.log_metrics(numbers, step=step), library.end_run


def _trackio(library: Any, run: Path, out: Path) -> Made:
    started = library.init(project="lagless-watch", name=run.name)
    return lambda numbers, step: started.log(numbers, step=step), started.finish


WRITERS: dict[str, tuple[str, Callable[[Any, Path, Path], Made]]] = {
    "tensorboard": ("torch.utils.tensorboard", _tensorboard),
    "wandb": ("wandb", _wandb),
    "mlflow": ("mlflow", _mlflow),
    "trackio": ("trackio", _trackio),
}
"""By name: the module, and what makes a function that logs and one that finishes."""
