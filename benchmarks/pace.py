"""Cost of a PACE step against AdamW followed by an EMA, and against the memory bandwidth.

On CPUs the parameters are those of GPT-2 124M (needs ``pip install -e '.[bench]'``); on an accelerator, 1.5 billion
float32 parameters. Run: ``python benchmarks/pace.py [--device cuda] [--repeats 15]``.
"""

from __future__ import annotations

import argparse
import ctypes
from pathlib import Path
from typing import Any

import torch
from _harness import measure, report, resident_bytes

from lagless import BEMA
from lagless.optim import PACE

ACCESSES = 9  # per parameter: read θ, g, m, v, ema; write θ, m, v, ema


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()

    torch.manual_seed(0)
    on_cpu = arguments.device == "cpu"
    parameters = gpt2() if on_cpu else large(arguments.device)
    size = sum(p.numel() * p.element_size() for p in parameters)
    for p in parameters:
        p.grad = torch.randn_like(p) * 1e-2
    transient = {
        "eager": extra_copies(parameters, size, compile=False),
        "compiled": extra_copies(parameters, size, compile=True),
    }

    # All candidates step the same parameters: which values they have does not matter to the time.
    candidates = {
        "copy": copy(parameters),
        "AdamW(fused=True)": torch.optim.AdamW(parameters, fused=True).step,
        "AdamW(fused=True) + _foreach_lerp_": adamw_and_ema(parameters, fused=True),
        "AdamW(foreach=True) + _foreach_lerp_": adamw_and_ema(parameters, foreach=True),
        "PACE": PACE(parameters).step,
        "PACE, compiled": PACE(parameters, compile=True).step,
    }
    if on_cpu:
        candidates["PACE towards BEMA"] = PACE(parameters, average=BEMA.paper(update_freq=1)).step
    else:
        candidates = {name: synchronised(call) for name, call in candidates.items()}
    seconds = measure(candidates, arguments.repeats)

    bandwidth = 2 * size / seconds["copy"]
    print(f"{size // 4 / 1e6:.0f} M parameters, float32, {arguments.repeats} repeats, medians")
    for name, s in seconds.items():
        print(f"{name:38s} {s * 1e3:9.2f} ms   {ACCESSES * size / s / 1e9:8.1f} GB/s of {ACCESSES} accesses")
    fused, foreach = seconds["AdamW(fused=True) + _foreach_lerp_"], seconds["AdamW(foreach=True) + _foreach_lerp_"]
    compiled = seconds["PACE, compiled"]
    report(
        f"pace-{arguments.device}",
        {
            "parameters": size // 4,
            "repeats": arguments.repeats,
            "seconds": seconds,
            "copy_bytes_per_second": bandwidth,
            "transient_share": transient,
        },
        {
            "compiled PACE / (AdamW(fused) + EMA)": (compiled / fused, "<=", 1.0),
            "eager PACE / (AdamW(foreach) + EMA)": (seconds["PACE"] / foreach, "<=", 1.15),
            "transient memory / (parameters + m + v + ema), eager": (transient["eager"], "<=", 0.02),
            "transient memory / (parameters + m + v + ema), compiled": (transient["compiled"], "<=", 0.02),
            # A goal for accelerators; on CPUs a copy and a step do not use the memory in the same way.
            "bandwidth of compiled PACE / copy": (ACCESSES * size / compiled / bandwidth, ">=", 0.85),
        },
    )


def gpt2() -> list[torch.Tensor]:
    from transformers import GPT2Config, GPT2LMHeadModel

    return list(GPT2LMHeadModel(GPT2Config()).parameters())


def large(device: str) -> list[torch.Tensor]:
    """1.5 billion parameters in the shapes of a GPT-2 XL."""
    width, layers = 1600, 48
    shapes = [(50257, width), (1024, width)]
    for _ in range(layers):
        shapes += [(width, 3 * width), (3 * width,), (width, width), (width,), (width, 4 * width), (4 * width,)]
        shapes += [(4 * width, width), (width,)] + [(width,)] * 4
    return [torch.nn.Parameter(torch.randn(shape, device=device) * 0.02) for shape in shapes]


def extra_copies(parameters: list[torch.Tensor], size: int, compile: bool) -> float:
    """The largest memory of a step beyond parameters and state, as a share of parameters, m, v and ema."""
    optimizer = PACE(parameters, compile=compile)
    optimizer.step()
    if parameters[0].device.type != "cpu":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        optimizer.step()
        return (torch.cuda.max_memory_allocated() - before) / (4 * size)
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)  # blocks that the first step has freed are to be counted again
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    before = resident_bytes()
    optimizer.step()
    return max(0, peak_bytes() - before) / (4 * size)


def peak_bytes() -> int:
    """The largest resident memory of this process since the mark was cleared."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def adamw_and_ema(parameters: list[torch.Tensor], **settings: Any):
    optimizer = torch.optim.AdamW(parameters, **settings)
    live = [p.detach() for p in parameters]
    average = [p.clone() for p in live]

    def run():
        optimizer.step()
        torch._foreach_lerp_(average, live, 1e-3)

    return run


def copy(parameters: list[torch.Tensor]):
    live = [p.detach() for p in parameters]
    other = [p.clone() for p in live]
    return lambda: torch._foreach_copy_(other, live)


def synchronised(call):
    def run():
        call()
        torch.cuda.synchronize()

    return run


if __name__ == "__main__":
    main()
