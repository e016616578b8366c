"""Weights learned at the end of a Trainer's training."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from lagless.checkpoints import find_checkpoints
from lagless.lab.learn import LearnCallback
from lagless.posthoc import combine_checkpoints

from .conftest import build

ANIMALS = ["cat", "dog", "cow", "pig", "hen", "fox", "owl", "bee", "elk", "eel", "ant", "bat"]


def train(tokenizer, folder, callbacks):
    ids = tokenizer("The cat sat on the mat and the dog sat on the log. " * 2)["input_ids"]
    rows = [{"input_ids": ids, "labels": ids}] * 8
    arguments = TrainingArguments(
        str(folder),
        max_steps=4,
        per_device_train_batch_size=1,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        save_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = Trainer(build(tokenizer), arguments, train_dataset=rows, processing_class=tokenizer, callbacks=callbacks)
    trainer.train()
    return trainer


def test_one_line_learns_from_the_checkpoints_that_were_kept(tokenizer, tmp_path):
    held = tmp_path / "held.txt"
    held.write_text("<|endoftext|>".join(f"The {animal} sat on the mat. " * 3 for animal in ANIMALS))
    callback = LearnCallback(str(held), length=64, evaluations=3, targets_per_weight=1, device="cpu")
    trainer = train(tokenizer, tmp_path / "run", [callback])
    plain = train(tokenizer, tmp_path / "plain", [])
    for name, tensor in plain.model.state_dict().items():
        assert torch.equal(trainer.model.state_dict()[name], tensor), "the Trainer's model stays as it is"
    found = callback.found
    assert found.steps == (1, 2, 3, 4) and found.weights.sum() == pytest.approx(1.0)
    record = json.loads((tmp_path / "run" / "learned" / "lagless.json").read_text())
    assert [source["weight"] for source in record["sources"]] == pytest.approx(found.weights.tolist())
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "learned", dtype=torch.float32).state_dict()
    (expected,) = combine_checkpoints(find_checkpoints(tmp_path / "run").checkpoints, found.weights)
    for name, tensor in expected.items():
        torch.testing.assert_close(model[name], tensor, rtol=1e-6, atol=1e-7)
