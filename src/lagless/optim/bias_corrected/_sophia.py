"""Sophia-G with cross-fitted curvature and corrected inverses."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lagless._deprecated import former_argument
from lagless.optim.bias_corrected._base import BiasCorrected
from lagless.optim.bias_corrected._exclusion import EXCLUDED
from lagless.optim.bias_corrected._sampled_labels import sampled_label_loss
from lagless.optim.bias_corrected._sophia_method import SophiaMethod


class BiasCorrectedSophia(BiasCorrected):
    """Sophia-G whose gradient and curvature may come from different microbatches, and whose inverse may be corrected.

    With q the gradient of the loss on labels that the model itself sampled, and c = ρ · batch_size:

        m ← β₁m + (1 - β₁)g;   every k steps h ← β₂h + (1 - β₂)s,  P = c·h + ε
        θ ← (1 - lr·λ)θ - lr · clamp(m · max(0, 1/P - V/P³), ±clip)

    For cross_fit "none", g = ḡ and s = (mean q)² of all microbatches; for "split", g = ḡ_A of every second one and s
    = mean q² of those between. V is the variance of P's mean over microbatches for "post_ema" and "pre_ema", which are
    the same since P is affine in q²; 0 for "none".

    :meth:`correction_report` compares with the update from ḡ and the same h without V.

    Curvature is collected by :meth:`estimate_curvature`, or by :meth:`add_curvature` in a loop of your own.

    Args:
        params: parameters, groups, or better ``model.named_parameters()``, see ``exclude``.
        lr: learning rate ≥ 0.
        betas: β₁ and β₂ in [0, 1).
        eps: ε > 0, added to c·h.
        weight_decay: λ ≥ 0, decoupled.
        rho: ρ > 0, how much curvature counts.
        batch_size: what one q is a mean over, in the unit that ρ was tuned in: the samples of a whole step for
            "none", those of one microbatch for "split". Sampled-label gradients have mean 0, so the mean of n squares
            is n times the square of the mean, and the same number for both would make P n times as large.
        clip: largest |u| per coordinate.
        hessian_freq: k, steps between estimates of the curvature. Where such a step has one microbatch only and
            cross_fit is "split", the former estimate stays until the next.
        cross_fit: "none" or "split". The method has no symmetric or leave-one-out form for curvature, which has labels
            of its own and is kept between estimates.
        inverse_correction: "none", "post_ema" or "pre_ema".
        compile: step large contiguous tensors by one kernel of ``torch.compile``, and add each of their microbatches to
            all its sums by one. Steps that are recorded go block by block.
        exclude: parts of names of parameters to step without corrections; () for none. Their ``batch_size`` is the
            same, so give groups of their own where parity matters.
        report_freq: fewest steps between records for :meth:`correction_report`, made when curvature is taken in; 0 for
            never.
        process_group: data-parallel processes, all of whose microbatches are folds; None for the default group.

    Raises:
        ValueError: for a hyperparameter out of range.

    Reference:
        Liu et al., arXiv 2305.14342, Algorithm 3; Nayak et al., arXiv 2605.20756. No bias correction of m or h.
    """

    _method_type = SophiaMethod
    _method: SophiaMethod

    @former_argument("standard", "exclude")
    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.965, 0.99),
        eps: float = 1e-12,
        weight_decay: float = 0.1,
        *,
        rho: float = 0.05,
        batch_size: float = 1.0,
        clip: float = 1.0,
        hessian_freq: int = 10,
        cross_fit: Literal["none", "split"] = "split",
        inverse_correction: Literal["none", "post_ema", "pre_ema"] = "none",
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
            "rho": rho,
            "batch_size": batch_size,
            "clip": clip,
            "hessian_freq": hessian_freq,
            "cross_fit": cross_fit,
            "inverse_correction": inverse_correction,
            "compile": compile,
        }
        super().__init__(params, defaults, exclude=exclude, report_freq=report_freq, process_group=process_group)

    @property
    def curvature_due(self) -> bool:
        """Whether the next step takes in curvature."""
        return self._method.due_anywhere(self.state, self.param_groups)

    def estimate_curvature(self, model: nn.Module) -> RemovableHandle:
        """Collect curvature whenever ``model`` is called for training and a step that needs it is ahead.

        Labels are sampled from the logits of the same forward pass, one more backward pass each time. The model is
        called with ``labels`` and returns an object with ``logits``, shape (batch, length, vocabulary), of the next
        token, as causal language models of transformers do; that is all it takes in the Trainer.

        Returns:
            A handle whose ``remove()`` ends it.

        Raises:
            RuntimeError: in the forward pass, if the model returns no logits.
        """
        owner = weakref.ref(self)

        def sample(_: nn.Module, __: Any, arguments: dict[str, Any], output: Any) -> None:
            optimizer, labels = owner(), arguments.get("labels")
            if optimizer is None or labels is None or not torch.is_grad_enabled():
                return
            if optimizer._method.wants(optimizer.state, optimizer.param_groups, optimizer._microbatches):
                logits = getattr(output, "logits", None)
                if logits is None:
                    raise RuntimeError(
                        f"{type(model).__name__} returned no logits, from which labels are to be sampled: its loss may "
                        "be fused with its last layer, as by TRL's SFTTrainer. Use transformers.Trainer, or do without "
                        "estimate_curvature: where optimizer.curvature_due, call the model without labels and give "
                        "sampled_label_loss(logits, labels) to optimizer.add_curvature."
                    )
                if logits.requires_grad:
                    optimizer.add_curvature(sampled_label_loss(logits, labels), retain_graph=True)

        return model.register_forward_hook(sample, with_kwargs=True)

    def add_curvature(self, loss: Tensor, retain_graph: bool = False) -> None:
        """Take in one microbatch's curvature.

        Args:
            loss: mean loss on sampled labels, :func:`sampled_label_loss`, not scaled by anything. Its microbatch is
                the one whose ``backward()`` comes next.
            retain_graph: keep the graph for a ``backward()`` on another loss.
        """
        self._method.curvature.add(loss, self.param_groups, self._microbatches, retain_graph)
