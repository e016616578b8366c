"""One step of Shampoo: factors, their roots, and what these make of the momentum."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from lagless.execution import Sharding, gather, local, over_shards, sum_over_mesh
from lagless.optim.bias_corrected._collected import Collected
from lagless.optim.bias_corrected._elements import move as move_weights
from lagless.optim.bias_corrected._factors import Factor, Partition
from lagless.optim.bias_corrected._method import Group, States
from lagless.optim.bias_corrected._report import CorrectionSums
from lagless.updates import (
    Eigenbasis,
    EmaWeights,
    Spread,
    eigenbasis,
    energies,
    inverse_fourth_root,
    two_nodes,
    vector_norm,
)


def recorded_together(due: Sequence[Tensor], sums: CorrectionSums | None) -> CorrectionSums | None:
    """Sums on every rank if there are any on one, since matrices are gathered for them."""
    sharded = next((p for p in due if isinstance(p, DTensor)), None)
    if sharded is None or not bool(sum_over_mesh(torch.tensor(float(sums is not None), dtype=torch.float32), sharded)):
        return sums
    return sums or CorrectionSums(0)


def root_due(states: States, group: Group, p: Tensor) -> bool:
    """Return whether this step takes roots."""
    return (int(states[p]["step"]) - 1) % group["root_freq"] == 0


def start(states: States, group: Group, p: Tensor) -> None:
    """Count a step of a matrix, and make its state at the first."""
    state = states[p]
    if not state:
        dtype = torch.promote_types(p.dtype, torch.float32)
        state["step"] = torch.zeros((), dtype=torch.float32)
        state["exp_avg"] = torch.zeros_like(p, dtype=dtype)
        if group["grafting"] == "adamw":
            state["exp_avg_sq"] = torch.zeros_like(p, dtype=dtype)
        for factor in Partition(p.shape, group["block_size"]).factors:
            state[factor.name("factor")] = torch.zeros(factor.size, factor.size, dtype=dtype, device=p.device)
    state["step"] += 1


def take_roots(
    states: States, group: Group, parameters: Sequence[Tensor], collected: dict[Tensor, Collected]
) -> tuple[dict[tuple[Tensor, Factor], Eigenbasis], dict[Tensor, list[Tensor]]]:
    """Move the factors of ``parameters`` on and take their roots, those of one size in one batch.

    Returns:
        Every factor's eigenbasis, and every parameter's V/λ², where V is known.
    """
    by_size: defaultdict[int, list[tuple[Tensor, Factor]]] = defaultdict(list)
    for p in parameters:
        factors = Partition(p.shape, group["block_size"]).factors
        for factor, fed in zip(factors, _fed(states, group, p, factors, collected.get(p)), strict=True):
            states[p][factor.name("factor")].lerp_(fed, 1.0 - group["betas"][1])
            by_size[factor.size].append((p, factor))
    bases: dict[tuple[Tensor, Factor], Eigenbasis] = {}
    dispersions: defaultdict[Tensor, list[Tensor]] = defaultdict(list)
    for batch in by_size.values():
        stacked = torch.stack([states[p][factor.name("factor")] for p, factor in batch])
        found = eigenbasis(stacked, group["damping"])
        for i, (p, factor) in enumerate(batch):
            basis = bases[p, factor] = Eigenbasis(found.values[i], found.vectors[i])
            variance = _variance(states, group, p, factor, basis, collected.get(p))
            if variance is not None:
                dispersions[p].append(variance / basis.values.square())
            state = states[p]
            state[factor.name("root")] = inverse_fourth_root(basis, variance, group["largest_root"])
            if measures_lagged(group):
                state[factor.name("vectors")] = basis.vectors.clone()
    return bases, dispersions


def _fed(
    states: States, group: Group, p: Tensor, factors: Sequence[Factor], found: Collected | None
) -> Iterator[Tensor]:
    """S_L or S_R of every block."""
    if group["cross_fit"] == "split" and found is not None and all(found.reached):
        yield from (found.mean(factor.gram) for factor in factors)
        return
    assert p.grad is not None
    mean = _whole(p.grad).to(states[p]["exp_avg"].dtype)
    yield from (block @ block.mT for block in (factor.of(mean) for factor in factors))


def _variance(
    states: States, group: Group, p: Tensor, factor: Factor, basis: Eigenbasis, found: Collected | None
) -> Tensor | None:
    """V of one block's eigenvalues; None where there is nothing to estimate it from."""
    if group["inverse_correction"] == "none" or found is None:
        return None
    half = 1 if group["cross_fit"] == "split" else None
    count = found.count if half is None else found.halves[half]
    if count < 2:
        return None
    weight = (1.0 - group["betas"][1]) ** 2
    if group["folds"] == "exact":
        chosen = found.samples if half is None else found.samples[half::2]
        samples = torch.stack([energies(factor.of(g), basis.vectors) for g in chosen])
        return weight * Spread(samples, count).variance_of_mean(samples)
    vectors = states[p].get(factor.name("vectors"))
    if vectors is None or factor.energy(2, half) not in found.totals:
        return None
    mean, square = found.mean(factor.energy(2, half)), found.mean(factor.energy(4, half))
    spread = two_nodes(mean, square - mean * mean, count)
    overlap = (basis.vectors.mT @ vectors).square_()
    return weight * overlap @ spread.variance_of_mean(spread.nodes)


def move(
    states: States,
    group: Group,
    p: Tensor,
    found: Collected | None,
    bases: dict[tuple[Tensor, Factor], Eigenbasis],
    dispersion: Tensor | None,
    report: CorrectionSums | None,
) -> None:
    """Move momentum and a matrix by one step."""
    assert p.grad is not None
    state, partition, sharding = states[p], Partition(p.shape, group["block_size"]), Sharding.of(p)
    m = local(state["exp_avg"])
    mean = local(p.grad).to(m.dtype)
    split = group["cross_fit"] == "split" and found is not None and all(found.reached)
    fed = found.mean(partition.numerator) if split and found is not None else mean
    if (p, partition.factors[0]) not in bases:
        report = None  # without a gradient in some step, its roots are taken in other ones
    old = m.clone() if report is not None else m
    m.lerp_(fed, 1.0 - group["betas"][0])
    update = partition.multiply(_whole(state["exp_avg"]), [state[f.name("root")] for f in partition.factors])
    if group["norm_clip"] is not None:
        update *= (group["norm_clip"] / vector_norm(update).clamp(min=1e-30)).clamp(max=1.0)
    if report is not None:
        roots = [inverse_fourth_root(bases[p, f], None, group["largest_root"]) for f in partition.factors]
        standard = _whole(sharding.present(old.lerp_(mean, 1.0 - group["betas"][0])))
        report.add(update, partition.multiply(standard, roots), dispersion)
    if group["grafting"] == "adamw":
        update *= _adamw_norm(states, group, p, mean) / vector_norm(update).clamp(min=1e-30)
    move_weights(local(p), sharding.part_of(update), group["lr"], group["weight_decay"])


def _adamw_norm(states: States, group: Group, p: Tensor, mean: Tensor) -> Tensor:
    """‖m̂/(√v̂ + ε)‖ of AdamW with this momentum."""
    state = states[p]
    weights = EmaWeights.at(group["adamw_betas"], int(state["step"]))
    b1, b2 = group["betas"][0], group["adamw_betas"][1]
    m, v = local(state["exp_avg"]), local(state["exp_avg_sq"])
    v.lerp_(mean * mean, 1.0 - b2)
    second = v * (weights.v_new / (1.0 - b2))
    momentum = m / (1.0 - b1 ** int(state["step"]))
    square = (momentum / (second.sqrt_() + group["adamw_eps"])).square_().sum()
    return over_shards(square, p).sqrt()


def _whole(tensor: Tensor) -> Tensor:
    """All of a tensor, where this rank's part lies: gathering moves an offloaded one to the device of the mesh."""
    return gather(tensor).to(local(tensor).device)


def is_matrix(group: Group, p: Tensor) -> bool:
    """Return whether a parameter is stepped as a matrix."""
    return group["block_size"] > 0 and p.dim() == 2 and min(p.shape) > 1


def measures_lagged(group: Group) -> bool:
    """Return whether variances are measured along the former roots' eigenvectors."""
    return group["inverse_correction"] != "none" and group["folds"] == "lagged"
