"""What to do next, given what was absorbed and what lies in the run folder now. Decisions only; nothing is changed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from lagless.checkpoints import Checkpoint
from lagless.watch._record import Absorbed, PassedOver, Record
from lagless.watch._scan import Readiness, Seen

Ready = Callable[[Seen], Readiness]
Losses = Callable[[Path], Sequence[tuple[int, str]]]


@dataclass(frozen=True)
class Absorb:
    """Take a complete checkpoint into the averages."""

    seen: Seen
    checkpoint: Checkpoint


@dataclass(frozen=True)
class Verify:
    """Compare the fingerprint of an absorbed checkpoint whose files have changed."""

    seen: Seen
    checkpoint: Checkpoint


@dataclass(frozen=True)
class RollBack:
    """Return to a state without checkpoints of step ``before`` and later.

    Attributes:
        before: the step.
        reason: what has shown that.
        stale: whether checkpoints of those steps that have not changed are of a branch that the run has left.
    """

    before: int
    reason: str
    stale: bool = True


@dataclass(frozen=True)
class PassOver:
    """Leave a checkpoint out for good."""

    seen: Seen
    reason: str


@dataclass(frozen=True)
class Pending:
    """A checkpoint is not complete.

    Attributes:
        seen: which one.
        readiness: how long it has not changed, and why it does not open.
        torn: whether it has not changed for so long that nobody seems to be writing it.
    """

    seen: Seen
    readiness: Readiness
    torn: bool


Action = Absorb | Verify | RollBack | PassOver


def decide(
    record: Record, seen: Sequence[Seen], ready: Ready, losses: Losses, patience: float
) -> tuple[Action | None, list[Pending]]:
    """Return the next thing to do, or None for now, and the checkpoints that are not complete.

    Args:
        record: what was absorbed.
        seen: what lies there, in order of steps.
        ready: looks whether a checkpoint is complete.
        losses: the training losses logged beside a checkpoint, by step.
        patience: seconds without a change after which an incomplete checkpoint no longer holds up later ones.
    """
    pending: list[Pending] = []
    absorbed = record.by_name()
    changed = {s.step for s in seen if s.path.name in absorbed and not _is_same(absorbed[s.path.name], s)}
    for one in seen:
        known = absorbed.get(one.path.name)
        if known is not None and one.step not in changed:
            continue
        if any(_is_same(passed, one) for passed in record.passed_over if passed.name == one.path.name):
            continue
        late = bool(record.history) and one.step <= record.steps[-1]
        readiness = ready(one)
        if readiness.checkpoint is None:
            torn = readiness.reason is not None and readiness.quiet_for >= patience
            pending.append(Pending(one, readiness, torn))
            if not torn and not late:
                return None, pending  # later ones wait: averages take checkpoints in order
            continue
        if known is not None:
            return Verify(one, readiness.checkpoint), pending
        if late:
            return _late(record, seen, changed, one), pending
        contradicted = _went_back(record, one) or _contradiction(record, losses(readiness.checkpoint.folder))
        if contradicted is not None:
            return contradicted, pending
        return Absorb(one, readiness.checkpoint), pending
    return None, pending


def stale(record: Record, seen: Sequence[Seen], action: RollBack) -> Iterator[PassedOver]:
    """The checkpoints of the branch that a run has left which are still there, to be left out from now on."""
    present = {one.path.name: one for one in seen}
    for absorbed in record.history:
        one = present.get(absorbed.name)
        if action.stale and absorbed.step >= action.before and one is not None and _is_same(absorbed, one):
            reason = f"of the branch that the run left when it went back before step {action.before}"
            yield PassedOver(absorbed.name, absorbed.step, absorbed.stamp, reason)


def went_back_to(record: Record, seen: Sequence[Seen]) -> int | None:
    """The newest checkpoint absorbed that is still there, if later ones are gone and nothing newer has come.

    What goes by rotation is old, and goes when something newer has come. An empty folder says nothing.
    """
    present = {one.path.name for one in seen}
    here = [absorbed.step for absorbed in record.by_name().values() if absorbed.name in present]
    newer = any(one.step > record.steps[-1] for one in seen) if record.history else True
    if newer:
        return record.went_back_to if record.history and record.history[-1].name not in present else None
    return here[-1] if here and here[-1] != record.steps[-1] else None


def _went_back(record: Record, one: Seen) -> RollBack | None:
    if record.went_back_to is None:
        return None
    newest = record.history[-1].name
    return RollBack(record.went_back_to + 1, f"{newest} was removed before {one.path.name} came: the run went back")


def _is_same(known: Absorbed | PassedOver, seen: Seen) -> bool:
    return set(known.stamp) <= set(seen.stamp)


def _late(record: Record, seen: Sequence[Seen], changed: set[int], one: Seen) -> Action:
    """A checkpoint of an earlier step than the newest absorbed: the run went back, or the file came late."""
    present = {other.path.name for other in seen if other.step not in changed}
    newest = record.history[-1]
    if newest.name not in present:
        return RollBack(
            one.step, f"{one.path.name} is new and {newest.name}, absorbed before, is gone: the run went back"
        )
    kept = record.back_to(one.step).history
    again = [absorbed for absorbed in record.history[len(kept) :] if absorbed.name not in present]
    if kept and not again:
        return RollBack(one.step, f"{one.path.name} was complete only after {newest.name}", stale=False)
    why = f"{again[0].name} is gone" if kept else "no state from before it is kept"
    return PassOver(one, f"complete only after {newest.name} was absorbed, and {why}: it is not in the averages")


def _contradiction(record: Record, losses: Sequence[tuple[int, str]]) -> RollBack | None:
    """The first step at which the log of a new checkpoint differs from that of the newest one absorbed."""
    if not record.history:
        return None
    before, now = dict(record.history[-1].losses), dict(losses)
    differing = [step for step in sorted(before.keys() & now.keys()) if before[step] != now[step]]
    if not differing or differing[0] > record.steps[-1]:
        return None
    step = differing[0]
    return RollBack(
        step, f"the loss logged for step {step} was {before[step]} and is {now[step]} now: the run was restarted"
    )
