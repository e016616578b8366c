"""Gains: β as a function of the update.

A gain is the weight a new iterate gets at an update, ``ema ← (1-β) ema + β θ_t``. Conventions elsewhere: *decay* is
1-β; a *half-life* h in steps is β = 1 - 2^(-Δ/h) for an update Δ steps after the last one. Every gain here lies in
(0, 1].
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, Protocol

from lagless.rules._clock import Tick, at_least

Form = Literal["algorithm_1", "trl", "offline", "online", "pace"]
FORMS: tuple[Form, ...] = ("algorithm_1", "trl", "offline", "online", "pace")


class Gain(Protocol):
    """β as a function of the tick; hashable, so that equal schedules can be recognised."""

    def __call__(self, tick: Tick) -> float:
        """The gain β in (0, 1] of the update ``tick``."""
        ...


@dataclass(frozen=True)
class PowerSchedule:
    """The base whose powers are β (exponent κ) and α (exponent η); the published forms differ in it.

    ========== ============================== =======================
    form       β                              α
    ========== ============================== =======================
    algorithm_1, trl  (ρ + γt)^-κ             (ρ + γt)^-η
    offline    (1 + γs)^-κ, s = max(t-τ+ρ, 1) (1 + s)^-η
    online     γ(1 + s)^-κ, s = max(0, t-ρ)   γ(1 + s)^-η
    pace       (1 + γs)^-κ, s = max(0, t-ρ)   (1 + γs)^-η
    ========== ============================== =======================
    """

    multiplier: float
    lag: float
    update_after: int
    form: Form = "algorithm_1"

    def beta(self, step: int, power: float) -> float:
        """β_t before any floor."""
        if self.form == "offline":
            return (1.0 + self.multiplier * max(step - self.update_after + self.lag, 1.0)) ** -power
        if self.form == "online":
            return self.multiplier * (1.0 + max(0.0, step - self.lag)) ** -power
        if self.form == "pace":
            return (1.0 + self.multiplier * at_least(step - self.lag, 0.0)) ** -power
        return (self.lag + self.multiplier * step) ** -power

    def alpha(self, step: int, power: float) -> float:
        """α_t; 0 for an infinite power, also where the base is 1."""
        if math.isinf(power):
            return 0.0
        if self.form == "offline":
            return (1.0 + max(step - self.update_after + self.lag, 1.0)) ** -power
        return self.beta(step, power)


@dataclass(frozen=True)
class PowerGain:
    """β_t = max((ρ + γt)^-κ, floor): the gain of Algorithm 1."""

    clock: PowerSchedule
    power: float
    floor: float

    def __call__(self, tick: Tick) -> float:
        """See the class."""
        return at_least(self.clock.beta(tick.step, self.power), self.floor)


@dataclass(frozen=True)
class ConstantGain:
    """β = 1 - decay at every update, however far apart updates are."""

    decay: float

    def __call__(self, tick: Tick) -> float:
        """See the class."""
        return 1.0 - self.decay


@dataclass(frozen=True)
class HalfLifeGain:
    """β = 1 - 2^(-Δ/h), Δ the steps since the last update: the same average in time for any update_freq."""

    half_life: float

    def __call__(self, tick: Tick) -> float:
        """See the class."""
        return -math.expm1(-math.log(2.0) * (tick.step - tick.previous) / self.half_life)


@dataclass(frozen=True)
class ProfileGain:
    """β = 1 - (t'/t)^p with t', t counted from burn-in: weights proportional to t^(p-1), for any update_freq.

    The product of (t'/t)^p over any chain of updates depends on its ends alone, hence the independence of update_freq.
    """

    exponent: float
    update_after: int

    def __call__(self, tick: Tick) -> float:
        """See the class."""
        return 1.0 - ((tick.previous - self.update_after) / (tick.step - self.update_after)) ** self.exponent


@dataclass(frozen=True)
class UniformGain:
    """β = 1/(k+1): the plain mean of θ_0 and the k iterates since (Polyak-Ruppert)."""

    def __call__(self, tick: Tick) -> float:
        """See the class."""
        return 1.0 / (tick.number + 1)
