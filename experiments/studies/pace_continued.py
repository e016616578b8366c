"""PACE against its baselines again, from a model past the plateau on which the runs of pace.py differ by chance.

Shorter, with what the first left open: is the clamped limit more than a learning rate η(1+t)^-κ, what do c, κ and the
rate do on a full grid, what is left under warm-up–stable–decay, and with weights in bfloat16?
"""

from __future__ import annotations

from experiments.shared.bench import Bench
from experiments.shared.continued import COMMON, START, START_STEPS
from experiments.shared.pace_study import STEPS, WARMUP, pace_study
from experiments.shared.passages import VOCABULARY
from experiments.shared.tuning import Trials, on_books


def main() -> None:
    """Run what is missing and write the results."""
    bench = Bench("pace-continued", __file__)
    recipe = "pace-pretrain-small"
    [start] = Trials(bench, recipe, *on_books(bench, START | {"method.returned": "live"})).run(
        "start", {}, {"training.learning_rate": "0.002"}, [7]
    )
    model = {"kind": "pretrained", "path": str(start.folder / f"checkpoint-{START_STEPS}")}
    common = COMMON | {"model": model, "training.micro_batch_size": 8}
    pace_study(
        bench,
        Trials(bench, recipe, *on_books(bench, common)),
        with_grid=True,
        bfloat16={"model": {**model, "dtype": "bfloat16"}},
        title="PACE against its baselines, from a model that is past the plateau",
        question="Is PACE always clamped more than AdamW with a learning rate that falls like its average's weight?",
        scale=f"Llama with 2 layers of width 64 and {VOCABULARY} tokens, books, {STEPS} steps of 8 sequences of 64 "
        f"tokens from a model of {START_STEPS} steps, float32, warm-up of {WARMUP} steps",
    )


if __name__ == "__main__":
    main()
