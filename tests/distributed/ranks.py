"""Checks that several gloo ranks run together, each rank a process of its own.

A script holds functions ``check_*(rank, world, folder)``. All ranks of a launch run all of them in order; a test then
asks for one by name and world size.
"""

from __future__ import annotations

import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

ROOT = Path(__file__).parents[2]
TIMEOUT = 240  # seconds for a launch
WAIT = 60  # seconds that a rank waits for the others


def launch(module: str, world: int, folder: Path, *arguments: str) -> list[subprocess.CompletedProcess[str]]:
    """Run ``module`` of this folder on ``world`` ranks; output and exit code of each."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "WORLD_SIZE": str(world), "GLOO_SOCKET_IFNAME": "lo"}
    env["RENDEZVOUS"] = f"file://{folder}/rendezvous-{world}"
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", f"tests.distributed.{module}", str(folder), *arguments]
    processes = [
        subprocess.Popen(
            command,
            env=env | {"RANK": str(rank)},
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world)
    ]
    try:
        outputs = [process.communicate(timeout=TIMEOUT)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [
        subprocess.CompletedProcess(command, process.returncode, output)
        for process, output in zip(processes, outputs, strict=True)
    ]


def join() -> tuple[int, int, Path]:
    """Become a rank: its number, how many there are, and the folder they share."""
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group(
        "gloo", os.environ["RENDEZVOUS"], rank=rank, world_size=world, timeout=timedelta(seconds=WAIT)
    )
    return rank, world, Path(sys.argv[1])


def run_checks(checks: dict[str, Callable[[int, int, Path], Any]]) -> None:
    """Run the checks on this rank and say of each how it went."""
    rank, world, folder = join()
    torch.manual_seed(0)
    for name, check in checks.items():
        own = folder / name
        own.mkdir(exist_ok=True)
        try:
            check(rank, world, own)
            print(f"\n<{name}> passed", flush=True)
        except Exception:
            print(f"\n<{name}> failed on rank {rank} of {world}\n{traceback.format_exc()}", flush=True)
        dist.barrier()
    dist.destroy_process_group()


def outcome(results: list[subprocess.CompletedProcess[str]], name: str) -> str:
    """What the ranks said that did not pass; empty if all did."""
    return "\n".join(
        r.stdout.partition(f"<{name}>")[2].partition("\n<check")[0] or r.stdout
        for r in results
        if f"<{name}> passed" not in r.stdout
    )
