"""How gradients spread over microbatches, as nodes and weights: the microbatches themselves, or a few nodes with the
same first moments (a quadrature), so that one formula serves both.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

TINY = 1e-30  # below every difference of two distinct nodes that matters in float32


@dataclass(frozen=True)
class Spread:
    """A distribution over n microbatches.

    Attributes:
        nodes: shape (k, ...).
        count: n, the number of microbatches.
        weights: of the nodes, shape (k, ...), summing to 1 over the first axis; None for 1/k each.
        total: sums a tensor over the processes over which nodes are distributed, each holding k of its own with equal
            weights; None where this process holds them all.
        processes: how many there are.
        shares: w_j, where the nodes are microbatches that make up unequal parts of the mean, shape (k, 1, ...),
            summing to 1 over all processes; the variance of a microbatch goes as 1/w_j. In place of ``weights``.
    """

    nodes: Tensor
    count: int
    weights: Tensor | None = None
    total: Callable[[Tensor], Tensor] | None = None
    processes: int = 1
    shares: Tensor | None = None

    def average(self, values: Tensor) -> Tensor:
        """Σ weight · value over all nodes; ``values`` has one row per node."""
        if self.shares is not None:
            return self._sum(self.shares * values)
        mean = values.mean(dim=0) if self.weights is None else (self.weights * values).sum(dim=0)
        return mean if self.total is None else self.total(mean) / self.processes

    def variance_of_mean(self, values: Tensor) -> Tensor:
        """Σ_j (x_j - x̄)²/(n(n - 1)), for n ≥ 2; Σ_j w_j (x_j - x̄)²/(n - 1) where there are shares."""
        return self.average((values - self.average(values)).square_()) / (self.count - 1)

    def others(self, mean: Tensor) -> Tensor:
        """The mean of all but one microbatch, one row per node: (n·ḡ - g_j)/(n - 1), or (ḡ - w_j g_j)/(1 - w_j)."""
        if self.shares is not None:
            return (mean - self.shares * self.nodes) / (1.0 - self.shares)
        return (self.count * mean - self.nodes) / (self.count - 1)

    def jackknife(self, values: Tensor) -> Tensor:
        """Variance of a statistic, from its values without one microbatch: (n - 1)/n Σ(x_j - x̄)², or Σ(1 - w_j)(…)²."""
        if self.shares is None:
            return self.variance_of_mean(values) * (self.count - 1) ** 2
        left = torch.where(self.shares > 0.0, 1.0 - self.shares, 0.0)
        return self._sum(left * (values - self.average(values)).square_())

    def _sum(self, values: Tensor) -> Tensor:
        total = values.sum(dim=0)
        return total if self.total is None else self.total(total)


def two_nodes(mean: Tensor, variance: Tensor, count: int) -> Spread:
    """mean ± √variance, for the population variance of n microbatches: exact for n = 2."""
    deviation = variance.clamp(min=0.0).sqrt_()
    return Spread(pair(mean + deviation, mean - deviation), count)


def skewed_nodes(mean: Tensor, variance: Tensor, third: Tensor, count: int) -> Spread:
    """Two nodes with the third central moment as well.

    In units of σ = √M_2, with skewness γ: deviations x = γ/2 ± √(1 + γ²/4), of weight 1/(1 + x²); their product is -1.
    """
    deviation = variance.clamp(min=0.0).sqrt_()
    # No n numbers are more skewed, but rounding errors of nearly equal ones may look so.
    bound = (count - 2) / math.sqrt(count - 1)
    half = (third / (2.0 * deviation**3).clamp(min=TINY)).clamp(-bound / 2, bound / 2)
    far = half + (1.0 + half * half).sqrt_().copysign(half)
    weight = (1.0 + far * far).reciprocal_()
    nodes = pair(mean + deviation * far, mean - deviation / far)
    return Spread(nodes, count, pair(weight, 1.0 - weight))


def pair(first: Tensor, second: Tensor) -> Tensor:
    """``torch.stack([first, second])`` as an elementwise operation, which compilers fuse with others."""
    place = torch.arange(2, dtype=torch.int64, device=first.device).view(2, *[1] * first.dim())
    return torch.where(place == 0, first, second)
