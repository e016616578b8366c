"""A mean over independent samples, with its standard error."""

from __future__ import annotations

from math import sqrt
from typing import NamedTuple

from lagless.rules import FloatArray


class Estimate(NamedTuple):
    """A Monte-Carlo estimate.

    Attributes:
        mean: the mean over samples.
        standard_error: of that mean.
    """

    mean: float
    standard_error: float


def estimate(samples: FloatArray) -> Estimate:
    """The mean of independent samples, shape (n,) with n ≥ 2, and its standard error."""
    return Estimate(float(samples.mean()), float(samples.std(ddof=1)) / sqrt(samples.size))
