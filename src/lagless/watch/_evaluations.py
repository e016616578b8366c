"""Evaluations beside the taking up: one at a time, the newest next, in a thread of their own.

Taking up checkpoints must not wait for evaluations, or rotation removes checkpoints that were never seen. What an
evaluation reads is pinned, so it does not matter what is absorbed meanwhile.
"""

from __future__ import annotations

import math
import threading
import time
from contextlib import ExitStack
from typing import Any, Protocol

from lagless.checkpoints import CheckpointError
from lagless.watch._measured import Measured
from lagless.watch._models import Models
from lagless.watch._plans import Evaluate, EvaluationError
from lagless.watch._snapshot import LIVE, Snapshot

_GRACE = 10.0  # seconds


class Told(Protocol):
    """Writes a row of the metrics."""

    def __call__(self, row: dict[str, Any], /) -> None:
        """Write it."""
        ...


class Evaluations:
    """A queue of one: what is evaluated now, and the newest that waits.

    Args:
        evaluate: measures one model.
        models: keeps the best.
        write: writes a row of the metrics.
        every: evaluate only checkpoints whose step is at least so much larger than that of the last evaluated.
    """

    def __init__(self, evaluate: Evaluate, models: Models, write: Told, every: int = 0) -> None:
        self._evaluate, self._models, self._write, self._every = evaluate, models, write, every
        self._changed, self._thread = threading.Condition(), None
        self._waiting: tuple[Snapshot, ExitStack] | None = None
        self._busy, self._closed, self._last = False, False, -1

    @property
    def stopping(self) -> bool:
        """Whether what is going on should end."""
        return self._closed

    def submit(self, snapshot: Snapshot, held: ExitStack) -> None:
        """Evaluate averages when there is time; those that waited until now are given up, which is told.

        Args:
            snapshot: the averages.
            held: closed when they are no longer needed.
        """
        if snapshot.step < self._last + self._every and self._last >= 0:
            held.close()
            return
        with self._changed:
            former, self._waiting = self._waiting, (snapshot, held)
            self._changed.notify_all()
        if former is not None:
            former[1].close()
            text = f"step {former[0].step} is not evaluated: evaluations take longer than checkpoints"
            self._write({"event": "skipped", "text": text, "step": former[0].step})
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="lagless-evaluation", daemon=True)
            self._thread.start()

    def finish(self) -> None:
        """Block until everything that waits is evaluated."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting is None and not self._busy)

    def close(self) -> None:
        """Give up what waits, and stop; what goes on in memory has a few seconds to end, a command is ended."""
        with self._changed:
            self._closed = True
            waiting, self._waiting = self._waiting, None
            self._changed.notify_all()
        if waiting is not None:
            waiting[1].close()
        if self._thread is not None:
            self._thread.join(_GRACE)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting is not None or self._closed)
                if self._closed:
                    return
                assert self._waiting is not None
                (snapshot, held), self._waiting, self._busy = self._waiting, None, True
            try:
                with held:
                    self._round(snapshot)
            finally:
                with self._changed:
                    self._busy = False
                    self._changed.notify_all()

    def _round(self, snapshot: Snapshot) -> None:
        """Evaluate the checkpoint and all averages as of one step."""
        began, found = time.monotonic(), dict[str, Measured]()
        for name in (*([LIVE] if snapshot.has_live else []), *snapshot.readable()):
            if self._closed:
                return
            start = time.monotonic()
            try:
                found[name] = self._one(snapshot, name)
            except (EvaluationError, CheckpointError, OSError) as error:
                if self._closed:
                    return
                text = f"{name} at step {snapshot.step} could not be evaluated: {error}"
                self._write({"event": "evaluation failed", "text": text, "step": snapshot.step, "name": name})
                continue
            seconds = round(time.monotonic() - start, 3)
            self._write({"step": snapshot.step, "name": name, **found[name].row(), "seconds": seconds})
        self._last = snapshot.step
        self._write({"event": "evaluated", "step": snapshot.step, "seconds": round(time.monotonic() - began, 3)})
        for row in leads(found):
            self._write({"event": "lead", "step": snapshot.step, **row})

    def _one(self, snapshot: Snapshot, name: str) -> Measured:
        with ExitStack() as stack:
            folder = None
            if not self._evaluate.in_memory:
                folder = stack.enter_context(self._models.candidate(snapshot, name))
            measured = self._evaluate(snapshot, name, folder)
            if name != LIVE and math.isfinite(measured.loss):
                self._models.consider(snapshot, name, measured.loss, folder)
            return measured


def leads(found: dict[str, Measured]) -> list[dict[str, Any]]:
    """How far the best average is ahead of the checkpoint and of the next best average."""
    averages = sorted((m.loss, name) for name, m in found.items() if name != LIVE and math.isfinite(m.loss))
    if not averages:
        return []
    best = averages[0][1]
    rows = []
    for other in [name for name in (LIVE, *(name for _, name in averages[1:2])) if name in found]:
        difference = found[best].minus(found[other])
        value = found[other].loss - found[best].loss if difference is None else -difference.value
        row: dict[str, Any] = {"name": best, "over": other, "lead": value}
        if difference is not None:
            row["standard_error"] = difference.standard_error
        rows.append(row)
    return rows
