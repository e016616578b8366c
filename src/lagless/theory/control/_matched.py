"""What pulling to the average costs in contraction, and the plain methods that contract as slowly."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from lagless.theory.control._pull import PullRecursion


def matched_ema(recursion: PullRecursion) -> PullRecursion:
    """An EMA beside unpulled SGD that contracts exactly as fast: c = 0, β' = 1 - ρ, the same learning rate.

    What a pull removes at fixed b it pays for here. For small parameters γ₀ ≈ σ²s/(2a²) with
    s = ab/(a + b + c(1 - b) - ab), whatever b and c are, and s is the contraction 1 - ρ within a factor of two: 1 - ρ
    is 2s for c = 0, a = b and approaches s as the roots move apart, at c = 1 for one. There the EMA has the same
    variance; elsewhere on c in [0, 1] it has less.

    Raises:
        ValueError: if ``recursion`` is unstable, or contracts faster than SGD (ρ < |1 - a|), as no EMA can and, for
            a ≤ 1, no gain c ≥ 0 does.

    >>> pulled = PullRecursion(a=1e-3, b=1e-3, c=1.0)
    >>> round(matched_ema(pulled).ema_variance / pulled.ema_variance, 3)
    0.999
    """
    rho = recursion.contraction
    if not recursion.is_stable or rho < abs(1.0 - recursion.a) - 1e-12:  # equal at c = 0, but for rounding
        raise ValueError(
            f"{recursion} has contraction {rho:g}; an EMA of SGD can match one from |1 - a| = "
            f"{abs(1.0 - recursion.a):g} up to 1 (exclusive)."
        )
    return PullRecursion(recursion.a, 1.0 - rho, 0.0, recursion.sigma)


def slowed_sgd(recursion: PullRecursion) -> PullRecursion:
    """SGD and its EMA, unpulled, at the learning rate of the sequence hidden in ``recursion``.

    Combining θ and the average as in :func:`~lagless.theory.hidden_iterate` gives plain SGD with the learning rate
    ηb/(b + (1 - b)c), which is η at c = 0 and bη at c = 1. Both a and σ scale with it.

    >>> pulled = PullRecursion(a=1e-3, b=1e-3, c=1.0)
    >>> abs(slowed_sgd(pulled).ema_variance / pulled.ema_variance - 1) < 1e-5
    True
    """
    scale = recursion.b / (recursion.b + (1.0 - recursion.b) * recursion.c)
    return PullRecursion(recursion.a * scale, recursion.b, 0.0, recursion.sigma * scale)


@dataclass(frozen=True)
class SpectrumComparison:
    """A pulled run against an EMA with the same slowest contraction, over the coordinates of a quadratic.

    Attributes:
        contraction: the largest ρ over the spectrum, common to both.
        pulled_error: Σγ₀ of the pulled run, the expected squared distance of its average.
        pulled_loss: ½Σaγ₀, the expected loss of its average in units of 1/η.
        ema_error: Σγ₀ of the EMA with β' = 1 - ρ.
        ema_loss: ½Σaγ₀ of the same.
    """

    contraction: float
    pulled_error: float
    pulled_loss: float
    ema_error: float
    ema_loss: float


def compare_over_spectrum(a: ArrayLike, b: float, c: ArrayLike, sigma: float = 1.0) -> SpectrumComparison:
    """Compare pulling with an EMA tuned to the same slowest contraction, when curvatures differ.

    Args:
        a: shape (n,), learning rate × curvature of each coordinate, in (0, 1).
        b: β of the pulled run, in (0, 1).
        c: shape (n,) or a number, the gain of each coordinate.
        sigma: the noise ηξ of one step, the same in each coordinate.

    Returns:
        Errors and losses of both.

    Raises:
        ValueError: if a coordinate is unstable, or no EMA can match the slowest contraction.

    >>> spectrum = np.geomspace(1e-3, 0.5, 40)
    >>> result = compare_over_spectrum(spectrum, b=1e-3, c=1.0)
    >>> round(result.ema_error / result.pulled_error, 2), round(result.ema_loss / result.pulled_loss, 2)
    (0.54, 0.18)
    """
    rates, gains = np.broadcast_arrays(np.asarray(a, dtype=np.float64), np.asarray(c, dtype=np.float64))
    pulled = [PullRecursion(float(rate), b, float(gain), sigma) for rate, gain in zip(rates, gains, strict=True)]
    slowest = max(pulled, key=lambda recursion: recursion.contraction)
    beta = matched_ema(slowest).b
    variances = np.array([recursion.ema_variance for recursion in pulled])
    matched = np.array([PullRecursion(float(rate), beta, 0.0, sigma).ema_variance for rate in rates])
    return SpectrumComparison(
        contraction=slowest.contraction,
        pulled_error=float(variances.sum()),
        pulled_loss=float(0.5 * rates @ variances),
        ema_error=float(matched.sum()),
        ema_loss=float(0.5 * rates @ matched),
    )
