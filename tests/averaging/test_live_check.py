"""A state beside other live weights than its own is refused at the first use, not before."""

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn

from lagless import BEMA, EMA, Averager
from lagless.optim import PACE

RULES = {"bema": BEMA(update_freq=2), "ema": EMA(decay=0.5)}
PROBLEM = (
    r"of 2 live tensors, such as \w+, are not those with which these averages were saved.*of another .*check_live=False"
)


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Linear(3, 2)


def train(model, averager, steps, optimizer=None):
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.ones(1, 3)).square().sum().backward()
        optimizer.step()
        averager.update()


def buffers(averager):
    return averager.state_dict()["meta"]["buffers"]


def older_meta(averager):
    plain = {rule: [e for e in entries if not e.startswith("live/")] for rule, entries in buffers(averager).items()}
    return {"format": 1, "buffers": plain}


def digests(averager):
    return {entry for entries in buffers(averager).values() for entry in entries if entry.startswith("live/")}


def saved(tmp_path):
    model = net()
    averager = Averager(model, RULES)
    train(model, averager, 3)
    averager.save(tmp_path / "averages.safetensors")
    return model, averager


def uses(model, averager):
    return [
        lambda: averager.read("ema"),
        lambda: averager.applied("bema").__enter__(),
        lambda: averager.copy_to_model("ema"),
        averager.update,
        lambda: train(model, averager, 1),
    ]


@pytest.mark.parametrize("use", range(5))
@pytest.mark.parametrize("element", [0, 5])
def test_one_other_element_is_enough_and_nothing_moves(tmp_path, use, element):
    first, _ = saved(tmp_path)
    model = net()
    model.load_state_dict(first.state_dict())
    with torch.no_grad():
        model.weight.view(-1)[element].mul_(1 + 1e-6)
    averager = Averager(model, RULES)
    averager.load(tmp_path / "averages.safetensors")
    before = [p.detach().clone() for p in model.parameters()]
    for _ in range(2):
        with pytest.raises(RuntimeError, match="1 " + PROBLEM):
            uses(model, averager)[use]()
    assert averager.step == 3
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    model.load_state_dict(first.state_dict())  # the remedy
    uses(model, averager)[use]()


@pytest.mark.parametrize("weights_first", [True, False])
def test_weights_may_come_after_the_averages(tmp_path, weights_first):
    first, own = saved(tmp_path)
    model = net(1)
    if weights_first:
        model.load_state_dict(first.state_dict())
    averager = Averager(model, RULES)
    averager.load(tmp_path / "averages.safetensors")
    model.load_state_dict(first.state_dict())
    for m, a in ((first, own), (model, averager)):
        train(m, a, 3)
    for name in RULES:
        assert all(torch.equal(t, averager.read(name)[key]) for key, t in own.read(name).items())


def test_who_means_it_says_so(tmp_path):
    saved(tmp_path)
    model = net(1)
    averager = Averager(model, RULES)
    averager.load(tmp_path / "averages.safetensors", check_live=False)
    train(model, averager, 1)
    assert averager.step == 4 and averager.read("ema")


def test_states_without_digests_load_as_before(tmp_path):
    _, own = saved(tmp_path)
    state = own.state_dict()
    state["meta"] |= older_meta(own)
    averager = Averager(net(1), RULES)
    averager.load_state_dict(state)
    averager.update()


def test_a_state_that_is_saved_again_before_its_weights_came_keeps_its_digests(tmp_path):
    _, own = saved(tmp_path)
    averager = Averager(net(1), RULES)
    averager.load_state_dict(own.state_dict())
    assert digests(averager) == digests(own) != digests(Averager(net(1), RULES))


def test_the_weights_are_those_that_train(tmp_path):
    model = net()
    optimizer = PACE(model.parameters(), lr=0.1)
    averager = Averager(model, RULES)
    train(model, averager, 3, optimizer)
    live = digests(averager)
    optimizer.eval()
    assert digests(averager) == live


def test_a_state_that_is_saved_while_an_average_is_in_the_model_knows_no_live_weights(tmp_path):
    first, own = saved(tmp_path)
    with own.applied("ema"):
        own.save(tmp_path / "inside.safetensors")
    averager = Averager(first, RULES)
    averager.load(tmp_path / "inside.safetensors")
    averager.update()
    assert len(digests(own)) == 2


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
@pytest.mark.parametrize("older", [False, True])
def test_files_of_torch_distributed_checkpoint(tmp_path, older):
    """Those without digests load too: that module refuses files that lack a key of the present state."""
    first, own = saved(tmp_path)
    state = own.state_dict()
    if older:
        state["meta"] |= older_meta(own)
    dcp.save({"averages": state}, checkpoint_id=tmp_path / "dcp")
    averager = Averager(net(1), RULES)
    state = averager.state_dict()
    dcp.load({"averages": state}, checkpoint_id=tmp_path / "dcp")
    averager.load_state_dict(state)
    if not older:
        with pytest.raises(RuntimeError, match="2 " + PROBLEM):
            averager.read("ema")
    averager._live.put(list(first.parameters()))
    assert all(torch.equal(t, averager.read("bema")[key]) for key, t in own.read("bema").items())
