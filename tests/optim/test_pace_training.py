"""PACE in the Hugging Face Trainer and in Lightning: evaluations see the average, and leave no trace in training."""

import random

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments
from transformers.utils import logging

from lagless import EMA
from lagless.optim import PACE

logging.set_verbosity_error()
SETTINGS = {"lr": 1e-2, "average": EMA(ema_power=0.5, lag=1.0)}


def make_model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=16,
    )
    return LlamaForCausalLM(config)


def rows(first, count):
    texts = (
        torch.randint(0, 32, (8,), generator=torch.Generator().manual_seed(i)) for i in range(first, first + count)
    )
    return [{"input_ids": ids, "labels": ids.clone()} for ids in texts]


def make_trainer(folder, model, callbacks=(), **settings):
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    arguments = {
        "max_steps": 6,
        "per_device_train_batch_size": 2,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "save_strategy": "no",
        "logging_strategy": "no",
        "dataloader_pin_memory": False,
        "lr_scheduler_type": "cosine",
        "learning_rate": 1e-2,
    } | settings
    optimizer = {"optimizers": (PACE(model.parameters(), **SETTINGS), None)}
    if arguments.pop("by_class", False):
        optimizer = {"optimizer_cls_and_kwargs": (PACE, SETTINGS)}
    arguments = TrainingArguments(str(folder), **arguments)
    data = {"train_dataset": rows(0, 16), "eval_dataset": rows(16, 4)}
    return Trainer(model, arguments, callbacks=list(callbacks), **data, **optimizer)


def bits(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def pace_of(trainer):
    return getattr(trainer.optimizer, "optimizer", trainer.optimizer)


class Evaluated(TrainerCallback):
    """What the model holds whenever it is evaluated, and what the average is then."""

    def __init__(self):
        self.held, self.averages, self.live = [], [], []

    def on_step_end(self, args, state, control, model, **kwargs):
        self.live.append(bits(model))

    def on_evaluate(self, args, state, control, model, **kwargs):
        self.held.append(bits(model))
        optimizer = kwargs["optimizer"]
        self.averages.append(getattr(optimizer, "optimizer", optimizer).read(model))


def test_the_trainer_evaluates_the_average_and_trains_as_without(tmp_path):
    quiet, watched, record = make_model(), make_model(), Evaluated()
    make_trainer(tmp_path / "quiet", quiet).train()
    trainer = make_trainer(tmp_path / "watched", watched, [record], eval_strategy="steps", eval_steps=2)
    trainer.train()
    assert len(record.held) == 3
    for held, average, live in zip(record.held, record.averages, record.live[1::2], strict=True):
        assert same(held, {name: average[name] for name in held}) and not same(held, live)
    # The run ends after an evaluation: the model that is left, and saved, is the average.
    assert same(bits(watched), record.held[-1])
    pace_of(trainer).train()
    assert same(bits(watched), bits(quiet))


def test_evaluating_before_the_first_step_is_possible(tmp_path):
    model = make_model()
    trainer = make_trainer(tmp_path, model, eval_strategy="steps", eval_steps=4, eval_on_start=True)
    trainer.train()
    assert trainer.state.log_history[0]["step"] == 0


@pytest.mark.parametrize("by_class", [False, True])
@pytest.mark.parametrize("evaluate", [False, True])
def test_a_run_resumes_bit_for_bit(tmp_path, by_class, evaluate):
    settings = {"save_strategy": "steps", "save_steps": 4, "by_class": by_class}
    if evaluate:
        settings |= {"eval_strategy": "steps", "eval_steps": 4}
    whole, resumed, record = make_model(), make_model(), Evaluated()
    trainer = make_trainer(tmp_path, whole, [record], **settings)
    trainer.train()
    expected = pace_of(trainer).train().read(whole)
    other = make_trainer(tmp_path, resumed, **settings)
    other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert other.state.global_step == 6
    average = pace_of(other).train().read(resumed)
    assert same(bits(whole), bits(resumed)) and same(expected, average)
    # A checkpoint written right after an evaluation holds the average, any other the live weights.
    stored = LlamaForCausalLM.from_pretrained(tmp_path / "checkpoint-4")
    assert same(bits(stored), record.held[0] if evaluate else record.live[3])
    assert not evaluate or not same(record.held[0], record.live[3])


class Module(pl.LightningModule):
    """Validates the average."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
        self.validated = []

    def training_step(self, batch, _):
        return self.net(batch[0]).square().mean()

    def validation_step(self, batch, _):
        self.validated.append(bits(self))

    def configure_optimizers(self):
        return PACE(self.parameters(), **SETTINGS)

    def on_train_batch_start(self, batch, batch_idx):
        self.optimizers().train()

    def on_validation_start(self):
        self.optimizers().eval()


@pytest.mark.filterwarnings("ignore:.*LeafSpec", "ignore:.*does not have many workers", "ignore:The dirpath has")
def test_lightning_validates_the_average_and_resumes(tmp_path):
    data = DataLoader(TensorDataset(torch.randn(12, 4, generator=torch.Generator().manual_seed(1))), batch_size=4)

    def fit(module, epochs, folder, validations=1, path=None):
        pl.seed_everything(0, verbose=False)
        checkpoint = ModelCheckpoint(
            tmp_path / folder, filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=False
        )
        trainer = pl.Trainer(
            max_epochs=epochs,
            accelerator="cpu",
            logger=False,
            callbacks=[checkpoint],
            enable_progress_bar=False,
            enable_model_summary=False,
            limit_val_batches=validations,
            num_sanity_val_steps=0,
        )
        trainer.fit(module, data, data, ckpt_path=path)
        return trainer.optimizers[0]

    quiet, watched = Module(), Module()
    fit(quiet, 2, "quiet", validations=0)
    optimizer = fit(watched, 2, "watched")
    assert same(watched.validated[-1], optimizer.read(watched)) and not same(watched.validated[-1], bits(quiet))
    optimizer.train()
    assert same(bits(watched), bits(quiet))
    # The checkpoint was written within the validation: weights of the average, live ones in the optimizer's state.
    stored = torch.load(tmp_path / "watched" / "epoch=0.ckpt", weights_only=True)
    assert same(stored["state_dict"], watched.validated[0])
    resumed = Module()
    other = fit(resumed, 2, "resumed", path=tmp_path / "watched" / "epoch=0.ckpt").train()
    assert same(bits(resumed), bits(watched)) and same(other.read(resumed), optimizer.read(watched))
