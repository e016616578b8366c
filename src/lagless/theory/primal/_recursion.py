"""SGD with its gradients taken between the iterate and its average, one coordinate of a quadratic, constant gains."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lagless._validation import check_number
from lagless.rules import FloatArray


@dataclass(frozen=True)
class PrimalRecursion:
    """The recursion of one coordinate, with its minimum at 0.

        y = (1 - m)z + m·x         v⁺ = μv + ay + ηξ       z⁺ = z - v⁺
        x⁺ = (1 - b)x + bz⁺        z⁺ ← z⁺ + p(x⁺ - z⁺)

    Without momentum (μ = 0) and pull (p = 0), the average alone obeys

        x_{k+1} = τx_k - δx_{k-1} - bηξ_k,    τ = 2 - b - a(1 - m(1 - b)),    δ = (1 - b)(1 - a(1 - m))

    with the roots λ of λ² - τλ + δ; (1 - λ₁)(1 - λ₂) = ab whatever m is. m = 0 is SGD with an EMA beside it; m = 1 is
    SGD with momentum 1 - b and learning rate bη, whose iterate is x.

    Args:
        a: ηα > 0, learning rate × curvature.
        b: β in (0, 1], the weight of a new iterate in the average.
        m: interpolation in [0, 1].
        p: pull in [0, 1].
        momentum: μ in [0, 1), of the base optimizer, as ``torch.optim.SGD`` has it.
        sigma: σ > 0, the standard deviation of the noise ηξ of one step, learning rate included.

    Raises:
        ValueError: if an argument is out of range or not finite.

    Reference:
        Defazio et al. (2024), arXiv 2405.15682, Eq. 3-5; (2025), arXiv 2512.17131, for the method.

    >>> plain, primal = PrimalRecursion(a=0.1, b=0.01), PrimalRecursion(a=0.1, b=0.001, m=0.81 / 0.999)
    >>> [round(1 - each.contraction, 3) for each in (plain, primal)]
    [0.01, 0.01]
    >>> round(primal.average_variance / plain.average_variance, 2)
    0.55
    """

    a: float
    b: float
    m: float = 0.0
    p: float = 0.0
    momentum: float = 0.0
    sigma: float = 1.0

    def __post_init__(self) -> None:
        check_number(self, "a", above=0.0, finite=True)
        check_number(self, "b", above=0.0, maximum=1.0)
        check_number(self, "m", minimum=0.0, maximum=1.0)
        check_number(self, "p", minimum=0.0, maximum=1.0)
        check_number(self, "momentum", minimum=0.0, below=1.0)
        check_number(self, "sigma", above=0.0, finite=True)

    @property
    def transition(self) -> FloatArray:
        """X of (z, x, v)⁺ = X(z, x, v) + Nηξ, shape (3, 3); (z, x) alone, shape (2, 2), without momentum."""
        return self._matrices[0]

    @property
    def noise(self) -> FloatArray:
        """N of the same, shape (3,) or (2,)."""
        return self._matrices[1]

    @property
    def _matrices(self) -> tuple[FloatArray, FloatArray]:
        a, b, m, p = self.a, self.b, self.m, self.p
        velocity = np.array([a * (1.0 - m), a * m, self.momentum, 1.0])  # of z, x, v and ηξ
        stepped = np.array([1.0, 0.0, 0.0, 0.0]) - velocity
        average = (1.0 - b) * np.array([0.0, 1.0, 0.0, 0.0]) + b * stepped
        rows = np.array([(1.0 - p) * stepped + p * average, average, velocity])
        size = 3 if self.momentum else 2
        return rows[:size, :size], rows[:size, 3]

    @property
    def roots(self) -> tuple[complex, ...]:
        """The eigenvalues of :attr:`transition`, largest modulus first."""
        if self.momentum:
            found = np.linalg.eigvals(self.transition)
        else:  # the digits of 1 - λ where it is small
            (za, zx), (xa, xx) = np.eye(2) - self.transition
            half, product = 0.5 * (za + xx), za * xx - zx * xa
            spread = np.sqrt(complex(half * half - product))
            large = half + spread if half >= 0.0 else half - spread
            found = np.array([1.0 - large, 1.0 - (product / large if large else 0.0)])
        return tuple(complex(root) for root in sorted(found, key=abs, reverse=True))

    @property
    def contraction(self) -> float:
        """ρ, the largest modulus of the roots: distances shrink by this factor per step in the long run."""
        return abs(self.roots[0])

    @property
    def is_stable(self) -> bool:
        """Whether ρ < 1."""
        return self.contraction < 1.0

    @property
    def covariance(self) -> FloatArray:
        """The stationary covariance of (z, x, v) or (z, x): C = XCXᵀ + σ²NNᵀ.

        Raises:
            ValueError: if the recursion is unstable.
        """
        self._require_stable()
        size = len(self.noise)
        system = np.eye(size * size) - np.kron(self.transition, self.transition)
        outer = self.sigma**2 * np.outer(self.noise, self.noise)
        return np.asarray(np.linalg.solve(system, outer.ravel()), dtype=np.float64).reshape(size, size)

    @property
    def average_variance(self) -> float:
        """Var x, the stationary variance of the average; without momentum and pull in closed form:

            σ²b²(1 + δ)/((1 - δ)((1 + δ)² - τ²)) = (σ/a)² u₁u₂(1 + u₁u₂)/(u₁ + u₂),   u = (1 - λ)/(1 + λ)

        It depends on the roots alone. For small steps it is σ²s/(2a²) with 1/s = 1/a + (1 - m)/b.

        Raises:
            ValueError: if the recursion is unstable.
        """
        if self.momentum or self.p:
            return float(self.covariance[1, 1])
        self._require_stable()
        a, b, m = self.a, self.b, self.m
        delta = (1.0 - b) * (1.0 - a * (1.0 - m))
        slack = b + a * (1.0 - m) * (1.0 - b)  # 1 - δ, and 1 + δ + τ below, without cancellation
        far = 4.0 - 2.0 * b - a * ((1.0 - m) * (2.0 - b) + b * m)
        return self.sigma**2 * b * (1.0 + delta) / (a * slack * far)

    def _require_stable(self) -> None:
        if not self.is_stable:
            raise ValueError(f"{self} has no stationary law: its largest root is {self.contraction:g}, not below 1.")
