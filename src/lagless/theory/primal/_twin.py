"""The plain average that a run with interpolation is in disguise, one curvature at a time."""

from __future__ import annotations

from dataclasses import replace

from lagless.theory.primal._recursion import PrimalRecursion


def plain_twin(recursion: PrimalRecursion) -> PrimalRecursion:
    """Return SGD with a plain average whose average is the same process: the same roots, the same variance.

        a' = 1 - λ₁,    b' = 1 - λ₂,    η' = ηa'/a,    m' = 0

    for λ₁ ≤ λ₂. Both averages obey x_{k+1} = τx_k - δx_{k-1} - bηξ_k with equal τ and δ, and b'η' = bη. So on one
    curvature, interpolation is another learning rate with another gain. Over several curvatures the twins differ.

    Args:
        recursion: without pull and momentum, stable, with real roots in (0, 1); m > 0 can also give complex roots,
            which no plain average has.

    Raises:
        ValueError: if it is anything else.

    >>> twin = plain_twin(PrimalRecursion(a=0.1, b=0.001, m=0.81 / 0.999))
    >>> round(twin.a, 2), round(twin.b, 2), round(twin.sigma, 2)
    (0.01, 0.01, 0.1)
    """
    if recursion.momentum or recursion.p:
        raise ValueError(f"{recursion} has momentum or a pull; a plain twin exists without both.")
    slow, fast = recursion.roots
    # Rounding splits a double root into a pair with an imaginary part of about the square root of the precision.
    if not recursion.is_stable or abs(slow.imag) > 1e-7 or not fast.real > 0.0:
        raise ValueError(f"{recursion} has roots {slow:.6g} and {fast:.6g}; a plain twin needs real ones in (0, 1).")
    a = 1.0 - fast.real
    return replace(recursion, a=a, b=1.0 - slow.real, m=0.0, sigma=recursion.sigma * a / recursion.a)
