"""What several ranks check about exports and stored checkpoints; run by test_export.py."""

from __future__ import annotations

import json
import weakref
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from accelerate import Accelerator
from accelerate.utils import (
    DistributedType,
    FullyShardedDataParallelPlugin,
    save_fsdp_model,
    save_fsdp_optimizer,
)
from tokenizers import Tokenizer, models
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lagless import BEMA, EMA, Averager, WindowAverage
from lagless.checkpoints import CheckpointError, _atomic_folder, open_checkpoint
from lagless.checkpoints._writer import ModelWriter
from lagless.execution import RankError
from lagless.integrations.distributed import export_model
from lagless.posthoc import average_checkpoints

from .averager_checks import full, move, same

RULES = {"bema": BEMA.paper(update_freq=10), "lawa": WindowAverage(update_freq=10, window=2)}
MESHES = {"rows": [Shard(0)], "columns": [Shard(1)], "copies": [Replicate()]}


def make_llama(tied: bool = True, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=67,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        tie_word_embeddings=tied,
    )
    model = LlamaForCausalLM(config).to(dtype)
    model.model.norm.requires_grad_(False)
    return model


def shard_llama(model: LlamaForCausalLM) -> LlamaForCausalLM:
    for layer in model.model.layers:
        fully_shard(layer)
    return fully_shard(model)


def make_tokenizer() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "[U]": 1}, "[U]")))


def follow(model: LlamaForCausalLM, steps: int = 3) -> Averager:
    averager = Averager(model, {"ema": EMA(decay=0.5), "bema": BEMA.paper(update_freq=1)})
    for step in range(steps):
        move(model, step)
        averager.update()
    return averager


def check_exported_model_is_that_of_one_process(rank: int, world: int, folder: Path) -> None:
    for tied, dtype in ((True, torch.float32), (False, torch.bfloat16)):
        plain, model = make_llama(tied, dtype), shard_llama(make_llama(tied, dtype))
        reference, averager = follow(plain), follow(model)
        out = folder / f"tied-{tied}"
        export_model(averager, model, out, "bema", tokenizer=make_tokenizer(), max_shard_size="5KB")
        loaded, info = LlamaForCausalLM.from_pretrained(out, output_loading_info=True, dtype="auto")
        assert not info["missing_keys"] and not info["unexpected_keys"], info
        assert loaded.dtype == dtype and len(list(out.glob("model-*-of-*.safetensors"))) > 2
        with reference.applied("bema"):
            assert same(dict(loaded.named_parameters()), dict(plain.named_parameters()))
        config = json.loads((out / "config.json").read_text())
        assert config["architectures"] == ["LlamaForCausalLM"]
        assert json.loads((out / "lagless.json").read_text())["name"] == "bema"
        assert PreTrainedTokenizerFast.from_pretrained(out)("a")["input_ids"] == [0]
        assert same(dict(model.named_parameters()), dict(plain.named_parameters()))
        export_model(averager, model, out, "ema", dtype="float32", overwrite=True)
        assert LlamaForCausalLM.from_pretrained(out, dtype="auto").dtype == torch.float32
        dist.barrier()


def check_no_rank_holds_the_model(rank: int, world: int, folder: Path) -> None:
    """At no time is there more than one whole tensor beside the shards."""
    import lagless.integrations.distributed as distributed

    model = shard_llama(make_llama())
    averager = follow(model)
    original, wholes, most = distributed.gather, weakref.WeakSet(), 0

    def watch(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal most
        whole = original(tensor)
        wholes.add(whole)
        most = max(most, len(wholes))
        return whole

    distributed.gather = watch
    try:
        export_model(averager, model, folder / "out", "ema")
    finally:
        distributed.gather = original
    assert most <= 2, most  # the next one is gathered before the name of the last is bound to it


def check_one_rank_failing_to_export_leaves_the_old_folder(rank: int, world: int, folder: Path) -> None:
    import lagless.integrations.distributed as distributed

    model, out = shard_llama(make_llama()), folder / "out"
    averager = follow(model)
    export_model(averager, model, out, "ema")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    run = follow(model)
    original, calls = distributed.ModelWriter.__call__, []

    def fail(self, *arguments) -> None:
        calls.append(arguments)
        if len(calls) == 5:
            raise OSError(28, "No space left on device")
        original(self, *arguments)

    distributed.ModelWriter.__call__ = fail
    try:
        export_model(run, model, out, "ema", overwrite=True)
    except (OSError, RankError) as error:
        assert isinstance(error, OSError) == (rank == 0) and "No space left" in str(error)
    else:
        raise AssertionError("exported")
    finally:
        distributed.ModelWriter.__call__ = original
    dist.barrier()
    assert [entry.name for entry in folder.iterdir()] == ["out"]
    assert before == {path.name: path.read_bytes() for path in out.iterdir()}


def check_another_model_is_refused(rank: int, world: int, folder: Path) -> None:
    averager = follow(shard_llama(make_llama()))
    try:
        export_model(averager, shard_llama(make_llama()).model, folder / "out", "ema")
    except ValueError as error:
        assert "give the model it was made of" in str(error)
    else:
        raise AssertionError("exported")
    dist.barrier()
    assert not list(folder.iterdir())


def check_stored_checkpoints(rank: int, world: int, folder: Path) -> None:
    """For test_export.py: the same states as DCP at the top level, as Accelerate writes them, and as one file."""
    from safetensors.torch import save_file

    plain, model = make_llama(), shard_llama(make_llama())
    mesh = init_device_mesh("cpu", (world,))
    for step in (10, 20, 30, 40):
        move(plain, step)
        move(model, step)
        whole = {name: torch.arange(35.0).view(5, 7) * step for name in MESHES} | {"count": torch.tensor(step)}
        parts = {name: distribute_tensor(whole[name], mesh, placements) for name, placements in MESHES.items()}
        state = model.state_dict() | parts | {"count": whole["count"]}
        dcp.save(
            state | {"optimizer": {"moment": parts["rows"]}, "epoch": 3}, checkpoint_id=folder / f"top/step-{step}"
        )
        place = folder / f"accelerate/checkpoint-{step}"
        dcp.save({"model": state}, checkpoint_id=place / "pytorch_model_fsdp_0")
        dcp.save({"optimizer": {"moment": parts["rows"]}}, checkpoint_id=place / "optimizer_0")
        if rank == 0:
            single = {name: tensor.detach().clone() for name, tensor in plain.state_dict().items()} | whole
            (folder / f"single/checkpoint-{step}").mkdir(parents=True)
            save_file(single, folder / f"single/checkpoint-{step}/model.safetensors")
    dist.barrier()


def check_models_that_accelerate_shards(rank: int, world: int, folder: Path) -> None:
    """Accelerate shards on accelerators only: its state is told so here, and everything after that is its own."""
    accelerator = Accelerator(cpu=True)
    accelerator.state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
        state_dict_type="SHARDED_STATE_DICT",
    )
    model = make_llama()
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=0.1))
    averager = Averager(model, EMA(decay=0.75))
    averager.attach(optimizer)
    wanted = {name: full(model.get_parameter(name)).clone() for name in names}
    tokens = torch.arange(8).view(1, 8)
    for _ in range(3):
        accelerator.backward(model(input_ids=tokens, labels=tokens).loss)
        optimizer.step()
        optimizer.zero_grad()
        wanted = {name: mean.lerp(full(model.get_parameter(name)), 0.25) for name, mean in wanted.items()}
    assert same(dict(averager.named_averages()), wanted)
    save_fsdp_model(plugin, accelerator, model, folder / "checkpoint-3")
    save_fsdp_optimizer(plugin, accelerator, optimizer, model, folder / "checkpoint-3")
    stored = open_checkpoint(folder / "checkpoint-3")
    assert set(names) <= stored.tensors.keys()
    assert all(torch.equal(stored.read_tensor(name), full(model.get_parameter(name))) for name in names)


def check_ranks_divide_the_product(rank: int, world: int, folder: Path) -> None:
    run = folder.parent / "check_stored_checkpoints" / "accelerate"
    average_checkpoints(run, RULES, folder / "together", max_shard_size="4KB", group=dist.group.WORLD)
    if rank == 0:
        average_checkpoints(run, RULES, folder / "alone", max_shard_size="4KB")
        files = sorted(path.relative_to(folder / "alone") for path in (folder / "alone").rglob("*"))
        assert files == sorted(path.relative_to(folder / "together") for path in (folder / "together").rglob("*"))
        for file in files:
            if (folder / "alone" / file).is_file():
                assert (folder / "alone" / file).read_bytes() == (folder / "together" / file).read_bytes(), file


def check_one_rank_failing_leaves_no_average(rank: int, world: int, folder: Path) -> None:
    run = folder.parent / "check_stored_checkpoints" / "single"
    for victim, owner, name in ((world - 1, ModelWriter, "__call__"), (0, _atomic_folder, "_put_in_place")):
        original = getattr(owner, name)

        def fail(*arguments, victim=victim, original=original) -> None:
            if rank == victim:
                raise CheckpointError("the disk is full")
            original(*arguments)

        setattr(owner, name, fail)
        try:
            average_checkpoints(run, RULES, folder / "out", max_shard_size="4KB", group=dist.group.WORLD)
        except (CheckpointError, RankError) as error:
            assert str(error) == "the disk is full" if rank == victim else f"rank {victim} failed" in str(error)
        else:
            raise AssertionError("averaged")
        finally:
            setattr(owner, name, original)
        dist.barrier()
        left = list(folder.iterdir())
        dist.barrier()  # nobody goes on to the next round before all have looked
        assert not left


CHECKS = {name: value for name, value in list(globals().items()) if name.startswith("check_")}
