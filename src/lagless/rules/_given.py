"""What a person gave as an argument: recognized, described, and written as code."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from numbers import Real
from typing import Any, cast

from lagless._validation import shown


def is_model(value: Any) -> bool:
    """Tell a model, which names its parameters, from other values."""
    return hasattr(value, "named_parameters") and not isinstance(value, type)


def is_optimizer(value: Any) -> bool:
    """Tell an optimizer, which has groups of parameters, from other values."""
    return hasattr(value, "param_groups") and not isinstance(value, type)


def is_rule_class(value: type[Any]) -> bool:
    """Tell a class of averaging rules from other classes."""
    return issubclass(value, rule_type())


def lists_parameters(module: Any) -> bool:
    """Tell whether a module is a list of parameters, as ``ParameterList`` is, rather than of layers."""
    return isinstance(module, Iterable) and all(
        hasattr(p, "requires_grad") and not is_model(p) for p in cast("Iterable[Any]", module)
    )


def kind_of_value(value: Any) -> str:
    """Return what a value is, in words for a message."""
    if isinstance(value, type):
        return "a class"
    if is_optimizer(value):
        return "an optimizer"
    if is_model(value):
        return "a model"
    if isinstance(value, rule_type()):
        return "a rule"
    return {"str": "a string", "int": "a number", "float": "a number"}.get(
        type(value).__name__, f"of the type {type(value).__name__}"
    )


def described(value: Any) -> str:
    """Return a value as a message shows it: short ones as code, others by their type."""
    if isinstance(value, type):
        return value.__name__
    if isinstance(value, rule_type()) or isinstance(value, (Real, str, tuple, type(None))):
        return code(value)
    return type(value).__name__


def number(value: Any) -> Any:
    """Return the number that ``value`` is, or says; None where it says none."""
    if not isinstance(value, bool) and isinstance(value, Real):
        return int(value) if isinstance(value, int) else float(value)
    try:
        return float(value) if isinstance(value, str) else None
    except ValueError:
        return None


def call_code(name: str, first: Iterable[str], settings: Mapping[str, Any]) -> str:
    """Return a call as code."""
    return f"{name}({', '.join([*first, *(f'{key}={code(value)}' for key, value in settings.items())])})"


def code(value: Any) -> str:
    """Return a value as the code that makes it."""
    if isinstance(value, rule_type()) and dataclasses.is_dataclass(value):
        fields = [f for f in dataclasses.fields(value) if f.init]
        changed = {f.name: getattr(value, f.name) for f in fields if getattr(value, f.name) != f.default}
        return call_code(type(value).__name__, [], changed)
    if isinstance(value, Real) and not isinstance(value, (bool, int)):
        return repr(float(value))
    if isinstance(value, tuple):
        return f"({', '.join(map(code, cast('tuple[Any, ...]', value)))})"
    if isinstance(value, (bool, int, str, type(None))):
        return shown(value)
    return "..."


def rule_type() -> type[Any]:
    from lagless.rules._rule import Rule  # which this module serves

    return Rule
