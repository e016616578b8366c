"""SGD pulled to its own average: closed forms, what the improvement costs, the hidden SGD, the convex guarantee."""

import numpy as np
import pytest
from hypothesis import assume, given, strategies as st
from scipy.linalg import solve_discrete_lyapunov

from lagless.theory import (
    ConvexGuarantee,
    PullRecursion,
    absolute_value_gap,
    compare_over_spectrum,
    full_pull_improvement,
    hidden_iterate,
    largest_stable_gain,
    matched_ema,
    optimal_gain,
    pulled_sgd,
    slowed_sgd,
)
from lagless.theory.control._pull import ema_variance_slope, smallest_ema_variance
from lagless.theory.control._pulled_sgd import simulate_recursion

unit = st.floats(0.01, 0.99)
recursions = st.builds(PullRecursion, a=st.floats(0.01, 2.5), b=unit, c=st.floats(-1.0, 3.0), sigma=st.floats(0.1, 3.0))
pulled = st.builds(PullRecursion, a=unit, b=unit, c=st.floats(0.0, 1.0))


def spectral_radius(recursion):
    return np.abs(np.linalg.eigvals(recursion.transition)).max()


def stationary_covariance(recursion):
    into = recursion.sigma * np.array([1.0, recursion.b])
    return solve_discrete_lyapunov(recursion.transition, np.outer(into, into))


@given(recursion=recursions)
def test_roots_and_stability(recursion):
    radius = spectral_radius(recursion)
    assert recursion.contraction == pytest.approx(radius, abs=1e-7)  # a double root loses half the digits
    phi1, phi2 = recursion.ar_coefficients
    x = recursion.transition
    assert (phi1, -phi2) == (pytest.approx(np.trace(x), abs=1e-13), pytest.approx(np.linalg.det(x), abs=1e-13))
    assume(abs(radius - 1.0) > 1e-9)
    assert recursion.is_stable == (radius < 1.0)


@given(recursion=recursions)
def test_stationary_law_against_lyapunov(recursion):
    assume(spectral_radius(recursion) < 0.999)
    (live, cross), (_, average) = stationary_covariance(recursion)
    assert recursion.live_variance == pytest.approx(live, rel=1e-8)
    assert recursion.covariance == pytest.approx(cross, rel=1e-8, abs=1e-8 * live)
    assert recursion.ema_variance == pytest.approx(average, rel=1e-8)
    a, b, c = recursion.a, recursion.b, recursion.c
    expanded = (
        b
        * (2 - a - b + a * b - c * (1 - b))
        / (a * (a + b - a * b + c * (1 - b)) * (4 - 2 * a - 2 * b + a * b - 2 * c * (1 - b)))
    )
    assert recursion.ema_variance == pytest.approx(recursion.sigma**2 * expanded, rel=1e-9)


@given(recursion=recursions)
def test_yule_walker(recursion):
    """γ₁ = φ₁γ₀ + φ₂γ₁, with γ₁ from the covariance matrix itself."""
    assume(spectral_radius(recursion) < 0.99)
    phi1, phi2 = recursion.ar_coefficients
    lagged = (recursion.transition @ stationary_covariance(recursion))[1, 1]
    assert lagged == pytest.approx(phi1 * recursion.ema_variance + phi2 * lagged, rel=1e-6, abs=1e-9)


def test_without_a_pull():
    recursion = PullRecursion(a=0.3, b=0.1)
    assert sorted(root.real for root in recursion.roots) == pytest.approx([0.7, 0.9])
    assert recursion.live_variance == pytest.approx(1 / (0.3 * 1.7))
    assert recursion.live_variance > recursion.ema_variance


def test_stability_edge():
    a, b = 0.4, 0.25
    edge = largest_stable_gain(a, b)
    assert edge == pytest.approx(1.6 * 1.75 / 1.5)
    assert PullRecursion(a, b, edge - 1e-6).is_stable and not PullRecursion(a, b, edge + 1e-6).is_stable
    assert spectral_radius(PullRecursion(a, b, edge)) == pytest.approx(1.0, abs=1e-12)
    # A full pull lowers the limit of a from 2 to 2/(2 - b).
    limit = 2 / (2 - b)
    assert PullRecursion(limit - 1e-6, b, 1.0).is_stable and not PullRecursion(limit + 1e-6, b, 1.0).is_stable
    for name in ("ema_variance", "live_variance", "covariance"):
        with pytest.raises(ValueError, match=r"no stationary law: it needs .* c < 1\.86667"):
            getattr(PullRecursion(a, b, edge), name)


@given(recursion=pulled)
def test_every_gain_up_to_one_is_stable(recursion):
    assert recursion.is_stable


@given(a=unit, b=unit)
def test_a_little_pull_always_helps(a, b):
    slope = ema_variance_slope(a, b, sigma=1.5)
    step = 1e-5 * b
    above, below = (PullRecursion(a, b, c, 1.5).ema_variance for c in (step, -step))
    assert slope < 0.0
    assert slope == pytest.approx((above - below) / (2 * step), rel=1e-5)


@given(a=unit, b=unit)
def test_optimal_gain(a, b):
    best = optimal_gain(a, b)
    smallest = smallest_ema_variance(a, b)
    assert 0.0 < best < largest_stable_gain(a, b)
    assert PullRecursion(a, b, best).ema_variance == pytest.approx(smallest, rel=1e-9)
    others = [PullRecursion(a, b, best * f).ema_variance for f in (0.0, 0.9, 0.999)]
    others += [PullRecursion(a, b, best + f * (largest_stable_gain(a, b) - best)).ema_variance for f in (0.01, 0.5)]
    assert min(others) >= smallest
    # Clamping the gain at 1 costs at most a factor of two.
    assert PullRecursion(a, b, min(best, 1.0)).ema_variance <= 2.0 * smallest


@given(a=unit, b=unit)
def test_when_the_variance_falls_up_to_a_full_pull(a, b):
    margin = (1 - a * (1 - b)) ** 2 - a * b
    assume(abs(margin) > 1e-9)
    assert (optimal_gain(a, b) > 1.0) == (margin > 0.0)


def test_optimal_gain_values():
    assert optimal_gain(0.9, 0.1) == pytest.approx(0.878, abs=5e-4)
    assert optimal_gain(1e-4, 1e-4) == pytest.approx(2.0, abs=1e-3)
    clamped, best = PullRecursion(1e-4, 1e-4, 1.0).ema_variance, smallest_ema_variance(1e-4, 1e-4)
    assert clamped / best == pytest.approx(2.0, abs=1e-3)


@pytest.mark.parametrize(
    ("x", "ratio", "digits"),
    [(0.1, 5.72, 2), (0.03, 17.42, 2), (0.01, 50.77, 2), (0.003, 167.5, 1), (0.001, 501.0, 1), (1e-4, 5003, 0)]
    + [(1e-5, 50026, 0)],
)
def test_unbounded_family(x, ratio, digits):
    a, b = x, 0.999 * x
    assert round(full_pull_improvement(a, b), digits) == ratio
    free, full = PullRecursion(a, b), PullRecursion(a, b, 1.0)
    assert full_pull_improvement(a, b) == pytest.approx(free.ema_variance / full.ema_variance, rel=1e-9)
    if x >= 1e-3:  # below, the Lyapunov solution itself has no digits left
        lyapunov = stationary_covariance(free)[1, 1] / stationary_covariance(full)[1, 1]
        assert full_pull_improvement(a, b) == pytest.approx(lyapunov, rel=1e-6)


@given(a=st.floats(1e-6, 0.124), fraction=st.floats(0.01, 0.999))
def test_improvement_is_at_least_an_eighth_of_the_inverse(a, fraction):
    assert full_pull_improvement(a, fraction * a) >= 1 / (8 * a)


def test_the_improvement_is_paid_for_in_contraction():
    free, full = PullRecursion(1e-3, 1e-3), PullRecursion(1e-3, 1e-3, 1.0)
    assert full_pull_improvement(1e-3, 1e-3) > 500
    assert 1 - free.contraction == pytest.approx(1e-3, rel=1e-3)
    assert 1 - full.contraction == pytest.approx(1e-6, rel=2e-3)
    match = matched_ema(full)
    assert match.contraction == pytest.approx(full.contraction, abs=1e-12)
    assert match.ema_variance / full.ema_variance == pytest.approx(0.999, abs=1e-4)  # the EMA is slightly better
    assert slowed_sgd(full).a == pytest.approx(1e-6) and slowed_sgd(full).b == 1e-3
    assert slowed_sgd(full).ema_variance == pytest.approx(full.ema_variance, rel=1e-5)


@given(a=st.floats(1e-5, 1e-3), b=st.floats(1e-5, 1e-3), c=st.floats(0.0, 1.0))
def test_variance_and_contraction_go_together(a, b, c):
    """γ₀ = s/(2a²) for small a, b; the contraction is s up to a factor of two, and s itself once c dominates."""
    recursion = PullRecursion(a, b, c)
    s = a * b / (a + b + c * (1 - b) - a * b)
    assert recursion.ema_variance == pytest.approx(s / (2 * a * a), rel=3e-3)
    assert 0.99 * s < 1 - recursion.contraction < 2.01 * s
    if c > 100 * (a + b):
        assert 1 - recursion.contraction == pytest.approx(s, rel=0.01)


@given(recursion=pulled)
def test_a_matched_ema_contracts_as_fast_and_is_no_worse(recursion):
    match = matched_ema(recursion)
    assert match.contraction == pytest.approx(recursion.contraction, abs=1e-7)
    assert match.ema_variance <= recursion.ema_variance * (1 + 1e-6)


def test_an_ema_cannot_contract_faster_than_sgd():
    with pytest.raises(ValueError, match=r"an EMA of SGD can match one from \|1 - a\| = 0\.9"):
        matched_ema(PullRecursion(0.1, 0.5, -0.2))
    with pytest.raises(ValueError, match="contraction 1"):
        matched_ema(PullRecursion(0.4, 0.25, 3.0))


def test_spectrum():
    """40 curvatures, a from 1e-3 to 0.5, same slowest contraction: an EMA has .34-.56 of the pulled run's squared error
    and .04-.24 of its loss.
    """
    spectrum = np.geomspace(1e-3, 0.5, 40)
    runs = {c: compare_over_spectrum(spectrum, b=1e-3, c=c) for c in (0.1, 1.0)}
    runs["inverse"] = compare_over_spectrum(spectrum, b=1e-3, c=np.minimum(1.0, 0.003 / spectrum))
    error = {key: run.ema_error / run.pulled_error for key, run in runs.items()}
    loss = {key: run.ema_loss / run.pulled_loss for key, run in runs.items()}
    assert [round(error[key], 3) for key in (0.1, 1.0, "inverse")] == [0.555, 0.543, 0.341]
    assert [round(loss[key], 3) for key in (0.1, 1.0, "inverse")] == [0.235, 0.181, 0.040]
    for key, run in runs.items():
        gains = np.minimum(1.0, 0.003 / spectrum) if key == "inverse" else np.full(40, key)
        radii = [spectral_radius(PullRecursion(a, 1e-3, c)) for a, c in zip(spectrum, gains, strict=True)]
        assert run.contraction == pytest.approx(max(radii), abs=1e-12)
        variances = np.array([PullRecursion(a, 1e-3, c).ema_variance for a, c in zip(spectrum, gains, strict=True)])
        assert run.pulled_error == pytest.approx(variances.sum())
        assert run.pulled_loss == pytest.approx(0.5 * (spectrum * variances).sum())


@pytest.mark.parametrize(
    ("recursion", "steps", "paths"),
    [
        (PullRecursion(0.3, 0.2, 0.0, 0.7), 200, 40_000),
        (PullRecursion(0.3, 0.2, 1.0, 0.7), 300, 40_000),
        (PullRecursion(0.3, 0.2, 1.7), 1000, 20_000),
        (PullRecursion(0.9, 0.1, 0.878), 300, 40_000),
        (PullRecursion(0.02, 0.01, 1.0), 20_000, 2000),
    ],
    ids=str,
)
def test_stationary_law_by_simulation(recursion, steps, paths):
    """|z| < 4: a sample variance of n normals has standard error √(2/n), a covariance at most that."""
    assert recursion.contraction ** (2 * steps) < 2e-3
    live, average = simulate_recursion(recursion, steps, paths, seed=11)
    assert abs(np.mean(live**2) / recursion.live_variance - 1) < 4 * np.sqrt(2 / paths) + 2e-3
    assert abs(np.mean(average**2) / recursion.ema_variance - 1) < 4 * np.sqrt(2 / paths) + 2e-3
    scale = np.sqrt(recursion.live_variance * recursion.ema_variance)
    assert abs(np.mean(live * average) - recursion.covariance) / scale < 4 * np.sqrt(2 / paths) + 2e-3


def test_variances_of_one_example():
    free, full = PullRecursion(0.02, 0.01), PullRecursion(0.02, 0.01, 1.0)
    assert (round(free.ema_variance, 3), round(full.ema_variance, 5)) == (8.390, 0.24517)
    assert round(free.ema_variance / full.ema_variance, 1) == 34.2


@given(
    b=unit,
    c=st.lists(st.floats(0.0, 1.0), min_size=1, max_size=4),
    rates=st.lists(st.floats(0.0, 2.0), min_size=1, max_size=20),
    seed=st.integers(0, 2**20),
)
def test_the_hidden_iterate_does_plain_sgd(b, c, rates, seed):
    rng = np.random.default_rng(seed)
    gradients = []

    def gradient(iterate):
        gradients.append(np.sign(iterate) + rng.standard_normal(iterate.shape))
        return gradients[-1]

    start = rng.standard_normal(len(c))
    gains = np.array(c)
    hidden = [hidden_iterate(state, b, c) for state in pulled_sgd(gradient, start, rates, b, c)]
    expected = start
    np.testing.assert_allclose(hidden[0], start, atol=1e-14)
    for eta, g, x in zip(rates, gradients, hidden[1:], strict=True):
        expected = expected - eta * b / (b + (1 - b) * gains) * g
        np.testing.assert_allclose(x, expected, atol=1e-12)


def test_pulled_sgd_by_hand():
    states = list(pulled_sgd(lambda theta: 2 * theta, [1.0], [0.25, 0.1], b=0.5, c=0.5))
    assert [state.iterate.item() for state in states] == [1.0, 0.5, pytest.approx(0.5 - 0.1 + 0.5 * (0.75 - 0.5))]
    assert [state.average.item() for state in states] == [1.0, 0.75, pytest.approx(0.375 + 0.5 * 0.525)]


@pytest.mark.parametrize("c", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("noise", [0.0, 1.0])
@pytest.mark.parametrize("steps", [30, 300])
def test_convex_guarantee_holds(c, noise, steps):
    """F = |θ|: the bound exceeds the simulated gap by more than four standard errors, at and off the best rate."""
    guarantee = ConvexGuarantee(distance=(5.0,), gains=(c,), b=0.1, lipschitz=1.0, noise=noise)
    for factor in (0.3, 1.0, 3.0):
        rates = np.full(steps, factor * guarantee.best_learning_rate(steps))
        gap = absolute_value_gap(guarantee, rates, paths=2000, seed=3)
        assert gap.mean + 4 * gap.standard_error <= guarantee.bound(rates) * (1 + 1e-12)


def test_convex_guarantee_with_several_coordinates_and_a_schedule():
    guarantee = ConvexGuarantee(distance=(3.0, -1.0, 0.5), gains=(1.0, 0.2, 0.0), b=0.3, lipschitz=2.0, noise=1.5)
    rates = 0.5 / np.sqrt(np.arange(1, 301))
    gap = absolute_value_gap(guarantee, rates, paths=300, seed=4)
    assert gap.mean + 4 * gap.standard_error <= guarantee.bound(rates)
    # D² = 9·(1 + 7/3) + (1 + .2·7/3) + .25, K = 1, V = 2.5, Q = V² + 2·2·.7·2.5/.3
    assert guarantee.squared_distance == pytest.approx(9 * 10 / 3 + 1 + 1.4 / 3 + 0.25)
    assert guarantee.step_cost == pytest.approx(6.25 + 7.0 / 0.3)


def test_a_full_pull_makes_the_flat_average_worse():
    """T = 2,000, |θ₁| = 5, σ = 1, b = .1, each at the learning rate that is best for its bound: 0.08 and 0.36."""
    gaps = []
    for c in (0.0, 1.0):
        guarantee = ConvexGuarantee(distance=(5.0,), gains=(c,), b=0.1, lipschitz=1.0, noise=1.0)
        gaps.append(absolute_value_gap(guarantee, np.full(2000, guarantee.best_learning_rate(2000)), 300, seed=0))
    assert [round(gap.mean, 2) for gap in gaps] == [0.08, 0.36]
    assert max(gap.standard_error for gap in gaps) < 3e-3


@given(b=unit, c=st.lists(st.floats(0.0, 1.0), min_size=2, max_size=2), noise=st.floats(0.0, 3.0))
def test_best_learning_rate(b, c, noise):
    guarantee = ConvexGuarantee(distance=(1.0, 2.0), gains=tuple(c), b=b, lipschitz=1.0, noise=noise)
    best = guarantee.best_learning_rate(50)
    at_best, below, above = (guarantee.bound(np.full(50, best * f)) for f in (1.0, 0.9, 1.1))
    assert at_best == pytest.approx(guarantee.best_bound(50), rel=1e-12)
    assert at_best < min(below, above)
    worst = np.sqrt(2 - b) / b * np.sqrt(5.0) * np.sqrt(1 + noise**2) / np.sqrt(50)
    assert at_best <= worst * (1 + 1e-12)


def test_bad_arguments_are_refused():
    for name, value in {"a": 0.0, "b": 1.0, "c": float("nan"), "sigma": -1.0}.items():
        with pytest.raises(ValueError, match=f"PullRecursion: {name}="):
            PullRecursion(**{"a": 0.1, "b": 0.1, name: value})
    good = {"distance": (1.0,), "gains": (0.5,), "b": 0.1, "lipschitz": 1.0, "noise": 0.0}
    with pytest.raises(ValueError, match=r"gains=\(1\.5,\); each must lie in \[0, 1\]"):
        ConvexGuarantee(**{**good, "gains": (1.5,)})
    with pytest.raises(ValueError, match="one number per coordinate"):
        ConvexGuarantee(**{**good, "gains": ()})
    with pytest.raises(ValueError, match="must not increase"):
        ConvexGuarantee(**good).bound([0.1, 0.2])
    with pytest.raises(ValueError, match="paths=1; it must be an integer >= 2"):
        absolute_value_gap(ConvexGuarantee(**good), [0.1], paths=1, seed=0)
    with pytest.raises(ValueError, match="every number must be finite"):
        ConvexGuarantee(**{**good, "distance": (float("nan"),)})
    for rates in ([], [0.0], [float("nan")]):
        with pytest.raises(ValueError, match="learning_rates="):
            ConvexGuarantee(**good).bound(rates)
        with pytest.raises(ValueError, match="learning_rates="):
            absolute_value_gap(ConvexGuarantee(**good), rates, paths=2, seed=0)
    with pytest.raises(ValueError, match="steps=0"):
        ConvexGuarantee(**good).best_bound(0)
    for function in (
        largest_stable_gain,
        optimal_gain,
        smallest_ema_variance,
        ema_variance_slope,
        full_pull_improvement,
    ):
        for a, b, name in ((0.0, 0.1, "a"), (float("nan"), 0.1, "a"), (0.1, 1.0, "b"), (0.1, float("nan"), "b")):
            with pytest.raises(ValueError, match=f"{name}="):
                function(a, b)
    with pytest.raises(ValueError, match="a=1.5; it must be less than"):
        full_pull_improvement(1.5, 0.1)
    for changes, message in (
        ({"b": 1.5}, "b=1.5"),
        ({"learning_rates": [-0.1]}, "learning_rates="),
        ({"start": np.nan}, "start has entries"),
        ({"c": [0.1, 0.2]}, r"c has shape \(2,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            pulled_sgd(**{"gradient": abs, "start": 1.0, "learning_rates": [0.1], "b": 0.1, "c": 0.5} | changes)
    with pytest.raises(ValueError, match="b=0"):
        hidden_iterate(next(pulled_sgd(abs, 1.0, [0.1], 0.1, 0.5)), 0, 0.5)
    with pytest.raises(ValueError, match="steps=0"):
        simulate_recursion(PullRecursion(0.1, 0.1), 0, 10, seed=0)
