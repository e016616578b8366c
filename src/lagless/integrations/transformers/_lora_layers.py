"""The layers of PEFT that depend on A and B only through their product."""

from __future__ import annotations

from typing import Any

from torch import nn

_LAYERS = {
    "Linear",
    "Embedding",
    "MultiheadAttention",
    "Linear8bitLt",
    "Linear4bit",
    "AqlmLoraLinear",
    "AwqLoraLinear",
    "EetqLoraLinear",
    "GPTQLoraLinear",
    "HqqLoraLinear",
    "TorchaoLoraLinear",
}
_VARIANTS = {"DoraLinearVariant", "DoraEmbeddingVariant", "ALoraLinearVariant", "VeloraLinearVariant"}
_ROOM = "peft.tuners.lora."


def require_product_layer(layer: nn.Module, adapter: str, name: str) -> None:
    """Refuse a layer that is not known to depend on A and B only through B A.

    Others put something between A and B that trains too, cut them into blocks, or let A and B stand for several
    matrices. There the nearest factors of B A are not the same adapter.

    Args:
        layer: the one that owns A and B.
        adapter: name of the adapter in it.
        name: of its first factor, for the error.

    Raises:
        NotImplementedError: naming the kind of layer.
    """
    variant: Any = getattr(layer, "lora_variant", {}).get(adapter)
    for part, known in ((layer, _LAYERS), *([(variant, _VARIANTS)] if variant is not None else [])):
        kind = type(part)
        if kind.__name__ not in known or not kind.__module__.startswith(_ROOM):
            raise NotImplementedError(
                f"merged_lora: {name} belongs to a {kind.__module__}.{kind.__name__}, which is not known to compute "
                "with the product BA alone; leave the option out to average A and B."
            )
