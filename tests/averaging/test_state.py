"""Saving and resuming, and what is refused."""

import copy
import json

import pytest
import torch

from lagless import BEMA, DEMA, EMA, Averager, WindowAverage
from lagless.averaging import _state_file

RULES = {
    "bema": BEMA.paper(update_freq=2),
    "ema": EMA(decay=0.9),
    "dema": DEMA.paper(update_freq=3),
    "lawa": WindowAverage(window=2),
}


def step(weights, n):
    generator = torch.Generator().manual_seed(n)
    for tensor in weights.values():
        tensor.add_(torch.randn(tensor.shape, generator=generator).to(tensor.dtype))


@pytest.mark.parametrize("storage", [None, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("stop", [1, 4, 7])
def test_resumed_equals_never_stopped_through_a_file(tmp_path, stop, storage):
    def run(interrupt):
        weights = {"a": torch.ones(40, dtype=torch.bfloat16), "b": torch.zeros(3, 4)}
        averager = Averager(weights, RULES, dtype=storage)
        for n in range(1, 11):
            step(weights, n)
            averager.update()
            if interrupt and n == stop:
                averager.save(tmp_path / "new folder" / "averager.safetensors")
                averager = Averager(weights, RULES, dtype=storage)
                averager.load(tmp_path / "new folder" / "averager.safetensors")
        return {name: averager.read(name) for name in RULES}

    whole, resumed = run(False), run(True)
    assert all(torch.equal(whole[r][k], resumed[r][k]) for r in RULES for k in ("a", "b"))


def test_state_is_tensors_and_plain_json(tmp_path):
    averager = Averager({"a": torch.ones(2)}, RULES)
    averager.update()
    state = averager.state_dict()
    assert json.loads(json.dumps(state["meta"], allow_nan=False)) == state["meta"]
    assert set(state["tensors"]) >= {"bema.0/a", "bema.1/a", "ema.0/a"}
    torch.save(state, tmp_path / "state.pt")
    again = torch.load(tmp_path / "state.pt", weights_only=True)
    Averager({"a": torch.ones(2)}, RULES).load_state_dict(again)


def test_averages_keep_their_dtype_through_save_and_load(tmp_path):
    averager = Averager({"a": torch.ones(2, dtype=torch.bfloat16)}, BEMA.paper(update_freq=1))
    averager.update()
    averager.save(tmp_path / "s.safetensors")
    averager.load(tmp_path / "s.safetensors")
    dtypes = {name: tensor.dtype for name, tensor in averager.state_dict()["tensors"].items()}
    assert dtypes == {"bema.0/a": torch.bfloat16, "bema.1/a": torch.float32}


@pytest.mark.parametrize(
    "other, message",
    [
        (
            lambda: Averager({"a": torch.ones(2)}, EMA(decay=0.5)),
            "was made with rules .*'decay': 0.9.*start new averages",
        ),
        (lambda: Averager({"a": torch.ones(2)}, {"x": EMA(decay=0.9)}), "was made with rules"),
        (
            lambda: Averager({"b": torch.ones(2)}, EMA(decay=0.9)),
            r"1 missing \['ema.0/b'\], 1 unexpected \['ema.0/a'\]",
        ),
        (lambda: Averager({"a": torch.ones(3)}, EMA(decay=0.9)), r"ema.0/a is torch.float32 \(2,\), .*\(3,\)"),
        (lambda: Averager({"a": torch.ones(2)}, EMA(decay=0.9), dtype=torch.bfloat16), "same dtype argument"),
    ],
)
def test_a_state_that_does_not_fit_changes_nothing(other, message):
    source = Averager({"a": torch.ones(2)}, EMA(decay=0.9))
    source.update()
    target = other()
    before = copy.deepcopy(target.state_dict())
    with pytest.raises(ValueError, match=message):
        target.load_state_dict(source.state_dict())
    after = target.state_dict()
    assert after["meta"] == before["meta"]
    assert all(torch.equal(t, after["tensors"][n]) for n, t in before["tensors"].items())


def test_order_of_rules_does_not_matter():
    weights = {"a": torch.ones(4)}
    source = Averager(weights, RULES)
    for n in range(6):
        step(weights, n)
        source.update()
    target = Averager(weights, dict(reversed(RULES.items())))
    target.load_state_dict(copy.deepcopy(source.state_dict()))
    assert all(torch.equal(target.read(name)["a"], source.read(name)["a"]) for name in RULES)


def test_the_seed_comes_with_the_state():
    weights = {"a": torch.ones(400)}
    source = Averager(weights, EMA(decay=0.9), dtype=torch.bfloat16, seed=5)
    target = Averager(weights, EMA(decay=0.9), dtype=torch.bfloat16, seed=6)
    target.load_state_dict(source.state_dict())
    weights["a"].fill_(1.003)
    source.update()
    target.update()
    assert torch.equal(source.read()["a"], target.read()["a"])


@pytest.mark.parametrize("broken", [{}, {"meta": {}, "tensors": {}}, {"meta": {"format": 1}, "tensors": {}}, "last"])
def test_something_else_changes_nothing(broken):
    averager = Averager({"a": torch.ones(2)}, EMA())
    if broken == "last":
        broken = copy.deepcopy(averager.state_dict())
        del broken["meta"]["last"]
        broken["tensors"]["ema.0/a"].fill_(42.0)
    with pytest.raises(ValueError, match="this is not the state of an Averager"):
        averager.load_state_dict(broken)
    assert averager.state_dict()["tensors"]["ema.0/a"].tolist() == [1.0, 1.0]


def test_future_format_is_refused():
    averager = Averager({"a": torch.ones(2)}, EMA())
    state = averager.state_dict()
    state["meta"]["format"] = 99
    with pytest.raises(ValueError, match="format 99; this lagless reads 1 to 2. Update lagless"):
        averager.load_state_dict(state)


def test_bad_files(tmp_path):
    averager = Averager({"a": torch.ones(200)}, EMA())
    averager.save(tmp_path / "good.safetensors")
    with pytest.raises(FileNotFoundError, match="no averager state at"):
        averager.load(tmp_path / "none.safetensors")
    data = (tmp_path / "good.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(data[:-20])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        averager.load(tmp_path / "cut.safetensors")
    import safetensors.torch

    safetensors.torch.save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="is not an Averager's state"):
        averager.load(tmp_path / "model.safetensors")


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    averager = Averager({"a": torch.ones(2)}, EMA())
    path = tmp_path / "s.safetensors"
    averager.save(path)
    old = path.read_bytes()

    def fail(tensor):
        assert len(list(tmp_path.iterdir())) == 2  # the header is written
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lagless.averaging._state_file.byte_view", fail)
    with pytest.raises(OSError, match="No space left"):
        averager.save(path)
    assert path.read_bytes() == old and [p.name for p in tmp_path.iterdir()] == ["s.safetensors"]


def test_replicas_may_save_to_one_path_at_once(tmp_path, monkeypatch):
    replicas = [Averager({"a": torch.ones(2)}, EMA()) for _ in range(2)]
    path, byte_view = tmp_path / "s.safetensors", _state_file.byte_view

    def both(tensor):
        monkeypatch.setattr(_state_file, "byte_view", byte_view)
        replicas[1].save(path)  # by a process of the same id, on another machine
        return byte_view(tensor)

    monkeypatch.setattr(_state_file, "byte_view", both)
    replicas[0].save(path)
    replicas[0].load(path)
    assert [p.name for p in tmp_path.iterdir()] == ["s.safetensors"]
