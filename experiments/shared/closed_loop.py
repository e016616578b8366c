"""The study of closed-loop accuracy on word problems from a given start; claims are the BEMA paper's on generation.

κ and η are chosen by the loss of the answers to held-out problems, among as many settings of EMA as of BEMA.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from experiments.shared.averages_grid import PAPER, VALID, Entry, compared, validated
from experiments.shared.bench import SEEDS, Bench, once, seconds_of
from experiments.shared.problems import LEVEL, PROMPTS, prepare
from transformers import AutoModelForCausalLM

from lagless.checkpoints import find_checkpoints
from lagless.lab.averages import LIVE, evaluate_averages
from lagless.lab.evaluate import load_tokenizer
from lagless.lab.evaluation import ClosedLoop, held_out_sequences, hf_model, oscillation
from lagless.lab.report import Claim, Figure
from lagless.lab.sweep import Cell
from lagless.rules import trajectory_weights

BASE_STEPS = 2000  # of training before
SAVE, EVERY, SAMPLES, LONGEST = 10, 20, 4, 20
ACCURACY, EARLY, LATE, JITTER = (
    "test/accuracy",
    "test/accuracy, first half",
    "test/accuracy, second half",
    "test/jitter",
)

CLAIMS = [
    Claim(
        text=text,
        source=f"{PAPER}, {where}",
        number="in figures only",
        method=method,
        baseline=baseline,
        score=score,
        claimed=claimed,  # type: ignore[arg-type]
        selected_by=VALID,
    )
    for text, where, method, baseline, score, claimed in (
        ("BEMA answers more problems than the live weights at the end", "Fig. 1(c)", "bema", LIVE, ACCURACY, 1),
        ("BEMA answers more problems than EMA at the end", "Fig. 1(c)", "bema", "ema", ACCURACY, 1),
        ("BEMA is ahead of EMA in the first half: less lag", "Fig. 1(c)", "bema", "ema", EARLY, 1),
        ("EMA answers more than the live weights in the second half", "Fig. 1(c)", "ema", LIVE, LATE, 1),
        ("BEMA answers more than the live weights in the second half", "Fig. 1(c)", "bema", LIVE, LATE, 1),
        ("EMA's accuracy swings less than the live weights'", "Section 1", "ema", LIVE, JITTER, -1),
        ("BEMA's accuracy swings less than the live weights'", "Section 1", "bema", LIVE, JITTER, -1),
    )
]


def closed_loop(
    cell: Cell, entries: list[Entry], tasks: ClosedLoop, tokenizer: Any, steps: list[int]
) -> dict[str, Any]:
    """By name, for every step, the share of right responses by prompt."""
    rules = {entry.name: entry.rule for entry in entries if entry.rule is not None}

    def accuracies(model: Any) -> list[float]:
        return list(tasks(hf_model(model, tokenizer, 256))["arithmetic"].prompts.values())

    found: dict[str, Any] = {}
    for one in evaluate_averages(cell.folder, rules, accuracies, at=steps):
        found.setdefault(one.name, []).append((one.step, one.result))
    print(f"{cell.folder.name}: {len(rules) + 1} accuracies at {len(steps)} steps", flush=True)
    return found


def closed_loop_study(bench: Bench, begin: int, steps: int, title: str) -> None:
    """Run what is missing, then write the study.

    Args:
        bench: of the study.
        begin: the step of the training before from which fine-tuning begins.
        steps: of fine-tuning.
        title: of the study.
    """
    shared = bench.work.parent / "arithmetic-oscillation"
    files, base = prepare(shared / "problems"), shared / "base"
    bench.lagless(
        "train", "experiments/studies/arithmetic.yaml", "--set", "method.averages={}",
        "--set", f"model.tokenizer={files['tokenizer']}", "--set", f"data.path={files['base.txt']}",
        "--set", f"training.max_steps={BASE_STEPS}", "--set", f"evaluation.every={BASE_STEPS}", "--out", str(base),
    )  # fmt: skip
    start = base / f"checkpoint-{begin}"
    changes = {"model.path": str(start), "data.path": str(files["train.txt"]), "method.averages": "{}"}
    changes |= {"training.max_steps": str(steps), "training.save_every": str(SAVE), "evaluation.every": str(steps)}
    cells = bench.sweep("experiments/studies/word-problems.yaml", "runs", changes, seeds=SEEDS)
    tokenizer = load_tokenizer(start)
    answers = held_out_sequences(str(files["valid.jsonl"]), tokenizer, length=64, count=None)
    entries = validated([("constant", cell) for cell in cells], {"constant": ("ema", "bema")}, (SAVE,), answers)
    tasks = ClosedLoop(["arithmetic"], prompts=PROMPTS, samples=SAMPLES, level=LEVEL, max_new_tokens=LONGEST)
    for cell, chosen in compared(entries, CLAIMS):
        at = list(range(EVERY, steps + 1, EVERY))
        found = once(cell.folder / "closed-loop.json", lambda: closed_loop(cell, chosen, tasks, tokenizer, at))  # noqa: B023
        for entry in chosen:
            _, shares = zip(*found[entry.name], strict=True)
            accuracy = np.mean(shares, axis=1)
            half = len(at) // 2
            swings = oscillation(shares[half:], SAMPLES)
            entry.run.scores = {
                **(entry.run.scores or {}),
                ACCURACY: round(float(accuracy[-1]), 6),
                EARLY: round(float(accuracy[:half].mean()), 6),
                LATE: round(float(accuracy[half:].mean()), 6),
                JITTER: round(swings.jitter, 6),
            }
            entry.run.curves = {ACCURACY: [(step, round(float(a), 5)) for step, a in zip(at, accuracy, strict=True)]}
    kept = {
        entry.run.method: float(trajectory_weights(entry.rule, find_checkpoints(cells[0].folder).steps)[0])
        for entry in compared(entries, CLAIMS)[0][1]
        if entry.rule is not None
    }
    record = shared / f"accuracy-{begin}.json"
    begun = once(record, lambda: _accuracy(start, tasks, tokenizer))
    bench.save(
        seconds_of(cells),
        title=title,
        question="Do averages answer more problems than the live weights, and does their accuracy swing less?",
        scale=f"Llama of 0.4 M parameters after {begin} of {BASE_STEPS} steps on sums, fine-tuned on 20,000 word "
        f"problems of one step, {steps} steps of 8 sequences of 64 tokens, AdamW 1e-3; {SAMPLES} "
        f"responses at temperature 1 to each of {PROMPTS} problems whose numbers are not in the training data, "
        f"every {EVERY} steps; settings chosen by the loss of the answers to 150 others",
        claims=CLAIMS,
        figures=[
            Figure(
                kind="curves",
                caption="Share of right responses along training.",
                score=ACCURACY,
                selected_by=VALID,
                methods=[LIVE, "ema", "bema"],
            ),
            Figure(
                kind="map",
                caption="Loss of the answers to held-out problems over κ and η, minus that of the best EMA.",
                score=VALID,
                methods=["bema"],
                x="kappa",
                y="eta",
                minus="ema",
            ),
        ],
        runs=[entry.run for entry in entries],
        notes=[
            f"The model that fine-tuning begins with has an accuracy of {begun:.2f} on the same problems.",
            f"Settings differ in κ and η; averages are updated at every checkpoint, φ = {SAVE}.",
            *(
                f"The chosen {name} keeps a weight of {weight:.2f} on the start."
                for name, weight in sorted(kept.items())
            ),
        ],
    )


def _accuracy(model: Path, tasks: ClosedLoop, tokenizer: Any) -> float:
    loaded = AutoModelForCausalLM.from_pretrained(model).eval()
    return tasks(hf_model(loaded, tokenizer, 256))["arithmetic"].mean.value
