"""Side-by-side timing in one process: candidates alternate, medians and ratios are reported, results go to JSON."""

from __future__ import annotations

import json
import platform
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from datetime import date
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"


def measure(candidates: Mapping[str, Callable[[], object]], repeats: int, warmup: int = 2) -> dict[str, float]:
    """Median seconds per call. Each round runs every candidate once: a slow moment of the machine hits them all."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(warmup + repeats):
        for name, call in candidates.items():
            began = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - began)
    return {name: statistics.median(seconds[warmup:]) for name, seconds in times.items()}


def machine() -> dict[str, object]:
    """What the numbers were measured on."""
    cpu = platform.processor()
    if (info := Path("/proc/cpuinfo")).exists():
        cpu = next((line.split(":")[1].strip() for line in info.read_text().splitlines() if "model name" in line), cpu)
    commit = ""
    if shutil.which("git"):
        commit = subprocess.run(
            ["git", "describe", "--always", "--dirty"], capture_output=True, text=True
        ).stdout.strip()
    accelerator = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "cpu": cpu,
        "vectors": torch.backends.cpu.get_cpu_capability(),  # tells machines of one name apart
        "threads": torch.get_num_threads(),
        "accelerator": accelerator,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": commit,
        "date": date.today().isoformat(),
    }


def resident_bytes() -> int:
    """Resident memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def report(name: str, record: dict[str, object], targets: Mapping[str, tuple[float, str, float]]) -> None:
    """Print each target as met or missed, and write the record to results/NAME.json."""
    verdicts = {}
    for label, (value, relation, bound) in targets.items():
        met = value <= bound if relation == "<=" else value >= bound
        verdicts[label] = {"value": round(value, 3), "target": f"{relation} {bound}", "met": met}
        print(f"{'met   ' if met else 'MISSED'} {label}: {value:.2f} (target {relation} {bound})")
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"machine": machine()} | record | {"targets": verdicts}, indent=2) + "\n")
    print(f"written to {path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path}")
