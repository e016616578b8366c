"""Kill a watch again and again, at random moments, while a run goes on: ``python -m tests.watch.kill_watch 200``.

Afterwards the averages must equal those of ``lagless average --recursive`` over the checkpoints that were taken up, bit
for bit, and after every kill the best model must load.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

import torch
from safetensors.torch import load_file
from tests.model_files import make_state
from tests.watch.trainer import QUICK, RULES, save

from lagless.posthoc import average_checkpoints
from lagless.watch import Until, Waiter, Watch, follow
from lagless.watch._record import read_record

STEP, KEPT = 10, 5


def wide(step: int) -> dict[str, torch.Tensor]:
    """Weights large enough that a kill often comes in the middle of them."""
    return make_state(step) | {"large.weight": torch.full((400, 1000), 1.0 / step).cumsum(0)}


def watch_on(run: Path, out: Path) -> None:
    """What a process does until it is killed."""
    with Watch(run, out, RULES, QUICK) as watch:
        follow(watch, Waiter(run), poll=0.01, until=Until())


def kill(kills: int, place: Path, seed: int = 0) -> int:
    """Run it; returns how many checkpoints were taken up.

    Raises:
        AssertionError: if an average differs, or the best model does not load.
    """
    chance, run, out, everything = random.Random(seed), place / "run", place / "out", place / "all"
    step, times = 0, 0
    while times < kills or len(_steps(out)) < 4:
        step += STEP
        for folder in (everything, run):
            save(folder, step, wide(step))
        shutil.rmtree(run / f"checkpoint-{step - KEPT * STEP}", ignore_errors=True)  # rotation
        for _ in range(chance.randint(1, 3)):
            child = os.fork()
            if child == 0:
                try:
                    watch_on(run, out)
                except BaseException:
                    traceback.print_exc()
                finally:
                    os._exit(1)
            time.sleep(chance.uniform(0.0, 0.4))
            os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
            assert os.WIFSIGNALED(status), "the watch ended by itself"
            times += 1
            _check_best(out)
    with Watch(run, out, RULES, QUICK) as watch:
        while watch.step():
            pass
        taken = watch.averages.record.steps
        average_checkpoints(everything, RULES, place / "posthoc", steps=taken, recursive=True)
        with watch.averages.snapshot() as snapshot:
            for name in RULES:
                wanted = load_file(place / "posthoc" / name / "model.safetensors")
                for tensor, value in snapshot.state(name):
                    assert torch.equal(value, wanted[tensor]), (name, tensor)
    _check_best(out)
    assert not [path for path in (out / "models").iterdir() if path.name.startswith(".")]
    return len(taken)


def _steps(out: Path) -> list[int]:
    record = read_record(out / "state") if (out / "state").is_dir() else None
    return [] if record is None else record.steps


def _check_best(out: Path) -> None:
    best = out / "best"
    if best.is_symlink():
        assert load_file(best / "model.safetensors").keys() == wide(1).keys() and (best / "config.json").is_file()


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        count = int(sys.argv[1]) if len(sys.argv) > 1 else 200
        print(f"{count} kills: {kill(count, Path(folder))} checkpoints taken up, all averages equal, best always loads")
