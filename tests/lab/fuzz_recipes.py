"""Mutate recipes and studies: each loads, or is refused with one line that names the file.

python -m tests.lab.fuzz_recipes 1000
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from lagless.lab.recipes import load_recipe, open_fields, recipe_names
from lagless.lab.report import load_study, save_study
from lagless.lab.report._study import Claim, Run, Study

SCALARS = ["", "x", 0, -1, 1, 10**30, 0.5, float("nan"), float("inf"), True, None, [], {}, [1], {"a": 1}, "1e-3"]
SCALARS.append("\u2028")
BYTES = [b"\xff\xfe", b"\x00", b"\xed\xa0\x80", b"{", b"[", b"]", b"}", b": ", b"- ", b"&a ", b"*a", b"!!int ", b"!!"]
BYTES += [b"\t", b"'", b"9", b"true", b"1e999", b"\xe2\x80\xa8"]


def study() -> Study:
    """Return a small study with every kind of field in use."""
    runs = [Run(method=m, setting={"lr": 0.1}, seed=s, scores={"test/loss": 1.0}) for m in "ab" for s in range(2)]
    claim = Claim(text="a is lower", source="ours", method="a", baseline="b", score="test/loss", claimed=-1)
    return Study(
        name="fuzzed", title="t", question="q", scale="s", claims=[claim], runs=runs, commands=["none"], commit=None,
        machine={"cores": 2}, seconds=1.0,
    )  # fmt: skip


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the paths of all values in nested lists and dictionaries."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(p for key, child in inner for p in places(child, (*path, key)))]


def at(value: Any, path: tuple[Any, ...]) -> Any:
    """Return what is at a path."""
    for key in path:
        value = value[key]
    return value


def change_values(data: Any, draw: random.Random) -> Any:
    """Change, rename, remove, add, move or bury a few values."""
    for _ in range(draw.randint(1, 3)):
        path = draw.choice(places(data)[1:] or [()])
        if not path:
            return draw.choice(SCALARS)
        holder, key = at(data, path[:-1]), path[-1]
        action = draw.randrange(6)
        if action == 0:
            holder[key] = draw.choice(SCALARS)
        elif action == 1 and isinstance(holder, dict):
            holder[str(key)[:-1] + draw.choice("abz")] = holder.pop(key)
        elif action == 2:
            del holder[key]
        elif action == 3 and isinstance(holder, dict):
            holder[draw.choice([1, None, "extends", "kind", "rule", "x" * 3000])] = draw.choice(SCALARS)
        elif action == 4:
            holder[key] = json.loads(json.dumps(at(data, draw.choice(places(data)))))
        else:
            for _ in range(draw.choice([1, 20, 50])):
                holder[key] = [holder[key]] if draw.random() < 0.5 else {"a": holder[key]}
    return data


def change_bytes(content: bytes, draw: random.Random) -> bytes:
    """Cut, repeat, replace or insert bytes."""
    for _ in range(draw.randint(1, 4)):
        start = draw.randrange(len(content) + 1)
        stop = min(len(content), start + draw.choice([0, 1, 5, 50]))
        new = draw.choice([b"", draw.choice(BYTES), draw.choice(BYTES) * 2000, content[start:stop] * 2])
        content = content[:start] + new + content[stop:]
    return content


def outcome(load: Callable[[Path], object], path: Path) -> str:
    """Return "loaded" or "refused"; anything else is a fault of lagless and raises AssertionError."""
    try:
        load(path)
    except (ValueError, OSError) as error:
        assert path.name in str(error), f"does not name the file: {error!r}"
        assert "\n" not in str(error), f"more than one line: {error}"
        return "refused"
    except Exception as error:
        raise AssertionError(f"raw {type(error).__name__}: {error}") from error
    return "loaded"


def fuzz(count: int, seed: int, folder: Path) -> dict[str, int]:
    """Try ``count`` mutations, half of recipes and half of studies; returns how many of each loaded or were refused."""
    save_study(study(), folder / "study.json")
    studies = (folder / "study.json").read_bytes()
    recipes = {
        name: load_recipe(name, {field: "x" for field in open_fields(name)}).model_dump(mode="json")
        for name in recipe_names()
    }
    found: dict[str, int] = {}
    for number in range(count):
        draw = random.Random(f"{seed} {number}")
        kind = ("recipe", "study")[number % 2]
        path = folder / f"mutation.{'yaml' if kind == 'recipe' else 'json'}"
        data = json.loads(json.dumps(recipes[draw.choice(list(recipes))])) if kind == "recipe" else json.loads(studies)
        write = (lambda d: yaml.safe_dump(d, allow_unicode=True)) if kind == "recipe" else json.dumps
        if draw.random() < 0.5:
            data = change_values(data, draw)
        content = write(data).encode("utf-8", "surrogatepass")
        path.write_bytes(change_bytes(content, draw) if draw.random() < 0.5 else content)
        try:
            result = outcome(load_recipe if kind == "recipe" else load_study, path)
        except AssertionError as error:
            raise AssertionError(f"mutation {number} of seed {seed} ({path}): {error}") from error
        found[f"{kind} {result}"] = found.get(f"{kind} {result}", 0) + 1
    return found


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("count", type=int, nargs="?", default=1000)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for what, number in sorted(fuzz(given.count, given.seed, Path(folder)).items()):
            print(f"{what}: {number}")


if __name__ == "__main__":
    main()
