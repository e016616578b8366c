"""The study at the paper's clock: its averages, its rules of decision on made-up losses, its results."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
from experiments.shared.averages import FRACTIONS, SHARES, Average, endpoints, power_rules, scale_free_rules
from experiments.shared.cells import array_once, once
from experiments.shared.comparisons import Best, Claim, by_condition, compare, judge
from experiments.shared.decision import decide, mean_over_conditions, standings
from experiments.shared.training import Setting
from experiments.studies import paper_clock

from lagless import WindowAverage, mean_age, trajectory_weights
from lagless.lab.statistics import Verdict

STEPS = list(range(0, 7201, 100))
DENSE = list(range(0, 7201, 4))


def named(averages) -> dict[str, Average]:
    return {average.name: average for average in averages}


def test_every_average_is_an_average_and_has_a_name_of_its_own():
    averages = [*endpoints(STEPS), *scale_free_rules(STEPS), *power_rules(STEPS)]
    assert len(named(averages)) == len(averages)
    for average in averages:
        assert average.weights.sum() == pytest.approx(1.0, abs=1e-9), average.name


def test_the_papers_defaults_at_the_papers_clock():
    """Weights on θ_0 and mean age of Algorithm 1 with κ = .5, η = .2, ρ = 10, φ = 400, T = 7,200, by the recursion."""
    on_start = age = 1.0
    for t in range(400, 7201, 400):
        beta = (10 + t) ** -0.5
        on_start, age = on_start * (1 - beta), age * (1 - beta) + beta * (1 - t / 7200)
    alpha = 7210**-0.2
    rules = named(power_rules(STEPS))
    ema, bema = (rules[name].summary(STEPS) for name in (paper_clock.EMA, paper_clock.BEMA))
    assert (ema["theta_0"], ema["age"]) == (round(on_start, 4), round(age, 4)) == (0.6975, 0.8668)
    assert (bema["theta_0"], bema["age"]) == (round(on_start - alpha, 4), round(age - alpha, 4))
    assert (bema["gamma"], bema["phi"], bema["T"]) == (1.0, 400, 7200)


def profile(f: float) -> np.ndarray:
    """Weights of the EMA of relative width f: w_i = (t_i^p - t_(i-1)^p)/T^p, p = ln 2/f."""
    return np.diff((np.array(STEPS) / STEPS[-1]) ** (math.log(2) / f), prepend=0.0)


@pytest.mark.parametrize("f", FRACTIONS)
def test_scale_free_weights_are_those_of_the_page(f):
    """The rules of the package, by the page's equations: α = c/(p + 1), and c (p/3 + 1)/(p + 1) for the slow anchor."""
    found, p = named(scale_free_rules(STEPS)), math.log(2) / f
    live, start = np.eye(len(STEPS))[-1], np.eye(len(STEPS))[0]
    assert found[f"ema-f f={f:g}"].weights == pytest.approx(profile(f), abs=1e-12)
    for c in SHARES:
        fixed = profile(f) + c / (p + 1) * (live - start)
        slow = profile(f) + c * (p / 3 + 1) / (p + 1) * (live - profile(3 * f))
        assert found[f"bema-f f={f:g} c={c:g}"].weights == pytest.approx(fixed, abs=1e-12)
        assert found[f"slow-bema-f f={f:g} c={c:g}"].weights == pytest.approx(slow, abs=1e-12)


@pytest.mark.parametrize("family", ["bema-f", "slow-bema-f"])
@pytest.mark.parametrize("c", [0.25, 0.5, 1.0])
def test_c_is_the_share_of_the_lag_that_is_removed(family, c):
    dense = named(scale_free_rules(DENSE))
    assert mean_age(dense["ema-f f=0.02"].weights, DENSE) == pytest.approx(7200 / (math.log(2) / 0.02 + 1), abs=3.0)
    for f in FRACTIONS:
        lag = mean_age(dense[f"ema-f f={f:g}"].weights, DENSE)
        left = mean_age(dense[f"{family} f={f:g} c={c:g}"].weights, DENSE)
        assert left == pytest.approx((1 - c) * lag, abs=3.0)  # of 7,200 steps; the grid is one of 4 steps


def test_tails_are_decays_of_the_learning_rate():
    averages = named(scale_free_rules(STEPS))
    uniform = averages["tail share=0.2"].weights
    assert uniform == pytest.approx(trajectory_weights(WindowAverage(window=14, update_freq=100), STEPS))
    multiplier = np.cumsum(averages["sqrt-decay share=0.2"].weights[::-1])[::-1]  # of every change of the weights
    assert multiplier[:59] == pytest.approx(1.0)
    assert multiplier[59:] == pytest.approx([1 - math.sqrt(k / 14) for k in range(14)])


def test_double_average_of_the_profile_follows_a_drift_more_closely():
    averages = named(scale_free_rules(STEPS))
    for f in FRACTIONS[:4]:
        single, double = (mean_age(averages[f"{family} f={f:g}"].weights, STEPS) for family in ("ema-f", "dema-f"))
        assert abs(double) < 0.5 * single


def test_what_is_finished_is_not_computed_again(tmp_path):
    def must_not_run():
        raise AssertionError

    assert once(tmp_path / "deep" / "a.json", lambda: {"x": 1}) == {"x": 1}
    assert once(tmp_path / "deep" / "a.json", must_not_run) == {"x": 1}
    assert array_once(tmp_path / "a.npy", lambda: np.arange(3)).tolist() == [0, 1, 2]
    assert array_once(tmp_path / "a.npy", must_not_run).tolist() == [0, 1, 2]
    with pytest.raises(KeyboardInterrupt):
        once(tmp_path / "b.json", lambda: (_ for _ in ()).throw(KeyboardInterrupt))
    assert sorted(p.name for p in tmp_path.rglob("*.*")) == ["a.json", "a.npy"]


def test_learning_rates_of_a_run():
    constant, linear = (Setting("adamw", 1e-3, final, 8, 0, steps=1000, warmup=10) for final in (1.0, 0.3))
    assert [constant.rate_at(step) for step in (1, 10, 1000)] == pytest.approx([1e-4, 1e-3, 1e-3])
    assert linear.rate_at(501) == pytest.approx(0.65e-3) and linear.rate_at(1000) == pytest.approx(0.3e-3, rel=1e-2)
    assert (constant.schedule, linear.schedule) == ("constant", "linear-to-0.3")


def cell(seed, losses, schedule="constant", tuning=None):
    """A cell whose averages have the given losses of two documents, on all texts."""
    setting = {"optimizer": "adamw", "rate": 1e-3, "schedule": schedule, "batch": 8, "seed": seed}
    entries = {
        name: {
            "family": name.split()[0], "setting": {}, "theta_0": 0.0, "age": 0.1, "iterates": 5.0,
            "T": 7200, "tuning": (tuning or {}).get(name, float(np.mean(values))),
            **dict.fromkeys(("reporting", "plays", "stories"), list(values)),
        }
        for name, values in losses.items()
    }  # fmt: skip
    return {"setting": setting, "averages": entries}


def claim(claimed, **more):
    return Claim("X", "a beats b", "here", "a", "b", claimed, optimizers=("adamw",), **more)


def verdicts_of(claim, gaps, floor=0.002):
    cells = [cell(seed, {"a": [2.0 + gap, 3.0 + gap], "b": [2.0, 3.0]}) for seed, gap in enumerate(gaps)]
    return [one.verdict for one in judge(compare([claim], by_condition(cells), "reporting"), floor, 3)]


@pytest.mark.parametrize(
    ("claimed", "more", "gaps", "expected"),
    [
        (-1, {}, [-0.011, -0.010, -0.010], Verdict.REPRODUCED),
        (-1, {}, [0.011, 0.010, 0.010], Verdict.CONTRADICTED),
        (-1, {}, [-0.0011, -0.0010, -0.0010], Verdict.TOO_SMALL),
        (-1, {}, [-0.03, 0.02, 0.0], Verdict.NOT_SEEN),
        (-1, {}, [-0.01, -0.01], None),  # too few seeds
        (0, {}, [0.0001, -0.0001, 0.0002], Verdict.REPRODUCED),
        (0, {}, [0.011, 0.010, 0.010], Verdict.CONTRADICTED),
        (0, {}, [-0.03, 0.02, 0.0], Verdict.NOT_SEEN),
        (0, {"no_worse": True}, [-0.011, -0.010, -0.010], Verdict.REPRODUCED),
        (0, {"no_worse": True}, [0.011, 0.010, 0.010], Verdict.CONTRADICTED),
        (0, {"no_worse": True}, [0.0015, 0.0025, 0.0020], Verdict.NOT_SEEN),
    ],
)
def test_verdicts(claimed, more, gaps, expected):
    assert verdicts_of(claim(claimed, **more), gaps) == [expected]


def test_the_best_is_chosen_on_the_tuning_part_and_reported_on_the_other():
    losses = {"ema k=1": [2.0, 2.0], "ema k=2": [3.0, 3.0], "live": [2.5, 2.5]}
    cells = [cell(seed, losses, tuning={"ema k=1": 9.0, "ema k=2": 1.0}) for seed in range(3)]
    for one in cells:
        for name, k in (("ema k=1", 1), ("ema k=2", 2)):
            one["averages"][name]["setting"] = {"k": k}
    best = Best(["ema"], {"k": [1, 2, 3]})
    [found] = compare([Claim("X", "", "", best, "live", -1)], by_condition(cells), "reporting")
    assert (found.method, found.at_edge, found.difference.value) == ("ema k=2", [], 0.5)
    [found] = compare([Claim("X", "", "", Best(["ema"], {"k": [1, 2]}), "live", -1)], by_condition(cells), "reporting")
    assert found.at_edge == ["method's k"]


def test_a_baseline_may_have_another_schedule_and_the_same_seeds():
    cells = [cell(seed, {"a": [1.0, 2.0], "b": [9.0, 9.0]}) for seed in (0, 1, 2)]
    cells += [cell(seed, {"a": [9.0, 9.0], "b": [1.5, 2.5]}, "linear-to-0") for seed in (0, 1)]
    [found] = compare([claim(-1, baseline_schedule="linear-to-0")], by_condition(cells), "reporting")
    assert (found.difference.value, found.difference.n) == (-0.5, 2)


def test_the_default_is_the_best_mean_among_the_smallest_worst_cases():
    constant = {"live": [2.0, 2.0], "wide": [1.8, 1.8], "narrow": [1.97, 1.97], "middle": [1.9, 1.9]}
    decayed = {"live": [1.9, 1.9], "wide": [1.95, 1.95], "narrow": [1.9001, 1.9001], "middle": [1.9015, 1.9015]}
    cells = by_condition([cell(0, constant), cell(0, decayed, "linear-to-0")])
    found = standings(cells, ["wide", "narrow", "middle"], ("reporting", "plays"))
    assert [s.name for s in decide(found, 0.002)] == ["middle", "narrow"]
    assert found[0].worst_run == "reporting; adamw 0.001, linear-to-0, batch 8, seed 0"


def test_the_mean_over_conditions_is_over_the_seeds_that_all_have():
    cells = [cell(seed, {"a": [1.0, 2.0 + seed], "b": [0.5, 1.0]}) for seed in (0, 1, 2)]
    cells += [cell(seed, {"a": [3.0, 4.0], "b": [1.0, 1.5 + seed]}, "linear-to-0") for seed in (0, 1)]
    difference, by_documents = mean_over_conditions(by_condition(cells), "a", "b", "reporting")
    table = np.array([[0.5 + 2.0, 1.0 + 2.5], [0.5 + 2.0, 2.0 + 1.5]]) / 2
    assert (difference.value, difference.n, difference.documents) == (table.mean(), 2, 2)
    assert by_documents.standard_error == pytest.approx(abs(np.diff(table.mean(0)))[0] / 2)


def test_the_page_states_every_claim():
    page = (Path(paper_clock.__file__).parent / "paper_clock.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| ([PO]\d+) ", page, re.M)) == {claim.key for claim in paper_clock.CLAIMS}
    assert f"{paper_clock.FLOOR:g} nats" in page


CELLS = sorted((paper_clock.RESULTS / "cells").glob("*.json"))


@pytest.fixture(scope="module")
def results():
    if not CELLS:
        pytest.skip("no cell is finished")
    cells = [json.loads(path.read_text(encoding="utf-8")) for path in CELLS]
    return cells, json.loads((paper_clock.RESULTS / "summary.json").read_text(encoding="utf-8"))


def test_summary_page_and_docs_are_made_of_the_cells(results, tmp_path, monkeypatch):
    cells, committed = results
    (tmp_path / "cells").mkdir()
    for path in CELLS:
        (tmp_path / "cells" / path.name).symlink_to(path)
    monkeypatch.setattr(paper_clock, "RESULTS", tmp_path)
    page, document = paper_clock.PAGE, paper_clock.DOCUMENT
    (tmp_path / "docs.md").write_text(document.read_text("utf-8"), "utf-8")
    monkeypatch.setattr(paper_clock, "PAGE", tmp_path / page.name)
    monkeypatch.setattr(paper_clock, "DOCUMENT", tmp_path / "docs.md")
    paper_clock.report()
    assert json.loads((tmp_path / "summary.json").read_text(encoding="utf-8")) == committed
    assert (tmp_path / page.name).read_text("utf-8") == page.read_text("utf-8")
    assert (tmp_path / "docs.md").read_text("utf-8") == document.read_text("utf-8")
    linked = re.findall(r"\(figures/([^)]+)\)", page.read_text("utf-8"))
    assert len(linked) == 2
    for name in linked:
        assert (tmp_path / "figures" / name).is_file() and (page.parent / "figures" / name).is_file()


def test_headline_numbers_by_few_lines(results):
    """The chosen rule's worst case and mean, and P2 in the first condition, from the cells alone."""
    cells, committed = results
    cells = [c for c in cells if c["setting"]["optimizer"] == "adamw" and c["setting"]["seed"] < 5]
    chosen = next(s for s in committed["standings"] if s["name"] == committed["decision"][0])
    gaps = {
        part: [np.mean(c["averages"][chosen["name"]][part]) - np.mean(c["averages"]["live"][part]) for c in cells]
        for part in ("reporting", "plays", "stories")
    }
    assert max(map(max, gaps.values())) == pytest.approx(max(chosen["worst"].values()), abs=1e-5)
    assert np.mean(gaps["reporting"]) == pytest.approx(chosen["mean"]["reporting"], abs=1e-5)
    claim = next(c for c in committed["claims"] if c["key"] == "P2" and c["condition"]["rate"] == 1e-3)
    mine = [c for c in cells if all(c["setting"][k] == v for k, v in claim["condition"].items())]
    default = "bema kappa=0.5 eta=0.2 phi=400"
    gap = [np.mean(c["averages"][default]["reporting"]) - np.mean(c["averages"]["live"]["reporting"]) for c in mine]
    assert np.mean(gap) == pytest.approx(claim["difference"], abs=1e-5)
