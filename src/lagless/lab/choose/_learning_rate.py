"""How the learning rate of a run changed: as logged beside its checkpoints, or as its increments suggest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from lagless.checkpoints import logged_rates
from lagless.rules import FloatArray

Source = Literal["log", "increments", "constant"]

_LEAST = 1e-6  # of the peak: the clock of a run never stands still


@dataclass(frozen=True)
class LearningRate:
    """The learning rate of a run in units of its peak, linear between the steps at which it is known.

    Attributes:
        steps: increasing.
        multipliers: in (0, 1], one per step.
        source: ``"log"``, ``"increments"`` or ``"constant"``.
    """

    steps: tuple[float, ...]
    multipliers: tuple[float, ...]
    source: Source

    def at(self, steps: FloatArray) -> FloatArray:
        """Return the multipliers at ``steps``; beyond the first and last known one they stay as they are."""
        return np.maximum(np.interp(steps, self.steps, self.multipliers), _LEAST)


def constant_rate() -> LearningRate:
    """Return a learning rate that does not change."""
    return LearningRate((0.0,), (1.0,), "constant")


def logged_rate(folder: Path) -> LearningRate | None:
    """Return the learning rate that ``transformers`` logged in ``trainer_state.json``; None if there is no such log.

    A log that cannot be read, or that has no positive learning rate at two steps or more, is none.
    """
    found = logged_rates(folder)
    if not found:
        return None
    peak = max(found.values())
    steps = sorted(found)
    return LearningRate(tuple(steps), tuple(found[step] / peak for step in steps), "log")


def rate_of_increments(products: FloatArray, steps: Sequence[int]) -> LearningRate:
    """Return a learning rate in proportion to the length of the increments, which never rises after its peak.

    Adaptive optimizers take steps of about the length of the learning rate, and noise of SGD is in proportion to it.

    Args:
        products: inner products of the increments, shape (N - 1, N - 1).
        steps: shape (N,).
    """
    times = np.asarray(steps, dtype=np.float64)
    lengths = np.sqrt(np.diag(products) / np.diff(times))
    lengths = np.maximum.accumulate(lengths[::-1])[::-1]
    middles = (times[1:] + times[:-1]) / 2.0
    return LearningRate(tuple(middles), tuple(np.maximum(lengths / lengths.max(), _LEAST)), "increments")
