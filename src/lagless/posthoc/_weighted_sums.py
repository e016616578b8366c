"""The streamed product W (G×N) · Θ (N×P): G averages of N checkpoints in one pass over their bytes, in bounded memory.

For each tensor, range by range of C elements: read that range from every checkpoint (N×C), multiply (G×N)·(N×C), hand
the result to the consumer. Worker threads take whole tensors, the largest first; reading, multiplying and hashing all
release the interpreter's lock.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Collection, Generator, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack, contextmanager
from typing import Literal, Protocol

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from lagless.checkpoints import (
    Checkpoint,
    CheckpointError,
    byte_view,
    combine_digests,
    is_averaged,
    spare_descriptors,
)
from lagless.execution import Ranks
from lagless.posthoc._blocks import OpenTensor, Workspace, block_width, covering_rows, keep_constants, scratch_bytes

Accumulate = Literal["float32", "float64"]
Progress = Callable[[int, int], None]

_WORKERS = 8  # more do not read faster
_WORKSPACE = 4 << 20  # bytes per worker at which blocks stay in cache and calls are few; measured on 2 cores
_SHORTEST = 1 << 15  # elements; shorter reads cost more in calls than they gain in cache
_AFFINE = 1e-6  # how far weights that sum to 1 may be from it


class Consumer(Protocol):
    """Receives averages range by range, from several threads at once and in any order."""

    def __call__(self, name: str, start: int, block: Tensor, /) -> None:
        """Take elements ``start``, ``start + 1``, ... of the flattened tensor ``name``.

        Args:
            name: the tensor.
            start: the element at which the range begins.
            block: shape (G, C), one row per average; reused after the call returns, so copy what is to be kept. Integer
                and boolean tensors arrive in their own type, the same values in every row.
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
    ranks: Ranks | None = None,
    names: Collection[str] | None = None,
) -> list[str | None]:
    """Form G weighted sums of N checkpoints, reading every byte once.

    Where all checkpoints that are read have the same element, an average (weights that sum to 1) has it too, bit for
    bit, also where it is infinite.

    Args:
        checkpoints: N checkpoints with the same tensors.
        weights: shape (G, N), or (N,) for one average. A checkpoint whose weight is 0 in every row is not read.
        consumer: called with ranges of the result as they become known; see :class:`Consumer`. Tensors without elements
            are left out.
        accumulate: the type in which floating-point tensors are summed; tensors stored in float64 are always summed in
            float64. Integer and boolean tensors, and running statistics of normalisation layers (``running_mean``,
            ``running_var``), are taken from the last checkpoint that is read.
        memory: the most bytes to use for buffers. (A tensor that a torch file does not hold row by row comes on top.)
        workers: threads; by default one per processor, at most 8.
        allow_nonfinite: average NaN and infinity as they are, instead of refusing them. They reach every row, also
            where the weight is 0.
        progress: called with the bytes read so far and in all, one call at a time.
        ranks: the processes among which the tensors are divided; all of them call this.
        names: the tensors that fall to this process; None for all.

    Returns:
        The fingerprint of each checkpoint, None for those not read.

    Raises:
        CheckpointError: if a value is not finite, or a file fails or changes while it is read.
        ValueError: if the shape of ``weights``, ``accumulate``, ``memory`` or ``workers`` do not fit.
    """
    matrix = check_weights(weights, len(checkpoints))
    used = [i for i in range(len(checkpoints)) if (matrix[:, i] != 0.0).any()]
    workers = _default_workers() if workers is None else workers
    if accumulate not in ("float32", "float64"):
        raise ValueError(f"accumulate={accumulate!r}; it must be 'float32' or 'float64'.")
    if workers < 1:
        raise ValueError(f"workers={workers}; it must be at least 1.")
    sources = [checkpoints[i] for i in used]
    product = _Product(
        sources,
        np.ascontiguousarray(matrix[:, used]),
        consumer,
        sources[-1].tensors.keys() if names is None else names,
        accumulate,
        memory,
        workers,
        allow_nonfinite,
        progress,
    )
    digests: dict[str, list[str]] = {}
    for found in (ranks or Ranks()).together(product.run):
        digests |= found
    fingerprints: list[str | None] = [None] * len(checkpoints)
    for row, i in enumerate(used):
        fingerprints[i] = combine_digests(checkpoints[i].tensors, {name: found[row] for name, found in digests.items()})
    return fingerprints


class _Product:
    """One run of the product: what the workers share."""

    def __init__(
        self,
        sources: list[Checkpoint],
        weights: NDArray[np.float64],
        consumer: Consumer,
        names: Collection[str],
        accumulate: Accumulate,
        memory: int,
        workers: int,
        allow_nonfinite: bool,
        progress: Progress | None,
    ) -> None:
        self._digests: dict[str, list[str]] = {}
        self._sources, self._weights, self._consumer, self._workers = sources, weights, consumer, workers
        self._checked = [] if allow_nonfinite else covering_rows(weights)
        self._affine = [g for g, row in enumerate(weights) if abs(row.sum() - 1.0) <= _AFFINE * np.abs(row).sum()]
        self._tensors = sources[-1].tensors
        self._queue = deque(sorted(names, key=lambda name: self._tensors[name].nbytes, reverse=True))
        self._types = {
            name: _sum_type(name, [c.tensors[name].dtype for c in sources], accumulate) for name in self._tensors
        }
        sum_bytes = sum(dtype.itemsize for dtype in set(self._types.values()) if dtype is not None)
        rows, columns = weights.shape
        stored = ((c.tensors[name].dtype, dtype) for c in sources for name, dtype in self._types.items())
        self._scratch = scratch_bytes(columns, {held for held, dtype in stored if dtype is not None and held != dtype})
        self._width = block_width(rows, columns, sum_bytes, self._scratch, memory // workers, _WORKSPACE, _SHORTEST)
        self._descriptors = spare_descriptors()
        self._stop, self._lock = threading.Event(), threading.Lock()
        self._progress, self._done, self._total = (
            progress,
            0,
            sum(c.tensors[name].nbytes for c in sources for name in names),
        )

    def run(self) -> dict[str, list[str]]:
        """Process the tensors; the first error of a worker stops the others. Returns their digests in each source."""
        with (
            _one_thread_per_operation(),
            ThreadPoolExecutor(self._workers, thread_name_prefix="lagless-product") as pool,
        ):
            try:
                for future in as_completed([pool.submit(self._work) for _ in range(self._workers)]):
                    future.result()
            except BaseException:
                self._stop.set()
                raise
        for source in self._sources:
            source.check_unchanged()
        return self._digests

    def _work(self) -> None:
        keep_open = len(self._sources) * self._workers <= self._descriptors
        scratch = torch.empty(self._width * self._scratch, dtype=torch.uint8, device="cpu")
        spaces: dict[torch.dtype, Workspace] = {}
        while not self._stop.is_set():
            try:
                name = self._queue.popleft()
            except IndexError:
                return
            dtype = self._types[name]
            if dtype is not None and dtype not in spaces:
                spaces[dtype] = Workspace(self._weights, self._width, dtype, self._checked, scratch)
            with ExitStack() as stack:
                readers = [stack.enter_context(source.reader(name, keep_open)) for source in self._sources]
                tensor = OpenTensor(readers, [source.tensors[name].dtype for source in self._sources])
                for start in range(0, self._tensors[name].numel, self._width):
                    if self._stop.is_set():
                        return
                    if dtype is None:
                        self._copy(name, start, scratch, tensor)
                    else:
                        self._sum(name, start, spaces[dtype], tensor)
            self._digests[name] = tensor.hexdigests()

    def _sum(self, name: str, start: int, space: Workspace, tensor: OpenTensor) -> None:
        count = min(self._width, self._tensors[name].numel - start)
        block, finite = space.form(tensor, start, count)
        rows = space.rows[:, :count]
        constant = keep_constants(rows, block, self._affine)
        if not finite:
            if constant is not None and len(self._affine) == len(self._weights):
                rows = rows.masked_fill(constant, 0.0)  # infinite everywhere, as in masks
            self._refuse_nonfinite(name, start, zip(self._sources, rows, strict=True))
        self._consumer(name, start, block)
        self._report(name, count)

    def _copy(self, name: str, start: int, scratch: Tensor, tensor: OpenTensor) -> None:
        count = min(self._width, self._tensors[name].numel - start)
        for row, stored in enumerate(tensor.types):  # what stays is the last checkpoint's
            tensor.read_one(row, start, byte_view(scratch[: count * stored.itemsize]).data)
        dtype = tensor.types[-1]
        values = scratch[: count * dtype.itemsize].view(dtype)
        if dtype.is_floating_point and self._checked:
            self._refuse_nonfinite(name, start, [(self._sources[-1], values)])
        self._consumer(name, start, values.expand(len(self._weights), count))
        self._report(name, count)

    def _refuse_nonfinite(self, name: str, start: int, rows: Iterable[tuple[Checkpoint, Tensor]]) -> None:
        """Name the value that made a sum non-finite; finite values whose sum overflows are no reason to refuse."""
        for source, row in rows:
            if len(bad := (~torch.isfinite(row)).nonzero()):
                first = int(bad[0])
                raise CheckpointError(
                    f"{source.file_of(name)}: tensor {name!r} has {row[first].item()} at element {start + first}. The "
                    "run has diverged or the file is damaged: leave this checkpoint out, or average it as it is with "
                    "allow_nonfinite (--allow-nonfinite)."
                )

    def _report(self, name: str, count: int) -> None:
        if self._progress is not None:
            with self._lock:
                self._done += count * sum(source.tensors[name].dtype.itemsize for source in self._sources)
                self._progress(self._done, self._total)


def check_weights(weights: ArrayLike, columns: int) -> NDArray[np.float64]:
    """The weights as a (G, N) matrix; one row may be given as a vector.

    Raises:
        ValueError: if the shape does not fit, or a weight is not finite, or all are 0.
    """
    matrix = np.atleast_2d(np.asarray(weights, dtype=np.float64))
    if matrix.ndim != 2 or matrix.shape[0] == 0 or matrix.shape[1] != columns:
        raise ValueError(
            f"weights: shape {matrix.shape}; it must be (G, {columns}), one column per checkpoint and at least one row."
        )
    if not np.isfinite(matrix).all():
        raise ValueError("weights: NaN or infinity among them; every weight must be finite.")
    if not matrix.any():
        raise ValueError("weights: all are 0; at least one checkpoint needs a weight.")
    return matrix


def _sum_type(name: str, stored: list[torch.dtype], accumulate: Accumulate) -> torch.dtype | None:
    """The type to sum in; None for integers, booleans and running statistics, which are copied."""
    if not is_averaged(name, stored[-1]):
        return None
    return torch.float64 if torch.float64 in stored else getattr(torch, accumulate)


def _default_workers() -> int:
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(available, _WORKERS)


@contextmanager
def _one_thread_per_operation() -> Generator[None]:
    """Our workers are the parallelism; threads started by single operations would get in their way."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
