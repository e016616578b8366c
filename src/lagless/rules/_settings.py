"""Rules from names and settings, as people type them: one rule, several, or every point of a grid."""

from __future__ import annotations

import difflib
import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from lagless._signatures import Argument, arguments_of
from lagless.rules._registry import kind_of, known_rules
from lagless.rules._rule import Rule

Value = str | float | int


class RuleArgument(NamedTuple):
    """An argument that one or several rules have.

    Attributes:
        name: as it is typed.
        rules: the names of the rules that have it, in lower case.
        annotations: its type in each of them.
        text: what the first of them that documents it says.
    """

    name: str
    rules: tuple[str, ...]
    annotations: tuple[Any, ...]
    text: str


def rule_names() -> tuple[str, ...]:
    """Return the names of all rules that are known, in lower case, as settings and commands take them."""
    return tuple(known_rules())


def rule_arguments() -> dict[str, RuleArgument]:
    """Return every argument that a known rule has, by name.

    >>> rule_arguments()["half_life"].rules
    ('ema',)
    """
    found: dict[str, list[tuple[str, Argument]]] = {}
    for kind, make in known_rules().items():
        for argument in arguments_of(make).values():
            found.setdefault(argument.name, []).append((kind, argument))
    return {
        name: RuleArgument(
            name,
            tuple(kind for kind, _ in owners),
            tuple(argument.annotation for _, argument in owners),
            next((argument.text for _, argument in owners if argument.text), ""),
        )
        for name, owners in found.items()
    }


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
    known = known_rules()
    fixed = {_argument(key): value for key, value in (settings or {}).items()}
    varied = {_argument(key): list(values) for key, values in (grid or {}).items()}
    for kind in kinds:
        if kind_of(kind) not in known:
            raise ValueError(f"unknown rule {kind!r}; known: {', '.join(known)}.{_suggestion(kind_of(kind), known)}")
    accepted = {kind: arguments_of(known[kind_of(kind)]) for kind in kinds}
    for key in (*fixed, *varied):
        if not any(key in arguments for arguments in accepted.values()):
            names = [name for arguments in accepted.values() for name in arguments]
            raise ValueError(
                f"{key} is no argument of {', '.join(kinds)}; {_listing(accepted)}.{_suggestion(key, names)}"
            )
        if key in fixed and key in varied:
            raise ValueError(f"{key} is given as a setting and in the grid; leave one out.")

    rules: dict[str, Rule] = {}
    for kind, arguments in accepted.items():
        mine = {key: _number(value) for key, value in fixed.items() if key in arguments}
        axes = {key: values for key, values in varied.items() if key in arguments}
        for point in itertools.product(*axes.values()):
            values = {key: _number(value) for key, value in zip(axes, point, strict=True)}
            name = "-".join([kind_of(kind), *(f"{key}={value}" for key, value in values.items())])
            rules[name] = known[kind_of(kind)](**mine, **values)
    return rules


def _argument(text: str) -> str:
    return text.strip().lstrip("-").replace("-", "_")


def _number(value: Value) -> Value:
    if not isinstance(value, str):
        return value
    text = value.strip()
    if re.fullmatch(r"[+-]?\d{1,18}", text):
        return int(text)
    try:
        return float(text)
    except ValueError:
        return text


def _suggestion(word: str, known: Mapping[str, Any] | Sequence[str]) -> str:
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.75)
    return f" Did you mean {close[0]}?" if close else ""


def _listing(accepted: Mapping[str, Mapping[str, object]]) -> str:
    return "; ".join(f"{kind} has {', '.join(arguments)}" for kind, arguments in accepted.items())
