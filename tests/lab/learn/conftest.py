"""An exact quadratic as a model: one vector, the checkpoints points, each document a centre of its own."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from lagless.lab.learn import Document

SIZE, COUNT, DOCUMENTS = 12, 7, 40


class Vector(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Parameter(torch.zeros(SIZE - 4))
        self.second = nn.Parameter(torch.zeros(2, 2))

    @property
    def vector(self):
        return torch.cat([self.first, self.second.flatten()])


class Quadratic:
    """The loss 1 + ½ (x - a_d)ᵀ H (x - a_d) of document d, with centres a_d about ``centre``."""

    def __init__(self, spread=0.1, seed=0):
        generator = np.random.default_rng(seed)
        root = generator.standard_normal((SIZE, SIZE))
        self.hessian = root @ root.T / SIZE + 0.1 * np.eye(SIZE)
        self.points = generator.standard_normal((COUNT, SIZE))
        self.centre = generator.dirichlet(np.ones(COUNT)) @ self.points + 0.3 * generator.standard_normal(SIZE)
        self.centres = self.centre + spread * generator.standard_normal((DOCUMENTS, SIZE))
        self.documents = [Document(f"document {i}", (tuple(centre),)) for i, centre in enumerate(self.centres)]

    def loss(self, model, items):
        moved = model.vector.double() - torch.tensor(np.array(items))
        return 1.0 + 0.5 * ((moved @ torch.from_numpy(self.hessian)) * moved).sum(dim=1)

    def value(self, weights, part):
        moved = weights @ self.points - np.array([document.items[0] for document in part.documents])
        return float(1.0 + 0.5 * ((moved @ self.hessian) * moved).sum(axis=1).mean())

    def save(self, folder):
        for i, point in enumerate(self.points):
            checkpoint = folder / f"checkpoint-{10 * i}"
            checkpoint.mkdir(parents=True)
            state = torch.from_numpy(point).float()
            tensors = {"first": state[: SIZE - 4].clone(), "second": state[SIZE - 4 :].reshape(2, 2).clone()}
            save_file(tensors, checkpoint / "model.safetensors", {"format": "pt"})
        self.points = self.points.astype(np.float32).astype(np.float64)
        return folder


@pytest.fixture
def quadratic():
    return Quadratic()


@pytest.fixture
def vector_run(quadratic, tmp_path):
    return quadratic.save(tmp_path / "run")
