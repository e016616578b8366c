"""Closed-loop accuracy on word problems where fine-tuning begins with a weaker model and has something to teach it.

In ``arithmetic_oscillation.py`` the start is better than what training at a constant rate arrives at, so that averages
which keep to the start come out best. Here fine-tuning begins before the training on sums is finished. Claims are the
same.
"""

from __future__ import annotations

from experiments.shared.bench import Bench
from experiments.shared.closed_loop import closed_loop_study

if __name__ == "__main__":
    closed_loop_study(Bench("arithmetic-learning", __file__), 1250, 200, "Word problems: a start that learns")
