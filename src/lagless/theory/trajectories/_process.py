"""The Ornstein-Uhlenbeck process: SGD with a constant learning rate on a noisy quadratic, in continuous time."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from lagless.rules import FloatArray, Rule
from lagless.theory.numerics import check_positive
from lagless.theory.trajectories._discrete import QuadraticAdamW, QuadraticSGD
from lagless.theory.trajectories._estimators import Estimator
from lagless.theory.trajectories._gauss_markov import GaussMarkov, Steps
from lagless.theory.trajectories._risk import Risk


class OrnsteinUhlenbeck(GaussMarkov):
    """A trajectory pulled linearly towards μ* under white noise.

        dθ = A (μ* - θ) dt + √η Σ dW,        θ_0 fixed

    with mean μ* + e^{-At}(θ_0 - μ*) and covariance Cov(θ_s, θ_t) = ∫_0^{min(s,t)} e^{-A(s-u)} ηΣ² e^{-A(t-u)} du, both
    in closed form in A's eigenbasis; A and Σ need not commute.

    Args:
        A: the Hessian, shape (d, d), symmetric positive definite; a number a stands for aI.
        mu: μ*, the minimum, shape (d,).
        theta0: θ_0, the start, shape (d,).
        eta: η > 0, the learning rate of the SGD that this approximates: one of its steps takes the time η.
        Sigma: Σ, shape (d, d), symmetric positive definite; a number σ stands for σI.

    Raises:
        ValueError: if a shape disagrees, a number is out of range, or A or Σ is not symmetric positive definite.

    Reference:
        Block and Zhang, arXiv 2508.00180, Eq. 2 and 11 and Lemma 1.

    >>> process = OrnsteinUhlenbeck(A=0.7, mu=1.3, theta0=-2.0, eta=0.25, Sigma=1.5)
    >>> process.mean(3.0).round(4).tolist(), process.cov(3.0, 3.0).round(4).tolist()
    ([0.8959], [[0.3958]])
    """

    def __init__(self, A: ArrayLike, mu: ArrayLike, theta0: ArrayLike, eta: float, Sigma: ArrayLike) -> None:
        super().__init__(A, mu, theta0, Sigma)
        self.eta = check_positive("eta", eta)

    def decay(self, duration: float) -> FloatArray:
        """e^{-a_i t}, shape (d,)."""
        return np.exp(-self.rates * duration)

    def innovation(self, duration: float) -> FloatArray:
        """ηΣ²_ij (1 - e^{-(a_i + a_j) t})/(a_i + a_j), shape (d, d), in ``basis``."""
        sums = self.rates[:, None] + self.rates
        return self.eta * self.noise * -np.expm1(-sums * duration) / sums

    def step_time(self, dt: float | None) -> float:
        """``dt``, or η: the time of one step of SGD with learning rate η."""
        return self.eta if dt is None else check_positive("dt", dt)

    def sgd(self) -> QuadraticSGD:
        """The SGD whose continuous-time limit this is: learning rate η, same A, μ*, θ_0 and Σ."""
        return QuadraticSGD(self.A, self.mu, self.theta0, lr=self.eta, Sigma=self.Sigma)

    def adamw(
        self,
        lr: float,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> QuadraticAdamW:
        """AdamW on the same noisy quadratic."""
        return QuadraticAdamW(
            self.A, self.mu, self.theta0, lr=lr, Sigma=self.Sigma, betas=betas, eps=eps, weight_decay=weight_decay
        )

    def risk(
        self,
        target: Rule | Estimator,
        *,
        steps: Steps | None = None,
        dt: float | None = None,
        at: Sequence[int] | None = None,
        horizon: float | None = None,
    ) -> Risk:
        """The exact E||μ̂ - μ*||² of an averaging rule or of an estimator.

        Args:
            target: a rule, which sees the iterates θ_{k dt}, or an estimator, which sees all of (θ_t), t ≤ T.
            steps: for a rule, as in :meth:`risks`.
            dt: for a rule, time per optimizer step; default η.
            at: for a rule, as in :meth:`risks`.
            horizon: for an estimator, T > 0.

        Returns:
            Numbers, or arrays over ``at``.

        Raises:
            ValueError: if ``target`` is neither, a rule comes without ``steps`` or an estimator without ``horizon``, or
                an argument is out of range.

        >>> from lagless import BEMA
        >>> from lagless.theory import MaximumLikelihood
        >>> process = OrnsteinUhlenbeck(A=0.7, mu=1.3, theta0=-2.0, eta=0.25, Sigma=1.5)
        >>> round(process.risk(MaximumLikelihood(), horizon=3.0).total, 4)
        0.3827
        >>> round(process.risk(BEMA.paper(update_freq=1, bias_power=0.4), steps=300, dt=0.01).total, 4)
        0.4549
        """
        if isinstance(target, Rule):
            if steps is None or horizon is not None:
                raise ValueError(
                    f"a rule ({type(target).__name__}) is read over optimizer steps: give steps, not horizon."
                )
            return self.risks({"": target}, steps=steps, dt=dt, at=at)[""]
        if not isinstance(target, Estimator):
            raise ValueError(
                f"target={target!r}; it must be an averaging rule, as EMA(half_life=100), or an estimator, as "
                "FlatAverage(): an instance, not a class or a name."
            )
        if horizon is None or steps is not None or dt is not None or at is not None:
            raise ValueError(
                f"an estimator ({type(target).__name__}) sees continuous time: give horizon, not steps, dt or at."
            )
        return target.risk(self, check_positive("horizon", horizon))
