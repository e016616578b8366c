"""The study of PACE against its baselines from a trained model: methods, claims, and their runs."""

from __future__ import annotations

from itertools import product
from typing import Any

from experiments.shared.bench import Bench
from experiments.shared.pace import CLAMPED, EMAS, PAPER, SCHEDULE_FREE, WITH_EMAS, adamw, claim, pace, schedule
from experiments.shared.tuning import (
    Axis,
    Position,
    Trials,
    TunedMethod,
    best_of,
    factors,
    full_grid,
    report,
    steps,
    tune,
)

from lagless.lab.report import Claim, Figure, Run

BUDGET, FINALISTS = 8, 1
SCHEDULE_FREE_BUDGET = 16  # its search with 8 settings ended at a β₁ of 0.8, the least that was allowed then
STEPS, WARMUP = 100, 20
DECAY = 0.2  # share of a run with warm-up, stable, decay, as in the paper

# Learning rates start where the mean over the run of lr·decay is about the same.
LR, DECAYING_LR = (Axis("lr", "training.learning_rate", factors(start, 2)) for start in (2e-3, 8e-3))
EXPONENT, BESIDE = (
    Axis(name, "method.schedule.exponent", steps(0.4, 0.2, 0.05, 1.0)) for name in ("kappa", "exponent")
)
KAPPA = Axis("kappa", "method.optimizer.average.ema_power", steps(0.4, 0.2, 0.05, 1.0))
BETA1 = Axis("beta1", "method.optimizer.betas", steps(0.9, 0.1, 0.4, 0.975), "[{:.4g}, 0.999]".format)
# On the grid, no gain is clamped at the smallest c, most at 1, all at the largest.
PULLBACK = Axis("c", "method.optimizer.pullback", lambda i: (0.01, 0.1, 1.0, CLAMPED)[i])
GRID: tuple[Position, ...] = tuple(product((-4, 0, 4), range(4), (-4, 0, 4, 8)))  # lr, c, κ = 0.2, ..., 0.8

PACE_CLAMPED = TunedMethod("pace always clamped", pace(schedule("constant"), pullback=CLAMPED), (DECAYING_LR, KAPPA))
PACE_GRID = TunedMethod("pace, grid", pace(schedule("constant")), (DECAYING_LR, PULLBACK, KAPPA))
EMA = TunedMethod("adamw, ema above 0", WITH_EMAS, (LR,), EMAS, folder="adamw")
METHODS = (
    PACE_CLAMPED,
    TunedMethod(
        "adamw, power above 0", adamw(schedule("power", exponent=0.4)), (DECAYING_LR, EXPONENT), folder="adamw power"
    ),
    TunedMethod("adamw", WITH_EMAS, (LR,), folder="adamw"),
    EMA,
    TunedMethod(
        "adamw, power and ema above 0",
        WITH_EMAS | {"method.schedule": schedule("power", exponent=0.4)},
        (DECAYING_LR, BESIDE),
        EMAS,
    ),
    TunedMethod("adamw, cosine", adamw(schedule("cosine")), (LR,)),
    TunedMethod("schedule-free adamw", SCHEDULE_FREE, (LR, BETA1)),
    TunedMethod("adamw, wsd", adamw(schedule("wsd", decay=DECAY)), (LR,)),
    TunedMethod("pace always clamped, wsd", pace(schedule("wsd", decay=DECAY), pullback=CLAMPED), (DECAYING_LR, KAPPA)),
)
CONTAINED = {
    "adamw, power": {"adamw, power above 0": {}, "adamw": {"kappa": 0.0}},
    "adamw, ema": {"adamw, ema above 0": {}, "adamw": {"kappa": 0.0}},
    "adamw, power and ema": {
        "adamw, power and ema above 0": {},
        "adamw, ema above 0": {"exponent": 0.0},
        "adamw": {"exponent": 0.0, "kappa": 0.0},
    },
}
CLAIMS = (
    claim(
        "PACE always clamped beats AdamW with the learning rate η(1+t)^-κ",
        "pace always clamped",
        "adamw, power",
        "docs/pace.md, a toy language model",
        "-0.064 ± 0.005",
    ),
    claim("PACE always clamped beats AdamW at a constant rate", "pace always clamped", "adamw", f"{PAPER}, Figure 1"),
    claim("PACE always clamped beats an EMA beside AdamW", "pace always clamped", "adamw, ema", f"{PAPER}, Figure 1"),
    claim(
        "PACE always clamped beats an EMA beside AdamW with the learning rate η(1+t)^-κ, each with a κ of its own",
        "pace always clamped",
        "adamw, power and ema",
        "ours: a matched baseline, stated when the results of the others were known",
    ),
    claim("PACE always clamped beats cosine decay", "pace always clamped", "adamw, cosine", f"{PAPER}, Figure 1"),
    claim("PACE always clamped beats schedule-free AdamW", "pace always clamped", "schedule-free adamw", PAPER),
    claim(
        "PACE always clamped, at a constant rate, beats AdamW with warm-up, stable, decay",
        "pace always clamped",
        "adamw, wsd",
        f"{PAPER}, budgets of SmolLM2-135M",
        "1.153 - 1.205 = -0.052 (fine-tuning); 3.537 - 3.531 = +0.006 (GPT-2)",
    ),
    claim(
        "PACE always clamped beats AdamW, both with warm-up, stable, decay",
        "pace always clamped, wsd",
        "adamw, wsd",
        f"{PAPER}, GPT-2",
        "3.507 - 3.531 = -0.024",
    ),
)
GRID_CLAIM = claim(
    "PACE with c, κ and rate from a grid beats PACE always clamped",
    "pace, grid",
    "pace always clamped",
    f"{PAPER}: clamping is generally not enforced",
)
BFLOAT16_CLAIM = claim(
    "PACE always clamped beats an EMA beside AdamW with weights in bfloat16, at the settings of float32",
    "pace always clamped, bfloat16",
    "adamw, ema, bfloat16",
    f"{PAPER}: SmolLM2, trained in bfloat16",
)
MAP = Figure(
    kind="map",
    caption="Validation loss of PACE over c and κ, at the better of three rates",
    score="valid/loss",
    methods=[PACE_GRID.name],
    x="kappa",
    y="c",
)


def pace_study(
    bench: Bench, trials: Trials, with_grid: bool, bfloat16: dict[str, Any], title: str, question: str, scale: str
) -> None:
    """Run what is missing of PACE against its baselines, and write the results.

    Args:
        bench: of the study.
        trials: of the study.
        with_grid: whether c, κ and the rate are tried on a full grid.
        bfloat16: what of the recipe is another with weights in bfloat16; without, they are not tried.
        title: of the study.
        question: of the study.
        scale: of the study.
    """
    tuned, reported = {}, {}
    for method in METHODS:
        budget = SCHEDULE_FREE_BUDGET if BETA1 in method.axes else BUDGET
        chosen = tuned[method.name] = tune(trials, method, budget, FINALISTS)
        reported[method.name] = [run for _, run in report(trials, method, chosen.position, chosen.weights)]
    claims: list[Claim] = list(CLAIMS)
    runs: list[Run] = []
    if with_grid:
        chosen = tuned[PACE_GRID.name] = full_grid(trials, PACE_GRID, GRID)
        reported[PACE_GRID.name] = [run for _, run in report(trials, PACE_GRID, chosen.position, chosen.weights)]
        claims.append(GRID_CLAIM)
    if bfloat16:
        claims.append(BFLOAT16_CLAIM)
        for method, name in ((PACE_CLAMPED, BFLOAT16_CLAIM.method), (EMA, BFLOAT16_CLAIM.baseline)):
            rounded = TunedMethod(name, {**method.changes, **bfloat16}, method.axes, method.averages)
            chosen = tuned[method.name]
            runs += [run for _, run in report(trials, rounded, chosen.position, chosen.weights)]
    runs += [run for name in tuned for run in (*tuned[name].runs, *reported[name])]
    runs += [run for name, methods in CONTAINED.items() for run in best_of(name, methods, tuned, reported)]
    curves = Figure(
        kind="curves",
        caption="Validation loss of what each method returns, at its chosen setting",
        score="valid/loss",
        methods=list(dict.fromkeys(name for claim in claims for name in (claim.method, claim.baseline))),
    )
    bench.save(
        trials.seconds,
        title=title,
        question=question,
        scale=scale,
        claims=claims,
        figures=[curves, MAP] if with_grid else [curves],
        runs=runs,
    )
