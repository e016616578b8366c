"""``lagless learn`` as a user types it, on a tiny language model."""

import json
import sys

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from lagless.checkpoints import find_checkpoints
from lagless.cli import main
from lagless.lab.evaluation import held_out_documents, pad, sequence_losses
from lagless.lab.learn import split_documents, text_documents
from lagless.posthoc import combine_checkpoints

from .conftest import build


@pytest.fixture
def lagless(monkeypatch, capsys):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["lagless", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit:
            main()
        captured = capsys.readouterr()
        return exit.value.code, captured.out, captured.err

    return run


@pytest.fixture
def documents(tmp_path):
    animals, places = ["cat", "dog", "cow", "pig"], ["mat", "log", "rug", "cot"]
    texts = [
        f"The {a} sat on the {p} and the {b} sat on the log. " * 4 for a in animals for b in animals for p in places
    ]
    (tmp_path / "held.txt").write_text("<|endoftext|>".join(texts[:40]))
    return tmp_path / "held.txt"


SMALL = ["--length", "48", "--batch-size", "16", "--evaluations", "4", "--ridge", "0.01"]


def test_a_model_is_learned_written_and_reported(run, documents, tokenizer, tmp_path, lagless):
    code, printed, progress = lagless("learn", run, "--data", documents, "-o", tmp_path / "model", *SMALL)
    assert code == 0, progress
    lines = printed.splitlines()
    assert lines[0].startswith("learned weights: ") and "against live" in lines[0] and "against best rule" in lines[0]
    assert "degrees of freedom" in printed and "schedule  " in printed and "best so far" in progress
    assert not (tmp_path / "model.learning.json").exists()

    record = json.loads((tmp_path / "model" / "lagless.json").read_text())
    weights = np.array([source["weight"] for source in record["sources"]])
    assert [source["step"] for source in record["sources"]] == [0, 10, 20, 30, 40, 50, 60]
    assert weights.sum() == pytest.approx(1.0) and record["loss"] == "cross-entropy"

    # what is written is the sum, and its loss on the documents that report is the one that was reported
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    (expected,) = combine_checkpoints(find_checkpoints(run).checkpoints, weights)
    for name, tensor in model.state_dict().items():
        if name in expected:
            torch.testing.assert_close(tensor, expected[name], rtol=1e-6, atol=1e-7)
    parts = split_documents(text_documents(str(documents), tokenizer, 48))
    windows = [window for document in parts.report.documents for window in document.items]
    measured = sequence_losses(model, pad(windows)).mean.value
    assert measured == pytest.approx(record["learned"]["loss"]["value"], abs=1e-5)
    assert record["learned"]["data"]["report"]["sha256"] == parts.report.digest
    assert record["learned"]["data"]["fit"]["targets"] == parts.fit.size


def test_models_of_several_runs_are_merged(run, documents, tokenizer, tmp_path, lagless):
    other = build(tokenizer, seed=0)
    with torch.no_grad():
        for tensor in other.parameters():
            tensor.add_(0.002 * torch.randn_like(tensor))
    other.save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    models = [run / "checkpoint-50", tmp_path / "other", run]
    code, printed, errors = lagless("learn", "--merge", *models, "--data", documents, "-o", tmp_path / "model", *SMALL)
    assert code == 0, errors
    assert "against best checkpoint" in printed and "checkpoint-60 +" in printed and "schedule" not in printed
    record = json.loads((tmp_path / "model" / "lagless.json").read_text())
    assert [source["name"] for source in record["sources"]] == ["checkpoint-50", "other", "checkpoint-60"]
    (expected,) = combine_checkpoints([*models[:2], run / "checkpoint-60"], record["weights"])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32).state_dict()
    for name, tensor in expected.items():
        torch.testing.assert_close(model[name], tensor, rtol=1e-6, atol=1e-7)
    assert record["learned"]["differences"].keys() == {"best checkpoint", "prior"}


def test_groups_of_tensors_are_learned_and_written(run, documents, tokenizer, tmp_path, lagless):
    given = ["--group", "embeddings=embed", "--group", "norms=norm", "--targets-per-weight", "50"]
    code, printed, errors = lagless("learn", run, "--data", documents, "-o", tmp_path / "model", *SMALL, *given)
    assert code == 0, errors
    assert all(f"\n{name} " in printed for name in ("embeddings", "norms", "rest"))
    record = json.loads((tmp_path / "model" / "lagless.json").read_text())
    assert record["groups"] == {"embeddings": "embed", "norms": "norm"} and record["steps"] == list(range(0, 61, 10))
    sums = combine_checkpoints(find_checkpoints(run).checkpoints, record["weights"])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    for name, tensor in model.state_dict().items():
        if name in sums[0]:
            expected = sums[0 if "embed" in name else 1 if "norm" in name else 2][name]
            torch.testing.assert_close(tensor, expected, rtol=1e-6, atol=1e-7)
    parts = split_documents(text_documents(str(documents), tokenizer, 48))
    windows = [window for document in parts.report.documents for window in document.items]
    measured = sequence_losses(model, pad(windows)).mean.value
    assert measured == pytest.approx(record["learned"]["loss"]["value"], abs=1e-5)


def test_a_loss_of_ones_own(run, documents, tmp_path, monkeypatch, lagless):
    (tmp_path / "my_losses.py").write_text(
        "import torch\n"
        "def first_words(model, tokenizer, rows):\n"
        "    ids = torch.tensor([tokenizer(row['text'])['input_ids'][:24] for row in rows])\n"
        "    logits = model(input_ids=ids).logits[:, :-1]\n"
        "    return torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction='none').mean(1)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    own = ["--loss", "my_losses:first_words", "--targets-per-weight", "1"]
    code, _, errors = lagless("learn", run, "--data", documents, "-o", tmp_path / "model", *SMALL, *own)
    assert code == 0, errors
    record = json.loads((tmp_path / "model" / "lagless.json").read_text())
    assert record["loss"] == "my_losses:first_words"
    assert record["learned"]["data"]["fit"]["targets"] == record["learned"]["data"]["fit"]["documents"]


@pytest.mark.parametrize(
    "body, message",
    [
        ("return 1.0", "returned float; it must return shape"),
        ("return torch.zeros(len(rows) + 1)", r"it must return shape"),
        ("return torch.zeros(len(rows))", "no gradient"),
        ("return rows.loss", "my_bad_loss:f"),
        (
            "return torch.full((len(rows),), float('nan')) * next(model.parameters()).sum()",
            "not finite at checkpoint-0",
        ),
    ],
)
def test_a_bad_loss_of_ones_own_is_named(run, documents, tmp_path, monkeypatch, lagless, body, message):
    (tmp_path / "my_bad_loss.py").write_text(f"import torch\ndef f(model, tokenizer, rows):\n    {body}\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "my_bad_loss", raising=False)
    own = ["--loss", "my_bad_loss:f", "--targets-per-weight", "1"]
    code, _, errors = lagless("learn", run, "--data", documents, "-o", tmp_path / "model", *SMALL, *own)
    assert code == 2 and message in errors and not (tmp_path / "model").exists()


@pytest.mark.parametrize(
    "more, message",
    [
        (["--loss", "my_losses"], "it must be module:function"),
        (["--loss", "no_such_module_at_all:f"], "No module named"),
        (["--loss", "json:nothing"], "json has no function nothing"),
        (["--mode", "best"], "modes="),
        (["--targets-per-weight", "100000"], "at least 100000 are needed"),
        (["--steps", "50,60"], "3 or more"),
        (["--ema-power", "0.5"], "without --prior"),
        (["--prior", "ema", "--decay", "2"], "decay"),
        (["--group", "norms"], "NAME=REGEX"),
        (["--group", "norms=nothing"], "finds no tensor"),
        (["--group", "a=mlp", "--group", "a=norm"], "the same name"),
        (["--merge"], "1 given"),
        (["--merge", "--steps", "10,20"], "have no order"),
    ],
)
def test_bad_input_is_refused_in_one_line(run, documents, tmp_path, lagless, more, message):
    code, _, errors = lagless("learn", run, "--data", documents, "-o", tmp_path / "model", *SMALL, *more)
    assert code == 2 and message in errors and not (tmp_path / "model").exists()


def test_documents_are_split_by_their_ends_and_count_once(tmp_path, tokenizer):
    (tmp_path / "some.txt").write_text("one text<|endoftext|>\n another<|endoftext|>one text<|endoftext|>")
    found = held_out_documents(str(tmp_path / "some.txt"), tokenizer, length=6)
    end = tokenizer.eos_token_id
    assert list(found) == ["one text", "another"]
    assert [token for ids, _ in found["one text"] for token in ids] == [*tokenizer("one text")["input_ids"], end]
    assert [len(ids) for ids, _ in found["another"]] == [6, 2]
    with pytest.raises(ValueError, match="2 documents; at least 10"):
        split_documents(text_documents(str(tmp_path / "some.txt"), tokenizer, 6))
