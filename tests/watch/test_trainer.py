"""A Trainer of transformers in another process, watched while it trains, stops and resumes."""

from __future__ import annotations

import os
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tests.lab.evaluation.conftest import build, cache as cache, text as text, tokenizer as tokenizer
from tests.watch.test_averages import check_equal
from tests.watch.trainer import taken
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from lagless import BEMA, EMA
from lagless.watch import HeldOutPlan, Settings


def train(run: Path, tokenizer: Any, steps: int) -> None:
    """What the other process does; it goes on from the last checkpoint if there is one."""
    data = [{"input_ids": row, "labels": row} for row in torch.randint(2, 90, (32, 16)).tolist()]
    options = TrainingArguments(
        str(run),
        max_steps=steps,
        save_steps=2,
        logging_steps=1,
        learning_rate=1e-2,
        per_device_train_batch_size=2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = Trainer(build(tokenizer), options, train_dataset=data, processing_class=tokenizer)  # type: ignore[arg-type]
    trainer.train(resume_from_checkpoint=any(run.glob("checkpoint-*")))


def fork(target: Callable[..., None], *arguments: Any, output: Path) -> int:
    """A process that calls ``target``, and has imported everything already; returns its number."""
    if child := os.fork():
        return child
    code = 1
    try:
        with output.open("w") as file:
            for stream in (1, 2):
                os.dup2(file.fileno(), stream)
            target(*arguments)
            code = 0
    except BaseException:
        traceback.print_exc(file=output.open("a"))
    finally:
        os._exit(code)


def test_a_trainer_in_another_process(
    tmp_path: Path, text: tuple[Path, Path], tokenizer: Any, watching: Callable[..., Any]
) -> None:
    run, rules = tmp_path / "run", {"ema": EMA(half_life_fraction=0.2), "bema": BEMA()}
    plan = HeldOutPlan(str(text[0]), length=48, sequences=8, device="cpu")
    watch, rows = watching(run=run, rules=rules, settings=Settings(settle=0.2, evaluate=plan))
    for steps in (4, 8):  # the second one resumes from the first one's last checkpoint
        trainer = fork(train, run, tokenizer, steps, output=tmp_path / f"printed-{steps}")
        while (ended := os.waitpid(trainer, os.WNOHANG)) == (0, 0):
            if not watch.step():
                time.sleep(0.05)
        assert ended[1] == 0, (tmp_path / f"printed-{steps}").read_text()
        while watch.step() or watch.pending:
            time.sleep(0.05)
    watch.finish()
    assert taken(watch) == [2, 4, 6, 8]
    assert not [row for row in rows if row.get("event") in ("torn", "vanished", "rolled back", "passed over")]
    assert {row["name"] for row in rows if "loss" in row and row["step"] == 8} == {"live", "ema", "bema"}
    assert [row["learning_rate"] < row["peak_rate"] for row in rows if row.get("event") == "absorbed"][-1]
    AutoModelForCausalLM.from_pretrained(tmp_path / "out/best")
    check_equal(watch, run, tmp_path)
