"""Widths as shares of the run mean the same average at every length; averages are learning-rate schedules."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from lagless import BEMA, DEMA, EMA, OUEMA, Averager, DecayAverage, equivalent_schedule, mean_age, trajectory_weights
from lagless.rules import rescaled, rule_from_dict, rule_to_dict, schedule_of, weights_of

FRACTIONS = st.floats(0.02, 0.6)
SCALE_FREE = {
    "ema": lambda f, c, freq: EMA(half_life_fraction=f, update_freq=freq),
    "bema, start": lambda f, c, freq: BEMA(half_life_fraction=f, correction=c, anchor="start", update_freq=freq),
    "bema, slow": lambda f, c, freq: BEMA(half_life_fraction=f, correction=c, update_freq=freq),
    "bema, own anchor": lambda f, c, freq: BEMA(half_life_fraction=f, correction=c, anchor=2.5 * f, update_freq=freq),
    "ouema": lambda f, c, freq: OUEMA(half_life_fraction=f, correction=c, update_freq=freq),
    "dema": lambda f, c, freq: DEMA(half_life_fraction=f, update_freq=freq),
}


@pytest.mark.parametrize("make", SCALE_FREE.values(), ids=SCALE_FREE)
@settings(max_examples=25, deadline=None)
@given(f=FRACTIONS, c=st.floats(0.0, 1.0))
def test_the_same_weights_over_the_run_at_any_length(make, f, c):
    short, long = (np.cumsum(trajectory_weights(make(f, c, 1), range(T + 1))) for T in (300, 3000))
    # The share of the weight up to u differs by what one gap of the shorter grid holds: its density is at most p.
    density = (1.0 + 2.0 * c * 3.0) * np.log(2.0) / f
    assert np.abs(short - long[::10]).max() <= 3.0 * density / 300


@pytest.mark.parametrize("anchor", ["start", "slow", 0.9])
@settings(max_examples=25, deadline=None)
@given(f=FRACTIONS, c=st.floats(0.0, 1.0))
def test_correction_is_the_share_of_the_lag_that_is_removed(anchor, f, c):
    T, p = 20_000, np.log(2.0) / f
    rules = [BEMA(half_life_fraction=f, correction=c, anchor=anchor)]
    rules += [OUEMA(half_life_fraction=f, correction=c)] if anchor == "start" else []
    for rule in rules:
        weights = trajectory_weights(rule, range(T + 1))
        assert mean_age(weights, range(T + 1)) / T == pytest.approx((1.0 - c) / (p + 1.0), abs=3.0 / T)
        if anchor != "start":
            assert abs(weights[0]) < 1e-2 * (1 + c)


def test_full_correction_is_exact_on_a_linear_drift():
    weights = trajectory_weights(BEMA(half_life_fraction=0.2, correction=1.0), range(5001))
    assert weights @ np.arange(5001) == pytest.approx(5000, rel=1e-3)


def test_no_correction_is_the_ema():
    for kind in (BEMA, OUEMA):
        weights = trajectory_weights(kind(half_life_fraction=0.2, correction=0.0), range(200))
        np.testing.assert_allclose(weights, trajectory_weights(EMA(half_life_fraction=0.2), range(200)), atol=1e-15)


def test_a_scale_free_bema_shares_the_buffer_of_its_ema():
    weights = {"w": torch.zeros(3)}
    averager = Averager(weights, {"bema": BEMA(half_life_fraction=0.1), "ema": EMA(half_life_fraction=0.1)})
    assert len(averager.state_dict()["tensors"]) == 2


PAPER = {
    "bema": BEMA.paper(update_freq=40),
    "bema, offline": BEMA.paper(update_freq=40, form="offline", lag=0.0),
    "ouema": OUEMA.paper(update_freq=40, update_after=80),
    "ema": EMA(update_freq=40),
    "dema": DEMA.paper(update_freq=40),
}


@pytest.mark.parametrize("factor", [2, 4, 8, 40])
@pytest.mark.parametrize("name", ["bema", "ouema", "ema", "dema"])
def test_rescaled_paper_forms_are_the_same_average(name, factor):
    rule = PAPER[name]
    whole = trajectory_weights(rule, range(0, 801, 40))
    twin = rescaled(rule, factor)
    np.testing.assert_allclose(trajectory_weights(twin, range(0, 800 // factor + 1, 40 // factor)), whole, atol=1e-12)


def test_what_cannot_be_rescaled():
    with pytest.raises(ValueError, match="update_freq=40 divided by 3 is 13.3333, no whole number of steps"):
        rescaled(BEMA.paper(update_freq=40), 3)
    with pytest.raises(ValueError, match="need no rescaling"):
        rescaled(BEMA(), 2)


@pytest.mark.parametrize("kind", [BEMA, OUEMA, DEMA])
def test_the_clocks_do_not_mix(kind):
    assert kind(ema_power=0.5) == kind.paper()
    with pytest.raises(ValueError, match="half_life_fraction and ema_power belong to different clocks"):
        kind(half_life_fraction=0.1, ema_power=0.5)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: BEMA(half_life_fraction=1.0), "half_life_fraction=1.0"),
        (lambda: BEMA(half_life_fraction=0.0), "half_life_fraction=0.0"),
        (lambda: BEMA(correction=1.5), "correction=1.5"),
        (lambda: BEMA(correction=float("nan")), "correction=nan"),
        (lambda: BEMA(anchor="theta"), "anchor='theta'"),
        (lambda: BEMA(half_life_fraction=0.2, anchor=0.2), "anchor"),
        (lambda: OUEMA(correction=-0.1), "correction=-0.1"),
        (lambda: DEMA(half_life_fraction=2.0), "half_life_fraction=2.0"),
        (lambda: DecayAverage(total_steps=100, duration=0.0), "duration=0.0; it must be a fraction of the run"),
        (lambda: DecayAverage(total_steps=100, duration=101), "duration=101"),
        (lambda: DecayAverage(total_steps=100, duration=True), "duration=True"),
        (lambda: DecayAverage(total_steps=0), "total_steps=0"),
        (lambda: DecayAverage(total_steps=100, shape="square"), "shape='square'"),
        (lambda: DecayAverage(total_steps=100, shape=(1.0, 0.4, 0.6)), "never rise"),
        (lambda: DecayAverage(total_steps=100, shape=lambda u: 0.5 - u), "begin at 1"),
    ],
)
def test_bad_settings(make, message):
    with pytest.raises(ValueError, match=message):
        make()


RULES = st.sampled_from(
    [
        BEMA(),
        BEMA(anchor="start", correction=0.3, update_after=5),
        OUEMA(update_freq=3),
        DEMA(),
        BEMA.paper(update_freq=4),
        DecayAverage(total_steps=60, duration=0.5, shape="cosine"),
        DecayAverage(total_steps=60, duration=20, shape="minus-sqrt", update_freq=3),
        DecayAverage(total_steps=60, duration=0.4, shape=(1.0, 0.5, 0.25, 0.1)),
    ]
)


@settings(max_examples=60, deadline=None)
@given(rule=RULES, T=st.integers(60, 90))
def test_streaming_is_the_weights_and_their_schedule(rule, T):
    generator = torch.Generator().manual_seed(T)
    path = torch.randn(T + 1, 3, generator=generator, dtype=torch.float64).cumsum(0)
    weights = {"w": path[0].clone()}
    averager = Averager(weights, rule)
    for theta in path[1:]:
        weights["w"].copy_(theta)
        averager.update()
    expected = trajectory_weights(rule, range(T + 1))
    assert expected.sum() == pytest.approx(1.0, abs=1e-12)
    torch.testing.assert_close(averager.read()["w"], torch.from_numpy(expected) @ path, rtol=1e-9, atol=1e-9)
    multipliers = equivalent_schedule(rule, range(T + 1))
    np.testing.assert_allclose(weights_of(multipliers), expected, atol=1e-12)
    moved = path[0] + torch.from_numpy(multipliers[1:]) @ path.diff(dim=0)
    torch.testing.assert_close(averager.read()["w"], moved, rtol=1e-9, atol=1e-9)
    assert rule_from_dict(rule_to_dict(rule)) == rule


@pytest.mark.parametrize("shape", ["linear", "minus-sqrt", "cosine", "exponential"])
@pytest.mark.parametrize("freq", [1, 5])
def test_a_decay_average_is_its_decay(shape, freq):
    rule = DecayAverage(shape=shape, duration=0.5, total_steps=200, update_freq=freq)
    multipliers = equivalent_schedule(rule, range(0, 201, freq))
    u = (np.arange(0, 201, freq) - freq - 100) / 100  # a change is made at the rate of its begin
    formula = {
        "linear": lambda u: 1 - u,
        "minus-sqrt": lambda u: 1 - np.sqrt(u),
        "cosine": lambda u: (1 + np.cos(np.pi * u)) / 2,
        "exponential": lambda u: (np.exp(-5 * u) - np.exp(-5)) / (1 - np.exp(-5)),
    }[shape]
    np.testing.assert_allclose(multipliers, np.where(u <= 0, 1.0, formula(np.clip(u, 0.0, 1.0))), atol=1e-12)


def test_a_finished_decay_average_rests():
    rule = DecayAverage(duration=10, total_steps=20)
    weights = trajectory_weights(rule, range(31), at=25)
    np.testing.assert_allclose(weights[11:21], 0.1)
    assert weights[21:].sum() == 0.0


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-2.0, 2.0), min_size=1, max_size=30))
def test_weights_and_schedules_invert_each_other(values):
    weights = np.array(values)
    np.testing.assert_allclose(weights_of(schedule_of(weights)), weights, atol=1e-12)
