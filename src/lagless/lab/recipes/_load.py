"""Recipes from YAML: packaged ones by name, others by path, with changes from the command line."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from lagless._validation import shown
from lagless.lab.recipes._problems import field_of, problem, suggestion
from lagless.lab.recipes._recipe import Recipe
from lagless.lab.recipes._yaml import parse_yaml

_LIBRARY = files("lagless.lab.recipes") / "library"


def recipe_names() -> list[str]:
    """The names of the packaged recipes."""
    return sorted(Path(entry.name).stem for entry in _LIBRARY.iterdir() if entry.name.endswith(".yaml"))


def load_recipe(name: str | Path, overrides: Iterable[str] | Mapping[str, Any] = ()) -> Recipe:
    """A packaged recipe, or one in a file.

    A recipe that says ``extends: NAME`` is that packaged recipe with changes.

    Args:
        name: of a packaged recipe, or path of a YAML file.
        overrides: ``"training.learning_rate=3e-4"`` and the like; the value is YAML. Or a mapping of the same.

    Raises:
        ValueError: if there is no such recipe, or a field is unknown, missing or out of range; all of them are named.

    >>> load_recipe("bema-sft-qwen2.5-1.5b", ["training.learning_rate=1e-5"]).training.learning_rate
    1e-05
    """
    data = _read(name)
    if not isinstance(overrides, Mapping):
        overrides = dict(map(parse_override, overrides))
    for path, value in overrides.items():
        _set(data, path.split("."), copy.deepcopy(value), path)  # a later path may lead into it
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        problems = " ".join(problem(data, one) for one in error.errors())
        raise ValueError(
            f"recipe {name}: {problems} Change fields with --set FIELD=VALUE; `lagless recipes NAME` documents each."
        ) from None


def open_fields(name: str | Path) -> list[str]:
    """The fields of a recipe that have no value yet and need one.

    >>> open_fields("pace-pretrain-small")
    ['data.path']
    """
    data = _read(name)
    try:
        Recipe.model_validate(data)
    except ValidationError as error:
        return [field_of(data, one["loc"])[0] for one in error.errors() if one["type"] == "missing"]
    return []


def summary(name: str) -> str:
    """What a packaged recipe trains."""
    return _read(name)["summary"]


def parse_override(text: str) -> tuple[str, Any]:
    """``FIELD=VALUE`` as --set takes it; the value is YAML.

    >>> parse_override("training.learning_rate=3e-4")
    ('training.learning_rate', 0.0003)

    Raises:
        ValueError: if there is no ``=``, or the value is no YAML.
    """
    path, equals, value = text.partition("=")
    if not equals or not path.strip():
        raise ValueError(f"--set {text}: write FIELD=VALUE, e.g. training.learning_rate=3e-4.")
    try:
        return path.strip(), parse_value(value)
    except ValueError as error:
        raise ValueError(f"--set {path.strip()}: {error}") from error


def parse_value(text: str) -> Any:
    """A value as --set takes it.

    >>> parse_value("1e-3"), parse_value("[1, 2]"), parse_value("{kind: constant}")
    (0.001, [1, 2], {'kind': 'constant'})
    """
    try:
        return parse_yaml(text)
    except ValueError as error:
        raise ValueError(f"{shown(text)} is no YAML value ({error}). Quote it, or check its brackets.") from error


def _read(name: str | Path) -> dict[str, Any]:
    path = Path(name).expanduser()
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise ValueError(f"{path}: there is no such recipe file. `lagless recipes` lists the packaged ones.")
        content = path.read_bytes()
    elif str(name) in recipe_names():
        content = (_LIBRARY / f"{name}.yaml").read_bytes()
    else:
        raise ValueError(
            f"recipe {str(name)!r} is unknown{suggestion(str(name), recipe_names())}. "
            "`lagless recipes` lists them; a file of yours ends in .yaml."
        )
    try:
        data = parse_yaml(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{name}: is no text in UTF-8 (byte {error.start} is {content[error.start]:#04x}). Save it as UTF-8."
        ) from error
    except ValueError as error:
        raise ValueError(f"{name}: is no YAML ({error}).") from error
    if not isinstance(data, dict):
        raise ValueError(f"{name}: a recipe is a mapping of fields; this is a {type(data).__name__}.")
    if (parent := data.pop("extends", None)) is not None:
        if parent not in recipe_names():
            raise ValueError(
                f"{name}: extends={shown(parent)} is no packaged recipe{suggestion(str(parent), recipe_names())}. A "
                "recipe extends a packaged one, by its name; `lagless recipes` lists them."
            )
        data = _merged(_read(parent), data)
    return data


def _merged(base: Any, changes: Any) -> Any:
    if not isinstance(base, dict) or not isinstance(changes, dict) or not changes:  # nothing is left of it by {}
        return changes
    if changes.get("kind", base.get("kind")) != base.get("kind"):  # another kind of section, with fields of its own
        return changes
    return base | {key: _merged(base.get(key), value) for key, value in changes.items()}


def _set(data: dict[str, Any], keys: Sequence[str], value: Any, path: str) -> None:
    *outer, last = keys
    for key in outer:
        if data.get(key) is None:
            data[key] = {}
        data = data[key]
        if not isinstance(data, dict):
            raise ValueError(f"{path}: {key} has no fields of its own.")
    data[last] = value
