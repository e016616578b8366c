"""Whether a loaded state stands beside the live weights that it was saved with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import xxhash
from torch import Tensor

from lagless.averaging._live import LiveTensors
from lagless.execution import shown_average, trained_weights


class LiveCheck:
    """Compares live weights with the digests in a state, at the first use of the averages after it was loaded.

    Not before: some trainers load averages first and weights afterwards.

    Args:
        live: what is averaged.
    """

    def __init__(self, live: LiveTensors) -> None:
        self._live = live
        self._expected: Mapping[str, str] = {}

    def digests(self) -> Mapping[str, str]:
        """Return a digest of the bytes of every live tensor, by name.

        Until a loaded state is verified, these are its own. There are none where ranks hold parts of tensors, nor while
        an average is in their place.
        """
        if self._expected or shown_average(self._live.parameters()) is not None:
            return self._expected
        return {name: _digest(tensor) for name, tensor in self._present().items()}

    def unlike(self, digests: Mapping[str, str]) -> Mapping[str, str]:
        """Return ``digests`` if the live weights have others now; nothing if they are these, or nobody knows.

        Weights that have them already are not looked at again: they may change before the next use in a way that is
        not seen here, as by the step of an optimizer without hooks.
        """
        return digests if digests and self._different(self._present(), digests) else {}

    def expect(self, digests: Mapping[str, str]) -> None:
        """Require these digests at the next use; nothing is required where there are none."""
        self._expected = digests

    def require(self) -> None:
        """Refuse to go on beside other live weights than those of the state.

        Raises:
            RuntimeError: naming the first tensor that differs.
        """
        if not self._expected:
            return
        present = self._present()
        if differ := self._different(present, self._expected):
            raise RuntimeError(
                f"{len(differ)} of {len(present)} live tensors, such as {differ[0]}, are not those with which these "
                "averages were saved: the weights are of another checkpoint, or whoever resumed the run restored wrong "
                "ones. Restore the weights of that step, before the averages or at least before the next step; or load "
                "the averages with check_live=False, if they are to go on from other weights."
            )
        self._expected = {}

    def _present(self) -> dict[str, Tensor]:
        live = self._live
        if any(sharding.mesh is not None for sharding in live.shardings):
            return {}
        if live.made_of:
            return {str(i): tensor for i, tensor in enumerate(trained_weights(live.made_of))}
        return dict(zip(live.names, live.trained(), strict=True))

    @staticmethod
    def _different(present: Mapping[str, Tensor], digests: Mapping[str, str]) -> Sequence[str]:
        return [name for name, tensor in present.items() if _digest(tensor) != digests.get(name)]


def _digest(tensor: Tensor) -> str:
    """Return 64 bits that depend on every byte: about 0.1 s for a gigabyte in memory."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return xxhash.xxh3_64_hexdigest(flat.view(torch.uint8).numpy().data if flat.numel() else b"")
