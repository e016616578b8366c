"""How many files may be held open."""

from __future__ import annotations

import os

try:
    import resource
except ImportError:  # not a Unix
    resource = None

_MOST = 256  # more are not faster
_OTHERS = 64  # left to everything else in the process


def spare_descriptors() -> int:
    """Return how many files reading, and again how many files writing, may hold open beside each other.

    The limit of the process (``ulimit -n``) and the files that are open already count; 0 if there is no room.
    """
    if resource is None:
        return _MOST
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if limit == resource.RLIM_INFINITY:
        return _MOST
    return max(0, min(_MOST, (limit - _open_now() - _OTHERS) // 2))


def _open_now() -> int:
    try:
        return len(os.listdir("/dev/fd"))
    except OSError:
        return _OTHERS
