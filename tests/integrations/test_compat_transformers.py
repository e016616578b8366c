"""A canary: what lagless uses of transformers beyond its documented interface is where it was, or ``_compat`` moves."""

import inspect

import pytest
import transformers
from transformers import Trainer, TrainerState
from transformers.trainer_callback import CallbackHandler, ProgressCallback

from lagless.integrations.transformers import _compat

RELEASE = ".".join(transformers.__version__.split(".")[:2])


def complain(what):
    return (
        f"transformers {transformers.__version__}: {what}. Mend src/lagless/integrations/transformers/_compat.py, "
        f"whose names were seen in {', '.join(_compat.SEEN_IN)}."
    )


def test_this_release_is_among_those_seen_or_between_them():
    first, last = (tuple(map(int, seen.split("."))) for seen in (_compat.SEEN_IN[0], _compat.SEEN_IN[-1]))
    assert first <= tuple(map(int, RELEASE.split("."))) <= last, complain("a release that nobody has looked at")


@pytest.mark.parametrize("name", _compat.EVALUATE_ARGUMENTS)
def test_evaluate_has_its_arguments(name):
    assert name in inspect.signature(Trainer.evaluate).parameters, complain(f"Trainer.evaluate has no {name}")


def test_the_training_loop_knows_the_checkpoint():
    methods = [
        method
        for name, method in inspect.getmembers(Trainer, inspect.isfunction)
        if "on_train_begin" in _source(method)
    ]
    assert methods, complain("no method of Trainer raises on_train_begin")
    [name] = _compat.TRAIN_ARGUMENTS
    assert all(name in method.__code__.co_varnames for method in methods), complain(
        f"{methods[0].__name__} has no {name}"
    )


def test_names_of_the_trainer():
    assert "_internal_call" in inspect.signature(Trainer.save_model).parameters, complain("save_model(_internal_call=)")
    assert "callbacks" in _source(CallbackHandler.__init__), complain("CallbackHandler has no callbacks")
    assert "prediction_bar" in _source(ProgressCallback.__init__), complain("ProgressCallback has no prediction_bar")
    assert hasattr(TrainerState(), "best_global_step"), complain("TrainerState has no best_global_step")


def test_trl_collects_metrics_under_the_name_known():
    trl = pytest.importorskip("trl")
    assert "self._metrics" in inspect.getsource(trl.SFTTrainer), complain(f"trl {trl.__version__} has no _metrics")


def test_the_best_step_is_found_in_the_name_of_the_checkpoint():
    state = TrainerState()
    assert _compat.best_step(state) is None
    state.best_model_checkpoint = "run/checkpoint-40"
    assert _compat.best_step(state) == 40
    state.best_global_step = 30
    assert _compat.best_step(state) == 30


def _source(method):
    return inspect.getsource(method)
