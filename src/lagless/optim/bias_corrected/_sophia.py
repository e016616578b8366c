"""Sophia-G with cross-fitted curvature and corrected inverses."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.graph import increment_version
from torch.distributed.tensor import DTensor
from torch.utils.hooks import RemovableHandle

from lagless._validation import Settings
from lagless.execution import compiled, fits_kernel, flat, local, on_device, sum_over
from lagless.optim._settings import require_learning_rate
from lagless.optim.bias_corrected._base import STANDARD, BiasCorrected
from lagless.optim.bias_corrected._elements import move, pieces
from lagless.optim.bias_corrected._microbatches import Collected
from lagless.optim.bias_corrected._report import CorrectionSums
from lagless.optim.bias_corrected._sums import Power, PowerSums, Sums
from lagless.updates import sophia_inverse, sophia_update, sophia_variance, two_nodes


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
        params: parameters, groups, or better ``model.named_parameters()``, see ``standard``.
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
        standard: parts of names of parameters to step without corrections; () for none. Their ``batch_size`` is the
            same, so give groups of their own where parity matters.
        report_freq: fewest steps between records for :meth:`correction_report`, made when curvature is taken in; 0 for
            never.
        process_group: data-parallel processes, all of whose microbatches are folds; None for the default group.

    Raises:
        ValueError: for a hyperparameter out of range.

    Reference:
        Liu et al., arXiv 2305.14342, Algorithm 3; Nayak et al., arXiv 2605.20756. No bias correction of m or h.
    """

    _plain: ClassVar[dict[str, Any]] = {"cross_fit": "none", "inverse_correction": "none"}

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
        standard: Sequence[str] = STANDARD,
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
        self._curvature: dict[Tensor, PowerSums] = {}
        self._estimates, self._weights = [0, 0], [0.0, 0.0]  # of either half, and what they weigh
        super().__init__(params, defaults, standard=standard, report_freq=report_freq, process_group=process_group)

    @property
    def curvature_due(self) -> bool:
        """Whether the next step takes in curvature."""
        return any(self._due(group) for group in self.param_groups)

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
            if optimizer.curvature_due and optimizer._wanted():
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
        parameters = [p for group in self.param_groups for p in group["params"] if p.requires_grad]
        announced = self._microbatches.announced
        weight = 1.0 if announced is None else announced
        loss = loss if weight == 1.0 else weight * loss
        if any(isinstance(p, DTensor) for p in parameters):
            gradients = self._gradients_of_shards(loss, parameters, retain_graph)
        else:
            gradients = torch.autograd.grad(loss, parameters, retain_graph=retain_graph, allow_unused=True)
        if all(q is None for q in gradients):
            raise RuntimeError("this loss depends on none of the optimizer's parameters; give that of their own model.")
        half, fresh = self._half(), not any(self._estimates)
        with torch.no_grad():
            for group in self.param_groups:
                for p in group["params"]:
                    sums = self._sums_of(group, p)
                    if fresh:
                        sums.totals.clear()
            for p, q in zip(parameters, gradients, strict=True):
                if q is not None:
                    self._curvature[p].add(local(q), half, False, weight)
        self._estimates[half] += weight > 0.0
        self._weights[half] += weight

    def _gradients_of_shards(
        self, loss: Tensor, parameters: Sequence[Tensor], retain_graph: bool
    ) -> list[Tensor | None]:
        """Those of a backward pass of its own, since FSDP2 reduces gradients into p.grad only."""
        own = [p.grad for p in parameters]
        for p in parameters:
            p.grad = None
        self._microbatches.paused = True
        try:
            loss.backward(retain_graph=retain_graph)
            return [p.grad for p in parameters]
        finally:
            self._microbatches.paused = False
            for p, gradient in zip(parameters, own, strict=True):
                p.grad = gradient

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._curvature, self._estimates, self._weights = {}, [0, 0], [0.0, 0.0]
        super().__setstate__(state)

    def _half(self) -> int:
        microbatches = self._microbatches
        rank = 0 if microbatches.group is None else microbatches.group.rank()
        return (microbatches.begun + rank) % 2

    def _wanted(self) -> bool:
        """Whether anybody uses the curvature of the microbatch at hand."""
        return self._half() == 1 or any(g["cross_fit"] == "none" for g in self.param_groups)

    def _records(self, group: dict[str, Any], step: int, former: CorrectionSums | None) -> bool:
        return (former is None or step - former.step >= self._report_freq) and self._due(group)

    def _due(self, group: dict[str, Any]) -> bool:
        taken = [int(self.state[p]["step"]) for p in group["params"] if "step" in self.state[p]]
        return bool(group["params"]) and max(taken, default=0) % group["hessian_freq"] == 0

    def _check(self, group: dict[str, Any]) -> None:
        check = Settings(self, group)
        require_learning_rate(self, group["lr"])
        check.decays("betas")
        check.numbers("weight_decay", minimum=0.0)
        check.numbers("eps", "rho", "batch_size", "clip", above=0.0)
        check.integers("hessian_freq", minimum=1)
        check.flags("compile")
        reason = ": the method has no other form for curvature, which has its own labels and is kept between estimates"
        allowed = "'none' or 'split'" + (reason if group["cross_fit"] in ("symmetric", "leave_one_out") else "")
        check.that("cross_fit", group["cross_fit"] in ("none", "split"), allowed)
        check.choice("inverse_correction", ("none", "post_ema", "pre_ema"))

    def _needs(self, group: dict[str, Any], parameter: Tensor) -> tuple[Sums | None, bool]:
        return PowerSums((Power(1, 0),), group["compile"]) if group["cross_fit"] == "split" else None, False

    def _all_finite(self, parameters: Sequence[Tensor], sums: Iterable[dict[Any, Tensor]]) -> bool:
        if self._microbatches.group is not None and self.curvature_due:  # all ranks are due together
            self._reduce(self._microbatches.group)
        return super()._all_finite(parameters, [*sums, *(own.totals for own in self._curvature.values())])

    def _reduce(self, over: dist.ProcessGroup) -> None:
        """Replace curvature and its counts by those of all processes, which need not have reached the same."""
        wanted = [(g, p) for g in self.param_groups for p in g["params"] if p.requires_grad]
        for group, p in wanted:
            self._sums_of(group, p).start(p)
        device = wanted[0][1].device if wanted else None
        counts = torch.tensor([*self._estimates, *self._weights], dtype=torch.float64, device=device)
        sum_over(over, [counts, *(total for _, p in wanted for total in self._curvature[p].totals.values())])
        self._estimates, self._weights = [int(n) for n in counts[:2].tolist()], counts[2:].tolist()

    def _sums_of(self, group: dict[str, Any], p: Tensor) -> PowerSums:
        return self._curvature.setdefault(p, PowerSums(_curvature_powers(group), group["compile"]))

    def _forget(self, stepped: bool) -> None:
        # Curvature is estimated before its microbatch's backward(), and zero_grad() may come between.
        if stepped or self._microbatches.begun:
            self._curvature.clear()
            self._estimates, self._weights = [0, 0], [0.0, 0.0]
        super()._forget(stepped)

    def _refuse(self, groups: Sequence[dict[str, Any]]) -> None:
        super()._refuse(groups)
        for group in groups:
            # The remainder of an epoch may be one microbatch, and none of the half that curvature is taken from.
            rest = group["cross_fit"] == "split" and self._microbatches.halves == (1, 0) and self._folds_seen
            if self._due(group) and not self._estimates_of(group) and not rest:
                raise RuntimeError(
                    "this step needs curvature and none was collected. Call optimizer.estimate_curvature(model) before "
                    "training, or optimizer.add_curvature(loss) when optimizer.curvature_due."
                )

    def _update(self, group: dict[str, Any], collected: dict[Tensor, Collected], sums: CorrectionSums | None) -> None:
        due = self._due(group)
        estimates = self._estimates_of(group) if due else 0
        for p in group["params"]:
            if p.grad is not None:
                self._update_one(group, p, collected.get(p), estimates, sums)

    def _estimates_of(self, group: dict[str, Any]) -> int:
        """How many microbatches' curvature there is for a group."""
        first, second = self._estimates
        return second if group["cross_fit"] == "split" else first + second

    def _update_one(
        self, group: dict[str, Any], p: Tensor, found: Collected | None, estimates: int, report: CorrectionSums | None
    ) -> None:
        assert p.grad is not None
        state = self.state[p]
        if not state:
            dtype = torch.promote_types(p.dtype, torch.float32)
            state["step"] = torch.zeros((), dtype=torch.float32)
            for name in ("exp_avg", "hessian", "inverse"):
                state[name] = torch.zeros_like(p, dtype=dtype, memory_format=torch.preserve_format)
            state["inverse"].fill_(1.0 / group["eps"])  # of no curvature, until there is an estimate
        state["step"] += 1
        k = Numbers.at(group, self._weights[1] if group["cross_fit"] == "split" else sum(self._weights))
        sums = self._curvature.get(p, PowerSums(())).totals if estimates else {}
        split = group["cross_fit"] == "split" and found is not None and all(found.reached)
        half = found.mean(Power(1, 0)) if split and found is not None else p.grad
        row = [local(t) for t in (p, half, state["exp_avg"], state["hessian"], state["inverse"], *sums.values())]
        if group["compile"] and report is None and fits_kernel(row):
            compiled(_one_pass)(tuple(sums), estimates, on_device(k, row[2].dtype, row[2].device), *map(flat, row))
            increment_version(row[0])
            return
        for mean, *piece in pieces(local(p.grad), *row):
            _step(tuple(sums), estimates, k, *piece, mean=mean, report=report)


class Numbers(NamedTuple):
    """What may change from step to step: numbers, or tensors of no dimension."""

    lr: Any
    weight_decay: Any
    eps: Any
    beta1: Any
    beta2: Any
    scale: Any  # ρ · batch_size
    clip: Any
    weight: Any  # of all estimates of the curvature

    @classmethod
    def at(cls, group: dict[str, Any], weight: float) -> Numbers:
        """Those of a parameter group."""
        (b1, b2), scale = group["betas"], group["rho"] * group["batch_size"]
        return cls(group["lr"], group["weight_decay"], group["eps"], b1, b2, scale, group["clip"], weight)


def _one_pass(powers: tuple[Power, ...], estimates: int, numbers: Tensor, *row: Tensor) -> None:
    _step(powers, estimates, Numbers(*numbers.unbind()), *row)


def _step(
    powers: tuple[Power, ...],
    estimates: int,
    k: Numbers,
    live: Tensor,
    gradient: Tensor,
    m: Tensor,
    h: Tensor,
    inverse: Tensor,
    *totals: Tensor,
    mean: Tensor | None = None,
    report: CorrectionSums | None = None,
) -> None:
    """One step of what is given; curvature is taken in if there are ``estimates`` of it."""
    variance = None
    if estimates:
        means = {power: total / k.weight for power, total in zip(powers, totals, strict=True)}
        variance = _take_in(h, means, k, estimates)
        inverse.copy_(sophia_inverse(h, k.scale, k.eps, variance))
    old = m.clone() if report is not None else m
    m.lerp_(gradient.to(m.dtype), 1.0 - k.beta1)
    update = sophia_update(m, inverse, k.clip)
    if report is not None and mean is not None:
        plain = sophia_inverse(h, k.scale, k.eps)
        standard = sophia_update(old.lerp_(mean.to(m.dtype), 1.0 - k.beta1), plain, k.clip)
        report.add(update, standard, None if variance is None else variance * plain * plain)
    move(live, update, k.lr, k.weight_decay)


def sampled_label_loss(
    logits: Tensor, labels: Tensor, ignore_index: int = -100, generator: torch.Generator | None = None
) -> Tensor:
    """Mean cross-entropy of next tokens that the model samples itself, where ``labels`` supervise one.

    Its gradient q makes mean q² · batch size the Gauss-Newton-Bartlett estimate of the diagonal curvature.

    Args:
        logits: of the next token, shape (batch, length, vocabulary); the last position's are not used.
        labels: shape (batch, length), not shifted, ``ignore_index`` where there is no supervision.
        ignore_index: as in the true loss.
        generator: of the samples.
    """
    logits, supervised = logits[:, :-1].float(), labels[:, 1:] != ignore_index
    logits = logits[supervised]
    probabilities = logits.detach().softmax(dim=-1)
    sampled = torch.multinomial(probabilities, 1, generator=generator).squeeze(1)
    return nn.functional.cross_entropy(logits, sampled)


def _curvature_powers(group: dict[str, Any]) -> tuple[Power, ...]:
    corrected = group["inverse_correction"] != "none"
    if group["cross_fit"] == "split":
        return (Power(2, 1), Power(4, 1)) if corrected else (Power(2, 1),)
    return (Power(1), Power(2), Power(4)) if corrected else (Power(1),)


def _take_in(h: Tensor, means: dict[Power, Tensor], k: Numbers, n: int) -> Tensor | None:
    """Move h on, and return V; a parameter that sampled labels did not reach has curvature 0."""
    first = means.get(Power(1))
    square, fourth = (means.get(Power(e, 1), means.get(Power(e))) for e in (2, 4))
    fed = square if first is None else first * first
    h.lerp_(torch.zeros_like(h) if fed is None else fed, 1.0 - k.beta2)
    if fourth is None or square is None or n < 2:
        return None
    return sophia_variance(two_nodes(square, fourth - square * square, n), k.beta2, k.scale)
