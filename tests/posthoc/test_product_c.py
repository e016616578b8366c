import os
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from lagless.execution import _c, _product_c as kernel


@pytest.fixture
def compiled():
    if kernel._library() is None:
        assert "CI" not in os.environ, "no C compiler"
        pytest.skip("no C compiler")


@pytest.mark.parametrize("rows", [1, 2, 5, 6, 25])
@pytest.mark.parametrize("columns", [1, 9, 40])
@pytest.mark.parametrize("count", [1, 15, 64, 257])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equals_the_product(compiled, rows, columns, count, dtype):
    generator = torch.Generator().manual_seed(rows + 100 * columns + count)
    weights = torch.randn(rows, columns, dtype=dtype, generator=generator)
    x = torch.randn(columns, count + 3, dtype=dtype, generator=generator)[:, :count]
    out = torch.full((rows, count + 5), 7.0, dtype=dtype)
    kernel.Product(weights, x, out[:, :count])()
    expected = weights.double() @ x.double()
    scale = weights.double().abs() @ x.double().abs()
    assert ((out[:, :count].double() - expected).abs() <= 2 * columns * torch.finfo(dtype).eps * scale).all()
    assert (out[:, count:] == 7.0).all()  # nothing beyond the given columns is touched


def test_an_element_does_not_depend_on_where_blocks_begin(compiled):
    weights, x, out = torch.randn(7, 9), torch.randn(9, 1000), torch.empty(7, 1000)
    kernel.Product(weights, x, out)()
    shifted = torch.empty(7, 1000)
    kernel.Product(weights, x[:, :331], shifted[:, :331])()
    kernel.Product(weights, x[:, 331:], shifted[:, 331:])()
    assert torch.equal(out, shifted)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nonfinite_values_reach_every_row(compiled, value):
    weights, x, out = torch.zeros(6, 2), torch.ones(2, 70), torch.empty(6, 70)
    x[1, 3] = x[1, 69] = value
    kernel.Product(weights, x, out)()
    assert out[:, [3, 69]].isnan().all() and out.isnan().sum() == 12


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", [0, 127, 128, 298])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_checked_rows_that_are_not_finite_are_noticed(value, where, dtype):
    weights, x, out = torch.eye(3, dtype=dtype), torch.ones(3, 299, dtype=dtype), torch.empty(3, 299, dtype=dtype)
    x[:, :9] = torch.finfo(dtype).max  # finite, though the sum of a row is not
    assert kernel.Product(weights, x, out, [0, 1, 2])()
    x[1, where] = value  # reaches every row, since 0 times it is NaN
    for checked in ([0], [1], [2, 0]):
        assert not kernel.Product(weights, x, out, checked)()
    assert kernel.Product(weights, x, out)()  # nobody asked


def test_pieces_are_filled_from_files(compiled, tmp_path):
    content = bytes(range(256))
    (tmp_path / "a").write_bytes(content)
    (tmp_path / "b").write_bytes(content[::-1])
    arrays = [np.zeros(size, dtype=np.uint8) for size in (7, 100, 5)]
    with (tmp_path / "a").open("rb") as a, (tmp_path / "b").open("rb") as b:
        files = np.array([a.fileno(), b.fileno(), a.fileno()], dtype=np.int32)
        pieces = kernel.Pieces(arrays)
        assert pieces.fill(files, np.array([0, 10, 251])) == 3
        assert [bytes(array) for array in arrays] == [content[:7], content[::-1][10:110], content[251:]]
        assert pieces.fill(files, np.array([3, 200, 0])) == 1  # b ends after 56 of 100 bytes
        assert bytes(arrays[0]) == content[3:10]
    assert pieces.fill(files, np.zeros(3, dtype=np.int64)) == 0  # closed


@pytest.mark.filterwarnings("ignore:the C compiler")
@pytest.mark.parametrize("compiler", ["lagless-has-no-such-compiler", "false"])
def test_without_a_compiler_it_is_torch_mm(monkeypatch, compiler):
    monkeypatch.setenv("CC", compiler)
    kernel._library.cache_clear()
    try:
        weights, x, out = torch.randn(6, 9), torch.randn(9, 50), torch.empty(6, 50)
        assert kernel._library() is None
        assert kernel.Product(weights, x, out, [0, 5])() and torch.equal(out, weights @ x)
        x[0, 0] = float("nan")
        assert not kernel.Product(weights, x, out, [5])()
        assert kernel.Pieces([np.zeros(1, np.uint8)]).fill(np.zeros(1, np.int32), np.zeros(1, np.int64)) == 0
    finally:
        kernel._library.cache_clear()


def test_many_threads_compile_once(monkeypatch):
    run, runs = subprocess.run, []
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: (runs.append(a), run(*a, **k))[1])
    _c._compile.cache_clear()
    kernel._library.cache_clear()
    with ThreadPoolExecutor(4) as pool:
        assert len(set(pool.map(lambda _: kernel._library() is None, range(8)))) == 1
    assert len(runs) == 1


@pytest.mark.filterwarnings("ignore:the C compiler")
@pytest.mark.parametrize("broken", ["no folder", "no compiler", "open quote"])
def test_what_keeps_the_compiler_from_working_is_no_error(broken, monkeypatch):
    if broken == "no folder":
        monkeypatch.setattr(tempfile, "gettempdir", lambda: "/lagless-has-no-such-folder")
    else:
        monkeypatch.setenv("CC", "cc '" if broken == "open quote" else "'a compiler' that is not there")
    _c._compile.cache_clear()
    assert _c.compile_source("product.c", ()) is None
    _c._compile.cache_clear()


def test_an_empty_name_of_a_compiler_is_none_given(compiled, monkeypatch):
    monkeypatch.setenv("CC", "")
    assert _c.compile_source("product.c", ()) is not None
