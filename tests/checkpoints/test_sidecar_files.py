"""What goes along with averages: everything a model needs to load, no states of training, nothing wider open."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.model_files import files_under, make_state, save_model

from lagless import EMA
from lagless.checkpoints import CheckpointError
from lagless.checkpoints._sidecar_files import copy_sidecar_files, sidecar_files
from lagless.posthoc import average_checkpoints

Make = Callable[..., Path]

CARRIED = ["1_Pooling/config.json", "2_Normalize/config.json", "LICENSE", "added_tokens.json", "bpe.codes"]
CARRIED += ["chat_template.jinja", "config.json", "config_sentence_transformers.json", "custom/__init__.py"]
CARRIED += ["custom/layers/attention.py", "dict.txt", "generation_config.json", "merges.txt", "modeling_custom.py"]
CARRIED += ["modules.json", "preprocessor_config.json", "scheduler/scheduler_config.json", "special_tokens_map.json"]
CARRIED += ["tekken.json", "tokenizer.json", "tokenizer.model", "tokenizer.pkl", "vocab.bin"]
LEFT = ["optimizer.pt", "scheduler.pt", "rng_state.pth", "rng_state_0.pth", "trainer_state.json", "training_args.bin"]
LEFT += ["model.safetensors", "pytorch_model.bin", "model.safetensors.index.json", "README.md", "zero_to_fp32.py"]
LEFT += ["scaler.pt", "lagless.json", "random_states_0.pkl", "global_step5/states.pt", "checkpoint-3/config.json"]
LEFT += ["events.out.tfevents.1", "runs/x/events", "train.log", "all_results.json", ".git/config", "latest"]
LEFT += ["bema/lagless.json", "bema/config.json", "pytorch_model_fsdp_0/.metadata", "optimizer_0/x.json"]
LEFT += ["__pycache__/modeling_custom.pyc", "averages.safetensors", "model.onnx", "model.gguf", "tf_model.h5"]


def write(folder: Path, names: list[str]) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")


def test_everything_is_carried_over_but_weights_states_and_logs(tmp_path: Path) -> None:
    write(tmp_path, [*CARRIED, *LEFT])
    (tmp_path / "data").symlink_to("/")
    assert sorted(str(path.relative_to(tmp_path)) for path in sidecar_files(tmp_path)) == CARRIED


def test_beside_one_file_only_what_is_known_is_carried_over(tmp_path: Path) -> None:
    """The folder may be anything, as a whole project."""
    write(tmp_path, ["config.json", "tekken.json", "secrets.txt", "train.py", "src/config.json", "step_1.pt"])
    assert [path.name for path in sidecar_files(tmp_path / "step_1.pt")] == ["config.json", "tekken.json"]


def test_links_to_files_are_followed_and_those_that_lead_nowhere_refused(tmp_path: Path) -> None:
    write(tmp_path, ["blobs/1"])
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "snapshot" / "config.json").symlink_to(tmp_path / "blobs" / "1")
    (tmp_path / "out").mkdir()
    copy_sidecar_files(tmp_path / "snapshot", tmp_path / "out")
    assert (tmp_path / "out" / "config.json").read_text() == "{}" and not (
        tmp_path / "out" / "config.json"
    ).is_symlink()
    (tmp_path / "snapshot" / "tokenizer.json").symlink_to(tmp_path / "blobs" / "2")
    with pytest.raises(CheckpointError, match="tokenizer.json: this link leads nowhere"):
        sidecar_files(tmp_path / "snapshot")


def test_an_average_has_what_the_last_checkpoint_has(make_run: Make, tmp_path: Path) -> None:
    run = make_run([make_state(i) for i in range(2)])
    for folder in run.iterdir():
        write(folder, CARRIED)
    average_checkpoints(run, EMA(decay=0.5), tmp_path / "out")
    files = [name for name in files_under(tmp_path / "out") if (tmp_path / "out" / name).is_file()]
    assert files == sorted([*CARRIED, "README.md", "lagless.json", "model.safetensors"])


def test_shards_with_notes_of_their_own_take_the_configuration_of_the_base(make_run: Make, tmp_path: Path) -> None:
    run = make_run([make_state(i) for i in range(2)])
    for checkpoint in run.iterdir():
        (checkpoint / "config.json").rename(checkpoint / "metadata.json")
    save_model(make_state(5), tmp_path / "base")
    write(tmp_path / "base", ["config.json", "tokenizer.json"])
    average_checkpoints(run, EMA(decay=0.5), tmp_path / "out", start=tmp_path / "base")
    assert (tmp_path / "out" / "tokenizer.json").exists()


@pytest.mark.parametrize("mode, shown", [(0o600, 0o600), (0o640, 0o640), (0o644, 0o644), (0o400, 0o600)])
def test_nobody_may_read_more_than_of_the_checkpoints(make_run: Make, tmp_path: Path, mode: int, shown: int) -> None:
    run = make_run([make_state(i) for i in range(2)])
    for file in run.glob("*/*"):
        file.chmod(0o644)
    (run / "checkpoint-10" / "model.safetensors").chmod(mode)
    (run / "checkpoint-20" / "config.json").chmod(mode)
    (run / "checkpoint-20").chmod(0o700)
    before = os.umask(0o022)
    try:
        average_checkpoints(run, {"a": EMA(decay=0.5)}, tmp_path / "out", max_shard_size=5000)
    finally:
        os.umask(before)
    for path in (tmp_path / "out").rglob("*"):
        if path.name == "config.json" or path.is_dir():
            continue
        assert path.stat().st_mode & 0o777 == shown, path
    assert (tmp_path / "out/a/config.json").stat().st_mode & 0o077 == mode & 0o077
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "out", tmp_path / "out/a")} == {0o700}


def test_the_configuration_names_the_type_that_is_written(tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    out.mkdir()
    config = {"torch_dtype": "bfloat16", "text_config": {"dtype": "bfloat16", "hidden_size": 3}, "x": 1}
    (source / "config.json").write_text(json.dumps(config))
    copy_sidecar_files(source, out)
    assert json.loads((out / "config.json").read_text()) == config
    copy_sidecar_files(source, out, "float32")
    changed = {"torch_dtype": "float32", "text_config": {"dtype": "float32", "hidden_size": 3}, "x": 1}
    assert json.loads((out / "config.json").read_text()) == changed
    (source / "config.json").write_text("{}")
    copy_sidecar_files(source, out, "float32")
    assert json.loads((out / "config.json").read_text()) == {"dtype": "float32"}
    (source / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="config.json: not a JSON object .a list.*dtype='auto'"):
        copy_sidecar_files(source, out, "float32")
