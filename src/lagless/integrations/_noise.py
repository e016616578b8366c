"""The gradient noise scale in trainers: who measures it, and what is logged."""

from __future__ import annotations

import math
from typing import Any

from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lagless.optim import GradientNoise

LOGGED = "noise_scale"


class NoiseLog:
    """The gradient noise scale of a training run, from the optimizer or from a :class:`~lagless.GradientNoise`.

    Args:
        wanted: whether to measure beside an optimizer that does not; a number is that of samples in a microbatch.

    Raises:
        ValueError: if it is neither True, False nor a finite number > 0.
    """

    def __init__(self, wanted: bool | float) -> None:
        good = isinstance(wanted, int | float) and (isinstance(wanted, bool) or 0.0 < wanted < math.inf)
        if not good:
            raise ValueError(
                f"gradient_noise={wanted!r}; it must be True, False, or how many samples a microbatch has, > 0."
            )
        self._wanted = wanted
        self._source: Any = None
        self._handles: list[RemovableHandle] = []
        self._samples: float | None = None  # of a step, where the source counts in another unit

    def begin(
        self, optimizer: Any, model: nn.Module, *, batch: int | None, microbatches: int, ranks: int, shifted: bool
    ) -> None:
        """Find who measures, before the first backward pass.

        Args:
            optimizer: the trainer's, wrapped or not.
            model: the trainer's, before it is wrapped.
            batch: samples of a microbatch of one rank; None if that is not known.
            microbatches: of one rank in a step.
            ranks: of data parallelism.
            shifted: whether labels are shifted by one position in the loss.

        Raises:
            ValueError: if steps have one microbatch only, or nobody knows how many samples that has.
        """
        self.end()
        own = _measuring(optimizer)
        if own is None and self._wanted is False:
            return
        batch = batch if isinstance(self._wanted, bool) else self._wanted  # pyright: ignore[reportAssignmentType]
        if own is not None:
            self._source, self._samples = own, None if batch is None else batch * microbatches * ranks
            return
        if batch is None:
            raise ValueError(
                "gradient_noise=True, and the data loader does not say how many samples a batch has; give the number."
            )
        groups = _innermost(optimizer).param_groups
        sharded = any(isinstance(p, DTensor) for group in groups for p in group["params"])
        if microbatches * (1 if sharded else ranks) < 2:
            raise ValueError(
                f"gradient_noise={self._wanted!r}, and steps have one microbatch, which says nothing about noise. "
                "Accumulate gradients over at least two."
            )
        noise = GradientNoise(groups, batch * (ranks if sharded else 1))
        self._handles = [noise.attach(_innermost(optimizer)), noise.weigh_by_tokens(model, shifted=shifted)]
        self._source = noise

    def value(self) -> float | None:
        """Return the smoothed B_simple in samples; None before there is one, or where noise hides all signal."""
        if self._source is None:
            return None
        try:
            found = self._source.noise_scale()
        except RuntimeError:  # no step with two microbatches yet
            return None
        scale = found.smoothed.scale
        if self._handles == [] and self._samples is not None:
            scale *= self._samples / found.samples
        return scale if math.isfinite(scale) else None

    def end(self) -> None:
        """Stop measuring."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._source, self._samples = [], None, None


def _innermost(optimizer: Any) -> Any:
    """Return the optimizer inside Accelerate's wrapper, whose hooks run."""
    while hasattr(optimizer, "accelerator_state") and isinstance(getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = optimizer.optimizer
    return optimizer


def _measuring(optimizer: Any) -> Any:
    """Return the optimizer that measures the noise scale itself, among those that are wrapped into each other."""
    while optimizer is not None and not callable(getattr(optimizer, "noise_scale", None)):
        optimizer = getattr(optimizer, "optimizer", None)
    return optimizer
