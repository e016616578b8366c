"""Processes that torchrun started, and the progress of reading."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from lagless.cli._console import err, out


@contextmanager
def torchrun() -> Iterator[Any]:
    """Give the processes that torchrun started, of which only the first prints results; None without torchrun."""
    if not dist.is_torchelastic_launched():
        yield None
        return
    dist.init_process_group("gloo")
    out.quiet = dist.get_rank() > 0
    try:
        yield dist.group.WORLD
    finally:
        dist.destroy_process_group()


@contextmanager
def reading() -> Iterator[Callable[[int, int], None]]:
    """Give a function that shows how many bytes are read, of how many."""
    columns = TextColumn("reading"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()
    progress = Progress(*columns, console=err, transient=True, disable=out.quiet)
    task = progress.add_task("reading", total=None)

    def advance(done: int, total: int) -> None:
        progress.start()  # not before something is read, so that errors stand alone
        progress.update(task, completed=done, total=total)

    try:
        yield advance
    finally:
        progress.stop()
