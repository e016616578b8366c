"""Rules as people type them."""

import inspect
import math

import pytest

from lagless import BEMA, EMA, PowerEMA, WindowAverage
from lagless.rules import rule_arguments, rules_from_settings


def test_one_rule():
    assert rules_from_settings(["BEMA"], {"update-freq": "40", "bias_power": ".3"}) == {
        "bema": BEMA.paper(update_freq=40, bias_power=0.3)
    }
    assert rules_from_settings(["power-ema"], {"relative_width": 0.1}) == {"powerema": PowerEMA(relative_width=0.1)}


def test_grid_multiplies_the_kinds_that_have_it():
    rules = rules_from_settings(["bema", "ema"], {"update_freq": 5}, {"ema-power": [0.2, 0.5], "bias-power": ["inf"]})
    assert rules == {
        "bema-ema_power=0.2-bias_power=inf": BEMA.paper(ema_power=0.2, bias_power=math.inf, update_freq=5),
        "bema-ema_power=0.5-bias_power=inf": BEMA.paper(ema_power=0.5, bias_power=math.inf, update_freq=5),
        "ema-ema_power=0.2": EMA(ema_power=0.2, update_freq=5),
        "ema-ema_power=0.5": EMA(ema_power=0.5, update_freq=5),
    }


@pytest.mark.parametrize(
    "kinds, settings, grid, message",
    [
        (["swa"], {}, {}, "unknown rule 'swa'; known: bema, ouema, decayaverage, ema"),
        (["ema"], {"bias_power": 1}, {}, "bias_power is no argument of ema; ema has ema_power"),
        (["ema"], {"decay": 0.9}, {"decay": [0.8]}, "decay is given as a setting and in the grid"),
        (["ema"], {"half-live": 3}, {}, r"half_live is no argument of ema; .* Did you mean half_life\?"),
        (["emma"], {}, {}, r"unknown rule 'emma'; known: .* Did you mean ema\?"),
        (["ema"], {"decay": "nan"}, {}, "decay=nan; it must be a number"),
        (["ema"], {"decay": "much"}, {}, "decay='much'; it must be a number"),
        (["ema"], {}, {"update_freq": ["2.5"]}, "update_freq=2.5; it must be an integer"),
    ],
)
def test_refusals(kinds, settings, grid, message):
    with pytest.raises(ValueError, match=message):
        rules_from_settings(kinds, settings, grid)


def test_arguments_of_all_rules_are_listed():
    found = rule_arguments()
    assert {name for rule in (EMA, BEMA, WindowAverage) for name in inspect.signature(rule).parameters} <= found.keys()
    assert set(found["form"].rules) == {"ema", "bema", "ouema", "dema"} and found["window"].rules == ("windowaverage",)
    for argument in found.values():
        assert argument.text, f"{argument.name}: no rule documents it"
