"""Watch a large run in little memory: ``python -m tests.watch.memory [MB of a checkpoint] [MB of memory]``.

The process that watches may have so many bytes of private memory (RLIMIT_DATA), which covers the interpreter and torch
too. Prints what it had at most.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from tests.model_files import save_sharded

_CHILD = """
import json, resource, sys
from pathlib import Path
megabytes = int(sys.argv[3])
import torch
from lagless import BEMA, EMA, PowerEMA, UniformAverage
from lagless.watch import Settings, Watch
torch.set_num_threads(1)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
resource.setrlimit(resource.RLIMIT_DATA, (megabytes << 20, megabytes << 20))
rules = {"ema": EMA(), "bema": BEMA(), "uniform": UniformAverage(), "power": PowerEMA()}
with Watch(Path(sys.argv[1]), Path(sys.argv[2]), rules, Settings(settle=0.0, keep_states=1)) as watch:
    while watch.step():
        pass
    steps = watch.averages.record.steps
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps({"steps": steps, "before": before // 1024, "peak": after // 1024}))
"""


def measure(megabytes: int, limit: int, place: Path, checkpoints: int = 2) -> dict[str, int]:
    """Watch checkpoints of so many megabytes with ``limit`` megabytes of memory.

    Returns:
        The largest resident memory in megabytes, before the watch and in all.
    """
    count = megabytes * 2**20 // 4 // 8
    for step in range(1, checkpoints + 1):
        generator = torch.Generator().manual_seed(step)
        state = {f"layers.{i}.weight": torch.randn(count, generator=generator) for i in range(8)}
        save_sharded(state, place / f"run/checkpoint-{step}", 4)
        del state
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", _CHILD, str(place / "run"), str(place / "out"), str(limit)]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    found = json.loads(ended.stdout.splitlines()[-1])
    assert found["steps"] == list(range(1, checkpoints + 1)), found
    return found


if __name__ == "__main__":
    size, most = (int(word) for word in (*sys.argv[1:], "2000", "600")[:2])
    with tempfile.TemporaryDirectory(dir=os.environ.get("BENCH_DIR")) as folder:
        found = measure(size, most, Path(folder))
    print(
        f"checkpoints of {size} MB under a limit of {most} MB: {found['before']} MB before, {found['peak']} MB at most"
    )
