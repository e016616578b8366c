"""Averages beside the pretraining of a 0.9 M Llama on books, at a constant learning rate and with decay.

Claims: those of the BEMA paper on losses (``paper_claims`` in ``averages_grid``), which it makes for fine-tuning.
Settings are chosen on validation passages, the same number for each rule, and compared on test passages, paired over 5
seeds. Both schedules have the same peak, which is not tuned.
"""

from __future__ import annotations

from experiments.shared.bench import Bench
from experiments.shared.pretraining import pretraining

if __name__ == "__main__":
    pretraining(Bench("pretrain-averages", __file__), 120, {}, "Averages beside pretraining on books", "0.9 M")
