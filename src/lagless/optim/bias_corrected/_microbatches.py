"""Seeing each microbatch's gradient while ordinary ``backward()`` calls accumulate it.

Nothing is taken from ``p.grad``: hooks add powers of the incoming gradient to buffers of our own. What happens to
``p.grad`` afterwards (unscaling, clipping) is found out from its norm, and the buffers are scaled alike.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor

from lagless.execution import after_pass, current_pass, exact_dtype, local, numbers, sum_over, within_another_pass
from lagless.optim.bias_corrected._collected import Collected, Weights
from lagless.optim.bias_corrected._gradient_hooks import GradientHooks
from lagless.optim.bias_corrected._gradients import norms, norms_of_whole
from lagless.optim.bias_corrected._microbatch_weights import MicrobatchWeights, half_of, weights_of_all
from lagless.optim.bias_corrected._sums import SquareSum, Sums
from lagless.optim.bias_corrected._track import Track


class Microbatches:
    """The microbatches since the last optimizer step, as sums of powers of their gradients or as they are.

    Args:
        group: data-parallel processes whose microbatches count as well; None for this process alone.
        strict: whether :meth:`settle` raises, and norms are measured after every backward pass, any of which may be
            the last. Otherwise ``spoiled`` says what was found, and :meth:`expect_alike` may spare most norms.

    Attributes:
        weights: of the microbatches.
        hooks: on the parameters.
        count: microbatches of this process in this window, or in the latest one.
        spoiled: why the sums of this window belong to no gradient; empty where they do, or where that is not known.
    """

    def __init__(self, group: dist.ProcessGroup | None = None, strict: bool = True) -> None:
        self.group, self._strict, self.spoiled = group, strict, ""
        self._unsure = False  # whether somebody may have changed a gradient of unknown norm, in any window
        self._from = 1  # microbatch from which on norms are measured; none are before, by which changes are noticed
        self.weights, self.hooks = MicrobatchWeights(), GradientHooks(self)
        self.count = 0
        self._tracks: dict[Tensor, Track] = {}
        self._open = self._measured = False
        self._backward = -1  # number of the pass that autograd is working on
        self._latest = -1  # highest of these numbers

    def __contains__(self, parameter: Tensor) -> bool:
        return parameter in self._tracks

    def track(self, parameter: Tensor, sums: Sums, keep: bool) -> None:
        """Follow ``parameter``: add its microbatch gradients to ``sums``, and keep them if asked to."""
        self._tracks[parameter] = Track(sums, keep)
        self.hooks.follow(parameter)

    @property
    def begun(self) -> int:
        """How many microbatches of this process have arrived since the last step."""
        return self.count if self._open else 0

    @property
    def halves(self) -> tuple[int, int]:
        """How many of the microbatches since the last step, over all processes, belong to either half."""
        processes = 1 if self.group is None else self.group.size()
        first = sum((j + rank) % 2 == 0 for j in range(self.begun) for rank in range(processes))
        return first, self.begun * processes - first

    def close(self) -> None:
        """End the window: the next gradient starts a new one."""
        self._open = self._measured = False
        self.hooks.forget()
        for track in self._tracks.values():
            track.samples.clear()

    @torch.no_grad()
    def read(self, parameters: Iterable[Tensor]) -> dict[Tensor, Collected]:
        """Return what was collected for those of ``parameters`` whose microbatches were seen, over all processes.

        Every process must ask for the same parameters. Sums become those of all processes: read once per window.
        """
        present = [(p, self._tracks[p]) for p in parameters if p in self._tracks and p.grad is not None]
        # A parameter that no microbatch of this process reached may have been reached in another process.
        present = [(p, track) for p, track in present if self._open and (track.microbatch or self.group is not None)]
        if not present:
            return {}
        mine = self.weights.given()
        for p, track in present:
            if not track.microbatch and p.grad is not None:
                track.sums.add(torch.zeros_like(local(p.grad)), 0, fresh=True)
                track.reached = [0, 0]
        reached = [(a, b) for a, b in (track.reached for _, track in present)]
        device = local(present[0][0]).device
        halves, weights = (self.halves, None) if mine is None else weights_of_all(mine, self.group, device)
        if self.group is not None:
            counts = torch.tensor(reached, dtype=torch.float32, device=device)
            sum_over(self.group, [counts, *(total for _, track in present for total in track.sums.totals.values())])
            if any(key.half is not None for _, track in present for key in track.sums.totals):
                reached = [(int(a), int(b)) for a, b in map(numbers, counts)]
        before = torch.stack([track.norm for _, track in present if track.norm is not None])
        after = torch.stack(norms([p for p, _ in present]))
        before, after = norms_of_whole([p for p, _ in present], torch.stack([before, after]))
        # p.grad is this times the mean of the gradients seen, by whatever it was unscaled and clipped.
        ratios = torch.where(before > 0.0, after / before, 1.0)
        processes = 1 if self.group is None else self.group.size()
        summed = self.count if weights is None else weights.total / processes
        ratios = ratios * summed
        shares = None if weights is None or mine is None else tuple(w / weights.total for w in mine)
        found = {}
        each = zip(present, ratios.unbind(), before.unbind(), reached, strict=True)
        for (p, track), ratio, norm, counts in each:
            samples = ()
            if track.keep and p.grad is not None:
                gradient = local(p.grad)
                zero = torch.zeros_like(gradient, dtype=torch.promote_types(gradient.dtype, torch.float32))
                scales = [ratio / w if w else 0.0 for w in mine or [1.0] * self.count]
                samples = tuple(track.samples.get(j, zero) * scale for j, scale in enumerate(scales))
            everything = weights or Weights(sum(halves), *halves)
            found[p] = Collected(
                totals=track.sums.totals,
                ratio=ratio,
                samples=samples,
                shares=shares,
                count=sum(halves),
                halves=halves,
                weights=everything,
                reached=counts,
                summed=summed,
                norm=norm,
                group=self.group,
            )
        return found

    def squares(self, parameters: Iterable[Tensor]) -> tuple[list[Tensor], Tensor] | None:
        """Return what :class:`SquareSum` has of this process's microbatches, and squared norms of their gradients.

        Returns:
            The parameters of which there is a gradient; Σ w|g|² and |p.grad|² of each, as they were before anybody
            scaled p.grad, shape (2, number of parameters); NaN where that was not measured. None where there are none.
        """
        tracks = [(p, self._tracks[p]) for p in parameters if self._open and p.grad is not None]
        held = [(p, track) for p, track in tracks if track.microbatch or self.group is not None]
        if not held:
            return None
        device = local(held[0][0]).device
        zero = torch.zeros((), dtype=exact_dtype(device), device=device)
        totals = [t.sums.totals[SquareSum.key].to(device) if t.microbatch else zero for _, t in held]
        norms = [zero * torch.nan if t.norm is None else t.norm.to(zero).square() for _, t in held]
        return [p for p, _ in held], torch.stack([torch.stack(totals), torch.stack(norms)])

    def expect_alike(self) -> None:
        """Measure norms, where this is not strict, from the pass of the next window on that was this one's last."""
        if self._open and not self._strict:
            self._from = 1 if self._unsure or self.spoiled else self.count

    @torch.no_grad()
    def settle(self) -> None:
        """Look whether ``p.grad`` still holds what was accumulated: what was thrown away is no microbatch any more.

        Raises:
            RuntimeError: if a part of the gradients was thrown away, or if they were scaled or written to.
        """
        if not self._measured:
            return
        held = [(p, track) for p, track in self._tracks.items() if track.microbatch]
        # Versions change also where others write to a buffer that gradients are views of; only values tell.
        suspects = [(p, track) for p, track in held if not track.is_as_left(p.grad)]
        now = dict(zip([p for p, _ in suspects if p.grad is not None], norms([p for p, _ in suspects]), strict=True))
        changed = [p for p, track in suspects if track.has_changed(p.grad, now.get(p))]
        if changed and len(suspects) == len(held) and not any(bool(norm) for norm in now.values()):
            self.close()
        elif any(track.norm is None for _, track in suspects):
            self._unsure, self._from = True, sys.maxsize  # this window is lost, the next ones are looked at closely
        elif changed:
            self.spoiled = (
                f"the gradients of {len(changed)} of {len(held)} parameters, the first of shape "
                f"{tuple(changed[0].shape)}, were changed between two microbatches, whose sums no longer belong to "
                "them. Clip, scale or replace gradients once, after the last backward() of a step; to throw "
                "microbatches away, call optimizer.zero_grad()."
            )
            if self._strict:
                raise RuntimeError(self.spoiled)
        self._measured = False

    def receive(self, parameter: Tensor, gradient: Tensor | None) -> None:
        """Take in a gradient that has been added to ``parameter.grad``; None where it is all of it."""
        track, backward = self._tracks[parameter], current_pass()
        # An outermost pass is a microbatch. Passes within it, as those of checkpointing, may be the first to arrive:
        # they are told apart by a parameter that arrives again, and what began before them is of the same microbatch.
        new = track.microbatch == self.count or (backward > self._latest and not within_another_pass())
        first, self._latest = backward != self._backward, max(backward, self._latest)
        # Gradients may be thrown away without a step, as when a gradient scaler skips one.
        if not self._open or (
            first and gradient is None and all(p.grad is None for p in self._tracks if p is not parameter)
        ):
            self._open, self.count, new, self.spoiled = True, 0, True, ""
            self.weights.clear()
            self.hooks.forget_accumulated()
            for other in self._tracks.values():
                other.microbatch = 0
                other.samples.clear()
        if new:
            self.count += 1
            self.weights.begin()
        assert parameter.grad is not None
        arrived = local(parameter.grad if gradient is None else gradient)
        track.add(self.count, arrived, half_of(self.count - 1, self.group), self.weights.of(self.count - 1))
        if first:
            self._backward = backward
            # The engine runs callbacks in order and DDP's, which reduces gradients, may be queued after this one.
            after_pass(lambda: after_pass(self._measure))

    @torch.no_grad()
    def _measure(self) -> None:
        present = [(p, track) for p, track in self._tracks.items() if p.grad is not None]
        measured = norms([p for p, _ in present]) if self.count >= self._from else [None] * len(present)
        for (p, track), norm in zip(present, measured, strict=True):
            assert p.grad is not None
            track.leave(p.grad, norm)
        self._measured = self._open


def data_parallel(group: dist.ProcessGroup | None) -> dist.ProcessGroup | None:
    """Return the processes whose microbatches count, ``group`` or the default one; None where there is one only."""
    if group is None and dist.is_available() and dist.is_initialized():
        group = dist.group.WORLD
    return None if group is None or group.size() == 1 else group
