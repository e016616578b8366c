"""Problems that pydantic found, in a sentence each."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lagless._validation import shown
from lagless.lab.recipes._section import Section


def problem(data: Any, error: Mapping[str, Any]) -> str:
    """Return one of pydantic's errors about ``data`` as a sentence that names the field."""
    field, node = field_of(data, error["loc"])
    leaf = field.rpartition(".")[2]
    if error["type"] == "extra_forbidden":
        known = _fields(Section)
        if leaf in known:
            return f"{field}: is no field of this kind of section."
        return f"{field}: unknown field{suggestion(leaf, known)}."
    if error["type"] == "missing":
        return f"{field}: is required and has no value."
    if error["type"] == "union_tag_not_found":
        return f"{field}.kind: is required and has no value."
    message = error["msg"].removeprefix("Value error, ").removesuffix(".")
    if error["type"] == "union_tag_invalid":
        context = error["ctx"]
        return f"{field}.kind={shown(context['tag'])}; it must be one of {context['expected_tags']}."
    given = "" if isinstance(node, dict) or node is None else f"={shown(node)}"
    return f"{field}{given}{': ' if field else ''}{message}."


def field_of(data: Any, location: Sequence[int | str]) -> tuple[str, Any]:
    """Return where pydantic found a problem, as a dotted field, and the value there."""
    parts, node = [], data
    for part in location:
        # Within a choice of sections pydantic names the kind as well, which is no field.
        if isinstance(node, dict) and part not in node and part == node.get("kind"):
            continue
        parts.append(str(part))
        node = node.get(part) if isinstance(node, dict) else None
    return ".".join(parts), node


def suggestion(word: str, known: Iterable[str]) -> str:
    """Return "; did you mean ...?" where a known word is near, else nothing."""
    close = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {close[0]}?" if close else ""


def _fields(section: type[Section]) -> list[str]:
    found = set(section.model_fields)
    for kind in section.__subclasses__():
        found.update(_fields(kind))
    return sorted(found)
