"""Cards of averages, and averages on the hub."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import save_file
from tests.integrations.hub_server import Hub, serving
from torch import nn
from typer.testing import CliRunner

from lagless import EMA, Averager, WindowAverage
from lagless.checkpoints import CheckpointError
from lagless.cli import app
from lagless.integrations.distributed import export_model
from lagless.integrations.hub import push_to_hub
from lagless.posthoc import average_checkpoints

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # huggingface_hub's own request


@pytest.fixture
def run(tmp_path: Path) -> Path:
    for step in (10, 20, 30, 40):
        folder = tmp_path / "run" / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        save_file({"w": torch.full((4, 4), float(step))}, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps({"model_type": "llama", "_name_or_path": "org/base"}))
        (folder / "README.md").write_text(
            "---\nlanguage: en\nlicense: apache-2.0\ntags:\n- trl\n---\n\nThe live model."
        )
    return tmp_path / "run"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with serving() as server:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.endpoint)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)  # its server is another protocol
        monkeypatch.setenv("HF_TOKEN", "hf_test")
        yield server


def test_the_card_says_what_was_averaged_and_how_to_do_it_again(run: Path, tmp_path: Path) -> None:
    average_checkpoints(run, {"window": WindowAverage(window=2, update_freq=10)}, tmp_path / "out")
    folder = tmp_path / "out" / "window"
    card = ModelCard.load(folder / "README.md")
    assert card.data.base_model == "org/base" and card.data.to_dict()["base_model_relation"] == "finetune"
    assert card.data.tags == ["trl", "lagless", "weight-averaging"]
    assert (card.data.language, card.data.license, card.data.library_name) == ("en", "apache-2.0", "transformers")
    assert "The live model" not in card.text
    assert "`WindowAverage(window=2, update_freq=10)`" in card.text
    assert "| 30 | `checkpoint-30` | +0.500000 | 1.0000 |" in card.text
    assert "| 40 | `checkpoint-40` | +0.500000 | 0.5000 |" in card.text
    assert str(tmp_path) not in card.content
    assert "README.md" in json.loads((folder / "lagless.json").read_text())["files"]

    # what it says makes the same weights
    command = ["average", str(run), "--weights", str(folder / "lagless.json"), "-o", str(tmp_path / "again")]
    assert "lagless average RUN --weights lagless.json -o OUT" in card.text
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    files = [path / "model.safetensors" for path in (folder, tmp_path / "again")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_the_card_of_an_average_that_followed_training(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    averager = Averager(model, EMA(half_life=2.0))
    averager.attach(optimizer)
    for _ in range(8):
        optimizer.zero_grad()
        model(torch.ones(2, 4)).sum().backward()
        optimizer.step()
    export_model(averager, model, tmp_path / "out")
    record = json.loads((tmp_path / "out" / "lagless.json").read_text())
    text = (tmp_path / "out" / "README.md").read_text()
    assert "at optimizer step 8, after 8 updates" in text and "`EMA(half_life=2.0)`" in text
    assert f"mean age: {record['mean_age']:.4g}" in text
    assert record["schedule"]["1"] == pytest.approx(1.0 - 0.5**4)  # half-lives leave 0.5^(8/2) of θ_0
    assert "| 8 | 0." in text


def test_an_average_goes_to_a_repository_of_its_own(run: Path, tmp_path: Path, hub: Hub) -> None:
    average_checkpoints(run, EMA(half_life=10, update_freq=10), tmp_path / "out")
    address = push_to_hub(tmp_path / "out", "me/model-ema", private=True)
    assert address == f"{hub.endpoint}/me/model-ema/commit/{'0' * 40}"
    assert hub.private == {"me/model-ema": True} and "Bearer hf_test" in hub.tokens
    files = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert hub.repositories == {"me/model-ema": files}
    assert hub.commits == [("me/model-ema", "main", "Average at step 40")]
    assert list(hub.objects.values()) == [files["model.safetensors"]]


def test_the_command_pushes_and_names_the_base(run: Path, tmp_path: Path, hub: Hub) -> None:
    average_checkpoints(run, EMA(half_life=10, update_freq=10), tmp_path / "out")
    hub.repositories["me/ema"] = {}  # one that exists already
    result = CliRunner().invoke(app, ["push", str(tmp_path / "out"), "me/ema", "--base-model", "other/base"])
    assert result.exit_code == 0, result.output
    assert "base_model: other/base" in hub.repositories["me/ema"]["README.md"].decode()
    assert "lagless.json" in hub.repositories["me/ema"]


def test_what_is_no_average_is_not_pushed(run: Path, tmp_path: Path, hub: Hub) -> None:
    average_checkpoints(run, {"a": EMA(half_life=10, update_freq=10)}, tmp_path / "two")
    cases: list[tuple[Any, str, type[Exception], str]] = [
        (run / "checkpoint-10", "me/x", CheckpointError, "holds no average of its own"),
        (tmp_path / "two", "me/x", CheckpointError, "holds the averages a: give the folder of one"),
        (tmp_path / "absent", "me/x", CheckpointError, "no such folder"),
        (tmp_path / "two" / "a", "x", ValueError, "repo_id='x'; it must be OWNER/NAME"),
        (tmp_path / "two" / "a", "org/base", ValueError, "is the base model; give the average a repository of its own"),
    ]
    for folder, name, kind, message in cases:
        with pytest.raises(kind, match=message):
            push_to_hub(folder, name)
    (tmp_path / "two" / "a" / "secret.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="secret.txt, which lagless did not write"):
        push_to_hub(tmp_path / "two" / "a", "me/x")
    assert hub.repositories == {}
