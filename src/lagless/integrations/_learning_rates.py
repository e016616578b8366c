"""How far the learning rate of a run decays, as its scheduler and its optimizer tell."""

from __future__ import annotations

from functools import partial
from types import FunctionType
from typing import Any

import numpy as np
from torch.optim.lr_scheduler import LambdaLR

_SAMPLES = 500


def scheduled_share(scheduler: Any, steps: int) -> float:
    """Return the learning rate before the last of ``steps`` in units of its peak; NaN where that cannot be told.

    It can be of schedules that are functions of the step, as those of ``transformers`` are. Of several groups, the one
    that decays least counts.

    Args:
        scheduler: also as wrapped by Accelerate.
        steps: calls of its ``step()`` in the whole run.
    """
    scheduler = getattr(scheduler, "scheduler", scheduler)
    functions = scheduler.lr_lambdas if isinstance(scheduler, LambdaLR) else []
    if steps < 1 or not functions or not all(isinstance(f, FunctionType | partial) for f in functions):
        return float("nan")
    sampled = sorted({int(t) for t in np.linspace(0, steps - 1, min(steps, _SAMPLES))})
    rates = np.array([[float(f(t)) for t in sampled] for f in functions])
    return _largest([(row[-1], row.max()) for row in rates])


def present_share(optimizer: Any) -> float:
    """Return the present learning rate in units of its peak; NaN where no scheduler has noted that."""
    pairs = []
    for group in optimizer.param_groups:
        peak = max(float(group.get("initial_lr", 0.0)), float(group.get("max_lr", 0.0)))
        pairs.append((float(group["lr"]), peak))
    return _largest(pairs)


def _largest(pairs: list[tuple[float, float]]) -> float:
    return max((rate / peak for rate, peak in pairs if peak > 0.0), default=float("nan"))
