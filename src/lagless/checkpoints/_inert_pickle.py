"""Unpickling without running anything that a pickle names: what it does not know becomes an inert record."""

from __future__ import annotations

import pickle
from collections import OrderedDict
from typing import Any

import torch


class Record:
    """An object of a class that a pickle names; holds what the pickle says of it and does nothing."""

    state: Any = None

    def __new__(cls, *_: Any, **__: Any) -> Record:
        return super().__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, value: Any) -> None:
        """Take an item of a list, which is not kept."""

    def extend(self, values: Any) -> None:
        """Take items of a list, which are not kept."""

    def add(self, value: Any) -> None:
        """Take an item of a set, which is not kept."""


class InertUnpickler(pickle._Unpickler):  # type: ignore[name-defined]
    """Knows dictionaries, ``torch.Size`` and types of tensors; every other class becomes a :class:`Record`.

    It is the one in Python: that in C fills memory for as many objects as a damaged pickle says it refers to.
    """

    def find_class(self, module: str, name: str) -> Any:
        """Return what stands for the class or function that is named."""
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if (module, name) == ("torch", "Size"):
            return tuple
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        return type(name, (Record,), {})
