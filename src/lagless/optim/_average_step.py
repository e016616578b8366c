"""What an average does at one optimizer step: what it pulls to, how it moves, and how strong the pull still is."""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from lagless.rules import (
    ConstantGain,
    EmaBuffer,
    Gain,
    HalfLifeGain,
    ReadCoefficients,
    Rule,
    Tick,
    UpdateCoefficients,
    read_after,
)


class AverageStep(NamedTuple):
    """The average's part of step t.

    Attributes:
        target: the average before the step, in terms of the buffers and of θ_{t-1}.
        update: how the buffers move with θ_t; None between updates.
        decay: d_t, by which the gain of the pull falls in the course of the run; 0 through burn-in.
    """

    target: ReadCoefficients
    update: UpdateCoefficients | None
    decay: float

    @property
    def weight(self) -> float | None:
        """The weight of θ_t, if the average is its single buffer; None if it is anything else."""
        if self.target != ReadCoefficients((1.0,), 0.0):
            return None
        return 0.0 if self.update is None else self.update.live[0]


def average_step(rule: Rule, step: int) -> AverageStep:
    """What ``rule``'s average does at ``step``.

    The target of step t is the average A_s that was read at the latest update s < t,

        target_t = A_s + d_s (θ_{t-1} - θ_s)

    where d_s is the share of θ_s in it that is no buffer's: α_s for BEMA, whose correction goes on with the iterate,
    and 0 for the other rules, whose targets rest until the next update. At s = t - 1 it is what ``read()`` returns
    before the step. Between two, ``read()`` counts θ_{t-1} in as one more update would; the pull does not, since that
    would weaken it by the gain of an update that is not made.

    Through burn-in the buffers follow the weights, and nothing is pulled. Until the first update all of them hold the
    weights at the end of burn-in, and these are the target.

    Args:
        rule: the averaging rule.
        step: t ≥ 1.
    """
    size = len(rule.buffer_keys)
    first = ReadCoefficients((1.0,) + (0.0,) * (size - 1), 0.0)
    if step <= rule.update_after:
        return AverageStep(first, UpdateCoefficients(((0.0,) * size,) * size, (1.0,) * size), 0.0)
    last, tick = rule.schedule.last(step - 1), rule.schedule.tick_at(step)
    target = rule.read(last) if last.number else first
    return AverageStep(target, rule.update(tick) if rule.schedule.updates(step) else None, pull_decay(rule, tick))


def coefficients(rule: Rule, step: int) -> ReadCoefficients | None:
    """Return how the average is read after ``step``, with the tail counted in; None before the first update."""
    return read_after(rule, rule.schedule.last(step), step)


def pull_decay(rule: Rule, tick: Tick) -> float:
    """d_t: the gain β_t with which the average takes in an iterate, where β falls with time; 1 where it is constant.

    The average that counts is the first one of ``rule.buffer_keys``, for BEMA its ema. Where β depends on the steps
    since the last update, d_t is that of a single step: it falls smoothly while the average rests.
    """
    gain = next((label.gain for label in rule.buffer_keys if isinstance(label, EmaBuffer)), None)
    if gain is None or isinstance(gain, ConstantGain | HalfLifeGain):
        return 1.0
    return gain(tick._replace(previous=tick.step - 1))


def average_step_on_device(rule: Rule, steps: Tensor) -> tuple[Tensor, Tensor]:
    """The weight of θ_t (0 between updates, 1 through burn-in) and d_t, as tensors: nothing waits for the device.

    Args:
        rule: one that :func:`check_capturable` accepts.
        steps: shape (n,), float64 where the device has it.

    Returns:
        Two tensors of shape (n,).
    """
    schedule, now = rule.schedule, cast(Any, steps)  # the clock takes tensors as it takes numbers
    tick, ones = schedule.tick_at(now), torch.ones_like(steps)
    beta, decay = (number * ones for number in (rule.update(tick).live[0], pull_decay(rule, tick)))
    follows, due = cast(Any, schedule.follows(now)), cast(Any, schedule.updates(now))
    return torch.where(follows, 1.0, torch.where(due, beta, 0.0)), torch.where(follows, 0.0, decay)


def check_capturable(rule: Rule) -> None:
    """Require an average whose numbers can be computed on the device.

    Raises:
        ValueError: if it is none.
    """
    labels = rule.buffer_keys
    single = len(labels) == 1 and isinstance(labels[0], EmaBuffer) and labels[0].source is None
    if not single or isinstance(_gain(rule), HalfLifeGain):
        raise ValueError(
            f"average={rule!r} with capturable=True; inside a graph only averages of one buffer, other than by "
            "half_life, can be followed. Use e.g. EMA(decay=...), or capturable=False."
        )


def _gain(rule: Rule) -> Gain:
    label = rule.buffer_keys[0]
    assert isinstance(label, EmaBuffer)
    return label.gain
