"""Steps compute in the precision of their states: under any default type, inside autocast, and with extreme numbers."""

import contextlib
import copy

import pytest
import torch
from hypothesis import given, settings, strategies as st

from lagless.optim import PACE, BiasCorrectedAdamW, BiasCorrectedShampoo, BiasCorrectedSophia, Pullback
from lagless.rules import EMA
from lagless.updates import lerp, lerp_square

OPTIMIZERS = {
    "pace": lambda ps: PACE(ps, lr=0.01),
    "pace compiled": lambda ps: PACE(ps, lr=0.01, compile=True),
    "pace capturable": lambda ps: PACE(ps, lr=0.01, average=EMA(decay=0.9), capturable=True),
    "pullback": lambda ps: Pullback(torch.optim.AdamW(ps, lr=0.01)),
    "adamw": lambda ps: BiasCorrectedAdamW(ps, lr=0.01, warm_start=1),
    "adamw compiled": lambda ps: BiasCorrectedAdamW(ps, lr=0.01, warm_start=1, compile=True, report_freq=0),
    "adamw exact": lambda ps: BiasCorrectedAdamW(ps, lr=0.01, warm_start=1, folds="exact"),
    "sophia": lambda ps: BiasCorrectedSophia(ps, lr=0.01, hessian_freq=2),
    "shampoo": lambda ps: BiasCorrectedShampoo(ps, lr=0.01, root_freq=2, inverse_correction="post_ema", exclude=()),
    "shampoo exact": lambda ps: BiasCorrectedShampoo(
        ps, lr=0.01, root_freq=2, inverse_correction="post_ema", folds="exact", exclude=()
    ),
}


@contextlib.contextmanager
def default_dtype(dtype):
    former = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(former)


def parameters():
    values = torch.linspace(-1.0, 1.0, 20, dtype=torch.float32).view(4, 5)
    return [("w", torch.nn.Parameter(values.clone())), ("b", torch.nn.Parameter(values[0].clone()))]


def train(optimizer, named, steps=5, region=contextlib.nullcontext):
    """Steps of 4 microbatches with the same gradients wherever it is called."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        optimizer.zero_grad()
        for _ in range(4):
            noise = [torch.randn(p.shape, dtype=torch.float32, generator=generator) for _, p in named]
            if getattr(optimizer, "curvature_due", False):
                optimizer.add_curvature(sum((p * q).sum() for (_, p), q in zip(named, noise, strict=True)))
            with region():
                sum((p * (p.detach() + q)).sum() for (_, p), q in zip(named, noise, strict=True)).backward()
        with region():
            optimizer.step()
    return [p.detach().clone() for _, p in named]


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_default_type_changes_nothing(name, dtype):
    named = parameters()
    expected = train(OPTIMIZERS[name](named), named)
    with default_dtype(dtype):
        named = parameters()
        optimizer = OPTIMIZERS[name](named)
        found = train(optimizer, named)
    assert all(map(torch.equal, found, expected))
    own = {"step"} if name == "pullback" else set()  # the count of torch's AdamW, which is of the default type
    for state in optimizer.state.values():
        tensors = {key: value for key, value in state.items() if isinstance(value, torch.Tensor) and key not in own}
        assert not [key for key, value in tensors.items() if value.dtype == dtype]


@pytest.mark.parametrize("name", ["pace", "pace capturable", "adamw", "sophia", "shampoo"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_counters_of_a_saved_state_go_on_counting(name, dtype):
    named = parameters()
    optimizer = OPTIMIZERS[name](named)
    train(optimizer, named, steps=1)
    state = copy.deepcopy(optimizer.state_dict())
    for values in state["state"].values():
        values["step"] = torch.tensor(2048.0, dtype=dtype)
    optimizer.load_state_dict(state)
    train(optimizer, named, steps=3)
    assert [float(values["step"]) for values in optimizer.state.values()] == [2051.0] * 2


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_changes_nothing(name, dtype):
    named = parameters()
    expected = train(OPTIMIZERS[name](named), named)
    named = parameters()
    found = train(OPTIMIZERS[name](named), named, region=lambda: torch.autocast("cpu", dtype))
    assert all(map(torch.equal, found, expected))


def test_a_closure_keeps_the_autocast_around_it():
    named = parameters()
    optimizer, seen = PACE(named, lr=0.1), []

    def closure():
        seen.append(torch.is_autocast_enabled("cpu"))
        return 0.0

    with torch.autocast("cpu", torch.bfloat16):
        optimizer.step(closure)
        assert torch.is_autocast_enabled("cpu")
    assert seen == [True]


PATHS = {"eager": {}, "compiled": {"compile": True}, "capturable": {"capturable": True}}


def pace_steps(gradients, path, **options):
    parameter = torch.nn.Parameter(torch.full((8,), 0.5, dtype=torch.float32))
    optimizer = PACE([parameter], lr=0.1, average=EMA(decay=0.9, update_after=2), **PATHS[path], **options)
    for gradient in gradients:
        parameter.grad = torch.full((8,), gradient, dtype=torch.float32)
        optimizer.step()
    return parameter.detach(), optimizer.state[parameter]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("extreme", [1e19, 1e20, 1e25, -1e30])
def test_one_huge_gradient_leaves_no_nan(path, extreme):
    weights, state = pace_steps([1.0, extreme, 1.0, -1.0, 1.0], path)
    assert weights.isfinite().all()
    assert not state["exp_avg_sq"].isnan().any()
    assert state["average"].isfinite().all()


@pytest.mark.parametrize("path", PATHS)
def test_without_a_memory_the_second_moment_is_the_last_square(path):
    _, state = pace_steps([1e8, 1e-3], path, betas=(0.0, 0.0))
    torch.testing.assert_close(state["exp_avg_sq"], torch.full((8,), 1e-6, dtype=torch.float32), rtol=1e-5, atol=0.0)
    torch.testing.assert_close(state["exp_avg"], torch.full((8,), 1e-3, dtype=torch.float32), rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("path", PATHS)
def test_burn_in_copies_bit_for_bit(path):
    weights, state = pace_steps([1.0, -3.3e7], path)
    assert torch.equal(state["average"].view(torch.int32), weights.view(torch.int32))


finite = st.floats(width=32, allow_nan=False, allow_infinity=False)


@settings(max_examples=300, deadline=None)
@given(finite, finite, st.floats(0.0, 1.0, width=32))
def test_a_moving_average_lies_between_its_ends(start, end, gain):
    ends = torch.tensor([start, end], dtype=torch.float32)
    for g in (gain, torch.tensor(gain, dtype=torch.float32)):
        assert torch.equal(lerp(ends[0], ends[1], 0.0 * g), ends[0])
        assert torch.equal(lerp(ends[0], ends[1], 0.0 * g + 1.0), ends[1])
        if (ends[1] - ends[0]).isfinite():
            moved = lerp(ends[0], ends[1], g)
            slack = 1e-6 * ends.abs().max() + 1e-44
            assert ends.min() - slack <= moved <= ends.max() + slack
    square = lerp_square(ends[0].abs(), ends[1], gain)
    assert not square.isnan()


@settings(max_examples=200, deadline=None)
@given(st.floats(0.0, 2.0**10, width=32), st.floats(-(2.0**10), 2.0**10, width=32), st.floats(0.0, 0.4375, width=32))
def test_ordinary_values_have_the_bits_of_the_plain_formula(start, root, gain):
    v, g = torch.tensor([start, root], dtype=torch.float32)
    assert torch.equal(lerp_square(v, g, gain), v + gain * (g * g - v))
