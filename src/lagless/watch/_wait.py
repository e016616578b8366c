"""Sleeping until something changes in the run folder, or for a while where the system does not tell."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

Wait = Callable[[float], None]
"""Sleeps for at most so many seconds."""


class Waiter:
    """Sleeps between looks; wakes early when watchfiles, if it is installed, sees a change, or :meth:`wake` is called.

    Events are a help, never relied upon: file systems that are mounted from elsewhere have none.

    Args:
        run: the folder to be followed; events begin once it is there.
    """

    def __init__(self, run: Path) -> None:
        self._run, self._changed, self._stop = run, threading.Event(), threading.Event()
        self._thread: threading.Thread | None = None

    def __call__(self, seconds: float) -> None:
        """Sleep for at most so many seconds."""
        if self._thread is None and self._run.is_dir():
            self._thread = threading.Thread(target=self._listen, name="lagless-events", daemon=True)
            self._thread.start()
        self._changed.wait(seconds)
        self._changed.clear()

    def wake(self) -> None:
        """End the present sleep, or the next one."""
        self._changed.set()

    def close(self) -> None:
        """Stop listening."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def _listen(self) -> None:
        try:
            from watchfiles import watch
        except ImportError:
            return
        try:
            # Files that are being written make many events: one wake-up a second is enough.
            for _ in watch(
                self._run, stop_event=self._stop, debounce=1000, step=200, rust_timeout=500, yield_on_timeout=False
            ):
                self._changed.set()
        except (OSError, RuntimeError):  # the folder went away, or the system has no room for more watches
            return


def sleep(seconds: float) -> None:
    """Sleep, as :class:`Waiter` does without events."""
    time.sleep(seconds)
