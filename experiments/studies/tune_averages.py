"""What ``lagless tune`` gains on held-out data over default settings, on the fine-tuning runs of ``sft_averages.py``.

Each run at a constant learning rate is tuned by itself: settings are searched on validation sequences, beginning with
the defaults of BEMA and EMA, and reported on test sequences, paired over 5 seeds. Run ``sft_averages.py`` first.
"""

from __future__ import annotations

import json
from typing import Any

from experiments.shared.bench import SEEDS, Bench

from lagless.lab.report import Claim, Run

SEQUENCES = 100
RUNS = {"plays": ("sft-averages-text", 64)}
NAMES = {"live": "live", "bema": "default bema", "ema": "default ema", "best": "tuned"}


def _claims() -> list[Claim]:
    found = []
    for data in RUNS:
        for baseline, text, number in (
            ("live", "The tuned average beats the live weights", None),
            ("default bema", "The tuned average beats BEMA at its default setting", "+0.0014 ± 0.0036, one run"),
            ("default ema", "The tuned average beats EMA at its default setting", None),
        ):
            found.append(
                Claim(
                    text=f"{text} ({data})",
                    source="ours, docs/experiments-evaluate.md" if number else "ours",
                    number=number,
                    method="tuned",
                    baseline=baseline,
                    score="test/loss",
                    claimed=-1,
                    at={"data": data},
                )
            )
    return found


CLAIMS = _claims()


def _rule(record: dict[str, Any]) -> str:
    shown = ("ema_power", "bias_power", "update_freq")
    return f"{record['rule']} " + ", ".join(f"{name} {record[name]}" for name in shown if name in record)


def main() -> None:
    """Tune what is not tuned yet, then write the study."""
    bench = Bench("tune-averages", __file__)
    runs, chosen, evaluations, seconds = [], [], [], 0.0
    for data, (study, length) in RUNS.items():
        folder = bench.work.parent / study
        files = {part: str(folder / f"{part}.jsonl") for part in ("valid", "test")}
        for seed in SEEDS:
            [run] = (folder / "runs").glob(f"*constant*seed={seed}-*")
            record = bench.work / f"{data}-{seed}.json"
            command = [
                "tune", str(run), "--validation", files["valid"], "--test", files["test"], "--rule", "bema",
                "--rule", "ema", "--sequences", str(SEQUENCES), "--length", str(length), "-o", str(record),
            ]  # fmt: skip
            seconds += bench.lagless(*command, made=record)
            found = json.loads(record.read_text(encoding="utf-8"))
            for candidate in found["candidates"]:
                scores = {"valid/loss": candidate["validation"], "test/loss": candidate["test"]["value"]}
                method = NAMES[candidate["name"]]
                runs.append(Run(method=method, setting={"data": data}, seed=seed, scores=scores))
            chosen.append(f"{data}, seed {seed}: {_rule(found['best'])}")
            evaluations.append(len(found["trials"]))
    bench.save(
        seconds,
        title="Tuning averages by gradients",
        question="Does a rule found on validation data by lagless tune beat default settings on other data?",
        scale="the fine-tuning runs of stories260K at a constant rate, 31 checkpoints each; "
        f"{SEQUENCES} validation and {SEQUENCES} test sequences",
        claims=CLAIMS,
        runs=runs,
        notes=[f"{min(evaluations)} to {max(evaluations)} evaluations on validation per run.", *chosen],
    )


if __name__ == "__main__":
    main()
