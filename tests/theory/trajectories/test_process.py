"""The Ornstein-Uhlenbeck process and discrete optimizers on the same quadratic: moments, sampling, refusals."""

import numpy as np
import pytest
import torch

from lagless.theory import OrnsteinUhlenbeck, QuadraticAdamW, QuadraticSGD

# A sampled mean or covariance entry may lie this many standard errors off: 6e-5 per entry, seeds are fixed.
Z_BOUND = 4.0


def spd(rng, d, condition=20.0):
    basis, _ = np.linalg.qr(rng.normal(size=(d, d)))
    return (basis * np.exp(rng.uniform(-0.5, 0.5, d) * np.log(condition))) @ basis.T


def random_process(seed, d=4, **changes):
    rng = np.random.default_rng(seed)
    settings = {"A": spd(rng, d), "mu": rng.normal(size=d), "theta0": 2.0 * rng.normal(size=d)}
    return OrnsteinUhlenbeck(**(settings | {"eta": 0.3, "Sigma": spd(rng, d)} | changes))


def exponential(matrix, t):
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * np.exp(values * t)) @ vectors.T


@pytest.mark.parametrize("seed", range(5))
def test_covariance_is_the_integral_that_defines_it(seed):
    process = random_process(seed)
    s, t = 0.7, 1.9
    nodes, weights = np.polynomial.legendre.leggauss(60)
    total = np.zeros((4, 4))
    for x, w in zip(s * (nodes + 1) / 2, s * weights / 2, strict=True):
        left, right = exponential(process.A, -(s - x)), exponential(process.A, -(t - x))
        total += w * 0.3 * left @ process.Sigma @ process.Sigma @ right
    np.testing.assert_allclose(process.cov(s, t), total, rtol=0, atol=1e-10 * np.abs(total).max())
    np.testing.assert_allclose(process.cov(t, s), process.cov(s, t).T, rtol=0, atol=1e-14)


def test_one_dimension_in_closed_form():
    a, mu, start, eta, sigma = 0.7, 1.3, -2.0, 0.25, 1.5
    process = OrnsteinUhlenbeck(a, mu, start, eta, sigma)
    assert process.mean(3.0)[0] == pytest.approx(mu + np.exp(-3 * a) * (start - mu), rel=1e-14)
    q = eta * sigma**2
    assert process.cov(1.0, 3.0)[0, 0] == pytest.approx(q / (2 * a) * (np.exp(-2 * a) - np.exp(-4 * a)), rel=1e-14)
    assert process.mean([0.0, 1.0, 2.0]).shape == (3, 1)


@pytest.mark.parametrize("seed", range(3))
def test_transitions_compose(seed):
    """Two steps are one: m(s+t) and C(s+t) from m(s), C(s)."""
    process = random_process(seed)
    step = exponential(process.A, -0.8)
    once = step @ process.cov(0.5, 0.5) @ step.T + process.basis @ process.innovation(0.8) @ process.basis.T
    np.testing.assert_allclose(process.cov(1.3, 1.3), once, rtol=0, atol=1e-12 * np.abs(once).max())


@pytest.mark.parametrize("kind", ["process", "sgd"])
def test_sampled_moments(kind):
    """Any spacing gives the exact law: three coarse, unequal gaps."""
    process = random_process(3, d=3)
    source, times = (process, [0.4, 0.9, 3.0]) if kind == "process" else (process.sgd(), [1, 3, 10])
    paths = 40_000
    sampled = source.sample(paths, times, seed=5).numpy()
    assert sampled.shape == (paths, 3, 3)
    centred = sampled - source.mean(times)
    for i, s in enumerate(times):
        for j, t in enumerate(times):
            exact = source.cov(s, t)
            product = centred[:, i, :, None] * centred[:, j, None, :]
            error = product.std(axis=0, ddof=1) / np.sqrt(paths)
            assert np.abs((product.mean(axis=0) - exact) / error).max() < Z_BOUND, (s, t)
        error = sampled[:, i].std(axis=0, ddof=1) / np.sqrt(paths)
        assert np.abs(centred[:, i].mean(axis=0) / error).max() < Z_BOUND, s


def test_sampling_is_seeded_starts_at_the_start_and_shows_progress(capsys):
    process = random_process(0)
    first = process.sample(5, [0.0, 0.1, 0.2], seed=3, progress=True)
    assert "sampling" in capsys.readouterr().out
    assert torch.equal(first, process.sample(5, [0.0, 0.1, 0.2], seed=3))
    assert not torch.equal(first, process.sample(5, [0.0, 0.1, 0.2], seed=4))
    np.testing.assert_allclose(first[:, 0].numpy(), np.tile(process.theta0, (5, 1)), atol=1e-14)
    assert process.sample(2, [1.0], dtype=torch.float32).dtype == torch.float32


def test_many_blocks_are_one_stream():
    """More numbers than one block holds: the law does not notice."""
    process = random_process(1, d=2)
    paths = 30_000
    last = process.sample(paths, 0.05 * np.arange(41), seed=2)[:, -1].numpy()
    error = last.std(axis=0, ddof=1) / np.sqrt(paths)
    assert np.abs((last.mean(axis=0) - process.mean(2.0)) / error).max() < Z_BOUND


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_sampling_on_a_gpu():
    process = random_process(1, d=2)
    paths = 30_000
    last = process.sample(paths, [0.5, 2.0], seed=2, device="cuda")[:, -1].cpu().numpy()
    error = last.std(axis=0, ddof=1) / np.sqrt(paths)
    assert np.abs((last.mean(axis=0) - process.mean(2.0)) / error).max() < Z_BOUND


@pytest.mark.parametrize("lr", [0.05, 0.6, 2.3])
def test_sgd_moments_are_the_recursion(lr):
    """Also where 1 - lr a is negative, and where SGD diverges."""
    rng = np.random.default_rng(2)
    sgd = QuadraticSGD(spd(rng, 3, 5.0), rng.normal(size=3), rng.normal(size=3), lr, spd(rng, 3))
    mean, cov = sgd.theta0, np.zeros((3, 3))
    contraction = np.eye(3) - lr * sgd.A
    for step in range(1, 8):
        mean = sgd.mu + contraction @ (mean - sgd.mu)
        cov = contraction @ cov @ contraction.T + lr**2 * sgd.Sigma @ sgd.Sigma
        np.testing.assert_allclose(sgd.mean(step), mean, rtol=1e-11, atol=1e-11)
        np.testing.assert_allclose(sgd.cov(step, step), cov, rtol=0, atol=1e-11 * np.abs(cov).max())
    np.testing.assert_allclose(sgd.cov(9, 7), contraction @ contraction @ cov, rtol=0, atol=1e-10 * np.abs(cov).max())


def test_sgd_on_the_edge_of_stability_is_a_random_walk():
    sgd = QuadraticSGD(A=1.0, mu=0.0, theta0=0.0, lr=2.0, Sigma=1.0)
    assert sgd.cov(5, 5)[0, 0] == pytest.approx(4.0 * 5)


def test_sgd_tends_to_the_process():
    """Weak order 1: halving the learning rate (and the noise scale with it) halves the error."""
    errors = []
    for eta in (0.02, 0.01):
        process = random_process(4, eta=eta)
        sgd, steps = process.sgd(), round(2.0 / eta)
        errors.append(np.linalg.norm(sgd.cov(steps, steps) - process.cov(2.0, 2.0)) / eta)
    assert errors[1] / errors[0] == pytest.approx(0.5, abs=0.05)


def test_adamw_is_torch_adamw():
    rng = np.random.default_rng(0)
    adamw = QuadraticAdamW(
        spd(rng, 3), rng.normal(size=3), rng.normal(size=3), 0.05, spd(rng, 3), betas=(0.8, 0.9), weight_decay=0.1
    )
    simulated = adamw.sample(2, list(range(11)), seed=7)
    parameter = torch.nn.Parameter(torch.tensor(adamw.theta0).repeat(2, 1))
    optimizer = torch.optim.AdamW([parameter], lr=0.05, betas=(0.8, 0.9), weight_decay=0.1)
    noises = torch.randn(10, 2, 3, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    for step in range(1, 11):
        noise = noises[step - 1] @ torch.tensor(adamw.Sigma)
        parameter.grad = (parameter.detach() - torch.tensor(adamw.mu)) @ torch.tensor(adamw.A) + noise
        optimizer.step()
        torch.testing.assert_close(simulated[:, step], parameter.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(adamw.sample(2, [0, 10], seed=7), simulated[:, [0, 10]], rtol=0, atol=0)


def test_the_process_gives_its_discrete_companions():
    process = random_process(0)
    assert process.sgd().lr == process.eta and np.array_equal(process.sgd().Sigma, process.Sigma)
    assert np.array_equal(process.adamw(1e-3).A, process.A)


GOOD = {"A": 1.0, "mu": np.zeros(2), "theta0": 1.0, "eta": 0.1, "Sigma": 1.0}


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"A": [[1.0, 0.5], [0.0, 1.0]]}, "A is not symmetric"),
        ({"A": [[1.0, 2.0], [2.0, 1.0]]}, "A has the eigenvalue -1"),
        ({"A": np.eye(3), "mu": 0.0, "theta0": np.zeros(2)}, r"A has shape \(3, 3\); it must have shape \(2, 2\)"),
        ({"A": np.nan}, "A has entries that are not finite"),
        ({"Sigma": 0.0}, "Sigma has the eigenvalue 0"),
        ({"Sigma": -np.eye(2)}, "Sigma has the eigenvalue -1"),
        ({"theta0": np.zeros(3)}, r"theta0 has shape \(3,\)"),
        ({"mu": [0.0, np.inf]}, "mu has entries that are not finite"),
        ({"eta": 0.0}, "eta=0.0; it must be a finite number > 0"),
        ({"eta": np.nan}, "eta=nan"),
    ],
)
def test_bad_processes_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        OrnsteinUhlenbeck(**(GOOD | changes))


@pytest.mark.parametrize("times", [[], [1.0, 1.0], [2.0, 1.0], [-1.0, 1.0], [0.0, np.nan], [[0.0, 1.0]]])
def test_bad_times_are_refused(times):
    with pytest.raises(ValueError, match="times must be"):
        OrnsteinUhlenbeck(**GOOD).sample(1, times)


def test_bad_moments_in_time_are_refused():
    process = OrnsteinUhlenbeck(**GOOD)
    for call in (
        lambda: process.cov(-1.0, 2.0),
        lambda: process.cov(1.0, np.nan),
        lambda: process.mean([1.0, -1.0]),
        lambda: process.sgd().cov(-1, 2),
    ):
        with pytest.raises(ValueError, match="must be a finite number >= 0"):
            call()
    for source in (process, process.sgd(), process.adamw(0.1)):
        with pytest.raises(ValueError, match="paths=0"):
            source.sample(0, [0, 1])


def test_optimizer_arguments_are_refused():
    process = OrnsteinUhlenbeck(**GOOD)
    for changes, message in (
        ({"lr": -1.0}, "lr=-1"),
        ({"lr": 0.1, "betas": (0.9, 1.0)}, "betas"),
        ({"lr": 0.1, "eps": 0.0}, "eps=0"),
        ({"lr": 0.1, "weight_decay": -0.1}, "weight_decay=-0.1"),
    ):
        with pytest.raises(ValueError, match=message):
            process.adamw(**changes)
    with pytest.raises(ValueError, match="whole number"):
        process.sgd().mean(1.5)
    with pytest.raises(ValueError, match="leave dt out"):
        process.sgd().risks({}, steps=3, dt=0.1)
