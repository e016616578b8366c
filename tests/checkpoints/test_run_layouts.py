"""Each program's checkpoints as that program writes them: found, opened, averaged."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.checkpoint import save as save_dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from typer.testing import CliRunner

from lagless.checkpoints import CheckpointError, find_checkpoints
from lagless.cli import app
from lagless.posthoc import average_checkpoints

State = dict[str, Tensor]


def _state(seed: int) -> State:
    generator = torch.Generator().manual_seed(seed)
    return {"embed.weight": torch.randn(6, 4, generator=generator), "norm.bias": torch.randn(4, generator=generator)}


def _lightning(run: Path, i: int, state: State, name: str | None = None, **entries: object) -> Path:
    path = run / (name or f"epoch={i}-step={10 * (i + 1)}.ckpt")
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"epoch": i, "global_step": 10 * (i + 1), "state_dict": state, "loops": {}, "optimizer_states": []}
    torch.save({**content, **entries}, path)
    return path


def _lightning_metric_names(run: Path, i: int, state: State) -> Path:
    return _lightning(run, i, state, f"epoch={i:02d}-val_loss=0.{5 - i}3.ckpt")


def _lightning_log_folder(run: Path, i: int, state: State) -> Path:
    return _lightning(run / "lightning_logs" / "version_0" / "checkpoints", i, state)


def _lightning_sharded(run: Path, i: int, state: State) -> Path:
    path = run / f"epoch={i}-step={10 * (i + 1)}.ckpt"
    save_dcp(
        {"state_dict": state, "optimizer_0": {"state": {"embed.weight": {"exp_avg": torch.ones(6, 4)}}}},
        checkpoint_id=path,
    )
    torch.save({"global_step": 10 * (i + 1), "callbacks": {}}, path / "meta.pt")
    return path


def _olmo_core(run: Path, i: int, state: State) -> Path:
    path = run / f"step{10 * (i + 1)}"
    states = {"model": state, "optim": {"state": {"embed.weight": {"exp_avg": torch.ones(6, 4)}}}}
    save_dcp(states, checkpoint_id=path / "model_and_optim")
    (path / "train").mkdir()
    torch.save({"global_step": 10 * (i + 1)}, path / "train" / "rank0.pt")
    (path / "config.json").write_text(json.dumps({"model": {"d_model": 4}}))
    (path / ".metadata.json").write_text("{}")
    return path


def _olmo_unsharded(run: Path, i: int, state: State) -> Path:
    path = run / f"step{10 * (i + 1)}-unsharded"
    path.mkdir(parents=True)
    save_file(state, path / "model.safetensors")
    return path


def _verl(run: Path, i: int, state: State) -> Path:
    path = run / f"global_step_{10 * (i + 1)}"
    for part, scale in (("actor", 1.0), ("critic", 5.0)):
        folder = path / part
        (folder / "huggingface").mkdir(parents=True)
        mesh = init_device_mesh("cpu", (1,), mesh_dim_names=("fsdp",))
        placed = {
            "embed.weight": distribute_tensor(scale * state["embed.weight"], mesh, [Shard(0)]),
            "norm.bias": distribute_tensor(scale * state["norm.bias"], mesh, [Replicate()]),
        }
        torch.save(placed, folder / "model_world_size_1_rank_0.pt")
        torch.save({"state": {0: {"exp_avg": torch.ones(6, 4)}}}, folder / "optim_world_size_1_rank_0.pt")
        torch.save({"lr_scheduler": {}}, folder / "extra_state_world_size_1_rank_0.pt")
        (folder / "huggingface" / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (run / "latest_checkpointed_iteration.txt").write_text(str(10 * (i + 1)))
    return path


def _verl_merged(run: Path, i: int, state: State) -> Path:
    path = _verl(run, i, {name: 0 * value for name, value in state.items()})
    save_file(state, path / "actor" / "huggingface" / "model.safetensors")
    return path


def _diffusers(run: Path, i: int, state: State) -> Path:
    path = run / f"checkpoint-{10 * (i + 1)}"
    for part, scale in (("unet", 1.0), ("unet_ema", 9.0)):
        (path / part).mkdir(parents=True)
        save_file({k: scale * v for k, v in state.items()}, path / part / "diffusion_pytorch_model.safetensors")
        (path / part / "config.json").write_text(json.dumps({"_class_name": "UNet2DConditionModel"}))
    for name in ("optimizer.bin", "scheduler.bin", "random_states_0.pkl"):
        (path / name).write_bytes(b"state")
    return path


def _timm(run: Path, i: int, state: State) -> Path:
    path = run / f"checkpoint-{i}.pth.tar"
    run.mkdir(exist_ok=True)
    averaged = {name: 9 * value for name, value in state.items()}
    content = {
        "epoch": i,
        "arch": "resnet18",
        "state_dict": state,
        "optimizer": {"state": {0: {"momentum_buffer": torch.ones(6, 4)}}, "param_groups": []},
        "version": 2,
        "args": Namespace(model="resnet18", lr=0.1),
        "state_dict_ema": averaged,
        "metric": [70.0, 72.0, 71.0][i],
    }
    torch.save(content, path)
    torch.save(content, run / "last.pth.tar")
    torch.save(content, run / "model_best.pth.tar")
    return path


def _torchtune(run: Path, i: int, state: State) -> Path:
    path = run / f"epoch_{i}"
    path.mkdir(parents=True)
    save_file(state, path / "model-00001-of-00001.safetensors")
    weight_map = dict.fromkeys(state, "model-00001-of-00001.safetensors")
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (run / "recipe_state").mkdir(exist_ok=True)
    torch.save({"epochs_run": i}, run / "recipe_state" / "recipe_state.pt")
    return path


def _nanotron(run: Path, i: int, state: State) -> Path:
    path = run / str(10 * (i + 1))
    for name, value in state.items():
        *parents, last = name.split(".")
        folder = path.joinpath("model", "model", *parents, "pp_block")
        folder.mkdir(parents=True)
        if value.dim() == 1:
            save_file({"data": value}, folder / f"model_{last}.safetensors")
            continue
        for rank, rows in enumerate(value.chunk(2)):
            slices = f"0,3,None|None,None,None#{3 * rank},{3 * rank + 3},None|None,None,None"
            metadata = {"version": "1.4", "local_global_slices_pairs": slices, "unsharded_shape": "(6, 4)"}
            file = f"model_{last}_pp-rank-0-of-1_tp-rank-{rank}-of-2.safetensors"
            save_file({"data": rows.contiguous()}, folder / file, metadata)
    (path / "optimizer").mkdir()
    torch.save({}, path / "optimizer" / "optimizer_pp-0-of-1_dp-0-of-1_tp-0-of-1_exp-0-of-1.pt")
    (path / "checkpoint_metadata.json").write_text(json.dumps({"version": "1.4", "tp": 2, "dp": 1}))
    (path / "model_config.json").write_text(json.dumps({"hidden_size": 4}))
    (run / "latest.txt").write_text(path.name)
    return path


def _universal(run: Path, i: int, state: State) -> Path:
    path = run / f"global_step{10 * (i + 1)}_universal"
    for name, value in state.items():
        folder = path / "zero" / name
        folder.mkdir(parents=True)
        torch.save({"param": value, "cat_dim": 0}, folder / "fp32.pt")
        for moment in ("exp_avg", "exp_avg_sq"):
            torch.save({"param": 7 * value}, folder / f"{moment}.pt")
    torch.save({"universal_checkpoint_info": {}, "optimizer_state": {}}, path / "mp_rank_00_model_states.pt")
    sharded = run / f"global_step{10 * (i + 1)}"
    sharded.mkdir()
    torch.save({"module": {}}, sharded / "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt")
    (run / "latest").write_text(sharded.name)
    return path


STEPS = (10, 20, 30)
LAYOUTS: dict[str, tuple[Callable[[Path, int, State], Path], tuple[int, ...]]] = {
    "Lightning": (_lightning, STEPS),
    "Lightning, names with metrics": (_lightning_metric_names, STEPS),
    "Lightning, log folder": (_lightning_log_folder, STEPS),
    "Lightning, sharded": (_lightning_sharded, STEPS),
    "OLMo-core": (_olmo_core, STEPS),
    "OLMo, unsharded": (_olmo_unsharded, STEPS),
    "verl": (_verl, STEPS),
    "verl, merged": (_verl_merged, STEPS),
    "diffusers": (_diffusers, STEPS),
    "timm": (_timm, (0, 1, 2)),
    "torchtune": (_torchtune, (0, 1, 2)),
    "nanotron": (_nanotron, STEPS),
    "DeepSpeed universal": (_universal, STEPS),
}
PREFIXES = {"nanotron": lambda name: ".".join(["model", *name.split(".")[:-1], "pp_block", name.split(".")[-1]])}
EPOCHS = ("timm", "torchtune")


@pytest.fixture(scope="module", autouse=True)
def _one_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Tensors placed on a mesh, and torch.distributed.checkpoint, want a process group."""
    dist.init_process_group(
        "gloo", init_method=f"file://{tmp_path_factory.mktemp('group') / 'store'}", rank=0, world_size=1
    )
    yield
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning:torch")
@pytest.mark.parametrize("program", LAYOUTS)
def test_a_programs_checkpoints_are_found_and_averaged(program: str, tmp_path: Path) -> None:
    write, steps = LAYOUTS[program]
    run = tmp_path / "run"
    states = [_state(i) for i in range(3)]
    paths = [write(run, i, state) for i, state in enumerate(states)]
    found = find_checkpoints(run)
    assert found.steps == steps
    assert found.unit == ("epoch" if program in EPOCHS else "step")
    assert [checkpoint.path for checkpoint in found.checkpoints] == paths
    renamed = PREFIXES.get(program, str)
    for checkpoint, state in zip(found.checkpoints, states, strict=True):
        assert checkpoint.tensors.keys() == {renamed(name) for name in state}
        for name, value in state.items():
            assert torch.equal(checkpoint.read_tensor(renamed(name)), value)
    weights = np.array([0.25, 0.25, 0.5])
    average_checkpoints(run, weights, tmp_path / "out")
    stem = "diffusion_pytorch_model" if program == "diffusers" else "model"
    written = load_file(tmp_path / "out" / f"{stem}.safetensors")
    for name in states[0]:
        expected = sum(float(w) * state[name] for w, state in zip(weights, states, strict=True))
        torch.testing.assert_close(written[renamed(name)], expected)
    assert find_checkpoints(paths).steps == steps  # as a list


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning:torch")
def test_configuration_goes_along_from_where_each_program_keeps_it(tmp_path: Path) -> None:
    for program, expected in {
        "verl": {"model_type": "llama"},
        "diffusers": {"_class_name": "UNet2DConditionModel"},
    }.items():
        for i in range(2):
            LAYOUTS[program][0](tmp_path / program, i, _state(i))
        average_checkpoints(tmp_path / program, [0.5, 0.5], tmp_path / f"{program}-out")
        assert json.loads((tmp_path / f"{program}-out" / "config.json").read_text()) == expected


def test_parts_of_a_model_are_averaged_apart(tmp_path: Path) -> None:
    for i in range(2):
        path = _diffusers(tmp_path, i, _state(i))
        (path / "text_encoder").mkdir()
        save_file({"other.weight": torch.full((2, 2), float(i))}, path / "text_encoder" / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"unet and text_encoder hold weights of diffusers. Average them apart"):
        find_checkpoints(tmp_path)
    found = find_checkpoints([tmp_path / f"checkpoint-{step}" / "text_encoder" for step in (20, 10)])
    assert found.steps == (10, 20) and list(found.checkpoints[0].tensors) == ["other.weight"]


def test_one_step_saved_twice_by_lightning_is_refused(tmp_path: Path) -> None:
    for i in range(2):
        _lightning(tmp_path, i, _state(i))
    _lightning(tmp_path, 1, _state(1), "epoch=1-step=20-v1.ckpt")
    with pytest.raises(CheckpointError, match="both are step 20"):
        find_checkpoints(tmp_path)


def test_several_log_folders_are_refused(tmp_path: Path) -> None:
    for version in range(2):
        for i in range(2):
            _lightning(tmp_path / f"version_{version}" / "checkpoints", i, _state(i))
    with pytest.raises(CheckpointError, match="several folders in it hold checkpoints .*version_0.*version_1"):
        find_checkpoints(tmp_path)
    assert find_checkpoints(tmp_path / "version_1").steps == (10, 20)


def test_a_rank_that_is_missing_is_named(tmp_path: Path) -> None:
    for i in range(2):
        file = _verl(tmp_path, i, _state(i)) / "actor" / "model_world_size_1_rank_0.pt"
        file.rename(file.with_name("model_world_size_2_rank_0.pt"))
    with pytest.raises(CheckpointError, match="has 1 files .* on 2 ranks; each rank's is needed"):
        find_checkpoints(tmp_path)


def test_a_tensor_parallel_part_that_is_missing_is_named(tmp_path: Path) -> None:
    for i in range(2):
        path = _nanotron(tmp_path, i, _state(i))
    file = next(path.rglob("*tp-rank-1-of-2*"))
    slices = {
        "local_global_slices_pairs": "0,3,None|None,None,None#0,3,None|None,None,None",
        "unsharded_shape": "(6, 4)",
    }
    save_file({"data": torch.zeros(3, 4)}, file, slices)
    with pytest.raises(CheckpointError, match=r"the parts of .* do not make up F32 \[6, 4\]"):
        find_checkpoints(tmp_path)


# Selection by a metric


def _monitored(run: Path, scores: list[float]) -> list[Path]:
    paths = []
    for i, score in enumerate(scores):
        state = {
            "monitor": "val_loss",
            "current_score": torch.tensor(score),
            "best_k_models": {"x.ckpt": torch.tensor(0.1)},
        }
        callbacks = {"ModelCheckpoint{'monitor': 'val_loss'}": state}
        paths.append(_lightning(run, i, _state(i), callbacks=callbacks))
    return paths


def test_the_best_by_lightnings_monitor(tmp_path: Path) -> None:
    _monitored(tmp_path, [0.5, 0.2, 0.9, 0.3])
    assert find_checkpoints(tmp_path, best=2, metric="val_loss").steps == (20, 40)
    assert find_checkpoints(tmp_path, best=2, metric="val_loss", mode="max").steps == (10, 30)


def test_the_best_by_the_trainers_log(make_run: Callable[..., Path]) -> None:
    run = make_run([_state(i) for i in range(4)])
    history: list[dict[str, float]] = []
    for step, loss, accuracy in [(10, 0.9, 0.1), (20, 0.5, 0.9), (30, 0.7, 0.3), (40, 0.6, 0.8)]:
        history = [*history, {"step": step, "loss": 1.0}, {"step": step, "eval_loss": loss, "eval_accuracy": accuracy}]
        (run / f"checkpoint-{step}" / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    assert find_checkpoints(run, best=3, metric="eval_loss").steps == (20, 30, 40)
    assert find_checkpoints(run, best=2, metric="eval_accuracy").steps == (20, 40)
    with pytest.raises(
        CheckpointError, match="says no value of 'eval_los'.*Metrics found: eval_accuracy, eval_loss, loss"
    ):
        find_checkpoints(run, best=2, metric="eval_los", mode="min")


def test_the_best_by_timms_metric(tmp_path: Path) -> None:
    for i in range(3):
        _timm(tmp_path, i, _state(i))
    assert find_checkpoints(tmp_path, best=2, metric="metric", mode="max").steps == (1, 2)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"best": 2}, "say by which metric"),
        ({"metric": "val_loss"}, "say how many with best"),
        ({"best": 1, "metric": "val_loss"}, "best=1: it must be at least 2 and at most 3"),
        ({"best": 9, "metric": "val_loss"}, "at most 3"),
        ({"best": 2, "metric": "score"}, "does not say whether small or large values are good"),
        ({"best": 2, "metric": "val_loss", "mode": "low"}, "mode='low'; it must be 'min' or 'max'"),
    ],
)
def test_a_selection_that_is_not_clear_is_refused(tmp_path: Path, arguments: dict[str, Any], message: str) -> None:
    _monitored(tmp_path, [0.5, 0.2, 0.9])
    with pytest.raises(ValueError, match=message):
        find_checkpoints(tmp_path, **arguments)


def test_commands_average_the_best(tmp_path: Path) -> None:
    """Without a rule, --best is the mean of those checkpoints."""
    _monitored(tmp_path / "run", [0.5, 0.2, 0.9, 0.3])
    command = ["average", str(tmp_path / "run"), "--best", "2", "--metric", "val_loss", "-o", str(tmp_path / "out")]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    written = load_file(tmp_path / "out" / "model.safetensors")
    torch.testing.assert_close(written["norm.bias"], (_state(1)["norm.bias"] + _state(3)["norm.bias"]) / 2)
    shown = CliRunner().invoke(app, ["inspect", str(tmp_path / "run"), *command[2:6]])
    assert shown.exit_code == 0 and "2 checkpoints, steps 20, 40" in shown.output, shown.output
