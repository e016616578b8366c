"""Processes for tests that need several, forked from one that has imported the libraries and done nothing else.

Importing them takes longer than most of what a process is started for here.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import runpy
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from lagless import cli

TIMEOUT = 240  # seconds for a launch
GRACE = 60  # seconds that the others have when one failed
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    [
        "pytest",
        "torch.distributed.checkpoint",
        "torch.distributed.fsdp",
        "torch.distributed.tensor.parallel",
        "accelerate",
        "transformers.trainer",
        "transformers.models.auto.modeling_auto",
        "transformers.models.auto.tokenization_auto",
        "transformers.models.llama.modeling_llama",
        "trl",
        "lagless.cli",
        "lagless.integrations.transformers",
    ]
)


class Ended(NamedTuple):
    """How a process ended and what it printed."""

    exitcode: int | None
    output: str


def start(
    target: Callable[..., Any], *arguments: Any, output: Path, env: Mapping[str, str] | None = None
) -> ForkServerProcess:
    """A process that calls ``target`` in the present folder and prints to the file ``output``."""
    process = _CONTEXT.Process(target=_call, args=(target, arguments, output, dict(env or {})))
    process.start()
    return process


def launch(target: Callable[..., Any], world: int, *arguments: Any, timeout: float = TIMEOUT) -> list[Ended]:
    """Call ``target`` on ``world`` ranks, which find each other as those of torchrun do."""
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    env = {
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_RUN_ID": "tests",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder, str(rank)) for rank in range(world)]
        ranks = [
            start(target, *arguments, output=output, env=env | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
            for rank, output in enumerate(outputs)
        ]
        join(*ranks, timeout=timeout)
        return [
            Ended(process.exitcode, output.read_text() if output.exists() else "")
            for process, output in zip(ranks, outputs, strict=True)
        ]


def join(*processes: ForkServerProcess, timeout: float = TIMEOUT) -> None:
    """Wait until all have ended; kill those that take longer than ``timeout`` seconds, or wait for one that failed."""
    deadline = time.monotonic() + timeout
    try:
        while (running := [p for p in processes if p.is_alive()]) and (left := deadline - time.monotonic()) > 0:
            wait([process.sentinel for process in running], left)
            if any(process.exitcode for process in processes):
                deadline = min(deadline, time.monotonic() + GRACE)
    finally:
        for process in processes:
            process.kill()
            process.join()


def run_script(path: Path, *arguments: Any) -> None:
    """What ``python path arguments`` does."""
    sys.argv = [str(path), *map(str, arguments)]
    runpy.run_path(str(path), run_name="__main__")


def run_command(cache: Path, *arguments: str) -> None:
    """What ``lagless arguments`` does, with data sets cached in ``cache``."""
    import datasets

    datasets.config.HF_DATASETS_CACHE = cache
    sys.argv = ["lagless", *arguments]
    cli.main()


def _call(target: Callable[..., Any], arguments: tuple[Any, ...], output: Path, env: dict[str, str]) -> None:
    with output.open("w") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    os.environ.update(env)
    gc.freeze()  # garbage is sought in what is made from here on
    torch.set_num_threads(1)
    target(*arguments)
