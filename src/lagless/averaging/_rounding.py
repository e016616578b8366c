"""Stochastic rounding from float32 to bfloat16.

Round-to-nearest loses an update smaller than half a unit in the last place for good, so a bfloat16 EMA with decay .999
never moves. Rounding up with probability equal to the fraction cut off keeps the expected value exact, and the average
moves.
"""

from __future__ import annotations

import torch
from torch import Tensor


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
