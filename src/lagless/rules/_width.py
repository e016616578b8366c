"""Two clocks of one rule: widths as shares of the run, which mean the same at every length, and the paper's powers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, TypeVar

from lagless._validation import require_number
from lagless.rules._rule import Rule

AnyRule = TypeVar("AnyRule", bound=Rule)

PAPER_CLOCK: Mapping[str, Any] = {
    "ema_power": 0.5,
    "bias_power": 0.2,
    "multiplier": 1.0,
    "lag": 10.0,
    "min_ema_multiplier": 0.0,
    "form": "algorithm_1",
}
"""The arguments of the paper's clock, with the paper's settings."""


def profile_exponent(half_life_fraction: float) -> float:
    """Return p = ln 2/f: under β_t = 1 - (t'/t)^p the half-life is the fraction f of the steps so far."""
    return math.log(2.0) / half_life_fraction


def resolve_clock(rule: Rule, relative: Mapping[str, Any], paper: Mapping[str, Any]) -> bool:
    """Fill in the arguments of ``rule`` that are None, by the clock to which those that are given belong.

    Args:
        rule: a rule being made.
        relative: arguments of widths as shares of the run, with their defaults; this clock if none is given.
        paper: arguments of the paper's clock, with their defaults.

    Returns:
        Whether it is the paper's clock.

    Raises:
        ValueError: if arguments of both are given.
    """
    mine = [name for name in relative if name not in paper and getattr(rule, name) is not None]
    theirs = [name for name in paper if name not in relative and getattr(rule, name) is not None]
    if mine and theirs:
        raise ValueError(
            f"{type(rule).__name__}: {', '.join(mine)} and {', '.join(theirs)} belong to different clocks. Give widths "
            f"as shares of the run ({', '.join(n for n in relative if n not in paper)}), or the paper's settings "
            f"({', '.join(n for n in paper if n not in relative)})."
        )
    for name, default in (paper if theirs else relative).items():
        if getattr(rule, name) is None and default is not None:
            object.__setattr__(rule, name, default)  # rules are frozen
    return bool(theirs)


def rescaled(rule: AnyRule, factor: float) -> AnyRule:
    """Return the rule on the paper's clock that is on a run s times shorter what ``rule`` is on the whole run.

    (T, φ, γ) and (T/s, φ/s, γs) give the same weights over t/T, exactly for rules without a floor on β.

    Args:
        rule: BEMA, OUEMA, DEMA or EMA in their power forms.
        factor: s > 0. It must divide φ and τ, whose results are whole steps.

    Raises:
        ValueError: if the rule has no such clock, or φ/s or τ/s is no whole number of steps.

    >>> from lagless import BEMA
    >>> twin = rescaled(BEMA.paper(), 20)
    >>> twin.update_freq, twin.multiplier
    (20, 20.0)
    """
    s = require_number("factor", factor, above=0.0, finite=True)
    multiplier = getattr(rule, "multiplier", None)
    widths = ("half_life_fraction", "decay", "half_life")
    if multiplier is None or any(getattr(rule, name, None) is not None for name in widths):
        raise ValueError(f"{rule!r} is not on the paper's clock; widths as shares of the run need no rescaling.")
    steps = {name: getattr(rule, name) / s for name in ("update_freq", "update_after")}
    for name, value in steps.items():
        if value != round(value) or (name == "update_freq" and value < 1):
            raise ValueError(
                f"{name}={getattr(rule, name)} divided by {factor:g} is {value:g}, no whole number of steps. Choose a "
                "factor that divides it."
            )
    whole: dict[str, Any] = {name: round(value) for name, value in steps.items()}
    return replace(rule, multiplier=multiplier * s, **whole)  # type: ignore[type-var]
