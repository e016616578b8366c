"""Watch a large run in little memory: ``python -m tests.watch.memory [MB of a checkpoint] [MB of memory]``.

The process that watches may have so many bytes of private memory (RLIMIT_DATA), which covers the interpreter and torch
too. Prints what it had at most.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import tempfile
import traceback
from pathlib import Path

import torch
from tests.model_files import save_sharded

from lagless import BEMA, EMA, PowerEMA, UniformAverage
from lagless.watch import Settings, Watch

RULES = {"ema": EMA(), "bema": BEMA(), "uniform": UniformAverage(), "power": PowerEMA()}


def measure(megabytes: int, limit: int | None, place: Path, checkpoints: int = 2) -> tuple[int, int]:
    """Watch checkpoints of so many megabytes, with ``limit`` megabytes of private memory, in a process of its own.

    Returns:
        The largest resident memory in megabytes, when the watch began and in all.
    """
    count = megabytes * 2**20 // 4 // 8
    for step in range(1, checkpoints + 1):
        generator = torch.Generator().manual_seed(step)
        state = {f"layers.{i}.weight": torch.randn(count, generator=generator) for i in range(8)}
        save_sharded(state, place / f"run/checkpoint-{step}", 4)
        del state
    child = os.fork()
    if child == 0:
        code = 1
        try:
            _watch(place, limit, list(range(1, checkpoints + 1)))
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    assert status == 0
    return tuple(json.loads((place / "found.json").read_text()))


def _watch(place: Path, limit: int | None, steps: list[int]) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if limit is not None:
        resource.setrlimit(resource.RLIMIT_DATA, (limit << 20, limit << 20))
    with Watch(place / "run", place / "out", RULES, Settings(settle=0.0, keep_states=1)) as watch:
        while watch.step():
            pass
        assert watch.averages.record.steps == steps, list(watch.metrics.rows())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    (place / "found.json").write_text(json.dumps([before // 1024, peak // 1024]))


if __name__ == "__main__":
    torch.set_num_threads(1)
    given = [int(word) for word in sys.argv[1:]]
    size, most = given[0] if given else 2000, given[1] if given[1:] else 600
    with tempfile.TemporaryDirectory(dir=os.environ.get("BENCH_DIR")) as folder:
        began, at_most = measure(size, most, Path(folder))
    print(f"checkpoints of {size} MB under a limit of {most} MB: {began} MB when it began, {at_most} MB at most")
