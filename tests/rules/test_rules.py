"""Rules against published vectors, closed forms and limits."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, strategies as st

import lagless
from lagless import (
    BEMA,
    DEMA,
    EMA,
    OUEMA,
    PowerEMA,
    UniformAverage,
    WarmupEMA,
    WindowAverage,
    mean_age,
    trajectory_weights,
)
from lagless.rules import Tick, named_rules, rule_from_dict, rule_to_dict
from lagless.rules._gains import PowerSchedule
from lagless.testing import RULE_CHECKS

VECTORS = json.loads((Path(__file__).parent / "averaging_vectors.json").read_text())
THETA = np.array(VECTORS["theta"])

RULES = [
    EMA(),
    EMA(update_freq=4, min_ema_multiplier=0.2),
    EMA(decay=0.9, update_after=3),
    EMA(half_life=6.0, update_freq=5),
    EMA(half_life_fraction=0.1, update_freq=3, update_after=2),
    BEMA.paper(update_freq=1),
    BEMA.paper(update_freq=7, update_after=5),
    BEMA.paper(update_freq=3, update_after=4, form="trl"),
    BEMA.paper(update_freq=3, update_after=4, form="offline", min_ema_multiplier=1e-4),
    BEMA.paper(update_freq=3, form="online"),
    BEMA.paper(ema_power=0.0, update_freq=2),
    OUEMA.paper(update_freq=3, update_after=2),
    DEMA.paper(update_freq=3, update_after=2),
    UniformAverage(update_freq=2, update_after=3),
    PowerEMA(relative_width=0.1, update_freq=4, update_after=3),
    WindowAverage(window=3, update_freq=2, update_after=1),
    WarmupEMA(update_freq=2, update_after=3),
    WarmupEMA(warmup="inverse_gamma", decay=0.8, min_decay=0.3),
    WarmupEMA(warmup="ramp", tau=5.0, update_freq=3),
    WarmupEMA(warmup="none", decay=0.9, update_after=2),
]


@pytest.mark.parametrize("check", RULE_CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_conformance(rule, check):
    check(rule)


@pytest.mark.parametrize("case", VECTORS["cases"], ids=lambda c: f"{c['rule']}-{c['args']}")
def test_published_vectors(case):
    kind = getattr(lagless, case["rule"])
    rule = getattr(kind, "paper", kind)(**case["args"])
    steps, latest = range(len(THETA)), 0
    for step, expected in enumerate(case["read_at_last_update"], start=1):
        if rule.schedule.updates(step) or rule.schedule.follows(step):
            latest = step
        weights = trajectory_weights(rule, steps, at=latest)
        np.testing.assert_allclose(weights @ THETA, expected, rtol=0, atol=1e-14)


def test_bema_weights_by_hand():
    # κ = 1, ρ = 0: β_t = 1/t, so ema is the mean of the iterates; α_2 = 2^-½.
    weights = trajectory_weights(BEMA.paper(ema_power=1.0, bias_power=0.5, lag=0.0, update_freq=1), [0, 1, 2])
    alpha = 2**-0.5
    np.testing.assert_allclose(weights, [-alpha, 0.5, 0.5 + alpha], atol=1e-15)


def test_bema_without_ema_is_an_extrapolation():
    # κ = 0: (1 + α) θ_t - α θ_0
    weights = trajectory_weights(BEMA.paper(ema_power=0.0, bias_power=0.4, update_freq=1), range(6))
    alpha = (10 + 5) ** -0.4
    np.testing.assert_allclose(weights, [-alpha, 0, 0, 0, 0, 1 + alpha], atol=1e-15)


def test_infinite_bias_power_is_the_ema():
    steps = range(50)
    ema = trajectory_weights(EMA(), steps)
    for rule in (BEMA.paper(bias_power=math.inf, update_freq=1), OUEMA.paper(bias_power=math.inf, update_freq=1)):
        assert np.array_equal(trajectory_weights(rule, steps), ema)
    assert BEMA.paper(bias_power=math.inf, lag=0.0, update_freq=1).read(Tick(1, 0, 1)).live == 0.0


def test_dema_is_twice_ema_minus_ema_of_ema():
    beta, steps = 0.25, range(4)
    rule = DEMA.paper(ema_power=0.5, lag=16.0, multiplier=0.0, update_freq=1)
    first = [(1 - beta) ** 3, beta * (1 - beta) ** 2, beta * (1 - beta), beta]
    # e2 after three steps: weights of e1 at steps 1, 2, 3 with the same gains, e1_0 = e2_0 = θ_0.
    e1 = np.zeros((4, 4))
    e1[0, 0] = 1
    for t in (1, 2, 3):
        e1[t] = (1 - beta) * e1[t - 1] + beta * np.eye(4)[t]
    second = np.array(first) @ e1
    np.testing.assert_allclose(trajectory_weights(rule, steps), 2 * e1[3] - second, atol=1e-15)


@given(decay=st.floats(0.1, 0.99), drift=st.floats(-2, 2), n=st.integers(2, 300))
def test_lag_of_an_ema_on_a_linear_drift(decay, drift, n):
    steps = np.arange(n + 1)
    weights = trajectory_weights(EMA(decay=decay), steps)
    lag = drift * n - weights @ (drift * steps)
    closed = decay / (1 - decay) * (1 - decay**n)  # Σ_i w_i (n - i) for w_i = (1-d) d^(n-i), w_0 = d^n
    assert lag == pytest.approx(drift * mean_age(weights, steps), rel=1e-9, abs=1e-9)
    assert mean_age(weights, steps) == pytest.approx(closed, rel=1e-9)


@pytest.mark.parametrize("phi", [1, 2, 5, 20])
def test_half_life_is_the_same_for_any_update_freq(phi):
    weights = trajectory_weights(EMA(half_life=20.0, update_freq=phi), range(101))
    assert weights[0] == pytest.approx(2 ** (-100 / 20), rel=1e-12)


@pytest.mark.parametrize("phi", [1, 7, 100])
@pytest.mark.parametrize("width", [0.05, 0.1, 0.2, 12**-0.5])
def test_power_ema_realises_its_relative_width(width, phi):
    total = 70_000
    steps = np.arange(0, total + 1, phi)
    weights = trajectory_weights(PowerEMA(relative_width=width, update_freq=phi), steps)
    mean = weights @ steps
    realised = math.sqrt(weights @ (steps - mean) ** 2) / total
    assert realised == pytest.approx(width, rel=5 * phi / total + 1e-4)
    assert weights[0] == pytest.approx(0.0, abs=1e-12)


def test_power_ema_is_the_published_recursion():
    s, ema = PowerEMA(relative_width=0.15).exponent, np.eye(31)[0]
    for t in range(1, 31):
        beta = 1 - (1 - 1 / t) ** (s + 1)
        ema = (1 - beta) * ema + beta * np.eye(31)[t]
    np.testing.assert_allclose(trajectory_weights(PowerEMA(relative_width=0.15), range(31)), ema, atol=1e-14)


def test_power_ema_counts_from_the_end_of_burn_in():
    # Weights proportional to (t - τ)^s, exactly so in the limit of many steps.
    rule = PowerEMA(relative_width=0.15, update_after=1000)
    weights = trajectory_weights(rule, range(3001))
    profile = (np.arange(1, 2001) / 2000) ** (rule.exponent + 1) - (np.arange(0, 2000) / 2000) ** (rule.exponent + 1)
    np.testing.assert_allclose(weights[1001:], profile, atol=1e-12)
    assert not weights[:1001].any()


def test_uniform_averages():
    np.testing.assert_allclose(trajectory_weights(UniformAverage(), range(8)), np.full(8, 1 / 8), atol=1e-15)
    uniform = EMA(ema_power=1.0, lag=1.0)
    np.testing.assert_allclose(trajectory_weights(uniform, range(8)), np.full(8, 1 / 8), atol=1e-15)
    np.testing.assert_allclose(trajectory_weights(UniformAverage(update_after=3), range(8)), [0] * 3 + [0.2] * 5)


def test_window():
    assert trajectory_weights(WindowAverage(window=3), range(6)).tolist() == [0, 0, 0, 1 / 3, 1 / 3, 1 / 3]
    assert trajectory_weights(WindowAverage(window=3), range(3)).tolist() == [0, 0.5, 0.5]
    off_step = trajectory_weights(WindowAverage(window=2, update_freq=2), range(6))
    assert off_step.tolist() == [0, 0, 0, 0, 0.5, 0.5]


def test_half_life_fraction_is_near_torchtitans_to_first_order():
    fraction, t, delta = 0.05, 10_000, 10
    beta = EMA(half_life_fraction=fraction, update_freq=delta).update(Tick(t, t - delta, t // delta)).live[0]
    assert beta == pytest.approx(1 - 2 ** (-delta / (fraction * t)), rel=delta / t)


def test_forms_of_bema():
    t, tau, rho, gamma = 50, 20, 7.0, 0.5
    offline, online, trl = (PowerSchedule(gamma, rho, tau, form) for form in ("offline", "online", "trl"))
    assert offline.beta(t, 0.3) == (1 + gamma * (t - tau + rho)) ** -0.3
    assert offline.alpha(t, 0.2) == (1 + (t - tau + rho)) ** -0.2
    assert online.beta(t, 0.3) == gamma * (1 + t - rho) ** -0.3
    assert online.alpha(t, 0.2) == gamma * (1 + t - rho) ** -0.2
    assert trl.beta(t, 0.3) == (rho + gamma * t) ** -0.3
    # At τ = 0, γ = 1 the offline form is Algorithm 1 with ρ + 1.
    steps = range(30)
    a = trajectory_weights(BEMA.paper(update_freq=1, lag=3, form="offline"), steps)
    b = trajectory_weights(BEMA.paper(update_freq=1, lag=4), steps)
    np.testing.assert_allclose(a, b, atol=1e-15)
    # TRL's average stays at the initial weights during burn-in, the paper's follows the live ones.
    assert trajectory_weights(BEMA.paper(update_after=9, form="trl"), steps, at=9)[9] == 1.0
    assert trajectory_weights(BEMA.paper(update_after=9), steps, at=5)[5] == 1.0
    with pytest.raises(ValueError, match="rests until its burn-in ends, at step 9"):
        trajectory_weights(BEMA.paper(update_after=9, form="trl"), steps, at=5)


BAD = [
    (lambda: EMA(decay=1.0), r"decay=1.0; it must be a number >= 0, < 1"),
    (lambda: EMA(decay=math.nan), "decay=nan"),
    (lambda: EMA(half_life=0.0), "half_life=0.0"),
    (lambda: EMA(half_life_fraction=1.5), "half_life_fraction=1.5"),
    (lambda: EMA(decay=0.9, half_life=3.0), "decay and half_life each set"),
    (lambda: EMA(decay=0.9, ema_power=0.2), "decay and ema_power each set"),
    (lambda: EMA(ema_power=-0.5), "ema_power=-0.5; it must be a finite number >= 0"),
    (lambda: EMA(ema_power="half"), "ema_power='half'"),
    (lambda: EMA(lag=-1.0), "lag=-1.0"),
    (lambda: EMA(lag=0.0, multiplier=0.0), r"β must lie in \(0, 1\]"),
    (lambda: EMA(lag=0.0, multiplier=0.1), r"β = 3.16228 at the first update \(step 1\); β must lie in \(0, 1\]"),
    (lambda: EMA(min_ema_multiplier=1.5), "min_ema_multiplier=1.5"),
    (lambda: EMA(update_freq=0), "update_freq=0; it must be an integer >= 1"),
    (lambda: EMA(update_freq=2.0), "update_freq=2.0"),
    (lambda: EMA(update_freq=True), "update_freq=True"),
    (lambda: EMA(update_after=-1), "update_after=-1"),
    (lambda: BEMA.paper(bias_power=-0.1), "bias_power=-0.1"),
    (lambda: BEMA.paper(bias_power=math.nan), "bias_power=nan"),
    (lambda: BEMA.paper(multiplier=math.inf), "multiplier=inf"),
    (lambda: BEMA.paper(form="paper"), "form='paper'; it must be one of 'algorithm_1', 'trl', 'offline', 'online'"),
    (
        lambda: BEMA.paper(form="online", multiplier=2.0, lag=500),
        r"β must lie in \(0, 1\]. Choose a multiplier of at most 1",
    ),
    (lambda: BEMA.paper(form="online", update_after=3), "that form has no burn-in, use 0"),
    (lambda: BEMA.paper(ema_power=0, lag=0, multiplier=1e-6, update_freq=1), r"α = 15.8489 .*α must lie in \[0, 1\]"),
    (lambda: EMA(ema_power=1000), "Choose a smaller ema_power"),
    (lambda: OUEMA.paper(bias_power=0.0), "bias_power=0.0; it must be a number > 0"),
    (lambda: OUEMA.paper(multiplier=0.0), "multiplier=0.0"),
    (lambda: DEMA.paper(lag=math.nan), "lag=nan"),
    (lambda: PowerEMA(relative_width=0.0), "relative_width=0.0"),
    (lambda: PowerEMA(relative_width=0.3), "relative_width=0.3"),
    (lambda: WindowAverage(window=0), "window=0"),
    (lambda: UniformAverage(update_freq="1"), "update_freq='1'"),
]


@pytest.mark.parametrize("make, message", BAD, ids=[message for _, message in BAD])
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("rule", RULES + [BEMA.paper(bias_power=math.inf)], ids=str)
def test_json_round_trip(rule):
    assert rule_from_dict(json.loads(json.dumps(rule_to_dict(rule), allow_nan=False))) == rule


def test_json_of_something_else():
    with pytest.raises(ValueError, match="unknown rule 'SWA'; known: BEMA, OUEMA, DecayAverage, EMA"):
        rule_from_dict({"rule": "SWA"})
    with pytest.raises(ValueError, match="EMA has no argument alpha"):
        rule_from_dict({"rule": "EMA", "alpha": 1})


@pytest.mark.parametrize("given", [[EMA()], (EMA(),), EMA, "bema", {1: EMA()}, {"ema": "ema"}, {"ema": EMA}], ids=repr)
def test_what_is_no_rule_nor_rules_by_name(given):
    with pytest.raises(TypeError, match="give one rule, e.g. EMA"):
        named_rules(given)


def test_rules_by_name():
    assert named_rules(EMA(decay=0.9)) == {"ema": EMA(decay=0.9)}
    assert named_rules(None) == {"ema": EMA(half_life_fraction=0.05)}
    assert named_rules({"a": BEMA.paper()}) == {"a": BEMA.paper()}
    with pytest.raises(ValueError, match="rules is empty"):
        named_rules({})


@pytest.mark.parametrize("rule", [EMA, BEMA, OUEMA, DEMA, UniformAverage, PowerEMA, WindowAverage])
def test_hyperparameters_are_given_by_name(rule):
    """EMA(0.999) would be a power of 0.999, not a decay."""
    with pytest.raises(TypeError, match="have names"):
        rule(0.999)
