"""How matrices are stepped with Shampoo, and everything else with AdamW."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from lagless._validation import Settings
from lagless.execution import Sharding, is_sharded
from lagless.optim._loaded_state import Entry, wide_dtype
from lagless.optim._settings import require_learning_rate
from lagless.optim.bias_corrected._adam_step import PLAIN, adam_state, adam_update
from lagless.optim.bias_corrected._collected import Collected
from lagless.optim.bias_corrected._factors import FactorSums, Partition
from lagless.optim.bias_corrected._method import Group, Method, States, corrects, tensors_of
from lagless.optim.bias_corrected._report import CorrectionSums
from lagless.optim.bias_corrected._shampoo_step import (
    is_matrix,
    measures_lagged,
    move,
    recorded_together,
    root_due,
    start,
    take_roots,
)
from lagless.optim.bias_corrected._sums import Sums


class ShampooMethod(Method):
    """Shampoo, with factors summed over microbatches."""

    plain: ClassVar[Group] = {"cross_fit": "none", "inverse_correction": "none", "block_size": 0}
    plain_words = "AdamW"

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self._factor_sums: dict[Tensor, FactorSums] = {}

    def entries(self, group: Group, parameter: Tensor) -> dict[str, Entry]:  # noqa: D102
        entries = super().entries(group, parameter)
        if is_matrix(group, parameter):
            entries["exp_avg_sq"] = entries["exp_avg_sq"]._replace(needed=group["grafting"] == "adamw")
            needed = {"factor": True, "root": True, "vectors": measures_lagged(group)}
            for factor in Partition(parameter.shape, group["block_size"]).factors:
                square = Entry((factor.size, factor.size), (wide_dtype(parameter),))
                entries |= {factor.name(kind): square._replace(needed=needed[kind]) for kind in needed}
        return entries

    @staticmethod
    def corrected(group: Group) -> bool:  # noqa: D102
        return group["block_size"] != 0

    def check(self, owner: object, group: Group, alone: bool) -> None:  # noqa: D102
        check = Settings(owner, group)
        require_learning_rate(owner, group["lr"])
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
        alone = alone and not any(map(is_sharded, tensors_of(group)))
        check.that("folds", alone or group["folds"] != "exact", "'lagged' in data parallel")

    def needs(self, states: States, group: Group, parameter: Tensor) -> tuple[Sums | None, bool]:  # noqa: D102
        if not is_matrix(group, parameter) or not corrects(group):
            return None, False
        keep = group["folds"] == "exact" and group["inverse_correction"] != "none"
        partition, split = Partition(parameter.shape, group["block_size"]), group["cross_fit"] == "split"
        sums = FactorSums(partition, split, measures_lagged(group), Sharding.of(parameter))
        self._factor_sums[parameter] = sums
        self._prepare(group, parameter, states.get(parameter, {}))
        return sums, keep

    def _prepare(self, group: Group, p: Tensor, state: dict[str, Any]) -> None:
        """Tell the sums whether the next step takes roots, and the eigenvectors to measure along."""
        sums = self._factor_sums.get(p)
        if sums is not None:
            sums.due = int(state.get("step", 0)) % group["root_freq"] == 0
            sums.vectors = [state[f.name("vectors")] for f in sums.partition.factors if f.name("vectors") in state]

    def records(self, states: States, group: Group, step: int, former: int | None, freq: int) -> bool:  # noqa: D102
        return (former is None or step - former >= freq) and (step - 1) % group["root_freq"] == 0

    def loaded(self, states: States, groups: Sequence[Group]) -> None:  # noqa: D102
        for group in groups:
            for p in group["params"]:
                self._prepare(group, p, states.get(p, {}))

    def update(  # noqa: D102
        self, states: States, group: Group, collected: dict[Tensor, Collected], sums: CorrectionSums | None
    ) -> None:
        adamw = {"betas": group["adamw_betas"], "eps": group["adamw_eps"]}
        adamw |= {"support_clip": None, "support_eps": 0.0, "update_clip": None}
        matrices: list[Tensor] = []
        for p in group["params"]:
            if p.grad is None:
                continue
            if is_matrix(group, p):
                matrices.append(p)
                continue
            state = adam_state(states[p], p)
            state["step"] += 1
            adam_update(group | adamw, PLAIN, int(state["step"]), p, state, None, None)
        for p in matrices:
            start(states, group, p)
        due = [p for p in matrices if root_due(states, group, p)]
        sums = recorded_together(due, sums)
        bases, dispersions = take_roots(states, group, due, collected)
        for p in matrices:
            dispersion = torch.cat(dispersions[p]) if p in dispersions else None
            move(states, group, p, collected.get(p), bases, dispersion, sums)
            self._prepare(group, p, states[p])
