"""A call with arguments that do not fit is answered, before anything is made, with a line that can be written."""

import copy
import inspect
import pickle
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings, strategies as st

import lagless
from lagless import BEMA, EMA, Averager, rules
from lagless.optim import (
    PACE,
    BiasCorrectedAdamW,
    BiasCorrectedShampoo,
    BiasCorrectedSophia,
    PrimalAveraging,
    Pullback,
    gpa,
    lookahead,
    schedule_free,
)
from lagless.rules import RULES

OPTIMIZERS = (PACE, BiasCorrectedAdamW, BiasCorrectedShampoo, BiasCorrectedSophia)
WRAPPERS = (Pullback, PrimalAveraging)
NAMES = sorted(rules._words.OTHER_NAMES)


@pytest.fixture
def model():
    return torch.nn.Linear(2, 1)


def answer(kind, *arguments, **options):
    """Return the line that the refusal of a call says to write."""
    with pytest.raises(TypeError) as refusal:
        kind(*arguments, **options)
    text = str(refusal.value)
    assert text.startswith(f"{kind.__name__}: "), text
    return text.rpartition(". Write ")[2].removesuffix(".")


def written(line, model):
    """Run a line as someone would who has a model and an optimizer."""
    scope = {**vars(lagless), **vars(lagless.optim), "torch": torch, "Averager": Averager, "model": model}
    scope["optimizer"] = torch.optim.SGD(model.parameters(), lr=0.1)
    for statement in line.split("; "):
        name, equals, expression = statement.partition(" = ")
        made = scope[name] = eval(expression if equals else statement, scope)
    return made


NUMBERS = st.one_of(st.floats(), st.integers(-3, 10_000), st.floats(0.0, 1.0), st.booleans(), st.just("0.999"))


@settings(deadline=None, max_examples=10)
@pytest.mark.parametrize("rule", RULES.values(), ids=list(RULES))
@given(values=st.lists(NUMBERS, min_size=1, max_size=3))
def test_numbers_without_names_are_answered_with_a_rule_that_can_be_made(rule, values):
    line = answer(rule, *values)
    assert isinstance(eval(line, vars(lagless)), rule)


@settings(deadline=None, max_examples=10)
@pytest.mark.parametrize("rule", RULES.values(), ids=list(RULES))
@given(name=st.sampled_from([*NAMES, "decey", "nothing"]), value=NUMBERS)
def test_other_names_are_answered_with_a_rule_that_can_be_made(rule, name, value):
    if name not in inspect.signature(rule).parameters:
        assert isinstance(eval(answer(rule, **{name: value}), vars(lagless)), rule)


@pytest.mark.parametrize("rule", RULES.values(), ids=list(RULES))
def test_a_rule_that_is_given_the_model_is_answered_with_the_averager(rule, model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for given_ in (model, model.parameters(), optimizer):
        assert isinstance(written(answer(rule, given_), torch.nn.Linear(2, 1)), Averager)


EXACT = [
    (EMA, (0.999,), {}, "EMA(decay=0.999)"),
    (EMA, (100,), {}, "EMA(half_life=100)"),
    (EMA, (), {"beta": 0.999}, "EMA(decay=0.999)"),
    (EMA, (), {"alpha": 0.01}, "EMA(decay=0.99)"),
    (EMA, (), {"momentum": 0.9, "update_freq": 5}, "EMA(decay=0.9, update_freq=5)"),
    (EMA, (), {"decey": 0.9}, "EMA(decay=0.9)"),
    (BEMA, (), {"kappa": 0.5, "eta": 0.2}, "BEMA(ema_power=0.5, bias_power=0.2)"),
    (BEMA, (), {"φ": 100, "ρ": 5.0, "τ": 10}, "BEMA(update_freq=100, lag=5.0, update_after=10)"),
    (BEMA, (0.1,), {}, "BEMA(half_life_fraction=0.1)"),
    (lagless.WindowAverage, (5,), {}, "WindowAverage(window=5)"),
    (lagless.PowerEMA, (), {"sigma_rel": 0.05}, "PowerEMA(relative_width=0.05)"),
    (lagless.DecayAverage, ("cosine",), {"total_steps": 50}, "DecayAverage(total_steps=50, shape='cosine')"),
    (lagless.WarmupEMA, ("ramp",), {}, "WarmupEMA(warmup='ramp')"),
]


@pytest.mark.parametrize("kind, arguments, options, line", EXACT, ids=[line for *_, line in EXACT])
def test_the_line_says_what_was_meant(kind, arguments, options, line):
    assert answer(kind, *arguments, **options) == line


def test_an_averager_recognizes_model_rule_and_optimizer_in_any_place(model):
    optimizer, rule = torch.optim.SGD(model.parameters(), lr=0.1), EMA(decay=0.9)
    calls = {
        "avg = Averager(model); avg.attach(optimizer)": [(optimizer,), (model, optimizer)],
        "avg = Averager(model, EMA(decay=0.9)); avg.attach(optimizer)": [(optimizer, rule), (model, rule, optimizer)],
        "Averager(model, EMA(decay=0.9))": [(rule,), (rule, model)],
        "Averager(model, EMA(decay=0.999))": [(model, 0.999)],
        "Averager(model, BEMA(half_life_fraction=0.05))": [(model, BEMA), (model, "bema"), (model, "bemma")],
        "Averager(model)": [(torch.nn.Linear,), (3,)],
    }
    for line, samples in calls.items():
        for arguments in samples:
            assert answer(Averager, *arguments) == line, arguments
        written(line, torch.nn.Linear(2, 1))
    assert answer(Averager, model, decay=0.999) == "Averager(model, EMA(decay=0.999))"
    assert answer(Averager, model, window=5) == "Averager(model, WindowAverage(window=5))"
    assert answer(Averager, model, rule=rule, seed=3) == "Averager(model, EMA(decay=0.9), seed=3)"
    with pytest.raises(TypeError, match=r"write \{'a': EMA\(half_life_fraction=0.05\)\}"):
        Averager(model, {"a": EMA})


@pytest.mark.parametrize("kind", [*OPTIMIZERS, *WRAPPERS])
@pytest.mark.parametrize("what", ["model", "layers", "optimizer", "rule", "class", "string", "number"])
def test_an_optimizer_is_given_what_it_steps(kind, what, model):
    wrong = {
        "model": model,
        "layers": torch.nn.Sequential(model),
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
        "rule": EMA(),
        "class": torch.nn.Linear,
        "string": "model",
        "number": 1e-3,
    }[what]
    if kind in WRAPPERS and what == "optimizer":
        assert answer(kind, wrong, EMA if kind is PrimalAveraging else 0.1, foo=1).startswith(
            f"{kind.__name__}(optimizer"
        )
        return
    assert isinstance(written(answer(kind, wrong), torch.nn.Linear(2, 1)), kind)


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize(
    "name, value, argument, expected",
    [
        ("learning_rate", 0.1, "lr", 0.1),
        ("eta", 0.1, "lr", 0.1),
        ("wd", 0.2, "weight_decay", 0.2),
        ("beta", 0.8, "betas", 0.8),
        ("momentum", 0.8, "betas", 0.8),
        ("beta2", 0.9, "betas", 0.9),
        ("epsilon", 1e-6, "eps", 1e-6),
    ],
)
def test_other_names_of_optimizers_arguments(kind, name, value, argument, expected, model):
    if argument not in inspect.signature(kind).parameters:
        pytest.skip(f"{kind.__name__} has no {argument}")
    made = written(answer(kind, model.parameters(), **{name: value}), torch.nn.Linear(2, 1))
    found = made.param_groups[0][argument]
    assert (found[int("2" in name)] if argument == "betas" else found) == expected


def test_optimizers_take_lists_of_parameters_as_torch_does(model):
    for params in (list(model.parameters()), model.named_parameters(), torch.nn.ParameterList(model.parameters())):
        PACE(params)
    assert (
        answer(PACE, model.parameters(), average=EMA)
        == "PACE(model.parameters(), average=EMA(half_life_fraction=0.05))"
    )
    assert answer(PACE, model.parameters(), decay=0.99) == "PACE(model.parameters(), average=EMA(decay=0.99))"


@pytest.mark.parametrize("function", [schedule_free, gpa, lookahead])
def test_functions_that_wrap_an_optimizer(function, model):
    assert answer(function, model).startswith(f"{function.__name__}(optimizer")
    assert answer(lookahead, torch.optim.SGD(model.parameters(), lr=0.1), k=5) == "lookahead(optimizer, steps=5)"


def callbacks():
    from lagless.integrations.transformers import AveragingCallback, MovingReferenceCallback

    return AveragingCallback, MovingReferenceCallback


def test_callbacks_refuse_at_construction(model):
    for kind in callbacks():
        name = kind.__name__
        assert answer(kind, BEMA) == f"{name}(BEMA(half_life_fraction=0.05))"
        assert answer(kind, 0.999) == f"{name}(EMA(decay=0.999))"
        assert answer(kind, decay=0.999) == f"{name}(EMA(decay=0.999))"
        assert answer(kind, model) == f"{name}()"
        assert answer(kind, EMA(decay=0.9), dtipe=torch.bfloat16) == f"{name}(EMA(decay=0.9), dtype=...)"
    assert answer(callbacks()[0], memory=3) == "AveragingCallback()"
    assert answer(callbacks()[0], evaluat="ema").endswith("evaluate='ema')")


def test_good_calls_and_copies_are_not_touched(model):
    for rule in (EMA(decay=0.9), BEMA(), lagless.DecayAverage(total_steps=5)):
        assert copy.deepcopy(rule) == rule == pickle.loads(pickle.dumps(rule))
    with pytest.raises(TypeError, match="params"):
        PACE()


@pytest.mark.parametrize("room, extra", [("transformers", "hf"), ("lightning", "lightning")])
def test_an_integration_without_its_library_names_the_extra(room, extra):
    code = f"""
import sys
sys.modules.update(dict.fromkeys(("transformers", "lightning", "pytorch_lightning")))
import lagless.integrations.{room}
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: ") and last.endswith(f"pip install 'lagless[{extra}]'"), done.stderr
