"""Cross-entropy on fixed held-out sequences."""

import gzip
import json
import math

import pytest
import torch
from datasets import Dataset

from lagless.lab.data import split_rows
from lagless.lab.evaluation import Losses, Sequences, held_out_sequences, sequence_losses
from lagless.lab.evaluation._rows import read_rows
from lagless.lab.recipes import PretrainingData


def rows(path, records):
    with gzip.open(path, "wt") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)
    return str(path)


def test_it_is_the_loss_of_transformers(model, text, tokenizer):
    sequences = held_out_sequences(str(text[0]), tokenizer, length=24, count=5)
    found = sequence_losses(model, sequences, batch_size=2)
    for i in range(5):
        expected = model(input_ids=sequences.tokens[i : i + 1], labels=sequences.labels[i : i + 1]).loss.detach()
        assert float(found.nats[i] / found.targets[i]) == pytest.approx(float(expected), rel=1e-6)
    assert found.targets.tolist() == [23] * 5


def test_padding_and_batches_change_nothing(model, tokenizer, tmp_path):
    data = rows(tmp_path / "r.jsonl.gz", [{"question": "a" * n, "answer": "b" * 3} for n in range(1, 8)])
    sequences = held_out_sequences(data, tokenizer, length=64, count=None)
    assert (sequences.tokens == 0).any()
    one, many = (sequence_losses(model, sequences, batch_size) for batch_size in (1, 7))
    torch.testing.assert_close(one.nats, many.nats, rtol=1e-6, atol=0)
    alone = sequences.tokens[0][: int((sequences.tokens[0] != 0).sum())]
    short = sequence_losses(model, Sequences(alone[None], sequences.labels[:1, : len(alone)]))
    assert float(short.nats[0]) == pytest.approx(float(one.nats[0]), rel=1e-6)


def test_the_models_mode_is_kept(model, text, tokenizer):
    model.train()
    sequence_losses(model, held_out_sequences(str(text[0]), tokenizer, length=24, count=2))
    assert model.training
    model.eval()


def test_standard_errors_of_a_ratio():
    nats, targets = torch.tensor([2.0, 6.0, 5.0], dtype=torch.float64), torch.tensor([1, 2, 2])
    mean = 13 / 5
    error = math.sqrt(sum((n - mean * t) ** 2 for n, t in ((2, 1), (6, 2), (5, 2))) * 3 / 2) / 5
    found = Losses(nats, targets).mean
    assert (found.value, found.n) == (pytest.approx(mean), 3)
    assert found.standard_error == pytest.approx(error)


def test_differences_are_paired():
    nats, targets = torch.rand(50, dtype=torch.float64) * 100, torch.full((50,), 10)
    paired = Losses(nats + 1.0, targets).difference(Losses(nats, targets))
    assert paired.value == pytest.approx(0.1)
    assert paired.standard_error < 1e-12 < Losses(nats, targets).mean.standard_error
    with pytest.raises(ValueError, match="not on the same sequences"):
        Losses(nats, targets).difference(Losses(nats, targets + 1))


def test_text_is_cut_into_windows_that_do_not_overlap(tokenizer, tmp_path):
    (tmp_path / "t.txt").write_text("abcdefghij\n<|endoftext|>\nklmno")
    sequences = held_out_sequences(str(tmp_path / "t.txt"), tokenizer, length=4, count=None)
    assert [tokenizer.decode(row) for row in sequences.tokens] == ["abcd", "efgh", "ij<eos>k", "lmno"]


def test_only_the_reply_counts(tokenizer, tmp_path):
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    pair = {"instruction": "add", "input": "1 2", "output": "3"}
    for record, reply in (
        ({"messages": messages}, "hello<eos>"),
        (pair, "3<eos>"),
        ({"question": "q", "answer": "a"}, " a<eos>"),
    ):
        data = rows(tmp_path / f"{len(reply)}.jsonl.gz", [record])
        sequences = held_out_sequences(data, tokenizer, length=99, count=1)
        counted = sequences.labels[0] != -100
        assert tokenizer.decode(sequences.tokens[0][counted]) == reply
    whole = tokenizer.decode(held_out_sequences(str(tmp_path / "6.jsonl.gz"), tokenizer, length=99, count=1).tokens[0])
    assert whole == "<user>add\n\n1 2<eos><assistant>3<eos>"


def test_the_choice_is_fixed_by_the_seed(tokenizer, text):
    one, same, other = (
        held_out_sequences(str(text[0]), tokenizer, length=7, count=9, seed=seed).tokens for seed in (1, 1, 2)
    )
    assert torch.equal(one, same) and not torch.equal(one, other)


def test_data_that_do_not_fit_are_refused(tokenizer, tmp_path, text):
    with pytest.raises(ValueError, match="has columns x; held-out data need text, messages"):
        held_out_sequences(rows(tmp_path / "x.jsonl.gz", [{"x": 1}]), tokenizer, length=8)
    with pytest.raises(ValueError, match="gives 60 sequences of up to 24 tokens, and 200 are asked for"):
        held_out_sequences(str(text[0]), tokenizer, length=24)
    with pytest.raises(ValueError, match="is no file"):
        held_out_sequences(str(tmp_path / "missing.txt"), tokenizer, length=8)
    (tmp_path / "a.doc").write_text("a")
    with pytest.raises(ValueError, match="its type is not one of .json"):
        held_out_sequences(str(tmp_path / "a.doc"), tokenizer, length=8)


@pytest.mark.parametrize("splits", [["train", "test"], ["train"], ["validation"]])
def test_the_split_of_a_hub_data_set(splits, monkeypatch, tokenizer):
    """Its test split; where there is none, the rows of train that recipes hold out; or the one that is named."""
    rows = {split: Dataset.from_dict({"text": [f"{split} {i} " * 20 for i in range(400)]}) for split in splits}
    monkeypatch.setattr("datasets.get_dataset_split_names", lambda source, name=None: splits)
    monkeypatch.setattr("datasets.load_dataset", lambda source, name=None, split=None: rows[split])
    if "train" not in splits:
        with pytest.raises(ValueError, match="has the splits validation; name one with --split"):
            read_rows("someone/set", split=None)
        assert len(read_rows("someone/set", split="validation")) == 400
        return
    found = [row["text"] for row in read_rows("someone/set", split=None)]
    if "test" in splits:
        assert found == rows["test"]["text"]
    else:
        source = PretrainingData(kind="pretraining", path="someone/set", sequence_length=8)
        monkeypatch.setattr("lagless.lab.data._rows.load_dataset", lambda *a, streaming, **o: rows["train"])
        assert found == split_rows(source)[1]["text"] and 0 < len(found) < 20
    assert len(held_out_sequences("someone/set", tokenizer, length=16, count=2).tokens) == 2
