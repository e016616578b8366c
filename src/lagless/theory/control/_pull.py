"""SGD pulled back to its own average, on a quadratic: stability, stationary variances and contraction in closed form.

One coordinate, a = ηα (learning rate × curvature), gain c, averaging gain b = β, step noise ηξ of standard deviation
σ, minimum at 0:

    θ⁺ = (1 - a - c)θ + c·ema - ηξ          ema⁺ = (1 - b)ema + bθ⁺
"""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt

import numpy as np

from lagless._validation import check_number
from lagless.rules import FloatArray
from lagless.theory.numerics import check_fraction, check_positive


@dataclass(frozen=True)
class PullRecursion:
    """The recursion of one coordinate.

    Args:
        a: ηα > 0.
        b: β in (0, 1), the weight of a new iterate in the average.
        c: the gain with which an iterate is pulled to the average; 0 is SGD with an EMA beside it.
        sigma: σ > 0, the standard deviation of the noise ηξ of one step, learning rate included.

    Raises:
        ValueError: if an argument is out of range or not finite.

    Reference:
        Au and Block, arXiv 2606.25086, equation (22) and the propositions on quadratics. Its Yule-Walker equations
        print γ₁ = φ₁γ₀; the right one is γ₁ = φ₁γ₀ + φ₂γ₁.

    >>> round(PullRecursion(a=0.01, b=0.00999).ema_variance / PullRecursion(a=0.01, b=0.00999, c=1.0).ema_variance, 2)
    50.77
    """

    a: float
    b: float
    c: float = 0.0
    sigma: float = 1.0

    def __post_init__(self) -> None:
        check_number(self, "a", above=0.0, finite=True)
        check_number(self, "b", above=0.0, below=1.0)
        check_number(self, "c", finite=True)
        check_number(self, "sigma", above=0.0, finite=True)

    @property
    def transition(self) -> FloatArray:
        """X, shape (2, 2): (θ, ema)⁺ = X(θ, ema) - ηξ(1, b)."""
        a, b, c = self.a, self.b, self.c
        return np.array([[1.0 - a - c, c], [b * (1.0 - a - c), 1.0 - b + b * c]])

    @property
    def ar_coefficients(self) -> tuple[float, float]:
        """(φ₁, φ₂) of ema_{k+1} = φ₁ema_k + φ₂ema_{k-1} - bηξ_k: (2 - a - b - c(1 - b), -(1 - b)(1 - a - c))."""
        a, b, c = self.a, self.b, self.c
        return 2.0 - a - b - c * (1.0 - b), -(1.0 - b) * (1.0 - a - c)

    @property
    def roots(self) -> tuple[complex, complex]:
        """The roots of z² - φ₁z - φ₂, larger modulus first; 1 - a and 1 - b at c = 0."""
        phi1, phi2 = self.ar_coefficients
        spread = np.sqrt(complex(phi1 * phi1 + 4.0 * phi2))
        large = 0.5 * (phi1 + spread) if phi1 >= 0.0 else 0.5 * (phi1 - spread)
        return complex(large), complex(-phi2 / large) if large else 0j

    @property
    def contraction(self) -> float:
        """ρ, the larger modulus of the roots: distances shrink by this factor per step in the long run."""
        return max(abs(root) for root in self.roots)

    @property
    def is_stable(self) -> bool:
        """Whether a > 0, a + b - ab + c(1 - b) > 0 and c < (2 - a)(2 - b)/(2(1 - b)), equivalently ρ < 1."""
        a, b, c = self.a, self.b, self.c
        return a + b - a * b + c * (1.0 - b) > 0.0 and c < largest_stable_gain(a, b)

    @property
    def ema_variance(self) -> float:
        """γ₀ = σ²b·y/(a(2 - y)(2y - ab)), y = 1 + (1 - b)(1 - a - c): the average's stationary variance.

        Raises:
            ValueError: if the recursion is unstable.
        """
        a, b = self.a, self.b
        y = 1.0 + (1.0 - b) * (1.0 - a - self.c)
        return self._over_shared(b * y, a * (2.0 - y) * (2.0 * y - a * b))

    @property
    def live_variance(self) -> float:
        """Var θ = σ²(2a + 2b - 3ab - b² + ab² - bc(1 - b))/D, the iterate's stationary variance.

        D = a(a + b - ab + c(1 - b))(4 - 2a - 2b + ab - 2c(1 - b))

        Raises:
            ValueError: if the recursion is unstable.
        """
        a, b, c = self.a, self.b, self.c
        return self._over_shared(2 * a + 2 * b - 3 * a * b - b * b + a * b * b - b * c * (1 - b), self._denominator)

    @property
    def covariance(self) -> float:
        """Cov(θ, ema) = σ²b(2 - b - c(1 - b))/D, D as in :attr:`live_variance`.

        Raises:
            ValueError: if the recursion is unstable.
        """
        b = self.b
        return self._over_shared(b * (2.0 - b - self.c * (1.0 - b)), self._denominator)

    @property
    def _denominator(self) -> float:
        a, b, pull = self.a, self.b, self.c * (1.0 - self.b)
        return a * (a + b - a * b + pull) * (4.0 - 2.0 * a - 2.0 * b + a * b - 2.0 * pull)

    def _over_shared(self, numerator: float, denominator: float) -> float:
        if not self.is_stable:
            raise ValueError(
                f"{self} has no stationary law: it needs a + b - ab + c(1 - b) > 0 and "
                f"c < {largest_stable_gain(self.a, self.b):g}."
            )
        return self.sigma**2 * numerator / denominator


def largest_stable_gain(a: float, b: float) -> float:
    """c_max = (2 - a)(2 - b)/(2(1 - b)): from this gain on the recursion diverges.

    As a limit on the learning rate: a < 2 - 2c(1 - b)/(2 - b), so that a full pull (c = 1) lowers SGD's limit from 2
    to 2/(2 - b).

    Raises:
        ValueError: if a is not finite and > 0, or b not in (0, 1).

    >>> largest_stable_gain(1.0, 0.5)
    1.5
    """
    _check(a, b)
    return (2.0 - a) * (2.0 - b) / (2.0 * (1.0 - b))


def optimal_gain(a: float, b: float) -> float:
    """c* = 1 - a + (1 - √(ab))/(1 - b): the gain with the smallest variance of the average; near 2 for small a, b.

    It lies above 1, the largest gain PACE applies, iff (1 - a(1 - b))² > ab.

    Raises:
        ValueError: if a is not finite and > 0, or b not in (0, 1).

    >>> round(optimal_gain(0.9, 0.1), 3)
    0.878
    """
    _check(a, b)
    return 1.0 - a + (1.0 - sqrt(a * b)) / (1.0 - b)


def smallest_ema_variance(a: float, b: float, sigma: float = 1.0) -> float:
    """γ₀* = σ²b/(a(2 - √(ab))²), the average's variance at :func:`optimal_gain`."""
    _check(a, b, sigma)
    return sigma**2 * b / (a * (2.0 - sqrt(a * b)) ** 2)


def ema_variance_slope(a: float, b: float, sigma: float = 1.0) -> float:
    """γ₀'(c = 0), negative: a little pull always lowers the average's variance at fixed b and learning rate.

        -2σ²b(1 - b)[(1 - b)²(1 - a)² + (1 - b)(2 - a) + (1 - a)] / (a(2 - a)²(2 - b)²(a + b - ab)²)

    Reference:
        Au and Block, arXiv 2606.25086, Proposition 2 (a in (0, 1)).
    """
    _check(a, b, sigma)
    if not a < 2.0:
        raise ValueError(f"a={a!r}; it must be less than 2: from there on SGD diverges.")
    bracket = (1.0 - b) ** 2 * (1.0 - a) ** 2 + (1.0 - b) * (2.0 - a) + (1.0 - a)
    return -2.0 * sigma**2 * b * (1.0 - b) * bracket / (a * ((2.0 - a) * (2.0 - b) * (a + b - a * b)) ** 2)


def full_pull_improvement(a: float, b: float) -> float:
    """γ₀(c = 0)/γ₀(c = 1): how much a full pull lowers the average's variance at fixed b and learning rate.

        (2 - a - b + ab)(1 + a - ab)(2 - 2a + ab) / ((2 - a)(2 - b)(a + b - ab)(1 - a + ab))

    About 1/(a + b - ab), so unbounded as a, b → 0, and at least 1/(8a) for b < a < 1/8. What it costs:
    :func:`matched_ema`.

    Raises:
        ValueError: if b is not in (0, 1), or a not in (0, 2/(2 - b)), where the full pull is stable.

    Reference:
        Au and Block, arXiv 2606.25086, the proposition on arbitrarily large improvement.

    >>> round(full_pull_improvement(1e-3, 0.999e-3), 1)
    501.0
    """
    _check(a, b)
    if not a < 2.0 / (2.0 - b):
        raise ValueError(
            f"a={a!r}; it must be less than 2/(2 - b) = {2.0 / (2.0 - b):g}: from there on c = 1 diverges."
        )
    ab = a * b
    return (2 - a - b + ab) * (1 + a - ab) * (2 - 2 * a + ab) / ((2 - a) * (2 - b) * (a + b - ab) * (1 - a + ab))


def _check(a: float, b: float, sigma: float = 1.0) -> None:
    check_positive("a", a)
    check_fraction("b", b)
    check_positive("sigma", sigma)
