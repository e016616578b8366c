import math

import numpy as np
import pytest
from scipy import stats

from lagless.lab.statistics import (
    Mean,
    Verdict,
    crossed_mean,
    edges,
    holm,
    mean,
    paired_difference,
    require_equal_resolution,
    verdict,
)


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


def draw(rng, seeds, documents, a, b, e):
    """Differences of seeds crossed with documents around 0, with the standard deviations of their three parts."""
    return (
        a * rng.normal(size=(seeds, 1)) + b * rng.normal(size=(1, documents)) + e * rng.normal(size=(seeds, documents))
    )


def test_crossed_mean_by_hand():
    m = crossed_mean([[1.0, 2.0, 6.0], [2.0, 3.0, 4.0]])
    # Means of seeds 3 and 3, of documents 1.5, 2.5, 5: A = 0, below E
    b, e = 2 * (1.5**2 + 0.5**2 + 2.0**2) / 2, 2 * (0.5**2 + 0.5**2 + 1.0**2) / 2
    assert (m.value, m.n, m.documents) == (3.0, 2, 3)
    assert m.standard_error == pytest.approx(math.sqrt(b / 6))
    assert m.degrees_of_freedom == pytest.approx(b**2 / (e**2 / 1 + b**2 / 2))
    m = crossed_mean([[1.0, 2.0, 6.0], [3.0, 4.0, 8.5]])
    # Means of seeds 3 and 31/6, of documents 2, 3, 7.25; what is left is ± 1/12, 1/12 and 1/6
    a, b = 3 * 2 * (13 / 12) ** 2, 2 * ((25 / 12) ** 2 + (13 / 12) ** 2 + (19 / 6) ** 2) / 2
    e = 2 * (1 / 144 + 1 / 144 + 1 / 36) / 2
    assert m.standard_error == pytest.approx(math.sqrt((a + b - e) / 6))
    assert m.degrees_of_freedom == pytest.approx((a + b - e) ** 2 / (a**2 / 1 + b**2 / 2))


def test_crossed_mean_is_the_students_interval_where_only_seeds_differ():
    by_seed = np.random.default_rng(0).normal(size=6)
    crossed, plain = crossed_mean(np.repeat(by_seed[:, None], 10, axis=1)), mean(by_seed.tolist())
    assert crossed.interval() == pytest.approx(plain.interval()) and crossed.p_value == pytest.approx(plain.p_value)


def test_one_seed_has_no_standard_error():
    m = crossed_mean([[1.0, 2.0, 3.0]])
    assert math.isnan(m.standard_error) and m.interval() == (-math.inf, math.inf) and m.p_value == 1.0


def test_crossed_mean_refuses_what_is_no_table():
    with pytest.raises(ValueError, match=r"shape \(3,\).*\(seeds, documents\)"):
        crossed_mean([1.0, 2.0, 3.0])
    with pytest.raises(ValueError, match="at least 2 documents"):
        crossed_mean([[1.0], [2.0]])
    with pytest.raises(ValueError, match="contains nan"):
        crossed_mean([[1.0, 2.0], [math.nan, 2.0]])


@pytest.mark.parametrize(
    ("seeds", "a", "b", "e", "coverage"),
    [
        (5, 1.0, 0.0, 0.0, 0.950),  # only seeds differ: Student's interval
        (5, 0.0, 1.0, 0.0, 0.951),  # only documents differ
        (5, 0.2, 0.5, 1.0, 0.959),
        (5, 0.5, 0.5, 0.5, 0.943),
        (5, 0.02, 0.5, 0.2, 0.952),
        (3, 0.3, 0.5, 1.0, 0.962),
        (5, 0.0, 0.0, 1.0, 0.997),  # neither differs: variances below 0 are cut off
    ],
)
def test_crossed_intervals_cover_at_least_as_often_as_they_say(seeds, a, b, e, coverage):
    """The coverage of 95 % intervals, simulated apart with 40,000 tables, again with 5,000; z-bound 4 of both."""
    rng = np.random.default_rng(7)
    intervals = (crossed_mean(draw(rng, seeds, 36, a, b, e)).interval() for _ in range(5_000))
    covered = np.mean([low <= 0.0 <= high for low, high in intervals])
    bound = 4 * math.sqrt(0.95 * 0.05 * (1 / 5_000 + 1 / 40_000))  # .013
    assert abs(covered - coverage) < bound and covered > 0.95 - bound


def test_intervals_over_seeds_alone_miss_what_documents_add():
    """Seeds see the same documents: the spread of their means says nothing of the spread of documents."""
    rng = np.random.default_rng(1)
    tables = [draw(rng, 5, 36, 0.02, 0.5, 0.2) for _ in range(1000)]
    plain = np.mean([low <= 0 <= high for low, high in (mean(table.mean(1).tolist()).interval() for table in tables)])
    crossed = np.mean([low <= 0 <= high for low, high in (crossed_mean(table).interval() for table in tables)])
    assert plain < 0.5  # .41
    assert crossed > 0.95 - 4 * math.sqrt(0.95 * 0.05 / 1000)  # .952


def test_crossed_variance_is_that_of_a_two_way_cluster_bootstrap():
    """Seeds and documents are drawn with replacement; the factors n/(n - 1) undo the bootstrap's own shrinkage."""
    rng = np.random.default_rng(2)
    seeds, documents = 30, 40
    table = draw(rng, seeds, documents, 0.5, 0.8, 0.3)
    means = [
        table[np.ix_(rng.integers(0, seeds, seeds), rng.integers(0, documents, documents))].mean()
        for _ in range(20_000)
    ]
    # Standard error of the ratio: 1/√(2 · 20,000) = .5 %; the factors are 3 % and the interaction about 1 %.
    assert np.std(means) == pytest.approx(crossed_mean(table).standard_error, rel=0.04)


def test_best_settings_at_an_edge_are_named():
    grid = {"kappa": [0.1, 0.2, 0.3], "eta": [0.2, 0.4, math.inf], "phi": [100]}
    assert edges({"kappa": 0.2, "eta": math.inf, "phi": 100}, grid) == ["eta"]
    assert edges({"kappa": 0.2, "eta": math.inf, "phi": 100}, grid, natural={"eta": [math.inf]}) == []
    assert edges({"kappa": 0.1, "eta": 0.2, "phi": 100}, grid, natural={"eta": [math.inf]}) == ["kappa", "eta"]
    with pytest.raises(ValueError, match=r"kappa=0.15 is not on its grid"):
        edges({"kappa": 0.15, "eta": 0.2, "phi": 100}, grid)


def test_grids_of_unequal_resolution_are_not_compared():
    require_equal_resolution({"kappa": [0.2, 0.1], "eta": [0.2]}, {"kappa": [0.1, 0.2]})
    with pytest.raises(ValueError, match=r"kappa is \[0.1, 0.2\] for the method and \[0.1, 0.15, 0.2\]"):
        require_equal_resolution({"kappa": [0.1, 0.2], "eta": [0.2]}, {"kappa": [0.1, 0.15, 0.2]})


@pytest.mark.parametrize(
    ("value", "error", "expected"),
    [
        (-0.010, 0.001, Verdict.REPRODUCED),
        (+0.010, 0.001, Verdict.CONTRADICTED),
        (-0.0015, 0.0001, Verdict.TOO_SMALL),  # counts, and is below the floor
        (+0.0001, 0.0003, Verdict.TOO_SMALL),  # does not count, and its interval lies within the floor
        (-0.010, 0.010, Verdict.NOT_SEEN),
        (-0.001, 0.002, Verdict.NOT_SEEN),  # may be larger than the floor
    ],
)
def test_differences_below_the_floor_do_not_matter(value, error, expected):
    assert verdict(Mean(value, error, 5, 36, 10.0), claimed=-1, floor=0.002) is expected


def test_a_negative_floor_is_refused():
    with pytest.raises(ValueError, match="floor=-0.1"):
        verdict(Mean(1.0, 0.1, 5), claimed=1, floor=-0.1)
