"""AdamW with cross-fitted preconditioners and corrected inverses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch.distributed as dist

from lagless._deprecated import former_argument
from lagless.optim.bias_corrected._adamw_method import AdamWMethod
from lagless.optim.bias_corrected._base import BiasCorrected
from lagless.optim.bias_corrected._exclusion import EXCLUDED
from lagless.updates import CrossFit, InverseCorrection


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
        params: parameters, groups, or better ``model.named_parameters()``, see ``exclude``.
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
        warm_start: steps of plain AdamW before the first corrected one. None: 1/(1 - β₂) where cross_fit is
            not "none", since one microbatch can be all that an empty history divides by; 0 otherwise.
        update_clip: largest |u| per coordinate; None for no limit.
        support_clip: τ > 0 for none and split: u is shortened by √(τ s/g²) where that is below 1; None for no limit.
        support_eps: added to s and g² there.
        alpha: in [0, 1], for split: the weight of B's mean square in s; the rest is ḡ_A².
        adaptive_alpha: multiply α by the cosine of the two, per tensor.
        constants: of the corrections: "derived", or "reference" as in the authors' code.
        compile: read and write everything once in a step. On CPUs, contiguous float32 and float64 tensors are stepped
            by one call into C, compiled in a fraction of a second, for leave_one_out with ``folds="moments"`` and where
            nothing is corrected; other forms, and elsewhere, large tensors by a kernel of ``torch.compile``, and their
            microbatches are added to several sums by one. Steps that are recorded, and those with ``folds="exact"``, go
            block by block.
        exclude: parts of names of parameters to step with plain AdamW: rows of an embedding that no microbatch but
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

    _method_type = AdamWMethod

    @former_argument("standard", "exclude")
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
        compile: bool = False,
        exclude: Sequence[str] = EXCLUDED,
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
            "compile": compile,
        }
        super().__init__(params, defaults, exclude=exclude, report_freq=report_freq, process_group=process_group)
