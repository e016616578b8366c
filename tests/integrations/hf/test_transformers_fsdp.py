"""AveragingCallback on two ranks under FSDP2."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ...processes import launch, run_script

pytest.importorskip("trl")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Each rank has checked averages and returned models against the weights that it saw."""
    folder = tmp_path_factory.mktemp("fsdp")
    for rank in launch(run_script, 2, Path(__file__).with_name("fsdp_run.py"), folder):
        assert rank.exitcode == 0, rank.output[-3000:]
    return folder


@pytest.mark.parametrize("kind", ["Sharded", "Checkpointed"])  # with activation checkpointing, and state dicts gathered
def test_folders_load_and_hold_the_averages(hf, runs, kind):
    for run, name in (("whole", "bema"), ("whole", "ema"), ("best", "ema")):
        model = AutoModelForCausalLM.from_pretrained(runs / f"{kind}-{run}/averaged/{name}")
        expected = torch.load(runs / f"{kind}-{run}-{name}.pt", weights_only=True)
        assert hf.same(dict(model.state_dict()), expected)
        assert AutoTokenizer.from_pretrained(runs / f"{kind}-{run}/averaged/{name}")("weights")["input_ids"]
    for name in ("bema", "ema"):
        model = AutoModelForCausalLM.from_pretrained(runs / f"{kind}-whole/checkpoint-4/averaged/{name}")
        hf.close(hf.weights(model), torch.load(runs / f"{kind}-4-{name}.pt", weights_only=True))
    assert not [path for path in runs.rglob("*") if path.name.startswith(".") and "partial" in path.name]


@pytest.mark.parametrize("kind", ["Sharded", "Checkpointed"])
def test_resumed_equals_never_stopped(hf, runs, kind):
    for name in ("bema", "ema"):
        first, second = (
            AutoModelForCausalLM.from_pretrained(runs / f"{kind}-{run}/averaged/{name}") for run in ("whole", "stopped")
        )
        assert hf.same(hf.weights(first), hf.weights(second))


def test_trl_sharded(runs):
    """TRL's BEMACallback makes a second model of the sharded one's class, and fails before the first step."""
    for rank in (0, 1):
        assert "got mixed torch.Tensor and DTensor" in (runs / f"theirs-{rank}.txt").read_text()
