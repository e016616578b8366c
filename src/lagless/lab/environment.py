"""What numbers were measured on: the machine, the versions, the commit."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

import torch

_PACKAGES = ("lagless", "torch", "transformers", "trl", "datasets", "accelerate")


def machine() -> dict[str, object]:
    """The processor, its memory and threads, the accelerators, and how many processes share the run."""
    cpu = platform.processor()
    if (info := Path("/proc/cpuinfo")).exists():
        cpu = next((line.split(":")[1].strip() for line in info.read_text().splitlines() if "model name" in line), cpu)
    accelerator = torch.accelerator.current_accelerator()
    name = accelerator and (torch.cuda.get_device_name() if accelerator.type == "cuda" else accelerator.type)
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "accelerator": name,
        "accelerators": torch.accelerator.device_count() if accelerator else 0,
        "processes": int(os.environ.get("WORLD_SIZE", "1")),
    }


def versions() -> dict[str, str]:
    """Of Python and of the packages that a training run goes through."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str | None:
    """The commit of the lagless that runs, with ``-dirty`` where files differ from it; None outside its repository."""
    # An installed package may lie in an ignored folder of somebody else's repository.
    if not _git("ls-files", Path(__file__).name):
        return None
    return _git("describe", "--always", "--dirty", "--abbrev=12", "--exclude=*")


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True)
    except OSError:  # no git
        return None
    return done.stdout.strip() or None
