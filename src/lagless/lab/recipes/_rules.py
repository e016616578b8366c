"""Averaging rules in recipes."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any

from pydantic import PlainSerializer, PlainValidator

from lagless._validation import shown
from lagless.rules import Rule, rescaled, rule_from_dict, rule_to_dict


def _rule(value: Any) -> Rule:
    if isinstance(value, Rule):
        return value
    if not isinstance(value, dict) or not all(isinstance(name, str) for name in (*value, value.get("rule"))):
        raise ValueError(f"{shown(value)} is no rule; write {{rule: BEMA, ema_power: 0.5}}")
    try:
        return rule_from_dict(value)
    except TypeError as error:  # a setting that is no number
        raise ValueError(str(error)) from error


AveragingRule = Annotated[Rule, PlainValidator(_rule), PlainSerializer(rule_to_dict)]


def at_length(rule: Rule, stated: int, steps: int) -> Rule:
    """Return the rule that means on a run of ``steps`` what ``rule`` means on one of ``stated`` steps.

    On the paper's clock, φ, τ and γ are rescaled: φ' = φ/s, τ' = τ/s and γ' = γs with s = stated/steps give the same
    weights over t/T, exactly where φ/s and τ/s are whole steps; otherwise they are rounded. Other rules mean the same
    on a run of any length already.

    >>> from lagless import BEMA
    >>> twin = at_length(BEMA.paper(), 7200, 400)
    >>> twin.update_freq, twin.multiplier
    (22, 18.0)
    """
    try:
        rescaled(rule, 1.0)
    except ValueError:  # not on the paper's clock
        return rule
    factor = stated / steps
    clock: dict[str, Any] = {
        "update_freq": max(1, round(rule.update_freq / factor)),
        "update_after": round(rule.update_after / factor),
        "multiplier": getattr(rule, "multiplier") * factor,  # noqa: B009 (not every rule has it; this one does)
    }
    return replace(rule, **clock)  # type: ignore[type-var]
