"""How parameters are stepped with AdamW, corrected or not."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor
from torch.distributed.tensor import DTensor

from lagless._validation import Settings
from lagless.optim._settings import require_learning_rate
from lagless.optim.bias_corrected._adam_step import PLAIN, adam_state, adam_update
from lagless.optim.bias_corrected._collected import Collected
from lagless.optim.bias_corrected._method import Group, Method, States, corrects, tensors_of
from lagless.optim.bias_corrected._report import CorrectionSums
from lagless.optim.bias_corrected._sums import Power, PowerSums, Sums
from lagless.updates import DERIVED, REFERENCE, AdamForm


class AdamWMethod(Method):
    """AdamW from sums of powers of microbatch gradients, or from these themselves."""

    plain: ClassVar[dict[str, Any]] = {
        "cross_fit": "none",
        "inverse_correction": "none",
        "folds": "moments",
        "support_clip": None,
        "alpha": 1.0,
        "adaptive_alpha": False,
        "warm_start": 0,
    }

    def check(self, owner: object, group: Group, alone: bool) -> None:  # noqa: D102
        check = Settings(owner, group)
        require_learning_rate(owner, group["lr"])
        check.decays("betas")
        check.numbers("eps", "weight_decay", "support_eps", minimum=0.0)
        check.numbers("update_clip", "support_clip", above=0.0, optional=True)
        check.choice("constants", ("derived", "reference"))
        check.flags("compile", "adaptive_alpha")
        form = form_of(group)
        if group["warm_start"] is None:
            group["warm_start"] = round(1.0 / (1.0 - group["betas"][1])) if form.cross_fit != "none" else 0
        check.integers("warm_start", minimum=0)
        left_out, shared = form.cross_fit == "leave_one_out", form.cross_fit in ("none", "split")
        choices = ("moments", "skewed", "exact") if left_out else ("moments", "exact")
        check.that("folds", group["folds"] in choices, f"one of {choices} for {form.cross_fit!r}")
        together = left_out or alone
        exact = group["folds"] == "exact"
        check.that("folds", together or not exact, "'moments' in data parallel, unless for leave_one_out")
        whole = not any(isinstance(p, DTensor) for p in tensors_of(group))
        check.that("adaptive_alpha", whole or not group["adaptive_alpha"], "False for sharded parameters")
        unset = group["support_clip"] is None
        check.that("support_clip", unset or shared, "None unless cross_fit is 'none' or 'split'")

    def needs(self, states: States, group: Group, parameter: Tensor) -> tuple[Sums | None, bool]:  # noqa: D102
        form = form_of(group)
        if not corrects(group):
            return None, False
        exact, powers = group["folds"] == "exact", powers_of(form, group["folds"] == "skewed")
        return None if exact else PowerSums(powers, group["compile"]), exact

    def update(  # noqa: D102
        self, states: States, group: Group, collected: dict[Tensor, Collected], sums: CorrectionSums | None
    ) -> None:
        form = form_of(group)
        for p in group["params"]:
            if p.grad is not None:
                _update_one(group, form, p, states[p], collected.get(p), sums)


def _update_one(
    group: Group,
    form: AdamForm,
    p: Tensor,
    state: dict[str, Any],
    found: Collected | None,
    sums: CorrectionSums | None,
) -> None:
    adam_state(state, p)["step"] += 1
    step = int(state["step"])
    halved = form.cross_fit in ("split", "symmetric")
    if step <= group["warm_start"] or found is None or found.count < 2 or (halved and not all(found.reached)):
        form, found = PLAIN, None
    adam_update(group, form, step, p, state, found, sums)


def form_of(group: dict[str, Any]) -> AdamForm:
    """The update that a parameter group's hyperparameters describe."""
    return AdamForm(
        group["cross_fit"],
        group["inverse_correction"],
        group["alpha"],
        group["adaptive_alpha"],
        {"derived": DERIVED, "reference": REFERENCE}[group["constants"]],
    )


def powers_of(form: AdamForm, skewed: bool = False) -> tuple[Power, ...]:
    """The sums that an update needs besides p.grad."""
    corrected = form.inverse_correction != "none"
    if form.cross_fit == "leave_one_out":
        return (Power(2), Power(3)) if skewed else (Power(2),)
    if form.cross_fit == "none":
        return (Power(2), Power(4)) if corrected else ()
    halves = (1,) if form.cross_fit == "split" else (0, 1)
    squares = [Power(exponent, half) for half in halves for exponent in ((2, 4) if corrected else (2,))]
    return (Power(1, 0), *squares)
