"""Sixteen more bits for float32 averages that move by small gains.

An average in float32 loses an update below half a unit in its last place: with gain β it stops within about 2^-25 |b|/β
of the weights. Weights that move by 0.1 % in all leave a plain mean 83 % of its way behind after 50,000 updates. So
where gains fall below :data:`SMALL_GAIN`, what rounding cuts off is kept beside the average ``b`` in an integer q,

    b + r,   r = q u,   u = 2^-39 b        |q| < 2^15, since |r| is at most half a unit in the last place, 2^-24 |b|

and enters the next update. That is half as much memory again. Found by following 256 weights that move by 0.1 %, with
noise of 2e-5 per step; error of the average relative to the way it went:

    ============================= ============ ============ ================= ===============
    storage                       1/t, 50,000  1/t, 400,000 β = 1e-6, 50,000  memory
    ============================= ============ ============ ================= ===============
    float32, to nearest           .83          1.0          1.0               1
    float32, stochastic           .0055        .0063        .046              1
    and bfloat16, to nearest      .00005       .0006        .013              1.5
    and 16 bits as here           .00005       .00004       .0009             1.5
    displacement from θ_0         .000002      .00009       .000002           1, and θ_0
    ============================= ============ ============ ================= ===============

Stochastic rounding needs a random number per element and update, which costs more time than the memory saves, and is
another sequence on every device; displacements need θ_0, which most rules do not hold.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lagless.execution._foreach import (
    foreach_add,
    foreach_add_,
    foreach_clamp_max_,
    foreach_clamp_min_,
    foreach_copy_,
    foreach_div_,
    foreach_mul,
    foreach_mul_,
    foreach_neg,
    foreach_round_,
    foreach_sub,
    foreach_sub_,
)

SMALL_GAIN = 0.01
"""Rows whose average keeps more than 1 minus this are compensated; at this gain plain rounding costs below 1 %."""
LOW_DTYPE = torch.int16
_UNIT, _TINY, _MOST = 2.0**-39, 2.0**-126, 32767.0  # the tiny part makes 0/0 be 0 where weights are exactly 0


def lerp_low_(average: list[Tensor], low: list[Tensor], live: list[Tensor], gain: float) -> None:
    """``b + r ← (b + r) + gain (θ - b - r)``, in place.

    Args:
        average: b, float32.
        low: q, int16, of the same shapes.
        live: θ, float32.
        gain: in (0, 1).
    """
    change, rest = list(foreach_sub(live, average)), _rest(average, low)
    foreach_sub_(change, rest)
    foreach_mul_(change, gain)
    foreach_add_(change, rest)
    _settle_(average, low, change)


def combine_low_(
    average: list[Tensor], low: list[Tensor], keep: float, terms: Sequence[tuple[list[Tensor], float]]
) -> None:
    """``b + r ← keep (b + r) + Σ_j weight_j x_j``, in place; the arguments are as in :func:`lerp_low_`."""
    change = _rest(average, low)
    foreach_mul_(change, keep)
    for values, weight in terms:
        # From b, so that what enters is as small as the change: of the numbers themselves, b's size would be rounded.
        foreach_add_(change, list(foreach_sub(values, average)), alpha=weight)
    if abs(surplus := keep + sum(weight for _, weight in terms) - 1.0) > 1e-12:
        foreach_add_(change, average, alpha=surplus)
    _settle_(average, low, change)


def lerp_low_single_(average: Tensor, low: Tensor, live: Tensor, gain: Tensor) -> None:
    """:func:`lerp_low_` of single tensors, for a compiled kernel."""
    rest = low.to(average.dtype) * (average * _UNIT + _TINY)
    change = ((live - average) - rest) * gain + rest
    new = average + change
    left = (change - (new - average)) / (new * _UNIT + _TINY)
    low.copy_(torch.round(left).clamp(-_MOST, _MOST).to(low.dtype))
    average.copy_(new)


def _rest(average: list[Tensor], low: list[Tensor]) -> list[Tensor]:
    """r as float32."""
    rest = list(foreach_neg(average))  # memory of the right shapes
    foreach_copy_(rest, low)
    foreach_mul_(rest, _units(average))
    return rest


def _settle_(average: list[Tensor], low: list[Tensor], change: list[Tensor]) -> None:
    """Add r + change, given as one in ``change`` (overwritten), to b; keep what does not fit."""
    new = list(foreach_add(average, change))
    foreach_sub_(change, list(foreach_sub(new, average)))
    foreach_copy_(average, new)
    foreach_div_(change, _units(average))
    foreach_round_(change)
    foreach_clamp_min_(change, -_MOST)
    foreach_clamp_max_(change, _MOST)
    foreach_copy_(low, change)


def _units(average: list[Tensor]) -> list[Tensor]:
    units = list(foreach_mul(average, _UNIT))
    foreach_add_(units, _TINY)
    return units
