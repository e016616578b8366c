"""The Averager: closed forms, neutrality, what it shares, what it refuses."""

import contextlib
import copy
import dataclasses
import math

import numpy as np
import pytest
import torch
from torch import nn

import lagless
from lagless import BEMA, DEMA, EMA, OUEMA, Averager, UniformAverage, WindowAverage, trajectory_weights
from lagless.rules import ReadCoefficients, UpdateCoefficients


def walk(tensors, seed):
    """One step of a random walk, in place."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in tensors:
            tensor.add_(torch.randn(tensor.shape, generator=generator).to(tensor.dtype))


def model(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2)).to(dtype)


def bits(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_many_rules_in_one_pass_equal_each_alone():
    rules = {
        "ema": EMA(decay=0.9),
        "bema": BEMA.paper(update_freq=3),
        "same_ema": EMA(update_freq=3),
        "ouema": OUEMA.paper(update_freq=2),
        "dema": DEMA.paper(update_freq=3),
        "window": WindowAverage(window=2, update_freq=2),
        "mean": UniformAverage(update_after=4),
    }
    weights = {"a": torch.randn(5, 7, dtype=torch.float64), "b": torch.randn(3, dtype=torch.float64)}
    together = Averager(weights, rules)
    alone = {name: Averager(weights, {name: rule}) for name, rule in rules.items()}
    history = [{name: t.clone() for name, t in weights.items()}]
    for step in range(1, 12):
        walk(weights.values(), step)
        history.append({name: t.clone() for name, t in weights.items()})
        for averager in (together, *alone.values()):
            averager.update()
    for name, rule in rules.items():
        w = torch.from_numpy(trajectory_weights(rule, range(12)))
        for key in weights:
            expected = sum(w[i] * history[i][key] for i in range(12))
            torch.testing.assert_close(together.read(name)[key], expected, rtol=0, atol=1e-12)
            assert torch.equal(together.read(name)[key], alone[name].read()[key])


def stored_copies(averager, numel):
    return sum(t.numel() for t in averager.state_dict()["tensors"].values()) / numel


@pytest.mark.parametrize(
    "rules, copies",
    [
        (EMA(), 1),
        (BEMA.paper(), 2),
        (DEMA.paper(), 2),
        (OUEMA.paper(), 2),
        (WindowAverage(window=4), 4),
        ({"a": BEMA.paper(update_freq=1), "b": EMA()}, 2),
        ({"a": BEMA.paper(), "b": BEMA.paper(bias_power=0.4), "c": DEMA.paper(), "d": BEMA.paper(form="trl")}, 3),
        ({"a": BEMA.paper(update_freq=1), "b": BEMA.paper(update_freq=2), "c": OUEMA.paper(update_freq=3)}, 4),
    ],
    ids=str,
)
def test_buffers_are_shared(rules, copies):
    weights = {"w": torch.randn(10)}
    assert stored_copies(Averager(weights, rules), 10) == copies


def test_shared_or_not_the_averages_are_the_same_bits():
    weights = {"w": torch.randn(100)}
    both = Averager(weights, {"bema": BEMA.paper(update_freq=2, bias_power=float("inf")), "ema": EMA(update_freq=2)})
    for step in range(1, 7):
        walk(weights.values(), step)
        both.update()
    assert torch.equal(both.read("bema")["w"], both.read("ema")["w"])


def test_larger_than_a_block_and_odd_layouts():
    weights = {
        "big": torch.randn(3 * (1 << 20) + 5),
        "transposed": torch.randn(6, 9).t(),
        "empty": torch.randn(0),
        "scalar": torch.randn(()),
        "strided": torch.randn(20)[::2],
    }
    start = {name: t.clone() for name, t in weights.items()}
    averager = Averager(weights, EMA(decay=0.75))
    walk(weights.values(), 1)
    averager.update()
    for name, average in averager.read().items():
        torch.testing.assert_close(average, start[name].lerp(weights[name], 0.25), rtol=0, atol=1e-6)


def test_tied_frozen_and_integer_entries():
    net = nn.Module()
    net.embed, net.head, net.frozen = nn.Embedding(6, 4), nn.Linear(4, 6, bias=False), nn.Linear(4, 4)
    net.head.weight = net.embed.weight
    net.frozen.requires_grad_(False)
    net.register_buffer("count", torch.tensor(3))
    net.register_buffer("scale", torch.ones(2))
    averager = Averager(net, EMA(decay=0.9))
    before = net.embed.weight.detach().clone()
    with torch.no_grad():
        net.embed.weight.add_(1.0)
        net.count.add_(1)
    averager.update()
    averages = averager.read()
    assert set(averages) == {"embed.weight", "head.weight"}
    assert averages["head.weight"] is averages["embed.weight"]
    torch.testing.assert_close(averages["embed.weight"], before + 0.1)  # once, not twice
    net.load_state_dict({**net.state_dict(), **averages})
    assert net.count.item() == 4


def test_compiled_module_has_plain_names():
    net = model()
    averager = Averager(torch.compile(net), EMA())
    averager.update()
    assert set(averager.read()) <= set(net.state_dict())


def test_parameters_moved_by_module_to_are_followed():
    net = model()
    averager = Averager(net, EMA(decay=0.5))
    net.to(torch.float64).to(torch.float32)  # replaces the storage of every parameter
    with torch.no_grad():
        net[0].bias.fill_(2.0)
    start = averager.state_dict()["tensors"]["ema.0/0.bias"].clone()
    averager.update()
    torch.testing.assert_close(averager.read()["0.bias"], 0.5 * (start + 2.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_applied_returns_the_exact_bits(dtype):
    net = model(dtype)
    averager = Averager(net, BEMA.paper(update_freq=2))
    for step in range(1, 6):
        walk(net.parameters(), step)
        averager.update()
    live = bits(net)
    expected = averager.read()
    with averager.applied():
        inside = bits(net)
    assert not same(inside, live) and same(bits(net), live)
    assert all(torch.equal(inside[name], value.to(dtype)) for name, value in expected.items())
    with pytest.raises(KeyError), averager.applied():
        raise KeyError
    assert same(bits(net), live)
    averager.update()


def test_refusals_while_applied():
    net = model()
    averager = Averager(net, {"ema": EMA(), "bema": BEMA.paper(update_freq=1)})
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    averager.update()
    averager.attach(optimizer)
    state = averager.state_dict()
    with averager.applied("ema"):
        with pytest.raises(RuntimeError, match="cannot apply 'bema' while the average 'ema' is in the model"):
            averager.applied("bema").__enter__()
        for action, call in [
            ("update", averager.update),
            ("read 'ema'", lambda: averager.read("ema")),
            ("step the optimizer", optimizer.step),
            ("load a state", lambda: averager.load_state_dict(state)),
        ]:
            with pytest.raises(RuntimeError, match=f"cannot {action} while"):
                call()


def test_no_average_before_the_first_update():
    averager = Averager({"w": torch.zeros(2)}, BEMA.paper(update_after=2, update_freq=3))
    for _ in range(4):
        with pytest.raises(
            RuntimeError, match=r"'bema' has had no update in \d steps \(update_after=2, update_freq=3\)"
        ):
            averager.read()
        with pytest.raises(RuntimeError, match="no update"), averager.applied():
            pass
        averager.update()
    averager.update()
    assert averager.updates() == 1
    averager.read()


def test_run_shorter_than_the_first_update_is_refused_at_once():
    with pytest.raises(ValueError, match="BEMA: update_after=0, update_freq=400 give no update up to step 50"):
        Averager({"w": torch.zeros(2)}, BEMA.paper(), total_steps=50)


@pytest.mark.parametrize(
    "make, error, message",
    [
        (lambda: Averager({}, EMA()), ValueError, "nothing to average"),
        (lambda: Averager(nn.Linear(2, 2).requires_grad_(False), EMA()), ValueError, "nothing to average"),
        (lambda: Averager({"w": torch.zeros(2)}, {}), ValueError, "rules is empty"),
        (lambda: Averager({"w": torch.zeros(2)}, {"a/b": EMA()}), ValueError, "'a/b' cannot name an average"),
        (lambda: Averager({"w": torch.zeros(2)}, {"a": 0.9}), TypeError, "'a' is 0.9, which is no rule by name"),
        (lambda: Averager({"w": torch.zeros(2)}, EMA(), dtype=torch.float16), ValueError, "dtype=torch.float16"),
        (lambda: Averager({"w": torch.zeros(2)}, EMA(), step=-1), ValueError, "step=-1; it must be an integer >= 0"),
        (
            lambda: Averager({"w": torch.zeros(2, device="meta")}, EMA()),
            ValueError,
            "w is torch.float32, torch.strided, on device meta.*Load it whole .* or freeze it",
        ),
        (
            lambda: Averager({"w": torch.zeros(2, dtype=torch.complex64)}, EMA()),
            ValueError,
            "w is torch.complex64.*dense real tensors",
        ),
        (lambda: Averager([("w", torch.zeros(2)), ("w", torch.ones(2))], EMA()), ValueError, "two tensors are named"),
        (lambda: Averager([torch.zeros(2)], EMA()), TypeError, "is not a named tensor; pass a module"),
        (lambda: Averager({"w": [1.0]}, EMA()), TypeError, "is not a named tensor"),
    ],
)
def test_bad_arguments(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_which_average():
    averager = Averager({"w": torch.zeros(2)}, {"a": EMA(), "b": EMA(decay=0.5)})
    averager.update()
    with pytest.raises(ValueError, match="say which average you mean; this Averager follows a, b"):
        averager.read()
    with pytest.raises(ValueError, match="there is no average 'c'; this Averager follows a, b"):
        averager.updates("c")


def test_changed_shape_is_refused():
    parameter = nn.Parameter(torch.zeros(2))
    averager = Averager({"w": parameter}, EMA())
    parameter.data = torch.zeros(3)
    with pytest.raises(RuntimeError, match=r"w changed its shape from \(2,\) to \(3,\)"):
        averager.update()


def test_attach_counts_real_steps_only():
    net = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    averager = Averager(net, EMA())
    tie = averager.attach(optimizer)
    with pytest.raises(RuntimeError, match="attached to an optimizer already"):
        averager.attach(optimizer)
    for micro in range(6):  # gradient accumulation over 3 microbatches
        net(torch.ones(1, 2)).sum().backward()
        if micro % 3 == 2:
            optimizer.step()
            optimizer.zero_grad()
    assert averager.step == 2
    tie.remove()
    optimizer.step()
    assert averager.step == 2
    averager.attach(optimizer)


@pytest.mark.parametrize("fused", [False, True])
def test_steps_the_scaler_skips_do_not_count(fused):
    net = nn.Linear(2, 1)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1, fused=fused)
    averager = Averager(net, EMA())
    averager.attach(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    for scale in (1.0, float("inf"), 1.0):
        optimizer.zero_grad()
        scaler.scale(net(torch.ones(1, 2)).sum() * scale).backward()
        scaler.step(optimizer)
        scaler.update()
    assert averager.step == 2


def test_joining_a_run():
    weights = {"w": torch.zeros(1, dtype=torch.float64)}
    rule = EMA()
    averager = Averager(weights, rule, step=100)
    weights["w"].fill_(1.0)
    averager.update()
    assert averager.step == 101
    assert averager.read()["w"].item() == pytest.approx(trajectory_weights(rule, [100, 101])[1])


def test_device_argument_and_read_dtype():
    averager = Averager({"w": torch.ones(2, dtype=torch.bfloat16)}, EMA(), device="cpu")
    averager.update()
    assert averager.read()["w"].dtype == torch.float32
    assert averager.read(dtype=torch.bfloat16)["w"].dtype == torch.bfloat16


def test_repr_names_the_rules():
    averager = Averager({"w": torch.ones(2)}, BEMA.paper(update_freq=2))
    assert "bema: BEMA(ema_power=0.5" in repr(averager) and "0 updates" in repr(averager)


def test_training_is_bitwise_unchanged_by_averaging_and_evaluating():
    def train(averaged):
        torch.manual_seed(1)
        net = model()
        optimizer = torch.optim.AdamW(net.parameters(), lr=0.05)
        averager = Averager(net, {"bema": BEMA.paper(update_freq=2), "ema": EMA()}) if averaged else None
        if averager:
            averager.attach(optimizer)
        for step in range(12):
            optimizer.zero_grad()
            net(torch.randn(8, 4)).square().mean().backward()
            optimizer.step()
            for name in ("bema", "ema"):
                with averager.applied(name) if averager and step >= 1 else contextlib.nullcontext():
                    net.eval()
                    net(torch.ones(2, 4))
                    net.train()
        return bits(net)

    assert same(train(averaged=True), train(averaged=False))


def test_import_needs_no_heavy_library():
    import subprocess
    import sys

    heavy = "transformers trl lightning matplotlib pandas typer rich accelerate torch._dynamo".split()
    code = f"import lagless, sys; print([m for m in {heavy!r} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
    assert lagless.__version__


def random_rule(generator):
    pick = lambda *options: options[generator.integers(len(options))]  # noqa: E731
    after, freq = int(generator.integers(0, 5)), int(generator.integers(1, 5))
    kind = pick(EMA, BEMA, OUEMA, DEMA, UniformAverage, lagless.PowerEMA, WindowAverage)
    extra = {
        EMA: lambda: pick({}, {"ema_power": 0.3}, {"half_life": 4.0}, {"half_life_fraction": 0.2}, {"decay": 0.8}),
        BEMA: lambda: pick({}, {"bias_power": 0.5}, {"ema_power": 0.3}, {"form": "trl"}, {"form": "offline"}),
        OUEMA: lambda: pick({}, {"bias_power": 0.5}, {"ema_power": 0.3}),
        DEMA: lambda: pick({}, {"ema_power": 0.3}),
        UniformAverage: dict,
        lagless.PowerEMA: lambda: pick({}, {"relative_width": 0.2}),
        WindowAverage: lambda: pick({"window": 2}, {"window": 3}),
    }[kind]()
    return kind(update_after=after, update_freq=freq, **extra)


@pytest.mark.parametrize("seed", range(30))
def test_any_set_of_rules_shares_buffers_without_harm(seed):
    generator = np.random.default_rng(seed)
    rules = {f"r{i}": random_rule(generator) for i in range(5)}
    joined = int(generator.integers(0, 7))
    weights = {"w": torch.from_numpy(generator.standard_normal(4))}
    history = [weights["w"].clone()]
    together = Averager(weights, rules, step=joined)
    alone = {name: Averager(weights, rule, step=joined) for name, rule in rules.items()}
    for _ in range(21):
        weights["w"].add_(torch.from_numpy(generator.standard_normal(4)))
        history.append(weights["w"].clone())
        for averager in (together, *alone.values()):
            averager.update()
    iterates = torch.stack(history)
    for name, rule in rules.items():
        filtered = torch.from_numpy(trajectory_weights(rule, range(joined, joined + 22))) @ iterates
        assert torch.equal(together.read(name)["w"], alone[name].read()["w"])
        torch.testing.assert_close(together.read(name)["w"], filtered, rtol=0, atol=1e-9)


def test_a_label_that_says_too_little_is_caught():
    @dataclasses.dataclass(frozen=True)
    class Mine(lagless.Rule):
        gain: float
        update_after: int = 0
        update_freq: int = 1
        buffer_keys = ("mine",)

        def update(self, tick):
            return UpdateCoefficients(((1.0 - self.gain,),), (self.gain,))

        def read(self, tick):
            return ReadCoefficients((1.0,), 0.0)

    averager = Averager({"w": torch.zeros(1)}, {"a": Mine(0.9), "b": Mine(0.1)})
    with pytest.raises(ValueError, match="'b' has a buffer with the label of another rule's, but updates it otherwise"):
        averager.update()


def test_replaced_parameters_are_followed():
    net = nn.Linear(2, 2)
    averager = Averager(net, EMA(decay=0.5))
    new = {name: torch.full_like(t, 7.0) for name, t in net.state_dict().items()}
    net.load_state_dict(new, assign=True)
    for _ in range(60):
        averager.update()
    torch.testing.assert_close(averager.read()["bias"], torch.full((2,), 7.0))


def test_models_that_changed_are_refused():
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    net[1].weight = net[0].weight
    averager = Averager(net, EMA())
    net[1].weight = nn.Parameter(torch.zeros(2, 2))
    with pytest.raises(RuntimeError, match="1.weight is no longer tied to 0.weight; make a new Averager"):
        averager.update()
    assert averager.step == 0
    frozen = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    frozen[0].requires_grad_(False)
    averager = Averager(frozen, EMA())
    averager.update()
    frozen[0].requires_grad_(True)
    with pytest.raises(RuntimeError, match="0.weight was frozen when the Averager was made, and trains now"):
        averager.read()


@pytest.mark.parametrize(
    "change", [nn.Module.half, nn.Module.double, lambda m: m.load_state_dict(zeros(m), assign=True)]
)
def test_applied_returns_the_bits_whatever_the_block_did(change):
    net = nn.Linear(3, 3)
    averager = Averager(net, EMA())
    walk(net.parameters(), 1)
    averager.update()
    live = bits(net)
    with averager.applied():
        change(net)
    assert same(bits(net), live) and net.weight.dtype == torch.float32


def zeros(module):
    return {name: torch.zeros_like(t) for name, t in module.state_dict().items()}


def test_buffers_are_the_live_models():
    net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    net.register_buffer("mask", torch.tensor([0.0, -math.inf]))
    averager = Averager(net, BEMA.paper(update_freq=1))
    averager.update()
    assert set(averager.read()) == {"0.weight", "0.bias", "1.weight", "1.bias"}


def test_wrapped_modules_have_plain_names():
    net = model()
    plain = set(Averager(net, EMA())._live.names)
    inner = nn.Sequential(torch.compile(nn.Linear(2, 2)))
    assert set(Averager(torch.compile(nn.DataParallel(net)), EMA())._live.names) == plain
    assert set(Averager(inner, EMA())._live.names) == {"0.weight", "0.bias"}


def test_what_is_not_averaged_may_lie_anywhere():
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, device="meta").requires_grad_(False))
    averager = Averager(net, EMA(decay=0.5))  # as with adapters on a model that device_map has offloaded
    before = net[0].weight.detach().clone()
    walk(net[0].parameters(), 1)
    averager.update()
    assert averager.read().keys() == {"0.weight", "0.bias"}
    expected = (before + net[0].weight) / 2
    with averager.applied():
        torch.testing.assert_close(net[0].weight, expected)


def test_frozen_parameters_given_by_name_are_left_out():
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    net[0].requires_grad_(False)
    assert Averager(net.named_parameters(), EMA())._live.names == ["1.weight", "1.bias"]
    tied = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    tied[1].weight = tied[0].weight
    assert Averager(tied.state_dict(), EMA())._live.aliases == {"1.weight": "0.weight"}


def test_attach_takes_one_optimizer():
    net = nn.Linear(2, 2)
    first, second = (torch.optim.SGD(net.parameters(), lr=0.1) for _ in range(2))
    averager = Averager(net, EMA())
    with pytest.raises(TypeError, match="attach needs a torch.optim.Optimizer, not a Linear"):
        averager.attach(net)
    averager.attach(first)
    with pytest.raises(RuntimeError, match="attached to an optimizer already"):
        averager.attach(second)


def test_attach_looks_into_accelerates_optimizer():
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=3)
    net = nn.Linear(2, 1)
    net, optimizer = accelerator.prepare(net, torch.optim.SGD(net.parameters(), lr=0.1))
    averager = Averager(net, EMA())
    averager.attach(optimizer)
    for _ in range(9):
        with accelerator.accumulate(net):
            accelerator.backward(net(torch.ones(1, 2)).sum())
            optimizer.step()
            optimizer.zero_grad()
    assert averager.step == 3


def test_device_argument_is_where_averages_live():
    tensors = Averager({"w": torch.ones(2)}, BEMA.paper(update_freq=1), device="meta").state_dict()["tensors"]
    assert [t.device.type for t in tensors.values()] == ["meta", "meta"]


def test_mixed_kinds_and_layouts():
    image = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)
    weights = {
        "image": nn.Parameter(image),
        "double": torch.randn(5, dtype=torch.float64),
        "half": torch.randn(5).half(),
    }
    start = {name: t.detach().clone() for name, t in weights.items()}
    averager = Averager(weights, BEMA.paper(update_freq=1))
    weights["image"].data = weights["image"].data.contiguous()
    for tensor in weights.values():
        tensor.data = tensor.data + 1
    averager.update()
    alpha, beta = 11**-0.2, 11**-0.5
    for name, average in averager.read().items():
        torch.testing.assert_close(average.double(), start[name].double() + alpha + beta, rtol=0, atol=2e-3)


def test_numpy_numbers_are_numbers(tmp_path):
    rule = EMA(update_freq=np.int64(1), decay=np.float32(0.5))
    averager = Averager({"w": torch.zeros(2)}, rule, step=np.int64(3), seed=np.int64(1), dtype=torch.bfloat16)
    averager.update()
    averager.save(tmp_path / "state.safetensors")
    assert (type(rule.update_freq), type(rule.decay), type(averager.step)) == (int, float, int)


def test_an_averager_is_not_copied():
    averager = Averager({"w": torch.zeros(2)}, EMA())
    with pytest.raises(TypeError, match="cannot be copied or pickled; use state_dict"):
        copy.deepcopy(averager)


def test_joining_late_counts_the_steps_left():
    with pytest.raises(ValueError, match="up to step 1000 from step 900 on.*update_freq <= 100"):
        Averager({"w": torch.zeros(2)}, BEMA.paper(), step=900, total_steps=1000)
    with pytest.raises(ValueError, match="total_steps='100'; it must be an integer"):
        Averager({"w": torch.zeros(2)}, EMA(), total_steps="100")


def test_steps_that_an_attached_optimizer_counts_are_not_counted_by_hand_too():
    model = torch.nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    averager = Averager(model, EMA(decay=0.5))
    attachment = averager.attach(optimizer)
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    with pytest.raises(RuntimeError, match="counts by itself: leave update\\(\\) out"):
        averager.update()
    assert averager.step == 1
    attachment.remove()
    averager.update()
    assert averager.step == 2


def test_an_average_of_no_step_at_all_says_what_was_forgotten():
    with pytest.raises(RuntimeError, match="in 0 steps .* Call attach"):
        Averager(torch.nn.Linear(2, 1), EMA(decay=0.5)).read()


@pytest.mark.parametrize("rules", [[EMA()], EMA, "ema"], ids=repr)
def test_what_is_no_rule_is_refused_in_words(rules):
    with pytest.raises(TypeError, match="rules takes a rule"):
        Averager(torch.nn.Linear(2, 1), rules)
