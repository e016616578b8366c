"""What learned weights are compared with: averaging rules at several settings."""

from __future__ import annotations

from collections.abc import Sequence

from lagless.rules import EMA, DecayAverage, Rule, UniformAverage, common_update_freq, default_rule

HALF_LIVES = (0.02, 0.05, 0.1, 0.2, 0.4)
DECAYS = (("linear", 0.1), ("linear", 0.2), ("linear", 0.4), ("minus-sqrt", 0.2), ("minus-sqrt", 0.4))


def default_prior(steps: Sequence[int]) -> Rule:
    """Return the default rule, ``EMA(half_life_fraction=0.05)``, with an update at every stored checkpoint."""
    return default_rule(update_freq=common_update_freq(steps))


def rules_compared(steps: Sequence[int]) -> dict[str, Rule]:
    """Return the rules of which the best is compared with: EMAs of :data:`HALF_LIVES`, the averages that equal
    :data:`DECAYS` of the learning rate over the last part of the run, and the uniform average.

    Args:
        steps: of the checkpoints, θ_0's first.
    """
    every = common_update_freq(steps)
    total = steps[-1] - steps[0]
    found: dict[str, Rule] = {
        f"EMA, half-life {share:.0%} of the run": EMA(half_life_fraction=share, update_freq=every)
        for share in HALF_LIVES
    }
    for shape, share in DECAYS:
        duration = max(1, round(share * total / every)) * every
        found[f"{shape} decay over the last {share:.0%}"] = DecayAverage(
            shape=shape, duration=duration, total_steps=steps[-1], update_freq=every
        )
    found["uniform average"] = UniformAverage(update_freq=every)
    return found
