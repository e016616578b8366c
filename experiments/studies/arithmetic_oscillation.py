"""Closed-loop accuracy on word problems with a chain of thought, and how much it swings between checkpoints.

A small Llama that was trained on one-step sums, alone and in word problems, until it gets part of them right is
fine-tuned on word problems in small batches at a constant learning rate. κ and η are chosen by the loss of the answers
to held-out problems, among as many settings of EMA as of BEMA; accuracy is that of sampled responses to other problems,
along training. Swings are ``jitter``: the standard deviation about a locally straight curve over the second half of
training, the noise of sampling subtracted. Claims are those of the BEMA paper on generation.
"""

from __future__ import annotations

from experiments.shared.bench import Bench
from experiments.shared.closed_loop import BASE_STEPS, closed_loop_study

if __name__ == "__main__":
    closed_loop_study(
        Bench("arithmetic-oscillation", __file__), BASE_STEPS, 300, "Word problems: a start that is spoilt"
    )
