"""Data: every kind of file, splits that do not leak, conversations, packing, noise."""

import bz2
import gzip
import json
import lzma
import re

import numpy as np
import pytest

datasets = pytest.importorskip("datasets")
pytest.importorskip("transformers")

from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: E402
from transformers import PreTrainedTokenizerFast  # noqa: E402

from lagless.lab.data import conversations, packed, read_rows, replace_spans, split_rows  # noqa: E402
from lagless.lab.recipes import PretrainingData, SftData, SpanNoise  # noqa: E402

ROWS = [{"instruction": f"Say {i}", "output": "o" * i, "input": "", "set": i // 4} for i in range(40)]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def tokenizer():
    """One token for each word of digits; <eos> is 0."""
    words = Tokenizer(models.WordLevel({"<eos>": 0, "<unk>": 1, **{str(i): i for i in range(2, 200)}}, "<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", unk_token="<unk>")


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def sft(path, **fields):
    pair = {} if "messages_column" in fields else {"prompt_column": "instruction", "response_column": "output"}
    return SftData(kind="sft", path=str(path), max_length=64, loss_on="all", **{**pair, **fields})


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.xz", ".jsonl.bz2", ".csv", ".parquet", ""])
def test_rows_of_files(suffix, tmp_path):
    path = tmp_path / f"rows.of.mine{suffix}"
    table = datasets.Dataset.from_list(ROWS)
    if suffix == ".csv":
        path.write_text("instruction,output\n" + "".join(f"{r['instruction']},{r['output']}x\n" for r in ROWS))
    elif suffix == ".parquet":
        table.to_parquet(path)
    elif suffix == "":
        datasets.DatasetDict({"train": table}).save_to_disk(path)
    else:
        compress = {".gz": gzip.compress, ".xz": lzma.compress, ".bz2": bz2.compress}.get(path.suffix, bytes)
        path.write_bytes(compress(lines(ROWS)))
    rows = read_rows(str(path))
    assert [row["instruction"] for row in rows] == [row["instruction"] for row in ROWS]


@pytest.mark.parametrize("suffix", [".txt", ".txt.xz"])
def test_documents_of_a_text(suffix, tmp_path):
    path = tmp_path / f"books{suffix}"
    text = b"One.\n\nStill one.\n<|endoftext|>\nTwo.\n<|endoftext|>\n\n"
    path.write_bytes(lzma.compress(text) if suffix.endswith("xz") else text)
    assert read_rows(str(path))["text"] == ["One.\n\nStill one.", "Two."]
    assert read_rows(str(path), separator="\n\n")["text"][:2] == [
        "One.",
        "Still one.\n<|endoftext|>\nTwo.\n<|endoftext|>",
    ]


def test_unreadable_data(tmp_path, monkeypatch):
    for path in (tmp_path / "none", "none.jsonl", "./none", "folder/none.txt.gz"):
        with pytest.raises(ValueError, match=f"data: {re.escape(str(path))} does not exist"):
            read_rows(str(path))
    for name, content, message in [
        ("x.bin", b"", "is none of .jsonl"),
        ("x.jsonl", b'{"a": 1}\n{"a": \n', "is no readable .json"),
        ("x.txt", b"\xff\xfe\xff", "cannot be read"),
        ("x.txt.xz", b"no xz", "cannot be read"),
    ]:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=message):
            read_rows(str(tmp_path / name))
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match="no folder of save_to_disk"):
        read_rows(str(tmp_path / "folder"))
    datasets.DatasetDict({"test": datasets.Dataset.from_list(ROWS)}).save_to_disk(tmp_path / "saved")
    with pytest.raises(ValueError, match="has no split train; it has test"):
        read_rows(str(tmp_path / "saved"))

    def offline(*args, **options):
        raise ConnectionError("no network")

    monkeypatch.setattr("lagless.lab.data._rows.load_dataset", offline)
    with pytest.raises(ValueError, match=r"someone/set \(small\), split train, .* cannot be had .*no network"):
        read_rows("someone/set", config="small")


def test_split_by_row_and_by_group(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(lines(ROWS))
    train, held_out = split_rows(sft(path, validation_fraction=0.25))
    assert len(train) + len(held_out) == 40 and 4 <= len(held_out) <= 16
    assert not set(train["instruction"]) & set(held_out["instruction"])
    again, other = (split_rows(sft(path, validation_fraction=0.25, split_seed=seed))[1] for seed in (42, 43))
    assert again["instruction"] == held_out["instruction"] != other["instruction"]
    train, held_out = split_rows(sft(path, validation_fraction=0.3, group_column="set"))
    assert held_out["set"] and not set(train["set"]) & set(held_out["set"])
    with pytest.raises(ValueError, match=r"data.group_column: .* no column author; it has instruction"):
        split_rows(sft(path, group_column="author"))


@pytest.mark.parametrize("fraction", [1e-9, 1 - 1e-9])
@pytest.mark.parametrize("groups", [None, "set"])
def test_neither_part_is_empty(fraction, groups, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(lines(ROWS))
    sizes = [len(part) for part in split_rows(sft(path, validation_fraction=fraction, group_column=groups))]
    assert sorted(sizes) == ([4, 36] if groups else [1, 39]) and (sizes[1] < sizes[0]) == (fraction < 0.5)


def test_one_example_cannot_be_split(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(lines(ROWS[:1]))
    with pytest.raises(ValueError, match=r"of 1 rows in .*rows.jsonl, .* data.validation_path"):
        split_rows(sft(path))
    path.write_bytes(lines(ROWS[:4]))
    with pytest.raises(ValueError, match=r"of 4 rows .* which are 1 groups of data.group_column='set'"):
        split_rows(sft(path, group_column="set"))


def test_split_of_a_stream_is_that_of_the_rows(monkeypatch):
    """So that a data set may be streamed or downloaded."""
    table = datasets.Dataset.from_list(ROWS)
    monkeypatch.setattr(
        "lagless.lab.data._rows.load_dataset",
        lambda *args, streaming, **options: table.to_iterable_dataset() if streaming else table,
    )
    source = sft("someone/set", validation_fraction=0.25)
    for whole, stream in zip(split_rows(source), split_rows(source, streaming=True), strict=True):
        assert isinstance(stream, datasets.IterableDataset)
        assert list(whole) == list(stream)


def test_held_out_file(tmp_path):
    for name in ("train", "valid"):
        (tmp_path / f"{name}.jsonl").write_bytes(lines([{"instruction": name, "output": name}]))
    train, held_out = split_rows(sft(tmp_path / "train.jsonl", validation_path=str(tmp_path / "valid.jsonl")))
    assert (train["output"], held_out["output"]) == (["train"], ["valid"])


def test_conversations(tokenizer):
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] + ' ' }}{% endfor %}"
    table = datasets.Dataset.from_list(
        [{"instruction": "2 3", "input": "", "output": "4"}, {"instruction": "5", "input": "6", "output": "7 " * 70}]
    )
    first, second = conversations(table, sft("x", input_column="input"), tokenizer)["messages"]
    assert first == [{"role": "user", "content": "2 3"}, {"role": "assistant", "content": "4"}]
    assert second[0]["content"] == "5\n\n6"
    short = conversations(table, sft("x", too_long="drop"), tokenizer)["messages"]
    assert short == [first]
    with pytest.raises(ValueError, match="data.max_length=64: every conversation of x is longer"):
        conversations(table.select([1]), sft("x", too_long="drop"), tokenizer)
    with pytest.raises(ValueError, match=r"prompt_column: x has no column question; it has instruction, input, output"):
        conversations(table, sft("x", prompt_column="question"), tokenizer)
    with pytest.raises(ValueError, match="messages_column: x has no column messages"):
        conversations(table, sft("x", messages_column="messages"), tokenizer)
    with pytest.raises(ValueError, match=r"has 'hello' in chat, which is no list of \{role, content\}"):
        conversations(datasets.Dataset.from_dict({"chat": ["hello"]}), sft("x", messages_column="chat"), tokenizer)
    chat = datasets.Dataset.from_dict({"chat": [[{"role": "user", "content": "2", "id": 1}]], "other": [0]})
    found = conversations(chat, sft("x", messages_column="chat"), tokenizer)
    assert found.column_names == ["messages"] and found[0]["messages"] == [{"role": "user", "content": "2"}]


def test_kept_conversations_are_fixed(tokenizer):
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    table = datasets.Dataset.from_list(ROWS)
    kept = [conversations(table, sft("x", split_seed=seed), tokenizer, keep=5)["messages"] for seed in (1, 1, 2)]
    assert len(kept[0]) == 5 and kept[0] == kept[1] != kept[2]


def test_packing(tokenizer):
    documents = [" ".join(map(str, range(start, start + size))) for start, size in ((2, 5), (10, 1), (20, 9), (40, 2))]
    stream = [t for d in documents for t in (*map(int, d.split()), 0)]  # 21 tokens
    rows = datasets.Dataset.from_dict({"text": documents})
    shared = {"column": "text", "length": 4, "source": "x"}
    found = packed(rows, tokenizer, **shared, identity="a")
    assert found["input_ids"] == [stream[i : i + 4] for i in range(0, 20, 4)]
    assert packed(rows, tokenizer, **shared, count=2, identity="a")["input_ids"] == found["input_ids"][:2]
    other = datasets.Dataset.from_dict({"text": documents[::-1]})
    assert packed(other, tokenizer, **shared, identity="b")["input_ids"] != found["input_ids"]
    # What has the same identity is not tokenized again.
    kept = packed(datasets.Dataset.from_dict({"text": ["5 5 5 5"]}), tokenizer, **shared, identity="a")
    assert kept["input_ids"] == found["input_ids"]
    with pytest.raises(ValueError, match=r"text_column: x has no column body; it has text"):
        packed(rows, tokenizer, column="body", length=4, source="x", identity="a")
    with pytest.raises(ValueError, match="sequence_length=400: x has fewer tokens"):
        packed(rows, tokenizer, column="text", length=400, source="x", identity="a")
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no end-of-text token"):
        packed(rows, tokenizer, **shared, identity="c")


def test_noise():
    """Sequence i consists of the numbers 1000 i, ..., so that every token tells where it is from."""
    count, length, block = 400, 64, 8
    features = datasets.Features({"input_ids": datasets.List(datasets.Value("int32"), length=length)})
    tokens = (1000 * np.arange(count)[:, None] + np.arange(length)).astype(np.int32)
    clean = datasets.Dataset.from_dict({"input_ids": tokens}, features=features)
    noise = SpanNoise(block=block)
    noisy = np.array(replace_spans(clean, noise)["input_ids"])
    assert np.array_equal(noisy, replace_spans(clean, noise)["input_ids"])
    assert not np.array_equal(noisy, replace_spans(clean, SpanNoise(block=block, seed=1))["input_ids"])

    foreign = (noisy // 1000 != np.arange(count)[:, None]).reshape(count, -1, block)
    assert np.array_equal(foreign.any(-1), foreign.all(-1))  # whole blocks
    spans = noisy.reshape(count, -1, block)[foreign.all(-1)]
    assert (np.diff(spans, axis=-1) == 1).all()  # each from within one other sequence
    corrupted = foreign.all(-1).any(-1)
    # Binomial with q = 0.2: 4 standard deviations are 4 √(400 · 0.2 · 0.8) = 32.
    assert abs(corrupted.sum() - 80) < 32
    # U(0.2, 0.4) of 8 blocks, rounded: 2 or 3, each about half the time.
    replaced = foreign.all(-1).sum(-1)[corrupted]
    assert set(replaced) == {2, 3} and 0.3 < (replaced == 2).mean() < 0.7
    assert np.array_equal(replace_spans(clean, SpanNoise(sequences=0.0, block=block))["input_ids"], tokens)
    with pytest.raises(ValueError, match=r"block=65 is longer than data.sequence_length=64"):
        replace_spans(clean, SpanNoise(block=65))
    with pytest.raises(ValueError, match="there is one only"):
        replace_spans(clean.select([0]), noise)


def test_text_is_split_by_document(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("<|endoftext|>".join(map(str, range(50))))
    source = PretrainingData(kind="pretraining", path=str(path), sequence_length=8, validation_fraction=0.3)
    train, held_out = split_rows(source)
    assert sorted([*train["text"], *held_out["text"]], key=int) == [str(i) for i in range(50)]


@pytest.mark.parametrize("documents", [1, 3])
@pytest.mark.parametrize("fraction", [0.05, 0.3])
def test_long_documents_are_cut_by_position(documents, fraction, tmp_path):
    """A book is one row: its end is held out, in whole words."""
    path = tmp_path / "book.txt"
    books = [" ".join(f"{book}w{i}" for i in range(1000)) for book in range(documents)]
    path.write_text("<|endoftext|>".join(books))
    source = PretrainingData(
        kind="pretraining", path=str(path), sequence_length=8, validation_fraction=fraction, split_seed=0
    )
    train, held_out = split_rows(source, streaming=True)
    assert [head + tail for head, tail in zip(train["text"], held_out["text"], strict=True)] == books
    assert len(held_out["text"][0].split()) == pytest.approx(1000 * fraction, rel=0.05)  # words have two lengths
