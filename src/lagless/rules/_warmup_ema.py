"""Exponential averages whose decay warms up, in the ways that diffusion, vision and detection libraries do it."""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Literal

from lagless._validation import check_choice, check_number
from lagless.rules._clock import Tick
from lagless.rules._rule import EmaBuffer, ReadCoefficients, Rule, UpdateCoefficients, lerp

Warmup = Literal["ratio", "inverse_gamma", "ramp", "none"]


@dataclass(frozen=True)
class WarmupEmaGain:
    """β_k = 1 - decay_k for the k-th update after burn-in; see :class:`WarmupEMA`."""

    warmup: Warmup
    decay: float
    min_decay: float
    inv_gamma: float
    power: float
    tau: float

    def __call__(self, tick: Tick) -> float:
        """Return the gain of the update ``tick``."""
        if self.warmup == "ramp":
            return 1.0 - self.decay * -math.expm1(-tick.number / self.tau)
        n = tick.number - 1
        if n == 0:
            return 1.0
        warm = {
            "ratio": (1.0 + n) / (10.0 + n),
            "inverse_gamma": 1.0 - (1.0 + n / self.inv_gamma) ** -self.power,
            "none": self.decay,
        }[self.warmup]
        return 1.0 - max(min(warm, self.decay), self.min_decay)


@dataclass(frozen=True, kw_only=True)
class WarmupEMA(Rule):
    """Exponential moving average whose decay rises to its final value, as EMAs of diffusion and vision models do.

        ema ← d_k ema + (1 - d_k) θ_t        k = 1, 2, ... updates after burn-in, n = k - 1

    ===================== ============================================== =============================================
    ``warmup``            d_k                                            written by
    ===================== ============================================== =============================================
    ``"ratio"``           min((1 + n)/(10 + n), decay)                   diffusers ``EMAModel``, TensorFlow, torch-ema
    ``"inverse_gamma"``   min(1 - (1 + n/γ)^-p, decay)                   diffusers ``use_ema_warmup``, timm
                                                                         ``use_warmup``, k-diffusion
    ``"ramp"``            decay (1 - e^(-k/τ))                           ultralytics ``ModelEMA``
    ``"none"``            decay                                          timm without warm-up
    ===================== ============================================== =============================================

    but at least ``min_decay``, and d_1 = 0: the first update takes the iterate itself. ``"ramp"`` has neither.

    Args:
        decay: the final decay, in [0, 1).
        warmup: how it is reached.
        min_decay: the least decay from the second update on, in [0, 1).
        inv_gamma: γ > 0, of ``"inverse_gamma"``; p = γ = 1 is the plain mean.
        power: p > 0, likewise: 2/3 for runs of a million steps, 3/4 for shorter ones.
        tau: τ > 0, of ``"ramp"``, in updates.
        update_after: burn-in in optimizer steps.
        update_freq: φ ≥ 1 optimizer steps.

    Raises:
        ValueError: if an argument is out of range.

    Reference:
        Polyak and Juditsky (1992) for the average; the warm-ups are those of the libraries named.

    >>> from lagless import trajectory_weights
    >>> trajectory_weights(WarmupEMA(decay=0.99, warmup="inverse_gamma", power=1.0), range(5)).round(4).tolist()
    [0.0, 0.25, 0.25, 0.25, 0.25]
    """

    decay: float = 0.9999
    warmup: Warmup = "ratio"
    min_decay: float = 0.0
    inv_gamma: float = 1.0
    power: float = 2 / 3
    tau: float = 2000.0
    update_after: int = 0
    update_freq: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self, "warmup", ("ratio", "inverse_gamma", "ramp", "none"))
        for name in ("decay", "min_decay"):
            check_number(self, name, minimum=0.0, below=1.0)
        for name in ("inv_gamma", "power", "tau"):
            check_number(self, name, above=0.0)

    @property
    def _gain(self) -> WarmupEmaGain:
        return WarmupEmaGain(self.warmup, self.decay, self.min_decay, self.inv_gamma, self.power, self.tau)

    @property
    def buffer_keys(self) -> tuple[Hashable, ...]:
        return (EmaBuffer(self._gain, self.schedule),)

    def update(self, tick: Tick) -> UpdateCoefficients:
        return lerp(self._gain(tick))

    def read(self, tick: Tick) -> ReadCoefficients:
        return ReadCoefficients((1.0,), 0.0)
