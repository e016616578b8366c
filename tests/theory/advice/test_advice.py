"""Advice: every risk it reports is exact, and it recommends what it says it does."""

import math

import numpy as np
import pytest

from lagless import BEMA, DEMA, EMA, OUEMA, PowerEMA, UniformAverage, WindowAverage
from lagless.theory import AveragingProblem, QuadraticSGD, choose, default_rules, risk_curve, sampled_risks

PROBLEM = AveragingProblem(curvature_min=0.02, curvature_max=0.8, noise=1.3, distance=2.0, lr=0.2, steps=150)
KINDS = (BEMA, DEMA, EMA, OUEMA, PowerEMA, UniformAverage, WindowAverage)
RULES = {
    "ema": EMA(half_life=20),
    "bema": BEMA.paper(update_freq=7),
    "ouema": OUEMA.paper(update_freq=5, update_after=20),
    "dema": DEMA.paper(update_freq=4),
    "uniform": UniformAverage(update_after=40, update_freq=3),
    "window": WindowAverage(window=4, update_freq=11),
}


def test_risks_of_one_direction_are_the_closed_form_of_sgd():
    problem = AveragingProblem(0.3, 0.3, noise=1.5, distance=2.0, lr=0.1, steps=25, coordinates=1)
    live = choose(problem, {}).live
    rho = 1 - 0.03
    variance = 0.1**2 * 1.5**2 * (1 - rho**50) / (1 - rho**2)
    assert live.distance.bias_squared == pytest.approx((2.0 * rho**25) ** 2, rel=1e-12)
    assert live.distance.variance == pytest.approx(variance, rel=1e-12)
    assert live.loss.total == pytest.approx(0.15 * ((2.0 * rho**25) ** 2 + variance), rel=1e-12)


@pytest.mark.parametrize("measure", ["loss", "distance"])
def test_risks_equal_those_of_the_moment_recursion_on_every_step(measure):
    """Advice leaves out iterates that are no updates and scales coordinates; the other executor does neither."""
    a = PROBLEM.curvatures
    process = QuadraticSGD(A=np.diag(a), mu=0.0, theta0=np.full(16, 2.0), lr=0.2, Sigma=1.3)
    weight = (0.5 * a if measure == "loss" else np.ones(16)) / 16
    advice = choose(PROBLEM, RULES, measure=measure)
    found = {setting.name: advice.risk(setting) for setting in advice.settings}
    for name, rule in RULES.items():
        expected = 0.0
        for a_i, w_i in zip(a, weight, strict=True):
            one = QuadraticSGD(A=a_i, mu=0.0, theta0=2.0, lr=0.2, Sigma=1.3)
            expected += w_i * one.risk(rule, steps=150).total
        assert found[name].total == pytest.approx(expected, rel=1e-10)
    assert found["live"].total == pytest.approx(
        weight @ ((process.mean(150)) ** 2 + np.diag(process.cov(150, 150))), rel=1e-10
    )


def test_risks_agree_with_simulated_runs():
    """1,000 paths, |z| < 4.5 for seven numbers."""
    advice = choose(PROBLEM, RULES)
    sampled = sampled_risks(PROBLEM.process("loss"), RULES, steps=150, paths=1000, seed=1)
    for setting in advice.settings:
        if setting.rule is not None:
            assert abs(sampled[setting.name].z(setting.loss.total)) < 4.5, setting.name


def test_a_curve_ends_at_the_risk_in_the_table_and_starts_after_the_first_update():
    advice = choose(PROBLEM, RULES)
    for setting in advice.settings:
        curve = risk_curve(PROBLEM, setting.rule, [2, 100, 150])
        assert curve.total[-1] == pytest.approx(setting.loss.total, rel=1e-12)
        assert math.isnan(curve.total[0]) == (setting.rule is not None and setting.name != "ema")


def test_settings_are_ordered_and_the_cheapest_within_two_percent_is_recommended():
    advice = choose(AveragingProblem(0.01, 1.0, noise=1.0, distance=3.0, lr=0.1, steps=2000))
    totals = [advice.total(setting) for setting in advice.settings]
    assert totals == sorted(totals)
    near = [setting.copies for setting in advice.settings if advice.total(setting) <= 1.02 * totals[0]]
    assert advice.recommended.copies == min(near) < max(near)
    assert advice.gain(advice.live) == pytest.approx(advice.total(advice.live) / advice.total(advice.recommended))
    assert advice.best_ema is not None and advice.gain(advice.best_ema) >= 0.98


def test_without_noise_that_matters_nothing_is_averaged():
    advice = choose(AveragingProblem(0.1, 0.1, noise=1e-9, distance=1.0, lr=0.1, steps=50), {"ema": EMA(half_life=10)})
    assert advice.recommended.rule is None and advice.gain(advice.live) == 1.0


def test_without_a_start_to_forget_the_longest_average_wins():
    rules = {f"{h}": EMA(half_life=h) for h in (1, 10, 100)}
    advice = choose(AveragingProblem(0.5, 0.5, noise=1.0, distance=0.0, lr=0.2, steps=2000), rules)
    assert [setting.name for setting in advice.settings] == ["100", "10", "1", "live"]


def test_the_learning_rate_changes_units_and_no_ratio():
    one = choose(AveragingProblem(0.1, 2.0, noise=1.0, distance=3.0, lr=0.05, steps=400))
    other = choose(AveragingProblem(0.005, 0.1, noise=0.05, distance=3.0, lr=1.0, steps=400))
    assert [s.name for s in one.settings] == [s.name for s in other.settings]
    for a, b in zip(one.settings, other.settings, strict=True):
        assert a.loss.total == pytest.approx(20 * b.loss.total, rel=1e-9)


@pytest.mark.parametrize("steps, freq, copies", [(1, None, 10), (7, 3, 1), (1000, None, 2), (50_000, None, 10)])
def test_every_default_rule_updates_within_the_run_and_its_budget(steps, freq, copies):
    rules = default_rules(steps, update_freq=freq, copies=copies)
    assert rules
    for name, rule in rules.items():
        assert rule.update_after + rule.update_freq <= steps
        assert len(rule.buffer_keys) <= copies
        assert eval(name, {kind.__name__: kind for kind in KINDS}) == rule


@pytest.mark.parametrize(
    "change, message",
    [
        ({"curvature_min": 0.0}, "curvature_min"),
        ({"curvature_max": math.nan}, "curvature_max"),
        ({"curvature_max": 0.01}, "below curvature_min"),
        ({"noise": -1.0}, "noise"),
        ({"distance": math.inf}, "distance"),
        ({"steps": 0}, "steps"),
        ({"lr": 3.0}, "diverges from 2"),
    ],
)
def test_impossible_problems_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        AveragingProblem(**{**vars(PROBLEM), **change})


def test_bad_questions_are_refused():
    with pytest.raises(ValueError, match=r"at=151; steps must lie in \[1, 150\]"):
        risk_curve(PROBLEM, None, [100, 151])
    with pytest.raises(ValueError, match="at=-1; it must be an integer >= 1"):
        risk_curve(PROBLEM, EMA(half_life=20), [-1])
    with pytest.raises(ValueError, match="measure='risk'"):
        choose(PROBLEM, measure="risk")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="update_freq"):
        choose(PROBLEM, {"never": BEMA.paper(update_freq=400)})
    with pytest.raises(ValueError, match="gives no update in 150 steps"):
        choose(PROBLEM, update_freq=151)
    with pytest.raises(ValueError, match="copies"):
        choose(PROBLEM, copies=0)
