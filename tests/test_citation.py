"""BibTeX entries name the methods in use, each once."""

import re

import torch

import lagless
from lagless.optim import PACE


def keys(text):
    return re.findall(r"@\w+\{(\w+),", text)


def test_methods_in_use_are_cited_once():
    averager = lagless.Averager(
        {"w": torch.ones(1)}, {"a": lagless.BEMA.paper(), "b": lagless.DEMA.paper(), "c": lagless.PowerEMA()}
    )
    assert keys(lagless.citation(averager, PACE)) == [
        "lagless",
        "block2025ema",
        "karras2024analyzing",
        "au2026training",
    ]


def test_without_arguments_every_method_is_cited_and_braces_match():
    text = lagless.citation()
    assert len(keys(text)) == len(set(keys(text))) == text.count("@")
    assert text.count("{") == text.count("}")


def test_every_rule_and_optimizer_is_known():
    import lagless._citation as citation
    import lagless.optim
    from lagless.rules import RULES

    optimizers = {name for name in vars(lagless.optim) if name.startswith("BiasCorrected")} | {"PACE", "Pullback"}
    assert citation._METHODS.keys() >= RULES.keys() | optimizers
