"""Averages at the paper's clock: T = 7,200 steps of stories260K on books; claims and rules in ``paper_clock.md``.

    python -m experiments.studies.paper_clock run --data DATA --work WORK

trains what is missing and evaluates its averages, run by run. It may be stopped at any moment, which costs the run in
progress, and goes on where it was.

    python -m experiments.studies.paper_clock report

writes what the finished cells say.
"""

from __future__ import annotations

import argparse
import itertools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from experiments.shared.averages import ETAS, FRACTIONS, KAPPAS, PHIS, Average, endpoints, power_rules, scale_free_rules
from experiments.shared.books import WINDOWS
from experiments.shared.cells import load
from experiments.shared.comparisons import Best, Claim
from experiments.shared.page import write_block, write_report
from experiments.shared.runs import Runs
from experiments.shared.summary import Plan
from experiments.shared.training import Setting

NAME = "paper_clock"
RESULTS = Path(__file__).parents[1] / "results" / NAME
PAGE = Path(__file__).parents[1] / "report" / "paper-clock.md"
DOCUMENT = Path(__file__).parents[2] / "docs" / "experiments-report.md"
RATES, FINALS, BATCHES, SEEDS = (1e-3, 3e-4, 1e-4), (1.0, 0.0, 0.3), (8, 16), (0, 1, 2, 3, 4)
FIRST_SEEDS = SEEDS[:3]  # of the stages that are judged first
SGD_RATES, SGD_TUNING_SEEDS, SGD_TUNING_STEPS = (0.01, 0.03, 0.1, 0.3, 1.0), (100, 101, 102), 1800

FLOOR, LEAST_SEEDS = 0.002, 3
CANDIDATES = ("ema-f", "bema-f", "slow-bema-f", "dema-f", "tail", "sqrt-decay")  # for the default rule
PRESENT = "ema-f f=0.05"  # the default now
EMA, BEMA, OUEMA, DEMA = (
    f"{family} kappa=0.5{eta} phi=400"
    for family, eta in (("ema", ""), ("bema", " eta=0.2"), ("ouema", " eta=0.2"), ("dema", ""))
)  # at the paper's defaults
BEST_EMA = Best(["ema"], {"kappa": KAPPAS, "phi": PHIS})
BEST_BEMA = Best(["bema", "ema"], {"kappa": KAPPAS, "eta": (*ETAS, np.inf), "phi": PHIS}, {"eta": np.inf})
BEST_DEMA = Best(["dema"], {"kappa": KAPPAS[1:], "phi": (100, 400)})
BEST_F = Best(["ema-f"], {"f": FRACTIONS})
SHOWN = {
    "EMA, the paper's defaults": EMA,
    "BEMA, the paper's defaults": BEMA,
    "OUEMA, the paper's defaults": OUEMA,
    "DEMA, the paper's clock": DEMA,
    "EMA, best κ and φ": BEST_EMA,
    "BEMA, best κ, η and φ": BEST_BEMA,
    "EMA, f = 0.05 (the default)": PRESENT,
    "EMA, f = 0.1": "ema-f f=0.1",
    "BEMA, slow anchor, f = 0.2, c = 0.5": "slow-bema-f f=0.2 c=0.5",
    "DEMA, f = 0.2": "dema-f f=0.2",
    "uniform over the last 20 %": "tail share=0.2",
}  # what the page begins with
DECAYED = ("linear-to-0", "linear-to-0.3")
ADAMW = ("adamw",)
CLAIMS = [
    Claim("P1", "BEMA beats EMA at κ = .5, η = .2, φ = 400", "Fig. 1b", BEMA, EMA, -1),
    Claim("P2", "BEMA at its defaults beats the live weights", "Fig. 1b, Table 2", BEMA, "live", -1),
    Claim("P3", "BEMA at its best beats EMA at its best", "Fig. 7", BEST_BEMA, BEST_EMA, -1),
    Claim("P4", "BEMA at its best beats the live weights", "Fig. 7", BEST_BEMA, "live", -1),
    Claim("P5", "BEMA beats OUEMA at the defaults", "Figs. 4, 15", BEMA, OUEMA, -1, optimizers=ADAMW),
    Claim("P5", "OUEMA beats EMA at the defaults", "Figs. 4, 15", OUEMA, EMA, -1, optimizers=ADAMW),
    Claim("P6", "BEMA beats DEMA at the defaults", "Fig. 14", BEMA, DEMA, -1, optimizers=ADAMW),
    Claim("P6", "BEMA at its best beats DEMA at its best", "Fig. 14", BEST_BEMA, BEST_DEMA, -1, optimizers=ADAMW),
    Claim("P7", "EMA at κ = .5, φ = 400 is worse than the live weights", "Sec. 5.2", EMA, "live", 1),
    Claim(
        "P8", "A constant rate with BEMA at its best beats linear decay to 0 without averaging", "App. A", BEST_BEMA,
        "live", -1, baseline_schedule="linear-to-0", optimizers=ADAMW,
    ),
    Claim("P9", "BEMA at its best beats the live weights under decay", "App. A", BEST_BEMA, "live", -1, DECAYED),
    Claim(
        "P10", "BEMA with φ = 100 beats φ = 400 at κ = η = .2", "Fig. 11", "bema kappa=0.2 eta=0.2 phi=100",
        "bema kappa=0.2 eta=0.2 phi=400", -1, optimizers=ADAMW,
    ),
    Claim("O1", "EMA(half_life_fraction=.05) beats the live weights", "ours", "ema-f f=0.05", "live", -1),
    Claim(
        "O2", "EMA(half_life_fraction=.05) loses less than the floor under linear decay to 0", "ours", "ema-f f=0.05",
        "live", 0, ("linear-to-0",), no_worse=True,
    ),
    Claim(
        "O3", "Slow-anchor BEMA (f = .5, c = .5) beats the EMA of f = .5", "ours", "slow-bema-f f=0.5 c=0.5",
        "ema-f f=0.5", -1, optimizers=ADAMW,
    ),
    Claim(
        "O4", "Slow-anchor BEMA (f = .2, c = .5) and the EMA of f = .1: no difference that matters", "ours",
        "slow-bema-f f=0.2 c=0.5", "ema-f f=0.1", 0, optimizers=ADAMW,
    ),
    Claim(
        "O5", "A constant rate with the EMA of f = .1 beats linear decay to 0 without averaging", "ours", "ema-f f=0.1",
        "live", -1, baseline_schedule="linear-to-0",
    ),
    Claim(
        "O6", "BEMA at its best and the EMA of the best f: no difference that matters", "ours", BEST_BEMA, BEST_F, 0,
        optimizers=ADAMW,
    ),
]  # fmt: skip


def averages(steps: Sequence[int]) -> Iterator[Average]:
    """Yield every average of a run."""
    yield from endpoints(steps)
    yield from scale_free_rules(steps)
    yield from power_rules(steps)


def parts(average: Average) -> Sequence[str]:
    """Return the held-out parts for an average: plays and stories only where a default is judged."""
    widely = average.family in ("live", "start", *CANDIDATES) or average.name in (EMA, BEMA, OUEMA, DEMA)
    return list(WINDOWS) if widely else ["tuning", "reporting"]


def adamw_settings() -> Iterator[Setting]:
    """Yield the AdamW runs in the stages of the study's page: a schedule is judged once its stage is done."""
    stages = [(8, FIRST_SEEDS, [final]) for final in FINALS]
    stages += [(8, SEEDS[len(FIRST_SEEDS) :], FINALS), (16, SEEDS, FINALS)]
    for batch, seeds, finals in stages:
        for seed, final, rate in itertools.product(seeds, finals, RATES):
            yield Setting("adamw", rate, final, batch, seed)


def sgd_tuning_settings(rate: float) -> list[Setting]:
    """Return the runs that judge a learning rate of SGD, on seeds of their own."""
    return [Setting("sgd", rate, 1.0, 8, seed, steps=SGD_TUNING_STEPS) for seed in SGD_TUNING_SEEDS]


def sgd_settings(rate: float) -> Iterator[Setting]:
    """Yield the runs of the arm with SGD."""
    for seed in SEEDS:
        for final in (1.0, 0.0):
            yield Setting("sgd", rate, final, 8, seed)


def tuned_sgd_rate(runs: Runs) -> float:
    """Return the learning rate of SGD with the lowest live loss on the tuning books; the grid grows until it is inside.

    A rate at which training diverges is out of the question, and ends the grid.
    """
    scores: dict[float, float] = {}

    def score(rate: float) -> float:
        if rate not in scores:
            try:
                tuned = [runs.result(setting, endpoints) for setting in sgd_tuning_settings(rate)]
                scores[rate] = sum(cell["averages"]["live"]["tuning"] for cell in tuned) / len(tuned)
            except FloatingPointError:
                scores[rate] = np.inf
        return scores[rate]

    rates = list(SGD_RATES)
    while True:
        best = min(rates, key=score)
        if best == rates[0]:
            rates.insert(0, best / 3)
        elif best == rates[-1]:
            rates.append(best * 3)
        else:
            return best


def run(data: Path, work: Path, model: Path) -> None:
    """Make every cell that is missing, in the order of the plan."""
    runs = Runs(data, work, RESULTS / "cells", model, averages, parts)
    for setting in adamw_settings():
        runs.result(setting)
    for setting in sgd_settings(tuned_sgd_rate(runs)):
        runs.result(setting)


def report() -> None:
    """Write what the finished cells say: ``summary.json``, the page with its figures, and the table in the docs."""
    planned = len(list(adamw_settings())) + len(list(sgd_settings(1.0)))
    cells = [load(file) for file in sorted((RESULTS / "cells").glob("*.json"))]
    plan = Plan("Averages at the paper's clock", "experiments/studies/paper_clock.md", planned, CLAIMS, CANDIDATES,
                (EMA, BEMA, OUEMA, DEMA, "start"), PRESENT, SHOWN, FLOOR, LEAST_SEEDS)  # fmt: skip
    summary = write_report(plan, [cell for cell in cells if cell["setting"]["seed"] in SEEDS], RESULTS, PAGE)
    write_block(DOCUMENT, summary)


def main() -> None:
    """Parse the command line and run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("run", "report"))
    parser.add_argument("--data", type=Path, default=os.environ.get("DATA"), help="folder of data; or $DATA")
    parser.add_argument("--work", type=Path, default=os.environ.get("WORK", "work"), help="folder of runs; or $WORK")
    parser.add_argument("--model", type=Path, help="folder of the model; default DATA/model/stories260K/hf")
    given = parser.parse_args()
    if given.command == "report":
        report()
        return
    if given.data is None:
        parser.error("give --data FOLDER, or set DATA; experiments/README.md says what it holds")
    data, work = Path(given.data).resolve(), Path(given.work).resolve() / NAME
    torch.set_num_threads(1)
    run(data, work, given.model or data / "model" / "stories260K" / "hf")


if __name__ == "__main__":
    main()
