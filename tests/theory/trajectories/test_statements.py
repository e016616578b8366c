"""Every numbered statement of the paper on random instances, what makes a check fail, and the slips."""

import dataclasses
import re

import numpy as np
import pytest

from lagless.theory import (
    FlatAverage,
    MaximumLikelihood,
    OrnsteinUhlenbeck,
    check_statements,
    commuting_plug_in_upper_bound,
    cramer_rao,
    fisher_information,
    flat_average_lower_bound,
    flat_average_upper_bound,
    last_iterate_upper_bound,
    log_likelihood,
    ou_flat_average_upper_bound,
    plug_in_upper_bound,
    slips,
)
from lagless.theory.numerics._matrices import commute
from lagless.theory.trajectories._integrals import integral_covariance, integral_cross_covariance


def spd(rng, d, condition=20.0):
    basis, _ = np.linalg.qr(rng.normal(size=(d, d)))
    return (basis * np.exp(rng.uniform(-0.5, 0.5, d) * np.log(condition))) @ basis.T


def random_process(rng, isotropic):
    d = int(rng.integers(1, 6))
    sigma = float(rng.uniform(0.2, 2.0)) if isotropic else spd(rng, d)
    start = rng.normal(size=d) * 10 ** rng.uniform(-2, 1)
    return OrnsteinUhlenbeck(spd(rng, d), rng.normal(size=d), start, 10 ** rng.uniform(-3, 0), sigma)


@pytest.mark.parametrize("seed", range(40))
def test_statements_hold(seed):
    rng = np.random.default_rng(seed)
    process = random_process(rng, isotropic=seed % 2 == 0)
    horizon = 10 ** rng.uniform(-1.5, 1.5)
    guess = spd(rng, process.dimension) if seed % 3 else float(rng.uniform(0.2, 3.0))
    checks = check_statements(process, horizon, tau=horizon * rng.uniform(0.02, 0.95), guess=guess)
    assert [check for check in checks if not check.holds] == []


@pytest.mark.parametrize("seed", range(60))
def test_no_statement_is_said_not_to_hold_by_rounding(seed):
    """Ill-conditioned instances, short and long horizons: each holds, or is refused with the numbers."""
    rng = np.random.default_rng(seed)
    d, span = int(rng.integers(1, 5)), float(rng.uniform(0, 8))
    bases = [np.linalg.qr(rng.normal(size=(d, d)))[0] for _ in range(2)]
    curvature, noise = 10 ** rng.uniform(-span, span, d), 10 ** rng.uniform(-span / 2, span / 2, d)
    matrix, sigma = ((basis * values) @ basis.T for basis, values in zip(bases, (curvature, noise), strict=True))
    arguments = (matrix + matrix.T) / 2, rng.normal(size=d), rng.normal(size=d), 10 ** rng.uniform(-3, 0)
    horizon = 10 ** rng.uniform(-4, 4)
    try:
        process = OrnsteinUhlenbeck(*arguments, (sigma + sigma.T) / 2)
        checks = check_statements(process, horizon)
    except ValueError as error:
        assert re.search("can tell whether statements hold up to|loses it to rounding|positive definite", str(error))
        assert span > 1.0 and not isinstance(error, np.linalg.LinAlgError)
    else:
        assert [check for check in checks if not check.holds] == []


def test_every_statement_is_there():
    process = OrnsteinUhlenbeck(np.diag([0.1, 0.3]), 1.0, -1.0, 0.1, 1.0)
    numbers = {number for check in check_statements(process, 2.0) for number in check.number.split(", ")}
    assert numbers == (
        {f"Lemma {i}" for i in range(1, 5)} | {"Cor. 1", "Cor. 2"}
        | {f"Prop. {i}" for i in range(1, 11)} | {"Theorem 1", "Theorem 2", "Theorem 4", "Theorem 5"}
    )  # fmt: skip


def test_checks_can_fail():
    """A wrong process makes equalities fail, a wrong direction inequalities."""
    process = OrnsteinUhlenbeck(0.7, 1.3, -2.0, 0.25, 1.5)
    checks = check_statements(process, 3.0, tau=0.5, guess=1.1)
    for check in checks:
        assert check.scale < 30.0
        if check.relation == "=":
            assert not dataclasses.replace(check, left=check.left + 1e-9 * check.scale).holds
        elif check.right > check.left + 1e-9 * check.scale:
            assert not dataclasses.replace(check, left=check.right, right=check.left).holds


def test_bounds_are_not_idle():
    """Inequalities that are tight somewhere: long horizons for (6), short ones for the lower bound."""
    process = OrnsteinUhlenbeck(1.0, 1.0, 0.0, 0.1, 1.0)
    by_claim = {check.claim: check for check in check_statements(process, 1000.0)}
    assert by_claim["risk of the flat average <= (6)"].left > 0.99 * by_claim["risk of the flat average <= (6)"].right
    short = OrnsteinUhlenbeck(1.0, 1.0, 0.0, 1e-6, 1.0)
    risk = short.risk(FlatAverage(), horizon=0.01).total
    assert 0.999 * risk < flat_average_lower_bound(short, 0.01) <= risk


def test_flat_average_lower_bound_as_stated():
    """Prop. 3 and 8 with their (1 - c)², c = 2 λ_max T < 1; the proof's constant lies above."""
    rng = np.random.default_rng(0)
    for _ in range(50):
        process = random_process(rng, isotropic=True)
        c = rng.uniform(0.01, 0.99)
        horizon = c / (2.0 * process.rates[-1])
        stated = (1.0 - c) ** 2 * (process.start @ process.start)
        assert (
            stated <= flat_average_lower_bound(process, horizon) <= process.risk(FlatAverage(), horizon=horizon).total
        )
        assert flat_average_lower_bound(process, 3.0 / process.rates[-1]) == 0.0


def test_commuting_bound_says_when_it_does_not_apply():
    rng = np.random.default_rng(1)
    process = OrnsteinUhlenbeck(spd(rng, 3), 0.0, np.ones(3), 0.1, 1.0)
    with pytest.raises(ValueError, match="use plug_in_upper_bound"):
        commuting_plug_in_upper_bound(process, 1.0, spd(rng, 3))
    general = OrnsteinUhlenbeck(process.A, 0.0, np.ones(3), 0.1, spd(rng, 3))
    with pytest.raises(ValueError, match="use plug_in_upper_bound"):
        commuting_plug_in_upper_bound(general, 1.0, 2.0)


def test_lemma_1_has_no_matrix_inequality_between_different_times():
    """‖Σ‖² A⁻¹(e^{-A(t-s)} - e^{-A(t+s)})/2 - K(t, s) is not positive semidefinite when A and Σ do not commute; its
    trace is not negative."""
    process = OrnsteinUhlenbeck(np.diag([1.0, 4.0]), 0.0, np.ones(2), 1.0, np.array([[1.0, 0.5], [0.5, 1.0]]))
    t, s = 1.0, 0.3
    a = np.array([1.0, 4.0])
    bound = np.diag(1.5**2 * (np.exp(-a * (t - s)) - np.exp(-a * (t + s))) / (2 * a))
    gap = bound - (process.cov(t, s) + process.cov(s, t)) / 2
    assert np.linalg.eigvalsh(gap)[0] < -1e-3 * np.abs(bound).max()
    assert np.trace(gap) > 0.0


def test_lemma_4_symmetric_part_is_a_derivative():
    """d/dT Cov(∫θ) = Cov(θ_T, ∫θ) + its transpose."""
    process = random_process(np.random.default_rng(11), isotropic=False)
    step = 1e-4
    slope = (integral_covariance(process, 1.0 + step) - integral_covariance(process, 1.0 - step)) / (2 * step)
    cross = integral_cross_covariance(process, 1.0)
    np.testing.assert_allclose(slope, cross + cross.T, rtol=0, atol=1e-7 * np.abs(slope).max())


@pytest.mark.parametrize("seed", range(3))
def test_likelihood(seed):
    """Prop. 4: the estimator maximises it, its curvature is the Fisher information, its score at μ* has mean 0 and the
    Fisher information as covariance."""
    process = random_process(np.random.default_rng(seed + 20), isotropic=False)
    times = np.linspace(0.0, 2.0, 401)
    paths = 1000
    path = process.sample(paths, times, seed=seed)

    def total(point):
        return log_likelihood(process, point, times, path).numpy()

    step = 0.5  # quadratic in μ: central differences are exact at any step
    score = np.stack(
        [(total(process.mu + step * e) - total(process.mu - step * e)) / (2 * step) for e in np.eye(process.dimension)],
        axis=1,
    )
    information = fisher_information(process, 2.0)
    error = np.sqrt(np.diag(information) / paths)
    assert np.abs(score.mean(axis=0) / error).max() < 4.5
    product = score[:, :, None] * score[:, None, :]
    assert np.abs((product.mean(axis=0) - information) / (product.std(axis=0) / np.sqrt(paths))).max() < 4.5
    # One Newton step from μ* lands on the estimator, path by path.
    newton = process.mu + score @ np.linalg.inv(information)
    expected = MaximumLikelihood().estimate(process, times, path).numpy()
    np.testing.assert_allclose(newton, expected, rtol=0, atol=1e-8 * np.abs(expected).max())


def test_slips_in_numbers():
    process = OrnsteinUhlenbeck(A=0.7, mu=1.3, theta0=-2.0, eta=0.25, Sigma=1.5)
    found = {slip.where: (round(slip.printed, 4), round(slip.right, 4)) for slip in slips(process, 3.0, 0.5, 1.1)}
    assert found == {
        "Prop. 2, Prop. 5, Lemma 2": (0.9548, 0.5591),
        "Lemma 1": (0.0533, 0.0746),
        "Lemma 4, proof": (0.5123, 0.4420),
        "Lemma 3, proof": (2.7466, 1.3733),
        "App. E.4": (0.0330, 0.1690),
        "§3": (0.8610, 0.3827),
        "Theorem 1": (0.7180, 0.0),
        "Prop. 4": (7.6065, 0.0),
        "§3, definition of the EMA": (0.5591, 2.0542),
        "Theorem 5, definition": (0.3827, 0.5297),
        "Prop. 3, Prop. 8": (2.7225, 8.3377),
    }
    short = {slip.where: slip for slip in slips(process, 3.0, 0.5, 1.1)}["Prop. 3, Prop. 8"]
    assert "T = 0.25/λ_max = 0.3571" in short.quantity
    assert short.printed < short.right <= process.risk(FlatAverage(), horizon=0.25 / 0.7).total


def test_sampled_paths_side_with_the_right_numbers():
    """Within 4.5 standard errors of "right", more than 6 from "printed"."""
    process = OrnsteinUhlenbeck(A=0.7, mu=1.3, theta0=-2.0, eta=0.25, Sigma=1.5)
    times = np.linspace(0.0, 3.0, 121)
    path = process.sample(20_000, times, seed=8)[:, :, 0].numpy()
    integral = (path[:, 1:] + path[:, :-1]) @ np.diff(times) / 2.0
    last, third = path[:, -1], path[:, 40]
    sampled = {
        "Prop. 2, Prop. 5, Lemma 2": (last - 1.3) ** 2,
        "Lemma 1": (last - last.mean()) * (third - third.mean()),
        "Lemma 4, proof": (last - last.mean()) * (integral - integral.mean()),
        "Lemma 3, proof": (integral - integral.mean()) ** 2,
        "§3": ((last + 2.0) / (0.7 * 3.0) + integral / 3.0 - 1.3) ** 2,
    }
    for slip in slips(process, 3.0, 0.5, 1.1):
        if slip.where in sampled:
            values = sampled[slip.where]
            error = values.std(ddof=1) / np.sqrt(len(values))
            assert abs(values.mean() - slip.right) < 4.5 * error, slip.where
            assert abs(values.mean() - slip.printed) > 6.0 * error, slip.where


def test_commuting_is_judged_at_every_scale():
    rng = np.random.default_rng(5)
    for _ in range(50):
        a, other = spd(rng, 3), spd(rng, 3)
        for scale in (1e-9, 1.0, 1e9):
            assert commute(a, scale * a @ a) and commute(scale * a, np.eye(3)) and not commute(a, scale * other)


@pytest.mark.parametrize("horizon", [0.0, -2.0, float("nan"), float("inf")])
def test_horizons_must_be_positive(horizon):
    process = OrnsteinUhlenbeck(0.7, 1.3, -2.0, 0.25, 1.5)
    for bound in (
        cramer_rao,
        fisher_information,
        flat_average_lower_bound,
        flat_average_upper_bound,
        last_iterate_upper_bound,
    ):
        with pytest.raises(ValueError, match="horizon="):
            bound(process, horizon)
    for bound in (plug_in_upper_bound, commuting_plug_in_upper_bound, ou_flat_average_upper_bound, check_statements):
        with pytest.raises(ValueError, match="horizon="):
            bound(process, horizon, 0.5) if bound is not check_statements else bound(process, horizon)
    with pytest.raises(ValueError, match="horizon="):
        slips(process, horizon, 0.5, 1.1)


@pytest.mark.parametrize("tau", [0.0, -1.0, 1.0, 2.0, float("nan")])
def test_tau_must_lie_before_the_horizon(tau):
    process = OrnsteinUhlenbeck(0.7, 1.3, -2.0, 0.25, 1.5)
    for call in (
        lambda: ou_flat_average_upper_bound(process, 1.0, tau=tau),
        lambda: check_statements(process, 1.0, tau=tau),
        lambda: slips(process, 1.0, tau, 1.1),
    ):
        with pytest.raises(ValueError, match="tau="):
            call()


def test_slips_need_isotropic_noise():
    process = OrnsteinUhlenbeck(1.0, np.zeros(2), 1.0, 0.1, np.diag([1.0, 2.0]))
    with pytest.raises(ValueError, match="Sigma = sigma I"):
        slips(process, 1.0, 0.2, 1.0)
