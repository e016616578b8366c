"""Checks that checkpoints are those of one run, each once, and that none of their weights would be left out."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from lagless._validation import is_list, is_object
from lagless.checkpoints._checkpoint import Checkpoint
from lagless.checkpoints._errors import CheckpointError, reporting
from lagless.checkpoints._json import read_object
from lagless.checkpoints._model_settings import check_settings
from lagless.checkpoints._spare_weights import refuse_spare_weights

_STATE = "trainer_state.json"
_SLACK = 60.0  # seconds by which a later checkpoint may seem older, as after a copy


def check_one_run(checkpoints: Sequence[Checkpoint], steps: Sequence[int], start_given: bool) -> None:
    """Refuse checkpoints of several runs.

    Args:
        checkpoints: in order of their steps.
        steps: their steps.
        start_given: whether the first one need not be of the run, so that its configuration and age say nothing.

    Raises:
        CheckpointError: if two checkpoints are the same files, their configurations or logs contradict each other, or
            one holds weights that would be left out.

    Warns:
        UserWarning: if a later checkpoint was written well before an earlier one, and no log shows that both are of
            one run.
    """
    own = checkpoints[1:] if start_given else checkpoints
    with reporting(own[-1].path):
        refuse_links(checkpoints)
        check_settings(checkpoints if own[-1].is_adapter else own)
        for checkpoint in own:
            refuse_spare_weights(checkpoint)
        _check_order(own, steps[-len(own) :])


def refuse_links(checkpoints: Sequence[Checkpoint]) -> None:
    """Refuse checkpoints that are the same files.

    Raises:
        CheckpointError: naming two.
    """
    seen: dict[tuple[int, int], Checkpoint] = {}
    for checkpoint in checkpoints:
        for file in checkpoint.files:
            stat = file.stat()
            other = seen.setdefault((stat.st_dev, stat.st_ino), checkpoint)
            if other is not checkpoint:
                raise CheckpointError(
                    f"{checkpoint.path} and {other.path} are the same files ({file.resolve()}), which would count "
                    "twice. Leave one of them out, or remove the link."
                )


def _check_order(checkpoints: Sequence[Checkpoint], steps: Sequence[int]) -> None:
    """Look for the later checkpoints of an older run, over which a run was started again."""
    logs = [dict(_losses(checkpoint.folder / _STATE)) for checkpoint in checkpoints]
    aged: list[tuple[int, int, float]] = []
    for earlier, later in pairwise(range(len(checkpoints))):
        common = sorted(step for step in logs[earlier].keys() & logs[later].keys() if step <= steps[earlier])
        for step in common:
            one, other = logs[earlier][step], logs[later][step]
            if one != other:
                raise CheckpointError(
                    f"{checkpoints[earlier].path} and {checkpoints[later].path} are of two runs: at step {step} their "
                    f"{_STATE} say loss {one} and {other}. Leave out the older run's checkpoints (--steps), or move "
                    "them away."
                )
        before, after = (_written(checkpoints[i]) for i in (earlier, later))
        if not common and after < before - _SLACK:
            aged.append((earlier, later, before - after))
    if aged:
        earlier, later, seconds = aged[0]
        warnings.warn(
            f"{checkpoints[later].path} was written {seconds / 60:.0f} minutes before {checkpoints[earlier].path}, "
            "which is of an earlier step. If a run was started again over an older one, leave out the older one's "
            "checkpoints (--steps); if the files were copied, all is well.",
            stacklevel=4,
        )


def _written(checkpoint: Checkpoint) -> float:
    return max(file.stat().st_mtime for file in checkpoint.files)


def _losses(path: Path) -> Iterator[tuple[int, str]]:
    """The training losses that a Trainer logged, by step, as text; none if there is no readable log."""
    try:
        history: Any = read_object(path, "").get("log_history")
    except CheckpointError:
        return
    for entry in history if is_list(history) else ():
        if is_object(entry) and isinstance(entry.get("step"), int) and "loss" in entry:
            yield entry["step"], repr(entry["loss"])
