"""θ_0 kept where it already is: in the base checkpoint on disk."""

from __future__ import annotations

from os import PathLike
from pathlib import Path

import torch
from torch import Tensor

from lagless.posthoc import Checkpoint, fingerprint, open_checkpoint


class StoredStart:
    """The base checkpoint of a run as θ_0, opened when an average is read.

    Args:
        path: a model folder or weights file.
        names: the tensors to find in it.
        live: the live tensors, which must equal the stored ones bit for bit.

    Raises:
        ValueError: if a tensor is missing or differs from the live one.
    """

    def __init__(self, path: str | PathLike[str], names: list[str], live: list[Tensor]) -> None:
        self.path = Path(path)
        self.fingerprint = fingerprint(self.path)
        self._verified = _stamp(self.path)
        checkpoint = open_checkpoint(self.path)
        for name, tensor in zip(names, live, strict=True):
            if name not in checkpoint.tensors:
                raise ValueError(
                    f"start={str(path)!r} has no tensor {name!r}, which is averaged; give the base of this very model."
                )
            if not torch.equal(checkpoint.read_tensor(name).to(tensor.device), tensor):
                raise ValueError(
                    f"start={str(path)!r}: {name} differs from the live weights, so it is not θ_0 of this run. "
                    "Make the Averager right after loading that checkpoint, in the same dtype, or leave start out."
                )

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


def _stamp(path: Path) -> tuple[tuple[str, int, int], ...]:
    files = [path] if path.is_file() else sorted(p for p in path.iterdir() if p.is_file())
    return tuple((p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in files)
