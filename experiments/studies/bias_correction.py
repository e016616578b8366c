"""Bias-corrected AdamW, Sophia-G and Shampoo against the same optimizers uncorrected, on clean and on noisy books.

All go on from one model that AdamW has trained for some steps: from random weights, 100 steps end on the plateau of the
unigram model, where nothing tells optimizers apart.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from experiments.shared.bench import Bench
from experiments.shared.continued import COMMON, FOLDS, START, START_STEPS, STEPS, WARMUP
from experiments.shared.passages import VOCABULARY
from experiments.shared.tuning import Axis, Position, Trials, TunedMethod, factors, on_books, report, tune

from lagless.lab.report import Claim, Figure

# Settings, and how many of them run on the second tuning seed too. Sophia's were as Shampoo's until the best rate of
# its split form was the lowest tried.
ADAMW_BUDGET, SOPHIA_BUDGET, SHAMPOO_BUDGET = (7, 2), (9, 2), (5, 1)

NOISE = {"data.noise": {"sequences": 0.2, "least": 0.2, "most": 0.4, "block": 16, "seed": 123}}

LR, SOPHIA_LR = (Axis("lr", "training.learning_rate", factors(start, 2)) for start in (2e-3, 5e-4))


def _adamw(cross_fit: str, correction: str) -> dict[str, Any]:
    shared = {"betas": [0.9, 0.95], "weight_decay": 0.1}
    if cross_fit == "none":
        return {"method.optimizer": {"kind": "adamw", **shared}}
    corrected = {"cross_fit": cross_fit, "inverse_correction": correction}
    return {"method.optimizer": {"kind": "bias_corrected_adamw", **shared, **corrected}}


def _sophia(cross_fit: str, correction: str, samples: int) -> dict[str, Any]:
    """``samples`` are tokens: of a step where one estimate is made of it, of a microbatch for each of several."""
    section = {"kind": "sophia", "weight_decay": 0.1, "rho": 0.05, "clip": 3.0, "hessian_freq": 5}
    section |= {"cross_fit": cross_fit, "inverse_correction": correction, "batch_size": samples}
    return {"method.optimizer": section}


def _shampoo(cross_fit: str, correction: str) -> dict[str, Any]:
    section = {"kind": "shampoo", "weight_decay": 0.1, "root_freq": 5}
    return {"method.optimizer": section | {"cross_fit": cross_fit, "inverse_correction": correction}}


ADAMW = TunedMethod("adamw", _adamw("none", "none"), (LR,))
LEAVE_ONE_OUT = TunedMethod("leave one out", _adamw("leave_one_out", "jackknife"), (LR,))
SPLIT = TunedMethod("split", _adamw("split", "pre_ema"), (LR,))
SOPHIA = TunedMethod("sophia", _sophia("none", "none", 8 * 64), (SOPHIA_LR,))
SOPHIA_SPLIT = TunedMethod("sophia, split", _sophia("split", "pre_ema", 8 * 64 // FOLDS), (SOPHIA_LR,))
SHAMPOO = TunedMethod("shampoo", _shampoo("none", "none"), (LR,))
SHAMPOO_SPLIT = TunedMethod("shampoo, split", _shampoo("split", "pre_ema"), (LR,))


def _variant(method: TunedMethod, name: str, changes: Mapping[str, Any]) -> TunedMethod:
    return replace(method, name=f"{method.name}, {name}", changes={**method.changes, **changes})


NO_CLIPPING: dict[str, Any] = {"training.max_grad_norm": 0.0}
LONGER: dict[str, Any] = {"training.max_steps": STEPS * 6 // 5, "training.save_every": STEPS * 6 // 5}

PAPER = "Nayak et al., arXiv 2605.20756"


def _best(text: str, method: TunedMethod, baseline: TunedMethod, source: str, number: str | None) -> Claim:
    """Each at its own best setting."""
    return Claim(
        text=text,
        source=source,
        number=number,
        method=method.name,
        baseline=baseline.name,
        score="test/loss",
        claimed=-1,
        selected_by="valid/loss",
    )


BEST = (
    _best(
        "Leave-one-out AdamW with the jackknife beats AdamW",
        LEAVE_ONE_OUT,
        ADAMW,
        f"{PAPER}, Table 2",
        "4.6872 - 4.8361 = -0.1489, one seed, another rate and floor, two passes",
    ),
    _best(
        "Sophia-G split in two folds, corrected, beats Sophia-G",
        SOPHIA_SPLIT,
        SOPHIA,
        f"{PAPER}, Table 2",
        "6.5946 - 6.6647 = -0.0701",
    ),
    _best(
        "Shampoo split in two folds, corrected, beats Shampoo",
        SHAMPOO_SPLIT,
        SHAMPOO,
        f"{PAPER}, Table 2",
        "5.6813 - 5.7916 = -0.1103",
    ),
)
# Both at the learning rate that was chosen for AdamW on clean text, and the same floor of 0.
MATCHED = (
    ("Leave-one-out AdamW beats AdamW at AdamW's best rate", LEAVE_ONE_OUT, ADAMW, "ours: matched"),
    (
        "Leave-one-out AdamW beats AdamW on noisy text, at AdamW's best rate",
        _variant(LEAVE_ONE_OUT, "noisy text", NOISE),
        _variant(ADAMW, "noisy text", NOISE),
        f"{PAPER}, Table 2 (4.8034 - 4.8225 = -0.0191), here matched",
    ),
    (
        "Leave-one-out AdamW beats AdamW with a fifth more steps, for the time that it takes, at AdamW's best rate",
        LEAVE_ONE_OUT,
        _variant(ADAMW, "longer", LONGER),
        "ours: matched",
    ),
    (
        "Leave-one-out AdamW beats AdamW at AdamW's best rate, both without clipping",
        _variant(LEAVE_ONE_OUT, "no clipping", NO_CLIPPING),
        _variant(ADAMW, "no clipping", NO_CLIPPING),
        "ours: matched",
    ),
    (
        "AdamW split in two folds, corrected, beats AdamW at AdamW's best rate",
        SPLIT,
        ADAMW,
        f"{PAPER}, Table A.18 (5.285 - 4.836 = +0.449), at the same rate",
    ),
)
# The published runs differ by 1.5 in the rate and by 0.2 in the floor; here √2 in the rate, a point of the grid.
FLOOR = {"method.schedule": {"kind": "cosine", "warmup_steps": WARMUP, "floor": 0.2}}
PUBLISHED = (
    ("AdamW at √2 of its best rate with a floor of 0.2 beats AdamW", _variant(ADAMW, "floor", FLOOR)),
    (
        "Leave-one-out AdamW at √2 of AdamW's best rate with a floor of 0.2 beats AdamW",
        _variant(LEAVE_ONE_OUT, "floor", FLOOR),
    ),
)


def _at(
    text: str, method: TunedMethod, at: Position, baseline: TunedMethod, baseline_at: Position, source: str
) -> Claim:
    return Claim(
        text=text,
        source=source,
        method=method.name,
        baseline=baseline.name,
        score="test/loss",
        claimed=-1,
        at=dict(method.settings(at)[0]),
        baseline_at=dict(baseline.settings(baseline_at)[0]),
    )


def main() -> None:
    """Run what is missing and write the results."""
    bench = Bench("bias-correction", __file__)
    recipe = "bias-pretrain-small"
    [start] = Trials(bench, recipe, *on_books(bench, START)).run("start", {}, {"training.learning_rate": "0.002"}, [7])
    model = {"kind": "pretrained", "path": str(start.folder / f"checkpoint-{START_STEPS}")}
    trials = Trials(bench, recipe, *on_books(bench, COMMON | {"model": model}))
    tuned, reported, claims = {}, {}, []

    def choose(method: TunedMethod, budget: tuple[int, int]) -> None:
        tuned[method.name] = tune(trials, method, *budget)
        run(method, tuned[method.name].position)
        claims.extend(c for c in BEST if method.name in (c.method, c.baseline) and {c.method, c.baseline} <= set(tuned))

    def run(method: TunedMethod, position: Position) -> None:
        if (method.name, position) not in reported:
            reported[method.name, position] = [run for _, run in report(trials, method, position, "live")]

    def compare(text: str, method: TunedMethod, baseline: TunedMethod, source: str, higher: int = 0) -> None:
        best = tuned[ADAMW.name].position
        position = (best[0] + higher,)
        run(method, position)
        run(baseline, best)
        claims.append(_at(text, method, position, baseline, best, source))

    def save() -> None:
        stated = [*(claim.text for claim in BEST), *(each[0] for each in (*MATCHED, *PUBLISHED))]
        done = {claim.text for claim in claims}
        bench.save(
            trials.seconds,
            title="Bias-corrected optimizers against the same ones uncorrected, matched",
            question="Does correcting the biases of the preconditioner lower the loss at the same tuning, rate, floor, "
            "clipping and time?",
            scale=f"Llama with 2 layers of width 64 and {VOCABULARY} tokens, books, {STEPS} steps of 8 sequences of 64 "
            f"tokens in {FOLDS} microbatches from a model of {START_STEPS} steps, float32, warm-up of {WARMUP}, cosine",
            claims=claims,
            figures=[
                Figure(
                    kind="curves",
                    caption="Validation loss at the settings chosen",
                    score="valid/loss",
                    methods=list(tuned),
                ),
            ],
            runs=[run for found in tuned.values() for run in found.runs]
            + [run for runs in reported.values() for run in runs],
            notes=[f"Stated, and not run: {text}." for text in stated if text not in done],
        )

    # What matters most comes first, and what is finished is written: the whole takes two hours of one core.
    choose(ADAMW, ADAMW_BUDGET)
    choose(LEAVE_ONE_OUT, ADAMW_BUDGET)
    for comparison in MATCHED[:3]:
        compare(*comparison)
    save()
    for pair, budget in (((SOPHIA, SOPHIA_SPLIT), SOPHIA_BUDGET), ((SHAMPOO, SHAMPOO_SPLIT), SHAMPOO_BUDGET)):
        for method in pair:
            choose(method, budget)
        save()
    for comparison in MATCHED[3:]:
        compare(*comparison)
        save()
    for text, method in PUBLISHED:
        compare(text, method, ADAMW, f"{PAPER}: its rate and floor", higher=2)
        save()


if __name__ == "__main__":
    main()
