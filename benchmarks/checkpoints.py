"""Averages of stored checkpoints against plainly reading and writing the same files.

Makes checkpoints of GPT-2 124M in a temporary folder, in the page cache, and removes them at the end.
Run: ``python benchmarks/checkpoints.py [--repeats 7] [--small]``.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from _harness import measure, report
from safetensors.torch import save_file

from lagless import BEMA
from lagless.checkpoints import find_checkpoints
from lagless.posthoc import average_checkpoints, stream_product
from lagless.rules import Rule

CHUNK = 8 << 20
GRID: dict[str, Rule] = {
    f"ema{power}-bias{bias}": BEMA.paper(ema_power=power, bias_power=bias, update_freq=100)
    for power in (0.1, 0.2, 0.3, 0.4, 0.5)
    for bias in (0.1, 0.2, 0.3, 0.4, 0.5)
}
WRITTEN = dict(list(GRID.items())[:4])
CLEAN = "(removing what {} wrote)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--checkpoints", type=int, default=9)
    parser.add_argument("--memory", type=int, default=2**30, help="bound on buffers, in bytes")
    parser.add_argument(
        "--small", action="store_true", help="a hundredth of the size: checks that it runs, times mean little"
    )
    arguments = parser.parse_args()

    tensors = gpt2(width=64, layers=4) if arguments.small else gpt2(width=768, layers=12)
    size = 4 * sum(int(np.prod(shape)) for shape in tensors.values())
    needed = size * (arguments.checkpoints + 2 * len(WRITTEN))
    with tempfile.TemporaryDirectory(prefix="lagless-benchmark-") as temporary:
        folder = Path(temporary)
        if (free := shutil.disk_usage(folder).free) < 1.1 * needed:
            raise SystemExit(f"{folder}: {needed / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free. Set TMPDIR.")
        run = make_run(folder / "run", tensors, arguments.checkpoints)
        seconds, peaks = benchmark(run, folder, size, arguments)

    read, read_and_write = seconds["plain reading"], seconds["plain reading, then writing 4"]
    print(
        f"{arguments.checkpoints} checkpoints of {len(tensors)} tensors, float32, {size / 1e6:.0f} MB each; "
        f"{arguments.repeats} repeats, medians"
    )
    for name, s in seconds.items():
        print(f"{name:36s} {s * 1e3:9.1f} ms   {s / read:6.2f} x plain reading")
    for name, peak in peaks.items():
        print(f"{name:36s} {peak / 1e6:9.1f} MB at the peak, bound {arguments.memory / 1e6:.0f} MB")
    if arguments.small:
        return
    report(
        "checkpoints-cpu",
        {
            "checkpoints": arguments.checkpoints,
            "tensors": len(tensors),
            "parameters": size // 4,
            "repeats": arguments.repeats,
            "seconds": seconds,
            "peak_bytes": peaks,
            "memory_bound": arguments.memory,
        },
        {
            "25 settings / plain reading": (seconds["lagless, 25 settings"] / read, "<=", 2.5),
            "1 setting / plain reading": (seconds["lagless, 1 setting"] / read, "<=", 1.3),
            "4 models written / plain reading and writing": (
                seconds["lagless, 4 models written"] / read_and_write,
                "<=",
                1.2,
            ),
            "peak / bound": (max(peaks.values()) / arguments.memory, "<=", 1.0),
        },
    )


def benchmark(
    run: Path, folder: Path, size: int, arguments: argparse.Namespace
) -> tuple[dict[str, float], dict[str, float]]:
    """Median seconds per candidate, and the peak of resident memory beyond the start for those of ours."""
    files = sorted(run.glob("*/model.safetensors"))
    trajectory = find_checkpoints(run)
    weights = np.random.default_rng(0).dirichlet(np.ones(len(files)), size=len(GRID))

    def product(rows: int) -> Callable[[], object]:
        return lambda: stream_product(trajectory.checkpoints, weights[:rows], discard, memory=arguments.memory)

    ours = {
        "lagless, 1 setting": product(1),
        "lagless, 25 settings": product(25),
        "lagless, 4 models written": lambda: average_checkpoints(
            run, WRITTEN, folder / "ours", memory=arguments.memory
        ),
    }
    peaks = peaks_of(ours)
    shutil.rmtree(folder / "ours")
    content = files[-1].read_bytes()
    # Writing leaves the system with dirty pages to flush in the background, so reading is measured first and alone.
    seconds = measure(
        {
            "plain reading": lambda: read_plainly(files),
            "plain reading, 2 threads": lambda: read_in_threads(files, 2),
            "lagless, 1 setting": ours["lagless, 1 setting"],
            "lagless, 25 settings": ours["lagless, 25 settings"],
        },
        arguments.repeats,
    )
    # Each writes into a clean cache: the second of two would wait while the system flushes what the first wrote.
    writing = measure(
        {
            "plain reading, then writing 4": lambda: (read_plainly(files), write_plainly(folder / "plain", content)),
            CLEAN.format("plain"): lambda: remove(folder / "plain"),
            "lagless, 4 models written": ours["lagless, 4 models written"],
            CLEAN.format("ours"): lambda: remove(folder / "ours"),
        },
        arguments.repeats,
    )
    seconds |= {name: s for name, s in writing.items() if not name.startswith("(")}
    return seconds, peaks


def remove(folder: Path) -> None:
    shutil.rmtree(folder)
    os.sync()


def gpt2(width: int, layers: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of GPT-2's tensors."""
    block = {
        "ln_1.weight": (width,),
        "ln_1.bias": (width,),
        "attn.c_attn.weight": (width, 3 * width),
        "attn.c_attn.bias": (3 * width,),
        "attn.c_proj.weight": (width, width),
        "attn.c_proj.bias": (width,),
        "ln_2.weight": (width,),
        "ln_2.bias": (width,),
        "mlp.c_fc.weight": (width, 4 * width),
        "mlp.c_fc.bias": (4 * width,),
        "mlp.c_proj.weight": (4 * width, width),
        "mlp.c_proj.bias": (width,),
    }
    ends = {"wte.weight": (50257, width), "wpe.weight": (1024, width), "ln_f.weight": (width,), "ln_f.bias": (width,)}
    return ends | {f"h.{i}.{name}": shape for i in range(layers) for name, shape in block.items()}


def make_run(run: Path, tensors: dict[str, tuple[int, ...]], count: int) -> Path:
    for i in range(count):
        torch.manual_seed(i)
        checkpoint = run / f"checkpoint-{100 * (i + 1)}"
        checkpoint.mkdir(parents=True)
        state = {name: torch.randn(shape) for name, shape in tensors.items()}
        save_file(state, checkpoint / "model.safetensors", {"format": "pt"})
        (checkpoint / "config.json").write_text("{}")
    return run


def discard(name: str, start: int, block: torch.Tensor) -> None:
    pass


def read_plainly(files: list[Path]) -> None:
    buffer = bytearray(CHUNK)
    for path in files:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def read_in_threads(files: list[Path], count: int) -> None:
    threads = [threading.Thread(target=read_plainly, args=(files[i::count],)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def write_plainly(folder: Path, content: bytes) -> None:
    view = memoryview(content)
    for name in WRITTEN:
        (folder / name).mkdir(parents=True)
        with (folder / name / "model.safetensors").open("wb", buffering=0) as file:
            for start in range(0, len(view), CHUNK):
                file.write(view[start : start + CHUNK])


def peaks_of(calls: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Peak of resident memory during each call, in bytes beyond what was resident before the first (Linux)."""
    peaks = {}
    reset = Path("/proc/self/clear_refs")
    reset.write_text("5")
    before = _peak()
    for name, call in calls.items():
        reset.write_text("5")
        call()
        peaks[name] = float(_peak() - before)
    return peaks


def _peak() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


if __name__ == "__main__":
    main()
