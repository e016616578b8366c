"""Train the cells of a sweep, handed out by Optuna to any number of processes."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import optuna
from optuna.samplers import GridSampler

from lagless.lab.sweep._cells import Cell
from lagless.lab.training import FolderInUse, train

_SEED = "seed"


def sweep(
    cells: Sequence[Cell], storage: str, notify: Callable[[str], None] = lambda line: None
) -> dict[Path, Exception]:
    """Train every cell that is not finished.

    Any number of processes, on any number of machines that share the folder and the storage, may do so at the same
    time. A sweep that was stopped goes on when it is called again: finished cells are known by their ``result.json``,
    and interrupted ones go on from their latest checkpoint.

    Args:
        cells: of :func:`sweep_cells`.
        storage: database of Optuna, such as ``sqlite:///sweep.db``.
        notify: called with a line of text now and then.

    Returns:
        Folder → error, for cells that failed; the others are trained nevertheless.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    by_parameters = {_parameters(cell): cell for cell in cells}
    fields = list(cells[0].values)
    space = {field: sorted({cell.values[field] for cell in cells}) for field in fields}
    space[_SEED] = sorted({str(cell.seed) for cell in cells})
    failed: dict[Path, Exception] = {}
    elsewhere: set[Path] = set()

    def objective(trial: optuna.Trial) -> float:
        chosen = tuple(trial.suggest_categorical(field, space[field]) for field in (*fields, _SEED))
        cell = by_parameters[chosen]
        if cell.loss is None and cell.folder not in failed:
            notify(f"{cell.folder.name} ({sum(c.loss is not None for c in cells)} of {len(cells)} finished)")
            try:
                train(cell.recipe, cell.folder, notify=notify)
            except FolderInUse as error:
                elsewhere.add(cell.folder)
                raise optuna.TrialPruned from error
            except (ValueError, RuntimeError, OSError, ImportError) as error:
                failed[cell.folder] = error
                notify(f"{cell.folder.name} failed: {error}")
                raise optuna.TrialPruned from error
        loss = cell.loss
        assert loss is not None
        return loss

    # A study visits each cell once; what fails or is interrupted in it is for the next one.
    name = hashlib.sha256(json.dumps([sorted(space.items()), cells[0].recipe.name]).encode()).hexdigest()[:12]
    for attempt in itertools.count(1):
        if all(cell.loss is not None or cell.folder in failed or cell.folder in elsewhere for cell in cells):
            return failed
        sampler = GridSampler(space)
        study = optuna.create_study(
            study_name=f"{name}-{attempt}", storage=storage, sampler=sampler, load_if_exists=True
        )
        if not sampler.is_exhausted(study):
            study.optimize(objective)
    raise AssertionError("unreachable")


def _parameters(cell: Cell) -> tuple[str, ...]:
    return (*cell.values.values(), str(cell.seed))
