"""Ways to run one step of PACE over many tensors, each equal to the pure update: block by block, or as one kernel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from lagless.execution import (
    Noise,
    Row,
    apply_row,
    blocks,
    compiled,
    cut,
    flat,
    foreach_add_,
    foreach_addcdiv_,
    foreach_addcmul_,
    foreach_clamp_max,
    foreach_copy_,
    foreach_div_,
    foreach_lerp_,
    foreach_mul,
    foreach_mul_,
    foreach_neg,
    foreach_reciprocal_,
    foreach_sqrt,
    foreach_sub,
    local,
    update_rows,
)
from lagless.optim._average_step import AverageStep
from lagless.optim._pull_statistics import PullStatistics
from lagless.rules import ReadCoefficients, UpdateCoefficients
from lagless.updates import PaceConstants, lerp, pulled_adamw

Columns = list[list[Tensor]]


def step_in_blocks(
    rows: Sequence[Row], k: PaceConstants, motion: AverageStep, noise: Noise, statistics: PullStatistics | None = None
) -> None:
    """One step of the parameters in ``rows``, in cache-sized blocks; temporaries are as large as a block.

    With no pull these are the operations of ``torch.optim.AdamW(foreach=True)``, bit for bit.

    Args:
        rows: (weights, gradient, first moment, second moment, buffers...) of each parameter; modified in place.
        k: numbers.
        motion: what the average does.
        noise: of the rounding of bfloat16 averages.
        statistics: where to count what the pull does.
    """
    for theta, grad, m, v, *buffers in blocks(rows):
        wide = torch.promote_types(theta[0].dtype, torch.float32)
        weights, grad = widened(theta, wide), widened(grad, wide)
        before = [w.clone() for w in weights] if statistics is not None else []
        if k.sign < 0.0:
            grad = foreach_neg(grad)
        distance = towards(motion.target, buffers, weights) if k.pull != 0.0 else None

        foreach_lerp_(m, grad, k.first)
        foreach_mul_(v, 1.0 - k.second)
        foreach_addcmul_(v, grad, grad, k.second)
        denominator = list(foreach_sqrt(v))
        foreach_div_(denominator, k.correction)
        foreach_add_(denominator, k.eps)
        foreach_mul_(weights, k.decay)
        foreach_addcdiv_(weights, m, denominator, -k.rate)
        if distance is not None:
            pull_(weights, denominator, distance, k.pull, k.ceiling)
        if statistics is not None:
            gains = denominator
            if distance is None:
                gains = distance = [torch.zeros_like(w) for w in weights]
            statistics.count(before, weights, gains, distance, k.ceiling)

        if weights is not theta:
            foreach_copy_(theta, weights)
            foreach_copy_(weights, theta)  # the average is of the weights as they were rounded
        if motion.update is not None:
            move_average(buffers, motion.update, weights, noise)


def pull_(
    weights: list[Tensor], denominator: list[Tensor], distance: list[Tensor], pull: float, ceiling: float
) -> None:
    """``weights += min(pull/denominator, ceiling) · distance``; leaves the unclamped gains in ``denominator``."""
    foreach_reciprocal_(denominator)
    foreach_mul_(denominator, pull)
    gain = denominator if ceiling == float("inf") else foreach_clamp_max(denominator, ceiling)
    foreach_addcmul_(weights, gain, distance)


def towards(target: ReadCoefficients, buffers: Columns, weights: list[Tensor]) -> list[Tensor] | None:
    """``c·b + d θ - θ``, or None where that is nothing."""
    terms = [(b, w) for b, w in zip(buffers, target.buffers, strict=True) if w != 0.0]
    if not terms:
        return None
    (first, weight), *others = terms
    wide = weights[0].dtype
    if weight == 1.0 and not others and target.live == 0.0:
        return list(foreach_sub(widened(first, wide), weights))
    distance = list(foreach_mul(widened(first, wide), weight))
    for buffer, weight in others:
        foreach_add_(distance, widened(buffer, wide), alpha=weight)
    foreach_add_(distance, weights, alpha=target.live - 1.0)
    return distance


def move_average(buffers: Columns, update: UpdateCoefficients, weights: list[Tensor], noise: Noise) -> None:
    """``b ← M b + v θ`` in place."""
    for row in update_rows(update):
        apply_row(buffers, row, weights, noise)


def local_gradient(parameter: Tensor) -> Tensor:
    """Return the gradient of this rank's part of a parameter."""
    gradient: Any = parameter.grad
    if hasattr(gradient, "redistribute"):
        sharded: Any = parameter
        gradient = gradient.redistribute(sharded.device_mesh, sharded.placements)
    return local(gradient)


def widened(tensors: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """The tensors in ``dtype``: themselves, or copies."""
    return tensors if tensors[0].dtype == dtype else [t.to(dtype) for t in tensors]


def step_in_one_kernel(row: Row, constants: Tensor) -> None:
    """One step of one parameter whose average is a single buffer: everything is read and written once.

    Args:
        row: weights, gradient, first moment, second moment, average, all contiguous; modified in place.
        constants: :class:`PaceConstants` and the step as one tensor on the device of the weights, so that new values
            need neither a new kernel nor a host sync.
    """
    compiled(_one_pass)(*map(flat, row), constants.to(row[2].dtype))
    increment_version(row[0])  # autograd notices changed weights only through the tensors it knows


def step_on_device(row: Row, constants: Tensor, size: int) -> None:
    """The step of :func:`step_in_one_kernel` without compiling; temporaries are of ``size`` elements."""
    first = 0
    for theta, grad, m, v, average in cut(row, size):
        _one_pass(theta, grad, m, v, average, constants.to(m.dtype), first)
        first += theta.numel()


def _one_pass(
    theta: Tensor, grad: Tensor, m: Tensor, v: Tensor, average: Tensor, constants: Tensor, first: int = 0
) -> None:
    wide = m.dtype
    *numbers, step = constants.unbind()
    k = PaceConstants(*numbers)
    target = average.to(wide)
    weights, new_m, new_v = pulled_adamw(theta.to(wide), grad.to(wide), m, v, target, k)
    rounded = weights.to(theta.dtype)
    moved = lerp(target, rounded.to(wide), k.average)
    average.copy_(_rounded_at_random(moved, step, first) if average.dtype == torch.bfloat16 else moved)
    theta.copy_(rounded)
    m.copy_(new_m)
    v.copy_(new_v)


def _rounded_at_random(value: Tensor, step: Tensor, first: int) -> Tensor:
    """``value``, a tensor from element ``first`` on, to bfloat16, up or down at random, with ``value`` as expectation.

    The noise is a hash of an element's place and the step, so that a kernel needs no generator, and a resumed run draws
    it again. The rounding is that of :func:`lagless.execution._rounding.stochastic_round_`.
    """
    bits = value.float().view(torch.int32)
    place = torch.arange(first, first + value.numel(), dtype=torch.int32, device=value.device).view(value.shape)
    mixed = (place + step.to(torch.int32) * 0x3C6EF372) * 0x2C1B3C6D
    mixed = (mixed ^ ((mixed >> 12) & 0xFFFFF)) * 0x297A2D39
    noise = (mixed ^ ((mixed >> 15) & 0x1FFFF)) & 0xFFFF
    finite = value.abs() < float("inf")
    return torch.where(finite, (bits + noise) & -(1 << 16), bits).view(torch.float32).to(torch.bfloat16)
