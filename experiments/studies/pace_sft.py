"""PACE against its baselines in the fine-tuning of a 260K-parameter story model on plays; methods and claims are those
of ``pace_continued.py``."""

from __future__ import annotations

from experiments.shared.averages_grid import split
from experiments.shared.bench import Bench
from experiments.shared.continued import COMMON
from experiments.shared.fine_tuning import plays
from experiments.shared.pace_study import STEPS, WARMUP, pace_study
from experiments.shared.tuning import HeldOut, Trials


def main() -> None:
    """Run what is missing and write the results."""
    bench = Bench("pace-sft", __file__)
    files = split(plays(bench.data / "corpus" / "tinyshakespeare.txt"), bench.work)
    path = str(bench.data / "model" / "stories260K" / "hf")
    common = COMMON | {
        "model": {"kind": "pretrained", "path": path},
        "data.path": str(files["train"]),
        "data.validation_path": str(files["valid"]),
        "training.micro_batch_size": 8,
    }
    trials = Trials(bench, "pace-pretrain-small", common, HeldOut(str(files["test"]), path, None))
    pace_study(
        bench,
        trials,
        with_grid=False,
        bfloat16={},
        title="PACE against its baselines in fine-tuning on plays",
        question="Does the pull towards the average help in fine-tuning, when schedules and averages are tuned as well "
        "as it is?",
        scale=f"stories260K (260K parameters) on tinyshakespeare, {STEPS} steps of 8 sequences of 64 tokens, float32, "
        f"warm-up of {WARMUP} steps",
    )


if __name__ == "__main__":
    main()
