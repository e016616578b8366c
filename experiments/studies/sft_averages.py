"""Averages beside the fine-tuning of a 260K-parameter story model on plays.

Claims: ``paper_claims`` in ``averages_grid``, those of the BEMA paper on losses. Settings are chosen on validation
sequences, the same number for each rule, and compared on test sequences, paired over 5 seeds. Both learning-rate
schedules have the same peak, which is not tuned.
"""

from __future__ import annotations

from experiments.shared.bench import Bench
from experiments.shared.fine_tuning import fine_tuning, plays

if __name__ == "__main__":
    bench = Bench("sft-averages-text", __file__)
    fine_tuning(
        bench,
        "experiments/studies/text.yaml",
        plays(bench.data / "corpus" / "tinyshakespeare.txt"),
        {},
        64,
        (40, 160),
        "Averages beside fine-tuning on plays",
        "stories260K (260K parameters) on tinyshakespeare, 300 steps of 8 sequences of 64 tokens (a third of the "
        "training passages), AdamW 1e-3; 40 validation and 160 test sequences",
    )
