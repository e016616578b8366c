"""Cost of a step of primal averaging around AdamW against AdamW followed by an EMA, and against package schedulefree.

On CPUs the parameters are those of GPT-2 124M (needs ``pip install -e '.[bench]'``), or with ``--layers 2`` those of
two of its layers, for a machine that is busy; on an accelerator, 1.5 billion float32 parameters.
Run: ``python benchmarks/primal.py [--device cuda] [--repeats 15] [--layers 2]``.
"""

from __future__ import annotations

import argparse

import schedulefree
import torch
from _harness import measure, report
from pace import adamw_and_ema, gpt2, large, synchronised

from lagless import EMA
from lagless.optim import PrimalAveraging, schedule_free


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--layers", type=int, default=12, help="of GPT-2, without embeddings where fewer than 12")
    arguments = parser.parse_args()

    torch.manual_seed(0)
    on_cpu = arguments.device == "cpu"
    parameters = gpt2() if on_cpu else large(arguments.device)
    if arguments.layers < 12:
        parameters = parameters[2 : 2 + 12 * arguments.layers]  # the first two are embeddings
    size = sum(p.numel() * p.element_size() for p in parameters)
    for p in parameters:
        p.grad = torch.randn_like(p) * 1e-2

    def primal(**settings: bool) -> PrimalAveraging:
        return PrimalAveraging(torch.optim.AdamW(parameters, lr=1e-5), EMA(decay=0.999), **settings)

    theirs = schedulefree.AdamWScheduleFree(parameters, lr=1e-5, foreach=True)
    theirs.train()
    # The same method: second moments only, a plain mean of z, the interpolation in place of momentum.
    base = torch.optim.AdamW(parameters, lr=1e-5, betas=(0.0, 0.999), weight_decay=0.0)
    ours = schedule_free(base)
    compiled = primal(compile=True)
    compiled.step()  # makes the state
    stored = sum(
        t.numel() * t.element_size() for s in compiled.state.values() for t in s.values() if torch.is_tensor(t)
    )
    # All candidates step the same parameters: which values they have does not matter to the time.
    candidates = {
        "AdamW(fused=True)": torch.optim.AdamW(parameters, lr=1e-5, fused=True).step,
        "AdamW(fused=True) + _foreach_lerp_": adamw_and_ema(parameters, lr=1e-5, fused=True),
        "AdamW(foreach=True) + _foreach_lerp_": adamw_and_ema(parameters, lr=1e-5, foreach=True),
        "PrimalAveraging(AdamW)": primal().step,
        "PrimalAveraging(AdamW), compiled": compiled.step,
        "schedule_free(AdamW)": ours.step,
        "schedulefree.AdamWScheduleFree": theirs.step,
    }
    if not on_cpu:
        candidates = {name: synchronised(call) for name, call in candidates.items()}
    seconds = measure(candidates, arguments.repeats)

    print(f"{size // 4 / 1e6:.0f} M parameters, float32, {arguments.repeats} repeats, medians")
    fused = seconds["AdamW(fused=True) + _foreach_lerp_"]
    for name, s in seconds.items():
        print(f"{name:38s} {s * 1e3:9.2f} ms   {s / fused:6.2f} x (AdamW(fused) + EMA)")
    name = f"primal-{arguments.device}" + (f"-{arguments.layers}-layers" if arguments.layers < 12 else "")
    report(
        name,
        {"parameters": size // 4, "repeats": arguments.repeats, "seconds": seconds},
        {
            "compiled PrimalAveraging(AdamW) / (AdamW(fused) + EMA)": (
                seconds["PrimalAveraging(AdamW), compiled"] / fused,
                "<=",
                1.0,
            ),
            "eager schedule_free(AdamW) / schedulefree": (
                seconds["schedule_free(AdamW)"] / seconds["schedulefree.AdamWScheduleFree"],
                "<=",
                1.05,
            ),
            "state beside y / parameters: z, m, v": (stored / size, "<=", 3.001),
        },
    )


if __name__ == "__main__":
    main()
