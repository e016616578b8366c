"""PACE's state: evaluating, saving, resuming, dtypes."""

import copy
import io

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from lagless import BEMA, EMA, UniformAverage
from lagless.optim import PACE, Pullback


def tied_model(dtype=torch.float32):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 4), nn.Linear(4, 7, bias=False))
    model[2].weight = model[0].weight
    model[1].bias.requires_grad_(False)
    return model.to(dtype)


def train(model, optimizer, steps, first=0):
    for step in range(first, first + steps):
        generator = torch.Generator().manual_seed(step)
        batch = torch.randint(0, 7, (8,), generator=generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(batch).float(), batch.roll(1)).backward()
        optimizer.step()


def bits(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def through_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


MAKE = {
    "PACE": lambda params: PACE(params, lr=0.02),
    "PACE, BEMA": lambda params: PACE(params, lr=0.02, average=BEMA.paper(update_freq=2)),
    "Pullback": lambda params: Pullback(torch.optim.AdamW(params, lr=0.02)),
}


@pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("order", ["model first", "optimizer first"])
def test_a_checkpoint_written_while_evaluating_resumes_exactly(make, dtype, order):
    whole = tied_model(dtype)
    optimizer = make(whole.parameters())
    train(whole, optimizer, 5)
    live = bits(whole)
    optimizer.eval()
    assert not torch.equal(whole[0].weight, live["0.weight"])
    saved_model, saved = bits(whole), through_file(optimizer.state_dict())
    train(whole, optimizer.train(), 4, first=5)

    resumed = tied_model(dtype)
    other = make(resumed.parameters())
    if order == "model first":
        resumed.load_state_dict(saved_model)
        other.load_state_dict(saved)
    else:
        other.load_state_dict(saved)
        resumed.load_state_dict(saved_model)
    with pytest.raises(RuntimeError, match="cannot take a step while the parameters hold the average: call train()"):
        other.step()
    assert same(bits(resumed), saved_model)
    other.train()
    assert same(bits(resumed), live)
    train(resumed, other, 4, first=5)
    assert same(bits(resumed), bits(whole))
    assert same(other.read(resumed), optimizer.read(whole))


@pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)
def test_state_under_bfloat16_weights_stays_float32(make):
    model = tied_model(torch.bfloat16)
    optimizer = make(model.parameters())
    train(model, optimizer, 3)
    dtypes = [{k: getattr(v, "dtype", None) for k, v in s.items()} for s in optimizer.state.values()]
    averages = [v for s in optimizer.state.values() for k, v in s.items() if k in ("average", "average_1")]
    assert averages and all(v.dtype == torch.float32 for v in averages)
    assert any(not torch.equal(v, v.bfloat16().float()) for v in averages)
    # θ_0 is an iterate: the weights' own dtype loses nothing.
    assert all(s["average_0"].dtype == torch.bfloat16 for s in optimizer.state.values() if "average_0" in s)
    other = make(model.parameters())
    other.load_state_dict(through_file(optimizer.state_dict()))
    assert [{k: getattr(v, "dtype", None) for k, v in s.items()} for s in other.state.values()] == dtypes


def test_a_load_hook_still_decides_what_is_loaded():
    model = tied_model(torch.bfloat16)
    optimizer = PACE(model.parameters())
    train(model, optimizer, 2)
    state = optimizer.state_dict()
    other = PACE(model.parameters())

    def halve(_, state):
        state = copy.deepcopy(state)
        for values in state["state"].values():
            values["average"] *= 0.5
        return state

    other.register_load_state_dict_pre_hook(halve)
    other.load_state_dict(state)
    for p in optimizer.state:
        assert torch.equal(other.state[p]["average"], 0.5 * optimizer.state[p]["average"])


@pytest.mark.parametrize("weights", ["kept", "loaded"])
@pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)
def test_a_training_state_loaded_while_evaluating_loses_no_weights(make, weights):
    model = tied_model()
    optimizer = make(model.parameters())
    train(model, optimizer, 3)
    state, live = copy.deepcopy(optimizer.state_dict()), bits(model)
    optimizer.eval()
    if weights == "loaded":  # they stay, in whatever order model and optimizer are loaded
        live = {name: 2.0 * tensor for name, tensor in live.items()}
        model.load_state_dict(live)
    optimizer.load_state_dict(state)
    assert same(bits(model), live)
    optimizer.train()
    assert same(bits(model), live)
    train(model, optimizer, 1)


@pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)
def test_a_refused_load_while_evaluating_changes_nothing(make):
    model = tied_model()
    optimizer = make(model.parameters())
    train(model, optimizer, 3)
    live = bits(model)
    averaged = bits(optimizer.eval() and model)
    with pytest.raises(ValueError, match="not the state"):
        optimizer.load_state_dict(torch.optim.AdamW(model.parameters()).state_dict())
    assert same(bits(model), averaged)
    optimizer.train()
    assert same(bits(model), live)


@pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)
@pytest.mark.parametrize("dtypes", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)], ids=str)
def test_a_state_saved_while_evaluating_leaves_the_parameters_their_dtype(make, dtypes):
    model, other = (tied_model(dtype) for dtype in dtypes)
    optimizer = make(model.parameters())
    train(model, optimizer, 3)
    live = bits(model)
    loaded = make(other.parameters())
    loaded.load_state_dict(through_file(optimizer.eval().state_dict()))
    loaded.train()
    expected = {name: tensor.to(dtypes[1]) for name, tensor in live.items()}
    assert same(
        {k: v for k, v in bits(other).items() if k != "1.bias"}, {k: expected[k] for k in expected if k != "1.bias"}
    )
    assert all(p.dtype == dtypes[1] for p in other.parameters())


@pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)
def test_a_state_is_not_changed_by_what_follows(make):
    model = tied_model()
    optimizer = make(model.parameters())
    train(model, optimizer, 3)
    before, during = optimizer.state_dict(), optimizer.eval().state_dict()
    optimizer.train()
    assert not any("live" in values for values in before["state"].values())
    assert any("live" in values for values in during["state"].values())
    make(tied_model().parameters()).load_state_dict(during)


def test_settings_that_a_state_lacks_stay_as_they_are_here():
    model = tied_model()
    optimizer = PACE(model.parameters())
    train(model, optimizer, 1)
    others = {"gate_pullback": True, "average_dtype": torch.bfloat16, "compile": True, "clamp": False}
    for name in others:
        state = copy.deepcopy(optimizer.state_dict())
        del state["param_groups"][0][name]
        other = PACE(model.parameters(), **others)
        other.load_state_dict(state)
        assert other.param_groups[0][name] == others[name]
        assert other.param_groups[0]["maximize"] is False
        train(model, other, 1)
    for name in PACE._lasting:
        state = copy.deepcopy(optimizer.state_dict())
        del state["param_groups"][0][name]
        with pytest.raises(ValueError, match=f"'{name}'"):
            optimizer.load_state_dict(state)


def test_a_load_hook_may_make_the_state_of_another_optimizer_fit():
    model = tied_model()
    adamw, optimizer = torch.optim.AdamW(model.parameters()), PACE(model.parameters())
    train(model, adamw, 2)

    def convert(own, state):
        groups = [
            {**{k: v for k, v in mine.items() if k != "params"}, "params": theirs["params"]}
            for mine, theirs in zip(own.param_groups, state["param_groups"], strict=True)
        ]
        parameters = dict(enumerate(model.parameters()))
        values = {i: {**v, "average": parameters[i].detach().clone()} for i, v in state["state"].items()}
        return {"state": values, "param_groups": groups}

    optimizer.register_load_state_dict_pre_hook(convert)
    optimizer.load_state_dict(adamw.state_dict())
    for p, values in adamw.state.items():
        assert torch.equal(optimizer.state[p]["exp_avg"], values["exp_avg"]) and optimizer.state[p]["step"] == 2
    train(model, optimizer, 1)


def test_a_module_of_other_parameters_is_not_read():
    model = tied_model()
    optimizer = PACE(model.parameters())
    train(model, optimizer, 1)
    with pytest.raises(ValueError, match="no parameter of this Sequential is in this PACE"):
        optimizer.read(copy.deepcopy(model))
    assert optimizer.read(nn.Sequential(model[1], nn.Linear(2, 2))).keys() == {"0.weight"}


def test_reading_goes_by_names_and_leaves_frozen_parameters_out():
    model = tied_model()
    optimizer = PACE(model.named_parameters(), lr=0.02)
    train(model, optimizer, 3)
    by_name, by_module = optimizer.read(), optimizer.read(model)
    assert by_name.keys() == {"0.weight", "1.weight"}
    assert by_module.keys() == {"0.weight", "1.weight", "2.weight"}
    assert by_module["0.weight"] is by_module["2.weight"]
    assert torch.equal(by_module["1.weight"], optimizer.state[model[1].weight]["average"])
    assert optimizer.read(dtype=torch.bfloat16)["1.weight"].dtype == torch.bfloat16
    model.load_state_dict({**model.state_dict(), **by_module})
    other = tied_model()
    numbered = PACE(other.parameters(), lr=0.02)
    train(other, numbered, 1)
    assert numbered.read().keys() == {"0", "1"} == {str(i) for i in numbered.state_dict()["state"]}


def test_what_is_read_is_what_is_applied():
    model = tied_model(torch.bfloat16)
    optimizer = PACE(model.parameters(), lr=0.02, average=BEMA.paper(update_freq=1))
    train(model, optimizer, 4)
    read = optimizer.read(model)
    with optimizer.applied():
        assert same({k: v.to(torch.bfloat16) for k, v in read.items()}, {k: model.state_dict()[k] for k in read})
        assert same(optimizer.read(model), read)
        with pytest.raises(RuntimeError, match="cannot apply the average while"), optimizer.applied():
            pass


def test_applied_undoes_what_the_block_does():
    model = tied_model()
    optimizer = PACE(model.parameters(), lr=0.02)
    train(model, optimizer, 2)
    live = bits(model)
    with pytest.raises(ZeroDivisionError), optimizer.applied():
        model[0].bfloat16()
        model[1].weight.data.zero_()
        raise ZeroDivisionError
    assert same(bits(model), live)


def test_before_the_first_update_there_is_no_average():
    model = tied_model()
    optimizer = PACE(model.parameters(), lr=0.02, average=UniformAverage(update_freq=5))
    train(model, optimizer, 4)
    live = bits(model)
    for use in (optimizer.read, lambda: optimizer.applied().__enter__()):
        with pytest.raises(RuntimeError, match="no average yet: UniformAverage.* has had no update"):
            use()
    # A trainer evaluates when it is told to: then the live weights are all there is.
    assert same(bits(model), live) and optimizer.eval() is optimizer and same(bits(model), live)
    saved = through_file(optimizer.state_dict())
    with pytest.raises(RuntimeError, match="cannot take a step"):
        optimizer.step()
    train(model, optimizer.train(), 1, first=4)
    assert optimizer.read(model).keys() == {"0.weight", "1.weight", "2.weight"}
    PACE(tied_model().parameters()).load_state_dict(saved)


def test_an_error_on_the_way_restores_what_was_swapped():
    model = tied_model()
    optimizer = PACE(model.parameters(), lr=0.02)
    train(model, optimizer, 2)
    live = bits(model)
    optimizer.state[model[1].weight]["average"] = torch.zeros(3, 5)
    with pytest.raises(RuntimeError, match="size"):
        optimizer.eval()
    assert same(bits(model), live)
    assert not any("live" in state for state in optimizer.state.values())


def test_train_takes_a_mode():
    model = tied_model()
    optimizer = PACE(model.parameters(), lr=0.02)
    train(model, optimizer, 2)
    live = bits(model)
    assert optimizer.train(False) is optimizer and not same(bits(model), live)
    assert optimizer.train(True) is optimizer and same(bits(model), live)


def test_a_loaded_rule_replaces_the_own_one():
    model = tied_model()
    optimizer = PACE(model.parameters(), lr=0.02, average=BEMA.paper(update_freq=2), pullback=0.7)
    train(model, optimizer, 3)
    state = optimizer.state_dict()
    assert state["param_groups"][0]["average"]["rule"] == "BEMA"
    other = PACE(model.parameters())
    other.load_state_dict(state)
    assert other.param_groups[0]["average"] == BEMA.paper(update_freq=2) and other.param_groups[0]["pullback"] == 0.7
    assert same(other.read(model), optimizer.read(model))


def test_foreign_and_incomplete_states_are_refused():
    model = tied_model()
    adamw = torch.optim.AdamW(model.parameters())
    train(model, adamw, 1)
    with pytest.raises(ValueError, match="not the state of a PACE: its groups have no 'average'"):
        PACE(model.parameters()).load_state_dict(adamw.state_dict())
    optimizer = PACE(model.parameters())
    train(model, optimizer, 1)
    state = copy.deepcopy(optimizer.state_dict())
    del state["state"][0]["average"]
    with pytest.raises(ValueError, match="parameter 0 lacks average"):
        PACE(model.parameters()).load_state_dict(state)
    state = copy.deepcopy(optimizer.eval().state_dict())
    del state["state"][1]["live"]
    with pytest.raises(ValueError, match="parameter 1 lacks live, .*Call train"):
        PACE(model.parameters()).load_state_dict(state)


@pytest.mark.parametrize("flatten", [False, True])
@pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)
def test_state_by_parameter_names(make, flatten):
    model = tied_model()
    optimizer = make([p for p in model.parameters() if p.requires_grad])
    train(model, optimizer, 3)
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    state = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=options))
    twin = copy.deepcopy(model)
    resumed = make([p for p in twin.parameters() if p.requires_grad])
    set_optimizer_state_dict(twin, resumed, state, options=options)
    train(model, optimizer, 3, first=3)
    train(twin, resumed, 3, first=3)
    assert same(bits(model), bits(twin))
    assert same(optimizer.read(model), resumed.read(twin))


def test_a_bfloat16_average_does_not_stall():
    # An EMA with a memory of 1000 steps towards weights that jumped: what is left of the way is (1 - 1e-3)^n.
    torch.manual_seed(0)
    weight = nn.Parameter(torch.ones(4096))
    optimizer = PACE([weight], lr=0.0, pullback=0.0, average=EMA(decay=0.999), average_dtype=torch.bfloat16)
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    weight.data.fill_(1.5)
    for _ in range(1000):
        optimizer.step()
    average = optimizer.state[weight]["average"]
    left = (1.5 - average.double()) / 0.5
    assert average.dtype == torch.bfloat16
    # Rounding is unbiased; one rounding has a standard deviation of at most half of 2^-7, and they decay like the way.
    deviation = 2**-8 / 0.5 * (1 / (1 - 0.999**2)) ** 0.5 / 4096**0.5
    assert abs(left.mean().item() - 0.999**1000) < 4 * deviation
