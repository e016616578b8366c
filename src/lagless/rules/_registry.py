"""Rules by name. A rule registers itself by being defined; rules of installed packages are found by entry points.

Names are found again by module and name. Nothing a file says makes code be imported, other than the entry points that
installed packages declare in the group ``lagless.rules``.
"""

from __future__ import annotations

import inspect
import sys
import warnings
from collections.abc import Mapping
from functools import lru_cache
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

if TYPE_CHECKING:
    from lagless.rules._rule import Rule

GROUP = "lagless.rules"

_BUILT_IN = __name__.rpartition(".")[0] + "."
_homes: WeakValueDictionary[tuple[str, str], type[Rule]] = WeakValueDictionary()
_kinds: WeakValueDictionary[str, type[Rule]] = WeakValueDictionary()


def register(rule: type[Rule]) -> None:
    """Enter a class that was just defined; a definition of the same module and name replaces the former one.

    Names that begin with an underscore are found by module only.

    Raises:
        ValueError: if another class has the name.
    """
    kind = kind_of(rule.__name__)
    if not rule.__name__.startswith("_"):
        other = _kinds.get(kind)
        if other is not None and _home(other) != _home(rule) and not _is_fleeting(other):
            raise ValueError(
                f"{rule.__module__} defines the rule {rule.__name__}, but {other.__module__}.{other.__name__} "
                "has that name (rules are typed without regard to case, - and _). Call it otherwise, or import the one "
                f"there is: from {other.__module__} import {other.__name__}."
            )
        _kinds[kind] = rule
    _homes[_home(rule)] = rule


def is_built_in(rule: type[Rule]) -> bool:
    """Whether ``rule`` is one of lagless's own."""
    return rule.__module__.startswith(_BUILT_IN)


def built_in_rules() -> dict[str, type[Rule]]:
    """Return lagless's own rules by name."""
    return {rule.__name__: rule for rule in _kinds.values() if is_built_in(rule)}


def known_rules() -> dict[str, type[Rule]]:
    """Return all rules that can be named: lagless's own, those defined or imported by now, those of installed packages.

    A rule defined inside a function is not among them. A package whose entry point is broken is warned about.

    Returns:
        Name as it is typed (lower case, without - and _) → class.
    """
    own: dict[str, type[Rule]] = {}
    others: dict[str, type[Rule]] = {}
    for kind, rule in _nameable().items():
        (own if is_built_in(rule) else others)[kind] = rule
    for kind, declared in sorted(_declared().items()):
        if kind not in own:
            try:
                others[kind] = _load(kind, declared)
            except ValueError as error:
                warnings.warn(str(error), stacklevel=2)
    return own | dict(sorted(others.items()))


def find_rule(name: str, module: str | None = None) -> type[Rule]:
    """Return the rule that is called ``name``.

    Args:
        name: of the class; without a module also as it is typed, in any case.
        module: where it was defined; None for one of lagless's own, or one whose name is enough.

    Raises:
        ValueError: if nothing has imported it, saying what to import; or if its entry point is broken.
    """
    if module is None:
        kind = kind_of(name)
        found = _kinds.get(kind) or (_load(kind, _declared()[kind]) if kind in _declared() else None)
        if found is None:
            known = [*(rule.__name__ for rule in _nameable().values()), *_declared()]
            raise ValueError(f"unknown rule {name!r}; known: {', '.join(dict.fromkeys(known))}.")
        return found
    found = _at_home(name, module)
    if found is None:
        for kind, declared in _declared().items():
            if any(point.module == module for point in declared):
                _load(kind, declared)
        found = _at_home(name, module)
    if found is None:
        raise ValueError(f"the averaging rule {name!r} of module {module!r} is not known here. {_remedy(name, module)}")
    return found


def kind_of(name: str) -> str:
    """Return a rule's name as it is typed: lower case, without - and _."""
    return name.lower().replace("-", "").replace("_", "")


def _nameable() -> dict[str, type[Rule]]:
    return {
        kind: rule
        for kind, rule in _kinds.items()
        if not inspect.isabstract(rule) and "<locals>" not in rule.__qualname__
    }


def _home(rule: type[Rule]) -> tuple[str, str]:
    return rule.__module__, rule.__qualname__


def _is_fleeting(rule: type[Rule]) -> bool:
    """Whether a class is defined in a function, a script or a notebook, where no other code can import it."""
    return "<locals>" in rule.__qualname__ or _is_script(rule.__module__)


def _is_script(module: str) -> bool:
    return module in ("__main__", "__mp_main__")


def _at_home(name: str, module: str) -> type[Rule] | None:
    if (module, name) in _homes:
        return _homes[module, name]
    # A script's rule that moved to a module, a module that was started as a script: the same class under two names.
    for (other, qualname), rule in _homes.items():
        if qualname == name and (_is_script(module) or _is_script(other)):
            return rule
    return None


def _remedy(name: str, module: str) -> str:
    if _is_script(module):
        return (
            "It was defined in a script or notebook. Define it in a module of its own, which both that script and this "
            "program import."
        )
    if module in sys.modules:
        return f"{module} is imported, but defines no rule of that name: was it renamed, or is its version another one?"
    return f"Nothing has imported it: write `import {module}` first, or install the package that has it."


def _declared() -> Mapping[str, list[EntryPoint]]:
    return _declared_on(tuple(sys.path))


@lru_cache(maxsize=1)
def _declared_on(path: tuple[str, ...]) -> Mapping[str, list[EntryPoint]]:
    """The entry points of the packages on ``path``, which must be ``sys.path``; reading them takes a while."""
    found: dict[str, list[EntryPoint]] = {}
    for point in entry_points(group=GROUP):
        found.setdefault(kind_of(point.name), []).append(point)
    return found


def _load(kind: str, declared: list[EntryPoint]) -> type[Rule]:
    point = declared[0]
    if len({other.value for other in declared}) > 1:
        owners = " and ".join(sorted(f"{_owner(other)} ({other.value})" for other in declared))
        raise ValueError(f"the rule {kind!r} is declared by {owners}; uninstall one of these distributions.")
    try:
        rule = point.load()
    except Exception as error:
        raise ValueError(
            f"the rule {point.name!r} of the distribution {_owner(point)} cannot be loaded: {point.value} gives "
            f"{type(error).__name__}: {error}. Repair or uninstall {_owner(point)}."
        ) from error
    if not isinstance(rule, type) or _homes.get(_home(rule)) is not rule:
        raise ValueError(
            f"the rule {point.name!r} of the distribution {_owner(point)} is {rule!r}; the group {GROUP} of entry "
            f"points is for classes derived from lagless.Rule. Repair or uninstall {_owner(point)}."
        )
    return rule


def _owner(point: EntryPoint) -> str:
    return "(unknown)" if point.dist is None else point.dist.name
