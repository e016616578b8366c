"""An optimizer that keeps an average of its parameters in its state: reading it, putting it in place, saving it."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lagless.execution import (
    LIVE as LIVE,
    Turns,
    buffer_dtype,
    combine,
    counts,
    follow_optimizer,
    follow_optimizers,
    local,
    require_own_weights,
    require_training_mode,
    writing_weights,
)
from lagless.optim._average_step import coefficients
from lagless.optim._averaged_loading import prepared_state, take_entries
from lagless.optim._loaded_state import (
    Entry,
    counter,
    load_checked,
    wide_dtype,
    with_format,
)
from lagless.rules import CheckedCall, ReadCoefficients, Rule, count_updates, rule_to_dict

Self = TypeVar("Self", bound="AveragedOptimizer")


class AveragedOptimizer(CheckedCall, Optimizer):
    """An optimizer whose state holds, for every parameter, a step count and the buffers of an averaging rule.

    The rule of a group is ``group["average"]``; the buffers of a parameter are ``state["average"]``, or
    ``state["average_0"]`` and so on where the rule has several.
    """

    step_key = "step"
    moments: ClassVar[tuple[str, ...]] = ()
    """Entries of a parameter's state, besides averages, that have the parameter's shape."""
    _lasting: ClassVar[tuple[str, ...]] = ("lr", "average")
    """Settings that the states of all versions have."""

    def __init__(self, params: Any, defaults: dict[str, Any]) -> None:
        super().__init__(params, defaults)
        self._begin_turns()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._begin_turns()

    def _begin_turns(self) -> None:
        self.turns = Turns()
        follow_optimizers()
        follow_optimizer(self)

    @property
    def average_name(self) -> str:
        """Return the name of the average in callbacks and exports: the optimizer's class in lower case."""
        return type(self).__name__.lower()

    @property
    def steps_taken(self) -> int:
        """Return the number of steps taken, at the parameter with the most."""
        return max(self._steps(), default=0)

    def updates(self, name: str | None = None) -> int:
        """Return how many updates the average has had, at the parameter with the most.

        Args:
            name: :attr:`average_name`, or None.
        """
        self._require_name(name)
        rules = [group["average"] for group in self._groups for _ in group["params"]]
        return max((count_updates(rule, t) for rule, t in zip(rules, self._steps(), strict=True)), default=0)

    @contextmanager
    def applied(self, name: str | None = None) -> Generator[None]:
        """The parameters hold the average inside the ``with`` block; afterwards, also after an error, the live bits.

        Buffers are the model's, which the optimizer does not know: what the block does to running statistics stays.

        Args:
            name: :attr:`average_name`, or None.

        Raises:
            RuntimeError: before the first update of the average, or if the parameters hold it already.
        """
        self._require_name(name)
        with self.turns.still("apply the average"):
            self._refuse_while_evaluating("apply the average")
            self._require_average()
            self.eval()
        try:
            yield
        finally:
            self.train()

    @torch.no_grad()
    def eval(self: Self) -> Self:
        """Put the average into the parameters until :meth:`train`; does nothing if it is there already.

        Parameters whose average has had no update yet, and frozen ones, keep their weights. The live weights wait in
        the state, one more copy of the parameters: a state saved meanwhile resumes training exactly.

        Raises:
            RuntimeError: while an Averager, or another optimizer's evaluation mode, has put other weights there.
        """
        with self.turns.still("put the average into the parameters"):
            if not self._evaluating:
                self._show_average()
        return self

    def _show_average(self) -> None:
        self._refuse_while_others_show("put the average into the parameters", training=True)
        self._set_evaluating(True)
        try:
            with writing_weights():
                for parameter, value in self._values():
                    self.state[parameter][LIVE] = parameter.detach().clone()
                    parameter.copy_(value)
        except BaseException:
            self.train()
            raise

    @torch.no_grad()
    def train(self: Self, mode: bool = True) -> Self:
        """Put the live weights back, bit for bit; with ``mode=False`` the same as :meth:`eval`.

        Raises:
            RuntimeError: while an Averager has put an average there.
        """
        if not mode:
            return self.eval()
        if self._evaluating:
            self._refuse_while_others_show("put the live weights back")
            with writing_weights():
                for parameter in self._parameters():
                    live = self.state[parameter].pop(LIVE, None) if parameter in self.state else None
                    if live is not None:
                        _put(parameter, live)
            self._set_evaluating(False)
        return self

    @torch.no_grad()
    def read(self, module: nn.Module | None = None, *, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """The averaged weights as new tensors; the live ones stay untouched.

        A read off an update step counts the tail, as with :class:`lagless.Averager`.

        Args:
            module: whose names to use; every name of a tied parameter maps to the same tensor. None for the names the
                optimizer was given (``named_parameters()``), or else the positions of the parameters, ``"0"`` and so
                on.
            dtype: of the result; None for float32 (wider where the parameters are).

        Raises:
            RuntimeError: before the first update of the average.
            ValueError: if ``module`` has no parameter of this optimizer.
        """
        with self.turns.still("read the average"):
            averages = dict(self._named(module, dtype))
        if module is None:
            return averages
        first = {p: averages[name] for name, p in module.named_parameters() if name in averages}
        return {name: first[p] for name, p in module.named_parameters(remove_duplicate=False) if p in first}

    @torch.no_grad()
    def named_averages(
        self, name: str | None = None, *, module: nn.Module | None = None, dtype: torch.dtype | None = None
    ) -> Iterator[tuple[str, Tensor]]:
        """Return the averaged weights of :meth:`read` one by one, so that they need never be in memory all at once.

        Of tied parameters only the first comes, under its first name.

        Args:
            name: :attr:`average_name`, or None.
            module: as for :meth:`read`.
            dtype: as for :meth:`read`.

        Raises:
            RuntimeError: before the first update of the average, and once this optimizer steps meanwhile.
            ValueError: if ``module`` has no parameter of this optimizer, or there is no average ``name``.
        """
        self._require_name(name)
        return self._named(module, dtype)

    @torch.no_grad()
    def copy_to_model(self, name: str | None = None) -> None:
        """Make the average the parameters' weights for good; the live ones are gone.

        Args:
            name: :attr:`average_name`, or None.

        Raises:
            RuntimeError: before the first update of the average, or while the parameters hold it.
        """
        self._require_name(name)
        with self.turns.still("copy the average"):
            self._refuse_while_evaluating("copy the average")
            self._refuse_while_others_show("copy the average", training=True)
            self._require_average()
            with writing_weights():
                for parameter, value in self._values():
                    parameter.copy_(value)

    def _named(self, module: nn.Module | None, dtype: torch.dtype | None) -> Iterator[tuple[str, Tensor]]:
        if module is not None and not {*module.parameters()} & {*self._parameters()}:
            raise ValueError(
                f"no parameter of this {type(module).__name__} is in this {type(self).__name__}; read the module whose "
                "parameters it was given, not a copy."
            )
        self._refuse_while_others_show("read the average")
        self._require_average()
        if module is None:
            names = [name for group in self._groups for name in group.get("param_names", group["params"])]
            pairs = zip(names, self._parameters(), strict=True)
            named: dict[Tensor, str] = {
                p: name if isinstance(name, str) else str(i) for i, (name, p) in enumerate(pairs)
            }
        else:
            named = {parameter: name for name, parameter in module.named_parameters()}
        values, begun = self._values(), self.turns.steps

        def averages() -> Iterator[tuple[str, Tensor]]:
            while True:
                with self.turns.still("read the average"):
                    self.turns.require_none_since(begun, "read the average")
                    if (pair := next(values, None)) is None:
                        return
                parameter, value = pair
                if parameter in named:
                    yield named[parameter], value if dtype is None else value.to(dtype)

        return averages()

    def state_dict(self) -> dict[str, Any]:
        """As ``torch.optim`` has it; rules are plain JSON, and nothing in it needs code to be loaded.

        What a later :meth:`eval` or :meth:`train` takes into or out of the state is not seen in it; the tensors are
        shared.
        """
        state = super().state_dict()
        state["state"] = {index: dict(values) for index, values in state["state"].items()}
        for group, own in zip(state["param_groups"], self._groups, strict=True):
            group["average"] = rule_to_dict(own["average"])
        return with_format(state)

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a state of :meth:`state_dict`. Tensors keep their own dtype, also under bfloat16 parameters.

        A state saved after :meth:`eval` leaves this optimizer evaluating, whatever the parameters hold now:
        :meth:`train` puts the saved live weights into them. One saved before it leaves this optimizer training:
        parameters that hold the average get their live weights back, and weights that were loaded meanwhile stay. Save
        model and optimizer without switching in between: what a model file holds cannot be told from a state.

        Settings that a group of an earlier version lacks stay as they are here. As with every optimizer of torch,
        nothing in a state tells beside which parameters it was saved: restore the model of the same step.

        Raises:
            ValueError: if the state is another optimizer's, lacks what the average needs, has settings that are out of
                range, or tensors of other shapes than the parameters. Nothing is changed then.
            RuntimeError: while an Averager has put an average into the parameters.
        """
        self._refuse_while_others_show("load a state")
        waiting = list(self._live_weights())
        given = load_checked(
            self, super().load_state_dict, state_dict, lambda state: prepared_state(self, state), self._wrapped()
        )
        take_entries(self, given)
        if not self._evaluating:
            with writing_weights():
                for parameter, live in waiting:
                    _put(parameter, live)

    def _check(self, group: dict[str, Any]) -> None:
        """Require the settings of a group to be in range."""

    def _check_loaded(self, group: dict[str, Any]) -> None:
        """Require the settings of a group of a state to be in range; its ``params`` are this optimizer's."""
        self._check(group)

    def _wrapped(self) -> list[Optimizer]:
        """Return the optimizers that share groups and state with this one."""
        return []

    def _entries_of(self, parameter: Tensor, group: dict[str, Any], state: dict[str, Any]) -> dict[str, Entry]:
        """Return the tensors that ``state``, which is not empty, may have of ``parameter``, besides counts of steps."""
        shape, wide, rule = parameter.shape, wide_dtype(parameter), group["average"]
        entries = {name: Entry(shape, (wide,)) for name in self.moments}
        for name, label in zip(average_keys(rule), rule.buffer_keys, strict=True):
            own = buffer_dtype(label, parameter.dtype, None)
            entries[name] = Entry(shape, (own, torch.float32, torch.float64, torch.bfloat16))
        entries[LIVE] = Entry(shape, (parameter.dtype,), needed=False)
        return entries

    def _require_fitting(self, parameter: Tensor, group: dict[str, Any], state: dict[str, Any], name: str) -> None:
        """Refuse the state, called ``name``, of a parameter if one of its numbers is out of range."""

    def _counters(self, parameter: Tensor, group: dict[str, Any], state: dict[str, Any]) -> list[str]:
        """Return the names of the counts of steps in ``state``, which is not empty."""
        return [self.step_key]

    def _counter(self, name: str, step: Any, parameter: Tensor, group: dict[str, Any]) -> Any:
        """Return a loaded count as this optimizer keeps it."""
        return counter(step, parameter.device if group.get("capturable") else torch.device("cpu"))

    def _live_weights(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The parameters that hold their average, and nothing that was put there since, with their live weights."""
        if self._evaluating:
            for parameter, value in self._values():
                live = self.state[parameter].get(LIVE)
                if live is not None and torch.equal(local(parameter), local(value).to(parameter.dtype)):
                    yield parameter, live

    @property
    def _groups(self) -> list[dict[str, Any]]:
        """The parameter groups with all settings, which one that was added to a wrapped optimizer does not have."""
        for group in self.param_groups:
            for name, value in self.defaults.items():
                group.setdefault(name, value)
        return self.param_groups

    @property
    def _evaluating(self) -> bool:
        return any(group["evaluating"] for group in self._groups)

    def _set_evaluating(self, value: bool) -> None:
        for group in self._groups:
            group["evaluating"] = value

    def _refuse_while_evaluating(self, action: str) -> None:
        require_own_weights((p for group in self._groups for p in group["params"]), action)
        if self._evaluating:
            raise RuntimeError(
                f"cannot {action} while the parameters hold the average: call train(), or leave the applied() block, "
                "first."
            )

    def _require_name(self, name: str | None) -> None:
        if name not in (None, self.average_name):
            raise ValueError(f"there is no average {name!r}; {type(self).__name__} has one, {self.average_name!r}.")

    def _refuse_while_others_show(self, action: str, *, training: bool = False) -> None:
        """Refuse ``action`` while somebody else has put weights into the parameters."""
        parameters = self._parameters()
        require_own_weights(parameters, action)
        if training:
            require_training_mode(parameters, action, except_for=self)

    def _require_average(self) -> None:
        if all(read is None for _, _, read in self._reads()):
            rules = ", ".join(dict.fromkeys(str(group["average"]) for group in self._groups))
            raise RuntimeError(f"there is no average yet: {rules} has had no update. Read it later.")

    def _parameters(self) -> list[Tensor]:
        return [p for group in self._groups for p in group["params"]]

    def _steps(self) -> list[int]:
        """Every parameter's steps."""
        return counts([self.state[p].get(self.step_key, 0) if p in self.state else 0 for p in self._parameters()])

    def _reads(self) -> Iterator[tuple[Tensor, Rule, ReadCoefficients | None]]:
        """Every parameter, its rule, and how its average is read now; None where there is none yet."""
        rules = [(p, group["average"]) for group in self._groups for p in group["params"]]
        for (parameter, rule), step in zip(rules, self._steps(), strict=True):
            yield parameter, rule, coefficients(rule, step) if step else None

    def _values(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Every parameter that has an average, and the average in float32 or wider."""
        for parameter, rule, read in self._reads():
            if read is not None:
                state = self.state[parameter]
                live = state.get(LIVE, parameter).detach()
                buffers = (state[key] for key in average_keys(rule))
                yield parameter, combine([(live, read.live), *zip(buffers, read.buffers, strict=True)])


def average_keys(rule: Rule) -> list[str]:
    """The names of the rule's buffers in the state of a parameter."""
    count = len(rule.buffer_keys)
    return ["average"] if count == 1 else [f"average_{i}" for i in range(count)]


def new_buffers(rule: Rule, start: Tensor, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """The rule's buffers for one parameter, copies of ``start``; averages are stored in ``dtype``, if it is given."""
    return {
        key: start.detach().to(buffer_dtype(label, start.dtype, dtype), copy=True, memory_format=torch.preserve_format)
        for key, label in zip(average_keys(rule), rule.buffer_keys, strict=True)
    }


def _put(parameter: Tensor, live: Tensor) -> None:
    """Put the live weights into a parameter, whose dtype or device may have changed meanwhile."""
    if (parameter.dtype, parameter.device) == (live.dtype, live.device):
        parameter.detach().copy_(live)
    else:
        parameter.data = live
