"""PACE: AdamW pulled towards the average that will be returned."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lagless._validation import Settings
from lagless.execution import (
    Noise,
    PaceRow,
    Row,
    block_size,
    counts,
    exact_dtype,
    fits_kernel,
    fits_pace_c,
    foreach_add_,
    local,
    on_device,
    pace_step_c,
    without_autocast,
)
from lagless.optim._average_step import average_step, average_step_on_device, check_capturable
from lagless.optim._averaged import AveragedOptimizer, average_keys, new_buffers
from lagless.optim._executors import local_gradient, step_in_blocks, step_in_one_kernel, step_on_device
from lagless.optim._pull_statistics import PullStatistics
from lagless.optim._settings import check_average, check_dtype, require_learning_rate
from lagless.rules import EMA, Rule
from lagless.updates import PaceConstants, pace_constants

PACE_AVERAGE = EMA(ema_power=0.2, lag=1.0, min_ema_multiplier=1e-4, update_freq=1)


class PACE(AveragedOptimizer):
    """AdamW with a clipped pull of every coordinate towards the average of the weights; the average is what you return.

    At step t, with ema the average before the step, D = (v_t/(1 - β₂^t))^½ + ε and η the present learning rate,

        θ_t = AdamW step from θ_{t-1}  +  min(η c d_t/D, 1)(ema_{t-1} - θ_{t-1})
        ema_t = (1 - β_t) ema_{t-1} + β_t θ_t

    where d_t = β_t for averages whose gain β_t falls with time, and 1 for others. With ``pullback=0`` this is AdamW
    with an average beside it. Where the gain is clamped, the weights make AdamW steps of size ηβ_t around the
    average: see "When does PACE help?" in the documentation before you compare.

    Evaluate with :meth:`applied`, :meth:`read`, or :meth:`eval` and :meth:`train`, which the Hugging Face ``Trainer``
    calls by itself. The Trainer does not put the average into the model that it saves at the end:
    :class:`lagless.integrations.transformers.AveragingCallback` does, and elsewhere :meth:`copy_to_model`.

    Args:
        params: parameters, named parameters or parameter groups. Everything below can be set per group.
        lr: η ≥ 0; a number or a tensor.
        betas: (β₁, β₂) in [0, 1).
        eps: ε > 0, for Adam and for the gain of the pull.
        weight_decay: λ ≥ 0, decoupled.
        pullback: c ≥ 0. The useful value depends on the scale of the gradients: the loss times s needs c times s.
        average: the rule of the average, any of :mod:`lagless.rules`. Between its updates the target is the average
            of the latest one, at step s. Until the first it is the weights at the end of burn-in. With BEMA it is
            ema_s + α_s(θ_{t-1} - θ_0): it lies ahead of the ema in the direction travelled, so the pull brakes less,
            and between updates it moves on with the iterate.
        clamp: whether gains end at 1.
        gate_pullback: pull only at the update steps of the average (Algorithm 1 of the paper; the authors' code pulls
            at every step). No difference for ``update_freq=1``.
        maximize: ascend.
        average_dtype: of stored averages; None for float32 (wider where the parameters are), or ``torch.bfloat16``,
            rounded stochastically.
        compile: read and write everything once, for averages of one buffer, such as EMA; others go block by block.
            On CPUs, contiguous float32 and float64 tensors are stepped by one call into C (not with ``capturable``),
            compiled in a fraction of a second; elsewhere each large tensor by a kernel of ``torch.compile``.
        capturable: keep step counts on the device and never wait for it, so that a step can be captured in a CUDA
            graph; a learning rate that changes must be a tensor on the device.

    Raises:
        ValueError: if an argument is out of range.
        TypeError: if ``average`` is no rule.

    Reference:
        Au and Block, *Training for the Model You Return*, arXiv 2606.25086, Algorithm 1; settings of Figure 1
        (SmolLM2-1.7B). Where paper and code differ, this follows the code.

    >>> import torch
    >>> weight = torch.nn.Parameter(torch.ones(3))
    >>> optimizer = PACE([weight], lr=0.1)
    >>> for _ in range(100):
    ...     optimizer.zero_grad()
    ...     weight.square().sum().backward()
    ...     _ = optimizer.step()
    >>> with optimizer.applied():
    ...     bool(weight.abs().max() < 0.1)
    True
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        pullback: float = 0.15,
        average: Rule = PACE_AVERAGE,
        *,
        clamp: bool = True,
        gate_pullback: bool = False,
        maximize: bool = False,
        average_dtype: torch.dtype | None = None,
        compile: bool = False,
        capturable: bool = False,
    ) -> None:
        settings = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "pullback": pullback,
            "average": average,
            "clamp": clamp,
            "gate_pullback": gate_pullback,
            "maximize": maximize,
            "average_dtype": average_dtype,
            "compile": compile,
            "capturable": capturable,
            "evaluating": False,
        }
        self._statistics: PullStatistics | None = None
        super().__init__(params, settings)

    moments = ("exp_avg", "exp_avg_sq")
    _lasting = ("lr", "betas", "eps", "weight_decay", "pullback", "average")

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._statistics = None
        super().__setstate__(state)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters with settings of their own.

        Raises:
            ValueError: if a setting is out of range.
        """
        group = {**self.defaults, **param_group}
        self._check(group)
        super().add_param_group(param_group)
        lr, elsewhere = group["lr"], [p.device for p in self.param_groups[-1]["params"] if p.device.type != "cpu"]
        if group["capturable"] and isinstance(lr, Tensor) and lr.device.type == "cpu" and elsewhere:
            del self.param_groups[-1]
            raise ValueError(
                f"{type(self).__name__}: lr is a tensor on the CPU, whose later values a captured graph would not see; "
                f"with capturable=True give lr.to({str(elsewhere[0])!r})."
            )

    def _check(self, group: dict[str, Any]) -> None:
        check = Settings(self, group)
        require_learning_rate(self, group["lr"])
        check.decays("betas")
        check.numbers("eps", above=0.0)
        check.numbers("weight_decay", "pullback", minimum=0.0)
        check.flags("clamp", "gate_pullback", "maximize", "compile", "capturable")
        check_average(group["average"])
        check_dtype(group["average_dtype"])
        if group["capturable"]:
            check_capturable(group["average"])

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step.

        Args:
            closure: evaluates the model anew and returns the loss.

        Returns:
            What the closure returned.

        Raises:
            RuntimeError: while the parameters hold the average, or for sparse gradients or complex parameters.
        """
        self._refuse_while_evaluating("take a step")
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        due = [[p for p in group["params"] if p.grad is not None] for group in self._groups]
        for parameter in (p for parameters in due for p in parameters):
            if parameter.is_complex() or parameter.grad is None or parameter.grad.layout != torch.strided:
                raise RuntimeError("PACE needs real parameters and dense gradients; use SparseAdam or view_as_real.")
        with without_autocast(p.device for p in self._parameters()):
            for group, parameters in zip(self.param_groups, due, strict=True):
                for parameter in parameters:
                    self._prepare(parameter, group)
                if group["capturable"] and self._statistics is None:
                    self._step_on_device(group, parameters)
                else:
                    self._step(group, parameters)
        if self._statistics is not None:
            self._statistics.steps += 1
        return loss

    @contextmanager
    def recording(self) -> Generator[PullStatistics]:
        """Statistics of the steps inside the ``with`` block: how much is clamped, gains and norms.

        Recorded steps go block by block, also with ``compile`` and ``capturable``. Of a block inside another one, the
        inner one records.

        Raises:
            RuntimeError: on a read without any step recorded.
        """
        outer, statistics = self._statistics, PullStatistics()
        self._statistics = statistics
        try:
            yield statistics
        finally:
            self._statistics = outer

    def _prepare(self, parameter: Tensor, group: dict[str, Any]) -> None:
        """Make the state of a parameter at its first step."""
        state = self.state[parameter]
        if state:
            return
        wide = torch.promote_types(parameter.dtype, torch.float32)
        state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device if group["capturable"] else "cpu")
        for name in ("exp_avg", "exp_avg_sq"):
            state[name] = torch.zeros_like(parameter, dtype=wide, memory_format=torch.preserve_format)
        state.update(new_buffers(group["average"], parameter, group["average_dtype"]))

    def _rows(self, parameters: list[Tensor], group: dict[str, Any]) -> Iterator[Row]:
        names = ("exp_avg", "exp_avg_sq", *average_keys(group["average"]))
        for parameter in parameters:
            state = self.state[parameter]
            yield local(parameter), local_gradient(parameter), *[local(state[name]) for name in names]

    def _step(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        kinds: defaultdict[tuple[Any, ...], list[Row]] = defaultdict(list)
        steps = [self.state[p]["step"] for p in parameters]
        if steps:
            foreach_add_(steps, 1.0)
        for row, step in zip(self._rows(parameters, group), counts(steps), strict=True):
            kinds[step, row[0].device, tuple(t.dtype for t in row)].append(row)
        rule: Rule = group["average"]
        for index, ((step, *_), rows) in enumerate(kinds.items()):
            moves = average_step(rule, step)
            pulls = moves.update is not None or not group["gate_pullback"]
            k = _constants(group, step, float(group["lr"]), moves.decay if pulls else 0.0, moves.weight or 0.0)
            if group["compile"] and moves.weight is not None and self._statistics is None:
                rows = _step_whole(rows, k, step)
            step_in_blocks(rows, k, moves, Noise(index, step), self._statistics)

    def _step_on_device(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        """As :meth:`_step`, with step counts and all that follows from them on the device."""
        devices: defaultdict[torch.device, list[Tensor]] = defaultdict(list)
        for parameter in parameters:
            devices[parameter.device].append(parameter)
        for same in devices.values():
            steps = [self.state[p]["step"] for p in same]
            foreach_add_(steps, 1.0)
            t = torch.stack(steps).to(exact_dtype(steps[0].device))
            weight, decay = average_step_on_device(group["average"], t)
            pulls = torch.where(weight > 0.0, decay, 0.0) if group["gate_pullback"] else decay
            lr = group["lr"].reshape(()) if isinstance(group["lr"], Tensor) else group["lr"]
            k = _constants(group, t, lr, pulls, weight)
            columns = [x.expand_as(t) if isinstance(x, Tensor) else torch.full_like(t, x) for x in (*k, t)]
            rows = list(self._rows(same, group))
            for row, constants in zip(rows, torch.stack(columns, dim=1).unbind(), strict=True):
                if group["compile"] and fits_kernel(row):
                    step_in_one_kernel(row, constants)
                else:
                    step_on_device(row, constants, block_size(rows))


def _step_whole(rows: list[Row], k: PaceConstants, step: int) -> list[Row]:
    """Step the parameters for which one pass over memory is possible; returns the others."""
    whole: list[Row] = []
    large: list[Row] = []
    others: list[Row] = []
    for row in rows:
        (whole if fits_pace_c(row) else large if fits_kernel(row) else others).append(row)
    if whole:
        pace_step_c([PaceRow(*row) for row in whole], k)
    if large:
        device = large[0][0].device
        constants = on_device((*k, step), exact_dtype(device), device)
        for row in large:
            step_in_one_kernel(row, constants)
    return others


def _constants(group: dict[str, Any], step: Any, lr: Any, decay: Any, weight: Any) -> PaceConstants:
    return pace_constants(
        step,
        lr=lr,
        betas=group["betas"],
        eps=group["eps"],
        weight_decay=group["weight_decay"],
        pullback=group["pullback"] * decay,
        clamp=group["clamp"],
        maximize=group["maximize"],
        average=weight,
    )
