"""What the golden files hold: the settings of every kind, and the run that each of them follows.

The run is given by stored arrays. Weights follow ``trajectory``, or the optimizer under test, whose gradients are
exactly ``gradients``; nothing on the way sums over elements. Sizes are 1 or multiples of 32, for which vectors of 256
and of 512 bits leave the same elements over. What then still depends on the processor is torch's square root, see
``same_roots``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from .names import (
    BEMA,
    DEMA,
    EMA,
    OUEMA,
    PACE,
    Averager,
    BiasCorrectedAdamW,
    BiasCorrectedShampoo,
    BiasCorrectedSophia,
    PowerEMA,
    Pullback,
    UniformAverage,
    WindowAverage,
)

FILES = Path(__file__).parent / "files"
SHAPES = {"embed.weight": (8, 4), "layer.weight": (2, 16), "scale": ()}
SAVED, END = 9, 16  # the step of every stored state, and the one up to which tests go on
MICROBATCHES = 4
CHECKPOINTS = (0, 6, 9, 12)  # steps of the stored run
COMBINATION = [0.25, -0.25, 0.5, 0.5]  # one power of two for each, so that products are exact

RULES: dict[str, Any] = {
    "ema-decay": EMA(decay=0.8),
    "ema-half_life": EMA(half_life=3.0, update_freq=2),
    "ema-half_life_fraction": EMA(half_life_fraction=0.2, update_after=2),
    "ema-power": EMA(ema_power=0.7, lag=4.0),
    "ema-power-floor": EMA(ema_power=0.9, multiplier=2.0, min_ema_multiplier=0.3, update_after=3, update_freq=3),
    "ema-power-pace": EMA(ema_power=0.6, lag=2.0, min_ema_multiplier=1e-4, form="pace"),
    "bema": BEMA.paper(update_freq=2),
    "bema-burn_in": BEMA.paper(bias_power=0.5, update_after=3, update_freq=3),
    "bema-no_ema": BEMA.paper(ema_power=0.0, update_freq=2),
    "bema-trl": BEMA.paper(update_after=3, update_freq=2, form="trl"),
    "bema-offline": BEMA.paper(update_after=2, update_freq=2, min_ema_multiplier=1e-4, form="offline"),
    "bema-online": BEMA.paper(multiplier=0.9, lag=2.0, update_freq=2, form="online"),
    "bema-pace": BEMA.paper(lag=2.0, update_freq=2, form="pace"),
    "ouema": OUEMA.paper(update_freq=2),
    "ouema-burn_in": OUEMA.paper(bias_power=0.5, update_after=3, update_freq=3),
    "dema": DEMA.paper(update_freq=2),
    "dema-floor": DEMA.paper(ema_power=0.9, min_ema_multiplier=0.3, update_after=3, update_freq=3),
    "uniform": UniformAverage(),
    "uniform-burn_in": UniformAverage(update_after=3, update_freq=2),
    "power_ema": PowerEMA(relative_width=0.1),
    "power_ema-burn_in": PowerEMA(relative_width=0.2, update_after=3, update_freq=2),
    "window": WindowAverage(window=3, update_freq=2),
    "window-burn_in": WindowAverage(window=2, update_after=3),
}

# Base checkpoints hold θ_0 for rules that keep it unchanged.
START_RULES = {name: RULES[name] for name in ("bema", "bema-online", "ema-decay")}

# A torch.distributed.checkpoint takes a kilobyte for every number beside the tensors, so few are followed there.
MODEL_RULES = {name: RULES[name] for name in ("bema", "window")}

# Storage: the dtype of the weights, and that of averages.
STORAGES: dict[str, tuple[torch.dtype, torch.dtype | None]] = {
    "float32": (torch.float32, None),
    "float64": (torch.float64, None),
    "bfloat16-averages": (torch.float32, torch.bfloat16),
    "bfloat16-weights": (torch.bfloat16, None),
}

# Steps of stored iterates; each rule is asked about those grids on which it has an update.
GRIDS: dict[str, list[int]] = {
    "every step": list(range(37)),
    "every third": list(range(0, 61, 3)),
    "uneven": [0, 1, 2, 4, 6, 9, 12, 18, 19, 23, 24, 36],
    "from the middle": list(range(100, 151, 6)),
}

Make = Callable[[list[tuple[str, nn.Parameter]]], Any]


def _plain(parameters: list[tuple[str, nn.Parameter]]) -> list[nn.Parameter]:
    return [p for _, p in parameters]


def _groups(parameters: list[tuple[str, nn.Parameter]]) -> list[dict[str, Any]]:
    return [
        {"params": _plain(parameters[:1]), "pullback": 0.5, "lr": 0.01, "average": EMA(decay=0.7)},
        {"params": _plain(parameters[1:])},
    ]


def _adamw(**settings: Any) -> Make:
    return lambda ps: BiasCorrectedAdamW(ps, **{"lr": 0.02, "exclude": (), "warm_start": 2, **settings})


def _sophia(**settings: Any) -> Make:
    return lambda ps: BiasCorrectedSophia(ps, **{"lr": 0.02, "hessian_freq": 3, "exclude": (), **settings})


# Corrections need blocks so small that factors have full rank: in a null space any basis is as good, and they differ.
def _shampoo(**settings: Any) -> Make:
    return lambda ps: BiasCorrectedShampoo(
        ps, **{"lr": 0.02, "damping": 1e-2, "root_freq": 2, "exclude": (), **settings}
    )


AVERAGED: dict[str, Make] = {
    "pace": lambda ps: PACE(ps, lr=0.02),
    "pace-evaluating": lambda ps: PACE(ps, lr=0.02),
    "pace-bema-gated": lambda ps: PACE(ps, lr=0.02, average=BEMA.paper(update_freq=2), gate_pullback=True),
    "pace-bema-evaluating": lambda ps: PACE(ps, lr=0.02, average=BEMA.paper(update_freq=2)),
    "pace-window-unclamped": lambda ps: PACE(
        _plain(ps), lr=0.02, pullback=2.0, clamp=False, average=WindowAverage(window=3, update_freq=2)
    ),
    "pace-groups": lambda ps: PACE(_groups(ps), lr=0.02, weight_decay=0.1, betas=(0.8, 0.95)),
    "pace-bfloat16-weights": lambda ps: PACE(ps, lr=0.05),
    "pace-bfloat16-weights-evaluating": lambda ps: PACE(ps, lr=0.05, average=BEMA.paper(update_freq=2)),
    "pace-bfloat16-averages": lambda ps: PACE(ps, lr=0.02, average_dtype=torch.bfloat16),
    "pullback-adamw": lambda ps: Pullback(torch.optim.AdamW(ps, lr=0.02), 0.3),
    "pullback-adamw-evaluating": lambda ps: Pullback(torch.optim.AdamW(ps, lr=0.02), average=DEMA.paper(update_freq=2)),
    "pullback-sgd": lambda ps: Pullback(torch.optim.SGD(ps, lr=0.02, momentum=0.9), 0.3, EMA(decay=0.8)),
    "pullback-constant": lambda ps: Pullback(
        torch.optim.AdamW(_plain(ps), lr=0.02), 0.3, UniformAverage(update_freq=2), gain="constant"
    ),
}

BIAS_CORRECTED: dict[str, Make] = {
    "adamw-leave_one_out": _adamw(),
    "adamw-warm": _adamw(warm_start=12),
    "adamw-excluded": lambda ps: BiasCorrectedAdamW(ps, lr=0.02, warm_start=2, exclude=("embed",)),
    "adamw-jackknife": _adamw(inverse_correction="jackknife", folds="exact"),
    "adamw-skewed": _adamw(folds="skewed", inverse_correction="jackknife"),
    "adamw-split-post_ema": _adamw(cross_fit="split", inverse_correction="post_ema"),
    "adamw-split-pre_ema": _adamw(cross_fit="split", inverse_correction="pre_ema", support_clip=1.0, update_clip=2.0),
    "adamw-symmetric": _adamw(cross_fit="symmetric"),
    "adamw-none-post_ema": _adamw(cross_fit="none", inverse_correction="post_ema", warm_start=0),
    "adamw-bfloat16-weights": _adamw(),
    "sophia-split": _sophia(),
    "sophia-split-post_ema": _sophia(inverse_correction="post_ema"),
    "sophia-none": _sophia(cross_fit="none"),
    "sophia-excluded": _sophia(exclude=("embed",)),
    "sophia-bfloat16-weights": _sophia(),
    "shampoo-split": _shampoo(),
    "shampoo-split-post_ema": _shampoo(inverse_correction="post_ema", block_size=4),
    "shampoo-none": _shampoo(cross_fit="none", grafting="none"),
    "shampoo-exact": _shampoo(cross_fit="none", inverse_correction="post_ema", folds="exact", block_size=4),
    "shampoo-blocks": _shampoo(block_size=4, norm_clip=1.0),
    "shampoo-excluded": _shampoo(exclude=("embed",)),
}

OPTIMIZERS = AVERAGED | BIAS_CORRECTED


def same_roots() -> bool:
    """Whether torch's square root has the bits that it had where the files were written.

    It is MKL's, which rounds 7 in a thousand float32 roots to the second nearest number with vectors of 512 bits.
    """
    stored = load_file(FILES / "run.safetensors")
    return torch.equal(stored["gradients/layer.weight"].abs().sqrt(), stored["roots"])


def weights_at(step: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """The stored weights of a step, as new tensors."""
    stored = load_file(FILES / "run.safetensors")
    return {name: stored[f"trajectory/{name}"][step].to(dtype, copy=True) for name in SHAPES}


def follow(averager: Averager, live: dict[str, Tensor], first: int, last: int) -> None:
    """Move the live weights along the stored trajectory, from step ``first`` to step ``last``, with their averages."""
    stored = load_file(FILES / "run.safetensors")
    for step in range(first + 1, last + 1):
        for name, tensor in live.items():
            tensor.copy_(stored[f"trajectory/{name}"][step])
        averager.update()


def new_parameters(case: str) -> list[tuple[str, nn.Parameter]]:
    """The parameters of an optimizer's case, at θ_0."""
    dtype = torch.bfloat16 if "bfloat16-weights" in case else torch.float32
    return [(name, nn.Parameter(value)) for name, value in weights_at(0, dtype).items()]


def train(case: str, optimizer: Any, parameters: list[tuple[str, nn.Parameter]], first: int, last: int) -> None:
    """Step the optimizer from step ``first`` to step ``last``, with the stored gradients."""
    stored = load_file(FILES / "run.safetensors")
    count = MICROBATCHES if case in BIAS_CORRECTED else 1

    def loss(kind: str, step: int, microbatch: int) -> Tensor:
        # Its gradient is the stored one exactly: the sum over elements is not in it.
        grads = {name: stored[f"{kind}/{name}"][step, microbatch].to(p.dtype) for name, p in parameters}
        return torch.stack([(p * grads[name]).sum() for name, p in parameters]).sum()

    for step in range(first, last):
        optimizer.zero_grad()
        for microbatch in range(count):
            if case.startswith("sophia") and optimizer.curvature_due:
                optimizer.add_curvature(loss("sampled", step, microbatch))
            (loss("gradients", step, microbatch) / count).backward()
        optimizer.step()


def flat(tensors: Mapping[str, Tensor]) -> Tensor:
    """The elements of all parameters in one vector, as the files of expected values have them."""
    return torch.cat([tensors[name].detach().reshape(-1) for name in SHAPES])


def weights_of(parameters: list[tuple[str, nn.Parameter]]) -> dict[str, Tensor]:
    """Copies of the parameters' values."""
    return {name: p.detach().clone() for name, p in parameters}


def average_of(optimizer: Any, parameters: list[tuple[str, nn.Parameter]]) -> dict[str, Tensor]:
    """The average that an optimizer keeps, by parameter."""
    values = list(optimizer.read().values())  # in the parameters' order
    return {name: value for (name, _), value in zip(parameters, values, strict=True)}


class Model(nn.Module):
    """A model with the run's parameters, and a buffer that is not averaged."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.layer = nn.Embedding(*SHAPES["embed.weight"]), nn.Linear(16, 2, bias=False)
        self.scale = nn.Parameter(torch.zeros(()))
        self.register_buffer("positions", torch.arange(5))
        self.load_state_dict(weights_at(0, torch.float32), strict=False)

    def tensors(self) -> dict[str, Tensor]:
        """The trainable weights themselves."""
        return {name: p.detach() for name, p in self.named_parameters()}
