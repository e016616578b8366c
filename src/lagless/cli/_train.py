"""``lagless train``, ``lagless sweep`` and ``lagless recipes``."""

from __future__ import annotations

import importlib.util
import math
import sys
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from lagless.cli._console import out

if TYPE_CHECKING:
    from lagless.lab.sweep import Cell

_NEEDED = {
    "recipes": ("pydantic", "yaml"),
    "train": ("pydantic", "yaml", "datasets", "transformers", "accelerate", "trl"),
    "sweep": ("pydantic", "yaml", "datasets", "transformers", "accelerate", "trl", "optuna", "scipy"),
}

RecipeName = Annotated[str, typer.Argument(metavar="RECIPE", help="A name of `lagless recipes`, or a YAML file.")]
Changes = Annotated[
    list[str], typer.Option("--set", metavar="FIELD=VALUE", help="Change a field of the recipe; may be repeated.")
]


def _require(command: str) -> None:
    if missing := [name for name in _NEEDED[command] if importlib.util.find_spec(name) is None]:
        raise ImportError(f"lagless {command} needs {', '.join(missing)}: pip install 'lagless[lab]'")


def _say(line: str) -> None:
    out.print(line, highlight=False, markup=False)


def _no_bars_in_files() -> None:
    if not sys.stderr.isatty():
        import datasets
        from transformers.utils import logging

        datasets.disable_progress_bars()
        logging.disable_progress_bar()


def recipes(
    name: Annotated[str | None, typer.Argument(metavar="[RECIPE]", help="Print this one, with every field.")] = None,
    changes: Changes = [],  # noqa: B006 (typer copies it)
) -> None:
    """List the recipes, or print one as YAML with what every field means; the output is a recipe file itself."""
    _require("recipes")
    from lagless.lab.recipes import describe, load_recipe, open_fields, recipe_names, summary

    if name is not None:
        opened = [f"{field}=FILL IN" for field in open_fields(name)]
        print(describe(load_recipe(name, [*opened, *changes])), end="")
        return
    table = Table(box=None, pad_edge=False)
    table.add_column("recipe", no_wrap=True)
    table.add_column("what it trains")
    for each in recipe_names():
        table.add_row(each, summary(each))
    out.print(table)


def train(
    recipe: RecipeName,
    output: Annotated[Path | None, typer.Option("--out", "-o", metavar="OUT", help="Folder of the run.")] = None,
    changes: Changes = [],  # noqa: B006
    seed: Annotated[int | None, typer.Option(help="In place of the recipe's.")] = None,
    dry_run: Annotated[
        bool, typer.Option(help="Load everything, make one step and one evaluation, estimate the rest; write nothing.")
    ] = False,
) -> None:
    """Train by a recipe. Called again with the same OUT it goes on where it stopped; a finished run is not repeated.

    Several GPUs or nodes: torchrun --nproc-per-node N -m lagless train ..., or accelerate launch -m lagless train ...
    """
    _require("train")
    _no_bars_in_files()
    from lagless.lab import training
    from lagless.lab.recipes import load_recipe

    loaded = load_recipe(recipe, changes)
    if dry_run:
        for line in training.dry_run(loaded, seed).lines():
            _say(line)
        return
    if output is None:
        raise ValueError("--out is missing: give a folder for the run, or --dry-run.")
    result = training.train(loaded, output, seed, notify=_say)
    for weights, metrics in result.get("final", {}).items():
        _say(f"{weights}: " + ", ".join(f"{metric} {value}" for metric, value in metrics.items()))


def sweep(
    recipe: RecipeName,
    output: Annotated[Path, typer.Option("--out", "-o", metavar="OUT", help="Folder; one folder in it for each run.")],
    grid: Annotated[
        list[str],
        typer.Option(metavar="FIELD=VALUE,...", help="Values to compare; repeat for a product. Default: the recipe's."),
    ] = [],  # noqa: B006
    seeds: Annotated[str | None, typer.Option(help="Seeds, e.g. 0,1,2. Default: the recipe's.")] = None,
    changes: Changes = [],  # noqa: B006
    storage: Annotated[
        str | None, typer.Option(help="Optuna's database, shared by all processes. Default: sqlite in OUT.")
    ] = None,
    list_only: Annotated[
        bool, typer.Option("--list", help="List the runs and check that each could begin; train nothing.")
    ] = False,
) -> None:
    """Train every combination of values and seeds. Called again it does what is missing; several processes share it."""
    _require("sweep")
    _no_bars_in_files()
    from lagless.lab import sweep as engine
    from lagless.lab.recipes import parse_override

    overrides = dict(parse_override(change) for change in changes)
    cells = engine.sweep_cells(recipe, output, overrides, engine.parse_grid(grid) or None, _integers(seeds))
    if list_only:
        out.print(_table(cells))
        if refused := engine.check_cells(cells):
            raise ValueError(
                f"{len(refused)} of {len(cells)} runs could not begin:\n"
                + "\n".join(f"  {folder.name}: {error}" for folder, error in refused.items())
            )
        return
    output.mkdir(parents=True, exist_ok=True)
    failed = engine.sweep(cells, storage or f"sqlite:///{output / 'sweep.db'}", notify=_say)
    out.print(_table(cells))
    if failed:
        raise ValueError(
            f"{len(failed)} of {len(cells)} runs failed; call the sweep again to retry them:\n"
            + "\n".join(f"  {folder.name}: {error}" for folder, error in failed.items())
        )


def _table(cells: list[Cell]) -> Table:
    """Mean loss over seeds for every combination, best first."""
    from lagless.lab.statistics import mean

    losses: dict[tuple[str, ...], list[float | None]] = defaultdict(list)
    for cell in cells:
        losses[tuple(cell.values.values())].append(cell.loss)
    table = Table(box=None, pad_edge=False)
    for column in (*cells[0].values, "held-out loss", "finished"):
        table.add_column(column)

    def order(values: tuple[str, ...]) -> float:
        done = [loss for loss in losses[values] if loss is not None]
        return sum(done) / len(done) if done else math.inf

    for values in sorted(losses, key=order):
        done = [loss for loss in losses[values] if loss is not None]
        finite = [loss for loss in done if math.isfinite(loss)]
        diverged = f", {len(done) - len(finite)} diverged" if len(finite) < len(done) else ""
        table.add_row(
            *values, f"{mean(finite)}{diverged}" if finite else diverged[2:], f"{len(done)}/{len(losses[values])}"
        )
    return table


def _integers(text: str | None) -> list[int] | None:
    if text is None:
        return None
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"--seeds {text}: write integers with commas between them, e.g. 0,1,2.") from None
