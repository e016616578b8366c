"""Seeing each microbatch's gradient while ordinary ``backward()`` calls accumulate it.

Nothing is taken from ``p.grad``: hooks add powers of the incoming gradient to buffers of our own. What happens to
``p.grad`` afterwards (unscaling, clipping) is found out from its norm, and the buffers are scaled alike.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Variable
from torch.utils.hooks import unserializable_hook

from lagless.optim._blocks import local
from lagless.optim.bias_corrected._sums import Sums, sum_over


@dataclass(frozen=True)
class Collected:
    """What is known of one parameter's microbatches, in units in which their mean is ``p.grad``.

    Attributes:
        means: by key of the sums, over n (or over the half's) microbatches.
        samples: the microbatch gradients of this process, if they were kept.
        count: n, over all processes.
        halves: how many of them belong to either half.
        group: the processes, if there are several.
    """

    means: dict[Any, Tensor]
    samples: tuple[Tensor, ...]
    count: int
    halves: tuple[int, int]
    group: dist.ProcessGroup | None


class _Track:
    """One parameter's buffers."""

    def __init__(self, sums: Sums, keep: bool) -> None:
        self.sums, self.keep = sums, keep
        self.samples: dict[int, Tensor] = {}
        self.microbatch = 0  # the latest one that reached this parameter, 1-based; 0: none of this window
        self.previous: Tensor | None = None  # where gradients arrive accumulated
        self.norm: Tensor | None = None  # of p.grad after the latest backward


class Microbatches:
    """The microbatches since the last optimizer step, as sums of powers of their gradients or as they are.

    Args:
        group: data-parallel processes whose microbatches count as well; None for this process alone.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self.count = 0
        self._tracks: dict[Tensor, _Track] = {}
        self._incoming: dict[Tensor, Tensor | None] = {}
        self._open = False
        self._handles: list[Any] = []
        self._backward = -1  # number of the graph that autograd is working on

    def __contains__(self, parameter: Tensor) -> bool:
        return parameter in self._tracks

    def track(self, parameter: Tensor, sums: Sums, keep: bool) -> None:
        """Follow ``parameter``: add its microbatch gradients to ``sums``, and keep them if asked to."""
        self._tracks[parameter] = _Track(sums, keep)
        owner = weakref.ref(self)

        @unserializable_hook
        def before(gradient: Tensor) -> None:
            if (alive := owner()) is not None:
                # Where p.grad is empty, autograd may make the incoming tensor p.grad itself, unless it is held here.
                alive._incoming[parameter] = None if parameter.grad is None else gradient

        def after(_: Tensor) -> None:
            if (alive := owner()) is not None:
                alive._arrived(parameter)

        self._handles += [parameter.register_hook(before), parameter.register_post_accumulate_grad_hook(after)]

    @property
    def begun(self) -> int:
        """How many microbatches of this process have arrived since the last step."""
        return self.count if self._open else 0

    def remove(self) -> None:
        """Stop following all parameters."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._tracks.clear()

    def close(self) -> None:
        """End the window: the next gradient starts a new one."""
        self._open = False
        for track in self._tracks.values():
            track.samples.clear()
            track.previous = None

    @torch.no_grad()
    def read(self, parameters: Iterable[Tensor]) -> dict[Tensor, Collected]:
        """What was collected for those of ``parameters`` whose microbatches were seen, over all processes.

        Every process must ask for the same parameters. Sums are scaled in place: read once per window.
        """
        present = [(p, self._tracks[p]) for p in parameters if p in self._tracks and p.grad is not None]
        present = [(p, track) for p, track in present if self._open and track.microbatch]
        processes = 1 if self.group is None else self.group.size()
        count = self.count * processes
        first = sum(self._half(j, rank) == 0 for j in range(self.count) for rank in range(processes))
        halves = (first, count - first)
        if self.group is not None:
            sum_over(self.group, [total for _, track in present for total in track.sums.totals.values()])
        found = {}
        for (p, track), norm in zip(present, norms([p for p, _ in present]), strict=True):
            assert track.norm is not None
            # p.grad is this times the mean of the gradients seen, by whatever it was unscaled and clipped.
            ratio = torch.where(track.norm > 0.0, norm / track.norm, 1.0) * self.count
            for power, total in track.sums.totals.items():
                members = count if power.half is None else halves[power.half]
                total.mul_(ratio.to(total.dtype) ** power.exponent / max(members, 1))
            samples = ()
            if track.samples:
                zero = torch.zeros_like(next(iter(track.samples.values())))
                samples = tuple(track.samples.get(j, zero) * ratio for j in range(self.count))
            found[p] = Collected(track.sums.totals, samples, count, halves, self.group)
        return found

    def _half(self, microbatch: int, rank: int) -> int:
        # Halves alternate, since how many microbatches will come is not known; over ranks too, for one each.
        return (microbatch + rank) % 2

    @torch.no_grad()
    def _arrived(self, parameter: Tensor) -> None:
        """A microbatch's gradient has been added to ``parameter.grad``."""
        track, grad = self._tracks[parameter], parameter.grad
        assert grad is not None
        accumulated = local(grad)
        # FSDP sets gradients without autograd's leaf hooks.
        seen = parameter in self._incoming
        gradient = self._incoming.pop(parameter, None)
        backward = torch._C._current_graph_task_id()
        first = backward != self._backward
        if not self._open or (first and seen and gradient is None and self._abandoned(parameter)):
            self._open, self.count = True, 0
            for other in self._tracks.values():
                other.microbatch, other.previous = 0, None
                other.samples.clear()
        if track.microbatch == self.count:
            self.count += 1
        if gradient is None:
            gradient = accumulated if seen or track.previous is None else accumulated - track.previous
        self._add(track, local(gradient))
        if not seen:
            track.previous = accumulated.clone()
        track.microbatch = self.count
        if first:
            self._backward = backward
            # The engine runs callbacks in order and DDP's, which reduces gradients, may be queued after this one.
            queue = Variable._execution_engine.queue_callback
            queue(lambda: queue(self._measure))

    def _abandoned(self, arrived: Tensor) -> bool:
        """Whether gradients were thrown away without a step, as when a gradient scaler skips one."""
        return all(p.grad is None for p in self._tracks if p is not arrived)

    def _add(self, track: _Track, gradient: Tensor) -> None:
        if track.keep:
            dtype = torch.promote_types(gradient.dtype, torch.float32)
            track.samples[self.count - 1] = gradient.to(dtype, copy=True)
        rank = 0 if self.group is None else self.group.rank()
        track.sums.add(gradient, self._half(self.count - 1, rank), fresh=track.microbatch == 0)

    @torch.no_grad()
    def _measure(self) -> None:
        present = [(p, track) for p, track in self._tracks.items() if p.grad is not None and track.microbatch]
        for (_, track), norm in zip(present, norms([p for p, _ in present]), strict=True):
            track.norm = norm


def norms(parameters: Sequence[Tensor]) -> Sequence[Tensor]:
    """‖p.grad‖ of each, in float32 or wider."""
    gradients = [local(p.grad) for p in parameters if p.grad is not None]
    if not gradients:
        return []
    dtype = max((torch.promote_types(g.dtype, torch.float32) for g in gradients), key=lambda d: d.itemsize)
    return torch._foreach_norm(gradients, 2, dtype=dtype)
