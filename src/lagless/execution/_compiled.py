"""Running a formula over whole tensors as one kernel of ``torch.compile``."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor

from lagless.execution._annotated import one_kernel

KERNEL_SMALLEST = 1 << 16  # elements: below this, calling a compiled kernel costs more than it saves


def fits_kernel(row: Sequence[Tensor]) -> bool:
    """Whether tensors of one shape are large enough for a kernel, and lie in memory so that it can take them."""
    return row[0].numel() >= KERNEL_SMALLEST and all(t.is_contiguous() for t in row)


def flat(tensor: Tensor) -> Tensor:
    """The same memory in one dimension. Not a view: a compiled function would be compiled anew for every shape seen."""
    alias = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    return alias.set_(tensor.untyped_storage(), tensor.storage_offset(), (tensor.numel(),), (1,))


@lru_cache(maxsize=8)
def on_device(numbers: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Numbers as one tensor, so that new values need no new kernel; all that step with them share the copy."""
    given = torch.tensor(numbers, dtype=dtype)
    if device.type == "cuda":
        # From pinned memory, the host need not wait for what the device is doing.
        return given.pin_memory().to(device, non_blocking=True)
    return given.to(device)


@cache
def compiled(formula: Callable[..., None]) -> Callable[..., None]:
    """``formula`` as one kernel for tensors of every size; autograd does not notice what it changes."""
    options: dict[str, str | int | bool | Callable[..., Any]] = {
        # Otherwise casts down and up again are dropped, and what follows would be of unrounded values.
        "emulate_precision_casts": True,
        # Long formulas are cut by default, which writes temporaries as large as the tensors to memory.
        "realize_opcount_threshold": 10_000,
        "realize_reads_threshold": 10_000,
    }
    return or_eager(one_kernel(formula, options), formula)


def or_eager(kernel: Callable[..., None], formula: Callable[..., None]) -> Callable[..., None]:
    """``kernel``, or from its first failure to compile on, after a warning, ``formula``: nothing has been changed then.

    Args:
        kernel: the compiled formula.
        formula: the same by single operations.
    """
    failed = False

    def run(*arguments: Any) -> None:
        nonlocal failed
        if not failed:
            try:
                return kernel(*arguments)
            except _failures() as error:
                failed = True
                _warn_once(str(error).strip().partition("\n")[0])
        formula(*arguments)

    return run


@cache
def _failures() -> tuple[type[Exception], ...]:
    from torch._dynamo.exc import TorchDynamoException  # of a backend, too
    from torch._inductor.exc import InductorError

    return TorchDynamoException, InductorError


_warned = False


def _warn_once(reason: str) -> None:
    global _warned
    if not _warned:
        _warned = True
        warnings.warn(
            f"torch.compile failed ({reason}), so compile=True has no effect: single operations are used, which are "
            "slower, and whose results may differ in the last bit. Replicas of one run should all compile, or none: "
            "install a C++ compiler (CXX names it; Triton on accelerators), or leave compile=True out.",
            RuntimeWarning,
            stacklevel=4,
        )
