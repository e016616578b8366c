"""Former names of modules and of public objects. Each goes on working for one release, with a warning."""

from __future__ import annotations

import functools
import importlib
import importlib.abc
import importlib.machinery
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

MODULES = {
    "lagless.schedules": "lagless.rules",
    "lagless.filters": "lagless.rules",
    "lagless.reconstruction": "lagless.rules",
    "lagless.native": "lagless.execution",
    "lagless.experiments.laboratory": "lagless.lab.pictures",
    "lagless.experiments": "lagless.lab",
    **{
        f"lagless.posthoc.{name}": "lagless.checkpoints"
        for name in ("checkpoint", "dcp", "destination", "errors", "fingerprint", "layout", "trajectory", "writer")
    },
    **{f"lagless.posthoc.{name}": "lagless.posthoc" for name in ("average", "combine", "product")},
}
"""Former module → the module that has its names now. Modules below a former one are found below the new one."""


class _Loader(importlib.abc.Loader):
    """Give the module that ``target`` names, which keeps its own name and specification."""

    def __init__(self, target: str) -> None:
        self._target = target

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        module = importlib.import_module(self._target)
        self._own = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self._own


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        new = _renamed(fullname)
        if new is None:
            return None
        warnings.warn(
            f"{fullname} is called {new} now; the former name goes with the next release.",
            DeprecationWarning,
            stacklevel=2,
        )
        return importlib.machinery.ModuleSpec(fullname, _Loader(new), is_package=True)


def install() -> None:
    """Let ``import`` find modules under their former names."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())


def former_names(module: str, names: Mapping[str, str]) -> Callable[[str], Any]:
    """Return a ``__getattr__`` for ``module`` that finds objects under their former names.

    Args:
        module: the module's ``__name__``.
        names: former name → where the object is now, "module:name".
    """

    def find(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        home, _, new = names[name].partition(":")
        warnings.warn(
            f"{module}.{name} is called {home}.{new} now; the former name goes with the next release.",
            DeprecationWarning,
            stacklevel=2,
        )
        return getattr(importlib.import_module(home), new)

    return find


def _renamed(fullname: str) -> str | None:
    if fullname in MODULES:
        return MODULES[fullname]
    for former in ("lagless.experiments.laboratory", "lagless.experiments"):  # packages: what is below moved along
        if fullname.startswith(f"{former}."):
            return MODULES[former] + fullname[len(former) :]
    return None


def former_method(name: str, new: str) -> Callable[..., Any]:
    """Return a method that warns and calls the method ``new``, which was called ``name``."""

    def call(self: Any, *arguments: Any, **options: Any) -> Any:
        warnings.warn(
            f"{type(self).__name__}.{name} is called {new} now; the former name goes with the next release.",
            DeprecationWarning,
            stacklevel=2,
        )
        return getattr(self, new)(*arguments, **options)

    return call


FORMER_ARGUMENTS = "former_arguments"
"""The attribute of a function under which its former arguments are, with their names of now."""


def former_argument(name: str, new: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Return a decorator for functions whose keyword ``new`` was called ``name``."""

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def call(*arguments: P.args, **options: P.kwargs) -> R:
            if name in options:
                if new in options:
                    raise TypeError(f"both {new} and {name}, its former name, are given; give {new} only.")
                warnings.warn(
                    f"the argument {name} is called {new} now; the former name goes with the next release.",
                    DeprecationWarning,
                    stacklevel=2,
                )
                options[new] = options.pop(name)
            return function(*arguments, **options)

        call.__dict__[FORMER_ARGUMENTS] = {name: new}
        return call

    return decorate
