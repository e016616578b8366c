"""The study of averages beside pretraining on books, for a given length and size of the model."""

from __future__ import annotations

from collections.abc import Mapping

from experiments.shared.averages_grid import averages_study, paper_claims, paper_figures
from experiments.shared.bench import SEEDS, Bench, seconds_of
from experiments.shared.passages import prepare

SAVE, PHIS = 10, (10, 30)
WARMUP = 20
SCHEDULES = {kind: f"{{kind: {kind}, warmup_steps: {WARMUP}}}" for kind in ("constant", "cosine")}
METHODS = {"constant": ("ema", "bema", "ouema", "dema"), "cosine": ("bema",)}
COMMON = {
    "method.optimizer": "{kind: adamw}",
    "method.returned": "live",
    "data.sequence_length": "64",
    "training.batch_size": "8",
    "training.micro_batch_size": "8",
    "training.evaluation_batch_size": "8",
    "training.save_every": str(SAVE),
    "evaluation.sequences": "40",
}


def pretraining(bench: Bench, steps: int, changes: Mapping[str, str], title: str, size: str) -> None:
    """Run what is missing, then write the study.

    Args:
        bench: of the study.
        steps: of training.
        changes: of the recipe.
        title: of the study.
        size: of the model.
    """
    files = prepare(bench.data, bench.work / "passages")
    length = {"training.max_steps": str(steps), "evaluation.every": str(steps)}
    cells = bench.sweep(
        "pace-pretrain-small",
        "runs",
        files | COMMON | length | dict(changes),
        {"method.schedule": list(SCHEDULES.values())},
        SEEDS,
    )
    named = {text: schedule for schedule, text in SCHEDULES.items()}
    claims = paper_claims(PHIS[0], "cosine")
    runs = averages_study(
        [(named[cell.values["method.schedule"]], cell) for cell in cells],
        METHODS,
        PHIS,
        claims,
        (files["data.validation_path"], 40),
        (str(bench.work / "passages" / "test.jsonl.gz"), 160),
        64,
        30,
    )
    bench.save(
        seconds_of(cells),
        title=title,
        question="Do averages beat the live weights in pretraining, and do they do what decay of the rate does?",
        scale=f"Llama of {size} parameters on passages of 249 books, {steps} steps of 8 sequences of 64 tokens, AdamW "
        f"2e-3 after {WARMUP} steps of warm-up; 40 validation and 160 test sequences from 10 other books",
        claims=claims,
        figures=paper_figures(),
        runs=runs,
        notes=[
            "The paper's claims are about fine-tuning; here they are put to pretraining.",
            "Averages of one run share its data order and weights; seeds are runs of their own.",
            "Both schedules have the same peak learning rate, which was not tuned for either.",
        ],
    )
