"""The learning rate that a trainer logged beside a checkpoint."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from lagless._validation import is_list, is_object

_LOG = "trainer_state.json"


def logged_rates(folder: Path) -> dict[float, float]:
    """Return the learning rate at each step that ``transformers`` logged in ``trainer_state.json``, in its order.

    A log that cannot be read, or that has no positive learning rate at two steps or more, is none.
    """
    try:
        state: Any = json.loads((folder / _LOG).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    history = state.get("log_history") if is_object(state) else None
    found: dict[float, float] = {}
    for entry in history if is_list(history) else ():
        if is_object(entry):
            step, rate = _number(entry.get("step")), _number(entry.get("learning_rate"))
            if step is not None and rate is not None and rate >= 0.0:
                found[step] = rate
    return found if len(found) >= 2 and max(found.values()) > 0.0 else {}


def _number(value: Any) -> float | None:
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    return None
