"""What the studies share: their arguments, the product's commands, and the file that holds the results."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lagless.checkpoints import atomic_file
from lagless.lab.environment import commit, machine
from lagless.lab.recipes import parse_override
from lagless.lab.report import Study, save_study
from lagless.lab.sweep import Cell, parse_grid, sweep_cells

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "experiments" / "results"
SEEDS = (0, 1, 2, 3, 4)


class Bench:
    """Where a study runs, and what it has run so far.

    Attributes:
        data: folder of the data that the study reads.
        work: folder of its runs; what is finished there is not repeated.
        commands: as they were run, with ``$DATA`` and ``$WORK`` for the folders.
    """

    def __init__(self, name: str, script: str) -> None:
        parser = argparse.ArgumentParser(description=sys.modules["__main__"].__doc__)
        parser.add_argument("--data", type=Path, default=os.environ.get("DATA"), help="folder of data; or $DATA")
        parser.add_argument(
            "--work", type=Path, default=os.environ.get("WORK", "work"), help="folder of runs; or $WORK"
        )
        given = parser.parse_args()
        if given.data is None:
            parser.error("give --data FOLDER, or set DATA; experiments/README.md says what it holds")
        self.name, self.data, self.work = name, Path(given.data).resolve(), Path(given.work).resolve() / name
        self.work.mkdir(parents=True, exist_ok=True)
        self.commands = [f"python -m experiments.studies.{Path(script).stem} --data $DATA --work $WORK"]

    def lagless(self, *arguments: str, made: Path | None = None) -> float:
        """Run a command of the product, and remember it; the seconds that it took.

        Args:
            arguments: of the command.
            made: a file that it writes; a command whose file is there is not run again.
        """

        def run() -> float:
            print(self.commands[-1], flush=True)
            begun = time.monotonic()
            subprocess.run([sys.executable, "-m", "lagless", *arguments], cwd=ROOT, check=True)
            return time.monotonic() - begun

        self.commands.append(self.shown("lagless", *arguments))
        return run() if made is None else once(made.with_suffix(".seconds"), run)

    def sweep(
        self,
        recipe: str,
        folder: str,
        changes: Mapping[str, str],
        grid: Mapping[str, Sequence[str]] | None = None,
        seeds: Sequence[int] = SEEDS,
    ) -> list[Cell]:
        """Train what is missing of a sweep by ``lagless sweep``; its finished runs.

        Args:
            recipe: a name, or a file relative to the repository.
            folder: in ``work``.
            changes: dotted field → value as ``--set`` takes it, for all runs.
            grid: dotted field → values; by default that of the recipe.
            seeds: of every combination.
        """
        sets = [f"{field}={value}" for field, value in changes.items()]
        grids = [f"{field}={','.join(values)}" for field, values in (grid or {}).items()]
        arguments = ["sweep", recipe, "--out", str(self.work / folder), "--seeds", ",".join(map(str, seeds))]
        for option, values in (("--set", sets), ("--grid", grids)):
            arguments += [part for value in values for part in (option, value)]
        self.lagless(*arguments)
        name = ROOT / recipe if recipe.endswith(".yaml") else recipe
        overrides = dict(parse_override(change) for change in sets)
        return sweep_cells(name, self.work / folder, overrides, parse_grid(grids) or None, seeds)

    def shown(self, *arguments: str) -> str:
        """A command with ``$DATA`` and ``$WORK`` in place of the folders."""
        text = shlex.join(arguments)
        return text.replace(str(self.work.parent), "$WORK").replace(str(self.data), "$DATA")

    def save(self, seconds: float, **parts: Any) -> None:
        """Write the study into ``experiments/results``."""
        study = Study(
            name=self.name, commands=self.commands, commit=commit(), machine=machine(), seconds=seconds, **parts
        )
        RESULTS.mkdir(exist_ok=True)
        save_study(study, RESULTS / f"{self.name}.json")
        print(f"written to {RESULTS / self.name}.json", flush=True)


def seconds_of(cells: Sequence[Cell]) -> float:
    """Training time of finished runs."""
    return sum((cell.result or {})["seconds"] for cell in cells)


def once(path: Path, compute: Callable[[], Any]) -> Any:
    """The JSON in ``path``; computed and written there if it is missing."""
    if not path.is_file():
        store(path, compute())
    return json.loads(path.read_text(encoding="utf-8"))


def store(path: Path, content: Any) -> None:
    """Write JSON, complete or not at all."""
    with atomic_file(path) as partial:
        partial.write_text(json.dumps(content), encoding="utf-8")
