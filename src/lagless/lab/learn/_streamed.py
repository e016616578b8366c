"""Sums of stored checkpoints put into a model, and slopes along all checkpoints, each by one read of the files."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from lagless.checkpoints import Checkpoint, CheckpointError, is_running_statistic
from lagless.posthoc import Consumer, TensorGroups, stream_product

Floats = NDArray[np.float64]
Gradient = Mapping[str, Tensor]


class StreamedModel:
    """A model that takes any sum of N stored checkpoints, none of which is held in memory.

    Args:
        model: what sums are loaded into; its floating-point tensors are those of the checkpoints by name.
        checkpoints: N checkpoints with the same tensors.
        memory: bytes for buffers.
        progress: called with the bytes read since this object was made.
        groups: patterns of tensors that have weights of their own; see :class:`lagless.posthoc.TensorGroups`.
        tensors: the model's tensors by their names in the checkpoints; by default its state dict.

    Attributes:
        model: the model.
        groups: the groups of tensors, G of them.
        bytes_read: since this object was made.

    Raises:
        CheckpointError: if the model has a tensor that the checkpoints lack, or the other way round.
    """

    def __init__(
        self,
        model: nn.Module,
        checkpoints: Sequence[Checkpoint],
        memory: int = 2**28,
        progress: Callable[[int], None] | None = None,
        groups: Mapping[str, str] | None = None,
        tensors: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.model, self.bytes_read = model, 0
        self._checkpoints, self._memory, self._progress = checkpoints, memory, progress
        self.groups = TensorGroups(groups or {}, checkpoints[-1].tensors)
        own = model.state_dict() if tensors is None else tensors
        self._targets = _targets(own, checkpoints[-1])
        at = {tensor.data_ptr(): name for name, tensor in self._targets.items() if not is_running_statistic(name)}
        parameters = {at[p.data_ptr()]: p for p in model.parameters() if p.data_ptr() in at}  # tied ones count once
        self._parameters = {name: p for name, p in parameters.items() if p.requires_grad}
        for name, tensor in self._targets.items():
            other = at.get(tensor.data_ptr(), name)
            if self.groups.of(other) != self.groups.of(name):
                raise CheckpointError(
                    f"groups: {name!r} and {other!r} are one tensor in the model, but in two groups "
                    f"({self.groups.names[self.groups.of(name)]}, {self.groups.names[self.groups.of(other)]}). Write "
                    "the expressions so that both are in one."
                )

    def load(self, weights: Floats) -> None:
        """Put Σ_i w_i θ_i into the model; checkpoints whose weight is 0 are not read.

        Args:
            weights: shape (GN,), those of one group after another.
        """

        def put(name: str, start: int, block: Tensor) -> None:
            if (target := self._targets.get(name)) is not None:
                target[start : start + block.shape[1]].copy_(block[0])

        self._stream(weights.reshape(len(self.groups.names), -1), self.groups.consumer(put))

    def take_gradient(self) -> Gradient:
        """Return the gradient that has gathered in the parameters, on the CPU, and clear it."""
        found = {name: p.grad.cpu() for name, p in self._parameters.items() if p.grad is not None}
        self.model.zero_grad(set_to_none=True)
        return found

    def slopes(self, gradients: Sequence[Gradient], gram: bool = False) -> tuple[Floats, Floats, list[str]]:
        """Return the slopes along all checkpoints, by one read.

        Where Σ w = 1 the slopes matter up to a common number only, and are given for the moves from the last
        checkpoint, which are small: rounding is relative to them.

        Args:
            gradients: K gradients.
            gram: form the Gram matrix, too.

        Returns:
            <g_k, θ_i - θ_N>, shape (K, GN); <θ_i - θ_N, θ_j - θ_N>, shape (GN, GN), zeros without ``gram`` and between
            groups; the fingerprints of the checkpoints.
        """
        count = len(self._checkpoints)
        moves = np.eye(count)[:-1] - np.eye(count)[-1]
        # By tensor, each of which one thread goes through in order: the sums do not depend on chance.
        along = {name: np.zeros((len(gradients), count - 1)) for name in self._parameters}
        products = {name: np.zeros((count - 1, count - 1)) for name in self._parameters} if gram else {}

        def add(name: str, start: int, block: Tensor) -> None:
            if name not in self._parameters:
                return
            moved = block.double()
            for row, gradient in zip(along[name], gradients, strict=True):
                if name in gradient:
                    part = gradient[name].reshape(-1)[start : start + block.shape[1]].double()
                    row += (moved @ part).numpy()
            if gram:
                products[name] += (moved @ moved.T).numpy()

        fingerprints = self._stream(moves, add)
        size = count * len(self.groups.names)
        slopes, total = np.zeros((len(gradients), size)), np.zeros((size, size))
        for name in sorted(self._parameters):
            own = slice(count * self.groups.of(name), count * (self.groups.of(name) + 1) - 1)
            slopes[:, own] += along[name]
            if gram:
                total[own, own] += products[name]
        return slopes, total, [str(fingerprint) for fingerprint in fingerprints]

    def _stream(self, weights: Floats, consumer: Consumer) -> list[str | None]:
        before = self.bytes_read

        def advance(done: int, total: int) -> None:
            self.bytes_read = before + done
            if self._progress is not None:
                self._progress(self.bytes_read)

        return stream_product(self._checkpoints, weights, consumer, memory=self._memory, progress=advance)


def _targets(own: Mapping[str, Tensor], checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The flattened tensors of the model that checkpoints are loaded into, by name."""
    unexpected = [name for name in checkpoint.tensors if name not in own]
    given = {own[name].data_ptr() for name in checkpoint.tensors if name in own}
    missing = [name for name, tensor in own.items() if tensor.numel() and tensor.data_ptr() not in given]
    if missing or unexpected:
        raise CheckpointError(
            f"the checkpoints do not fit the model: {(missing or unexpected)[0]!r} is only in the "
            f"{'model' if missing else 'checkpoints'}. Give the model they were trained with."
        )
    for name, info in checkpoint.tensors.items():
        if own[name].shape != info.shape or not own[name].is_contiguous():
            raise CheckpointError(f"tensor {name!r} is {tuple(own[name].shape)} in the model, but {info} in files.")
    return {name: own[name].view(-1) for name in checkpoint.tensors}
