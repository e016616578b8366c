"""The live tensors of a model: which of them are averaged, under which names."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

Source = nn.Module | Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]


@dataclass(frozen=True)
class _Parameter:
    """A module's parameter, looked up anew at every use: loading or moving a model may replace it."""

    owner: nn.Module
    key: str

    def get(self) -> Tensor:
        return getattr(self.owner, self.key)


@dataclass(frozen=True)
class _Given:
    """A tensor that was handed over by name."""

    tensor: Tensor

    def get(self) -> Tensor:
        return self.tensor


_Place = _Parameter | _Given


class LiveTensors:
    """Named floating-point tensors, as they are at every use.

    From a module: its trainable parameters. Frozen parameters and buffers are left out: what the model holds serves the
    average too, and extrapolating a running variance or a mask of infinities would not. From names and tensors: all
    floating-point ones but frozen ``nn.Parameter``. A tensor under several names (tied weights) counts once, under the
    first.

    Attributes:
        names: one per distinct tensor.
        aliases: every further name of a tied tensor, mapped to the one in ``names``.
    """

    def __init__(self, source: Source) -> None:
        self.names: list[str] = []
        self.aliases: dict[str, str] = {}
        self._places: list[_Place] = []
        self._tied: list[tuple[str, _Place, _Place]] = []
        self._frozen: list[tuple[str, _Place]] = []
        seen: dict[Hashable, int] = {}
        for name, place in _entries(source):
            if name in self.names or name in self.aliases:
                raise ValueError(f"two tensors are named {name!r}; names must be unique.")
            tensor = place.get()
            _require_supported(name, tensor)
            if isinstance(tensor, nn.Parameter) and not tensor.requires_grad:
                self._frozen.append((name, place))
            elif not tensor.is_floating_point():
                continue
            elif (first := seen.setdefault(_memory_of(tensor, name), len(self.names))) < len(self.names):
                self.aliases[name] = self.names[first]
                self._tied.append((name, place, self._places[first]))
            else:
                self.names.append(name)
                self._places.append(place)
        if not self.names:
            raise ValueError(
                "there is nothing to average: no trainable floating-point parameter was given. "
                "Unfreeze parameters before making the Averager, or pass named tensors."
            )
        self._shapes = [place.get().shape for place in self._places]

    def tensors(self) -> list[Tensor]:
        """The tensors as they are now, detached, in the order of ``names``.

        Raises:
            RuntimeError: if one has changed its shape, or tied weights have come apart.
        """
        for name, place, first in self._tied:
            if _memory_of(place.get(), name) != _memory_of(first.get(), name):
                raise RuntimeError(f"{name} is no longer tied to {self.aliases[name]}; {_ANEW}")
        tensors = [place.get().detach() for place in self._places]
        for name, tensor, shape in zip(self.names, tensors, self._shapes, strict=True):
            if tensor.shape != shape:
                raise RuntimeError(f"{name} changed its shape from {tuple(shape)} to {tuple(tensor.shape)}; {_ANEW}")
        return tensors

    def check_frozen(self) -> None:
        """Refuse averages that lack parameters which train by now.

        Raises:
            RuntimeError: if a parameter has been unfrozen.
        """
        for name, place in self._frozen:
            if place.get().requires_grad:
                raise RuntimeError(f"{name} was frozen when the Averager was made, and trains now; {_ANEW}")

    def restore(self, bits: list[Tensor]) -> None:
        """Give every tensor the values, dtype and device of ``bits``."""
        for place, saved in zip(self._places, bits, strict=True):
            tensor = place.get()
            if (tensor.dtype, tensor.device) == (saved.dtype, saved.device):
                tensor.detach().copy_(saved)
            else:
                tensor.data = saved


_ANEW = "make a new Averager after changing the model."


def _entries(source: Source) -> Iterator[tuple[str, _Place]]:
    if isinstance(source, nn.Module):
        for prefix, owner in _unwrap(source).named_modules(remove_duplicate=False):
            for key, parameter in owner._parameters.items():
                if parameter is not None:
                    yield _plain(f"{prefix}.{key}" if prefix else key), _Parameter(owner, key)
        return
    for pair in source.items() if isinstance(source, Mapping) else source:
        name, tensor = pair if isinstance(pair, tuple) and len(pair) == 2 else (None, pair)
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise TypeError(f"{pair!r} is not a named tensor; pass a module or model.named_parameters().")
        yield name, _Given(tensor)


def _unwrap(module: nn.Module) -> nn.Module:
    wrappers = nn.parallel.DistributedDataParallel, nn.DataParallel
    while isinstance(module, wrappers) or hasattr(module, "_orig_mod"):
        module = module.module if isinstance(module, wrappers) else module._orig_mod  # type: ignore[assignment]
    return module


def _plain(name: str) -> str:
    """The name without the levels that compiling single blocks adds."""
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def _memory_of(tensor: Tensor, name: str) -> Hashable:
    """Equal for tensors that are the same memory seen in the same way."""
    if tensor.numel() == 0:
        return name
    return tensor.data_ptr(), tensor.device, tensor.dtype, tensor.shape, tensor.stride()


def _require_supported(name: str, tensor: Tensor) -> None:
    if hasattr(tensor, "device_mesh") or hasattr(tensor, "ds_id"):
        kind = "DTensor" if hasattr(tensor, "device_mesh") else "DeepSpeed ZeRO-3"
        raise NotImplementedError(f"{name} is sharded ({kind}), which the Averager does not support.")
    if tensor.is_complex() or tensor.layout != torch.strided or tensor.device.type == "meta":
        raise ValueError(
            f"{name} is {tensor.dtype}, {tensor.layout}, on device {tensor.device}; the Averager needs dense real "
            "tensors that hold data."
        )
