"""A small noisy parabola to run optimizers on, the same at every run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

STEPS = 6
_SHAPES = ((4, 3), (3,), (), (1,))


class Problem:
    """Parameters, an optimizer of them, and a loss whose noise depends on the step alone.

        loss = sign · Σ_p (½ (1 + dim p) |p - 1|² + noise_t · p)

    Args:
        make: from parameters to their optimizer.
        dtype: of the parameters, unless they are given.
        parameters: parameters to go on with.
        step: steps already taken.
        sign: of the loss.
        noise: standard deviation of the gradients' noise.
        microbatches: ``backward()`` calls per step, each with noise of its own.
    """

    def __init__(
        self,
        make: Callable[[Any], Optimizer],
        dtype: torch.dtype = torch.float32,
        *,
        parameters: list[nn.Parameter] | None = None,
        step: int = 0,
        sign: float = 1.0,
        noise: float = 0.3,
        microbatches: int = 1,
    ) -> None:
        self.parameters = parameters or [
            nn.Parameter(torch.linspace(-1.0, 0.5, shape.numel(), dtype=dtype).view(shape))
            for shape in map(torch.Size, _SHAPES)
        ]
        self.optimizer = make(self.parameters)
        self.step, self.sign, self.noise, self.microbatches = step, sign, noise, microbatches

    def loss(self, microbatch: int = 0) -> Tensor:
        """The loss of a microbatch of the present step."""
        total = torch.zeros((), dtype=torch.float64)
        for p in self.parameters:
            # The seed tells shapes apart but not positions, so that a parameter may be left out.
            seed = 1_000_000 * microbatch + 1000 * self.step + 10 * p.numel() + p.dim()
            generator = torch.Generator().manual_seed(seed)
            noise = self.noise * torch.randn(p.shape, generator=generator, dtype=torch.float64)
            total = total + (0.5 * (1 + p.dim()) * (p - 1.0).square() + noise.to(p.dtype) * p).sum().double()
        return self.sign * total

    def backward(self, scale: float | Tensor = 1.0) -> Tensor:
        """New gradients, of the loss times ``scale``; returns the loss."""
        self.optimizer.zero_grad()
        losses = []
        for microbatch in range(self.microbatches):
            losses.append(self.loss(microbatch) / self.microbatches)
            (scale * losses[-1]).backward()
        return torch.stack(losses).sum().detach()

    def update(self) -> None:
        """One step of the optimizer."""
        self.optimizer.step()
        self.step += 1

    def run(self, steps: int) -> Problem:
        """Take ``steps`` steps."""
        for _ in range(steps):
            self.backward()
            self.update()
        return self

    def bits(self) -> list[Tensor]:
        """Copies of the parameters."""
        return [p.detach().clone() for p in self.parameters]
