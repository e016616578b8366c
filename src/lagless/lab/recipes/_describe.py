"""A recipe as YAML in which every field is explained."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from typing import Any

import yaml

from lagless.lab.recipes._recipe import Recipe
from lagless.lab.recipes._section import Section


def describe(recipe: Recipe) -> str:
    """The recipe as YAML, every field under its description; those that no reference states are marked as ours.

    The result is a recipe itself: put it in a file, change it, and give the file to ``lagless train``.
    """
    return "\n".join(_lines(recipe, recipe.model_dump(mode="json"), (), frozenset(recipe.ours))) + "\n"


def _lines(section: Section, data: dict[str, Any], path: tuple[str, ...], ours: frozenset[str]) -> Iterator[str]:
    indent = "  " * len(path)
    fields = type(section).model_fields
    for name in sorted(fields, key="kind".__ne__):  # which kind of section it is comes first
        field, value = fields[name], getattr(section, name)
        dotted = ".".join((*path, name))
        mark = " (ours)" if dotted in ours else ""
        if not path:
            yield ""
        yield from textwrap.wrap(
            f"{field.description}{mark}", 120, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# "
        )
        if isinstance(value, Section):
            yield f"{indent}{name}:"
            yield from _lines(value, data[name], (*path, name), ours)
        else:
            flow = None if isinstance(data[name], dict | list) else False  # inner collections on one line
            dumped = yaml.safe_dump(
                {name: data[name]}, sort_keys=False, allow_unicode=True, width=1000, default_flow_style=flow
            )
            yield from (indent + line for line in dumped.splitlines())
