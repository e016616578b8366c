"""``lagless evaluate --backend vllm``, with a stand-in for vLLM that has its documented interface; it needs a GPU."""

import json
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lagless import EMA
from lagless.cli import main
from lagless.lab.evaluate import EvaluationPlan, evaluate_models
from lagless.posthoc import average_checkpoints

CLOSED = ["--task", "arithmetic", "--prompts", "3", "--samples", "2", "--max-new-tokens", "3", "--backend", "vllm"]


MODULES = {}
"""The stand-in's modules between tests: the harness keeps the ones that it has seen first."""


@pytest.fixture
def vllm(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parent / "stand_in")
    sys.modules.update(MODULES)
    import vllm
    import vllm.distributed

    vllm.ENGINES.clear()
    vllm.distributed.CLEANED.clear()
    yield vllm
    for name in [name for name in sys.modules if name.split(".")[0] == "vllm"]:
        MODULES[name] = sys.modules.pop(name)


@pytest.fixture
def lagless(monkeypatch, capsys):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["lagless", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit:
            main()
        captured = capsys.readouterr()
        return exit.value.code, captured.out, captured.err

    return run


def test_averages_go_through_the_engine_one_at_a_time(run, tmp_path, lagless, vllm, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    grid = ["--rule", "ema", "--half-life-fraction", ".1", "--rule", "uniformaverage", "--at", "40", "--at", "60"]
    code, _, shown = lagless("evaluate", run, *CLOSED, *grid, "-o", tmp_path / "o.json")
    assert code == 0, shown
    record = json.loads((tmp_path / "o.json").read_text())
    rows = [(row["name"], row["step"]) for row in record["rows"]]
    assert rows == [(name, step) for step in (40, 60) for name in ("live", "ema", "uniformaverage")]
    assert all(len(row["results"]["arithmetic"]["prompts"]) == 3 for row in record["rows"])
    # One engine for each, never two at a time; nothing is left of the models.
    assert len(vllm.ENGINES) == 6 and {engine["alive"] for engine in vllm.ENGINES} == {0}
    assert vllm.distributed.CLEANED == [0] * 6
    assert list((tmp_path / "temporary").iterdir()) == []


def test_the_engine_reads_the_average(run, tmp_path, vllm, monkeypatch):
    """What is served is what ``average_checkpoints`` writes, tensor by tensor."""
    seen = {}
    held = AutoModelForCausalLM.from_pretrained

    def spy(folder, **arguments):
        seen[Path(folder).name] = load_file(next(Path(folder).glob("*.safetensors")))
        return held(folder, **arguments)

    monkeypatch.setattr(vllm.AutoModelForCausalLM, "from_pretrained", spy)
    plan = EvaluationPlan(("arithmetic",), {}, prompts=2, samples=1, max_new_tokens=1, backend="vllm")
    rule = EMA(half_life_fraction=0.2, update_freq=10)
    list(evaluate_models([run], plan, lambda trajectory: {"mine": rule}, [50]))
    average_checkpoints(run, rule, tmp_path / "out", at=50)
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert seen["mine"].keys() == written.keys()
    assert all(torch.equal(seen["mine"][name], written[name]) for name in written)


def test_settings_of_the_engine_are_passed_on(run, lagless, vllm):
    options = ["--dtype", "bfloat16", "--gpu-memory", ".5", "--max-model-len", "512", "--tensor-parallel", "2"]
    code, _, shown = lagless("evaluate", run / "checkpoint-60", *CLOSED, *options, "--seed", "7")
    assert code == 0, shown
    [engine] = vllm.ENGINES
    expected = {"dtype": "bfloat16", "gpu_memory_utilization": 0.5, "max_model_len": 512, "tensor_parallel_size": 2}
    assert engine.items() >= (expected | {"seed": 7, "torch_dtype": torch.bfloat16}).items()


def test_an_engine_that_does_not_start_says_what_to_change(run, lagless, vllm):
    code, _, shown = lagless("evaluate", run / "checkpoint-60", *CLOSED, "--max-model-len", "9999")
    assert code == 2 and "greater than the derived 1024" in shown and "Lower --max-model-len" in shown
    code, _, shown = lagless("evaluate", run / "checkpoint-60", *CLOSED, "--tensor-parallel", "4")
    assert code == 2 and "larger than the number of available GPUs" in shown


def test_settings_of_the_engine_belong_to_vllm(run, lagless):
    code, _, shown = lagless("evaluate", run, "--task", "arithmetic", "--gpu-memory", ".5")
    assert code == 2 and "gpu_memory_utilization are settings of vLLM's engine" in shown


def test_steps_that_the_run_does_not_have(run, lagless, vllm):
    code, _, shown = lagless("evaluate", run, *CLOSED, "--at", "33")
    assert code == 2 and "at=33: the run has checkpoints at 0, 10" in shown and not vllm.ENGINES
