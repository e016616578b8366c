"""Losses of a model on documents: cross-entropy, or any differentiable one."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lagless.lab.cross_entropy import cross_entropy_by_sequence
from lagless.lab.evaluation import Losses, Window, pad
from lagless.lab.learn._documents import Part

ItemLoss = Callable[[nn.Module, Sequence[Any]], Tensor | tuple[Tensor, Tensor]]
"""Called with the model and B items; returns the loss of each, shape (B,), and perhaps over how many targets it is
summed, (B,). Without these, every item counts as 1."""


def cross_entropy(model: nn.Module, items: Sequence[Window]) -> tuple[Tensor, Tensor]:
    """Return the nats of each window of tokens, and its number of targets."""
    sequences = pad(items)
    ((nats, targets),) = cross_entropy_by_sequence(model, sequences.tokens, sequences.labels, len(items))
    return nats, targets


def load_loss(name: str) -> Callable[..., Any]:
    """Import the function that ``module:function`` names; the working folder is searched, too.

    Raises:
        ValueError: if there is no such function.
    """
    module, separator, function = name.partition(":")
    if not separator or not module or not function:
        raise ValueError(f"loss {name!r}; it must be module:function, e.g. my_losses:margin.")
    sys.path.insert(0, os.getcwd())
    try:
        found = getattr(importlib.import_module(module), function, None)
    except ModuleNotFoundError as error:
        raise ValueError(f"loss {name!r}: {error}. Run where the module lies, or install it.") from error
    finally:
        sys.path.pop(0)
    if not callable(found):
        raise ValueError(f"loss {name!r}: {module} has no function {function}.")
    return found


def part_losses(model: nn.Module, part: Part, loss: ItemLoss, batch_size: int, gradient: bool) -> Losses:
    """Return the loss of every document of a part.

    Args:
        model: in evaluation mode.
        part: the documents.
        loss: of items.
        batch_size: items at a time.
        gradient: add the gradient of the *sum* over all documents to the parameters' ``grad``.

    Raises:
        ValueError: if the loss returns something else than one number per item, or memory runs out.
    """
    items = [(index, item) for index, document in enumerate(part.documents) for item in document.items]
    sums, counts = (torch.zeros(len(part.documents), dtype=torch.float64, device="cpu") for _ in range(2))
    with torch.set_grad_enabled(gradient), _saying_what_to_lower(batch_size):
        for first in range(0, len(items), batch_size):
            owners, batch = zip(*items[first : first + batch_size], strict=True)
            each, targets = _checked(_called(loss, model, batch), len(batch))
            if gradient:
                if not each.requires_grad:
                    raise ValueError(
                        f"loss {_name(loss)} has no gradient: PyTorch cannot follow what it returns to the model's "
                        "parameters. Compute it from the model's outputs, without no_grad or item()."
                    )
                each.sum().backward()
            owner = torch.tensor(owners, dtype=torch.int64, device="cpu")
            sums.index_add_(0, owner, each.detach().double().cpu())
            counts.index_add_(0, owner, targets.detach().double().cpu())
    return Losses(sums, counts)


def _called(loss: ItemLoss, model: nn.Module, batch: Sequence[Any]) -> Any:
    """Call a loss; what it raises is an error in it, not in what lagless was asked."""
    try:
        return loss(model, batch)
    except (AttributeError, TypeError, KeyError, IndexError, RuntimeError, ValueError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise ValueError(f"loss {_name(loss)} raised {type(error).__name__}: {error}") from error


def _name(loss: ItemLoss) -> str:
    return f"{getattr(loss, '__module__', '')}:{getattr(loss, '__qualname__', type(loss).__name__)}"


@contextmanager
def _saying_what_to_lower(batch_size: int) -> Iterator[None]:
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        first = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(
            f"out of memory with batch_size={batch_size} ({first}). "
            "Lower batch_size (--batch-size), or the length of sequences (--length); what was measured is kept."
        ) from error


def _checked(found: Tensor | tuple[Tensor, Tensor], count: int) -> tuple[Tensor, Tensor]:
    each, targets = found if isinstance(found, tuple) else (found, torch.ones(count, dtype=torch.float64, device="cpu"))
    for tensor in (each, targets):
        if not isinstance(tensor, Tensor) or tensor.shape != (count,):
            shown = tuple(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
            raise ValueError(f"loss: called with {count} items it returned {shown}; it must return shape ({count},).")
    return each, targets
