"""Recipes from YAML: packaged ones by name, others by path, with changes from the command line."""

from __future__ import annotations

import copy
import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from lagless.lab.recipes._recipe import Recipe
from lagless.lab.recipes._section import Section

_LIBRARY = files("lagless.lab.recipes") / "library"


class _Loader(yaml.SafeLoader):
    """YAML whose numbers are those of JSON as well: 1e-3 is one."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


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
        problems = "\n".join(f"  {_problem(data, dict(one))}" for one in error.errors())
        raise ValueError(
            f"recipe {name}:\n{problems}\nChange fields with --set FIELD=VALUE; `lagless recipes NAME` documents each."
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
        return [_field(data, one["loc"])[0] for one in error.errors() if one["type"] == "missing"]
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
    return path.strip(), parse_value(value)


def parse_value(text: str) -> Any:
    """A value as --set takes it.

    >>> parse_value("1e-3"), parse_value("[1, 2]"), parse_value("{kind: constant}")
    (0.001, [1, 2], {'kind': 'constant'})
    """
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ValueError(
            f"{text!r} is no YAML value ({_first_line(error)}). Quote it, or check its brackets."
        ) from error


def _read(name: str | Path) -> dict[str, Any]:
    path = Path(name)
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise ValueError(f"{path}: there is no such recipe file. `lagless recipes` lists the packaged ones.")
        text = path.read_text(encoding="utf-8")
    elif str(name) in recipe_names():
        text = (_LIBRARY / f"{name}.yaml").read_text(encoding="utf-8")
    else:
        raise ValueError(
            f"recipe {str(name)!r} is unknown{_suggestion(str(name), recipe_names())}. "
            "`lagless recipes` lists them; a file of yours ends in .yaml."
        )
    try:
        data = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"{name}: is no YAML ({_first_line(error)}).") from error
    if not isinstance(data, dict):
        raise ValueError(f"{name}: a recipe is a mapping of fields; this is a {type(data).__name__}.")
    if (parent := data.pop("extends", None)) is not None:
        if parent not in recipe_names():
            raise ValueError(
                f"{name}: extends={parent!r} is no packaged recipe{_suggestion(str(parent), recipe_names())}."
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


def _field(data: Any, location: Sequence[int | str]) -> tuple[str, Any]:
    """Where pydantic found a problem, as a dotted field, and the value there."""
    parts, node = [], data
    for part in location:
        # Within a choice of sections pydantic names the kind as well, which is no field.
        if isinstance(node, dict) and part not in node and part == node.get("kind"):
            continue
        parts.append(str(part))
        node = node.get(part) if isinstance(node, dict) else None
    return ".".join(parts), node


def _problem(data: Any, error: dict[str, Any]) -> str:
    """One of pydantic's errors as a sentence."""
    field, node = _field(data, error["loc"])
    leaf = field.rpartition(".")[2]
    if error["type"] == "extra_forbidden":
        known = _fields(Section)
        if leaf in known:
            return f"{field}: is no field of this kind of section."
        return f"{field}: unknown field{_suggestion(leaf, known)}."
    if error["type"] == "missing":
        return f"{field}: is required and has no value."
    if error["type"] == "union_tag_not_found":
        return f"{field}.kind: is required and has no value."
    message = error["msg"].removeprefix("Value error, ").removesuffix(".")
    if error["type"] == "union_tag_invalid":
        context = error["ctx"]
        return f"{field}.kind={context['tag']!r}; it must be one of {context['expected_tags']}."
    given = "" if isinstance(node, dict) or node is None else f"={node!r}"
    return f"{field}{given}{': ' if field else ''}{message}."


def _fields(section: type[Section]) -> list[str]:
    found = set(section.model_fields)
    for kind in section.__subclasses__():
        found.update(_fields(kind))
    return sorted(found)


def _suggestion(word: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {close[0]}?" if close else ""


def _first_line(error: Exception) -> str:
    return " ".join(str(error).split())
