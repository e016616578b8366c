"""Averages beside the fine-tuning of a 260K-parameter story model, on plays and on instructions.

Claims: ``paper_claims`` in ``_averages.py``, those of the BEMA paper on losses. Settings are chosen on validation
sequences, the same number for each rule, and compared on test sequences, paired over 5 seeds. Both learning-rate
schedules have the same peak, which is not tuned.
"""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path

from _averages import averages_study, paper_claims, paper_figures, split
from _collect import SEEDS, Bench, seconds_of

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


def plays(source: Path) -> list[str]:
    """Passages of a text in random order, so that what is held out is from every play."""
    text = source.read_text(encoding="utf-8")
    passages = [text[i : i + PASSAGE] for i in range(0, len(text), PASSAGE)]
    random.Random(0).shuffle(passages)
    return [json.dumps({"text": passage}) for passage in passages]


def instructions(source: Path) -> list[str]:
    """Pairs of instruction and output in random order."""
    with gzip.open(source, "rt", encoding="utf-8") as file:
        rows = [line.rstrip("\n") for line in file]
    random.Random(0).shuffle(rows)
    return rows


def main() -> None:
    """Run what is missing, then write both studies."""
    for name, title, recipe, rows, changes, length, scale in (
        (
            "sft-averages-text",
            "Averages beside fine-tuning on plays",
            "experiments/studies/text.yaml",
            lambda data: plays(data / "corpus" / "tinyshakespeare.txt"),
            {},
            64,
            "stories260K (260K parameters) on tinyshakespeare, 300 steps of 8 sequences of 64 tokens (a third of "
            "the training passages), AdamW 1e-3; 40 validation and 160 test sequences",
        ),
        (
            "sft-averages-instructions",
            "Averages beside fine-tuning on instructions",
            "bema-sft-small",
            lambda data: instructions(data / "instruct" / "dolly_open_qa.jsonl.gz"),
            {"data.max_length": "96"},
            96,
            "stories260K (260K parameters) on dolly's open_qa, 300 steps of 8 conversations of at most 96 tokens, "
            "AdamW 1e-3; loss of the replies in 60 validation and 120 test conversations",
        ),
    ):
        bench = Bench(name, __file__)
        files = split(rows(bench.data), bench.work)
        model = str(bench.data / "model" / "stories260K" / "hf")
        common = {"model.path": model, "data.path": str(files["train"]), "data.validation_path": str(files["valid"])}
        cells = bench.sweep(
            recipe, "runs", common | COMMON | changes, {"method.schedule": list(SCHEDULES.values())}, SEEDS
        )
        named = {text: schedule for schedule, text in SCHEDULES.items()}
        by_schedule = [(named[cell.values["method.schedule"]], cell) for cell in cells]
        claims = paper_claims(PHIS[0], "linear")
        valid, test = (40, 160) if name == "sft-averages-text" else (60, 120)
        runs = averages_study(
            by_schedule,
            METHODS,
            PHIS,
            claims,
            (str(files["valid"]), valid),
            (str(files["test"]), test),
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


if __name__ == "__main__":
    main()
