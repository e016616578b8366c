"""The rules among which a choice is made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from lagless.rules import BEMA, DEMA, EMA, DecayAverage, FloatArray, Rule, common_update_freq, ticks, trajectory_weights


def shortlist(steps: Sequence[int]) -> dict[str, tuple[Rule, FloatArray]]:
    """Return the rules that are worth an evaluation on any run, with their weights, by a name that fits into a table.

    They mean the same on a run of any length, their widths being fractions of it. Rules that come to the last
    checkpoint alone, as a decay between the last two, are left out.

    Args:
        steps: of the checkpoints, each of which is an update.
    """
    total = steps[-1]
    rules: dict[str, Rule] = {f"EMA {f:g}": EMA(half_life_fraction=f) for f in (0.05, 0.1, 0.2)}
    rules |= {f"BEMA {f:g}": BEMA(half_life_fraction=f, correction=0.5, anchor="slow") for f in (0.1, 0.2)}
    rules["DEMA 0.2"] = DEMA(half_life_fraction=0.2)
    rules |= {f"decay {d:g}": DecayAverage(shape="linear", duration=d, total_steps=total) for d in (0.1, 0.2)}
    found: dict[str, tuple[Rule, FloatArray]] = {}
    for name, rule in rules.items():
        rule = replace(rule, update_freq=common_update_freq(steps, rule.update_after))  # type: ignore[type-var]
        if next(ticks(rule, steps), None) is None:
            continue
        weights = trajectory_weights(rule, steps)
        if np.count_nonzero(weights) > 1:
            found[name] = rule, weights
    return found
