"""What an evaluation reads and holds in memory."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lagless.lab.learn import Document, learn

WIDTH, LAYERS, COUNT = 128, 12, 9
MEMORY = 2**18


class Deep(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS))


def loss(model, items):
    x = torch.tensor(items, dtype=torch.float32)
    for layer in model.layers:
        x = x + 0.1 * layer(x)
    return (x**2).mean(dim=1)


class Held(TorchDispatchMode):
    """The most bytes of tensors that this thread made and had alive at once; buffers of reading threads are not seen.

    Args:
        model: its own parameters do not count.
    """

    def __init__(self, model):
        super().__init__()
        self.own = {p.untyped_storage().data_ptr() for p in model.parameters()}
        self.storages, self.peak = {}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in self.own:
                    self.storages[storage.data_ptr()] = (StorageWeakRef(storage), storage.nbytes())
        self.storages = {k: v for k, v in self.storages.items() if not v[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.storages.values()))
        return out


@pytest.fixture
def run(tmp_path):
    generator = torch.Generator().manual_seed(0)
    for i in range(COUNT):
        folder = tmp_path / "run" / f"checkpoint-{i}"
        folder.mkdir(parents=True)
        tensors = {f"layers.{k}.weight": torch.randn(WIDTH, WIDTH, generator=generator) for k in range(LAYERS)}
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return tmp_path / "run"


def test_two_models_beside_the_model_and_two_reads_for_an_evaluation(run):
    generator = np.random.default_rng(0)
    documents = [Document(str(i), (tuple(generator.standard_normal(WIDTH).tolist()),)) for i in range(20)]
    model = Deep()
    size = sum(p.nbytes for p in model.parameters())
    with Held(model) as held:
        found = learn(
            run, documents, loss=loss, model=model, modes=["free"], evaluations=4, targets_per_weight=0, memory=MEMORY
        )
    assert len(found.evaluations) >= 3
    assert 1.9 <= found.reads[0] / len(found.evaluations) <= 2.2
    activations = 8 * 3 * LAYERS * WIDTH * 4  # a batch of 8 through all layers
    assert 1.5 * size < held.peak < 2 * size + activations < 2.5 * size
