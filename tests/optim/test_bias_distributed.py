"""Two ranks with k microbatches each take the steps of one process with 2k of them."""

import contextlib
import datetime
import time
import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from lagless.optim import BiasCorrectedAdamW, BiasCorrectedShampoo, BiasCorrectedSophia

ADAMW = {
    "standard": {"cross_fit": "none"},
    "inverse": {"cross_fit": "none", "inverse_correction": "pre_ema"},
    "split": {"cross_fit": "split", "inverse_correction": "post_ema"},
    "symmetric": {"cross_fit": "symmetric", "inverse_correction": "pre_ema"},
    "leave one out": {"inverse_correction": "jackknife"},
    "skewed": {"folds": "skewed"},
    "exact": {"folds": "exact"},
    "exact jackknife": {"folds": "exact", "inverse_correction": "jackknife"},
}


def make_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1)).double()


def adamw(model, form):
    return BiasCorrectedAdamW(model.named_parameters(), lr=0.1, eps=1e-3, warm_start=1, standard=(), **form)


def shampoo(model, _):
    return BiasCorrectedShampoo(
        model.named_parameters(), damping=1e-2, lr=0.1, root_freq=2, inverse_correction="post_ema", standard=()
    )


def batches(steps, microbatches):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(steps, microbatches, 4, 3, generator=generator, dtype=torch.float64)


def order(j, rank):
    """The place of a rank's microbatch in one process, so that halves are the same."""
    return 2 * rank + (j if rank == 0 else 1 - j)


def train(model, optimizer, data, rank=None, each=2, sync_always=False):
    """Train on ``data``; a rank takes its own microbatches, and gradients are averaged over ranks."""
    for step in data:
        optimizer.zero_grad()
        mine = step if rank is None else [step[order(j, rank)] for j in range(each)]
        for j, x in enumerate(mine):
            quiet = rank is not None and isinstance(model, DistributedDataParallel) and j + 1 < each and not sync_always
            with model.no_sync() if quiet else contextlib.nullcontext():
                (model(x).square().mean() / len(mine)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
    return [p.detach() for p in model.parameters()]


def same(found, expected, message):
    for p, q in zip(found, expected, strict=True):
        whole = p.full_tensor() if isinstance(p, DTensor) else p
        torch.testing.assert_close(whole, q, rtol=1e-9, atol=1e-9, msg=lambda m: f"{message}: {m}")


def replicated(rank):
    data = batches(4, 4)
    makers = [(name, adamw, form) for name, form in ADAMW.items()] + [("Shampoo", shampoo, None)]
    for name, make, form in makers:
        # A process group of this rank alone makes the reference a single process.
        alone = make_model()
        single = make(alone, form)
        single._microbatches.group = None
        expected = train(alone, single, data)
        for sync_always in (False, True):
            model = DistributedDataParallel(make_model())
            found = train(model, make(model.module, form), data, rank, sync_always=sync_always)
            same(found, expected, f"{name}, sync_always={sync_always}")


def refusals(_):
    """What keeps gradients of its own would not see those of the other ranks."""
    model = make_model()
    with pytest.raises(ValueError, match="folds='exact'; it must be 'moments' in data parallel"):
        adamw(model, {"cross_fit": "split", "folds": "exact"})
    with pytest.raises(ValueError, match="folds='exact'; it must be 'lagged' in data parallel"):
        BiasCorrectedShampoo(model.named_parameters(), folds="exact")


def one_microbatch_per_rank(rank):
    """Ranks are the folds."""
    data = batches(3, 2)
    for form in (ADAMW["exact"], ADAMW["leave one out"], {"cross_fit": "split"}):
        alone = make_model()
        single = adamw(alone, form)
        single._microbatches.group = None
        expected = train(alone, single, data)
        model = DistributedDataParallel(make_model())
        optimizer = adamw(model.module, form)
        for step in data:
            optimizer.zero_grad()
            model(step[rank]).square().mean().backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
        same([p.detach() for p in model.parameters()], expected, str(form))


def sharded(rank):
    """FSDP reduces every microbatch over the ranks: it is one fold, as large as all of them together."""
    data = batches(4, 8)
    for name, form in ADAMW.items():
        alone = make_model()
        single = adamw(alone, form)
        single._microbatches.group = None
        together = data.view(4, 4, 2, 4, 3).flatten(2, 3)
        expected = train(alone, single, together)
        model = make_model()
        for layer in (model[0], model[2]):
            fully_shard(layer, mesh=init_device_mesh("cpu", (2,)))
        fully_shard(model)
        optimizer = adamw(model, form)
        for step in data.view(4, 4, 2, 4, 3):
            optimizer.zero_grad()
            for microbatch in step:
                (model(microbatch[rank]).square().mean() / 4).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
        same([p.detach() for p in model.parameters()], expected, f"FSDP, {name}")
        assert all(isinstance(s["exp_avg"], DTensor) for s in optimizer.state.values())
    with pytest.raises(NotImplementedError, match="these parameters are sharded"):
        shampoo(model, None)


def not_finite_on_one_rank(rank):
    """Every rank skips."""
    model = make_model()
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    optimizer = adamw(model, ADAMW["leave one out"])
    before = [p.detach().full_tensor().clone() for p in model.parameters()]
    for _ in range(2):
        model(torch.ones(1, 3, dtype=torch.float64)).sum().backward()
    bias = model[0].bias.grad.to_local()
    if rank == 0:
        bias[0] = float("nan")
    optimizer.step()
    assert bool(optimizer.found_inf)
    same([p.detach() for p in model.parameters()], before, "skipped")


class Table(nn.Module):
    """A loss that is linear in its parameter."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.zeros(5, 5, dtype=torch.float64))

    def forward(self, gradient):
        return (self.table * gradient).sum()


def curvature(rank):
    """Sophia: sampled-label gradients are made here, so that both runs have the same."""
    generator = torch.Generator().manual_seed(2)
    drawn = torch.randn(4, 2, 4, 5, 5, generator=generator, dtype=torch.float64)
    for form in ({"cross_fit": "none", "inverse_correction": "post_ema"}, {"inverse_correction": "post_ema"}):
        tables = []
        for ranks in (None, rank):
            model = Table()
            settings = {"lr": 0.1, "eps": 1e-3, "hessian_freq": 2, "clip": 100.0}
            optimizer = BiasCorrectedSophia(model.named_parameters(), **settings, **form)
            loss = model
            if ranks is None:
                optimizer._microbatches.group = None
            else:
                loss = DistributedDataParallel(model)
            for true, sampled in drawn:
                places = range(4) if ranks is None else [order(j, rank) for j in range(2)]
                optimizer.zero_grad()
                for place in places:
                    if optimizer.curvature_due:
                        optimizer.add_curvature(model(sampled[place]))
                    (loss(true[place]) / len(places)).backward()
                optimizer.step()
            tables.append(model.table.detach())
        same(tables[1:], tables[:1], f"Sophia, {form}")


def work(rank, store):
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=datetime.timedelta(seconds=60)
    )
    for check in (replicated, refusals, one_microbatch_per_rank, sharded, not_finite_on_one_rank, curvature):
        check(rank)
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")
def test_two_ranks_equal_one_process(tmp_path):
    context = torch.multiprocessing.spawn(work, (str(tmp_path / "store"),), nprocs=2, join=False)
    assert context is not None
    deadline = time.monotonic() + 240
    try:
        while not context.join(timeout=5):
            assert time.monotonic() < deadline, "the ranks did not finish in time"
    finally:
        for process in context.processes:
            process.kill()
