"""AveragingCallback in TRL's trainers, and where TRL's own BEMACallback fails."""

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, Trainer

from lagless import BEMA, EMA
from lagless.integrations.transformers import AveragingCallback

trl = pytest.importorskip("trl")
pytestmark = pytest.mark.filterwarnings(  # TRL's and PEFT's own use of transformers
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)
RULE = BEMA.paper(update_freq=2)
FAILS = pytest.mark.skipif(int(trl.__version__.split(".")[0]) < 1, reason="trl 0.24 fails in other ways, or not yet")
EVALUATING = {"eval_strategy": "steps", "eval_steps": 4}


def text(hf, first, count):
    return Dataset.from_dict({"text": [" ".join(hf.words[i : i + 8]) for i in range(first, first + count)]})


def pairs(hf, first, count):
    rows = [hf.words[i : i + 8] for i in range(first, first + count)]
    columns = {"prompt": slice(0, 4), "chosen": slice(4, 6), "rejected": slice(6, 8)}
    return Dataset.from_dict({k: [" " * (k != "prompt") + " ".join(r[s]) for r in rows] for k, s in columns.items()})


def prompts(hf, first, count):
    return Dataset.from_dict({"prompt": [" ".join(hf.words[i : i + 4]) for i in range(first, first + count)]})


def variety(completions, **kwargs):
    return [float(len(set(completion.split()))) for completion in completions]


TRAINERS = {
    "sft": (trl.SFTTrainer, trl.SFTConfig, text, {}),
    "dpo": (trl.DPOTrainer, trl.DPOConfig, pairs, {}),
    "grpo": (
        trl.GRPOTrainer,
        trl.GRPOConfig,
        prompts,
        {"num_generations": 2, "num_generations_eval": 2, "max_completion_length": 5, "beta": 0.04},
    ),
}


def known(config, settings):
    """The settings that this release of TRL has."""
    return {key: value for key, value in settings.items() if key in config.__dataclass_fields__}


def make(hf, folder, kind, callbacks, **settings):
    trainer, config, data, own = TRAINERS[kind]
    hf.model().save_pretrained(folder / "base")  # DPO and GRPO load their reference model from the model's path
    model = AutoModelForCausalLM.from_pretrained(folder / "base")
    torch.manual_seed(0)
    settings = (
        hf.quiet | {"bf16": False, "gradient_checkpointing": False, "activation_checkpointing": False} | own | settings
    )
    options = {"reward_funcs": variety} if kind == "grpo" else {}
    return trainer(
        model=model,
        args=config(str(folder), **known(config, settings)),
        train_dataset=data(hf, 0, 16),
        eval_dataset=data(hf, 20, 4),
        processing_class=hf.tokenizer,
        callbacks=callbacks,
        **options,
    )


@pytest.mark.parametrize("kind", TRAINERS)
def test_trainers_average_evaluate_and_export_and_train_on_as_without(hf, tmp_path, kind):
    def run(folder, callbacks):
        recorder = hf.recorder()
        trainer = make(hf, tmp_path / folder, kind, [*callbacks, recorder], **EVALUATING)
        trainer.train()
        return trainer, recorder

    trainer, recorder = run("ours", [AveragingCallback(RULE)])
    _, plain = run("plain", [])
    # GRPO's iterates are what its generations were rewarded for, so these were made with the live weights.
    assert all(hf.same(a, b) for a, b in zip(recorder.iterates, plain.iterates, strict=True))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "ours/averaged/bema")
    hf.close(hf.weights(model), recorder.average(RULE))
    evaluated = [entry for entry in trainer.state.log_history if "eval_bema_loss" in entry]
    assert [entry["step"] for entry in evaluated] == [4, 8]


@pytest.mark.parametrize(
    "kind, metric", [("sft", "mean_token_accuracy"), ("dpo", "rewards/margins"), ("grpo", "reward")]
)
def test_metrics_that_trl_collects_beside_the_loop_keep_their_models(hf, tmp_path, kind, metric):
    trainer = make(hf, tmp_path, kind, [AveragingCallback(RULE)], learning_rate=0.1, **EVALUATING)
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if entry["step"] == 8]
    assert [f"eval_{metric}" in entry for entry in entries if "eval_loss" in entry] == [True]
    [averaged] = [entry for entry in entries if "eval_bema_loss" in entry]
    assert f"eval_bema_{metric}" in averaged and f"eval_{metric}" not in averaged
    with trainer_average(trainer):
        alone = trainer.evaluation_loop(trainer.get_eval_dataloader(), "", True, metric_key_prefix="eval")
    assert alone.metrics["eval_loss"] == pytest.approx(averaged["eval_bema_loss"]) or kind == "grpo"
    if not hasattr(trainer, "_metrics"):  # DPO of trl 0.24 keeps them elsewhere
        return
    collected = trainer._metrics["eval"][metric]
    assert sum(collected) / len(collected) == pytest.approx(averaged[f"eval_bema_{metric}"]) or kind == "grpo"


def trainer_average(trainer):
    [callback] = [c for c in trainer.callback_handler.callbacks if isinstance(c, AveragingCallback)]
    return callback.averager.applied("bema")


# Where BEMACallback fails. Each test names what it does there, and shows that it still does, as a warning to those who
# read the comparison when it no longer holds.


def test_trl_frozen_parameters(hf, tmp_path):
    """BEMACallback pairs the trainable parameters with all of them, at its first update."""

    def run(callback):
        model = hf.model()
        model.model.embed_tokens.weight.requires_grad = False
        hf.trainer(tmp_path, [callback], model=model).train()

    with pytest.raises((RuntimeError, ValueError)):
        run(trl.BEMACallback(update_freq=2))
    run(AveragingCallback(RULE))


@FAILS
def test_trl_peft(hf, tmp_path):
    """BEMACallback makes a second PeftModel from a config alone."""
    peft = pytest.importorskip("peft")

    def run(callback):
        config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
        hf.trainer(tmp_path, [callback], model=peft.get_peft_model(hf.model(), config)).train()

    with pytest.raises(TypeError, match="peft_config"):
        run(trl.BEMACallback(update_freq=2))
    run(AveragingCallback(RULE))


@FAILS
def test_trl_second_train(hf, tmp_path):
    """BEMACallback appends the parameters again."""

    def run(callback):
        trainer = hf.trainer(tmp_path, [callback])
        trainer.train()
        trainer.train()

    with pytest.raises(ValueError, match="zip"):
        run(trl.BEMACallback(update_freq=2))
    run(AveragingCallback(RULE))


@pytest.mark.parametrize(
    "theirs, ours",
    [({}, BEMA.paper()), ({"update_freq": 5, "update_after": 6}, BEMA.paper(update_freq=5, update_after=6))],
)
def test_trl_saves_the_untouched_model_of_a_short_run(hf, tmp_path, theirs, ours):
    """BEMACallback saves its copy of the initial model when no update came, and says that it saved BEMA."""
    trainer = hf.trainer(tmp_path / "theirs", [trl.BEMACallback(**theirs)])
    start = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    assert hf.same(hf.weights(AutoModelForCausalLM.from_pretrained(tmp_path / "theirs/bema")), start)
    with pytest.raises(ValueError, match="the initial model"):
        hf.trainer(tmp_path / "ours", [AveragingCallback(ours)]).train()
    assert not (tmp_path / "ours/averaged").exists()


@FAILS
def test_trl_smaller_batches(hf, tmp_path):
    """BEMACallback appends the parameters again when auto_find_batch_size starts the training once more."""

    class Small(Trainer):
        def training_step(self, model, inputs, *args, **kwargs):
            if self.state.global_step == 1 and len(inputs["input_ids"]) > 2:
                raise RuntimeError("CUDA out of memory.")
            return super().training_step(model, inputs, *args, **kwargs)

    def run(callback):
        settings = {"auto_find_batch_size": True, "per_device_train_batch_size": 4}
        hf.trainer(tmp_path, [callback], kind=Small, **settings).train()

    with pytest.raises(ValueError, match="zip"):
        run(trl.BEMACallback(update_freq=2))
    run(AveragingCallback(RULE))


def test_trl_resume(hf, tmp_path):
    """BEMACallback stores nothing, and starts again from the resumed weights at a late step."""
    settings = {"save_strategy": "steps", "save_steps": 4}

    def run(folder, callback, steps, resume=None):
        trainer = hf.trainer(
            tmp_path / folder, [callback], **settings | {"max_steps": steps, "lr_scheduler_type": "constant"}
        )
        trainer.train(resume_from_checkpoint=resume)

    def result(folder, name):
        return hf.weights(AutoModelForCausalLM.from_pretrained(tmp_path / folder / name))

    for folder, name, make_callback in (
        ("theirs", "bema", lambda: trl.BEMACallback(update_freq=2)),
        ("ours", "averaged/bema", lambda: AveragingCallback(RULE)),
    ):
        run(f"{folder} whole", make_callback(), 8)
        run(f"{folder} stopped", make_callback(), 4)
        run(f"{folder} stopped", make_callback(), 8, resume=True)
        equal = hf.same(result(f"{folder} whole", name), result(f"{folder} stopped", name))
        assert equal == (folder == "ours")


def test_trl_last_partial_window(hf, tmp_path):
    """BEMACallback drops the steps after its last update; the tail counts here."""
    trainer = hf.trainer(tmp_path, [AveragingCallback(BEMA.paper(update_freq=5)), recorder := hf.recorder()])
    trainer.train()
    averaged = hf.weights(AutoModelForCausalLM.from_pretrained(tmp_path / "averaged/bema"))
    hf.close(averaged, recorder.average(BEMA.paper(update_freq=5)))
    assert not hf.same(averaged, {k: v.float() for k, v in recorder.average(BEMA.paper(update_freq=5), at=5).items()})


@pytest.mark.parametrize(
    "arguments", [{"update_freq": 0}, {"ema_power": -0.5}, {"lag": -1}, {"bias_power": float("nan")}]
)
def test_trl_arguments_that_make_no_sense(arguments):
    """BEMACallback takes them all, and divides by zero or diverges later."""
    trl.BEMACallback(**arguments)
    with pytest.raises(ValueError, match=next(iter(arguments))):
        AveragingCallback(BEMA.paper(**arguments))


def test_trl_bfloat16_average(hf, tmp_path):
    """BEMACallback keeps its ema in the parameters' dtype."""
    theirs, ours, recorder = (
        trl.BEMACallback(update_freq=1),
        AveragingCallback(BEMA.paper(update_freq=1)),
        hf.recorder(),
    )
    model = hf.model().bfloat16()
    hf.trainer(tmp_path, [theirs, ours, recorder], model=model, learning_rate=1e-3, max_steps=20).train()
    assert all(tensor.dtype == torch.bfloat16 for tensor in theirs.ema_params)
    expected, averages = recorder.average(EMA(ema_power=0.5, lag=10)), ours.averager.state_dict()["tensors"]
    emas = {name.split("/")[1]: t for name, t in averages.items() if name.startswith("bema.1/")}
    hf.close(emas, expected)
