"""The checkpoints in a run folder or a list, in order of their steps."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from lagless.checkpoints._contents import RECORD, records_average
from lagless.checkpoints._errors import CheckpointError
from lagless.checkpoints._layouts import BELOW, INSIDE, RUN_LAYOUTS, SUFFIXES, RunLayout, split_suffix, step_named
from lagless.checkpoints._open import holds_weights
from lagless.checkpoints._training_record import stored_step

_FSDP_MODEL = "pytorch_model_fsdp_"  # a folder in a checkpoint of Accelerate
_TEMPORARY = re.compile(r"^\.|^~|^_?te?mp[-_.]|[-_.](te?mp|partial|incomplete)$", re.IGNORECASE)
_LOOKED_FOR = (
    "checkpoint-N, step-N, stepN, iter_N, global_stepN, "
    + ", ".join(dict.fromkeys(layout.shown for layout in RUN_LAYOUTS if layout.program))
    + f" (folders, or files ending in {', '.join(SUFFIXES)})"
)


@dataclass(frozen=True)
class FoundRun:
    """The checkpoints of a run folder.

    Attributes:
        folder: the folder that holds them; perhaps one in the run folder.
        layout: whose names they have.
        checkpoints: number and path of each, in order.
    """

    folder: Path
    layout: RunLayout
    checkpoints: list[tuple[int, Path]]


def holds_averages(folder: Path) -> bool:
    """Whether lagless wrote averages to a folder: they are no checkpoints of the run they were made from."""
    if records_average(folder):
        return True
    return not holds_weights(folder) and any((entry / RECORD).is_file() for entry in folder.iterdir())


def scan_run(run: Path) -> FoundRun:
    """Return the checkpoints in a run folder; temporary names and averages are passed over.

    Raises:
        CheckpointError: if there are none, or several kinds, or two of one step.
    """
    if (own := look_into(run)) is not None:
        return own
    found = sorted(entry.name for entry in run.iterdir())
    listing = ", ".join(found[:8]) + (f" and {len(found) - 8} more" if len(found) > 8 else "")
    hint = (
        " This looks like one checkpoint: give the folder above it."
        if holds_weights(run)
        else " Give the checkpoints as a list."
    )
    raise CheckpointError(f"{run}: no checkpoints found. Looked for {_LOOKED_FOR}; found {listing or 'nothing'}.{hint}")


def look_into(run: Path) -> FoundRun | None:
    """Return the checkpoints in a run folder, as :func:`scan_run`; None if there are none, as in one that has begun.

    Raises:
        CheckpointError: if there is no such folder, or there are several kinds, or two of one step.
    """
    if not run.is_dir():
        raise CheckpointError(
            f"{run}: {'is a file, not a run folder' if run.exists() else 'no such folder'}. Give the folder that "
            "holds the checkpoints."
        )
    if (own := _scan(run)) is not None:
        return own
    places = [place for pattern in BELOW for place in sorted(run.glob(pattern)) if place.is_dir()]
    below = [found for place in places if (found := _scan(place)) is not None]
    if len(below) > 1:
        raise CheckpointError(
            f"{run}: several folders in it hold checkpoints ({', '.join(str(f.folder) for f in below)}). Give the one "
            "that is meant."
        )
    return below[0] if below else None


def _scan(run: Path) -> FoundRun | None:
    groups: dict[tuple[int, str], tuple[RunLayout, list[tuple[int, Path]]]] = {}
    for entry, layout, match in _named(run):
        if not entry.exists():
            raise CheckpointError(
                f"{entry}: this link leads nowhere. Repair it, remove it, or give the checkpoints as a list."
            )
        _, suffix = split_suffix(entry.name)
        if (entry.is_dir() and holds_averages(entry)) or (not entry.is_dir() and not suffix):
            continue
        number = match["number"] if "number" in match.groupdict() else stored_step(entry)
        what = "folders" if entry.is_dir() else f"files *{suffix}"
        name = layout.shown
        if not layout.program:
            name = re.sub(r"\d+", "N", match.string[: match.start("number")]) + "N"
        group = groups.setdefault((layout.rank, f"{what} {name}"), (layout, []))
        group[1].append((int(number), entry))
    if not groups:
        return None
    lowest = min(rank for rank, _ in groups)
    meant = {kind: group for (rank, kind), group in groups.items() if rank == lowest}
    if len({layout.program or kind for kind, (layout, _) in meant.items()}) > 1:
        counts = "; ".join(f"{len(group)} {kind}" for kind, (_, group) in meant.items())
        raise CheckpointError(
            f"{run}: several kinds of checkpoints ({counts}). Give those that are meant as a list, or move the others "
            "away."
        )
    layout = next(iter(meant.values()))[0]
    return FoundRun(run, layout, _in_order([found for _, group in meant.values() for found in group]))


def _named(run: Path) -> Iterator[tuple[Path, RunLayout, re.Match[str]]]:
    for entry in sorted(run.iterdir()):
        if not _TEMPORARY.search(entry.name) and (found := step_named(entry)):
            yield entry, *found


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
    """The checkpoints of a list with their steps, by default those in their names.

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
    inner = {place.split("/")[-1] for row in INSIDE for place in row.folders}
    while path.name.startswith(_FSDP_MODEL) or path.name in inner:  # the checkpoint is the folder above
        path = path.parent
    if found := step_named(path):
        match = found[1]
        return int(match["number"]) if "number" in match.groupdict() else stored_step(path)
    own, suffix = split_suffix(path.name)
    for name in (own, path.parent.name) if suffix else (own,):
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
