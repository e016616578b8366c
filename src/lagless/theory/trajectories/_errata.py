"""What the paper prints differently from what holds, with both numbers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from lagless.theory.numerics import check_tau, integrate
from lagless.theory.trajectories._bounds import cramer_rao, flat_average_lower_bound, isotropic
from lagless.theory.trajectories._estimators import FlatAverage, LastIterate, MaximumLikelihood, PlugInMaximumLikelihood
from lagless.theory.trajectories._integrals import integral_covariance, integral_cross_covariance
from lagless.theory.trajectories._process import OrnsteinUhlenbeck


@dataclass(frozen=True)
class Slip:
    """One formula, as printed and as it should be.

    Attributes:
        where: its place in arXiv 2508.00180.
        what: what is wrong.
        quantity: what the two numbers are.
        printed: the value of the printed formula.
        right: the value that holds.
    """

    where: str
    what: str
    quantity: str
    printed: float
    right: float


def slips(process: OrnsteinUhlenbeck, horizon: float, tau: float, guess: float) -> list[Slip]:
    """The slips of arXiv 2508.00180, evaluated on a process with Σ = σI.

    Args:
        process: a process with Σ = σI.
        horizon: T > 0; the slip in a condition on T is shown at a T of its own, which its ``quantity`` names.
        tau: τ in (0, T), for Theorem 1.
        guess: α of Ã = αI, for Theorem 5.

    Raises:
        ValueError: if Σ is not σI or an argument is out of range.

    >>> process = OrnsteinUhlenbeck(A=0.7, mu=1.3, theta0=-2.0, eta=0.25, Sigma=1.5)
    >>> first = slips(process, 3.0, 0.5, 1.1)[0]
    >>> first.where, round(first.printed, 4), round(first.right, 4)
    ('Prop. 2, Prop. 5, Lemma 2', 0.9548, 0.5591)
    """
    check_tau(tau, horizon)
    sigma = isotropic(process)
    if sigma is None:
        raise ValueError("slips are shown on processes with Sigma = sigma I; give Sigma as a number.")
    return [
        *_variances(process, horizon, sigma),
        *_means(process, horizon, tau),
        *_definitions(process, horizon, guess),
    ]


def _variances(process: OrnsteinUhlenbeck, horizon: float, sigma: float) -> Iterator[Slip]:
    a, noise = process.rates, process.eta * sigma**2
    last = LastIterate().risk(process, horizon)
    yield Slip(
        "Prop. 2, Prop. 5, Lemma 2",
        "the stationary variance is printed twice as large; as printed it is an upper bound, not an equality",
        "E||θ_T - μ*||²",
        float(last.bias_squared + noise * (-np.expm1(-2.0 * a * horizon) / a).sum()),
        float(last.total),
    )
    early = horizon / 3.0
    kernel = process.basis.T @ process.cov(horizon, early) @ process.basis
    yield Slip(
        "Lemma 1",
        "the general formula has a factor A⁻¹/2 before the integral, which its own isotropic case has not",
        "Tr Cov(θ_T, θ_{T/3})",
        float((np.diag(kernel) / (2.0 * a)).sum()),
        float(np.trace(kernel)),
    )
    cross = noise * (1.0 - np.exp(-a * horizon) + np.exp(-2.0 * a * horizon)) / (2.0 * a**2)
    yield Slip(
        "Lemma 4, proof",
        "the integral is printed as A⁻²(I - e^{-AT} + e^{-2AT})/2; the middle term has a factor 2",
        "Tr Cov(θ_T, ∫θ)",
        float(cross.sum()),
        float(np.trace(integral_cross_covariance(process, horizon))),
    )
    yield Slip(
        "Lemma 3, proof",
        "the square is printed as twice the integral over all of it, not over half of it",
        "Tr Cov(∫θ)",
        float(2.0 * np.trace(integral_covariance(process, horizon))),
        float(np.trace(integral_covariance(process, horizon))),
    )
    early_spread = -np.expm1(-a * early)
    late_spread = -np.expm1(-a * horizon)
    yield Slip(
        "App. E.4",
        "the kernel of the iterates without memory is printed with the factors I - e^{-At}, not with their inverses",
        "Tr Cov(θ̄_T, θ̄_{T/3})",
        float((np.diag(kernel) * early_spread * late_spread).sum()),
        float((np.diag(kernel) / (early_spread * late_spread)).sum()),
    )
    yield Slip(
        "§3",
        "Σ = σ²I is written where every formula means Σ = σI",
        "the bound (3)",
        float(process.eta * sigma**4 * (a**-2.0).sum() / horizon),
        cramer_rao(process, horizon),
    )


def _means(process: OrnsteinUhlenbeck, horizon: float, tau: float) -> Iterator[Slip]:
    a = process.rates
    start = process.basis.T @ process.theta0

    def leftover(time: np.ndarray) -> np.ndarray:
        t = time[:, None]
        return (np.exp(-a * t) - np.exp(-a * horizon)) / -np.expm1(-a * t) * start

    bias = integrate(leftover, tau, horizon) / (horizon - tau)
    yield Slip(
        "Theorem 1",
        "θ̄_t is printed with e^{-AT}θ_0; with e^{-At}θ_0, as in Prop. 9, it is unbiased as claimed",
        "squared bias of the average of θ̄ over [τ, T]",
        float(bias @ bias),
        0.0,
    )
    # The maximiser of the printed likelihood subtracts the displacement that the MLE adds.
    wrong = (-np.expm1(-a * horizon) / (a * horizon)) * 2.0 * process.start
    yield Slip(
        "Prop. 4",
        "the stochastic integral of the likelihood is printed with a minus sign; Theorem 4 needs a plus",
        "squared bias of the maximiser",
        float(wrong @ wrong),
        0.0,
    )
    # The condition is on small T: c = 1/2 here.
    reached = 0.25
    short = float(reached / process.rates[-1])
    yield Slip(
        "Prop. 3, Prop. 8",
        "T ≤ c/(2λ_max) and λ_max T ≤ c/2 are one condition; the proof gives (1 - λ_max T/2)², not (1 - c)²",
        f"lower bound on the risk of the flat average at T = {reached}/λ_max = {short:.4g}",
        float((1.0 - 2.0 * reached) ** 2 * (process.start @ process.start)),
        flat_average_lower_bound(process, short),
    )


def _definitions(process: OrnsteinUhlenbeck, horizon: float, guess: float) -> Iterator[Slip]:
    yield Slip(
        "§3, definition of the EMA",
        "μ̂_t stands on both sides, which makes it θ_t; meant is the recursion from μ̂_{t-1}, started at θ_0",
        "risk of that average with gain 1/t",
        float(LastIterate().risk(process, horizon).total),
        float(FlatAverage().risk(process, horizon).total),
    )
    yield Slip(
        "Theorem 5, definition",
        "the plug-in estimator is printed with A⁻¹, not Ã⁻¹, and so would not depend on Ã",
        "its risk",
        float(MaximumLikelihood().risk(process, horizon).total),
        float(PlugInMaximumLikelihood(guess).risk(process, horizon).total),
    )
