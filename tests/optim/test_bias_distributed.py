"""Two ranks with k microbatches each take the steps of one process with 2k of them."""

import contextlib
import datetime
import shutil
import tempfile
import time
import warnings
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from lagless.execution import _process_sums
from lagless.execution._sharding import local
from lagless.optim import BiasCorrectedAdamW, BiasCorrectedShampoo, BiasCorrectedSophia, GradientNoise

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
    return BiasCorrectedAdamW(model.named_parameters(), lr=0.1, eps=1e-3, warm_start=1, exclude=(), **form)


def shampoo(model, _):
    return BiasCorrectedShampoo(
        model.named_parameters(), damping=1e-2, lr=0.1, root_freq=2, inverse_correction="post_ema", exclude=()
    )


def batches(steps, microbatches):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(steps, microbatches, 4, 3, generator=generator, dtype=torch.float64)


def order(j, rank):
    """The place of a rank's microbatch in one process, so that halves are the same."""
    return 2 * rank + (j if rank == 0 else 1 - j)


WEIGHTS = (5.0, 1.0, 2.0, 4.0)  # of one process's microbatches; 12 in all


def train(model, optimizer, data, rank=None, each=2, sync_always=False, weighed=False):
    """Train on ``data``; a rank takes its own microbatches, and gradients are averaged over ranks."""
    for step in data:
        optimizer.zero_grad()
        mine = step if rank is None else [step[order(j, rank)] for j in range(each)]
        for j, x in enumerate(mine):
            quiet = rank is not None and isinstance(model, DistributedDataParallel) and j + 1 < each and not sync_always
            loss = model(x).square().mean() / len(mine)
            if weighed:
                weight = WEIGHTS[j if rank is None else order(j, rank)]
                optimizer.set_microbatch_weight(weight)
                loss *= weight
            with model.no_sync() if quiet else contextlib.nullcontext():
                loss.backward()
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


def weighed(rank):
    """Weights are of all processes' microbatches."""
    data = batches(3, 4)
    for name, make, form in [(name, adamw, form) for name, form in ADAMW.items()] + [("Shampoo", shampoo, None)]:
        alone = make_model()
        single = make(alone, form)
        single._microbatches.group = None
        expected = train(alone, single, data, weighed=True)
        model = DistributedDataParallel(make_model())
        found = train(model, make(model.module, form), data, rank, weighed=True)
        same(found, expected, f"weighed, {name}")


@contextlib.contextmanager
def messages_sent():
    """The tensors given to all_reduce meanwhile."""
    sent, send = [], dist.all_reduce
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_reduce", lambda t, **options: sent.append(t) or send(t, **options))
        yield sent


def buckets(rank):
    """Sums in buckets are those of one message each; a step sends one message for all of a dtype."""
    shapes = [(3,), (), (2, 2), (5,), (0,), (4,)]
    tensors = [
        torch.full(s, float(i + rank), dtype=(torch.float32, torch.float64)[i == 3]) for i, s in enumerate(shapes)
    ]
    expected = [torch.full_like(t, 2.0 * i + 1.0) for i, t in enumerate(tensors)]
    for limit, messages in ((_process_sums.BUCKET, 2), (24, 4), (1, 6)):
        mine = [t.clone() for t in tensors]
        with pytest.MonkeyPatch.context() as patch, messages_sent() as sent:
            patch.setattr(_process_sums, "BUCKET", limit)
            _process_sums.sum_over(dist.group.WORLD, mine)
        assert len(sent) == messages, limit
        assert all(torch.equal(a, b) for a, b in zip(mine, expected, strict=True))
    model = DistributedDataParallel(make_model())
    optimizer = adamw(model.module, {"cross_fit": "symmetric", "inverse_correction": "pre_ema"})
    with messages_sent() as sent:
        train(model, optimizer, batches(1, 4), rank)
    # The counts are in float32, and five sums of four parameters in float64.
    assert [t.dtype for t in sent] == [torch.float32, torch.float64]


def sharded_curvature(rank):
    """Sophia under FSDP2: a microbatch, and its curvature, is that of all ranks together."""
    data = batches(4, 8).view(4, 4, 2, 4, 3)
    for weights in (None, WEIGHTS):
        for form in ({"cross_fit": "none", "inverse_correction": "post_ema"}, {"inverse_correction": "post_ema"}):
            found = []
            for shards in (False, True):
                model = make_model()
                if shards:
                    for layer in (model[0], model[2]):
                        fully_shard(layer, mesh=init_device_mesh("cpu", (2,)))
                    fully_shard(model)
                settings = {"lr": 0.1, "eps": 1e-3, "hessian_freq": 2, "clip": 100.0}
                optimizer = BiasCorrectedSophia(model.named_parameters(), **settings, **form)
                if not shards:
                    optimizer._microbatches.group = None
                for step in data:
                    for j, x in enumerate(step):
                        weight = 1.0 if weights is None else weights[j]
                        if weights is not None:
                            optimizer.set_microbatch_weight(weight)
                        output = model(x[rank] if shards else x.flatten(0, 1))
                        if optimizer.curvature_due:
                            optimizer.add_curvature(output.sin().mean(), retain_graph=True)
                        (weight * output.square().mean() / 4).backward()
                    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
                    optimizer.step()
                    optimizer.zero_grad()
                if shards:
                    assert all(isinstance(s["hessian"], DTensor) for s in optimizer.state.values())
                    assert all(s["hessian"].full_tensor().any() for s in optimizer.state.values())
                found.append([p.detach() for p in model.parameters()])
            same(found[1], found[0], f"Sophia under FSDP, {form}, {weights}")


class Language(nn.Module):
    """Logits of a causal model."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(7, 4), nn.Linear(4, 7)

    def forward(self, tokens, labels, num_items_in_batch=None):
        logits = self.head(self.embed(tokens))
        return Output(nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()), logits)


class Output(NamedTuple):
    """Of a language model."""

    loss: torch.Tensor
    logits: torch.Tensor


def sharded_language_model(rank):
    """Sampled labels, and the tokens of all ranks for a weight."""
    model = Language()
    fully_shard(model.head, mesh=init_device_mesh("cpu", (2,)))
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    optimizer = BiasCorrectedSophia(model.named_parameters(), hessian_freq=2)
    optimizer.weigh_by_tokens(model)
    optimizer.estimate_curvature(model)
    for _ in range(3):
        for _ in range(2):
            tokens = torch.randint(7, (2, 5 + rank))
            model(tokens, labels=tokens, num_items_in_batch=36).loss.backward()
        assert optimizer._microbatches.weights.given() == [18.0, 18.0]  # 2 · (4 + 5)
        optimizer.step()
        optimizer.zero_grad()
    for state in optimizer.state.values():
        hessian = state["hessian"].full_tensor()
        assert hessian.isfinite().all() and hessian.any()


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
    with pytest.raises(ValueError, match="folds='exact'; it must be 'lagged' in data parallel"):
        BiasCorrectedShampoo(model.named_parameters(), folds="exact")


SHAMPOO = {
    "standard": {"cross_fit": "none", "exclude": ("2.",)},
    "split": {"norm_clip": 1.0, "grafting": "none"},
    "inverse": {"cross_fit": "none", "inverse_correction": "pre_ema"},
    "split inverse in blocks": {"inverse_correction": "post_ema", "block_size": 2},
}


def matrices(dimension, settings):
    """A model whose parameters are cut along ``dimension``, replicated and cut, or as they are; with its optimizer."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1)).double()
    model[4].weight.data[:, 3:] = 0.0  # some ranks' parts have no gradient at first, but are clipped as the others
    if dimension is not None:
        hybrid = dimension == "hybrid"
        mesh = init_device_mesh("cpu", (2, 1) if hybrid else (2,), mesh_dim_names=("dp", "shard") if hybrid else None)
        dimension = 0 if hybrid else dimension
        for layer in (model[2], model[4]) if dimension else (model[0], model[2], model[4]):
            fully_shard(layer, mesh=mesh, shard_placement_fn=lambda p: Shard(min(dimension, p.dim() - 1)))
        fully_shard(model, mesh=mesh)
    settings = {"damping": 1e-2, "lr": 0.1, "root_freq": 2, "exclude": (), "report_freq": 1} | settings
    optimizer = BiasCorrectedShampoo(model.named_parameters(), **settings)
    if dimension is None:
        optimizer._microbatches.group = None
    return model, optimizer


def train_matrices(model, optimizer, data, weights=None):
    for step in data:
        for j, x in enumerate(step):
            loss = 10.0 * model(x).square().mean() / len(step)
            if weights is not None:
                optimizer.set_microbatch_weight(weights[j])
                loss *= weights[j]
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
    return [p.detach() for p in model.parameters()]


def sharded_matrices(rank):
    """Shampoo under FSDP2, whatever dimension is cut: factors are of whole matrices."""
    data = batches(5, 8).view(5, 4, 2, 4, 3)
    cases = [(name, form, None) for name, form in SHAMPOO.items()]
    for name, form, weights in [*cases, ("weighed", {"inverse_correction": "post_ema"}, WEIGHTS)]:
        alone, single = matrices(None, form)
        expected = train_matrices(alone, single, data.flatten(2, 3), weights)
        for dimension in (0, 1, "hybrid"):
            # What only one rank records is summed by all.
            once = dimension == 1 and rank == 1
            model, optimizer = matrices(dimension, form | {"report_freq": 0 if once else 1})
            found = train_matrices(model, optimizer, data[:, :, rank], weights)
            same(found, expected, f"Shampoo under FSDP, {name}, {dimension}")
            states = [s for s in optimizer.state.values() if "left_factor_0" in s]
            assert len(states) == (1 if name == "standard" else 2)  # the last layer is a vector
            assert all(isinstance(s["exp_avg"], DTensor) for s in states)
            numbers = [local(t).numel() for s in optimizer.state.values() for t in s.values() if t.dim()]
            assert optimizer.state_bytes() == 8 * sum(numbers)
            if name != "standard" and not once:
                [a], [b] = optimizer.correction_report(), single.correction_report()
                assert [a.relative, a.cosine, a.dispersion] == pytest.approx(
                    [b.relative, b.cosine, b.dispersion], rel=1e-9, nan_ok=True
                )


def gradients_as_partial_sums(_):
    """As those of SequenceParallel."""
    mesh = init_device_mesh("cpu", (2,))
    weight = nn.Parameter(distribute_tensor(torch.zeros(4), mesh, [Replicate()]))
    weight.grad = DTensor.from_local(torch.ones(4), mesh, [Partial()])
    optimizer = BiasCorrectedAdamW([("w", weight)], cross_fit="none")
    with pytest.raises(RuntimeError, match="its gradient as .*SequenceParallel.*Shard them with fully_shard"):
        optimizer.step()
    assert not optimizer.state


def resumed_matrices(rank):
    """torch.distributed.checkpoint takes momentum by its shards and factors as they are."""
    data = batches(6, 8).view(6, 4, 2, 4, 3)[:, :, rank]
    place = [tempfile.mkdtemp() if rank == 0 else None]
    dist.broadcast_object_list(place)
    model, optimizer = matrices(0, {"inverse_correction": "post_ema"})
    train_matrices(model, optimizer, data[:3])
    dcp.save(dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True)), checkpoint_id=place[0])
    expected = [p.full_tensor() for p in train_matrices(model, optimizer, data[3:])]
    for dimension, exact in ((0, True), (1, False)):
        model, optimizer = matrices(dimension, {"inverse_correction": "post_ema"})
        train_matrices(model, optimizer, data[3:4])
        weights, state = get_state_dict(model, optimizer)
        dcp.load({"model": weights, "optimizer": state}, checkpoint_id=place[0])
        set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)
        found = [p.full_tensor() for p in train_matrices(model, optimizer, data[3:])]
        same(found, expected, f"resumed, {dimension}")
        assert not exact or all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    dist.barrier()
    if rank == 0:
        shutil.rmtree(place[0])


def abandoned_shards(rank):
    """Gradients thrown away by the model, without the optimizer being told, are forgotten under FSDP too."""
    data, found = batches(3, 4), []
    for abandon in (False, True):
        model = make_model()
        fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
        optimizer = adamw(model, ADAMW["leave one out"])
        for number, step in enumerate(data):
            if abandon and number == 1:
                for microbatch in step[:3]:
                    model(7.0 * microbatch).square().mean().backward()
                model.zero_grad()
            for microbatch in step:
                (model(microbatch).square().mean() / 4).backward()
            optimizer.step()
            model.zero_grad()
        found.append([p.detach().full_tensor() for p in model.parameters()])
    same(*found, "abandoned")


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


class Branches(nn.Module):
    """A trunk, and one of two branches."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(6)
        draw = lambda: nn.Parameter(torch.randn(3, 3, generator=generator, dtype=torch.float64))  # noqa: E731
        self.trunk, self.left, self.right = draw(), draw(), draw()

    def forward(self, x, right):
        return (x @ (self.trunk + (self.right if right else self.left))).square().mean()


def unused_parameters(rank):
    """Each rank reaches a branch of its own; a window later both reach the same one."""
    data = batches(4, 4)
    makers = [(name, adamw, form) for name, form in ADAMW.items()] + [("Shampoo", shampoo, None)]
    for name, make, form in makers:
        alone, model = Branches(), Branches()
        single = make(alone, form)
        single._microbatches.group = None
        replica = DistributedDataParallel(model, find_unused_parameters=True)
        optimizer = make(model, form)
        for number, step in enumerate(data):
            for place, x in enumerate(step):
                (alone(x, place // 2 == 1 and number != 1) / 4).backward()
            for j in range(2):
                with replica.no_sync() if j == 0 else contextlib.nullcontext():
                    (replica(step[order(j, rank)], rank == 1 and number != 1) / 2).backward()
            for each in (single, optimizer):
                each.step()
                each.zero_grad()
        same([p.detach() for p in model.parameters()], [p.detach() for p in alone.parameters()], f"unused, {name}")


def unreached_curvature(rank):
    """Sophia: sampled labels of a rank reach its branch only, or there are none on it at all."""
    for each in (2, 1):
        alone, model = Branches(), Branches()
        settings = {"lr": 0.1, "eps": 1e-3, "hessian_freq": 2, "clip": 100.0, "inverse_correction": "post_ema"}
        single, optimizer = (BiasCorrectedSophia(m.named_parameters(), **settings) for m in (alone, model))
        single._microbatches.group = None
        replica = DistributedDataParallel(model, find_unused_parameters=True)
        for step in batches(3, 2 * each):
            for place, x in enumerate(step):
                if single._method.wants(single.state, single.param_groups, single._microbatches):
                    single.add_curvature(alone(2.0 * x, place // each == 1))
                (alone(x, place // each == 1) / len(step)).backward()
            for j in range(each):
                x = step[order(j, rank) if each == 2 else rank]
                if optimizer._method.wants(optimizer.state, optimizer.param_groups, optimizer._microbatches):
                    optimizer.add_curvature(model(2.0 * x, rank == 1))
                with replica.no_sync() if j + 1 < each else contextlib.nullcontext():
                    (replica(x, rank == 1) / each).backward()
            for both in (single, optimizer):
                both.step()
                both.zero_grad()
        same([p.detach() for p in model.parameters()], [p.detach() for p in alone.parameters()], "curvature")


def noise_scale(rank):
    """Ranks are microbatches: two with two each find what one process with four finds, also if one has more."""
    data = batches(3, 4)
    for weights in (None, WEIGHTS):
        for mine in ((0, 1) if rank == 0 else (2, 3), (0,) if rank == 0 else (1, 2, 3)):
            found = []
            for places in (range(4), mine):
                model = make_model()
                replica = model if len(places) == 4 else DistributedDataParallel(model)
                optimizer = adamw(model, {})
                noise = GradientNoise(model)
                optimizer.param_groups[0]["lr"] = 1e-12  # so that all have the same gradients
                if len(places) == 4:
                    noise._microbatches.group = optimizer._microbatches.group = None
                noise.attach(optimizer)
                for step in data:
                    for j, place in enumerate(places):
                        weight = 1.0
                        if weights is not None:
                            weight = weights[place]
                            noise.set_microbatch_weight(weight)
                            optimizer.set_microbatch_weight(weight)
                        with contextlib.nullcontext() if j + 1 == len(places) else quiet(replica):
                            loss = replica(step[place]).square().mean() * weight / 4
                            (loss if replica is model else 2 * loss).backward()  # DDP takes the mean over ranks
                    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
                    optimizer.step()
                    optimizer.zero_grad()
                found.append((noise.noise_scale(), optimizer.noise_scale()))
            (alone, collected), (beside, own) = found
            # Without weights the optimizers take it that every rank has as many.
            for one in (collected, beside, own) if weights or len(mine) == 2 else (collected, beside):
                for which in ("latest", "smoothed"):
                    a, b = getattr(one, which), getattr(alone, which)
                    assert tuple(a) == pytest.approx(tuple(b), rel=1e-6), (rank, weights, mine, which)
                assert one.samples == alone.samples


def sharded_noise_scale(rank):
    """Under FSDP2 a microbatch is that of all ranks, and squares are of whole gradients."""
    data, found = batches(3, 8).view(3, 4, 2, 4, 3), []
    for shards in (False, True):
        model = make_model()
        if shards:
            for layer in (model[0], model[2]):
                fully_shard(layer, mesh=init_device_mesh("cpu", (2,)))
            fully_shard(model)
        optimizer, noise = adamw(model, {}), GradientNoise(model)
        if not shards:
            noise._microbatches.group = optimizer._microbatches.group = None
        noise.attach(optimizer)
        for step in data:
            for x in step:
                model(x[rank] if shards else x.flatten(0, 1)).square().mean().backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad()
        found += [noise.noise_scale(), optimizer.noise_scale()]
    for one in found[1:]:
        assert tuple(one.smoothed) == pytest.approx(tuple(found[0].smoothed), rel=1e-6)
        assert one.samples == 4.0


def quiet(model):
    return model.no_sync() if isinstance(model, DistributedDataParallel) else contextlib.nullcontext()


def work(rank, store):
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=datetime.timedelta(seconds=60)
    )
    for check in (
        replicated,
        refusals,
        one_microbatch_per_rank,
        sharded,
        sharded_matrices,
        gradients_as_partial_sums,
        resumed_matrices,
        abandoned_shards,
        not_finite_on_one_rank,
        curvature,
        weighed,
        buckets,
        sharded_curvature,
        sharded_language_model,
        unused_parameters,
        unreached_curvature,
        noise_scale,
        sharded_noise_scale,
    ):
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
