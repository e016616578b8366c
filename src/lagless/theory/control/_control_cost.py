"""What a linear control costs, from the second moments of its state: no simulation."""

from __future__ import annotations

from math import sqrt
from typing import NamedTuple

import numpy as np

from lagless._validation import require_integer
from lagless.rules import FloatArray
from lagless.theory.control._control import EFFORT, INTEGRAL, ITERATE, TARGET, Control, ControlProblem


class ControlCost(NamedTuple):
    """What a control achieves and what it spends.

    Attributes:
        error: E(θ̄_T - μ*)².
        effort: λ E∫u².
    """

    error: float
    effort: float

    @property
    def total(self) -> float:
        """J, the sum of both."""
        return self.error + self.effort


def control_cost(problem: ControlProblem, control: Control, intervals: int = 500) -> ControlCost:
    """The cost of a linear control, from the second moments of the state.

    With z = (θ, ∫θ, ∫u, μ*, 1), u = k(t)·z and dz = F(t)z dt + σe dW,

        P' = FP + PFᵀ + σ²eeᵀ,     J = q·P(T)q + λ∫ k·Pk dt,     θ̄_T - μ* = q·z_T

    is a linear system. It is advanced over ``intervals`` intervals, shorter toward both ends, by the fourth-order
    Magnus expansion Ω and exp Ω ≈ (1 - Ω/2 + Ω²/12)⁻¹(1 + Ω/2 + Ω²/12), which never evaluates a control at t = 0 or T.

    Args:
        problem: the process and its price.
        control: ``no_control``, ``oracle_control``, ``certainty_equivalent_control``, ``plug_in_control``,
            ``practical_control``, or any function like them.
        intervals: ≥ 1; the default's relative error is below 1e-7 for aT up to 100.

    Raises:
        ValueError: if ``intervals`` is not a positive integer.

    >>> from lagless.theory import no_control, practical_control
    >>> problem = ControlProblem(rate=1.0, noise=1.0, horizon=20.0, penalty=0.01)
    >>> round(control_cost(problem, no_control).total, 6), round(control_cost(problem, practical_control).total, 6)
    (0.04875, 0.049021)
    """
    require_integer("intervals", intervals, minimum=1)
    s = np.linspace(0.0, 1.0, intervals + 1)
    edges = problem.horizon * s * s * (3.0 - 2.0 * s)
    width, middle = np.diff(edges), 0.5 * (edges[1:] + edges[:-1])
    first, second = (_moment_rates(problem, control, middle + sign * width / sqrt(12.0)) for sign in (-1.0, 1.0))
    step = width[:, None, None]
    omega = 0.5 * step * (first + second) + sqrt(3.0) / 12.0 * step**2 * (second @ first - first @ second)
    start = np.array([problem.start, 0.0, 0.0, problem.prior_mean, 1.0])
    moments = np.outer(start, start)
    moments[TARGET, TARGET] += problem.prior_std**2
    y = np.append(moments.ravel(), 0.0)
    even = np.eye(26) + omega @ omega / 12.0
    for advance in np.linalg.solve(even - 0.5 * omega, even + 0.5 * omega):
        y = advance @ y
    miss = np.array([0.0, 1.0 / problem.horizon, 0.0, -1.0, 0.0])
    return ControlCost(float(miss @ y[:25].reshape(5, 5) @ miss), float(y[25]))


def _moment_rates(problem: ControlProblem, control: Control, time: FloatArray) -> FloatArray:
    """The matrices L(t), shape (n, 26, 26), of y' = Ly for y = (vec E[zzᵀ], λ∫E[u²])."""
    k = control(problem, time)
    drift = np.zeros((time.size, 5, 5))
    drift[:, ITERATE] = drift[:, EFFORT] = k
    drift[:, ITERATE, ITERATE] -= problem.rate
    drift[:, ITERATE, TARGET] += problem.rate
    drift[:, INTEGRAL, ITERATE] = 1.0
    one = np.eye(5)
    lifted = np.einsum("tij,kl->tikjl", drift, one) + np.einsum("ij,tkl->tikjl", one, drift)
    rates = np.zeros((time.size, 26, 26))
    rates[:, :25, :25] = lifted.reshape(-1, 25, 25)
    rates[:, ITERATE, 24] += problem.noise**2  # E[1·1] = 1 drives Var θ
    rates[:, 25, :25] = problem.penalty * (k[:, :, None] * k[:, None, :]).reshape(-1, 25)
    return rates
