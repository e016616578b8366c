"""Saving, resuming, rotating and uploading checkpoints with averages in them."""

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback

from lagless import BEMA, DEMA, EMA, Averager, WindowAverage
from lagless.checkpoints import CheckpointError
from lagless.integrations.transformers import AveragingCallback
from lagless.posthoc import average_checkpoints
from lagless.rules import rule_from_dict

RULES = {"bema": BEMA.paper(update_freq=2), "ema": EMA(decay=0.8), "lawa": WindowAverage(window=2, update_freq=3)}
SAVING = {"save_strategy": "steps", "save_steps": 3, "max_steps": 9}


def averages(callback):
    return {f"{name}/{k}": v for name in callback.averager.rules for k, v in callback.averager.read(name).items()}


class Interrupt(TrainerCallback):
    """Ends the process, as far as the Trainer can tell, after a step."""

    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


@pytest.mark.parametrize("options", [{}, {"dtype": torch.bfloat16}])
@pytest.mark.parametrize("where", ["last", "elsewhere"])
def test_resumed_equals_never_stopped(hf, tmp_path, where, options):
    def run(folder, callbacks=(), resume=None):
        callback, recorder = AveragingCallback(RULES, **options), hf.recorder()
        settings = SAVING | {"eval_strategy": "steps", "eval_steps": 2}
        trainer = hf.trainer(tmp_path / folder, [callback, recorder, *callbacks], **settings)
        trainer.train(resume_from_checkpoint=resume)
        return recorder.iterates[-1], averages(callback)

    never_stopped = run("whole")
    with pytest.raises(KeyboardInterrupt):
        run("stopped", [Interrupt(8)])
    if where == "last":  # between two updates of every rule but one
        resumed = run("stopped", resume=True)
    else:
        shutil.move(tmp_path / "stopped/checkpoint-3", tmp_path / "saved away")
        resumed = run("another", resume=str(tmp_path / "saved away"))
    assert all(hf.same(a, b) for a, b in zip(resumed, never_stopped, strict=True))
    folders = [tmp_path / run / "averaged/bema" for run in ("whole", "stopped" if where == "last" else "another")]
    first, second = (hf.weights(AutoModelForCausalLM.from_pretrained(folder)) for folder in folders)
    assert hf.same(first, second)


@pytest.fixture
def stopped(hf, tmp_path):
    """A run of three steps with its checkpoint."""
    hf.trainer(tmp_path, [AveragingCallback(RULES)], **SAVING | {"max_steps": 3}).train()
    return tmp_path / "checkpoint-3"


def test_a_checkpoint_without_averages_is_refused_or_joined(hf, stopped):
    (stopped / "averages.safetensors").unlink()
    with pytest.raises(
        ValueError, match=r"averages.safetensors is missing.*save_total_limit=1.*on_missing_state='restart'"
    ):
        hf.trainer(stopped.parent, [AveragingCallback(RULES)], **SAVING).train(resume_from_checkpoint=True)
    recorder, callback = hf.recorder(), AveragingCallback(RULES, on_missing_state="restart")
    hf.trainer(stopped.parent, [callback, recorder], **SAVING).train(resume_from_checkpoint=True)
    assert callback.averager.step == 9 and callback.averager.updates("bema") == 3  # at steps 4, 6, 8
    expected = recorder.iterates[0]
    for iterate in recorder.iterates[1:]:
        expected = {k: 0.8 * v + 0.2 * iterate[k] for k, v in expected.items()}
    hf.close(callback.averager.read("ema"), expected)


@pytest.mark.parametrize(
    "rules, options, message",
    [
        (RULES | {"ema": EMA(decay=0.9)}, {}, r"checkpoint-3/averages.safetensors: .*made with rules.*same rules"),
        ({"bema": RULES["bema"]}, {}, "made with rules"),
        (RULES, {"dtype": torch.bfloat16}, "same dtype argument"),
    ],
)
def test_a_state_of_something_else_is_refused(hf, stopped, rules, options, message):
    trainer = hf.trainer(stopped.parent, [AveragingCallback(rules, **options)], **SAVING)
    with pytest.raises(ValueError, match=message + r".*on_missing_state='restart'"):
        trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 3


def test_a_state_of_other_parameters_is_refused(hf, stopped):
    Averager(hf.model().model.norm, RULES).save(stopped / "averages.safetensors")
    trainer = hf.trainer(stopped.parent, [AveragingCallback(RULES)], **SAVING)
    with pytest.raises(ValueError, match="another set of parameters.*on_missing_state='restart'"):
        trainer.train(resume_from_checkpoint=True)


def test_a_damaged_state_is_refused(hf, stopped):
    file = stopped / "averages.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(ValueError, match="averages.safetensors is not a whole safetensors file"):
        hf.trainer(stopped.parent, [AveragingCallback(RULES)], **SAVING).train(resume_from_checkpoint=True)


def test_save_total_limit_removes_states_with_their_checkpoints(hf, tmp_path):
    callback = AveragingCallback(RULES, export_at_save=True)
    hf.trainer(tmp_path, [callback], **SAVING | {"save_total_limit": 1}).train()
    assert [folder.name for folder in tmp_path.glob("checkpoint-*")] == ["checkpoint-9"]
    assert (tmp_path / "checkpoint-9/averages.safetensors").is_file()
    assert len(list(tmp_path.rglob("averages.safetensors"))) == 1


def test_save_only_model_leaves_the_state_out_and_cannot_resume_silently(hf, tmp_path):
    settings = SAVING | {"save_only_model": True}
    hf.trainer(tmp_path, [AveragingCallback(RULES)], **settings).train()
    assert not list(tmp_path.rglob("averages.safetensors"))
    assert (tmp_path / "averaged/bema/model.safetensors").is_file()
    with pytest.raises(ValueError, match="save_only_model"):
        hf.trainer(tmp_path, [AveragingCallback(RULES)], **settings | {"max_steps": 12}).train(
            resume_from_checkpoint=True
        )


def test_a_model_per_average_at_each_save(hf, tmp_path):
    recorder = hf.recorder()
    hf.trainer(tmp_path, [AveragingCallback(RULES, export_at_save=True), recorder], **SAVING).train()
    for step in (3, 6, 9):
        for name, rule in RULES.items():
            model = AutoModelForCausalLM.from_pretrained(tmp_path / f"checkpoint-{step}/averaged/{name}")
            hf.close(hf.weights(model), recorder.average(rule, at=step))
    # The checkpoint itself is still the live model, and nothing in it gets into the way of resuming from it.
    assert hf.same(hf.weights(AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-6")), recorder.iterates[6])
    trainer = hf.trainer(tmp_path, [AveragingCallback(RULES)], **SAVING | {"max_steps": 10})
    trainer.train(resume_from_checkpoint=True)


def test_the_run_folder_is_still_one_for_lagless_average(hf, tmp_path):
    run, start, recorder = tmp_path / "run", tmp_path / "start", hf.recorder()
    hf.model().save_pretrained(start)
    hf.trainer(run, [AveragingCallback(RULES, export_at_save=True), recorder], **SAVING).train()
    rule = BEMA.paper(update_freq=3)
    average_checkpoints(run, rule, tmp_path / "out", start=start, start_step=0)
    hf.close(hf.weights(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), recorder.average(rule))


PUSHES = pytest.mark.skipif(
    not hasattr(TrainerCallback, "on_push_begin"), reason="transformers 4.57 raises no event before it uploads"
)


@PUSHES
def test_an_upload_of_a_checkpoint_holds_its_averages(hf, tmp_path, monkeypatch):
    """The Trainer uploads before on_save; the layout of the repository is its own."""
    uploads, written, state = [], [], tmp_path / "checkpoint-3/averages.safetensors"

    class Job:
        def done(self):
            return True

    class Hub:
        def upload_folder(self, folder_path, path_in_repo=None, ignore_patterns=(), **kwargs):
            files = {str(p.relative_to(folder_path)) for p in tmp_path.glob("**/*") if p.is_relative_to(folder_path)}
            uploads.append((path_in_repo, files))
            written.append(state.stat().st_mtime_ns)
            return Job()

    monkeypatch.setattr("transformers.trainer.hf_api", Hub)
    monkeypatch.setattr(
        Trainer, "init_hf_repo", lambda self: vars(self).update(hub_model_id="me/model", push_in_progress=None)
    )
    settings = SAVING | {"push_to_hub": True, "hub_strategy": "checkpoint", "max_steps": 3}
    callback = AveragingCallback(RULES, export_at_save=True)
    hf.trainer(tmp_path, [callback], **settings).train()
    [checkpoint] = [files for path, files in uploads if path == "last-checkpoint"]
    assert set(written) == {state.stat().st_mtime_ns}  # once
    assert {"averages.safetensors", "averaged/bema/model.safetensors", "optimizer.pt"} <= checkpoint
    assert all("averaged" in file or file.startswith("checkpoint") or "/" not in file for _, f in uploads for file in f)


@PUSHES
def test_a_push_in_the_middle_makes_no_checkpoint_of_its_own(hf, tmp_path, monkeypatch):
    class Pushing(Trainer):
        def training_step(self, *args, **kwargs):
            self.callback_handler.on_push_begin(self.args, self.state, self.control)
            return super().training_step(*args, **kwargs)

    trainer = hf.trainer(tmp_path, [AveragingCallback(RULES)], kind=Pushing, max_steps=4)
    trainer.train()
    assert not list(tmp_path.glob("checkpoint-*"))


def test_a_failing_save_leaves_no_half_written_state(hf, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError("No space left on device")

    trainer = hf.trainer(tmp_path, [AveragingCallback(RULES)], **SAVING)
    monkeypatch.setattr("lagless.averaging._state_file.save_file", full)
    with pytest.raises(OSError, match="No space"):
        trainer.train()
    assert not [p for p in tmp_path.rglob("*") if "averages" in p.name]


def test_an_earlier_runs_folder_is_replaced(hf, tmp_path):
    hf.trainer(tmp_path, [AveragingCallback({"ema": EMA()})], **SAVING).train()
    recorder = hf.recorder()
    rule = DEMA.paper(update_freq=1)
    hf.trainer(tmp_path, [AveragingCallback({"ema": rule}), recorder], **SAVING | {"learning_rate": 0.02}).train()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "averaged/ema")
    hf.close(hf.weights(model), recorder.average(rule))
    assert not [p.name for p in (tmp_path / "averaged").iterdir() if p.name != "ema"]


def test_a_failing_export_leaves_the_earlier_one_whole(hf, tmp_path, monkeypatch):
    hf.trainer(tmp_path, [AveragingCallback({"ema": EMA()})], **SAVING).train()
    before = {p: p.read_bytes() for p in (tmp_path / "averaged").rglob("*") if p.is_file()}

    class Failing(Trainer):
        def save_model(self, output_dir=None, _internal_call=False):
            super().save_model(output_dir, _internal_call)
            raise OSError("No space left on device")

    with pytest.raises(OSError, match="No space"):
        hf.trainer(tmp_path, [AveragingCallback({"ema": EMA()})], kind=Failing, learning_rate=0.1).train()
    assert before == {p: p.read_bytes() for p in (tmp_path / "averaged").rglob("*") if p.is_file()}
    assert [p.name for p in (tmp_path / "averaged").iterdir()] == ["ema"]


BEST = {"eval_strategy": "steps", "eval_steps": 3, "metric_for_best_model": "eval_loss", "load_best_model_at_end": True}
# The first step is the best: of a loss that falls, where greater is better.
FIRST = SAVING | BEST | {"greater_is_better": True}


def test_a_best_step_before_the_averages_is_refused_at_the_start(hf, tmp_path):
    hf.trainer(tmp_path, **FIRST | {"max_steps": 3}).train()
    callback, recorder = AveragingCallback(RULES, on_missing_state="restart"), hf.recorder()
    trainer = hf.trainer(tmp_path, [recorder, callback], **FIRST)
    with pytest.raises(ValueError, match=r"may go back to .*checkpoint-3, where.*Go on without load_best_model_at_end"):
        trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 3
    hf.trainer(tmp_path, [callback], **FIRST | {"load_best_model_at_end": False}).train(resume_from_checkpoint=True)
    assert (tmp_path / "averaged/bema/model.safetensors").is_file()


def test_a_best_step_with_averages_of_other_rules_is_refused_at_the_start(hf, tmp_path):
    hf.trainer(tmp_path, [AveragingCallback(EMA(decay=0.5))], **FIRST | {"max_steps": 6}).train()
    (tmp_path / "checkpoint-6/averages.safetensors").unlink()
    trainer = hf.trainer(tmp_path, [AveragingCallback(EMA(), on_missing_state="restart")], **FIRST)
    with pytest.raises(ValueError, match="may go back to .*checkpoint-3.*made with rules"):
        trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 6


def test_a_resumed_run_may_go_back_before_the_step_at_which_it_was_resumed(hf, tmp_path):
    hf.trainer(tmp_path, [AveragingCallback(RULES)], **FIRST | {"max_steps": 6}).train()
    recorder, callback = hf.recorder(), AveragingCallback(RULES)
    trainer = hf.trainer(tmp_path, [callback, recorder], **FIRST)
    trainer.train(resume_from_checkpoint=True)
    first = Averager(hf.model(), RULES)
    first.load(tmp_path / "checkpoint-3/averages.safetensors")
    assert trainer.state.best_global_step == 3 and callback.averager.step == 3
    assert hf.same(callback.averager.state_dict()["tensors"], first.state_dict()["tensors"])


def test_a_best_state_lost_during_the_run_costs_none_of_the_last_ones(hf, tmp_path):
    class Deleting(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 8:
                (tmp_path / "checkpoint-3/averages.safetensors").unlink()

    class Reading(TrainerCallback):
        def on_step_end(self, args, state, control, model, **kwargs):
            if state.global_step == 9:
                self.live, self.averages = hf.weights(model), averages(callback)

    callback, reading = AveragingCallback(RULES), Reading()
    with pytest.raises(RuntimeError, match="went back to .*checkpoint-3, but.*state at step 9 is in .*Averager.load"):
        hf.trainer(tmp_path, [callback, Deleting(), reading], **FIRST).train()
    model = hf.model()
    model.load_state_dict(reading.live)
    callback.averager = Averager(model, RULES)
    # The file was written beside the weights of the best step, which were in the model by then.
    callback.averager.load(tmp_path / "averages.safetensors", check_live=False)
    assert hf.same(averages(callback), reading.averages)


def test_a_best_checkpoint_that_is_gone_leaves_weights_and_averages_at_the_last_step(hf, tmp_path):
    """The Trainer warns of it and goes on."""

    class Deleting(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 8:
                shutil.rmtree(tmp_path / "checkpoint-3")

    callback, recorder = AveragingCallback(RULES), hf.recorder()
    settings = FIRST | {"metric_for_best_model": "eval_ema_loss"}
    trainer = hf.trainer(tmp_path, [callback, Deleting(), recorder], **settings)
    trainer.train()
    assert trainer.state.best_global_step == 3
    assert hf.same(hf.weights(trainer.model), recorder.iterates[9])
    hf.close(callback.averager.read("ema"), recorder.average(RULES["ema"]))


def test_exports_say_what_they_are(hf, tmp_path):
    hf.trainer(tmp_path, [AveragingCallback(RULES)], **SAVING).train()
    record = json.loads((tmp_path / "averaged/bema/lagless.json").read_text())
    assert (record["name"], record["step"], record["updates"]) == ("bema", 9, 4)
    assert rule_from_dict(record["rule"]) == RULES["bema"]


def test_a_folder_of_something_else_is_refused_before_training(hf, tmp_path):
    (tmp_path / "averaged/ema").mkdir(parents=True)
    (tmp_path / "averaged/ema/thesis.txt").write_text("x")
    trainer = hf.trainer(tmp_path, [AveragingCallback(RULES)])
    with pytest.raises(CheckpointError, match="averaged/ema: .*lagless did not write thesis.txt"):
        trainer.train()
    assert trainer.state.global_step == 0 and (tmp_path / "averaged/ema/thesis.txt").is_file()


def test_an_earlier_runs_average_is_not_left_where_this_run_has_none(hf, tmp_path):
    rules = {"fast": EMA(decay=0.8), "slow": EMA(decay=0.8, update_after=6)}
    hf.trainer(tmp_path, [AveragingCallback(rules)], **SAVING).train()
    assert (tmp_path / "averaged/slow").is_dir()
    trainer = hf.trainer(tmp_path, [AveragingCallback(rules)], **FIRST)
    trainer.train()
    assert trainer.state.best_global_step == 3
    assert [folder.name for folder in (tmp_path / "averaged").iterdir()] == ["fast"]
