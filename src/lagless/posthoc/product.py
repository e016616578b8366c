"""The streamed product W (G×N) · Θ (N×P): G averages of N checkpoints in one pass over their bytes, in bounded memory.

For each tensor, range by range of C elements: read that range from every checkpoint (N×C), multiply (G×N)·(N×C), hand the result to the consumer.
Worker threads take whole tensors, the largest first; reading, multiplying and hashing all release the interpreter's lock.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack, contextmanager
from typing import Literal, Protocol

import numpy as np
import torch
import xxhash
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from lagless.posthoc.checkpoint import Checkpoint
from lagless.posthoc.errors import CheckpointError
from lagless.posthoc.fingerprint import combine_digests
from lagless.posthoc.readers import Reader, byte_view
from lagless.posthoc.safetensors_format import TensorInfo

Accumulate = Literal["float32", "float64"]
Progress = Callable[[int, int], None]

_WORKERS = 8  # more do not read faster
_OPEN_FILES = 256  # well below the usual limit of 1024 per process
_WORKSPACE = 8 << 20  # bytes per worker at which blocks stay in cache and calls are few; measured, see benchmarks/checkpoints.py
_SHORTEST = 1 << 15  # elements; shorter reads cost more in calls than they gain in cache


class Consumer(Protocol):
    """Receives averages range by range, from several threads at once and in any order."""

    def __call__(self, name: str, start: int, block: Tensor, /) -> None:
        """Take elements ``start``, ``start + 1``, ... of the flattened tensor ``name``.

        Args:
            name: the tensor.
            start: the element at which the range begins.
            block: shape (G, C), one row per average; reused after the call returns, so copy what is to be kept. Integer and boolean tensors
                arrive in their own type, the same values in every row.
        """
        ...


def stream_product(
    checkpoints: Sequence[Checkpoint],
    weights: ArrayLike,
    consumer: Consumer,
    *,
    accumulate: Accumulate = "float32",
    memory: int = 2**30,
    workers: int | None = None,
    allow_nonfinite: bool = False,
    progress: Progress | None = None,
) -> list[str | None]:
    """Form G weighted sums of N checkpoints, reading every byte once.

    Args:
        checkpoints: N checkpoints with the same tensors.
        weights: shape (G, N). A checkpoint whose weight is 0 in every row is not read.
        consumer: called with ranges of the result as they become known; see :class:`Consumer`. Tensors without elements are left out.
        accumulate: the type in which floating-point tensors are summed; tensors stored in float64 are always summed in float64. Integer and
            boolean tensors are taken from the last checkpoint that is read.
        memory: the most bytes to use for buffers.
        workers: threads; by default one per processor, at most 8.
        allow_nonfinite: average NaN and infinity as they are, instead of refusing them. They reach every row, also where the weight is 0.
        progress: called with the bytes read so far and in all, one call at a time.

    Returns:
        The fingerprint of each checkpoint, None for those not read.

    Raises:
        CheckpointError: if a value is not finite, or a file fails or changes while it is read.
        ValueError: if the shape of ``weights``, ``accumulate``, ``memory`` or ``workers`` do not fit.
    """
    matrix = _check_weights(weights, len(checkpoints))
    used = [i for i in range(len(checkpoints)) if (matrix[:, i] != 0.0).any()]
    workers = min(os.cpu_count() or 1, _WORKERS) if workers is None else workers
    if accumulate not in ("float32", "float64"):
        raise ValueError(f"accumulate={accumulate!r}; it must be 'float32' or 'float64'.")
    if workers < 1:
        raise ValueError(f"workers={workers}; it must be at least 1.")
    sources = [checkpoints[i] for i in used]
    product = _Product(sources, np.ascontiguousarray(matrix[:, used]), consumer, accumulate, memory, workers, allow_nonfinite, progress)
    product.run()
    fingerprints: list[str | None] = [None] * len(checkpoints)
    for row, i in enumerate(used):
        checkpoints[i].check_unchanged()
        fingerprints[i] = combine_digests(checkpoints[i].tensors, {name: found[row] for name, found in product.digests.items()})
    return fingerprints


class _Product:
    """One run of the product: what the workers share."""

    def __init__(
        self,
        sources: list[Checkpoint],
        weights: NDArray[np.float64],
        consumer: Consumer,
        accumulate: Accumulate,
        memory: int,
        workers: int,
        allow_nonfinite: bool,
        progress: Progress | None,
    ) -> None:
        self.sources, self.consumer, self.workers, self.allow_nonfinite = sources, consumer, workers, allow_nonfinite
        self.weights = weights
        self.tensors = sources[-1].tensors
        self.digests: dict[str, list[str]] = {}
        self.stop = threading.Event()
        self._progress, self._lock, self._done, self._total = progress, threading.Lock(), 0, sum(c.nbytes for c in sources)
        self._queue = deque(sorted(self.tensors, key=lambda name: -self.tensors[name].nbytes))
        self._types = {name: _sum_type([c.tensors[name].dtype for c in sources], getattr(torch, accumulate)) for name in self.tensors}
        self.width = _block_width(set(self._types.values()), *weights.shape, memory // workers)
        self._checked = _covering_rows(weights)

    def run(self) -> None:
        """Process all tensors; the first error of a worker stops the others."""
        with _one_thread_per_operation(), ThreadPoolExecutor(self.workers, thread_name_prefix="lagless-product") as pool:
            try:
                for future in as_completed([pool.submit(self._work) for _ in range(self.workers)]):
                    future.result()
            except BaseException:
                self.stop.set()
                raise

    def _work(self) -> None:
        spaces: dict[torch.dtype, _Workspace] = {}
        keep_open = len(self.sources) * self.workers <= _OPEN_FILES
        with np.errstate(all="ignore"):
            while self._queue and not self.stop.is_set():
                try:
                    name = self._queue.popleft()
                except IndexError:
                    return
                dtype = self._types[name]
                space = spaces.setdefault(dtype, _Workspace(dtype, self.weights, self.width)) if dtype not in spaces else spaces[dtype]
                with ExitStack() as stack:
                    self._tensor(name, space, [stack.enter_context(c.reader(name, keep_open)) for c in self.sources])

    def _tensor(self, name: str, space: _Workspace, readers: list[Reader]) -> None:
        numel = self.tensors[name].numel
        stored = [c.tensors[name] for c in self.sources]
        digests = [xxhash.xxh3_128() for _ in readers]
        for start in range(0, numel, self.width):
            if self.stop.is_set():
                return
            count = min(self.width, numel - start)
            for row, (reader, info, digest) in enumerate(zip(readers, stored, digests, strict=True)):
                space.read(row, reader, info, start, count, digest)
            block = space.multiply(count)
            if not self.allow_nonfinite and space.sums and not all(np.isfinite(block[row].sum()) for row in self._checked):
                self._refuse_nonfinite(name, start, space.rows[:, :count])
            self.consumer(name, start, torch.from_numpy(block) if space.sums else space.copied(count))
            self._report(count * sum(info.dtype.itemsize for info in stored))
        self.digests[name] = [digest.hexdigest() for digest in digests]

    def _refuse_nonfinite(self, name: str, start: int, rows: NDArray) -> None:
        """Find the value that made a sum non-finite; finite values whose sum overflows are none of our business."""
        for checkpoint, row in zip(self.sources, rows, strict=True):
            if (bad := np.flatnonzero(~np.isfinite(row))).size:
                raise CheckpointError(
                    f"{checkpoint.file_of(name)}: tensor {name!r} has {row[bad[0]]} at element {start + int(bad[0])}. The run has diverged or the "
                    "file is damaged: leave this checkpoint out, or average it as it is with allow_nonfinite (--allow-nonfinite)."
                )

    def _report(self, count: int) -> None:
        if self._progress is not None:
            with self._lock:
                self._done += count
                self._progress(self._done, self._total)
