"""Averages of a run as predicted from how its stored iterates move, by the code of ``lagless choose``."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from experiments.shared.averages import Average
from experiments.shared.training import Setting

from lagless.lab.choose import LearningRate, fit_motion

DRIFT_WEIGHT = 0.4  # of lagless choose


def predict(iterates: np.ndarray, setting: Setting, averages: Iterable[Average]) -> dict[str, Any]:
    """Return the misfit of the fitted motion, and by average the predicted difference to the live weights.

    The differences of a run have one unknown unit.

    Args:
        iterates: shape (N, parameters), float32.
        setting: of the run, whose schedule is known.
        averages: weights on the N iterates.
    """
    steps = list(range(0, setting.steps + 1, setting.every))
    increments = np.diff(iterates.astype(np.float64), axis=0)
    rates = tuple(setting.rate_at(step) / setting.rate for step in range(1, setting.steps + 1))
    rate = LearningRate(tuple(range(1, setting.steps + 1)), rates, "log")
    motion = fit_motion(increments @ increments.T, steps, rate)
    made = list(averages)
    change = motion.change(np.array([average.weights for average in made]))
    total = change.noise + DRIFT_WEIGHT * change.drift
    return {
        "misfit": float(f"{motion.misfit:.4g}"),
        "unresolved": float(f"{motion.unresolved:.4g}"),
        "predicted": {average.name: float(f"{value:.6g}") for average, value in zip(made, total, strict=True)},
    }
