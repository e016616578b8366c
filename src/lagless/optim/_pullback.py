"""The pull of PACE around any optimizer."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from lagless._validation import Settings
from lagless.execution import Noise, Row, blocks, counts, foreach_add_, foreach_copy_, local, without_autocast
from lagless.optim._average_step import AverageStep, average_step
from lagless.optim._averaged import average_keys, new_buffers
from lagless.optim._denominators import Denominator, denominator_of, is_plain
from lagless.optim._executors import move_average, pull_, towards, widened
from lagless.optim._pace import PACE_AVERAGE
from lagless.optim._settings import check_average, check_dtype
from lagless.optim._wrapping import WrappingOptimizer, check_base
from lagless.rules import Rule


class Pullback(WrappingOptimizer):
    """Any optimizer, with every coordinate pulled towards the average of the weights.

        θ_t = step of the optimizer from θ_{t-1}  +  min(λ_t, 1)(ema_{t-1} - θ_{t-1})

    Where the optimizer has a diagonal preconditioner D, the gain is that of :class:`PACE`, λ_t = η c d_t/D: for Adam,
    AdamW, RMSprop and Adagrad of torch. Around SGD and Muon, and with ``gain="constant"``, it is λ_t = c d_t, whatever
    the learning rate. d_t is as in :class:`PACE`. ``Pullback(AdamW(params, lr), c)`` is ``PACE(params, lr,
    pullback=c)``.

    Parameter groups, their settings and the state are the wrapped optimizer's own, so that schedulers, hooks and
    checkpoints see one optimizer. During a step one more copy of the weights is held.

    Args:
        optimizer: the one that steps.
        pullback: c ≥ 0. Can be set per group, as all that follow: before, in the groups given to ``optimizer``.
        average: the rule of the average; what the pull is towards between its updates, and with BEMA, is as in
            :class:`PACE`.
        clamp: whether gains end at 1.
        gate_pullback: pull only at the update steps of the average.
        average_dtype: of stored averages; None for float32 (wider where the parameters are), or ``torch.bfloat16``,
            rounded stochastically.
        gain: ``"constant"`` for λ_t = c d_t; required around optimizers other than those above, whose D is not known
            here. None for the gain that the optimizer has.

    Raises:
        ValueError: if an argument is out of range, the optimizer needs a ``gain``, or another ``Pullback`` has it.
        TypeError: if ``optimizer`` is no ``torch.optim.Optimizer``, keeps an average itself, or cannot step without a
            closure, as LBFGS.

    Reference:
        Au and Block, *Training for the Model You Return*, arXiv 2606.25086; with a constant gain their equation (22).

    >>> import torch
    >>> weight = torch.nn.Parameter(torch.ones(2))
    >>> optimizer = Pullback(torch.optim.SGD([weight], lr=0.1), pullback=0.5)
    >>> weight.square().sum().backward()
    >>> optimizer.step()
    >>> [round(v, 4) for v in weight.tolist()]
    [0.8, 0.8]
    """

    def __init__(
        self,
        optimizer: Optimizer,
        pullback: float = 0.15,
        average: Rule = PACE_AVERAGE,
        *,
        clamp: bool = True,
        gate_pullback: bool = False,
        average_dtype: torch.dtype | None = None,
        gain: Literal["constant"] | None = None,
    ) -> None:
        check_base(optimizer, type(self).__name__)
        settings = {
            "pullback": pullback,
            "average": average,
            "clamp": clamp,
            "gate_pullback": gate_pullback,
            "average_dtype": average_dtype,
            "gain": gain,
            "evaluating": False,
        }
        super().__init__(optimizer, settings)

    _lasting = ("lr", "average", "pullback")

    def _check(self, group: dict[str, Any]) -> None:
        check = Settings(self, group)
        check.numbers("pullback", minimum=0.0)
        check.flags("clamp", "gate_pullback")
        check.that("gain", group["gain"] in (None, "constant"), "'constant' or None")
        check_average(group["average"])
        check_dtype(group["average_dtype"])
        if group["gain"] is None and denominator_of(self.optimizer) is None and not is_plain(self.optimizer):
            raise ValueError(
                f"the preconditioner of {type(self.optimizer).__name__} is not known here. For a pull of c d_t, "
                "whatever the learning rate and the gradients, give gain='constant'."
            )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of the optimizer, and the pull.

        Args:
            closure: evaluates the model anew and returns the loss; called once.

        Returns:
            What the closure returned.

        Raises:
            RuntimeError: while the parameters hold the average, or for complex parameters.
        """
        self._refuse_while_evaluating("take a step")
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        due = [[p for p in group["params"] if p.grad is not None] for group in self._groups]
        if any(p.is_complex() for parameters in due for p in parameters):
            raise RuntimeError("Pullback needs real parameters; optimize torch.view_as_real of complex ones.")
        before = [[p.detach().clone() for p in parameters] for parameters in due]
        with without_autocast(p.device for p in self._parameters()):
            self.optimizer.step()
            for group, parameters, starts in zip(self.param_groups, due, before, strict=True):
                self._pull(group, parameters, starts)
        return loss

    def _pull(self, group: dict[str, Any], parameters: list[Tensor], before: list[Tensor]) -> None:
        rule: Rule = group["average"]
        denominator = None if group["gain"] == "constant" else denominator_of(self.optimizer)
        names = (*(denominator.names(group) if denominator else ()), *average_keys(rule))
        kinds: defaultdict[tuple[Any, ...], list[Row]] = defaultdict(list)
        needs_step = denominator is not None and denominator.needs_step
        base_steps = counts([self.state[p]["step"] if needs_step else 0 for p in parameters])
        for parameter, start, base_step in zip(parameters, before, base_steps, strict=True):
            state = self.state[parameter]
            if self.step_key not in state:
                state[self.step_key] = 0
                state.update(new_buffers(rule, start, group["average_dtype"]))
            state[self.step_key] += 1
            row = (local(parameter), local(start), *(local(state[name]) for name in names))
            kinds[state[self.step_key], base_step, row[0].device, tuple(t.dtype for t in row)].append(row)
        for index, ((step, base_step, _, _), rows) in enumerate(kinds.items()):
            moves, noise = average_step(rule, step), Noise(index, step)
            for block in blocks(rows):
                _pull_block(block, group, denominator, base_step, moves, noise)


def _pull_block(
    block: list[list[Tensor]],
    group: dict[str, Any],
    denominator: Denominator | None,
    base_step: int,
    moves: AverageStep,
    noise: Noise,
) -> None:
    theta, before, *rest = block
    count = len(denominator.names(group)) if denominator else 0
    sources, buffers = rest[:count], rest[count:]
    wide = torch.promote_types(theta[0].dtype, torch.float32)
    weights = widened(theta, wide)
    pull = group["pullback"] * moves.decay
    if group["gate_pullback"] and moves.update is None:
        pull = 0.0
    distance = towards(moves.target, buffers, widened(before, wide)) if pull != 0.0 else None
    ceiling = 1.0 if group["clamp"] else float("inf")
    if distance is not None and denominator is not None:
        divisor = denominator.compute([widened(s, wide) for s in sources], group, base_step)
        pull_(weights, divisor, distance, float(group["lr"]) * pull, ceiling)
    elif distance is not None:
        foreach_add_(weights, distance, alpha=min(pull, ceiling))
    if weights is not theta:
        foreach_copy_(theta, weights)
        foreach_copy_(weights, theta)
    if moves.update is not None:
        move_average(buffers, moves.update, weights, noise)
