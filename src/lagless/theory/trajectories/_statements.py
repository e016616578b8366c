"""The paper's propositions and theorems, each checked on a given instance."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import ArrayLike

from lagless.rules import FloatArray
from lagless.theory.numerics import check_tau, commute, inverse, op_norm, positive_definite
from lagless.theory.trajectories._bounds import (
    commuting_plug_in_upper_bound,
    cramer_rao,
    fisher_information,
    flat_average_lower_bound,
    flat_average_upper_bound,
    isotropic,
    last_iterate_upper_bound,
    ou_flat_average_upper_bound,
    plug_in_upper_bound,
)
from lagless.theory.trajectories._estimators import (
    FlatAverage,
    LastIterate,
    MaximumLikelihood,
    OUFlatAverage,
    PlugInMaximumLikelihood,
    debiased,
)
from lagless.theory.trajectories._integrals import integral_covariance, integral_cross_covariance, reach
from lagless.theory.trajectories._likelihood import log_likelihood
from lagless.theory.trajectories._process import OrnsteinUhlenbeck

_BETTER = "Choose an instance that is better conditioned."
_TINY = 1e-290  # below it numbers have fewer digits
_WORST, _WORST_NOISE = 1e6, 1e3  # condition numbers at which rounding is still below what the checks allow
Relation = Literal["=", "<="]


@dataclass(frozen=True)
class Check:
    """One statement on one instance: ``left`` relation ``right``.

    Attributes:
        number: its number in the paper.
        claim: what stands on the two sides.
        relation: "=" to a relative 1e-10, "<=" to rounding.
        left: its left side.
        right: its right side.
        scale: what rounding is relative to; at least the larger side.
    """

    number: str
    claim: str
    relation: Relation
    left: float
    right: float
    scale: float

    @property
    def holds(self) -> bool:
        """Whether it is so."""
        if self.relation == "=":
            return abs(self.left - self.right) <= 1e-10 * self.scale
        return self.left <= self.right + 1e-12 * self.scale

    @property
    def slack(self) -> float:
        """(right - left)/scale: ≥ 0 in an inequality that holds, about 0 in an equality."""
        return (self.right - self.left) / self.scale


def check_statements(
    process: OrnsteinUhlenbeck, horizon: float, *, tau: float | None = None, guess: ArrayLike = 1.0
) -> list[Check]:
    """Every statement of arXiv 2508.00180, §3 and App. E, on one instance; those for Σ = σI only where it is so.

    Those about the likelihood are left out where rounding would decide them.

    Statements are taken as corrected; see :func:`slips` for what is printed. Matrix inequalities are checked as "the
    smallest eigenvalue of the difference is not negative", of the symmetric part in Lemma 4. Lemma 1 compares traces:
    for s < t and matrices A and Σ that do not commute, the matrix inequality printed there does not hold.

    Args:
        process: the process.
        horizon: T > 0.
        tau: τ in (0, T) of the average without the memory of θ_0; default T/4.
        guess: Ã of Theorem 5.

    Raises:
        ValueError: if an argument is out of range, or the instance too ill-conditioned for float64 to tell.

    >>> process = OrnsteinUhlenbeck(A=0.7, mu=1.3, theta0=-2.0, eta=0.25, Sigma=1.5)
    >>> checks = check_statements(process, 3.0, tau=0.5, guess=1.1)
    >>> len(checks), all(check.holds for check in checks)
    (32, True)
    """
    start = horizon / 4.0 if tau is None else tau
    check_tau(start, horizon)
    _refuse_ill_conditioned(process, horizon)
    try:
        return [
            *_moments(process, horizon),
            *_lower_bounds(process, horizon, guess),
            *_risks(process, horizon, start, guess),
            *_likelihood(process, horizon, start),
        ]
    except np.linalg.LinAlgError as error:
        raise ValueError(
            f"check_statements: a matrix that has an inverse loses it to rounding ({error}). {_BETTER}"
        ) from error


def _refuse_ill_conditioned(process: OrnsteinUhlenbeck, horizon: float) -> None:
    """Refuse instances on which float64 cannot tell whether a statement holds."""
    found = {
        "cond(A)": float(process.rates.max() / process.rates.min()),
        "cond(Σ)": float(np.linalg.cond(process.Sigma)),
        "1/(T λ_min(A))": 1.0 / (horizon * float(process.rates.min())),
        "T λ_max(A)": horizon * float(process.rates.max()),
    }
    limits = {"cond(A)": _WORST, "cond(Σ)": _WORST_NOISE, "1/(T λ_min(A))": _WORST, "T λ_max(A)": _WORST}
    if beyond := [name for name, value in found.items() if not value <= limits[name]]:
        raise ValueError(
            f"check_statements: {', '.join(f'{name} is {found[name]:.3g}' for name in beyond)}; it can tell whether "
            f"statements hold up to {', '.join(f'{limits[name]:g} for {name}' for name in beyond)}. {_BETTER}"
        )


def _equal(number: str, claim: str, left: ArrayLike, right: ArrayLike, scale: float = 0.0) -> Check:
    """Equality of numbers or, entry by entry, of arrays."""
    one, other = np.asarray(left, dtype=np.float64), np.asarray(right, dtype=np.float64)
    size = max(_TINY, scale, float(np.abs(one).max()), float(np.abs(other).max()))
    if one.ndim:
        return Check(number, claim + " (largest difference)", "=", float(np.abs(one - other).max()), 0.0, size)
    return Check(number, claim, "=", float(one), float(other), size)


def _at_most(number: str, claim: str, left: ArrayLike, right: ArrayLike, scale: float = 0.0) -> Check:
    """Inequality of numbers or, in the Loewner order, of symmetric matrices."""
    one, other = np.asarray(left, dtype=np.float64), np.asarray(right, dtype=np.float64)
    size = max(_TINY, scale, float(np.abs(one).max()), float(np.abs(other).max()))
    if one.ndim:
        smallest = float(np.linalg.eigvalsh(other - one)[0])
        return Check(number, claim + " (0 against the smallest eigenvalue)", "<=", 0.0, smallest, size)
    return Check(number, claim, "<=", float(one), float(other), size)


def _moments(process: OrnsteinUhlenbeck, horizon: float) -> Iterator[Check]:
    """Lemmas 1 to 4."""
    a, eta = process.rates, process.eta
    top, low = eta * op_norm(process.Sigma) ** 2, eta / op_norm(inverse(process.Sigma)) ** 2
    early, late = horizon / 3.0, horizon
    scalar = -np.exp(-a * (late - early)) * np.expm1(-2.0 * a * early) / (2.0 * a)
    kernel = process.cov(late, early)
    isotropy = isotropic(process) is not None
    yield _at_most(
        "Lemma 1", "Tr Cov(θ_t, θ_s) <= η‖Σ‖² Tr A⁻¹(e^{-A(t-s)} - e^{-A(t+s)})/2", np.trace(kernel), top * scalar.sum()
    )
    if isotropy:
        yield _equal("Lemma 1", "Cov(θ_t, θ_s), Σ = σI", kernel, _function(process, top * scalar))

    travelled = _function(process, -np.expm1(-a * late)) @ (process.mu - process.theta0)
    claim, rounding = "E(θ_T - θ_0) = (I - e^{-AT})(μ* - θ_0)", _largest(process.theta0, process.mu)
    yield _equal("Lemma 2", claim, process.mean(late) - process.theta0, travelled, rounding)
    stationary = _function(process, -top * np.expm1(-2.0 * a * late) / (2.0 * a))
    yield _at_most("Lemma 2", "Cov(θ_T) <= η‖Σ‖² A⁻¹(I - e^{-2AT})/2", process.cov(late, late), stationary)
    if isotropy:
        yield _equal("Lemma 2", "Cov(θ_T), Σ = σI", process.cov(late, late), stationary)

    mean = process.mu - _function(process, reach(a, late)) @ (process.mu - process.theta0) / late
    yield _equal("Lemma 3", "E (1/T)∫θ", FlatAverage().bias(process, late) + process.mu, mean)
    integral = process.basis @ integral_covariance(process, late) @ process.basis.T
    exact = (late - (2.0 * reach(a, late) - reach(2.0 * a, late))) / a**2
    # At small T the difference of large terms: rounding is relative to those.
    terms = float(top * (late / a**2).sum())
    below = _function(process, low * exact)
    yield _at_most("Lemma 3", "η λ_min(Σ)² A⁻²(T - A⁻¹[...]) <= Cov(∫θ)", below, integral, terms)
    yield _at_most("Lemma 3", "Cov(∫θ) <= T η‖Σ‖² A⁻²", integral, _function(process, top * late / a**2))

    cross = process.basis @ integral_cross_covariance(process, late) @ process.basis.T
    both = (cross + cross.T) / 2.0
    ends = _function(process, reach(a, late))
    claim = "symmetric part of Cov(θ_T, ∫θ) = A⁻¹(I - e^{-AT}) ηΣ² (I - e^{-AT})A⁻¹/2"
    yield _equal("Lemma 4", claim, both, eta * ends @ process.Sigma @ process.Sigma @ ends / 2.0)
    square = reach(a, late) ** 2 / 2.0
    yield _at_most("Lemma 4", "η λ_min(Σ)² A⁻²(I - e^{-AT})²/2 <= it", _function(process, low * square), both)
    yield _at_most("Lemma 4", "it <= η‖Σ‖² A⁻²/2", both, _function(process, top / (2.0 * a**2)))
    if isotropy:
        yield _equal("Lemma 3", "Cov(∫θ), Σ = σI", integral, _function(process, top * exact), terms)
        yield _equal("Lemma 4", "Cov(θ_T, ∫θ), Σ = σI", cross, _function(process, top * square))


def _lower_bounds(process: OrnsteinUhlenbeck, horizon: float, guess: ArrayLike) -> Iterator[Check]:
    """Propositions 1, 6 and 7."""
    bound = cramer_rao(process, horizon)
    sigma = isotropic(process)
    if sigma is not None:
        trace = (process.rates**-2.0).sum()
        yield _equal("Prop. 1", "the bound, Σ = σI", bound, process.eta * sigma**2 * trace / horizon)
    information = fisher_information(process, horizon)
    claim = "the bound is Tr of the inverse Fisher information"
    yield _equal("Prop. 6", claim, bound, np.trace(inverse(information)), bound * _inflation(information))
    decays = process.decay(horizon)
    plug_in = PlugInMaximumLikelihood(guess)
    gap = plug_in.inverse_guess(process) - inverse(process.A)
    moved = gap @ _function(process, 1.0 - decays) / horizon
    contractions = (
        (LastIterate(), float(decays.max())),
        (FlatAverage(), float(reach(process.rates, horizon).max() / horizon)),
        (plug_in, op_norm(moved)),
    )
    for estimator, lipschitz in contractions:
        if lipschitz < 1.0:
            claim = f"(1 - L)² times it <= risk of {type(estimator).__name__}"
            risk = estimator.risk(process, horizon).total
            yield _at_most("Prop. 7", claim, cramer_rao(process, horizon, lipschitz=lipschitz), risk)


def _risks(process: OrnsteinUhlenbeck, horizon: float, tau: float, guess: ArrayLike) -> Iterator[Check]:
    """Propositions 2, 3, 5, 8, 10, Theorems 1, 2, 5, Corollaries 1 and 2."""
    last, flat = LastIterate().risk(process, horizon), FlatAverage().risk(process, horizon)
    best = MaximumLikelihood()
    debiasing = OUFlatAverage(tau).risk(process, horizon)
    sigma = isotropic(process)
    if sigma is not None:
        a, noise = process.rates, process.eta * sigma**2
        shrunk = process.decay(horizon) * process.start
        variance = noise * (-np.expm1(-2.0 * a * horizon) / (2.0 * a)).sum()
        yield _equal("Prop. 2", "risk of the last iterate, Σ = σI", last.total, shrunk @ shrunk + variance)
        yield _equal(
            "Theorem 2", "risk of the MLE, Σ = σI", best.risk(process, horizon).total, noise * (a**-2.0).sum() / horizon
        )
    yield _at_most(
        "Prop. 5", "risk of the last iterate <= bound", last.total, last_iterate_upper_bound(process, horizon)
    )
    yield _at_most(
        "Prop. 3, Cor. 2", "risk of the flat average <= (6)", flat.total, flat_average_upper_bound(process, horizon)
    )
    yield _at_most(
        "Prop. 8", "lower bound <= risk of the flat average", flat_average_lower_bound(process, horizon), flat.total
    )
    upper = ou_flat_average_upper_bound(process, horizon, tau)
    yield _at_most("Theorem 1, Prop. 10", "risk of the average without memory <= (7)", debiasing.total, upper)
    yield _at_most(
        "Prop. 6", "Cramér-Rao <= risk of the average without memory", cramer_rao(process, horizon), debiasing.total
    )
    known = PlugInMaximumLikelihood(process.A)
    claim = "Cov of the MLE from its parts = η A⁻¹Σ²A⁻¹/T"
    covariance = best.covariance(process, horizon)
    rounding = _largest(covariance) * _inflation(process.A)
    yield _equal("Theorem 4, Cor. 1", claim, known.covariance(process, horizon), covariance, rounding)
    plugged = PlugInMaximumLikelihood(guess).risk(process, horizon).total
    yield _at_most(
        "Theorem 5", "risk of the plug-in MLE <= bound", plugged, plug_in_upper_bound(process, horizon, guess)
    )
    matrix = positive_definite("guess", guess, process.dimension)
    if sigma is not None and commute(matrix, process.A):
        commuting = commuting_plug_in_upper_bound(process, horizon, guess)
        yield _at_most("Theorem 5", "risk of the plug-in MLE <= (13)", plugged, commuting)


def _likelihood(process: OrnsteinUhlenbeck, horizon: float, tau: float) -> Iterator[Check]:
    """Theorems 3 and 4, Propositions 4 and 9, on one path each."""
    times = np.linspace(0.0, horizon, 33)
    path = process.sample(1, times, seed=1)[0]
    best = MaximumLikelihood().estimate(process, times, path).numpy()

    def value(mu: FloatArray) -> float:
        return float(log_likelihood(process, mu, times, path))

    worse = float(np.linalg.cond(process.Sigma) * np.linalg.cond(process.A))
    yield from _stationary(value, best, fisher_information(process, horizon), worse)
    later = np.linspace(tau, horizon, 9)
    expected = torch.as_tensor(process.mean(later), dtype=torch.float64)
    averages = debiased(process, later, expected).numpy()
    # What θ_0 left behind is taken off and the rest divided by I - e^{-At}: short of 1/a, by little.
    rounding = _largest(process.theta0, process.mu) / float(-np.expm1(-process.rates.min() * tau))
    yield _equal("Prop. 9", "E θ̄_t = μ* at every t", averages, np.broadcast_to(process.mu, averages.shape), rounding)
    average = OUFlatAverage(tau).estimate(process, later, expected).numpy()
    yield _equal("Theorem 1", "E of the average without memory = μ*", average, process.mu, rounding)


def _stationary(
    value: Callable[[FloatArray], float], best: FloatArray, information: FloatArray, worse: float
) -> Iterator[Check]:
    """A quadratic with Hessian -information is at its maximum at ``best``: it falls by half the square either way.

    Left out where rounding, ``worse`` by the condition numbers of Σ and A, would hide it.
    """
    step = np.linalg.cholesky(inverse(information))[:, -1]
    for sign, side in ((1.0, "above"), (-1.0, "below")):
        claim = f"log-likelihood one standard deviation {side} the MLE is lower by 1/2"
        there = value(best + sign * step)
        fall = value(best) - there
        scale = max(1.0, abs(there)) * _inflation(information) * worse
        if 1e-10 * scale < 0.05:  # else rounding hides a fall of 1/2
            yield Check("Prop. 4, Theorem 4", claim, "=", fall, 0.5, scale)


def _function(process: OrnsteinUhlenbeck, values: FloatArray) -> FloatArray:
    """The matrix with the eigenvectors of A and these eigenvalues."""
    return (process.basis * values) @ process.basis.T


def _largest(*values: FloatArray) -> float:
    """Return the largest absolute entry, which rounding is relative to."""
    return max(float(np.abs(value).max()) for value in values)


def _inflation(matrix: FloatArray) -> float:
    """How much more than 1e-10 rounding may cost when ``matrix`` is inverted."""
    return max(1.0, float(np.linalg.cond(matrix)) / 1e4)
