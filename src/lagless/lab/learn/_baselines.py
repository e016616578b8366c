"""What learned weights are compared with: averaging rules at several settings, and decays of fixed shapes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lagless.lab.learn._modes import Floats
from lagless.rules import EMA, DecayAverage, Rule, UniformAverage, common_update_freq, default_rule, schedule_of

HALF_LIVES = (0.02, 0.05, 0.1, 0.2, 0.4)
SHAPES = ("linear", "minus-sqrt", "cosine")
DURATIONS = (0.1, 0.2, 0.4)
LEARNED_OVER = (0.1, 0.2, 0.4, 0.8)
_FULL, _POINTS = 0.99, 33


def default_prior(steps: Sequence[int]) -> Rule:
    """Return the default rule, ``EMA(half_life_fraction=0.05)``, with an update at every stored checkpoint."""
    return default_rule(update_freq=common_update_freq(steps))


def rules_compared(steps: Sequence[int]) -> dict[str, Rule]:
    """Return the rules of which the best is compared with: EMAs of :data:`HALF_LIVES` and the uniform average.

    Args:
        steps: of the checkpoints, θ_0's first.
    """
    every = common_update_freq(steps)
    found: dict[str, Rule] = {
        f"EMA, half-life {share:.0%} of the run": EMA(half_life_fraction=share, update_freq=every)
        for share in HALF_LIVES
    }
    return {**found, "uniform average": UniformAverage(update_freq=every)}


def decays_compared(steps: Sequence[int]) -> dict[str, Rule]:
    """Return the averages that equal decays of the learning rate, of :data:`SHAPES` over :data:`DURATIONS`.

    Args:
        steps: of the checkpoints, θ_0's first.
    """
    return {
        f"{shape} decay over the last {share:.0%}": decay_over(shape, share, steps)
        for shape in SHAPES
        for share in DURATIONS
    }


def decay_over(shape: str | tuple[float, ...], share: float, steps: Sequence[int]) -> DecayAverage:
    """Return the average that equals a decay of the learning rate over the last ``share`` of a run."""
    every = common_update_freq(steps)
    duration = max(1, round(share * (steps[-1] - steps[0]) / every)) * every
    return DecayAverage(shape=shape, duration=duration, total_steps=steps[-1], update_freq=every)


def shape_of(weights: Floats, steps: Sequence[int]) -> tuple[float, ...]:
    """Return the shape of the decay that weights equal, for :class:`DecayAverage`: multipliers from where they leave 1.

    Where the multipliers would rise again, as those of negative weights do, they are held at the least so far, which is
    what a trainer would run.

    Args:
        weights: shape (N,).
        steps: of the checkpoints.

    >>> shape_of(np.array([0.0, 0.0, 0.5, 0.0, 0.5]), [0, 10, 20, 30, 40])[::16]
    (1.0, 0.5, 0.5)
    """
    schedule = np.minimum.accumulate(np.clip(schedule_of(weights)[1:], 0.0, 1.0))
    begin = int(np.flatnonzero(schedule >= _FULL)[-1]) if schedule[0] >= _FULL else 0
    # On the way to step j the run has c_j, from step j - 1 on.
    places = np.linspace(steps[begin], steps[-1], _POINTS)
    found = np.interp(places, steps[begin:], np.append(schedule[begin:], schedule[-1]))
    return (1.0, *found[1:].tolist())


def learned_shape(weights: Floats, steps: Sequence[int]) -> dict[str, Rule]:
    """Return the averages that equal decays of the learned shape over the last part of a run, by name."""
    shape = shape_of(weights, steps)
    return {f"the learned shape over the last {share:.0%}": decay_over(shape, share, steps) for share in LEARNED_OVER}
