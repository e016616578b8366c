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
    ) -> None:
        self.parameters = parameters or [
            nn.Parameter(torch.linspace(-1.0, 0.5, shape.numel(), dtype=dtype).view(shape))
            for shape in map(torch.Size, _SHAPES)
        ]
        self.optimizer = make(self.parameters)
        self.step, self.sign, self.noise = step, sign, noise

    def loss(self) -> Tensor:
        """The loss of the present step."""
        total = torch.zeros((), dtype=torch.float64)
        for p in self.parameters:
            # The seed tells shapes apart but not positions, so that a parameter may be left out.
            generator = torch.Generator().manual_seed(1000 * self.step + 10 * p.numel() + p.dim())
            noise = self.noise * torch.randn(p.shape, generator=generator, dtype=torch.float64)
            total = total + (0.5 * (1 + p.dim()) * (p - 1.0).square() + noise.to(p.dtype) * p).sum().double()
        return self.sign * total

    def backward(self) -> None:
        """New gradients."""
        self.optimizer.zero_grad()
        self.loss().backward()

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
