"""The commands as a user types them."""

import json
import subprocess
import sys

import pytest
import safetensors.torch
import torch
from rich.cells import cell_len

from lagless import BEMA, EMA, trajectory_weights
from lagless.cli import main


@pytest.fixture
def run(tmp_path):
    """Four checkpoints of a random walk, and the weights in them."""
    generator = torch.Generator().manual_seed(0)
    walk = torch.randn(4, 5, generator=generator).cumsum(dim=0)
    for i, weights in enumerate(walk):
        folder = tmp_path / "run" / f"checkpoint-{100 * i}"
        folder.mkdir(parents=True)
        safetensors.torch.save_file({"w": weights.clone()}, folder / "model.safetensors")
        (folder / "config.json").write_text("{}")
    return tmp_path / "run", walk


def lagless(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["lagless", *map(str, arguments)])
    with pytest.raises(SystemExit) as exit:
        main()
    return exit.value.code


def test_average_writes_the_average(run, tmp_path, monkeypatch, capsys):
    folder, walk = run
    assert lagless(monkeypatch, "average", folder, "-o", tmp_path / "out", "--rule", "bema", "--bias-power", "0.4") == 0
    weights = torch.tensor(trajectory_weights(BEMA.paper(update_freq=100, bias_power=0.4), [0, 100, 200, 300]))
    stored = safetensors.torch.load_file(tmp_path / "out" / "model.safetensors")["w"]
    torch.testing.assert_close(stored, (weights @ walk.double()).float(), rtol=0, atol=1e-6)
    record = json.loads((tmp_path / "out" / "lagless.json").read_text())
    assert record["rule"]["bias_power"] == 0.4 and record["rule"]["update_freq"] == 100
    printed = capsys.readouterr().out
    assert "θ_0 is checkpoint-0, step 0 (the earliest checkpoint; --start sets another)" in printed
    assert f"written to {tmp_path / 'out'}" in printed


def test_grid_writes_one_model_per_point(run, tmp_path, monkeypatch):
    folder, walk = run
    arguments = ["--rule", "bema", "--rule", "ema", "--grid", "ema-power=.2,.5", "--grid", "bias-power=.2,.4"]
    assert lagless(monkeypatch, "average", folder, "-o", tmp_path / "out", *arguments) == 0
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        *(f"bema-ema_power={k}-bias_power={e}" for k in (0.2, 0.5) for e in (0.2, 0.4)),
        *(f"ema-ema_power={k}" for k in (0.2, 0.5)),
        "lagless.json",  # which folders those are
    }
    weights = torch.tensor(trajectory_weights(EMA(ema_power=0.2, update_freq=100), [0, 100, 200, 300]))
    stored = safetensors.torch.load_file(tmp_path / "out" / "ema-ema_power=0.2" / "model.safetensors")["w"]
    torch.testing.assert_close(stored, (weights @ walk.double()).float(), rtol=0, atol=1e-6)


def test_the_anchor_after_burn_in_is_named_with_its_weight(run, tmp_path, monkeypatch, capsys):
    options = ["--rule", "ema", "--decay", "0.6", "--update-after", "200"]
    assert lagless(monkeypatch, "inspect", run[0], *options) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "θ_200 +0.6000" in printed
    assert "leaves 60% of its weight on θ_200, where averaging began," in printed
    assert "EMA(half_life_fraction=0.05, update_after=200)" in printed
    assert lagless(monkeypatch, "average", run[0], "-o", tmp_path / "out", *options) == 0
    record = json.loads((tmp_path / "out" / "lagless.json").read_text())
    assert record["anchor"] == {"name": "checkpoint-200", "step": 200, "weight": pytest.approx(0.6)}


def test_dry_run_writes_nothing(run, tmp_path, monkeypatch, capsys):
    assert lagless(monkeypatch, "average", run[0], "-o", tmp_path / "out", "--dry-run") == 0
    assert "would be written to" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_inspect(run, monkeypatch, capsys):
    assert lagless(monkeypatch, "inspect", run[0], "--rule", "ema", "--half-life", "100") == 0
    printed = capsys.readouterr().out
    assert "4 checkpoints, steps 0, 100, 200, 300; each a model of 5 parameters" in printed
    assert "half_life=100.0" in printed and "+0.5000" in printed


BAD = [
    (["average", "RUN/none", "-o", "OUT"], "none: no such folder"),
    (["average", "RUN", "-o", "OUT", "--rule", "swa"], "unknown rule 'swa'; known: bema, ouema, decayaverage, ema"),
    (["average", "RUN", "-o", "OUT", "--rule", "bema", "--decay", "0.9"], "decay is no argument of bema"),
    (["average", "RUN", "-o", "OUT", "--rule", "ema", "--decay", "1.5"], "decay=1.5; it must be a number >= 0, < 1"),
    (["average", "RUN", "-o", "OUT", "--rule", "bema", "--lag", "0", "--multiplier", "0"], "β must lie in (0, 1]"),
    (
        ["average", "RUN", "-o", "OUT", "--rule", "bema", "--update-freq", "1000"],
        "Choose an update_freq that divides them, e.g. 100",
    ),
    (["average", "RUN", "-o", "OUT", "--rule", "bema", "--steps", "0,200,100"], "200 is followed by 100"),
    (["average", "RUN", "-o", "OUT", "--rule", "bema", "--steps", "a,b"], "--steps 'a,b'; it must be integers"),
    (
        ["average", "RUN", "-o", "OUT", "--rule", "bema", "--grid", "ema-power"],
        "--grid 'ema-power'; it must be ARGUMENT=VALUE",
    ),
    (["average", "RUN", "-o", "OUT", "--rule", "bema", "--memory", "lots"], "size 'lots' is not understood"),
    (["average", "RUN/checkpoint-0", "-o", "OUT"], "give the folder above it"),
    (["inspect", "RUN", "--ema-power", ".2"], "say which rule they belong to"),
    (["average", "RUN", "-o", "OUT", "--rule", "bema", "--start", "RUN/base"], "base: no such checkpoint"),
    (["average", "RUN", "-o", "OUT", "--rule", "bema", "--start", "RUN/checkpoint-100"], "Leave --start out"),
    (["average", "RUN", "-o", "RUN/checkpoint-0"], "checkpoint-0"),
]


@pytest.mark.parametrize("arguments, message", BAD, ids=[message for _, message in BAD])
def test_bad_input_ends_with_exit_code_2_and_leaves_nothing(run, tmp_path, monkeypatch, capsys, arguments, message):
    before = sorted(tmp_path.rglob("*"))
    places = {"RUN": str(run[0]), "OUT": str(tmp_path / "out")}
    filled = [argument.replace("RUN", places["RUN"]).replace("OUT", places["OUT"]) for argument in arguments]
    assert lagless(monkeypatch, *filled) == 2
    printed = capsys.readouterr().err
    assert message in printed and "Traceback" not in printed
    assert sorted(tmp_path.rglob("*")) == before


def test_what_a_user_may_not_expect_is_said(run, monkeypatch, capsys):
    arguments = ["--rule", "bema", "--ema-power", ".5", "--rule", "windowaverage", "--update-freq", "200"]
    assert lagless(monkeypatch, "inspect", run[0], *arguments) == 0
    printed = capsys.readouterr().out
    assert "note: bema: update_freq=200 leaves out 1 of 4 checkpoints (steps 100); 100 uses all" in printed
    assert "of its weight on θ_0" in printed and "EMA(half_life_fraction=0.05)" in printed
    assert "note: windowaverage: θ_0 (step 0) is not one of the snapshots averaged" in printed


def test_a_full_disk_is_named(run, tmp_path, monkeypatch, capsys):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lagless.posthoc.average_checkpoints", full)
    assert lagless(monkeypatch, "average", run[0], "-o", tmp_path / "out") == 2
    assert "the disk is full" in capsys.readouterr().err


def test_termination_leaves_nothing_half_written(run, tmp_path):
    code = f"""
import sys, time
import lagless.checkpoints._writer as w
from lagless.cli import main
original = w.ModelWriter.__call__
def slow(self, *block):
    original(self, *block)
    print("writing", flush=True)
    time.sleep(3)
w.ModelWriter.__call__ = slow
sys.argv = ["lagless", "average", {str(run[0])!r}, "-o", {str(tmp_path / "out")!r}]
main()
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "writing\n"
        process.terminate()
        assert process.wait(timeout=60) == 143
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_module_is_the_command():
    result = subprocess.run([sys.executable, "-m", "lagless", "--version"], capture_output=True, text=True, check=True)
    assert result.stdout.startswith("lagless 0.")


def test_theory_check_prints_statements_and_slips(monkeypatch, capsys):
    assert lagless(monkeypatch, "theory", "check", "--dimension", "2", "--seed", "3") == 0
    printed = capsys.readouterr().out
    assert "Theorem 5" in printed and "Slips of arXiv 2508.00180" in printed and "NO" not in printed
    assert "T = 0.25/λ_max = 0.3571" in " ".join(printed.split()) and "→ 8.3377" in printed
    assert "plug-in MLE" in printed and "OUEMA, τ = 0.5" in printed
    assert max(map(cell_len, printed.splitlines())) <= 80


def test_theory_choose_needs_numbers(monkeypatch, capsys):
    assert lagless(monkeypatch, "theory", "choose", "--steps", "100") == 2
    assert "--curvature-min" in capsys.readouterr().err


def test_notes_on_averages_that_a_user_may_not_expect(run, monkeypatch, capsys):
    folder, _ = run
    assert lagless(monkeypatch, "inspect", folder, "--rule", "bema", "--ema-power", "0.2", "--bias-power", "0.01") == 0
    assert "noisier than the last checkpoint alone" in capsys.readouterr().out
    assert lagless(monkeypatch, "inspect", folder, "--rule", "window_average", "--window", "50") == 0
    assert "these are all 3 there are, fewer than window=50" in capsys.readouterr().out
    assert lagless(monkeypatch, "inspect", folder, "--rule", "window_average", "--window", "2") == 0
    assert "fewer than window" not in capsys.readouterr().out


def test_a_model_without_configuration_is_pointed_out(run, tmp_path, monkeypatch, capsys):
    folder, _ = run
    assert lagless(monkeypatch, "average", folder, "-o", tmp_path / "with") == 0
    assert "config.json" not in capsys.readouterr().out
    for config in folder.glob("*/config.json"):
        config.unlink()
    assert lagless(monkeypatch, "average", folder, "-o", tmp_path / "without") == 0
    assert "have no config.json, which from_pretrained needs" in capsys.readouterr().out


def test_a_run_is_opened_once(run, tmp_path, monkeypatch):
    opened: list[str] = []
    headers: list[str] = []

    def counting(into, function):
        def count(path, *rest):
            into.append(f"{path.parent.name}/{path.name}")
            return function(path, *rest)

        return count

    from lagless.checkpoints import _open, _trajectory

    monkeypatch.setattr(_trajectory, "open_checkpoint", counting(opened, _trajectory.open_checkpoint))
    monkeypatch.setattr(_open, "read_header", counting(headers, _open.read_header))
    folder, walk = run
    base = folder / "base"
    (folder / "checkpoint-0").rename(base)
    arguments = [folder, "--start", base, "--rule", "ema", "--rule", "bema"]
    assert lagless(monkeypatch, "average", *arguments, "-o", tmp_path / "out") == 0
    places = [base, *(folder / f"checkpoint-{n}" for n in (100, 200, 300))]
    assert sorted(opened) == sorted(f"run/{place.name}" for place in places)
    assert sorted(headers) == sorted(f"{place.name}/model.safetensors" for place in places)
    opened.clear()
    assert lagless(monkeypatch, "inspect", *arguments) == 0
    assert len(opened) == len(places)


@pytest.mark.parametrize(
    "command", [[], ["average"], ["inspect"], ["evaluate"], ["tune"], ["learn"], ["train"], ["theory"]]
)
def test_help_loads_no_torch(command):
    code = f"""
import sys
from lagless.cli import main
sys.argv = ["lagless", *{command!r}, "--help"]
try:
    main()
finally:
    heavy = sys.modules.keys() & {{"torch", "transformers", "datasets", "scipy", "matplotlib"}}
    assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and "Usage: " in done.stdout, done.stderr


def test_importing_the_package_loads_no_torch_and_the_averager_is_there():
    code = """
import sys, lagless
assert "torch" not in sys.modules and "Averager" in dir(lagless)
from lagless import Averager
assert "torch" in sys.modules and Averager is lagless.averaging.Averager
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_options_are_the_arguments_of_the_rules(run, monkeypatch, capsys):
    from lagless.rules import rule_arguments

    for command in ("average", "inspect", "evaluate", "tune"):
        assert lagless(monkeypatch, command, "--help") == 0
        printed = capsys.readouterr().out
        for name in rule_arguments():
            assert f"--{name.replace('_', '-')} " in printed, (command, name)
    assert lagless(monkeypatch, "inspect", run[0], "--rule", "ema", "--form", "pace") == 0
    assert "form=pace" in capsys.readouterr().out


def test_accumulation_types_are_those_of_posthoc():
    from typing import get_args, get_type_hints

    from lagless.cli._average import average
    from lagless.posthoc import Accumulate

    accumulate = get_type_hints(average.__wrapped__)["accumulate"]
    assert get_args(accumulate) == get_args(Accumulate)
