"""What is known of a step's microbatches, in units of ``p.grad``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch.distributed as dist
from torch import Tensor


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
        summed: the mean of the gradients, as they were added up, times it is ``p.grad`` before it was scaled.
        norm: of ``p.grad`` before it was scaled.
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
    summed: float
    norm: Tensor
    group: dist.ProcessGroup | None

    def mean(self, key: Any) -> Tensor:
        """Return what was summed under ``key``, per microbatch and in units of ``p.grad``."""
        total = self.totals[key]
        return total * scale_of(key, self.ratio.to(total.dtype), self.weights)


def scale_of(key: Any, ratio: Tensor, weights: Weights) -> Tensor:
    """Return what turns a sum into that mean."""
    members = weights.total if key.half is None else weights[1 + key.half]
    return ratio**key.exponent / members
