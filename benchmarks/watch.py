"""Time to take a checkpoint into four averages, beside the time to read it: ``python benchmarks/watch.py [MB]``.

Reading is the fingerprint of the same files, block by block through the same reader. Files are dropped from the page
cache before both, as a checkpoint is that another machine wrote; ``cached`` leaves them there.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file

from lagless import EMA, PowerEMA, UniformAverage
from lagless.checkpoints import fingerprint, open_checkpoint
from lagless.watch._averages import Averages
from lagless.watch._scan import stamp_of_files

RULES = {"ema": EMA(half_life_fraction=0.1), "slow": EMA(half_life_fraction=0.3), "uniform": UniformAverage()}
RULES["power"] = PowerEMA()


def forget(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def timed(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def main(megabytes: int) -> None:
    torch.set_num_threads(1)
    place = Path(tempfile.mkdtemp(dir=os.environ.get("BENCH_DIR")))
    try:
        count = megabytes * 2**20 // 4 // 16
        for dtype in (torch.float32, torch.bfloat16):
            run = place / str(dtype)
            for step in range(4):
                folder = run / f"checkpoint-{step}"
                folder.mkdir(parents=True)
                save_file({f"w{i}": torch.randn(count).to(dtype) for i in range(16)}, folder / "model.safetensors")
            for cold in (True, False):
                averages = Averages(place / f"state-{dtype}-{cold}", RULES, keep=1)
                for step in range(4):
                    folder = run / f"checkpoint-{step}"
                    checkpoint = open_checkpoint(folder)
                    if cold:
                        forget(folder)
                    reading = timed(lambda: fingerprint(checkpoint))  # noqa: B023
                    if cold:
                        forget(folder)
                    taking = timed(lambda: averages.absorb(checkpoint, step, stamp_of_files(folder)))  # noqa: B023
                    kind = "cold" if cold else "cached"
                    print(
                        f"{dtype} {kind} step {step}: reading {reading:.2f} s, taking up {taking:.2f} s, "
                        f"{taking / reading:.2f} times as long",
                        flush=True,
                    )
                shutil.rmtree(averages.store.folder)
    finally:
        shutil.rmtree(place)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 512)
