"""The command, its exit codes, and one watcher per folder."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.model_files import make_state
from tests.watch.trainer import save
from typer.testing import CliRunner

from lagless.checkpoints import CheckpointError
from lagless.cli import app
from lagless.posthoc import average_checkpoints
from lagless.rules import EMA
from lagless.watch import Until

HOLD = """
import sys, time
from pathlib import Path
from lagless.watch._lock import only_watcher
with only_watcher(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def command(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["watch", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


def test_once_takes_up_what_is_there_and_says_how_it_went(tmp_path: Path) -> None:
    run, quick = tmp_path / "run", ("--once", "--settle", 0, "--poll", 0.05)
    assert command(run, *quick)[0] == 4
    save(run, 10)
    assert command(run, *quick)[0] == 4
    for step in (20, 30):
        save(run, step)
    assert command(run, *quick)[0] == 0
    average_checkpoints(run, EMA(half_life_fraction=0.05), tmp_path / "posthoc", recursive=True)
    best, other = (load_file(p / "model.safetensors") for p in (tmp_path / "run-watch/best", tmp_path / "posthoc"))
    assert all(torch.equal(best[name], other[name]) for name in other)
    bad = make_state(40)
    bad["mlp.weight"][0, 0] = torch.nan
    save(run, 40, bad)
    code, text = command(run, *quick)
    assert code == 3 and "checkpoint-40 is left out" in " ".join(text.split())


def test_it_ends_at_a_step_or_when_nothing_comes(tmp_path: Path) -> None:
    for step in (10, 20):
        save(tmp_path / "run", step)
    quick = ("--settle", 0, "--poll", 0.05)
    assert command(tmp_path / "run", *quick, "--until", 20)[0] == 0
    assert command(tmp_path / "run", *quick, "--until", "idle:0.001")[0] == 0


@pytest.mark.parametrize("text", ["soon", "idle:", "idle:x", "-3"])
def test_other_ends_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="it must be a step, e.g. 5000, or idle:MINUTES"):
        Until.parse(text)


def test_a_second_watcher_is_refused_until_the_first_one_is_killed(tmp_path: Path, watching: Any) -> None:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    first = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "out")], stdout=subprocess.PIPE, env=env)
    try:
        assert first.stdout is not None and first.stdout.readline() == b"held\n"
        with pytest.raises(CheckpointError, match=f"process {first.pid} on .* is watching into this folder"):
            watching()
    finally:
        first.kill()
        first.communicate()
    watching()


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path, watching: Any) -> None:
    (tmp_path / "out").write_text("a file")
    with pytest.raises(CheckpointError, match="out: cannot be written"):
        watching()
