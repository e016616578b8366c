"""The live tensors of a model: which of them are averaged, under which names."""

from __future__ import annotations

from collections.abc import Generator, Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from lagless._validation import is_tuple
from lagless.averaging._module_buffers import ModuleBuffers
from lagless.averaging._outline import Outline
from lagless.averaging._tables import modules_of, parameters_of
from lagless.execution import (
    Sharding,
    fsdp_modules,
    is_sharded,
    keeping_modes,
    local,
    require_own_weights,
    require_training_mode,
    showing,
    trained_weights,
    writing_weights,
)

Source = nn.Module | Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]


@dataclass(frozen=True)
class _Parameter:
    """A module's parameter, looked up anew at every use: loading or moving a model may replace it."""

    owner: nn.Module
    key: str

    def peek(self) -> Tensor | None:
        return parameters_of(self.owner).get(self.key)

    def get(self) -> Tensor:
        parameter = self.peek()
        if parameter is None:
            raise RuntimeError(
                f"{self.key} is no longer a parameter of its {type(self.owner).__name__} (parametrizing, weight norm "
                f"and pruning replace it by a computed one); {_ANEW}"
            )
        return parameter

    def put_back(self, tensor: Tensor) -> None:
        self.owner._parameters[self.key] = tensor  # type: ignore[assignment]


@dataclass(frozen=True)
class _Given:
    """A tensor that was handed over by name."""

    tensor: Tensor

    def peek(self) -> Tensor:
        return self.tensor

    def get(self) -> Tensor:
        return self.tensor

    def put_back(self, tensor: Tensor) -> None:
        pass


_Place = _Parameter | _Given


class LiveTensors:
    """Named floating-point tensors, as they are at every use.

    From a module: its trainable parameters. Frozen parameters and buffers are left out: what the model holds serves the
    average too, and extrapolating a running variance or a mask of infinities would not. From names and tensors: all
    floating-point ones but frozen ``nn.Parameter``. A tensor under several names (tied weights) counts once, under the
    first. Of a sharded tensor, the part on this rank is what is averaged.

    Attributes:
        names: one per distinct tensor.
        aliases: every further name of a tied tensor, mapped to the one in ``names``.
        shardings: how each of them lies on the ranks.
        made_of: what optimizers step, where the given tensors are only made of it.
        module: of which the block of :meth:`holding` may change the buffers.
    """

    def __init__(self, source: Source) -> None:
        self.names: list[str] = []
        self.aliases: dict[str, str] = {}
        self._places: list[_Place] = []
        self._tied: list[tuple[str, _Place, _Place]] = []
        self._frozen: list[tuple[str, _Place]] = []
        self.made_of: list[Tensor] = []
        self.module = unwrap(source) if isinstance(source, nn.Module) else None
        self._fsdp = fsdp_modules(source) if isinstance(source, nn.Module) else []
        self._reshard()
        seen: dict[Hashable, int] = {}
        for name, place in _entries(source):
            if name in self.names or name in self.aliases:
                raise ValueError(f"two tensors are named {name!r}; names must be unique.")
            tensor = place.get()
            _require_whole_or_dtensor(name, tensor)
            if isinstance(tensor, nn.Parameter) and not tensor.requires_grad:
                self._frozen.append((name, place))
                continue
            if not tensor.is_floating_point() and not tensor.is_complex():
                continue
            _require_dense(name, tensor)
            if (first := seen.setdefault(_memory_of(tensor, name), len(self.names))) < len(self.names):
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
        self.shardings = [Sharding.of(place.get()) for place in self._places]
        self._shapes = [sharding.shape for sharding in self.shardings]
        self._outline = Outline(self.module) if self.module is not None else None

    def named(self) -> dict[str, Tensor]:
        """Return the tensors themselves as they are now, by name: with their gradients, and not split into shards."""
        self._reshard()
        return {name: place.get() for name, place in zip(self.names, self._places, strict=True)}

    def tensors(self, *, detach: bool = True) -> list[Tensor]:
        """The tensors as they are now on this rank, in the order of ``names``.

        Args:
            detach: whether outside of autograd; else those that are whole are the parameters themselves, which saves a
                new tensor for each, for use under ``no_grad``.

        Raises:
            RuntimeError: if one is no longer where it was or has changed its shape or sharding, if parameters that
                train have come to the model, or if weights were tied or have come apart.
        """
        self._reshard()
        self._require_same_places()
        for name, place, first in self._tied:
            if _memory_of(place.get(), name) != _memory_of(first.get(), name):
                raise RuntimeError(f"{name} is no longer tied to {self.aliases[name]}; {_ANEW}")
        tensors = [place.get() for place in self._places]
        plain = [type(tensor) in _PLAIN for tensor in tensors]
        if not all(plain) or [tensor.shape for tensor in tensors] != self._shapes:
            for name, tensor, sharding in zip(self.names, tensors, self.shardings, strict=True):
                if (now := Sharding.of(tensor)) != sharding:
                    raise RuntimeError(f"{name} changed its shape from {sharding} to {now}; {_ANEW}")
        if len({(t if whole else local(t)).data_ptr() for t, whole in zip(tensors, plain, strict=True)}) < len(tensors):
            self._require_untied(tensors)  # or some are empty
        if detach:
            return [local(tensor) for tensor in tensors]
        return [t if whole else local(t) for t, whole in zip(tensors, plain, strict=True)]

    def _require_same_places(self) -> None:
        if self._outline is None or self.module is None or not self._outline.changed():
            return
        now = dict(_entries(self.module))
        averaged: dict[str, _Place] = dict(zip(self.names, self._places, strict=True))
        averaged |= {name: place for name, place, _ in self._tied}
        for name, place in averaged.items():
            if now.get(name) != place:
                raise RuntimeError(
                    f"{name} is no longer in the model where it was when the Averager was made: a module was replaced, "
                    f"wrapped or taken out; {_ANEW}"
                )
        others = {name: place for name, place in now.items() if name not in averaged}
        before = {name for name, _ in self._frozen}
        for name, place in others.items():
            if name not in before and place.get().requires_grad:
                raise RuntimeError(f"{name} trains and was not in the model when the Averager was made; {_ANEW}")
        self._frozen = [(name, place) for name, place in others.items() if not place.get().requires_grad]
        self._outline.look()

    def _require_untied(self, tensors: list[Tensor]) -> None:
        first: dict[Hashable, str] = {}
        for name, tensor in zip(self.names, tensors, strict=True):
            if (other := first.setdefault(_memory_of(tensor, name), name)) != name:
                raise RuntimeError(f"{name} was tied to {other} after the Averager was made; {_ANEW}")

    def trained(self) -> list[Tensor]:
        """Return :meth:`tensors` as they train, also while an optimizer shows other weights for evaluation."""
        tensors = self.tensors()
        given = [place.get() for place in self._places]
        trained = trained_weights(given)
        return [t if now is then else local(now) for t, now, then in zip(tensors, trained, given, strict=True)]

    def parameters(self) -> Iterator[Tensor]:
        """Yield what optimizers step, as far as it is still there."""
        self._reshard()
        yield from self.made_of or (tensor for place in self._places if (tensor := place.peek()) is not None)

    def require_own(self, action: str) -> None:
        """Refuse ``action`` while somebody else's average is in the parameters for the length of a block.

        Raises:
            RuntimeError: saying whose.
        """
        require_own_weights(self.parameters(), action)

    def require_training(self, action: str) -> None:
        """Refuse ``action`` while the parameters show weights that do not train.

        Raises:
            RuntimeError: saying whose.
        """
        self.require_own(action)
        require_training_mode(self.parameters(), action)

    def check_frozen(self) -> None:
        """Refuse averages that lack parameters which train by now.

        Raises:
            RuntimeError: if a parameter has been unfrozen.
        """
        for name, place in self._frozen:
            if place.get().requires_grad:
                raise RuntimeError(
                    f"{name} was frozen when the Averager was made, and trains now. Freeze it again to read these "
                    f"averages or to go on with them; or {_ANEW}"
                )

    @contextmanager
    def holding(self, values: Iterable[Tensor], what: str) -> Generator[None]:
        """Hold ``values``, rounded to the tensors' dtypes, inside the ``with`` block; afterwards the present bits.

        The present ones are copied and put back, also after an error; whatever the block does to the tensors (new
        values, another dtype or device) and to the module's buffers is undone.

        Args:
            values: for each tensor.
            what: to call them in errors of others who need the weights meanwhile.
        """
        live = self.tensors()
        bits = [tensor.clone() for tensor in live]
        buffers = ModuleBuffers(self.module)
        given = [(place, place.get()) for place in (*self._places, *(place for _, place, _ in self._tied))]
        try:
            with showing([*self.parameters(), *live], what), keeping_modes(self.parameters()):
                self.put(values)
                yield
        finally:
            with writing_weights(), torch.no_grad():
                for place, tensor in given:
                    if not is_sharded(tensor):  # FSDP exchanges its own
                        place.put_back(tensor)
                self.restore(bits)
                buffers.restore()

    def put(self, values: Iterable[Tensor]) -> None:
        """Give every tensor its value of ``values``, rounded to its dtype."""
        with writing_weights(), torch.no_grad():
            for tensor, value in zip(self.tensors(), values, strict=True):
                tensor.copy_(value)

    def restore(self, bits: list[Tensor]) -> None:
        """Give every tensor the values, dtype and device of ``bits``.

        Raises:
            RuntimeError: if a sharded parameter has changed its dtype or device.
        """
        self._reshard()
        for name, place, saved in zip(self.names, self._places, bits, strict=True):
            tensor = place.get()
            part = local(tensor)
            if (part.dtype, part.device) == (saved.dtype, saved.device):
                part.copy_(saved)
            elif is_sharded(tensor):
                raise RuntimeError(
                    f"{name} became {part.dtype} on {part.device} inside applied(), which cannot be undone where "
                    "parameters are sharded. Resume from a checkpoint, and convert the tensors of read() instead."
                )
            else:
                tensor.data = saved

    def _reshard(self) -> None:
        """Put the sharded parameters of FSDP back: after a forward pass, gathered copies may stand in their place."""
        for module in self._fsdp:
            module.reshard()


_PLAIN = (Tensor, nn.Parameter)
_ANEW = "make a new Averager after changing the model; its step=N joins a run at step N."


def _entries(source: Source) -> Iterator[tuple[str, _Place]]:
    if isinstance(source, nn.Module):
        for prefix, owner in modules_of(unwrap(source)):
            for key, parameter in parameters_of(owner).items():
                if parameter is not None:
                    yield plain_name(f"{prefix}.{key}" if prefix else key), _Parameter(owner, key)
        return
    pairs: Iterable[Any] = cast("Iterable[Any]", source.items() if isinstance(source, Mapping) else source)
    for pair in pairs:
        name, tensor = pair if is_tuple(pair) and len(pair) == 2 else (None, pair)
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise TypeError(f"{pair!r} is not a named tensor; pass a module or model.named_parameters().")
        yield name, _Given(tensor)


def unwrap(module: nn.Module) -> nn.Module:
    """The module that a compiled, data-parallel or DeepSpeed one wraps."""
    while hasattr(module, "_orig_mod") or _is_wrapper(module):
        module = module._orig_mod if hasattr(module, "_orig_mod") else module.module  # type: ignore[assignment]
    return module


def _is_wrapper(module: nn.Module) -> bool:
    kinds = nn.parallel.DistributedDataParallel, nn.DataParallel
    return isinstance(module, kinds) or type(module).__name__ == "DeepSpeedEngine"


def plain_name(name: str) -> str:
    """The name without the levels that compiling or checkpointing single blocks adds."""
    return ".".join(part for part in name.split(".") if part not in ("_orig_mod", "_checkpoint_wrapped_module"))


def _memory_of(tensor: Tensor, name: str) -> Hashable:
    """Equal for tensors that are the same memory seen in the same way."""
    if is_sharded(tensor):
        return id(tensor)  # parts may be empty on some ranks, and all ranks must find the same ties
    if tensor.numel() == 0:
        return name
    return tensor.data_ptr(), tensor.device, tensor.dtype, tensor.shape, tensor.stride()


def _require_whole_or_dtensor(name: str, tensor: Tensor) -> None:
    if hasattr(tensor, "ds_id"):
        raise NotImplementedError(
            f"{name} is partitioned by DeepSpeed ZeRO-3, which leaves parameters without elements between their uses. "
            "Train with ZeRO stage 1 or 2, or with FSDP2 (torch.distributed.fsdp.fully_shard)."
        )
    if getattr(tensor, "_fsdp_flattened", False):
        raise NotImplementedError(
            f"{name} belongs to FullyShardedDataParallel (FSDP1), which flattens parameters together. Shard with "
            "FSDP2: torch.distributed.fsdp.fully_shard, in Accelerate and the Trainer fsdp_version: 2."
        )
    if any(placement.is_partial() for placement in Sharding.of(tensor).placements):
        raise ValueError(f"{name} is a DTensor of partial sums, {Sharding.of(tensor)}; reduce it first.")


def _require_dense(name: str, tensor: Tensor) -> None:
    if tensor.is_complex() or tensor.layout != torch.strided or tensor.device.type == "meta":
        raise ValueError(
            f"{name} is {tensor.dtype}, {tensor.layout}, on device {tensor.device}; the Averager needs dense real "
            "tensors that hold data. Load it whole (what device_map offloads is on device meta), or freeze it before "
            "making the Averager."
        )
