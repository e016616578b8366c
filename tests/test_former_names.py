"""Names of the last release go on working, with a warning that says the new one."""

import importlib

import pytest
import torch

import lagless
import lagless.optim
import lagless.posthoc
import lagless.rules
from lagless import EMA, Averager


@pytest.mark.parametrize(
    "former, new",
    [
        ("lagless.filters", "lagless.rules"),
        ("lagless.schedules", "lagless.rules"),
        ("lagless.reconstruction", "lagless.rules"),
        ("lagless.posthoc.checkpoint", "lagless.checkpoints"),
        ("lagless.experiments.statistics", "lagless.lab.statistics"),
    ],
)
def test_a_former_module_is_the_new_one(former, new):
    with pytest.warns(DeprecationWarning, match=f"{former} is called {new} now"):
        found = lagless._deprecated._Finder().find_spec(former, None)
        module = importlib.util.module_from_spec(found)
        found.loader.exec_module(module)
    assert module is importlib.import_module(new)
    assert module.__spec__.name == new


def test_an_unknown_module_is_still_none():
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("lagless.nothing")


@pytest.mark.parametrize("module", [lagless.rules, lagless.posthoc, lagless.optim], ids=lambda m: m.__name__)
def test_former_names_of_objects(module):
    former = module.__getattr__.__closure__
    names = next(cell.cell_contents for cell in former if isinstance(cell.cell_contents, dict))
    for name, place in names.items():
        home, _, new = place.partition(":")
        with pytest.warns(DeprecationWarning, match=f"{name} is called {home}.{new} now"):
            assert getattr(module, name) is getattr(importlib.import_module(home), new)
    with pytest.raises(AttributeError):
        _ = module.no_such_name


def test_former_methods_of_the_averager():
    weights = {"w": torch.ones(2)}
    averager = Averager(weights, EMA(decay=0.1))
    averager.update()
    with pytest.warns(DeprecationWarning, match="named_averages"):
        assert [name for name, _ in averager.items()] == ["w"]
    with pytest.warns(DeprecationWarning, match="applied_name"):
        assert averager.in_model is None
    with pytest.warns(DeprecationWarning, match="copy_to_model"):
        averager.put()


@pytest.mark.parametrize("name", ["BiasCorrectedAdamW", "BiasCorrectedSophia", "BiasCorrectedShampoo"])
def test_the_former_argument_for_excluded_parameters(name):
    make = getattr(lagless.optim, name)
    named = {key: torch.nn.Parameter(torch.ones(2, 3)) for key in ("embed", "own.a", "own.b")}
    with pytest.warns(DeprecationWarning, match="argument standard is called exclude now"):
        optimizer = make(named.items(), standard=("own",))
    assert [group["param_names"] for group in optimizer.param_groups] == [["embed"], ["own.a", "own.b"]]
    with pytest.raises(TypeError, match="both exclude and standard"):
        make(named.items(), standard=(), exclude=())
    with pytest.warns(DeprecationWarning, match="set_microbatch_weight"):
        optimizer.weigh_microbatch(2.0)
