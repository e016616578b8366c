"""The curvature of a step's microbatches, collected before the step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from lagless.execution import backward, local, numbers, sum_over, without_autocast
from lagless.optim.bias_corrected._method import Group
from lagless.optim.bias_corrected._microbatch_weights import half_of
from lagless.optim.bias_corrected._microbatches import Microbatches
from lagless.optim.bias_corrected._sums import Power, PowerSums


class Curvature:
    """Sums over the gradients q of losses on sampled labels.

    Attributes:
        sums: by parameter.
    """

    def __init__(self) -> None:
        self.sums: dict[Tensor, PowerSums] = {}
        self._estimates, self._weights = [0, 0], [0.0, 0.0]  # of either half, and what they weigh

    def add(self, loss: Tensor, groups: Sequence[Group], microbatches: Microbatches, retain_graph: bool) -> None:
        """Take in the curvature of the microbatch whose ``backward()`` comes next."""
        parameters = [p for group in groups for p in group["params"] if p.requires_grad]
        begun = microbatches.begun
        microbatches.settle()
        if begun and not microbatches.begun:  # gradients were thrown away, and their microbatches' curvature with them
            self.clear()
        announced = microbatches.weights.announced
        weight = 1.0 if announced is None else announced
        loss = loss if weight == 1.0 else weight * loss
        if any(isinstance(p, DTensor) for p in parameters):
            gradients = _gradients_of_shards(loss, parameters, retain_graph, microbatches)
        else:
            gradients = torch.autograd.grad(loss, parameters, retain_graph=retain_graph, allow_unused=True)
        if all(q is None for q in gradients):
            raise RuntimeError("this loss depends on none of the optimizer's parameters; give that of their own model.")
        half, fresh = half_of(microbatches.begun, microbatches.group), not any(self._estimates)
        with torch.no_grad(), without_autocast(p.device for p in parameters):
            for group in groups:
                for p in group["params"]:
                    sums = self._sums_of(group, p)
                    if fresh:
                        sums.totals.clear()
            for p, q in zip(parameters, gradients, strict=True):
                if q is not None:
                    self.sums[p].add(local(q), half, False, weight)
        self._estimates[half] += weight > 0.0
        self._weights[half] += weight

    def reduce(self, groups: Sequence[Group], microbatches: Microbatches) -> None:
        """Replace sums and their counts by those of all processes, which need not have reached the same."""
        if microbatches.group is None:
            return
        wanted = [(g, p) for g in groups for p in g["params"] if p.requires_grad]
        for group, p in wanted:
            self._sums_of(group, p).start(p)
        device = wanted[0][1].device if wanted else None
        counts = torch.tensor([*self._estimates, *self._weights], dtype=torch.float64, device=device)
        totals = (total for _, p in wanted for total in self.sums[p].totals.values())
        sum_over(microbatches.group, [counts, *totals])
        self._estimates, self._weights = [int(n) for n in numbers(counts[:2])], numbers(counts[2:])

    def estimates(self, group: Group) -> int:
        """Return how many microbatches' curvature there is for a group."""
        first, second = self._estimates
        return second if group["cross_fit"] == "split" else first + second

    def weight(self, group: Group) -> float:
        """Return what they weigh."""
        return self._weights[1] if group["cross_fit"] == "split" else sum(self._weights)

    def clear(self) -> None:
        """Forget what was collected."""
        self.sums.clear()
        self._estimates, self._weights = [0, 0], [0.0, 0.0]

    def _sums_of(self, group: Group, p: Tensor) -> PowerSums:
        return self.sums.setdefault(p, PowerSums(_powers(group), group["compile"]))


def _powers(group: Group) -> tuple[Power, ...]:
    corrected = group["inverse_correction"] != "none"
    if group["cross_fit"] == "split":
        return (Power(2, 1), Power(4, 1)) if corrected else (Power(2, 1),)
    return (Power(1), Power(2), Power(4)) if corrected else (Power(1),)


def _gradients_of_shards(
    loss: Tensor, parameters: Sequence[Tensor], retain_graph: bool, microbatches: Microbatches
) -> list[Tensor | None]:
    """Those of a backward pass of its own, since FSDP2 reduces gradients into p.grad only."""
    own = [p.grad for p in parameters]
    for p in parameters:
        p.grad = None
    microbatches.hooks.paused = True
    try:
        backward(loss, retain_graph)
        return [p.grad for p in parameters]
    finally:
        microbatches.hooks.paused = False
        for p, gradient in zip(parameters, own, strict=True):
            p.grad = gradient
