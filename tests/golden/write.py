"""Writes the golden files. They were written by lagless 0.1.0 at commit 06d7e71 under torch 2.13.0, once.

This script is kept to say how they were made. Files are never written again: they stand for those that users have. A
new format, kind or setting gets files of its own, written by the version that introduces it. It refuses to replace a
file; from the root of the repository: ``python -m tests.golden.write``.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch import Tensor

from .cases import (
    AVERAGED,
    CHECKPOINTS,
    COMBINATION,
    END,
    FILES,
    GRIDS,
    MICROBATCHES,
    MODEL_RULES,
    OPTIMIZERS,
    RULES,
    SAVED,
    SHAPES,
    START_RULES,
    STORAGES,
    Model,
    average_of,
    flat,
    follow,
    new_parameters,
    train,
    weights_at,
    weights_of,
)
from .names import Averager, average_checkpoints, combine_checkpoints, export_model, trajectory_weights
from .trainers import LIGHTNING, fit


def main() -> None:
    """Write everything."""
    if FILES.exists():
        raise SystemExit(f"{FILES} exists, and golden files are never written again.")
    torch.set_num_threads(1)
    FILES.mkdir()
    write_run()
    write_weights()
    write_averagers()
    write_optimizers()
    write_checkpoints()
    write_dcp()
    write_export()
    write_lightning()


def write_run() -> None:
    """The run: a random walk that drifts, gradients, and what this processor takes for roots of their sizes."""
    draw = torch.Generator().manual_seed(20260)
    arrays: dict[str, Tensor] = {}
    for name, shape in SHAPES.items():
        steps = torch.randn(END + 1, *shape, generator=draw, dtype=torch.float64)
        arrays[f"trajectory/{name}"] = (0.1 * steps + 0.05).cumsum(0).float().double()
        for kind in ("gradients", "sampled"):
            arrays[f"{kind}/{name}"] = 0.3 + torch.randn(END, MICROBATCHES, *shape, generator=draw)
    arrays["roots"] = arrays["gradients/layer.weight"].abs().sqrt()
    save_file(arrays, FILES / "run.safetensors")


def write_weights() -> None:
    """The weights of every rule on every grid that has an update of it."""
    weights = {}
    for name, rule in RULES.items():
        for grid, steps in GRIDS.items():
            try:
                weights[f"{name}/{grid}"] = torch.from_numpy(trajectory_weights(rule, steps))
            except ValueError:
                continue
    save_file(weights, FILES / "trajectory_weights.safetensors")


def write_averagers() -> None:
    """States of all rules together in every storage, of each rule alone, and with a base checkpoint."""
    folder, expected = FILES / "averager", {}
    folder.mkdir()

    def write(case: str, rules: dict, of_weights: torch.dtype, **options) -> Averager:
        live = weights_at(0, of_weights)
        averager = Averager(live, rules, **options)
        follow(averager, live, 0, SAVED)
        averager.save(folder / f"{case}.safetensors")
        if case == "all-float32":
            torch.save(averager.state_dict(), folder / "all-float32.pt")
        for step in (SAVED, END):
            for name in rules:
                expected[f"{case}/{step}/{name}"] = flat(averager.read(name))
            if step == SAVED:
                follow(averager, live, SAVED, END)
        return averager

    for storage, (weights, averages) in STORAGES.items():
        write(f"all-{storage}", RULES, weights, dtype=averages, seed=3)
    for name, rule in RULES.items():
        write(f"one-{name}", {name: rule}, torch.float32)
    (folder / "base").mkdir()
    save_file(weights_at(0, torch.float32), folder / "base" / "model.safetensors", {"format": "pt"})
    write("start", START_RULES, torch.float32, start=folder / "base")
    save_file(expected, folder / "expected.safetensors")


def write_optimizers() -> None:
    """States of all optimizers beside the weights, and where they lead."""
    folder, expected = FILES / "optimizers", {}
    folder.mkdir()
    for case, make in OPTIMIZERS.items():
        parameters = new_parameters(case)
        optimizer = make(parameters)
        train(case, optimizer, parameters, 0, SAVED)
        if case.endswith("evaluating"):
            optimizer.eval()
        state = {"model": weights_of(parameters), "optimizer": copy.deepcopy(optimizer.state_dict())}
        torch.save(state, folder / f"{case}.pt")
        if case.endswith("evaluating"):
            optimizer.train()
        train(case, optimizer, parameters, SAVED, END)
        expected[f"{case}/weights"] = flat(weights_of(parameters))
        if case in AVERAGED:
            expected[f"{case}/average"] = flat(average_of(optimizer, parameters))
    save_file(expected, folder / "expected.safetensors")


def write_checkpoints() -> None:
    """A run of sharded checkpoints, the same one of torch files, averages of it by every rule, and a weighted sum."""
    folder = FILES / "checkpoints"
    for step in CHECKPOINTS:
        state = {**weights_at(step, torch.float32), "positions": torch.arange(5)}
        sharded, torch_file = (folder / kind / f"checkpoint-{step}" for kind in ("sharded", "torch"))
        for checkpoint in (sharded, torch_file):
            checkpoint.mkdir(parents=True)
            (checkpoint / "config.json").write_text('{"model_type": "golden", "dtype": "float32"}\n')
        torch.save(state, torch_file / "pytorch_model.bin")
        files = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
        weight_map = {name: files[i % 2] for i, name in enumerate(state)}
        for file in files:
            save_file({n: t for n, t in state.items() if weight_map[n] == file}, sharded / file, {"format": "pt"})
        size = sum(t.numel() * t.element_size() for t in state.values())
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        (sharded / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    # What compilers contract changes the last bits of sums, and is gone when those are rounded to a narrower type.
    average_checkpoints(folder / "sharded", RULES, folder / "averaged", accumulate="float64")
    average_checkpoints(folder / "sharded", RULES["bema"], folder / "averaged-bfloat16", dtype="bfloat16")
    paths = [folder / "torch" / f"checkpoint-{step}" for step in CHECKPOINTS]
    [combined] = combine_checkpoints(paths, COMBINATION)
    save_file(combined, folder / "combined.safetensors")


def _averaged_model() -> tuple[Model, Averager]:
    model = Model()
    averager = Averager(model, MODEL_RULES)
    follow(averager, model.tensors(), 0, SAVED)
    return model, averager


def write_dcp() -> None:
    """A model and its averages as folders of torch.distributed.checkpoint."""
    model, averager = _averaged_model()
    dcp.save({"model": model.state_dict()}, checkpoint_id=FILES / "dcp" / "model")
    dcp.save({"averager": averager.state_dict()}, checkpoint_id=FILES / "dcp" / "averager")


def write_export() -> None:
    """The folder that an average is exported to."""
    model, averager = _averaged_model()
    export_model(averager, model, FILES / "export", "bema")


def write_lightning() -> None:
    """A checkpoint of Lightning's Trainer, the averages in it, and what it leads to."""
    with TemporaryDirectory() as folder:
        trainer, _, averager = fit(Path(folder), SAVED)
        trainer.save_checkpoint(LIGHTNING)
        expected = {f"{SAVED}/{name}/{key}": t for name in MODEL_RULES for key, t in averager.read(name).items()}
        _, module, averager = fit(Path(folder), END)
    expected |= {f"{END}/{name}/{key}": t for name in MODEL_RULES for key, t in averager.read(name).items()}
    expected |= {f"live/{name}": p.detach() for name, p in module.named_parameters()}
    save_file(expected, FILES / "lightning.expected.safetensors")


if __name__ == "__main__":
    main()
