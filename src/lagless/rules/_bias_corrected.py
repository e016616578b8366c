"""Averages that correct for the memory of θ_0: BEMA and OUEMA."""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass

from lagless._validation import check_choice, check_number
from lagless.rules._clock import Tick, UpdateSchedule
from lagless.rules._gains import FORMS, Form
from lagless.rules._power import check_power, power_clock, power_gain
from lagless.rules._rule import EmaBuffer, InitialWeights, ReadCoefficients, Rule, UpdateCoefficients


@dataclass(frozen=True, kw_only=True)
class BEMA(Rule):
    """Bias-corrected exponential moving average: the EMA plus a decaying multiple of the distance travelled.

    At every update, with t the optimizer step,

        β_t = max((ρ + γt)^-κ, floor)        α_t = (ρ + γt)^-η
        ema ← (1 - β_t) ema + β_t θ_t        μ̂   = α_t (θ_t - θ_0) + ema

    Through burn-in (t ≤ τ) θ_0 and ema follow the live weights. Only θ_0 and ema are stored; μ̂ is formed when it is
    read.

    The rule of the paper, for reproduction. Its clock is absolute: with the default settings the weight left on θ_0 is
    .65 at 400 steps, .53 at 7,200, .39 at 20,000. ``EMA(half_life_fraction=0.05)`` means the same at every length.

    Args:
        ema_power: κ ≥ 0; 0 is "no EMA" (β = 1).
        bias_power: η ≥ 0; smaller corrects more strongly. ``math.inf`` is the plain EMA, 0 is α = 1, the strongest.
        multiplier: γ ≥ 0.
        lag: ρ ≥ 0, the virtual age at t = 0.
        update_after: τ ≥ 0, burn-in in optimizer steps.
        update_freq: φ ≥ 1 optimizer steps. The default is the paper's; a run shorter than φ is refused.
        min_ema_multiplier: floor on β_t, in [0, 1].
        form: which published form. ``"algorithm_1"``: the paper's. ``"trl"``: the same, but before t = τ the average
            stays at the initial weights. ``"offline"``: the authors' offline code, s = max(t - τ + ρ, 1), β = (1 +
            γs)^-κ, α = (1 + s)^-η (their runs use ``min_ema_multiplier=1e-4``). ``"online"``: the authors' callback,
            s = max(0, t - ρ), β = γ(1 + s)^-κ, α = γ(1 + s)^-η.
            ``"pace"``: as online, but β = (1 + γs)^-κ, α = (1 + γs)^-η.

    Raises:
        ValueError: if an argument is out of range or β leaves (0, 1] at the first update.

    Reference:
        Block and Zhang, *EMA Without the Lag*, arXiv 2508.00180, Algorithm 1; defaults from Table 2.

    >>> from lagless.rules import Tick
    >>> BEMA(ema_power=0.0, bias_power=0.5, lag=0.0).read(Tick(step=400, previous=0, number=1))
    ReadCoefficients(buffers=(-0.05, 1.0), live=0.05)
    """

    ema_power: float = 0.5
    bias_power: float = 0.2
    multiplier: float = 1.0
    lag: float = 10.0
    update_after: int = 0
    update_freq: int = 400
    min_ema_multiplier: float = 0.0
    form: Form = "algorithm_1"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(self, "bias_power", minimum=0.0)
        check_choice(self, "form", FORMS)
        check_power(self, self.form)
        if self.form == "online" and self.update_after > 0:
            raise ValueError(
                f"BEMA: form='online' with update_after={self.update_after}; that form has no burn-in, use 0."
            )
        first = self.update_after + self.update_freq
        alpha = power_clock(self, self.form).alpha(first, self.bias_power)
        if not alpha <= 1.0:
            raise ValueError(
                f"BEMA: bias_power={self.bias_power}, multiplier={self.multiplier}, lag={self.lag} give "
                f"α = {alpha:g} at the first update (step {first}); α must lie in [0, 1]. Raise lag to at least 1."
            )

    @property
    def schedule(self) -> UpdateSchedule:
        return UpdateSchedule(self.update_after, self.update_freq, hold=self.form == "trl")

    @property
    def buffer_keys(self) -> tuple[Hashable, ...]:
        # What happens before the end of burn-in leaves no trace in the buffers, so neither does hold.
        schedule = UpdateSchedule(self.update_after, self.update_freq)
        return InitialWeights(self.update_after), EmaBuffer(power_gain(self, self.form), schedule)

    def update(self, tick: Tick) -> UpdateCoefficients:
        beta = power_gain(self, self.form)(tick)
        return UpdateCoefficients(((1.0, 0.0), (0.0, 1.0 - beta)), (0.0, beta))

    def read(self, tick: Tick) -> ReadCoefficients:
        alpha = power_clock(self, self.form).alpha(tick.step, self.bias_power)
        return ReadCoefficients((-alpha, 1.0), alpha)


@dataclass(frozen=True, kw_only=True)
class OUEMA(Rule):
    """EMA of iterates from which the Ornstein-Uhlenbeck memory of θ_0 has been divided out.

    At every update,

        a_t = (1 + γt)^-η        θ̄_t = (θ_t - a_t θ_0)/(1 - a_t)        ema ← (1 - β_t) ema + β_t θ̄_t

    with β_t as in :class:`BEMA`.

    Args:
        ema_power: κ ≥ 0.
        bias_power: η > 0; smaller corrects more strongly, ``math.inf`` is the plain EMA.
        multiplier: γ > 0.
        lag: ρ ≥ 0, in β only.
        update_after: τ ≥ 0, burn-in in optimizer steps.
        update_freq: φ ≥ 1 optimizer steps.
        min_ema_multiplier: floor on β_t, in [0, 1].

    Raises:
        ValueError: if an argument is out of range or β leaves (0, 1].

    Reference:
        Block and Zhang, arXiv 2508.00180, App. C (practical form).
    """

    ema_power: float = 0.5
    bias_power: float = 0.2
    multiplier: float = 1.0
    lag: float = 10.0
    update_after: int = 0
    update_freq: int = 400
    min_ema_multiplier: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(self, "bias_power", above=0.0)
        check_number(self, "multiplier", above=0.0, finite=True)
        check_power(self)

    def _memory(self, step: int) -> float:
        """a_t, what is left of θ_0 in the iterate."""
        return 0.0 if math.isinf(self.bias_power) else (1.0 + self.multiplier * step) ** -self.bias_power

    @property
    def buffer_keys(self) -> tuple[Hashable, ...]:
        source = None if math.isinf(self.bias_power) else ("debiased", self.multiplier, self.bias_power)
        return InitialWeights(self.update_after), EmaBuffer(power_gain(self), self.schedule, source)

    def update(self, tick: Tick) -> UpdateCoefficients:
        beta, memory = power_gain(self)(tick), self._memory(tick.step)
        live = beta / (1.0 - memory)
        return UpdateCoefficients(((1.0, 0.0), (-live * memory, 1.0 - beta)), (0.0, live))

    def read(self, tick: Tick) -> ReadCoefficients:
        return ReadCoefficients((0.0, 1.0), 0.0)
