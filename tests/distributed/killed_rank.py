"""Rank 1 is killed while all ranks save; run by test_killed.py."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file

import lagless.averaging._state_file as state
import lagless.integrations.distributed as distributed
from lagless import EMA, Averager
from lagless.checkpoints._writer import ModelWriter
from lagless.posthoc import average_checkpoints

from .averager_checks import make_model, run_to, shard
from .ranks import join


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def kill_rank_1_at_call(number: int, owner: object, name: str) -> None:
    original, calls = getattr(owner, name), []

    def call(*arguments, **options):
        calls.append(None)
        if dist.get_rank() == 1 and len(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments, **options)

    setattr(owner, name, call)


def save_until_killed(shared: Path, what: str) -> None:
    rank, _ = join()
    folder = shared / what
    folder.mkdir(exist_ok=True)
    model = shard(make_model())
    averager = Averager(model, EMA(decay=0.9))
    run_to(model, averager, 0, 2)
    if what == "save":
        work = lambda: averager.save(folder / "state.safetensors")  # noqa: E731
        victim = state, "gather"
    elif what == "export":
        work = lambda: distributed.export_model(averager, model, folder / "out", overwrite=True)  # noqa: E731
        victim = distributed, "gather"
    else:
        for step in (1, 2) if rank == 0 else ():
            (shared / f"run/checkpoint-{step}").mkdir(parents=True)
            tensors = {f"w{i}": torch.full((100,), float(step * i)) for i in range(8)}
            save_file(tensors, shared / f"run/checkpoint-{step}/model.safetensors")
        dist.barrier()
        options = {"overwrite": True, "max_shard_size": 500, "group": dist.group.WORLD}
        work = lambda: average_checkpoints(shared / "run", EMA(decay=0.9), folder / "out", **options)  # noqa: E731
        victim = ModelWriter, "__call__"
    work()
    before = contents(folder)
    run_to(model, averager, 2, 4)
    dist.barrier()
    kill_rank_1_at_call(3, *victim)
    try:
        work()
    except Exception as error:
        assert contents(folder) == before and before
        print(f"<kept> {type(error).__name__}: {error}", flush=True)
    os._exit(0)  # without saying goodbye to a rank that is gone
