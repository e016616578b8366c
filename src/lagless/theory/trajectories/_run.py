"""What a rule does at each iterate of a run: follow, update, rest, be read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from numbers import Integral
from typing import NamedTuple

from lagless._validation import require_integer
from lagless.rules import Event, Rule, Tick, check_steps as check_steps


class Move(NamedTuple):
    """One iterate at which something happens.

    Attributes:
        position: its place among the iterates.
        event: what the rule's clock says: buffers follow, are updated or rest.
        read: the average is read here.
        live: if it is read, it is the live iterate.
    """

    position: int
    event: Event
    read: bool
    live: bool

    @property
    def tick(self) -> Tick | None:
        """The update to compute, if any: the rule's own, or the further one of a read between updates."""
        step, _, last = self.event
        if self.event.updates:
            return last
        return last.following(step) if self.read and not self.live else None


def iterate_steps(steps: int | Sequence[int]) -> list[int]:
    """The optimizer steps of the iterates; a number N stands for 0..N.

    Raises:
        ValueError: if they are not strictly increasing integers ≥ 0, or N is not an integer ≥ 0.
    """
    if isinstance(steps, Integral):
        return list(range(require_integer("steps", steps, minimum=0) + 1))
    return check_steps(steps)


def read_steps(steps: Sequence[int], at: Sequence[int] | None) -> list[int]:
    """The steps at which averages are read: ``at``, or the last.

    Raises:
        ValueError: if ``at`` is empty or has a step without an iterate.
    """
    wanted = [steps[-1]] if at is None else [int(step) for step in at]
    missing = sorted(set(wanted) - set(steps))
    if missing or not wanted:
        raise ValueError(f"at must hold steps with an iterate; {missing[:6] or 'it is empty'}.")
    return wanted


def moves(rule: Rule, steps: Sequence[int], at: Sequence[int]) -> Iterator[Move]:
    """The moves of ``rule`` over ``steps`` (``steps[0]`` is θ_0's) when it is read at each of ``at``, in the sense of
    :func:`~lagless.trajectory_weights`; iterates at which nothing happens are left out.

    Raises:
        ValueError: if the rule is read after burn-in and before its first update.
    """
    reads = set(at)
    if steps[0] in reads:
        yield Move(0, Event(steps[0], False, rule.schedule.begin(steps[0])), read=True, live=True)
    for index, event in enumerate(rule.schedule.events(steps), start=1):
        read = event.step in reads
        if read and event.last.number == 0 and not event.follows:
            raise ValueError(
                f"{type(rule).__name__}: update_after={rule.update_after}, update_freq={rule.update_freq} give no "
                f"update up to step {event.step}, where it is read. Read it later, or lower update_freq."
            )
        if event.follows or event.updates or read:
            yield Move(index, event, read, live=event.follows)
