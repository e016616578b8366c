"""Averages at the paper's clock: T = 7,200 steps of stories260K on books; claims and rules in ``paper_clock.md``.

    python -m experiments.studies.paper_clock run --data DATA --work WORK

trains what is missing and evaluates its averages, run by run. It may be stopped at any moment, which costs the run in
progress, and goes on where it was.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from experiments.shared.averages import Average, endpoints, power_rules, scale_free_rules
from experiments.shared.cells import array_once, load, once, store, store_array
from experiments.shared.environment import environment
from experiments.shared.evaluation import Evaluator
from experiments.shared.text import HeldOut, held_out, read_documents, tokens_of
from experiments.shared.training import Setting, load_model, train
from transformers import AutoTokenizer, PreTrainedTokenizerBase

NAME = "paper_clock"
RATES, FINALS, BATCHES, SEEDS = (1e-3, 3e-4, 1e-4), (1.0, 0.0, 0.3), (8, 16), (0, 1, 2, 3, 4)
LENGTH = 128
TUNING_BOOKS, REPORTING_BOOKS = 24, 36
OTHER_DOCUMENTS = 24
WINDOWS = {"tuning": 3, "reporting": 6, "plays": 4, "stories": 4}  # of each document
SHAKESPEARE = "William Shakespeare/"
MOST_OF_A_BOOK = 250_000  # characters that are trained on
SGD_RATES, SGD_TUNING_SEEDS, SGD_TUNING_STEPS = (0.01, 0.03, 0.1, 0.3, 1.0), (100, 101, 102), 1800

WIDELY = ("live", "start", "ema-f", "bema-f", "slow-bema-f", "dema-f", "tail", "sqrt-decay")  # on all parts
PAPERS_DEFAULTS = tuple(
    f"{family} kappa=0.5{eta} phi=400"
    for family, eta in (("ema", ""), ("bema", " eta=0.2"), ("ouema", " eta=0.2"), ("dema", ""))
)
RESULTS = Path(__file__).parents[1] / "results" / NAME


def adamw_settings() -> Iterator[Setting]:
    """Yield the AdamW runs, the most informative first."""
    for batch in BATCHES:
        for seed in SEEDS:
            for final in FINALS:
                for rate in RATES:
                    yield Setting("adamw", rate, final, batch, seed)


def sgd_tuning_settings(rate: float) -> list[Setting]:
    """Return the runs that judge a learning rate of SGD, on seeds of their own."""
    return [Setting("sgd", rate, 1.0, 8, seed, steps=SGD_TUNING_STEPS) for seed in SGD_TUNING_SEEDS]


def sgd_settings(rate: float) -> Iterator[Setting]:
    """Yield the runs of the arm with SGD."""
    for seed in SEEDS:
        for final in (1.0, 0.0):
            yield Setting("sgd", rate, final, 8, seed)


class Text:
    """The corpus in tokens, made once and kept in ``work``.

    Attributes:
        training: one long row of tokens.
        parts: held-out documents by the name of their part.
    """

    def __init__(self, data: Path, work: Path, tokenizer: PreTrainedTokenizerBase) -> None:
        self._data, self._work, self._tokenizer = data / "corpus", work / "tokens", tokenizer
        self.training = array_once(self._work / "training.npy", self._training)
        self.parts = {part: self._held_out(part, count) for part, count in WINDOWS.items()}

    def _books(self) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
        """Training and held-out books with their names; which of the training file are held out is fixed here."""
        training = _named_books(self._data, "train")
        held = _named_books(self._data, "valid")
        long_enough = [i for i, (_, text) in enumerate(training) if len(text) > 20_000]
        drawn = np.random.default_rng(0).choice(long_enough, TUNING_BOOKS + REPORTING_BOOKS - len(held), replace=False)
        held = held + [training[i] for i in sorted(drawn)]
        # tinyshakespeare is held out as a whole, so no play of Shakespeare is trained on.
        rest = [book for i, book in enumerate(training) if i not in drawn and not book[0].startswith(SHAKESPEARE)]
        return rest, held

    def _training(self) -> np.ndarray:
        return np.concatenate([tokens_of(self._tokenizer, text[:MOST_OF_A_BOOK]) for _, text in self._books()[0]])

    def _held_out(self, part: str, count: int) -> HeldOut:
        names = self._work / f"{part}-{count}.json"
        if not names.is_file():
            made = held_out(
                [(name, tokens_of(self._tokenizer, text)) for name, text in self._texts(part)], count, LENGTH
            )
            store_array(self._work / f"{part}-{count}.npy", made.windows)
            store(names, list(made.names))
        return HeldOut(np.load(self._work / f"{part}-{count}.npy"), tuple(load(names)))

    def _texts(self, part: str) -> list[tuple[str, str]]:
        if part in ("tuning", "reporting"):
            held = self._books()[1]
            order = np.random.default_rng(1).permutation(len(held))
            chosen = order[:TUNING_BOOKS] if part == "tuning" else order[TUNING_BOOKS:]
            return [held[i] for i in sorted(chosen)]
        if part == "plays":
            text = (self._data / "tinyshakespeare.txt").read_text(encoding="utf-8")
            size = len(text) // OTHER_DOCUMENTS
            return [(f"characters from {i * size}", text[i * size : (i + 1) * size]) for i in range(OTHER_DOCUMENTS)]
        stories = read_documents(self._data / "tinystories_val.txt.xz")
        size = len(stories) // OTHER_DOCUMENTS
        groups = [stories[i * size : (i + 1) * size] for i in range(OTHER_DOCUMENTS)]
        return [(f"stories from {i * size}", "\n".join(group[:20])) for i, group in enumerate(groups)]


def _named_books(folder: Path, part: str) -> list[tuple[str, str]]:
    lines = (folder / f"classic_books_{part}_index.tsv").read_text(encoding="utf-8").splitlines()[1:]
    texts = read_documents(folder / f"classic_books_{part}.txt.xz")
    if len(lines) != len(texts):
        raise ValueError(f"classic_books_{part}: {len(texts)} books, but {len(lines)} lines in the index.")
    return [(line.split("\t")[1].removesuffix(".md"), text) for line, text in zip(lines, texts, strict=True)]


class Runs:
    """The runs of the study: finished ones are read, missing ones made.

    Attributes:
        text: what is trained on and evaluated on.
    """

    def __init__(self, data: Path, work: Path, model: Path) -> None:
        self._model, self._work = model, work / "runs"
        self.text = Text(data, work, AutoTokenizer.from_pretrained(model))
        self._evaluator: Evaluator | None = None

    def iterates(self, setting: Setting) -> np.ndarray:
        """Return the stored iterates of a run, training it first if they are missing."""
        return array_once(self._work / f"{setting.name}.npy", lambda: self._train(setting))

    def result(self, setting: Setting) -> dict[str, Any]:
        """Return the losses of a run's averages, document by document, evaluating them first if they are missing."""
        return once(RESULTS / "cells" / f"{setting.name}.json", lambda: self._evaluate(setting))

    def _train(self, setting: Setting) -> np.ndarray:
        iterates, record = train(load_model(self._model), setting, self.text.training)
        _say(f"{setting.name}: training loss {record['training_loss'][-1]}, {record['cpu_seconds']} s of computing")
        store(self._work / f"{setting.name}.json", {**record, "environment": environment()})
        return iterates

    def _evaluate(self, setting: Setting) -> dict[str, Any]:
        iterates = self.iterates(setting)
        if self._evaluator is None:
            self._evaluator = Evaluator(load_model(self._model), self.text.parts)
        steps = list(range(0, setting.steps + 1, setting.every))
        begun, found = time.process_time(), {}
        for average in averages(steps):
            weights = (average.weights @ iterates.astype(np.float64)).astype(np.float32)
            parts = list(WINDOWS) if average.family in WIDELY or average.name in PAPERS_DEFAULTS else list(WINDOWS)[:2]
            losses = self._evaluator.document_losses(weights, parts)
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


def averages(steps: Sequence[int]) -> Iterator[Average]:
    """Yield every average of a run."""
    yield from endpoints(steps)
    yield from scale_free_rules(steps)
    yield from power_rules(steps)


def _say(text: str) -> None:
    print(f"{time.strftime('%H:%M')} {text}", flush=True)


def main() -> None:
    """Parse the command line and run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("run",))
    parser.add_argument("--data", type=Path, default=os.environ.get("DATA"), help="folder of data; or $DATA")
    parser.add_argument("--work", type=Path, default=os.environ.get("WORK", "work"), help="folder of runs; or $WORK")
    parser.add_argument("--model", type=Path, help="folder of the model; default DATA/model/stories260K/hf")
    given = parser.parse_args()
    if given.data is None:
        parser.error("give --data FOLDER, or set DATA; experiments/README.md says what it holds")
    data, work = Path(given.data).resolve(), Path(given.work).resolve() / NAME
    torch.set_num_threads(1)
    runs = Runs(data, work, given.model or data / "model" / "stories260K" / "hf")
    for setting in adamw_settings():
        runs.result(setting)


if __name__ == "__main__":
    main()
