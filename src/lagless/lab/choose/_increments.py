"""The geometry of stored iterates: inner products of what changed from one checkpoint to the next."""

from __future__ import annotations

from threading import Lock

import numpy as np
from torch import Tensor

from lagless.checkpoints import Trajectory, is_running_statistic
from lagless.posthoc import Progress, stream_product
from lagless.rules import FloatArray


def increment_products(trajectory: Trajectory, *, memory: int = 2**30, progress: Progress | None = None) -> FloatArray:
    """Return <Δ_i, Δ_j> over all parameters, Δ_i the change from checkpoint i to i + 1.

    Every byte is read once; memory holds a few ranges of the checkpoints and the result. Integers and running
    statistics of normalisation layers do not count. Inner products of any combinations of checkpoints whose weights
    sum to 0 follow from these.

    Args:
        trajectory: N checkpoints.
        memory: bytes for buffers.
        progress: called with the bytes read so far and in all.

    Returns:
        Shape (N - 1, N - 1), float64.

    Raises:
        CheckpointError: if a file fails or changes while it is read, or a value is not finite.
    """
    count = len(trajectory.checkpoints)
    total, lock = np.zeros((count - 1, count - 1)), Lock()

    def add(name: str, start: int, block: Tensor) -> None:
        if not block.is_floating_point() or is_running_statistic(name):
            return
        rows = block.double().numpy()  # differences of float32 neighbours are exact; their squares need the digits
        products = rows @ rows.T
        with lock:
            total[...] += products

    stream_product(trajectory.checkpoints, np.diff(np.eye(count), axis=0), add, memory=memory, progress=progress)
    return total
