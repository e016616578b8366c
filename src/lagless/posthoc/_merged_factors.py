"""Averages of the products B A that LoRA checkpoints stand for, as adapters of the same rank."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lagless.checkpoints import Checkpoint, CheckpointError, TensorInfo, read_object
from lagless.posthoc._weighted_sums import Consumer

_FIRST_FACTOR = re.compile(r"\.(lora|lora_embedding)_A(\.|$)")
_CONFIGURATION = "adapter_config.json"

# Settings of PEFT's LoraConfig under which a layer depends on A and B through B A alone, whatever their value.
_HARMLESS = frozenset(
    "alpha_pattern alora_invocation_tokens auto_mapping base_model_name_or_path bias corda_config ensure_weight_tying "
    "eva_config exclude_modules fan_in_fan_out inference_mode init_lora_weights layer_replication layers_pattern "
    "layers_to_transform loftq_config lora_alpha lora_bias lora_dropout lora_ga_config megatron_config megatron_core "
    "modules_to_save peft_type peft_version qalora_group_size r rank_pattern revision runtime_config target_modules "
    "task_type trainable_token_indices use_dora use_rslora velora_config".split()
)


def factor_pairs(tensors: dict[str, TensorInfo]) -> dict[str, str]:
    """Return the names of LoRA's B by those of the A beside them; a factor without its other one was frozen."""
    pairs = {name: _FIRST_FACTOR.sub(r".\1_B\2", name) for name in tensors if _FIRST_FACTOR.search(name)}
    return {a: b for a, b in pairs.items() if b in tensors}


def product_pairs(checkpoint: Checkpoint) -> dict[str, str]:
    """Return the factor pairs of an adapter whose layers depend on A and B through their product alone.

    Raises:
        CheckpointError: if the checkpoint has no such adapter, or its configuration asks for more than LoRA.
    """
    pairs = factor_pairs(checkpoint.tensors)
    if not checkpoint.is_adapter or not pairs:
        raise CheckpointError(f"{checkpoint.path}: holds no LoRA adapter; leave merged_lora out.")
    path = checkpoint.folder / _CONFIGURATION
    settings = read_object(path, "Keep the adapter's configuration beside it: it says what A and B mean.")
    unknown = sorted(key for key, value in settings.items() if value and key not in _HARMLESS)
    if str(settings.get("peft_type")).upper() != "LORA" or unknown:
        what = ", ".join(unknown) or f"peft_type={settings.get('peft_type')!r}"
        raise CheckpointError(
            f"{path}: with {what}, layers are not known to depend on A and B through the product BA alone. Leave "
            "merged_lora out to average A and B apart, or merge the adapter into its base at each checkpoint."
        )
    for a, b in pairs.items():
        first, second = checkpoint.tensors[a], checkpoint.tensors[b]
        if len(first.shape) != 2 or len(second.shape) != 2 or first.shape[0] != second.shape[1]:
            raise CheckpointError(
                f"{checkpoint.path}: {a} {list(first.shape)} and {b} {list(second.shape)} are no two matrices with a "
                "product BA, such as those of a convolution. Leave merged_lora out to average A and B apart."
            )
    return pairs


def without(names: Sequence[str], consumer: Consumer) -> Consumer:
    """Return a consumer that drops some tensors and hands on the others."""
    dropped = frozenset(names)

    def take(name: str, start: int, block: Tensor, /) -> None:
        if name not in dropped:
            consumer(name, start, block)

    return take


def write_products(
    checkpoints: Sequence[Checkpoint], weights: NDArray[np.float64], pairs: dict[str, str], consumer: Consumer
) -> list[float]:
    """Hand on the nearest factors of averaged products, in float64.

    P = Σ_i w_i B_i A_i has rank up to N r. The nearest matrix of rank r is U_r Σ_r V_rᵀ, of P's singular value
    decomposition (Eckart and Young 1936); it is written as B = U_r Σ_r^½ and A = Σ_r^½ V_rᵀ. Singular values are found
    from the factors, so no matrix of the size of a layer is formed. Where all checkpoints have the same two factors,
    these are handed on as they are.

    Args:
        checkpoints: N adapters.
        weights: shape (G, N).
        pairs: names of B by those of A.
        consumer: takes (name, 0, values of shape (G, numel)).

    Returns:
        For each average, the largest part of a layer's product that rank r leaves out, relative to it in Frobenius
        norm.
    """
    lost = [0.0] * len(weights)
    for a, b in pairs.items():
        firsts = [checkpoint.read_tensor(a).double() for checkpoint in checkpoints]
        seconds = [checkpoint.read_tensor(b).double() for checkpoint in checkpoints]
        found: list[tuple[Tensor, Tensor]] = []
        for g, row in enumerate(weights.tolist()):
            first, second, part = nearest_factors(firsts, seconds, row)
            found.append((first, second))
            lost[g] = max(lost[g], part)
        consumer(a, 0, torch.stack([first.reshape(-1) for first, _ in found]))
        consumer(b, 0, torch.stack([second.reshape(-1) for _, second in found]))
    return lost


def nearest_factors(
    firsts: Sequence[Tensor], seconds: Sequence[Tensor], weights: Sequence[float]
) -> tuple[Tensor, Tensor, float]:
    """Return A and B with B A nearest to Σ_i w_i B_i A_i, and the relative norm of what is left out.

    Args:
        firsts: A_i, shape (r, in).
        seconds: B_i, shape (out, r).
        weights: w_i.
    """
    read = [i for i, weight in enumerate(weights) if weight]
    same = all(torch.equal(x[i], x[read[0]]) for x in (firsts, seconds) for i in read[1:])
    if same and abs(sum(weights) - 1.0) < 1e-9:
        return firsts[read[0]], seconds[read[0]], 0.0
    rank = len(firsts[0])
    tall = _qr(torch.cat([weights[i] * seconds[i] for i in read], dim=1))
    wide = _qr(torch.cat([firsts[i].mT for i in read], dim=1))
    left, values, right = _svd(tall[1] @ wide[1].mT)
    missing = max(rank - len(values), 0)  # an adapter may be wider than its layer
    root = values[:rank].sqrt()
    second = torch.nn.functional.pad(tall[0] @ (left[:, :rank] * root), (0, missing))
    first = torch.nn.functional.pad(root[:, None] * (right[:rank] @ wide[0].mT), (0, 0, 0, missing))
    total = float(values.square().sum())
    return first, second, (float(values[rank:].square().sum()) / total) ** 0.5 if total else 0.0


def _qr(matrix: Tensor) -> tuple[Tensor, Tensor]:
    return torch.linalg.qr(matrix)  # pyright: ignore


def _svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.linalg.svd(matrix, full_matrices=False)  # pyright: ignore
