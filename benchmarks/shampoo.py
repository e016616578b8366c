"""Shampoo without correction beside that of the package pytorch-optimizer, at matched conventions.

Needs ``pip install pytorch-optimizer``. Run: ``python benchmarks/shampoo.py``. Both take roots at every step and have
no momentum, no grafting and no weight decay: theirs averages preconditioned gradients, ours preconditions the average
gradient, which is the same for β₁ = 0 only. Theirs starts the factors at ε·I, which decays; ours adds ε·I when roots
are taken. ε is so small that it does not count.
"""

from __future__ import annotations

import argparse

import torch
from _harness import measure, report
from pytorch_optimizer import ScalableShampoo

from lagless.optim import BiasCorrectedShampoo

DAMPING, BETA2, LR = 1e-12, 0.95, 0.01


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--matrices", type=int, default=4)
    arguments = parser.parse_args()
    ours, theirs = (train(kind, torch.float64, 24, 2, 5) for kind in ("ours", "theirs"))
    difference = max(float((a - b).abs().max() / a.abs().max()) for a, b in zip(ours, theirs, strict=True))
    print(f"largest difference of weights after 5 steps: {difference:.1e} of the largest weight")
    kinds = {"ours": "ours", "theirs, SVD": "theirs", "theirs, Schur-Newton": "theirs, iterative"}
    steps = {name: stepping(kind, torch.float32, arguments.size, arguments.matrices) for name, kind in kinds.items()}
    seconds = measure(steps, arguments.repeats)
    for name, s in seconds.items():
        print(f"{name:22s} {s * 1e3:9.1f} ms per step with roots")
    conditions = {"size": arguments.size, "matrices": arguments.matrices, "repeats": arguments.repeats}
    report(
        "shampoo",
        conditions | {"seconds": seconds, "difference": difference},
        {"difference from pytorch-optimizer": (difference, "<=", 1e-6)},
    )


def make(kind: str, parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    if kind == "ours":
        return BiasCorrectedShampoo(
            parameters,
            lr=LR,
            betas=(0.0, BETA2),
            damping=DAMPING,
            weight_decay=0.0,
            root_freq=1,
            grafting="none",
            cross_fit="none",
            exclude=(),
        )
    return ScalableShampoo(
        parameters,
        lr=LR,
        betas=(0.0, BETA2),
        moving_average_for_momentum=True,
        start_preconditioning_step=1,
        preconditioning_compute_steps=1,
        block_size=1024,
        shape_interpretation=False,
        graft_type=0,
        nesterov=False,
        matrix_eps=DAMPING,
        use_svd=kind == "theirs",
    )


def gradients(parameters: list[torch.nn.Parameter], generator: torch.Generator) -> None:
    for p in parameters:
        p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype)


def weights(dtype: torch.dtype, size: int, matrices: int) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.nn.Parameter(torch.randn(size, size, generator=generator, dtype=torch.float64).to(dtype))
        for _ in range(matrices)
    ]


def train(kind: str, dtype: torch.dtype, size: int, matrices: int, steps: int) -> list[torch.Tensor]:
    parameters, generator = weights(dtype, size, matrices), torch.Generator().manual_seed(1)
    optimizer = make(kind, parameters)
    for _ in range(steps):
        gradients(parameters, generator)
        optimizer.step()
    return [p.detach() for p in parameters]


def stepping(kind: str, dtype: torch.dtype, size: int, matrices: int):
    parameters = weights(dtype, size, matrices)
    optimizer = make(kind, parameters)
    gradients(parameters, torch.Generator().manual_seed(1))
    return optimizer.step


if __name__ == "__main__":
    main()
