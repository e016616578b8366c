"""Stochastic rounding from float32 to bfloat16.

Round-to-nearest loses an update smaller than half a unit in the last place for good, so a bfloat16 EMA with decay .999
never moves. Rounding up with probability equal to the fraction cut off keeps the expected value exact, and the average
moves.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Noise:
    """One generator per device, seeded by (seed, step): a resumed run draws the same noise, and nothing is stored.

    Args:
        seed: of the run, or of a part of it.
        step: of the optimizer.
    """

    def __init__(self, seed: int, step: int) -> None:
        self._seed = (seed * 0x9E3779B97F4A7C15 + step) % 2**63
        self._generators: dict[torch.device, torch.Generator] = {}

    def on(self, device: torch.device) -> torch.Generator:
        """The generator of ``device``, made when it is first asked for."""
        if device not in self._generators:
            self._generators[device] = torch.Generator(device).manual_seed(self._seed)
        return self._generators[device]


def stochastic_round_(target: Tensor, value: Tensor, generator: torch.Generator) -> None:
    """Write ``value`` into ``target``, rounding up or down at random so that the expectation is ``value``.

    A float32 has 16 bits more than a bfloat16. Adding a uniform 16-bit integer to its bits and cutting them off carries
    into the part that stays with exactly the wanted probability. Infinities and NaN pass through.

    Args:
        target: bfloat16, same shape; overwritten.
        value: float32; overwritten with scratch.
        generator: source of the noise, on the device of ``value``.
    """
    bits = value.view(torch.int32)
    noise = torch.randint(0, 1 << 16, bits.shape, dtype=torch.int32, device=bits.device, generator=generator)
    special = ~torch.isfinite(value)
    noise.masked_fill_(special, 0)
    # A NaN whose payload lies in the low bits would turn into an infinity if they were cut off: let the copy round it.
    torch.where(special, bits, bits.add(noise).bitwise_and_(-(1 << 16)), out=bits)
    target.copy_(value)
