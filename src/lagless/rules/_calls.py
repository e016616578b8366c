"""Answers to calls that do not fit: what is wrong with the arguments, and the line to write.

A call is checked against the signature before it is made. Arguments are recognized by what they are (a model, an
optimizer, a rule, a class, a number) and by their other names (:mod:`lagless.rules._words`).
"""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from numbers import Real
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar
from weakref import WeakKeyDictionary

from lagless._deprecated import FORMER_ARGUMENTS
from lagless.rules._given import (
    call_code,
    code,
    described,
    is_model,
    is_optimizer,
    is_rule_class,
    kind_of_value,
    lists_parameters,
    number,
    rule_type,
)
from lagless.rules._registry import kind_of, known_rules
from lagless.rules._words import EXAMPLES, OTHER_NAMES, candidates, translated

if TYPE_CHECKING:
    from typing_extensions import Self

P = ParamSpec("P")
R = TypeVar("R")

_ROLES = {
    "source": ("a model", "model"),
    "params": ("parameters", "model.parameters()"),
    "optimizer": ("an optimizer", "optimizer"),
    "rules": ("a rule", "EMA(half_life_fraction=0.05)"),
    "average": ("a rule", "EMA(half_life_fraction=0.05)"),
    "rule": ("a rule", "EMA(half_life_fraction=0.05)"),
}
"""Argument → what it takes, and how that is written."""
_BY_NAME = inspect.Parameter.KEYWORD_ONLY
_RULES = ("rules", "average", "rule")

_signatures: WeakKeyDictionary[Any, inspect.Signature] = WeakKeyDictionary()


class CheckedCall:
    """Mix-in: a construction with arguments that do not fit is answered with the line to write.

    A subclass that hands ``**options`` on names in ``_options_of`` the classes that take them.
    """

    _options_of: tuple[type[Any], ...] = ()

    def __new__(cls, *arguments: Any, **options: Any) -> Self:
        check_call(cls, arguments, options)
        return super().__new__(cls)


def checked(function: Callable[P, R]) -> Callable[P, R]:
    """Decorate a function so that a call whose arguments do not fit is answered with the line to write."""

    @functools.wraps(function)
    def call(*arguments: P.args, **options: P.kwargs) -> R:
        check_call(function, arguments, options)
        return function(*arguments, **options)

    return call


def check_call(kind: Callable[..., Any], arguments: tuple[Any, ...], options: Mapping[str, Any]) -> None:
    """Require arguments that fit the signature of ``kind`` and are what their names say.

    Raises:
        TypeError: if not, with the line to write.
    """
    signature = _signature(kind)
    former: dict[str, str] = getattr(getattr(kind, "__init__", kind), FORMER_ARGUMENTS, {})
    options = {former.get(name, name): value for name, value in options.items()}
    try:
        given = signature.bind_partial(*arguments, **options).arguments
    except TypeError:
        given = None
    if given is None or any(not _fits(name, value, signature) for name, value in given.items()):
        problems, line = _Answer(kind, signature, arguments, options).lines()
        raise TypeError(f"{kind.__name__}: {'; '.join(problems)}. Write {line}.")


def rule_line(value: object) -> str:
    """Return the expression that gives the rule which ``value``, a class, a name or a number, may mean."""
    if isinstance(value, type) and issubclass(value, rule_type()):
        return _sample(value)
    if isinstance(value, str):
        close = difflib.get_close_matches(kind_of(value), list(known_rules()), n=1, cutoff=0.6)
        return _sample(known_rules()[close[0]]) if close else _sample(known_rules()["ema"])
    ema = known_rules()["ema"]
    if isinstance(value, Real):
        return _Answer(ema, _signature(ema), (value,), {}).lines()[1]
    return _sample(ema)


class _Answer:
    """What is wrong with one call, and the line in its place."""

    def __init__(
        self, kind: Any, signature: inspect.Signature, arguments: Iterable[Any], options: Mapping[str, Any]
    ) -> None:
        self._kind, self._signature = kind, signature
        self._names = [n for n, p in signature.parameters.items() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        self._roles = [name for name in self._names if _has_role(name, signature)]
        self._is_rule = isinstance(kind, type) and issubclass(kind, rule_type())
        self._unplaced = list(arguments)
        self._options = dict(options)
        self._problems: list[str] = []
        self._settings: dict[str, Any] = {}
        self._of_rule: dict[str, Any] = {}

    def lines(self) -> tuple[list[str], str]:
        """Return what is wrong, and the line to write."""
        self._take_named()
        if self._is_rule:
            return self._for_a_rule()
        roles = self._take_roles()
        placed = self._signature.parameters
        others = [n for n in self._names if n not in self._roles and placed[n].kind is not _BY_NAME]
        for name, value in zip(others, self._unplaced[len(self._roles) :], strict=False):
            if isinstance(value, (Real, tuple)) and name not in self._settings:
                self._settings[name] = value
        line = call_code(self._kind.__name__, roles, self._settings)
        if "source" in self._roles and any(map(is_optimizer, [*self._unplaced, *self._options.values()])):
            line = f"avg = {line}; avg.attach(optimizer)"
        return self._problems or [f"{self._shown()} does not fit"], line

    def _shown(self) -> str:
        return ", ".join([*map(described, self._unplaced), *(f"{k}={described(v)}" for k, v in self._options.items())])

    def _take_named(self) -> None:
        """Sort out the arguments given by name."""
        unknown: list[str] = []
        for name, value in self._options.items():
            if name in self._names and name not in self._roles:
                self._settings[name] = value
            elif name not in self._names and not self._translate(name, value):
                unknown.append(name)
        if unknown:
            verb = "is no argument" if len(unknown) == 1 else "are no arguments"
            self._problems.append(f"{' and '.join(unknown)} {verb}; there are {', '.join(self._names)}")

    def _translate(self, name: str, value: Any) -> bool:
        taken = {*self._options, *self._settings}
        for argument in (*_others(name), *difflib.get_close_matches(name, self._names, n=1, cutoff=0.75)):
            if argument in self._names and argument not in taken:
                if argument in self._roles:
                    self._problems.append(f"{name} is called {argument} here")
                    return True
                given = translated(name, value, argument, self._signature.parameters[argument].default)
                self._settings[argument] = given
                how = "" if given == value else f", and {described(value)} is written {described(given)}"
                self._problems.append(f"{name} is called {argument} here{how}")
                return True
        if self._is_rule or not {*_RULES} & {*self._roles}:
            return False
        owners = known_rules().values()
        if any(argument in _signature(rule).parameters for rule in owners for argument in (name, *_others(name))):
            self._of_rule[name] = value
            self._problems.append(f"{name} is an argument of the rule")
            return True
        return False

    def _take_roles(self) -> list[str]:
        """Find the model, the parameters, the optimizer and the rule among what was given, whatever its place."""
        written: list[str] = []
        pool = [*self._unplaced, *self._options.values()]
        for position, role in enumerate(self._roles):
            what, written_as = _ROLES[role]
            given = self._options.get(role, self._unplaced[position] if position < len(self._unplaced) else None)
            if given is not None and not _fits(role, given, self._signature):
                self._problems.append(f"{role} takes {what}, and {described(given)} is {kind_of_value(given)}")
            if role in _RULES:
                line = self._rule_among(pool, given)
                required = self._signature.parameters[role].default is inspect.Parameter.empty
                if line is None and not required:
                    continue
                adjoins = self._names.index(role) == len(written)
                written.append(line or written_as if adjoins else f"{role}={line or written_as}")
            else:
                written.append(self._written(role, written_as, pool))
        if not self._problems and len(self._unplaced) > len(self._roles):
            rest = [name for name in self._names if name not in self._roles]
            self._problems.append(f"takes {' and '.join(self._roles)}, and by name {', '.join(rest)}")
        return written

    def _written(self, role: str, usual: str, pool: list[Any]) -> str:
        if role == "optimizer" and isinstance(self._kind, type) and not any(map(is_optimizer, pool)):
            return "torch.optim.AdamW(model.parameters())"
        if role == "params" and "exclude" in self._names:  # by name
            return "model.named_parameters()"
        return usual

    def _rule_among(self, pool: list[Any], given: Any) -> str | None:
        rules = [value for value in pool if isinstance(value, rule_type())]
        if rules:
            return code(rules[0])
        if self._of_rule:
            kinds = known_rules()
            best = max(kinds.values(), key=lambda kind: sum(_takes(kind, name) for name in self._of_rule))
            kind = kinds["ema"] if all(_takes(kinds["ema"], name) for name in self._of_rule) else best
            return _Answer(kind, _signature(kind), (), self._of_rule).lines()[1]
        classes = [value for value in pool if isinstance(value, type) and is_rule_class(value)]
        meant: list[Any] = [given] if isinstance(given, str) else classes
        if meant:
            return rule_line(meant[0])
        if not isinstance(given, bool) and isinstance(given, Real):
            return rule_line(given)
        return None

    def _for_a_rule(self) -> tuple[list[str], str]:
        numbers = [n for n in map(number, self._unplaced) if n is not None]
        words = [value for value in self._unplaced if isinstance(value, str) and number(value) is None]
        if self._unplaced:
            self._problems.insert(0, f"{', '.join(map(described, self._unplaced))}: a rule's arguments have names")
        settings = {**_required(self._signature), **self._settings}
        for value in (*numbers, *words):
            names = candidates(value) if not isinstance(value, str) else iter(self._names)
            for name in names:
                if (
                    name in self._names
                    and name not in self._settings
                    and _constructs(self._kind, {**settings, name: value})
                ):
                    settings[name] = value
                    break
        plain = settings == _required(self._signature)
        line = call_code(self._kind.__name__, [], settings)
        if plain or not _constructs(self._kind, settings):
            line = _sample(self._kind)
        holders = [v for v in (*self._unplaced, *self._options.values()) if is_model(v) or is_optimizer(v)]
        if holders or any(isinstance(v, Iterable) and not isinstance(v, (str, Mapping)) for v in self._unplaced):
            self._problems.append("a rule holds numbers only, the Averager has the model")
            line = f"Averager(model, {line})"
        return self._problems, line


def _signature(kind: Any) -> inspect.Signature:
    found = _signatures.get(kind)
    if found is None:
        found = inspect.signature(kind)
        own = {n: p for n, p in found.parameters.items() if p.kind is not p.VAR_KEYWORD}
        for further in getattr(kind, "_options_of", ()):
            for name, parameter in inspect.signature(further).parameters.items():
                if parameter.kind is _BY_NAME:
                    own.setdefault(name, parameter)
            found = found.replace(parameters=list(own.values()))
        _signatures[kind] = found
    return found


def _has_role(name: str, signature: inspect.Signature) -> bool:
    return name in _ROLES and signature.parameters[name].kind is inspect.Parameter.POSITIONAL_OR_KEYWORD


def _fits(name: str, value: Any, signature: inspect.Signature) -> bool:
    """Tell whether ``value`` can be what the argument ``name`` takes; what has no role always can."""
    if not _has_role(name, signature) or (value is None and signature.parameters[name].default is None):
        return True
    if name in _RULES:
        return isinstance(value, rule_type()) or (name == "rules" and isinstance(value, Mapping))
    if name == "optimizer":
        return is_optimizer(value)
    wrong = isinstance(value, (type, str, Real, rule_type())) or value is None or is_optimizer(value)
    return not wrong and not (name == "params" and is_model(value) and not lists_parameters(value))


def _others(name: str) -> tuple[str, ...]:
    return OTHER_NAMES.get(name, ())


def _takes(kind: Any, name: str) -> bool:
    return any(argument in _signature(kind).parameters for argument in (name, *_others(name)))


def _required(signature: inspect.Signature) -> dict[str, Any]:
    empty = inspect.Parameter.empty
    return {n: EXAMPLES[n] for n, p in signature.parameters.items() if p.default is empty and n in EXAMPLES}


def _constructs(kind: Any, settings: Mapping[str, Any]) -> bool:
    try:
        kind(**settings)
    except (TypeError, ValueError):
        return False
    return True


def _sample(kind: Any) -> str:
    """Return the expression of a rule with a sensible width."""
    signature = _signature(kind)
    for name, value in EXAMPLES.items():
        if name in signature.parameters and _constructs(kind, settings := {**_required(signature), name: value}):
            return call_code(kind.__name__, [], settings)
    return f"{kind.__name__}()"
