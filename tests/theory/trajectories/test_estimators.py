"""Estimators in continuous time: the published table, limits, general matrices, sampled paths."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from lagless.theory import (
    FlatAverage,
    LastIterate,
    MaximumLikelihood,
    OrnsteinUhlenbeck,
    OUFlatAverage,
    PlugInMaximumLikelihood,
    cramer_rao,
    debiased,
    sampled_estimates,
)
from lagless.theory.trajectories._integrals import integral_covariance, integral_cross_covariance

Z_BOUND = 4.5  # standard errors; seeds are fixed
A, MU, START, ETA, SIGMA, T = 0.7, 1.3, -2.0, 0.25, 1.5, 3.0
Q, D = ETA * SIGMA**2, MU - START
E1, E2 = -np.expm1(-A * T), -np.expm1(-2 * A * T)
V = Q / A**2 * (T - (2 * E1 - E2 / 2) / A)

# estimator, risk to four digits, and an independent Monte-Carlo value with its standard error (40,000 paths)
TABLE = {
    "last": (LastIterate(), 0.5591, 0.553, 0.004),
    "flat": (FlatAverage(), 2.0542, 2.0515, 0.0055),
    "mle": (MaximumLikelihood(), 0.3827, 0.3825, 0.0027),
    "plug-in": (PlugInMaximumLikelihood(1.1), 0.5297, 0.5272, 0.0033),
    "ou": (OUFlatAverage(0.5), 0.4818, 0.4829, 0.0034),
}


def spd(rng, d, condition=20.0):
    basis, _ = np.linalg.qr(rng.normal(size=(d, d)))
    return (basis * np.exp(rng.uniform(-0.5, 0.5, d) * np.log(condition))) @ basis.T


def random_process(seed, d=4):
    rng = np.random.default_rng(seed)
    return OrnsteinUhlenbeck(spd(rng, d), rng.normal(size=d), 2.0 * rng.normal(size=d), 0.3, spd(rng, d))


@pytest.fixture(scope="module")
def line():
    return OrnsteinUhlenbeck(A, MU, START, ETA, SIGMA)


@pytest.mark.parametrize("name", TABLE)
def test_table(line, name):
    estimator, four_digits, sampled, error = TABLE[name]
    risk = line.risk(estimator, horizon=T).total
    assert round(risk, 4) == four_digits
    assert abs(risk - sampled) < 2.5 * error


def test_closed_forms(line):
    last, flat = line.risk(LastIterate(), horizon=T), line.risk(FlatAverage(), horizon=T)
    assert last.bias_squared == pytest.approx((np.exp(-A * T) * D) ** 2, rel=1e-12)
    assert last.variance == pytest.approx(Q * E2 / (2 * A), rel=1e-12)
    assert flat.bias_squared == pytest.approx((E1 * D / (A * T)) ** 2, rel=1e-12)
    assert flat.variance == pytest.approx(V / T**2, rel=1e-12)
    assert line.risk(MaximumLikelihood(), horizon=T).total == pytest.approx(Q / (A**2 * T), rel=1e-12)
    guess = 1.1
    plugged = line.risk(PlugInMaximumLikelihood(guess), horizon=T)
    assert plugged.bias_squared == pytest.approx(((1 / guess - 1 / A) * E1 * D / T) ** 2, rel=1e-12)
    variance = Q * E2 / (2 * A) / (guess * T) ** 2 + V / T**2 + Q * E1**2 / (A**2 * guess * T**2)
    assert plugged.variance == pytest.approx(variance, rel=1e-12)
    assert integral_cross_covariance(line, T)[0, 0] == pytest.approx(Q * E1**2 / (2 * A**2), rel=1e-12)


@pytest.mark.parametrize("tau, horizon, a", [(0.5, 3.0, 0.7), (1e-3, 3.0, 0.7), (2.99, 3.0, 0.7), (1.0, 900.0, 2.0)])
def test_average_without_memory_is_its_double_integral(tau, horizon, a):
    """∬ K(s,t)/((1-e^{-as})(1-e^{-at})), on triangles, where the kernel is smooth."""
    process = OrnsteinUhlenbeck(a, MU, START, ETA, SIGMA)
    nodes, weights = np.polynomial.legendre.leggauss(40)
    # Log-spaced panels towards small t, as 1/(1-e^{-at}) grows there; fine ones everywhere.
    edges = np.unique(np.concatenate([np.geomspace(tau, horizon, 25), np.linspace(tau, horizon, int(horizon * a) + 2)]))
    lower, upper = edges[:-1], edges[1:]
    t = (lower[:, None] + np.outer(upper - lower, (nodes + 1) / 2)).ravel()
    wt = np.outer(upper - lower, weights / 2).ravel()
    # For s < t, K = q/(2a) e^{-at} (e^{as} - e^{-as}), and (e^{as} - e^{-as})/(1 - e^{-as}) = e^{as} + 1.
    inner = (1.0 - np.exp(-a * (t - tau)) + a * (t - tau) * np.exp(-a * t)) / (2 * a)
    total = 2 * (wt * Q / a * inner / -np.expm1(-a * t)).sum() / (horizon - tau) ** 2
    risk = process.risk(OUFlatAverage(tau), horizon=horizon)
    assert risk.bias_squared == 0.0
    assert risk.variance == pytest.approx(total, rel=1e-9)


def test_covariance_of_the_average_without_memory():
    """All of the matrix, A and Σ not commuting, against wᵀKw with Simpson weights."""
    process, tau, horizon, n = random_process(8, d=2), 0.5, 2.0, 400
    times = np.linspace(tau, horizon, n + 1)
    weights = np.ones(n + 1)
    weights[1:-1:2], weights[2:-1:2] = 4.0, 2.0
    weights *= 1.0 / (3.0 * n)
    values, vectors = process.rates, process.basis
    # The kernel has a kink at s = t: the half s < t, then its transpose.
    noise = process.eta * vectors.T @ process.Sigma @ process.Sigma @ vectors
    sums = values[:, None] + values
    total = np.zeros((2, 2))
    for k, t in enumerate(times):
        s = tau + (t - tau) * np.linspace(0.0, 1.0, n + 1)[:, None, None]
        kernel = noise * np.exp(-(t - s) * values) * -np.expm1(-sums * s) / sums  # rows for s, columns for t
        kernel = kernel / -np.expm1(-s * values[:, None])
        kernel = kernel / -np.expm1(-t * values)
        total += weights[k] * (t - tau) * np.einsum("n,nij->ij", weights, kernel) / (horizon - tau)
    expected = vectors @ (total + total.T) @ vectors.T
    exact = OUFlatAverage(tau).covariance(process, horizon)
    np.testing.assert_allclose(exact, expected, rtol=0, atol=1e-9 * np.abs(exact).max())


@pytest.mark.parametrize("seed", range(5))
def test_maximum_likelihood_is_its_parts_and_attains_the_bound(seed):
    """Cor. 1 against Lemmas 1, 3 and 4, with matrices that do not commute."""
    process = random_process(seed)
    exact = MaximumLikelihood().covariance(process, 2.0)
    parts = PlugInMaximumLikelihood(process.A).covariance(process, 2.0)
    np.testing.assert_allclose(parts, exact, rtol=0, atol=1e-10 * np.abs(exact).max())
    solved = np.linalg.inv(process.A) @ process.Sigma @ process.Sigma @ np.linalg.inv(process.A)
    np.testing.assert_allclose(exact, process.eta * solved / 2.0, rtol=0, atol=1e-10 * np.abs(exact).max())
    assert process.risk(MaximumLikelihood(), horizon=2.0).total == pytest.approx(cramer_rao(process, 2.0), rel=1e-12)


def test_a_large_guess_gives_the_flat_average():
    process = random_process(1)
    flat = process.risk(FlatAverage(), horizon=2.0)
    plugged = process.risk(PlugInMaximumLikelihood(1e12), horizon=2.0)
    assert plugged.total == pytest.approx(flat.total, rel=1e-9)


def test_rotation_changes_nothing():
    """Every risk is that of the rotated problem."""
    process, guess = random_process(2), spd(np.random.default_rng(9), 4)
    turn, _ = np.linalg.qr(np.random.default_rng(3).normal(size=(4, 4)))
    rotated = OrnsteinUhlenbeck(
        turn @ process.A @ turn.T, turn @ process.mu, turn @ process.theta0, process.eta, turn @ process.Sigma @ turn.T
    )
    for one, other in (
        (LastIterate(), LastIterate()),
        (FlatAverage(), FlatAverage()),
        (OUFlatAverage(0.3), OUFlatAverage(0.3)),
        (PlugInMaximumLikelihood(guess), PlugInMaximumLikelihood(turn @ guess @ turn.T)),
    ):
        assert process.risk(one, horizon=1.5).total == pytest.approx(rotated.risk(other, horizon=1.5).total, rel=1e-10)


@settings(deadline=None)
@given(
    low=st.floats(-9.0, 2.0),
    ratio=st.floats(0.0, 5.0),
    horizon=st.floats(0.1, 10.0),
)
def test_integrals_keep_their_digits(low, ratio, horizon):
    """Closed forms against quadrature, from aT = 1e-10, where they would cancel, to 1e8, where they are stiff."""
    rates = np.array([10.0**low, 10.0 ** (low + ratio)])
    process = OrnsteinUhlenbeck(np.diag(rates), np.zeros(2), np.ones(2), 1.0, np.array([[1.0, 0.5], [0.5, 1.0]]))
    # Panels that grow from the fast scale to T.
    edges = np.concatenate([[0.0], np.geomspace(min(horizon, 1e-3 / rates[1]), horizon, 120)])
    nodes, weights = np.polynomial.legendre.leggauss(16)
    x = (edges[:-1, None] + np.outer(np.diff(edges), (nodes + 1) / 2)).ravel()
    w = np.outer(np.diff(edges), weights / 2).ravel()
    reach = -np.expm1(-np.outer(x, rates)) / rates
    decay = np.exp(-np.outer(x, rates))
    noise = process.Sigma @ process.Sigma
    expected = noise * np.einsum("n,ni,nj->ij", w, reach, reach)
    np.testing.assert_allclose(integral_covariance(process, horizon), expected, rtol=1e-10)
    expected = noise * np.einsum("n,ni,nj->ij", w, decay, reach)
    np.testing.assert_allclose(integral_cross_covariance(process, horizon), expected, rtol=1e-10)


def test_estimators_on_sampled_paths(line):
    """The table again, on paths of our own: 300 steps make the trapezoid's error 1e-5 of the variance."""
    times = np.linspace(0.0, T, 301)
    found = sampled_estimates(line, {name: row[0] for name, row in TABLE.items()}, times, paths=20_000, seed=3)
    for name, (estimator, *_) in TABLE.items():
        assert abs(float(found[name].z(line.risk(estimator, horizon=T).total))) < Z_BOUND, name
        assert found[name].standard_error < 0.012 * found[name].total


def test_estimators_on_sampled_paths_with_general_matrices():
    process, guess = random_process(5, d=3), spd(np.random.default_rng(6), 3)
    estimators = {
        "flat": FlatAverage(),
        "mle": MaximumLikelihood(),
        "plug-in": PlugInMaximumLikelihood(guess),
        "ou": OUFlatAverage(0.5),
    }
    found = sampled_estimates(process, estimators, np.linspace(0.0, 2.0, 201), paths=5000, seed=1)
    for name, estimator in estimators.items():
        assert abs(float(found[name].z(process.risk(estimator, horizon=2.0).total))) < Z_BOUND, name


def test_iterates_without_memory_have_the_right_mean_and_covariance():
    """Prop. 9, and the kernel of App. E.4 with the factors inverted."""
    process = random_process(7, d=2)
    times = np.array([0.2, 1.5])
    path = process.sample(40_000, times, seed=2)
    clean = debiased(process, times, path).numpy()
    error = clean.std(axis=0, ddof=1) / 200.0
    assert np.abs((clean.mean(axis=0) - process.mu) / error).max() < Z_BOUND
    values, vectors = np.linalg.eigh(process.A)
    early, late = ((vectors / -np.expm1(-values * t)) @ vectors.T for t in times)
    exact = early @ process.cov(0.2, 1.5) @ late
    product = (clean[:, 0] - process.mu)[:, :, None] * (clean[:, 1] - process.mu)[:, None, :]
    assert np.abs((product.mean(axis=0) - exact) / (product.std(axis=0) / 200.0)).max() < Z_BOUND


def test_estimates_of_one_path_need_no_batch(line):
    path = line.sample(1, np.linspace(0.0, T, 31))[0]
    for estimator in (LastIterate(), FlatAverage(), MaximumLikelihood(), PlugInMaximumLikelihood(2.0)):
        assert estimator.estimate(line, np.linspace(0.0, T, 31), path).shape == (1,)
    flat = FlatAverage().estimate(line, np.linspace(0.0, T, 31), path)
    torch.testing.assert_close(flat[0], torch.trapezoid(path[:, 0], torch.linspace(0, T, 31).double()) / T)


def test_refusals(line):
    with pytest.raises(ValueError, match="tau=0"):
        OUFlatAverage(0.0)
    with pytest.raises(ValueError, match="tau=3.0; it must be less than the horizon"):
        line.risk(OUFlatAverage(3.0), horizon=3.0)
    with pytest.raises(ValueError, match="not one of the times"):
        OUFlatAverage(0.5).estimate(line, [0.0, 0.4, 3.0], torch.zeros(3, 1, dtype=torch.float64))
    with pytest.raises(ValueError, match="guess has the eigenvalue -1"):
        line.risk(PlugInMaximumLikelihood(-1.0), horizon=3.0)
    with pytest.raises(ValueError, match=r"guess has shape \(2, 2\)"):
        line.risk(PlugInMaximumLikelihood(np.eye(2)), horizon=3.0)
    with pytest.raises(ValueError, match="lipschitz=1.0"):
        cramer_rao(line, 3.0, lipschitz=1.0)
    for estimator, *_ in TABLE.values():
        for method in (estimator.bias, estimator.covariance, estimator.risk):
            for horizon in (-2.0, 0.0, float("nan")):
                with pytest.raises(ValueError, match="horizon="):
                    method(line, horizon)
    for times in ([0.5, 1.0], [0.0], []):
        with pytest.raises(ValueError, match="the first of them 0"):
            sampled_estimates(line, {"last": LastIterate()}, times)
