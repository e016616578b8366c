"""What is averaged is what is trained, now: models and optimizers that change are noticed at the next due update."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from lagless import EMA, Averager
from lagless.integrations.transformers import _lora

RULE = EMA(decay=0.5)


class Half(nn.Module):
    def forward(self, x):
        return x / 2


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.body, self.head = nn.Embedding(5, 4), nn.Linear(4, 4), nn.Linear(4, 5, bias=False)
        self.frozen = nn.Linear(2, 2).requires_grad_(False)
        self.blocks = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))


def replace(m):
    m.head = nn.Linear(4, 5, bias=False)


def replace_inside(m):
    m.blocks[0] = nn.Linear(4, 4)


def replace_all(m):
    m.blocks = copy.deepcopy(m.blocks)


def remove(m):
    del m.body


def take_out(m):
    m.body = None


def drop_bias(m):
    m.body.bias = None


def add_module(m):
    m.extra = nn.Linear(2, 2)


def add_parameter(m):
    m.body.scale = nn.Parameter(torch.ones(1))


def append(m):
    m.blocks.append(nn.Linear(4, 4))


def adapt(m):
    peft = pytest.importorskip("peft")
    peft.get_peft_model(m, peft.LoraConfig(r=2, target_modules=["body"]))


def tie(m):
    m.head.weight = m.embed.weight


def tie_memory(m):
    m.head.weight.data = m.embed.weight.data


def unfreeze(m):
    m.frozen.requires_grad_(True)


def parametrized(m):
    parametrize.register_parametrization(m.body, "weight", Half())


def weight_norm(m):
    parametrizations.weight_norm(m.body)


def pruned(m):
    prune.random_unstructured(m.body, "weight", 0.5)


CHANGES = {
    replace: "head.weight is no longer in the model where it was",
    replace_inside: "blocks.0.weight is no longer in the model where it was",
    replace_all: "blocks.0.weight is no longer in the model where it was",
    remove: "body.weight is no longer in the model",
    take_out: "body.weight is no longer in the model",
    drop_bias: "bias is no longer a parameter|body.bias is no longer in the model",
    add_module: "extra.weight trains and was not in the model",
    add_parameter: "body.scale trains and was not in the model",
    append: "blocks.2.weight trains and was not in the model",
    adapt: "body.weight is no longer in the model",
    tie: "head.weight was tied to embed.weight after",
    tie_memory: "head.weight was tied to embed.weight after",
    unfreeze: "frozen.weight was frozen when the Averager was made.*Freeze it again",
    parametrized: "body.weight is no longer in the model",
    weight_norm: "body.weight is no longer in the model",
    pruned: "body.weight is no longer in the model",
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_model_that_changed_is_refused_at_the_next_update_and_read(change):
    net = Net()
    averager = Averager(net, RULE)
    averager.update()
    change(net)
    for call in (averager.update, averager.read, lambda: averager.applied().__enter__(), averager.copy_to_model):
        with pytest.raises(RuntimeError, match=CHANGES[change]) as info:
            call()
        assert "make a new Averager" in str(info.value) and "step=N" in str(info.value)
    assert averager.step == 1
    joined = Averager(net, RULE, step=averager.step)  # the remedy
    joined.update()
    assert joined.step == 2 and joined.read()


def test_unfreezing_can_be_taken_back():
    net = Net()
    averager = Averager(net, RULE)
    averager.update()
    unfreeze(net)
    with pytest.raises(RuntimeError, match="Freeze it again"):
        averager.update()
    net.frozen.requires_grad_(False)
    averager.update()
    assert averager.step == 2 and averager.read()


def harmless():
    def compile_block(m):
        m.blocks = torch.compile(m.blocks)

    def add_frozen(m):
        m.extra = nn.Linear(2, 2).requires_grad_(False)

    def add_buffer(m):
        m.register_buffer("mask", torch.ones(3))

    def replace_frozen(m):
        m.frozen = nn.Linear(2, 2).requires_grad_(False)

    def freeze(m):
        m.body.requires_grad_(False)

    def assign(m):
        m.load_state_dict({k: t.clone() for k, t in m.state_dict().items()}, assign=True)

    return [compile_block, add_frozen, add_buffer, replace_frozen, freeze, assign, nn.Module.double, nn.Module.eval]


@pytest.mark.parametrize("change", harmless())
def test_changes_that_leave_the_averaged_parameters_in_place_are_followed(change):
    net = Net()
    averager = Averager(net, RULE)
    averager.update()
    change(net)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.fill_(3.0)
    for _ in range(60):
        averager.update()
    torch.testing.assert_close(averager.read(dtype=torch.float32)["body.weight"], torch.full((4, 4), 3.0))


def test_what_was_frozen_and_put_in_later_is_watched_too():
    net = Net()
    averager = Averager(net, RULE)
    net.extra = nn.Linear(2, 2).requires_grad_(False)
    averager.update()
    net.extra.requires_grad_(True)
    with pytest.raises(RuntimeError, match=r"extra.weight was frozen when"):
        averager.update()


def sgd(source):
    parameters = source.parameters() if isinstance(source, nn.Module) else source
    return torch.optim.SGD(parameters, lr=0.1)


def step(optimizer):
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.ones_like(parameter)
    optimizer.step()


def test_attaching_to_another_models_optimizer_is_refused_and_leaves_no_hook():
    net, other = Net(), Net()
    averager, optimizer = Averager(net, RULE), sgd(other)
    with pytest.raises(ValueError, match="this SGD steps none of the 8 averaged tensors, such as embed.weight"):
        averager.attach(optimizer)
    step(optimizer)
    assert averager.step == 0
    averager.attach(sgd(net))


def test_named_tensors_that_loading_has_replaced_are_refused():
    net = Net()
    averager = Averager(net.named_parameters(), RULE)
    net.load_state_dict({k: t.clone() for k, t in net.state_dict().items()}, assign=True)
    optimizer = sgd(net.body)
    with pytest.raises(ValueError, match="assign=True"):
        averager.attach(optimizer)
    step(optimizer)
    with pytest.raises(RuntimeError, match="SGD steps none of the averaged tensors, such as embed.weight"):
        averager.update()


def test_an_averager_of_a_copy_is_refused():
    net = Net()
    averager, optimizer = Averager(copy.deepcopy(net), RULE), sgd(net.body)
    step(optimizer)
    with pytest.raises(RuntimeError, match="steps none of the averaged tensors"):
        averager.update()


def test_optimizers_of_other_models_do_not_matter_when_the_averaged_tensors_move():
    net, other = Net(), Net()
    averager, own, foreign = Averager(net, RULE), sgd(net.body), sgd(other.body)
    for first, second in ((own, foreign), (foreign, own)):
        step(first), step(second)
        averager.update()
    step(foreign)
    with torch.no_grad():
        net.body.weight.add_(1.0)  # by hand
    averager.update()
    averager.update()
    assert averager.step == 4


@pytest.mark.parametrize("attach", [True, False])
def test_parameters_added_to_the_optimizer_are_refused_before_they_step(attach):
    net, extra = Net(), nn.Linear(2, 2)
    averager, optimizer = Averager(net, RULE), sgd(p for p in net.parameters() if p.requires_grad)
    if attach:
        averager.attach(optimizer)
    step(optimizer)
    optimizer.add_param_group({"params": extra.parameters()})
    before = [p.clone() for p in (*net.parameters(), *extra.parameters())]
    for _ in range(2):
        with pytest.raises(RuntimeError, match="2 parameters were added to SGD that are not averaged"):
            step(optimizer)
    assert all(torch.equal(a, b) for a, b in zip(before, (*net.parameters(), *extra.parameters()), strict=True))


def test_parts_of_what_an_optimizer_steps_may_be_averaged():
    net, extra = Net(), nn.Linear(2, 2)
    averager, optimizer = Averager(net.body, RULE), sgd(p for p in net.parameters() if p.requires_grad)
    averager.attach(optimizer)
    step(optimizer)
    optimizer.add_param_group({"params": extra.parameters()})
    step(optimizer)
    assert averager.step == 2


def test_parameters_replaced_after_the_optimizer_was_made_are_noticed():
    net = Net()
    averager, optimizer = Averager(net.body, RULE), sgd(net.body)
    averager.attach(optimizer)
    step(optimizer)
    assign = {k: t.clone() for k, t in net.body.state_dict().items()}
    net.body.load_state_dict(assign, assign=True)
    with pytest.raises(RuntimeError, match="2 averaged tensors were replaced after SGD was made"):
        step(optimizer)


def test_flat_buffers_of_the_optimizer_are_known_by_their_memory():
    flat = torch.zeros(6)
    flat.grad = None
    parts = {"a": flat[:2], "b": flat[2:]}
    averager = Averager(parts, RULE)
    averager.attach(sgd([flat.requires_grad_()]))


def test_whatever_the_block_replaced_the_parameters_are_the_same_objects_afterwards():
    net = Net()
    averager, optimizer = Averager(net, RULE), sgd(net.body)
    averager.attach(optimizer)
    step(optimizer)
    before = dict(net.named_parameters())
    with averager.applied():
        net.load_state_dict({k: t.clone() for k, t in net.state_dict().items()}, assign=True)
    assert all(p is before[name] for name, p in net.named_parameters() if not name.startswith("frozen"))
    step(optimizer)
    assert averager.step == 2


def test_a_step_without_a_due_update_looks_at_no_tensor(monkeypatch):
    net = Net()
    averager = Averager(net, EMA(decay=0.5, update_freq=10))
    monkeypatch.setattr(averager._live, "tensors", lambda **options: 1 / 0)
    for _ in range(9):
        averager.update()
    with pytest.raises(ZeroDivisionError):
        averager.update()
    assert averager.step == 9


def test_merged_adapters_follow_their_factors():
    peft = pytest.importorskip("peft")
    net, other = (peft.get_peft_model(Net(), peft.LoraConfig(r=2, target_modules=["body"])) for _ in range(2))
    averager = _lora.MergedLoraAverager(net, RULE)
    with pytest.raises(ValueError, match="steps none of the"):
        averager.attach(sgd(other))
    optimizer = sgd(net)
    averager.attach(optimizer)
    step(optimizer)
    assert averager.step == 1
