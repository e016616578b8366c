"""What lies in a run folder now, and which of it is complete.

A checkpoint is complete when it opens (every shard is there and as long as its header says) and no file of it has
changed for a while. Time is that of a monotonic clock between two looks: clocks of file servers are off, and jump.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lagless.checkpoints import Checkpoint, CheckpointError, look_into, open_checkpoint
from lagless.watch._record import Stamp

_STATE = "trainer_state.json"
_MOST_LOSSES = 400


@dataclass(frozen=True)
class Seen:
    """A checkpoint as it lies there now.

    Attributes:
        step: of the optimizer.
        path: its folder or file.
        stamp: of all its files.
    """

    step: int
    path: Path
    stamp: Stamp


@dataclass(frozen=True)
class Readiness:
    """Whether a checkpoint is complete.

    Attributes:
        checkpoint: the open checkpoint, if it is.
        quiet_for: seconds since a file of it was last seen to change.
        reason: why it does not open.
    """

    checkpoint: Checkpoint | None
    quiet_for: float
    reason: str | None = None


def look(run: Path) -> list[Seen]:
    """The checkpoints in a run folder in order of their steps; none if there are none yet.

    Raises:
        CheckpointError: if the folder is missing or cannot be read, or its checkpoints are ambiguous.
    """
    found, run_found = [], look_into(run)
    for step, path in run_found.checkpoints if run_found is not None else ():
        stamp = stamp_of_files(path)
        if stamp:  # an empty folder has only just been made, or is just going
            found.append(Seen(step, path, stamp))
    return found


class Settling:
    """How long checkpoints have not changed.

    Args:
        settle: seconds without a change after which a checkpoint that opens is complete.
        clock: monotonic, in seconds.
    """

    def __init__(self, settle: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._settle, self._clock = settle, clock
        self._since: dict[Path, tuple[Stamp, float]] = {}

    def forget_all_but(self, seen: list[Seen]) -> None:
        """Forget what is gone."""
        paths = {one.path for one in seen}
        self._since = {path: known for path, known in self._since.items() if path in paths}

    def check(self, seen: Seen) -> Readiness:
        """Look at a checkpoint once more."""
        now = self._clock()
        stamp, since = self._since.setdefault(seen.path, (seen.stamp, now))
        if stamp != seen.stamp:
            self._since[seen.path], since = (seen.stamp, now), now
        quiet = now - since
        if quiet < self._settle:
            return Readiness(None, quiet)
        try:
            return Readiness(open_checkpoint(seen.path), quiet)
        except (CheckpointError, OSError) as error:
            return Readiness(None, quiet, str(error))


def stamp_of_files(path: Path) -> Stamp:
    """Size, time of change and inode of the file at ``path``, or of all files in the folder there."""
    if path.is_dir():
        files = [Path(place, name) for place, _, names in os.walk(path) for name in names]
    else:
        files = [path]
    rows = []
    for file in sorted(files):
        try:
            status = file.stat()
        except OSError:  # just renamed or removed; the next look will tell
            continue
        rows.append((file.relative_to(path.parent).as_posix(), status.st_size, status.st_mtime_ns, status.st_ino))
    return tuple(rows)


def weight_stamp(checkpoint: Checkpoint, stamp: Stamp) -> Stamp:
    """The part of a stamp that is about the weights, which a trainer that goes on does not touch."""
    names = {file.relative_to(checkpoint.path.parent).as_posix() for file in checkpoint.files}
    return tuple(row for row in stamp if row[0] in names)


def logged_losses(folder: Path) -> tuple[tuple[int, str], ...]:
    """The training losses that a Trainer logged beside a checkpoint, by step, as text; the last few hundred."""
    entries = [entry for entry in _log(folder) if isinstance(entry.get("step"), int) and "loss" in entry]
    return tuple((entry["step"], repr(entry["loss"])) for entry in entries[-_MOST_LOSSES:])


def logged_rates(folder: Path) -> dict[str, float]:
    """The last learning rate that a Trainer logged beside a checkpoint, and the largest; empty without a log."""
    rates = [rate for entry in _log(folder) if isinstance(rate := entry.get("learning_rate"), int | float)]
    return {"learning_rate": float(rates[-1]), "peak_rate": float(max(rates))} if rates else {}


def _log(folder: Path) -> list[dict[str, Any]]:
    try:
        state: Any = json.loads((folder / _STATE).read_text(encoding="utf-8"))
        return [entry for entry in state["log_history"] if isinstance(entry, dict)]
    except (OSError, ValueError, KeyError, TypeError):
        return []
