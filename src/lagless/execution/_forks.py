"""Whether a process is a fork of the one that made something: threads and locks do not come along."""

from __future__ import annotations

import os

_forks = 0


def forks() -> int:
    """Return how many forks lie between this process and the one that imported lagless.

    Unlike a call of ``os.getpid``, this can be traced by ``torch.compile``.
    """
    return _forks


def _count() -> None:
    global _forks
    _forks += 1


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_count)
