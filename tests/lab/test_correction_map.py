"""The map of corrections: its numbers of a run on made-up losses, its verdicts, and its results."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from experiments.shared.averages import Average, endpoints, scale_free_rules
from experiments.shared.prediction import DRIFT_WEIGHT, predict
from experiments.shared.training import Setting
from experiments.studies import correction_map
from experiments.studies.correction_map import POWER, UNIT, Run, summarise

from lagless.lab import choose


def run(measured, predicted, name="new", families=None):
    """A run with these differences to the live weights; all others are 0."""
    averages = {"live": {"family": "live", "reporting": [1.0, 2.0], "tuning": 1.5}}
    for key, gap in measured.items():
        family = (families or {}).get(key, key.split()[0])
        averages[key] = {"family": family, "reporting": [1.0 + gap, 2.0 + gap], "tuning": 1.5 + gap}
    cell = {"setting": {}, "averages": averages}
    return Run(name, cell, {"misfit": 0.1, "predicted": {"live": 0.0, **predicted}})


def test_signs_are_those_of_pairs_that_differ_enough():
    pairs = [("a", "x"), ("b", "x"), ("c", "x"), ("d", "x")]
    gaps = {"a": -0.01, "b": -0.02, "c": 0.03, "d": 0.0015, "x": 0.0, UNIT: -0.1}
    one = run(gaps, {"a": -5.0, "b": 4.0, "c": 3.0, "d": -9.0, "x": 0.0, UNIT: -10.0})
    assert one.signs(pairs) == (pytest.approx(2 / 3), pytest.approx(2 / 3), 3)  # d has no sign


def test_the_unit_is_that_of_one_average_on_the_tuning_books():
    names = {UNIT: -0.05, "ema k=1": 0.08, "ema k=2": -0.01, "ema k=3": 0.5, "ema k=4": 0.01}
    predicted = {UNIT: -1.0, "ema k=1": 0.8, "ema k=2": -0.4, "ema k=3": 1.0, "ema k=4": -1.0}
    one = run(names, predicted)
    assert one.unit == pytest.approx(0.05)
    # 0.08 against 0.04 and -0.01 against -0.02: factors of 2; 0.5 is too large to count, 0.01 has another sign.
    assert one.factor() == pytest.approx(np.median([0.0, 1.0, 1.0]))
    assert run(names | {UNIT: 0.01}, predicted).unit is None
    assert np.isnan(run(names, predicted | {UNIT: 1.0}).factor())


def test_regret_is_among_candidates_only():
    gaps = {UNIT: -0.04, correction_map.DEFAULT: -0.05, "tail share=0.1": -0.07, "bema k=9": -0.09}
    one = run(gaps, {UNIT: -9.0, correction_map.DEFAULT: -5.0, "tail share=0.1": -6.0, "bema k=9": -99.0})
    assert one.chosen() == (UNIT, "tail share=0.1")
    assert (one.measured[UNIT] - one.measured["tail share=0.1"]) == pytest.approx(0.03)


class Counted(Run):
    """A run whose numbers are given."""

    def __init__(self, name, value):
        self.name, self.setting, self.misfit, self.unit, self._value = name, {}, 0.1, None, value
        self.measured = self.predicted = dict.fromkeys([n for pair in correction_map.MAPPED for n in pair], 0.0)

    def numbers(self):
        return dict.fromkeys(("M1", "M2", "M3", "M4", "M5"), self._value)

    def signs(self, pairs):
        return np.nan, np.nan, 0

    def chosen(self):
        return "a", "a"


def verdicts(values, name="new"):
    return {c["key"]: c["verdict"] for c in summarise([Counted(f"{name}{v}", v) for v in values])["claims"]}


def test_verdicts_go_by_side_and_level():
    assert verdicts([0.3, 0.301, 0.302]) == {
        "M1": "reproduced", "M2": "reproduced", "M3": "reproduced", "M4": "contradicted", "M5": "contradicted",
    }  # fmt: skip
    assert set(verdicts([-5.0, 0.1, 6.0]).values()) == {"not seen"}
    assert set(verdicts([0.3, 0.301]).values()) == {None}


def test_runs_that_the_prediction_was_built_on_do_not_count():
    built = [Counted(name, 9.0) for name in correction_map.BUILT_ON]
    found = summarise([*built, Counted("one", 0.1)])
    assert [claim["runs"] for claim in found["claims"]] == [1] * 5 and found["claims"][0]["mean"] == 0.1


def test_the_prediction_is_that_of_lagless_choose():
    """On a path of drift and noise: noise + 0.4 drift, with the schedule's learning rate."""
    setting = Setting("adamw", 1e-3, 1.0, 8, 0, steps=400, warmup=10, every=20)
    steps, draw = range(0, 401, 20), np.random.default_rng(0)
    path = np.cumsum(draw.normal(size=(21, 300)), axis=0) * 0.3 + np.exp(-np.arange(21) / 5)[:, None] * 5
    averages: list[Average] = [*endpoints(steps), *scale_free_rules(steps)]
    found = predict(path.astype(np.float32), setting, averages)
    assert found["predicted"]["live"] == 0.0 and DRIFT_WEIGHT == choose._choice.DRIFT_WEIGHT
    rows = np.diff(path.astype(np.float32).astype(np.float64), axis=0)
    rate = choose.LearningRate(tuple(range(1, 401)), tuple(min(1.0, t / 10) for t in range(1, 401)), "log")
    change = choose.fit_motion(rows @ rows.T, steps, rate).change(np.array([a.weights for a in averages]))
    expected = change.noise + 0.4 * change.drift
    assert list(found["predicted"].values()) == pytest.approx(expected.tolist(), rel=1e-4, abs=1e-9)


def test_pairs_are_averages_of_the_cells():
    cells = sorted(correction_map.CELLS.glob("*.json"))
    averages = json.loads(cells[0].read_text(encoding="utf-8"))["averages"]
    assert len(POWER) == 72 and len(correction_map.FREE) == 42
    assert all(name in averages for pair in (*POWER, *correction_map.FREE, *correction_map.MAPPED) for name in pair)


def test_the_page_states_every_claim():
    page = (Path(correction_map.__file__).parent / "correction_map.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| (M\d) ", page, re.M) == [claim.key for claim in correction_map.CLAIMS]


def test_summary_and_page_are_made_of_the_cells(tmp_path, monkeypatch):
    committed = correction_map.RESULTS / correction_map.NAME / "summary.json"
    page = correction_map.PAGE
    monkeypatch.setattr(correction_map, "RESULTS", tmp_path)
    monkeypatch.setattr(correction_map, "PAGE", tmp_path / page.name)
    correction_map.report()
    made = tmp_path / correction_map.NAME / "summary.json"
    assert json.loads(made.read_text("utf-8")) == json.loads(committed.read_text("utf-8"))
    assert (tmp_path / page.name).read_text("utf-8") == page.read_text("utf-8")


def test_a_headline_number_by_few_lines():
    """M5 of a run that the prediction was not built on, from its cell and prediction alone."""
    summary = json.loads((correction_map.RESULTS / correction_map.NAME / "summary.json").read_text("utf-8"))
    one = next(r for r in summary["runs"] if not r["built_on"])
    cell, guess = (json.loads((folder / f"{one['name']}.json").read_text("utf-8"))
                   for folder in (correction_map.CELLS, correction_map.PREDICTIONS))  # fmt: skip
    wanted = ("ema-f", "bema-f", "slow-bema-f", "dema-f", "tail", "sqrt-decay")
    losses = {name: np.mean(a["reporting"]) for name, a in cell["averages"].items() if a["family"] in wanted}
    chosen = min(losses, key=guess["predicted"].get)
    assert losses[chosen] - losses["ema-f f=0.05"] == pytest.approx(one["M5"], abs=1e-5)
    assert losses[chosen] - min(losses.values()) == pytest.approx(one["M4"], abs=1e-5)
