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
    read_between_updates,
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

    Through burn-in the buffers follow the weights, and nothing is pulled. Until the first update all of them hold the
    weights at the end of burn-in.

    Args:
        rule: the averaging rule.
        step: t ≥ 1.
    """
    size = len(rule.buffer_keys)
    first = ReadCoefficients((1.0,) + (0.0,) * (size - 1), 0.0)
    if step <= rule.update_after:
        return AverageStep(first, UpdateCoefficients(((0.0,) * size,) * size, (1.0,) * size), 0.0)
    last = last_update(rule, step - 1)
    target = rule.read(last) if last.number else first
    tick = Tick(step, last.step, last.number + 1)
    return AverageStep(target, rule.update(tick) if rule.timing.updates(step) else None, pull_decay(rule, tick))


def last_update(rule: Rule, step: int) -> Tick:
    """The rule's latest update at ``step``; number 0 if there was none."""
    number = max(0, step - rule.update_after) // rule.update_freq
    at = rule.update_after + number * rule.update_freq
    return Tick(at, at - rule.update_freq if number else at, number)


def coefficients(rule: Rule, step: int) -> ReadCoefficients | None:
    """How the average is read after ``step``, with the tail counted in; None before the first update."""
    last = last_update(rule, step)
    if last.number == 0:
        return None
    if last.step == step:
        return rule.read(last)
    tick = Tick(step, last.step, last.number + 1)
    return read_between_updates(rule.update(tick), rule.read(tick))


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
    after, every = rule.update_after, rule.update_freq
    number = ((steps - after - 1).clamp(min=0) / every).floor() + 1  # of the update that is next, or now
    gain: Any = _gain(rule)  # of a tick of tensors it is a tensor
    ones = torch.ones_like(steps)
    beta = gain(Tick(*cast(Any, (steps, after + (number - 1) * every, number)))) * ones
    decay = ones if isinstance(gain, ConstantGain) else gain(Tick(*cast(Any, (steps, steps - 1, number)))) * ones
    follows, due = steps <= after, (steps - after) % every == 0
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
