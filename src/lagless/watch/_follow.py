"""The loop: look until there is nothing to do, then sleep; end when that was asked for."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass

from lagless.watch._wait import Wait
from lagless.watch._watch import Watch

DONE, LEFT_OUT, NO_AVERAGE = 0, 3, 4
"""Exit codes: all that is there is in the averages; something was left out or is not complete; there is no average."""


@dataclass(frozen=True)
class Until:
    """When to end by oneself; without either, never.

    Attributes:
        step: when a checkpoint of this step or a later one is in the averages.
        idle: when nothing was taken up for so many seconds.
    """

    step: int | None = None
    idle: float | None = None

    @classmethod
    def parse(cls, text: str | None) -> Until:
        """Return what ``STEP`` or ``idle:MINUTES`` says.

        Raises:
            ValueError: if it is neither.

        >>> Until.parse("idle:30"), Until.parse("5000").step
        (Until(step=None, idle=1800.0), 5000)
        """
        if text is None:
            return cls()
        if text.isdecimal():
            return cls(step=int(text))
        if match := re.fullmatch(r"idle:(\d+(\.\d+)?)", text):
            return cls(idle=60.0 * float(match[1]))
        raise ValueError(f"--until {text!r}; it must be a step, e.g. 5000, or idle:MINUTES, e.g. idle:30.")


def follow(
    watch: Watch,
    wait: Wait,
    *,
    poll: float = 2.0,
    until: Until = Until(),  # noqa: B008 (immutable)
    once: bool = False,
    each: Callable[[], None] = lambda: None,
    clock: Callable[[], float] = time.monotonic,
) -> int:
    """Follow a run to its end.

    Args:
        watch: an entered watch.
        wait: sleeps.
        poll: seconds between looks.
        until: when to end.
        once: end when everything that is complete was taken up.
        each: called after every look, as to show how things stand.
        clock: monotonic, in seconds.

    Returns:
        An exit code.
    """
    quiet_since, looks = clock(), 0
    while True:
        if watch.step():
            quiet_since, looks = clock(), 0
            each()
            continue
        each()
        looks += 1
        steps = watch.averages.record.steps
        if until.step is not None and steps and steps[-1] >= until.step:
            why = f"step {until.step} is reached"
            break
        if until.idle is not None and clock() - quiet_since >= until.idle:
            why = f"no new checkpoint for {until.idle / 60:g} minutes"
            break
        if once and looks > 1 and all(waiting.torn for waiting in watch.pending):
            why = "all that is there was taken up"
            break
        wait(min(poll, watch.settings.settle) if watch.pending else poll)
    watch.finish()
    best = f"the best model is {watch.models.best}" if watch.models.kept else _none_kept(watch)
    watch.tell("ended", f"ended: {why}; {best}")
    each()
    return exit_code(watch)


def _none_kept(watch: Watch) -> str:
    if len(watch.averages.record.history) < 2:
        return "there is no averaged model yet"
    return "no averaged model was kept, as no evaluation succeeded: the averages are in the state, and go on from there"


def exit_code(watch: Watch) -> int:
    """What a script needs to know of how things stand."""
    record = watch.averages.record
    if len(record.history) < 2 or not watch.models.kept:
        return NO_AVERAGE
    return LEFT_OUT if record.passed_over or watch.pending else DONE
