"""Reads of averages and steps of weights take turns, whichever threads they are in.

An average is formed of buffers and of the weights that train. A step moves the weights first and the buffers
afterwards, and a read in between would mix two steps. So a step is open from before the optimizer's until the buffers
have followed, and another thread that reads meanwhile waits for its end.
"""

from __future__ import annotations

import threading
from collections.abc import Generator
from contextlib import AbstractContextManager, contextmanager

from lagless.execution._forks import forks

LONGEST_WAIT = 60.0
"""Seconds until a step is taken for one that failed, or that nobody will follow by an update."""


class Turns:
    """Whose turn it is: one thread's that steps, or one thread's that reads."""

    def __init__(self) -> None:
        self._begin_anew()

    def _begin_anew(self) -> None:
        self._forks = forks()
        self._turn = threading.Condition(threading.RLock())
        self._stepping: int | None = None
        self._steps = 0

    @property
    def steps(self) -> int:
        """Return a number that changes with every step."""
        return self._steps

    def between_reads(self) -> AbstractContextManager[object]:
        """No other thread reads inside the block; steps may be open, as parts of one may come from several threads."""
        return self._lock()

    def begin_step(self) -> None:
        """Wait for reads in other threads, and open a step. One that is open already may be another optimizer's."""
        with self._lock():
            self._stepping = threading.get_ident()
            self._steps += 1

    def end_step(self) -> None:
        """Close the step, if one is open."""
        turn = self._lock()
        with turn:
            self._stepping = None
            turn.notify_all()

    @contextmanager
    def still(self, action: str) -> Generator[None]:
        """Nothing steps inside the block but this thread.

        Raises:
            RuntimeError: if another thread has begun a step that does not end.
        """
        turn, here = self._lock(), threading.get_ident()
        with turn:
            if not turn.wait_for(lambda: self._stepping in (None, here), LONGEST_WAIT):
                raise RuntimeError(
                    f"cannot {action} in this thread: a step that another one has begun {LONGEST_WAIT:g} s ago has not "
                    "ended, so weights and averages are of different steps. Either it failed, or update() was not "
                    "called after it. Read in the thread that trains, between its steps."
                )
            yield

    def require_none_since(self, steps: int, action: str) -> None:
        """Refuse to go on with what was begun at ``steps``.

        Raises:
            RuntimeError: if a step has begun since.
        """
        if self._steps != steps:
            raise RuntimeError(
                f"cannot go on to {action} one by one: weights have stepped since the first of them, and the rest "
                "would be of another step. Take all of them between two steps, or call read(), which does so in any "
                "thread."
            )

    def _lock(self) -> threading.Condition:
        if self._forks != forks():  # a forked process has no thread that could give a turn back
            self._begin_anew()
        return self._turn
