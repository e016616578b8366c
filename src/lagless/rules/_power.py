"""The power form of the gain, β_t = (ρ + γt)^-κ, for the rules that take ``ema_power``, ``multiplier`` and ``lag``."""

from __future__ import annotations

import math
from typing import Any, Protocol

from lagless._validation import check_number
from lagless.rules._clock import Tick
from lagless.rules._gains import Form, PowerGain, PowerSchedule

POWER_ARGUMENTS: tuple[str, ...] = ("ema_power", "multiplier", "lag", "min_ema_multiplier", "form")


class PowerRule(Protocol):
    """A rule with the arguments of the power form, all of them numbers by now: κ, γ, ρ, the floor on β, τ and φ."""

    @property
    def ema_power(self) -> Any: ...

    @property
    def multiplier(self) -> Any: ...

    @property
    def lag(self) -> Any: ...

    @property
    def min_ema_multiplier(self) -> Any: ...

    @property
    def update_after(self) -> int: ...

    @property
    def update_freq(self) -> Any: ...


def power_clock(rule: PowerRule, form: Form = "algorithm_1") -> PowerSchedule:
    """The clock whose powers are β and α."""
    form = "algorithm_1" if form == "trl" else form  # they differ before the end of burn-in only
    return PowerSchedule(rule.multiplier, rule.lag, rule.update_after, form)


def power_gain(rule: PowerRule, form: Form = "algorithm_1") -> PowerGain:
    """β as a function of the tick."""
    return PowerGain(power_clock(rule, form), rule.ema_power, rule.min_ema_multiplier)


def check_power(rule: PowerRule, form: Form = "algorithm_1") -> None:
    """Require every power argument in range and β in (0, 1] at the first update, where it is largest."""
    check_number(rule, "ema_power", minimum=0.0, finite=True)
    check_number(rule, "multiplier", minimum=0.0, finite=True)
    check_number(rule, "lag", minimum=0.0, finite=True)
    check_number(rule, "min_ema_multiplier", minimum=0.0, maximum=1.0)
    first = rule.update_after + rule.update_freq
    base = 1.0 if form == "pace" else rule.lag + rule.multiplier * first
    beta = power_gain(rule, form)(Tick(first, rule.update_after, 1)) if base > 0.0 else math.inf
    if not 0.0 < beta <= 1.0:
        remedy = "Raise lag, so that lag + multiplier * step is at least 1."
        if form == "online" or beta <= 0.0:
            remedy = "Choose a multiplier of at most 1." if beta > 1.0 else "Choose a smaller ema_power."
        raise ValueError(
            f"{type(rule).__name__}: ema_power={rule.ema_power}, multiplier={rule.multiplier}, lag={rule.lag} give "
            f"β = {beta:g} at the first update (step {first}); β must lie in (0, 1]. {remedy}"
        )
