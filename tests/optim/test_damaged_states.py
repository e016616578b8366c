"""States that do not fit are refused before anything changes, and C is given only tensors that belong together."""

import copy

import pytest
import torch

from lagless.execution._c import TensorTable
from lagless.execution._product_c import Product
from lagless.optim import PACE, BiasCorrectedAdamW, BiasCorrectedShampoo, Pullback

SHAPE = (6, 4)
MAKERS = {
    "pace": lambda p: PACE([p], lr=0.1),
    "pace_compiled": lambda p: PACE([p], lr=0.1, compile=True),
    "pullback": lambda p: Pullback(torch.optim.SGD([p], lr=0.1), pullback=0.1),
    "adamw": lambda p: BiasCorrectedAdamW([("w", p)], lr=0.1),
    "adamw_compiled": lambda p: BiasCorrectedAdamW([("w", p)], lr=0.1, compile=True),
    "shampoo": lambda p: BiasCorrectedShampoo([("w", p)], lr=0.1),
}


def take_step(parameter, optimizer):
    optimizer.zero_grad()
    for weight in (0.5, 0.6):
        (parameter.square().sum() * weight).backward()
    optimizer.step()


def stepped(name, shape=SHAPE):
    torch.manual_seed(0)
    parameter = torch.nn.Parameter(torch.randn(shape))
    optimizer = MAKERS[name](parameter)
    take_step(parameter, optimizer)
    return parameter, optimizer


SHAPES = {
    "shrunk": lambda t: t[:-1].clone(),
    "grown": lambda t: torch.cat([t, t]),
    "scalar": lambda t: t.sum(),
    "one row": lambda t: t[:1].clone(),
    "flat": lambda t: t.flatten(),
    "integer": lambda t: t.long(),
    "bool": lambda t: t > 0,
    "complex": lambda t: t.to(torch.complex64),
    "list": lambda t: t.tolist(),
    "None": lambda _: None,
}
COUNTERS = {
    "negative": lambda t: t - 5,
    "fraction": lambda t: t + 0.5,
    "nan": lambda t: t * float("nan"),
    "huge": lambda t: t + 1e30,
    "text": lambda _: "3",
    "two": lambda t: torch.stack([t, t]),
}


@pytest.mark.parametrize("name", MAKERS)
def test_a_damaged_entry_is_refused_and_nothing_changes(name):
    _, optimizer = stepped(name)
    good, before = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(optimizer.state_dict())
    assert any(torch.is_tensor(v) and v.dim() for v in good["state"][0].values())
    for key, value in good["state"][0].items():
        counter = not torch.is_tensor(value) or not value.dim()
        for kind, damage in (COUNTERS if counter else SHAPES).items():
            damaged = copy.deepcopy(good)
            damaged["state"][0][key] = damage(torch.as_tensor(value, dtype=torch.float32))
            with pytest.raises(ValueError, match=f"parameter 0: '{key}'.*must be"):
                optimizer.load_state_dict(damaged)
                pytest.fail(f"{kind} {key} accepted")
            assert optimizer.state_dict()["param_groups"] == before["param_groups"]
            torch.testing.assert_close(optimizer.state_dict()["state"], before["state"], rtol=0, atol=0)


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("other", [(5, 4), (7, 4), (4, 6), (24,), (1, 4)])
def test_a_state_of_another_shape_is_refused(name, other):
    _, optimizer = stepped(name)
    _, new = stepped(name, other)
    with pytest.raises(ValueError, match="must be of shape"):
        new.load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize("name", [n for n in MAKERS if n != "pullback"])
def test_right_shapes_in_transposed_memory_step_as_before(name):
    one, optimizer = stepped(name)
    state = copy.deepcopy(optimizer.state_dict())
    moments = state["state"][0]
    moments.update({k: v.mT.contiguous().mT for k, v in moments.items() if torch.is_tensor(v) and v.dim() == 2})
    two, new = stepped(name)
    new.load_state_dict(state)
    for parameter, its in ((one, optimizer), (two, new)):
        take_step(parameter, its)
    torch.testing.assert_close(two, one)


def test_no_row_reaches_c_unchecked():
    row = [torch.zeros(6, 4) for _ in range(5)]
    wrong = [torch.zeros(4, 6), torch.zeros(5, 4), torch.zeros(6, 4).double(), torch.zeros(4, 6).mT, torch.zeros(24)]
    for i in range(5):
        for tensor in wrong:
            bad = [*row[:i], tensor, *row[i + 1 :]]
            with pytest.raises(ValueError, match="row 1 of 2 for C holds"):
                TensorTable([row, bad], 5)
    with pytest.raises(ValueError, match="row 0 of 1"):
        TensorTable([row[:4]], 5)
    assert TensorTable([row], 5).threads == 1


def test_no_product_reaches_c_unchecked():
    weights, x, out = torch.ones(2, 3), torch.ones(3, 7), torch.ones(2, 7)
    assert Product(weights, x, out, (1,))()
    assert torch.equal(out, torch.full((2, 7), 3.0))
    for bad in (
        (weights, x[:2], out),
        (weights, x, out[:1]),
        (weights, x, torch.ones(2, 6)),
        (weights, x.double(), out),
        (weights, torch.ones(7, 3).mT, out),
        (weights, x, out, (2,)),
        (weights, x, out, (-1,)),
    ):
        with pytest.raises(ValueError, match="weights, x and out are"):
            Product(*bad)


@pytest.mark.parametrize("name", MAKERS)
def test_states_carry_the_number_of_their_format(name):
    parameter, optimizer = stepped(name)
    state = copy.deepcopy(optimizer.state_dict())
    assert state.pop("format") == 1
    optimizer.load_state_dict(state)  # of a version that did not number them
    take_step(parameter, optimizer)
    for unknown in (2, "1", None, True, 1.5):
        with pytest.raises(ValueError, match=f"format {unknown!r}; this lagless reads 1. Update lagless."):
            optimizer.load_state_dict({**state, "format": unknown})
