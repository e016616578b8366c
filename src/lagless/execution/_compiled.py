"""Running a formula over whole tensors as one kernel of ``torch.compile``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, lru_cache

import torch
from torch import Tensor

from lagless.execution._lerp_compiled import KERNEL_SMALLEST as KERNEL_SMALLEST


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
    return torch.tensor(numbers, dtype=torch.float64).to(device, dtype)


@cache
def compiled(formula: Callable[..., None]) -> Callable[..., None]:
    """``formula`` as one kernel for tensors of every size; autograd does not notice what it changes."""
    options = {
        # Otherwise casts down and up again are dropped, and what follows would be of unrounded values.
        "emulate_precision_casts": True,
        # Long formulas are cut by default, which writes temporaries as large as the tensors to memory.
        "realize_opcount_threshold": 10_000,
        "realize_reads_threshold": 10_000,
    }
    return torch.compile(formula, dynamic=True, fullgraph=True, options=options)
