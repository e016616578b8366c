"""Optimizers for the average, in the pretraining of a small Llama on books: who is best when each is tuned alike.

The claims were stated before the first run.
"""

from __future__ import annotations

from typing import Any

from experiments.shared.bench import Bench
from experiments.shared.pace import CLAMPED, claim, ema
from experiments.shared.passages import VOCABULARY
from experiments.shared.tuning import (
    Axis,
    Hyperparameters,
    Trials,
    TunedMethod,
    best_of,
    factors,
    on_books,
    report,
    steps,
    tune,
)

from lagless.lab.report import Figure

STEPS, WARMUP = 3000, 100
BUDGET, FINALISTS = 8, 1

LLAMA = {
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
}
COMMON: dict[str, Any] = {
    "model.config": LLAMA,
    "data.sequence_length": 128,
    "training.max_steps": STEPS,
    "training.batch_size": 8,
    "training.micro_batch_size": 8,
    "training.evaluation_batch_size": 100,
    "training.log_every": 100,
    "training.save_every": STEPS,
    "evaluation.sequences": 400,
    "evaluation.every": STEPS,
}

FRACTIONS = (0.02, 0.05, 0.1, 0.2)  # half-lives as shares of the run
BESIDE = {f"ema{fraction}": {"half_life_fraction": fraction} for fraction in FRACTIONS}
SCALE_FREE = {"rule": "EMA", "half_life_fraction": 0.05}

# Learning rates start where the mean over the run of lr·decay is about the same.
LR, DECAYING_LR = (Axis("lr", "training.learning_rate", factors(start, 2)) for start in (2e-3, 4e-3))
KAPPA = Axis("kappa", "method.optimizer.average.ema_power", steps(0.5, 0.2, 0.05, 1.0))
INTERPOLATION = Axis("m", "method.optimizer.interpolation", steps(0.9, 0.1, 0.5, 0.975))
DECAY = Axis("1 - decay", "method.optimizer.average.decay", factors(0.01, 2), lambda value: f"{1.0 - value:.6g}")
WIDTH = Axis("half_life_fraction", "method.optimizer.average.half_life_fraction", factors(0.05, 2))


def adamw(kind: str, **averages: Any) -> dict[str, Any]:
    """Return the fields for AdamW with a schedule, which returns its live weights or one of ``averages``."""
    return {
        "method.optimizer": {"kind": "adamw"},
        "method.schedule": {"kind": kind, "warmup_steps": WARMUP},
        "method.returned": "live",
        **({"method.averages": averages} if averages else {}),
    }


def primal(average: dict[str, Any], kind: str = "constant", **base: Any) -> dict[str, Any]:
    """Return the fields for primal averaging around AdamW, which returns its own average."""
    return {
        "method.optimizer": {
            "kind": "primal_averaging",
            "base": {"kind": "adamw", **base},
            "average": average,
            "interpolation": 0.9,
        },
        "method.schedule": {"kind": kind, "warmup_steps": WARMUP},
        "method.returned": "optimizer",
    }


METHODS = (
    TunedMethod("adamw, linear decay", adamw("linear"), (DECAYING_LR,)),
    TunedMethod(
        "adamw, scale-free ema",
        adamw("constant", **{name: {"rule": "EMA", **width} for name, width in BESIDE.items()}),
        (LR,),
        BESIDE,
    ),
    TunedMethod(
        "schedule-free",
        primal({"rule": "WarmupAverage", "warmup_steps": WARMUP}, betas=[0.0, 0.999]),
        (LR, INTERPOLATION),
    ),
    TunedMethod("gpa, constant", primal({"rule": "EMA", "decay": 0.99}), (LR, DECAY)),
    TunedMethod("gpa, linear decay", primal({"rule": "EMA", "decay": 0.99}, "linear"), (DECAYING_LR, DECAY)),
    TunedMethod(
        "pace, clamped",
        {
            "method.optimizer": {"kind": "pace", "average": ema(0.5), "pullback": CLAMPED},
            "method.schedule": {"kind": "constant", "warmup_steps": WARMUP},
            "method.returned": "optimizer",
        },
        (DECAYING_LR, KAPPA),
    ),
    TunedMethod("primal averaging, scale-free ema", primal(SCALE_FREE), (LR, WIDTH)),
)
CONTAINED: dict[str, dict[str, Hyperparameters]] = {
    "gpa": {"gpa, constant": {}, "gpa, linear decay": {}},
}
OURS = "lagless, stated before the runs"
CLAIMS = [
    claim("Schedule-Free beats AdamW with linear decay", "schedule-free", "adamw, linear decay", "arXiv 2405.15682"),
    claim(
        "GPA beats AdamW with linear decay",
        "gpa",
        "adamw, linear decay",
        "arXiv 2512.17131, v3",
        "8.7 to 10.1 % fewer steps to the loss of AdamW, at 160 M to 8 B parameters",
    ),
    claim("GPA beats Schedule-Free", "gpa", "schedule-free", "arXiv 2512.17131"),
    claim("PACE, clamped, beats AdamW with linear decay", "pace, clamped", "adamw, linear decay", "arXiv 2606.25086"),
    claim("PACE, clamped, beats Schedule-Free", "pace, clamped", "schedule-free", "arXiv 2606.25086"),
    claim(
        "Gradients at the interpolation lower the loss of a scale-free average, both at their best learning rate",
        "primal averaging, scale-free ema",
        "adamw, scale-free ema",
        f"{OURS}; on a quadratic they cannot where steps are small",
    ),
    *(
        claim(
            f"Primal averaging with a scale-free average beats {name}", "primal averaging, scale-free ema", name, OURS
        )
        for name in ("adamw, linear decay", "schedule-free", "gpa", "pace, clamped")
    ),
]
NOTES = (
    f"Every method has {BUDGET} settings on one tuning seed, its best {FINALISTS} on a second, and five fresh seeds at "
    "the chosen one. GPA has two schedules and so twice as many settings.",
)


def main() -> None:
    """Run what is missing and write the results."""
    bench = Bench("primal", __file__)
    trials = Trials(bench, "pace-pretrain-small", *on_books(bench, COMMON))
    tuned, reported = {}, {}
    for method in METHODS:
        chosen = tuned[method.name] = tune(trials, method, BUDGET, FINALISTS)
        reported[method.name] = [run for _, run in report(trials, method, chosen.position, chosen.weights)]
    runs = [run for name in tuned for run in (*tuned[name].runs, *reported[name])]
    runs += [run for name, methods in CONTAINED.items() for run in best_of(name, methods, tuned, reported)]
    bench.save(
        trials.seconds,
        title="Optimizers for the average, each tuned alike",
        question="Which optimizer returns the best average, and does it beat a decaying learning rate?",
        scale=f"Llama with {LLAMA['num_hidden_layers']} layers of width {LLAMA['hidden_size']} and {VOCABULARY} "
        f"tokens, books, {STEPS:,} steps of 8 sequences of 128 tokens, float32, warm-up of {WARMUP} steps",
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
        notes=list(NOTES),
    )


if __name__ == "__main__":
    main()
