"""Averages of checkpoints beside others who write to the same folder."""

from __future__ import annotations

import os
import re
import stat
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lagless import EMA
from lagless.checkpoints import CheckpointError
from lagless.posthoc import average_checkpoints

RULE = EMA(decay=0.5, update_freq=1)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    for step in (1, 2, 3):
        folder = tmp_path / "run" / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        save_file({"w": torch.full((4, 2), float(step))}, folder / "model.safetensors")
    return tmp_path / "run"


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_that_appears_while_averaging_stays(run: Path, tmp_path: Path, overwrite: bool) -> None:
    out = tmp_path / "out"

    def appear(*_: int) -> None:
        out.mkdir(exist_ok=True)
        (out / "thesis.txt").write_text("mine")

    with pytest.raises(CheckpointError, match="lagless did not write it"):
        average_checkpoints(run, RULE, out, progress=appear, overwrite=overwrite)
    assert [(entry.name, entry.read_text()) for entry in out.iterdir()] == [("thesis.txt", "mine")]
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["out", "run"]


def test_of_two_averages_that_end_at_once_one_wins(run: Path, tmp_path: Path) -> None:
    end, out = threading.Barrier(2), tmp_path / "out"

    def average(decay: float) -> str:
        def wait(done: int, total: int) -> None:
            if done == total:
                end.wait(30)

        try:
            average_checkpoints(run, EMA(decay=decay, update_freq=1), out, progress=wait)
        except CheckpointError as error:
            return str(error)
        return "done"

    with ThreadPoolExecutor(2) as pool:
        outcomes = sorted(pool.map(average, (0.2, 0.7)))
    assert re.search(rf"out: changed .*another run of lagless \(process {os.getpid()} on .*\) wrote it", outcomes[0])
    assert outcomes[1] == "done"
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["out", "run"]


def test_permissions_are_those_of_the_checkpoints_or_fewer(run: Path, tmp_path: Path) -> None:
    for file in run.glob("*/*"):
        file.chmod(0o600)
    average_checkpoints(run, {"a": RULE, "b": RULE}, tmp_path / "out")
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert len(files) == 7 and {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o600}


def test_of_two_averages_for_one_new_folder_the_first_wins(run: Path, tmp_path: Path) -> None:
    out, files = tmp_path / "out", []

    def overtake(*_: int) -> None:
        if not files:
            average_checkpoints(run, EMA(decay=0.2, update_freq=1), out)
            files.append((out / "model.safetensors").read_bytes())

    with pytest.raises(CheckpointError, match="another run of lagless .process [0-9]+ on .* wrote it"):
        average_checkpoints(run, RULE, out, progress=overtake)
    assert files == [(out / "model.safetensors").read_bytes()]
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["out", "run"]
