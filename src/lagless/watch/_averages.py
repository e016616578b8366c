"""Averages of checkpoints that come one after another: buffers on disk, moved block by block by each checkpoint.

The buffers after a checkpoint are written into new files, and the record that names them replaces the former one when
they are on the disk. So the state is always whole, wherever the process is killed, and earlier ones can be kept to
return to.
"""

from __future__ import annotations

import os
import time
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from threading import Event, Lock
from typing import Any

import torch
import xxhash
from torch import Tensor

from lagless.checkpoints import (
    Checkpoint,
    CheckpointError,
    TensorInfo,
    byte_view,
    combine_digests,
    is_averaged,
    permissions_of,
)
from lagless.execution import (
    BLOCK,
    RowUpdate,
    RuleSet,
    buffer_dtype,
    first_nan,
    move_block,
    start_buffers,
)
from lagless.rules import Rule, rule_to_dict
from lagless.watch._record import Absorbed, Generation, Record, Stamp, read_record
from lagless.watch._snapshot import Snapshot
from lagless.watch._store import BufferFile, BufferLayout, Store

_WORKERS = 8
_NONE = torch.empty(0, dtype=torch.float32)


class NonFiniteError(CheckpointError):
    """A checkpoint has NaN or infinity where the averages would take it in."""


class Averages:
    """The averages of a run, kept in a folder.

    Args:
        folder: of the state.
        rules: by name; those of a state that is there already must be the same.
        keep: how many states to keep, the present one included, for a run that is rolled back.
        keep_live: whether to keep the last checkpoint's own weights too, for whoever evaluates them later.
        workers: threads; by default one per processor, at most 8.

    Raises:
        CheckpointError: if the state is damaged, or of other rules.
    """

    def __init__(
        self,
        folder: Path,
        rules: Mapping[str, Rule],
        keep: int = 2,
        keep_live: bool = False,
        workers: int | None = None,
    ) -> None:
        self.store = Store(folder)
        found = read_record(folder)
        if found is not None and not found.history:
            found = replace(found, rules=dict(rules))
        if found is not None and dict(found.rules) != dict(rules):
            raise CheckpointError(
                f"{folder}: {_difference(found.rules, rules)}. Ask for the same rules, or choose another output folder "
                "(-o)."
            )
        self.record = found or Record(dict(rules))
        self._keep, self._keep_live = keep, keep_live
        self._workers = min(os.cpu_count() or 1, _WORKERS) if workers is None else workers
        self._pinned: Counter[str] = Counter()
        self._lock = Lock()
        self.store.discard(self._kept())

    @property
    def rules(self) -> Mapping[str, Rule]:
        """By name."""
        return self.record.rules

    def absorb(
        self,
        checkpoint: Checkpoint,
        step: int,
        stamp: Stamp,
        losses: Sequence[tuple[int, str]] = (),
        start_of: Checkpoint | None = None,
    ) -> Absorbed:
        """Take a checkpoint into all averages, reading every byte of it once.

        Args:
            checkpoint: the next one; the first is θ_0.
            step: of the optimizer, larger than that of the last one.
            stamp: of its files, to know it again.
            losses: what its log says, to notice a run that was rolled back.
            start_of: a checkpoint of the run, of which ``checkpoint`` is θ_0 without being of it.

        Raises:
            CheckpointError: if it cannot be read, changes meanwhile, or has other tensors than the ones before.
            NonFiniteError: if a value in it is not finite.
            OSError: if the state cannot be written, as on a full disk; it is then as before.
        """
        began = time.monotonic()
        record = self.record
        if not record.history:
            record = replace(record, **_kind_of(checkpoint, start_of))
        _check_tensors(record, checkpoint, start_of is not None)
        work = _Absorption(self, record, checkpoint, step)
        try:
            fingerprint, generation = work.run(self._workers, self._kept(), self._keep_live)
        finally:
            work.close()
        absorbed = Absorbed(
            checkpoint.path.name, step, fingerprint, stamp, checkpoint.nbytes, time.monotonic() - began, tuple(losses)
        )
        files, folders = permissions_of([checkpoint])
        self._commit(
            replace(
                record,
                permissions=(record.permissions[0] & files, record.permissions[1] & folders),
                history=(*record.history, absorbed),
                generations=(*record.generations, generation)[-self._keep :],
                serial=record.serial + 1,
            )
        )
        return absorbed

    def back_to(self, before: int) -> list[Absorbed]:
        """Return to the newest state kept in which there is no checkpoint of step ``before`` or later.

        Returns:
            The checkpoints that are no longer in the averages; those among them that are still there may be absorbed
            again.
        """
        former = self.record.history
        self._commit(self.record.back_to(before))
        self.store.discard(self._kept())
        return list(former[len(self.record.history) :])

    def keep_only(self, count: int) -> None:
        """Keep fewer states from now on, and remove the files of the others."""
        self._keep = min(self._keep, count)
        if len(self.record.generations) > self._keep:
            self._commit(replace(self.record, generations=self.record.generations[-self._keep :]))
        self.store.discard(self._kept())

    def note(self, record: Record) -> None:
        """Write a record that differs in what is known of checkpoints, not in buffers."""
        self._commit(record)

    @contextmanager
    def snapshot(self) -> Iterator[Snapshot]:
        """Yield the present averages, which stay readable inside the block whatever is absorbed meanwhile.

        Raises:
            CheckpointError: before θ_0 and one more checkpoint were absorbed.
        """
        with self._lock:
            record = self.record
            generation = record.newest
            if generation is None:
                raise CheckpointError("no checkpoint has been absorbed yet, so there is no average.")
            self._pinned.update(generation.files)
        try:
            with ExitStack() as stack:
                yield Snapshot(record, generation, self.open_files(record, generation, stack))
        finally:
            with self._lock:
                self._pinned.subtract(generation.files)

    def layouts(self, record: Record, tensors: Mapping[str, TensorInfo]) -> list[BufferLayout]:
        """Where tensors lie in the file of each buffer, in that of the live weights, and in that of what is copied."""
        keys = RuleSet(record.rules, 0).keys
        start = record.start_dtypes or {}
        own = {
            name: torch.promote_types(info.dtype, start.get(name, info.dtype))
            for name, info in tensors.items()
            if is_averaged(name, info.dtype)
        }
        dtypes = [{name: buffer_dtype(key, dtype, None) for name, dtype in own.items()} for key in keys]
        live = {name: tensors[name].dtype for name in own}
        copied = {name: info.dtype for name, info in tensors.items() if name not in own}
        return [BufferLayout(tensors, kinds) for kinds in (*dtypes, live, copied)]

    def open_files(self, record: Record, generation: Generation, stack: ExitStack) -> list[BufferFile | None]:
        """Open the files of a generation: of its buffers, of the live weights, of what is copied."""
        assert record.tensors is not None
        names = [*generation.buffers, generation.live, generation.copied]
        files: list[BufferFile | None] = []
        for name, layout in zip(names, self.layouts(record, record.tensors), strict=True):
            if name is None:
                files.append(None)
                continue
            file = self.store.open(name, layout)
            stack.callback(file.close)
            files.append(file)
        return files

    def _kept(self) -> set[str]:
        pinned = {name for name, count in self._pinned.items() if count > 0}
        return pinned.union(*(generation.files for generation in self.record.generations))

    def _commit(self, record: Record) -> None:
        record.written_to(self.store.folder)
        with self._lock:
            self.record = record


class _Absorption:
    """One checkpoint on its way into the buffers: what the workers share."""

    def __init__(self, averages: Averages, record: Record, checkpoint: Checkpoint, step: int) -> None:
        assert record.tensors is not None
        self._averages, self._checkpoint, self._record, self._step = averages, checkpoint, record, step
        self._tensors = record.tensors
        self._first = record.newest is None
        rules = RuleSet(record.rules, record.history[0].step if record.history else step, every_step=False)
        self._rows: list[RowUpdate] = []
        if record.newest is not None:
            rules.last = dict(record.newest.last)
            self._rows, rules.last = rules.advance(step)
        self._rules = rules
        self._stack, self._stop = ExitStack(), Event()
        self._old: list[BufferFile | None] = []
        self._new: dict[int, BufferFile] = {}

    def run(self, workers: int, kept: set[str], keep_live: bool) -> tuple[str, Generation]:
        """Read the checkpoint and write the new files; returns its fingerprint and the generation that names them."""
        record, newest, count = self._record, self._record.newest, len(self._rules.keys)
        if newest is not None:
            self._old = self._averages.open_files(record, newest, self._stack)
        moved = {row.buffer for row in self._rows} if newest is not None else set(range(count))
        needs_live = keep_live or any(self._reads_live(name) for name in record.rules)
        wanted = [*sorted(moved), *([count] if needs_live else []), count + 1]
        layouts = self._averages.layouts(record, self._tensors)
        for number in wanted:
            file = self._averages.store.make(f"{record.serial:08d}-{number:03d}", layouts[number], kept)
            self._stack.callback(file.close)
            self._new[number] = file
            kept = kept | {file.path.name}
        fingerprint = self._pass(workers)
        for file in self._new.values():
            file.sync()
        buffers = tuple(
            self._new[i].path.name if i in self._new else newest.buffers[i]  # type: ignore[union-attr]
            for i in range(count)
        )
        live = self._new[count].path.name if needs_live else None
        generation = Generation(
            len(record.history) + 1, self._rules.last, buffers, live, self._new[count + 1].path.name
        )
        return fingerprint, generation

    def close(self) -> None:
        self._stack.close()

    def _reads_live(self, name: str) -> bool:
        try:
            return self._rules.coefficients(name, self._step)[1] != 0.0
        except RuntimeError:  # there is no average yet
            return False

    def _pass(self, workers: int) -> str:
        queue = deque(sorted(self._tensors, key=lambda name: self._tensors[name].nbytes, reverse=True))
        digests: dict[str, str] = {}

        def work() -> None:
            while not self._stop.is_set():
                try:
                    name = queue.popleft()
                except IndexError:
                    return
                digests[name] = self._tensor(name)

        with ThreadPoolExecutor(workers, thread_name_prefix="lagless-watch") as pool:
            try:
                for future in as_completed([pool.submit(work) for _ in range(workers)]):
                    future.result()
            except BaseException:
                self._stop.set()
                raise
        self._checkpoint.check_unchanged()
        return combine_digests(self._checkpoint.tensors, digests)

    def _tensor(self, name: str) -> str:
        info = self._checkpoint.tensors[name]
        digest, move = xxhash.xxh3_128(), is_averaged(name, info.dtype)
        with self._checkpoint.reader(name) as reader:
            for start in range(0, info.numel, BLOCK):
                if self._stop.is_set():
                    break
                block = torch.empty(min(BLOCK, info.numel - start), dtype=info.dtype, device="cpu")
                view = byte_view(block)
                reader.read(start * info.dtype.itemsize, view)
                digest.update(view.data)
                if move:
                    self._move(name, start, block)
                else:
                    self._new[len(self._rules.keys) + 1].write(name, start, block)
        return digest.hexdigest()

    def _move(self, name: str, start: int, live: Tensor) -> None:
        count = len(self._rules.keys)
        if count in self._new:
            self._new[count].write(name, start, live)
        if self._first:
            if (at := first_nan(live)) is not None:
                raise self._nonfinite(name, start + at, float("nan"))
            own = torch.promote_types(live.dtype, self._tensors[name].dtype)
            blocks = start_buffers(self._rules.keys, live, own)
            for i, block in enumerate(blocks):
                self._new[i].write(name, start, block)
            return
        needed = {i for row in self._rows for i in (row.buffer, *(other for other, _ in row.others))} or {0}
        blocks = [self._read(i, name, start, len(live)) if i in needed else _NONE for i in range(count)]
        if (bad := move_block(self._rows, blocks, live)) is not None:
            raise self._nonfinite(name, start + int(bad[0]), live[bad[0]].item())
        for row in self._rows:
            self._new[row.buffer].write(name, start, blocks[row.buffer])

    def _read(self, number: int, name: str, start: int, count: int) -> Tensor:
        file = self._old[number]
        assert file is not None
        return file.read(name, start, count)

    def _nonfinite(self, name: str, element: int, value: float) -> NonFiniteError:
        file = self._checkpoint.file_of(name)
        return NonFiniteError(f"{file}: tensor {name!r} has {value} at element {element}: has the run diverged?")


def _kind_of(start: Checkpoint, run: Checkpoint | None) -> dict[str, Any]:
    """What a record says of checkpoints, from the first of them: θ_0, or the first of a run whose θ_0 is given."""
    own = run or start
    dtypes = {name: info.dtype for name, info in start.tensors.items() if info != own.tensors[name]}
    written = {name: info.dtype for name, info in own.written.items() if info != own.tensors[name]}
    return {
        "tensors": dict(own.tensors),
        "written": written or None,
        "stem": own.stem,
        "dequantized": own.quantized is not None,
        "start_dtypes": dtypes or None,
        "start_given": run is not None,
        "is_adapter": own.is_adapter,
    }


def _check_tensors(record: Record, checkpoint: Checkpoint, is_start: bool) -> None:
    assert record.tensors is not None
    if checkpoint.is_adapter != record.is_adapter:
        kind = "an adapter" if checkpoint.is_adapter else "a whole model"
        raise CheckpointError(
            f"{checkpoint.path} is {kind}, and the checkpoints before it were not. Give each kind a watch of its own."
        )
    for name in sorted(record.tensors.keys() | checkpoint.tensors.keys()):
        before, now = record.tensors.get(name), checkpoint.tensors.get(name)
        if before != now and not (is_start and before and now and before.shape == now.shape):
            raise CheckpointError(
                f"{checkpoint.path}: tensor {name!r} is {now or 'missing'}; in the checkpoints before it was "
                f"{before or 'missing'}. They are not of one run."
            )


def _difference(held: Mapping[str, Rule], asked: Mapping[str, Rule]) -> str:
    if held.keys() != asked.keys():
        return f"holds averages by {', '.join(held)}, and {', '.join(asked)} are asked for"
    name = next(name for name in held if held[name] != asked[name])
    one, other = rule_to_dict(held[name]), rule_to_dict(asked[name])
    key = next(key for key in [*one, *other] if one.get(key) != other.get(key))
    return f"{name} has {key}={one.get(key)!r} there, and {other.get(key)!r} is asked for"
