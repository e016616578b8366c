"""The mean of the iterates of a run whose learning rate warms up: iterates count by a power of their rate."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

from lagless._validation import check_integer
from lagless.rules._clock import Tick
from lagless.rules._rule import EmaBuffer, ReadCoefficients, Rule, UpdateCoefficients, lerp


@dataclass(frozen=True)
class WarmupGain:
    """β_k = w_k / Σ_{j=1..k} w_j with w_j = min(jφ/W, 1)², for the k-th update after burn-in."""

    warmup_steps: int
    update_freq: int

    def __call__(self, tick: Tick) -> float:
        """Return the gain of the update ``tick``."""
        k, rise = tick.number, self.update_freq / max(self.warmup_steps, self.update_freq)
        n = min(k, int(1.0 / rise))  # updates within warm-up
        total = rise**2 * n * (n + 1) * (2 * n + 1) / 6 + (k - n)
        return min(k * rise, 1.0) ** 2 / total


@dataclass(frozen=True, kw_only=True)
class WarmupAverage(Rule):
    """The mean of all iterates after burn-in, those of a linear warm-up weighted by the square of their learning rate.

        x ← x + β_k (θ_t - x)        β_k = w_k / Σ_{j=1..k} w_j,  w_j = min(t_j/W, 1)²

    θ_0 itself has no weight: β_1 = 1. With ``warmup_steps=0`` this is the plain mean of θ_1, ..., θ_t, the average of
    Schedule-Free without warm-up.

    Args:
        warmup_steps: W ≥ 0, optimizer steps over which the learning rate grows linearly to its full value.
        update_after: τ ≥ 0, burn-in in optimizer steps; warm-up is counted from its end.
        update_freq: φ ≥ 1 optimizer steps.

    Raises:
        ValueError: if an argument is out of range.

    Reference:
        Defazio et al. (2024), *The Road Less Scheduled*, arXiv 2405.15682, Eq. 8 and section 4.2.

    >>> from lagless import trajectory_weights
    >>> trajectory_weights(WarmupAverage(warmup_steps=2), [0, 1, 2, 3]).round(3).tolist()
    [0.0, 0.111, 0.444, 0.444]
    """

    warmup_steps: int = 0
    update_after: int = 0
    update_freq: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integer(self, "warmup_steps", minimum=0)

    @property
    def _gain(self) -> WarmupGain:
        return WarmupGain(self.warmup_steps, self.update_freq)

    @property
    def buffer_keys(self) -> tuple[Hashable, ...]:
        return (EmaBuffer(self._gain, self.schedule),)

    def update(self, tick: Tick) -> UpdateCoefficients:
        return lerp(self._gain(tick))

    def read(self, tick: Tick) -> ReadCoefficients:
        return ReadCoefficients((1.0,), 0.0)
