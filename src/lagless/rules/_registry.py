"""Rules as plain JSON."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

from lagless.rules._bias_corrected import BEMA, OUEMA
from lagless.rules._exponential import DEMA, EMA
from lagless.rules._rule import Rule
from lagless.rules._windows import PowerEMA, UniformAverage, WindowAverage

RULES: dict[str, Callable[..., Rule]] = {
    rule.__name__: rule for rule in (EMA, BEMA, OUEMA, DEMA, UniformAverage, PowerEMA, WindowAverage)
}


def rule_to_dict(rule: Rule) -> dict[str, Any]:
    """A rule as plain JSON: its class name under ``"rule"`` and its hyperparameters; infinity is written as ``"inf"``.

    >>> from lagless import UniformAverage
    >>> rule_to_dict(UniformAverage())
    {'rule': 'UniformAverage', 'update_after': 0, 'update_freq': 1}
    """
    return {"rule": type(rule).__name__} | {k: "inf" if v == math.inf else v for k, v in vars(rule).items()}


def rule_from_dict(data: dict[str, Any]) -> Rule:
    """The rule that :func:`rule_to_dict` wrote.

    Raises:
        ValueError: if the name or an argument is unknown.
    """
    values = dict(data)
    name = values.pop("rule", None)
    if name not in RULES:
        raise ValueError(f"unknown rule {name!r}; known: {', '.join(RULES)}.")
    known = inspect.signature(RULES[name]).parameters.keys()
    if unknown := sorted(values.keys() - known):
        raise ValueError(f"{name} has no argument {', '.join(unknown)}; it has {', '.join(sorted(known))}.")
    return RULES[name](**{k: math.inf if v == "inf" else v for k, v in values.items()})
