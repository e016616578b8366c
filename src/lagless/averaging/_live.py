"""The live tensors of a model: which of them are averaged, under which names."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

Source = nn.Module | Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]
_Getter = Callable[[], Tensor]


class LiveTensors:
    """Named floating-point tensors, looked up anew at every use.

    From a module: its trainable parameters and persistent floating-point buffers. Frozen parameters and integer or
    boolean buffers are left out, since their average is what the model already holds. Tensors that appear under
    several names (tied weights) count once, under the first. From names and tensors: all floating-point ones.

    Attributes:
        names: one per distinct tensor.
        aliases: every further name of a tied tensor, mapped to the one in ``names``.
    """

    def __init__(self, source: Source) -> None:
        self.names: list[str] = []
        self.aliases: dict[str, str] = {}
        self._getters: list[_Getter] = []
        seen: dict[int, str] = {}
        for name, getter in _entries(source):
            if name in self.names or name in self.aliases:
                raise ValueError(f"two tensors are named {name!r}; names must be unique.")
            tensor = getter()
            if id(tensor) in seen:
                self.aliases[name] = seen[id(tensor)]
                continue
            _require_dense(name, tensor)
            seen[id(tensor)] = name
            self.names.append(name)
            self._getters.append(getter)
        if not self.names:
            raise ValueError(
                "there is nothing to average: no trainable floating-point parameter was given. "
                "Unfreeze parameters before making the Averager, or pass named tensors."
            )
        self._shapes = [getter().shape for getter in self._getters]

    def tensors(self) -> list[Tensor]:
        """The tensors as they are now, detached, in the order of ``names``.

        Raises:
            RuntimeError: if one has changed its shape.
        """
        tensors = [getter().detach() for getter in self._getters]
        for name, tensor, shape in zip(self.names, tensors, self._shapes, strict=True):
            if tensor.shape != shape:
                raise RuntimeError(
                    f"{name} changed its shape from {tuple(shape)} to {tuple(tensor.shape)} under the Averager; "
                    "make a new Averager after changing the model."
                )
        return tensors


def _entries(source: Source) -> Iterator[tuple[str, _Getter]]:
    if isinstance(source, nn.Module):
        yield from _module_entries(source)
        return
    for pair in source.items() if isinstance(source, Mapping) else source:
        name, tensor = pair if isinstance(pair, tuple) and len(pair) == 2 else (None, pair)
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise TypeError(f"{pair!r} is not a named tensor; pass a module or model.named_parameters().")
        if tensor.is_floating_point():
            yield name, lambda tensor=tensor: tensor


def _module_entries(module: nn.Module) -> Iterator[tuple[str, _Getter]]:
    if isinstance(module, nn.parallel.DistributedDataParallel):
        module = module.module
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if parameter.requires_grad:
            yield _plain(name), lambda parameter=parameter: parameter
    for prefix, owner in module.named_modules(remove_duplicate=False):
        for key, buffer in owner.named_buffers(recurse=False):
            if buffer.is_floating_point() and key not in owner._non_persistent_buffers_set:
                # Module.to replaces buffers rather than moving them, hence the lookup.
                yield _plain(f"{prefix}.{key}" if prefix else key), lambda owner=owner, key=key: owner.get_buffer(key)


def _plain(name: str) -> str:
    """The name without the level that torch.compile adds."""
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def _require_dense(name: str, tensor: Tensor) -> None:
    if hasattr(tensor, "device_mesh"):
        raise NotImplementedError(f"{name} is sharded (a DTensor), which the Averager does not support.")
    if tensor.layout != torch.strided or tensor.device.type == "meta":
        raise ValueError(
            f"{name} has layout {tensor.layout} on device {tensor.device}; the Averager needs dense tensors with data."
        )
