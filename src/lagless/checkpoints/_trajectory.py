"""Finding the checkpoints of a run, putting them in order, and checking that they belong together."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lagless.checkpoints._checkpoint import Checkpoint
from lagless.checkpoints._errors import CheckpointError
from lagless.checkpoints._open import SUFFIXES, holds_weights, open_checkpoint
from lagless.checkpoints._paths import StrPath
from lagless.checkpoints._safetensors_format import TensorInfo

_STEP_NAME = re.compile(r"(?:^|[-_.=])(checkpoint|ckpt|global_?step|step|iteration|iter)[-_=]?(\d+)$", re.IGNORECASE)
_FSDP_MODEL = "pytorch_model_fsdp_"  # a folder in a checkpoint of Accelerate
_TEMPORARY = re.compile(r"^\.|^~|^_?te?mp[-_.]|[-_.](te?mp|partial|incomplete)$", re.IGNORECASE)
_OTHER_RUN = "They are not checkpoints of one run: leave one out, or convert it."
_LOOKED_FOR = (
    "checkpoint-N, step-N, stepN, iter_N, global_stepN (folders, or files ending in " + ", ".join(SUFFIXES) + ")"
)


@dataclass(frozen=True)
class Trajectory:
    """Stored checkpoints of one run in order of their steps; the first is θ_0.

    Attributes:
        checkpoints: the open checkpoints.
        steps: the optimizer step of each, strictly increasing.
        start_given: whether θ_0 was chosen by ``start``, and is not just the earliest checkpoint stored.
    """

    checkpoints: tuple[Checkpoint, ...]
    steps: tuple[int, ...]
    start_given: bool = False

    def until(self, at: int | None) -> Trajectory:
        """The part of the trajectory up to step ``at``; all of it for None.

        Raises:
            CheckpointError: if fewer than two checkpoints are left.
        """
        if at is None:
            return self
        count = sum(step <= at for step in self.steps)
        if count < 2:
            raise CheckpointError(
                f"at={at}: {count} of the checkpoints at steps {_short(self.steps)} lie up to it; an average needs "
                "two. Raise at."
            )
        return replace(self, checkpoints=self.checkpoints[:count], steps=self.steps[:count])


def find_checkpoints(
    run: StrPath | Sequence[StrPath],
    steps: Sequence[int] | None = None,
    start: StrPath | None = None,
    start_step: int | None = None,
) -> Trajectory:
    """Open the checkpoints of a run.

    Args:
        run: a run folder with one folder or file per checkpoint, named ``checkpoint-100``, ``step100``,
            ``iter_0000100``, ``global_step100``, ``step_000100.safetensors`` and the like; temporary names
            (``tmp-checkpoint-100``) are passed over. Or a list of checkpoints.
        steps: for a run folder, the steps to use, by default all; for a list, the step of each, by default the last
            integer in its name.
        start: the checkpoint that is θ_0, for example the base model of a fine-tuning run. By default the earliest one
            found is θ_0. Its floating-point types may differ from the run's.
        start_step: the step of ``start``, by default 0.

    Raises:
        CheckpointError: if there are no checkpoints or only one, if they are ambiguous, or if they differ in a tensor.
        ValueError: if ``steps`` or ``start_step`` do not fit the checkpoints.
    """
    if isinstance(run, (str, os.PathLike)):
        named = _select(Path(run), _scan(Path(run)), steps)
    else:
        named = _with_steps([Path(path) for path in run], steps)
    if start is None and start_step is not None:
        raise ValueError(
            f"start_step={start_step} is the step of start, which is not given. Give start, or leave start_step out."
        )
    opened: Checkpoint | None = None
    if start is not None:
        opened = open_checkpoint(start)  # a wrong path is reported as such, before all else
        first = 0 if start_step is None else start_step
        if first >= named[0][0]:
            raise ValueError(
                f"start ({Path(start).name}) is given for step {first}, but the run begins with {named[0][1].name} at "
                f"step {named[0][0]}, which is θ_0 then. Leave --start out, or leave that checkpoint out (--steps), or "
                "give an earlier --start-step."
            )
        named.insert(0, (first, Path(start)))
    if len(named) < 2:
        raise CheckpointError(
            f"{named[0][1]}: this is the only checkpoint found, an average needs two. Keep more of them while "
            "training (save_steps, save_total_limit), or give θ_0 with start."
        )
    rest = named if opened is None else named[1:]
    checkpoints = (*([] if opened is None else [opened]), *(open_checkpoint(path) for _, path in rest))
    trajectory = Trajectory(checkpoints, tuple(step for step, _ in named), start is not None)
    check_alike(trajectory.checkpoints, trajectory.start_given)
    return trajectory


def _scan(run: Path) -> list[tuple[int, Path]]:
    if not run.is_dir():
        raise CheckpointError(
            f"{run}: {'is a file, not a run folder' if run.exists() else 'no such folder'}. Give the folder that "
            "holds the checkpoints."
        )
    groups: dict[str, list[tuple[int, Path]]] = {}
    for entry in sorted(run.iterdir()):
        stem = entry.name.removesuffix(entry.suffix) if entry.suffix in SUFFIXES else entry.name
        match = _STEP_NAME.search(stem)
        if not match or _TEMPORARY.search(entry.name):
            continue
        if not entry.exists():
            raise CheckpointError(
                f"{entry}: this link leads nowhere. Repair it, remove it, or give the checkpoints as a list."
            )
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


def _select(run: Path, found: list[tuple[int, Path]], steps: Sequence[int] | None) -> list[tuple[int, Path]]:
    if steps is None:
        return found
    _check_increasing(steps)
    by_step = dict(found)
    missing = [step for step in steps if step not in by_step]
    if missing or not steps:
        raise ValueError(
            f"steps={list(steps)}: {run} has no checkpoint at {_short(missing) or 'those'}; it has "
            f"{_short(sorted(by_step))}."
        )
    return [(step, by_step[step]) for step in steps]


def _with_steps(paths: list[Path], steps: Sequence[int] | None) -> list[tuple[int, Path]]:
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


def check_alike(checkpoints: Sequence[Checkpoint], start_given: bool = False) -> None:
    """Refuse checkpoints that differ in the name, type or shape of a tensor.

    Args:
        checkpoints: what to compare.
        start_given: let floating-point types of the first one differ.

    Raises:
        CheckpointError: naming the first difference and both checkpoints.
    """
    last = checkpoints[-1]
    for position, other in enumerate(checkpoints[:-1]):
        if other.is_adapter != last.is_adapter:
            kinds = ["a whole model", "an adapter"]
            raise CheckpointError(
                f"{other.path} is {kinds[other.is_adapter]}, {last.path} is {kinds[last.is_adapter]}. Average "
                "checkpoints of one kind; the θ_0 of an adapter is the adapter at its initialisation."
            )
        for name in sorted(other.tensors.keys() ^ last.tensors.keys()):
            has, lacks = (other, last) if name in other.tensors else (last, other)
            raise CheckpointError(
                f"{lacks.path} has no tensor {name!r}, {has.path} has it ({has.tensors[name]}). {_OTHER_RUN}"
            )
        for name, info in other.tensors.items():
            if not _alike(info, last.tensors[name], start_given and position == 0):
                raise CheckpointError(
                    f"tensor {name!r} is {info} in {other.path}, but {last.tensors[name]} in {last.path}. {_OTHER_RUN}"
                )


def _alike(one: TensorInfo, other: TensorInfo, any_float: bool) -> bool:
    both_float = one.dtype.is_floating_point and other.dtype.is_floating_point
    return one.shape == other.shape and (one.dtype == other.dtype or (any_float and both_float))


def _short(steps: Iterable[int]) -> str:
    steps = list(steps)
    return ", ".join(map(str, steps)) if len(steps) <= 8 else f"{', '.join(map(str, steps[:3]))}, ..., {steps[-1]}"
