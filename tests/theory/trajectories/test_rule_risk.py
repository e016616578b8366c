"""Exact risk of averaging rules: two executors, the dense definition, and sampled paths."""

import numpy as np
import pytest
import torch

from lagless import BEMA, DEMA, EMA, OUEMA, PowerEMA, UniformAverage, WindowAverage, trajectory_weights
from lagless.theory import (
    FlatAverage,
    LastIterate,
    MaximumLikelihood,
    OrnsteinUhlenbeck,
    averages_along,
    cramer_rao,
    distance_curves,
    sampled_risks,
)

# A sampled risk may lie this many standard errors off the exact one; squared errors are nearly chi-squared and paths
# many, seeds are fixed.
Z_BOUND = 4.5

RULES = {
    "ema": EMA(),
    "live": EMA(ema_power=0.0),
    "half-life": EMA(half_life=10.0, update_freq=4),
    "bema": BEMA.paper(update_freq=3, update_after=7),
    "bema, same buffers": BEMA.paper(update_freq=3, update_after=7, bias_power=0.7),
    "trl": BEMA.paper(update_freq=5, update_after=10, form="trl"),
    "ouema": OUEMA.paper(update_freq=1),
    "dema": DEMA.paper(update_freq=2),
    "uniform": UniformAverage(update_after=5),
    "power": PowerEMA(relative_width=0.15),
    "window": WindowAverage(window=6, update_freq=2),
}


def spd(rng, d, condition=20.0):
    basis, _ = np.linalg.qr(rng.normal(size=(d, d)))
    return (basis * np.exp(rng.uniform(-0.5, 0.5, d) * np.log(condition))) @ basis.T


def random_process(seed, d=4):
    rng = np.random.default_rng(seed)
    return OrnsteinUhlenbeck(spd(rng, d), rng.normal(size=d), 2.0 * rng.normal(size=d), 0.05, spd(rng, d))


@pytest.fixture(scope="module")
def process():
    return random_process(0)


@pytest.mark.parametrize("source", ["process", "sgd"])
@pytest.mark.parametrize("steps", [range(0, 61), [0, 3, 12, 13, 20, 21, 22, 40, 60]], ids=["dense", "gaps"])
def test_moments_equal_weights(process, source, steps):
    source, dt = (process, 0.1) if source == "process" else (process.sgd(), None)
    at = [step for step in steps if step >= 20]
    # 13 and 7 + 3k etc. are missing where there are gaps; rules without any update are refused by both.
    rules = {name: rule for name, rule in RULES.items() if _has_updates(rule, steps, at)}
    assert len(rules) >= 8
    risks = source.risks(rules, steps=steps, dt=dt, at=at)
    assert list(risks) == list(rules)
    for name, rule in rules.items():
        rows = np.array([trajectory_weights(rule, steps, at=step) for step in at])
        expected = source.risk_of_weights(rows, steps=steps, dt=dt)
        np.testing.assert_allclose(risks[name].bias_squared, expected.bias_squared, rtol=1e-10, err_msg=name)
        np.testing.assert_allclose(risks[name].variance, expected.variance, rtol=1e-10, err_msg=name)


def _has_updates(rule, steps, at):
    try:
        return all(trajectory_weights(rule, steps, at=step).size for step in at)
    except ValueError:
        return False


@pytest.mark.parametrize("seed", range(3))
def test_weights_equal_the_dense_covariance(seed):
    """wᵀKw with the full kernel of the process, A and Σ not commuting."""
    process = random_process(seed)
    weights = np.random.default_rng(seed).normal(size=(3, 12))
    times = 0.2 * np.arange(12)
    risk = process.risk_of_weights(weights, steps=11, dt=0.2)
    for row, w in enumerate(weights):  # they do not sum to 1
        bias = w @ process.mean(times) - process.mu
        cov = sum(w[i] * w[j] * process.cov(times[i], times[j]) for i in range(12) for j in range(12))
        assert risk.bias_squared[row] == pytest.approx(bias @ bias, rel=1e-10)
        assert risk.variance[row] == pytest.approx(np.trace(cov), rel=1e-10)
    single = process.risk_of_weights(weights[0], steps=11, dt=0.2)
    assert isinstance(single.variance, float) and single.total == pytest.approx(risk.total[0], rel=1e-14)


def test_no_averaging_is_the_last_iterate(process):
    risk = process.risk(EMA(ema_power=0.0), steps=40, dt=0.1)
    assert isinstance(risk.total, float)
    assert risk.total == pytest.approx(process.risk(LastIterate(), horizon=4.0).total, rel=1e-12)


def test_a_fine_uniform_average_is_the_flat_average(process):
    exact = process.risk(FlatAverage(), horizon=4.0).total
    errors = [process.risk(UniformAverage(), steps=n, dt=4.0 / n).total - exact for n in (1000, 2000)]
    assert errors[1] / errors[0] == pytest.approx(0.5, abs=0.01)
    assert abs(errors[1]) < 1e-2 * exact


def test_bema_with_the_ideal_correction_is_the_maximum_likelihood_estimator():
    """A = aI: uniform averaging with α_t = 1/(a dt t), which is BEMA with multiplier a dt in α alone. Built from
    weights: those of the uniform mean plus α (θ_t - θ_0)."""
    a, dt, steps = 0.7, 0.001, 3000
    process = OrnsteinUhlenbeck(a, 1.3, -2.0, 0.25, 1.5)
    weights = trajectory_weights(UniformAverage(), range(steps + 1))
    alpha = 1.0 / (a * dt * steps)
    weights[-1] += alpha
    weights[0] -= alpha
    exact = process.risk(MaximumLikelihood(), horizon=3.0).total
    assert process.risk_of_weights(weights, steps=steps, dt=dt).total == pytest.approx(exact, rel=1e-3)


@pytest.mark.parametrize("name", RULES)
def test_no_rule_beats_the_contraction_bound(name):
    """Prop. 7: the bias of a rule is -Σ w_k e^{-A t_k}(μ* - θ_0), Lipschitz in μ* with its operator norm."""
    checked = 0
    for seed in range(10):
        process = random_process(seed)
        for steps in (24, 60):
            weights = trajectory_weights(RULES[name], range(steps + 1))
            memory = np.abs(np.exp(-0.1 * np.outer(process.rates, np.arange(steps + 1))) @ weights).max()
            if memory < 1.0:
                risk = process.risk_of_weights(weights, steps=steps, dt=0.1).total
                assert cramer_rao(process, 0.1 * steps, lipschitz=float(memory)) <= risk
                checked += 1
    assert checked > 5


@pytest.mark.parametrize("source", ["process", "sgd"])
def test_sampled_risks(process, source):
    source = process if source == "process" else process.sgd()
    at = [22, 25, 31, 60]  # on and off the update steps of most rules
    exact = source.risks(RULES, steps=60, at=at)
    sampled = sampled_risks(source, RULES, steps=60, at=at, paths=4000, seed=1)
    for name in RULES:
        assert sampled[name].paths == 4000
        assert np.abs(sampled[name].z(exact[name].total)).max() < Z_BOUND, name
        # The comparison has teeth: it would see an error of 15 %.
        assert (np.asarray(sampled[name].standard_error) < 0.03 * np.asarray(exact[name].total)).all(), name


def test_rules_on_given_paths_are_their_weights(process):
    path = process.sample(2, 0.1 * np.arange(31), seed=4)
    rules = {name: RULES[name] for name in ("ema", "ouema", "power")} | {
        "bema": BEMA.paper(update_freq=1, update_after=9)
    }
    for name, values in averages_along(rules, path, 30).items():
        assert values.shape == path.shape
        for step in (0, 1, 9, 10, 30):
            weights = torch.tensor(trajectory_weights(rules[name], range(31), at=step))
            expected = torch.einsum("n,pnd->pd", weights, path)
            torch.testing.assert_close(values[:, step], expected, rtol=1e-10, atol=1e-12)


def test_adamw_runs_through_the_same_rules():
    """No exact risk there; started at the minimum, all error is variance, and averaging must lower it."""
    process = OrnsteinUhlenbeck(np.diag([1.0, 3.0]), 0.5, 0.5, 0.1, 1.0)
    rules = {"live": RULES["live"], "ema": EMA(half_life=60)}
    found = sampled_risks(process.adamw(0.05), rules, steps=300, paths=200)
    assert isinstance(found["ema"].total, float)
    assert found["ema"].total < 0.5 * found["live"].total


FIGURE_2 = {
    "EMA": EMA(ema_power=1.0),
    "OUEMA": OUEMA.paper(ema_power=1.0, update_freq=1),
    "BEMA": BEMA.paper(ema_power=1.0, update_freq=1),
}


def test_distance_curves_are_sampled_and_exact():
    process = OrnsteinUhlenbeck(np.eye(20), mu=0.0, theta0=1.0, eta=0.003, Sigma=1.0)
    curves = distance_curves(process, FIGURE_2, steps=200, paths=200)
    assert curves.exact.keys() == FIGURE_2.keys() and curves.times[-1] == pytest.approx(0.6)
    assert curves.largest_z() < Z_BOUND


def test_figure_2_as_the_paper_describes_it():
    """OUEMA and BEMA are far ahead of the EMA throughout; BEMA ends below all of them."""
    process = OrnsteinUhlenbeck(np.eye(20), mu=0.0, theta0=1.0, eta=0.003, Sigma=1.0)
    at = range(100, 2001, 100)
    totals = {name: risk.total for name, risk in process.risks(FIGURE_2, steps=2000, at=at).items()}
    assert (totals["BEMA"] < 0.85 * totals["EMA"]).all() and (totals["OUEMA"] < 0.85 * totals["EMA"]).all()
    assert totals["BEMA"][-1] < 0.1 * totals["EMA"][-1] and totals["BEMA"][-1] < 0.25 * totals["OUEMA"][-1]


def test_refusals(process):
    with pytest.raises(ValueError, match="no update up to step 2"):
        process.risk(BEMA.paper(update_freq=5), steps=2)
    with pytest.raises(ValueError, match=r"at must hold steps with an iterate; \[7\]"):
        process.risk(EMA(), steps=5, at=[3, 7])
    with pytest.raises(ValueError, match="it is empty"):
        process.risk(EMA(), steps=5, at=[])
    with pytest.raises(ValueError, match="strictly increasing"):
        process.risk(EMA(), steps=[0, 2, 2])
    with pytest.raises(ValueError, match="give steps, not horizon"):
        process.risk(EMA(), horizon=3.0)
    with pytest.raises(ValueError, match="give horizon, not steps"):
        process.risk(LastIterate(), steps=3)
    with pytest.raises(ValueError, match="horizon=-1"):
        process.risk(LastIterate(), horizon=-1.0)
    with pytest.raises(ValueError, match="steps=-3; it must be an integer >= 0"):
        process.risk(EMA(), steps=-3)
    for target in ("ema", EMA):
        with pytest.raises(ValueError, match="target=.*an instance, not a class or a name"):
            process.risk(target, steps=3)
    with pytest.raises(ValueError, match="dt=0"):
        process.risk(EMA(), steps=3, dt=0.0)
    with pytest.raises(ValueError, match="weights have 3 entries per row; there are 6"):
        process.risk_of_weights([0.2, 0.3, 0.5], steps=5)
    with pytest.raises(ValueError, match="paths=1"):
        sampled_risks(process, {"ema": EMA()}, steps=3, paths=1)
    with pytest.raises(ValueError, match="path has 4 iterates; steps has 6"):
        averages_along({"ema": EMA()}, torch.zeros(4, 4, dtype=torch.float64), 5)
