"""Rules from names and settings, as people type them: one rule, several, or every point of a grid."""

from __future__ import annotations

import inspect
import itertools
import re
from collections.abc import Mapping, Sequence

from lagless.rules._registry import RULES
from lagless.rules._rule import Rule

Value = str | float | int


def rules_from_settings(
    kinds: Sequence[str], settings: Mapping[str, Value] | None = None, grid: Mapping[str, Sequence[Value]] | None = None
) -> dict[str, Rule]:
    """The rules ``kinds`` with ``settings``, at every point of ``grid``, by name.

    Each setting goes to every kind that has such an argument, and must fit at least one. A grid multiplies the kinds
    that have its argument. Names tell what the grid varies: ``bema``, ``bema-ema_power=0.2``.

    Args:
        kinds: rule names in any case, e.g. ``["bema", "ema"]``.
        settings: argument → value; numbers may be strings. Dashes and underscores are the same.
        grid: argument → values.

    Raises:
        ValueError: if a kind is unknown, an argument fits no kind, or a value is out of range.

    >>> list(rules_from_settings(["bema", "ema"], {"update-freq": 10}, {"bias-power": ["0.2", "inf"]}))
    ['bema-bias_power=0.2', 'bema-bias_power=inf', 'ema']
    """
    known = {name.lower(): name for name in RULES}
    fixed = {_argument(key): value for key, value in (settings or {}).items()}
    varied = {_argument(key): list(values) for key, values in (grid or {}).items()}
    for kind in kinds:
        if _kind(kind) not in known:
            raise ValueError(f"unknown rule {kind!r}; known: {', '.join(known)}.")
    accepted = {kind: inspect.signature(RULES[known[_kind(kind)]]).parameters for kind in kinds}
    for key in (*fixed, *varied):
        if not any(key in parameters for parameters in accepted.values()):
            raise ValueError(f"{key} is no argument of {', '.join(kinds)}; {_listing(accepted)}.")
        if key in fixed and key in varied:
            raise ValueError(f"{key} is given as a setting and in the grid; leave one out.")

    rules: dict[str, Rule] = {}
    for kind, parameters in accepted.items():
        mine = {key: _number(value) for key, value in fixed.items() if key in parameters}
        axes = {key: values for key, values in varied.items() if key in parameters}
        for point in itertools.product(*axes.values()):
            values = {key: _number(value) for key, value in zip(axes, point, strict=True)}
            name = "-".join([_kind(kind), *(f"{key}={value}" for key, value in values.items())])
            rules[name] = RULES[known[_kind(kind)]](**mine, **values)
    return rules


def _kind(text: str) -> str:
    return text.lower().replace("-", "").replace("_", "")


def _argument(text: str) -> str:
    return text.strip().lstrip("-").replace("-", "_")


def _number(value: Value) -> Value:
    if not isinstance(value, str):
        return value
    text = value.strip()
    if re.fullmatch(r"[+-]?\d+", text):
        return int(text)
    try:
        return float(text)
    except ValueError:
        return text


def _listing(accepted: Mapping[str, Mapping[str, object]]) -> str:
    return "; ".join(f"{kind} has {', '.join(parameters)}" for kind, parameters in accepted.items())
