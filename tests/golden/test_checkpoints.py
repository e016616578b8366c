"""Runs, averages and exports on disk, written by an earlier version: read, averaged, resumed and replaced as before."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch import Tensor

from .cases import CHECKPOINTS, COMBINATION, END, FILES, MODEL_RULES, RULES, SAVED, Model, flat, follow, weights_at
from .names import (
    Averager,
    average_checkpoints,
    combine_checkpoints,
    export_model,
    open_checkpoint,
)

FOLDER = FILES / "checkpoints"
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")


def record(folder: Path) -> dict[str, Any]:
    """``lagless.json`` without the version, and without the files' names, which the format of the run decides."""
    content = json.loads((folder / "lagless.json").read_text())
    assert content.pop("lagless")
    if "anchor" in content:  # version 0.1 told the weight on the first checkpoint, which is the anchor without burn-in
        content["weight_on_start"] = content.pop("anchor")["weight"]
    content.pop("files", None)  # earlier versions listed none
    for source in content.get("sources", ()):
        assert source.pop("files")
    return content


def check_same_model(folder: Path, golden: Path) -> None:
    ours, theirs = load_file(folder / "model.safetensors"), load_file(golden / "model.safetensors")
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        # Sums that lie between two numbers are rounded either way, as the last bit of a wider type has it.
        tolerance = torch.finfo(tensor.dtype).eps if tensor.dtype.is_floating_point else 0.0
        torch.testing.assert_close(ours[name], tensor, rtol=tolerance, atol=0.0)
    ours, theirs = record(folder), record(golden)
    assert ours.keys() >= theirs.keys()
    for key, value in theirs.items():
        # Figures are sums and powers in float64, whose last bits depend on the processor.
        if key in ("mean_age", "effective_iterates", "weight_on_start"):
            assert ours[key] == pytest.approx(value, rel=1e-12, abs=1e-12), key
        elif key == "sources":
            weights = [[source.pop("weight") for source in sources] for sources in (ours[key], value)]
            assert weights[0] == pytest.approx(weights[1], rel=1e-12, abs=1e-12)
            assert ours[key] == value
        else:
            assert ours[key] == value, key


def contents(folder: Path) -> dict[str, Tensor]:
    checkpoint = open_checkpoint(folder)
    return {name: checkpoint.read_tensor(name) for name in checkpoint.tensors}


@pytest.mark.parametrize("kind", ["sharded", "torch"])
@pytest.mark.parametrize("step", CHECKPOINTS)
def test_checkpoints_are_read(kind: str, step: int) -> None:
    stored = contents(FOLDER / kind / f"checkpoint-{step}")
    assert torch.equal(flat(stored), flat(weights_at(step, torch.float32)))
    assert torch.equal(stored["positions"], torch.arange(5)) and len(stored) == 4


@pytest.mark.parametrize("kind", ["sharded", "torch"])
def test_averages_of_a_run(tmp_path: Path, kind: str) -> None:
    average_checkpoints(FOLDER / kind, RULES, tmp_path / "all", accumulate="float64")
    for name in RULES:
        check_same_model(tmp_path / "all" / name, FOLDER / "averaged" / name)
    average_checkpoints(FOLDER / kind, RULES["bema"], tmp_path / "one", dtype="bfloat16")
    check_same_model(tmp_path / "one", FOLDER / "averaged-bfloat16")


def test_a_weighted_sum_in_memory() -> None:
    paths = [FOLDER / "torch" / f"checkpoint-{step}" for step in CHECKPOINTS]
    [combined] = combine_checkpoints(paths, COMBINATION)
    wanted = load_file(FOLDER / "combined.safetensors")
    assert combined.keys() == wanted.keys()
    assert all(torch.equal(combined[name], tensor) for name, tensor in wanted.items())


def test_earlier_averages_are_replaced(tmp_path: Path) -> None:
    for golden in ("averaged", "averaged-bfloat16"):
        shutil.copytree(FOLDER / golden, tmp_path / golden)
        rules = RULES if golden == "averaged" else RULES["ema-decay"]
        average_checkpoints(FOLDER / "sharded", rules, tmp_path / golden, overwrite=True)
    assert record(tmp_path / "averaged-bfloat16")["rule"]["rule"] == "EMA"


def averaged_model() -> tuple[Model, Averager]:
    """A model and an Averager that have taken no step."""
    model = Model()
    return model, Averager(model, MODEL_RULES)


def check_resumed(model: Model, averager: Averager) -> None:
    """A run that was resumed gives what the states of Averagers are expected to give."""
    assert averager.step == SAVED
    assert torch.equal(flat(model.tensors()), flat(weights_at(SAVED, torch.float32)))
    expected = load_file(FILES / "averager" / "expected.safetensors")
    for step in (SAVED, END):
        follow(averager, model.tensors(), averager.step, step)
        for name in MODEL_RULES:
            assert torch.equal(flat(averager.read(name)), expected[f"one-{name}/{step}/{name}"]), f"{name} at {step}"


def test_folders_of_torch_distributed_checkpoint_go_on() -> None:
    model, averager = averaged_model()
    state = {"model": model.state_dict()}
    dcp.load(state, checkpoint_id=FILES / "dcp" / "model")
    model.load_state_dict(state["model"])
    averages = {"averager": averager.state_dict()}
    dcp.load(averages, checkpoint_id=FILES / "dcp" / "averager")
    averager.load_state_dict(averages["averager"])
    check_resumed(model, averager)


def test_a_folder_of_torch_distributed_checkpoint_is_read() -> None:
    assert torch.equal(flat(contents(FILES / "dcp" / "model")), flat(weights_at(SAVED, torch.float32)))


def test_an_export_is_read_and_replaced(tmp_path: Path) -> None:
    expected = load_file(FILES / "averager" / "expected.safetensors")
    assert torch.equal(flat(contents(FILES / "export")), expected[f"one-bema/{SAVED}/bema"])
    model, averager = averaged_model()
    follow(averager, model.tensors(), 0, SAVED)
    shutil.copytree(FILES / "export", tmp_path / "export")
    (tmp_path / "export" / "mine").touch()
    with pytest.raises(Exception, match="lagless did not write mine"):
        export_model(averager, model, tmp_path / "export", "bema", overwrite=True)
    (tmp_path / "export" / "mine").unlink()
    export_model(averager, model, tmp_path / "export", "bema", overwrite=True)
    check_same_model(tmp_path / "export", FILES / "export")
