"""AveragingCallback in the Trainer: what is averaged, evaluated, chosen and exported."""

import random

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, EarlyStoppingCallback, Trainer, TrainerCallback

from lagless import BEMA, EMA, count_updates, effective_iterates, mean_age, trajectory_weights
from lagless.integrations.transformers import AveragingCallback
from lagless.integrations.transformers._compat import best_step
from lagless.integrations.transformers._evaluation import average_of

RULES = {"bema": BEMA.paper(update_freq=2), "ema": EMA(decay=0.8)}
EVALUATING = {"eval_strategy": "steps", "eval_steps": 2}


def token_accuracy(prediction):
    logits, labels = prediction
    return {"accuracy": float((logits[:, :-1].argmax(-1) == labels[:, 1:]).mean())}


def with_metrics(hf):
    return {"train_dataset": hf.rows(0, 20), "eval_dataset": hf.rows(24, 6), "compute_metrics": token_accuracy}


def loss_on(hf, folder, model, rows):
    """The loss as a Trainer without the callback evaluates it; releases differ in what they divide by."""
    return hf.trainer(folder / "alone", model=model).evaluate(rows)["eval_loss"]


def test_one_line_follows_evaluates_and_exports(hf, tmp_path):
    recorder = hf.recorder()
    trainer = hf.trainer(tmp_path, [AveragingCallback(BEMA.paper(update_freq=2)), recorder], **EVALUATING)
    trainer.train()
    averaged = AutoModelForCausalLM.from_pretrained(tmp_path / "averaged/bema")
    hf.close(hf.weights(averaged), recorder.average(BEMA.paper(update_freq=2)))
    assert AutoTokenizer.from_pretrained(tmp_path / "averaged/bema")("weights")["input_ids"]
    assert (tmp_path / "averaged/bema/generation_config.json").is_file()
    assert hf.same(hf.weights(trainer.model), recorder.iterates[-1])  # the Trainer returns what it always did


def test_many_rules_are_evaluated_under_their_own_prefix_with_every_metric(hf, tmp_path):
    recorder, callback = hf.recorder(), AveragingCallback(RULES)
    trainer = hf.trainer(tmp_path, [callback, recorder], data=with_metrics(hf), **EVALUATING)
    trainer.train()
    logged = {key: entry for entry in trainer.state.log_history for key in entry if entry["step"] == 8}
    rows = hf.rows(24, 6)
    for name in RULES:
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "averaged" / name)
        assert logged[f"eval_{name}_loss"][f"eval_{name}_loss"] == pytest.approx(
            loss_on(hf, tmp_path, model, rows), rel=1e-5
        )
        assert 0 <= logged[f"eval_{name}_accuracy"][f"eval_{name}_accuracy"] <= 1
    assert logged["eval_loss"]["eval_loss"] == pytest.approx(loss_on(hf, tmp_path, trainer.model, rows), rel=1e-5)
    assert len({logged[f"eval{name}_loss"][f"eval{name}_loss"] for name in ("", "_bema", "_ema")}) == 3


@pytest.mark.parametrize("evaluate", ["ema", ["ema"]])
def test_which_averages_are_evaluated_is_selectable(hf, tmp_path, evaluate):
    trainer = hf.trainer(tmp_path, [AveragingCallback(RULES, evaluate=evaluate)], **EVALUATING)
    trainer.train()
    metrics = trainer.evaluate()
    assert "eval_ema_loss" in metrics and "eval_bema_loss" not in metrics


def test_several_evaluation_sets(hf, tmp_path):
    sets = {"early": hf.rows(20, 4), "late": hf.rows(30, 4)}
    data = {"train_dataset": hf.rows(0, 20), "eval_dataset": sets}
    trainer = hf.trainer(tmp_path, [AveragingCallback(BEMA.paper(update_freq=2))], data=data, **EVALUATING)
    trainer.train()
    metrics = trainer.evaluate()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "averaged/bema")
    for name, rows in sets.items():
        assert metrics[f"eval_{name}_bema_loss"] == pytest.approx(loss_on(hf, tmp_path, model, rows), rel=1e-5)
    assert metrics["eval_early_bema_loss"] != metrics["eval_late_bema_loss"]


def test_a_set_and_a_prefix_given_to_evaluate_hold_for_averages_too(hf, tmp_path):
    trainer = hf.trainer(tmp_path, [AveragingCallback(BEMA.paper(update_freq=2))])
    trainer.train()
    rows = hf.rows(10, 4)
    metrics = trainer.evaluate(rows, metric_key_prefix="test")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "averaged/bema")
    assert metrics["test_bema_loss"] == pytest.approx(loss_on(hf, tmp_path, model, rows), rel=1e-5)


def test_outputs_to_ignore_are_ignored_for_averages_too(hf, tmp_path):
    seen = []

    class Seeing(Trainer):
        def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
            seen.append(ignore_keys)
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)

    trainer = hf.trainer(tmp_path, [AveragingCallback(RULES)], kind=Seeing, **EVALUATING | {"max_steps": 2})
    trainer.train(ignore_keys_for_eval=["past_key_values"])
    assert seen == [["past_key_values"]] * 6


@pytest.mark.parametrize("evaluate", [None, ["ema"], []])
def test_training_is_bitwise_what_it_is_without_the_callback(hf, tmp_path, evaluate):
    class Spy(TrainerCallback):
        """What a step must find as it was: random numbers, flags, the training mode of every module."""

        def __init__(self):
            self.seen = []

        def on_step_begin(self, args, state, control, model, **kwargs):
            modes = [module.training for module in model.modules()]
            numbers = random.getstate(), np.random.get_state()[2], torch.get_rng_state().tolist()
            self.seen.append((numbers, modes, dict(vars(control))))

    def drawing(prediction):
        """A metric that samples, with every generator there is."""
        return token_accuracy(prediction) | {"noise": random.random() + np.random.rand() + float(torch.rand(()))}

    def run(folder, callbacks):
        recorder, spy = hf.recorder(), Spy()
        data = with_metrics(hf) | {"compute_metrics": drawing}
        settings = EVALUATING | {"max_steps": 12, "eval_on_start": True, "save_strategy": "steps", "save_steps": 4}
        trainer = hf.trainer(tmp_path / folder, [*callbacks, recorder, spy], data=data, **settings)
        trainer.train()
        history = [{k: v for k, v in e.items() if "loss" in k and "ema" not in k} for e in trainer.state.log_history]
        return recorder.iterates, spy.seen, [entry for entry in history if entry]

    callback = AveragingCallback(RULES, evaluate=evaluate, export_at_save=True)
    (ours, our_state, our_losses), (plain, state, losses) = run("ours", [callback]), run("plain", [])
    assert len(ours) == 13 and all(hf.same(a, b) for a, b in zip(ours, plain, strict=True))
    assert our_state == state
    assert our_losses == losses


def test_evaluation_draws_no_random_numbers_that_training_would_have_drawn(hf, tmp_path):
    """The test above could not fail if evaluations drew none: they do."""
    trainer = hf.trainer(tmp_path, [])
    before = torch.get_rng_state()
    trainer.evaluate()
    assert not torch.equal(before, torch.get_rng_state())


def test_an_evaluation_of_one_average_is_one_more_evaluation_and_no_second_model(hf, tmp_path):
    class Counting(Trainer):
        forwards = 0
        models = set()

        def prediction_step(self, model, *args, **kwargs):
            Counting.forwards += 1
            Counting.models.add(id(model))
            return super().prediction_step(model, *args, **kwargs)

    trainer = hf.trainer(tmp_path, [AveragingCallback(RULES, evaluate=["bema"])], kind=Counting, **EVALUATING)
    trainer.train()
    assert Counting.forwards == 2 * 4 * 2  # live and average, four times, two batches
    assert len(Counting.models) == 1


def best_settings(metric, **settings):
    best = {"metric_for_best_model": metric, "load_best_model_at_end": True, "learning_rate": 0.03, "max_steps": 12}
    return EVALUATING | {"save_strategy": "steps", "save_steps": 2} | best | settings


@pytest.mark.parametrize("save_only_model", [False, True])
@pytest.mark.parametrize("save_total_limit", [None, 1])
def test_the_best_model_can_be_an_average(hf, tmp_path, save_total_limit, save_only_model):
    recorder, callback = hf.recorder(), AveragingCallback(RULES)
    settings = best_settings("eval_bema_loss", save_total_limit=save_total_limit, save_only_model=save_only_model)
    trainer = hf.trainer(tmp_path, [callback, recorder], **settings)
    trainer.train()
    losses = {e["step"]: e["eval_bema_loss"] for e in trainer.state.log_history if "eval_bema_loss" in e}
    step = min(losses, key=losses.get)
    assert trainer.state.best_global_step == step < 12  # or the test would not see whether it goes back
    assert trainer.state.best_metric == losses[step]
    # The Trainer holds the average of that step, bit for bit what the exported folder holds, and evaluates as it did.
    hf.close(hf.weights(trainer.model), recorder.average(RULES["bema"], at=step))
    stored = load_file(tmp_path / "averaged/bema/model.safetensors")
    assert all(torch.equal(p, stored[name]) for name, p in trainer.model.named_parameters())
    assert trainer.evaluate()["eval_loss"] == losses[step]
    hf.close(
        hf.weights(AutoModelForCausalLM.from_pretrained(tmp_path / "averaged/ema")),
        recorder.average(RULES["ema"], at=step),
    )
    kept = {folder.name for folder in tmp_path.glob("checkpoint-*")}
    assert kept == {f"checkpoint-{step}"} if save_total_limit else len(kept) == 6


def test_the_best_model_can_be_the_live_one_and_averages_go_back_with_it(hf, tmp_path):
    recorder, callback = hf.recorder(), AveragingCallback(RULES)
    trainer = hf.trainer(tmp_path, [callback, recorder], **best_settings("loss"))
    trainer.train()
    step = trainer.state.best_global_step
    assert step < 12 and hf.same(hf.weights(trainer.model), recorder.iterates[step])
    for name, rule in RULES.items():
        hf.close(callback.averager.read(name), recorder.average(rule, at=step))


@pytest.mark.parametrize("position", [0, 1])
def test_early_stopping_follows_an_average_wherever_it_is_listed(hf, tmp_path, position):
    callbacks = [AveragingCallback(RULES)]
    callbacks.insert(position, EarlyStoppingCallback(early_stopping_patience=2))
    trainer = hf.trainer(tmp_path, callbacks, **best_settings("eval_bema_loss", max_steps=40))
    trainer.train()
    losses = [e["eval_bema_loss"] for e in trainer.state.log_history if "eval_bema_loss" in e]
    best = losses.index(min(losses))
    assert trainer.state.global_step < 40 and len(losses) == best + 3


def test_save_strategy_best_and_a_plateau_schedule_follow_an_average(hf, tmp_path):
    settings = best_settings("eval_ema_loss", save_strategy="best", lr_scheduler_type="reduce_lr_on_plateau")
    trainer = hf.trainer(tmp_path, [AveragingCallback(RULES)], **settings)
    trainer.train()
    losses = {e["step"]: e["eval_ema_loss"] for e in trainer.state.log_history if "eval_ema_loss" in e}
    assert best_step(trainer.state) == min(losses, key=losses.get)
    assert trainer.lr_scheduler.best == min(losses.values())


def test_a_metric_of_an_average_before_its_first_update_is_refused(hf, tmp_path):
    callback, message = (
        AveragingCallback(BEMA.paper(update_freq=3)),
        "but before the first update of 'bema'.*eval_delay",
    )
    trainer = hf.trainer(tmp_path, [callback], **best_settings("eval_bema_loss"))
    with pytest.raises(ValueError, match=f"evaluated at step 2, {message}"):
        trainer.train()
    assert trainer.state.global_step == 0
    by_epoch = {"eval_strategy": "epoch", "save_strategy": "epoch"}
    trainer = hf.trainer(
        tmp_path, [AveragingCallback(BEMA.paper(update_freq=11))], **best_settings("bema_loss", **by_epoch)
    )
    with pytest.raises(ValueError, match=f"evaluated at step 10, {message}"):
        trainer.train()
    settings = best_settings("eval_bema_loss", eval_delay=3, eval_on_start=True)  # the first chooses nothing yet
    trainer = hf.trainer(tmp_path, [callback], **settings)
    trainer.train()
    assert trainer.state.best_global_step >= 4


def test_of_two_names_that_fit_a_metric_the_longer_is_meant():
    names = ["ema", "ema_slow"]
    assert [average_of(f"eval_{name}_loss", names, None) for name in names] == names
    assert average_of("eval_text_ema_slow_loss", names, {"text": ...}) == "ema_slow"
    assert average_of("eval_text_loss", names, {"text": ...}) is None


def test_a_live_metric_that_begins_like_an_average_is_the_live_models(hf, tmp_path):
    def metrics(prediction):
        return {"ema_token_accuracy": token_accuracy(prediction)["accuracy"]}

    data, recorder = with_metrics(hf) | {"compute_metrics": metrics}, hf.recorder()
    settings = best_settings("eval_ema_token_accuracy")
    trainer = hf.trainer(tmp_path, [AveragingCallback(RULES), recorder], data=data, **settings)
    trainer.train()
    assert hf.same(hf.weights(trainer.model), recorder.iterates[trainer.state.best_global_step])


def test_a_metric_of_an_average_under_the_name_of_a_live_one_is_refused(hf, tmp_path):
    data = with_metrics(hf) | {"compute_metrics": lambda prediction: {"ema_loss": 0.0}}
    trainer = hf.trainer(tmp_path, [AveragingCallback(RULES)], data=data, **EVALUATING)
    with pytest.raises(ValueError, match="eval_ema_loss are metrics of the live model and of an average; rename"):
        trainer.train()


def test_averages_without_an_update_yet_are_left_out_of_an_evaluation(hf, tmp_path):
    trainer = hf.trainer(tmp_path, [AveragingCallback(BEMA.paper(update_freq=3))], eval_on_start=True, **EVALUATING)
    trainer.train()
    assert [e["step"] for e in trainer.state.log_history if "eval_loss" in e] == [0, 2, 4, 6, 8]
    assert [e["step"] for e in trainer.state.log_history if "eval_bema_loss" in e] == [4, 6, 8]


@pytest.mark.parametrize("rule", [BEMA.paper(), BEMA.paper(update_freq=5, update_after=4)])
def test_a_run_too_short_for_an_update_is_refused_before_it_starts(hf, tmp_path, rule):
    recorder = hf.recorder()
    trainer = hf.trainer(tmp_path, [recorder, AveragingCallback({"ema": EMA(), "bema": rule})])
    with pytest.raises(ValueError, match="update_freq.*the initial model"):
        trainer.train()
    assert len(recorder.iterates) == 1 and not (tmp_path / "averaged").exists()


def test_a_run_that_stops_before_the_first_update_is_refused_at_its_end(hf, tmp_path):
    class StopAtOnce(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = True

    trainer = hf.trainer(tmp_path, [AveragingCallback({"ema": EMA(), "bema": BEMA.paper(update_freq=4)}), StopAtOnce()])
    with pytest.raises(RuntimeError, match="stopped at step 1, before the first update of bema"):
        trainer.train()
    assert [folder.name for folder in (tmp_path / "averaged").iterdir()] == ["ema"]


@pytest.mark.parametrize("position", [0, 1])
def test_an_error_at_the_end_comes_after_the_other_callbacks(hf, tmp_path, position):
    class Other(TrainerCallback):
        ends = 0

        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = True

        def on_train_end(self, *args, **kwargs):
            self.ends += 1

    other = Other()
    callbacks = [other]
    callbacks.insert(position, AveragingCallback(BEMA.paper(update_freq=4)))
    trainer = hf.trainer(tmp_path, callbacks)
    for ends in (1, 2):
        with pytest.raises(RuntimeError, match="before the first update"):
            trainer.train()
        assert other.ends == ends
    assert len(trainer.callback_handler.callbacks) == len(set(trainer.callback_handler.callbacks))


def test_each_evaluation_has_a_progress_bar_of_its_own(hf, tmp_path, monkeypatch):
    bars = []

    class Bar:
        def __init__(self, *args, total=None, **kwargs):
            self.count, self.total = 0, total

        def update(self, count=1):
            self.count += count

        def close(self):
            bars.append((self.count, self.total))

        def write(self, *args, **kwargs):
            pass

    monkeypatch.setattr("transformers.trainer_callback.tqdm", Bar)
    hf.trainer(tmp_path, [AveragingCallback(RULES)], disable_tqdm=False, eval_strategy="steps", eval_steps=4).train()
    assert bars == [(2, 2)] * 6 + [(8, 8)]


@pytest.mark.parametrize(
    "options, settings, message",
    [
        ({"evaluate": ["swa"]}, {}, r"evaluate=\['swa'\] are no averages; there are bema, ema"),
        ({"evaluate": ["ema"]}, best_settings("eval_bema_loss"), "needs 'bema'; add it to evaluate"),
        ({"dtype": torch.float16}, {}, "dtype=torch.float16"),
    ],
)
def test_what_does_not_fit_is_refused_before_training(hf, tmp_path, options, settings, message):
    trainer = hf.trainer(tmp_path, [AveragingCallback(RULES, **options)], **settings)
    with pytest.raises((ValueError, TypeError), match=message):
        trainer.train()
    assert trainer.state.global_step == 0


def test_more_refusals(hf, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="on_missing_state='ignore'"):
        AveragingCallback(RULES, on_missing_state="ignore")
    with pytest.raises(ValueError, match="two AveragingCallbacks"):
        hf.trainer(tmp_path, [AveragingCallback(EMA()), AveragingCallback(BEMA.paper())]).train()
    data = {"train_dataset": hf.rows(0, 20), "eval_dataset": {"ema": hf.rows(20, 4)}}
    with pytest.raises(ValueError, match=r"\['ema'\] name both averages and evaluation datasets"):
        hf.trainer(tmp_path, [AveragingCallback(RULES)], data=data).train()
    monkeypatch.setattr("transformers.integrations.hp_params", dict)
    with pytest.raises(NotImplementedError, match="hyperparameter_search"):
        hf.trainer(tmp_path, [AveragingCallback(EMA())]).train(trial={"learning_rate": 0.1})


def test_deepspeed_is_refused_by_name(hf, tmp_path):
    class Enabling(TrainerCallback):
        def on_train_begin(self, *args, **kwargs):
            trainer.is_deepspeed_enabled = True

    trainer = hf.trainer(tmp_path, [Enabling(), AveragingCallback(EMA())])
    with pytest.raises(NotImplementedError, match="does not support DeepSpeed.*FSDP2.*Averager.update"):
        trainer.train()


def test_events_without_a_trainer_are_refused(hf, tmp_path):
    args = hf.trainer(tmp_path).args
    with pytest.raises(RuntimeError, match="finds no Trainer that calls it"):
        AveragingCallback(EMA()).on_train_begin(args, None, None, model=None, optimizer=None)


def test_a_trainer_inside_another_trainers_event_finds_its_own(hf, tmp_path):
    class Nested(TrainerCallback):
        def on_epoch_begin(self, args, state, control, **kwargs):
            inner = hf.trainer(tmp_path / "inner", [AveragingCallback(EMA())], max_steps=3, **EVALUATING)
            inner.train()
            assert inner.state.log_history[0]["step"] == 2

    trainer = hf.trainer(tmp_path, [AveragingCallback(BEMA.paper(update_freq=2)), Nested()], **EVALUATING)
    trainer.train()
    assert {f.name for f in (tmp_path / "inner/averaged").iterdir()} == {"ema"}
    assert {f.name for f in (tmp_path / "averaged").iterdir()} == {"bema"}


def test_a_trainer_with_an_evaluation_of_its_own_is_not_taken_for_the_one_around_it(hf, tmp_path):
    class Own(Trainer):
        def evaluate(self, *args, **kwargs):
            self.callback_handler.on_evaluate(self.args, self.state, self.control, {})

    inner = hf.trainer(tmp_path / "inner", [AveragingCallback(EMA())], kind=Own)
    inner.train()
    data = with_metrics(hf) | {"compute_metrics": lambda prediction: inner.evaluate() or {}}
    with pytest.raises(RuntimeError, match="finds no Trainer that calls it in a method with eval_dataset"):
        hf.trainer(tmp_path, data=data).evaluate()


def test_a_trainer_with_an_evaluation_of_its_own_averages_without_evaluating(hf, tmp_path):
    class Own(Trainer):
        def evaluate(self, *args, **kwargs):
            metrics = {"eval_own": 1.0}
            self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
            return metrics

    trainer = hf.trainer(tmp_path, [AveragingCallback(EMA(), evaluate=[])], kind=Own, **EVALUATING)
    trainer.train()
    assert trainer.evaluate() == {"eval_own": 1.0}
    with pytest.raises(RuntimeError, match=r"finds no Trainer.*evaluate=\[\]"):
        hf.trainer(tmp_path, [AveragingCallback(EMA())], kind=Own, **EVALUATING).train()


def test_an_average_that_is_in_the_model_is_evaluated_by_hand(hf, tmp_path):
    callback = AveragingCallback(EMA(decay=0.5))
    trainer = hf.trainer(tmp_path, [callback])
    trainer.train()
    average = trainer.evaluate()["eval_ema_loss"]
    with callback.averager.applied():
        assert callback.averager.applied_name == "ema"
        metrics = trainer.evaluate()
    assert metrics["eval_loss"] == pytest.approx(average) and "eval_ema_loss" not in metrics
    assert callback.averager.applied_name is None


class KeepsMetricsApart(Trainer):
    """Collects metrics beside the loop and adds them to whatever is logged next, under the live model's names."""

    def evaluate(self, *args, **kwargs):
        return super().evaluate(*args, **kwargs) | {"eval_own": 1.0}

    def prediction_step(self, model, inputs, *args, **kwargs):
        loss, logits, labels = super().prediction_step(model, inputs, False, *args[1:], **kwargs)
        self.collected = getattr(self, "collected", []) + [float(loss)]
        return loss, None, None

    def log(self, logs, *args, **kwargs):
        if collected := self.__dict__.pop("collected", None):
            logs |= {"eval_mean": sum(collected) / len(collected), "plain": len(collected)}
        super().log(logs, *args, **kwargs)


def test_what_a_trainer_adds_to_an_averages_log_entry_gets_its_prefix(hf, tmp_path):
    seen = []

    class Watching(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            seen.append(dict(logs))

    watching = Watching()
    trainer = hf.trainer(tmp_path, [watching, AveragingCallback(RULES)], kind=KeepsMetricsApart, **EVALUATING)
    trainer.train()
    metrics = trainer.evaluate()
    assert "on_log" not in vars(trainer.callback_handler)
    for name in RULES:
        entries = [entry for entry in trainer.state.log_history if f"eval_{name}_loss" in entry]
        heard = [entry for entry in seen if f"eval_{name}_loss" in entry]
        assert len(entries) == len(heard) > 1
        for entry in entries + heard:
            others = [key for key in entry if not key.startswith(f"eval_{name}_")]
            assert set(others) <= {"epoch", "step", "num_input_tokens_seen"}
            assert entry[f"eval_{name}_plain"] > 0
            assert entry[f"eval_{name}_mean"] == pytest.approx(entry[f"eval_{name}_loss"], rel=0.1)
    live = [entry for entry in trainer.state.log_history if "eval_mean" in entry]
    assert live and all("eval_loss" in entry and "plain" in entry for entry in live)
    assert metrics["eval_own"] == 1.0


def test_what_an_average_is_stands_beside_its_loss(hf, tmp_path):
    """Distance from the live weights, mean age, effective iterates and updates, in the Trainer's own log."""
    recorder, callback = hf.recorder(), AveragingCallback(RULES)
    trainer = hf.trainer(tmp_path, [callback, recorder], **EVALUATING)
    trainer.train()
    for name, rule in RULES.items():
        for entry in (e for e in trainer.state.log_history if f"eval_{name}_loss" in e):
            step = entry["step"]
            weights = trajectory_weights(rule, range(step + 1))
            average = recorder.average(rule, at=step)
            live = recorder.iterates[step]
            expected = sum(float((average[key] - live[key].double()).square().sum()) for key in average) ** 0.5
            assert entry[f"eval_{name}_distance"] == pytest.approx(expected, rel=1e-3)
            assert entry[f"eval_{name}_mean_age"] == pytest.approx(mean_age(weights, range(step + 1)))
            assert entry[f"eval_{name}_effective_iterates"] == pytest.approx(effective_iterates(weights))
            assert entry[f"eval_{name}_updates"] == count_updates(rule, step)


class Fork(Trainer):
    """As ms-swift does it: metrics collected beside the loop, computed and forgotten by ``log``, under one name."""

    def prediction_step(self, model, inputs, *args, **kwargs):
        last = list(model.parameters())[-1].detach().sum()
        self.custom_metrics = [*getattr(self, "custom_metrics", []), float(last)]
        return super().prediction_step(model, inputs, *args, **kwargs)

    def log(self, logs, *args, **kwargs):
        if collected := getattr(self, "custom_metrics", []):
            logs["eval_token_acc"] = sum(collected) / len(collected)
            self.custom_metrics = []
        super().log(logs, *args, **kwargs)


def test_metrics_that_a_fork_adds_to_the_log_have_the_averages_prefix(hf, tmp_path):
    seen = []

    class Logger(TrainerCallback):
        def on_log(self, args, state, control, logs, **kwargs):
            seen.append(dict(logs))

    trainer = hf.trainer(tmp_path, [AveragingCallback(RULES), Logger()], kind=Fork, **EVALUATING)
    trainer.train()
    for entries in (seen, trainer.state.log_history):
        at_end = [entry for entry in entries if any(key.startswith("eval") for key in entry)][-3:]
        live, *averaged = at_end
        assert "eval_token_acc" in live
        for name, entry in zip(RULES, averaged, strict=True):
            own = [key for key in entry if key not in ("epoch", "step", "num_input_tokens_seen")]
            assert all(key.startswith(f"eval_{name}_") for key in own) and f"eval_{name}_token_acc" in own
            assert entry[f"eval_{name}_token_acc"] != live["eval_token_acc"]
