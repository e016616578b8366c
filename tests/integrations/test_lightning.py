"""Averages in Lightning: neutral, validated, checkpointed, resumed, exported; and what is refused."""

import dataclasses
import json
import re
import time
import warnings
from contextlib import nullcontext
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
import torchmetrics
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint, RichProgressBar, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.strategies import SingleDeviceStrategy
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from torch.optim.lr_scheduler import ExponentialLR, LambdaLR, OneCycleLR
from torch.utils.data import DataLoader, TensorDataset
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lagless import BEMA, EMA, mean_age, trajectory_weights
from lagless.averaging import _buffers, _offload
from lagless.checkpoints import CheckpointError
from lagless.integrations.lightning import AveragingCallback, load_average
from lagless.optim import PACE
from lagless.rules import AverageWarning

from ..processes import launch

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:.*{text}")
    for text in (
        "LeafSpec",  # Lightning's use of torch's pytrees
        "does not have many workers",
        "sampler has shuffling enabled",
        "Checkpoint directory .* exists and is not empty",
        "GPU available but not used",
    )
]

TEXT = "the mean of the path lags behind the path; what is left of the lag is a bias, and the bias has a size. " * 6
RULES = {"bema": BEMA.paper(update_freq=2), "ema": EMA(decay=0.8)}


def windows(length=16):
    tokens = torch.tensor(list(TEXT.encode()))
    return TensorDataset(tokens[: len(tokens) // length * length].view(-1, length))


def loader(**settings):
    return DataLoader(windows(), batch_size=4, **settings)


def llama(**settings):
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
        **{"attention_dropout": 0.1, **settings},
    )
    return LlamaForCausalLM(config)


class Language(pl.LightningModule):
    """A tiny Llama on bytes, with dropout, a metric object, and outputs gathered until the epoch ends."""

    def __init__(self, **settings):
        super().__init__()
        self.model = llama(**settings)
        self.accuracy = torchmetrics.MeanMetric()
        self.losses = []
        self.validations = 0

    def forward(self, tokens):
        return self.model(input_ids=tokens, labels=tokens, use_cache=False)

    def training_step(self, batch, index):
        return self(batch[0]).loss

    def validation_step(self, batch, index):
        output = self(batch[0])
        self.losses.append(output.loss)
        self.accuracy((output.logits[:, :-1].argmax(-1) == batch[0][:, 1:]).float())
        self.log("val_accuracy", self.accuracy)
        self.log("val_loss", output.loss, on_step=True, on_epoch=True, prog_bar=True)

    def on_validation_start(self):
        self.validations += 1

    def on_validation_epoch_end(self):
        self.log("val_worst", torch.stack(self.losses).max())
        self.losses.clear()

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


class Last(Callback):
    ended = False

    def on_train_end(self, trainer, module):
        self.ended = True


class Snapshots(Callback):
    """The weights after every batch, and what the run looked like after every validation."""

    def __init__(self):
        self.weights, self.metrics = [], []

    def on_train_batch_end(self, trainer, module, *_):
        self.weights.append([p.detach().clone() for p in module.parameters()])

    def on_validation_end(self, trainer, module):
        if not trainer.sanity_checking:
            self.metrics.append({name: value.clone() for name, value in trainer.callback_metrics.items()})


def trainer(folder, *callbacks, **settings):
    defaults = dict(
        max_epochs=2,
        accelerator="cpu",
        logger=CSVLogger(folder),
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
    )
    return pl.Trainer(callbacks=list(callbacks), default_root_dir=folder, **{**defaults, **settings})


def fit(folder, *callbacks, module=None, seed=0, train=None, validation=None, ckpt_path=None, **settings):
    torch.manual_seed(seed)
    module = module or Language()
    run = trainer(folder, *callbacks, **settings)
    run.fit(module, train or loader(shuffle=True), validation or loader(), ckpt_path=ckpt_path, weights_only=True)
    return run, module


def last_of(folder):
    return ModelCheckpoint(dirpath=folder, save_last=True)


def same(a, b):
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def averages(callback):
    return {name: callback.averager.read(name) for name in callback.averager.rules}


def assert_same_averages(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].keys() == b[name].keys() and same(list(a[name].values()), list(b[name].values()))


def loop_state(run):
    state = run.fit_loop.state_dict()
    return {name: value for name, value in state.items() if name != "state_dict"}


def test_training_is_bitwise_what_it_is_without_the_callback(tmp_path):
    runs = []
    for callbacks in ([], [AveragingCallback(RULES)]):
        snapshots = Snapshots()
        run, module = fit(
            tmp_path, *callbacks, snapshots, validation=loader(shuffle=True), val_check_interval=3, max_epochs=2
        )
        runs.append((run, module, snapshots, torch.rand(5)))
    (run, module, without, noise), (averaged_run, averaged_module, with_averages, averaged_noise) = runs
    assert len(without.weights) > 12
    assert all(same(a, b) for a, b in zip(without.weights, with_averages.weights, strict=True))
    assert same(list(module.state_dict().values()), list(averaged_module.state_dict().values()))
    assert torch.equal(noise, averaged_noise)
    assert loop_state(run) == loop_state(averaged_run)
    assert module.training and averaged_module.training
    for a, b in zip(without.metrics, with_averages.metrics, strict=True):
        assert a and all(torch.equal(a[name], b[name]) for name in a)


def test_every_validation_reports_live_and_averaged_models(tmp_path):
    callback, snapshots = AveragingCallback(RULES), Snapshots()
    run, module = fit(tmp_path, callback, snapshots)
    names = {"val_accuracy", "val_loss", "val_worst", "val_loss_epoch"}
    facts = {"distance", "mean_age", "effective_iterates", "updates"}
    expected = names | {f"{average}_{name}" for average in RULES for name in names | facts}
    assert len(snapshots.metrics) == 2 and all(metrics.keys() == expected for metrics in snapshots.metrics)
    for average in RULES:
        with callback.averager.applied(average):
            (alone,) = trainer(tmp_path, logger=False).validate(module, loader(), verbose=False)
        weights = trajectory_weights(RULES[average], range(callback.averager.step + 1))
        age = mean_age(weights, range(len(weights)))
        assert float(run.callback_metrics[f"{average}_mean_age"]) == pytest.approx(age)
        assert float(run.callback_metrics[f"{average}_updates"]) == callback.averager.updates(average)
        pairs = zip(callback.averager.read(average).values(), module.parameters(), strict=True)
        distance = sum(float((value - p.detach()).square().sum()) for value, p in pairs) ** 0.5
        assert float(run.callback_metrics[f"{average}_distance"]) == pytest.approx(distance, rel=1e-5)
        for name in ("val_accuracy", "val_loss_epoch", "val_worst"):
            assert float(run.callback_metrics[f"{average}_{name}"]) == alone[name], name
    assert run.progress_bar_metrics["bema_val_loss_epoch"] == float(run.callback_metrics["bema_val_loss"])
    rows = (Path(run.log_dir) / "metrics.csv").read_text().splitlines()
    columns = rows[0].split(",")
    steps = {name: [row.split(",")[columns.index("step")] for row in rows[1:] if row.split(",")[i]] for i, name in
             enumerate(columns)}  # fmt: skip
    assert steps["bema_val_loss_epoch"] == steps["ema_val_accuracy"] == steps["val_loss_epoch"]
    assert len(steps["val_loss_epoch"]) == 2


def test_several_loaders_and_chosen_averages(tmp_path):
    class Two(Language):
        def validation_step(self, batch, index, dataloader_idx=0):
            super().validation_step(batch, index)

    callback = AveragingCallback(RULES, evaluate="ema")
    validation = [loader(), loader()]
    run, _ = fit(tmp_path, callback, module=Two(), validation=validation, max_steps=4, val_check_interval=2)
    metrics = run.callback_metrics
    assert {"ema_val_loss_epoch/dataloader_idx_0", "ema_val_loss_epoch/dataloader_idx_1"} < metrics.keys()
    assert not [name for name in metrics if name.startswith("bema")]
    with pytest.raises(ValueError, match=r"evaluate=\['sma'\] are no averages; there are bema, ema"):
        fit(tmp_path, AveragingCallback(RULES, evaluate="sma"), max_steps=4)


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork")
def test_persistent_workers_serve_every_pass(tmp_path):
    workers = dict(num_workers=1, persistent_workers=True, multiprocessing_context="fork")
    callback = AveragingCallback(EMA(decay=0.8))
    settings = dict(max_steps=4, val_check_interval=2)
    plain, _ = fit(tmp_path, validation=loader(**workers), **settings)
    run, module = fit(tmp_path, callback, validation=loader(**workers), **settings)
    assert torch.equal(run.callback_metrics["val_loss"], plain.callback_metrics["val_loss"])
    with callback.averager.applied():
        (alone,) = trainer(tmp_path, logger=False).validate(module, loader(), verbose=False)
    assert float(run.callback_metrics["ema_val_loss"]) == alone["val_loss_epoch"]


@pytest.mark.parametrize("bar", [TQDMProgressBar, RichProgressBar])
def test_the_progress_bar_shows_every_pass(tmp_path, bar):
    class Counted(bar):
        def on_validation_end(self, trainer, module):
            self.totals.append(self.val_progress_bar.total)
            super().on_validation_end(trainer, module)

        def on_train_epoch_end(self, trainer, module):
            super().on_train_epoch_end(trainer, module)
            self.metrics = self.get_metrics(trainer, module)

    class Slow(Language):
        def on_validation_epoch_end(self):
            super().on_validation_epoch_end()
            time.sleep(0.2)  # long enough for the thread that draws

    progress = Counted()
    progress.totals = []
    fit(
        tmp_path,
        AveragingCallback(RULES),
        progress,
        module=Slow(),
        max_epochs=1,
        enable_progress_bar=True,
        num_sanity_val_steps=0,
    )
    assert progress.totals == [10, 10, 10]
    assert {"val_loss_epoch", "bema_val_loss_epoch", "ema_val_loss_epoch"} < progress.metrics.keys()


def test_early_stopping_follows_an_average_wherever_it_stands(tmp_path):
    # the loss falls, so the second check stops
    stopping = EarlyStopping("ema_val_loss", mode="max", patience=1, check_on_train_epoch_end=False)
    run, _ = fit(tmp_path, stopping, AveragingCallback(EMA(decay=0.5)), max_epochs=9)
    assert run.current_epoch == 2
    assert torch.isfinite(stopping.best_score)


class Scheduled(Language):
    """The schedule follows ``monitor``."""

    def __init__(self, monitor):
        super().__init__()
        self.monitor = monitor

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        self.schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": self.schedule, "monitor": self.monitor}}


@pytest.mark.parametrize("watcher", [EarlyStopping, ModelCheckpoint, Scheduled])
def test_what_is_monitored_before_the_first_update_is_refused(tmp_path, watcher):
    def run(update_after):
        rules = {"slow": EMA(decay=0.8, update_after=update_after), "slow_val": EMA(decay=0.8)}
        module, callbacks = Language(), [AveragingCallback(rules)]
        if watcher is Scheduled:
            module = Scheduled(monitor="slow_val_loss")
        else:
            callbacks.append(watcher(monitor="slow_val_loss"))
        fit(tmp_path, *callbacks, module=module, max_epochs=2)

    message = r"slow_val_loss is monitored, and validated at step 10, .* update of 'slow' \(EMA.*val_check_interval"
    with pytest.raises(ValueError, match=message):
        run(update_after=12)
    run(update_after=4)


@pytest.mark.filterwarnings("ignore:.*has had no update yet", "ignore:Early stopping conditioned on metric")
@pytest.mark.parametrize("monitor, strict", [("slow_val_loss", False), ("val_loss", True), ("slow_val_val_loss", True)])
def test_what_can_do_without_the_average_or_is_of_others_is_not_refused(tmp_path, monitor, strict):
    rules = {"slow": EMA(decay=0.8, update_after=12), "slow_val": EMA(decay=0.8)}
    fit(tmp_path, AveragingCallback(rules), EarlyStopping(monitor, strict=strict), max_epochs=2)


def test_a_learning_rate_schedule_follows_an_average(tmp_path):
    run, module = fit(tmp_path, AveragingCallback(EMA(decay=0.5)), module=Scheduled(monitor="ema_val_loss"))
    assert module.schedule.best == float(run.callback_metrics["ema_val_loss"])


def test_best_checkpoint_of_an_average_gives_its_model(tmp_path):
    best = ModelCheckpoint(monitor="bema_val_loss", filename="{step}-{bema_val_loss:.4f}")
    run, _ = fit(tmp_path, best, AveragingCallback(RULES), max_epochs=3)
    fresh = Language()
    fresh.load_state_dict(load_average(best.best_model_path, "bema"))
    (alone,) = trainer(tmp_path, logger=False).validate(fresh, loader(), verbose=False)
    assert alone["val_loss_epoch"] == float(best.best_model_score)
    with pytest.raises(ValueError, match="say which average you mean"):
        load_average(best.best_model_path)
    weights_only = tmp_path / "weights.ckpt"
    run.save_checkpoint(weights_only, weights_only=True)
    with pytest.raises(ValueError, match="holds no averages"):
        load_average(weights_only, "bema")


@pytest.mark.parametrize("storage", [{}, {"dtype": torch.bfloat16}], ids=str)
def test_resumed_equals_never_stopped(tmp_path, storage):
    # Lightning's checkpoints hold no random number generator, so this run draws no random numbers.
    def run(folder, epochs, ckpt_path=None):
        torch.manual_seed(3)
        module = Language(attention_dropout=0.0)
        callback, saved = AveragingCallback(RULES, **storage), last_of(folder)
        settings = dict(max_epochs=epochs, accumulate_grad_batches=3, ckpt_path=ckpt_path)
        trainer, _ = fit(tmp_path, callback, saved, module=module, train=loader(), **settings)
        return trainer, module, callback, saved.last_model_path

    whole_trainer, whole_module, whole, _ = run(tmp_path / "whole", 2)
    path = run(tmp_path / "part", 1)[-1]
    trainer, module, resumed, last = run(tmp_path / "part", 2, ckpt_path=path)
    assert resumed.averager.step == whole.averager.step == trainer.global_step == whole_trainer.global_step == 8
    assert same(list(module.state_dict().values()), list(whole_module.state_dict().values()))
    assert_same_averages(averages(resumed), averages(whole))
    loaded = load_average(last, "bema")
    assert all(torch.equal(loaded[key], value) for key, value in averages(whole)["bema"].items())
    for name in ("bema_val_loss", "ema_val_accuracy"):
        assert torch.equal(trainer.callback_metrics[name], whole_trainer.callback_metrics[name])


def test_resuming_without_the_averages_is_refused(tmp_path):
    folder = tmp_path / "plain"
    saved = last_of(folder)
    fit(tmp_path, saved, max_epochs=1)
    path = saved.last_model_path
    with pytest.raises(ValueError, match=r"last.ckpt holds no averages at step 10: .*on_missing_state='restart'"):
        fit(tmp_path, last_of(folder), AveragingCallback(RULES), ckpt_path=path)
    restarted = AveragingCallback(RULES, on_missing_state="restart")
    run, _ = fit(tmp_path, last_of(folder), restarted, ckpt_path=path)
    assert (restarted.averager.step, restarted.averager.updates("ema")) == (run.global_step, 10) == (20, 10)
    with pytest.raises(ValueError, match="on_missing_state='ignore'; it must be 'refuse' or 'restart'"):
        AveragingCallback(RULES, on_missing_state="ignore")


def test_resuming_with_other_rules_or_parameters_is_refused(tmp_path):
    folder = tmp_path / "averaged"
    saved = last_of(folder)
    fit(tmp_path, saved, AveragingCallback(EMA(decay=0.8)), max_epochs=1)
    path = saved.last_model_path
    with pytest.raises(ValueError, match="last.ckpt: .* was made with rules"):
        fit(tmp_path, last_of(folder), AveragingCallback(EMA(decay=0.9)), ckpt_path=path)

    class Frozen(Language):
        def on_train_start(self):
            raise AssertionError("the callback should have refused before")

        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            self.model.lm_head.requires_grad_(False)
            return optimizer

    with pytest.raises(ValueError, match="another set of parameters"):
        fit(tmp_path, last_of(folder), AveragingCallback(EMA(decay=0.8)), module=Frozen(), ckpt_path=path)


def test_the_same_callback_goes_on_in_a_second_fit_and_starts_anew_in_another_run(tmp_path):
    callback = AveragingCallback(EMA(decay=0.8))
    run, module = fit(tmp_path, callback, max_epochs=1)
    run.fit_loop.max_epochs = 2
    run.fit(module, loader(), loader())
    assert callback.averager.step == run.global_step == 20
    run, module = fit(tmp_path, callback, max_epochs=1)
    assert callback.averager.step == run.global_step == 10
    assert module.validations == 3  # sanity check, live, average
    run.fit_loop.max_epochs = 2
    with pytest.raises(ValueError, match="the earlier fit holds no averages"):
        run.fit(Language(), loader(), loader())  # a module that the averages are not of


def test_the_base_on_disk_is_the_start(tmp_path):
    module = Language()
    module.model.save_pretrained(tmp_path / "base")
    saved, settings = last_of(tmp_path), {"start": tmp_path / "base"}
    callback = AveragingCallback(BEMA.paper(update_freq=2), **settings)
    fit(tmp_path, callback, saved, module=module, max_epochs=1)
    expected = callback.averager.read()
    loaded = load_average(saved.last_model_path, **settings)
    assert all(torch.equal(loaded[name], value) for name, value in expected.items())


@dataclasses.dataclass
class Settings:
    width: int = 4


def test_settings_in_a_checkpoint_are_not_unpickled_unasked(tmp_path):
    class Configured(Language):
        def __init__(self, settings):
            super().__init__()
            self.save_hyperparameters()

    callback, saved = AveragingCallback(EMA(decay=0.8)), last_of(tmp_path)
    fit(tmp_path, callback, saved, module=Configured(Settings()), max_epochs=1)
    with pytest.raises(ValueError, match=r"objects of .*Settings, .*hyperparameters.*add_safe_globals\(\[Settings\]\)"):
        load_average(saved.last_model_path)
    with torch.serialization.safe_globals([Settings]):
        assert load_average(saved.last_model_path)


def test_validating_a_checkpoint_does_not_resume_the_next_fit(tmp_path):
    callback, saved = AveragingCallback(EMA(decay=0.8)), last_of(tmp_path)
    run, module = fit(tmp_path, callback, saved, max_epochs=1)
    run.validate(module, loader(), ckpt_path=saved.last_model_path, weights_only=True, verbose=False)
    run, _ = fit(tmp_path, callback, max_epochs=1)
    assert callback.averager.step == run.global_step == 10


def test_a_step_that_the_gradient_scaler_skips_does_not_count(tmp_path):
    class Watched(Language):
        changes = 0

        def optimizer_step(self, *args, **kwargs):
            before = [p.detach().clone() for p in self.parameters()]
            super().optimizer_step(*args, **kwargs)
            self.changes += not same(before, [p.detach() for p in self.parameters()])

    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**60, backoff_factor=2.0**-25)
    callback = AveragingCallback(EMA(decay=0.8))
    run, module = fit(
        tmp_path, callback, module=Watched(), max_epochs=1, plugins=[MixedPrecision("16-mixed", "cpu", scaler)]
    )
    assert 0 < module.changes < run.global_step == 10
    assert callback.averager.step == module.changes


def test_bfloat16_keeps_float32_averages(tmp_path):
    mixed, true = AveragingCallback(EMA(decay=0.8)), AveragingCallback(EMA(decay=0.8))
    fit(tmp_path, mixed, max_epochs=1, precision="bf16-mixed")
    _, module = fit(tmp_path, true, max_epochs=1, precision="bf16-true")
    assert next(module.parameters()).dtype == torch.bfloat16
    for callback in (mixed, true):
        assert {t.dtype for t in callback.averager.read().values()} == {torch.float32}


def test_frozen_and_tied_parameters(tmp_path):
    class Tuned(Language):
        def __init__(self):
            super().__init__(tie_word_embeddings=True)
            self.model.model.layers[0].requires_grad_(False)

    callback, best = AveragingCallback(EMA(decay=0.8)), last_of(tmp_path)
    _, module = fit(tmp_path, callback, best, module=Tuned(), max_epochs=1)
    average = callback.averager.read()
    assert not any(name.startswith("model.model.layers.0.") for name in average)
    assert average["model.lm_head.weight"] is average["model.model.embed_tokens.weight"]
    loaded, expected = load_average(best.last_model_path), {**module.state_dict(), **average}
    assert loaded.keys() == expected.keys() and same(list(loaded.values()), list(expected.values()))


def test_compiled_modules(tmp_path):
    class Inner(Language):
        def __init__(self):
            super().__init__()
            self.model = torch.compile(self.model, backend="eager")

    callback, best = AveragingCallback(EMA(decay=0.8)), last_of(tmp_path)
    _, module = fit(tmp_path, callback, best, module=Inner(), max_epochs=1)
    loaded, average = load_average(best.last_model_path), callback.averager.read()
    assert loaded.keys() == module.state_dict().keys()
    key = "model.lm_head.weight"
    assert torch.equal(loaded["model._orig_mod.lm_head.weight"], average[key])


class Manual(Language):
    """Two optimizers, stepped by hand: the body every batch, the head every second one."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def configure_optimizers(self):
        head = self.model.lm_head.parameters()
        return torch.optim.SGD(self.model.model.parameters(), lr=0.1), torch.optim.SGD(head, lr=0.1)

    def training_step(self, batch, index):
        body, head = self.optimizers()
        self.manual_backward(self(batch[0]).loss)
        body.step()
        body.zero_grad()
        if index % 2 == 1:
            head.step()
            head.zero_grad()


@pytest.mark.parametrize("optimizer, steps", [(0, 10), (1, 5)])
def test_manual_optimization_counts_the_steps_of_one_optimizer(tmp_path, optimizer, steps):
    callback = AveragingCallback(EMA(decay=0.8), optimizer=optimizer)
    late = pytest.warns(UserWarning, match="one step late") if optimizer == 0 else nullcontext()
    with late:  # the other optimizer steps later
        fit(tmp_path, callback, module=Manual(), max_epochs=1)
    assert callback.averager.step == steps


@pytest.mark.parametrize("optimizer", [None, 2, -1])
def test_several_optimizers_need_a_choice(tmp_path, optimizer):
    callback = AveragingCallback(EMA(decay=0.8), optimizer=optimizer)
    with pytest.raises(ValueError, match=f"optimizer={optimizer}, and the module has 2 optimizers"):
        fit(tmp_path, callback, module=Manual(), max_epochs=1)


def test_a_run_too_short_for_an_update_is_refused_before_training(tmp_path):
    snapshots = Snapshots()
    with pytest.raises(ValueError, match="give no update up to step 3 "):
        fit(tmp_path, AveragingCallback(BEMA.paper(update_freq=4)), snapshots, max_epochs=1, accumulate_grad_batches=4)
    assert not snapshots.weights


def test_a_run_that_stops_before_the_first_update_exports_no_untrained_average(tmp_path):
    class Stop(Callback):
        def on_train_batch_end(self, trainer, *_):
            trainer.should_stop = trainer.global_step == 3

    rules = {"late": EMA(decay=0.8, update_after=3), "early": EMA(decay=0.8)}
    callback = AveragingCallback(rules, export=tmp_path / "out")
    late = pytest.warns(UserWarning, match=r"'late' \(EMA.* has had no update yet, so this validation has no late_")
    fit(tmp_path, AveragingCallback(rules, export=tmp_path / "out"), max_epochs=1)  # an earlier run
    assert len(list((tmp_path / "out").iterdir())) == 4
    last = Last()
    with late, pytest.raises(RuntimeError, match="stopped at step 3, before the first update of late, so there is no"):
        fit(tmp_path, callback, Stop(), last, max_epochs=1)
    assert [path.name for path in sorted((tmp_path / "out").iterdir())] == ["early", "early.ckpt"]
    record = json.loads((tmp_path / "out" / "early" / "lagless.json").read_text())
    assert (record["rule"]["decay"], record["step"], record["updates"]) == (0.8, 3, 3)
    assert last.ended  # the error silences nobody


@pytest.mark.parametrize("stranger", ["ema/thesis.txt", "ema.ckpt"])
def test_exports_replace_exports_only(tmp_path, stranger):
    class Write(Callback):
        def on_train_batch_end(self, trainer, *_):
            file.write_text("years of work")

    file, callback = tmp_path / "out" / stranger, AveragingCallback(EMA(decay=0.8), export=tmp_path / "out")
    file.parent.mkdir(parents=True)
    snapshots = Snapshots()
    for trained in (2, 0):  # the first time the file comes during training, the second time it is there before
        with pytest.raises(CheckpointError, match="lagless did not write"):
            fit(tmp_path, callback, Write(), snapshots, max_steps=2)
        assert file.read_text() == "years of work" and len(snapshots.weights) == trained
        snapshots.weights.clear()
    file.unlink()
    for steps in (2, 3):
        fit(tmp_path, callback, max_steps=steps)
        assert json.loads((tmp_path / "out" / "ema" / "lagless.json").read_text())["step"] == steps


class Late(_offload.CopyStream):
    """Copies that take their time."""

    def copy(self, pieces, copies):
        time.sleep(0.1)
        return super().copy(pieces, copies)


@pytest.mark.parametrize("interrupted", [False, True])
def test_averages_on_the_host_are_complete_when_fit_returns(tmp_path, monkeypatch, interrupted):
    monkeypatch.setattr(_offload, "CopyStream", Late)
    monkeypatch.setattr(_buffers, "can_overlap", lambda device: True)

    class Interrupt(Callback):
        def on_train_batch_end(self, trainer, *_):
            if interrupted and trainer.global_step == 2:
                raise ArithmeticError

    callback = AveragingCallback(EMA(decay=0.8), device="cpu", export=False)
    with pytest.raises(ArithmeticError) if interrupted else nullcontext():
        _, module = fit(tmp_path, callback, Interrupt(), max_steps=3, limit_val_batches=0)
    with torch.no_grad():
        for parameter in callback.averager._live.tensors():
            parameter.zero_()  # as loading other weights does
    assert callback.averager.read()  # else refused, being mixed


def test_fast_dev_run_is_no_reason_to_refuse(tmp_path):
    callback = AveragingCallback(BEMA.paper(update_freq=400), export=tmp_path / "out")
    with pytest.warns(UserWarning, match="has had no update yet"):
        fit(tmp_path, callback, fast_dev_run=True)
    assert callback.averager.step == 1 and not (tmp_path / "out").exists()


def tokenizer():
    words = {word: i for i, word in enumerate(sorted(set(TEXT.split())))}
    inner = Tokenizer(models.WordLevel(words | {"<unk>": len(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>")


def test_exported_models_load_without_lagless(tmp_path):
    module, callback = Language(), AveragingCallback(RULES)
    module.tokenizer = tokenizer()
    run, _ = fit(tmp_path, callback, module=module, max_epochs=1)
    live = {name: value.clone() for name, value in module.state_dict().items()}
    for name in RULES:
        folder = Path(run.log_dir) / "averaged"
        expected = callback.averager.read(name)
        checkpoint = Language.load_from_checkpoint(folder / f"{name}.ckpt", weights_only=True)
        pretrained = AutoModelForCausalLM.from_pretrained(folder / name)
        for key, value in expected.items():
            assert torch.equal(checkpoint.state_dict()[key], value)
            assert torch.equal(pretrained.state_dict()[key.removeprefix("model.")], value)
            assert not torch.equal(live[key], value)
        assert (
            AutoTokenizer.from_pretrained(folder / name)("the lag").input_ids == module.tokenizer("the lag").input_ids
        )
    assert same(list(module.state_dict().values()), list(live.values()))


def test_each_of_several_pretrained_models_has_its_folder(tmp_path):
    class Pair(Language):
        def __init__(self):
            super().__init__()
            self.other, self.reference = llama(), llama().requires_grad_(False)

    fit(tmp_path, AveragingCallback(EMA(decay=0.8), export=tmp_path / "out"), module=Pair(), max_steps=2)
    found = [path.name for path in sorted((tmp_path / "out" / "ema").iterdir())]
    assert found == ["README.md", "lagless.json", "model", "other"]
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "ema" / "other")


def test_nothing_is_exported_on_request(tmp_path):
    run, _ = fit(tmp_path, AveragingCallback(EMA(decay=0.8), export=False), max_steps=2)
    assert not (Path(run.log_dir) / "averaged").exists()


def test_a_failing_validation_leaves_live_weights_and_callbacks_in_place(tmp_path):
    class Fails(Language):
        passes = 0

        def on_validation_start(self):
            self.passes += 1
            if self.passes == 3:  # after the sanity check and the live model
                raise ArithmeticError("third pass")

    callback, snapshots = AveragingCallback(EMA(decay=0.8)), Snapshots()
    torch.manual_seed(0)
    module, run = Fails(), trainer(tmp_path, callback, snapshots)
    loggers = list(run.loggers)
    with pytest.raises(ArithmeticError, match="third pass"):
        run.fit(module, loader(), loader())
    assert same([p.detach() for p in module.parameters()], snapshots.weights[-1])
    assert {callback, snapshots} <= set(run.callbacks) and run.loggers == loggers
    run.optimizers[0].step()
    assert callback.averager.step == 10  # it has let go of the optimizer


def test_strategies_that_shard_parameters_are_refused(tmp_path):
    class Sharded(SingleDeviceStrategy):
        restore_checkpoint_after_setup = True

    with pytest.raises(NotImplementedError, match="Sharded shards parameters.*Use one device or DDP"):
        fit(tmp_path, AveragingCallback(EMA(decay=0.8)), strategy=Sharded(torch.device("cpu")), max_steps=2)


def test_the_package_under_its_other_name(tmp_path):
    import pytorch_lightning

    class Small(pytorch_lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(16, 1)

        def training_step(self, batch, index):
            return self.layer(batch[0] / 128).square().mean()

        def validation_step(self, batch, index):
            self.log("val_loss", self.training_step(batch, index))

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    callback = AveragingCallback(EMA(decay=0.8), export=tmp_path / "out")
    run = pytorch_lightning.Trainer(
        max_epochs=1,
        accelerator="cpu",
        callbacks=[pytorch_lightning.callbacks.EarlyStopping("ema_val_loss"), callback],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    run.fit(Small(), loader(), loader())
    assert torch.isfinite(run.callback_metrics["ema_val_loss"])
    loaded = Small.load_from_checkpoint(tmp_path / "out" / "ema.ckpt", weights_only=True)
    assert torch.equal(loaded.layer.weight, callback.averager.read()["layer.weight"])


class Small(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 1)

    def training_step(self, batch, index):
        return (self.layer(batch[0]) - 1).square().mean()

    def validation_step(self, batch, index):
        self.log("val_loss", self.training_step(batch, index), sync_dist=True)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit_on_ranks(folder):
    torch.manual_seed(0)
    module, data = Small(), DataLoader(TensorDataset(torch.randn(16, 3)), batch_size=4)
    callback = AveragingCallback(BEMA.paper(update_freq=2), export=folder)
    run = trainer(folder, callback, devices=2, strategy="ddp", logger=False)
    run.fit(module, data, data)
    rank, loss = run.global_rank, run.callback_metrics["bema_val_loss"]
    torch.save((callback.averager.read()["layer.weight"], loss), folder / f"rank{rank}.pt")


def test_ranks_of_ddp_hold_the_same_average_and_one_writes_it(tmp_path):
    for rank in launch(fit_on_ranks, 2, tmp_path):
        assert rank.exitcode == 0, rank.output
    (weight, loss), (other_weight, other_loss) = (torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2))
    assert torch.equal(weight, other_weight) and torch.equal(loss, other_loss)
    exported = torch.load(tmp_path / "bema.ckpt", weights_only=True)["state_dict"]["layer.weight"]
    assert torch.equal(exported, weight)


class Pulled(Language):
    """Trained by PACE; if it says so, evaluated with PACE's average by its own hooks."""

    def __init__(self, switches=False):
        torch.manual_seed(0)
        super().__init__()
        self.switches = switches

    def configure_optimizers(self):
        return PACE(self.parameters(), lr=1e-2, average=EMA(decay=0.8))

    def on_validation_start(self):
        super().on_validation_start()
        if self.switches:
            self.optimizers().optimizer.eval()

    def on_validation_end(self):
        if self.switches:
            self.optimizers().optimizer.train()


@pytest.mark.parametrize("switches", [False, True])
@pytest.mark.parametrize("rules", [None, {"mine": BEMA.paper(update_freq=2)}])
def test_the_average_of_an_optimizer_is_validated_and_exported(tmp_path, rules, switches):
    callback, snapshots, last = AveragingCallback(rules), Snapshots(), last_of(tmp_path)
    run, module = fit(tmp_path, callback, snapshots, last, module=Pulled(switches))
    fit(tmp_path / "plain", plain := Snapshots(), module=Pulled(switches))
    assert all(same(a, b) for a, b in zip(snapshots.weights, plain.weights, strict=True))
    assert same(list(module.parameters()), snapshots.weights[-1])  # the module keeps the live weights
    [optimizer] = run.optimizers
    average = optimizer.read(module)
    folder = Path(run.log_dir, "averaged")
    stored = torch.load(folder / "pace.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(stored[name], value) for name, value in average.items())
    assert any(not torch.equal(stored[name], p) for name, p in module.named_parameters())
    record = json.loads((folder / "pace/lagless.json").read_text())
    assert (record["optimizer"], record["step"], record["weights"]) == ("PACE", len(snapshots.weights), "average")
    assert {path.name for path in folder.iterdir() if path.is_dir()} == {"pace", *(rules or ())}
    metrics = snapshots.metrics[-1]
    assert ("mine_val_loss" in metrics) == (rules is not None)
    assert (metrics["pace_val_loss"] == metrics["val_loss"]) == switches
    saved = torch.load(last.last_model_path, weights_only=True)["state_dict"]
    assert all(torch.equal(saved[name], p) for name, p in module.named_parameters())
    if rules and not switches:  # whose hooks would put the other average in its place
        with callback.averager.applied("mine"):
            again = run.validate(module, loader(), verbose=False)[0]["val_loss_epoch"]
        assert again == pytest.approx(float(metrics["mine_val_loss"]), rel=1e-5)


def test_a_rule_with_the_name_of_the_optimizers_average_is_refused(tmp_path):
    with pytest.raises(ValueError, match="'pace' is the average of the optimizer; rename"):
        fit(tmp_path, AveragingCallback({"pace": EMA()}), module=Pulled())


class Decayed(pl.LightningModule):
    """Four weights, for a learning rate that a function or a scheduler without one decides."""

    def __init__(self, make):
        super().__init__()
        self.weights, self.make = nn.Linear(4, 1), make

    def training_step(self, batch, _):
        return self.weights(batch[0]).square().mean()

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        return [optimizer], [{"scheduler": self.make(optimizer), "interval": "step"}]


@pytest.mark.parametrize(
    "make, rules, said",
    [
        (lambda o: LambdaLR(o, lambda t: 1.0), None, None),
        (lambda o: LambdaLR(o, lambda t: 1.0 - t / 16), None, "learning rate ends at 6% of its peak"),
        (lambda o: ExponentialLR(o, 0.5), None, "learning rate ends at 0% of its peak"),
        (lambda o: OneCycleLR(o, 0.1, total_steps=17), None, "learning rate ends at 0% of its peak"),
        (
            lambda o: LambdaLR(o, lambda t: 1.0),
            {"bema": BEMA.paper(update_freq=2)},
            r"average 'bema': .*θ_0 after 16 steps",
        ),
    ],
)
def test_averages_and_rates_are_warned_of_once(tmp_path, make, rules, said):
    settings = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    callback = AveragingCallback(rules, export=False)
    trainer = pl.Trainer(
        max_steps=16, default_root_dir=tmp_path, callbacks=[callback], enable_checkpointing=False, **settings
    )
    data = DataLoader(TensorDataset(torch.ones(16, 4)), batch_size=1)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always", AverageWarning)
        trainer.fit(Decayed(make), data)
    messages = [str(w.message) for w in found if w.category is AverageWarning]
    assert len(messages) == (said is not None)
    assert said is None or re.search(said, messages[0])
