"""The demo as a person runs it, small: everything is there, loads, repeats, and agrees with itself."""

import functools
import io
import json
import re
import shlex
import shutil
import subprocess
import sys
from html.parser import HTMLParser

import pytest
import torch
from rich.console import Console

import lagless
from lagless import BEMA, DEMA, EMA, OUEMA, trajectory_weights
from lagless.cli import main
from lagless.lab.demo import Plan, Shape, _demo, run_demo
from lagless.lab.demo._words import command, python_code, scaled_code
from lagless.posthoc import average_checkpoints

transformers = pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

TINY = Shape(vocab_size=320, hidden_size=16, intermediate_size=32, layers=1, heads=2, batch_size=2, length=32)
FEW = functools.partial(Plan, curve_sequences=4, validation_sequences=24, test_sequences=96)
STEPS = 100
MATCHED = {"ema": EMA, "bema": BEMA, "ouema": OUEMA, "dema": DEMA}


def run(out, texts, **options):
    console = Console(file=io.StringIO(), width=100)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_demo, "Plan", FEW)
        result = run_demo(out, data=texts, console=console, shape=TINY, **{"steps": STEPS, **options})
    return result, console.file.getvalue()


@pytest.fixture(scope="module")
def texts():
    import _pydecimal
    import argparse
    import inspect
    import turtle
    import typing

    return [module.__file__ for module in (_pydecimal, argparse, inspect, turtle, typing)]


@pytest.fixture(scope="module")
def demo(tmp_path_factory, texts):
    return run(tmp_path_factory.mktemp("demo") / "out", texts)


def weights(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder).state_dict()


def test_everything_is_written(demo):
    result, _ = demo
    found = {path.name for path in result.out.iterdir()}
    plots = {"curves.png", "differences.png", "ages.png", "memory.png"}
    assert found == {"report.html", "lagless.json", "metrics.jsonl", "demo.json", "run", "averages"} | plots
    checkpoints = {path.name for path in (result.out / "run").iterdir()}
    assert checkpoints == {f"checkpoint-{step}" for step in range(0, STEPS + 1, result.plan.interval)}
    assert not list(result.out.parent.glob(".*"))


def test_metrics_parse(demo):
    result, _ = demo
    records = [json.loads(line) for line in (result.out / "metrics.jsonl").read_text().splitlines()]
    assert {record["text"] for record in records} == {"curve", "validation", "test"}
    test_losses = {r["model"]: r["loss"] for r in records if r["text"] == "test"}
    assert test_losses["live"] == result.live_loss
    for row in result.rows:
        assert row.loss == test_losses[row.candidate.name]
        assert row.difference.mean == pytest.approx(row.loss - result.live_loss, abs=1e-12)
    record = json.loads((result.out / "demo.json").read_text())
    assert [row["test_loss"] for row in record["rows"]] == [row.loss for row in result.rows]


def test_best_is_chosen_on_validation_text_and_not_worse_than_matched(demo):
    result, _ = demo
    for family in ("EMA", "BEMA", "OUEMA", "DEMA"):
        own = [c.validation for c in result.candidates if type(c.rule).__name__ == family]
        assert len(own) > 1
        assert result.row(f"best {family}").candidate.validation == min(own)


def test_averages_load_with_their_tokenizer(demo):
    result, _ = demo
    for row in result.rows:
        folder = result.out / "averages" / row.folder
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        text = "def f(x):\n    return 'é' + x\n"
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
        assert not torch.equal(
            weights(folder)["model.norm.weight"],
            weights(result.out / f"run/checkpoint-{STEPS}")["model.norm.weight"],
        )


@pytest.mark.parametrize("name", MATCHED)
def test_stored_checkpoints_give_the_streaming_averages(demo, tmp_path, name):
    result, _ = demo
    rule = result.row(name.upper()).candidate.rule
    assert type(rule) is MATCHED[name] and rule.update_freq == result.plan.interval
    average_checkpoints(result.out / "run", rule, tmp_path / "again")
    again, streamed = weights(tmp_path / "again"), weights(result.out / "averages" / name)
    steps = range(result.plan.warmup, STEPS + 1)
    growth = float(abs(trajectory_weights(rule, steps)).sum())
    for parameter, value in streamed.items():
        # Roundings to float32 of at most half an ulp of the largest term: 3 were seen; a lag off by 0.1 % gives 30.
        bound = 8 * torch.finfo(torch.float32).eps * growth * value.abs().max()
        assert (again[parameter] - value).abs().max() <= bound, parameter


def test_same_seed_same_numbers_and_the_caller_s_settings_are_left_alone(demo, tmp_path, texts):
    result, _ = demo
    threads = torch.get_num_threads()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    again, _ = run(tmp_path / "again", texts)
    assert torch.equal(torch.rand(3), expected)
    assert torch.get_num_threads() == threads
    assert (again.out / "metrics.jsonl").read_bytes() == (result.out / "metrics.jsonl").read_bytes()
    for name, value in weights(result.out / "averages/best-bema").items():
        assert torch.equal(value, weights(again.out / "averages/best-bema")[name])


def test_report_is_one_file_with_numbers_and_commands(demo):
    result, _ = demo
    page = result.report.read_text(encoding="utf-8")
    tags = []
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, attributes: tags.append((tag, dict(attributes)))
    parser.feed(page)
    images = [attributes["src"] for tag, attributes in tags if tag == "img"]
    assert len(images) == 4 and all(source.startswith("data:image/png;base64,") for source in images)
    assert not [tag for tag, attributes in tags if tag in ("link", "script") or "href" in attributes]
    for row in result.rows:
        assert f"{row.loss:.3f}" in page and str(row.difference) in page
    assert "averager.attach(optimizer)" in page


def test_command_in_the_report_makes_the_average_again(demo, tmp_path, monkeypatch):
    result, _ = demo
    row = result.row("BEMA")
    _, *arguments = shlex.split(command(result, row).replace("\\\n", ""))
    arguments[arguments.index("-o") + 1] = str(tmp_path / "again")
    monkeypatch.setattr(sys, "argv", ["lagless", *arguments])
    with pytest.raises(SystemExit, match="^0$"):
        main()
    again, streamed = weights(tmp_path / "again"), weights(result.out / "averages" / row.folder)
    for parameter, value in streamed.items():
        assert torch.allclose(again[parameter], value, rtol=1e-5, atol=1e-6)
    page = result.report.read_text(encoding="utf-8")
    assert f"lagless average {result.out}/run" in page


def test_code_in_the_report_runs(demo):
    result, _ = demo
    steps = range(result.plan.warmup, STEPS + 1)
    for row in result.rows:
        rule = row.candidate.rule
        call = re.search(r"rule = (lagless.*)", python_code(row)).group(1)
        assert eval(call, {"lagless": lagless}) == rule
        names = {"lagless": lagless, "my_total_steps": 3 * STEPS}
        exec(scaled_code(result, row), names)
        stretched = trajectory_weights(names["rule"], [3 * step for step in steps])
        assert stretched == pytest.approx(trajectory_weights(rule, steps), abs=1e-12)


def test_terminal_shows_the_table(demo):
    result, printed = demo
    for row in result.rows:
        assert f"{row.loss:.3f}" in printed
    assert "report.html" in printed


def test_importing_the_library_loads_nothing_of_the_demo():
    code = (
        "import sys, lagless, lagless.lab.demo\n"
        "print([name for name in ('transformers', 'tokenizers', 'matplotlib') if name in sys.modules])"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


def test_overwrite_replaces_a_demo_and_nothing_else_and_another_seed_starts_elsewhere(demo, tmp_path, texts):
    result, _ = demo
    with pytest.raises(ValueError, match="not empty.*--overwrite"):
        run(result.out, texts)
    (tmp_path / "own.txt").write_text("mine")
    with pytest.raises(ValueError, match="the demo did not write this one"):
        run(tmp_path, texts, overwrite=True)
    assert (tmp_path / "own.txt").read_text() == "mine"
    shutil.copytree(result.out, tmp_path / "copy")
    replaced, _ = run(tmp_path / "copy", texts, steps=21, seed=1, overwrite=True)
    assert max(int(path.name.split("-")[1]) for path in (replaced.out / "run").iterdir()) == 21
    assert replaced.curves["live"][0] != result.curves["live"][0]


def test_bad_input_is_refused_and_leaves_nothing(tmp_path, texts):
    with pytest.raises(ValueError, match="steps=19: too few.*at least 20"):
        run(tmp_path / "out", texts, steps=19)
    (tmp_path / "short.txt").write_text("a few words\n" * 100)
    with pytest.raises(ValueError, match="--data: 1,200 bytes"):
        run(tmp_path / "out", [tmp_path / "short.txt"])
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    with pytest.raises(ValueError, match="latin.txt is not UTF-8"):
        run(tmp_path / "out", [tmp_path / "latin.txt"])
    with pytest.raises(ValueError, match="cannot read .*missing.txt"):
        run(tmp_path / "out", [tmp_path / "missing.txt"])
    with pytest.raises(ValueError, match="cannot read .*folders"):
        run(tmp_path / "out", [tmp_path])
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


def test_missing_packages_are_named(tmp_path, texts, monkeypatch):
    monkeypatch.setattr(_demo, "_NEEDED", ("transformers", "no_such_package"))
    with pytest.raises(ImportError, match=r"no_such_package: pip install 'lagless\[lab\]'"):
        run(tmp_path / "out", texts)
