"""Finding the checkpoints of a run, putting them in order, and checking that they belong together."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lagless.checkpoints._alike import check_alike, fit_start
from lagless.checkpoints._checkpoint import Checkpoint
from lagless.checkpoints._errors import CheckpointError, reporting
from lagless.checkpoints._one_run import check_one_run
from lagless.checkpoints._open import open_checkpoint
from lagless.checkpoints._paths import StrPath, absolute_path
from lagless.checkpoints._run_folder import scan_run, select_steps, short, with_steps
from lagless.checkpoints._training_record import Mode, best_checkpoints


@dataclass(frozen=True)
class Trajectory:
    """Stored checkpoints of one run in order of their steps; the first is θ_0.

    Attributes:
        checkpoints: the open checkpoints.
        steps: the optimizer step of each, strictly increasing.
        start_given: whether θ_0 was chosen by ``start``, and is not just the earliest checkpoint stored.
        unit: what steps count: optimizer steps, or epochs where a program numbers its checkpoints by them.
    """

    checkpoints: tuple[Checkpoint, ...]
    steps: tuple[int, ...]
    start_given: bool = False
    unit: str = "step"

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
                f"at={at}: {count} of the checkpoints at steps {short(self.steps)} lie up to it; an average needs "
                "two. Raise at."
            )
        return replace(self, checkpoints=self.checkpoints[:count], steps=self.steps[:count])


def find_checkpoints(
    run: StrPath | Sequence[StrPath],
    steps: Sequence[int] | None = None,
    start: StrPath | None = None,
    start_step: int | None = None,
    *,
    best: int | None = None,
    metric: str | None = None,
    mode: Mode | None = None,
) -> Trajectory:
    """Open the checkpoints of a run.

    Args:
        run: a run folder with one folder or file per checkpoint, named ``checkpoint-100``, ``step100``,
            ``iter_0000100``, ``global_step100``, ``step_000100.safetensors``, ``epoch=1-step=100.ckpt`` and the like
            (docs/checkpoints.md has the table); temporary names (``tmp-checkpoint-100``) and averages that lagless
            wrote are passed over. Or a list of checkpoints.
        steps: for a run folder, the steps to use, by default all; for a list, the step of each, by default the last
            integer in its name.
        start: the checkpoint that is θ_0, for example the base model of a fine-tuning run. By default the earliest one
            found is θ_0. Its floating-point types may differ from the run's, and tensors that the run lacks are left
            out.
        start_step: the step of ``start``, by default 0.
        best: use only that many checkpoints, those with the best ``metric``.
        metric: a metric that ``trainer_state.json`` holds, that Lightning's ``ModelCheckpoint`` monitors, or ``metric``
            of timm.
        mode: ``"min"`` or ``"max"``: which values are good; None to go by the metric's name.

    Raises:
        CheckpointError: if there are no checkpoints or only one, if they are ambiguous, if they differ in a tensor or
            in a setting that gives weights their meaning, if they are of several runs, or if weights in them would be
            left out.
        ValueError: if ``steps`` or ``start_step`` do not fit the checkpoints.
    """
    if isinstance(run, (str, os.PathLike)):
        run = absolute_path(run)
        with reporting(run):
            found = scan_run(run)
            named, unit = select_steps(run, found.checkpoints, steps), found.layout.unit
    else:
        unit = "step"
        named = with_steps([absolute_path(path) for path in run], steps)
    named = _best(named, best, metric, mode)
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
                f"start ({opened.path.name}) is given for step {first}, but the run begins with {named[0][1].name} at "
                f"step {named[0][0]}, which is θ_0 then. Leave --start out, or leave that checkpoint out (--steps), or "
                "give an earlier --start-step."
            )
        named.insert(0, (first, opened.path))
    if len(named) < 2:
        raise CheckpointError(
            f"{named[0][1]}: this is the only checkpoint found, an average needs two. Keep more of them while "
            "training (save_steps, save_total_limit), or give θ_0 with start."
        )
    own = [open_checkpoint(path) for _, path in (named if opened is None else named[1:])]
    checkpoints = own if opened is None else [fit_start(opened, own[-1]), *own]
    trajectory = Trajectory(tuple(checkpoints), tuple(step for step, _ in named), start is not None, unit)
    check_alike(trajectory.checkpoints, trajectory.start_given)
    check_one_run(trajectory.checkpoints, trajectory.steps, trajectory.start_given)
    return trajectory


def _best(
    named: list[tuple[int, Path]], best: int | None, metric: str | None, mode: Mode | None
) -> list[tuple[int, Path]]:
    if best is None:
        if metric is not None or mode is not None:
            raise ValueError(f"metric={metric!r}, mode={mode!r} choose among checkpoints; say how many with best.")
        return named
    if metric is None:
        raise ValueError(f"best={best}: say by which metric, e.g. metric='eval_loss'.")
    return best_checkpoints(named, best, metric, mode)
