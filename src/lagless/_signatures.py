"""The arguments of rules and optimizers, read from their signatures and docstrings.

Command-line options and sections of recipes are made of these, so that they cannot lag behind.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import typing
from collections.abc import Callable
from types import NoneType, UnionType
from typing import Any, Literal, NamedTuple, Union

_ENTRY = re.compile(r"^    (\w+(?:, \w+)*):(?: |$)")
_ROLE = re.compile(r":\w+:`~?\.?([^`]*)`")


class Argument(NamedTuple):
    """One argument of a rule or an optimizer.

    Attributes:
        name: as it is typed.
        annotation: its type.
        default: ``inspect.Parameter.empty`` where there is none.
        text: what the docstring says about it, as plain text; empty where it says nothing.
    """

    name: str
    annotation: Any
    default: Any
    text: str


def arguments_of(kind: Callable[..., Any]) -> dict[str, Argument]:
    """Return the arguments that calling ``kind`` takes, by name, in the order of its signature."""
    hints, texts = _hints(kind), _texts(inspect.getdoc(kind) or "")
    return {
        name: Argument(name, hints.get(name, Any), parameter.default, texts.get(name, ""))
        for name, parameter in inspect.signature(kind).parameters.items()
        if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    }


def choices_of(annotation: Any) -> tuple[Any, ...]:
    """Return the alternatives of a type: the members of unions, and the values of literals.

    >>> choices_of(Literal["a", "b"] | None)
    ('a', 'b', <class 'NoneType'>)
    """
    origin = typing.get_origin(annotation)
    if origin is Literal:
        return typing.get_args(annotation)
    if origin in (Union, UnionType):
        return tuple(choice for part in typing.get_args(annotation) for choice in choices_of(part))
    return (NoneType if annotation is None else annotation,)


def first_sentence(text: str) -> str:
    """Return the first sentence of a text.

    >>> first_sentence("κ ≥ 0, e.g. .5; larger forgets more slowly. 0 is no averaging.")
    'κ ≥ 0, e.g. .5; larger forgets more slowly.'
    """
    return re.split(r"(?<=[^.][^.]\.) (?=[A-Z0-9])", text, maxsplit=1)[0]


def _hints(kind: Any) -> dict[str, Any]:
    """Types of the arguments; those of a dataclass are its fields', each resolved where it was written."""
    source = kind if dataclasses.is_dataclass(kind) else kind.__init__ if inspect.isclass(kind) else kind
    try:
        return typing.get_type_hints(source)
    except NameError:  # a name that is imported for type checkers only
        return {}


def _texts(doc: str) -> dict[str, str]:
    """Name → description, from the section ``Args:`` of a docstring."""
    found: dict[str, list[str]] = {}
    names: list[str] = []
    _, _, section = doc.partition("\nArgs:\n")
    for line in section.splitlines():
        if line and not line.startswith(" "):
            break
        if match := _ENTRY.match(line):
            names, line = match[1].split(", "), line[match.end() :]
        for name in names:
            found.setdefault(name, []).append(line.strip())
    return {name: _plain(" ".join(filter(None, lines))) for name, lines in found.items()}


def _plain(text: str) -> str:
    return _ROLE.sub(r"\1", text).replace("``", "")
