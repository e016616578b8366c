"""What people give as rules: one, or several by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lagless.rules._rule import Rule


def named_rules(rules: Any) -> dict[str, Rule]:
    """Name → rule; a rule that is given alone is named by its class in lower case.

    Args:
        rules: one rule, or a mapping of names to rules.

    Raises:
        TypeError: if they are anything else.
        ValueError: if there is none.
    """
    if isinstance(rules, Rule):
        return {type(rules).__name__.lower(): rules}
    if not isinstance(rules, Mapping):
        raise TypeError(f"rules={rules!r}; {_WANTED}.")
    for name, rule in rules.items():
        if not isinstance(name, str) or not isinstance(rule, Rule):
            raise TypeError(f"rules: {name!r} is {rule!r}; {_WANTED}.")
    if not rules:
        raise ValueError(f"rules is empty; {_WANTED}.")
    return dict(rules)


_WANTED = (
    "give one rule, e.g. EMA(half_life_fraction=0.05), or a mapping of names to rules, e.g. "
    "{'ema': EMA(half_life_fraction=0.05), 'window': WindowAverage()}"
)
