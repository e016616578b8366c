"""How parameters are stepped with Sophia."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

from torch import Tensor

from lagless._validation import Settings
from lagless.optim._loaded_state import Entry, wide_dtype
from lagless.optim._settings import require_learning_rate
from lagless.optim.bias_corrected._collected import Collected
from lagless.optim.bias_corrected._curvature import Curvature
from lagless.optim.bias_corrected._method import Group, Method, States, steps_taken
from lagless.optim.bias_corrected._microbatch_weights import half_of
from lagless.optim.bias_corrected._microbatches import Microbatches
from lagless.optim.bias_corrected._report import CorrectionSums
from lagless.optim.bias_corrected._sophia_step import sophia_step
from lagless.optim.bias_corrected._sums import Power, PowerSums, Sums


class SophiaMethod(Method):
    """Sophia, with curvature collected besides gradients.

    Attributes:
        curvature: of this step's microbatches.
    """

    plain: ClassVar[Group] = {"cross_fit": "none", "inverse_correction": "none"}

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.curvature = Curvature()

    def check(self, owner: object, group: Group, alone: bool) -> None:  # noqa: D102
        check = Settings(owner, group)
        require_learning_rate(owner, group["lr"])
        check.decays("betas")
        check.numbers("weight_decay", minimum=0.0)
        check.numbers("eps", "rho", "batch_size", "clip", above=0.0)
        check.integers("hessian_freq", minimum=1)
        check.flags("compile")
        reason = ": the method has no other form for curvature, which has its own labels and is kept between estimates"
        allowed = "'none' or 'split'" + (reason if group["cross_fit"] in ("symmetric", "leave_one_out") else "")
        check.that("cross_fit", group["cross_fit"] in ("none", "split"), allowed)
        check.choice("inverse_correction", ("none", "post_ema", "pre_ema"))

    def entries(self, group: Group, parameter: Tensor) -> dict[str, Entry]:  # noqa: D102
        return dict.fromkeys(("exp_avg", "hessian", "inverse"), Entry(parameter.shape, (wide_dtype(parameter),)))

    def needs(self, states: States, group: Group, parameter: Tensor) -> tuple[Sums | None, bool]:  # noqa: D102
        return PowerSums((Power(1, 0),), group["compile"]) if group["cross_fit"] == "split" else None, False

    def due_anywhere(self, states: States, groups: Sequence[Group]) -> bool:
        """Whether the next step takes in curvature of some group."""
        return any(_due(states, group) for group in groups)

    def wants(self, states: States, groups: Sequence[Group], microbatches: Microbatches) -> bool:
        """Whether anybody uses the curvature of the microbatch at hand."""
        second = half_of(microbatches.begun, microbatches.group) == 1
        return self.due_anywhere(states, groups) and (second or any(g["cross_fit"] == "none" for g in groups))

    def records(self, states: States, group: Group, step: int, former: int | None, freq: int) -> bool:  # noqa: D102
        return (former is None or step - former >= freq) and _due(states, group)

    def totals(  # noqa: D102
        self, states: States, groups: Sequence[Group], microbatches: Microbatches
    ) -> Iterable[dict[Any, Tensor]]:
        if self.due_anywhere(states, groups):  # all ranks are due together
            self.curvature.reduce(groups, microbatches)
        return [sums.totals for sums in self.curvature.sums.values()]

    def require_ready(self, states: States, groups: Sequence[Group], microbatches: Microbatches) -> None:  # noqa: D102
        for group in groups:
            # The remainder of an epoch may be one microbatch, and none of the half that curvature is taken from.
            rest = group["cross_fit"] == "split" and microbatches.halves == (1, 0)
            if _due(states, group) and not self.curvature.estimates(group) and not rest:
                raise RuntimeError(
                    "this step needs curvature and none was collected. Call optimizer.estimate_curvature(model) before "
                    "training, or optimizer.add_curvature(loss) when optimizer.curvature_due."
                )

    def update(  # noqa: D102
        self, states: States, group: Group, collected: dict[Tensor, Collected], sums: CorrectionSums | None
    ) -> None:
        estimates = self.curvature.estimates(group) if _due(states, group) else 0
        for p in group["params"]:
            if p.grad is not None:
                sophia_step(group, p, states[p], collected.get(p), self.curvature, estimates, sums)

    def forget(self) -> None:  # noqa: D102
        self.curvature.clear()


def _due(states: States, group: Group) -> bool:
    return bool(group["params"]) and steps_taken(states, group) % group["hessian_freq"] == 0
