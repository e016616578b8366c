"""Averages whose width is a window or a share of the run: UniformAverage, PowerEMA, WindowAverage."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from functools import cache

import numpy as np

from lagless._validation import check_integer, check_number, require_number
from lagless.rules._clock import Tick
from lagless.rules._gains import Gain, ProfileGain, UniformGain
from lagless.rules._rule import EmaBuffer, ReadCoefficients, Rule, SnapshotBuffer, UpdateCoefficients, lerp


@dataclass(frozen=True, kw_only=True)
class UniformAverage(Rule):
    """The plain mean of θ_0 and of the iterates at every update since (Polyak-Ruppert; SWA with its start included).

        ema ← ema + (θ_t - ema)/(k + 1)        k the number of updates

    Give ``update_after=τ`` to start from θ_τ, and so to leave the beginning of the run out.

    Args:
        update_after: τ ≥ 0, burn-in in optimizer steps.
        update_freq: φ ≥ 1 optimizer steps.

    Raises:
        ValueError: if an argument is out of range.

    Reference:
        Polyak and Juditsky (1992), SIAM J. Control Optim. 30(4); Izmailov et al. (2018), arXiv 1803.05407.
    """

    update_after: int = 0
    update_freq: int = 1

    @property
    def buffer_keys(self) -> tuple[Hashable, ...]:
        return (EmaBuffer(UniformGain(), self.schedule),)

    def update(self, tick: Tick) -> UpdateCoefficients:
        return lerp(UniformGain()(tick))

    def read(self, tick: Tick) -> ReadCoefficients:
        return ReadCoefficients((1.0,), 0.0)


@dataclass(frozen=True, kw_only=True)
class PowerEMA(Rule):
    """Average whose weights grow as a power of time: a window that is a fixed fraction of the run, however long it
    gets.

        ema ← ema + β (θ_t - ema)        β = 1 - (t'/t)^(s+1)        t' the step of the last update

    so that the weight on step i is proportional to i^s, for any ``update_freq``; with φ = 1 this is β_t = 1 - (1 -
    1/t)^(s+1). The exponent s comes from ``relative_width``, the standard deviation of that profile divided by t: σ²
    = (s+1)/((s+2)²(s+3)). Time is counted from the end of burn-in.

    Args:
        relative_width: σ_rel in (0, 12^-½], where 12^-½ ≈ 0.2887 is the uniform mean; 0.05 and 0.1 are common.
        update_after: τ ≥ 0, burn-in in optimizer steps.
        update_freq: φ ≥ 1 optimizer steps.

    Raises:
        ValueError: if an argument is out of range.

    Reference:
        Karras et al. (2024), *Analyzing and Improving the Training Dynamics of Diffusion Models*, arXiv 2312.02696,
        Eq. 121-127.

    >>> round(PowerEMA(relative_width=0.1).exponent, 4)
    6.9372
    """

    relative_width: float = 0.1
    update_after: int = 0
    update_freq: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(self, "relative_width", above=0.0, maximum=12**-0.5)

    @property
    def exponent(self) -> float:
        """s ≥ 0, the power of time in the weights."""
        return _profile_exponent(self.relative_width)

    @property
    def buffer_keys(self) -> tuple[Hashable, ...]:
        return (EmaBuffer(self._gain, self.schedule),)

    @property
    def _gain(self) -> Gain:
        return ProfileGain(self.exponent + 1.0, self.update_after)

    def update(self, tick: Tick) -> UpdateCoefficients:
        return lerp(self._gain(tick))

    def read(self, tick: Tick) -> ReadCoefficients:
        return ReadCoefficients((1.0,), 0.0)


_MOST_SNAPSHOTS = 4096  # more, as a damaged file may ask for, would be worked on for hours before memory ends


@dataclass(frozen=True, kw_only=True)
class WindowAverage(Rule):
    """The plain mean of the last ``window`` snapshots (LAWA); of all of them while there are fewer. θ_0 is not one of
    them.

    Each snapshot is a copy of the parameters: memory is ``window`` copies.

    Args:
        window: N snapshots, 1 to 4,096; means of more are those of :class:`UniformAverage` and :class:`EMA`, which hold
            one copy.
        update_after: τ ≥ 0, burn-in in optimizer steps.
        update_freq: φ ≥ 1 optimizer steps from one snapshot to the next.

    Raises:
        ValueError: if an argument is out of range.

    Reference:
        Kaddour (2022), *Stop Wasting My Time!*, arXiv 2209.14981.
    """

    window: int = 10
    update_after: int = 0
    update_freq: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integer(self, "window", minimum=1)
        require_number("WindowAverage: window", self.window, maximum=_MOST_SNAPSHOTS)

    @property
    def buffer_keys(self) -> tuple[Hashable, ...]:
        return tuple(SnapshotBuffer(slot, self.window, self.schedule) for slot in range(self.window))

    def update(self, tick: Tick) -> UpdateCoefficients:
        newest = (tick.number - 1) % self.window
        keep = tuple(tuple(float(i == j and i != newest) for j in range(self.window)) for i in range(self.window))
        return UpdateCoefficients(keep, tuple(float(i == newest) for i in range(self.window)))

    def read(self, tick: Tick) -> ReadCoefficients:
        filled = min(tick.number, self.window)
        return ReadCoefficients(tuple(1.0 / filled if slot < filled else 0.0 for slot in range(self.window)), 0.0)


@cache
def _profile_exponent(width: float) -> float:
    """The largest real root of (s+2)² (s+3) = (s+1)/σ²."""
    inverse = width**-2
    return max(0.0, *(float(root.real) for root in np.roots([1.0, 7.0, 16.0 - inverse, 12.0 - inverse])))
