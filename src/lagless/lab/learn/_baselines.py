"""What learned weights are compared with: averaging rules at several settings."""

from __future__ import annotations

from collections.abc import Sequence

from lagless.rules import EMA, Rule, UniformAverage, WindowAverage, common_update_freq

HALF_LIVES = (0.02, 0.05, 0.1, 0.2, 0.4)
TAILS = (0.1, 0.2, 0.4)


def default_prior(steps: Sequence[int]) -> Rule:
    """Return the scale-free EMA with a half-life of 5 % of the run, which every stored checkpoint updates."""
    return EMA(half_life_fraction=0.05, update_freq=common_update_freq(steps, 0))


def rules_compared(steps: Sequence[int]) -> dict[str, Rule]:
    """Return the rules of which the best is compared with: EMAs of :data:`HALF_LIVES`, uniform averages of the last
    :data:`TAILS` of the run, which equal linear decays, and of all of it.

    Args:
        steps: of the checkpoints, θ_0's first.
    """
    every = common_update_freq(steps, 0)
    found: dict[str, Rule] = {
        f"EMA, half-life {share:.0%} of the run": EMA(half_life_fraction=share, update_freq=every)
        for share in HALF_LIVES
    }
    count = len(steps) - 1
    for share in TAILS:
        window = max(2, round(share * count))
        found[f"last {window} checkpoints"] = WindowAverage(window=window, update_freq=every)
    found["all checkpoints"] = UniformAverage(update_freq=every)
    return found
