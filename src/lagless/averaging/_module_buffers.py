"""The buffers of a module as they were, such as running statistics, whatever a block does to them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lagless.averaging._tables import buffers_of


class ModuleBuffers:
    """The present bits of a module's buffers.

    Args:
        module: whose; None for no buffers at all.
    """

    def __init__(self, module: nn.Module | None) -> None:
        owners = module.modules() if module is not None else ()
        self._places = [(owner, key, b) for owner in owners for key, b in buffers_of(owner).items() if b is not None]
        copies = {id(buffer): buffer.detach().clone() for _, _, buffer in self._places}
        self._bits = [copies[id(buffer)] for _, _, buffer in self._places]

    @torch.no_grad()
    def restore(self) -> None:
        """Put the same tensors with the same bits back where they were; buffers that are new stay."""
        # Versions do not tell which to write: inference mode changes tensors without counting.
        for (owner, key, buffer), bits in zip(self._places, self._bits, strict=True):
            buffers_of(owner)[key] = buffer
            if (buffer.dtype, buffer.device, buffer.shape) != (bits.dtype, bits.device, bits.shape):
                buffer.data = bits
            elif not _overlaps_itself(buffer):
                with torch.inference_mode(buffer.is_inference()):
                    buffer.copy_(bits)


def _overlaps_itself(buffer: Tensor) -> bool:
    """Whether elements share memory, as after ``expand``; torch refuses to write such a tensor."""
    strided = buffer.layout == torch.strided
    return strided and any(n > 1 and by == 0 for n, by in zip(buffer.shape, buffer.stride(), strict=True))
