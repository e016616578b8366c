"""How large a learning rate may be when gradients are taken at the interpolation."""

from __future__ import annotations

import math

from lagless._validation import require_number


def largest_stable_rate(b: float, m: float, momentum: float = 0.0) -> float:
    """Return the least upper bound of ηα below which the recursion of :class:`PrimalRecursion` is stable (p = 0).

    Without momentum (4 - 2b)/((1 - m)(2 - b) + mb): 2 at m = 0, (4 - 2b)/b at m = 1. With momentum μ the
    characteristic polynomial is

        (λ - 1)(λ - μ)(λ - 1 + b) + aλ((1 - m + mb)λ - (1 - m)(1 - b))

    and the bound is the smallest a > 0 at which a root reaches the unit circle. Momentum and interpolation delay the
    gradient one after the other: for small b and 1 - μ the bound is about

        b(1 - μ)(1 - μ + b)/(b - (1 - m)(1 - μ + b))

    where that is positive, that is for m > (1 - μ)/(1 - μ + b), and of the order of 1 otherwise.

    Args:
        b: β in (0, 1].
        m: interpolation in [0, 1].
        momentum: μ in [0, 1), of the base optimizer.

    Raises:
        ValueError: if an argument is out of range.

    >>> [round(largest_stable_rate(0.1, *each), 3) for each in ((0.0, 0.9), (0.9, 0.0), (0.9, 0.9), (0.5, 0.9))]
    [3.8, 13.571, 0.03, 7.22]
    """
    require_number("b", b, above=0.0, maximum=1.0)
    require_number("m", m, minimum=0.0, maximum=1.0)
    require_number("momentum", momentum, minimum=0.0, below=1.0)
    q, mu = 1.0 - b, momentum
    lead, tail = 1.0 - m + m * b, (1.0 - m) * q
    # λ³ + c₂λ² + c₁λ + c₀ with c₂ = k₂ + a·lead, c₁ = k₁ - a·tail, c₀ = -μq.
    k2, k1, c0 = -(1.0 + mu + q), mu + q + mu * q, -mu * q
    # λ = -1: 1 - c₂ + c₁ - c₀ = 0.
    bounds = [(1.0 - k2 + k1 - c0) / (lead + tail)]
    # A complex pair of modulus 1: 1 - c₁ + c₀c₂ - c₀² = 0, with the sum of the pair, c₀ - c₂, in [-2, 2].
    slope = tail + c0 * lead
    if slope < 0.0:
        a = -(1.0 - k1 + c0 * k2 - c0 * c0) / slope
        bounds += [a] if abs(c0 - k2 - a * lead) <= 2.0 else []
    return min((a for a in bounds if a > 0.0), default=math.inf)
