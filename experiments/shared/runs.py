"""Training runs and the losses of their averages, each made once."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from experiments.shared.averages import Average
from experiments.shared.books import Text
from experiments.shared.cells import array_once, load, once, store
from experiments.shared.environment import environment
from experiments.shared.evaluation import Evaluator
from experiments.shared.training import Setting, load_model, train
from transformers import AutoTokenizer

Averages = Callable[[Sequence[int]], Iterable[Average]]  # from the steps of the stored iterates


class Runs:
    """The runs of a study: finished ones are read, missing ones made.

    Args:
        data: folder of the data.
        work: folder of tokens and iterates.
        results: folder of a JSON file per run.
        model: folder of the initial model.
        averages: the averages to be evaluated.
        parts: from an average to the parts of the held-out text that it is evaluated on.

    Attributes:
        text: what is trained on and evaluated on.
    """

    def __init__(
        self,
        data: Path,
        work: Path,
        results: Path,
        model: Path,
        averages: Averages,
        parts: Callable[[Average], Sequence[str]],
    ) -> None:
        self._model, self._work, self._results = model, work / "runs", results
        self._averages, self._parts = averages, parts
        self.text = Text(data, work, AutoTokenizer.from_pretrained(model))
        self._evaluator: Evaluator | None = None

    def iterates(self, setting: Setting) -> np.ndarray:
        """Return the stored iterates of a run, training it first if they are missing."""
        return array_once(self._work / f"{setting.name}.npy", lambda: self._train(setting))

    def result(self, setting: Setting, averages: Averages | None = None) -> dict[str, Any]:
        """Return the losses of a run's averages, document by document, evaluating them first if they are missing.

        Args:
            setting: of the run.
            averages: for this run, if they are others.
        """
        made = averages or self._averages
        return once(self._results / f"{setting.name}.json", lambda: self._evaluate(setting, made))

    def _train(self, setting: Setting) -> np.ndarray:
        iterates, record = train(load_model(self._model), setting, self.text.training)
        _say(f"{setting.name}: training loss {record['training_loss'][-1]}, {record['cpu_seconds']} s of computing")
        store(self._work / f"{setting.name}.json", {**record, "environment": environment()})
        return iterates

    def _evaluate(self, setting: Setting, averages: Averages) -> dict[str, Any]:
        iterates = self.iterates(setting)
        if self._evaluator is None:
            self._evaluator = Evaluator(load_model(self._model), self.text.parts)
        steps = list(range(0, setting.steps + 1, setting.every))
        begun, found = time.process_time(), {}
        for average in averages(steps):
            weights = (average.weights @ iterates.astype(np.float64)).astype(np.float32)
            losses = self._evaluator.document_losses(weights, self._parts(average))
            found[average.name] = {
                "family": average.family,
                "setting": average.setting,
                **average.summary(steps),
                "tuning": round(float(losses.pop("tuning").mean()), 5),
                **{part: [round(loss, 4) for loss in by_document.tolist()] for part, by_document in losses.items()},
            }
        seconds = round(time.process_time() - begun, 1)
        _say(f"{setting.name}: {len(found)} averages, {seconds} s of computing")
        return {
            "setting": {**asdict(setting), "schedule": setting.schedule},
            "run": load(self._work / f"{setting.name}.json"),
            "averages": found,
            "evaluation": {"cpu_seconds": seconds, "environment": environment()},
        }


def _say(text: str) -> None:
    print(f"{time.strftime('%H:%M')} {text}", flush=True)
