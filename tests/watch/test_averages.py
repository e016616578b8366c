"""Averages that are kept while checkpoints come are those of ``lagless average --recursive``, bit for bit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from safetensors.torch import load_file
from tests.model_files import make_state, save_sharded
from tests.watch.trainer import QUICK, RULES, save, settle, taken

from lagless import EMA, PowerEMA
from lagless.checkpoints import CheckpointError, fingerprint
from lagless.posthoc import average_checkpoints
from lagless.watch import Settings, Watch


def check_equal(watch: Watch, run: Path, out: Path, **options: Any) -> None:
    """Compare all averages, and what is said of them, with those of the stored checkpoints."""
    rules = watch.averages.rules
    average_checkpoints(run, rules, out / "posthoc", recursive=True, **options)
    with watch.averages.snapshot() as snapshot:
        for name in rules:
            watch.models.write(snapshot, name, out / "watched" / name)
            one, other = (load_file(out / kind / name / "model.safetensors") for kind in ("watched", "posthoc"))
            assert one.keys() == other.keys()
            for tensor, value in one.items():
                assert value.dtype == other[tensor].dtype and torch.equal(value, other[tensor]), (name, tensor)
            records = [json.loads((out / kind / name / "lagless.json").read_text()) for kind in ("watched", "posthoc")]
            for record in records:
                record.pop("files")
            assert records[0] == records[1]
            cards = [(out / kind / name / "README.md").read_text() for kind in ("watched", "posthoc")]
            assert cards[0] == cards[1]


@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.integers(1, 40), min_size=2, max_size=8, unique=True),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    st.integers(1, 3),
)
def test_any_checkpoints_of_any_type_give_the_same_averages(
    tmp_path_factory: pytest.TempPathFactory, steps: list[int], dtype: torch.dtype, shards: int
) -> None:
    tmp_path = tmp_path_factory.mktemp("watch")
    rules = RULES | {"late": EMA(decay=0.5, update_after=min(steps)), "power": PowerEMA()}
    with Watch(tmp_path / "run", tmp_path / "out", rules, QUICK) as watch:
        for step in sorted(steps):
            save_sharded(make_state(step, dtype), tmp_path / f"run/checkpoint-{step}", shards)
            settle(watch)
        assert taken(watch) == sorted(steps)
        check_equal(watch, tmp_path / "run", tmp_path)


def test_a_watch_that_starts_again_and_moves_goes_on_where_it_was(tmp_path: Path, watching: Any) -> None:
    for step in (10, 20, 30):
        save(tmp_path / "run", step)
    first, _ = watching()
    settle(first)
    first.__exit__(None, None, None)
    (tmp_path / "out").rename(tmp_path / "elsewhere")
    (tmp_path / "run").rename(tmp_path / "moved")
    save(tmp_path / "moved", 40)
    second, rows = watching(run=tmp_path / "moved", out=tmp_path / "elsewhere")
    settle(second)
    assert [row["step"] for row in rows if row["event"] == "absorbed"] == [40]
    check_equal(second, tmp_path / "moved", tmp_path)


def test_each_checkpoint_may_be_removed_once_it_was_absorbed(tmp_path: Path, watching: Any) -> None:
    watch, _ = watching()
    for step in range(10, 60, 10):
        save(tmp_path / "run", step)
        save(tmp_path / "all", step)
        settle(watch)
        shutil.rmtree(tmp_path / f"run/checkpoint-{step - 10}", ignore_errors=True)
    check_equal(watch, tmp_path / "all", tmp_path)


def test_a_start_of_another_type_is_theta_0(tmp_path: Path, watching: Any) -> None:
    base = save(tmp_path / "base", 0)
    for step in (10, 20, 30):
        save(tmp_path / "run", step, dtype=torch.bfloat16)
    watch, _ = watching(settings=Settings(settle=0.0, start=base))
    settle(watch)
    assert taken(watch) == [0, 10, 20, 30]
    check_equal(watch, tmp_path / "run", tmp_path, start=base)


def test_the_state_says_what_was_absorbed(tmp_path: Path, watching: Any) -> None:
    folder = save(tmp_path / "run", 10)
    watch, rows = watching()
    settle(watch)
    stored = json.loads((tmp_path / "out/state/state.json").read_text())
    assert [entry["fingerprint"] for entry in stored["history"]] == [fingerprint(folder)] == [rows[0]["fingerprint"]]


def test_other_rules_on_one_state_are_refused(tmp_path: Path, watching: Any) -> None:
    save(tmp_path / "run", 10)
    watch, _ = watching()
    settle(watch)
    watch.__exit__(None, None, None)
    with pytest.raises(CheckpointError, match="holds averages by ema, bema, .*, and ema are asked for"):
        watching(rules={"ema": EMA(decay=0.5)})
    with pytest.raises(CheckpointError, match="ema has decay=None there, and 0.5 is asked for"):
        watching(rules=RULES | {"ema": EMA(decay=0.5)})


def test_a_damaged_state_is_named(tmp_path: Path, watching: Any) -> None:
    (tmp_path / "out/state").mkdir(parents=True)
    (tmp_path / "out/state/state.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"state.json: cannot be read .*choose another output folder"):
        watching()


def test_the_best_model_without_a_measure_is_the_newest_average_of_the_first_rule(
    tmp_path: Path, watching: Any
) -> None:
    for step in (10, 20):
        save(tmp_path / "run", step)
    watch, _ = watching()
    settle(watch)
    average_checkpoints(tmp_path / "run", RULES["ema"], tmp_path / "posthoc", recursive=True)
    best, other = load_file(tmp_path / "out/best/model.safetensors"), load_file(tmp_path / "posthoc/model.safetensors")
    assert all(torch.equal(best[name], other[name]) for name in other)
    assert (tmp_path / "out/best/config.json").is_file()
    assert len(list((tmp_path / "out/models").iterdir())) == 1
