"""What parameters show for a while is never taken for what trains: swaps, evaluation modes, other Averagers."""

import copy

import pytest
import torch
from torch import nn

from lagless import BEMA, EMA, Averager
from lagless.averaging import _buffers, _offload
from lagless.optim import PACE, PrimalAveraging

RULES = {"bema": BEMA(update_freq=1), "late": BEMA(update_freq=2), "ema": EMA(decay=0.5)}
X = torch.ones(2, 4)


def schedule_free(parameters):
    return pytest.importorskip("schedulefree").AdamWScheduleFree(parameters, lr=0.1)


def pace(parameters):
    return PACE(parameters, lr=0.1)


def primal(parameters):
    return PrimalAveraging(torch.optim.SGD(parameters, lr=0.1), EMA(decay=0.5))


OPTIMIZERS = [pace, primal, schedule_free]


def net():
    torch.manual_seed(0)
    return nn.Linear(4, 3)


def step(model, optimizer, seed):
    optimizer.train()
    optimizer.zero_grad()
    model(X + torch.randn(2, 4, generator=torch.Generator().manual_seed(seed))).square().sum().backward()
    optimizer.step()


def trained(make, steps, attach=True):
    model = net()
    optimizer = make(model.parameters())
    averager = Averager(model, RULES)
    if attach:
        averager.attach(optimizer)
    for seed in range(steps):
        step(model, optimizer, seed)
        if not attach:
            averager.update()
    return model, optimizer, averager


def bits(model):
    return [p.detach().clone() for p in model.parameters()]


def same(a, b):
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# Evaluation modes


@pytest.mark.parametrize("attach", [True, False])
@pytest.mark.parametrize("make", OPTIMIZERS)
def test_averages_are_of_trained_weights_in_evaluation_mode_and_nothing_else_changes(make, attach):
    model, optimizer, averager = trained(make, 5, attach)
    expected = {name: averager.read(name) for name in RULES}
    state = copy.deepcopy(averager.state_dict())
    live = bits(model)
    optimizer.eval()
    shown = bits(model)
    assert not same(shown, live)
    for name, values in expected.items():
        read = averager.read(name)
        torch.testing.assert_close(read, values, rtol=1e-6, atol=1e-7)
        # Schedule-free's package computes trained weights from shown ones, with rounding.
        assert make is schedule_free or same(list(read.values()), list(values.values()))
        with averager.applied(name):
            assert same(bits(model), list(read.values()))
        assert same(bits(model), shown)
    now = averager.state_dict()
    if make is schedule_free:  # rounding shows in the digests of trained weights
        for buffers in (meta["meta"]["buffers"] for meta in (now, state)):
            buffers["bema"] = [entry for entry in buffers["bema"] if not entry.startswith("live/")]
    assert now["meta"] == state["meta"] and same([*now["tensors"].values()], [*state["tensors"].values()])
    other, twin, _ = trained(make, 5, attach)
    twin.eval()
    for m, o in ((model, optimizer), (other, twin)):
        step(m, o, 9)
    assert same(bits(model), bits(other))


@pytest.mark.parametrize("make", OPTIMIZERS)
def test_an_averager_made_in_evaluation_mode_starts_at_the_trained_weights(make):
    model, optimizer, _ = trained(make, 3)
    live = bits(model)
    optimizer.eval()
    averager = Averager(model, EMA(decay=0.5, update_freq=2))
    assert same([*averager.state_dict()["tensors"].values()], live)


@pytest.mark.parametrize("make", OPTIMIZERS)
def test_no_update_in_evaluation_mode(make):
    _, optimizer, averager = trained(make, 3, attach=False)
    optimizer.eval()
    with pytest.raises(RuntimeError, match=r"cannot update while \w+ is in evaluation mode.*call its train\(\) first"):
        averager.update()
    assert averager.step == 3
    optimizer.train()
    averager.update()


@pytest.mark.parametrize("make", OPTIMIZERS)
def test_an_average_copied_for_good_stays_when_training_goes_on(make):
    model, optimizer, averager = trained(make, 3)
    expected = list(averager.read("bema").values())
    optimizer.eval()
    averager.copy_to_model("bema")
    optimizer.train()
    assert same(bits(model), expected)


@pytest.mark.parametrize("make", [pace, primal])
@pytest.mark.parametrize("evaluating", [False, True])
def test_our_optimizers_refuse_to_switch_while_an_average_is_in_the_parameters(make, evaluating):
    model, optimizer, averager = trained(make, 3)
    if evaluating:
        optimizer.eval()
    before = bits(model)
    with averager.applied("ema"):
        with pytest.raises(RuntimeError, match="while the average 'ema' is in"):
            optimizer.train() if evaluating else optimizer.eval()
        with pytest.raises(RuntimeError, match="while the average 'ema' is in"):
            optimizer.load_state_dict(optimizer.state_dict())
        for call in (optimizer.step, optimizer.read, lambda: optimizer.applied().__enter__(), optimizer.copy_to_model):
            with pytest.raises(RuntimeError, match="while the average 'ema' is in"):
                call()
    assert same(bits(model), before)
    optimizer.train()
    step(model, optimizer, 1)


@pytest.mark.parametrize("evaluating", [False, True])
def test_a_switch_of_others_inside_the_block_is_undone(evaluating):
    model, optimizer, averager = trained(schedule_free, 3)
    optimizer.eval() if evaluating else optimizer.train()
    before = bits(model)
    with averager.applied("ema"):
        optimizer.train() if evaluating else optimizer.eval()
    assert same(bits(model), before) and optimizer.param_groups[0]["train_mode"] is not evaluating


def test_two_optimizers_do_not_show_weights_at_once():
    model, optimizer, _ = trained(pace, 3)
    other = pace(model.parameters())
    step(model, other, 0)
    optimizer.eval()
    with pytest.raises(RuntimeError, match="while PACE is in evaluation mode"):
        other.eval()


def test_a_resumed_optimizer_in_evaluation_mode_is_known_before_its_first_step():
    model, optimizer, averager = trained(pace, 3)
    expected = averager.read("bema")
    optimizer.eval()
    again = net()
    again.load_state_dict(model.state_dict())
    resumed = pace(again.parameters())
    resumed.load_state_dict(optimizer.state_dict())
    other = Averager(again, RULES)
    other.load_state_dict(averager.state_dict())
    assert same([*other.read("bema").values()], [*expected.values()])


# Several Averagers


@pytest.mark.parametrize("source", [lambda m: m, lambda m: m.state_dict(), lambda m: dict(m.named_parameters())])
def test_another_averager_refuses_what_it_would_take_for_trained(source):
    model, _, first = plain(3)
    second = Averager(source(model), EMA(decay=0.9))
    second.update()
    state = second.state_dict()
    with first.applied("ema"):
        for action, call in [
            ("update", second.update),
            ("read 'ema'", second.read),
            ("apply 'ema'", lambda: second.applied().__enter__()),
            ("put 'ema' into the model", second.copy_to_model),
            ("load a state", lambda: second.load_state_dict(state)),
            ("start averages", lambda: Averager(source(model), EMA())),
        ]:
            with pytest.raises(RuntimeError, match=f"cannot {action} while the average 'ema' is in these parameters"):
                call()
    second.update()
    assert second.step == 2


def test_averagers_of_other_models_and_of_other_parts_are_free():
    first, second = nn.Linear(2, 2), nn.Linear(2, 2)
    averagers = [Averager(m, EMA()) for m in (first, second)]
    for averager in averagers:
        averager.update()
    with averagers[0].applied():
        averagers[1].update()
        averagers[1].read()


def plain(steps):
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    averager = Averager(model, RULES)
    averager.attach(optimizer)
    for seed in range(steps):
        optimizer.zero_grad()
        model(X + seed).square().sum().backward()
        optimizer.step()
    return model, optimizer, averager


# Autocast


def swaps():
    """Every way to swap weights: a function of (model, averager, optimizer) that swaps, and one that swaps back."""

    def averager_applied(_, averager, optimizer):
        block = averager.applied("ema")
        block.__enter__()
        return lambda: block.__exit__(None, None, None)

    def optimizer_applied(_, averager, optimizer):
        block = optimizer.applied()
        block.__enter__()
        return lambda: block.__exit__(None, None, None)

    def evaluation(_, averager, optimizer):
        optimizer.eval()
        return optimizer.train

    def for_good(_, averager, optimizer):
        averager.copy_to_model("ema")
        return lambda: None

    def loading(_, averager, optimizer):
        state = copy.deepcopy(optimizer.state_dict())
        optimizer.eval()
        averager.read("ema")
        return lambda: optimizer.load_state_dict(state)

    return [averager_applied, optimizer_applied, evaluation, for_good, loading]


@pytest.mark.parametrize("swap", swaps())
def test_forward_passes_of_one_autocast_region_use_the_weights_of_their_time(swap):
    def outputs(region):
        model, optimizer, averager = trained(pace, 4)
        found = []
        with torch.autocast("cpu", torch.bfloat16, enabled=True, cache_enabled=region):
            found.append(model(X))
            back = swap(model, averager, optimizer)
            found.append(model(X))
            back()
            found.append(model(X))
        return found

    cached, uncached = outputs(True), outputs(False)
    assert not torch.equal(uncached[0], uncached[1])
    assert same(cached, uncached)


# Buffers


def update_statistics(model):
    torch.optim.swa_utils.update_bn([X + 3.0, X + 5.0 * torch.randn(2, 4)], model)


def replaced(model):
    model[1].running_mean = torch.full((3,), 9.0)


def written_in_inference_mode(model):
    model.train()
    with torch.inference_mode():
        model(X)


@pytest.mark.parametrize(
    "change",
    [update_statistics, replaced, written_in_inference_mode, nn.Module.half, lambda m: m[1].reset_running_stats()],
)
def test_buffers_that_the_block_changes_are_the_live_ones_afterwards(change):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))
    model.register_buffer("overlapping", torch.ones(1).expand(3))
    averager = Averager(model, EMA(decay=0.5))
    model(X + torch.randn(2, 4))
    averager.update()
    buffers = dict(model.named_buffers())
    before = {name: b.clone() for name, b in buffers.items()}
    with averager.applied():
        change(model)
        assert any(b.dtype != before[n].dtype or not torch.equal(b, before[n]) for n, b in model.named_buffers())
    after = dict(model.named_buffers())
    assert all(after[name] is buffers[name] for name in buffers)
    assert all(after[n].dtype == b.dtype and torch.equal(after[n], b) for n, b in before.items())


# Averages on the host


@pytest.mark.parametrize("make", [pace, primal])
def test_swaps_wait_for_copies_under_way(make, monkeypatch):
    monkeypatch.setattr(_buffers, "can_overlap", lambda device: True)
    held, release = [], _offload.Offload.release
    monkeypatch.setattr(_offload.Offload, "release", lambda self: (held.append(self), release(self))[1])
    model = net()
    optimizer, averager = make(model.parameters()), Averager(model, EMA(decay=0.5), device="cpu")
    averager.attach(optimizer)
    own = lambda: sum(o is averager._buffers._offload for o in held)  # noqa: E731
    for seed in range(3):
        step(model, optimizer, seed)
    for swap in (optimizer.eval, optimizer.train, averager.copy_to_model):
        count = own()
        swap()
        assert own() > count
    averager.read()
