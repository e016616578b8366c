"""The tables in which a module keeps its parameters, buffers and children: torch's own names for them are private."""

# pyright: reportPrivateUsage=false, reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn


def parameters_of(module: nn.Module) -> dict[str, nn.Parameter | None]:
    """Return the table of a module's own parameters, in which they can be replaced."""
    return module._parameters


def buffers_of(module: nn.Module) -> dict[str, Tensor | None]:
    """Return the table of a module's own buffers, in which they can be replaced."""
    return module._buffers


def children_of(module: nn.Module) -> dict[str, nn.Module | None]:
    """Return the table of the modules directly below a module."""
    return module._modules


def modules_of(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield a module and all below it with their paths, those in several places once for each."""
    yield from module.named_modules(remove_duplicate=False)
