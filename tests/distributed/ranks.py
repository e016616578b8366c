"""Checks that several gloo ranks run together, each rank a process of its own.

A script holds functions ``check_*(rank, world, folder)``. All ranks of a launch run all of them in order; a test then
asks for one by name and world size.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ..processes import Ended

WAIT = 60  # seconds that a rank waits for the others


def join() -> tuple[int, int]:
    """Become a rank: its number, and how many there are."""
    dist.init_process_group("gloo", timeout=timedelta(seconds=WAIT))
    return dist.get_rank(), dist.get_world_size()


def run_checks(checks: dict[str, Callable[[int, int, Path], Any]], folder: Path) -> None:
    """Run the checks on this rank and say of each how it went."""
    rank, world = join()
    torch.manual_seed(0)
    for name, check in checks.items():
        own = folder / name
        own.mkdir(parents=True, exist_ok=True)
        try:
            check(rank, world, own)
            print(f"\n<{name}> passed", flush=True)
        except Exception:
            print(f"\n<{name}> failed on rank {rank} of {world}\n{traceback.format_exc()}", flush=True)
        dist.barrier()
    dist.destroy_process_group()


def outcome(results: list[Ended], name: str) -> str:
    """What the ranks said that did not pass; empty if all did."""
    return "\n".join(
        r.output.partition(f"<{name}>")[2].partition("\n<check")[0] or r.output
        for r in results
        if f"<{name}> passed" not in r.output
    )
