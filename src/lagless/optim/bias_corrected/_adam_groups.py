"""What Adam's update is made of, from the microbatches' gradients or from sums over them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lagless.execution import sum_in_place
from lagless.optim.bias_corrected._collected import Collected, Weights, scale_of
from lagless.optim.bias_corrected._sums import Power
from lagless.updates import AdamForm, Group, Spread, skewed_nodes, two_nodes

Counts = tuple[int, tuple[int, int]]
"""n, and how many microbatches belong to either half."""


def groups_of_samples(form: AdamForm, mean: Tensor, samples: Tensor, found: Collected) -> list[Group]:
    """Return what an update is made of, from ḡ and the microbatch gradients of this process."""
    shares = None if found.shares is None else torch.tensor(found.shares, dtype=samples.dtype, device=samples.device)
    if form.cross_fit == "leave_one_out":
        column = None if shares is None else shares.view(-1, *[1] * mean.dim())
        total = None if found.group is None else sum_in_place(found.group)
        processes = 1 if found.group is None else found.group.size()
        return [Group(mean, Spread(samples, found.count, None, total, processes, column))]
    if form.cross_fit == "none":
        return [Group.of(samples, shares)]
    return [Group.of(samples[half::2], None if shares is None else shares[half::2]) for half in (0, 1)]


def groups_of_sums(
    form: AdamForm,
    mean: Tensor,
    keys: Sequence[Power],
    counts: Counts | None,
    weights: Weights | None,
    ratio: Tensor | None,
    totals: Sequence[Tensor],
) -> list[Group]:
    """Return what an update is made of, from ḡ and sums of powers; of ḡ alone without ``counts``."""
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
