"""Text, tokens, evaluation and sentences of the demo, each on its own."""

import math
import random

import pytest
import torch

pytest.importorskip("transformers")

from lagless import BEMA, EMA  # noqa: E402
from lagless.lab.data import Document, train_tokenizer  # noqa: E402
from lagless.lab.demo import DemoResult, Difference, Plan, Row, Shape  # noqa: E402
from lagless.lab.demo._data import load_corpus  # noqa: E402
from lagless.lab.demo._evaluate import paired_difference, sequence_losses  # noqa: E402
from lagless.lab.demo._results import Candidate, Sample  # noqa: E402
from lagless.lab.demo._tokens import (  # noqa: E402
    encode,
    held_out_sequences,
    random_batches,
)
from lagless.lab.demo._train import build_model  # noqa: E402
from lagless.lab.demo._words import findings  # noqa: E402


def test_standard_library_is_split_by_file_and_the_same_each_time():
    corpus, again = load_corpus(), load_corpus()
    assert corpus == again
    names = {split: {document.name for document in texts} for split, texts in corpus.documents.items()}
    assert not (names["train"] & names["validation"] or names["train"] & names["test"])
    assert not names["validation"] & names["test"]
    assert not any("site-packages" in name or "/test" in name for name in set.union(*names.values()))
    assert corpus.nbytes("train") > 4 * corpus.nbytes("test") > 400_000


def test_a_copied_file_is_not_on_both_sides(tmp_path):
    text = "\n".join(f"line {i} " + "x" * 60 for i in range(200))
    for i in range(50):
        (tmp_path / f"{i}.txt").write_text(f"{text}\n{i % 25}")
    corpus = load_corpus(sorted(tmp_path.iterdir()))
    texts = [document.text for split in corpus.documents.values() for document in split]
    assert len(texts) == len(set(texts)) == 25


def test_pieces_of_one_file_are_all_of_it(tmp_path):
    lines = [f"line {i} of some text\n" for i in range(20_000)]
    (tmp_path / "one.txt").write_text("".join(lines))
    corpus = load_corpus([tmp_path / "one.txt"])
    pieces = [document for split in corpus.documents.values() for document in split]
    pieces.sort(key=lambda piece: int(piece.name.rpartition("#")[2]))
    assert "".join(piece.text for piece in pieces) == "".join(lines)


@pytest.fixture(scope="module")
def documents():
    words = random.Random(0)
    return [
        Document(str(i), " ".join(words.choices(["alpha", "beta", "gamma", "delta", "ζ"], k=80 + i))) for i in range(9)
    ]


def test_tokens_decode_to_the_text(documents):
    tokenizer = train_tokenizer(documents, 280)
    for document, tokens in zip(documents, encode(tokenizer, documents), strict=True):
        assert tokens[0] == tokens[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(tokens, skip_special_tokens=True) == document.text


def test_batches_repeat_with_the_seed_and_held_out_sequences_do_not_overlap():
    tokens = [torch.arange(1000), torch.arange(1000, 1500)]
    one, same, other = (next(random_batches(tokens, 4, 16, seed)) for seed in (0, 0, 1))
    assert torch.equal(one, same) and not torch.equal(one, other)
    assert torch.equal(one - one[:, :1], torch.arange(16).expand(4, 16))
    sequences, files = held_out_sequences(tokens, 64, 10)
    assert sequences.shape == (10, 64) and len(sequences.unique()) == sequences.numel()
    assert torch.equal(files, (sequences[:, 0] >= 1000).long())
    assert held_out_sequences(tokens, 64, 100)[0].shape == (15 + 7, 64)


def test_sequence_losses_are_those_of_transformers(documents):
    tokenizer = train_tokenizer(documents, 280)
    model = build_model(Plan(shape=Shape(280, 16, 32, 1, 2)), tokenizer)
    tokens = torch.randint(len(tokenizer), (11, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        each = [float(model(input_ids=row[None], labels=row[None]).loss) for row in tokens]
    assert sequence_losses(model, tokens).tolist() == pytest.approx(each, rel=1e-5)


def test_paired_difference_by_hand():
    reference = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
    losses = reference + torch.tensor([0.1, 0.3, 0.2, 0.6])
    # One file each: the usual standard error of a mean.
    each = paired_difference(losses, reference, torch.arange(4))
    deviation = math.sqrt(sum((d - 0.3) ** 2 for d in (0.1, 0.3, 0.2, 0.6)) / 3)
    assert (each.mean, each.standard_error) == pytest.approx((0.3, deviation / 2))
    # Two files of two: their sums of d - 0.3 are -0.2 and 0.2.
    two = paired_difference(losses, reference, torch.tensor([0, 0, 1, 1]))
    assert two.standard_error == pytest.approx(math.sqrt(2 / 1 * (0.04 + 0.04) / 16))


def test_labels_are_spread_about_their_lines():
    pytest.importorskip("matplotlib")
    from lagless.lab.demo._plots import _spread

    assert _spread([0.0, 5.0], 1.0, -9.0, 9.0) == [0.0, 5.0]
    assert _spread([0.0, 0.0, 0.0, 9.0], 1.0, -9.0, 9.0) == pytest.approx([-1.0, 0.0, 1.0, 9.0])
    assert _spread([0.0, 1.5, 1.6], 1.0, -9.0, 9.0) == pytest.approx([0.0, 1.05, 2.05])
    assert _spread([0.0, 0.0, 2.0], 1.0, 0.0, 2.0) == pytest.approx([0.0, 1.0, 2.0])


def test_the_same_hash_of_names_everywhere():
    from lagless.lab.demo._data import _fraction

    assert _fraction("argparse.py") == pytest.approx(0.7861274150892384)


@pytest.mark.parametrize(
    ("difference", "expected", "never"),
    [
        (Difference(-0.10, 0.01), ["clearly lower for EMA", "worth having here: the best"], ["not worth"]),
        (Difference(0.10, 0.01), ["clearly higher for EMA", "not worth having"], ["clearly lower"]),
        (Difference(-0.10, 0.06), ["not clearly different for EMA", "not worth having"], ["clearly lower"]),
    ],
)
def test_sentences_say_what_the_numbers_say(tmp_path, difference, expected, never):
    text = " ".join(findings(made_up(tmp_path, difference, Difference(0.0, 0.01))))
    assert all(part in text for part in expected), text
    assert not any(part in text for part in never), text


@pytest.mark.parametrize(
    ("difference", "expected"),
    [
        (Difference(-0.10, 0.01), "BEMA beats EMA"),
        (Difference(0.10, 0.01), "BEMA loses to EMA"),
        (Difference(-0.10, 0.06), "BEMA and EMA cannot be told apart"),
    ],
)
def test_sentences_compare_bema_with_ema(tmp_path, difference, expected):
    text = " ".join(findings(made_up(tmp_path, Difference(-0.1, 0.01), difference)))
    assert text.count(expected) == 2


def made_up(out, difference, comparison):
    rows = tuple(
        Row(prefix + type(rule).__name__, "folder", Candidate("name", rule, -0.1, 1.0, 2.0, 0.0), 3.0, difference)
        for prefix in ("", "best ")
        for rule in (EMA(), BEMA.paper())
    )
    candidates = tuple(row.candidate for row in rows)
    sample = Sample("file", "a", "b", "c")
    return DemoResult(
        out, Plan(), "text", 1, 1.0, 3.1, rows, comparison, comparison, candidates, {"live": []}, sample, 3, 99
    )
