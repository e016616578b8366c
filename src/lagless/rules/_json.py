"""Rules as plain JSON."""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Mapping
from typing import Any

from lagless._validation import is_list, is_mapping, is_tuple
from lagless.rules._registry import find_rule, is_built_in
from lagless.rules._rule import Rule


def rule_to_dict(rule: Rule) -> dict[str, Any]:
    """Return a rule as plain JSON: its class name under ``"rule"`` and its hyperparameters.

    Infinity is written as ``"inf"``. A rule that is not lagless's own has its module under ``"module"``.

    Raises:
        ValueError: if a hyperparameter is called "rule" or "module".

    >>> from lagless import UniformAverage
    >>> rule_to_dict(UniformAverage())
    {'rule': 'UniformAverage', 'update_after': 0, 'update_freq': 1}
    """
    kind = type(rule)
    head = {"rule": kind.__name__} if is_built_in(kind) else {"rule": kind.__qualname__, "module": kind.__module__}
    values = hyperparameters(rule)
    if taken := {"rule", "module"} & values.keys():
        raise ValueError(f"{kind.__name__}: a hyperparameter is called {' and '.join(taken)}, which names the class.")
    return head | {name: _encoded(value) for name, value in values.items()}


def rule_from_dict(data: object) -> Rule:
    """Return the rule that :func:`rule_to_dict` wrote.

    A rule that is not lagless's own must have been imported, or be declared by an installed package in the entry-point
    group ``lagless.rules``.

    Raises:
        ValueError: if the rule or an argument is unknown.
    """
    if not is_mapping(data) or not all(isinstance(key, str) for key in data):
        raise ValueError(f"an averaging rule is recorded as {data!r:.100}; it must be a mapping as of rule_to_dict().")
    values = dict(data)
    name, module = values.pop("rule", None), values.pop("module", None)
    if not isinstance(name, str) or not isinstance(module, str | None):
        raise ValueError(f'"rule": {name!r}, "module": {module!r}; these name a class, e.g. "rule": "EMA".')
    rule = find_rule(name, module)
    known = inspect.signature(rule).parameters.keys()
    if unknown := sorted(values.keys() - known):
        raise ValueError(f"{name} has no argument {', '.join(unknown)}; it has {', '.join(sorted(known))}.")
    return rule(**{key: _decoded(value) for key, value in values.items()})


def same_rule(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two records of :func:`rule_to_dict` are of one rule.

    Records of rules of one's own had no module formerly; and what is defined in a script has no lasting one.
    """
    mine, theirs = dict(one), dict(other)
    modules = mine.pop("module", None), theirs.pop("module", None)
    return mine == theirs and (len(set(modules)) == 1 or not {None, "__main__", "__mp_main__"}.isdisjoint(modules))


def hyperparameters(rule: Rule) -> dict[str, Any]:
    """Return the arguments that make ``rule`` again, by name."""
    if dataclasses.is_dataclass(rule):
        given = {field.name: getattr(rule, field.name) for field in dataclasses.fields(rule) if field.init}
        return {
            name: value for name, value in given.items() if value is not None or name not in rule.recorded_when_given
        }
    return dict(vars(rule))


def _encoded(value: Any) -> Any:
    if isinstance(value, float) and math.isinf(value):
        return "inf" if value > 0.0 else "-inf"
    return [_encoded(item) for item in value] if is_tuple(value) else value


def _decoded(value: Any) -> Any:
    if value in ("inf", "-inf"):
        return float(value)
    return tuple(_decoded(item) for item in value) if is_list(value) else value
