"""One step of Adam, of any form, from what was collected about its microbatches: in pieces, or as one kernel."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from lagless.execution import (
    AdamConstants,
    AdamRow,
    adam_step_c,
    compiled,
    fits_adam_c,
    fits_kernel,
    flat,
    local,
    on_device,
)
from lagless.optim.bias_corrected._adam_groups import Counts, groups_of_samples, groups_of_sums
from lagless.optim.bias_corrected._collected import Collected, Weights
from lagless.optim.bias_corrected._elements import move, pieces
from lagless.optim.bias_corrected._report import CorrectionSums
from lagless.optim.bias_corrected._sums import Power
from lagless.updates import (
    AdamForm,
    EmaWeights,
    Folds,
    Group,
    Moments,
    adam_folds,
    fed_moments,
    support_clip,
)

PLAIN = AdamForm()

Clips = tuple[float | None, float, float | None]
"""``support_clip``, ``support_eps`` and ``update_clip``."""


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
        adam_step_c(form, AdamRow(*row), _constants(k, clips[2], found))
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
            groups = groups_of_samples(form, mean, torch.stack(rest), found)
        else:
            groups = groups_of_sums(form, mean, powers, counts, weights, ratio, rest)
        _step(form, clips, k, groups, live, mean, m, v, sums if found is not None else None)


def _constants(k: Numbers, largest: float | None, found: Collected | None) -> AdamConstants:
    """What :func:`adam_step_c` takes."""
    return AdamConstants(
        decay=1.0 - k.lr * k.weight_decay,
        rate=k.lr,
        eps=k.eps,
        first=k.first,
        second=k.second,
        m_old=k.m_old,
        m_new=k.m_new,
        v_old=k.v_old,
        v_new=k.v_new,
        others=1.0 if found is None else found.count - 1.0,
        scale=0.0 if found is None else float(found.ratio) ** 2 / found.weights.total,
        largest=math.inf if largest is None else largest,
    )


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
    groups = groups_of_sums(form, mean, powers, counts, weights, ratio, totals)
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


def _dispersion(folds: Folds, eps: float) -> Tensor | None:
    """Var(D̂)/D² per coordinate."""
    variance, d = folds.variance, folds.second_moment.sqrt() + eps
    if folds.spread is not None:
        variance = folds.spread.jackknife(d)[None]
    return None if variance is None else (variance / (d * d)).mean(dim=0)
