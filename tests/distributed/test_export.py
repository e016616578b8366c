"""Models from sharded averages, and averages of sharded checkpoints."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lagless.checkpoints import fingerprint, open_checkpoint
from lagless.posthoc import average_checkpoints

from ..processes import TIMEOUT, Ended, launch, run_script
from .export_checks import CHECKS, MESHES, RULES
from .ranks import outcome, run_checks

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
ENV = os.environ | {"OMP_NUM_THREADS": "1"}
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


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("kind", ["top/step", "accelerate/checkpoint"])
def test_shards_of_ranks_read_as_the_whole(results: Results, runs: Path, kind: str, world: int) -> None:
    stored = runs / str(world) / "check_stored_checkpoints"
    single, sharded = open_checkpoint(stored / "single/checkpoint-20"), open_checkpoint(stored / f"{kind}-20")
    assert sharded.tensors == single.tensors
    assert fingerprint(sharded) == fingerprint(single)
    for name in MESHES:  # ranges that begin and end within chunks
        assert torch.equal(sharded.read_range(name, 3, 25), single.read_range(name, 3, 25))


@pytest.mark.parametrize("kind", ["top", "accelerate"])
def test_averages_of_shards_are_those_of_whole_files(results: Results, runs: Path, tmp_path: Path, kind: str) -> None:
    stored = runs / "3" / "check_stored_checkpoints"
    for run in (kind, "single"):
        average_checkpoints(stored / run, RULES, tmp_path / run, memory=200_000)
    for rule in RULES:
        sharded, single = ((tmp_path / run / rule / "model.safetensors").read_bytes() for run in (kind, "single"))
        assert sharded == single


def test_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    page = Path(__file__).parents[2] / "docs" / "distributed.md"
    (tmp_path / "train.py").write_text(page.read_text().split("```python\n")[1].split("```")[0])
    for rank in launch(run_script, 2, tmp_path / "train.py"):
        assert rank.exitcode == 0, rank.output
    assert open_checkpoint(tmp_path / "ema").tensors
    assert (tmp_path / "checkpoint-10/averager.safetensors").is_file()


def test_the_command_under_torchrun_writes_what_it_writes_alone(results: Results, runs: Path, tmp_path: Path) -> None:
    stored = runs / "2" / "check_stored_checkpoints"
    start = str(stored / "single" / "checkpoint-10")
    average = ["lagless", "average", str(stored / "top"), "--rule", "ema", "--start", start, "--max-shard-size", "4KB"]
    commands = {"alone": ["-m", *average, "-o"], "together": [*TORCHRUN, "-m", "--", *average, "-o"]}
    for name, command in commands.items():
        done = subprocess.run(
            [sys.executable, *command, str(tmp_path / name)],
            env=ENV,
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("written to") == 1  # by one of the processes
    alone, together = ({p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in ("alone", "together"))
    assert len(alone) > 3 and alone == together
