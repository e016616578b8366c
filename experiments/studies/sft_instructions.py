"""Averages beside the fine-tuning of a 260K-parameter story model on instructions; claims as in ``sft_averages.py``."""

from __future__ import annotations

import gzip
import random
from pathlib import Path

from experiments.shared.bench import Bench
from experiments.shared.fine_tuning import fine_tuning


def instructions(source: Path) -> list[str]:
    """Pairs of instruction and output in random order."""
    with gzip.open(source, "rt", encoding="utf-8") as file:
        rows = [line.rstrip("\n") for line in file]
    random.Random(0).shuffle(rows)
    return rows


if __name__ == "__main__":
    bench = Bench("sft-averages-instructions", __file__)
    fine_tuning(
        bench,
        "bema-sft-small",
        instructions(bench.data / "instruct" / "dolly_open_qa.jsonl.gz"),
        {"data.max_length": "96"},
        96,
        (60, 110),
        "Averages beside fine-tuning on instructions",
        "stories260K (260K parameters) on dolly's open_qa, 300 steps of 8 conversations of at most 96 tokens, "
        "AdamW 1e-3; loss of the replies in 60 validation and 110 test conversations",
    )
