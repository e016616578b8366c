"""Controlling a process so that its average ends up at the target: the finite-horizon problem behind PACE.

One eigen-coordinate of the Ornstein-Uhlenbeck model with a control u; several coordinates add their costs:

    dθ = [a(μ* - θ) + u] dt + σ dW,      μ* ~ N(m₀, s₀²),      J(u) = E[ (θ̄_T - μ*)² + λ∫₀ᵀ u² dt ],
    θ̄_T = (1/T)∫₀ᵀ θ dt

Every control here is linear in the state (θ, ∫θ, ∫u, μ*, 1).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import factorial, sqrt
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import ArrayLike

from lagless._validation import check_number
from lagless.rules import FloatArray

ITERATE, INTEGRAL, EFFORT, TARGET, ONE = range(5)


@dataclass(frozen=True)
class ControlProblem:
    """The controlled process of one eigen-coordinate, and what its control costs.

    Args:
        rate: a ≥ 0, the curvature, per unit of time.
        noise: σ > 0.
        horizon: T > 0.
        penalty: λ > 0, the price of ∫u².
        prior_mean: m₀.
        prior_std: s₀ > 0; how far the target may be, before anything is seen.
        start: θ_0.

    Raises:
        ValueError: if an argument is out of range or not finite.

    Reference:
        Au and Block, arXiv 2606.25086, the model of Theorem 2; the √η of the usual process is part of σ here.
    """

    rate: float
    noise: float
    horizon: float
    penalty: float
    prior_mean: float = 0.0
    prior_std: float = 1.0
    start: float = 0.0

    def __post_init__(self) -> None:
        check_number(self, "rate", minimum=0.0, finite=True)
        for name in ("noise", "horizon", "penalty", "prior_std"):
            check_number(self, name, above=0.0, finite=True)
        for name in ("prior_mean", "start"):
            check_number(self, name, finite=True)

    def times(self, time: ArrayLike) -> FloatArray:
        """``time`` as float64, refused outside [0, T]."""
        t = np.asarray(time, dtype=np.float64)
        if not ((t >= 0.0) & (t <= self.horizon)).all():
            raise ValueError(f"time={time!r}; it must lie in [0, {self.horizon:g}], the problem's horizon.")
        return t


class Riccati(NamedTuple):
    """The value matrix [[M, N], [N, S]] of the state (θ - μ*, ∫(θ - μ*)); arrays shaped like the time asked for."""

    M: FloatArray
    N: FloatArray
    S: FloatArray


def riccati(problem: ControlProblem, time: ArrayLike) -> Riccati:
    """The Riccati solution of the finite-horizon problem with μ* known.

        M = h²/D   N = h/D   S = 1/D        D = T² + g/λ,  h = (1 - e^{-aτ})/a,  g = ∫₀^τ h²,  τ = T - t

    solves -M' = -2aM + 2N - M²/λ, -N' = -aN + S - MN/λ, -S' = -N²/λ with (M, N, S) = (0, 0, 1/T²) at T. The optimal
    control is u = -(M/λ)(θ - μ*) - (N/λ)∫(θ - μ*).

    Args:
        problem: the process and its price.
        time: t in [0, T], any shape.

    Raises:
        ValueError: if a time lies outside [0, T].

    Reference:
        Au and Block, arXiv 2606.25086, Theorem 2. Its appendix prints g with 2(1 - e^{-aτ})/(2a³); the right term is
        2(1 - e^{-aτ})/a³.

    >>> riccati(ControlProblem(rate=1.0, noise=1.0, horizon=2.0, penalty=0.5), 2.0).S.item()
    0.25
    """
    tau = problem.horizon - problem.times(time)
    x = problem.rate * tau
    h = tau * _mean_decay(x)
    d = problem.horizon**2 + tau**3 * _mean_square_response(x) / problem.penalty
    return Riccati(h * h / d, h / d, 1.0 / d)


def _mean_decay(x: FloatArray) -> FloatArray:
    """(1 - e^{-x})/x, 1 at 0."""
    return np.divide(-np.expm1(-x), x, out=np.ones_like(x), where=x > 0.0)


def _mean_square_response(x: FloatArray) -> FloatArray:
    """x^{-3} ∫₀^x (1 - e^{-s})² ds, 1/3 at 0. Below x = 1 the closed form cancels; there its power series is used."""
    small = np.minimum(x, 1.0)
    series = np.sum([(2.0 ** (n - 1) - 2.0) * (-small) ** (n - 3) / factorial(n) for n in range(3, 26)], axis=0)
    closed = x + 2.0 * np.expm1(-x) - 0.5 * np.expm1(-2.0 * x)
    return np.divide(closed, x**3, out=np.asarray(series, dtype=np.float64), where=x >= 1.0)


def early_gain(problem: ControlProblem) -> float:
    """The practical controller's gain, the optimal one for t ≪ T and aT ≫ 1: 1/(T(1 + λa²T)).

    Reference:
        Au and Block, arXiv 2606.25086, the practical control strategy after Theorem 2.

    >>> early_gain(ControlProblem(rate=1.0, noise=1.0, horizon=20.0, penalty=0.05))
    0.025
    """
    return 1.0 / (problem.horizon * (1.0 + problem.penalty * problem.rate**2 * problem.horizon))


def relaxed_gain(problem: ControlProblem, time: ArrayLike) -> FloatArray:
    """The gain on μ* - θ that is optimal when the average of squares replaces the square of the average.

        (1/(λT))·(1 - E)/((w + a) + (w - a)E),     w = √(a² + 1/(λT)),  E = e^{-2w(T-t)}

    minimises E[(1/T)∫(θ - μ*)² + λ∫u²] with u = gain·(μ* - θ). By Jensen this objective lies above the original one.

    Args:
        problem: the process and its price.
        time: t in [0, T], any shape.

    Raises:
        ValueError: if a time lies outside [0, T].

    Reference:
        Au and Block, arXiv 2606.25086, the relaxed objective of the appendix on control.
    """
    a, inverse = problem.rate, 1.0 / (problem.penalty * problem.horizon)
    w = sqrt(a * a + inverse)
    decay = np.exp(-2.0 * w * (problem.horizon - problem.times(time)))
    return inverse * (1.0 - decay) / ((w + a) + inverse / (w + a) * decay)


def relaxed_early_gain(problem: ControlProblem) -> float:
    """:func:`relaxed_gain` for t ≪ T: 1/(λT(w + a)), w = √(a² + 1/(λT))."""
    inverse = 1.0 / (problem.penalty * problem.horizon)
    return inverse / (sqrt(problem.rate**2 + inverse) + problem.rate)


def posterior_variance(problem: ControlProblem, time: ArrayLike) -> FloatArray:
    """Var(μ* | θ_s, s ≤ t) = 1/(1/s₀² + a²t/σ²), whatever the control was."""
    return 1.0 / (problem.prior_std**-2 + (problem.rate / problem.noise) ** 2 * problem.times(time))


def posterior_mean(problem: ControlProblem, time: ArrayLike) -> FloatArray:
    """What the path so far says about the target: the coefficients of E[μ* | θ_s, s ≤ t] on the state.

        μ̂_t = (m₀/s₀² + (a/σ²) Z_t) / (1/s₀² + a²t/σ²),     Z_t = θ_t - θ_0 - ∫u + a∫θ

    With a flat prior this is θ̄_t + (θ_t - θ_0 - ∫u)/(at): not the running average θ̄_t.

    Args:
        problem: the process and the prior.
        time: shape (n,), t in [0, T].

    Returns:
        Shape (n, 5), coefficients on (θ, ∫θ, ∫u, μ*, 1).

    Raises:
        ValueError: if a time lies outside [0, T].
    """
    a, precision = problem.rate, problem.noise**-2
    on_state = np.array([a, a * a, -a, 0.0, 0.0]) * precision
    on_state[ONE] = problem.prior_mean / problem.prior_std**2 - a * precision * problem.start
    return posterior_variance(problem, time)[:, None] * on_state


class Control(Protocol):
    """A control linear in the state: at times t, shape (n,), its coefficients on (θ, ∫θ, ∫u, μ*, 1), shape (n, 5)."""

    def __call__(self, problem: ControlProblem, time: ArrayLike) -> FloatArray:
        """See the class."""
        ...


def no_control(problem: ControlProblem, time: ArrayLike) -> FloatArray:
    """u = 0."""
    return np.zeros((problem.times(time).size, 5))


def oracle_control(problem: ControlProblem, time: ArrayLike) -> FloatArray:
    """The optimal control if μ* were known: (M/λ)(μ* - θ) + (N/λ)(tμ* - ∫θ)."""
    return _steer(problem, time, np.eye(5)[TARGET])


def certainty_equivalent_control(problem: ControlProblem, time: ArrayLike) -> FloatArray:
    """The optimal control: the oracle's, with the posterior mean for μ*.

        u* = (h²/(λT² + g))(μ̂_t - θ_t) + (h/(λT² + g))(tμ̂_t - ∫₀ᵗθ)

    Reference:
        Au and Block, arXiv 2606.25086, Theorem 2, multiplied through by a².
    """
    return _steer(problem, time, posterior_mean(problem, time))


def plug_in_control(problem: ControlProblem, time: ArrayLike) -> FloatArray:
    """The optimal control with the running average for μ*, which cancels its second term: (M/λ)(θ̄_t - θ_t)."""
    return _pull_to_average(problem, time, riccati(problem, time).M / problem.penalty)


def practical_control(problem: ControlProblem, time: ArrayLike) -> FloatArray:
    """:func:`plug_in_control` with the gain of t ≪ T: (θ̄_t - θ_t)/(T(1 + λa²T))."""
    return _pull_to_average(problem, time, np.full(problem.times(time).shape, early_gain(problem)))


def _steer(problem: ControlProblem, time: ArrayLike, target: FloatArray) -> FloatArray:
    """(M/λ)(target - θ) + (N/λ)(t·target - ∫θ), ``target`` given by its coefficients on the state."""
    value = riccati(problem, time)
    on_target = (value.M + problem.times(time) * value.N) / problem.penalty
    coefficients = on_target[:, None] * target
    coefficients[:, ITERATE] -= value.M / problem.penalty
    coefficients[:, INTEGRAL] -= value.N / problem.penalty
    return coefficients


def _pull_to_average(problem: ControlProblem, time: ArrayLike, gain: FloatArray) -> FloatArray:
    t = problem.times(time)
    coefficients = np.zeros((t.size, 5))
    coefficients[:, ITERATE] = np.where(t > 0.0, -gain, 0.0)  # at t = 0 the average is the iterate
    coefficients[:, INTEGRAL] = np.divide(gain, t, out=np.zeros_like(t), where=t > 0.0)
    return coefficients
