"""What the demo shows on the terminal while it runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class Display:
    """Progress bars; during training with the live loss and the lowest averaged loss on held-out text.

    Args:
        console: where to.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress: Progress | None = None

    @contextmanager
    def task(self, what: str, total: int | None = None) -> Iterator[Callable[[], None]]:
        """A step of the demo; yields a function to call after each of ``total`` parts."""
        columns = [TextColumn("{task.description}"), TimeElapsedColumn()]
        if total is not None:
            columns.insert(1, BarColumn(bar_width=20))
        with Progress(*columns, console=self._console) as progress:
            bar = progress.add_task(what, total=total)
            yield lambda: progress.advance(bar)

    @contextmanager
    def training(self, steps: int) -> Iterator[None]:
        """The training run; :meth:`trained` and :meth:`evaluated` may be called inside."""
        columns = (
            TextColumn("training"),
            BarColumn(bar_width=10),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[held_out]}"),
        )
        with Progress(*columns, console=self._console) as self._progress:
            self._progress.add_task("", total=steps, held_out="")
            yield
        self._progress = None

    def trained(self, step: int) -> None:
        """One more optimizer step is done."""
        if self._progress is not None:
            self._progress.update(self._progress.task_ids[0], completed=step)

    def evaluated(self, losses: Mapping[str, float]) -> None:
        """Held-out losses by name, ``"live"`` among them."""
        if self._progress is None:
            return
        averages = [loss for name, loss in losses.items() if name != "live"]
        text = f"held-out loss: live {losses['live']:.3f}"
        if averages:
            text += f", averaged {min(averages):.3f}"
        self._progress.update(self._progress.task_ids[0], held_out=text)
