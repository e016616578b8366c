"""Options for the arguments that rules can have, made from the rules' own signatures and docstrings."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Sequence
from types import NoneType
from typing import Annotated, Any

import typer

from lagless._signatures import choices_of, first_sentence
from lagless.rules import (
    Rule,
    RuleArgument,
    common_update_freq,
    hyperparameters,
    kind_of,
    known_rules,
    rule_arguments,
    rule_names,
    rules_from_settings,
)

RuleNames = Annotated[list[str], typer.Option("--rule", help=f"{', '.join(rule_names())}; may be repeated.")]
Grid = Annotated[
    list[str],
    typer.Option(help="ARGUMENT=VALUE,VALUE,...: one average per value; repeat for a product. All in one pass."),
]


def rule_options(command: Callable[..., None]) -> Callable[..., None]:
    """Replace the parameter ``settings`` of ``command`` by one option for every argument that a known rule has.

    An argument that is called like an option of the command's own gets the option ``--rule-ARGUMENT``.
    """
    own = inspect.signature(command, eval_str=True)
    options = {
        f"rule_{name}" if name in own.parameters else name: argument for name, argument in rule_arguments().items()
    }
    extra = [
        inspect.Parameter(
            option,
            inspect.Parameter.KEYWORD_ONLY,
            default=None,
            annotation=Annotated[
                _type(argument) | None, typer.Option(help=_help(argument), rich_help_panel="Rule arguments")
            ],
        )
        for option, argument in options.items()
    ]

    @functools.wraps(command)
    def run(**values: Any) -> None:
        given = {argument.name: values.pop(option) for option, argument in options.items()}
        command(settings={name: value for name, value in given.items() if value is not None}, **values)

    kept = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for name, p in own.parameters.items() if name != "settings"]
    run.__signature__ = own.replace(parameters=[*kept, *extra])  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in [*kept, *extra]}
    return run


def chosen_rules(steps: Sequence[int], kinds: list[str], settings: dict[str, Any], grid: list[str]) -> dict[str, Rule]:
    """Return the rules asked for. Left alone, update_freq is the one at which every stored checkpoint is an update."""
    if not kinds:  # as lagless.rules.default_rule()
        kinds, settings = ["ema"], settings if settings or grid else {"half_life_fraction": 0.05}
    axes: dict[str, list[str]] = {}
    for item in grid:
        name, _, values = item.partition("=")
        if not re.fullmatch(r"[\w-]+", name) or not values:
            raise ValueError(f"--grid {item!r}; it must be ARGUMENT=VALUE,VALUE,..., e.g. ema-power=0.2,0.5.")
        axes[name] = values.split(",")
    given = {*settings, *(name.replace("-", "_") for name in axes)}
    known = known_rules()
    ends = any(kind_of(kind) in known and _needs_length(known[kind_of(kind)]) for kind in kinds)
    if ends and "total_steps" not in given:
        settings = settings | {"total_steps": steps[-1]}
    if not ends and "update_freq" not in given:
        settings = settings | {"update_freq": common_update_freq(steps, settings.get("update_after", 0))}
    return rules_from_settings(kinds, settings, axes)


def _needs_length(rule: type[Rule]) -> bool:
    argument = inspect.signature(rule).parameters.get("total_steps")
    return argument is not None and argument.default is inspect.Parameter.empty


def require_rule(rule: list[str], settings: dict[str, Any], grid: list[str]) -> None:
    """Refuse arguments of rules where no rule is named."""
    if (settings or grid) and not rule:
        raise ValueError("rule arguments were given without --rule; say which rule they belong to, e.g. --rule ema.")


def settings_of(rule: Rule | None) -> str:
    """Return the settings of a rule that are not its defaults, as text."""
    if rule is None:
        return "weights as given"
    defaults = inspect.signature(type(rule)).parameters
    changed = {name: value for name, value in hyperparameters(rule).items() if value != defaults[name].default}
    return ", ".join(f"{name}={value}" for name, value in changed.items() if value is not None)


def integers(option: str, text: str | None) -> list[int] | None:
    """Return the integers in ``text``, which commas are between; None for None."""
    if text is None:
        return None
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"{option} {text!r}; it must be integers separated by commas, e.g. 0,100,200.") from None


def _choices(argument: RuleArgument) -> list[Any]:
    found = dict.fromkeys(choice for annotation in argument.annotations for choice in choices_of(annotation))
    return [choice for choice in found if choice is not NoneType]


def _type(argument: RuleArgument) -> type:
    """What typer converts the text to: the widest number or flag that all rules take, or text as it is."""
    kinds = set(_choices(argument))
    if any({int, float} <= {*choices_of(annotation)} for annotation in argument.annotations):
        return str  # 1 and 1.0 differ there, and the rule reads them
    for kind, members in ((bool, {bool}), (int, {int}), (float, {int, float})):
        if kinds and kinds <= members:
            return kind
    return str


def _help(argument: RuleArgument) -> str:
    words = [choice for choice in _choices(argument) if isinstance(choice, str)]
    text = first_sentence(argument.text)
    if words:
        text = f"{', '.join(words)}."
    if argument.name == "update_freq":
        text += " Default: every stored checkpoint."
    if argument.name == "total_steps":
        text += " Default: the last step."
    owners = "" if len(argument.rules) == len(rule_names()) else f" ({', '.join(argument.rules)})"
    return f"{text}{owners}".strip()
