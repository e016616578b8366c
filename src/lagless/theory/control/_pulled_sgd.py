"""SGD pulled back to its own exponential average, on any stochastic gradient, and the plain SGD hidden in it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from lagless._validation import require_integer
from lagless.rules import FloatArray
from lagless.theory.control._pull import PullRecursion
from lagless.theory.numerics import check_fraction


class PulledState(NamedTuple):
    """θ_k and ema_k, arrays shaped like the start; overwritten by no later step."""

    iterate: FloatArray
    average: FloatArray


def pulled_sgd(
    gradient: Callable[[FloatArray], FloatArray], start: ArrayLike, learning_rates: ArrayLike, b: float, c: ArrayLike
) -> Iterator[PulledState]:
    """Run SGD with a pull to its average, one state at a time.

        θ_{k+1} = θ_k - η_k g_k + C(ema_k - θ_k)          ema_{k+1} = (1 - β)ema_k + βθ_{k+1}

    Args:
        gradient: from θ_k to the stochastic gradient g_k, same shape.
        start: θ and ema before the first step, any shape; leading dimensions may be independent paths.
        learning_rates: shape (n,), η_k of each step.
        b: β in (0, 1).
        c: the diagonal of C, broadcast against ``start``.

    Returns:
        An iterator over the n + 1 states, the start first.

    Raises:
        ValueError: if an argument is out of range or not finite, or ``c`` does not broadcast to the start's shape.

    Reference:
        Au and Block, arXiv 2606.25086, the stylised update.
    """
    check_fraction("b", b)
    gain, first = np.asarray(c, dtype=np.float64), np.array(start, dtype=np.float64)
    rates = np.asarray(learning_rates, dtype=np.float64)
    for name, values in (("start", first), ("learning_rates", rates), ("c", gain)):
        if not np.isfinite(values).all():
            raise ValueError(f"{name} has entries that are not finite.")
    if rates.ndim != 1 or not (rates >= 0.0).all():
        raise ValueError(f"learning_rates={learning_rates!r}; it must be a sequence of numbers >= 0.")
    try:
        gain = np.broadcast_to(gain, first.shape)
    except ValueError:
        raise ValueError(f"c has shape {gain.shape}; it must broadcast to that of start, {first.shape}.") from None
    return _states(gradient, first, rates, b, gain)


def _states(
    gradient: Callable[[FloatArray], FloatArray], start: FloatArray, rates: FloatArray, b: float, gain: FloatArray
) -> Iterator[PulledState]:
    iterate = average = start
    yield PulledState(iterate, average)
    for eta in rates:
        iterate = iterate - eta * gradient(iterate) + gain * (average - iterate)
        average = (1.0 - b) * average + b * iterate
        yield PulledState(iterate, average)


def hidden_iterate(state: PulledState, b: float, c: ArrayLike) -> FloatArray:
    """The combination of iterate and average that does plain SGD.

        x = ema + (β/B)(1 - C)(θ - ema),   B = β + (1 - β)C,     x_{k+1} = x_k - (ηβ/B) g_k

    Exact for any gradients: its learning rate is η at c = 0 and βη at c = 1.

    Args:
        state: θ_k and ema_k.
        b: β in (0, 1).
        c: the diagonal of C, broadcast against the state.

    Raises:
        ValueError: if ``b`` is not in (0, 1).

    Reference:
        Au and Block, arXiv 2606.25086, proof of Theorem 3.
    """
    check_fraction("b", b)
    gain = np.asarray(c, dtype=np.float64)
    weight = b / (b + (1.0 - b) * gain) * (1.0 - gain)
    return state.average + weight * (state.iterate - state.average)


def simulate_recursion(recursion: PullRecursion, steps: int, paths: int, seed: int) -> PulledState:
    """Independent paths of ``recursion`` with Gaussian noise, started at the minimum, after ``steps`` steps.

    Args:
        recursion: a, b, c, σ.
        steps: ≥ 1. The law is stationary up to a factor 1 - ρ^(2·steps) in its variances.
        paths: ≥ 1.
        seed: of the noise.

    Returns:
        θ and ema, shape (paths,) each.

    Raises:
        ValueError: if ``steps`` or ``paths`` is not a positive integer.
    """
    require_integer("steps", steps, minimum=1)
    require_integer("paths", paths, minimum=1)
    rng = np.random.default_rng(seed)

    def gradient(iterate: FloatArray) -> FloatArray:
        return recursion.a * iterate + recursion.sigma * rng.standard_normal(paths)

    states = pulled_sgd(gradient, np.zeros(paths), np.ones(steps), recursion.b, recursion.c)
    return deque(states, maxlen=1)[0]
