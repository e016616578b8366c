"""The gradient noise scale from sums that an optimizer has collected for its own step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lagless.execution import exact_dtype, local, sum_over
from lagless.optim.bias_corrected._collected import Collected
from lagless.optim.bias_corrected._gradients import squared_norm, sums_of_whole
from lagless.optim.bias_corrected._sums import Power
from lagless.updates import noise_moments


def moments_of(groups: Sequence[dict[str, Any]], collected: Mapping[Tensor, Collected]) -> Tensor | None:
    """Return |G|² and tr Σ of every parameter group, shape (groups, 2); NaN where nothing was collected of it.

    The unit of tr Σ is that of the microbatches' weights. None where there is nothing of any group.
    """
    known = [(i, p, collected[p]) for i, group in enumerate(groups) for p in group["params"] if p in collected]
    known = [(i, p, found, spread) for i, p, found in known if (spread := _spread(found)) is not None]
    if not known:
        return None
    device = local(known[0][1]).device
    dtype = exact_dtype(device)
    parameters = [p for _, p, _, _ in known]
    squares = torch.stack([_square(found).to(device, dtype) for _, _, found, _ in known])
    kept = [j for j, (_, _, found, _) in enumerate(known) if found.samples and found.group is not None]
    if kept:  # sums are of all processes already, what was kept is of this one
        mine = squares[kept]
        sum_over(next(known[j][2].group for j in kept), [mine])  # pyright: ignore[reportArgumentType]
        squares[kept] = mine
    squares = sums_of_whole(parameters, squares)
    norms = torch.stack([found.norm.to(device, dtype).square() for _, _, found, _ in known])
    spreads, weights = (
        torch.tensor(numbers, dtype=dtype, device=device)
        for numbers in ([spread for *_, spread in known], [float(found.weights.total) for _, _, found, _ in known])
    )
    each = noise_moments(squares, norms, spreads, weights)
    places = torch.tensor([i for i, *_ in known], dtype=torch.int64, device=device)
    moments = torch.stack([each.signal, each.noise], dim=1)
    totals = moments.new_zeros(len(groups), 2).index_add_(0, places, moments)
    seen = torch.zeros(len(groups), dtype=torch.bool, device=device).index_fill_(0, places, True)
    return totals.masked_fill_(~seen[:, None], torch.nan)


def _spread(found: Collected) -> float | None:
    """Return s of :func:`noise_moments` for what :func:`_square` takes; None where nothing fits."""
    weights, (n_a, n_b) = found.weights, found.halves
    if found.count < 2 or not all(found.reached if _halved(found) else (1,)):
        return None
    if found.samples or Power(2) in found.totals or {Power(2, 0), Power(2, 1)} <= found.totals.keys():
        return found.count / weights.total
    if Power(2, 1) in found.totals:
        return n_b / weights.second
    return 1.0 / weights.first if Power(1, 0) in found.totals and n_a else None


def _halved(found: Collected) -> bool:
    return any(getattr(key, "half", None) is not None for key in found.totals)


def _square(found: Collected) -> Tensor:
    """Return the mean of w|g|², or |ḡ_A|², in units of p.grad as it was accumulated; of this rank's part."""
    weights, unit = found.weights, found.summed
    if found.samples:
        shares = found.shares or [1.0 / weights.total] * len(found.samples)
        scaled = found.summed / found.ratio  # they are in units of p.grad as it is now
        total = sum(w * squared_norm(g) for w, g in zip(shares, found.samples, strict=True))
        return total * scaled.to(total.dtype) ** 2  # pyright: ignore[reportAttributeAccessIssue]
    if Power(2) in found.totals:
        return found.totals[Power(2)].sum() * (unit**2 / weights.total)
    if {Power(2, 0), Power(2, 1)} <= found.totals.keys():
        return (found.totals[Power(2, 0)].sum() + found.totals[Power(2, 1)].sum()) * (unit**2 / weights.total)
    if Power(2, 1) in found.totals:
        return found.totals[Power(2, 1)].sum() * (unit**2 / weights.second)
    return squared_norm(found.totals[Power(1, 0)]) * (unit / weights.first) ** 2
