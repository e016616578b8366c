"""When the correction helps: averages predicted from a run's iterates against their losses; ``correction_map.md``.

    python -m experiments.studies.correction_map run --work WORK

predicts the averages of every run of ``paper_clock`` whose losses are in ``results`` and whose iterates are in WORK.

    python -m experiments.studies.correction_map report

compares what was predicted with what was measured.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from experiments.shared.averages import ETAS, FRACTIONS, KAPPAS, PHIS, SHARES, endpoints, power_rules, scale_free_rules
from experiments.shared.calibration import draw_calibration, draw_map
from experiments.shared.cells import load, once, store
from experiments.shared.page import table, write_text
from experiments.shared.prediction import predict
from experiments.shared.training import Setting

from lagless.lab.statistics import LEVEL, Mean, holm, mean

NAME = "correction_map"
RESULTS = Path(__file__).parents[1] / "results"
CELLS, PREDICTIONS = RESULTS / "paper_clock" / "cells", RESULTS / NAME / "cells"
PAGE = Path(__file__).parents[1] / "report" / "correction-map.md"

BUILT_ON = ("adamw-lr0.001-constant-b8-s0", "adamw-lr0.0003-constant-b8-s0", "adamw-lr0.001-linear-to-0-b8-s0")
FLOOR, LARGEST, LEAST_RUNS = 0.002, 0.1, 3
UNIT, DEFAULT = "ema-f f=0.1", "ema-f f=0.05"
CANDIDATES = ("ema-f", "bema-f", "slow-bema-f", "dema-f", "tail", "sqrt-decay")

POWER = [
    (f"bema kappa={k:g} eta={e:g} phi={phi}", f"ema kappa={k:g} phi={phi}") for phi, k, e in product(PHIS, KAPPAS, ETAS)
]
FREE = [(f"{anchor} f={f:g} c={c:g}", f"ema-f f={f:g}")
        for anchor, f, c in product(("bema-f", "slow-bema-f"), FRACTIONS, SHARES)]  # fmt: skip
FREE += [(f"dema-f f={f:g}", f"ema-f f={f:g}") for f in FRACTIONS]
MAPPED = (("bema kappa=0.5 eta=0.2 phi=400", "ema kappa=0.5 phi=400"),
          ("bema kappa=0.2 eta=0.2 phi=400", "ema kappa=0.2 phi=400"))  # fmt: skip


@dataclass(frozen=True)
class Claim:
    """A claim about a number of each run: that its mean lies on one side of a bound.

    Attributes:
        key: of the study's page.
        text: in words.
        bound: the mean is compared with it.
        sign: +1 if it is claimed to be above, -1 if below.
    """

    key: str
    text: str
    bound: float
    sign: int


CLAIMS = [
    Claim("M1", "sign of BEMA − EMA: share right minus share of the more frequent sign", 0.0, 1),
    Claim("M2", "sign of scale-free corrections: likewise", 0.0, 1),
    Claim("M3", "median factor between measured and predicted nats, in powers of 2", 1.0, -1),
    Claim("M4", "loss of the rule predicted best minus that of the best", 0.005, -1),
    Claim("M5", "loss of the rule predicted best minus that of the default", 0.0, -1),
]


class Run:
    """The measured and predicted averages of one run.

    Args:
        name: of the run.
        cell: of ``paper_clock``.
        prediction: of the run.
    """

    def __init__(self, name: str, cell: Mapping[str, Any], prediction: Mapping[str, Any]) -> None:
        self.name, self.setting, self.misfit = name, cell["setting"], prediction["misfit"]
        averages = cell["averages"]
        self.family = {key: entry["family"] for key, entry in averages.items()}
        live = averages["live"]
        self.measured = {k: float(np.mean(e["reporting"]) - np.mean(live["reporting"])) for k, e in averages.items()}
        self.predicted: Mapping[str, float] = prediction["predicted"]
        unit = averages[UNIT]["tuning"] - live["tuning"], self.predicted[UNIT]
        self.unit = unit[0] / unit[1] if max(unit) < 0.0 else None

    def signs(self, pairs: Sequence[tuple[str, str]]) -> tuple[float, float, int]:
        """Return the share of signs that are right, that of the more frequent sign, and the number of pairs."""
        gaps = np.array([[at[one] - at[other] for one, other in pairs] for at in (self.measured, self.predicted)])
        gaps = gaps[:, np.abs(gaps[0]) >= FLOOR]
        if not gaps.size:
            return np.nan, np.nan, 0
        helps = float((gaps[0] < 0.0).mean())
        return float((np.sign(gaps[0]) == np.sign(gaps[1])).mean()), max(helps, 1.0 - helps), gaps.shape[1]

    def factor(self) -> float:
        """Return the median of |log2 (measured/predicted nats)|; NaN without a unit or an average to judge by."""
        if self.unit is None:
            return np.nan
        ratios = [measured / (self.unit * self.predicted[name]) for name, measured in self.measured.items()
                  if FLOOR < abs(measured) < LARGEST and measured * self.predicted[name] > 0.0]  # fmt: skip
        return float(np.median(np.abs(np.log2(ratios)))) if ratios else np.nan

    def chosen(self) -> tuple[str, str]:
        """Return the candidates with the lowest predicted and the lowest measured loss."""
        names = [name for name, family in self.family.items() if family in CANDIDATES]
        return min(names, key=self.predicted.__getitem__), min(names, key=self.measured.__getitem__)

    def numbers(self) -> dict[str, float]:
        """Return by claim the number of this run; NaN where it has none."""
        found, best = self.chosen()
        return {
            "M1": float(np.subtract(*self.signs(POWER)[:2])),
            "M2": float(np.subtract(*self.signs(FREE)[:2])),
            "M3": self.factor(),
            "M4": self.measured[found] - self.measured[best],
            "M5": self.measured[found] - self.measured[DEFAULT],
        }


def run(work: Path) -> None:
    """Predict every run whose losses and iterates are there."""
    for file in sorted(CELLS.glob("*.json")):
        stored = work / "paper_clock" / "runs" / f"{file.stem}.npy"
        if stored.is_file():
            given = load(file)["setting"]
            setting = Setting(**{field.name: given[field.name] for field in fields(Setting)})
            steps = range(0, setting.steps + 1, setting.every)
            averages = [*endpoints(steps), *scale_free_rules(steps), *power_rules(steps)]
            once(PREDICTIONS / file.name, lambda: predict(np.load(stored), setting, averages))  # noqa: B023 (called now)


def summarise(runs: Iterable[Run]) -> dict[str, Any]:
    """Return the claims' verdicts, and what was found in every run."""
    runs = list(runs)
    unseen = [one for one in runs if one.name not in BUILT_ON]
    numbers = {one.name: one.numbers() for one in runs}
    means: dict[str, Mean] = {}
    for claim in CLAIMS:
        values = [value for one in unseen if np.isfinite(value := numbers[one.name][claim.key])]
        if values:
            means[claim.key] = mean([value - claim.bound for value in values])
    tested = [key for key, found in means.items() if found.n >= LEAST_RUNS]
    adjusted = dict(zip(tested, holm([means[key].p_value for key in tested]), strict=True)) if tested else {}
    return {
        "runs": [_record(one, numbers[one.name]) for one in runs],
        "claims": [_verdict(claim, means.get(claim.key), adjusted.get(claim.key)) for claim in CLAIMS],
    }


def _record(one: Run, numbers: Mapping[str, float]) -> dict[str, Any]:
    power, free, (found, best) = one.signs(POWER), one.signs(FREE), one.chosen()
    return {
        "name": one.name,
        "built_on": one.name in BUILT_ON,
        "misfit": one.misfit,
        "power": _signs(power),
        "free": _signs(free),
        "chosen": found,
        "best": best,
        **{key: _number(value) for key, value in numbers.items()},
        "map": {method: [_number(one.measured[method] - one.measured[base]),
                         None if one.unit is None else
                         _number(one.unit * (one.predicted[method] - one.predicted[base]))]
                for method, base in MAPPED},
    }  # fmt: skip


def _signs(found: tuple[float, float, int]) -> dict[str, float | int | None]:
    return {"right": _number(found[0]), "frequent": _number(found[1]), "pairs": found[2]}


def _number(value: float) -> float | None:
    return round(value, 5) if np.isfinite(value) else None


def _verdict(claim: Claim, found: Mean | None, p: float | None) -> dict[str, Any]:
    side = None if found is None else np.sign(found.value) == claim.sign
    verdict = None if p is None else "not seen" if p >= LEVEL else "reproduced" if side else "contradicted"
    return {
        "key": claim.key,
        "text": claim.text,
        "claimed": f"{'above' if claim.sign > 0 else 'below'} {claim.bound:g}",
        "mean": None if found is None else _number(found.value + claim.bound),
        "standard_error": None if found is None else _number(found.standard_error),
        "runs": 0 if found is None else found.n,
        "p_value": None if p is None else float(f"{p:.3g}"),
        "verdict": verdict,
    }


def report() -> None:
    """Write ``summary.json``, the page and its figures."""
    runs = [Run(f.stem, load(CELLS / f.name), load(f)) for f in sorted(PREDICTIONS.glob("*.json"))
            if (CELLS / f.name).is_file()]  # fmt: skip
    summary = summarise(runs)
    store(RESULTS / NAME / "summary.json", summary, indent=1)
    figures = PAGE.parent / "figures"
    draw_calibration({f"{one.name}{' *' * (one.name in BUILT_ON)}": (one.predicted, one.measured, one.unit)
                      for one in runs}, figures / "correction-map-calibration.png")  # fmt: skip
    draw_map(summary["runs"], [method for method, _ in MAPPED], figures / "correction-map.png")
    write_text(PAGE, _page(summary))


def _page(summary: Mapping[str, Any]) -> str:
    unseen = sum(not one["built_on"] for one in summary["runs"])
    mapped = [[f"`{one['name']}`{' *' * one['built_on']}",
               *(("" if value is None else f"{value:+.4f}") for method, _ in MAPPED for value in one["map"][method])]
              for one in summary["runs"]]  # fmt: skip
    rows = [[f"`{one['name']}`{' *' * one['built_on']}", f"{one['misfit']:.2f}", _share(one["power"]),
             _share(one["free"]), _shown(one["M3"], ".2f"), f"`{one['chosen']}`", f"`{one['best']}`",
             _shown(one["M4"], "+.4f"), _shown(one["M5"], "+.4f")] for one in summary["runs"]]  # fmt: skip
    claims = [[c["key"], c["text"], c["claimed"], c["runs"], _shown(c["mean"], "+.4f"),
               _shown(c["standard_error"], ".4f"), _shown(c["p_value"], "g"), c["verdict"] or "too few runs"]
              for c in summary["claims"]]  # fmt: skip
    parts = [
        "# When does the correction help? Predicted and measured",
        f"{unseen} runs that `lagless choose` was not built on are in; those with * it was built on, and no claim "
        "counts them. Design and claims were written before: `experiments/studies/correction_map.md`. Nats per token "
        "on held-out books; a run is a learning rate, a schedule, a batch size (b) and a seed (s).",
        "![Measured against predicted differences to the live weights](figures/correction-map-calibration.png)",
        "Every average of a run; the unit of a run's predictions is fixed by its EMA of f = 0.1 on the tuning books.",
        "![BEMA minus EMA, predicted and measured](figures/correction-map.png)",
        table(["BEMA − EMA", *(f"{name.removeprefix('bema ')}, {what}" for name, _ in MAPPED
                               for what in ("measured", "predicted"))], mapped),
        "## Claims",
        table(["", "number of a run", "claimed", "runs", "mean", "s.e.", "p (Holm)", "verdict"], claims),
        "## Runs",
        "Shares of signs that are right, of the more frequent sign in brackets, and the number of pairs that differ by "
        f"{FLOOR} or more. Regret is to the best candidate; the last column is to the default, `{DEFAULT}`.",
        table(["run", "misfit", "BEMA − EMA", "scale-free", "factor of nats, powers of 2", "predicted best", "best",
               "regret", "minus default"], rows),
    ]  # fmt: skip
    return "\n\n".join(parts) + "\n"


def _share(found: Mapping[str, Any]) -> str:
    return "" if not found["pairs"] else f"{found['right']:.2f} ({found['frequent']:.2f}), {found['pairs']}"


def _shown(value: float | None, form: str) -> str:
    return "" if value is None else f"{value:{form}}"


def main() -> None:
    """Parse the command line and run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("run", "report"))
    parser.add_argument("--work", type=Path, default=os.environ.get("WORK", "work"), help="folder of runs; or $WORK")
    given = parser.parse_args()
    if given.command == "run":
        run(Path(given.work).resolve())
    else:
        report()


if __name__ == "__main__":
    main()
