"""Averages on the host that follow live weights on an accelerator while training goes on.

A thread moves the weights through bounded pinned memory, on a stream of its own, and updates the averages block by
block. The weights must stay as they are until all are copied, which spans the forward and backward pass: with staging
memory smaller than the model, the last copy cannot even be issued before the host has averaged most of the model.
Copying on the device first would need no waiting, but another copy of the model there, which is what offloading is
meant to save. So the optimizers wait: torch runs a hook before every step of every optimizer, and here it makes the
stream of that step wait for the copies. Weights that are written in another way too early are noticed by their version
counters, and the averages are refused instead of mixed.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lagless.execution import forks, split, wait_for_copies

STAGING_BYTES = 1 << 28  # 5 ms of copying at 50 GB/s: enough to keep copies going while the host works


def can_overlap(device: torch.device) -> bool:
    """Whether copies from ``device`` can run beside its computations: on accelerators with streams."""
    return device.type != "cpu" and hasattr(torch.get_device_module(device), "Stream")


class _Staged(NamedTuple):
    """A block on its way: the slot it fills, its tensors there, when they have arrived, and what to do then."""

    slot: Tensor
    pieces: list[Tensor]
    arrived: Any
    apply: Callable[[list[Tensor]], None]


class Offload:
    """Runs one update at a time in a thread, on copies of the live tensors."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="lagless-offload")
        self._pending: Future[None] | None = None
        self._streams: dict[torch.device, CopyStream] = {}
        self._slots: list[Tensor] = []
        self._slot_bytes = 0
        self._issued = threading.Event()  # every copy of the pending update is in its stream
        self._watched: list[tuple[Tensor, int]] = []  # live tensors, until they may change, and their versions
        self._changed = False
        self._lock = threading.Lock()
        self._forks = forks()
        wait_for_copies(self)

    def start(
        self,
        live: Sequence[Tensor],
        blocks: Iterable[tuple[list[Tensor], Callable[[list[Tensor]], None]]],
        largest: int,
    ) -> None:
        """Begin an update, after the one before has ended.

        Args:
            live: the live tensors, which must not change before :meth:`release`.
            blocks: pieces of them, of one dtype and device per block, and what to do with their copies.
            largest: bytes of the largest block; at most ``STAGING_BYTES``.
        """
        self._require_own_process()
        self.wait()
        if largest > self._slot_bytes:
            self._slot_bytes, self._slots = largest, []
        for device in {tensor.device for tensor in live}:
            if device not in self._streams:
                self._streams[device] = CopyStream(device)
            self._streams[device].follow()
        self._watched = [(tensor, tensor._version) for tensor in live]
        self._issued.clear()
        self._pending = self._thread.submit(self._run, blocks)

    def release(self) -> None:
        """Let the live tensors change: what the calling thread gives to their devices from now on follows the copies.

        Waits until the host has made room for the last copies, not until they or the averages are done.
        """
        if self._pending is None or self._pending.done():
            return
        self._require_own_process()
        self._issued.wait()
        for stream in self._streams.values():
            stream.hold()
        self._unwatch()

    def wait(self) -> None:
        """Block until the pending update has ended.

        Raises:
            RuntimeError: if one has failed, at every call.
        """
        if self._pending is not None and not self._pending.done():
            self._require_own_process()
        if self._pending is not None and (error := self._pending.exception()) is not None:
            raise RuntimeError(
                f"an update of the averages on the host has failed and left them incomplete ({error}); make a new "
                "Averager, from the last saved state."
            ) from error

    def _require_own_process(self) -> None:
        """Refuse to wait for a thread, or to use one, that a forked process has not."""
        if self._forks != forks():
            raise RuntimeError(
                "these averages are updated on the host by a thread of another process, of which this one is a fork, "
                "without its threads. Use averages in the process that made the Averager, and start others with "
                "multiprocessing's 'spawn' (torch.multiprocessing.set_start_method, multiprocessing_context of a "
                "DataLoader)."
            )

    def _run(self, blocks: Iterable[tuple[list[Tensor], Callable[[list[Tensor]], None]]]) -> None:
        free, staged = list(self._slots), deque[_Staged]()
        try:
            for pieces, apply in blocks:
                if not free:
                    free.append(self._new_slot() if self._may_grow() else _finish(staged.popleft()))
                staged.append(self._stage(pieces, apply, free.pop()))
            self._issued.set()
            while staged:
                _finish(staged.popleft())
        finally:
            self._issued.set()
            self._unwatch()
        if self._changed:
            raise RuntimeError(
                "weights were changed by something other than a torch.optim.Optimizer's step while they were being "
                "copied to the host; call wait() on the Averager before changing them"
            )

    def _may_grow(self) -> bool:
        return (len(self._slots) + 1) * self._slot_bytes <= STAGING_BYTES

    def _new_slot(self) -> Tensor:
        pinned = any(device.type != "cpu" for device in self._streams)
        self._slots.append(torch.empty(self._slot_bytes, dtype=torch.uint8, device="cpu", pin_memory=pinned))
        return self._slots[-1]

    def _stage(self, pieces: list[Tensor], apply: Callable[[list[Tensor]], None], slot: Tensor) -> _Staged:
        dtype, sizes = pieces[0].dtype, [piece.numel() for piece in pieces]
        room = split(slot.view(dtype)[: sum(sizes)], sizes)
        copies = [part.view(piece.shape) for part, piece in zip(room, pieces, strict=True)]
        return _Staged(slot, copies, self._streams[pieces[0].device].copy(pieces, copies), apply)

    def _unwatch(self) -> None:
        with self._lock:
            self._changed |= any(tensor._version != version for tensor, version in self._watched)
            self._watched = []


def _finish(staged: _Staged) -> Tensor:
    """Update the averages by one block; its slot is free again."""
    staged.arrived.synchronize()
    staged.apply(staged.pieces)
    return staged.slot


class CopyStream:
    """Copies from one device, beside its computations; from the CPU, where torch's streams do nothing, at once."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._module = torch.get_device_module(device)
        self._stream = self._module.Stream(device)  # on the CPU the argument means something else, and nothing

    def follow(self) -> None:
        """Later copies see what the calling thread has given to the device so far."""
        self._stream.wait_stream(self._module.current_stream(self._device))

    def hold(self) -> None:
        """What the calling thread gives to the device from now on comes after the copies issued so far."""
        self._module.current_stream(self._device).wait_stream(self._stream)

    def copy(self, pieces: list[Tensor], copies: list[Tensor]) -> Any:
        """Issue copies of ``pieces``; ``synchronize()`` of the event returned waits for them."""
        with self._module.stream(self._stream):
            for piece, copy in zip(pieces, copies, strict=True):
                copy.copy_(piece, non_blocking=True)
            arrived = self._module.Event()
            arrived.record(self._stream)
        return arrived
