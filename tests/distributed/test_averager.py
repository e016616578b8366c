"""The Averager on sharded parameters: 2 and 3 gloo ranks, and what one process makes of their states."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from lagless import EMA, Averager

from ..processes import Ended, launch
from .averager_checks import CHECKS, make_model, resume
from .ranks import outcome, run_checks

Results = dict[int, list[Ended]]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def results(runs: Path) -> Results:
    return {world: launch(run_checks, world, CHECKS, runs / str(world)) for world in (2, 3)}


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("name", CHECKS)
def test_ranks(results: Results, name: str, world: int) -> None:
    assert not (failed := outcome(results[world], name)), failed


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
@pytest.mark.parametrize("way", ["dcp", "file"])
def test_one_process_goes_on_from_three_ranks(results: Results, runs: Path, way: str) -> None:
    resume(runs / "3" / "check_state_for_another_world_size", make_model(), way)


def test_zero_3_is_refused() -> None:
    model = nn.Linear(2, 2)
    model.weight.ds_id = 0  # type: ignore[assignment]
    model.weight.data = torch.empty(0)
    with pytest.raises(NotImplementedError, match="ZeRO-3.*Train with ZeRO stage 1 or 2, or with FSDP2"):
        Averager(model, EMA())


def test_zero_1_and_2_keep_whole_parameters_behind_an_engine() -> None:
    class DeepSpeedEngine(nn.Module):  # stands for the wrapper of that name
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

    averager = Averager(DeepSpeedEngine(nn.Linear(2, 2)), EMA())
    averager.update()
    assert list(averager.read()) == ["weight", "bias"]


def test_names_are_those_of_the_module_that_activation_checkpointing_wraps() -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    averager = Averager(nn.Sequential(checkpoint_wrapper(nn.Linear(2, 2))), EMA())
    averager.update()
    assert list(averager.read()) == ["0.weight", "0.bias"]
