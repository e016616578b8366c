"""The first example of the README at three lengths and two learning-rate schedules: is its average ever worse?

A small pretrained Llama is fine-tuned on plays by the loop of the README, and the average of its default rule is
compared with the live weights on the end of the text, which training does not see. Run

    python -m experiments.studies.first_example --data DATA

where ``DATA`` holds ``model/stories260K/hf`` and ``corpus/tinyshakespeare.txt``. Finished runs are kept in the result
file and not computed again.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import lagless

RESULT = Path("experiments/results/first-example/runs.json")
LENGTHS, SCHEDULES, SEEDS = (300, 1000, 4000), ("constant", "linear"), (0, 1, 2)
BATCH, LENGTH, LR, HELD_OUT = 8, 128, 1e-3, 64


def main() -> None:
    """Run what is missing, and print a line per run."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True)
    data = parser.parse_args().data
    folder = data / "model/stories260K/hf"
    tokens = AutoTokenizer.from_pretrained(folder)((data / "corpus/tinyshakespeare.txt").read_text()).input_ids
    rows = torch.tensor(tokens[: len(tokens) // LENGTH * LENGTH]).view(-1, LENGTH)
    found = json.loads(RESULT.read_text()) if RESULT.exists() else {"columns": ["live", "average"], "runs": {}}
    for seed in SEEDS:
        for steps in LENGTHS:
            for schedule in SCHEDULES:
                name = f"{steps} {schedule} {seed}"
                if name not in found["runs"]:
                    found["runs"][name] = run(folder, rows, steps, schedule, seed)
                    RESULT.write_text(json.dumps(found, indent=1) + "\n")
                live, average = found["runs"][name]
                print(f"{name}: live {live:.4f}, average {average:.4f}, difference {average - live:+.4f}", flush=True)


def run(folder: Path, rows: Tensor, steps: int, schedule: str, seed: int) -> tuple[float, float]:
    """Return the held-out losses of the live weights and of their average after one fine-tuning."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.01)
    factor = {"constant": lambda t: 1.0, "linear": lambda t: 1.0 - t / steps}[schedule]
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    train, held_out = rows[:-HELD_OUT], rows[-HELD_OUT:]
    avg = lagless.Averager(model, lagless.EMA(half_life_fraction=0.05), total_steps=steps)
    avg.attach(optimizer)
    for _ in range(steps):
        batch = train[torch.randint(len(train), (BATCH,))]
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
    live = loss_on(model, held_out)
    with avg.applied():
        return live, loss_on(model, held_out)


@torch.no_grad()
def loss_on(model: nn.Module, rows: Tensor) -> float:
    """Return the mean loss of held-out rows, in nats per token."""
    model.eval()
    return float(model(input_ids=rows, labels=rows).loss)


if __name__ == "__main__":
    main()
