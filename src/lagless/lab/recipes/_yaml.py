"""YAML as recipes use it: plain values, numbers as in JSON, every key once, and errors instead of surprises."""

from __future__ import annotations

import re
from typing import Any

import yaml

_DEEPEST, _MOST = 50, 100_000


class _Loader(yaml.SafeLoader):
    """YAML whose numbers are those of JSON as well, 1e-3 among them, and in which a key occurs once."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value != "<<":
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        problem=f"{key.value!r} occurs twice", problem_mark=key.start_mark
                    )
                seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def parse_yaml(text: str) -> Any:
    """Return the value that ``text`` describes.

    Raises:
        ValueError: if it is no YAML, too deep or too large for a recipe, or contains itself; saying why and where.
    """
    try:
        value = yaml.load(text, _Loader)
        _measure(value)
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except Exception as error:  # PyYAML's constructors stumble in many ways over values such as !!int "" and 2020-13-45
        raise ValueError(f"a value cannot be understood: {error!r}") from error
    return value


def _measure(value: Any) -> None:
    """Refuse what is too deep or too large; an alias counts wherever it stands, so loops are too deep."""
    level, count = [value], 0
    for _ in range(_DEEPEST):
        inner: list[Any] = []
        for node in level:
            if isinstance(node, dict):
                inner.extend(node.values())
            elif isinstance(node, list | tuple | set):
                inner.extend(node)
            if count + len(inner) > _MOST:
                raise yaml.YAMLError(f"more than {_MOST:,} values")
        if not inner:
            return
        level, count = inner, count + len(inner)
    raise yaml.YAMLError("nested too deeply")
