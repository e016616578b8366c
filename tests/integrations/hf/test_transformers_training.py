"""The ways in which people train: each must average the weights of every real optimizer step, and nothing else."""

import time

import pytest
import torch
from safetensors.torch import load_file
from tests.integrations.hf.conftest import COMPILES_LAYERS
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from lagless import BEMA, EMA, Averager
from lagless.averaging import _buffers, _offload
from lagless.integrations.transformers import AveragingCallback

RULE = BEMA.paper(update_freq=2)


def check(hf, folder, callback, recorder, rule=RULE):
    """The exported model is the rule's average of the recorded weights."""
    model = AutoModelForCausalLM.from_pretrained(folder / "averaged/bema", dtype=torch.float32)
    averages = recorder.average(rule)
    hf.close({k: v for k, v in hf.weights(model).items() if k in averages}, averages)
    assert callback.averager.step == len(recorder.iterates) - 1


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"gradient_accumulation_steps": 4},
        {"activation_checkpointing": True},
        {"bf16": True},
        {"max_steps": -1, "num_train_epochs": 2, "save_strategy": "epoch", "eval_strategy": "epoch"},
        {"torch_compile": True, "torch_compile_backend": "eager", "eval_strategy": "steps", "eval_steps": 4},
        {"optim": "sgd", "max_grad_norm": 0.0},
        {"group_by_length": True, "auto_find_batch_size": True, "include_num_input_tokens_seen": "all"},
        {"neftune_noise_alpha": 5.0},
    ],
    ids=lambda settings: next(iter(settings), "plain"),
)
def test_settings_of_the_trainer(hf, tmp_path, settings):
    if "group_by_length" in settings and "train_sampling_strategy" in TrainingArguments.__dataclass_fields__:
        settings = {key: value for key, value in settings.items() if key != "group_by_length"}
        settings["train_sampling_strategy"] = "group_by_length"
    callback, recorder = AveragingCallback(RULE), hf.recorder()
    trainer = hf.trainer(tmp_path, [callback, recorder], **settings)
    trainer.train()
    steps = settings.get("max_steps", 8)
    assert callback.averager.step == trainer.state.global_step == (20 if steps == -1 else steps)
    check(hf, tmp_path, callback, recorder)


@pytest.mark.parametrize(
    "optim", ["adamw_torch", "adamw_torch_fused"]
)  # the scaler calls a fused step, which does nothing
def test_steps_that_a_gradient_scaler_skips_do_not_count(hf, tmp_path, optim):
    """What fp16=True does, with the scaler itself; transformers allows fp16 on accelerators alone."""

    class Scaled(Trainer):
        def create_accelerator_and_postprocess(self):
            super().create_accelerator_and_postprocess()
            self.accelerator.scaler = torch.amp.GradScaler("cpu", 2.0**127, 2.0**8, 2.0**-8, growth_interval=3)

    callback, recorder = AveragingCallback({"bema": RULE, "ema": EMA(decay=0.5)}), hf.recorder()
    hf.trainer(tmp_path, [callback, recorder], kind=Scaled, max_steps=20, max_grad_norm=0.0, optim=optim).train()
    moved = [recorder.iterates[0]]
    moved += [b for a, b in zip(recorder.iterates, recorder.iterates[1:], strict=False) if not hf.same(a, b)]
    assert 4 < len(moved) < len(recorder.iterates) == 21
    assert callback.averager.updates("ema") == len(moved) - 1
    recorder.iterates = moved
    check(hf, tmp_path, callback, recorder)


def test_bfloat16_parameters_have_float32_averages(hf, tmp_path):
    callback, recorder = AveragingCallback(RULE), hf.recorder()
    trainer = hf.trainer(tmp_path, [callback, recorder], model=hf.model().bfloat16(), learning_rate=1e-4, max_steps=40)
    trainer.train()
    averages = callback.averager.read()
    expected = recorder.average(RULE)
    hf.close({k: averages[k] for k in expected}, expected)
    stored = load_file(tmp_path / "averaged/bema/model.safetensors")
    assert all(stored[k].dtype == torch.bfloat16 and torch.equal(stored[k], v.bfloat16()) for k, v in averages.items())


def test_frozen_layers(hf, tmp_path):
    model = hf.model()
    for parameter in (*model.model.embed_tokens.parameters(), *model.model.layers[0].parameters()):
        parameter.requires_grad = False
    start = {name: p.clone() for name, p in model.named_parameters()}
    callback, recorder = AveragingCallback(RULE), hf.recorder()
    hf.trainer(tmp_path, [callback, recorder], model=model, eval_strategy="steps", eval_steps=4).train()
    check(hf, tmp_path, callback, recorder)
    stored = load_file(tmp_path / "averaged/bema/model.safetensors")
    frozen = start.keys() - recorder.iterates[0].keys()
    assert len(frozen) > 5 and all(torch.equal(stored[name], start[name]) for name in frozen)


def test_tied_embeddings_count_once_and_stay_tied(hf, tmp_path):
    callback, recorder = AveragingCallback(RULE), hf.recorder()
    settings = {"eval_strategy": "steps", "eval_steps": 4}
    trainer = hf.trainer(tmp_path, [callback, recorder], model=hf.model(tie_word_embeddings=True), **settings)
    trainer.train()
    check(hf, tmp_path, callback, recorder)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "averaged/bema")
    for tied in (model, trainer.model):
        assert tied.lm_head.weight.data_ptr() == tied.model.embed_tokens.weight.data_ptr()


def test_a_second_train_starts_new_averages_and_lets_go_of_the_first(hf, tmp_path):
    callback, recorder = AveragingCallback(RULE), hf.recorder()
    trainer = hf.trainer(tmp_path, [callback, recorder], save_strategy="steps", save_steps=8)
    trainer.train()
    first = callback.averager
    trainer.train()
    assert first.step == 8 and callback.averager is not first
    check(hf, tmp_path, callback, recorder)
    saved, state = load_file(tmp_path / "checkpoint-8/averages.safetensors"), callback.averager.state_dict()["tensors"]
    assert hf.same(saved, state)


def test_training_again_after_an_error_lets_go_of_the_first_averages(hf, tmp_path):
    class Once(Trainer):
        failed = False

        def training_step(self, *args, **kwargs):
            if self.state.global_step == 3 and not Once.failed:
                Once.failed = True
                raise KeyError("a bad batch")
            return super().training_step(*args, **kwargs)

    callback, recorder = AveragingCallback(RULE), hf.recorder()
    trainer = hf.trainer(tmp_path, [callback, recorder], kind=Once)
    with pytest.raises(KeyError, match="a bad batch"):
        trainer.train()
    first = callback.averager
    trainer.train()
    assert first.step == 3
    check(hf, tmp_path, callback, recorder)


def test_auto_find_batch_size_starts_again_with_a_smaller_batch(hf, tmp_path):
    class Small(Trainer):
        tried = []

        def training_step(self, model, inputs, *args, **kwargs):
            Small.tried.append(len(inputs["input_ids"]))
            if self.state.global_step == 1 and len(inputs["input_ids"]) > 2:
                raise RuntimeError("CUDA out of memory.")
            return super().training_step(model, inputs, *args, **kwargs)

    callback, recorder = AveragingCallback(RULE), hf.recorder()
    settings = {"auto_find_batch_size": True, "per_device_train_batch_size": 4}
    trainer = hf.trainer(tmp_path, [callback, recorder], kind=Small, **settings)
    trainer.train()
    assert 4 in Small.tried and Small.tried[-1] < 4
    check(hf, tmp_path, callback, recorder)


def test_a_model_made_anew_for_each_training(hf, tmp_path):
    callback, recorder = AveragingCallback(RULE), hf.recorder()

    class Init(Trainer):
        def __init__(self, model, *args, **kwargs):
            super().__init__(None, *args, model_init=lambda: hf.model(seed=3), **kwargs)

    hf.trainer(tmp_path, [callback, recorder], kind=Init).train()
    check(hf, tmp_path, callback, recorder)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # within torch.compile
@pytest.mark.parametrize(
    "level, wrap",
    [
        pytest.param("_orig_mod", lambda layer: torch.compile(layer, backend="eager"), marks=COMPILES_LAYERS),
        ("_checkpoint_wrapped_module", checkpoint_wrapper),
    ],
)
def test_a_model_with_wrapped_layers_becomes_the_best_average_in_all_of_them(hf, tmp_path, level, wrap):
    callback, recorder = AveragingCallback(RULE), hf.recorder()
    model = hf.model()
    for index, layer in enumerate(model.model.layers):
        model.model.layers[index] = wrap(layer)
    settings = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
    best = {"metric_for_best_model": "eval_bema_loss", "load_best_model_at_end": True, "learning_rate": 1e-3}
    trainer = hf.trainer(tmp_path, [callback, recorder], model=model, **settings | best)
    trainer.train()
    assert any(level in name for name in recorder.iterates[0])
    hf.close(hf.weights(trainer.model), recorder.average(RULE, at=trainer.state.best_global_step))


def test_storage_options_reach_the_averager(hf, tmp_path):
    hf.model().save_pretrained(tmp_path / "base")
    callback, recorder = AveragingCallback(RULE, start=tmp_path / "base", dtype=torch.float64), hf.recorder()
    hf.trainer(tmp_path / "run", [callback, recorder]).train()
    check(hf, tmp_path / "run", callback, recorder)
    tensors = callback.averager.state_dict()["tensors"]
    assert all(tensor.dtype == torch.float64 for tensor in tensors.values())
    assert sum(t.numel() for t in tensors.values()) == sum(p.numel() for p in recorder.iterates[0].values())
    assert type(callback.averager) is Averager


def test_averages_on_the_host_are_complete_before_the_best_weights_come_back(hf, tmp_path, monkeypatch):
    """Copies that start late stand for a busy device; the CPU plays the accelerator."""

    class Late(_offload.CopyStream):
        def copy(self, pieces, copies):
            time.sleep(0.02)
            return super().copy(pieces, copies)

    monkeypatch.setattr(_offload, "CopyStream", Late)
    monkeypatch.setattr(_buffers, "can_overlap", lambda device: True)
    monkeypatch.setattr(_buffers, "_CPU_BLOCK", 1 << 10)
    callback, recorder = AveragingCallback(RULE, evaluate=[], device="cpu"), hf.recorder()
    settings = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "best", "learning_rate": 0.3}
    best = {"metric_for_best_model": "eval_loss", "load_best_model_at_end": True}
    trainer = hf.trainer(tmp_path, [callback, recorder], **settings | best)
    trainer.train()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "averaged/bema", dtype=torch.float32)
    hf.close(hf.weights(model), recorder.average(RULE, at=trainer.state.best_global_step))
