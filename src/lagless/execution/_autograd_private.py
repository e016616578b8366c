"""Private names of torch's autograd, which tell one backward pass from another. All of them that lagless uses are here.

Microbatches are told apart by the pass that a gradient arrives in, for which torch has no public name. The test of this
module fails where a release of torch has moved one of them.
"""

# pyright: reportPrivateUsage=false, reportUnknownMemberType=false

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from torch.autograd import Variable
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import _engine_run_backward

SEEN_IN = ("2.8", "2.13")
"""Releases of torch in which all of them were found to work."""


def current_pass() -> int:
    """Return the number of the backward pass at work, higher for later ones; -1 outside of any."""
    return torch._C._current_graph_task_id()


def after_pass(callback: Callable[[], None]) -> None:
    """Call ``callback`` when the pass at work ends, after the callbacks that were queued before."""
    Variable._execution_engine.queue_callback(callback)


def within_another_pass() -> bool:
    """Return whether the pass at work was started by a node of another one, as reentrant checkpointing does."""
    frame, started = sys._getframe(), False
    while frame is not None:
        started |= frame.f_code is _engine_run_backward.__code__
        if started and frame.f_code is BackwardCFunction.apply.__code__:
            return True
        frame = frame.f_back
    return False
