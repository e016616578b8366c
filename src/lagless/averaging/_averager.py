"""Follow one or many averaging rules during training."""

from __future__ import annotations

import warnings
from collections.abc import Generator, Hashable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from os import PathLike
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lagless._deprecated import former_method
from lagless._validation import require_integer
from lagless.averaging._attachment import Attachment
from lagless.averaging._buffers import AverageBuffers
from lagless.averaging._live import LiveTensors, Source
from lagless.averaging._live_check import LiveCheck
from lagless.averaging._notices import Notices
from lagless.averaging._state import State, buffer_with_low, live_digests, make_state, match
from lagless.averaging._steppers import Steppers
from lagless.execution import (
    RuleSet,
    Turns,
    combine,
    follow_optimizer,
    follow_optimizers,
    leave_evaluation,
    local,
    observe_steps,
)
from lagless.rules import CheckedCall, InitialWeights, Rule, named_rules, require_updates

if TYPE_CHECKING:
    from lagless.averaging._initial_weights import StoredStart

_DTYPES = (torch.bfloat16, torch.float32, torch.float64)


class Averager(CheckedCall):
    """Averages of a model's weights, updated once per optimizer step.

    At a rule's update steps ``b ← M b + v θ_t``; the average ``c·b + d θ_t`` is formed when it is read. Rules that need
    the same buffer share it: BEMA holds two copies of the parameters (θ_0 and its ema), and an EMA with the same gain
    beside it adds none.

    A read off an update step counts the tail: its value is that of one more update at the present step, and the state
    stays as it was. On an update step it is the rule's own value, for BEMA that of Algorithm 1.

    Args:
        source: a module, of which the trainable parameters are averaged, or named tensors. The set is fixed from here
            on. Of sharded ones (DTensor, as FSDP2 makes them) each rank averages its part.
        rules: one rule, or a mapping of names to rules. A single rule is named by its class in lower case. None for
            ``EMA(half_life_fraction=0.05)``, the same average at every length of run.
        dtype: of the stored averages: None for float32 (wider where the parameters are), or ``torch.bfloat16``, which
            is rounded stochastically so that averages with long memories still move. θ_0 and snapshots keep the
            parameters' dtype. From the first gain below 0.01 on, float32 averages keep 16 bits more, half as much
            memory again: what rounding would cut off from the many small updates.
        device: where averages are kept; None for each parameter's own device. ``"cpu"`` under an accelerator: they are
            updated there while training goes on (see :meth:`wait`).
        start: path of the base checkpoint, if it holds θ_0: BEMA then stores one copy, like an EMA. It is checked to
            equal the live weights now (unless a state is loaded next), and to be unchanged whenever an average is read.
        step: optimizer steps already taken, for an Averager that joins a run.
        total_steps: length of the run, if known; rules that would never update in it are refused now, and those whose
            average would be mostly the initial model, or no less noisy than one iterate, are warned of.
        seed: of the noise of stochastic rounding.
        compile: update several averages by one kernel of ``torch.compile``, which reads the live weights once and takes
            some seconds at the first update. Pays with two rules or more on an accelerator; on CPUs several averages in
            float32 or float64 are moved by one call into C in any case, where there is a C compiler.

    Raises:
        ValueError: if there is nothing to average, a name is not usable, ``total_steps`` is too short for a rule, or
            ``start`` does not fit.

    Warns:
        AverageWarning: of an average that, at ``total_steps`` or when :meth:`copy_to_model` makes it final, has more
            than 20 % of its weight on the initial model (or less than -20 %), amounts to fewer than three iterates, or
            is noisier than one. Once for each, on rank 0.

    >>> import torch, lagless
    >>> model = torch.nn.Linear(2, 1)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> rules = {"ema": lagless.EMA(half_life_fraction=0.05), "window": lagless.WindowAverage(update_freq=2)}
    >>> avg = lagless.Averager(model, rules)
    >>> handle = avg.attach(optimizer)
    >>> for _ in range(4):
    ...     optimizer.zero_grad()
    ...     model(torch.ones(1, 2)).square().mean().backward()
    ...     optimizer.step()
    >>> avg.step, avg.updates("window")
    (4, 2)
    >>> with avg.applied("ema"):
    ...     averaged = model(torch.ones(1, 2))
    """

    def __init__(
        self,
        source: Source,
        rules: Rule | Mapping[str, Rule] | None = None,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        start: str | PathLike[str] | None = None,
        step: int = 0,
        total_steps: int | None = None,
        seed: int = 0,
        compile: bool = False,
    ) -> None:
        self.rules = named_rules(rules)
        if dtype is not None and dtype not in _DTYPES:
            raise ValueError(f"dtype={dtype}; averages are stored as one of {', '.join(map(str, _DTYPES))}.")
        self.step = step = require_integer("step", step, minimum=0)
        if total_steps is not None:
            for rule in self.rules.values():
                require_updates(rule, require_integer("total_steps", total_steps, minimum=0), after=step)
        follow_optimizers()
        self._live = LiveTensors(source)
        self._check = LiveCheck(self._live)
        self._turns = Turns()
        self._steppers = Steppers(self._live, self._check, self._turns)
        observe_steps(self._steppers)
        self._applied: str | None = None
        self._attachment: Attachment | None = None
        self._rules = RuleSet(self.rules, step)
        self._live.require_own("start averages")
        live = self._live.trained()
        self._stored_start: StoredStart | None = None
        absent: list[Hashable] = []
        if start is not None:
            from lagless.averaging._initial_weights import StoredStart, check_start  # reads checkpoints

            check_start(self.rules, step)
            self._stored_start = StoredStart(start, self._live, live)
            absent = [key for key in self._rules.keys if isinstance(key, InitialWeights)]
        place = None if device is None else torch.device(device)
        self._buffers = AverageBuffers(
            live,
            self._rules.keys,
            dtype=dtype,
            device=place,
            seed=require_integer("seed", seed, minimum=0),
            compile=compile,
            absent=absent,
        )
        self._notices = Notices(self.rules)
        if total_steps is not None:
            self._notices.of_run(total_steps, step)

    def __reduce__(self) -> tuple[Any, ...]:
        raise TypeError("an Averager belongs to its live model and cannot be copied or pickled; use state_dict().")

    def __repr__(self) -> str:
        rules = ", ".join(f"{name}: {rule} ({self.updates(name)} updates)" for name, rule in self.rules.items())
        return f"Averager({len(self._live.names)} tensors, step {self.step}, {rules})"

    @torch.no_grad()
    def update(self) -> None:
        """Count one optimizer step, and update the rules that are due. Call it after every step of the optimizer.

        Raises:
            RuntimeError: while averaged weights are in the model, if an attached optimizer calls this already, or, when
                a rule is due, if the averaged tensors are no longer those that train: a module was replaced or added,
                weights were tied, unfrozen or replaced, or optimizers step others.
        """
        self._refuse_while_applied("update")
        self._live.require_training("update")
        if self._attachment is not None and self._attachment.active and not self._attachment.stepping:
            raise RuntimeError(
                "the Averager is attached to an optimizer, whose steps it counts by itself: leave update() out, or "
                "remove() the attachment first."
            )
        with self._turns.between_reads():
            try:
                self._turns.begin_step()
                self._update()
            finally:
                self._turns.end_step()

    def _update(self) -> None:
        self._check.require()
        if self._stored_start is not None:
            self._stored_start.require_verified()
        rows, last = self._rules.advance(self.step + 1)
        if rows:  # looking at thousands of tensors costs more than all else that a step without an update does
            live = self._live.tensors(detach=False)
            self._live.check_frozen()
            self._steppers.require_trained()
            self._buffers.update(live, rows, self.step + 1)
        self.step, self._rules.last = self.step + 1, last

    def attach(self, optimizer: Optimizer) -> Attachment:
        """Call :meth:`update` after every real step of ``optimizer`` from now on.

        Under gradient accumulation that is once per optimizer step. A step that a gradient scaler skipped does not
        count. Stepping while averaged weights are in the model is refused.

        Args:
            optimizer: with several of them, the one that steps last; an optimizer of Accelerate's is looked into.

        Returns:
            An object whose ``remove()`` detaches again.

        Raises:
            RuntimeError: if it is attached already.
            ValueError: if it steps none of the averaged tensors.
            TypeError: if this is no ``torch.optim.Optimizer``, or one whose ``step()`` runs no hooks.
        """
        if self._attachment is not None and self._attachment.active:
            raise RuntimeError("the Averager is attached to an optimizer already, and every step would count twice.")
        attachment = Attachment(
            optimizer,
            before=lambda: self._refuse_while_applied("step the optimizer"),
            after=self.update,
            skipped=self._turns.end_step,
            averaged=self._live.named(),
        )
        try:
            self._steppers.require_ours(optimizer)
        except ValueError:
            attachment.remove()
            raise
        follow_optimizer(optimizer)
        self._attachment = attachment
        return attachment

    def wait(self) -> None:
        """Block until pending host updates finish. Call it before changing weights outside an optimizer step.

        Whatever needs the averages waits by itself, and every step of a ``torch.optim.Optimizer`` for the weights to be
        on their way.

        Raises:
            RuntimeError: if an update failed in the background.
        """
        self._buffers.wait()

    def updates(self, name: str | None = None) -> int:
        """How many updates the rule ``name`` has had; its average can be read from the first one on."""
        return self._rules.last[self._rules.resolve(name)].number

    def warn_of_weights(self) -> None:
        """Warn of averages that are not what one may expect, as they are now; call it at the end of a run.

        Needed only where neither ``total_steps`` was given nor :meth:`copy_to_model` is called.

        Warns:
            AverageWarning: once for each average, on rank 0.
        """
        self._notices.of_present(self.step, self._rules.last)

    @property
    def sharded(self) -> bool:
        """Whether parameters are sharded, so that all ranks must :meth:`save` together."""
        return any(sharding.mesh is not None for sharding in self._live.shardings)

    @property
    def applied_name(self) -> str | None:
        """The average that is in the model now, inside :meth:`applied`; None for the live weights."""
        return self._applied

    @contextmanager
    def applied(self, name: str | None = None) -> Generator[None]:
        """The model with averaged weights inside the ``with`` block; afterwards, also after an error, the live bits.

        Weights are rounded to the parameters' dtype. One more copy of the parameters is held meanwhile, and whatever
        the block does to them (new values, another dtype or device) is undone. So it is with a module's buffers: the
        running statistics that ``torch.optim.swa_utils.update_bn`` computes inside the block serve the average there,
        and the live model has its own again afterwards.

        An optimizer that shows other weights for evaluation (PACE, those of schedule-free's package) does so again
        after the block. Switch it before the block, not inside.

        Args:
            name: which average; may be left out if there is only one.

        Raises:
            RuntimeError: before the first update of that rule, or inside another ``applied``, also of another Averager
                of the same parameters.
        """
        name = self._rules.resolve(name)
        with ExitStack() as stack:
            with self._turns.still(f"apply {name!r}"):
                self._refuse_while_applied(f"apply {name!r}")
                self.wait()
                values = self._values(name)
                self._applied = name
                stack.callback(self._forget_applied)
                stack.enter_context(self._live.holding(values, f"the average {name!r}"))
            yield

    def _forget_applied(self) -> None:
        self._applied = None

    @torch.no_grad()
    def copy_to_model(self, name: str | None = None) -> None:
        """Make the average the model's weights for good, rounded to the parameters' dtype; the live ones are gone.

        An optimizer that shows other weights for evaluation trains from there on: its ``train()`` is called.

        Args:
            name: which average; may be left out if there is only one.

        Raises:
            RuntimeError: before the first update of that rule, or while averaged weights are in the model.
        """
        name = self._rules.resolve(name)
        with self._turns.still(f"put {name!r} into the model"):
            self._refuse_while_applied(f"put {name!r} into the model")
            self.wait()
            values = self._values(name)
            self.warn_of_weights()
            leave_evaluation(self._live.parameters())
            self._live.put(values)

    @torch.no_grad()
    def read(self, name: str | None = None, *, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """The averaged weights as new tensors; the live ones stay untouched.

        Averages are those of the weights that train, also while an optimizer shows others for evaluation. Any thread
        may read, and waits until a step and its update are complete; steps wait in turn.

        ``model.load_state_dict({**model.state_dict(), **avg.read()})`` makes a model of them: frozen parameters and
        buffers are the model's own. Names are those of the module that a compiled or distributed one wraps.

        Args:
            name: which average; may be left out if there is only one.
            dtype: of the result; None for float32 (wider where the parameters are).

        Returns:
            Name → tensor on the parameter's device, sharded like the parameter; every name of a tied tensor maps to the
            same one.

        Raises:
            RuntimeError: before the first update of that rule, or while averaged weights are in the model.
        """
        with self._turns.still("read averages"):
            averages = dict(self.named_averages(name, dtype=dtype))
        return averages | {alias: averages[first] for alias, first in self._live.aliases.items()}

    def named_averages(
        self, name: str | None = None, *, dtype: torch.dtype | None = None
    ) -> Iterator[tuple[str, Tensor]]:
        """The averaged weights of :meth:`read` one by one, so that they need never be in memory all at once.

        Of tied tensors only the first comes, under its first name. All are of one step: the next one is refused once
        the weights have stepped.
        """
        name = self._rules.resolve(name)
        with self._turns.still(f"read {name!r}"):
            self._refuse_while_applied(f"read {name!r}")
            values, begun = self._values(name), self._turns.steps

        def averages() -> Iterator[tuple[str, Tensor]]:
            for key, sharding in zip(self._live.names, self._live.shardings, strict=True):
                with self._turns.still(f"read {name!r}"):
                    self._refuse_while_applied(f"read {name!r}")
                    self._turns.require_none_since(begun, f"read {name!r}")
                    value = next(values)
                yield key, sharding.present(value if dtype is None else value.to(dtype))

        return averages()

    put = former_method("put", "copy_to_model")
    items = former_method("items", "named_averages")

    @property
    def in_model(self) -> str | None:
        """Return ``applied_name``, which this was called formerly."""
        warnings.warn(
            "Averager.in_model is called applied_name now; the former name goes with the next release.",
            DeprecationWarning,
            stacklevel=2,
        )
        return self.applied_name

    def state_dict(self) -> State:
        """Everything a resumed run needs: ``{"tensors": {name: tensor}, "meta": {plain JSON}}``.

        Tensors are the Averager's own, not copies: write them out, or copy them, before the next update. To resume,
        restore the live weights, make the Averager, then :meth:`load_state_dict`: the run goes on bit for bit as if it
        had never stopped. Those of sharded parameters are DTensors, which ``torch.distributed.checkpoint`` saves from
        all ranks at once and loads on any number of them.
        """
        with self._turns.still("make a state"):
            return self._state(self._check.digests())

    def _state(self, digests: Mapping[str, str]) -> State:
        stored = self._stored_start
        numbers = {
            "step": self.step,
            "seed": self._buffers.seed,
            "start": stored and {"name": stored.path.name, "fingerprint": stored.fingerprint},
        }
        return make_state(self._live, self._rules, self._buffers.buffers, self._buffers.low, numbers, digests)

    @torch.no_grad()
    def load_state_dict(self, state: State, *, check_live: bool = True) -> None:
        """Take over a state of :meth:`state_dict`; the Averager must have the same rules, parameters and dtype.

        Of whole tensors, an Averager of sharded parameters takes the parts on this rank.

        Args:
            state: what :meth:`state_dict` returned.
            check_live: require, at the first step, update or read from here on, the live weights with which the state
                was saved. States of earlier versions, and those of sharded parameters, do not know them.

        Raises:
            ValueError: if it has not; nothing is changed then.
            RuntimeError: while averaged weights are in the model.
        """
        with self._turns.still("load a state"):
            self._load(state, check_live)

    def _load(self, state: State, check_live: bool) -> None:
        self._refuse_while_applied("load a state")
        given = match(state, self._state({}), self.rules)
        shardings = dict(zip(self._live.names, self._live.shardings, strict=True))
        parts = {name: shardings[name.split("/", 1)[1]].part_of(tensor) for name, tensor in given.tensors.items()}
        unlike: Mapping[str, str] = self._check.unlike(live_digests(state)) if check_live else {}
        for i, name in enumerate(self._rules.buffer_names()):
            if name in given.with_low:
                self._buffers.keep_low(i)
        self._rules.last, self.step, self._buffers.seed = given.last, given.step, given.seed
        left_out: list[str] = []
        for name, tensor in self._state({})["tensors"].items():
            if name in parts:
                local(tensor).copy_(parts[name])
            else:  # low bits that the state has not
                local(tensor).zero_()
                left_out += [name] if buffer_with_low(name) in given.with_low else []
        if left_out:
            warnings.warn(
                f"the state was made with low bits, and is loaded without {len(left_out)} of them, {left_out[:3]}: the "
                "averages go on from their values in float32, not bit for bit. The Averager has room for them from now "
                "on: load once more, into its present state_dict().",
                UserWarning,
                stacklevel=2,
            )
        self._check.expect(unlike)
        if self._stored_start is not None:
            self._stored_start.mismatch = None  # the state vouches for θ_0 by its fingerprint

    def save(self, path: str | PathLike[str]) -> None:
        """Write the state to one safetensors file, atomically. It is right to call this on every rank.

        Where parameters are sharded, all ranks must, together: tensor by tensor is gathered, and rank 0 writes. The
        file does not depend on the sharding. If one rank fails, all raise, and an earlier file stays.

        Elsewhere nobody waits, and every rank that calls writes a whole file of its own: of replicas that share the
        path (DDP) the last one stays, and all are equal; averages that differ between ranks need a path for each.
        """
        from lagless.averaging._state_file import save_file  # writes checkpoints

        with self._turns.still("save averages"):
            save_file(self.state_dict(), path)

    def load(self, path: str | PathLike[str], *, check_live: bool = True) -> None:
        """Take over a state that :meth:`save` wrote, on as many ranks as there are now; each reads its own parts.

        Args:
            path: the file.
            check_live: as for :meth:`load_state_dict`.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if it is damaged or does not fit.
        """
        from lagless.averaging._state_file import load_file  # reads checkpoints

        self.load_state_dict(load_file(path), check_live=check_live)

    def _refuse_while_applied(self, action: str) -> None:
        if self._applied is not None:
            raise RuntimeError(
                f"cannot {action} while the average {self._applied!r} is in the model; leave the applied() block first."
            )
        self._live.require_own(action)

    def _values(self, name: str) -> Iterator[Tensor]:
        """The averaged tensors one by one, in float32 or wider."""
        weighted, live_weight = self._rules.coefficients(name, self.step)
        trained = self._live.trained()
        self._live.check_frozen()
        self._check.require()
        stored = self._stored_start
        base = stored.open() if stored and any(not self._buffers.buffers[i] for i, _ in weighted) else None

        def values() -> Iterator[Tensor]:
            for n, (parameter, live) in enumerate(zip(self._live.names, trained, strict=True)):
                terms = [(live, live_weight)]
                for i, weight in weighted:
                    buffer = self._buffers.buffers[i]
                    if buffer:
                        terms.append((buffer[n], weight))
                    elif stored is not None and base is not None:
                        terms.append((stored.read(base, parameter), weight))
                yield combine(terms, live.device, torch.promote_types(live.dtype, torch.float32))

        return values()
