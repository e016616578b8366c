"""What is said of averages that are not what one may expect, and that nothing is said of the others."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from lagless import BEMA, DEMA, EMA, OUEMA, PowerEMA, UniformAverage, WindowAverage, effective_iterates
from lagless.rules import (
    _notes as notes,
    anchor,
    default_rule,
    rate_note,
    run_notes,
    spread_note,
    start_note,
    trajectory_weights,
)

RULES = [
    default_rule(),
    EMA(decay=0.3),
    EMA(decay=0.999),
    EMA(ema_power=0.9, multiplier=2.0),
    BEMA(),
    BEMA(correction=1.0, anchor="start"),
    BEMA.paper(),
    BEMA.paper(update_freq=1, bias_power=0.0),
    BEMA.paper(update_freq=10, update_after=40),
    OUEMA(correction=1.0),
    OUEMA.paper(update_freq=7),
    DEMA(),
    DEMA.paper(update_freq=3),
    PowerEMA(relative_width=0.1),
    UniformAverage(update_after=25),
    WindowAverage(window=2),
    WindowAverage(window=20, update_freq=5),
]


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(RULES), st.integers(0, 60), st.integers(1, 900))
def test_notes_are_those_of_the_weights_of_the_run(rule, start, more):
    end = max(start, rule.update_after) + rule.update_freq + more
    steps = range(start, end + 1)
    found, effective = anchor(rule, steps), effective_iterates(trajectory_weights(rule, steps))
    beginning = start_note(rule, found, end)
    spread = spread_note(rule, effective, end - found.step)
    judged = end - found.step >= 10 and (effective < 1.0 or not beginning)
    near = min(abs(abs(found.weight) - 0.2), abs(effective - 1.0), abs(effective - min(3.0, (end - found.step) / 10)))
    if near > 0.02:  # run_notes neglects updates of little weight
        kinds = [note is not None for note in (beginning, spread if judged else None)]
        assert len(run_notes(rule, end, start)) == sum(kinds)
        assert not beginning or run_notes(rule, end, start)[0].split(" after ")[0] == beginning.split(" after ")[0]


@pytest.mark.parametrize("rule", [r for r in RULES if r.update_after == 0], ids=str)
def test_updates_taken_together_are_judged_as_one_by_one(rule, monkeypatch):
    exact = run_notes(rule, 4000)
    monkeypatch.setattr(notes, "_EXACT_UPDATES", 40)
    assert run_notes(rule, 4000) == exact


@given(st.integers(1, 3000))
@settings(deadline=None, max_examples=40)
def test_nothing_is_said_of_the_default_rule_at_any_length(steps):
    assert run_notes(default_rule(), steps) == run_notes(BEMA(), steps) == []


@pytest.mark.parametrize(
    "rule, steps, said",
    [
        (EMA(decay=0.9999), 2000, r"leaves 82% of its weight on θ_0 after 2,000 steps.*half_life_fraction=0.05"),
        (BEMA.paper(), 400, r"leaves 65% .*a smaller update_freq\.$"),
        (EMA(decay=0.3), 2000, r"EMA\(decay=0.3\) amounts to 1.9 of 2,000 iterates .*half_life_fraction=0.05"),
        (WindowAverage(window=2), 500, "amounts to 2.0 of 500 iterates"),
        (BEMA.paper(update_freq=1, bias_power=0.0), 500, r"sum to \d\.\d\d, more than 1: .* larger bias_power"),
    ],
)
def test_what_is_said(rule, steps, said):
    assert any(re.search(said, note) for note in run_notes(rule, steps)), run_notes(rule, steps)


def test_weights_that_were_given_are_told_to_be_noisy_and_nothing_else():
    assert "sum to 2.50, more than 1" in str(spread_note(None, 0.4, 10))
    assert spread_note(None, 1.2, 100) is None


@pytest.mark.parametrize("share, told", [(0.0, True), (0.0999, True), (0.1, False), (1.0, False), (np.nan, False)])
def test_a_rate_below_a_tenth_of_its_peak_is_told(share, told):
    note = rate_note(share)
    assert (note is not None) == told
    assert note is None or f"ends at {share:.0%} of its peak" in note
