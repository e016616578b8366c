"""Losses of checkpoints and averages while they come: in memory, or by a command that may fail or hang."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tests.lab.evaluation.conftest import cache as cache, run as hf_run, text as text, tokenizer as tokenizer
from tests.watch.trainer import save, settle
from transformers import AutoModelForCausalLM

from lagless import EMA, UniformAverage
from lagless.lab.averages import evaluate_averages
from lagless.lab.evaluation import held_out_sequences, sequence_losses
from lagless.watch import CommandPlan, HeldOutPlan, Settings
from lagless.watch._command import CommandEvaluation, parse
from lagless.watch._measured import Measured
from lagless.watch._plans import EvaluationError

run = hf_run
RULES = {"ema": EMA(decay=0.5), "uniform": UniformAverage()}
NORM = """
import sys, json, struct
content = open(sys.argv[1] + '/model.safetensors', 'rb').read()
size = struct.unpack('<Q', content[:8])[0]
begin, end = json.loads(content[8 : 8 + size])['mlp.weight']['data_offsets']
values = struct.unpack(f'<{(end - begin) // 4}f', content[8 + size + begin : 8 + size + end])
print(json.dumps({'loss': sum(v * v for v in values) ** 0.5}))
"""


def losses(rows: list[dict[str, Any]]) -> dict[tuple[str, int], float]:
    return {(row["name"], row["step"]): row["loss"] for row in rows if "loss" in row}


def python(code: str) -> str:
    return f'{sys.executable} -c "{code}"'


def test_held_out_losses_are_those_of_stored_averages_and_the_best_is_kept(
    run: Path, text: tuple[Path, Path], tokenizer: Any, watching: Callable[..., Any], tmp_path: Path
) -> None:
    plan = HeldOutPlan(str(text[0]), length=48, sequences=8, device="cpu")
    watch, rows = watching(run=run, rules=RULES, settings=Settings(settle=0.0, keep=2, evaluate=plan))
    for _ in range(20):
        more = watch.step()
        watch.finish()
        if not more:
            break
    sequences = held_out_sequences(str(text[0]), tokenizer, length=48, count=8)
    steps = [10, 20, 30, 40, 50, 60]
    wanted = {
        (found.name, found.step): found.result.mean.value
        for found in evaluate_averages(run, RULES, lambda m: sequence_losses(m, sequences), at=steps, device="cpu")
    }
    found = losses(rows)
    assert {key: value for key, value in found.items() if key[1]} == pytest.approx(wanted, abs=1e-4)
    best = sorted((value, key) for key, value in found.items() if key[0] != "live")[:2]
    assert [(m.name, m.step) for m in watch.models.kept] == [key for _, key in best]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out/best")
    assert float(sequence_losses(model, sequences).mean.value) == pytest.approx(best[0][0], abs=1e-4)
    leads = [row for row in rows if row.get("event") == "lead" and row["step"] == 60]
    assert [row["over"] for row in leads][0] == "live" and all("standard_error" in row for row in leads)


def test_a_command_gets_a_model_and_its_loss_decides(tmp_path: Path, watching: Callable[..., Any]) -> None:
    plan = CommandPlan(python(NORM))
    watch, rows = watching(rules=RULES, settings=Settings(settle=0.0, evaluate=plan))
    for step in (10, 20):
        save(tmp_path / "run", step)
        settle(watch)
        watch.finish()
    norms = losses(rows)
    assert norms.keys() == {("live", 20), ("ema", 20), ("uniform", 20)}
    weight = load_file(tmp_path / "run/checkpoint-20/model.safetensors")["mlp.weight"]
    assert norms["live", 20] == pytest.approx(float(weight.norm()), rel=1e-6)
    kept = watch.models.kept
    assert len(kept) == 1 and kept[0].loss == min(norms["ema", 20], norms["uniform", 20])
    assert float(load_file(tmp_path / "out/best/model.safetensors")["mlp.weight"].norm()) == pytest.approx(kept[0].loss)
    assert not list((tmp_path / "out/models").glob("candidate*"))


@pytest.mark.parametrize(
    "code, message",
    [
        ("import sys; print('no good', file=sys.stderr); sys.exit(3)", "ended with 3: no good"),
        ("print('done')", "printed no JSON object; it must print JSON with a number 'loss'"),
        ("print('[1]')", "printed no JSON object"),
        ("import json; print(json.dumps(dict(perplexity=3)))", "printed {'perplexity': 3}; it must print JSON"),
    ],
)
def test_a_command_that_fails_marks_the_checkpoint_and_the_watch_goes_on(
    tmp_path: Path, watching: Callable[..., Any], code: str, message: str
) -> None:
    watch, rows = watching(rules={"ema": EMA()}, settings=Settings(settle=0.0, evaluate=CommandPlan(python(code))))
    for step in (10, 20):
        save(tmp_path / "run", step)
    settle(watch)
    watch.finish()
    failed = [row for row in rows if row.get("event") == "evaluation failed"]
    assert {row["name"] for row in failed} == {"live", "ema"} and all(message in row["text"] for row in failed)
    save(tmp_path / "run", 30)
    settle(watch)
    assert watch.averages.record.steps == [10, 20, 30]


def test_a_command_that_hangs_is_ended_with_what_it_started(tmp_path: Path) -> None:
    file = tmp_path / "alive"
    inner = f"import time\\nwhile True: open('{file}', 'a').write('x'); time.sleep(.05)"
    code = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', '''{inner}''']); time.sleep(60)"
    evaluate = CommandEvaluation(CommandPlan(f'{sys.executable} -c "{code}"', timeout=1.0))
    with pytest.raises(EvaluationError, match=r"longer than 1 s \(--eval-timeout\)"):
        evaluate(None, "ema", tmp_path)  # type: ignore[arg-type]
    time.sleep(0.2)
    size = file.stat().st_size
    time.sleep(0.3)
    assert size > 0 and file.stat().st_size == size


def test_a_command_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="no-such-command cannot be started"):
        CommandEvaluation(CommandPlan("no-such-command {model}"))(None, "ema", tmp_path)  # type: ignore[arg-type]


def test_what_a_command_prints_is_read() -> None:
    found = parse('loading\n{"loss": 9}\n{"loss": 2.0, "losses": [1.0, 2.0, 3.0], "accuracy": 0.5, "step": 7}\nbye')
    assert (found.loss, found.n, found.further) == (2.0, 3, {"accuracy": 0.5})
    assert found.standard_error == pytest.approx(1 / 3**0.5)
    other = parse('{"loss": 1.5,\n "losses": [0.5, 1.5, 2.5]}')
    difference = found.minus(other)
    assert difference is not None and (difference.value, difference.standard_error) == (0.5, 0.0)
    assert found.minus(parse('{"loss": 1}')) is None


def test_a_difference_has_the_standard_error_of_the_pairs() -> None:
    generator = np.random.default_rng(0)
    counts = generator.integers(5, 9, 50).astype(float)
    one, other = generator.normal(size=(2, 50)) * counts
    difference = Measured(0.0, items=(one, counts)).minus(Measured(0.0, items=(other, counts)))
    assert difference is not None
    draws = []
    for _ in range(2000):
        chosen = generator.integers(0, 50, 50)
        draws.append((one - other)[chosen].sum() / counts[chosen].sum())
    assert difference.standard_error == pytest.approx(float(np.std(draws)), rel=0.15)


def test_evaluations_that_fall_behind_go_on_with_the_newest(tmp_path: Path, watching: Callable[..., Any]) -> None:
    go = tmp_path / "go"
    code = f"import time, os\nwhile not os.path.exists('{go}'): time.sleep(.02)\nprint('{{\\\"loss\\\": 1}}')"
    watch, rows = watching(rules={"ema": EMA()}, settings=Settings(settle=0.0, evaluate=CommandPlan(python(code))))
    for step in (10, 20):
        save(tmp_path / "run", step)
    settle(watch)
    while not list((tmp_path / "out/models").glob("candidate*")):
        time.sleep(0.01)
    for step in (30, 40, 50):
        save(tmp_path / "run", step)
    settle(watch)
    shutil.rmtree(tmp_path / "run")  # what is evaluated is pinned
    go.touch()
    watch.finish()
    assert [row["step"] for row in rows if row.get("event") == "skipped"] == [30, 40]
    assert [row["step"] for row in rows if row.get("event") == "evaluated"] == [20, 50]


def test_an_evaluation_that_was_interrupted_is_made_up_for(tmp_path: Path, watching: Callable[..., Any]) -> None:
    slow, quick = (CommandPlan(python(f"import time; time.sleep({s}); print('{{\\\"loss\\\": 1}}')")) for s in (60, 0))
    for step in (10, 20):
        save(tmp_path / "run", step)
    first, rows = watching(rules={"ema": EMA()}, settings=Settings(settle=0.0, evaluate=slow))
    settle(first)
    first.__exit__(None, None, None)
    assert not losses(rows)
    second, rows = watching(rules={"ema": EMA()}, settings=Settings(settle=0.0, evaluate=quick))
    second.finish()
    assert losses(rows).keys() == {("live", 20), ("ema", 20)}


def test_a_model_that_does_not_fit_is_told(tmp_path: Path, watching: Callable[..., Any]) -> None:
    plan = HeldOutPlan(str(tmp_path / "text.txt"))
    for step in (10, 20):
        save(tmp_path / "run", step)
    watch, rows = watching(rules={"ema": EMA()}, settings=Settings(settle=0.0, evaluate=plan))
    settle(watch)
    watch.finish()
    failed = [row["text"] for row in rows if row.get("event") == "evaluation failed"]
    assert len(failed) == 2 and "tokenizer" in failed[0]


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
def test_adapters_are_evaluated_in_memory(
    run: Path, text: tuple[Path, Path], tokenizer: Any, watching: Callable[..., Any], tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft")
    base = AutoModelForCausalLM.from_pretrained(run / "checkpoint-60")
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    model.peft_config["default"].base_model_name_or_path = str(run / "checkpoint-60")
    for step in (1, 2):
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora" in name:
                    parameter.normal_(generator=torch.Generator().manual_seed(step))
        model.save_pretrained(tmp_path / f"lora/checkpoint-{step}")
        tokenizer.save_pretrained(tmp_path / f"lora/checkpoint-{step}")
    plan = HeldOutPlan(str(text[0]), length=48, sequences=8, device="cpu")
    watch, rows = watching(
        run=tmp_path / "lora", rules={"ema": EMA(decay=0.5)}, settings=Settings(settle=0.0, evaluate=plan)
    )
    settle(watch)
    watch.finish()
    sequences = held_out_sequences(str(text[0]), tokenizer, length=48, count=8)
    found = losses(rows)
    assert found["live", 2] == pytest.approx(sequence_losses(model.eval(), sequences).mean.value, abs=1e-4)
    best = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out/best")
    assert found["ema", 2] == pytest.approx(sequence_losses(best.eval(), sequences).mean.value, abs=1e-4)
    assert json.loads((tmp_path / "out/best/lagless.json").read_text())["name"] == "ema"
