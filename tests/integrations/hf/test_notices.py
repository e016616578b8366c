"""The Trainer's callback warns of averages and learning rates, once, and says nothing where all is well."""

import warnings

import pytest
import torch
from transformers import Trainer, TrainerCallback

from lagless import BEMA
from lagless.integrations.transformers import AveragingCallback
from lagless.rules import AverageWarning


def told(hf, folder, rules=None, **settings):
    """The warnings of a run, and how many of them came before the first step."""
    callback, before = AveragingCallback(rules), []

    class Begun(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            before.extend(w for w in found if w.category is AverageWarning)

    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always", AverageWarning)
        trainer = hf.trainer(folder, [callback, Begun()], **settings)
        trainer.train()
    return [str(w.message) for w in found if w.category is AverageWarning], len(before)


@pytest.mark.parametrize("schedule", ["constant", "constant_with_warmup"])
def test_the_default_says_nothing_at_a_constant_rate(hf, tmp_path, schedule):
    assert told(hf, tmp_path, lr_scheduler_type=schedule) == ([], 0)


def test_weights_on_the_start_are_told_before_the_first_step(hf, tmp_path):
    messages, before = told(hf, tmp_path, BEMA.paper(update_freq=2), lr_scheduler_type="constant")
    assert len(messages) == before == 1
    assert "average 'bema': BEMA(" in messages[0] and "of its weight on θ_0 after 8 steps" in messages[0]


@pytest.mark.parametrize("schedule, percent", [("linear", "8%"), ("cosine", "2%")])
def test_a_decaying_rate_is_told_before_the_first_step(hf, tmp_path, schedule, percent):
    messages, before = told(hf, tmp_path, lr_scheduler_type=schedule, max_steps=12)
    assert len(messages) == before == 1
    assert f"learning rate ends at {percent} of its peak" in messages[0]


def test_a_rate_that_is_no_function_of_the_step_is_told_at_the_end(hf, tmp_path):
    class Halving(Trainer):
        def create_scheduler(self, num_training_steps, optimizer=None):
            self.lr_scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer or self.optimizer, 0.5)
            return self.lr_scheduler

    messages, before = told(hf, tmp_path, kind=Halving)
    assert len(messages) == 1 and before == 0
    assert "learning rate ends at 0% of its peak" in messages[0]
