"""A run that is written slowly, rotated, crashed, resumed and rolled back: the averages are of what the run is now."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from tests.model_files import make_state
from tests.watch.test_averages import check_equal
from tests.watch.trainer import save, settle, taken

from lagless import EMA
from lagless.watch import Settings, Watch


def events(rows: list[dict[str, Any]]) -> list[str]:
    return [row["event"] for row in rows if "event" in row]


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_whatever_a_trainer_does_the_averages_are_of_the_branch_it_is_on(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    tmp_path = tmp_path_factory.mktemp("watch")
    run, mirror, seed, branch = tmp_path / "run", tmp_path / "mirror", 0, list[int]()
    with Watch(run, tmp_path / "out", {"ema": EMA(decay=0.5)}, Settings(settle=0.0, keep_states=9)) as watch:
        for _ in range(data.draw(st.integers(2, 6))):
            seed += 1
            there = [step for step in branch[:-1] if (run / f"checkpoint-{step}").exists()]
            back = bool(there) and data.draw(st.booleans())
            if back:  # resumed from an earlier checkpoint that is still there; later ones are removed
                branch = branch[: branch.index(data.draw(st.sampled_from(there))) + 1]
                for path in [*run.iterdir(), *mirror.iterdir()]:
                    if int(path.name.split("-")[1]) > branch[-1]:
                        shutil.rmtree(path)
                settle(watch)  # between the removal and the next checkpoint there is time to look
            branch.append((branch[-1] if branch else 0) + 10 * data.draw(st.integers(1, 2)))
            for folder in (run, mirror):
                save(folder, branch[-1], make_state(seed))
            if not back and data.draw(st.booleans()):  # rotation, of which the newest stays
                for path in run.iterdir():
                    if int(path.name.split("-")[1]) < branch[-1]:
                        shutil.rmtree(path)
            settle(watch)
            assert taken(watch) == branch
        check_equal(watch, mirror, tmp_path)


def test_a_checkpoint_written_again_with_other_weights_takes_the_averages_back(tmp_path: Path, watching: Any) -> None:
    for step in (10, 20, 30, 40):
        save(tmp_path / "run", step)
    watch, rows = watching(settings=Settings(settle=0.0, keep_states=3))
    settle(watch)
    save(tmp_path / "run", 30, make_state(77))
    settle(watch)
    assert taken(watch) == [10, 20, 30]
    assert events(rows)[-2:] == ["rolled back", "absorbed"]
    assert "checkpoint-30 was rewritten with other weights" in rows[-2]["text"] and rows[-2]["to"] == 20
    save(tmp_path / "run", 40, make_state(78))
    settle(watch)
    assert taken(watch) == [10, 20, 30, 40]
    check_equal(watch, tmp_path / "run", tmp_path)


def test_without_a_state_from_before_the_averages_begin_anew(tmp_path: Path, watching: Any) -> None:
    for step in (10, 20, 30, 40):
        save(tmp_path / "run", step)
    watch, rows = watching()
    settle(watch)
    save(tmp_path / "run", 20, make_state(77))
    settle(watch)
    assert "the averages begin anew" in next(row["text"] for row in rows if row["event"] == "rolled back")
    assert taken(watch) == [10, 20]
    check_equal(watch, tmp_path / "run", tmp_path, steps=[10, 20])


def test_a_log_that_contradicts_the_former_one_shows_a_restart(tmp_path: Path, watching: Any) -> None:
    def log(step: int, losses: dict[int, float]) -> None:
        state = {"log_history": [{"step": s, "loss": value} for s, value in losses.items()]}
        (save(tmp_path / "run", step) / "trainer_state.json").write_text(json.dumps(state))

    log(10, {5: 3.0, 10: 2.5})
    log(20, {5: 3.0, 10: 2.5, 15: 2.25, 20: 2.125})
    watch, rows = watching()
    settle(watch)
    log(30, {5: 3.0, 10: 2.5, 15: 2.26, 20: 2.13, 30: 2.0})
    settle(watch)
    assert taken(watch) == [10, 30]
    assert "the loss logged for step 15 was 2.25 and is 2.26 now" in rows[-2]["text"]
    assert [passed.name for passed in watch.averages.record.passed_over] == ["checkpoint-20"]


def test_copied_or_touched_checkpoints_are_known_by_their_fingerprint(tmp_path: Path, watching: Any) -> None:
    for step in (10, 20, 30):
        save(tmp_path / "run", step)
    watch, rows = watching()
    settle(watch)
    save(tmp_path / "run", 20)
    settle(watch)
    assert taken(watch) == [10, 20, 30] and events(rows)[-1] == "touched"


def test_a_torn_checkpoint_waits_and_is_then_told_by_name(tmp_path: Path, watching: Any) -> None:
    now = [0.0]
    for step in (10, 20, 30):
        save(tmp_path / "run", step)
    torn = tmp_path / "run/checkpoint-20/model.safetensors"
    whole = torn.read_bytes()
    torn.write_bytes(whole[:-100])
    watch, rows = watching(settings=Settings(settle=2.0, patience=60.0), clock=lambda: now[0])
    for _ in range(10):
        watch.step()
        now[0] += 2.0
    assert taken(watch) == [10] and [p.seen.step for p in watch.pending] == [20]  # 30 waits for it
    now[0] += 60.0
    settle(watch)
    now[0] += 2.0
    settle(watch)
    assert taken(watch) == [10, 30]
    assert [row["text"] for row in rows if row["event"] == "torn"][0].startswith("checkpoint-20 is not complete")
    assert "truncated" in [row["text"] for row in rows if row["event"] == "torn"][0]
    torn.write_bytes(whole)  # complete at last, while a state from before it is kept
    for _ in range(8):
        watch.step()
        now[0] += 2.0
    assert taken(watch) == [10, 20, 30]
    check_equal(watch, tmp_path / "run", tmp_path)


def test_a_late_checkpoint_is_passed_over_where_the_averages_cannot_go_back(tmp_path: Path, watching: Any) -> None:
    for step in (10, 30, 40, 50):
        save(tmp_path / "run", step)
    watch, rows = watching()
    settle(watch)
    save(tmp_path / "run", 20)
    settle(watch)
    assert taken(watch) == [10, 30, 40, 50]
    assert "checkpoint-20 is left out" in rows[-1]["text"] and "no state from before it is kept" in rows[-1]["text"]
    assert len(events(rows)) == 5  # told once


@pytest.mark.parametrize("kind", ["missing shard", "missing index", "growing", "renamed"])
def test_what_is_still_being_written_is_not_taken_up(tmp_path: Path, watching: Any, kind: str) -> None:
    from tests.model_files import save_sharded

    now = [0.0]
    save(tmp_path / "run", 10)
    folder = tmp_path / "run/checkpoint-20"
    save_sharded(make_state(20), folder, 3)
    index, shard = folder / "model.safetensors.index.json", sorted(folder.glob("*.safetensors"))[1]
    hidden = {"missing shard": shard, "missing index": index, "renamed": folder}.get(kind)
    if hidden is not None:
        away = hidden.with_name("tmp-" + hidden.name)
        hidden.rename(away)
    watch, _ = watching(settings=Settings(settle=2.0), clock=lambda: now[0])
    for _ in range(10):
        if kind == "growing":
            (folder / "optimizer.pt").write_bytes(os.urandom(1 + int(now[0])))
        watch.step()
        now[0] += 1.0
    assert taken(watch) == [10]
    if hidden is not None:
        away.rename(hidden)
    for _ in range(5):
        watch.step()
        now[0] += 1.0
    assert taken(watch) == [10, 20]


def test_weights_that_are_not_finite_are_left_out_by_name(tmp_path: Path, watching: Any) -> None:
    state = make_state(20)
    state["mlp.weight"][0, 3] = torch.nan
    save(tmp_path / "run", 10)
    save(tmp_path / "run", 20, state)
    save(tmp_path / "run", 30)
    watch, rows = watching()
    settle(watch)
    assert taken(watch) == [10, 30]
    assert "checkpoint-20 is left out" in rows[1]["text"] and "'mlp.weight' has nan at element 3" in rows[1]["text"]


def test_a_checkpoint_of_another_model_is_left_out(tmp_path: Path, watching: Any) -> None:
    save(tmp_path / "run", 10)
    save(tmp_path / "run", 20, {"other": torch.ones(3)})
    watch, rows = watching()
    settle(watch)
    assert taken(watch) == [10] and "checkpoint-20 is left out" in rows[-1]["text"]
