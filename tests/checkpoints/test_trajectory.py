from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tests.model_files import make_state, save_model, save_sharded

from lagless.checkpoints import CheckpointError, find_checkpoints

Make = Callable[..., Path]


def test_checkpoints_are_ordered_by_step_not_by_name(make_run: Make) -> None:
    run = make_run([make_state(i) for i in range(4)], [1000, 5, 200, 30])
    found = find_checkpoints(run)
    assert found.steps == (5, 30, 200, 1000)
    assert [c.path.name for c in found.checkpoints] == [f"checkpoint-{s}" for s in found.steps]
    assert not found.start_given
    assert find_checkpoints(str(run)).steps == found.steps


@pytest.mark.parametrize(
    "names",
    [
        ("step1000", "step2000"),
        ("step-1000", "step-2000"),
        ("iter_0001000", "iter_0002000"),
        ("global_step1000", "global_step2000"),
        ("my-run-step=1000", "my-run-step=2000"),
        ("ckpt_1000", "ckpt_2000"),
    ],
)
def test_other_names_of_folders(tmp_path: Path, names: tuple[str, str]) -> None:
    for i, name in enumerate(names):
        save_model(make_state(i), tmp_path / name)
    assert find_checkpoints(tmp_path).steps == (1000, 2000)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".bin"])
def test_files_instead_of_folders(tmp_path: Path, suffix: str) -> None:
    for step in (100, 200):
        save = save_file if suffix == ".safetensors" else torch.save
        save(make_state(step), tmp_path / f"step_{step:06d}{suffix}")
    assert find_checkpoints(tmp_path).steps == (100, 200)


def test_temporary_and_unrelated_entries_are_passed_over(make_run: Make) -> None:
    run = make_run([make_state(i) for i in range(2)])
    for name in (
        "tmp-checkpoint-30",
        ".checkpoint-40",
        "checkpoint-50.tmp",
        "checkpoint-60-partial",
        "epoch-1",
        "runs",
    ):
        (run / name).mkdir()
    (run / "model.safetensors").write_bytes(b"the final model")
    (run / "checkpoint-70").write_text("a file without a suffix")
    assert find_checkpoints(run).steps == (10, 20)


def test_links_to_checkpoints_are_followed(make_run: Make, tmp_path: Path) -> None:
    run = make_run([make_state(i) for i in range(2)])
    linked = tmp_path / "linked"
    linked.mkdir()
    for name in ("checkpoint-10", "checkpoint-20"):
        (linked / name).symlink_to(run / name)
    assert find_checkpoints(linked).steps == (10, 20)
    (linked / "checkpoint-30").symlink_to(run / "gone")
    with pytest.raises(CheckpointError, match="checkpoint-30: this link leads nowhere"):
        find_checkpoints(linked)


def test_a_list_takes_steps_from_names_or_from_steps(make_run: Make) -> None:
    run = make_run([make_state(i) for i in range(3)])
    paths = [run / "checkpoint-30", run / "checkpoint-10" / "model.safetensors", run / "checkpoint-20"]
    assert find_checkpoints(paths).steps == (10, 20, 30)
    given = find_checkpoints(paths, steps=[1, 2, 5])
    assert given.steps == (1, 2, 5) and [c.path for c in given.checkpoints] == paths


def test_a_list_of_sharded_folders_takes_steps_from_their_checkpoints(make_run: Make) -> None:
    """The number in pytorch_model_fsdp_0 counts the models of a checkpoint."""
    paths = []
    for checkpoint in sorted(make_run([make_state(i) for i in range(2)]).iterdir()):
        paths.append(checkpoint / "pytorch_model_fsdp_0")
        paths[-1].mkdir()
        (checkpoint / "model.safetensors").rename(paths[-1] / "model.safetensors")
    assert find_checkpoints(paths).steps == (10, 20)


def test_steps_select_from_a_run_folder(make_run: Make) -> None:
    run = make_run([make_state(i) for i in range(3)])
    (run / "checkpoint-20" / "model.safetensors").write_bytes(b"damaged")
    assert find_checkpoints(run, steps=[10, 30]).steps == (10, 30)
    with pytest.raises(ValueError, match="no checkpoint at 15; it has 10, 20, 30"):
        find_checkpoints(run, steps=[10, 15])


def test_a_given_start_comes_first_and_may_have_another_float_type(make_run: Make, tmp_path: Path) -> None:
    run = make_run([make_state(i) for i in range(2)])
    save_sharded(make_state(9, torch.bfloat16), tmp_path / "base", 2)
    found = find_checkpoints(run, start=tmp_path / "base")
    assert found.steps == (0, 10, 20) and found.start_given and found.checkpoints[0].path == tmp_path / "base"
    assert find_checkpoints(run, start=tmp_path / "base", start_step=4).steps == (4, 10, 20)


def test_until_cuts_the_end(make_run: Make) -> None:
    found = find_checkpoints(make_run([make_state(i) for i in range(4)]))
    assert found.until(None) is found
    assert found.until(30).steps == (10, 20, 30)
    assert found.until(29).steps == (10, 20) and len(found.until(29).checkpoints) == 2
    with pytest.raises(CheckpointError, match="at=15: 1 of the checkpoints at steps 10, 20, 30, 40.*Raise at"):
        found.until(15)


def _run(make_run: Make, **kinds: object) -> Path:
    return make_run([make_state(i) for i in range(2)])


def _nothing(make_run: Make) -> Path:
    run = _run(make_run) / "empty"
    run.mkdir()
    (run / "events.out").touch()
    return run


def _mixed(make_run: Make) -> Path:
    run = _run(make_run)
    save_model(make_state(0), run / "step10")
    return run


def _twice(make_run: Make) -> Path:
    run = _run(make_run)
    save_model(make_state(0), run / "checkpoint-010")
    return run


def _differing(make_run: Make, **change: torch.Tensor) -> Path:
    state = make_state(1) | change
    return make_run([make_state(0), {name: tensor for name, tensor in state.items() if tensor.numel() != 99}])


ERRORS = {
    "nothing": (
        lambda m: [_nothing(m)],
        CheckpointError,
        "no checkpoints found. Looked for checkpoint-N.*found events.out",
    ),
    "one checkpoint": (
        lambda m: [_run(m) / "checkpoint-10"],
        CheckpointError,
        "found config.json, model.safetensors.*looks like one checkpoint: give the folder above",
    ),
    "a file": (
        lambda m: [_run(m) / "checkpoint-10" / "model.safetensors"],
        CheckpointError,
        "is a file, not a run folder",
    ),
    "absent": (lambda m: [_run(m) / "absent"], CheckpointError, "absent: no such folder"),
    "only one": (lambda m: [m([make_state(0)])], CheckpointError, "only checkpoint found, an average needs two"),
    "mixed": (
        lambda m: [_mixed(m)],
        CheckpointError,
        r"several kinds of checkpoints \(2 folders checkpoint-N; 1 folders stepN\)",
    ),
    "twice": (lambda m: [_twice(m)], CheckpointError, "both are step 10"),
    "empty list": (lambda m: [[]], CheckpointError, "list of checkpoints is empty"),
    "no number": (lambda m: [[_run(m), _run(m)]], CheckpointError, "no step number in its name"),
    "steps too few": (lambda m: [[_run(m), _run(m)], [1]], ValueError, "1 steps for 2 checkpoints"),
    "steps equal": (lambda m: [[_run(m), _run(m)], [1, 1]], ValueError, "1 is followed by 1; steps must increase"),
    "steps backwards": (lambda m: [_run(m), [20, 10]], ValueError, "20 is followed by 10"),
    "start late": (
        lambda m: [_run(m), None, _run(m) / "checkpoint-20", 10],
        ValueError,
        "is given for step 10, but the run begins with checkpoint-10 at step 10.*Leave --start out",
    ),
    "start_step alone": (
        lambda m: [_run(m), None, None, 3],
        ValueError,
        "start_step=3 is the step of start, which is not",
    ),
    "other shape": (
        lambda m: [_differing(m, scale=torch.ones(2))],
        CheckpointError,
        r"tensor 'scale' is F32 \[\] in .*checkpoint-10, but F32 \[2\] in .*checkpoint-20. They do not belong together",
    ),
    "other type": (
        lambda m: [_differing(m, scale=torch.ones(()).bfloat16())],
        CheckpointError,
        r"tensor 'scale' is F32 \[\] in .*checkpoint-10, but BF16 \[\]",
    ),
    "other name": (
        lambda m: [_differing(m, extra=torch.ones(1))],
        CheckpointError,
        r"checkpoint-10 has no tensor 'extra', .*checkpoint-20 has it \(F32 \[1\]\)",
    ),
    "lacking": (
        lambda m: [_differing(m, scale=torch.ones(99))],
        CheckpointError,
        "checkpoint-20 has no tensor 'scale', .*checkpoint-10 has it",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_what_does_not_make_a_trajectory_is_refused(make_run: Make, case: str) -> None:
    make, kind, message = ERRORS[case]
    with pytest.raises(kind, match=message):
        find_checkpoints(*make(make_run))


def test_an_adapter_and_a_model_do_not_mix(make_run: Make, tmp_path: Path) -> None:
    run = make_run([make_state(i) for i in range(2)])
    (tmp_path / "base").mkdir()
    save_file(make_state(0), tmp_path / "base" / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="base is an adapter, .*checkpoint-20 is a whole model"):
        find_checkpoints(run, start=tmp_path / "base")
