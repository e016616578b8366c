"""Cutting the tensors of many parameters into blocks that stay in cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

from lagless.execution._annotated import split

# Elements. On CPUs the half dozen lists of a block, 1 MiB each, stay in cache from one operation to the next; elsewhere
# a launch costs more, and a block is what bounds temporaries: half a dozen of them are about 1 % of weights and state.
_CPU_BLOCK, _BLOCK, _SHARE = 1 << 18, 1 << 24, 1 << 7

Row = tuple[Tensor, ...]
"""The tensors of one parameter: itself, its gradient, its state, all of one shape."""


def blocks(rows: Sequence[Row]) -> Iterator[list[list[Tensor]]]:
    """Pieces of all tensors, column by column; together they are everything once.

    Args:
        rows: one per parameter, of the same length; every column has one device and dtype.
    """
    if not rows:
        return
    size = block_size(rows)
    block: list[list[Tensor]] = [[] for _ in rows[0]]
    room = size
    for row in rows:
        for piece in cut(row, size):
            if block[0] and room < piece[0].numel():
                yield block
                block, room = [list[Tensor]() for _ in row], size
            room -= piece[0].numel()
            for column, tensor in zip(block, piece, strict=True):
                column.append(tensor)
    yield block


def block_size(rows: Sequence[Row]) -> int:
    """How many elements of each column to work on at a time."""
    if rows[0][0].device.type == "cpu":
        return _CPU_BLOCK
    return max(_CPU_BLOCK, min(_BLOCK, sum(row[0].numel() for row in rows) // _SHARE))


def cut(row: Row, size: int) -> Iterator[Row]:
    """The row in order, in pieces of at most ``size`` elements."""
    flat = all(t.is_contiguous() for t in row)
    return zip(*(pieces(t, size, flat) for t in row), strict=True)


def pieces(tensor: Tensor, size: int, flat: bool) -> tuple[Tensor, ...]:
    """``tensor`` in order, in pieces of at most ``size`` elements; the same ones for all tensors of a shape.

    Args:
        tensor: any.
        size: at least 1.
        flat: whether to cut it as one line, which it must lie in.
    """
    if flat and 0 < size <= tensor.numel():
        return split(tensor.view(-1), size)
    if tensor.numel() <= size:
        return (tensor,)
    if rows := size * len(tensor) // tensor.numel():
        return split(tensor, rows)
    return tuple(piece for row in tensor for piece in pieces(row, size, flat))
