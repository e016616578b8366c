"""Exponential averages: EMA and DEMA."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal

from lagless._validation import check_choice, check_number
from lagless.rules._clock import Tick
from lagless.rules._gains import ConstantGain, Form, Gain, HalfLifeGain, ProfileGain
from lagless.rules._power import POWER_ARGUMENTS, check_power, power_gain
from lagless.rules._rule import EmaBuffer, ReadCoefficients, Rule, UpdateCoefficients, lerp
from lagless.rules._width import PAPER_CLOCK, profile_exponent, resolve_clock


@dataclass(frozen=True, kw_only=True)
class EMA(Rule):
    """Exponential moving average of the iterates.

    At every update, ``ema ← (1 - β) ema + β θ_t``, starting at ``ema = θ_0``. The gain β is set in one of four ways:

    ====================== ===================================================================================
    ``ema_power`` κ        β_t = max((ρ + γt)^-κ, floor), the default; κ = 1, ρ = γ = 1 is the uniform mean
    ``decay``              β = 1 - decay at every update
    ``half_life`` h        β = 1 - 2^(-Δ/h), h in optimizer steps, Δ the steps since the last update
    ``half_life_fraction`` the half-life is that fraction of the steps so far: β = 1 - (t'/t)^(ln 2/f)
    ====================== ===================================================================================

    ``half_life`` and ``half_life_fraction`` mean the same for any ``update_freq``; ``decay`` and ``ema_power`` are
    per update.

    Args:
        ema_power: κ ≥ 0; larger forgets more slowly. 0 is β = 1, no averaging.
        multiplier: γ ≥ 0.
        lag: ρ ≥ 0, the virtual age at t = 0.
        update_after: τ ≥ 0, burn-in in optimizer steps.
        update_freq: φ ≥ 1 optimizer steps.
        min_ema_multiplier: floor on β_t, in [0, 1].
        decay: in [0, 1).
        half_life: in optimizer steps, > 0.
        half_life_fraction: f in (0, 1).
        form: of the power form: ``"pace"`` is β_t = max((1 + γ·max(0, t - ρ))^-κ, floor), PACE's own, in which ρ is a
            delay.

    Raises:
        ValueError: if an argument is out of range, if β leaves (0, 1], or if β is set in two ways.

    Reference:
        Block and Zhang, *EMA Without the Lag*, arXiv 2508.00180, Algorithm 1 with α = 0 and Table 2. A half-life as a
        fraction of the run follows torchtitan's ``half_life_fraction`` to first order in Δ/t.

    >>> from lagless.rules import Tick
    >>> EMA(half_life=100).update(Tick(step=100, previous=0, number=1)).live
    (0.5,)
    """

    ema_power: float = 0.5
    multiplier: float = 1.0
    lag: float = 10.0
    update_after: int = 0
    update_freq: int = 1
    min_ema_multiplier: float = 0.0
    decay: float | None = None
    half_life: float | None = None
    half_life_fraction: float | None = None
    form: Literal["algorithm_1", "pace"] = "algorithm_1"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self, "form", ("algorithm_1", "pace"))
        check_power(self, self.form)
        widths = [name for name in ("decay", "half_life", "half_life_fraction") if getattr(self, name) is not None]
        changed = [f.name for f in fields(self) if f.name in POWER_ARGUMENTS and getattr(self, f.name) != f.default]
        if len(widths) > 1 or (widths and changed):
            raise ValueError(
                f"EMA: {' and '.join(widths + changed)} each set the gain β; give one of decay, half_life, "
                f"half_life_fraction, or the power form ({', '.join(POWER_ARGUMENTS)})."
            )
        if self.decay is not None:
            check_number(self, "decay", minimum=0.0, below=1.0)
        if self.half_life is not None:
            check_number(self, "half_life", above=0.0, finite=True)
        if self.half_life_fraction is not None:
            check_number(self, "half_life_fraction", above=0.0, below=1.0)

    @property
    def gain(self) -> Gain:
        """β as a function of the tick."""
        if self.decay is not None:
            return ConstantGain(self.decay)
        if self.half_life is not None:
            return HalfLifeGain(self.half_life)
        if self.half_life_fraction is not None:
            return ProfileGain(profile_exponent(self.half_life_fraction), self.update_after)
        return power_gain(self, self.form)

    @property
    def buffer_keys(self) -> tuple[Hashable, ...]:
        return (EmaBuffer(self.gain, self.schedule),)

    def update(self, tick: Tick) -> UpdateCoefficients:
        return lerp(self.gain(tick))

    def read(self, tick: Tick) -> ReadCoefficients:
        return ReadCoefficients((1.0,), 0.0)


@dataclass(frozen=True, kw_only=True, repr=False)
class DEMA(Rule):
    """Double exponential moving average: twice the EMA minus the EMA of the EMA.

        e1 ← (1 - β) e1 + β θ_t        e2 ← (1 - β) e2 + β e1        μ̂ = 2 e1 - e2

    By default the half-life of β is a fraction of the steps so far, β_t = 1 - (t'/t)^(ln 2/f): the same average at
    every length of run. If ``ema_power``, ``multiplier``, ``lag`` or ``min_ema_multiplier`` is given, β_t is that of
    :class:`EMA`'s power form.

    Args:
        half_life_fraction: f in (0, 1); default 0.1.
        update_after: τ ≥ 0, burn-in in optimizer steps.
        update_freq: φ ≥ 1 optimizer steps. Default 1; with the power form 400.
        ema_power: κ ≥ 0. Default 0.5.
        multiplier: γ ≥ 0. Default 1.
        lag: ρ ≥ 0. Default 10.
        min_ema_multiplier: floor on β_t, in [0, 1]. Default 0.
        form: ``"algorithm_1"`` (the default) or ``"offline"``, as in :class:`BEMA`.

    Raises:
        ValueError: if an argument is out of range, arguments of both kinds are given, or β leaves (0, 1].

    Reference:
        Mulloy (1994); Block and Zhang, arXiv 2508.00180, App. D.
    """

    half_life_fraction: float | None = None
    ema_power: float | None = None
    multiplier: float | None = None
    lag: float | None = None
    update_after: int = 0
    update_freq: int | None = None  # pyright: ignore[reportIncompatibleVariableOverride] -- an int once it is made
    min_ema_multiplier: float | None = None
    form: Form | None = None

    recorded_when_given: ClassVar[tuple[str, ...]] = ("half_life_fraction", *PAPER_CLOCK)

    def __post_init__(self) -> None:
        paper = {name: value for name, value in PAPER_CLOCK.items() if name != "bias_power"}
        on_paper = resolve_clock(
            self,
            relative={"half_life_fraction": 0.1, "update_freq": 1},
            paper={**paper, "form": None, "update_freq": 400},  # records of version 0.1 have no form
        )
        super().__post_init__()
        if not on_paper:
            check_number(self, "half_life_fraction", above=0.0, below=1.0)
            return
        if self.form is not None:
            check_choice(self, "form", ("algorithm_1", "offline"))
        check_power(self, self.form or "algorithm_1")

    @classmethod
    def paper(cls, ema_power: float = 0.5, **settings: Any) -> DEMA:
        """Return the average on the clock of BEMA's paper, with its settings where none are given."""
        return cls(ema_power=ema_power, **settings)

    @property
    def gain(self) -> Gain:
        """β as a function of the tick."""
        if self.half_life_fraction is not None:
            return ProfileGain(profile_exponent(self.half_life_fraction), self.update_after)
        return power_gain(self, self.form or "algorithm_1")

    @property
    def buffer_keys(self) -> tuple[Hashable, ...]:
        first = EmaBuffer(self.gain, self.schedule)
        return first, first._replace(source=first)

    def update(self, tick: Tick) -> UpdateCoefficients:
        beta = self.gain(tick)
        return UpdateCoefficients(((1.0 - beta, 0.0), (beta * (1.0 - beta), 1.0 - beta)), (beta, beta * beta))

    def read(self, tick: Tick) -> ReadCoefficients:
        return ReadCoefficients((2.0, -1.0), 0.0)
