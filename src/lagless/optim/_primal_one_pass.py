"""Primal averaging around torch's AdamW with everything read and written once: which parameters fit, and their step."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.optim import AdamW, Optimizer

from lagless.execution import (
    PrimalRow,
    compiled,
    counts,
    exact_dtype,
    fits_kernel,
    fits_primal_c,
    flat,
    local,
    on_device,
    primal_step_c,
)
from lagless.optim._average_step import average_step
from lagless.optim._executors import local_gradient
from lagless.rules import ReadCoefficients
from lagless.updates import PrimalConstants, primal_adamw

States = dict[str, Any]
_ITSELF = ReadCoefficients((1.0,), 0.0)


def takes_one_pass(optimizer: Optimizer, group: dict[str, Any]) -> bool:
    """Whether a group is stepped by AdamW of torch and nothing else: somebody may have hooks on its step."""
    hooks = (optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks)
    watched = any(hooks) or "step" in vars(optimizer)  # a learning-rate scheduler puts its own there
    special = group["amsgrad"] or group["capturable"] or group["differentiable"] if type(optimizer) is AdamW else True
    return not watched and not special


def step_in_one_pass(
    group: dict[str, Any],
    parameters: Sequence[Tensor],
    states: Callable[[Tensor], States],
    interpolate: Callable[[int], float],
    smallest: float,
) -> list[Tensor]:
    """Step the parameters for which one pass over memory is possible; return the others, as they were.

    Args:
        group: for which :func:`takes_one_pass` holds.
        parameters: of the group, with gradients.
        states: of a parameter.
        interpolate: the share m of x in y after a step (1-based).
        smallest: m from which on x is recovered from y and z.
    """
    rule = group["average"]
    fitting = [p for p in parameters if "z" in states(p) and "average" not in states(p) and "exp_avg" in states(p)]
    kinds: defaultdict[tuple[Any, ...], list[Tensor]] = defaultdict(list)
    for p, base_step in zip(fitting, counts([states(p)["step"] for p in fitting]), strict=True):
        kinds[base_step + 1, states(p)["average_step"] + 1, states(p)["interpolation"], p.device].append(p)
    stepped: set[Tensor] = set()
    for (base_step, step, m, device), same in kinds.items():
        moves, after = average_step(rule, step), interpolate(step)
        rows = {p: _row(p, states(p)) for p in same}
        in_c = [p for p in same if fits_primal_c(rows[p])]
        large = [p for p in same if p not in {*in_c} and fits_kernel(rows[p]) and _is_uniform(rows[p])]
        if moves.weight is None or average_step(rule, step + 1).target != _ITSELF or after < smallest:
            continue
        pull = group["pull"] if moves.update is not None and step > rule.update_after else 0.0
        k = _constants(group, base_step, m, moves.weight, pull, after)
        if in_c:
            primal_step_c([rows[p] for p in in_c], k)
        if large:
            numbers = on_device(tuple(k), exact_dtype(device), device)
            for p in large:
                compiled(_one_pass)(*map(flat, rows[p]), numbers.to(p.dtype))
                increment_version(rows[p].weights)  # autograd notices changed weights only through tensors it knows
        for p in (*in_c, *large):
            states(p)["step"] += 1
            states(p).update(average_step=step, interpolation=after)
            stepped.add(p)
    return [p for p in parameters if p not in stepped]


def _row(p: Tensor, state: States) -> PrimalRow:
    return PrimalRow(local(p), local_gradient(p), *(local(state[name]) for name in ("exp_avg", "exp_avg_sq", "z")))


def _is_uniform(row: PrimalRow) -> bool:
    return all(t.dtype == row.weights.dtype for t in row) and row.weights.dtype in (torch.float32, torch.float64)


def _constants(
    group: dict[str, Any], step: int, m: float, weight: float, pull: float, interpolation: float
) -> PrimalConstants:
    (beta1, beta2), lr = group["betas"], float(group["lr"])
    return PrimalConstants(
        sign=-1.0 if group["maximize"] else 1.0,
        decay=1.0 - lr * group["weight_decay"],
        first=1.0 - beta1,
        second=1.0 - beta2,
        correction=(1.0 - beta2**step) ** 0.5,
        rate=lr / (1.0 - beta1**step),
        eps=group["eps"],
        ahead=1.0 / m,
        decay_at_y=lr * group["weight_decay_at_y"],
        average=weight,
        pull=pull,
        interpolation=interpolation,
    )


def _one_pass(y: Tensor, grad: Tensor, m: Tensor, v: Tensor, z: Tensor, numbers: Tensor) -> None:
    for into, value in zip(
        (y, m, v, z), primal_adamw(y, grad, m, v, z, PrimalConstants(*numbers.unbind())), strict=True
    ):
        into.copy_(value)
