"""What an average is of the run it followed, in numbers: for records, cards and logs.

The numbers depend on the rule and the step alone. With w the weights of the average over the iterates, they are its
mean age t - Σ_i w_i t_i and its effective number of iterates 1/Σ_i w_i². Both follow from two moments of the rule's
buffers, which an update changes as it changes the buffers themselves: each buffer's mean step a, and the products G of
the buffers' weights, a ← M a + v t and G ← M G Mᵀ + v vᵀ.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lagless.averaging import Averager, plain_name
from lagless.rules import Rule, read_after, schedule_of, trajectory_weights

_LONGEST = 20_000  # steps of which the weights are formed one by one, in a third of a second
_POINTS = 11


class AverageMoments:
    """Mean age and effective number of iterates of an average, step by step.

    Args:
        rule: the averaging rule.
        start: the step of the first weights.
    """

    def __init__(self, rule: Rule, start: int = 0) -> None:
        self._rule, self._start = rule, start
        self._begin()

    def at(self, step: int) -> tuple[float, float] | None:
        """Return mean age and effective number of iterates at ``step``; None before the first update.

        Steps after the ones asked for before cost some microseconds each; going back begins anew.
        """
        if step < self._step:
            self._begin()
        while self._step < step:
            self._advance(self._step + 1)
        read = read_after(self._rule, self._last, step)
        if read is None:
            return None
        c, d = np.array(read.buffers), read.live
        # On an update step the buffers hold the live weights already.
        overlap = 2.0 * d * float(c @ self._live) if self._last.step == step else 0.0
        squares = float(c @ self._gram @ c) + overlap + d * d
        return step - (float(c @ self._means) + d * step), 1.0 / squares

    def _begin(self) -> None:
        count = len(self._rule.buffer_keys)
        self._step, self._last = self._start, self._rule.schedule.begin(self._start)
        self._means, self._gram = np.full(count, float(self._start)), np.ones((count, count))
        self._live = np.zeros(count)

    def _advance(self, step: int) -> None:
        event = self._rule.schedule.advance(self._last, step)
        self._step, self._last = step, event.last
        if event.updates:
            update = self._rule.update(event.last)
            matrix, self._live = np.array(update.matrix), np.array(update.live)
            self._means = matrix @ self._means + self._live * step
            self._gram = matrix @ self._gram @ matrix.T + np.outer(self._live, self._live)
        elif event.follows:
            self._means[:], self._gram[:] = step, 1.0


@dataclass(frozen=True)
class AverageFacts:
    """What the card of an average says of it.

    Attributes:
        mean_age: how far the average trails behind the live weights, in optimizer steps.
        effective_iterates: how many iterates it amounts to against independent noise.
        schedule: the multiplier of the learning rate that it equals to first order, by step; some of them.
    """

    mean_age: float
    effective_iterates: float
    schedule: dict[int, float]


def average_facts(rule: Rule, step: int) -> AverageFacts | None:
    """Return the facts of the average of steps 0 to ``step`` by ``rule``.

    None where the rule has had no update, and for runs so long that forming each weight would take noticeable time.
    """
    if not 0 < step <= _LONGEST or (moments := AverageMoments(rule).at(step)) is None:
        return None
    schedule = schedule_of(trajectory_weights(rule, range(step + 1)))
    shown = np.unique(np.linspace(1, step, _POINTS).round().astype(int))
    return AverageFacts(*moments, {int(at): float(schedule[at]) for at in shown})


@torch.no_grad()
def distance(averager: Averager, name: str, module: nn.Module) -> float:
    """Return the Euclidean distance of an average from the live weights in ``module``; all ranks call this together."""
    live = {plain_name(key): parameter for key, parameter in module.named_parameters(remove_duplicate=False)}
    total = torch.zeros((), dtype=torch.float64)
    for key, value in averager.named_averages(name):
        if (parameter := live.get(key)) is not None:
            squares: Tensor = (value - parameter.detach().to(value.dtype)).float().square().sum()
            total += (squares.full_tensor() if isinstance(squares, DTensor) else squares).double().cpu()
    return float(total.sqrt())
