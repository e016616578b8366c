"""A canary: what lagless uses of Lightning beyond its documented interface is where it was, or ``_compat`` moves."""

import inspect
import warnings

import pytest

lightning = pytest.importorskip("lightning")
from lightning.pytorch import Trainer  # noqa: E402
from lightning.pytorch.loops.evaluation_loop import _EvaluationLoop  # noqa: E402

from lagless.integrations.lightning import _compat  # noqa: E402


def complain(what):
    return (
        f"lightning {lightning.__version__}: {what}. Mend src/lagless/integrations/lightning/_compat.py, whose names "
        f"were seen in {', '.join(_compat.SEEN_IN)}."
    )


@pytest.fixture(scope="module")
def trainer():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)


def test_this_release_was_seen():
    assert ".".join(lightning.__version__.split(".")[:2]) in _compat.SEEN_IN, complain("a release nobody has looked at")


@pytest.mark.parametrize("name", _compat.TRAINER_NAMES)
def test_the_trainer_has(trainer, name):
    assert hasattr(trainer, name), complain(f"Trainer has no {name}")


@pytest.mark.parametrize("name", [*_compat.LOOP_NAMES, "_last_val_dl_reload_epoch"])
def test_the_validation_loop_has(trainer, name):
    assert hasattr(_compat.validation_loop(trainer), name), complain(f"the validation loop has no {name}")


def test_a_second_loop_is_made_as_lightning_makes_the_first(trainer):
    parameters = list(inspect.signature(_EvaluationLoop.__init__).parameters)
    assert parameters[1:4] == ["trainer", "trainer_fn", "stage"], complain("loops are made of other arguments")
    assert {"verbose", "inference_mode"} <= set(parameters), complain("loops have no verbose or inference_mode")
    assert hasattr(trainer._logger_connector, "log_metrics"), complain("the logger connector has no log_metrics")
