"""Weights over a trajectory, what they say, and reconstruction from stored averages."""

import math

import numpy as np
import pytest
from hypothesis import given, strategies as st

from lagless import (
    BEMA,
    DEMA,
    EMA,
    OUEMA,
    PowerEMA,
    UniformAverage,
    WindowAverage,
    anchor,
    count_updates,
    effective_iterates,
    mean_age,
    reconstruct,
    trajectory_weights,
    weight_on_start,
)
from lagless.rules import Anchor, common_update_freq, require_updates, run_anchor, run_note, start_note, ticks

RULES_OF_ALL_KINDS = (
    lambda after, freq: BEMA.paper(update_after=after, update_freq=freq),
    lambda after, freq: BEMA.paper(update_after=after, update_freq=freq, form="trl"),
    lambda after, freq: OUEMA.paper(update_after=after, update_freq=freq),
    lambda after, freq: DEMA.paper(update_after=after, update_freq=freq),
    lambda after, freq: EMA(update_after=after, update_freq=freq, decay=0.95),
    lambda after, freq: EMA(update_after=after, update_freq=freq, half_life_fraction=0.05),
    lambda after, freq: PowerEMA(update_after=after, update_freq=freq),
    lambda after, freq: UniformAverage(update_after=after, update_freq=freq),
    lambda after, freq: WindowAverage(update_after=after, update_freq=freq, window=3),
)


def forward_weights(rule, steps):
    """The definition: the recursion run forwards on unit vectors."""
    buffers = np.zeros((len(rule.buffer_keys), len(steps)))
    buffers[:, 0] = 1.0
    due = {tick.step: tick for tick in ticks(rule, steps)}
    for i, step in enumerate(steps[1:], start=1):
        unit = np.eye(len(steps))[i]
        if rule.schedule.follows(step):
            buffers[:] = unit
        elif step in due:
            update = rule.update(due[step])
            buffers = np.array(update.matrix) @ buffers + np.outer(update.live, unit)
    read = rule.read(due[steps[-1]])
    return np.array(read.buffers) @ buffers + read.live * np.eye(len(steps))[-1]


@pytest.mark.parametrize("kind", [EMA, BEMA, OUEMA, DEMA, UniformAverage])
@given(
    gaps=st.lists(st.integers(1, 5), min_size=2, max_size=20),
    first=st.integers(0, 5),
    freq=st.integers(1, 3),
    after=st.integers(0, 10),
)
def test_adjoint_equals_forward_recursion(kind, gaps, first, freq, after):
    steps = [first, *(first + np.cumsum(gaps)).tolist()]
    rule = kind(update_freq=freq, update_after=after)
    updates = list(ticks(rule, steps))
    if not updates or updates[-1].step != steps[-1]:
        return
    np.testing.assert_allclose(trajectory_weights(rule, steps), forward_weights(rule, steps), atol=1e-12)


def test_burn_in_moves_the_start():
    weights = trajectory_weights(BEMA.paper(update_after=40, update_freq=20), [0, 20, 40, 60, 80])
    assert weights[0] == weights[1] == 0.0 and weights[2] < 1.0
    # No checkpoint at τ itself: the last one followed stands in.
    weights = trajectory_weights(BEMA.paper(update_after=50, update_freq=10), [0, 20, 40, 60, 80])
    assert weights[1] == 0.0 and weights[2] != 0.0


def test_reads_between_updates_count_the_tail():
    rule = EMA(decay=0.5, update_freq=10)
    weights = trajectory_weights(rule, [0, 10, 15])
    assert weights.tolist() == [0.25, 0.25, 0.5]
    assert trajectory_weights(rule, [0, 10, 15], at=10).tolist() == [0.5, 0.5, 0.0]


def test_no_update_is_refused_with_a_remedy():
    with pytest.raises(ValueError, match=r"BEMA updates every 400 steps.*not once among.*e\.g\. 25\."):
        trajectory_weights(BEMA.paper(), [0, 25, 50])
    with pytest.raises(
        ValueError, match="no update up to step 50 from step 0 on: its average would be the initial model"
    ):
        require_updates(BEMA.paper(), 50)
    require_updates(BEMA.paper(), 400)
    assert [count_updates(BEMA.paper(update_after=100), n) for n in (499, 500, 900)] == [0, 1, 2]


@pytest.mark.parametrize(
    "steps, at, message",
    [
        ([0, 5, 5], None, "strictly increasing; 5 is followed by 5"),
        ([0, 5, 3], None, "strictly increasing; 5 is followed by 3"),
        ([-1, 5], None, "must be >= 0"),
        ([], None, "non-empty"),
        ([0.0, 1.0], None, "integers"),
        ([[0, 1]], None, "1-D"),
        (np.array([0, 5, 3], dtype=np.uint32), None, "5 is followed by 3"),
        ([0, 1, 2], 7, "at=7 is not one of the steps 0, 1, 2"),
    ],
)
def test_bad_steps(steps, at, message):
    with pytest.raises(ValueError, match=message):
        trajectory_weights(EMA(), steps, at)


def test_diagnostics():
    weights, steps = [0.5, 0.25, 0.25], [0, 100, 200]
    assert mean_age(weights, steps) == 125.0
    assert mean_age(weights, steps, at=300) == 225.0
    assert effective_iterates(weights) == pytest.approx(1 / (0.25 + 2 * 0.0625))
    assert weight_on_start(weights) == 0.5
    assert common_update_freq([7, 100, 250], update_after=50) == 50
    assert common_update_freq([7]) == 1


def test_bema_trails_its_ema_by_alpha_times_the_distance():
    # μ̂ = α(θ_T - θ_0) + ema moves weight α from age T to age 0.
    steps, total = range(0, 10_001, 100), 10_000
    ema = mean_age(trajectory_weights(EMA(update_freq=100), steps), steps)
    bema = mean_age(trajectory_weights(BEMA.paper(update_freq=100), steps), steps)
    assert bema == pytest.approx(ema - (10 + total) ** -0.2 * total, rel=1e-12)


def test_reconstruction_is_exact_inside_the_span():
    steps = range(0, 201, 10)
    a, b = (trajectory_weights(EMA(decay=d, update_freq=10), steps) for d in (0.8, 0.9))
    result = reconstruct([a, b], 0.3 * a + 0.7 * b)
    np.testing.assert_allclose(result.coefficients, [0.3, 0.7], atol=1e-10)
    assert result.residual < 1e-12


def test_reconstruction_from_all_checkpoints_gives_the_weights():
    steps = [0, 10, 30, 60, 100]
    wanted = trajectory_weights(BEMA.paper(update_freq=10), steps)
    result = reconstruct(np.eye(5), wanted)
    np.testing.assert_allclose(result.coefficients, wanted, atol=1e-12)


def test_reconstruction_reports_its_residual_and_refuses():
    steps = range(0, 401, 4)
    stored = [trajectory_weights(EMA(half_life=h, update_freq=4), steps) for h in (10, 200)]
    wanted = trajectory_weights(EMA(half_life=45, update_freq=4), steps)
    with pytest.raises(ValueError, match="cannot express the wanted one: relative residual 0.[0-9]+, allowed 0.01"):
        reconstruct(stored, wanted, max_residual=0.01)
    with pytest.warns(UserWarning, match="relative residual of"):
        result = reconstruct(stored, wanted, max_residual=1.0)
    assert result.residual == pytest.approx(np.linalg.norm(result.weights - wanted) / np.linalg.norm(wanted), rel=1e-12)
    assert result.coefficients.sum() == pytest.approx(1.0)
    # No other affine combination comes nearer.
    for shift in (-0.01, 0.01):
        other = (result.coefficients + [shift, -shift]) @ np.array(stored)
        assert np.linalg.norm(other - wanted) > np.linalg.norm(result.weights - wanted)


def test_reconstruction_from_neighbouring_widths_is_refused_or_damped():
    # On paper the combination is exact; formed of float32 files it would be off by more than the weights themselves.
    steps = range(2001)
    stored = [trajectory_weights(EMA(half_life=h), steps) for h in range(100, 107)]
    wanted = trajectory_weights(EMA(half_life=150), steps)
    with pytest.raises(ValueError, match=r"up to [0-9.]+e\+08 .*allowed 1000. Pass a ridge"):
        reconstruct(stored, wanted)
    path = 1.0 + np.cumsum(np.random.default_rng(0).normal(size=(2001, 50)) * 0.01, axis=0)
    files = [(weights @ path).astype(np.float32).astype(np.float64) for weights in stored]

    def error(combination):
        return np.abs(sum(c * f for c, f in zip(combination.coefficients, files, strict=True)) - wanted @ path).max()

    exact = reconstruct(stored, wanted, max_amplification=math.inf)
    damped = reconstruct(stored, wanted, ridge=1e-4)
    assert exact.amplification == pytest.approx(np.abs(exact.coefficients).sum()) and exact.amplification > 1e8
    assert damped.amplification < 1000 and damped.residual < 0.02 and damped.coefficients.sum() == pytest.approx(1.0)
    assert error(damped) < 0.05 < 1.0 < error(exact)


def test_the_ridge_minimises_what_the_docstring_says():
    steps, ridge = range(0, 401, 4), 0.05
    stored = np.array([trajectory_weights(EMA(half_life=h, update_freq=4), steps) for h in (10, 30, 200)])
    wanted = trajectory_weights(EMA(half_life=45, update_freq=4), steps)

    def objective(x):
        return np.sum((x @ stored - wanted) ** 2) + ridge**2 * np.sum(wanted**2) * np.sum(x**2)

    best = reconstruct(stored, wanted, ridge=ridge, max_residual=math.inf, warn_residual=math.inf).coefficients
    for shift in ([1, -1, 0], [0, 1, -1], [-1, 1, 0], [1, 0, -1]):
        assert objective(best + 0.001 * np.array(shift)) > objective(best)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"max_amplification": 0.5}, "max_amplification=0.5; it must be at least 1"),
        ({"max_amplification": math.nan}, "max_amplification=nan"),
        ({"ridge": -1.0}, "ridge=-1.0; it must be >= 0"),
        ({"ridge": math.inf}, "ridge=inf"),
    ],
)
def test_bad_limits_of_reconstruction(options, message):
    with pytest.raises(ValueError, match=message):
        reconstruct([[1.0, 0.0]], [1.0, 0.0], **options)


@pytest.mark.parametrize(
    "stored, wanted, message",
    [
        ([[0.5, 0.5]], [1.0, 0.0, 0.0], "same steps"),
        ([[0.5, 0.6]], [1.0, 0.0], "stored row does not sum to 1"),
        ([[0.5, 0.5]], [0.9, 0.0], "wanted does not sum to 1"),
    ],
)
def test_bad_reconstruction(stored, wanted, message):
    with pytest.raises(ValueError, match=message):
        reconstruct(stored, wanted)
    with pytest.raises(ValueError, match="max_residual=nan"):
        reconstruct([[1.0, 0.0]], [1.0, 0.0], max_residual=float("nan"))


@given(
    st.sampled_from(RULES_OF_ALL_KINDS),
    st.integers(0, 40),
    st.integers(1, 30),
    st.integers(0, 50),
    st.integers(0, 120),
)
def test_the_anchor_is_the_last_iterate_of_burn_in_with_all_the_weight_not_on_updates(make, after, freq, start, more):
    rule = make(after, freq)
    end = max(after, start) + freq + more
    steps = range(start, end + 1)
    weights = trajectory_weights(rule, steps)
    found = anchor(rule, steps)
    assert found.step == max(after, start)
    updated = {tick.step for tick in ticks(rule, list(steps))} | {end}
    assert found.weight == pytest.approx(1.0 - sum(weights[s - start] for s in updated), abs=1e-9)
    assert run_anchor(rule, end, start) == (found.step, pytest.approx(found.weight, abs=1e-3))
    assert (run_note(rule, end, start) is None) == (start_note(rule, found, end) is None) or (
        abs(abs(found.weight) - 0.2) < 1e-3
    )


@pytest.mark.parametrize("steps, percent", [(400, "65%"), (7200, "53%"), (20000, "39%")])
def test_the_default_bema_is_reported_at_usual_lengths(steps, percent):
    note = run_note(BEMA.paper(), steps)
    assert note is not None and f"leaves {percent} of its weight on θ_0 after {steps:,} steps" in note
    assert "EMA(half_life_fraction=0.05)" in note
    assert run_note(EMA(half_life_fraction=0.05), steps) is None


@pytest.mark.parametrize("weight, said", [(0.21, "leaves 21%"), (0.2, None), (-0.2, None), (-0.21, "puts -21%")])
def test_a_note_is_made_beyond_a_fifth_of_the_weight_to_either_side(weight, said):
    note = start_note(BEMA.paper(), Anchor(0, weight), 1000)
    assert said is None if note is None else said in note
