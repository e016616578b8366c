"""Weights in place of a rule, and the learning-rate schedule that an average equals, on the command line."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from lagless.cli import main
from lagless.posthoc import average_checkpoints


@pytest.fixture
def run(tmp_path):
    for i, step in enumerate((0, 100, 200, 300)):
        folder = tmp_path / "run" / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        save_file({"w": torch.full((5,), float(2**i))}, folder / "model.safetensors", {"format": "pt"})
    return tmp_path / "run"


def lagless(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["lagless", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        main()
    return ended.value.code


def read(folder):
    return load_file(folder / "model.safetensors")["w"]


@pytest.mark.parametrize(
    "weights",
    [
        "-.5,0,.5,1",
        "[-0.5, 0.0, 0.5, 1.0]",
        '{"0": -0.5, "200": 0.5, "300": 1.0}',
        "0 -0.5\n200 0.5\n300, 1\n",
        "-0.5\n0\n0.5\n1\n",
    ],
    ids=["typed", "list", "object", "lines", "numbers"],
)
def test_weights_of_any_sign(run, tmp_path, monkeypatch, capsys, weights):
    given = weights
    if weights != "-.5,0,.5,1":
        given = tmp_path / "weights.txt"
        given.write_text(weights)
    assert lagless(monkeypatch, "average", run, "-o", tmp_path / "out", f"--weights={given}") == 0
    torch.testing.assert_close(read(tmp_path / "out"), torch.full((5,), -0.5 + 0.5 * 4 + 8.0))
    record = json.loads((tmp_path / "out" / "lagless.json").read_text())
    assert record["rule"] is None and [s["weight"] for s in record["sources"]] == [-0.5, 0.0, 0.5, 1.0]
    assert record["equivalent_schedule"] == [1.0, 1.5, 1.5, 1.0]
    again = tmp_path / "again"
    assert lagless(monkeypatch, "average", run, "-o", again, "--weights", tmp_path / "out" / "lagless.json") == 0
    assert torch.equal(read(again), read(tmp_path / "out"))
    assert "weights as given" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--weights=1,1,1,1"], "the weights sum to 4; they must sum to 1"),
        (["--weights=.5,.5"], r"have shape (2,); it must be (4,)"),
        (["--weights=nan,0,0,1"], "nan at step 0; weights must be finite"),
        (["--weights=nan,0,0,1", "--normalize"], "cannot be normalized"),
        (["--weights=1,-1,1,-1", "--normalize"], "sum to 0, and cannot be normalized"),
        (["--weights=nothing.json"], "neither numbers separated by commas nor a text file"),
        (["--weights=WRONG"], "step 150 is not in the run, which has 0, 100, 200, 300"),
        (["--weights=.5,0,0,.5", "--rule", "ema"], "takes the place of --rule"),
    ],
)
def test_bad_weights(run, tmp_path, monkeypatch, capsys, arguments, message):
    (tmp_path / "wrong.json").write_text('{"150": 1.0}')
    filled = [a.replace("WRONG", str(tmp_path / "wrong.json")) for a in arguments]
    assert lagless(monkeypatch, "average", run, "-o", tmp_path / "out", *filled) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()


def test_normalized_weights(run, tmp_path, monkeypatch):
    assert lagless(monkeypatch, "average", run, "-o", tmp_path / "out", "--weights=0,1,1,2", "--normalize") == 0
    torch.testing.assert_close(read(tmp_path / "out"), torch.full((5,), (2.0 + 4.0 + 16.0) / 4))


def test_rules_and_weights_side_by_side(run, tmp_path):
    from lagless import WindowAverage

    rules = {"mean": WindowAverage(window=3, update_freq=100), "mine": [0.0, 0.0, 0.0, 1.0]}
    summaries = average_checkpoints(run, rules, tmp_path / "out")
    assert summaries[1].rule is None
    assert torch.equal(read(tmp_path / "out" / "mine"), torch.full((5,), 8.0))


def test_without_a_rule_it_is_the_scale_free_ema(run, tmp_path, monkeypatch):
    assert lagless(monkeypatch, "average", run, "-o", tmp_path / "out") == 0
    record = json.loads((tmp_path / "out" / "lagless.json").read_text())
    assert record["rule"]["rule"] == "EMA" and record["rule"]["half_life_fraction"] == 0.05
    average_checkpoints(run, None, tmp_path / "same")
    assert torch.equal(read(tmp_path / "out"), read(tmp_path / "same"))


def test_the_schedule_is_shown(run, monkeypatch, capsys, tmp_path):
    picture = tmp_path / "averages.png"
    arguments = ["--rule", "windowaverage", "--window", 2, "--rule", "bema"]
    assert lagless(monkeypatch, "inspect", run, *arguments, "--plot", picture) == 0
    shown = capsys.readouterr().out
    assert "windowaverage ██▄  1.00 at first, 0.50 at last" in shown
    assert picture.read_bytes().startswith(b"\x89PNG")
