"""One step of Adam, of any form, from what was collected about its microbatches: in pieces, or as one kernel."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from lagless.execution import adam_step_c, compiled, fits_adam_c, fits_kernel, flat, local, on_device, sum_in_place
from lagless.optim.bias_corrected._elements import move, pieces
from lagless.optim.bias_corrected._microbatches import Collected, Weights, scale_of
from lagless.optim.bias_corrected._report import CorrectionSums
from lagless.optim.bias_corrected._sums import Power
from lagless.updates import (
    AdamForm,
    EmaWeights,
    Folds,
    Group,
    Moments,
    Spread,
    adam_folds,
    fed_moments,
    skewed_nodes,
    support_clip,
    two_nodes,
)

PLAIN = AdamForm()

Clips = tuple[float | None, float, float | None]
"""``support_clip``, ``support_eps`` and ``update_clip``."""
Counts = tuple[int, tuple[int, int]]
"""n, and how many microbatches belong to either half."""


class Numbers(NamedTuple):
    """What may change from step to step: numbers, or tensors of no dimension."""

    lr: Any
    weight_decay: Any
    eps: Any
    first: Any  # 1 - β₁
    second: Any  # 1 - β₂
    m_old: Any
    m_new: Any
    v_old: Any
    v_new: Any

    @classmethod
    def at(cls, group: dict[str, Any], step: int) -> Numbers:
        """Those of a parameter group at ``step`` (1-based)."""
        (b1, b2), weights = group["betas"], EmaWeights.at(group["betas"], step)
        return cls(group["lr"], group["weight_decay"], group["eps"], 1.0 - b1, 1.0 - b2, *weights)


def adam_state(state: dict[str, Any], p: Tensor) -> dict[str, Any]:
    """Adam's state under the names that torch gives it, in float32 or wider."""
    if not state:
        dtype = torch.promote_types(p.dtype, torch.float32)
        state["step"] = torch.zeros((), dtype=torch.float32)
        state["exp_avg"] = torch.zeros_like(p, dtype=dtype, memory_format=torch.preserve_format)
        state["exp_avg_sq"] = torch.zeros_like(p, dtype=dtype, memory_format=torch.preserve_format)
    return state


def adam_update(
    group: dict[str, Any],
    form: AdamForm,
    step: int,
    p: Tensor,
    state: dict[str, Any],
    found: Collected | None,
    sums: CorrectionSums | None,
) -> None:
    """Move a parameter and its moments by one step, block by block or by one kernel."""
    assert p.grad is not None
    k = Numbers.at(group, step)
    clips = (group["support_clip"], group["support_eps"], group["update_clip"])
    totals, samples = ({}, ()) if found is None else (found.totals, found.samples)
    row = [local(t) for t in (p, p.grad, state["exp_avg"], state["exp_avg_sq"], *totals.values())]
    powers, counts = tuple(totals), None if found is None else (found.count, found.halves)
    weights = None if found is None else found.weights
    fused = group["compile"] and not samples and sums is None
    if fused and clips[0] is None and fits_adam_c(form, row):
        adam_step_c(form, row, _numbers_in_c(k, clips[2], found))
        increment_version(row[0])  # autograd notices changed weights only through the tensors it knows
        return
    if fused and fits_kernel(row):
        numbers = on_device(k, row[2].dtype, row[2].device)
        ratio = None if found is None else found.ratio.to(numbers.dtype)
        unequal = None
        if weights is not None and found is not None and found.shares is not None:
            unequal = on_device(weights, numbers.dtype, numbers.device)
        compiled(_one_pass)(form, clips, powers, counts, unequal, numbers, ratio, *map(flat, row))
        increment_version(row[0])
        return
    ratio = None if found is None else found.ratio.to(row[2].dtype)
    # A cosine is of the whole tensor, and every collective call has its price.
    whole = form.adaptive_alpha or (found is not None and bool(samples) and found.group is not None)
    for live, grad, m, v, *rest in pieces(*row, *samples, whole=whole):
        mean = grad.to(m.dtype)
        if found is not None and samples:
            groups = _groups_of_samples(form, mean, torch.stack(rest), found)
        else:
            groups = _groups_of_sums(form, mean, powers, counts, weights, ratio, rest)
        _step(form, clips, k, groups, live, mean, m, v, sums if found is not None else None)


def _numbers_in_c(k: Numbers, largest: float | None, found: Collected | None) -> tuple[float, ...]:
    """What :func:`adam_step_c` takes."""
    others, scale = 1.0, 0.0
    if found is not None:
        others, scale = found.count - 1.0, float(found.ratio) ** 2 / found.weights.total
    ema = (k.first, k.second, k.m_old, k.m_new, k.v_old, k.v_new)
    return (1.0 - k.lr * k.weight_decay, k.lr, k.eps, *ema, others, scale, math.inf if largest is None else largest)


def _one_pass(
    form: AdamForm,
    clips: Clips,
    powers: tuple[Power, ...],
    counts: Counts | None,
    unequal: Tensor | None,
    numbers: Tensor,
    ratio: Tensor | None,
    live: Tensor,
    grad: Tensor,
    m: Tensor,
    v: Tensor,
    *totals: Tensor,
) -> None:
    mean = grad.to(m.dtype)
    weights = None if counts is None else Weights(counts[0], *counts[1])
    if unequal is not None:
        weights = Weights(*unequal.unbind())
    groups = _groups_of_sums(form, mean, powers, counts, weights, ratio, totals)
    _step(form, clips, Numbers(*numbers.unbind()), groups, live, mean, m, v, None)


def _step(
    form: AdamForm,
    clips: Clips,
    k: Numbers,
    groups: Sequence[Group],
    live: Tensor,
    mean: Tensor,
    m: Tensor,
    v: Tensor,
    sums: CorrectionSums | None,
) -> None:
    weights, (support, support_eps, largest) = EmaWeights(k.m_old, k.m_new, k.v_old, k.v_new), clips
    folds = adam_folds(form, groups, Moments(m, v), weights, k.eps)
    fed, update = fed_moments(form, groups), folds.update
    if sums is not None:
        standard = adam_folds(PLAIN, [Group(mean)], Moments(m, v), weights, k.eps).update
        sums.add(update, standard, _dispersion(folds, k.eps))
    if support is not None:
        update = support_clip(update, fed, support, support_eps)
    if largest is not None:
        update = update.clamp(-largest, largest)
    m.lerp_(fed.m, k.first)
    v.lerp_(fed.v, k.second)
    move(live, update, k.lr, k.weight_decay)


def _groups_of_samples(form: AdamForm, mean: Tensor, samples: Tensor, found: Collected) -> list[Group]:
    """What an update is made of, from ḡ and the microbatch gradients of this process."""
    shares = None if found.shares is None else torch.tensor(found.shares, dtype=samples.dtype, device=samples.device)
    if form.cross_fit == "leave_one_out":
        column = None if shares is None else shares.view(-1, *[1] * mean.dim())
        total = None if found.group is None else sum_in_place(found.group)
        processes = 1 if found.group is None else found.group.size()
        return [Group(mean, Spread(samples, found.count, None, total, processes, column))]
    if form.cross_fit == "none":
        return [Group.of(samples, shares)]
    return [Group.of(samples[half::2], None if shares is None else shares[half::2]) for half in (0, 1)]


def _groups_of_sums(
    form: AdamForm,
    mean: Tensor,
    keys: Sequence[Power],
    counts: Counts | None,
    weights: Weights | None,
    ratio: Tensor | None,
    totals: Sequence[Tensor],
) -> list[Group]:
    """What an update is made of, from ḡ and sums of powers; of ḡ alone without ``counts``."""
    if counts is None or weights is None or ratio is None:
        return [Group(mean)]
    n, (n_a, n_b) = counts
    powers = {key: total * scale_of(key, ratio, weights) for key, total in zip(keys, totals, strict=True)}
    if form.cross_fit == "leave_one_out":
        square = powers[Power(2)]
        variance = square - mean * mean
        if Power(3) not in powers:
            return [Group(mean, two_nodes(mean, variance, n))]
        third = (powers[Power(3)] - mean * (3.0 * square - 2.0 * mean * mean)) * weights.third
        return [Group(mean, skewed_nodes(mean, variance, third, n))]

    def squares(half: int | None, count: int) -> Spread | None:
        if Power(2, half) not in powers or not count:
            return None
        square = powers[Power(2, half)]
        if Power(4, half) not in powers:
            return Spread(square[None], count)
        return two_nodes(square, powers[Power(4, half)] - square * square, count)

    if form.cross_fit == "none":
        return [Group(mean, None, squares(None, n))]
    a = powers[Power(1, 0)]
    b = (weights.total * mean - weights.first * a) / weights.second
    return [Group(a, None, squares(0, n_a)), Group(b, None, squares(1, n_b))]


def _dispersion(folds: Folds, eps: float) -> Tensor | None:
    """Var(D̂)/D² per coordinate."""
    variance, d = folds.variance, folds.second_moment.sqrt() + eps
    if folds.spread is not None:
        variance = folds.spread.jackknife(d)[None]
    return None if variance is None else (variance / (d * d)).mean(dim=0)
