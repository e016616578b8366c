"""Averaging rules in recipes."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import PlainSerializer, PlainValidator

from lagless._validation import shown
from lagless.rules import Rule, rule_from_dict, rule_to_dict


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
