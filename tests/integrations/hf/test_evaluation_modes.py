"""Optimizers that show other weights for evaluation, in the Trainer: averages are of the weights that train."""

import pytest
from transformers import TrainerCallback

from lagless import BEMA, EMA
from lagless.integrations.transformers import AveragingCallback
from lagless.optim import PACE

RULES = {"bema": BEMA(update_freq=2), "ema": EMA(decay=0.8)}


class Averages(TrainerCallback):
    """What the averages are at every evaluation, in evaluation mode."""

    def __init__(self, callback):
        self.callback, self.read, self.modes = callback, {}, []

    def on_evaluate(self, args, state, control, optimizer, **kwargs):
        [group, *_] = optimizer.param_groups
        self.modes.append(group.get("evaluating", not group.get("train_mode", True)))
        self.read[state.global_step] = {
            name: self.callback.averager.read(name) for name in RULES if self.callback.averager.updates(name)
        }


def make(kind, model):
    if kind == "pace":
        return PACE(model.parameters(), lr=0.01)
    return pytest.importorskip("schedulefree").AdamWScheduleFree(model.parameters(), lr=0.01)


@pytest.mark.parametrize("kind", ["pace", "schedule-free"])
def test_logs_and_exports_are_of_the_trained_weights(hf, tmp_path, kind):
    def run(folder, *callbacks):
        model = hf.model()
        settings = {"max_steps": 5, "eval_strategy": "steps", "eval_steps": 1, "lr_scheduler_type": "constant"}
        optimizers = (make(kind, model), None)
        trainer = hf.trainer(tmp_path / folder, callbacks, model=model, optimizers=optimizers, **settings)
        trainer.train()
        return trainer

    callback, recorder = AveragingCallback(RULES), hf.recorder()
    averages = Averages(callback)
    trainer = run("averaged", callback, averages, recorder)
    assert len(averages.modes) == 5
    for name, rule in RULES.items():
        for step, read in averages.read.items():
            if name not in read:
                continue
            hf.close(read[name], recorder.average(rule, at=step))
        exported = type(trainer.model).from_pretrained(tmp_path / "averaged" / "averaged" / name)
        hf.close(hf.weights(exported), recorder.average(rule))
    logged = [entry["eval_bema_loss"] for entry in trainer.state.log_history if "eval_bema_loss" in entry]
    exported = type(trainer.model).from_pretrained(tmp_path / "averaged" / "averaged" / "bema")
    loss = hf.trainer(tmp_path / "again", model=exported).evaluate()["eval_loss"]
    assert logged[-1] == pytest.approx(loss, rel=1e-5)
    alone = hf.recorder()
    run("plain", alone)
    assert all(hf.same(a, b) for a, b in zip(alone.iterates, recorder.iterates, strict=True))
