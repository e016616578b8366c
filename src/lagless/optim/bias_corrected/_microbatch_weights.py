"""What the microbatches of a step weigh."""

from __future__ import annotations

import torch
import torch.distributed as dist

from lagless._validation import require_number
from lagless.execution import numbers, sum_over
from lagless.optim.bias_corrected._collected import Weights


class MicrobatchWeights:
    """The weights of this process's microbatches since the last step, where they were given.

    Attributes:
        announced: of the microbatch that comes next, if it was given.
    """

    def __init__(self) -> None:
        self.announced: float | None = None
        self._begun: list[float | None] = []

    def announce(self, weight: float) -> None:
        """Set the weight of the microbatch that comes next.

        Raises:
            ValueError: for a negative or infinite weight.
        """
        weight = float(weight)  # of a tensor, too
        require_number("weight", weight, minimum=0.0, finite=True)
        self.announced = weight

    def begin(self) -> None:
        """Take the announced weight for the microbatch that begins."""
        self._begun.append(self.announced)
        self.announced = None

    def clear(self) -> None:
        """Forget the microbatches that have begun."""
        self._begun.clear()

    def of(self, microbatch: int) -> float | None:
        """Return the weight of a microbatch, counted from 0; None if it was given none."""
        return self._begun[microbatch]

    def given(self) -> list[float] | None:
        """Return the weights of all microbatches that have begun; None if none was given.

        Raises:
            RuntimeError: if some were given, and some were not.
        """
        given, count = [w for w in self._begun if w is not None], len(self._begun)
        if given and len(given) < count:
            raise RuntimeError(
                f"{len(given)} of {count} microbatches of this step were given a weight; give one to each before its "
                "backward(), or to none."
            )
        return given or None


def half_of(microbatch: int, group: dist.ProcessGroup | None) -> int:
    """Return which half a microbatch of this process belongs to, 0 or 1.

    Halves alternate, since how many microbatches will come is not known; over ranks too, for one each.
    """
    return (microbatch + (0 if group is None else group.rank())) % 2


def weights_of_all(
    mine: list[float], group: dist.ProcessGroup | None, device: torch.device
) -> tuple[tuple[int, int], Weights]:
    """Return numbers of microbatches in either half and their weights, over all processes.

    A microbatch of weight 0 is not counted.
    """
    sums = torch.zeros(5, dtype=torch.float64)  # numbers, weights, Σ 1/w
    for j, w in enumerate(mine):
        if w:
            half = half_of(j, group)
            sums[half] += 1
            sums[2 + half] += w
            sums[4] += 1.0 / w
    if group is not None:
        sums = sums.to(device)
        sum_over(group, [sums])
    n_a, n_b, a, b, inverse = numbers(sums)
    n, total = n_a + n_b, a + b
    third = (n - 1.0) * (n - 2.0) / (total * inverse - 3.0 * n + 2.0) if n > 2 else 0.0
    return (int(n_a), int(n_b)), Weights(total or 1.0, a, b, third)
