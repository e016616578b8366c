"""Two ranks: replicated and sharded weights take the steps of whole ones, bit for bit, and their state is sharded."""

import copy
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from lagless import BEMA
from lagless.optim import PACE, Pullback

from ..processes import launch

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")

MAKE = {
    "PACE": lambda params: PACE(params, lr=0.05),
    "PACE on device": lambda params: PACE(params, lr=0.05, capturable=True),
    "PACE, BEMA": lambda params: PACE(params, lr=0.05, average=BEMA.paper(update_freq=2)),
    "Pullback": lambda params: Pullback(torch.optim.AdamW(params, lr=0.05)),
}


def new_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1))  # 5 rows on 2 ranks; 1 row leaves one empty


def train(model, optimizer, steps, first=0):
    # All ranks have the same batch, so that their mean is the gradient of one, bit for bit.
    for step in range(first, first + steps):
        batch = torch.randn(4, 3, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        model(batch).square().mean().backward()
        optimizer.step()


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(whole(tensor).detach(), whole(theirs[name]).detach()), name


def sharded(make):
    model = new_model()
    for layer in (model[0], model[2]):
        fully_shard(layer)
    fully_shard(model)
    return model, make(model.parameters())


def check(folder):
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    try:
        for name, make in MAKE.items():
            single = new_model()
            reference = make(single.parameters())
            train(single, reference, 5)

            replicated = DistributedDataParallel(new_model())
            optimizer = make(replicated.parameters())
            train(replicated, optimizer, 5)
            assert_same(dict(replicated.module.named_parameters()), dict(single.named_parameters()))
            assert_same(optimizer.read(replicated.module), reference.read(single))

            model, optimizer = sharded(make)
            train(model, optimizer, 3)
            for state in optimizer.state.values():
                shards = [v for v in state.values() if isinstance(v, torch.Tensor) and v.dim()]
                assert len(shards) >= 3 and all(isinstance(v, DTensor) for v in shards), name
            with optimizer.applied():
                averaged = {n: whole(p).detach().clone() for n, p in model.named_parameters()}
            assert_same(averaged, optimizer.read(model))

            path = f"{folder}/{name}"
            dcp.save({"optimizer": get_optimizer_state_dict(model, optimizer)}, checkpoint_id=path)
            resumed, other = sharded(make)
            with torch.no_grad():
                for mine, theirs in zip(resumed.parameters(), model.parameters(), strict=True):
                    mine.copy_(theirs)
            template = {"optimizer": get_optimizer_state_dict(resumed, other)}
            dcp.load(template, checkpoint_id=path)
            set_optimizer_state_dict(resumed, other, template["optimizer"])
            for each, its_optimizer in ((model, optimizer), (resumed, other)):
                train(each, its_optimizer, 2, first=3)
                assert_same(dict(each.named_parameters()), dict(single.named_parameters()))
                assert_same(its_optimizer.read(each), reference.read(single))

            # What was saved while evaluating, without the live weights, is refused.
            optimizer.eval()
            incomplete = copy.deepcopy(optimizer.state_dict())
            for state in incomplete["state"].values():
                del state["live"]
            with pytest.raises(ValueError, match="lacks live"):
                other.load_state_dict(incomplete)
    finally:
        dist.destroy_process_group()


def test_ranks_take_the_steps_of_one(tmp_path):
    for rank in launch(check, 2, tmp_path, timeout=120):
        assert rank.exitcode == 0, rank.output
