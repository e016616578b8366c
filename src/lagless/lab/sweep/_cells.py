"""The runs of a sweep: one cell per combination of values and seed, with a folder and a recipe each."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lagless.lab.recipes import Recipe, load_recipe, parse_value
from lagless.lab.training import check_run, read_result


@dataclass(frozen=True)
class Cell:
    """One run of a sweep.

    Attributes:
        values: dotted field → value, as text.
        seed: of the run.
        folder: of the run.
        recipe: of the run.
    """

    values: dict[str, str]
    seed: int
    folder: Path
    recipe: Recipe

    @property
    def result(self) -> dict[str, Any] | None:
        """What the run left; None before it is finished."""
        return read_result(self.folder)

    @property
    def loss(self) -> float | None:
        """The final held-out loss of the weights that the method returns; infinite if it is not finite."""
        result = self.result
        if result is None:
            return None
        loss = result["final"][self.recipe.method.returned]["loss"]
        return math.inf if loss is None else loss


def sweep_cells(
    name: str | Path,
    out: Path,
    overrides: Mapping[str, Any] | None = None,
    grid: Mapping[str, Sequence[Any]] | None = None,
    seeds: Sequence[int] | None = None,
) -> list[Cell]:
    """The runs of a sweep.

    Args:
        name: of the recipe.
        out: folder of the sweep; each run gets one in it.
        overrides: dotted field → value, for all runs.
        grid: dotted field → values; None for that of the recipe's sweep section.
        seeds: None for those of the recipe's sweep section.

    Raises:
        ValueError: if a combination is no valid recipe, two are the same run, or there is nothing to compare.
    """
    base = overrides or {}
    # A recipe may leave fields open that the grid fills in.
    first = {field: _value(values[0]) for field, values in (grid or {}).items() if values}
    section = load_recipe(name, {**base, **first}).sweep
    grid = section.grid if grid is None and section else grid or {}
    seeds = section.seeds if seeds is None and section else seeds or [0]
    if not grid and len(seeds) < 2:
        raise ValueError(f"sweep of {name}: nothing to compare. Give --grid FIELD=VALUE,VALUE,... or several --seeds.")
    if empty := [field for field, values in grid.items() if not values]:
        raise ValueError(f"--grid {empty[0]}: has no values.")
    texts = [[_text(value) for value in values] for values in grid.values()]
    cells = []
    for chosen, seed in itertools.product(itertools.product(*texts), seeds):
        values = dict(zip(grid, chosen, strict=True))
        recipe = load_recipe(name, {**base, **{field: parse_value(text) for field, text in values.items()}})
        cells.append(Cell(values, seed, out / _folder_name(values, seed), recipe.resolved(seed)))
    _refuse_repetitions(name, cells)
    return cells


def check_cells(cells: Iterable[Cell]) -> dict[Path, ValueError]:
    """Return by folder what keeps a run from beginning, as :func:`lagless.lab.training.check_run` finds it."""
    found = {}
    for cell in cells:
        try:
            check_run(cell.recipe, cell.folder)
        except ValueError as error:
            found[cell.folder] = error
    return found


def _refuse_repetitions(name: str | Path, cells: Iterable[Cell]) -> None:
    seen: dict[tuple[str, int], Cell] = {}
    for cell in cells:
        first = seen.setdefault((cell.recipe.digest(), cell.seed), cell)
        if first is not cell:
            raise ValueError(
                f"sweep of {name}: {first.folder.name} and {cell.folder.name} are the same run. Give every value and "
                "every seed once."
            )


def parse_grid(texts: Iterable[str]) -> dict[str, list[Any]]:
    """``FIELD=VALUE,VALUE`` as the command line has it; commas inside brackets belong to a value.

    >>> parse_grid(["training.learning_rate=1e-3,3e-3", "method.schedule={kind: constant},{kind: wsd, decay: 0.1}"])
    {'training.learning_rate': ['1e-3', '3e-3'], 'method.schedule': ['{kind: constant}', '{kind: wsd, decay: 0.1}']}

    Raises:
        ValueError: if there is no ``=``.
    """
    grid: dict[str, list[Any]] = {}
    for text in texts:
        field, equals, values = text.partition("=")
        if not equals or not field.strip():
            raise ValueError(f"--grid {text}: write FIELD=VALUE,VALUE,..., e.g. training.learning_rate=1e-3,3e-3.")
        parts, depth, start = [], 0, 0
        for position, character in enumerate(values):
            depth += (character in "{[") - (character in "}]")
            if character == "," and depth == 0:
                parts.append(values[start:position])
                start = position + 1
        grid[field.strip()] = [part.strip() for part in (*parts, values[start:]) if part.strip()]
    return grid


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _value(value: Any) -> Any:
    return parse_value(_text(value))


def _folder_name(values: Mapping[str, str], seed: int) -> str:
    name = ",".join([*(f"{field}={text}" for field, text in values.items()), f"seed={seed}"])
    safe = re.sub(r"[^\w.,=+-]+", "_", name)
    if safe == name and len(name) <= 200:
        return name
    return f"{safe[:150]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
