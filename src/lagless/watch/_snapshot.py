"""The averages as of one absorbed checkpoint, read block by block."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from lagless.checkpoints import TensorInfo, is_averaged
from lagless.execution import BLOCK, RuleSet, read_block
from lagless.rules import FloatArray, trajectory_weights
from lagless.watch._record import Generation, Record
from lagless.watch._store import BufferFile

LIVE = "live"


class Snapshot:
    """Averages that can be read; see :meth:`lagless.watch._averages.Averages.snapshot`.

    Args:
        record: the state.
        generation: which of its generations.
        files: of every buffer, of the live weights, and of what is copied.

    Attributes:
        step: of the checkpoint as of which the averages are.
        record: the state.
    """

    def __init__(self, record: Record, generation: Generation, files: Sequence[BufferFile | None]) -> None:
        assert record.tensors is not None
        self.record, self._files = record, files
        self._history = record.history[: generation.count]
        self.step = self._history[-1].step
        self.tensors: dict[str, TensorInfo] = dict(record.tensors)
        self._rules = RuleSet(record.rules, self._history[0].step, every_step=False)
        self._rules.last = dict(generation.last)

    @property
    def steps(self) -> list[int]:
        """Of the checkpoints in the averages, θ_0's first."""
        return [absorbed.step for absorbed in self._history]

    @property
    def has_live(self) -> bool:
        """Whether the checkpoint's own weights are kept."""
        return self._files[len(self._rules.keys)] is not None

    def readable(self) -> list[str]:
        """The rules that have an average by now."""
        return [name for name in self.record.rules if self._why_not(name) is None]

    def weights(self, name: str) -> FloatArray:
        """The weight that a rule's average puts on each checkpoint."""
        return trajectory_weights(self.record.rules[name], self.steps)

    def blocks(self, name: str) -> Iterator[tuple[str, int, Tensor]]:
        """Yield the average of a rule, or with ``"live"`` the checkpoint, in blocks: tensor, first element, values.

        Raises:
            RuntimeError: if there is no average by that rule yet.
        """
        read = self._reader(name)
        for tensor, info in self.tensors.items():
            for start in range(0, info.numel, BLOCK):
                count = min(BLOCK, info.numel - start)
                if is_averaged(tensor, info.dtype):
                    yield tensor, start, read(tensor, start, count)
                else:
                    yield tensor, start, self._block(-1, tensor, start, count)

    def state(self, name: str) -> Iterator[tuple[str, Tensor]]:
        """Yield the tensors of an average one by one, in float32 or wider; those that are copied in their own type."""
        held: Tensor | None = None
        last = ""
        for tensor, start, block in self.blocks(name):
            if tensor != last:
                if held is not None:
                    yield last, held.view(self.tensors[last].shape)
                held, last = torch.empty(self.tensors[tensor].numel, dtype=block.dtype, device="cpu"), tensor
            assert held is not None
            held[start : start + len(block)] = block
        if held is not None:
            yield last, held.view(self.tensors[last].shape)

    def _reader(self, name: str) -> Callable[[str, int, int], Tensor]:
        live = len(self._rules.keys)
        if name == LIVE:
            return lambda tensor, start, count: self._block(live, tensor, start, count)
        terms, d = self._rules.coefficients(name, self.step)
        numbered = [*terms, *([(live, d)] if d != 0.0 else [])]
        return lambda tensor, start, count: read_block(
            [(self._block(i, tensor, start, count), weight) for i, weight in numbered]
        )

    def _block(self, number: int, tensor: str, start: int, count: int) -> Tensor:
        file = self._files[number]
        if file is None:
            raise RuntimeError("the checkpoint's own weights are not kept.")
        return file.read(tensor, start, count)

    def _why_not(self, name: str) -> str | None:
        try:
            self._rules.coefficients(name, self.step)
        except RuntimeError as error:
            return str(error)
        return None
