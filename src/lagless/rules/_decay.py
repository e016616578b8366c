"""Averages that equal a decaying learning rate to first order."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import numpy as np

from lagless._validation import check_integer, require_choice
from lagless.rules._clock import Tick
from lagless.rules._rule import EmaBuffer, ReadCoefficients, Rule, UpdateCoefficients, lerp

SHAPES: dict[str, Callable[[float], float]] = {
    "linear": lambda u: 1.0 - u,
    "minus-sqrt": lambda u: 1.0 - math.sqrt(u),
    "cosine": lambda u: 0.5 * (1.0 + math.cos(math.pi * u)),
    "exponential": lambda u: (math.exp(-5.0 * u) - math.exp(-5.0)) / (1.0 - math.exp(-5.0)),
}
"""The multiplier of the learning rate at u, the share of the decay that has passed."""

_POINTS = 257  # samples kept of a schedule that is given as a function


@dataclass(frozen=True)
class DecayGain:
    """β_t = (s(u') - s(u))/(1 - s(u)) with u = (t - begin)/length, u' that of the last update: w_t over Σ_{i≤t} w_i.

    From the end of the decay on s is 0, and beyond it β is 0: the average rests.
    """

    shape: str | tuple[float, ...]
    begin: int
    length: int

    def __call__(self, tick: Tick) -> float:
        """Return the gain of the update ``tick``."""
        before, now = self._multiplier(tick.previous), self._multiplier(tick.step)
        return (before - now) / (1.0 - now) if now < 1.0 else 1.0

    def _multiplier(self, step: int) -> float:
        u = (step - self.begin) / self.length
        if u <= 0.0 or u >= 1.0:
            return float(u <= 0.0)
        if isinstance(self.shape, str):
            return SHAPES[self.shape](u)
        return float(np.interp(u, np.linspace(0.0, 1.0, len(self.shape)), self.shape))


@dataclass(frozen=True, kw_only=True)
class DecayAverage(Rule):
    """The average of the last iterates that equals, to first order, a run whose learning rate decays to zero.

        μ̂ = Σ_i w_i θ_i        w_i = s_i - s_{i+1}

    with s_i the multiplier of the learning rate on the way to iterate i: 1 until the decay begins, 0 after the last
    step. ``shape="linear"`` is the plain mean of the iterates in the decay. One buffer:

        x ← x + β_t (θ_t - x)        β_t = w_t / Σ_{i≤t} w_i

    Before the decay begins there is no average to read. After the last step it rests.

    Args:
        shape: "linear" (s = 1 - u), "minus-sqrt" (1 - √u), "cosine" or "exponential" (e^-5u, brought to 0 at u = 1),
            with u the share of the decay that has passed. Or the multipliers themselves, at equally spaced times from
            the begin to the end of the decay, falling from 1; what is left at the end goes to the last iterate. Or a
            function of u, of which 257 values are kept.
        duration: of the decay, as a fraction of the run (a float in (0, 1]) or in optimizer steps (an int).
        total_steps: T, the length of the run in optimizer steps.
        update_freq: φ ≥ 1 optimizer steps.

    Raises:
        ValueError: if an argument is out of range, the decay is longer than the run, or multipliers rise.

    Reference:
        Tian et al., *WSM*, arXiv 2507.17634: merging in place of a decay; the equivalence is that of
        :func:`lagless.equivalent_schedule`.

    >>> from lagless import trajectory_weights
    >>> rule = DecayAverage(duration=0.5, total_steps=8, update_freq=2)
    >>> trajectory_weights(rule, range(0, 9, 2)).tolist()
    [0.0, 0.0, 0.0, 0.5, 0.5]
    """

    shape: str | tuple[float, ...] | Sequence[float] | Callable[[float], float] = "linear"
    duration: float | int = 0.2
    total_steps: int
    update_freq: int = 1

    def __post_init__(self) -> None:
        check_integer(self, "total_steps", minimum=1)
        object.__setattr__(self, "shape", _checked_shape(self.shape))  # rules are frozen
        object.__setattr__(self, "update_after", self.total_steps - _length(self.duration, self.total_steps))
        super().__post_init__()

    @property
    def _gain(self) -> DecayGain:
        shape: Any = self.shape
        return DecayGain(shape, self.update_after, self.total_steps - self.update_after)

    @property
    def buffer_keys(self) -> tuple[Hashable, ...]:
        return (EmaBuffer(self._gain, self.schedule),)

    def update(self, tick: Tick) -> UpdateCoefficients:
        return lerp(self._gain(tick))

    def read(self, tick: Tick) -> ReadCoefficients:
        return ReadCoefficients((1.0,), 0.0)


def _length(duration: object, total_steps: int) -> int:
    if not isinstance(duration, bool) and isinstance(duration, Integral) and 1 <= int(duration) <= total_steps:
        return int(duration)
    if isinstance(duration, Real) and not isinstance(duration, Integral) and 0.0 < float(duration) <= 1.0:
        return max(1, round(float(duration) * total_steps))
    raise ValueError(
        f"DecayAverage: duration={duration!r}; it must be a fraction of the run in (0, 1], as a float, or a number of "
        f"optimizer steps from 1 to total_steps={total_steps}, as an int."
    )


def _checked_shape(shape: Any) -> str | tuple[float, ...]:
    if isinstance(shape, str):
        require_choice("DecayAverage: shape", shape, tuple(SHAPES))
        return shape
    values = [shape(u) for u in np.linspace(0.0, 1.0, _POINTS).tolist()] if callable(shape) else list(shape)
    multipliers = np.array(values, dtype=np.float64)
    falls = multipliers.ndim == 1 and multipliers.size >= 2 and bool(np.isfinite(multipliers).all())
    if not falls or multipliers[0] != 1.0 or multipliers[-1] < 0.0 or (np.diff(multipliers) > 0.0).any():
        raise ValueError(
            f"DecayAverage: shape={shape!r:.80}; it must be one of {', '.join(SHAPES)}, or at least two multipliers of "
            "the learning rate that begin at 1, never rise and stay >= 0. For weights of any sign combine checkpoints "
            "directly: lagless.posthoc.combine_checkpoints."
        )
    return tuple(float(m) for m in multipliers)
