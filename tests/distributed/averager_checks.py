"""What several ranks check about the Averager; run by test_averager.py."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from lagless import BEMA, DEMA, EMA, OUEMA, Averager, WindowAverage
from lagless.execution import RankError
from lagless.execution._sharding import Sharding

RULES = {
    "bema": BEMA.paper(update_freq=2, update_after=1),
    "ema": EMA(decay=0.9),
    "dema": DEMA.paper(update_freq=3),
    "ouema": OUEMA.paper(update_freq=2),
    "lawa": WindowAverage(window=2),
}


class Model(nn.Module):
    """Uneven shards (7 rows), empty ones (1 row), and tied weights of both kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.block = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4))
        self.gate = nn.Linear(4, 1)
        self.second_gate = nn.Linear(4, 1, bias=False)
        self.second_gate.weight = self.gate.weight
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight
        self.frozen = nn.Linear(4, 4).requires_grad_(False)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.block(self.embed(tokens))
        return self.head(self.frozen(hidden) * self.gate(hidden) + self.second_gate(hidden))


TOKENS = torch.arange(14).view(2, 7) % 7


def make_model(dtype: torch.dtype = torch.float32) -> Model:
    torch.manual_seed(1)
    return Model().to(dtype)


def shard(model: Model, **options) -> Model:
    fully_shard(model.block, **options)
    return fully_shard(model, **options)


def full(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def move(model: nn.Module, step: int) -> None:
    """The same new weights, whatever the sharding: it has nothing to do with how gradients are summed."""
    generator = torch.Generator().manual_seed(step)
    with torch.no_grad():
        for parameter in model.parameters():
            delta = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
            if isinstance(parameter, DTensor):
                delta = distribute_tensor(delta, parameter.device_mesh, parameter.placements)
            parameter.add_(delta)


def train(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(TOKENS).flatten(0, 1).float(), TOKENS.flatten()).backward()
    optimizer.step()


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    assert one.keys() == other.keys(), (one.keys(), other.keys())
    return all(torch.equal(full(one[name]), full(other[name])) for name in one)


def local_bits(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.to_local().detach().clone() for name, p in model.named_parameters()}


def check_sharded_equals_unsharded(rank: int, world: int, folder: Path) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        plain, model = make_model(dtype), shard(make_model(dtype))
        reference, averager = Averager(plain, RULES), Averager(model, RULES)
        for step in range(1, 8):
            move(plain, step)
            move(model, step)
            reference.update()
            with CommDebugMode() as communication:
                averager.update()
            assert communication.get_total_counts() == 0
        for name in RULES:
            assert same(averager.read(name), reference.read(name)), name
            assert all(isinstance(tensor, DTensor) for tensor in averager.read(name).values())
        held = sum(t.to_local().numel() for t in averager.state_dict()["tensors"].values())
        assert held < sum(t.numel() for t in reference.state_dict()["tensors"].values()) / world * 1.6


def check_training_equals_one_process(rank: int, world: int, folder: Path) -> None:
    if world != 2:  # the mean of 3 equal gradients is rounded
        return
    reference = make_model()
    optimizer = torch.optim.AdamW(reference.parameters(), lr=0.1)
    wanted = Averager(reference, RULES)
    wanted.attach(optimizer)
    for _ in range(6):
        train(reference, optimizer)
    for reshard_after_forward in (True, False):
        model = shard(make_model(), reshard_after_forward=reshard_after_forward)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        averager = Averager(model, RULES)
        averager.attach(optimizer)
        for step in range(6):
            train(model, optimizer)
            with averager.applied("ema"), torch.no_grad():  # evaluation is neutral
                model(TOKENS)
            if step == 3:
                model(TOKENS)  # leaves gathered parameters behind
                averager.read("ema")
        assert all(same(averager.read(name), wanted.read(name)) for name in RULES)
        assert same(dict(model.named_parameters()), dict(reference.named_parameters()))


def check_mixed_precision_averages_the_float32_weights(rank: int, world: int, folder: Path) -> None:
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model = shard(make_model(), mp_policy=policy)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    averager = Averager(model, EMA(decay=0.75, update_freq=1))
    averager.attach(optimizer)
    wanted = {name: full(p).clone() for name, p in model.named_parameters() if p.requires_grad}
    for _ in range(3):
        train(model, optimizer)
        wanted = {n: w.lerp(full(dict(model.named_parameters())[n]).detach(), 0.25) for n, w in wanted.items()}
    found = {name: tensor for name, tensor in averager.named_averages()}
    assert same(found, wanted) and all(tensor.dtype == torch.float32 for tensor in found.values())


def check_applied_is_exact_and_undone(rank: int, world: int, folder: Path) -> None:
    plain, model = make_model(), shard(make_model())
    reference, averager = Averager(plain, EMA(decay=0.5)), Averager(model, EMA(decay=0.5))
    for step in range(3):
        move(plain, step)
        move(model, step)
        reference.update()
        averager.update()
    before = local_bits(model)
    with torch.no_grad():
        model(TOKENS)  # the root's parameters stay gathered: live ones must not serve as averaged ones
        with averager.applied():
            averaged = model(TOKENS)
        live = model(TOKENS)
        with reference.applied():
            assert torch.equal(averaged, plain(TOKENS))
        assert torch.equal(live, plain(TOKENS))
    model.unshard()
    try:
        with averager.applied():
            model(TOKENS)
            raise KeyError
    except KeyError:
        pass
    with torch.no_grad():
        assert torch.equal(model(TOKENS), live)
    model.reshard()
    after = local_bits(model)
    assert all(torch.equal(before[n], after[n]) for n in before)
    try:
        with averager.applied():
            model.block.to(torch.float64)
    except RuntimeError as error:
        assert "Resume from a checkpoint" in str(error)
    else:
        raise AssertionError("FSDP does not follow a change of dtype back")


def check_tensor_parallel(rank: int, world: int, folder: Path) -> None:
    mesh = init_device_mesh("cpu", (world,))
    whole = {"rows": torch.randn(5, 4), "columns": torch.randn(3, 7), "copies": torch.randn(3)}
    for tensor in whole.values():
        dist.broadcast(tensor, 0)
    placements = {"rows": [Shard(0)], "columns": [Shard(1)], "copies": [Replicate()]}
    parts = {name: distribute_tensor(tensor, mesh, placements[name]) for name, tensor in whole.items()}
    reference, averager = Averager(whole, RULES), Averager(parts, RULES)
    for step in range(4):
        for name in whole:
            whole[name].add_(step)
            parts[name].add_(step)
        reference.update()
        averager.update()
    assert same(averager.read("bema"), reference.read("bema"))
    averager.save(folder / "state.safetensors")
    again = Averager(parts, RULES)
    again.load(folder / "state.safetensors")
    assert all(same(again.read(name), reference.read(name)) for name in RULES)
    if rank == 0:
        save_file(whole, folder / "base.safetensors")
    dist.barrier()
    Averager(parts, BEMA.paper(update_freq=1), start=folder / "base.safetensors").update()  # else this is not θ_0


def check_hybrid_sharding(rank: int, world: int, folder: Path) -> None:
    """Replicated over one dimension of the mesh, sharded over the other."""
    for shape in ((1, world), (world, 1)):
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard"))
        plain, model = make_model(), shard(make_model(), mesh=mesh)
        reference, averager = Averager(plain, RULES), Averager(model, RULES)
        for step in range(4):
            move(plain, step)
            move(model, step)
            reference.update()
            averager.update()
        assert same(averager.read("bema"), reference.read("bema"))


def check_tensor_parallel_within_fsdp(rank: int, world: int, folder: Path) -> None:
    plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
    for shape in ((1, world), (world, 1)):
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("data", "tensor"))
        torch.manual_seed(3)
        plain = nn.Sequential(nn.Linear(4, 12), nn.Tanh(), nn.Linear(12, 4))
        model = fully_shard(parallelize_module(copy.deepcopy(plain), mesh["tensor"], plan), mesh=mesh["data"])
        reference, averager = Averager(plain, RULES), Averager(model, RULES)
        for _ in range(5):
            for module in (plain, model):
                for parameter in module.parameters():
                    parameter.data.mul_(1.1)
            reference.update()
            averager.update()
        averager.save(folder / "state.safetensors")
        again = Averager(model, RULES)
        again.load(folder / "state.safetensors")
        for name in RULES:
            assert same(averager.read(name), reference.read(name))
            assert same(again.read(name), reference.read(name))


def check_an_average_on_the_host_stays_there(rank: int, world: int, folder: Path) -> None:
    """Parameters on an accelerator, averages on the host: the DTensor of a state is the buffer itself."""
    mesh = DeviceMesh("meta", range(world))  # stands for the accelerator
    sharding, part = Sharding(torch.Size((3, 4)), mesh, (Shard(0),), (4, 1)), torch.ones(3, 4)
    part = part[sharding.box]
    shown = sharding.present(part)
    assert isinstance(shown, DTensor) and shown.shape == (3, 4) and shown.device.type == "cpu"
    assert shown.to_local().data_ptr() == part.data_ptr() and sharding.part_of(shown).data_ptr() == part.data_ptr()


def check_start_is_read_by_rows(rank: int, world: int, folder: Path) -> None:
    plain, model = make_model(), shard(make_model())
    if rank == 0:
        save_file({n: p.detach().clone() for n, p in plain.named_parameters()}, folder / "base.safetensors")
    dist.barrier()
    reference = Averager(plain, BEMA.paper(update_freq=1))
    averager = Averager(model, BEMA.paper(update_freq=1), start=folder / "base.safetensors")
    for step in range(3):
        move(plain, step)
        move(model, step)
        reference.update()
        averager.update()
    assert same(averager.read(), reference.read())
    try:
        Averager(model, BEMA.paper(update_freq=1), start=folder / "base.safetensors").update()
    except ValueError as error:
        assert "is not θ_0" in str(error)
    else:
        raise AssertionError("weights that have moved passed for θ_0")


def run_to(model: nn.Module, averager: Averager, begin: int, end: int) -> None:
    for step in range(begin + 1, end + 1):
        move(model, step)
        averager.update()


def check_state_for_another_world_size(rank: int, world: int, folder: Path) -> None:
    """Save at step 4; test_averager.py has other world sizes go on from here."""
    model = shard(make_model())
    averager = Averager(model, RULES)
    run_to(model, averager, 0, 4)
    averager.save(folder / "state.safetensors")
    dcp.save({"averager": averager, "model": model}, checkpoint_id=folder / "dcp")


def resume(folder: Path, model: nn.Module, way: str) -> None:
    """From the state of other ranks on, equal to a run that never stopped."""
    plain = make_model()
    reference = Averager(plain, RULES)
    run_to(plain, reference, 0, 9)
    averager = Averager(model, RULES)
    if way == "dcp":
        dcp.load({"averager": averager, "model": model}, checkpoint_id=folder / "dcp")
    else:
        averager.load(folder / "state.safetensors")
        dcp.load({"model": model}, checkpoint_id=folder / "dcp")
    assert averager.step == 4
    run_to(model, averager, 4, 9)
    for name in RULES:
        assert same(averager.read(name), reference.read(name)), (way, name)


def check_resume_from_another_world_size(rank: int, world: int, folder: Path) -> None:
    if world == 3:
        for way in ("dcp", "file"):
            resume(folder.parent.parent / "2" / "check_state_for_another_world_size", shard(make_model()), way)


def check_resumed_training_equals_never_stopped(rank: int, world: int, folder: Path) -> None:
    def start() -> tuple[Model, torch.optim.Optimizer, Averager]:
        model = shard(make_model())
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        averager = Averager(model, RULES, dtype=torch.bfloat16)  # the noise of rounding resumes too
        averager.attach(optimizer)
        return model, optimizer, averager

    model, optimizer, averager = start()
    for step in range(1, 7):
        train(model, optimizer)
        if step == 3:
            averager.save(folder / "state.safetensors")
            state = copy.deepcopy({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    again, optimizer, resumed = start()
    again.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    resumed.load(folder / "state.safetensors")
    for _ in range(3):
        train(again, optimizer)
    assert same(dict(again.named_parameters()), dict(model.named_parameters()))
    assert all(same(averager.read(name), resumed.read(name)) for name in RULES)


def check_a_state_sharded_otherwise_changes_nothing(rank: int, world: int, folder: Path) -> None:
    mesh = init_device_mesh("cpu", (world,))
    whole = torch.arange(12.0).view(3, 4)
    rows, columns = (Averager({"a": distribute_tensor(whole, mesh, [Shard(dim)])}, EMA(decay=0.9)) for dim in (0, 1))
    plain = Averager({"a": whole}, EMA(decay=0.9))
    for other in (columns, plain):
        try:
            other.load_state_dict(rows.state_dict())
        except ValueError as error:
            assert "reshards while it loads" in str(error), error
        else:
            raise AssertionError("accepted")


def check_ddp_equals_one_process(rank: int, world: int, folder: Path) -> None:
    if world != 2:
        return
    reference, model = make_model(), nn.parallel.DistributedDataParallel(make_model(), find_unused_parameters=False)
    averagers = []
    for module in (reference, model):
        optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
        averagers.append(Averager(module, RULES))
        averagers[-1].attach(optimizer)
        for _ in range(4):
            train(module, optimizer)
    assert all(same(averagers[0].read(name), averagers[1].read(name)) for name in RULES)
    averagers[1].save(folder / "state.safetensors")  # on every rank: replicas write the same, whichever comes last
    averagers[0].load(folder / "state.safetensors")


def check_fsdp1_is_refused(rank: int, world: int, folder: Path) -> None:
    for use_orig_params in (True, False):
        model = FullyShardedDataParallel(
            nn.Linear(4, 4), use_orig_params=use_orig_params, device_id=torch.device("cpu")
        )
        for source in (model, model.module):
            try:
                Averager(source, EMA())
            except NotImplementedError as error:
                assert "fsdp_version: 2" in str(error)
            else:
                raise AssertionError("accepted")


def check_ranks_with_different_parameters_are_refused(rank: int, world: int, folder: Path) -> None:
    mesh = init_device_mesh("cpu", (world,))
    averager = Averager({f"stage {rank}": distribute_tensor(torch.ones(4), mesh, [Shard(0)])}, EMA())
    try:
        averager.save(folder / "state.safetensors")
    except RankError as error:
        assert "differ between ranks, as in pipeline parallelism" in str(error)
    else:
        raise AssertionError("saved")
    dist.barrier()
    assert not list(folder.iterdir())


def check_sharding_after_the_averager_is_refused(rank: int, world: int, folder: Path) -> None:
    model = make_model()
    averager = Averager(model, EMA())
    shard(model)
    try:
        averager.update()
    except RuntimeError as error:
        assert "make a new Averager after changing the model" in str(error)
    else:
        raise AssertionError("accepted")


def check_one_rank_failing_to_save_leaves_the_old_file(rank: int, world: int, folder: Path) -> None:
    import lagless.averaging._state_file as state

    model = shard(make_model())
    averager, path = Averager(model, EMA(decay=0.9)), folder / "state.safetensors"
    averager.save(path)
    old = path.read_bytes()
    run_to(model, averager, 0, 2)
    original, calls = state.byte_view, []

    def fail(tensor: Tensor):
        calls.append(tensor)
        if rank == world - 1 and len(calls) == 3:
            raise OSError(28, "No space left on device")
        return original(tensor)

    state.byte_view = fail
    try:
        averager.save(path)
    except (OSError, RankError) as error:
        assert isinstance(error, OSError) == (rank == world - 1)
        assert "No space left" in str(error)
    else:
        raise AssertionError("saved")
    finally:
        state.byte_view = original
    dist.barrier()
    assert [entry.name for entry in folder.iterdir()] == [path.name] and path.read_bytes() == old


CHECKS = {name: value for name, value in list(globals().items()) if name.startswith("check_")}
