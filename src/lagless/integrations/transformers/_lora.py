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
from transformers import Trainer

from lagless.averaging import Averager, plain_name, unwrap
from lagless.execution import keeping_modes, trained_weights, writing_weights
from lagless.integrations.transformers._lora_layers import require_product_layer
from lagless.rules import Rule

_FIRST_FACTOR = re.compile(r"\.(lora|lora_embedding)_A\.")


class MergedLoraAverager(Averager):
    """An Averager of the products B A, which gives back the nearest A and B of the adapter's rank r.

    The nearest matrix of rank r to the average P = U Σ Vᵀ is made of its first r singular directions (Eckart and Young
    1936): B = U_r Σ_r^½, A = Σ_r^½ V_rᵀ. Its distance from P is the root of the sum of the other σ². Trainable
    parameters beside A and B are averaged as they are; so is a factor whose other one is frozen, which is exact.

    Args:
        model: with LoRA adapters of PEFT on linear layers or embeddings; the trainable ones are averaged. DoRA is
            among them, since its direction is made of B A and its magnitude is averaged as it is.
        rules: as for the Averager.
        options: likewise.

    Raises:
        NotImplementedError: if an adapter is sharded, tied to another one, on a convolution, or of another kind than
            those known to compute with B A alone.
        ValueError: if the model has no adapter of which A and B train.
    """

    def __init__(self, model: nn.Module, rules: Rule | Mapping[str, Rule] | None = None, **options: Any) -> None:
        trainable = {plain_name(name): p for name, p in model.named_parameters(remove_duplicate=False)}
        trainable = {name: p for name, p in trainable.items() if p.requires_grad}
        modules = {plain_name(name): module for name, module in model.named_modules()}
        self._factors: dict[str, tuple[str, Tensor, str, Tensor]] = {}
        for first, place in [(name, match) for name in trainable if (match := _FIRST_FACTOR.search(name))]:
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
            require_product_layer(modules[first[: place.start()]], first[place.end() :].split(".")[0], first)
            self._factors[_FIRST_FACTOR.sub(r".\1_BA.", first)] = first, a, second, b
        if not self._factors:
            raise ValueError(
                "merged_lora: the model has no trainable LoRA adapter, or none of which A and B both train; leave the "
                "option out."
            )
        self._require_untied()
        self._products = {
            name: torch.empty(len(b), a.shape[1], dtype=a.dtype, device=a.device)
            for name, (_, a, _, b) in self._factors.items()
        }
        self._multiply()
        super().__init__({**trainable, **self._products}, rules, **options)
        self._live.made_of = [*trainable.values(), *(t for _, a, _, b in self._factors.values() for t in (a, b))]
        self._live.module = unwrap(model)

    def update(self) -> None:
        """Count one optimizer step, and update the rules that are due."""
        step = self.step + 1
        with self._turns.between_reads():
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
                with keeping_modes(self._live.parameters()):
                    self._factorize()
                    yield
            finally:
                with writing_weights(), torch.no_grad():
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
        with self._turns.still("read averages"):
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
        with writing_weights():
            for product, (_, a, _, b) in zip(self._products.values(), self._factors.values(), strict=True):
                for factor, value in zip((a, b), _nearest_factors(product, len(a)), strict=True):
                    factor.copy_(value)

    @torch.no_grad()
    def _multiply(self) -> None:
        factors = iter(trained_weights([factor for _, a, _, b in self._factors.values() for factor in (a, b)]))
        for product, a, b in zip(self._products.values(), factors, factors, strict=True):
            torch.mm(b.detach().float(), a.detach().float(), out=product)

    def _require_untied(self) -> None:
        owners: dict[int, str] = {}
        for first, a, second, b in self._factors.values():
            for name, factor in ((first, a), (second, b)):
                if owners.setdefault(factor.untyped_storage().data_ptr(), name) != name:
                    raise NotImplementedError(
                        f"merged_lora: {name} is tied to {owners[factor.untyped_storage().data_ptr()]}, and their "
                        "products would give it two values; leave the option out to average A and B."
                    )


def is_adapter(trainer: Trainer) -> bool:
    """Whether the Trainer trains an adapter, and saves no more than that."""
    return hasattr(trainer.accelerator.unwrap_model(trainer.model), "peft_config")


def _nearest_factors(product: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A and B of the given rank with B A nearest to ``product``."""
    left, values, right = torch.linalg.svd(product, full_matrices=False)
    root = values[:rank].sqrt()
    missing = rank - len(root)  # an adapter may be wider than its layer
    a, b = root[:, None] * right[:rank], left[:, :rank] * root
    return nn.functional.pad(a, (0, 0, 0, missing)), nn.functional.pad(b, (0, missing))
