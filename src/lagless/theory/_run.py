"""What a rule does at each iterate of a run: follow, update, rest, be read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from numbers import Integral
from typing import NamedTuple

from lagless._validation import require_integer
from lagless.rules import Rule, Tick, check_steps as check_steps


class Move(NamedTuple):
    """One iterate at which something happens.

    Attributes:
        position: its place among the iterates.
        follow: buffers are set to the live iterate.
        tick: the update to compute, if any.
        keep: the update is one of the rule's own; otherwise it only serves a read off an update step.
        read: the average is read here; without a tick it is the live iterate.
    """

    position: int
    follow: bool
    tick: Tick | None
    keep: bool
    read: bool


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
        yield Move(0, False, None, False, True)
    previous, number = max(rule.update_after, steps[0]), 0
    for index, step in enumerate(steps[1:], start=1):
        read = step in reads
        if rule.timing.follows(step):
            yield Move(index, True, None, False, read)
        elif rule.timing.updates(step):
            number += 1
            yield Move(index, False, Tick(step, previous, number), True, read)
            previous = step
        elif read:
            if number == 0:
                raise ValueError(
                    f"{type(rule).__name__}: update_after={rule.update_after}, update_freq={rule.update_freq} give no "
                    f"update up to step {step}, where it is read. Read it later, or lower update_freq."
                )
            yield Move(index, False, Tick(step, previous, number + 1), False, True)
