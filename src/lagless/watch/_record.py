"""What the state of a watch says: the checkpoints absorbed, in order, and the stored buffers as of some of them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from lagless.checkpoints import NAMES, CheckpointError, TensorInfo, atomic_file
from lagless.rules import Rule, Tick, rule_from_dict, rule_to_dict

FORMAT = 1
NAME = "state.json"
_DTYPES = {name: dtype for dtype, name in NAMES.items()}

Stamp = tuple[tuple[str, int, int, int], ...]
"""Name, size, time of change and inode of each file."""


@dataclass(frozen=True)
class Absorbed:
    """One checkpoint that the averages are made of.

    Attributes:
        name: of its folder or file.
        step: of the optimizer.
        fingerprint: of its weights.
        stamp: of its weight files when they were read.
        nbytes: read.
        seconds: that took.
        losses: training losses that its log gives, by step, as text; the last few hundred.
    """

    name: str
    step: int
    fingerprint: str
    stamp: Stamp
    nbytes: int = 0
    seconds: float = 0.0
    losses: tuple[tuple[int, str], ...] = ()


@dataclass(frozen=True)
class Generation:
    """The stored buffers as of one absorbed checkpoint.

    Attributes:
        count: how many checkpoints are in it: the first so many of the history.
        last: the latest update of each rule.
        buffers: the file of each buffer, relative to the folder of the state.
        live: the file of the checkpoint's own averaged tensors; None where no read needs it.
        copied: the file of the tensors that are not averaged.
    """

    count: int
    last: Mapping[str, Tick]
    buffers: tuple[str, ...]
    live: str | None
    copied: str

    @property
    def files(self) -> set[str]:
        """All files it needs."""
        return {*self.buffers, self.copied, *([self.live] if self.live else [])}


@dataclass(frozen=True)
class PassedOver:
    """A checkpoint that was left out for good, unless its files change.

    Attributes:
        name: of its folder or file.
        step: of the optimizer.
        stamp: of its files then.
        reason: why.
    """

    name: str
    step: int
    stamp: Stamp
    reason: str


@dataclass(frozen=True)
class Record:
    """The whole state but the buffers' content; every change is a new record, written at once or not at all.

    Attributes:
        rules: by name.
        tensors: type and shape of every tensor of a checkpoint, in the order in which buffers hold them.
        written: the types of tensors as averages are written, where those differ: before they were quantized.
        stem: how files of weights are named.
        dequantized: whether checkpoints are quantized, which averages are not.
        start_dtypes: the types of θ_0's averaged tensors where they differ.
        is_adapter: whether checkpoints are adapters.
        start_given: whether θ_0 is not of the run.
        history: the checkpoints absorbed; the first is θ_0.
        generations: stored buffers, oldest first; the last is as of the whole history.
        passed_over: checkpoints left out.
        went_back_to: the newest checkpoint absorbed that was still there when later ones had gone before the run wrote
            another; None if that was not seen. Rotation removes old checkpoints, so the run has gone back.
        permissions: the most that group and others get on files and folders that are written.
        serial: the number of the next file.
    """

    rules: Mapping[str, Rule]
    tensors: Mapping[str, TensorInfo] | None = None
    written: Mapping[str, torch.dtype] | None = None
    stem: str | None = None
    dequantized: bool = False
    start_dtypes: Mapping[str, torch.dtype] | None = None
    is_adapter: bool = False
    start_given: bool = False
    history: tuple[Absorbed, ...] = ()
    generations: tuple[Generation, ...] = ()
    passed_over: tuple[PassedOver, ...] = ()
    went_back_to: int | None = None
    permissions: tuple[int, int] = (0o077, 0o077)
    serial: int = 0

    @property
    def steps(self) -> list[int]:
        """Of the checkpoints absorbed, θ_0's first."""
        return [absorbed.step for absorbed in self.history]

    @property
    def newest(self) -> Generation | None:
        """The stored buffers as of the whole history; None before θ_0."""
        return self.generations[-1] if self.generations else None

    def by_name(self) -> dict[str, Absorbed]:
        """The checkpoints of the run that were absorbed, by name."""
        return {absorbed.name: absorbed for absorbed in self.history[self.start_given :]}

    def back_to(self, before: int) -> Record:
        """Return the newest state without checkpoints of step ``before`` or later; an empty one if none is kept."""
        kept = tuple(g for g in self.generations if self.history[g.count - 1].step < before)
        history = self.history[: kept[-1].count] if kept else ()
        emptied: dict[str, Any] = {} if kept else {"tensors": None, "start_dtypes": None, "start_given": False}
        over = tuple(passed for passed in self.passed_over if passed.step < before)
        return replace(self, history=history, generations=kept, passed_over=over, went_back_to=None, **emptied)

    def written_to(self, folder: Path) -> None:
        """Write the record into the folder of the state, atomically and onto the disk."""
        with atomic_file(folder / NAME) as partial:
            partial.write_text(json.dumps(self._encoded(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

    def _encoded(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "rules": {name: rule_to_dict(rule) for name, rule in self.rules.items()},
            "tensors": self.tensors
            and [[name, NAMES[info.dtype], list(info.shape)] for name, info in self.tensors.items()],
            "written": self.written and {name: NAMES[dtype] for name, dtype in self.written.items()},
            "stem": self.stem,
            "dequantized": self.dequantized,
            "start_dtypes": self.start_dtypes and {name: NAMES[dtype] for name, dtype in self.start_dtypes.items()},
            "is_adapter": self.is_adapter,
            "start_given": self.start_given,
            "history": [asdict(absorbed) for absorbed in self.history],
            "generations": [
                asdict(replace(g, last={})) | {"last": {name: list(tick) for name, tick in g.last.items()}}
                for g in self.generations
            ],
            "passed_over": [asdict(passed) for passed in self.passed_over],
            "went_back_to": self.went_back_to,
            "permissions": list(self.permissions),
            "serial": self.serial,
        }


def read_record(folder: Path) -> Record | None:
    """Return the record in the folder of a state; None if there is none.

    Raises:
        CheckpointError: if it is damaged, or of a later version.
    """
    path = folder / NAME
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise _damaged(path, error) from error
    kind = found.get("format") if isinstance(found, dict) else None
    if kind != FORMAT:
        raise CheckpointError(
            f"{path}: format {kind!r}; this version reads {FORMAT}. "
            "Choose another output folder (-o), or the version of lagless that wrote this one."
        )
    try:
        return _decoded(found)
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise _damaged(path, error) from error


def _decoded(found: dict[str, Any]) -> Record:
    tensors = found["tensors"]
    start, written = found["start_dtypes"], found["written"]
    return Record(
        rules={name: rule_from_dict(rule) for name, rule in found["rules"].items()},
        tensors=None if tensors is None else {n: TensorInfo(_DTYPES[kind], tuple(shape)) for n, kind, shape in tensors},
        written=None if written is None else {name: _DTYPES[kind] for name, kind in written.items()},
        stem=found["stem"],
        dequantized=found["dequantized"],
        start_dtypes=None if start is None else {name: _DTYPES[kind] for name, kind in start.items()},
        is_adapter=found["is_adapter"],
        start_given=found["start_given"],
        history=tuple(
            Absorbed(**{**a, "stamp": stamp_of(a["stamp"]), "losses": tuple((int(s), str(t)) for s, t in a["losses"])})
            for a in found["history"]
        ),
        generations=tuple(
            Generation(
                g["count"], {n: Tick(*t) for n, t in g["last"].items()}, tuple(g["buffers"]), g["live"], g["copied"]
            )
            for g in found["generations"]
        ),
        passed_over=tuple(PassedOver(**{**p, "stamp": stamp_of(p["stamp"])}) for p in found["passed_over"]),
        went_back_to=found["went_back_to"],
        permissions=(int(found["permissions"][0]), int(found["permissions"][1])),
        serial=found["serial"],
    )


def stamp_of(rows: Sequence[Sequence[Any]]) -> Stamp:
    """Return a stamp from what JSON made of it."""
    return tuple((str(name), int(size), int(time), int(inode)) for name, size, time, inode in rows)


def _damaged(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"{path}: cannot be read ({error}). The state of the watch is damaged: choose another output folder (-o), and "
        "the checkpoints that are still there are averaged anew."
    )
