"""Shampoo with cross-fitted factors and corrected inverse roots."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist

from lagless._deprecated import former_argument
from lagless.execution import local
from lagless.optim.bias_corrected._base import BiasCorrected
from lagless.optim.bias_corrected._exclusion import EXCLUDED
from lagless.optim.bias_corrected._factors import Partition
from lagless.optim.bias_corrected._shampoo_method import ShampooMethod
from lagless.optim.bias_corrected._shampoo_step import is_matrix, measures_lagged

_log = logging.getLogger("lagless")


class BiasCorrectedShampoo(BiasCorrected):
    """Shampoo whose momentum and factors may come from different microbatches, and whose roots may be corrected.

    For every block of every matrix, with G_j its microbatch gradients:

        M ← β₁M + (1 - β₁)G;   every k steps L ← β₂L + (1 - β₂)S_L, R ← β₂R + (1 - β₂)S_R
        W ← (1 - lr·λ)W - lr · P_L M P_R,   P = Q diag(d) Qᵀ, d_i = λ_i^{-1/4} - (5/32) λ_i^{-9/4} V_i

    of the damped factors' eigenvalues λ_i. For cross_fit "none", G = Ḡ, S_L = ḠḠᵀ; for "split", G = Ḡ_A of every second
    microbatch and S_L the mean of G_jG_jᵀ over those between (likewise S_R). V_i is the variance of λ_i over
    microbatches, 0 without correction. What is no matrix, or is in ``exclude``, is stepped with AdamW.

    Args:
        params: parameters, groups, or better ``model.named_parameters()``, see ``exclude``.
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
        exclude: parts of names of parameters for AdamW; () for none.
        report_freq: fewest steps between records for :meth:`correction_report`, made when roots are; 0 for never.
        process_group: data-parallel processes, all of whose microbatches are folds; None for the default group.

    Raises:
        ValueError: for a hyperparameter out of range.

    Reference:
        Gupta et al., arXiv 1802.09568, Algorithm 1; Nayak et al., arXiv 2605.20756. As in the latter's code, factors
        move only when roots are taken.
    """

    _method_type = ShampooMethod

    @former_argument("standard", "exclude")
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
        exclude: Sequence[str] = EXCLUDED,
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
        super().__init__(params, defaults, exclude=exclude, report_freq=report_freq, process_group=process_group)
        _log.info("%s: state of %.1f MB", type(self).__name__, self.state_bytes() / 1e6)

    def state_bytes(self) -> int:
        """Bytes that the state will take on this process, known before the first step."""
        total = 0
        for group in self.param_groups:
            for p in group["params"]:
                size, mine = torch.promote_types(p.dtype, torch.float32).itemsize, local(p).numel()
                if not is_matrix(group, p):
                    total += 2 * mine * size
                    continue
                per_factor = 3 if measures_lagged(group) else 2
                squares = sum(f.size**2 for f in Partition(p.shape, group["block_size"]).factors)
                total += (mine * (2 if group["grafting"] == "adamw" else 1) + per_factor * squares) * size
        return total
