"""Optimizers that keep an average, in the Trainer: what is evaluated, saved, resumed, chosen and returned."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, TrainerCallback

from lagless import BEMA, EMA
from lagless.integrations.transformers import AveragingCallback
from lagless.optim import PACE, PrimalAveraging, Pullback
from lagless.rules import rule_from_dict

RULE = EMA(decay=0.8)
EVALUATING = {"eval_strategy": "steps", "eval_steps": 2}
SAVING = {"save_strategy": "steps", "save_steps": 2}
NAMES = {PACE: "pace", Pullback: "pullback", PrimalAveraging: "primalaveraging"}


def make_optimizer(kind, model, rule=RULE):
    parameters = list(model.parameters())
    if kind is PACE:
        return PACE(parameters, lr=1e-2, average=rule)
    if kind is Pullback:
        return Pullback(torch.optim.AdamW(parameters, lr=1e-2), average=rule)
    return PrimalAveraging(torch.optim.AdamW(parameters, lr=1e-2), rule)


def make_trainer(hf, folder, callbacks, kind=PACE, rule=RULE, **settings):
    model = hf.model()
    optimizer = make_optimizer(kind, model, rule)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    return hf.trainer(folder, callbacks, model=model, optimizers=(optimizer, schedule), **settings)


def optimizer_of(trainer):
    return trainer.optimizer.optimizer


def read(trainer):
    return optimizer_of(trainer).read(trainer.model)


def stored(folder):
    """Weights in a model folder, the tied ones under the name that the Trainer's model gives first."""
    return load_file(folder / "model.safetensors")


def record(folder):
    return json.loads((folder / "lagless.json").read_text())


def equal(first, second):
    assert first.keys() >= second.keys() and second
    return all(torch.equal(first[name], second[name].to(first[name].dtype)) for name in second)


class Live(TrainerCallback):
    """The live weights at every step, whatever the model holds."""

    def __init__(self):
        self.at, self.averages, self.average = {}, {}, None

    def on_step_end(self, args, state, control, model, optimizer, **kwargs):
        self.at[state.global_step] = {name: p.detach().clone() for name, p in model.named_parameters()}
        self.averages[state.global_step] = optimizer.optimizer.read(model)


@pytest.mark.parametrize("kind", NAMES)
@pytest.mark.parametrize("settings", [{}, EVALUATING, EVALUATING | {"eval_steps": 3}])
@pytest.mark.parametrize("rules", [None, {"mine": BEMA.paper(update_freq=2)}])
def test_the_model_after_training_is_the_average_and_the_folder_says_so(hf, tmp_path, kind, settings, rules):
    callback = AveragingCallback(rules)
    trainer = make_trainer(hf, tmp_path, [callback, live := Live()], kind, **settings)
    trainer.train()
    name, average = NAMES[kind], live.averages[8]
    assert not equal(live.at[8], average)
    trainer.save_model(str(tmp_path / "final"))
    for folder in (tmp_path / "final", tmp_path / "averaged" / name):
        assert equal(stored(folder), average)
        said = record(folder)
        assert (said["name"], said["weights"], said["optimizer"]) == (name, "average", kind.__name__)
        assert (said["step"], said["updates"], rule_from_dict(said["rule"])) == (8, 8, RULE)
    before = stored(tmp_path / "final")
    trainer.evaluate()
    trainer.save_model(str(tmp_path / "again"))
    assert equal(stored(tmp_path / "again"), before) and record(tmp_path / "again")["step"] == 8
    assert (callback.averager is None) == (rules is None)
    assert {f.name for f in (tmp_path / "averaged").iterdir()} == {name, *(rules or ())}


def test_without_the_callback_the_live_weights_are_saved(hf, tmp_path):
    """What the callback is for: if this fails, the Trainer has learned it."""
    trainer = make_trainer(hf, tmp_path, [live := Live()])
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    assert equal(stored(tmp_path / "final"), live.at[8])


@pytest.mark.parametrize("rules", [None, {"mine": BEMA.paper(update_freq=2)}])
def test_checkpoints_hold_live_weights_and_resume_bit_for_bit(hf, tmp_path, rules):
    class Predicts(TrainerCallback):
        def on_evaluate(self, args, state, control, **kwargs):
            trainer.predict(hf.rows(24, 2))

    def run(folder, resume=None, extra=(), **settings):
        nonlocal trainer
        callbacks = [AveragingCallback(rules), live := Live(), *extra]
        trainer = make_trainer(hf, tmp_path / folder, callbacks, **EVALUATING | SAVING | settings)
        trainer.train(resume_from_checkpoint=resume)
        return live

    trainer = None
    whole = run("whole")
    for step in (2, 4, 6, 8):
        assert equal(stored(tmp_path / f"whole/checkpoint-{step}"), whole.at[step])
        assert not (tmp_path / f"whole/checkpoint-{step}/lagless.json").exists()
    resumed = run("resumed", str(tmp_path / "whole/checkpoint-4"))
    assert resumed.at.keys() == {5, 6, 7, 8}
    for step in resumed.at:
        assert equal(resumed.at[step], whole.at[step]) and equal(resumed.averages[step], whole.averages[step])
    for name in ("pace", *(rules or ())):
        folders = (tmp_path / run / "averaged" / name for run in ("whole", "resumed"))
        first, second = (stored(folder) for folder in folders)
        assert equal(first, second)
    predicting = run("predicting", extra=[Predicts()])
    assert equal(stored(tmp_path / "predicting/checkpoint-4"), predicting.at[4])


def test_training_is_bitwise_what_it_is_without_the_callback(hf, tmp_path):
    runs = []
    for folder, callbacks in (("plain", []), ("ours", [AveragingCallback({"mine": BEMA.paper(update_freq=2)})])):
        make_trainer(hf, tmp_path / folder, [*callbacks, live := Live()], **EVALUATING | SAVING).train()
        runs.append(live)
    assert all(equal(runs[0].at[step], runs[1].at[step]) for step in range(1, 9))


def test_the_average_of_the_optimizer_has_metrics_under_its_name_for_free(hf, tmp_path):
    trainer = make_trainer(hf, tmp_path, [AveragingCallback({"mine": EMA(decay=0.5)})], **EVALUATING)
    trainer.train()
    entries = {key: {e["step"]: e[key] for e in trainer.state.log_history if key in e} for key in
               ("eval_loss", "eval_pace_loss", "eval_mine_loss")}  # fmt: skip
    assert entries["eval_pace_loss"] == entries["eval_loss"] and list(entries["eval_loss"]) == [2, 4, 6, 8]
    assert entries["eval_mine_loss"].keys() == entries["eval_loss"].keys()
    assert all(entries["eval_mine_loss"][step] != entries["eval_loss"][step] for step in entries["eval_loss"])
    metrics = trainer.evaluate()
    assert metrics["eval_pace_loss"] == metrics["eval_loss"] == entries["eval_loss"][8]
    assert metrics["eval_mine_loss"] == entries["eval_mine_loss"][8]
    averaged = AutoModelForCausalLM.from_pretrained(tmp_path / "averaged/mine").eval()
    again = hf.trainer(tmp_path / "other", model=averaged)
    assert again.evaluate()["eval_loss"] == pytest.approx(metrics["eval_mine_loss"], rel=1e-6)


def test_another_average_beside_it_is_of_the_weights_that_train(hf, tmp_path):
    rule = BEMA.paper(update_freq=2)
    trainer = make_trainer(hf, tmp_path, [callback := AveragingCallback({"mine": rule}), recorder := hf.recorder()],
                           **EVALUATING | {"max_steps": 7, "eval_steps": 1})  # fmt: skip
    trainer.train()
    hf.close(hf.weights(AutoModelForCausalLM.from_pretrained(tmp_path / "averaged/mine")), recorder.average(rule))
    trainer.evaluate()
    optimizer_of(trainer).train()
    hf.close(callback.averager.read("mine"), recorder.average(rule))


def best_settings(metric, **settings):
    best = {"metric_for_best_model": metric, "load_best_model_at_end": True, "max_steps": 12, "learning_rate": 0.03}
    return EVALUATING | SAVING | best | settings


class Worsen(TrainerCallback):
    """The best step comes before the last."""

    def on_step_begin(self, args, state, control, optimizer, **kwargs):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 if state.global_step < 6 else 0.3


@pytest.mark.parametrize("rules", [None, {"mine": BEMA.paper(update_freq=2)}])
@pytest.mark.parametrize("settings", [{}, {"save_only_model": True}, {"save_total_limit": 1}])
@pytest.mark.parametrize("metric", ["eval_loss", "eval_pace_loss"])
def test_the_best_model_is_the_average_of_the_best_step(hf, tmp_path, rules, settings, metric):
    callbacks = [AveragingCallback(rules), live := Live(), Worsen(), recorder := hf.recorder()]
    trainer = make_trainer(hf, tmp_path, callbacks, **best_settings(metric, **settings))
    trainer.train()
    step = trainer.state.best_global_step
    assert 2 <= step < 12
    trainer.save_model(str(tmp_path / "final"))
    for folder in (tmp_path / "final", tmp_path / "averaged/pace"):
        assert equal(stored(folder), live.averages[step])
        assert (record(folder)["step"], record(folder)["updates"]) == (step, step)
    losses = {e["step"]: e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e}
    assert trainer.evaluate()["eval_loss"] == losses[step] == min(losses.values())
    assert equal(dict(trainer.model.named_parameters()), live.averages[step])
    if rules:
        averaged = AutoModelForCausalLM.from_pretrained(tmp_path / "averaged/mine")
        hf.close(hf.weights(averaged), recorder.average(rules["mine"], at=step))


def test_the_best_model_can_be_another_average_beside_it(hf, tmp_path):
    rule = EMA(decay=0.5)
    callbacks = [AveragingCallback({"mine": rule}), Worsen(), recorder := hf.recorder()]
    trainer = make_trainer(hf, tmp_path, callbacks, **best_settings("eval_mine_loss"))
    trainer.train()
    step = trainer.state.best_global_step
    assert step < 12
    trainer.evaluate()
    hf.close(hf.weights(trainer.model), recorder.average(rule, at=step))
    trainer.save_model(str(tmp_path / "final"))
    assert (record(tmp_path / "final")["name"], record(tmp_path / "final")["step"]) == ("mine", step)


def test_a_record_goes_when_the_model_changes(hf, tmp_path):
    trainer = make_trainer(hf, tmp_path, [AveragingCallback()])
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    assert record(tmp_path / "final")["name"] == "pace"
    with torch.no_grad():
        next(trainer.model.parameters()).add_(1.0)
    trainer.save_model(str(tmp_path / "final"))
    assert not (tmp_path / "final/lagless.json").exists()


def test_training_goes_on_from_the_live_weights(hf, tmp_path):
    trainer = make_trainer(hf, tmp_path, [AveragingCallback({"mine": EMA()}), live := Live()], max_steps=4)
    trainer.train()
    recorder = hf.recorder()
    trainer.add_callback(recorder)
    trainer.train()
    assert len(live.at) == 4 and "save_model" in vars(trainer)
    assert len(recorder.iterates) == 5 and not equal(recorder.iterates[0], live.averages[4])


def test_before_its_first_update_there_is_no_average_and_the_model_is_the_live_one(hf, tmp_path):
    rule = EMA(decay=0.8, update_freq=20)
    trainer = make_trainer(hf, tmp_path, [AveragingCallback(), live := Seen()], rule=rule, **EVALUATING)
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    assert equal(stored(tmp_path / "final"), live.last) and not (tmp_path / "final/lagless.json").exists()
    assert not any("eval_pace_loss" in entry for entry in trainer.state.log_history)
    assert not (tmp_path / "averaged").exists()


class Seen(TrainerCallback):
    def on_step_end(self, args, state, control, model, **kwargs):
        self.last = {name: p.detach().clone() for name, p in model.named_parameters()}


def test_what_does_not_fit_is_refused(hf, tmp_path):
    with pytest.raises(ValueError, match="'pace' is the average of the optimizer; rename the rule"):
        make_trainer(hf, tmp_path, [AveragingCallback({"pace": EMA()})]).train()
    with pytest.raises(ValueError, match=r"evaluate=\['swa'\] are no averages; there are pace"):
        make_trainer(hf, tmp_path, [AveragingCallback(evaluate=["swa"])]).train()
    settings = best_settings("eval_loss", max_steps=4)
    make_trainer(hf, tmp_path / "old", [], **settings).train()
    trainer = make_trainer(hf, tmp_path / "old", [AveragingCallback()], **settings | {"max_steps": 6})
    with pytest.raises(ValueError, match="may go back to .*checkpoint-.*no optimizer_average.safetensors"):
        trainer.train(resume_from_checkpoint=True)


def test_averages_of_the_best_step_do_not_depend_on_the_mode_that_somebody_left_the_optimizer_in(hf, tmp_path):
    class Leaves(TrainerCallback):
        def on_epoch_end(self, args, state, control, optimizer, **kwargs):
            optimizer.eval()

    rule = BEMA.paper(update_freq=2)
    callbacks = [AveragingCallback({"mine": rule}), live := Live(), Worsen(), recorder := hf.recorder(), Leaves()]
    trainer = make_trainer(hf, tmp_path, callbacks, **best_settings("eval_loss"))
    trainer.train()
    step = trainer.state.best_global_step
    assert step < 12
    hf.close(
        hf.weights(AutoModelForCausalLM.from_pretrained(tmp_path / "averaged/mine")), recorder.average(rule, at=step)
    )
    assert equal(stored(tmp_path / "averaged/pace"), live.averages[step])
