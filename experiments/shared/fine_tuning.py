"""The study of averages beside fine-tuning, for given rows of text, and the plays that two studies tune on."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path

from experiments.shared.averages_grid import averages_study, paper_claims, paper_figures, split
from experiments.shared.bench import SEEDS, Bench, seconds_of

STEPS, SAVE, PHIS = 300, 10, (10, 30)
SCHEDULES = {"constant": "{kind: constant}", "linear": "{kind: linear}"}
METHODS = {"constant": ("ema", "bema", "ouema", "dema"), "linear": ("ema", "bema")}
COMMON = {
    "method.averages": "{}",
    "method.returned": "live",
    "training.max_steps": str(STEPS),
    "training.batch_size": "8",
    "training.micro_batch_size": "8",
    "training.save_every": str(SAVE),
    "evaluation.every": str(STEPS),
    "evaluation.sequences": "40",
}
PASSAGE = 1000  # characters


def fine_tuning(
    bench: Bench,
    recipe: str,
    rows: Sequence[str],
    changes: Mapping[str, str],
    length: int,
    counts: tuple[int, int],
    title: str,
    scale: str,
) -> None:
    """Run what is missing of one data set, then write the study.

    Args:
        bench: of the study.
        recipe: of the runs.
        rows: lines of JSON; some are kept for validation and test.
        changes: of the recipe.
        length: tokens of held-out sequences.
        counts: of validation and of test sequences.
        title: of the study.
        scale: of the study.
    """
    files = split(rows, bench.work)
    model = str(bench.data / "model" / "stories260K" / "hf")
    common = {"model.path": model, "data.path": str(files["train"]), "data.validation_path": str(files["valid"])}
    grid = {"method.schedule": list(SCHEDULES.values())}
    cells = bench.sweep(recipe, "runs", {**common, **COMMON, **changes}, grid, SEEDS)
    named = {text: schedule for schedule, text in SCHEDULES.items()}
    claims = paper_claims(PHIS[0], "linear")
    runs = averages_study(
        [(named[cell.values["method.schedule"]], cell) for cell in cells],
        METHODS,
        PHIS,
        claims,
        (str(files["valid"]), counts[0]),
        (str(files["test"]), counts[1]),
        length,
        30,
    )
    bench.save(
        seconds_of(cells),
        title=title,
        question="Do averages beat the live weights in fine-tuning, and does taking their lag away help?",
        scale=scale,
        claims=claims,
        figures=paper_figures(),
        runs=runs,
        notes=[
            "Averages of one run share its data order and weights; seeds are runs of their own.",
            "Both schedules have the same peak learning rate, which was not tuned for either.",
        ],
    )


def plays(source: Path) -> list[str]:
    """Passages of a text in random order, so that what is held out is from every play."""
    text = source.read_text(encoding="utf-8")
    passages = [text[i : i + PASSAGE] for i in range(0, len(text), PASSAGE)]
    random.Random(0).shuffle(passages)
    return [json.dumps({"text": passage}) for passage in passages]
