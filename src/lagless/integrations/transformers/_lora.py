"""Averages of the updates that LoRA adapters stand for.

A layer with a LoRA adapter computes with W + s B A, s a constant. The average of B times the average of A is not the
average of B A: it also holds products of factors from different steps. Averaging B A itself has no such terms, but its
rank exceeds the adapter's.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lagless.averaging import Averager, plain_name
from lagless.rules import Rule

_FIRST_FACTOR = re.compile(r"\.(lora|lora_embedding)_A\.")


class MergedLoraAverager(Averager):
    """An Averager of the products B A, which gives back the nearest A and B of the adapter's rank r.

    The nearest matrix of rank r to the average P = U Σ Vᵀ is made of its first r singular directions (Eckart and Young
    1936): B = U_r Σ_r^½, A = Σ_r^½ V_rᵀ. Its distance from P is the root of the sum of the other σ². Trainable
    parameters beside A and B are averaged as they are; so is a factor whose other one is frozen, which is exact.

    Args:
        model: with LoRA adapters of PEFT on linear layers or embeddings; the trainable ones are averaged.
        rules: as for the Averager.
        options: likewise.

    Raises:
        NotImplementedError: if an adapter is sharded, or on a convolution.
        ValueError: if the model has no adapter of which A and B train.
    """

    def __init__(self, model: nn.Module, rules: Rule | Mapping[str, Rule], **options: Any) -> None:
        trainable = {plain_name(name): p for name, p in model.named_parameters() if p.requires_grad}
        self._factors: dict[str, tuple[str, Tensor, str, Tensor]] = {}
        for first in [name for name in trainable if _FIRST_FACTOR.search(name)]:
            second = _FIRST_FACTOR.sub(r".\1_B.", first)
            if second not in trainable:
                continue
            a, b = trainable.pop(first), trainable.pop(second)
            if a.dim() != 2:
                raise NotImplementedError(
                    f"merged_lora: {first} belongs to a convolution, whose product BA is not supported; leave the "
                    "option out to average A and B."
                )
            if hasattr(a, "device_mesh") or hasattr(b, "device_mesh"):
                raise NotImplementedError(
                    f"merged_lora: {first} is sharded, and the product BA needs whole factors; train the adapter under "
                    "DDP, or leave the option out to average A and B."
                )
            self._factors[_FIRST_FACTOR.sub(r".\1_BA.", first)] = first, a, second, b
        if not self._factors:
            raise ValueError(
                "merged_lora: the model has no trainable LoRA adapter, or none of which A and B both train; leave the "
                "option out."
            )
        self._products = {
            name: torch.empty(len(b), a.shape[1], dtype=a.dtype, device=a.device)
            for name, (_, a, _, b) in self._factors.items()
        }
        self._multiply()
        super().__init__({**trainable, **self._products}, rules, **options)

    def update(self) -> None:
        """Count one optimizer step, and update the rules that are due."""
        step = self.step + 1
        if any(rule.schedule.changes(step) for rule in self.rules.values()):
            self._multiply()
        super().update()

    @contextmanager
    def applied(self, name: str | None = None) -> Iterator[None]:
        """The model with averaged updates inside the ``with`` block; afterwards the live bits."""
        self._multiply()
        with super().applied(name):
            live = [(factor, factor.detach().clone()) for _, a, _, b in self._factors.values() for factor in (a, b)]
            try:
                self._factorize()
                yield
            finally:
                with torch.no_grad():
                    for factor, bits in live:
                        factor.copy_(bits)

    def copy_to_model(self, name: str | None = None) -> None:
        """Make the nearest A and B of the average the model's for good."""
        self._multiply()
        super().copy_to_model(name)
        self._factorize()

    def named_averages(
        self, name: str | None = None, *, dtype: torch.dtype | None = None
    ) -> Iterator[tuple[str, Tensor]]:
        """The averaged weights one by one, A and B in place of their product."""
        averages = super().named_averages(name)
        self._multiply()
        return ((key, value if dtype is None else value.to(dtype)) for key, value in self._apart(averages))

    def _apart(self, averages: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        for key, value in averages:
            if key in self._factors:
                first, a, second, _ = self._factors[key]
                yield from zip((first, second), _nearest_factors(value, len(a)), strict=True)
            else:
                yield key, value

    @torch.no_grad()
    def _factorize(self) -> None:
        """Give A and B the products' values."""
        for product, (_, a, _, b) in zip(self._products.values(), self._factors.values(), strict=True):
            for factor, value in zip((a, b), _nearest_factors(product, len(a)), strict=True):
                factor.copy_(value)

    @torch.no_grad()
    def _multiply(self) -> None:
        for product, (_, a, _, b) in zip(self._products.values(), self._factors.values(), strict=True):
            torch.mm(b.float(), a.float(), out=product)


def _nearest_factors(product: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A and B of the given rank with B A nearest to ``product``."""
    left, values, right = torch.linalg.svd(product, full_matrices=False)
    root = values[:rank].sqrt()
    missing = rank - len(root)  # an adapter may be wider than its layer
    a, b = root[:, None] * right[:rank], left[:, :rank] * root
    return nn.functional.pad(a, (0, 0, 0, missing)), nn.functional.pad(b, (0, missing))
