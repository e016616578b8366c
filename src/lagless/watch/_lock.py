"""One watcher for each output folder: a lock of the system, which ends with the process that holds it."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lagless.checkpoints import CheckpointError

try:
    import fcntl
except ImportError:  # not a Unix
    fcntl = None

_NAME = "watch.lock"


@contextmanager
def only_watcher(out: Path) -> Iterator[None]:
    """Hold the lock of an output folder inside the ``with`` block.

    Raises:
        CheckpointError: if another process holds it, or the folder cannot be written.
    """
    path = out / _NAME
    try:
        out.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise CheckpointError(
            f"{out}: cannot be written ({error.strerror}). Check its permissions, or choose another output folder (-o)."
        ) from error
    try:
        if fcntl is not None:
            try:
                fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                holder = os.pread(descriptor, 200, 0).decode(errors="replace").strip() or "another process"
                raise CheckpointError(
                    f"{out}: {holder} is watching into this folder. Stop it, or choose another output folder (-o)."
                ) from error
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        yield
    finally:
        os.close(descriptor)
