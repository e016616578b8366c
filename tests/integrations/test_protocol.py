"""Whatever holds an average does the same things under the same names."""

import inspect
import json

import pytest
import torch
from torch import nn

from lagless import BEMA, EMA, Averager
from lagless.averaging import HoldsAverages
from lagless.integrations._exports import as_text, describe
from lagless.optim import PACE, PrimalAveraging, Pullback
from lagless.rules import rule_from_dict

METHODS = ("updates", "read", "named_averages", "applied", "copy_to_model")


def tied():
    torch.manual_seed(0)
    first, last = nn.Linear(3, 3), nn.Linear(3, 3)
    last.weight = first.weight
    return nn.Sequential(first, nn.Tanh(), last)


def averager(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    holder = Averager(model, {"sgd": EMA(decay=0.8)})
    holder.attach(optimizer)
    return model, holder, optimizer, "sgd"


def pace(model):
    optimizer = PACE(model.named_parameters(), lr=0.05, average=BEMA(update_freq=2))
    return model, optimizer, optimizer, "pace"


def pullback(model):
    optimizer = Pullback(torch.optim.SGD(model.named_parameters(), lr=0.1), average=EMA(decay=0.8))
    return model, optimizer, optimizer, "pullback"


def primal(model):
    optimizer = PrimalAveraging(torch.optim.SGD(model.named_parameters(), lr=0.1), EMA(decay=0.8))
    return model, optimizer, optimizer, "primalaveraging"


def merged(model):
    from lagless.integrations.transformers._lora import MergedLoraAverager

    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["0"]))
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.1)
    holder = MergedLoraAverager(adapted, {"lora": EMA(decay=0.8)})
    holder.attach(optimizer)
    return adapted, holder, optimizer, "lora"


def train(model, optimizer, steps=5):
    for seed in range(steps):
        torch.manual_seed(seed)
        optimizer.zero_grad()
        (model(torch.randn(4, 3)) - 1).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("make", [averager, pace, pullback, primal, merged])
def test_every_holder_reads_applies_lists_and_copies_one_and_the_same_average(make):
    model = tied() if make is not merged else nn.Sequential(nn.Linear(3, 3), nn.Tanh())
    model, holder, optimizer, name = make(model)
    assert isinstance(holder, HoldsAverages)
    for method in METHODS:
        ours, theirs = (inspect.signature(getattr(kind, method)).parameters for kind in (type(holder), HoldsAverages))
        assert all(key in ours and ours[key].kind == theirs[key].kind for key in theirs)
    assert holder.updates(name) == 0
    with pytest.raises(RuntimeError, match="no average yet"):
        dict(holder.named_averages(name))
    train(model, optimizer)
    live = {key: p.detach().clone() for key, p in model.named_parameters()}
    listed = dict(holder.named_averages(name))
    assert holder.updates() == holder.updates(name) > 0
    assert listed and listed.keys() <= live.keys() and len(listed) == len({id(t) for t in listed.values()})
    read = holder.read()
    assert all(torch.equal(read[key], value) for key, value in listed.items())
    assert any(not torch.equal(live[key], value) for key, value in listed.items())
    with holder.applied(name):
        for key, value in listed.items():
            torch.testing.assert_close(model.get_parameter(key), value, rtol=1e-5, atol=1e-6)
    assert all(torch.equal(p, live[key]) for key, p in model.named_parameters())
    halves = dict(holder.named_averages(name, dtype=torch.bfloat16))
    assert {value.dtype for value in halves.values()} == {torch.bfloat16}
    holder.copy_to_model(name)
    for key, value in listed.items():
        torch.testing.assert_close(model.get_parameter(key).detach(), value, rtol=1e-5, atol=1e-6)
    for action in (holder.updates, holder.named_averages, holder.copy_to_model):
        with pytest.raises(ValueError, match="no average 'swa'"):
            action("swa")
    with pytest.raises(ValueError, match="no average 'swa'"), holder.applied("swa"):
        pass


@pytest.mark.parametrize("make", [pace, pullback, primal])
def test_an_optimizer_names_its_average_after_a_module_and_counts_a_tie_once(make):
    model = tied()
    _, optimizer, _, _ = make(model)
    outer = nn.ModuleDict({"inner": model})
    train(model, optimizer)
    names = [name for name, _ in outer.named_parameters()]
    assert [name for name, _ in optimizer.named_averages(module=outer)] == names
    read = optimizer.read(outer)
    assert read["inner.0.weight"] is read["inner.2.weight"] and len(read) == len(names) + 1
    with pytest.raises(ValueError, match="no parameter of this Linear is in this"):
        optimizer.named_averages(module=nn.Linear(2, 2))


@pytest.mark.parametrize("make", [pace, pullback, primal])
def test_copying_is_refused_while_the_average_is_in_place(make):
    model = tied()
    _, optimizer, _, _ = make(model)
    train(model, optimizer)
    with optimizer.applied(), pytest.raises(RuntimeError, match="cannot copy the average"):
        optimizer.copy_to_model()
    assert optimizer.steps_taken == 5


@pytest.mark.parametrize("make", [averager, pace, pullback, primal])
def test_export_model_writes_the_average_of_whatever_holds_one(make, tmp_path):
    transformers = pytest.importorskip("transformers")
    from lagless.integrations.distributed import export_model

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=32,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    model = transformers.LlamaForCausalLM(config)
    _, holder, optimizer, name = make(model)
    for seed in range(3):
        tokens = torch.randint(32, (2, 8), generator=torch.Generator().manual_seed(seed))
        optimizer.zero_grad()
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
    export_model(holder, model, tmp_path / "out")
    stored = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out")
    with holder.applied():
        for key, p in stored.named_parameters():
            torch.testing.assert_close(p, model.get_parameter(key), rtol=1e-6, atol=1e-7)
    assert any(not torch.equal(p, model.get_parameter(key)) for key, p in stored.named_parameters())
    record = json.loads((tmp_path / "out/lagless.json").read_text())
    assert (record["name"], record["weights"], record["step"]) == (name, "average", 3)
    assert record["updates"] == holder.updates() and rule_from_dict(record["rule"]).update_freq in (1, 2)
    assert record.get("optimizer") == (None if make is averager else type(optimizer).__name__)


def test_an_export_of_groups_with_rules_of_their_own_lists_these(tmp_path):
    first, second = nn.Linear(3, 3), nn.Linear(3, 3)
    rules = [EMA(decay=0.8), EMA(decay=0.5)]
    groups = [{"params": m.parameters(), "average": r} for m, r in zip((first, second), rules, strict=True)]
    optimizer = PACE(groups, lr=0.1)
    train(nn.Sequential(first, second), optimizer)
    record = json.loads(as_text(describe(optimizer, "pace")))
    assert [rule_from_dict(rule) for rule in record["rule"]] == rules and record["updates"] == 5
