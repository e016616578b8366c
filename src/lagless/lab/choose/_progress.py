"""Progress of a run along the line from its first to its last iterate, its bend, and what lies off the line."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from lagless.rules import FloatArray


class RunPath(NamedTuple):
    """A run as seen along θ_T - θ_0.

    Attributes:
        length: |θ_T - θ_0|.
        progress: x_i = <θ_i - θ_0, θ_T - θ_0>/|θ_T - θ_0|², shape (N,), from 0 to 1.
        aside: |θ_i - θ_0 - x_i (θ_T - θ_0)|/|θ_T - θ_0|, shape (N,).
        early: progress per step over the first half of the steps, in units of the mean over the run.
        late: the same over the last quarter; below ``early`` the path bends, the run slows down.
    """

    length: float
    progress: FloatArray
    aside: FloatArray
    early: float
    late: float


def path_of(products: FloatArray, steps: Sequence[int]) -> RunPath:
    """Return the path of a run from the inner products of its increments.

    Args:
        products: shape (N - 1, N - 1).
        steps: of the N checkpoints.

    Raises:
        ValueError: if the last checkpoint is the first.
    """
    reached = np.cumsum(np.vstack([np.zeros(len(products)), products]), axis=0)  # <θ_i - θ_0, Δ_j>
    squares = np.diag(np.cumsum(np.hstack([np.zeros((len(reached), 1)), reached]), axis=1))
    total = squares[-1]
    if not total > 0.0:
        raise ValueError(f"the checkpoints at steps {steps[0]} and {steps[-1]} hold the same weights.")
    progress = reached.sum(axis=1) / total
    aside = np.sqrt(np.maximum(squares / total - progress**2, 0.0))
    share = (np.asarray(steps, dtype=np.float64) - steps[0]) / (steps[-1] - steps[0])
    half, quarter = (float(np.interp(at, share, progress)) for at in (0.5, 0.75))
    return RunPath(float(np.sqrt(total)), progress, aside, half / 0.5, (1.0 - quarter) / 0.25)
