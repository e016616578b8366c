"""Averaged models, ready to load: the best few of those that were written, and a link that always leads to one."""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from threading import Lock
from typing import Any

from lagless._version import __version__
from lagless.checkpoints import (
    CARD,
    RECORD,
    Checkpoint,
    ModelWriter,
    Permissions,
    atomic_file,
    model_card,
    permissions_of,
    plan_layout,
    sidecar_files,
)
from lagless.rules import anchor, effective_iterates, mean_age, rule_to_dict, schedule_of
from lagless.watch._snapshot import LIVE, Snapshot
from lagless.watch._store import size_of

_LIST = "models.json"
CANDIDATE = "candidate-"


@dataclass(frozen=True)
class Model:
    """A model that is kept.

    Attributes:
        name: of the rule.
        step: as of which it was formed.
        loss: that it was measured to have; None where nothing is measured.
        folder: its name.
        stale: whether it is of a branch that the run has left.
    """

    name: str
    step: int
    loss: float | None
    folder: str
    stale: bool = False


class Models:
    """The models in an output folder.

    Args:
        out: the output folder.
        keep: how many to keep.
        dtype: of the weights written, as in :func:`lagless.posthoc.average_checkpoints`.
        max_shard_size: largest weight file.
    """

    def __init__(self, out: Path, keep: int = 1, dtype: str = "auto", max_shard_size: int | str = "5GB") -> None:
        self._out, self._keep, self._dtype, self._max_shard_size = out, keep, dtype, max_shard_size
        self.folder, self._lock = out / "models", Lock()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.kept = list(self._read())
        self._tidy(first=True)

    @property
    def best(self) -> Path:
        """The link, or copy, that is the best model so far."""
        return self._out / "best"

    def write(self, snapshot: Snapshot, name: str, out: Path) -> None:
        """Write an average as a model folder that ``from_pretrained`` loads.

        Raises:
            CheckpointError: if it cannot be written.
        """
        record = snapshot.record
        written = {
            tensor: replace(info, dtype=(record.written or {}).get(tensor, info.dtype))
            for tensor, info in snapshot.tensors.items()
        }
        layout = plan_layout(written, self._dtype, self._max_shard_size, record.is_adapter, record.stem)
        companions = self._out / "state" / "companions"
        options = {"permissions": Permissions(*record.permissions), "dequantized": record.dequantized}
        with ModelWriter(out, [""], layout, companions, self._dtype, **options) as writer:
            for tensor, start, block in snapshot.blocks(name):
                writer(tensor, start, block.unsqueeze(0))
            told = provenance(snapshot, name, self._dtype)
            writer.write_texts(RECORD, [json.dumps(told, indent=2, ensure_ascii=False) + "\n"])
            if name != LIVE:
                writer.write_texts(CARD, [model_card(told, companions)])

    @contextmanager
    def candidate(self, snapshot: Snapshot, name: str) -> Iterator[Path]:
        """Write an average, or with ``"live"`` the checkpoint, as a model folder for the length of the ``with`` block.

        Raises:
            CheckpointError: if it cannot be written.
        """
        folder = self.folder / f"{CANDIDATE}{name}"
        try:
            self.write(snapshot, name, folder)
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def consider(self, snapshot: Snapshot, name: str, loss: float | None, written: Path | None = None) -> bool:
        """Keep an average if it is among the best; without a loss, the newest counts as best.

        Args:
            snapshot: the averages.
            name: which one.
            loss: that it has.
            written: a folder that holds it already, which is taken over.

        Returns:
            Whether it is the best of all now.
        """
        with self._lock:
            return self._consider(snapshot, name, loss, written)

    def _consider(self, snapshot: Snapshot, name: str, loss: float | None, written: Path | None) -> bool:
        model = Model(name, snapshot.step, loss, f"{name}-{snapshot.step}")
        ranked = sorted([m for m in self.kept if m.folder != model.folder] + [model], key=_rank)[: self._keep]
        if model not in ranked:
            return False
        place = self.folder / model.folder
        if written is None or place.exists():
            self.write(snapshot, name, place)
        else:
            os.rename(written, place)
        self._replace(ranked)
        return ranked[0] == model

    def forget_from(self, step: int) -> None:
        """Rank models of a branch that the run has left behind all others; they stay until there are others."""
        with self._lock:
            self._forget_from(step)

    def _forget_from(self, step: int) -> None:
        kept = [replace(model, stale=model.stale or model.step >= step) for model in self.kept]
        if kept != self.kept:
            self._replace(sorted(kept, key=_rank))

    def keep_only(self, count: int) -> None:
        """Keep fewer models from now on, and remove the others."""
        with self._lock:
            self._keep = min(self._keep, count)
            if len(self.kept) > self._keep:
                self._replace(self.kept[: self._keep])

    def nbytes(self) -> int:
        """Bytes on the disk."""
        return size_of(Path(place, name) for place, _, names in os.walk(self.folder) for name in names)

    def _replace(self, ranked: list[Model]) -> None:
        with atomic_file(self._out / "state" / _LIST) as partial:
            partial.write_text(json.dumps([asdict(model) for model in ranked], indent=1) + "\n", encoding="utf-8")
        self.kept = ranked
        self._tidy()

    def _tidy(self, first: bool = False) -> None:
        """Let the link lead to the best model, then remove what is not kept."""
        if self.kept:
            _link(self.best, Path("models") / self.kept[0].folder)
        names = {model.folder for model in self.kept}
        for path in self.folder.iterdir():
            if path.name not in names and not (path.name.lstrip(".").startswith(CANDIDATE) and not first):
                shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink()

    def _read(self) -> Iterator[Model]:
        with suppress(FileNotFoundError):
            for entry in json.loads((self._out / "state" / _LIST).read_text(encoding="utf-8")):
                if (self.folder / entry["folder"]).is_dir():
                    yield Model(**entry)


def keep_companions(checkpoint: Checkpoint, out: Path) -> None:
    """Copy what lies beside the weights, so that averages load when rotation has removed the checkpoint."""
    target, source = out / "state" / "companions", checkpoint.companions
    folder = source if source.is_dir() else source.parent
    wanted = {file.relative_to(folder): file for file in sidecar_files(source)}
    if (folder / CARD).is_file():  # lends its metadata to the averages' own cards
        wanted[Path(CARD)] = folder / CARD
    for name, file in wanted.items():
        copy = target / name
        if not copy.is_file() or copy.read_bytes() != file.read_bytes():
            copy.parent.mkdir(parents=True, exist_ok=True)
            with atomic_file(copy) as partial:
                shutil.copyfile(file, partial)
                permissions = permissions_of([checkpoint])
                partial.chmod(file.stat().st_mode & (permissions.files | 0o700) & 0o777)
    target.mkdir(parents=True, exist_ok=True)


def provenance(snapshot: Snapshot, name: str, dtype: str) -> dict[str, Any]:
    """What ``lagless.json`` says of an average, as that of ``lagless average`` does."""
    steps = snapshot.steps
    if name == LIVE:
        return {"lagless": __version__, "name": LIVE, "step": steps[-1], "rule": None, "dtype": dtype}
    rule = snapshot.record.rules[name]
    weights, history = snapshot.weights(name), snapshot.record.history[: len(snapshot.steps)]
    begin = anchor(rule, steps)
    return {
        "lagless": __version__,
        "name": name,
        "rule": rule_to_dict(rule),
        "start": {
            "name": history[0].name,
            "step": steps[0],
            "chosen": "given" if snapshot.record.start_given else "earliest checkpoint",
        },
        "step": steps[-1],
        "mean_age": mean_age(weights, steps),
        "effective_iterates": effective_iterates(weights),
        "equivalent_schedule": schedule_of(weights).tolist(),
        "anchor": {"name": history[steps.index(begin.step)].name, "step": begin.step, "weight": begin.weight},
        "sources": [
            {
                "name": absorbed.name,
                "step": absorbed.step,
                "weight": weight,
                "files": [Path(row[0]).name for row in absorbed.stamp],
                "fingerprint": absorbed.fingerprint,
            }
            for absorbed, weight in zip(history, weights.tolist(), strict=True)
        ],
        "accumulate": "recursion",
        "dtype": dtype,
    }


def _rank(model: Model) -> tuple[bool, bool, float, int]:
    return model.stale, model.loss is None, model.loss if model.loss is not None else 0.0, -model.step


def _link(link: Path, target: Path) -> None:
    """Let a link lead to ``target`` in one step."""
    if link.is_symlink() and Path(os.readlink(link)) == target:
        return
    temporary = link.with_name(f".{link.name}-{secrets.token_hex(4)}")
    temporary.symlink_to(target, target_is_directory=True)
    os.replace(temporary, link)
