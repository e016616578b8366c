"""θ_0 kept where it already is: in the base checkpoint on disk."""

from __future__ import annotations

import math
from collections.abc import Mapping
from os import PathLike
from pathlib import Path

import torch
from torch import Tensor

from lagless.averaging._live import LiveTensors
from lagless.checkpoints import Checkpoint, absolute_path, fingerprint, open_checkpoint
from lagless.rules import InitialWeights, Rule


def check_start(rules: Mapping[str, Rule], step: int) -> None:
    """Refuse a stored θ_0 for rules that replace it or read it at every update.

    Raises:
        ValueError: naming the rule.
    """
    if step != 0:
        raise ValueError(f"start is the model at step 0, but step={step}; leave start out when joining a run.")
    for name, rule in rules.items():
        first = rule.update(rule.schedule.tick_at(rule.update_after + rule.update_freq))
        for i, label in enumerate(rule.buffer_keys):
            read_back = any(row[i] != 0.0 for j, row in enumerate(first.matrix) if j != i)
            if isinstance(label, InitialWeights) and (rule.update_after > 0 or read_back):
                why = "reads θ_0 at every update" if read_back else f"replaces θ_0 at update_after={rule.update_after}"
                raise ValueError(f"start cannot hold θ_0 of {name!r}: {type(rule).__name__} {why}; leave start out.")


class StoredStart:
    """The base checkpoint of a run as θ_0, opened when an average is read.

    Args:
        path: a model folder or weights file.
        tensors: those to find in it, by their names, or all without the same first levels of them.
        live: what they are now.

    Attributes:
        mismatch: why the live weights are not θ_0, if they differ from the stored ones; a state that is loaded makes
            up for that.

    Raises:
        ValueError: if a tensor is missing.
    """

    def __init__(self, path: str | PathLike[str], tensors: LiveTensors, live: list[Tensor]) -> None:
        self.path = absolute_path(path)
        self.fingerprint = fingerprint(self.path)
        self.mismatch: str | None = None
        self._verified = _stamp(self.path)
        checkpoint = open_checkpoint(self.path)
        names = _stored_names(tensors, checkpoint)
        self._stored = {
            name: (names[name], sharding) for name, sharding in zip(tensors.names, tensors.shardings, strict=True)
        }
        for (name, (stored, sharding)), tensor in zip(self._stored.items(), live, strict=True):
            fits = checkpoint.tensors[stored].shape == sharding.shape
            if self.mismatch is None and not (
                fits and torch.equal(self.read(checkpoint, name).to(tensor.device), tensor)
            ):
                self.mismatch = (
                    f"start={str(path)!r}: {name} differs from the live weights at the start, so this is not θ_0. Make "
                    "the Averager right after loading that checkpoint, in the same dtype; or, to resume, load the "
                    "averager's state before the first update."
                )

    def read(self, checkpoint: Checkpoint, name: str) -> Tensor:
        """This rank's part of the tensor ``name``; of the others' no more than lies between its rows is read."""
        stored, sharding = self._stored[name]
        if sharding.mesh is None or not sharding.shape:
            return checkpoint.read_tensor(stored)
        rows, *others = sharding.box
        width = math.prod(sharding.shape[1:])
        part = checkpoint.read_range(stored, rows.start * width, rows.stop * width)
        return part.reshape(rows.stop - rows.start, *sharding.shape[1:])[(slice(None), *others)]

    def require_verified(self) -> None:
        """Refuse to go on when the live weights did not start at the stored ones.

        Raises:
            ValueError: naming the first tensor that differs.
        """
        if self.mismatch is not None:
            raise ValueError(self.mismatch)

    def open(self) -> Checkpoint:
        """The checkpoint, after checking that its content is still what it was."""
        stamp = _stamp(self.path)
        if stamp != self._verified:
            if (now := fingerprint(self.path)) != self.fingerprint:
                raise RuntimeError(
                    f"{self.path} has changed since the run started (fingerprint {now}, was {self.fingerprint}); "
                    "θ_0 is lost. Restore the base checkpoint to read BEMA averages."
                )
            self._verified = stamp
        return open_checkpoint(self.path)


def _stored_names(tensors: LiveTensors, checkpoint: Checkpoint) -> dict[str, str]:
    """Return what the checkpoint calls each tensor: its name, or all their names without the same first levels.

    The latter where the base is an attribute of the module that trains, as in Lightning.
    """
    known = {name: [name] for name in tensors.names}
    for alias, name in tensors.aliases.items():
        known[name].append(alias)
    levels, lacking = tensors.names[0].split("."), list[list[str]]()
    for depth in range(len(levels)):
        prefix = "".join(f"{level}." for level in levels[:depth])
        found = {
            name: [n for n in names if n.startswith(prefix) and n[len(prefix) :] in checkpoint.tensors]
            for name, names in known.items()
        }
        if all(found.values()):
            return {name: names[0][len(prefix) :] for name, names in found.items()}
        lacking.append([name for name, names in found.items() if not names])
    nearest, held = min(lacking, key=len), sorted(checkpoint.tensors)
    raise ValueError(
        f"start={str(checkpoint.path)!r} has no tensor {nearest[0]!r}, with or without its first levels; it holds "
        f"{', '.join(held[:3])}{', ...' if held[3:] else ''}. Give the base of this very model, whose names there may "
        "lack the same first levels each."
    )


def _stamp(path: Path) -> tuple[tuple[str, int, int], ...]:
    files = [path] if path.is_file() else sorted(p for p in path.iterdir() if p.is_file())
    return tuple((p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in files)
