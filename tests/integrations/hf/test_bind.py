"""A Trainer that is handed over is not looked for among the callers."""

import shutil
from types import SimpleNamespace

import pytest

from lagless import EMA
from lagless.integrations.transformers import AveragingCallback, _caller

RULE = EMA(decay=0.8)
SETTINGS = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 3, "max_steps": 6}


def run(hf, folder, bind, resume=None, sets=False):
    rows = {"early": hf.rows(20, 4), "late": hf.rows(30, 4)} if sets else hf.rows(24, 6)
    data = {"train_dataset": hf.rows(0, 20), "eval_dataset": rows}
    callback = AveragingCallback(RULE)
    trainer = hf.trainer(folder, [] if bind else [callback], data=data, **SETTINGS)
    if bind:
        assert callback.bind(trainer) is callback
    trainer.train(resume_from_checkpoint=resume)
    return trainer, callback


@pytest.mark.parametrize("sets", [False, True])
def test_a_bound_callback_does_the_same_without_looking_at_its_callers(hf, tmp_path, monkeypatch, sets):
    found, _ = run(hf, tmp_path / "found", bind=False, sets=sets)

    def refused(depth):
        raise AssertionError("looked at its callers")

    monkeypatch.setattr(_caller, "sys", SimpleNamespace(_getframe=refused))
    bound, callback = run(hf, tmp_path / "bound", bind=True, sets=sets)
    last = callback.averager.read()
    resumed, again = run(hf, tmp_path / "bound", bind=True, resume=str(tmp_path / "bound/checkpoint-3"), sets=sets)
    monkeypatch.undo()
    losses = [
        [{key: value for key, value in entry.items() if key.endswith("loss")} for entry in trainer.state.log_history]
        for trainer in (found, bound)
    ]
    assert losses[0][:-1] == losses[1][:-1] and any("ema_loss" in key for entry in losses[0] for key in entry)
    assert hf.same(last, again.averager.read())
    prefix = "late_test" if sets else "test"
    metrics = bound.evaluate(hf.rows(10, 4), metric_key_prefix=prefix)
    assert f"{prefix}_ema_loss" in metrics


def test_resuming_from_the_last_checkpoint_is_noted_as_its_path(hf, tmp_path):
    _, callback = run(hf, tmp_path, bind=True)
    shutil.rmtree(tmp_path / "checkpoint-6")
    _, again = run(hf, tmp_path, bind=True, resume=True)
    assert hf.same(callback.averager.read(), again.averager.read()) and again.averager.step == 6


def test_a_callback_serves_one_trainer(hf, tmp_path):
    callback = AveragingCallback(RULE)
    first, second = (hf.trainer(tmp_path / name) for name in ("first", "second"))
    callback.bind(first)
    with pytest.raises(ValueError, match="bound to a Trainer already"):
        callback.bind(second)
    second.add_callback(callback)
    with pytest.raises(RuntimeError, match="bound to one Trainer and called by another"):
        second.train()
