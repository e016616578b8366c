import pytest
import torch

from lagless.posthoc import kernel


@pytest.fixture
def compiled():
    if kernel._library() is None:
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
    kernel.multiply(weights, x, out[:, :count])
    expected = weights.double() @ x.double()
    scale = weights.double().abs() @ x.double().abs()
    assert ((out[:, :count].double() - expected).abs() <= 2 * columns * torch.finfo(dtype).eps * scale).all()
    assert (out[:, count:] == 7.0).all()  # nothing beyond the given columns is touched


def test_an_element_does_not_depend_on_where_blocks_begin(compiled):
    weights, x, out = torch.randn(7, 9), torch.randn(9, 1000), torch.empty(7, 1000)
    kernel.multiply(weights, x, out)
    shifted = torch.empty(7, 1000)
    kernel.multiply(weights, x[:, :331], shifted[:, :331])
    kernel.multiply(weights, x[:, 331:], shifted[:, 331:])
    assert torch.equal(out, shifted)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nonfinite_values_reach_every_row(compiled, value):
    weights, x, out = torch.zeros(6, 2), torch.ones(2, 70), torch.empty(6, 70)
    x[1, 3] = x[1, 69] = value
    kernel.multiply(weights, x, out)
    assert out[:, [3, 69]].isnan().all() and out.isnan().sum() == 12


@pytest.mark.parametrize("compiler", ["lagless-has-no-such-compiler", "false"])
def test_without_a_compiler_it_is_torch_mm(monkeypatch, compiler):
    monkeypatch.setenv("CC", compiler)
    kernel._library.cache_clear()
    try:
        weights, x, out = torch.randn(6, 9), torch.randn(9, 50), torch.empty(6, 50)
        assert kernel._library() is None
        assert torch.equal(kernel.multiply(weights, x, out), weights @ x)
    finally:
        kernel._library.cache_clear()
