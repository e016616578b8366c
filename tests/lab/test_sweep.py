"""Sweeps: every cell once, whatever is killed in between."""

import random
import re
import time

import pytest

datasets = pytest.importorskip("datasets")
pytest.importorskip("optuna")
pytest.importorskip("trl")

from typer.testing import CliRunner  # noqa: E402

from lagless.cli import app  # noqa: E402
from lagless.lab.sweep import parse_grid, sweep, sweep_cells  # noqa: E402
from lagless.lab.training._folder import claimed  # noqa: E402

from ..processes import join, run_command, start  # noqa: E402

NAME = "pace-pretrain-small"
GRID = {"method.optimizer.pullback": ["0", "1e-2"], "method.schedule": ["{kind: constant}"]}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def overrides(tmp_path):
    words = random.Random(0).choices("the cat sat on a mat and saw it run to me".split(), k=2000)
    documents = [" ".join(words[i : i + 40]) for i in range(0, 2000, 40)]
    (tmp_path / "text.txt").write_text("\n<|endoftext|>\n".join(documents))
    return {
        "data.path": str(tmp_path / "text.txt"),
        "data.validation_fraction": 0.2,
        "data.sequence_length": 16,
        "model.tokenizer": 280,
        "model.config": {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1},
        "training.max_steps": 2,
        "training.batch_size": 2,
        "training.micro_batch_size": 2,
        "training.save_every": 1,
        "evaluation.sequences": 4,
        "evaluation.every": 2,
    }


def database(tmp_path):
    return f"sqlite:///{tmp_path / 'sweep.db'}"


def test_every_cell_once(overrides, tmp_path, monkeypatch):
    cells = sweep_cells(NAME, tmp_path / "out", overrides, GRID, seeds=[0, 1])
    assert len(cells) == 4 and all(cell.loss is None for cell in cells)
    assert cells[0].folder.name.startswith("method.optimizer.pullback=0,method.schedule=_kind_constant_,seed=0-")
    assert len({cell.folder for cell in cells}) == 4
    assert cells[-1].recipe.method.optimizer.pullback == 0.01 and cells[-1].recipe.seed == 1
    assert sweep(cells, database(tmp_path)) == {}
    for cell in cells:
        assert cell.result["recipe"] == cell.recipe.model_dump(mode="json")
        assert cell.loss == cell.result["final"]["optimizer"]["loss"]
    assert cells[0].result["recipe_digest"] == cells[1].result["recipe_digest"] != cells[2].result["recipe_digest"]

    # Neither again nor in a larger sweep with another database.
    trained = []
    monkeypatch.setattr("lagless.lab.sweep._sweep.train", lambda recipe, folder, notify: trained.append(folder))
    assert sweep(cells, database(tmp_path)) == {} and not trained
    more = sweep_cells(NAME, tmp_path / "out", overrides, GRID, seeds=[0, 1, 2])
    with pytest.raises(AssertionError):  # what stands in for train leaves no result
        sweep(more, "sqlite://")
    assert trained and all(folder.name not in {cell.folder.name for cell in cells} for folder in trained)


def test_failed_cells_do_not_stop_the_others_and_are_retried(overrides, tmp_path, monkeypatch):
    cells = sweep_cells(NAME, tmp_path / "out", overrides, {"training.batch_size": ["2", "3", "4"]}, seeds=[0])
    failed = sweep(cells, database(tmp_path))
    assert list(failed) == [cells[1].folder] and "no multiple" in str(failed[cells[1].folder])
    assert [cell.loss is None for cell in cells] == [False, True, False]
    assert list(sweep(cells, database(tmp_path))) == [cells[1].folder]  # tried again
    with claimed(cells[1].folder, cells[1].recipe):
        monkeypatch.setattr(
            "lagless.lab.sweep._sweep.train", lambda recipe, folder, notify: claimed(folder, recipe).__enter__()
        )
        assert sweep(cells, database(tmp_path)) == {}  # in the hands of another process


def arguments(overrides, out):
    grid = [f"--grid={field}={','.join(values)}" for field, values in GRID.items()]
    changes = [f"--set={field}={value}" for field, value in overrides.items()]
    return ["sweep", NAME, "--out", str(out), *grid, "--seeds=0,1", *changes]


def test_killed_sweep_goes_on_in_two_processes(overrides, tmp_path):
    out = tmp_path / "out"
    outputs = [tmp_path / f"{i}.txt" for i in range(3)]

    def begin(output):
        return start(run_command, tmp_path / "cache", *arguments(overrides, out), output=output)

    first = begin(outputs[0])
    try:
        while first.is_alive() and not (outputs[0].exists() and "(1 of 4 finished)" in outputs[0].read_text()):
            time.sleep(0.02)  # until the second cell has begun
    finally:
        first.kill()
        first.join()
    finished = {path: path.stat().st_mtime_ns for path in out.glob("*/result.json")}
    assert len(finished) == 1

    others = [begin(output) for output in outputs[1:]]
    join(*others)
    assert [process.exitcode for process in others] == [0, 0]
    assert len(list(out.glob("*/result.json"))) == 4
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in finished.items())
    printed = "".join(output.read_text() for output in outputs[1:])
    assert printed.count("step 2 of 2") == 3  # each of the others once, by one process


def test_command(overrides, tmp_path):
    listed = CliRunner().invoke(app, [*arguments(overrides, tmp_path / "out"), "--list"], env={"COLUMNS": "200"})
    assert listed.exit_code == 0 and not (tmp_path / "out").exists()
    assert "0/2" in listed.stdout and "1e-2" in listed.stdout


def checked(overrides, out, **changes):
    command = [*arguments({**overrides, **changes}, out), "--list"]
    return CliRunner().invoke(app, command, env={"COLUMNS": "200"})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"training.batch_size": 3}, "training.batch_size=3 is no multiple of training.micro_batch_size=2"),
        ({"data.path": "./none.txt"}, "data.path: ./none.txt does not exist"),
        ({"data.validation_path": "none.jsonl.gz"}, "data.validation_path: none.jsonl.gz does not exist"),
        ({"model.tokenizer": "/no/such/folder"}, "model.tokenizer: /no/such/folder does not exist"),
        ({"method.averages": {"late": {"rule": "EMA", "update_freq": 3}}}, "method.averages.late: EMA: .* no update"),
    ],
)
def test_list_checks_the_runs(overrides, tmp_path, changes, message):
    """Each of these is refused by training, too, if only later."""
    found = checked(overrides, tmp_path / "out", **changes)
    assert found.exit_code == 1 and "0/2" in found.stdout and not (tmp_path / "out").exists()
    assert re.search(f"4 of 4 runs could not begin:(.|\n)*{message}", str(found.exception))


def test_list_checks_the_folders(overrides, tmp_path):
    out = tmp_path / "out"
    cell, *_ = sweep_cells(NAME, out, overrides, GRID, seeds=[0, 1])
    cell.folder.mkdir(parents=True)
    (cell.folder / "notes.txt").touch()
    found = checked(overrides, out)
    assert "1 of 4 runs could not begin" in str(found.exception) and "holds no run" in str(found.exception)


def test_the_same_run_twice_is_refused(overrides, tmp_path):
    with pytest.raises(ValueError, match="are the same run. Give every value"):
        sweep_cells(NAME, tmp_path, overrides, {"training.learning_rate": ["1e-3", "0.001"]}, seeds=[0])
    with pytest.raises(ValueError, match="are the same run"):
        sweep_cells(NAME, tmp_path, overrides, seeds=[3, 3])


def test_bad_sweeps(overrides, tmp_path):
    def refused(message, name=NAME, **options):
        with pytest.raises(ValueError, match=message):
            sweep_cells(name, tmp_path, overrides, **options)

    refused("nothing to compare", grid={}, seeds=[0])
    refused("batch: unknown field", grid={"training.batch": ["1"]})
    refused("--grid training.batch_size: has no values", grid={"training.batch_size": []})
    refused("Input should be greater than 0", grid={"training.learning_rate": ["1e-3", "-1"]})
    with pytest.raises(ValueError, match="write FIELD=VALUE,VALUE"):
        parse_grid(["training.learning_rate"])
    result = CliRunner().invoke(app, ["sweep", NAME, "--out", str(tmp_path), "--seeds", "0;1"])
    assert "write integers with commas" in str(result.exception)


def test_the_recipes_own_grid(overrides, tmp_path):
    cells = sweep_cells(NAME, tmp_path, overrides)
    assert len(cells) == 3 * 5 * 2 * 5
    assert len({cell.folder for cell in cells}) == len(cells)
    assert len(sweep_cells(NAME, tmp_path, overrides, seeds=[7])) == 30
