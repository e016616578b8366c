"""PACE against its baselines again, from a model past the plateau on which the runs of pace.py differ by chance.

Shorter, with the methods that the question needs: is the clamped limit more than a learning rate η(1+t)^-κ?
"""

from __future__ import annotations

from _collect import Bench
from _tuning import Axis, Method, Trials, best_of, factors, report, steps, tune
from bias_correction import COMMON, START, START_STEPS
from pace import BETA1, CLAMPED, EMAS, PAPER, SCHEDULE_FREE, WITH_EMAS, _adamw, _claim, _pace, _schedule

from lagless.experiments.report import Figure

BUDGET, FINALISTS = 8, 1
STEPS, WARMUP = 100, 20

# Learning rates start where the mean over the run of lr·decay is about the same.
LR, DECAYING_LR = (Axis("lr", "training.learning_rate", factors(start, 2)) for start in (2e-3, 8e-3))
EXPONENT = Axis("kappa", "method.schedule.exponent", steps(0.4, 0.2, 0.05, 1.0))
KAPPA = Axis("kappa", "method.optimizer.average.ema_power", steps(0.4, 0.2, 0.05, 1.0))
METHODS = (
    Method("pace always clamped", _pace(_schedule("constant"), pullback=CLAMPED), (DECAYING_LR, KAPPA)),
    Method(
        "adamw, power above 0", _adamw(_schedule("power", exponent=0.4)), (DECAYING_LR, EXPONENT), folder="adamw power"
    ),
    Method("adamw", WITH_EMAS, (LR,), folder="adamw"),
    Method("adamw, ema above 0", WITH_EMAS, (LR,), EMAS, folder="adamw"),
    Method("adamw, cosine", _adamw(_schedule("cosine")), (LR,)),
    Method("schedule-free adamw", SCHEDULE_FREE, (LR, BETA1)),
)
CONTAINED = {
    "adamw, power": {"adamw, power above 0": {}, "adamw": {"kappa": 0.0}},
    "adamw, ema": {"adamw, ema above 0": {}, "adamw": {"kappa": 0.0}},
}
CLAIMS = [
    _claim(
        "PACE always clamped beats AdamW with the learning rate η(1+t)^-κ",
        "pace always clamped",
        "adamw, power",
        "docs/pace.md, a toy language model",
        "-0.064 ± 0.005",
    ),
    _claim("PACE always clamped beats AdamW at a constant rate", "pace always clamped", "adamw", f"{PAPER}, Figure 1"),
    _claim("PACE always clamped beats an EMA beside AdamW", "pace always clamped", "adamw, ema", f"{PAPER}, Figure 1"),
    _claim("PACE always clamped beats cosine decay", "pace always clamped", "adamw, cosine", f"{PAPER}, Figure 1"),
    _claim("PACE always clamped beats schedule-free AdamW", "pace always clamped", "schedule-free adamw", PAPER),
]


def main() -> None:
    """Run what is missing and write the results."""
    bench = Bench("pace-continued", __file__)
    recipe = "pace-pretrain-small"
    [start] = Trials(bench, recipe, START | {"method.returned": "live"}).run(
        "start", {}, {"training.learning_rate": "0.002"}, [7]
    )
    model = {"kind": "pretrained", "path": str(start.folder / f"checkpoint-{START_STEPS}")}
    trials = Trials(bench, recipe, COMMON | {"model": model, "training.micro_batch_size": 8})
    tuned, reported = {}, {}
    for method in METHODS:
        chosen = tuned[method.name] = tune(trials, method, BUDGET, FINALISTS)
        reported[method.name] = [run for _, run in report(trials, method, chosen.position, chosen.weights)]
    runs = [run for method in METHODS for run in (*tuned[method.name].runs, *reported[method.name])]
    runs += [run for name, methods in CONTAINED.items() for run in best_of(name, methods, tuned, reported)]
    bench.save(
        trials.seconds,
        title="PACE against its baselines, from a model that is past the plateau",
        question="Is PACE always clamped more than AdamW with a learning rate that falls like its average's weight?",
        scale=f"Llama with 2 layers of width 64, books, {STEPS} steps of 8 sequences of 64 tokens from a model of "
        f"{START_STEPS} steps, float32, warm-up of {WARMUP} steps",
        claims=CLAIMS,
        figures=[
            Figure(
                kind="curves",
                caption="Validation loss of what each method returns, at its chosen setting",
                score="valid/loss",
                methods=list(dict.fromkeys(name for claim in CLAIMS for name in (claim.method, claim.baseline))),
            ),
        ],
        runs=runs,
    )


if __name__ == "__main__":
    main()
