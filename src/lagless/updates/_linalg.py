"""What corrections use of ``torch.linalg``, which carries no annotations, with whole ones."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportPrivateImportUsage=false

from __future__ import annotations

import torch
from torch import Tensor

LinAlgError: type[RuntimeError] = torch.linalg.LinAlgError


def vector_norm(tensor: Tensor) -> Tensor:
    """Return the root of the sum of squares of all elements."""
    return torch.linalg.vector_norm(tensor)


def eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return eigenvalues, ascending, and eigenvectors, in columns, of a batch of symmetric matrices."""
    values, vectors = torch.linalg.eigh(matrix)
    return values, vectors
