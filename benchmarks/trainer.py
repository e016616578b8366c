"""Cost of averaging in the Trainer: a step with two averages, and an evaluation of one.

Needs ``pip install -e '.[bench]'``. Run: ``python benchmarks/trainer.py [--repeats 9]``.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time

import torch
from _harness import report
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments
from transformers.utils import logging

from lagless import BEMA, EMA, Averager
from lagless.integrations.transformers import AveragingCallback

RULES = {"bema": BEMA.paper(update_freq=10), "ema": EMA(decay=0.99, update_freq=10)}
LENGTH, BATCH, EVALUATED = 128, 8, 64


class Random(Dataset):
    """Random tokens: what is timed does not depend on what they say."""

    def __init__(self, count: int) -> None:
        self._tokens = torch.randint(1000, (count, LENGTH), generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self._tokens)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self._tokens[index], "labels": self._tokens[index]}


class Clock(TrainerCallback):
    """Time of all steps together, on the wall and of the processor; the second hardly sees a busy machine."""

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 0:
            self.began = time.perf_counter(), time.process_time()

    def on_step_end(self, args, state, control, **kwargs):
        self.wall, self.cpu = time.perf_counter() - self.began[0], time.process_time() - self.began[1]


def make_trainer(folder: str, steps: int, callbacks: list[TrainerCallback]) -> Trainer:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1000,
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=LENGTH,
    )
    settings = TrainingArguments(
        folder,
        max_steps=steps,
        per_device_train_batch_size=BATCH,
        per_device_eval_batch_size=BATCH,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        save_strategy="no",
        logging_strategy="no",
        dataloader_pin_memory=False,
    )
    data = {"train_dataset": Random(steps * BATCH), "eval_dataset": Random(EVALUATED)}
    return Trainer(LlamaForCausalLM(config), settings, callbacks=callbacks, **data)


def seconds_per_step(averaging: bool, steps: int) -> dict[str, float]:
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        make_trainer(folder, steps, [AveragingCallback(RULES), clock] if averaging else [clock]).train()
    return {"wall": clock.wall / steps, "cpu": clock.cpu / steps}


def seconds_of_evaluations(repeats: int) -> dict[str, float]:
    """Of the live model alone, of it and one average, and of one swap; processor time."""
    alone, both, swap = [], [], []
    with tempfile.TemporaryDirectory() as folder:
        callback = AveragingCallback(RULES, evaluate=["bema"])
        trainer = make_trainer(folder, 10, [callback])
        trainer.train()
        averager = callback.averager
        assert isinstance(averager, Averager)
        for _ in range(repeats):
            callback.averager = None
            alone.append(timed(trainer.evaluate))
            callback.averager = averager
            both.append(timed(trainer.evaluate))
            swap.append(timed(lambda: swap_once(averager)))
    return {name: statistics.median(t) for name, t in {"live": alone, "live and average": both, "swap": swap}.items()}


def timed(call) -> float:
    began = time.process_time()
    call()
    return time.process_time() - began


def swap_once(averager: Averager) -> None:
    with averager.applied("bema"):
        pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--steps", type=int, default=60)
    arguments = parser.parse_args()
    logging.set_verbosity_error()

    # Runs alternate, with the first candidate changing: a slow moment of the machine hits both alike.
    runs: dict[str, list[dict[str, float]]] = {"without": [], "two averages": []}
    for repeat in range(arguments.repeats + 1):
        for name in sorted(runs, reverse=repeat % 2 == 1):
            runs[name].append(seconds_per_step(name != "without", arguments.steps))
    step = {
        clock: {name: statistics.median(run[clock] for run in runs[name][1:]) for name in runs}
        for clock in ("wall", "cpu")
    }
    evaluation = seconds_of_evaluations(arguments.repeats)
    extra = (evaluation["live and average"] - evaluation["live"] - evaluation["swap"]) / evaluation["live"]
    print(f"s per step: {step}\ns per evaluation: {evaluation}")
    report(
        "trainer-cpu",
        {"repeats": arguments.repeats, "steps": arguments.steps, "step_s": step, "evaluation_cpu_s": evaluation},
        {
            **{
                f"step with two averages / without, {clock} time": (s["two averages"] / s["without"], "<=", 1.05)
                for clock, s in step.items()
            },
            "evaluation of one average without its swap / of the live model": (extra, "<=", 1.1),
        },
    )


if __name__ == "__main__":
    main()
