"""Who writes: temporary names say which process owns them, and a lock tells whether it still lives."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import secrets
import socket
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum, auto
from pathlib import Path

if sys.platform != "win32":
    import fcntl

_LONGEST_STEM = 120  # bytes; with the owner it stays below the 255 that file systems allow
_QUIET = 3600.0  # seconds
_IDENTITY = re.compile(r"([0-9a-f]{8})-(\d+)-(\d+)-([0-9a-f]{8})-([\w.]*)")


@dataclass(frozen=True)
class Owner:
    """A process that writes.

    Attributes:
        token: eight random hexadecimal digits, one set for each thing written.
        pid: its number.
        started: when it started, in clock ticks since the machine did; 0 where the system does not say.
        boot: which run of which machine; containers on one machine have the same.
        host: the name of the machine or container.
    """

    token: str
    pid: int
    started: int
    boot: str
    host: str

    @classmethod
    def new(cls) -> Owner:
        """Return this process under a new token."""
        host = re.sub(r"[^\w.]", "_", socket.gethostname(), flags=re.ASCII)[:40]
        return cls(secrets.token_hex(4), os.getpid(), _start_of(os.getpid()) or 0, _boot(), host)

    @classmethod
    def parse(cls, text: str) -> Owner | None:
        """Return the owner that ``str`` made ``text`` of; None for another text."""
        if (found := _IDENTITY.fullmatch(text)) is None:
            return None
        token, pid, started, boot, host = found.groups()
        return cls(token, int(pid), int(started), boot, host)

    def __str__(self) -> str:
        return f"{self.token}-{self.pid}-{self.started}-{self.boot}-{self.host}"

    def __format__(self, spec: str) -> str:
        return format(str(self), spec)

    @property
    def words(self) -> str:
        """For messages."""
        return f"process {self.pid} on {self.host}"

    def is_of_this_machine(self) -> bool:
        """Whether the machine is this one and has not been restarted since."""
        return self.boot == _boot()

    def has_ended(self) -> bool:
        """Return whether the process is known to have ended; False where it cannot be known."""
        if (self.boot, self.host) != (_boot(), Owner.new().host):
            return False
        return _start_of(self.pid) not in (0, self.started)


def stem(path: Path) -> str:
    """The part of temporary names that says for which path they are; a long name is cut, with a digest of the whole."""
    name = os.fsencode(path.name)
    if len(name) <= _LONGEST_STEM:
        return path.name
    digest = hashlib.sha256(name).hexdigest()[:16]
    return f"{os.fsdecode(name[: _LONGEST_STEM - 20]).encode('utf-8', 'ignore').decode()}-{digest}"


class _Lock(Enum):
    TAKEN, BUSY, UNSUPPORTED = auto(), auto(), auto()


def claim(place: Callable[[Owner], Path]) -> tuple[Owner, Path, int]:
    """Make a file of a new owner and lock it.

    Args:
        place: from an owner to the path of the file, whose folder exists.

    Returns:
        The owner, the path, and the descriptor that holds the lock until it is closed.
    """
    while True:
        owner = Owner.new()
        path = place(owner)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        # In the moment before the lock another run may have taken the file for a dead owner's.
        if _lock(descriptor) is not _Lock.BUSY and _is_at(descriptor, path):
            return owner, path, descriptor
        os.close(descriptor)


def owners(folder: Path, prefix: str, suffix: str = "") -> Iterator[tuple[Owner, Path]]:
    """Yield the owners named between ``prefix`` and ``suffix`` in the names of ``folder``, and the paths."""
    try:
        names = sorted(os.listdir(folder))
    except OSError:
        return
    for name in names:
        if name.startswith(prefix) and name.endswith(suffix):
            if (owner := Owner.parse(name[len(prefix) : len(name) - len(suffix)])) is not None:
                yield owner, folder / name


def take_over(owner: Owner, path: Path, work: Path | None = None) -> int | None:
    """Lock the file of an owner that is dead, so that no other run cleans up after it too.

    A lock that can be taken proves an owner on this machine dead. File systems exist that keep locks to each machine,
    so what belongs to another machine must also have been quiet for an hour. Without locks, only processes of this
    machine can be known to have ended.

    Args:
        owner: whose file it is.
        path: the file that the owner keeps locked.
        work: the folder that it writes, if it is not the file.

    Returns:
        A descriptor to close when done; None if the owner lives, may live, or another run cleans up.
    """
    try:
        descriptor = os.open(path, os.O_RDWR)
    except OSError:
        return None
    state = _lock(descriptor)
    dead = {
        _Lock.TAKEN: owner.is_of_this_machine() or _quiet_for(path, work) > _QUIET,
        _Lock.BUSY: False,
        _Lock.UNSUPPORTED: owner.has_ended(),
    }[state]
    if dead and _is_at(descriptor, path):
        return descriptor
    os.close(descriptor)
    return None


def _lock(descriptor: int) -> _Lock:
    if sys.platform == "win32":
        return _Lock.UNSUPPORTED
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return _Lock.BUSY if error.errno in (errno.EWOULDBLOCK, errno.EACCES) else _Lock.UNSUPPORTED
    return _Lock.TAKEN


def _quiet_for(path: Path, work: Path | None) -> float:
    """Seconds since the last of these files changed."""
    paths = [path, *((Path(place) / name) for place, _, names in os.walk(work or "") for name in names)]
    latest = 0.0
    for changed in paths:
        with contextlib.suppress(OSError):
            latest = max(latest, changed.lstat().st_mtime)
    return time.time() - latest


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.lstat(path))
    except OSError:
        return False


def _boot() -> str:
    """Tell runs of machines apart; by the name alone where the system does not number them."""
    text = socket.gethostname()
    with contextlib.suppress(OSError):
        text = Path("/proc/sys/kernel/random/boot_id").read_text()
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def _start_of(pid: int) -> int | None:
    """When a process started, in clock ticks; None if there is none, 0 if the system does not say."""
    try:
        # The name of the program, in parentheses, may hold anything.
        return int(Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[19])
    except (OSError, IndexError, ValueError):
        pass
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except OSError:
        return 0
    return 0
