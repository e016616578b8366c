"""What an estimator needs of a trajectory: squared differences of its iterates, collected block by block."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from lagless.rules import FloatArray, check_steps


class TrajectoryMoments:
    """Squared distances between the iterates of one run, per coordinate, in several groups of coordinates.

        s_jk = mean over coordinates of (θ_j - θ_k)²

    Memory is groups × N²: the trajectory itself may be streamed. The mean over all coordinates does not depend on
    the basis, so it is also the mean over eigen-directions of the Hessian; that over a random sample of coordinates
    estimates it. Neighbouring coordinates stay in one group, so that their being alike shows in standard errors.

    Args:
        steps: shape (N,), the optimizer step of each iterate, increasing; the first is θ_0's.
        groups: ≥ 8; standard errors are those between groups.

    Raises:
        ValueError: if steps do not increase or there are too few groups.
    """

    def __init__(self, steps: ArrayLike, groups: int = 32) -> None:
        self.steps = check_steps(steps)
        if groups < 8:
            raise ValueError(f"groups={groups}; at least 8 are needed for a standard error.")
        count = len(self.steps)
        self._gram = np.zeros((groups, count, count))
        self._counts = np.zeros(groups, dtype=np.int64)
        self._next = 0

    @property
    def coordinates(self) -> int:
        """How many coordinates were added."""
        return int(self._counts.sum())

    def add(self, block: ArrayLike) -> None:
        """Take some coordinates of every iterate.

        Args:
            block: shape (N, C).

        Raises:
            ValueError: if the shape does not fit or a value is not finite.
        """
        values = np.asarray(block, dtype=np.float64)
        if values.ndim != 2 or len(values) != len(self.steps):
            raise ValueError(f"block has shape {values.shape}; it must be ({len(self.steps)}, C), one row per iterate.")
        if not np.isfinite(values).all():
            raise ValueError("block has NaN or infinity; leave diverged checkpoints out.")
        values = values - values.mean(axis=0)  # only differences count, and small numbers keep their digits
        groups = len(self._counts)
        for part in np.array_split(values, min(groups, values.shape[1]) or 1, axis=1):
            self._gram[self._next] += part @ part.T
            self._counts[self._next] += part.shape[1]
            self._next = (self._next + 1) % groups
        self._next = (self._next + 1) % groups  # so that what recurs in every block does not recur in one group

    def squared_differences(self) -> FloatArray:
        """s, shape (groups, N, N).

        Raises:
            ValueError: if there are fewer coordinates than groups.
        """
        if not self._counts.all():
            raise ValueError(
                f"{self.coordinates} coordinates for {len(self._counts)} groups; standard errors need at least one "
                "each."
            )
        gram = self._gram / self._counts[:, None, None]
        size = np.diagonal(gram, axis1=1, axis2=2)
        return size[:, :, None] + size[:, None, :] - 2.0 * gram


def moments_of(trajectory: ArrayLike, steps: Sequence[int], groups: int = 32) -> TrajectoryMoments:
    """The moments of a trajectory in memory.

    Args:
        trajectory: shape (N, P), one row per iterate.
        steps: shape (N,).
        groups: as in :class:`TrajectoryMoments`.
    """
    moments = TrajectoryMoments(steps, groups)
    moments.add(trajectory)
    return moments
