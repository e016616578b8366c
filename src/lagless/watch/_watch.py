"""Following a run: look, take up what is complete, write what is good, tell what happens."""

from __future__ import annotations

import errno
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lagless.checkpoints import Checkpoint, CheckpointError, find_checkpoints, fingerprint
from lagless.rules import Rule
from lagless.watch._averages import Averages, NonFiniteError
from lagless.watch._command import CommandEvaluation
from lagless.watch._evaluations import Evaluations
from lagless.watch._lock import only_watcher
from lagless.watch._metrics import Metrics, plain
from lagless.watch._models import Models, keep_companions
from lagless.watch._plans import CommandPlan, Evaluate, HeldOutPlan
from lagless.watch._prune import clear_leftovers, removable, remove
from lagless.watch._record import PassedOver
from lagless.watch._scan import Seen, Settling, logged_losses, logged_rates, look, stamp_of_files, weight_stamp
from lagless.watch._timeline import Absorb, PassOver, Pending, RollBack, Verify, decide, stale, went_back_to

Sink = Callable[[dict[str, Any]], None]
"""Called with every row of the metrics when it is written."""


@dataclass(frozen=True)
class Settings:
    """How a run is followed.

    Attributes:
        start: the checkpoint that is θ_0; None for the earliest one of the run.
        start_step: its step.
        settle: seconds without a change after which a checkpoint that opens is complete.
        patience: seconds without a change after which one that does not open is called torn, and no longer holds up
            later ones.
        keep_states: states of the averages that are kept, to return to when the run goes back; at least 1.
        keep: averaged models that are kept.
        dtype: type of the weights of models written.
        max_shard_size: of models written.
        evaluate: what measures models; None for nothing.
        evaluate_every: steps from one evaluation to the next at least.
        prune: remove checkpoints that are in all averages, but so many of the newest; None to remove none.
        prune_dry: only tell what would be removed.
        max_disk: bytes that the output folder may use; None for any number.
    """

    start: Path | None = None
    start_step: int = 0
    settle: float = 2.0
    patience: float = 60.0
    keep_states: int = 2
    keep: int = 1
    dtype: str = "auto"
    max_shard_size: int | str = "5GB"
    evaluate: HeldOutPlan | CommandPlan | None = None
    evaluate_every: int = 0
    prune: int | None = None
    prune_dry: bool = False
    max_disk: int | None = None

    def __post_init__(self) -> None:
        if self.prune is not None and self.prune < 1:
            raise ValueError(f"--prune-keep {self.prune}: at least 1 checkpoint must stay, from which the run resumes.")


class Watch:
    """Averages, and the models made of them, of a run that is being written. A context manager, which holds the lock of
    the output folder.

    Args:
        run: the run folder; it may be made later.
        out: the output folder. A watch that was there before goes on where it was.
        rules: by name.
        settings: how to follow.
        sinks: told everything that is measured or happens.
        clock: monotonic, in seconds.

    Raises:
        CheckpointError: if ``out`` is being watched into, cannot be written, or holds the state of other rules.
    """

    def __init__(
        self,
        run: Path,
        out: Path,
        rules: Mapping[str, Rule],
        settings: Settings = Settings(),  # noqa: B008 (immutable)
        sinks: Sequence[Sink] = (),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.run, self.out, self._rules, self.settings = run, out, rules, settings
        self.sinks, self.pending = list(sinks), list[Pending]()
        self._settling = Settling(settings.settle, clock)
        self._stack, self._told = ExitStack(), set[tuple[str, str]]()
        self.evaluations: Evaluations | None = None

    def __enter__(self) -> Watch:
        with ExitStack() as stack:
            stack.enter_context(only_watcher(self.out))
            self.metrics = Metrics(self.out)
            settings = self.settings
            if settings.prune is not None and not settings.prune_dry:
                clear_leftovers(self.run)
            keep_live = settings.evaluate is not None
            self.averages = Averages(self.out / "state", self._rules, settings.keep_states, keep_live)
            self.models = Models(self.out, settings.keep, settings.dtype, settings.max_shard_size)
            if settings.evaluate is not None:
                self.evaluations = Evaluations(
                    self._evaluation(settings.evaluate), self.models, self.write, settings.evaluate_every
                )
                stack.callback(self.evaluations.close)
            self._stack = stack.pop_all()
        evaluated = [row["step"] for row in self.metrics.rows() if row.get("event") == "evaluated"]
        if self.evaluations is not None and self.averages.record.steps[-1:] > evaluated[-1:]:
            self._make_models()  # the evaluation that was going on when the last watch ended
        return self

    def __exit__(self, *details: Any) -> None:
        self._stack.close()

    def step(self) -> bool:
        """Look once, and do the next thing that is to be done.

        Returns:
            Whether something was done; False if there is nothing to do for now.
        """
        if not self.run.exists():
            self.tell("waiting", f"{self.run} is not there yet, or not any more: waiting for it", once=True)
            self.pending = []
            return False
        try:
            seen = look(self.run)
        except (CheckpointError, OSError) as error:
            self.tell("unreadable", str(error), once=True)
            return False
        self._settling.forget_all_but(seen)
        if (back := went_back_to(self.averages.record, seen)) != self.averages.record.went_back_to:
            self.averages.note(replace(self.averages.record, went_back_to=back))
        action, self.pending = decide(
            self.averages.record, seen, self._settling.check, logged_losses, self.settings.patience
        )
        for waiting in self.pending:
            if waiting.torn:
                name, found = waiting.seen.path.name, waiting.readiness
                text = f"{name} is not complete and has not changed for {found.quiet_for:.0f} s: {found.reason}"
                self.tell("torn", text, once=True, key=name, step=waiting.seen.step)
        match action:
            case Absorb():
                return not self._is_full() and self._absorb(action)
            case Verify():
                return self._verify(action)
            case RollBack():
                return self._roll_back(action, seen)
            case PassOver():
                return self._pass_over(action.seen, action.reason)
        if self.settings.prune is not None:
            self._prune(seen, self.settings.prune)
        return False

    def finish(self) -> None:
        """Block until what waits for evaluation is evaluated."""
        if self.evaluations is not None:
            self.evaluations.finish()

    def tell(self, event: str, text: str, *, once: bool = False, key: str | None = None, **more: Any) -> None:
        """Write down that something happened, and pass it on.

        Args:
            event: its kind.
            text: in words.
            once: leave it out if the same was told before.
            key: what makes it the same; None for the text.
            more: numbers that go along.
        """
        if once and (event, key or text) in self._told:
            return
        self._told.add((event, key or text))
        self.write({"event": event, "text": text, **more})

    def write(self, row: dict[str, Any]) -> None:
        """Append a row to the metrics, and pass it on."""
        row = plain(row)
        try:
            self.metrics.append(row)
        except OSError as error:  # a full disk ends no watch
            row["unwritten"] = str(error)
        for sink in self.sinks:
            sink(row)

    def _absorb(self, action: Absorb) -> bool:
        seen, checkpoint = action.seen, action.checkpoint
        try:
            if not self.averages.record.history and self.settings.start is not None:
                self._absorb_start(seen)
            self._check_kin(seen)
            self._take(seen.step, checkpoint, seen)
        except NonFiniteError as error:
            return self._pass_over(seen, f"{error}")
        except CheckpointError as error:
            if seen in self._look_again():  # else it was rewritten or removed meanwhile, and the next look will tell
                return self._pass_over(seen, str(error))
            self.tell("vanished", f"{seen.path.name} changed or went away while it was read: {error}", step=seen.step)
            return True
        except OSError as error:
            what = "the disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "the state cannot be written"
            text = f"{what} ({error}): {seen.path.name} waits until there is room"
            self.tell("unwritable", text, once=True, key=seen.path.name, step=seen.step)
            return False
        self._make_models()
        return True

    def _absorb_start(self, first: Seen) -> None:
        assert self.settings.start is not None
        found = find_checkpoints([first.path], [first.step], self.settings.start, self.settings.start_step)
        start, own = found.checkpoints
        self._take(self.settings.start_step, start, None, own)

    def _take(self, step: int, checkpoint: Checkpoint, seen: Seen | None, own: Checkpoint | None = None) -> None:
        losses = logged_losses(checkpoint.folder) if seen is not None else ()
        stamp = weight_stamp(checkpoint, stamp_of_files(checkpoint.path) if seen is None else seen.stamp)
        keep_companions(own or checkpoint, self.out)
        absorbed = self.averages.absorb(checkpoint, step, stamp, losses, own)
        self.write(
            {
                "event": "absorbed",
                "text": f"{absorbed.name} is in the averages",
                "step": step,
                "fingerprint": absorbed.fingerprint,
                "bytes": absorbed.nbytes,
                "seconds": round(absorbed.seconds, 3),
                "state_bytes": self.averages.store.nbytes(),
                **logged_rates(checkpoint.folder),
            }
        )

    def _check_kin(self, seen: Seen) -> None:
        """Refuse a checkpoint of another run than the newest one absorbed, as far as both are there."""
        record = self.averages.record
        newest = seen.path.with_name(record.history[-1].name) if record.history else None
        if newest is None or not newest.exists() or record.history[-1].step >= seen.step:
            return
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            find_checkpoints([newest, seen.path], [record.history[-1].step, seen.step])
        for warning in caught:
            self.tell("note", str(warning.message), once=True, step=seen.step)

    def _verify(self, action: Verify) -> bool:
        seen, record = action.seen, self.averages.record
        known = record.by_name()[seen.path.name]
        try:
            same = fingerprint(action.checkpoint) == known.fingerprint
            action.checkpoint.check_unchanged()
        except (CheckpointError, OSError):
            return True  # it changed again; the next look will tell
        if not same:
            reason = f"{known.name} was rewritten with other weights: the run went back"
            return self._roll_back(RollBack(seen.step, reason), [])
        touched = replace(known, stamp=weight_stamp(action.checkpoint, seen.stamp))
        history = tuple(touched if absorbed is known else absorbed for absorbed in record.history)
        self.averages.note(replace(record, history=history))
        self.tell("touched", f"{known.name} was copied or touched; its weights are those that were absorbed")
        return True

    def _roll_back(self, action: RollBack, seen: Sequence[Seen]) -> bool:
        seen = seen or self._look_again()
        over = list(stale(self.averages.record, seen, action))
        dropped = self.averages.back_to(action.before)
        record = self.averages.record
        if over:
            kept = [passed for passed in record.passed_over if passed.name not in {one.name for one in over}]
            self.averages.note(replace(record, passed_over=(*kept, *over)))
        present = {one.path.name for one in seen}
        lost = [one.name for one in dropped if one.step < action.before and one.name not in present]
        where = f"the averages go back to step {record.steps[-1]}" if record.history else "the averages begin anew"
        text = f"{action.reason}; {where}" + (f", without {', '.join(lost)}, which are gone" if lost else "")
        self.tell("rolled back", text, step=action.before, to=record.steps[-1] if record.history else None)
        if action.stale:
            self.models.forget_from(action.before)
        return True

    def _pass_over(self, seen: Seen, reason: str) -> bool:
        record = self.averages.record
        passed = PassedOver(seen.path.name, seen.step, seen.stamp, reason)
        others = tuple(other for other in record.passed_over if other.name != passed.name)
        self.averages.note(replace(record, passed_over=(*others, passed)))
        self.tell("passed over", f"{seen.path.name} is left out: {reason}", step=seen.step)
        return True

    def _prune(self, seen: Sequence[Seen], keep: int) -> None:
        """Remove what is not needed. The record that says so is on the disk, with the buffers that it names."""
        for one in removable(self.averages.record, seen, keep):
            if self.settings.prune_dry:
                self.tell("would prune", f"{one.path.name} would be removed (--dry-run)", once=True, step=one.step)
                continue
            try:
                freed = remove(one)
            except OSError as error:
                text = f"{one.path.name} could not be removed ({error.strerror})"
                self.tell("not pruned", text, once=True, step=one.step)
                continue
            self.tell("pruned", f"{one.path.name} was removed, it is in all averages", step=one.step, bytes=freed)

    def _is_full(self) -> bool:
        """Whether the output folder uses more than it may, also with nothing in it that can be done without."""
        most = self.settings.max_disk
        if most is None or self._used() <= most:
            return False
        self.averages.keep_only(1)
        self.models.keep_only(1)
        if (used := self._used()) <= most:
            self.tell("spared", "earlier states and further models were removed, for --max-disk", once=True)
            return False
        text = f"{self.out} uses {used:,} bytes, more than --max-disk {most:,}: nothing more is taken up"
        self.tell("full", text, once=True)
        return True

    def _used(self) -> int:
        return self.averages.store.nbytes() + self.models.nbytes()

    def _look_again(self) -> list[Seen]:
        try:
            return look(self.run)
        except (CheckpointError, OSError):
            return []

    def _evaluation(self, plan: HeldOutPlan | CommandPlan) -> Evaluate:
        if isinstance(plan, CommandPlan):
            return CommandEvaluation(plan, lambda: self.evaluations is not None and self.evaluations.stopping)
        from lagless.watch._held_out import HeldOutEvaluation  # imports transformers

        return HeldOutEvaluation(plan, self.out / "state" / "companions")

    def _make_models(self) -> None:
        if self.evaluations is not None:
            with ExitStack() as held:
                snapshot = held.enter_context(self.averages.snapshot())
                if snapshot.readable():
                    self.evaluations.submit(snapshot, held.pop_all())
            return
        name = next(iter(self.averages.rules))
        try:
            with self.averages.snapshot() as snapshot:
                if name in snapshot.readable():
                    self.models.consider(snapshot, name, None)
        except (CheckpointError, OSError) as error:
            self.tell("unwritable", f"the averaged model could not be written: {error}", once=True)
