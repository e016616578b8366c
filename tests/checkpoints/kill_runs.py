"""Kill runs at random moments, and look at what they leave: ``python tests/checkpoints/kill_runs.py 300``.

Each run is a process of its own that is killed with SIGKILL, in turn after a random time, at a random one of its calls
that open, rename or remove files or list folders, and at one of the last of those calls. Afterwards the output must be
what it was, or complete, and the next run must leave nothing of the killed one.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file

from lagless import EMA, Averager
from lagless.checkpoints import CheckpointError, _atomic_folder
from lagless.execution import _product_c
from lagless.posthoc import average_checkpoints

Contents = dict[str, bytes]
CALLS = ("open", "os.", "shutil.")


class Folders:
    """An average of stored checkpoints, made where there was none, or in place of another one."""

    def __init__(self, root: Path, exists: bool, exchange: bool) -> None:
        self.root, self.run, self.out = root, root / "run", root / "out"
        self._exists, self._exchange = exists, exchange
        for step in (1, 2, 3):
            (self.run / f"checkpoint-{step}").mkdir(parents=True)
            weights = {f"w{i}": torch.full((5_000,), float(step * i)) for i in range(8)}
            save_file(weights, self.run / f"checkpoint-{step}" / "model.safetensors")
            (self.run / f"checkpoint-{step}" / "config.json").write_text("{}")

    def write(self, decay: float, overwrite: bool = True) -> None:
        if not self._exchange:
            _atomic_folder.exchange = lambda *_: False
        rules = {"a": EMA(decay=decay, update_freq=1), "b": EMA(decay=decay / 2, update_freq=1)}
        average_checkpoints(
            self.run, rules, self.out, overwrite=overwrite, max_shard_size="50KB", memory=2**16, dtype="float32"
        )

    def begin(self) -> None:
        if self._exists:
            self.write(0.9)

    def contents(self) -> Contents | None:
        return _contents(self.out)

    def former_is_put_back(self, old: Contents | None) -> bool:
        """Whether a run that was killed between two renames is made good by one that may not replace anything."""
        if self._exchange or old is None:
            return False
        found: list[bool] = []
        try:
            self.write(0.5, overwrite=False)
        except CheckpointError as error:
            found.append("is not empty" in str(error) and self.contents() == old)
        return found == [True]


class Files:
    """The state of an Averager, saved over an earlier one."""

    def __init__(self, root: Path, exists: bool) -> None:
        self.root, self.out, self._exists = root, root / "state.safetensors", exists
        root.mkdir()

    def write(self, decay: float) -> None:
        averager = Averager({f"w{i}": torch.full((5_000,), decay) for i in range(8)}, EMA(decay=0.5))
        averager.update()
        averager.save(self.out)

    def begin(self) -> None:
        if self._exists:
            self.write(0.9)

    def contents(self) -> Contents | None:
        return {"": self.out.read_bytes()} if self.out.exists() else None

    def former_is_put_back(self, old: Contents | None) -> bool:
        return False


KINDS: dict[str, Callable[[Path], Folders | Files]] = {
    "new folder": lambda root: Folders(root, exists=False, exchange=True),
    "exchanged folder": lambda root: Folders(root, exists=True, exchange=True),
    "folder renamed twice": lambda root: Folders(root, exists=True, exchange=False),
    "new file": lambda root: Files(root, exists=False),
    "replaced file": lambda root: Files(root, exists=True),
}


class Victim:
    """Work that is killed again and again in one folder."""

    def __init__(self, kind: str, root: Path) -> None:
        self._work = KINDS[kind](root)
        _child(self._work.begin)
        self._old, self._before = self._work.contents(), set(os.listdir(root)) | {self._work.out.name}
        self._seconds, self._calls = _measure(lambda: self._work.write(0.5))
        self._new = self._work.contents()
        assert self._new is not None and self._new != self._old

    def kill(self, kind: int, chance: random.Random) -> str:
        """Kill one run, then let one go on to its end.

        Args:
            kind: 0 or 2 for a kill after a random time, 1 at a random call, 3 at one of the last calls.
            chance: source of randomness.

        Returns:
            What was found at the output after the kill: "absent", "old", "new" or, between two renames, "put back".
            In capitals, what must not be.
        """
        work = self._work
        _clear(work.out)
        _child(work.begin)
        assert work.contents() == self._old
        # A run puts its output in place in a moment, with a few dozen calls.
        first = 0 if kind == 1 else max(0, self._calls - 60)
        at = chance.randrange(first, self._calls) if kind % 2 else None
        after = None if kind % 2 else chance.uniform(0.0, 1.05 * self._seconds)
        _child(lambda: work.write(0.5), at, after)
        left = work.contents()
        found = "absent" if left is None else "old" if left == self._old else "new" if left == self._new else "BROKEN"
        if found == "absent" and self._old is not None:
            found = "put back" if _child(lambda: work.former_is_put_back(self._old)) == 0 else "LOST"
        _child(lambda: work.write(0.5))
        if work.contents() != self._new:
            return "NEXT RUN BROKEN"
        if surplus := set(os.listdir(work.root)) - self._before:
            print(f"left by {found}, call {at}, time {after}: {sorted(surplus)}", flush=True)
            return "LEFTOVERS"
        return found


def _child(work: Callable[[], object], at: int | None = None, after: float | None = None) -> int:
    """Do the work in a process of its own, killed at a call or after a time; its exit code."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            if at is not None:
                _at_call(at, lambda: os.kill(os.getpid(), signal.SIGKILL))
            code = 0 if work() is not False else 2
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    if after is not None:
        time.sleep(after)
        os.kill(pid, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert status in (0, 2) or (status == -signal.SIGKILL and (at, after) != (None, None)), status
    return status


def _at_call(number: int, act: Callable[[], None]) -> None:
    count = 0

    def hook(event: str, _: object) -> None:
        nonlocal count
        if event.startswith(CALLS):
            count += 1
            if count == number + 1:
                act()

    sys.addaudithook(hook)


def _measure(work: Callable[[], object]) -> tuple[float, int]:
    """Seconds that the work takes, and calls."""
    reading, writing = os.pipe()

    def counted() -> None:
        count = 0

        def hook(event: str, _: object) -> None:
            nonlocal count
            count += event.startswith(CALLS)

        sys.addaudithook(hook)
        begin = time.perf_counter()
        work()
        os.write(writing, f"{time.perf_counter() - begin} {count}".encode())

    _child(counted)
    seconds, calls = os.read(reading, 100).split()
    os.close(reading)
    os.close(writing)
    return float(seconds), int(calls)


def _clear(out: Path) -> None:
    if out.is_dir():
        for path in sorted(out.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        out.rmdir()
    out.unlink(missing_ok=True)


def _contents(folder: Path) -> Contents | None:
    if not folder.exists():
        return None
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kills", type=int)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    _product_c._library()  # compiled here once: a run would spend most of its time on that
    chance = random.Random(options.seed)
    counts: dict[str, Counter[str]] = {kind: Counter() for kind in KINDS}
    with tempfile.TemporaryDirectory() as folder:
        victims = [Victim(kind, Path(folder, kind)) for kind in KINDS]
        for number in range(options.kills):
            kind, place = divmod(number % (4 * len(KINDS)), len(KINDS))
            counts[list(KINDS)[place]][victims[place].kill(kind, chance)] += 1
    for kind, found in counts.items():
        print(f"{kind}: {found.total()} kills, {', '.join(f'{n} {what}' for what, n in sorted(found.items()))}")
    bad = sum(n for found in counts.values() for what, n in found.items() if what.isupper())
    print(f"{options.kills} kills, {bad} bad")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
