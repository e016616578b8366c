"""Removing checkpoints that the averages no longer need, and nobody else does.

A checkpoint goes only if it is in every average on the disk, also in the oldest state that is kept to go back to; if it
is not among the newest, from which a run resumes; and if nothing in the run names it as the latest or the best.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from lagless.watch._record import Record
from lagless.watch._scan import Seen

_GOING = ".lagless-pruned-"
_NAMED_IN = ("latest", "latest_checkpointed_iteration.txt", "latest_universal", "checkpoint", "last.txt")
_STATE = "trainer_state.json"


def removable(record: Record, seen: Sequence[Seen], keep: int) -> list[Seen]:
    """Return the checkpoints that may be removed, oldest first.

    Args:
        record: what is in the averages, as it is on the disk.
        seen: what lies there.
        keep: how many of the newest stay.
    """
    if not record.generations:
        return []
    safe = record.history[record.generations[0].count - 1].step
    absorbed, newest = record.by_name(), {one.path for one in sorted(seen, key=lambda one: one.step)[-keep:]}
    named = set(_named(seen))
    return [
        one
        for one in sorted(seen, key=lambda one: one.step)
        if one.path not in newest
        and one.step <= safe
        and (known := absorbed.get(one.path.name)) is not None
        and set(known.stamp) <= set(one.stamp)
        and not one.path.is_symlink()
        and one.path.name not in named
        and str(one.step) not in named
    ]


def remove(one: Seen) -> int:
    """Remove a checkpoint; it is never there in part under its own name.

    Returns:
        The bytes that this freed.

    Raises:
        OSError: if it may not be removed.
    """
    going = one.path.with_name(f"{_GOING}{one.path.name}")
    size = sum(row[1] for row in one.stamp)
    os.rename(one.path, going)
    shutil.rmtree(going) if going.is_dir() else going.unlink()
    return size


def clear_leftovers(run: Path) -> None:
    """Remove what a process that was killed while it removed has left."""
    with suppress(OSError):
        for place in run.iterdir():
            if place.name.startswith(_GOING):
                shutil.rmtree(place, ignore_errors=True) if place.is_dir() else place.unlink(missing_ok=True)


def _named(seen: Sequence[Seen]) -> Iterator[str]:
    """Names and steps of checkpoints that files of the run name, as the latest one or the best."""
    for folder in {one.path.parent for one in seen}:
        for name in _NAMED_IN:
            with suppress(OSError, UnicodeDecodeError):
                yield from (folder / name).read_text(encoding="utf-8")[:4096].split()
    for one in seen[-1:]:
        with suppress(OSError, ValueError, AttributeError):
            state: Any = json.loads((one.path / _STATE).read_text(encoding="utf-8"))
            yield Path(str(state.get("best_model_checkpoint"))).name
            yield str(state.get("best_global_step"))
