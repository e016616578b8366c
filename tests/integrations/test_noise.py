"""The gradient noise scale in the logs of the Trainer and of Lightning."""

import math

import lightning.pytorch as pl
import pytest
import torch
import transformers
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader, TensorDataset

from lagless import EMA, GradientNoise
from lagless.integrations._noise import NoiseLog
from lagless.integrations.lightning import AveragingCallback as LightningCallback
from lagless.integrations.transformers import AveragingCallback
from lagless.optim import BiasCorrectedAdamW, PrimalAveraging

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:.*{text}")
    for text in ("LeafSpec", "does not have many workers", "Checkpoint directory", "smaller than the logging interval")
]


class Sentences(torch.utils.data.Dataset):
    """Sequences of 12 tokens, of which between 2 and 11 are to be predicted: microbatches weigh differently."""

    def __len__(self):
        return 64

    def __getitem__(self, i):
        tokens = torch.randint(50, (12,), generator=torch.Generator().manual_seed(i))
        labels = tokens.clone()
        labels[: 1 + i % 10] = -100
        return {"input_ids": tokens, "labels": labels}


def trainer(folder, callback, make=None, **arguments):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, use_cache=False
    )
    model = transformers.LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3) if make is None else make(model)
    settings = transformers.TrainingArguments(
        output_dir=str(folder),
        **{
            "max_steps": 4,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 4,
            "logging_steps": 1,
            "max_grad_norm": 0.1,
            "report_to": [],
            "use_cpu": True,
            "save_strategy": "no",
            "disable_tqdm": True,
            **arguments,
        },
    )
    return transformers.Trainer(
        model, settings, train_dataset=Sentences(), optimizers=(optimizer, None), callbacks=callback and [callback]
    )


def logged(run, key):
    return [entry[key] for entry in run.state.log_history if key in entry]


def test_the_trainer_logs_it_in_sequences_and_trains_as_before(tmp_path):
    plain = trainer(tmp_path / "plain", AveragingCallback(EMA()))
    plain.train()
    run = trainer(tmp_path / "run", AveragingCallback(EMA(), gradient_noise=True))
    beside = GradientNoise(run.model, samples_per_microbatch=2)
    beside.weigh_by_tokens(run.model)
    beside.attach(run.optimizer)
    run.train()
    assert logged(run, "loss") == logged(plain, "loss")
    assert all(map(torch.equal, run.model.parameters(), plain.model.parameters()))
    scale = beside.noise_scale().smoothed.scale
    assert math.isfinite(scale)
    assert logged(run, "noise_scale")[-1] == pytest.approx(scale, rel=1e-6)
    assert beside.noise_scale().samples == 8.0
    assert not logged(plain, "noise_scale")


@pytest.mark.parametrize("wrapped", [False, True])
def test_the_trainer_logs_what_the_optimizer_knows(tmp_path, wrapped):
    def make(model):
        optimizer = BiasCorrectedAdamW(model.named_parameters(), warm_start=0, exclude=())
        optimizer.weigh_by_tokens(model)
        return PrimalAveraging(optimizer, EMA(half_life_fraction=0.1)) if wrapped else optimizer

    known = trainer(tmp_path / "known", AveragingCallback(), make)
    known.train()
    beside = trainer(tmp_path / "beside", AveragingCallback(gradient_noise=2), lambda model: make(model))
    noise = GradientNoise(beside.model, samples_per_microbatch=2)
    noise.weigh_by_tokens(beside.model)
    noise.attach(beside.optimizer)
    beside.train()
    # Steps have different numbers of tokens, and the optimizer's unit is a token.
    assert logged(known, "noise_scale")[0] == pytest.approx(logged(beside, "noise_scale")[0])
    assert logged(known, "noise_scale")[-1] == pytest.approx(noise.noise_scale().smoothed.scale, rel=0.2)


def test_one_microbatch_is_refused_and_not_measured_unasked(tmp_path):
    with pytest.raises(ValueError, match="gradient_noise=True, and steps have one microbatch.*at least two"):
        trainer(tmp_path / "a", AveragingCallback(gradient_noise=True), gradient_accumulation_steps=1).train()
    run = trainer(tmp_path / "b", AveragingCallback(), gradient_accumulation_steps=1, max_steps=1)
    run.train()
    assert not logged(run, "noise_scale")


@pytest.mark.parametrize("value", [0, -1.0, math.nan, math.inf, "yes", None])
def test_bad_input(value):
    with pytest.raises(ValueError, match="gradient_noise=.*samples a microbatch has"):
        NoiseLog(value)


class Regression(pl.LightningModule):
    """A line through noise."""

    def __init__(self, make):
        super().__init__()
        torch.manual_seed(0)
        self.line, self._make = torch.nn.Linear(3, 1), make

    def training_step(self, batch, _):
        x, y = batch
        return (self.line(x) - y).square().mean()

    def configure_optimizers(self):
        return self._make(self)


def fit(folder, make, batch_size=4, **settings):
    generator = torch.Generator().manual_seed(1)
    data = TensorDataset(torch.randn(64, 3, generator=generator), 3.0 + torch.randn(64, 1, generator=generator))
    callback, module = LightningCallback(EMA(), **settings), Regression(make)
    run = pl.Trainer(
        max_epochs=2,
        accumulate_grad_batches=4,
        log_every_n_steps=1,
        accelerator="cpu",
        callbacks=[callback],
        logger=CSVLogger(folder),
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    run.fit(module, DataLoader(data, batch_size=batch_size, sampler=None if batch_size else range(64)))
    return run, module


def test_lightning_logs_it_in_samples(tmp_path):
    found = {}

    def make(module):
        optimizer = torch.optim.SGD(module.parameters(), lr=0.01)
        found["beside"] = GradientNoise(module, samples_per_microbatch=4)
        found["beside"].attach(optimizer)
        return optimizer

    run, _ = fit(tmp_path, make, gradient_noise=True)
    scale = found["beside"].noise_scale().smoothed.scale
    assert math.isfinite(scale)
    assert float(run.logged_metrics["train/noise_scale"]) == pytest.approx(scale, rel=1e-5)
    run, _ = fit(tmp_path, make)
    assert "train/noise_scale" not in run.logged_metrics


def test_lightning_logs_what_the_optimizer_knows_and_asks_for_the_size(tmp_path):
    bias_corrected = lambda module: BiasCorrectedAdamW(module.named_parameters(), warm_start=0)  # noqa: E731
    run, module = fit(tmp_path, bias_corrected)
    scale = 4 * module.optimizers().optimizer.noise_scale().smoothed.scale
    assert float(run.logged_metrics["train/noise_scale"]) == pytest.approx(scale, rel=1e-5)
    sgd = lambda module: torch.optim.SGD(module.parameters(), lr=0.01)  # noqa: E731
    with pytest.raises(ValueError, match="does not say how many samples a batch has; give the number"):
        fit(tmp_path, sgd, batch_size=None, gradient_noise=True)
    run, _ = fit(tmp_path, sgd, batch_size=None, gradient_noise=1)
    assert "train/noise_scale" in run.logged_metrics
