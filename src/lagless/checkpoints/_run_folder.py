"""The checkpoints in a run folder or a list, in order of their steps."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from lagless.checkpoints._contents import RECORD, records_average
from lagless.checkpoints._errors import CheckpointError
from lagless.checkpoints._open import SUFFIXES, holds_weights

STEP_NAME = re.compile(r"(?:^|[-_.=])(checkpoint|ckpt|global_?step|step|iteration|iter)[-_=]?(\d+)$", re.IGNORECASE)
_FSDP_MODEL = "pytorch_model_fsdp_"  # a folder in a checkpoint of Accelerate
_TEMPORARY = re.compile(r"^\.|^~|^_?te?mp[-_.]|[-_.](te?mp|partial|incomplete)$", re.IGNORECASE)
_LOOKED_FOR = (
    "checkpoint-N, step-N, stepN, iter_N, global_stepN (folders, or files ending in " + ", ".join(SUFFIXES) + ")"
)


def holds_averages(folder: Path) -> bool:
    """Whether lagless wrote averages to a folder: they are no checkpoints of the run they were made from."""
    if records_average(folder):
        return True
    return not holds_weights(folder) and any((entry / RECORD).is_file() for entry in folder.iterdir())


def scan_run(run: Path) -> list[tuple[int, Path]]:
    """The steps and paths of the checkpoints in a run folder; temporary names and averages are passed over.

    Raises:
        CheckpointError: if there are none, or several kinds, or two of one step.
    """
    if not run.is_dir():
        raise CheckpointError(
            f"{run}: {'is a file, not a run folder' if run.exists() else 'no such folder'}. Give the folder that "
            "holds the checkpoints."
        )
    groups: dict[str, list[tuple[int, Path]]] = {}
    for entry in sorted(run.iterdir()):
        stem = entry.name.removesuffix(entry.suffix) if entry.suffix in SUFFIXES else entry.name
        match = STEP_NAME.search(stem)
        if not match or _TEMPORARY.search(entry.name):
            continue
        if not entry.exists():
            raise CheckpointError(
                f"{entry}: this link leads nowhere. Repair it, remove it, or give the checkpoints as a list."
            )
        if entry.is_dir() and holds_averages(entry):
            continue
        if entry.is_dir() or entry.suffix in SUFFIXES:
            kind = "folders" if entry.is_dir() else f"files *{entry.suffix}"
            groups.setdefault(f"{kind} {stem[: match.start(2)]}N", []).append((int(match[2]), entry))
    if not groups:
        found = sorted(entry.name for entry in run.iterdir())
        listing = ", ".join(found[:8]) + (f" and {len(found) - 8} more" if len(found) > 8 else "")
        hint = (
            " This looks like one checkpoint: give the folder above it."
            if holds_weights(run)
            else " Give the checkpoints as a list."
        )
        raise CheckpointError(
            f"{run}: no checkpoints found. Looked for {_LOOKED_FOR}; found {listing or 'nothing'}.{hint}"
        )
    if len(groups) > 1:
        counts = "; ".join(f"{len(group)} {kind}" for kind, group in groups.items())
        raise CheckpointError(
            f"{run}: several kinds of checkpoints ({counts}). Give those that are meant as a list, or move the others "
            "away."
        )
    return _in_order(next(iter(groups.values())))


def select_steps(run: Path, found: list[tuple[int, Path]], steps: Sequence[int] | None) -> list[tuple[int, Path]]:
    """Those of the checkpoints found in ``run`` that are at ``steps``; all for None.

    Raises:
        ValueError: if a step is missing, or they do not increase.
    """
    if steps is None:
        return found
    _check_increasing(steps)
    by_step = dict(found)
    missing = [step for step in steps if step not in by_step]
    if missing or not steps:
        raise ValueError(
            f"steps={list(steps)}: {run} has no checkpoint at {short(missing) or 'those'}; it has "
            f"{short(sorted(by_step))}."
        )
    return [(step, by_step[step]) for step in steps]


def with_steps(paths: list[Path], steps: Sequence[int] | None) -> list[tuple[int, Path]]:
    """The checkpoints of a list with their steps, by default the last integers in their names.

    Raises:
        CheckpointError: if the list is empty, a name has no integer, or two have the same.
        ValueError: if ``steps`` does not fit.
    """
    if not paths:
        raise CheckpointError("run: the list of checkpoints is empty. Give a run folder, or at least two checkpoints.")
    if steps is None:
        return _in_order([(_step_of(path), path) for path in paths])
    if len(steps) != len(paths):
        raise ValueError(
            f"steps: {len(steps)} steps for {len(paths)} checkpoints. Give one step per checkpoint, in the same order."
        )
    _check_increasing(steps)
    return list(zip(steps, paths, strict=True))


def _step_of(path: Path) -> int:
    path = path.absolute()
    if path.name.startswith(_FSDP_MODEL):  # its number counts the models of a checkpoint
        path = path.parent
    own = path.name.removesuffix(path.suffix) if path.suffix in SUFFIXES else path.name
    for name in (own, path.parent.name) if path.suffix in SUFFIXES else (own,):
        if numbers := re.findall(r"\d+", name):
            return int(numbers[-1])
    raise CheckpointError(f"{path}: no step number in its name. Give the steps of the checkpoints with steps.")


def _in_order(named: list[tuple[int, Path]]) -> list[tuple[int, Path]]:
    named = sorted(named)
    for (before, one), (step, other) in zip(named, named[1:], strict=False):
        if step == before:
            raise CheckpointError(
                f"{one} and {other}: both are step {step}. Say which steps they are, with steps (--steps), "
                "or leave one out."
            )
    return named


def _check_increasing(steps: Sequence[int]) -> None:
    for before, step in zip(steps, steps[1:], strict=False):
        if step <= before:
            raise ValueError(
                f"steps: {before} is followed by {step}; steps must increase from checkpoint to checkpoint."
            )


def short(steps: Iterable[int]) -> str:
    """A few of many steps, for messages."""
    steps = list(steps)
    return ", ".join(map(str, steps)) if len(steps) <= 8 else f"{', '.join(map(str, steps[:3]))}, ..., {steps[-1]}"
