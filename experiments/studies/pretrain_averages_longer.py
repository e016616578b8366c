"""Averages beside a longer pretraining of a 1.3 M Llama on books; claims as in ``pretrain_averages.py``.

Its 120 steps end on the plateau of the frequencies of single tokens, where weights travel and noise is small.
"""

from __future__ import annotations

from experiments.shared.bench import Bench
from experiments.shared.pretraining import pretraining

if __name__ == "__main__":
    pretraining(
        Bench("pretrain-averages-longer", __file__),
        600,
        {"model.config.num_hidden_layers": "6"},
        "Averages beside longer pretraining on books",
        "1.3 M",
    )
