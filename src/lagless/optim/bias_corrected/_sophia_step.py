"""One step of Sophia: in pieces, or as one kernel."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from lagless.execution import compiled, fits_kernel, flat, local, on_device
from lagless.optim.bias_corrected._collected import Collected
from lagless.optim.bias_corrected._curvature import Curvature
from lagless.optim.bias_corrected._elements import move, pieces
from lagless.optim.bias_corrected._report import CorrectionSums
from lagless.optim.bias_corrected._sums import Power
from lagless.updates import sophia_inverse, sophia_update, sophia_variance, two_nodes


def sophia_step(
    group: dict[str, Any],
    p: Tensor,
    state: dict[str, Any],
    found: Collected | None,
    curvature: Curvature,
    estimates: int,
    report: CorrectionSums | None,
) -> None:
    """Move a parameter and its state by one step; curvature is taken in if there are ``estimates`` of it."""
    assert p.grad is not None
    if not state:
        dtype = torch.promote_types(p.dtype, torch.float32)
        state["step"] = torch.zeros((), dtype=torch.float32)
        for name in ("exp_avg", "hessian", "inverse"):
            state[name] = torch.zeros_like(p, dtype=dtype, memory_format=torch.preserve_format)
        state["inverse"].fill_(1.0 / group["eps"])  # of no curvature, until there is an estimate
    state["step"] += 1
    k = SophiaNumbers.at(group, curvature.weight(group))
    sums = curvature.sums[p].totals if estimates and p in curvature.sums else {}
    split = group["cross_fit"] == "split" and found is not None and all(found.reached)
    half = found.mean(Power(1, 0)) if split and found is not None else p.grad
    row = [local(t) for t in (p, half, state["exp_avg"], state["hessian"], state["inverse"], *sums.values())]
    if group["compile"] and report is None and fits_kernel(row):
        compiled(_one_pass)(tuple(sums), estimates, on_device(k, row[2].dtype, row[2].device), *map(flat, row))
        increment_version(row[0])
        return
    for mean, *piece in pieces(local(p.grad), *row):
        _step(tuple(sums), estimates, k, *piece, mean=mean, report=report)


class SophiaNumbers(NamedTuple):
    """What may change from step to step: numbers, or tensors of no dimension."""

    lr: Any
    weight_decay: Any
    eps: Any
    beta1: Any
    beta2: Any
    scale: Any  # ρ · batch_size
    clip: Any
    weight: Any  # of all estimates of the curvature

    @classmethod
    def at(cls, group: dict[str, Any], weight: float) -> SophiaNumbers:
        """Those of a parameter group."""
        (b1, b2), scale = group["betas"], group["rho"] * group["batch_size"]
        return cls(group["lr"], group["weight_decay"], group["eps"], b1, b2, scale, group["clip"], weight)


def _one_pass(powers: tuple[Power, ...], estimates: int, numbers: Tensor, *row: Tensor) -> None:
    _step(powers, estimates, SophiaNumbers(*numbers.unbind()), *row)


def _step(
    powers: tuple[Power, ...],
    estimates: int,
    k: SophiaNumbers,
    live: Tensor,
    gradient: Tensor,
    m: Tensor,
    h: Tensor,
    inverse: Tensor,
    *totals: Tensor,
    mean: Tensor | None = None,
    report: CorrectionSums | None = None,
) -> None:
    """One step of what is given; curvature is taken in if there are ``estimates`` of it."""
    variance = None
    if estimates:
        means = {power: total / k.weight for power, total in zip(powers, totals, strict=True)}
        variance = _take_in(h, means, k, estimates)
        inverse.copy_(sophia_inverse(h, k.scale, k.eps, variance))
    old = m.clone() if report is not None else m
    m.lerp_(gradient.to(m.dtype), 1.0 - k.beta1)
    update = sophia_update(m, inverse, k.clip)
    if report is not None and mean is not None:
        plain = sophia_inverse(h, k.scale, k.eps)
        standard = sophia_update(old.lerp_(mean.to(m.dtype), 1.0 - k.beta1), plain, k.clip)
        report.add(update, standard, None if variance is None else variance * plain * plain)
    move(live, update, k.lr, k.weight_decay)


def _take_in(h: Tensor, means: dict[Power, Tensor], k: SophiaNumbers, n: int) -> Tensor | None:
    """Move h on, and return V; a parameter that sampled labels did not reach has curvature 0."""
    first = means.get(Power(1))
    square, fourth = (means.get(Power(e, 1), means.get(Power(e))) for e in (2, 4))
    fed = square if first is None else first * first
    h.lerp_(torch.zeros_like(h) if fed is None else fed, 1.0 - k.beta2)
    if fourth is None or square is None or n < 2:
        return None
    return sophia_variance(two_nodes(square, fourth - square * square, n), k.beta2, k.scale)
