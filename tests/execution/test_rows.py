"""Rows of updates applied in place, and averages formed of buffers."""

import pytest
import torch

from lagless.execution import Noise, RowUpdate, apply_row, combine, in_place_order, update_rows
from lagless.rules import UpdateCoefficients

UPDATE = UpdateCoefficients(((0.5, 0.0, 0.0), (0.25, 0.5, 0.0), (0.125, 0.25, 0.5)), (0.5, 0.25, 0.125))


@pytest.mark.parametrize("index", [(0, 1, 2), (2, 1, 0), (1, 2, 0), (2, 0, 1)])
def test_rows_in_any_numbering_move_as_the_matrix_says(index):
    torch.manual_seed(0)
    buffers, live = torch.randn(3, 7, dtype=torch.float64), torch.randn(7, dtype=torch.float64)
    expected = torch.tensor(UPDATE.matrix, dtype=torch.float64) @ buffers + torch.outer(
        torch.tensor(UPDATE.live, dtype=torch.float64), live
    )
    columns = [[torch.empty(0)] for _ in range(3)]
    for position, place in enumerate(index):
        columns[place] = [buffers[position].clone()]
    for row in update_rows(UPDATE, index):
        apply_row(columns, row, [live], Noise(0, 1))
    torch.testing.assert_close(torch.stack([columns[place][0] for place in index]), expected, rtol=1e-14, atol=1e-14)


def test_order_is_from_the_last_buffer_unless_a_row_reads_a_later_one():
    plain = [RowUpdate(0, 0.5, (), 0.5), RowUpdate(1, 0.5, ((0, 0.1),), 0.4), RowUpdate(2, 0.5, (), 0.5)]
    assert [row.buffer for row in in_place_order(plain)] == [2, 1, 0]
    crossed = [RowUpdate(0, 0.5, ((2, 0.1),), 0.4), RowUpdate(1, 0.5, (), 0.5), RowUpdate(2, 0.5, (), 0.5)]
    assert [row.buffer for row in in_place_order(crossed)] == [1, 0, 2]


def test_rows_that_read_each_other_are_refused():
    with pytest.raises(ValueError, match="read each other"):
        in_place_order([RowUpdate(0, 0.5, ((1, 0.5),), 0.0), RowUpdate(1, 0.5, ((0, 0.5),), 0.0)])


def test_rows_that_do_nothing_are_left_out():
    still = UpdateCoefficients(((1.0, 0.0), (0.0, 0.5)), (0.0, 0.5))
    assert update_rows(still) == [RowUpdate(1, 0.5, (), 0.5)]


def test_combination_of_one_term_is_its_bits_and_of_several_is_wide():
    half = torch.randn(5).to(torch.bfloat16)
    alone = combine([(torch.full((5,), float("nan")), 0.0), (half, 1.0)])
    assert alone.dtype == torch.float32 and torch.equal(alone, half.float())
    single = torch.randn(3)
    copy = combine([(single, 1.0)])
    assert torch.equal(copy, single) and copy.data_ptr() != single.data_ptr()
    both = combine([(single, 0.25), (single.double(), 0.75)], dtype=torch.float64)
    torch.testing.assert_close(both, single.double(), rtol=1e-6, atol=1e-6)
