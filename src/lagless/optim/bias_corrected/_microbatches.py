"""Seeing each microbatch's gradient while ordinary ``backward()`` calls accumulate it.

Nothing is taken from ``p.grad``: hooks add powers of the incoming gradient to buffers of our own. What happens to
``p.grad`` afterwards (unscaling, clipping) is found out from its norm, and the buffers are scaled alike.
"""

from __future__ import annotations

import sys
import weakref
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Variable
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import _engine_run_backward
from torch.utils.hooks import unserializable_hook
from torch.utils.weak import TensorWeakRef

from lagless.execution import Sharding, local, over_shards, sum_over
from lagless.optim.bias_corrected._sums import Sums


class Weights(NamedTuple):
    """What a step's microbatches weigh together; their numbers, where all weigh the same.

    A microbatch of weight w_j arrives as a gradient ∝ w_j·g_j, and the variance of g_j goes as 1/w_j.

    Attributes:
        total: Σ w_j over all.
        first: over the first half.
        second: over the second half.
        third: what turns the third central moment Σ w_j(g_j - ḡ)³/Σ w_j into that of n equal microbatches of the same
            samples, in expectation: (n - 1)(n - 2)/(Σ 1/w_j - 3n + 2) with Σ w_j = 1. The second is that as it is.
    """

    total: Any
    first: Any
    second: Any
    third: Any = 1.0


@dataclass(frozen=True)
class Collected:
    """What is known of one parameter's microbatches.

    Attributes:
        totals: by key of the sums, as they were added up.
        ratio: the mean of the gradients, as they were added up, times it is ``p.grad``; one number.
        samples: the microbatch gradients of this process in units of ``p.grad``, if they were kept.
        shares: of these in the mean of all processes' microbatches; None where all are equal.
        count: n, over all processes.
        halves: how many of them belong to either half.
        weights: what they weigh.
        reached: how many of either half reached the parameter.
        group: the processes, if there are several.
    """

    totals: dict[Any, Tensor]
    ratio: Tensor
    samples: tuple[Tensor, ...]
    shares: tuple[float, ...] | None
    count: int
    halves: tuple[int, int]
    weights: Weights
    reached: tuple[int, int]
    group: dist.ProcessGroup | None

    def mean(self, key: Any) -> Tensor:
        """What was summed under ``key``, per microbatch and in units in which the mean gradient is ``p.grad``."""
        total = self.totals[key]
        return total * scale_of(key, self.ratio.to(total.dtype), self.weights)


def scale_of(key: Any, ratio: Tensor, weights: Weights) -> Tensor:
    """What turns a sum into that mean."""
    members = weights.total if key.half is None else weights[1 + key.half]
    return ratio**key.exponent / members


class _Track:
    """One parameter's buffers."""

    def __init__(self, sums: Sums, keep: bool) -> None:
        self.sums, self.keep = sums, keep
        self.samples: dict[int, Tensor] = {}
        self.microbatch = 0  # the latest one that reached this parameter, 1-based; 0: none of this window
        self.previous: tuple[TensorWeakRef, Tensor] | None = (
            None  # p.grad and its values, where they arrive accumulated
        )
        self.norm: Tensor | None = None  # of p.grad after the latest backward
        self.reached = [0, 0]  # microbatches of either half that did


class Microbatches:
    """The microbatches since the last optimizer step, as sums of powers of their gradients or as they are.

    Args:
        group: data-parallel processes whose microbatches count as well; None for this process alone.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self.count = 0
        self._weights: list[float | None] = []  # of the microbatches of this window
        self._announced: float | None = None  # of the next one
        self._tracks: dict[Tensor, _Track] = {}
        self._incoming: dict[Tensor, Tensor | None] = {}
        self.paused = False  # whether gradients that arrive are of no microbatch
        self._open = False
        self._handles: list[Any] = []
        self._backward = -1  # number of the graph that autograd is working on
        self._latest = -1  # highest of these numbers

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
            if (alive := owner()) is not None and not alive.paused:
                alive._arrived(parameter)

        wanted = parameter.requires_grad
        parameter.requires_grad_(True)  # those that are frozen for now take no hooks
        self._handles += [parameter.register_hook(before), parameter.register_post_accumulate_grad_hook(after)]
        parameter.requires_grad_(wanted)

    @property
    def begun(self) -> int:
        """How many microbatches of this process have arrived since the last step."""
        return self.count if self._open else 0

    @property
    def halves(self) -> tuple[int, int]:
        """How many of the microbatches since the last step, over all processes, belong to either half."""
        processes = 1 if self.group is None else self.group.size()
        first = sum(self._half(j, rank) == 0 for j in range(self.begun) for rank in range(processes))
        return first, self.begun * processes - first

    @property
    def announced(self) -> float | None:
        """What the microbatch weighs that comes next, if that was said."""
        return self._announced

    def announce(self, weight: float) -> None:
        """Say what the microbatch weighs that comes next."""
        self._announced = weight

    def remove(self) -> None:
        """Stop following all parameters."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._tracks.clear()

    def close(self) -> None:
        """End the window: the next gradient starts a new one."""
        self._open = False
        self._incoming.clear()  # torch.autograd.grad fills it and leaves it
        for track in self._tracks.values():
            track.samples.clear()
            track.previous = None

    @torch.no_grad()
    def read(self, parameters: Iterable[Tensor]) -> dict[Tensor, Collected]:
        """What was collected for those of ``parameters`` whose microbatches were seen, over all processes.

        Every process must ask for the same parameters. Sums become those of all processes: read once per window.
        """
        present = [(p, self._tracks[p]) for p in parameters if p in self._tracks and p.grad is not None]
        # A parameter that no microbatch of this process reached may have been reached in another process.
        present = [(p, track) for p, track in present if self._open and (track.microbatch or self.group is not None)]
        if not present:
            return {}
        mine = self._own_weights()
        for p, track in present:
            if not track.microbatch and p.grad is not None:
                track.sums.add(torch.zeros_like(local(p.grad)), 0, fresh=True)
                track.reached = [0, 0]
        reached = [(a, b) for a, b in (track.reached for _, track in present)]
        device = local(present[0][0]).device
        halves, weights = self.halves, None if mine is None else self._together(mine, device)
        if weights is not None:
            halves, weights = weights
        if self.group is not None:
            counts = torch.tensor(reached, dtype=torch.float32, device=device)
            sum_over(self.group, [counts, *(total for _, track in present for total in track.sums.totals.values())])
            if any(key.half is not None for _, track in present for key in track.sums.totals):
                reached = [(int(a), int(b)) for a, b in counts.tolist()]
        before = torch.stack([track.norm for _, track in present if track.norm is not None])
        after = torch.stack(norms([p for p, _ in present]))
        before, after = _of_whole([p for p, _ in present], torch.stack([before, after]))
        # p.grad is this times the mean of the gradients seen, by whatever it was unscaled and clipped.
        ratios = torch.where(before > 0.0, after / before, 1.0)
        processes = 1 if self.group is None else self.group.size()
        ratios = ratios * (self.count if weights is None else weights.total / processes)
        shares = None if weights is None or mine is None else tuple(w / weights.total for w in mine)
        found = {}
        for (p, track), ratio, counts in zip(present, ratios.unbind(), reached, strict=True):
            samples = ()
            if track.keep and p.grad is not None:
                gradient = local(p.grad)
                zero = torch.zeros_like(gradient, dtype=torch.promote_types(gradient.dtype, torch.float32))
                scales = [ratio / w if w else 0.0 for w in mine or [1.0] * self.count]
                samples = tuple(track.samples.get(j, zero) * scale for j, scale in enumerate(scales))
            everything = weights or Weights(sum(halves), *halves)
            found[p] = Collected(
                track.sums.totals, ratio, samples, shares, sum(halves), halves, everything, counts, self.group
            )
        return found

    def _own_weights(self) -> list[float] | None:
        """Those of this process's microbatches; None if none was given."""
        given = [w for w in self._weights if w is not None]
        if given and len(given) < self.count:
            raise RuntimeError(
                f"{len(given)} of {self.count} microbatches of this step were given a weight; give one to each before "
                "its backward(), or to none."
            )
        return given or None

    def _together(self, mine: Sequence[float], device: torch.device) -> tuple[tuple[int, int], Weights]:
        """Numbers of microbatches in either half and what they weigh, over all processes; no weight, no microbatch."""
        rank = 0 if self.group is None else self.group.rank()
        sums = torch.zeros(5, dtype=torch.float64)  # numbers, weights, Σ 1/w
        for j, w in enumerate(mine):
            if w:
                half = self._half(j, rank)
                sums[half] += 1
                sums[2 + half] += w
                sums[4] += 1.0 / w
        if self.group is not None:
            sums = sums.to(device)
            sum_over(self.group, [sums])
        n_a, n_b, a, b, inverse = sums.tolist()
        n, total = n_a + n_b, a + b
        third = (n - 1.0) * (n - 2.0) / (total * inverse - 3.0 * n + 2.0) if n > 2 else 0.0
        return (int(n_a), int(n_b)), Weights(total or 1.0, a, b, third)

    def _half(self, microbatch: int, rank: int) -> int:
        # Halves alternate, since how many microbatches will come is not known; over ranks too, for one each.
        return (microbatch + rank) % 2

    def _arrived(self, parameter: Tensor) -> None:
        """A microbatch's gradient has been added to ``parameter.grad``."""
        track, grad = self._tracks[parameter], parameter.grad
        assert grad is not None
        accumulated = local(grad)  # without its graph, if it has one
        # FSDP sets gradients without autograd's leaf hooks.
        seen = parameter in self._incoming
        gradient = self._incoming.pop(parameter, None)
        if not seen and track.previous is not None and track.previous[0]() is grad:
            gradient = accumulated - track.previous[1]
        backward = torch._C._current_graph_task_id()
        # An outermost pass is a microbatch. Passes within it, as those of checkpointing, may be the first to arrive:
        # they are told apart by a parameter that arrives again, and what began before them is of the same microbatch.
        new = track.microbatch == self.count or (backward > self._latest and not _within_backward())
        first, self._latest = backward != self._backward, max(backward, self._latest)
        if not self._open or (first and gradient is None and self._abandoned(parameter)):
            self._open, self.count = True, 0
            self._weights.clear()
            for other in self._tracks.values():
                other.microbatch, other.previous = 0, None
                other.samples.clear()
            new = True
        if new:
            self.count += 1
            self._weights.append(self._announced)
            self._announced = None
        self._add(track, local(accumulated if gradient is None else gradient))
        if not seen:
            track.previous = TensorWeakRef(grad), accumulated.clone()
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
        half = self._half(self.count - 1, 0 if self.group is None else self.group.rank())
        if track.microbatch == 0:
            track.reached = [0, 0]
        weight = self._weights[self.count - 1]
        track.reached[half] += weight != 0.0
        track.sums.add(gradient, half, track.microbatch == 0, 1.0 if weight is None else weight)

    @torch.no_grad()
    def _measure(self) -> None:
        present = [(p, track) for p, track in self._tracks.items() if p.grad is not None]
        for (_, track), norm in zip(present, norms([p for p, _ in present]), strict=True):
            track.norm = norm


def _within_backward() -> bool:
    """Whether the pass at work was started by a node of another one, as reentrant checkpointing does."""
    frame, started = sys._getframe(), False
    while frame is not None:
        started |= frame.f_code is _engine_run_backward.__code__
        if started and frame.f_code is BackwardCFunction.apply.__code__:
            return True
        frame = frame.f_back
    return False


def _of_whole(parameters: Sequence[Tensor], norms: Tensor) -> Tensor:
    """Norms of whole gradients, from those of this rank's parts; shape (..., number of parameters)."""
    alike: defaultdict[Any, list[int]] = defaultdict(list)
    for i, p in enumerate(parameters):
        sharding = Sharding.of(p)
        if sharding.mesh is not None:
            alike[sharding.mesh, tuple(each.is_replicate() for each in sharding.placements)].append(i)
    for some in alike.values():
        squares = norms[..., some].double().square()
        norms[..., some] = over_shards(squares, parameters[some[0]]).sqrt().to(norms.dtype)
    return norms


def norms(parameters: Sequence[Tensor]) -> list[Tensor]:
    """‖p.grad‖ of each, in float32 or wider."""
    gradients = [local(p.grad) for p in parameters if p.grad is not None]
    if not gradients:
        return []
    dtype = max((torch.promote_types(g.dtype, torch.float32) for g in gradients), key=lambda d: d.itemsize)
    return list(torch._foreach_norm(gradients, 2, dtype=dtype))
