"""Checks of arguments. Messages name the argument, its value and what is allowed; comparisons are written so that NaN
fails.

``require_...`` checks a value and returns it as a plain int or float. ``check_...`` checks a field of a frozen
dataclass, such as a rule. :class:`Settings` checks the entries of a mapping, such as a parameter group.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any, NoReturn, TypeGuard

LARGEST = (2.0 - 2.0**-23) * 2.0**127
"""The largest number of float32."""
_LONGEST = 200


def require_integer(name: str, value: object, *, minimum: int) -> int:
    """Return ``value`` as an int, required to be an integer ≥ ``minimum``."""
    if isinstance(value, bool) or not isinstance(value, Integral) or int(value) < minimum:
        _refuse(name, value, f"an integer >= {minimum}")
    return int(value)


def require_number(
    name: str,
    value: object,
    *,
    minimum: float = -math.inf,
    above: float = -math.inf,
    maximum: float = math.inf,
    below: float = math.inf,
    finite: bool = False,
    optional: bool = False,
) -> float | None:
    """Return ``value`` as a float, required to be a real number within the bounds; None passes if ``optional``.

    A number is ``finite`` if it is so in float32: weights cannot take in any other.
    """
    if value is None and optional:
        return None
    number = _float(value)
    good = (
        minimum <= number <= maximum
        and (above == -math.inf or number > above)
        and (below == math.inf or number < below)
    )
    if not good or (finite and not abs(number) <= LARGEST):
        bounds = [f">= {minimum:g}" if minimum > -math.inf else "", f"> {above:g}" if above > -math.inf else ""]
        bounds += [f"<= {maximum:g}" if maximum < math.inf else "", f"< {below:g}" if below < math.inf else ""]
        kind = "a finite number" if finite else "a number"
        within = ", ".join(bound for bound in bounds if bound)
        _refuse(name, value, f"{kind} {within}".strip() + (" or None" if optional else ""))
    return number


def require_choice(name: str, value: object, allowed: Sequence[str]) -> None:
    """Require ``value`` to be one of ``allowed``."""
    if not isinstance(value, str) or value not in allowed:
        _refuse(name, value, f"one of {', '.join(map(repr, allowed))}")


def require_decays(name: str, value: object) -> None:
    """Require two decays in [0, 1), as β₁ and β₂ are."""
    try:
        pair = tuple(value) if isinstance(value, Iterable) and not isinstance(value, str) else ()
    except TypeError:  # a tensor of no dimension
        pair = ()
    if len(pair) != 2 or not all(0.0 <= _float(beta) < 1.0 for beta in pair):
        _refuse(name, value, "two numbers in [0, 1)")


def check_integer(owner: object, name: str, *, minimum: int) -> None:
    """Require ``owner.name`` to be an integer ≥ ``minimum``, and make it a plain int."""
    value = require_integer(f"{type(owner).__name__}: {name}", getattr(owner, name), minimum=minimum)
    object.__setattr__(owner, name, value)  # rules are frozen


def check_number(
    owner: object,
    name: str,
    *,
    minimum: float = -math.inf,
    above: float = -math.inf,
    maximum: float = math.inf,
    below: float = math.inf,
    finite: bool = False,
) -> None:
    """Require ``owner.name`` to be a real number within the bounds, and make it a plain float."""
    number = require_number(
        f"{type(owner).__name__}: {name}",
        getattr(owner, name),
        minimum=minimum,
        above=above,
        maximum=maximum,
        below=below,
        finite=finite,
    )
    object.__setattr__(owner, name, number)


def check_choice(owner: object, name: str, allowed: Sequence[str]) -> None:
    """Require ``owner.name`` to be one of ``allowed``."""
    require_choice(f"{type(owner).__name__}: {name}", getattr(owner, name), allowed)


class Settings:
    """The entries of a mapping, such as a parameter group's, checked by name.

    Args:
        owner: whose settings they are, for messages.
        values: name → value; nothing in it is changed.
    """

    def __init__(self, owner: object, values: Mapping[str, Any]) -> None:
        self._owner, self._values = type(owner).__name__, values

    def numbers(
        self,
        *names: str,
        minimum: float = -math.inf,
        above: float = -math.inf,
        maximum: float = math.inf,
        below: float = math.inf,
        finite: bool = True,
        optional: bool = False,
    ) -> None:
        """Require numbers within the bounds; None passes if ``optional``."""
        for name in names:
            require_number(
                f"{self._owner}: {name}",
                self._values[name],
                minimum=minimum,
                above=above,
                maximum=maximum,
                below=below,
                finite=finite,
                optional=optional,
            )

    def integers(self, *names: str, minimum: int) -> None:
        """Require integers ≥ ``minimum``."""
        for name in names:
            require_integer(f"{self._owner}: {name}", self._values[name], minimum=minimum)

    def decays(self, *names: str) -> None:
        """Require two numbers in [0, 1) each."""
        for name in names:
            require_decays(f"{self._owner}: {name}", self._values[name])

    def flags(self, *names: str) -> None:
        """Require True or False."""
        for name in names:
            self.that(name, isinstance(self._values[name], bool), "True or False")

    def choice(self, name: str, allowed: Sequence[str]) -> None:
        """Require one of ``allowed``."""
        require_choice(f"{self._owner}: {name}", self._values[name], allowed)

    def that(self, name: str, good: bool, allowed: str) -> None:
        """Refuse the entry unless it is ``good``; ``allowed`` says what would be."""
        if not good:
            _refuse(f"{self._owner}: {name}", self._values[name], allowed)


def shown(value: object) -> str:
    """Return ``repr(value)``, shortened where it is long; for messages."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # integers of thousands of digits, containers in themselves
        return f"<{type(value).__name__}>"
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def _float(value: object) -> float:
    """``value`` as a float; NaN, which no bound admits, for what is no real number."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return math.nan
    try:
        return float(value)
    except OverflowError:
        return math.nan


def _refuse(name: str, value: object, allowed: str) -> NoReturn:
    raise ValueError(f"{name}={shown(value)}; it must be {allowed}.")


def is_object(value: Any) -> TypeGuard[dict[str, Any]]:
    """Tell a JSON object, whose names are strings, from the other values that JSON knows."""
    return isinstance(value, dict)


def is_list(value: Any) -> TypeGuard[list[Any]]:
    """Tell a list from other values, with nothing said of what is in it."""
    return isinstance(value, list)


def is_mapping(value: Any) -> TypeGuard[Mapping[Any, Any]]:
    """Tell a mapping from other values, with nothing said of what is in it."""
    return isinstance(value, Mapping)


def is_tuple(value: Any) -> TypeGuard[tuple[Any, ...]]:
    """Tell a tuple from other values, with nothing said of what is in it."""
    return isinstance(value, tuple)


def is_sequence(value: Any) -> TypeGuard[Sequence[Any]]:
    """Tell a sequence from other values, with nothing said of what is in it."""
    return isinstance(value, Sequence)
