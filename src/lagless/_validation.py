"""Argument checks whose messages name the argument, its value and what is allowed. Comparisons are written so that
NaN fails.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any


def require_integer(name: str, value: object, *, minimum: int) -> int:
    """``value`` as an int, required to be an integer ≥ ``minimum``."""
    if isinstance(value, bool) or not isinstance(value, Integral) or int(value) < minimum:
        raise ValueError(f"{name}={value!r}; it must be an integer >= {minimum}.")
    return int(value)


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
    value: Any = getattr(owner, name)
    number = float(value) if isinstance(value, Real) and not isinstance(value, bool) else math.nan
    good = (
        minimum <= number <= maximum
        and (above == -math.inf or number > above)
        and (below == math.inf or number < below)
    )
    if not good or (finite and not math.isfinite(number)):
        bounds = [f">= {minimum:g}" if minimum > -math.inf else "", f"> {above:g}" if above > -math.inf else ""]
        bounds += [f"<= {maximum:g}" if maximum < math.inf else "", f"< {below:g}" if below < math.inf else ""]
        bounds += ["finite" if finite else ""]
        raise ValueError(
            f"{type(owner).__name__}: {name}={value!r}; it must be a number {', '.join(b for b in bounds if b)}."
        )
    object.__setattr__(owner, name, number)


def check_choice(owner: object, name: str, allowed: Sequence[str]) -> None:
    """Require ``owner.name`` to be one of ``allowed``."""
    value = getattr(owner, name)
    if value not in allowed:
        raise ValueError(
            f"{type(owner).__name__}: {name}={value!r}; it must be one of {', '.join(map(repr, allowed))}."
        )
