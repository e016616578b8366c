"""The estimator of curvature, noise and distance, on runs of which the truth is known."""

import numpy as np
import pytest

from lagless.theory import OrnsteinUhlenbeck, QuadraticSGD, TrajectoryMoments, estimate_run, moments_of

LR, DISTANCE, SIGMA = 0.1, 3.0, 1.0
Z = 4.5


def trajectory(rates, steps, every, *, seed=0, paths=200, distance=DISTANCE):
    """SGD in 16 directions with the given range of lr·a, ``paths`` times: shape (checkpoints, 16·paths)."""
    a = np.geomspace(*rates, 16) / LR
    mu = np.linspace(-5.0, 5.0, 16)
    sgd = QuadraticSGD(A=np.diag(a), mu=mu, theta0=mu + distance, lr=LR, Sigma=SIGMA)
    times = np.arange(0, steps + 1, every)
    path = sgd.sample(paths, times, seed=seed).numpy()
    return path.transpose(1, 0, 2).reshape(len(times), -1), times.tolist()


def z(estimate, truth):
    return (estimate.mean - truth) / estimate.standard_error


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("rates, steps, every", [((0.01, 0.1), 4000, 20), ((0.002, 0.2), 8000, 20)])
def test_range_noise_and_distance_are_recovered(rates, steps, every, seed):
    """|z| < 4.5 for each of four numbers, and errors small enough to say something."""
    found = estimate_run(moments_of(*trajectory(rates, steps, every, seed=seed)))
    assert abs(z(found.rate_min, rates[0])) < Z
    assert abs(z(found.rate_max, rates[1])) < Z
    assert abs(z(found.step_noise, LR * SIGMA)) < Z
    assert abs(z(found.distance, DISTANCE)) < Z
    assert found.rate_min.standard_error < 0.05 * rates[0]
    assert found.rate_max.standard_error < 0.15 * rates[1]
    assert found.misfit < 0.02
    assert found.first_step > 0 and found.last_step == steps


def test_z_values_spread_like_standard_normal_ones():
    """Ten runs, 30 z-values: their root mean square lies in [0.6, 1.7], far outside it if errors were off by two."""
    values = []
    for seed in range(10):
        found = estimate_run(moments_of(*trajectory((0.01, 0.1), 4000, 20, seed=100 + seed)))
        values += [z(found.rate_min, 0.01), z(found.rate_max, 0.1), z(found.step_noise, LR * SIGMA)]
    assert 0.6 < np.sqrt(np.mean(np.square(values))) < 1.7


def test_a_single_curvature_is_reported_as_one():
    found = estimate_run(moments_of(*trajectory((0.02, 0.02), 4000, 20)))
    assert found.rate_min == found.rate_max
    assert abs(z(found.rate_min, 0.02)) < Z
    assert abs(z(found.step_noise, LR * SIGMA)) < Z


def test_the_basis_does_not_matter():
    """Squared distances between iterates are the same after any rotation of the parameters."""
    path, steps = trajectory((0.01, 0.1), 4000, 40, paths=20)
    turn, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(path.shape[1],) * 2))
    straight, turned = (moments_of(p, steps).squared_differences().mean(axis=0) for p in (path, path @ turn))
    np.testing.assert_allclose(turned, straight, rtol=1e-9, atol=1e-9)


def test_it_also_reads_the_process_in_continuous_time():
    """e^{-aη} against 1 - aη: at rates up to 0.02 the difference is below 1 %, within |z| < 4.5."""
    a = np.geomspace(0.02, 0.2, 16)
    process = OrnsteinUhlenbeck(A=np.diag(a), mu=0.0, theta0=np.full(16, DISTANCE), eta=LR, Sigma=SIGMA)
    steps = list(range(0, 12_001, 50))
    path = process.sample(200, LR * np.array(steps), seed=3).numpy().transpose(1, 0, 2).reshape(len(steps), -1)
    found = estimate_run(moments_of(path, steps))
    assert abs(z(found.rate_min, 0.002)) < Z
    assert abs(z(found.rate_max, 0.02)) < Z


def test_streamed_blocks_give_the_same_estimate_as_the_whole():
    path, steps = trajectory((0.01, 0.1), 4000, 20)
    blocks = TrajectoryMoments(steps)
    for start in range(0, path.shape[1], 32):
        blocks.add(path[:, start : start + 32])
    whole, streamed = estimate_run(moments_of(path, steps)), estimate_run(blocks)
    assert streamed.coordinates == whole.coordinates == path.shape[1]
    assert streamed.rate_min.mean == pytest.approx(whole.rate_min.mean, rel=0.02)  # groups, and so weights, differ
    assert streamed.distance.mean == pytest.approx(whole.distance.mean, rel=1e-9, abs=1e-3)


def test_the_estimate_becomes_a_problem_in_the_units_asked_for():
    found = estimate_run(moments_of(*trajectory((0.01, 0.1), 4000, 40)))
    one, other = found.problem(), found.problem(steps=500, lr=LR)
    assert (one.lr, one.steps, other.steps) == (1.0, 4000, 500)
    assert other.curvature_max == pytest.approx(one.curvature_max / LR)
    assert other.noise == pytest.approx(SIGMA, rel=0.05)


@pytest.mark.parametrize(
    "rates, steps, every, message",
    [
        ((0.01, 0.1), 300, 20, "15 checkpoints after θ_0"),
        ((0.01, 0.1), 400, 20, "no stationary part"),
        ((0.0001, 0.001), 4000, 20, "slowest direction cannot be seen"),
        ((0.2, 0.6), 4000, 40, "fastest direction cannot be seen"),
        ((0.005, 0.2), 16_000, 200, "fastest direction cannot be seen"),
        ((0.005, 0.2), 16_000, 400, "fastest direction cannot be seen"),
        ((0.005, 0.2), 16_000, 1000, "fastest direction cannot be seen"),
        ((1.8, 1.8), 1000, 1, "misses them by"),
        ((0.1, 1.5), 1000, 1, "rates below 1|misses them by"),
    ],
)
@pytest.mark.filterwarnings("error")
def test_it_refuses_where_it_cannot_know(rates, steps, every, message):
    with pytest.raises(ValueError, match=message):
        estimate_run(moments_of(*trajectory(rates, steps, every)))


@pytest.mark.parametrize("every", [200, 400])
@pytest.mark.parametrize("seed", range(2))
def test_few_coordinates_do_not_make_one_rate_of_a_wide_range(every, seed):
    with pytest.raises(ValueError, match="cannot be seen"):
        estimate_run(moments_of(*trajectory((0.005, 0.2), 16_000, every, paths=2, seed=seed)))


def test_momentum_is_refused():
    random = np.random.default_rng(0)
    weights, velocity, path = np.full(800, DISTANCE), np.zeros(800), [np.full(800, DISTANCE)]
    for step in range(1, 4001):
        velocity = 0.9 * velocity + 0.002 * weights + 0.1 * random.normal(size=800)
        weights = weights - velocity
        if step % 20 == 0:
            path.append(weights)
    with pytest.raises(ValueError, match="not those of SGD.*Momentum"):
        estimate_run(moments_of(np.array(path), range(0, 4001, 20)))


def test_a_decaying_learning_rate_is_no_stationary_part():
    path, steps = trajectory((0.01, 0.1), 4000, 20)
    shrink = np.linspace(1.0, 0.1, len(steps))[:, None]
    with pytest.raises(ValueError, match="no stationary part"):
        estimate_run(moments_of(path.mean(axis=0) + shrink * (path - path.mean(axis=0)), steps))


def test_bad_trajectories_are_refused():
    path, steps = trajectory((0.01, 0.1), 4000, 40)
    with pytest.raises(ValueError, match="20, 40 steps apart"):
        estimate_run(moments_of(path, [*steps[:-1], steps[-1] - 20]))
    with pytest.raises(ValueError, match="do not move at all"):
        estimate_run(moments_of(np.ones_like(path), steps))
    with pytest.raises(ValueError, match="must be"):
        moments_of(path[1:], steps)
    with pytest.raises(ValueError, match="NaN or infinity"):
        moments_of(np.where(path == path[3, 3], np.nan, path), steps)
    with pytest.raises(ValueError, match="at least one each"):
        estimate_run(moments_of(path[:, :20], steps))
    with pytest.raises(ValueError, match="groups=2"):
        TrajectoryMoments(steps, groups=2)
