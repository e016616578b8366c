"""Two stages, the same for every method: settings are chosen on tuning seeds, and reported on fresh ones.

A pattern search on the first tuning seed tries up to ``BUDGET`` settings of a method; its best ``FINALISTS`` run on the
second tuning seed too, and the one with the best mean validation loss runs on the reporting seeds. Every run is a cell
of a ``lagless sweep``, called in this process to save the start of another.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

from experiments.shared.bench import Bench, once, seconds_of
from experiments.shared.passages import prepare
from transformers import AutoModelForCausalLM, AutoTokenizer

from lagless.lab.evaluation import Sequences, held_out_sequences, sequence_losses
from lagless.lab.report import Run
from lagless.lab.sweep import Cell, sweep, sweep_cells

BUDGET, FINALISTS = 12, 2
TUNING_SEEDS, REPORTING_SEEDS = (100, 101), (0, 1, 2, 3, 4)

TEST_SEQUENCES = 1000

Position = tuple[int, ...]
Hyperparameters = dict[str, float]


@dataclass(frozen=True)
class Axis:
    """A hyperparameter on a grid without ends.

    Attributes:
        name: in the study.
        field: in the recipe.
        value: grid point → value; None where there is none.
        text: value → what the recipe gets.
    """

    name: str
    field: str
    value: Callable[[int], float | None]
    text: Callable[[float], str] = "{:.4g}".format


def factors(start: float, base: float) -> Callable[[int], float | None]:
    """start · base^(i/4)."""
    return lambda i: start * base ** (i / 4)


def steps(start: float, step: float, low: float, high: float) -> Callable[[int], float | None]:
    """start + i step/4, within [low, high]."""
    return lambda i: value if low - 1e-9 <= (value := round(start + i * step / 4, 6)) <= high + 1e-9 else None


def pattern_search(axes: Sequence[Axis], loss: Callable[[Position], float], budget: int) -> dict[Position, float]:
    """Grid points that were tried, with their losses.

    From point 0, one axis at a time, it goes on in a direction for as long as the loss falls; where no neighbour is
    better, steps of 4 grid points become 2, then 1. It ends when no neighbour is better or the budget is spent.
    """
    tried: dict[Position, float] = {}

    def new_best(position: Position, best: Position) -> bool:
        if position not in tried and len(tried) < budget:
            if any(axis.value(i) is None for axis, i in zip(axes, position, strict=True)):
                return False
            tried[position] = loss(position)
        return tried.get(position, float("inf")) < tried[best]

    best = (0,) * len(axes)
    tried[best] = loss(best)
    stride = 4
    while stride and len(tried) < budget:
        before = best
        for axis in range(len(axes)):
            for sign in (stride, -stride):
                moved = False
                while new_best(next_ := (*best[:axis], best[axis] + sign, *best[axis + 1 :]), best):
                    best, moved = next_, True
                if moved:
                    break
        if best == before:
            stride //= 2
    return tried


@dataclass(frozen=True)
class HeldOut:
    """Text that nothing is chosen by.

    Attributes:
        data: its file.
        tokenizer: the folder of one.
        count: sequences of it; None for all.
    """

    data: str
    tokenizer: str
    count: int | None


def on_books(bench: Bench, common: Mapping[str, Any]) -> tuple[dict[str, Any], HeldOut]:
    """Fields of a recipe with those that name the books, and held-out books."""
    place = bench.work.parent / "passages"
    fields = prepare(bench.data, place)
    test = HeldOut(str(place / "test.jsonl.gz"), fields["model.tokenizer"], TEST_SEQUENCES)
    if "model" in common:  # one that exists has its own tokenizer
        del fields["model.tokenizer"]
    return {**common, **fields}, test


class Trials:
    """Runs of one recipe.

    Args:
        bench: of the study.
        recipe: its name.
        common: fields that are changed for all runs.
        test: what is reported.

    Attributes:
        cells: finished runs by folder.
    """

    def __init__(self, bench: Bench, recipe: str, common: Mapping[str, Any], test: HeldOut) -> None:
        self.bench, self.recipe, self.common, self.test = bench, recipe, common, test
        self.cells: dict[Path, Cell] = {}

    def run(
        self, folder: str, changes: Mapping[str, Any], setting: Mapping[str, str], seeds: Sequence[int]
    ) -> list[Cell]:
        """The finished runs of one setting."""
        place = self.bench.work / folder
        place.mkdir(parents=True, exist_ok=True)
        grid = {field: [value] for field, value in setting.items()}
        cells = sweep_cells(self.recipe, place, {**self.common, **changes}, grid, seeds)
        for error in sweep(cells, f"sqlite:///{place / 'sweep.db'}").values():
            raise error
        for cell in cells:
            self.cells[cell.folder] = cell
            print(f"{folder}: {dict(setting)}, seed {cell.seed}: {cell.loss:.4f}", flush=True)
        return cells

    def command(self, folder: str, changes: Mapping[str, Any], setting: Mapping[str, str], seeds: Sequence[int]) -> str:
        """What does the same from a shell."""
        sets = [f"{field}={_text(value)}" for field, value in {**self.common, **changes}.items()]
        arguments = ["lagless", "sweep", self.recipe, "--out", str(self.bench.work / folder)]
        arguments += [part for each in sets for part in ("--set", each)]
        arguments += [part for each in setting.items() for part in ("--grid", "=".join(each))]
        shown = self.bench.shown(*arguments, "--seeds", ",".join(map(str, seeds)))
        return shown.replace(str(self.bench.work.parent), "$WORK")  # the passages

    @property
    def seconds(self) -> float:
        """Training time of all runs."""
        return seconds_of(list(self.cells.values()))

    @cached_property
    def _test(self) -> Sequences:
        tokenizer = AutoTokenizer.from_pretrained(self.test.tokenizer)
        length = self.common["data.sequence_length"]
        return held_out_sequences(self.test.data, tokenizer, length=length, count=self.test.count)

    def test_loss(self, cell: Cell, weights: str) -> float:
        """Nats per token of a run's weights on held-out text that nothing was chosen by."""

        def compute() -> float:
            steps = cell.recipe.training.max_steps
            folder = f"checkpoint-{steps}" if weights == "live" else f"averaged/{weights}"
            model = AutoModelForCausalLM.from_pretrained(cell.folder / folder, dtype="float32")
            return sequence_losses(model, self._test, batch_size=100).mean.value

        return once(cell.folder / f"test-{weights}.json", compute)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


@dataclass(frozen=True)
class TunedMethod:
    """What is compared.

    Attributes:
        name: in the study.
        changes: to the recipe.
        axes: what is tuned.
        averages: of the recipe's averages, those one of which is returned → what that adds to the setting; every run
            has them all, so that choosing among them costs no run.
        folder: of the runs; the same for methods that return different weights of the same runs.
    """

    name: str
    changes: Mapping[str, Any]
    axes: tuple[Axis, ...]
    averages: Mapping[str, Hyperparameters] = field(default_factory=dict)
    folder: str | None = None

    @property
    def place(self) -> str:
        """Of the runs."""
        return (self.folder or self.name).replace(",", "").replace(" ", "-")

    def settings(self, position: Position) -> tuple[Hyperparameters, dict[str, str]]:
        """A grid point for the study and for the recipe."""
        study, recipe = {}, {}
        for axis, i in zip(self.axes, position, strict=True):
            value = axis.value(i)
            assert value is not None
            study[axis.name], recipe[axis.field] = float(f"{value:.4g}"), axis.text(value)
        return study, recipe

    def losses(self, cell: Cell) -> dict[str, float]:
        """The validation loss of what may be returned."""
        result = cell.result
        assert result is not None
        weights = self.averages or [cell.recipe.method.returned]
        return {name: math.inf if (v := result["final"][name]["loss"]) is None else v for name in weights}

    def run_of(self, cell: Cell, position: Position, weights: str, **more: Any) -> Run:
        """The study's record of weights of a run."""
        loss = self.losses(cell)[weights]
        scores = {"valid/loss": loss, **more.pop("scores", {})} if math.isfinite(loss) else None
        setting = self.settings(position)[0] | self.averages.get(weights, {})
        return Run(method=self.name, setting=dict(setting), seed=cell.seed, scores=scores, **more)


@dataclass(frozen=True)
class Tuned:
    """What a method's search found: the records of its runs, and the choice."""

    runs: list[Run]
    position: Position
    weights: str
    loss: float  # of the choice, the mean over the tuning seeds


Cells = dict[tuple[Position, int], Cell]  # by position and seed


def tune(trials: Trials, method: TunedMethod, budget: int = BUDGET, finalists: int = FINALISTS) -> Tuned:
    """Choose a setting on the tuning seeds by a search."""
    first, second = TUNING_SEEDS
    cells: Cells = {}

    def loss(position: Position) -> float:
        return min(method.losses(_tuning_run(trials, method, cells, position, first)).values())

    tried = pattern_search(method.axes, loss, budget)
    for position in sorted(tried, key=lambda position: tried[position])[:finalists]:
        _tuning_run(trials, method, cells, position, second)
    return _choose(method, cells)


def full_grid(trials: Trials, method: TunedMethod, positions: Iterable[Position]) -> Tuned:
    """Choose among all ``positions``, each on all tuning seeds."""
    cells: Cells = {}
    for position in positions:
        for seed in TUNING_SEEDS:
            _tuning_run(trials, method, cells, position, seed)
    return _choose(method, cells)


def _tuning_run(trials: Trials, method: TunedMethod, cells: Cells, position: Position, seed: int) -> Cell:
    folder = f"{method.place}-tuning"
    [cell] = trials.run(folder, method.changes, method.settings(position)[1], [seed])
    cells[position, seed] = cell
    return cell


def _choose(method: TunedMethod, cells: Cells) -> Tuned:
    """The setting, of those that ran on all tuning seeds, with the best mean."""
    runs, losses = [], {}
    for (position, _), cell in cells.items():
        for weights, loss in method.losses(cell).items():
            runs.append(method.run_of(cell, position, weights, tuning=True))
            losses.setdefault((position, weights), []).append(loss)
    means = {key: fmean(each) for key, each in losses.items() if len(each) == len(TUNING_SEEDS)}
    position, weights = min(means, key=lambda key: means[key])
    return Tuned(runs, position, weights, means[position, weights])


def report(trials: Trials, method: TunedMethod, position: Position, weights: str) -> list[tuple[Cell, Run]]:
    """A setting on the reporting seeds, with the loss on text by which nothing was chosen."""
    changes = {**method.changes, "evaluation.every": trials.common["training.max_steps"] // 2}
    arguments = f"{method.place}-reporting", changes, method.settings(position)[1], REPORTING_SEEDS
    trials.bench.commands.append(trials.command(*arguments))
    found = []
    for cell in trials.run(*arguments):
        scores = {"test/loss": trials.test_loss(cell, weights)}
        curves = {"valid/loss": _curve(cell, weights)}
        found.append((cell, method.run_of(cell, position, weights, scores=scores, curves=curves)))
    return found


def best_of(
    name: str, methods: Mapping[str, Hyperparameters], tuned: Mapping[str, Tuned], reported: Mapping[str, list[Run]]
) -> list[Run]:
    """The runs of a method that contains others as limits, and chooses among all of their settings; no run is new.

    Args:
        name: of the method.
        methods: names of those that it contains → what makes their settings those of this method.
        tuned: what their searches found.
        reported: their runs on the reporting seeds, of which those of the best one are taken.
    """

    def own(runs: Sequence[Run], extra: Hyperparameters) -> list[Run]:
        return [run.model_copy(update={"method": name, "setting": {**run.setting, **extra}}) for run in runs]

    best = min(methods, key=lambda each: tuned[each].loss)
    tuning = [run for each, extra in methods.items() for run in own(tuned[each].runs, extra)]
    return [*tuning, *own(reported[best], methods[best])]


def _curve(cell: Cell, weights: str) -> list[tuple[float, float]]:
    records = map(json.loads, (cell.folder / "metrics.jsonl").read_text().splitlines())
    return [
        (record["step"], round(record["value"], 5))
        for record in records
        if (record["weights"], record["split"], record["metric"]) == (weights, "valid", "loss")
    ]
