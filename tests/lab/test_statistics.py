import math

import numpy as np
import pytest
from scipy import stats

from lagless.lab.statistics import Mean, Verdict, holm, mean, paired_difference, verdict


def test_mean_and_standard_error_by_hand():
    m = mean([1.0, 2.0, 3.0, 6.0])
    assert (m.value, m.n) == (3.0, 4)
    assert m.standard_error == pytest.approx(math.sqrt((4 + 1 + 0 + 9) / 3) / 2)
    low, high = m.interval()
    assert (high - 3.0) / m.standard_error == pytest.approx(3.18244630)  # t of 3 degrees of freedom, from a table
    assert 3.0 - low == pytest.approx(high - 3.0)


def test_p_value_is_that_of_the_t_test():
    a, b = np.random.default_rng(0).normal(size=(2, 7))
    difference = paired_difference(dict(enumerate(a)), dict(enumerate(b)))
    assert difference.p_value == pytest.approx(stats.ttest_rel(a, b).pvalue, rel=1e-12)


@pytest.mark.parametrize("n", [3, 5])
def test_intervals_cover_as_often_as_they_say(n):
    """z-bound 4: the coverage of 20,000 intervals lies within .95 ± 4 sqrt(.95 .05 / 20,000)."""
    draws = np.random.default_rng(n).normal(1.5, 2.0, size=(20_000, n))
    covered = np.mean([low <= 1.5 <= high for low, high in (mean(row).interval() for row in draws)])
    assert abs(covered - 0.95) < 4 * math.sqrt(0.95 * 0.05 / 20_000)


def test_pairing_removes_what_seeds_share():
    rng = np.random.default_rng(0)
    shared, noise = rng.normal(0, 10, size=8), rng.normal(0, 0.01, size=8)
    difference = paired_difference(dict(enumerate(shared + 0.1 + noise)), dict(enumerate(shared)))
    assert difference.standard_error < 0.01
    assert verdict(difference, claimed=1) is Verdict.REPRODUCED


def test_holm_keeps_the_chance_of_any_false_rejection():
    """z-bound 4 on a rate of at most .05 over 10,000 studies of 5 true null hypotheses."""
    p_values = np.random.default_rng(0).uniform(size=(10_000, 5))
    any_rejected = np.mean([min(holm(list(row))) < 0.05 for row in p_values])
    exact = 1 - (1 - 0.05 / 5) ** 5
    assert abs(any_rejected - exact) < 4 * math.sqrt(exact * (1 - exact) / 10_000)


def test_holm_equals_its_definition():
    assert holm([0.04, 0.01, 0.9, 0.02]) == pytest.approx([0.08, 0.04, 0.9, 0.06])
    assert holm([]) == []


@pytest.mark.parametrize(
    ("difference", "claimed", "p_value", "expected"),
    [
        (Mean(-1.0, 0.1, 5), -1, None, Verdict.REPRODUCED),
        (Mean(-1.0, 0.1, 5), +1, None, Verdict.CONTRADICTED),
        (Mean(-1.0, 0.9, 5), -1, None, Verdict.NOT_SEEN),
        (Mean(-1.0, 0.1, 5), -1, 0.2, Verdict.NOT_SEEN),
        (Mean(-1.0, float("nan"), 1), -1, None, Verdict.NOT_SEEN),
        (Mean(0.0, 0.0, 3), -1, None, Verdict.NOT_SEEN),
    ],
)
def test_verdicts(difference, claimed, p_value, expected):
    assert verdict(difference, claimed=claimed, p_value=p_value) is expected


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: mean([]), "at least one"),
        (lambda: mean([1.0, float("nan")]), "diverged"),
        (lambda: paired_difference({0: 1.0, 1: 1.0}, {0: 1.0, 2: 1.0}), "same seeds"),
        (lambda: verdict(Mean(1.0, 1.0, 2), claimed=0), "claimed=0"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_one_run_says_nothing_about_spread():
    m = mean([2.0])
    assert math.isnan(m.standard_error) and m.interval() == (-math.inf, math.inf) and m.p_value == 1.0
