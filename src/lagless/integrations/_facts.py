"""What an average is of the run it followed, in numbers: for records, cards and logs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lagless.rules import Rule, effective_iterates, mean_age, schedule_of, trajectory_weights

_LONGEST = 20_000  # steps of which the weights are formed one by one, in a third of a second
_POINTS = 11


@dataclass(frozen=True)
class AverageFacts:
    """Numbers that depend on the rule and the step alone.

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
    if not 0 < step <= _LONGEST:
        return None
    steps = range(step + 1)
    try:
        weights = trajectory_weights(rule, steps)
    except ValueError:  # no update so far
        return None
    schedule = schedule_of(weights)
    shown = np.unique(np.linspace(1, step, _POINTS).round().astype(int))
    return AverageFacts(
        mean_age(weights, steps), effective_iterates(weights), {int(at): float(schedule[at]) for at in shown}
    )
