"""θ_0 read from the base checkpoint instead of being held in memory."""

import pytest
import safetensors.torch
import torch

from lagless import BEMA, DEMA, EMA, OUEMA, Averager


@pytest.fixture
def base(tmp_path):
    weights = {"a": torch.randn(30).to(torch.bfloat16), "b": torch.randn(4, 5)}
    (tmp_path / "base").mkdir()
    safetensors.torch.save_file(weights, tmp_path / "base" / "model.safetensors")
    return tmp_path / "base", {name: t.clone() for name, t in weights.items()}


def train(averager, weights):
    for n in range(5):
        for tensor in weights.values():
            tensor.mul_(0.9).add_(0.01 * n)
        averager.update()


def test_one_copy_and_the_same_bits(base):
    path, weights = base
    other = {name: t.clone() for name, t in weights.items()}
    rules = {"bema": BEMA.paper(update_freq=2), "ema": EMA(update_freq=2), "dema": DEMA.paper(update_freq=2)}
    stored, held = Averager(weights, rules, start=path), Averager(other, rules)
    train(stored, weights)
    train(held, other)
    assert set(stored.state_dict()["tensors"]) == {
        n for n in held.state_dict()["tensors"] if not n.startswith("bema.0/")
    }
    for name in rules:
        assert all(torch.equal(stored.read(name)[k], held.read(name)[k]) for k in weights)
    with stored.applied("bema"):
        inside = {k: t.clone() for k, t in weights.items()}
    assert all(torch.equal(inside[k], held.read("bema")[k].to(weights[k].dtype)) for k in weights)


def test_resume_needs_the_same_base(base, tmp_path):
    path, weights = base
    averager = Averager(weights, BEMA.paper(update_freq=2), start=path)
    with pytest.raises(ValueError, match=r"made with start=None, this Averager has start=\{'name': 'base'"):
        averager.load_state_dict(Averager(weights, EMA(), start=None).state_dict() | {"meta": meta(averager, None)})
    averager.load_state_dict(averager.state_dict())


def meta(averager, start):
    return averager.state_dict()["meta"] | {"start": start}


def test_resume_in_the_documented_order(base, tmp_path):
    path, weights = base
    other = {name: t.clone() for name, t in weights.items()}
    whole = Averager(other, BEMA.paper(update_freq=2), start=path)
    train(whole, other)
    train(whole, other)
    averager = Averager(weights, BEMA.paper(update_freq=2), start=path)
    train(averager, weights)
    averager.save(tmp_path / "state.safetensors")
    resumed = Averager(weights, BEMA.paper(update_freq=2), start=path)  # the live weights are no longer θ_0
    resumed.load(tmp_path / "state.safetensors")
    train(resumed, weights)
    assert all(torch.equal(resumed.read()[name], whole.read()[name]) for name in weights)


def test_tied_weights_are_found_under_any_of_their_names(base):
    path, weights = base
    tied = {"other": weights["a"], "b": weights["b"], "a": weights["a"]}
    averager = Averager(tied, BEMA.paper(update_freq=1), start=path)
    train(averager, weights)
    averages = averager.read()
    assert averages["a"] is averages["other"]


def test_the_base_may_be_an_attribute_of_the_module(base):
    path, weights = base
    module = torch.nn.Module()
    module.model = torch.nn.Module()
    module.model.other = module.model.a = torch.nn.Parameter(weights["a"])  # tied
    module.model.b = torch.nn.Parameter(weights["b"])
    stored, held = (Averager(module, BEMA.paper(update_freq=1), **options) for options in ({"start": path}, {}))
    for averager in (stored, held):
        averager.update()
    assert all(torch.equal(average, held.read()[name]) for name, average in stored.read().items())
    assert stored.read().keys() == {"model.a", "model.b", "model.other"}
    module.head = torch.nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match=r"has no tensor 'head', with or without its first levels; it holds a, b\."):
        Averager(module, BEMA.paper(), start=path)


def test_a_changed_base_is_noticed(base):
    path, weights = base
    averager = Averager(weights, BEMA.paper(update_freq=1), start=path)
    train(averager, weights)
    averager.read()
    tensors = safetensors.torch.load_file(path / "model.safetensors")
    tensors["a"][3] += 1.0
    safetensors.torch.save_file(tensors, path / "model.safetensors")
    with pytest.raises(RuntimeError, match="has changed since the run started .* Restore the base checkpoint"):
        averager.read()


def test_touching_the_base_does_no_harm(base):
    path, weights = base
    averager = Averager(weights, BEMA.paper(update_freq=1), start=path)
    train(averager, weights)
    before = averager.read()
    (path / "model.safetensors").touch()
    assert all(torch.equal(before[name], average) for name, average in averager.read().items())


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda p, w: Averager(w, OUEMA.paper(), start=p), "OUEMA reads θ_0 at every update; leave start out"),
        (lambda p, w: Averager(w, BEMA.paper(update_after=3), start=p), "replaces θ_0 at update_after=3"),
        (lambda p, w: Averager(w, BEMA.paper(), start=p, step=5), "but step=5"),
        (lambda p, w: Averager(w | {"c": torch.ones(1)}, BEMA.paper(), start=p), "has no tensor 'c'"),
        (
            lambda p, w: Averager(w | {"a": w["a"] + 1}, BEMA.paper(), start=p).update(),
            "a differs from the live weights",
        ),
    ],
)
def test_refusals(base, make, message):
    with pytest.raises(ValueError, match=message):
        make(*base)
