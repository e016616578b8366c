"""What people give as rules: one, or several by name."""

from __future__ import annotations

from typing import Any

from lagless._validation import is_mapping, shown
from lagless.rules._calls import rule_line
from lagless.rules._exponential import EMA
from lagless.rules._rule import Rule


def default_rule(update_freq: int = 1) -> Rule:
    """Return the rule that is used where none is given: an EMA whose half-life is 5 % of the steps so far.

    It leaves no weight on θ_0 at any length of run. In the study at the paper's clock it is among the rules with the
    smallest worst-case loss against the live weights, at constant and at decayed learning rates (docs/choose.md).
    """
    return EMA(half_life_fraction=0.05, update_freq=update_freq)


def named_rules(rules: Any) -> dict[str, Rule]:
    """Return rules by name; a rule that is given alone is named by its class in lower case.

    Args:
        rules: one rule, or a mapping of names to rules; None for :func:`default_rule`.

    Raises:
        TypeError: if they are anything else.
        ValueError: if there is none.
    """
    if rules is None:
        rules = default_rule()
    if isinstance(rules, Rule):
        return {type(rules).__name__.lower(): rules}
    if not is_mapping(rules):
        raise TypeError(f"rules={shown(rules)} is no rule: write {rule_line(rules)}. {_ALSO}")
    for name, rule in rules.items():
        if not isinstance(name, str) or not isinstance(rule, Rule):
            given = f"rules: {shown(name)} is {shown(rule)}, which is no rule by name"
            raise TypeError(f"{given}: write {{{str(name)!r}: {rule_line(rule)}}}. {_ALSO}")
    if not rules:
        raise ValueError(f"rules is empty; {_WANTED}.")
    return dict(rules)


_WANTED = (
    "give one rule, e.g. EMA(half_life_fraction=0.05), or a mapping of names to rules, e.g. "
    "{'ema': EMA(half_life_fraction=0.05), 'window': WindowAverage()}"
)
_ALSO = f"In general, {_WANTED}."
