"""The folder of a run: whose it is, how far it got, whether it is finished."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from lagless.lab.output import write_text
from lagless.lab.recipes import Recipe, load_recipe

RECIPE, RESULT, METRICS = "recipe.yaml", "result.json", "metrics.jsonl"
_LOCK = ".lock"
_FORMAT = 1


class FolderInUse(ValueError):
    """Another process trains in the folder."""


def read_result(folder: Path) -> dict[str, Any] | None:
    """What a finished run left; None for an unfinished one.

    Raises:
        ValueError: if the file is of another format.
    """
    path = folder / RESULT
    if not path.is_file():
        return None
    result = json.loads(path.read_text(encoding="utf-8"))
    if result.get("format") != _FORMAT:
        raise ValueError(f"{path}: format {result.get('format')!r}; this lagless reads format {_FORMAT}.")
    return result


def write_result(folder: Path, recipe: Recipe, content: Mapping[str, Any]) -> dict[str, Any]:
    """Write the result, which makes the run finished; returns it."""
    result = {
        "format": _FORMAT,
        "recipe": recipe.model_dump(mode="json"),
        "recipe_digest": recipe.digest(),
        "seed": recipe.seed,
        **content,
    }
    write_text(folder / RESULT, json.dumps(result, indent=2, allow_nan=False) + "\n")
    return result


def check_folder(folder: Path, recipe: Recipe) -> None:
    """Refuse a folder that is not free and not this run's. One whose run got nowhere is free.

    Raises:
        ValueError: naming the fields that differ.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder}: is a file. Choose another folder for the run.")
    record = folder / RECIPE
    if record.is_file():
        if read_result(folder) is None and last_checkpoint(folder, averages=False) is None:
            return
        mine, its = (_flat(r.model_dump(mode="json", exclude={"sweep"})) for r in (recipe, load_recipe(record)))
        if differing := sorted(field for field in mine.keys() | its.keys() if mine.get(field) != its.get(field)):
            changes = ", ".join(f"{f}: {its.get(f)!r} there, {mine.get(f)!r} here" for f in differing[:5])
            raise ValueError(
                f"{folder}: holds a run of another recipe ({changes}). Choose another folder, or go on with the run's "
                f"own recipe, {record}."
            )
    elif folder.is_dir() and any(entry.name != _LOCK for entry in folder.iterdir()):
        raise ValueError(f"{folder}: is not empty and holds no run. Choose another folder.")


@contextmanager
def claimed(folder: Path, recipe: Recipe) -> Iterator[None]:
    """The folder with its recipe in it, kept from other processes while inside.

    Raises:
        FolderInUse: if another process trains in it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / _LOCK)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise FolderInUse(
            f"{folder}: another process trains in it now. Wait for it, or choose another folder."
        ) from None
    try:
        dumped = yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=1000)
        write_text(folder / RECIPE, dumped)
        yield
    finally:
        lock.release()


def last_checkpoint(folder: Path, averages: bool) -> Path | None:
    """The latest checkpoint that training can go on from; one that was being written when the run ended is none.

    Args:
        folder: of the run.
        averages: whether averages were followed, and so belong to it.
    """
    # In the order in which they are written; optimizer.bin is FSDP's.
    needed = [("optimizer.pt", "optimizer.bin", "optimizer_0"), ("trainer_state.json",)]
    if averages:
        needed.append(("averages.safetensors",))
    found = [
        path
        for path in folder.glob("checkpoint-*")
        if path.name.removeprefix("checkpoint-").isdigit()
        and all(any((path / name).exists() for name in names) for names in needed)
    ]
    return max(found, key=lambda path: int(path.name.removeprefix("checkpoint-")), default=None)


def _flat(value: Any, path: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {path: value}
    return {k: v for key, inner in value.items() for k, v in _flat(inner, f"{path}.{key}" if path else key).items()}
