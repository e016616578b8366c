"""Averages that correct for their lag: BEMA and OUEMA, as a share of the run or on the clock of the paper."""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, ClassVar, cast

from lagless._validation import check_choice, check_number, require_number
from lagless.rules._clock import Tick, UpdateSchedule
from lagless.rules._gains import FORMS, Form, ProfileGain
from lagless.rules._power import check_power, power_clock, power_gain
from lagless.rules._rule import EmaBuffer, InitialWeights, ReadCoefficients, Rule, UpdateCoefficients
from lagless.rules._width import PAPER_CLOCK, profile_exponent, resolve_clock

_SLOWER = 3.0  # width of the slow anchor in units of the average's own


@dataclass(frozen=True, kw_only=True, repr=False)
class BEMA(Rule):
    """Bias-corrected exponential moving average: the EMA plus a multiple of the distance from an anchor.

        ema ← (1 - β_t) ema + β_t θ_t        μ̂ = ema + α_t (θ_t - anchor)

    **As a share of the run** (the default), the same average at every length:

        β_t = 1 - (t'/t)^p, p = ln 2/f        α = c · (lag of the ema)/(age of the anchor)

    with t' the last update, f the half-life as a fraction of the steps so far, and c the share of the ema's lag that
    the correction removes: the mean age of the average is (1 - c)/(p + 1) of the run, and c = 1 follows a linear drift
    exactly. With ``anchor="start"`` the anchor is θ_0, α = c/(p + 1), and the weight on θ_0 is -α. With
    ``anchor="slow"`` it is an EMA of three times the width, so that the correction follows the recent drift and no
    weight is left on θ_0: α = c (q + 1)/(p + 1) with q = ln 2/(3f).

    **On the clock of the paper**, if any of its arguments is given, see :meth:`paper`:

        β_t = max((ρ + γt)^-κ, floor)        α_t = (ρ + γt)^-η        anchor θ_0

    This clock is absolute: with the paper's settings the weight left on θ_0 is .65 at 400 steps, .53 at 7,200, .39 at
    20,000. Through burn-in (t ≤ τ) all buffers follow the live weights.

    Args:
        half_life_fraction: f in (0, 1); default 0.1.
        correction: c in [0, 1]; 0 is the plain EMA. Default 0.5.
        anchor: "slow", "start", or the width of the slow EMA as a fraction > f. Default "slow".
        update_after: τ ≥ 0, burn-in in optimizer steps.
        update_freq: φ ≥ 1 optimizer steps. Default 1; on the clock of the paper 400, its setting.
        ema_power: κ ≥ 0; 0 is "no EMA" (β = 1). Default 0.5.
        bias_power: η ≥ 0; smaller corrects more strongly. ``math.inf`` is the plain EMA, 0 is α = 1, the strongest.
            Default 0.2.
        multiplier: γ ≥ 0. Default 1.
        lag: ρ ≥ 0, the virtual age at t = 0. Default 10.
        min_ema_multiplier: floor on β_t, in [0, 1]. Default 0.
        form: which published form. ``"algorithm_1"``: the paper's. ``"trl"``: the same, but before t = τ the average
            stays at the initial weights. ``"offline"``: the authors' offline code, s = max(t - τ + ρ, 1), β = (1 +
            γs)^-κ, α = (1 + s)^-η (their runs use ``min_ema_multiplier=1e-4``). ``"online"``: the authors' callback,
            s = max(0, t - ρ), β = γ(1 + s)^-κ, α = γ(1 + s)^-η.
            ``"pace"``: as online, but β = (1 + γs)^-κ, α = (1 + γs)^-η.

    Raises:
        ValueError: if an argument is out of range, arguments of both clocks are given, or β leaves (0, 1] at the first
            update.

    Reference:
        Block and Zhang, *EMA Without the Lag*, arXiv 2508.00180, Algorithm 1; defaults of the paper's clock from
        Table 2. Width and correction as shares of the run, and the slow anchor, are lagless's own.

    >>> from lagless import BEMA, mean_age, trajectory_weights
    >>> steps = range(2001)
    >>> weights = trajectory_weights(BEMA(half_life_fraction=0.1, correction=0.5), steps)
    >>> round(mean_age(weights, steps) / 2000, 3), abs(round(float(weights[0]), 3))
    (0.063, 0.0)
    """

    half_life_fraction: float | None = None
    correction: float | None = None
    anchor: str | float | None = None
    ema_power: float | None = None
    bias_power: float | None = None
    multiplier: float | None = None
    lag: float | None = None
    update_after: int = 0
    update_freq: int | None = None  # pyright: ignore[reportIncompatibleVariableOverride] -- an int once it is made
    min_ema_multiplier: float | None = None
    form: Form | None = None

    recorded_when_given: ClassVar[tuple[str, ...]] = ("half_life_fraction", "correction", "anchor", *PAPER_CLOCK)

    def __post_init__(self) -> None:
        on_paper = resolve_clock(
            self,
            relative={"half_life_fraction": 0.1, "correction": 0.5, "anchor": "slow", "update_freq": 1},
            paper={**PAPER_CLOCK, "update_freq": 400},
        )
        super().__post_init__()
        if not on_paper:
            check_number(self, "half_life_fraction", above=0.0, below=1.0)
            check_number(self, "correction", minimum=0.0, maximum=1.0)
            if isinstance(self.anchor, str):
                check_choice(self, "anchor", ("slow", "start"))
            else:
                require_number("BEMA: anchor", self.anchor, above=cast(float, self.half_life_fraction), finite=True)
            return
        check_number(self, "bias_power", minimum=0.0)
        check_choice(self, "form", FORMS)
        check_power(self, self._form)
        if self.form == "online" and self.update_after > 0:
            raise ValueError(
                f"BEMA: form='online' with update_after={self.update_after}; that form has no burn-in, use 0."
            )
        first = self.update_after + cast(int, self.update_freq)
        alpha = power_clock(self, self._form).alpha(first, self._bias_power)
        if not alpha <= 1.0:
            raise ValueError(
                f"BEMA: bias_power={self.bias_power}, multiplier={self.multiplier}, lag={self.lag} give "
                f"α = {alpha:g} at the first update (step {first}); α must lie in [0, 1]. Raise lag to at least 1."
            )

    @classmethod
    def paper(
        cls,
        ema_power: float = 0.5,
        bias_power: float = 0.2,
        multiplier: float = 1.0,
        lag: float = 10.0,
        *,
        update_after: int = 0,
        update_freq: int = 400,
        min_ema_multiplier: float = 0.0,
        form: Form = "algorithm_1",
    ) -> BEMA:
        """Return the average of the paper, with its settings where none are given; for reproduction.

        Its clock is absolute, so the same settings are another average on a run of another length: see
        :func:`lagless.rules.rescaled`.

        >>> BEMA.paper().ema_power
        0.5
        """
        return cls(
            ema_power=ema_power,
            bias_power=bias_power,
            multiplier=multiplier,
            lag=lag,
            update_after=update_after,
            update_freq=update_freq,
            min_ema_multiplier=min_ema_multiplier,
            form=form,
        )

    @property
    def _form(self) -> Form:
        return cast(Form, self.form)

    @property
    def _bias_power(self) -> float:
        return cast(float, self.bias_power)

    @property
    def _exponents(self) -> tuple[float, float]:
        """p of the ema, and q of the slow anchor; q = 0 for θ_0, whose age is the whole run."""
        width = cast(float, self.half_life_fraction)
        if self.anchor == "start":
            return profile_exponent(width), 0.0
        slow = _SLOWER * width if self.anchor == "slow" else cast(float, self.anchor)
        return profile_exponent(width), profile_exponent(slow)

    @property
    def schedule(self) -> UpdateSchedule:
        """When this rule follows, updates and rests."""
        return UpdateSchedule(self.update_after, cast(int, self.update_freq), hold=self.form == "trl")

    @property
    def buffer_keys(self) -> tuple[Hashable, ...]:
        # What happens before the end of burn-in leaves no trace in the buffers, so neither does hold.
        schedule = UpdateSchedule(self.update_after, cast(int, self.update_freq))
        if self.form is not None:
            return InitialWeights(self.update_after), EmaBuffer(power_gain(self, self._form), schedule)
        p, q = self._exponents
        anchor = EmaBuffer(ProfileGain(q, self.update_after), schedule) if q else InitialWeights(self.update_after)
        return anchor, EmaBuffer(ProfileGain(p, self.update_after), schedule)

    def update(self, tick: Tick) -> UpdateCoefficients:
        if self.form is not None:
            slow, beta = 0.0, power_gain(self, self._form)(tick)
        else:
            p, q = self._exponents
            slow = ProfileGain(q, self.update_after)(tick) if q else 0.0
            beta = ProfileGain(p, self.update_after)(tick)
        return UpdateCoefficients(((1.0 - slow, 0.0), (0.0, 1.0 - beta)), (slow, beta))

    def read(self, tick: Tick) -> ReadCoefficients:
        if self.form is not None:
            alpha = power_clock(self, self._form).alpha(tick.step, self._bias_power)
        else:
            p, q = self._exponents
            alpha = cast(float, self.correction) * (q + 1.0) / (p + 1.0)
        return ReadCoefficients((-alpha, 1.0), alpha)


@dataclass(frozen=True, kw_only=True, repr=False)
class OUEMA(Rule):
    """EMA of iterates from which a memory of θ_0 has been divided out.

    **As a share of the run** (the default), the same average at every length:

        β_t = 1 - (t'/t)^p, p = ln 2/f        μ̂ = (ema - a θ_0)/(1 - a),  a = c/(p + c)

    with c the share of the ema's lag that is removed, as in :class:`BEMA`: the mean age is (1 - c)/(p + 1) of the run.

    **On the clock of the paper**, if any of its arguments is given:

        a_t = (1 + γt)^-η        θ̄_t = (θ_t - a_t θ_0)/(1 - a_t)        ema ← (1 - β_t) ema + β_t θ̄_t

    with β_t as in :class:`BEMA`. ``form="offline"`` is the authors' offline code, s = max(t - τ + ρ, 1), β = (1 +
    γs)^-κ, a = (1 + γs)^-η.

    Args:
        half_life_fraction: f in (0, 1); default 0.1.
        correction: c in [0, 1]; 0 is the plain EMA. Default 0.5.
        update_after: τ ≥ 0, burn-in in optimizer steps.
        update_freq: φ ≥ 1 optimizer steps. Default 1; on the clock of the paper 400.
        ema_power: κ ≥ 0. Default 0.5.
        bias_power: η > 0; smaller corrects more strongly, ``math.inf`` is the plain EMA. Default 0.2.
        multiplier: γ > 0. Default 1.
        lag: ρ ≥ 0, in β only. Default 10.
        min_ema_multiplier: floor on β_t, in [0, 1]. Default 0.
        form: ``"algorithm_1"`` (the default) or ``"offline"``.

    Raises:
        ValueError: if an argument is out of range, arguments of both clocks are given, or β leaves (0, 1].

    Reference:
        Block and Zhang, arXiv 2508.00180, App. C (practical form).
    """

    half_life_fraction: float | None = None
    correction: float | None = None
    ema_power: float | None = None
    bias_power: float | None = None
    multiplier: float | None = None
    lag: float | None = None
    update_after: int = 0
    update_freq: int | None = None  # pyright: ignore[reportIncompatibleVariableOverride] -- an int once it is made
    min_ema_multiplier: float | None = None
    form: Form | None = None

    recorded_when_given: ClassVar[tuple[str, ...]] = ("half_life_fraction", "correction", *PAPER_CLOCK)

    def __post_init__(self) -> None:
        on_paper = resolve_clock(
            self,
            relative={"half_life_fraction": 0.1, "correction": 0.5, "update_freq": 1},
            paper={**PAPER_CLOCK, "form": None, "update_freq": 400},  # records of version 0.1 have no form
        )
        super().__post_init__()
        if not on_paper:
            check_number(self, "half_life_fraction", above=0.0, below=1.0)
            check_number(self, "correction", minimum=0.0, maximum=1.0)
            return
        check_number(self, "bias_power", above=0.0)
        check_number(self, "multiplier", above=0.0, finite=True)
        if self.form is not None:
            check_choice(self, "form", ("algorithm_1", "offline"))
        check_power(self, self._form)

    @classmethod
    def paper(cls, ema_power: float = 0.5, bias_power: float = 0.2, **settings: Any) -> OUEMA:
        """Return the average on the paper's clock, with the paper's settings where none are given."""
        return cls(ema_power=ema_power, bias_power=bias_power, **settings)

    @property
    def _form(self) -> Form:
        return self.form or "algorithm_1"

    def _memory(self, step: int) -> float:
        """a_t, what is left of θ_0 in the iterate."""
        power, multiplier = cast(float, self.bias_power), cast(float, self.multiplier)
        if math.isinf(power):
            return 0.0
        time = max(step - self.update_after + cast(float, self.lag), 1.0) if self.form == "offline" else step
        return (1.0 + multiplier * time) ** -power

    @property
    def buffer_keys(self) -> tuple[Hashable, ...]:
        start = InitialWeights(self.update_after)
        if self.half_life_fraction is not None:
            gain = ProfileGain(profile_exponent(self.half_life_fraction), self.update_after)
            return start, EmaBuffer(gain, self.schedule)
        source = None
        if not math.isinf(cast(float, self.bias_power)):
            clock = (self.form, self.lag, self.update_after) if self.form == "offline" else ()
            source = ("debiased", self.multiplier, self.bias_power, *clock)
        return start, EmaBuffer(power_gain(self, self._form), self.schedule, source)

    def update(self, tick: Tick) -> UpdateCoefficients:
        if self.half_life_fraction is not None:
            beta = ProfileGain(profile_exponent(self.half_life_fraction), self.update_after)(tick)
            return UpdateCoefficients(((1.0, 0.0), (0.0, 1.0 - beta)), (0.0, beta))
        beta, memory = power_gain(self, self._form)(tick), self._memory(tick.step)
        live = beta / (1.0 - memory)
        return UpdateCoefficients(((1.0, 0.0), (-live * memory, 1.0 - beta)), (0.0, live))

    def read(self, tick: Tick) -> ReadCoefficients:
        if self.half_life_fraction is None:
            return ReadCoefficients((0.0, 1.0), 0.0)
        correction, p = cast(float, self.correction), profile_exponent(self.half_life_fraction)
        return ReadCoefficients((-correction / p, 1.0 + correction / p), 0.0)
