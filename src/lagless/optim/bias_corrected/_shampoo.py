"""Shampoo with cross-fitted factors and corrected inverse roots."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from lagless._validation import Settings
from lagless.execution import Sharding, gather, is_sharded, local, over_shards, sum_over_mesh
from lagless.optim._settings import require_learning_rate
from lagless.optim.bias_corrected._adam_step import PLAIN, adam_state, adam_update
from lagless.optim.bias_corrected._base import STANDARD, BiasCorrected, tensors_of
from lagless.optim.bias_corrected._elements import move
from lagless.optim.bias_corrected._factors import Factor, FactorSums, Partition
from lagless.optim.bias_corrected._microbatches import Collected
from lagless.optim.bias_corrected._report import CorrectionSums
from lagless.optim.bias_corrected._sums import Sums
from lagless.updates import Eigenbasis, EmaWeights, Spread, eigenbasis, energies, inverse_fourth_root, two_nodes

_log = logging.getLogger("lagless")


class BiasCorrectedShampoo(BiasCorrected):
    """Shampoo whose momentum and factors may come from different microbatches, and whose roots may be corrected.

    For every block of every matrix, with G_j its microbatch gradients:

        M ← β₁M + (1 - β₁)G;   every k steps L ← β₂L + (1 - β₂)S_L, R ← β₂R + (1 - β₂)S_R
        W ← (1 - lr·λ)W - lr · P_L M P_R,   P = Q diag(d) Qᵀ, d_i = λ_i^{-1/4} - (5/32) λ_i^{-9/4} V_i

    of the damped factors' eigenvalues λ_i. For cross_fit "none", G = Ḡ, S_L = ḠḠᵀ; for "split", G = Ḡ_A of every second
    microbatch and S_L the mean of G_jG_jᵀ over those between (likewise S_R). V_i is the variance of λ_i over
    microbatches, 0 without correction. What is no matrix, or is in ``standard``, is stepped with AdamW.

    Args:
        params: parameters, groups, or better ``model.named_parameters()``, see ``standard``.
        lr: learning rate ≥ 0.
        betas: β₁ and β₂ in [0, 1). There is no bias correction of M, L and R.
        damping: > 0, added to the factors' diagonals.
        weight_decay: λ ≥ 0, decoupled.
        root_freq: k, steps between updates of factors and roots.
        block_size: longest side of a block; larger matrices are cut.
        grafting: "adamw" gives each matrix's update the norm of its AdamW update, which makes AdamW's learning rates
            fit, for one more buffer; "none" leaves it.
        largest_root: of d_i; None for no limit.
        norm_clip: largest Frobenius norm of a matrix's update before grafting; None for no limit.
        cross_fit: "none" or "split". Other forms would need eigendecompositions for each fold.
        inverse_correction: "none", "post_ema" or "pre_ema"; the latter two are the same, as λ_i is affine in G_jG_jᵀ.
        folds: for a correction, where variances are measured. "lagged" (default): along the eigenvectors of the
            previous roots, as microbatches go by, and turned into the new basis; none at the first roots. "exact":
            along the new ones, from the microbatches' gradients, which are kept, n buffers.
        adamw_betas: of what is stepped with AdamW, and of grafting.
        adamw_eps: likewise.
        compile: step contiguous tensors that go to AdamW by one call into C on CPUs, large ones elsewhere by one kernel
            of ``torch.compile``.
        standard: parts of names of parameters for AdamW; () for none.
        report_freq: fewest steps between records for :meth:`correction_report`, made when roots are; 0 for never.
        process_group: data-parallel processes, all of whose microbatches are folds; None for the default group.

    Raises:
        ValueError: for a hyperparameter out of range.

    Reference:
        Gupta et al., arXiv 1802.09568, Algorithm 1; Nayak et al., arXiv 2605.20756. As in the latter's code, factors
        move only when roots are taken.
    """

    _plain: ClassVar[dict[str, Any]] = {"cross_fit": "none", "inverse_correction": "none", "block_size": 0}
    _plain_words = "AdamW"

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        damping: float = 1e-6,
        weight_decay: float = 0.01,
        *,
        root_freq: int = 10,
        block_size: int = 1024,
        grafting: Literal["adamw", "none"] = "adamw",
        largest_root: float | None = None,
        norm_clip: float | None = None,
        cross_fit: Literal["none", "split"] = "split",
        inverse_correction: Literal["none", "post_ema", "pre_ema"] = "none",
        folds: Literal["lagged", "exact"] = "lagged",
        adamw_betas: tuple[float, float] = (0.9, 0.95),
        adamw_eps: float = 1e-8,
        compile: bool = False,
        standard: Sequence[str] = STANDARD,
        report_freq: int = 100,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "damping": damping,
            "weight_decay": weight_decay,
            "root_freq": root_freq,
            "block_size": block_size,
            "grafting": grafting,
            "largest_root": largest_root,
            "norm_clip": norm_clip,
            "cross_fit": cross_fit,
            "inverse_correction": inverse_correction,
            "folds": folds,
            "adamw_betas": adamw_betas,
            "adamw_eps": adamw_eps,
            "compile": compile,
        }
        self._factor_sums: dict[Tensor, FactorSums] = {}
        super().__init__(params, defaults, standard=standard, report_freq=report_freq, process_group=process_group)
        _log.info("%s: state of %.1f MB", type(self).__name__, self.state_bytes() / 1e6)

    def state_bytes(self) -> int:
        """Bytes that the state will take on this process, known before the first step."""
        total = 0
        for group in self.param_groups:
            for p in group["params"]:
                size, mine = torch.promote_types(p.dtype, torch.float32).itemsize, local(p).numel()
                if not _is_matrix(group, p):
                    total += 2 * mine * size
                    continue
                per_factor = 3 if _lagged(group) else 2
                squares = sum(f.size**2 for f in Partition(p.shape, group["block_size"]).factors)
                total += (mine * (2 if group["grafting"] == "adamw" else 1) + per_factor * squares) * size
        return total

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._factor_sums = {}
        super().__setstate__(state)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:  # noqa: D102
        super().load_state_dict(state_dict)
        for group in self.param_groups:
            for p in group["params"]:
                self._prepare(group, p)

    def _shapes(self, group: dict[str, Any], parameter: Tensor) -> dict[str, Sequence[int]]:
        shapes = super()._shapes(group, parameter)
        if _is_matrix(group, parameter):
            for factor in Partition(parameter.shape, group["block_size"]).factors:
                shapes |= {factor.name(kind): (factor.size, factor.size) for kind in ("factor", "root", "vectors")}
        return shapes

    def _special(self, group: dict[str, Any]) -> bool:
        return group["block_size"] != 0

    def _check(self, group: dict[str, Any]) -> None:
        check = Settings(self, group)
        require_learning_rate(self, group["lr"])
        check.decays("betas", "adamw_betas")
        check.numbers("weight_decay", "adamw_eps", minimum=0.0)
        check.numbers("damping", above=0.0)
        check.numbers("largest_root", "norm_clip", above=0.0, optional=True)
        check.integers("root_freq", minimum=1)
        check.integers("block_size", minimum=0)
        check.flags("compile")
        check.choice("grafting", ("adamw", "none"))
        check.choice("inverse_correction", ("none", "post_ema", "pre_ema"))
        check.choice("folds", ("lagged", "exact"))
        reason = ": the method has no other form for matrices; each fold would need eigendecompositions of its own"
        allowed = "'none' or 'split'" + (reason if group["cross_fit"] in ("symmetric", "leave_one_out") else "")
        check.that("cross_fit", group["cross_fit"] in ("none", "split"), allowed)
        alone = self._microbatches.group is None and not any(map(is_sharded, tensors_of(group)))
        check.that("folds", alone or group["folds"] != "exact", "'lagged' in data parallel")

    def _needs(self, group: dict[str, Any], parameter: Tensor) -> tuple[Sums | None, bool]:
        if not _is_matrix(group, parameter) or not self._corrects(group):
            return None, False
        keep = group["folds"] == "exact" and group["inverse_correction"] != "none"
        partition, split = Partition(parameter.shape, group["block_size"]), group["cross_fit"] == "split"
        sums = FactorSums(partition, split, _lagged(group), Sharding.of(parameter))
        self._factor_sums[parameter] = sums
        self._prepare(group, parameter)
        return sums, keep

    def _prepare(self, group: dict[str, Any], p: Tensor) -> None:
        """Tell the sums whether the next step takes roots, and the eigenvectors to measure along."""
        sums, state = self._factor_sums.get(p), self.state.get(p, {})
        if sums is not None:
            sums.due = int(state.get("step", 0)) % group["root_freq"] == 0
            sums.vectors = [state[f.name("vectors")] for f in sums.partition.factors if f.name("vectors") in state]

    def _records(self, group: dict[str, Any], step: int, former: CorrectionSums | None) -> bool:
        due = former is None or step - former.step >= self._report_freq
        return due and (step - 1) % group["root_freq"] == 0

    def _update(self, group: dict[str, Any], collected: dict[Tensor, Collected], sums: CorrectionSums | None) -> None:
        adamw = {"betas": group["adamw_betas"], "eps": group["adamw_eps"]}
        adamw |= {"support_clip": None, "support_eps": 0.0, "update_clip": None}
        matrices = []
        for p in group["params"]:
            if p.grad is None:
                continue
            if _is_matrix(group, p):
                matrices.append(p)
                continue
            state = adam_state(self.state[p], p)
            state["step"] += 1
            adam_update(group | adamw, PLAIN, int(state["step"]), p, state, None, None)
        for p in matrices:
            self._start(group, p)
        due = [p for p in matrices if self._root_due(group, p)]
        sums = self._recorded_together(due, sums)
        bases, dispersions = self._take_roots(group, due, collected)
        for p in matrices:
            dispersion = torch.cat(dispersions[p]) if p in dispersions else None
            self._move(group, p, collected.get(p), bases, dispersion, sums)
            self._prepare(group, p)

    @staticmethod
    def _recorded_together(due: Sequence[Tensor], sums: CorrectionSums | None) -> CorrectionSums | None:
        """Sums on every rank if there are any on one, since matrices are gathered for them."""
        sharded = next((p for p in due if isinstance(p, DTensor)), None)
        if sharded is None or not bool(sum_over_mesh(torch.tensor(float(sums is not None)), sharded)):
            return sums
        return sums or CorrectionSums(0)

    def _root_due(self, group: dict[str, Any], p: Tensor) -> bool:
        return (int(self.state[p]["step"]) - 1) % group["root_freq"] == 0

    def _start(self, group: dict[str, Any], p: Tensor) -> None:
        state = self.state[p]
        if not state:
            dtype = torch.promote_types(p.dtype, torch.float32)
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"] = torch.zeros_like(p, dtype=dtype)
            if group["grafting"] == "adamw":
                state["exp_avg_sq"] = torch.zeros_like(p, dtype=dtype)
            for factor in Partition(p.shape, group["block_size"]).factors:
                state[factor.name("factor")] = torch.zeros(factor.size, factor.size, dtype=dtype, device=p.device)
        state["step"] += 1

    def _take_roots(
        self, group: dict[str, Any], parameters: Sequence[Tensor], collected: dict[Tensor, Collected]
    ) -> tuple[dict[tuple[Tensor, Factor], Eigenbasis], dict[Tensor, list[Tensor]]]:
        """Move the factors of ``parameters`` on and take their roots, those of one size in one batch.

        Returns:
            Every factor's eigenbasis, and every parameter's V/λ², where V is known.
        """
        by_size: defaultdict[int, list[tuple[Tensor, Factor]]] = defaultdict(list)
        for p in parameters:
            factors = Partition(p.shape, group["block_size"]).factors
            for factor, fed in zip(factors, self._fed(group, p, factors, collected.get(p)), strict=True):
                self.state[p][factor.name("factor")].lerp_(fed, 1.0 - group["betas"][1])
                by_size[factor.size].append((p, factor))
        bases, dispersions = {}, defaultdict(list)
        for batch in by_size.values():
            stacked = torch.stack([self.state[p][factor.name("factor")] for p, factor in batch])
            found = eigenbasis(stacked, group["damping"])
            for i, (p, factor) in enumerate(batch):
                basis = bases[p, factor] = Eigenbasis(found.values[i], found.vectors[i])
                variance = self._variance(group, p, factor, basis, collected.get(p))
                if variance is not None:
                    dispersions[p].append(variance / basis.values.square())
                state = self.state[p]
                state[factor.name("root")] = inverse_fourth_root(basis, variance, group["largest_root"])
                if _lagged(group):
                    state[factor.name("vectors")] = basis.vectors.clone()
        return bases, dispersions

    def _fed(
        self, group: dict[str, Any], p: Tensor, factors: Sequence[Factor], found: Collected | None
    ) -> Iterator[Tensor]:
        """S_L or S_R of every block."""
        if group["cross_fit"] == "split" and found is not None and all(found.reached):
            yield from (found.mean(factor.gram) for factor in factors)
            return
        assert p.grad is not None
        mean = _whole(p.grad).to(self.state[p]["exp_avg"].dtype)
        yield from (block @ block.mT for block in (factor.of(mean) for factor in factors))

    def _variance(
        self, group: dict[str, Any], p: Tensor, factor: Factor, basis: Eigenbasis, found: Collected | None
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
        vectors = self.state[p].get(factor.name("vectors"))
        if vectors is None or factor.energy(2, half) not in found.totals:
            return None
        mean, square = found.mean(factor.energy(2, half)), found.mean(factor.energy(4, half))
        spread = two_nodes(mean, square - mean * mean, count)
        overlap = (basis.vectors.mT @ vectors).square_()
        return weight * overlap @ spread.variance_of_mean(spread.nodes)

    def _move(
        self,
        group: dict[str, Any],
        p: Tensor,
        found: Collected | None,
        bases: dict[tuple[Tensor, Factor], Eigenbasis],
        dispersion: Tensor | None,
        report: CorrectionSums | None,
    ) -> None:
        assert p.grad is not None
        state, partition, sharding = self.state[p], Partition(p.shape, group["block_size"]), Sharding.of(p)
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
            update *= (group["norm_clip"] / torch.linalg.vector_norm(update).clamp(min=1e-30)).clamp(max=1.0)
        if report is not None:
            roots = [inverse_fourth_root(bases[p, f], None, group["largest_root"]) for f in partition.factors]
            standard = _whole(sharding.present(old.lerp_(mean, 1.0 - group["betas"][0])))
            report.add(update, partition.multiply(standard, roots), dispersion)
        if group["grafting"] == "adamw":
            update *= self._adamw_norm(group, p, mean) / torch.linalg.vector_norm(update).clamp(min=1e-30)
        move(local(p), sharding.part_of(update), group["lr"], group["weight_decay"])

    def _adamw_norm(self, group: dict[str, Any], p: Tensor, mean: Tensor) -> Tensor:
        """‖m̂/(√v̂ + ε)‖ of AdamW with this momentum."""
        state = self.state[p]
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


def _is_matrix(group: dict[str, Any], p: Tensor) -> bool:
    return group["block_size"] > 0 and p.dim() == 2 and min(p.shape) > 1


def _lagged(group: dict[str, Any]) -> bool:
    return group["inverse_correction"] != "none" and group["folds"] == "lagged"
