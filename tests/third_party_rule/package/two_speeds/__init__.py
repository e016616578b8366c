"""A rule that lagless does not know: a mix of a fast and a slow average."""

import math
from dataclasses import dataclass

from lagless.rules import EmaBuffer, ProfileGain, ReadCoefficients, Rule, UpdateCoefficients


@dataclass(frozen=True, kw_only=True)
class TwoSpeeds(Rule):
    """Mix two exponential averages, the second of ``slowness`` times the first's half-life.

    Args:
        half_life_fraction: half-life of the fast average as a fraction of the steps so far.
        slowness: how many times longer the slow one's is.
        mix: weight of the fast one.
        update_after: burn-in in optimizer steps.
        update_freq: optimizer steps between updates.
    """

    half_life_fraction: float = 0.1
    slowness: float = 3.0
    mix: float = 0.75
    update_after: int = 0
    update_freq: int = 1

    @property
    def gains(self):
        halves = self.half_life_fraction, self.half_life_fraction * self.slowness
        return tuple(ProfileGain(math.log(2.0) / half, self.update_after) for half in halves)

    @property
    def buffer_keys(self):
        return tuple(EmaBuffer(gain, self.schedule) for gain in self.gains)

    def update(self, tick):
        fast, slow = (gain(tick) for gain in self.gains)
        return UpdateCoefficients(((1.0 - fast, 0.0), (0.0, 1.0 - slow)), (fast, slow))

    def read(self, tick):
        return ReadCoefficients((self.mix, 1.0 - self.mix), 0.0)
