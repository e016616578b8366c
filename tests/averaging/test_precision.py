"""Float32 averages with small gains keep what rounding cuts off: in blocks, in C and in one kernel alike."""

import copy
import math

import numpy as np
import pytest
import torch

from lagless import (
    BEMA,
    DEMA,
    EMA,
    OUEMA,
    Averager,
    PowerEMA,
    UniformAverage,
    WindowAverage,
)
from lagless.averaging import _buffers
from lagless.execution import SMALL_GAIN, Noise, RowUpdate, apply_row, lerp_c, lerp_compiled
from lagless.execution._lerp_c import _library
from lagless.rules import Tick

RULES = {
    "uniform": UniformAverage(),
    "power": PowerEMA(relative_width=0.2),
    "decay": EMA(decay=0.9999),
    "fraction": EMA(half_life_fraction=0.05),
    "threshold": EMA(decay=1.0 - SMALL_GAIN),
}


def trajectory(steps, n=32, seed=0):
    """Iterates that move by 0.1 % in all, with noise of 2e-5 per step, as float32 numbers; shape (steps + 1, n)."""
    generator = np.random.default_rng(seed)
    start = (0.02 * generator.standard_normal(n)).astype(np.float32).astype(np.float64)
    t = np.arange(steps + 1)[:, None]
    drift = 1e-3 * generator.standard_normal(n) * t / steps
    noise = 2e-5 * generator.standard_normal((steps + 1, n)) * (t > 0)
    return (start * (1.0 + drift + noise)).astype(np.float32)


def distance(found, exact, start):
    """Error relative to the way that the average went."""
    return np.linalg.norm(found - exact) / np.linalg.norm(exact - start)


@pytest.mark.skipif(_library() is None, reason="no C compiler: too slow without")
def test_after_a_hundred_thousand_updates_averages_are_where_they_should_be():
    steps = 100_000
    path = torch.from_numpy(trajectory(steps))
    kept, plain = ([path[0].clone() for _ in RULES] for _ in range(2))
    low = [torch.zeros(path.shape[1], dtype=torch.int16) for _ in RULES]
    gains = np.array([[rule.update(Tick(t, t - 1, t)).live[0] for rule in RULES.values()] for t in range(1, steps + 1)])
    library = _library()
    assert library is not None
    move, numbers, sizes = (
        library[torch.float32],
        np.hstack([gains, gains]).astype(np.float32),
        np.array([path.shape[1]]),
    )
    addresses = np.zeros((steps, 1 + 4 * len(RULES)), dtype=np.uintp)  # as lerp_c makes them, for all steps at once
    addresses[:, 0] = [row.data_ptr() for row in path[1:]]
    addresses[:, 1 : 1 + 2 * len(RULES)] = [b.data_ptr() for b in kept + plain]
    bits = np.array([b.data_ptr() for b in low], dtype=np.uintp)
    addresses[:, 1 + 2 * len(RULES) : 1 + 3 * len(RULES)] = np.where(gains < SMALL_GAIN, bits, 0)
    iterates, exact = path.numpy().astype(np.float64), path[0].double().numpy()
    begun, number, row, given = sizes.ctypes.data, 2 * len(RULES), addresses.strides[0], numbers.strides[0]
    for t in range(steps):
        move(1, number, begun, addresses.ctypes.data + row * t, numbers.ctypes.data + given * t, 1)
        exact = exact + gains[t, :, None] * (iterates[t + 1] - exact)
    error, error_without = (
        {name: distance(found[n].double().numpy(), exact[n], iterates[0]) for n, name in enumerate(RULES)}
        for found in (kept, plain)
    )
    assert max(error.values()) < 1e-3, error
    # What it is without the low bits; at the threshold, they are not worth their memory.
    assert error_without["uniform"] > 0.5 and error_without["power"] > 0.5 and error_without["decay"] > 0.2
    assert error_without["fraction"] > 0.05 and error_without["threshold"] < 0.01, error_without


@pytest.mark.parametrize("in_c", [False, True])
def test_every_kind_of_rule_equals_its_checkpoints(in_c, monkeypatch):
    # Streaming and weighted sums of checkpoints are one average, also where gains are 1/t.
    if in_c:
        monkeypatch.setattr(_buffers, "LERP_C_SMALLEST", 1)
    steps, begun = 1500, 200_000  # as in the later part of a long run, where gains are small
    rules = {
        "uniform": UniformAverage(),
        "fraction": EMA(half_life_fraction=0.2),
        "bema": BEMA.paper(update_freq=1),
        "dema": DEMA.paper(ema_power=1.0, update_freq=1),
        "ouema": OUEMA.paper(ema_power=1.0, update_freq=1),
        "wide dema".replace(" ", "-"): DEMA(half_life_fraction=0.3, update_freq=1),
        "window": WindowAverage(window=3),
    }
    path = trajectory(steps)
    live = {"w": torch.from_numpy(path[0].copy())}
    averager, exact = Averager(live, rules), Averager(live, rules, dtype=torch.float64)
    for one in (averager, exact):
        state = one.state_dict()
        for last in state["meta"]["last"].values():
            last.update(step=begun, previous=begun - 1, number=begun)
        state["meta"]["step"] = begun
        one.load_state_dict(state)
    for t in range(1, steps + 1):
        live["w"].copy_(torch.from_numpy(path[t]))
        averager.update()
        exact.update()
    for name in rules:
        wanted = exact.read(name, dtype=torch.float64)["w"].numpy()
        found = averager.read(name)["w"].double().numpy()
        # An average of so few steps of so many has gone a few ulp; half of one is the rounding of the value itself.
        assert np.all(np.abs(found - wanted) <= 0.75 * np.spacing(np.abs(path[0])) + 1e-12), name


def random_case(seed=0):
    generator = torch.Generator().manual_seed(seed)
    average = 0.02 * torch.randn(5003, generator=generator)
    average[:50] = 0.0
    average[50:55] = torch.tensor([math.inf, 1e-40, 3e38, 1e-30, -0.0])
    return average, generator


@pytest.mark.parametrize("way", ["c", "compiled", "rows", "pieces"])
def test_all_ways_give_the_same_bits(way):
    if way == "c" and _library() is None:
        pytest.skip("no C compiler")
    start, generator = random_case()
    live = start.clone()
    expected, found = ((start.clone(), torch.zeros(len(start), dtype=torch.int16)) for _ in range(2))
    for t in range(40):
        gain = 1.0 / (300 + 50 * t)
        live[55:] = start[55:] * (1.0 + 1e-4 * torch.randn(len(start) - 55, generator=generator))
        row = RowUpdate(0, 1.0 - gain, (), gain)
        apply_row([[expected[0]]], row, [live], Noise(0, 0), [expected[1]])
        if way == "c":
            lerp_c([live], [[found[0]]], [gain], [[found[1]]])
        elif way == "compiled":
            lerp_compiled(live, [found[0]], torch.tensor([gain], dtype=torch.float64), [found[1]])
        elif way == "pieces":
            columns = ([t.split(1000)] for t in (*found, live))
            (average,), (low,), (weights,) = columns
            apply_row([list(average)], row, list(weights), Noise(0, 0), list(low))
        else:
            apply_row([[found[0]], [live]], RowUpdate(0, 1.0 - gain, ((1, 0.5 * gain),), 0.5 * gain), [live],
                      Noise(0, 0), [found[1]])  # fmt: skip
    finite = torch.isfinite(expected[0])
    assert finite.sum() >= 5000 and expected[1].count_nonzero() > 4000
    if way == "rows":  # a row that reads another buffer rounds in another order
        torch.testing.assert_close(found[0][finite], expected[0][finite], rtol=1.3e-7, atol=0.0)
    else:
        assert torch.equal(found[0][finite], expected[0][finite]) and torch.equal(found[1][finite], expected[1][finite])
        assert torch.equal(torch.isnan(found[0]), torch.isnan(expected[0]))


@pytest.mark.parametrize("gain", [SMALL_GAIN, 0.1, 0.7])
@pytest.mark.parametrize("tensors", [3, 1100])
def test_larger_gains_are_the_lerp_of_torch_and_cost_no_memory(gain, tensors):
    live = {str(n): torch.randn(n % 5, 3) for n in range(tensors)}
    averager = Averager(live, EMA(decay=1.0 - gain))
    expected = [t.clone() for t in live.values()]
    for _ in range(3):
        for tensor in live.values():
            tensor.add_(torch.randn(tensor.shape))
        averager.update()
        torch._foreach_lerp_(expected, list(live.values()), 1.0 - (1.0 - gain))
    assert all(torch.equal(a, b) for a, b in zip(averager.read().values(), expected, strict=True))
    assert averager.state_dict()["tensors"].keys() == {f"ema.0/{name}" for name in live}


def test_low_bits_come_with_the_first_small_gain_and_to_float32_alone():
    live = {"w": torch.randn(7), "wide": torch.randn(3).double()}
    averager = Averager(live, {"u": UniformAverage(), "b": EMA(decay=0.5)})
    for t in range(1, 103):
        averager.update()
        low = {name for name in averager.state_dict()["tensors"] if ".low" in name}
        assert low == (set() if t < 100 else {"u.0.low/w"}), t
    assert averager.state_dict()["tensors"]["u.0.low/w"].dtype == torch.int16
    narrow = Averager(live, UniformAverage(), dtype=torch.bfloat16, step=0)
    for _ in range(102):
        narrow.update()
    assert len(narrow.state_dict()["tensors"]) == 2


def run(live, averager, begin, end):
    for t in range(begin, end):
        generator = torch.Generator().manual_seed(t)
        for tensor in live.values():
            tensor.mul_(1.0 + 1e-5 * torch.randn(tensor.shape, generator=generator))
        averager.update()


def started(rules):
    torch.manual_seed(0)
    live = {"a": torch.randn(50), "b": torch.randn(4, 5)}
    return live, Averager(live, rules)


def resumed_from(live, rules):
    live = {name: tensor.clone() for name, tensor in live.items()}
    return live, Averager(live, rules)


@pytest.mark.parametrize("way", ["file", "state"])
def test_a_resumed_run_goes_on_bit_for_bit(way, tmp_path):
    rules = {"ema": EMA(decay=0.9999), "dema": DEMA.paper(ema_power=1.0, update_freq=1), "short": EMA(decay=0.9)}
    live, averager = started(rules)
    run(live, averager, 0, 150)
    again, resumed = resumed_from(live, rules)
    if way == "file":
        averager.save(tmp_path / "state.safetensors")
        resumed.load(tmp_path / "state.safetensors")
    else:
        resumed.load_state_dict(copy.deepcopy(averager.state_dict()))
    run(live, averager, 150, 300)
    run(again, resumed, 150, 300)
    one, other = averager.state_dict()["tensors"], resumed.state_dict()["tensors"]
    assert one.keys() == other.keys() and any(t.dtype == torch.int16 and t.count_nonzero() for t in one.values())
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_state_without_low_bits_starts_them_at_zero():
    rules = {"ema": EMA(decay=0.9999)}
    live, averager = started(rules)
    run(live, averager, 0, 50)
    state = copy.deepcopy(averager.state_dict())
    state["meta"]["buffers"] = {"ema": ["ema.0"]}  # as earlier versions wrote it
    state["tensors"] = {name: t for name, t in state["tensors"].items() if ".low" not in name}
    _, fresh = resumed_from(live, rules)
    fresh.load_state_dict(state)
    assert not any(".low" in name for name in fresh.state_dict()["tensors"])
    averager.load_state_dict(state)
    assert not any(t.any() for name, t in averager.state_dict()["tensors"].items() if ".low" in name)


def test_low_bits_that_a_loader_left_out_are_missed_and_found_at_the_second_try():
    # torch.distributed.checkpoint fills the tensors of a new Averager's state, which has no low bits yet.
    rules = {"ema": EMA(decay=0.9999)}
    live, averager = started(rules)
    run(live, averager, 0, 50)
    saved = copy.deepcopy(averager.state_dict())
    _, resumed = resumed_from(live, rules)

    def load():
        template = resumed.state_dict()
        for name, tensor in template["tensors"].items():
            tensor.copy_(saved["tensors"][name])
        resumed.load_state_dict({"tensors": template["tensors"], "meta": saved["meta"]})

    with pytest.warns(UserWarning, match=r"without 2 of them, \['ema.0.low/a'.*load once more"):
        load()
    load()
    found = resumed.state_dict()["tensors"]
    assert found.keys() == saved["tensors"].keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in saved["tensors"].items())


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda t, m: t.pop("ema.0.low/a"), "ema.0.low/a is missing"),
        (lambda t, m: t.update({"ema.0.low/c": t["ema.0.low/a"]}), "ema.0.low/c belongs to no float32 average"),
        (lambda t, m: t.update({"ema.0.low/a": t["ema.0/a"]}), r"ema.0.low/a is torch.float32 .* stores torch.int16"),
        (lambda t, m: t.update({"ema.0.low/a": t["ema.0.low/a"][:3]}), r"ema.0.low/a is torch.int16 \(3,\)"),
        (lambda t, m: t.update({"x.0.low/a": t["ema.0.low/a"]}), "x.0.low/a belongs to no float32 average"),
        (lambda t, m: m.update(buffers={"ema": ["ema.0", 3]}), "not the state of an Averager"),
        (lambda t, m: m.update(buffers={"ema": ["ema.0", "other.0.low"]}), "not the state of an Averager"),
    ],
)
def test_damaged_low_bits_are_refused(damage, message):
    live, averager = started({"ema": EMA(decay=0.9999)})
    run(live, averager, 0, 5)
    state = copy.deepcopy(averager.state_dict())
    damage(state["tensors"], state["meta"])
    before = copy.deepcopy(averager.state_dict()["tensors"])
    with pytest.raises(ValueError, match=message):
        averager.load_state_dict(state)
    assert all(torch.equal(t, before[name]) for name, t in averager.state_dict()["tensors"].items())
