"""Commands that other commands end in."""

from __future__ import annotations

import inspect
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lagless.cli._average import average
from lagless.rules import Rule, common_update_freq, hyperparameters, rule_names


def average_command(
    rule: Rule, run: Sequence[Path], steps: Sequence[int], options: Mapping[str, Any] | None = None
) -> str | None:
    """Return the ``lagless average`` command that makes the average of a run by ``rule``.

    Args:
        rule: the rule; None is returned for one that no option can name.
        run: what the command averages.
        steps: of the checkpoints; an ``update_freq`` at which each of them is an update goes without saying.
        options: further ones of the command, by name; None and False are left out.
    """
    kind = type(rule).__name__.lower()
    if kind not in rule_names():
        return None
    own = inspect.signature(average).parameters
    defaults = inspect.signature(type(rule)).parameters
    usual = {name: parameter.default for name, parameter in defaults.items()}
    usual["update_freq"] = common_update_freq(steps)
    words = ["lagless", "average", *map(str, run), "--rule", kind]
    for name, value in hyperparameters(rule).items():
        if value is None or value == usual.get(name):
            continue
        if not isinstance(value, str | int | float):
            return None
        option = f"rule_{name}" if f"rule_{name}" in own else name
        words += [_option(option), str(value)]
    for name, value in (options or {}).items():
        if value is not None and value is not False:
            words += [_option(name), str(value)]
    return shlex.join([*words, "-o", f"{run[0]}-{kind}"])


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"
