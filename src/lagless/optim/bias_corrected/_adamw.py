"""AdamW with cross-fitted preconditioners and corrected inverses."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from lagless.optim._blocks import local
from lagless.optim.bias_corrected._base import STANDARD, BiasCorrected, tensors_of
from lagless.optim.bias_corrected._elements import move, pieces
from lagless.optim.bias_corrected._hyperparameters import (
    require,
    require_betas,
    require_nonnegative,
    require_positive,
    require_steps,
)
from lagless.optim.bias_corrected._microbatches import Collected
from lagless.optim.bias_corrected._report import CorrectionSums
from lagless.optim.bias_corrected._sums import Power, PowerSums, Sums
from lagless.updates import (
    DERIVED,
    REFERENCE,
    AdamForm,
    CrossFit,
    EmaWeights,
    Folds,
    Group,
    InverseCorrection,
    Moments,
    Spread,
    adam_folds,
    fed_moments,
    skewed_nodes,
    support_clip,
    two_nodes,
)

PLAIN = AdamForm()


class BiasCorrectedAdamW(BiasCorrected):
    """AdamW whose update is less biased, from the microbatches that gradient accumulation goes through anyway.

    Each microbatch is a fold. Numerator and preconditioner are taken from different folds (``cross_fit``), and what
    the convexity of 1/x adds is subtracted (``inverse_correction``); :class:`lagless.updates.AdamForm` has the
    formulas. With both "none" this is torch's AdamW:

        θ ← (1 - lr·λ)θ - lr·u,   m ← β₁m + (1 - β₁)g,   v ← β₂v + (1 - β₂)s

    Microbatches are seen by hooks: make the optimizer before the first ``backward()``, accumulate gradients as usual
    (Trainer, Accelerate, Lightning or a plain loop), divide losses by their number or not, unscale and clip
    ``p.grad`` as usual. One forward and backward pass per microbatch, whatever the setting.

    Args:
        params: parameters, groups, or better ``model.named_parameters()``, see ``standard``.
        lr: learning rate ≥ 0.
        betas: β₁ and β₂ in [0, 1).
        eps: ε ≥ 0, outside the root.
        weight_decay: λ ≥ 0, decoupled.
        cross_fit: "leave_one_out" (the default) divides each fold by what the others give; "split" takes the
            numerator from every second microbatch and the second moment from those between; "symmetric" averages both
            ways to do so; "none" takes everything from all.
        inverse_correction: "none", "post_ema", "pre_ema", or with leave_one_out "jackknife".
        folds: how microbatches are remembered. "moments" (default): sums of powers of their gradients, 1 buffer of
            the parameters' size for leave_one_out, 2 for none with a correction and for split, 3 for corrected split
            and for symmetric, 5 for corrected symmetric. "skewed": leave_one_out with the third moment too, 2
            buffers. "exact": the gradients themselves, n buffers.
        warm_start: steps of plain AdamW before the first corrected one. None: for leave_one_out 1/(1 - β₂), since one
            microbatch can be all that an empty history divides by; 0 otherwise.
        update_clip: largest |u| per coordinate; None for no limit.
        support_clip: τ > 0 for none and split: u is shortened by √(τ s/g²) where that is below 1; None for no limit.
        support_eps: added to s and g² there.
        alpha: in [0, 1], for split: the weight of B's mean square in s; the rest is ḡ_A².
        adaptive_alpha: multiply α by the cosine of the two, per tensor.
        constants: of the corrections: "derived", or "reference" as in the authors' code.
        standard: parts of names of parameters to step with plain AdamW: rows of an embedding that no microbatch but
            one has seen get no preconditioner from the others. Needs names; says what it found. () for none.
        report_freq: every how many steps to record for :meth:`correction_report`; 0 for never.
        process_group: data-parallel processes, all of whose microbatches are folds; None for the default group.

    Raises:
        ValueError: for a hyperparameter out of range, or a combination that has no meaning.

    Reference:
        Nayak et al., arXiv 2605.20756. Their code differs in constants, in clipping, and in taking two passes; the
        documentation lists where.

    >>> import torch
    >>> model = torch.nn.Linear(3, 1)
    >>> optimizer = BiasCorrectedAdamW(model.named_parameters(), lr=0.01, warm_start=0)
    >>> for _ in range(4):
    ...     model(torch.randn(8, 3)).square().mean().backward()
    >>> optimizer.step()
    >>> optimizer.correction_report()[0].cross_fit
    'leave_one_out'
    """

    _plain: ClassVar[dict[str, Any]] = {
        "cross_fit": "none",
        "inverse_correction": "none",
        "folds": "moments",
        "support_clip": None,
        "alpha": 1.0,
        "adaptive_alpha": False,
        "warm_start": 0,
    }

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        *,
        cross_fit: CrossFit = "leave_one_out",
        inverse_correction: InverseCorrection = "none",
        folds: Literal["moments", "skewed", "exact"] = "moments",
        warm_start: int | None = None,
        update_clip: float | None = None,
        support_clip: float | None = None,
        support_eps: float = 1e-12,
        alpha: float = 1.0,
        adaptive_alpha: bool = False,
        constants: Literal["derived", "reference"] = "derived",
        standard: Sequence[str] = STANDARD,
        report_freq: int = 100,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "cross_fit": cross_fit,
            "inverse_correction": inverse_correction,
            "folds": folds,
            "warm_start": warm_start,
            "update_clip": update_clip,
            "support_clip": support_clip,
            "support_eps": support_eps,
            "alpha": alpha,
            "adaptive_alpha": adaptive_alpha,
            "constants": constants,
        }
        super().__init__(params, defaults, standard=standard, report_freq=report_freq, process_group=process_group)

    def _check(self, group: dict[str, Any]) -> None:
        require_betas(self, group)
        form = form_of(group)
        if group["warm_start"] is None:
            group["warm_start"] = math.ceil(1.0 / (1.0 - group["betas"][1])) if form.cross_fit == "leave_one_out" else 0
        require_nonnegative(self, group, "lr", "eps", "weight_decay", "support_eps")
        require_positive(self, group, "update_clip", "support_clip")
        require_steps(self, group, "warm_start")
        left_out, shared = form.cross_fit == "leave_one_out", form.cross_fit in ("none", "split")
        choices = ("moments", "skewed", "exact") if left_out else ("moments", "exact")
        require(self, group, "folds", group["folds"] in choices, f"one of {choices} for {form.cross_fit!r}")
        together = left_out or self._microbatches.group is None
        exact = group["folds"] == "exact"
        require(self, group, "folds", together or not exact, "'moments' in data parallel, unless for leave_one_out")
        whole = not any(isinstance(p, DTensor) for p in tensors_of(group))
        require(self, group, "adaptive_alpha", whole or not group["adaptive_alpha"], "False for sharded parameters")
        unset = group["support_clip"] is None
        require(self, group, "support_clip", unset or shared, "None unless cross_fit is 'none' or 'split'")

    def _needs(self, group: dict[str, Any], parameter: Tensor) -> tuple[Sums | None, bool]:
        form = form_of(group)
        if not self._corrects(group):
            return None, False
        exact = group["folds"] == "exact"
        return None if exact else PowerSums(powers_of(form, group["folds"] == "skewed")), exact

    def _update(self, group: dict[str, Any], collected: dict[Tensor, Collected], sums: CorrectionSums | None) -> None:
        for p in group["params"]:
            if p.grad is not None:
                self._update_one(group, p, collected.get(p), sums)

    def _update_one(
        self, group: dict[str, Any], p: Tensor, found: Collected | None, sums: CorrectionSums | None
    ) -> None:
        state = adam_state(self.state[p], p)
        state["step"] += 1
        step, form = int(state["step"]), form_of(group)
        if step <= group["warm_start"] or found is None or found.count < 2:
            form, found = PLAIN, None
        adam_update(group, form, step, p, state, found, sums)


def _dispersion(folds: Folds, eps: float) -> Tensor | None:
    """Var(D̂)/D² per coordinate."""
    variance, d = folds.variance, folds.second_moment.sqrt() + eps
    if folds.spread is not None:
        variance = folds.spread.variance_of_mean(d)[None] * (folds.spread.count - 1) ** 2
    return None if variance is None else (variance / (d * d)).mean(dim=0)


def form_of(group: dict[str, Any]) -> AdamForm:
    """The update that a parameter group's hyperparameters describe."""
    constants = {"derived": DERIVED, "reference": REFERENCE}
    if group["constants"] not in constants:
        raise ValueError(f"constants={group['constants']!r}; it must be 'derived' or 'reference'.")
    return AdamForm(
        group["cross_fit"],
        group["inverse_correction"],
        group["alpha"],
        group["adaptive_alpha"],
        constants[group["constants"]],
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


def groups_of(
    form: AdamForm, mean: Tensor, powers: dict[Power, Tensor], samples: Sequence[Tensor], found: Collected | None
) -> list[Group]:
    """What an update is made of, from ḡ and what was collected besides."""
    if found is None:
        return [Group(mean)]
    n, (n_a, n_b) = found.count, found.halves
    if samples:
        stacked = torch.stack(tuple(samples))
        if form.cross_fit == "leave_one_out":
            return [Group(mean, Spread(stacked, n, group=found.group))]
        return [Group.of(stacked)] if form.cross_fit == "none" else [Group.of(stacked[half::2]) for half in (0, 1)]
    if form.cross_fit == "leave_one_out":
        square = powers[Power(2)]
        variance = square - mean * mean
        if Power(3) not in powers:
            return [Group(mean, two_nodes(mean, variance, n))]
        third = powers[Power(3)] - mean * (3.0 * square - 2.0 * mean * mean)
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
    b = (n * mean - n_a * a) / max(n_b, 1)
    return [Group(a, None, squares(0, n_a)), Group(b, None, squares(1, n_b))]


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
    """Move a parameter and its moments by one step, block by block."""
    assert p.grad is not None
    weights = EmaWeights.at(group["betas"], step)
    powers, samples = ({}, ()) if found is None else (found.means, found.samples)
    tensors = [local(t) for t in (p, p.grad, state["exp_avg"], state["exp_avg_sq"])]
    # A cosine is of the whole tensor, and every collective call has its price.
    whole = form.adaptive_alpha or (found is not None and bool(samples) and found.group is not None)
    for live, grad, m, v, *rest in pieces(*tensors, *powers.values(), *samples, whole=whole):
        sums_here, samples_here = dict(zip(powers, rest, strict=False)), rest[len(powers) :]
        moments = Moments(m, v)
        groups = groups_of(form, grad.to(m.dtype), sums_here, samples_here, found)
        folds = adam_folds(form, groups, moments, weights, group["eps"])
        fed = fed_moments(form, groups)
        update = folds.update
        if sums is not None and found is not None:
            standard = adam_folds(PLAIN, [Group(grad.to(m.dtype))], moments, weights, group["eps"]).update
            sums.add(update, standard, _dispersion(folds, group["eps"]))
        if group["support_clip"] is not None:
            update = support_clip(update, fed, group["support_clip"], group["support_eps"])
        if group["update_clip"] is not None:
            update = update.clamp(-group["update_clip"], group["update_clip"])
        m.lerp_(fed.m, 1.0 - group["betas"][0])
        v.lerp_(fed.v, 1.0 - group["betas"][1])
        move(live, update, group["lr"], group["weight_decay"])
