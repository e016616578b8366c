"""Curvature, noise and distance from the checkpoints of a run, without loading them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from lagless.checkpoints import StrPath, Trajectory, find_checkpoints
from lagless.rules import FloatArray
from lagless.theory import RunEstimate, TrajectoryMoments, estimate_run

_RANGE = 4096  # elements read at once


def estimate_checkpoints(
    run: StrPath | Sequence[StrPath],
    *,
    steps: Sequence[int] | None = None,
    start: StrPath | None = None,
    start_step: int | None = None,
    sample: int = 1_000_000,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> RunEstimate:
    """Estimate curvature range, noise and distance of a run from its checkpoints; see
    :func:`~lagless.theory.estimate_run` for what that can and cannot know.

    Parameters are read in short ranges, each from all checkpoints; a random sample of ranges stands for all of them if
    there are more than ``sample``. Memory is a few ranges and the squared distances between checkpoints.

    Args:
        run: as in :func:`~lagless.posthoc.find_checkpoints`.
        steps: as there; evenly spaced after the first.
        start: as there, the checkpoint that is θ_0.
        start_step: as there.
        sample: about how many parameters to look at, ≥ 1.
        seed: of the sample.
        progress: called with the parameters read so far and in all.

    Raises:
        CheckpointError: if the checkpoints cannot be read.
        ValueError: if they cannot tell; the message says what is missing.
    """
    if sample < 1:
        raise ValueError(f"sample={sample}; it must be at least 1.")
    trajectory = find_checkpoints(run, steps, start, start_step)
    ranges = sample_ranges(trajectory, sample, seed)
    moments = TrajectoryMoments(trajectory.steps)
    total, done = sum(stop - first for _, first, stop in ranges), 0
    for name, first, stop in ranges:
        moments.add(_read(trajectory, name, first, stop))
        done += stop - first
        if progress is not None:
            progress(done, total)
    for checkpoint in trajectory.checkpoints:
        checkpoint.check_unchanged()
    return estimate_run(moments)


def sample_ranges(trajectory: Trajectory, sample: int, seed: int) -> list[tuple[str, int, int]]:
    """(tensor, first, stop) of ranges that together hold about ``sample`` floating-point parameters, or all of them.

    Every range of every tensor is as likely as any other.
    """
    every: list[tuple[str, int, int]] = []
    for name, info in trajectory.checkpoints[-1].tensors.items():
        if info.dtype.is_floating_point:
            every += [(name, first, min(first + _RANGE, info.numel)) for first in range(0, info.numel, _RANGE)]
    if not every:
        raise ValueError("the checkpoints have no floating-point tensors.")
    if sum(stop - first for _, first, stop in every) <= sample:
        return every
    order = np.random.default_rng(seed).permutation(len(every))
    sizes = np.array([every[i][2] - every[i][1] for i in order]).cumsum()
    count = int(np.searchsorted(sizes, sample)) + 1
    return [every[i] for i in sorted(order[:count])]  # in the order of the files


def _read(trajectory: Trajectory, name: str, first: int, stop: int) -> FloatArray:
    rows = [checkpoint.read_range(name, first, stop).double().numpy() for checkpoint in trajectory.checkpoints]
    return np.stack(rows)
