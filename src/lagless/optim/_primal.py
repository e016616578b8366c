"""Primal averaging: gradients taken between the weights that an optimizer steps and their average."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lagless._validation import Settings, require_number
from lagless.execution import (
    Noise,
    Row,
    blocks,
    combine,
    foreach_add_,
    foreach_copy_,
    foreach_lerp,
    is_sharded,
    local,
    without_autocast,
)
from lagless.optim._average_step import AverageStep, average_step
from lagless.optim._averaged import LIVE, average_keys, new_buffers
from lagless.optim._executors import move_average, towards, widened
from lagless.optim._loaded_state import Entry, wide_dtype
from lagless.optim._primal_moves import Widened, mix, without_gradients
from lagless.optim._primal_one_pass import step_in_one_pass, takes_one_pass
from lagless.optim._settings import check_average
from lagless.optim._wrapping import WrappingOptimizer, check_base
from lagless.rules import EMA, ReadCoefficients, Rule, Tick

Interpolation = float | Callable[[int], float]
"""m, or a function of the step t (1-based) that gives it."""

Entries = Mapping[Tensor, dict[str, Any]]
"""The state of each parameter that steps."""

_AVERAGE = EMA(half_life_fraction=0.05)
_RECOVERABLE = 0.5  # smallest m at which x = (y - (1 - m) z)/m loses at most one bit to the rounding of y
_FIRST = Tick(1, 0, 1)


class PrimalAveraging(WrappingOptimizer):
    """Any optimizer, with its gradients taken between its own iterate and the average that is returned.

    Three sequences: z is what the optimizer steps, x is its average, y is where the gradient is taken. The parameters
    hold y during training and x after :meth:`eval`.

        y_t     = (1 - m) z_t + m x_t
        z_{t+1} = step of the optimizer from z_t with the gradient at y_t
        x_{t+1} = average of z_1, ..., z_{t+1} under the rule
        z_{t+1} ← z_{t+1} + p (x_{t+1} - z_{t+1})        at update steps of the average

    With m = p = 0 this is the optimizer with an average beside it. Named members of the family:
    :func:`schedule_free`, :func:`gpa`, :func:`lookahead`.

    In float32 and float64, for rules of one buffer and m ≥ 1/2, z is stored and x is recovered as (y - (1 - m) z)/m:
    one copy of the parameters beside the optimizer's own state. Otherwise z and the rule's buffers are stored (for
    m = 0 the buffers alone, since then y = z). Parameters of 16 bits have z and x in float32, and during a step their
    weights and gradients are held in float32 too.

    Parameter groups, their settings and the state are the wrapped optimizer's own, so that schedulers, hooks and
    checkpoints see one optimizer. Statistics of BatchNorm layers belong to y: recompute them at x before evaluating.

    An average about as short as the optimizer's momentum and m near 1 diverge together where each alone is stable: on a
    parabola SGD with momentum 0.9, an EMA of decay 0.9 and m = 0.9 does from lr·curvature = 0.03 on. With momentum μ
    and gain b of the average keep m ≤ (1 - μ)/(1 - μ + b); :func:`lagless.theory.largest_stable_rate` has the edge.

    Args:
        optimizer: the one that steps; it must not have stepped yet.
        average: the rule of x. Between its updates x rests; with BEMA it is ema_s + α_s(z_t - z_0), s the latest
            update, and moves on with z. Until the first update x is z at the end of burn-in.
        interpolation: m in [0, 1], or a function of the step (1-based) that gives it. A number can be set per group, as
            all that follow: before, in the groups given to ``optimizer``.
        pull: p in [0, 1], how far z moves to x at the update steps of the average.
        weight_decay_at_y: λ ≥ 0, decoupled weight decay taken at y: z ← z - η λ y, beside the optimizer's own, which is
            taken at z.
        compile: around AdamW of torch, read and write everything once where x is recovered from y and z, from the
            second step on: on CPUs by one call into C, compiled in a fraction of a second; elsewhere each large tensor
            by a kernel of ``torch.compile``. Everything else, and an AdamW with hooks on its own ``step`` (such as that
            of a scheduler that was given it instead of this optimizer), goes by single operations. Values differ from
            those of single operations by rounding.

    Raises:
        ValueError: if an argument is out of range, or the optimizer has stepped or belongs to another wrapper.
        TypeError: if ``optimizer`` is no ``torch.optim.Optimizer``, keeps an average itself, or cannot step without a
            closure, as LBFGS.

    Reference:
        The family: Defazio et al., *The Road Less Scheduled*, arXiv 2405.15682, Eq. 3-5; *Smoothing DiLoCo with Primal
        Averaging*, arXiv 2512.17131; Zhang et al., *Lookahead Optimizer*, arXiv 1907.08610, Algorithm 1.

    >>> import torch
    >>> weight = torch.nn.Parameter(torch.ones(2))
    >>> optimizer = PrimalAveraging(torch.optim.SGD([weight], lr=0.1), EMA(decay=0.5), interpolation=0.5)
    >>> weight.square().sum().backward()
    >>> optimizer.step()
    >>> [round(v, 4) for v in weight.tolist()]  # z = 0.8, x = 0.9
    [0.85, 0.85]
    >>> with optimizer.applied():
    ...     [round(v, 4) for v in weight.tolist()]
    [0.9, 0.9]
    """

    moments = ("z",)
    _lasting = ("lr", "average", "interpolation")

    def __init__(
        self,
        optimizer: Optimizer,
        average: Rule = _AVERAGE,
        *,
        interpolation: Interpolation = 0.9,
        pull: float = 0.0,
        weight_decay_at_y: float = 0.0,
        compile: bool = False,
    ) -> None:
        check_base(optimizer, type(self).__name__)
        if optimizer.state:
            raise ValueError(
                f"this {type(optimizer).__name__} has stepped already; wrap a new one, so that z starts where its "
                "state does."
            )
        self._schedule = interpolation if callable(interpolation) else None
        settings = {
            "average": average,
            "interpolation": _number(self._schedule(1)) if self._schedule else interpolation,
            "pull": pull,
            "weight_decay_at_y": weight_decay_at_y,
            "compile": compile,
            "evaluating": False,
        }
        super().__init__(optimizer, settings)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_schedule": self._schedule}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step of the optimizer at z, average it, and put the next y into the parameters.

        Args:
            closure: evaluates the model at y and returns the loss; called once.

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
        with without_autocast(p.device for p in self._parameters()):
            self._step()
        return loss

    def _step(self) -> None:
        due = [(group, [p for p in group["params"] if p.grad is not None]) for group in self._groups]
        if any(p.is_complex() for _, parameters in due for p in parameters):
            raise RuntimeError("PrimalAveraging needs real parameters; optimize torch.view_as_real of complex ones.")
        others = [(group, self._step_whole(group, parameters)) for group, parameters in due]
        if any(parameters for _, parameters in others) or not any(parameters for _, parameters in due):
            waiting = {p for _, parameters in others for p in parameters}
            with without_gradients(p for _, parameters in due for p in parameters if p not in waiting):
                self._step_by_parts(others)

    def _step_whole(self, group: dict[str, Any], parameters: list[Tensor]) -> list[Tensor]:
        """Step the parameters for which one pass over memory is possible; return the others."""
        if not group["compile"] or not takes_one_pass(self.optimizer, group):
            return parameters

        def interpolate(step: int) -> float:
            return self._interpolation_after(step, group)

        return step_in_one_pass(group, parameters, lambda p: self.state.get(p, {}), interpolate, _RECOVERABLE)

    def _step_by_parts(self, due: list[tuple[dict[str, Any], list[Tensor]]]) -> None:
        """Put z into the parameters, let the optimizer step it, and put y there again."""
        # Optimizers make their state when a parameter has none, so what is new goes there after their step only.
        entries = {p: self._entries(p, group) for group, parameters in due for p in parameters}
        self._check_ahead(due, entries)
        for group, parameters in due:
            self._put_z(group, parameters, entries)
        widened = Widened({p: held["z"] for p, held in entries.items() if _is_narrow(p)})
        stepped = False
        try:
            self.optimizer.step()
            stepped = True
        finally:
            widened.undo()
            for group, parameters in due:
                self._put_y(group, parameters, entries, stepped)
        for parameter, held in entries.items():
            self.state[parameter].update(held)

    def _check_ahead(self, due: Sequence[tuple[dict[str, Any], list[Tensor]]], entries: Entries) -> None:
        """Require the settings of a step, and m after it, to be in range before anything has changed."""
        for group, parameters in due:
            self._check(group)
            if self._schedule is not None:
                for step in {int(entries[p][self.step_key]) + 2 for p in parameters}:
                    self._check({**group, "interpolation": _number(self._schedule(step))})

    def _check(self, group: dict[str, Any]) -> None:
        check = Settings(self, group)
        check.numbers("interpolation", "pull", minimum=0.0, maximum=1.0)
        check.numbers("weight_decay_at_y", minimum=0.0)
        check.flags("compile")
        check_average(group["average"])

    def _entries(self, parameter: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        """Return the state of a parameter, or a new one before its first step, where x = y = z."""
        if parameter in self.state and self.step_key in self.state[parameter]:
            return self.state[parameter]
        m, rule = float(group["interpolation"]), group["average"]
        state: dict[str, Any] = {self.step_key: 0, "interpolation": m}
        narrow = _is_narrow(parameter)
        if narrow and is_sharded(parameter):
            raise RuntimeError(
                f"PrimalAveraging cannot step sharded parameters of {parameter.dtype} in float32. Keep the parameters "
                "in float32, and let FSDP's MixedPrecisionPolicy(param_dtype=torch.bfloat16) cast them."
            )
        recovers = _is_single(rule) and not narrow and m >= _RECOVERABLE
        if m > 0.0 or narrow:
            state["z"] = parameter.detach().to(wide_dtype(parameter), copy=True, memory_format=torch.preserve_format)
        if not recovers:
            state.update(new_buffers(rule, parameter, None))
        return state

    def _stepped_dtype(self, parameter: Tensor) -> torch.dtype:
        return wide_dtype(parameter)

    def _entries_of(self, parameter: Tensor, group: dict[str, Any], state: dict[str, Any]) -> dict[str, Entry]:
        entries = super()._entries_of(parameter, group, state)
        m, rule = state.get("interpolation", 0.0), group["average"]
        needs_z = m != 0.0 or _is_narrow(parameter)
        recovers = needs_z and not _is_narrow(parameter) and _is_single(rule) and m >= _RECOVERABLE
        needed = {"z": needs_z, **dict.fromkeys(average_keys(rule), not recovers)}
        return {n: e._replace(needed=needed[n] and e.needed) if n in needed else e for n, e in entries.items()}

    def _require_fitting(self, parameter: Tensor, group: dict[str, Any], state: dict[str, Any], name: str) -> None:
        if self._is_averaged(parameter, group, state):
            require_number(f"{name}: 'interpolation'", state.get("interpolation"), minimum=0.0, maximum=1.0)

    def _average_entries(self, rule: Rule, state: dict[str, Any]) -> list[str]:
        keys = average_keys(rule)
        return keys if "z" not in state or not {*keys}.isdisjoint(state) else []

    def _put_z(self, group: dict[str, Any], parameters: Sequence[Tensor], entries: Entries) -> None:
        """Exchange y in the parameters for z. Where x is not stored, it takes the place of z in the state."""
        kinds: defaultdict[tuple[Any, ...], list[Row]] = defaultdict(list)
        decay = float(group["lr"]) * group["weight_decay_at_y"] if group["weight_decay_at_y"] else 0.0
        for parameter in parameters:
            state = entries[parameter]
            if "z" in state:
                row = (local(parameter), local(state["z"]))
                stored = bool(self._average_entries(group["average"], state))
                kinds[state["interpolation"], stored, tuple((t.dtype, t.device) for t in row)].append(row)
            elif decay:
                local(parameter).mul_(1.0 - decay)
        for (m, stored, _), rows in kinds.items():
            for y, z in blocks(rows):
                ahead = () if stored else foreach_lerp(z, y, 1.0 / m)
                if decay:
                    foreach_add_(z, widened(y, z[0].dtype), alpha=-decay)
                if y[0].dtype == z[0].dtype:
                    foreach_copy_(y, z)
                if not stored:
                    foreach_copy_(z, ahead)

    def _put_y(self, group: dict[str, Any], parameters: Sequence[Tensor], entries: Entries, stepped: bool) -> None:
        """Exchange z in the parameters for y, after averaging and pulling it if it was ``stepped``."""
        rule: Rule = group["average"]
        kinds: defaultdict[tuple[Any, ...], list[Row]] = defaultdict(list)
        for parameter in parameters:
            state = entries[parameter]
            if stepped:
                state[self.step_key] += 1
                self._interpolate(parameter, state, group)
            names = self._average_entries(rule, state)
            own = [local(state["z"])] if "z" in state else []
            row = (local(parameter), *own, *(local(state[name]) for name in names))
            types = tuple((t.dtype, t.device) for t in row)
            kinds[state[self.step_key], state["interpolation"], bool(own), bool(names), types].append(row)
        for index, ((step, m, has_z, stores_x, _), rows) in enumerate(kinds.items()):
            moves = average_step(rule, step) if stepped else AverageStep(ReadCoefficients((), 0.0), None, 0.0)
            pull = group["pull"] if moves.update is not None and step > rule.update_after else 0.0
            target = average_step(rule, step + 1).target
            for y, *rest in blocks(rows):
                narrow = has_z and y[0].dtype != rest[0][0].dtype
                z = rest[0] if narrow else y  # what the optimizer has stepped
                buffers = rest[int(has_z) :] if stores_x else rest[:1]
                if moves.update is not None:
                    move_average(buffers, moves.update, z, Noise(index, step))
                mix(y, z, rest[0] if has_z else None, towards(target, buffers, z), m, pull)

    def _interpolate(self, parameter: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        """Set m of the next step, and store apart what can no longer be recovered with it."""
        m = state["interpolation"] = self._interpolation_after(state[self.step_key], group)
        if "z" not in state and m > 0.0:
            state["z"] = parameter.detach().clone(memory_format=torch.preserve_format)
        elif m < _RECOVERABLE and not self._average_entries(group["average"], state):
            (name,) = average_keys(group["average"])
            state[name], state["z"] = state["z"], parameter.detach().clone(memory_format=torch.preserve_format)

    def _interpolation_after(self, step: int, group: dict[str, Any]) -> float:
        """Return m of the step after ``step``, and set it in the group where a schedule gives it."""
        if self._schedule is not None:
            group["interpolation"] = _number(self._schedule(step + 1))
            self._check(group)
        return float(group["interpolation"])

    def _values(self) -> Iterator[tuple[Tensor, Tensor]]:
        for parameter, rule, read in self._reads():
            if read is not None:
                state = self.state[parameter]
                y = state.get(LIVE, parameter).detach()
                z = state.get("z", y)
                names = self._average_entries(rule, state)
                buffers = [state[n] for n in names] or [torch.lerp(z, y, 1.0 / state["interpolation"])]
                terms = [(z, read.live), *zip(buffers, read.buffers, strict=True)]
                yield parameter, combine(terms)


def _is_single(rule: Rule) -> bool:
    """Whether x is the rule's only buffer."""
    return len(rule.buffer_keys) == 1 and rule.read(_FIRST) == ReadCoefficients((1.0,), 0.0)


def _is_narrow(parameter: Tensor) -> bool:
    return wide_dtype(parameter) != parameter.dtype


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) else float("nan")
