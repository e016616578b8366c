"""Averages formed by the recursion of their rule, checkpoint after checkpoint, as a run that goes on needs it.

The weighted sum Σ_i w_i θ_i needs the weights, which are known only once the last checkpoint is there: an average that
is kept while checkpoints come and go cannot be that sum, bit for bit. It can be the recursion

    b ← M b + v θ_t        μ̂ = c·b + d θ_t

whose state has a bounded size. Both are the same number up to rounding.
"""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack
from threading import Event, Lock

import torch
import xxhash
from torch import Tensor

from lagless.checkpoints import (
    Checkpoint,
    CheckpointError,
    Reader,
    TensorInfo,
    byte_view,
    combine_digests,
    is_averaged,
    spare_descriptors,
)
from lagless.execution import BLOCK, Ranks, RowUpdate, RuleSet, first_nan, move_block, read_block, start_buffers
from lagless.posthoc._weighted_sums import Consumer, Progress
from lagless.rules import Rule

_WORKERS = 8


def stream_recursion(
    checkpoints: Sequence[Checkpoint],
    steps: Sequence[int],
    rules: Sequence[Rule],
    consumer: Consumer,
    *,
    workers: int | None = None,
    allow_nonfinite: bool = False,
    progress: Progress | None = None,
    ranks: Ranks | None = None,
    names: Collection[str] | None = None,
) -> list[str | None]:
    """Form the averages of rules by their recursion, reading every byte once.

    Args:
        checkpoints: N checkpoints with the same tensors, θ_0 first.
        steps: the step of each.
        rules: G rules, each of which makes an update among ``steps``.
        consumer: called with ranges of the result, shape (G, C); see :func:`lagless.posthoc.stream_product`.
        workers: threads; by default one per processor, at most 8.
        allow_nonfinite: average NaN and infinity as they are, instead of refusing them.
        progress: called with the bytes read so far and in all.
        ranks: the processes among which the tensors are divided; all of them call this.
        names: the tensors that fall to this process; None for all.

    Returns:
        The fingerprint of each checkpoint.

    Raises:
        CheckpointError: if a value is not finite, or a file fails or changes while it is read.
    """
    work = _Pass(checkpoints, steps, rules, consumer, allow_nonfinite, progress)
    own = list(checkpoints[-1].tensors) if names is None else list(names)
    digests: dict[str, list[str]] = {}
    for found in (ranks or Ranks()).together(lambda: work.run(own, workers)):
        digests |= found
    return [
        combine_digests(checkpoint.tensors, {name: found[i] for name, found in digests.items()})
        for i, checkpoint in enumerate(checkpoints)
    ]


class _Pass:
    """One pass over the checkpoints: what the workers share."""

    def __init__(
        self,
        checkpoints: Sequence[Checkpoint],
        steps: Sequence[int],
        rules: Sequence[Rule],
        consumer: Consumer,
        allow_nonfinite: bool,
        progress: Progress | None,
    ) -> None:
        self._checkpoints, self._consumer = checkpoints, consumer
        self._checked, self._progress = not allow_nonfinite, progress
        named = {f"r{i}": rule for i, rule in enumerate(rules)}
        rule_set = RuleSet(named, steps[0], every_step=False)
        self._keys, self._moves = rule_set.keys, list[Sequence[RowUpdate]]()
        for step in steps[1:]:
            rows, rule_set.last = rule_set.advance(step)
            self._moves.append(rows)
        self._reads = [rule_set.coefficients(name, steps[-1]) for name in named]
        self._stop, self._lock, self._done, self._total = Event(), Lock(), 0, 0

    def run(self, names: Sequence[str], workers: int | None) -> dict[str, list[str]]:
        last = self._checkpoints[-1].tensors
        queue = deque(sorted(names, key=lambda name: last[name].nbytes, reverse=True))
        self._total = sum(checkpoint.tensors[name].nbytes for checkpoint in self._checkpoints for name in names)
        count = min(os.cpu_count() or 1, _WORKERS) if workers is None else workers
        keep_open = len(self._checkpoints) * count <= spare_descriptors()
        digests: dict[str, list[str]] = {}

        def work() -> None:
            while not self._stop.is_set():
                try:
                    name = queue.popleft()
                except IndexError:
                    return
                digests[name] = self._tensor(name, keep_open)

        with ThreadPoolExecutor(count, thread_name_prefix="lagless-recursion") as pool:
            try:
                for future in as_completed([pool.submit(work) for _ in range(count)]):
                    future.result()
            except BaseException:
                self._stop.set()
                raise
        for checkpoint in self._checkpoints:
            checkpoint.check_unchanged()
        return digests

    def _tensor(self, name: str, keep_open: bool) -> list[str]:
        info = self._checkpoints[-1].tensors[name]
        with ExitStack() as stack:
            open_ = [stack.enter_context(c.reader(name, keep_open)) for c in self._checkpoints]
            hashes = [xxhash.xxh3_128() for _ in open_]
            for start in range(0, info.numel, BLOCK):
                if self._stop.is_set():
                    break
                count = min(BLOCK, info.numel - start)
                read = (
                    read_elements(reader, checkpoint.tensors[name].dtype, start, count, digest)
                    for reader, checkpoint, digest in zip(open_, self._checkpoints, hashes, strict=True)
                )
                if is_averaged(name, info.dtype):
                    self._consumer(name, start, self._average(name, info, start, read))
                else:
                    *_, last = read
                    self._consumer(name, start, last.expand(len(self._reads), count))
                self._report(name, count)
            return [digest.hexdigest() for digest in hashes]

    def _average(self, name: str, info: TensorInfo, start: int, blocks: Iterator[Tensor]) -> Tensor:
        live = next(blocks)
        if self._checked and (at := first_nan(live)) is not None:
            raise nonfinite(self._checkpoints[0], name, start + at, math.nan)
        buffers = start_buffers(self._keys, live, torch.promote_types(live.dtype, info.dtype))
        for number, (rows, live) in enumerate(zip(self._moves, blocks, strict=True), 1):
            if (bad := move_block(rows, buffers, live)) is not None and self._checked:
                raise nonfinite(self._checkpoints[number], name, start + int(bad[0]), live[bad[0]].item())
        return torch.stack(
            [read_block([*((buffers[i], weight) for i, weight in read), (live, d)]) for read, d in self._reads]
        )

    def _report(self, name: str, count: int) -> None:
        if self._progress is not None:
            with self._lock:
                self._done += count * sum(c.tensors[name].dtype.itemsize for c in self._checkpoints)
                self._progress(self._done, self._total)


def read_elements(reader: Reader, dtype: torch.dtype, start: int, count: int, digest: xxhash.xxh3_128) -> Tensor:
    """Return ``count`` elements of a tensor from ``start`` on, their bytes added to ``digest``."""
    block = torch.empty(count, dtype=dtype, device="cpu")
    view = byte_view(block)
    reader.read(start * dtype.itemsize, view)
    digest.update(view.data)
    return block


def nonfinite(checkpoint: Checkpoint, name: str, element: int, value: float) -> CheckpointError:
    """Return the error that names a value that is not finite, or that an average became so beside ``value``."""
    what = f"has {value}" if not math.isfinite(value) else f"has {value}, and an earlier checkpoint infinity,"
    return CheckpointError(
        f"{checkpoint.file_of(name)}: tensor {name!r} {what} at element {element}. The run has diverged or the file is "
        "damaged: leave this checkpoint out, or average it as it is with allow_nonfinite (--allow-nonfinite)."
    )
