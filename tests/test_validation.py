"""One vocabulary of checks: what passes comes back plain, what does not is named with its value and what is allowed."""

import math

import numpy as np
import pytest
import torch

from lagless import BEMA, EMA, PowerEMA, WindowAverage
from lagless._validation import Settings, require_choice, require_decays, require_integer, require_number, shown
from lagless.optim import PACE, BiasCorrectedAdamW, BiasCorrectedShampoo, BiasCorrectedSophia

NO_NUMBERS = [math.nan, True, "0.5", None, [0.5], 1j, 10**400, torch.tensor(0.5), np.bool_(True)]


@pytest.mark.parametrize("value", NO_NUMBERS, ids=lambda value: shown(value)[:20])
def test_what_is_no_number_is_refused(value):
    with pytest.raises(ValueError, match="^x=.*; it must be a finite number >= 0, < 1\\.$"):
        require_number("x", value, minimum=0.0, below=1.0, finite=True)


def test_numbers_come_back_as_floats_and_integers_as_ints():
    for value in (1, np.float32(1.0), np.int64(1), 1.0):
        number = require_number("x", value, above=0.0)
        assert number == 1.0 and type(number) is float
    assert require_number("x", None, optional=True) is None
    assert type(require_integer("n", np.int64(3), minimum=0)) is int
    for value in (True, 3.0, "3", None, -1):
        with pytest.raises(ValueError, match="^n=.*; it must be an integer >= 0\\.$"):
            require_integer("n", value, minimum=0)


def test_bounds_are_said():
    with pytest.raises(ValueError, match=r"x=2; it must be a number > 0, <= 1 or None"):
        require_number("x", 2, above=0.0, maximum=1.0, optional=True)
    with pytest.raises(ValueError, match="f='c'; it must be one of 'a', 'b'"):
        require_choice("f", "c", ("a", "b"))
    with pytest.raises(ValueError, match=r"f=\['a'\]; it must be one of"):
        require_choice("f", ["a"], ("a", "b"))
    for value in ((0.9,), (0.9, 1.0), (math.nan, 0.9), 0.9, "99", (True, 0.9), None):
        with pytest.raises(ValueError, match=r"it must be two numbers in \[0, 1\)"):
            require_decays("betas", value)
    require_decays("betas", [0.0, 0.999])


def test_long_values_are_shortened():
    endless: list[object] = []
    endless.append(endless)
    assert len(shown("x" * 10_000)) < 300 and len(shown(10**10_000)) < 300 and shown(endless) == "[[...]]"


def test_settings_are_not_changed():
    values = {"eps": 1, "n": 2, "on": True}
    check = Settings(object(), values)
    check.numbers("eps", above=0.0)
    check.integers("n", minimum=1)
    check.flags("on")
    assert values == {"eps": 1, "n": 2, "on": True} and type(values["eps"]) is int
    with pytest.raises(ValueError, match="object: n=2; it must be odd"):
        check.that("n", False, "odd")


NUMBERS = [
    (EMA, "ema_power", {}),
    (EMA, "half_life", {}),
    (BEMA, "bias_power", {}),
    (PowerEMA, "relative_width", {}),
    (WindowAverage, "window", {}),
    *(
        (kind, name, {"params": None})
        for kind, names in (
            (PACE, ("lr", "eps", "weight_decay", "pullback")),
            (BiasCorrectedAdamW, ("lr", "eps", "weight_decay", "update_clip", "support_clip", "support_eps")),
            (BiasCorrectedSophia, ("lr", "eps", "weight_decay", "rho", "batch_size", "clip", "hessian_freq")),
            (BiasCorrectedShampoo, ("lr", "weight_decay", "damping", "root_freq", "block_size", "adamw_eps")),
        )
        for name in names
    ),
]


@pytest.mark.parametrize("value", [math.nan, -1.0, True, "1", [1.0]], ids=str)
@pytest.mark.parametrize(("kind", "name", "others"), NUMBERS, ids=lambda x: getattr(x, "__name__", str(x)))
def test_rules_and_optimizers_refuse_what_is_no_number(kind, name, others, value):
    if "params" in others:
        others = {"params": [("weight", torch.nn.Parameter(torch.ones(2, 2)))]}
    with pytest.raises(ValueError, match=f"^{kind.__name__}: {name}=.*; it must be "):
        kind(**others, **{name: value})
