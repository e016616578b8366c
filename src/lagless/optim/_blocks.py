"""Cutting the tensors of many parameters into blocks that stay in cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

# Elements. On CPUs the half dozen lists of a block, 1 MiB each, stay in cache from one operation to the next; elsewhere
# a launch costs more, and a block is what bounds temporaries.
_CPU_BLOCK, _BLOCK = 1 << 18, 1 << 24

Row = tuple[Tensor, ...]
"""The tensors of one parameter: itself, its gradient, its state, all of one shape."""


def blocks(rows: Sequence[Row]) -> Iterator[list[list[Tensor]]]:
    """Pieces of all tensors, column by column; together they are everything once.

    Args:
        rows: one per parameter, of the same length; every column has one device and dtype.
    """
    if not rows:
        return
    size = _CPU_BLOCK if rows[0][0].device.type == "cpu" else _BLOCK
    block: list[list[Tensor]] = [[] for _ in rows[0]]
    room = size
    for row in rows:
        for piece in _pieces(row, size):
            if block[0] and room < piece[0].numel():
                yield block
                block, room = [[] for _ in row], size
            room -= piece[0].numel()
            for column, tensor in zip(block, piece, strict=True):
                column.append(tensor)
    yield block


def local(tensor: Tensor) -> Tensor:
    """The part of a DTensor on this rank; any other tensor itself. What acts on each element alone needs no more."""
    if tensor.requires_grad:
        tensor = tensor.detach()
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor  # type: ignore[operator]


def _pieces(row: Row, size: int) -> Iterator[Row]:
    """The row in pieces of at most ``size`` elements; as it is where it is small or does not lie in one line."""
    if row[0].numel() <= size or not all(t.is_contiguous() for t in row):
        yield row
    else:
        yield from zip(*(t.view(-1).split(size) for t in row), strict=True)
