"""``lagless evaluate`` and ``lagless tune`` as a user types them."""

import json
import shlex
import sys

import pytest

from lagless import BEMA, trajectory_weights
from lagless.cli import main
from lagless.lab.evaluate import Row, swings
from lagless.lab.evaluation import Score, oscillation
from lagless.lab.statistics import Mean
from lagless.posthoc import average_checkpoints
from lagless.rules import rule_from_dict


@pytest.fixture
def lagless(monkeypatch, capsys):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["lagless", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit:
            main()
        captured = capsys.readouterr()
        return exit.value.code, captured.out, captured.err

    return run


def test_a_run_its_averages_and_a_model(run, text, tmp_path, lagless):
    loss = ["--task", "loss", "--data", text[1], "--sequences", "8", "--length", "32"]
    code, printed, _ = lagless("evaluate", run, *loss, "-o", tmp_path / "run.json")
    assert code == 0 and "live at 60" in printed
    rows = json.loads((tmp_path / "run.json").read_text())["rows"]
    assert [row["step"] for row in rows] == [0, 10, 20, 30, 40, 50, 60]

    grid = ["--rule", "bema", "--grid", "bias-power=.2,.5"]
    assert lagless("evaluate", run, *loss, *grid, "-o", tmp_path / "bema.json")[0] == 0
    averaged = json.loads((tmp_path / "bema.json").read_text())["rows"]
    assert [row["name"] for row in averaged] == ["live", "bema-bias_power=0.2", "bema-bias_power=0.5"]
    assert averaged[0]["results"]["loss"]["value"] == pytest.approx(rows[-1]["results"]["loss"]["value"], abs=1e-6)
    assert "difference" not in averaged[0]["results"]["loss"]

    average_checkpoints(
        run, {"a": BEMA.paper(update_freq=10), "b": BEMA.paper(update_freq=10, bias_power=0.5)}, tmp_path / "out"
    )
    assert lagless("evaluate", tmp_path / "out", *loss, "-o", tmp_path / "out.json")[0] == 0
    assert lagless("evaluate", tmp_path / "out" / "a", *loss, "-o", tmp_path / "a.json")[0] == 0
    stored = [row for name in ("out", "a") for row in json.loads((tmp_path / f"{name}.json").read_text())["rows"]]
    expected = [averaged[1], averaged[2], averaged[1]]
    for one, other in zip(stored, expected, strict=True):
        assert one["results"]["loss"]["value"] == pytest.approx(other["results"]["loss"]["value"], abs=1e-5)
    paired = stored[1]["results"]["loss"]
    assert paired["difference"]["value"] == pytest.approx(paired["value"] - stored[0]["results"]["loss"]["value"])


def test_oscillation_along_a_run(run, tmp_path, lagless):
    options = ["--task", "arithmetic", "--prompts", "3", "--samples", "2", "--max-new-tokens", "3"]
    code, printed, _ = lagless("evaluate", run, *options, "--at", "50,60,40", "-o", tmp_path / "o.json")
    assert code == 0 and "live: arithmetic moves by" in printed
    record = json.loads((tmp_path / "o.json").read_text())
    shares = [
        list(row["results"]["arithmetic"]["prompts"].values())
        for row in sorted(record["rows"], key=lambda row: row["step"])
    ]
    assert record["oscillation"]["live"]["arithmetic"]["step"] == oscillation(shares, 2).step
    assert record["plan"]["samples"] == 2 and record["machine"] and record["versions"]["torch"]
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ".partial"] == []


def test_swings_are_in_the_order_of_steps_and_by_name():
    shares = {10: [0.0, 0.5], 20: [1.0, 0.5], 30: [0.9, 0.5], 40: [0.8, 0.1]}

    def row(name, step):
        score = Score(Mean(0.0, 0.0, 2), 1.0, {"gsm8k/0": shares[step][0], "gsm8k/1": shares[step][1]}, {}, 0)
        return Row(name, step, {"gsm8k": score})

    rows = [row("live", 20), row("ema", 40), row("live", 40), row("live", 10), row("live", 30)]
    assert swings(rows, 9) == {"live": {"gsm8k": oscillation([shares[step] for step in (10, 20, 30, 40)], 9)}}
    assert swings(rows, 1) == {}


def test_tune(run, text, tmp_path, lagless):
    options = ["--sequences", "8", "--length", "32", "--evaluations", "5", "--rule", "bema", "-o", tmp_path / "t.json"]
    code, printed, shown = lagless("tune", run, "--validation", text[0], "--test", text[1], *options)
    assert code == 0
    assert "live" in printed and "best" in printed and "settings were evaluated on validation" in printed
    evaluated = [float(line.split()[0]) for line in shown.splitlines() if line.endswith("live") or "BEMA" in line]
    assert 3 <= len(evaluated) <= 5
    assert f"{min(evaluated[1:]):.3f}" in printed
    record = json.loads((tmp_path / "t.json").read_text())
    assert [trial["loss"] for trial in record["trials"]] == pytest.approx(evaluated, abs=1e-5)
    live, start, best = record["candidates"]
    assert (live["name"], live["rule"], best["rule"]) == ("live", None, record["best"])
    assert record["best_minus_start"]["value"] == pytest.approx(best["test"]["value"] - start["test"]["value"])
    assert f"{best['test']['value']:.4f}" in printed
    words = shlex.split(next(line for line in printed.splitlines() if line.startswith("lagless average")))
    assert lagless(*words[1:-1], tmp_path / "model")[0] == 0
    made = json.loads((tmp_path / "model" / "lagless.json").read_text())
    weights = trajectory_weights(rule_from_dict(record["best"]), range(0, 61, 10))
    assert [source["weight"] for source in made["sources"]] == pytest.approx(weights.tolist(), abs=1e-12)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task", "nonsense"], "task 'nonsense' is unknown; there are loss, boolq, gsm8k, mmlu_hs, arithmetic"),
        (["--task", "loss"], "the loss needs held-out data"),
        (["--task", "loss", "--data", "nowhere.txt"], "data='nowhere.txt' is no file"),
        (["--task", "loss", "--task", "boolq", "--data", "a.txt"], "with several tasks say which it is for"),
        (["--task", "arithmetic", "--data", "loss=a.txt"], "data are given for loss, which is not among the tasks"),
        (["--task", "arithmetic", "--ema-power", ".2"], "rule arguments were given without --rule"),
        (["--task", "arithmetic", "--backend", "vllm"], "pip install 'lagless[vllm]'"),
        (["--task", "arithmetic", "--at", "33"], "at=33: the run has checkpoints at 0, 10"),
        (["--task", "arithmetic", "--output", "no/such/o.json"], "there is no folder no/such"),
    ],
)
def test_bad_input_ends_with_a_message(run, lagless, arguments, message):
    code, _, shown = lagless("evaluate", run, *arguments)
    assert code == 2 and message in shown


def test_what_is_no_model(run, tmp_path, lagless):
    (tmp_path / "empty").mkdir()
    for folder, message in ((tmp_path / "nowhere", "is no folder"), (tmp_path / "empty", "holds no model weights")):
        code, _, shown = lagless("evaluate", folder, "--task", "arithmetic")
        assert code == 2 and message in shown
    code, _, shown = lagless("evaluate", run / "checkpoint-0", "--task", "arithmetic", "--rule", "ema")
    assert code == 2 and "is no run with checkpoints" in shown
