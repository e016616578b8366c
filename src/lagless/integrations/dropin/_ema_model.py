"""The interface of diffusers' ``EMAModel`` over an Averager."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lagless.checkpoints import CARD, RECORD, model_card
from lagless.integrations._exports import as_text, complete
from lagless.integrations.dropin._following import FollowingAverager
from lagless.rules import Rule, Tick, WarmupEMA, rule_from_dict, rule_to_dict

STATE_FILE = "average_state.safetensors"


class EMAModel:
    """What diffusers' training scripts do with their ``EMAModel``, for any averaging rule.

    In a script it is one line, ``from lagless.integrations.dropin import EMAModel``. Without ``rule`` the average is
    that of the original, up to rounding: it is kept in float32 whatever the parameters' type. With
    ``rule=BEMA(half_life_fraction=0.05)`` it is that one, and ``decay`` and the arguments beside it are not used.

    Args:
        parameters: of the model, or of a copy of it: their values are θ_0.
        decay: the final decay.
        min_decay: the least decay.
        update_after_step: burn-in: until then the average follows the live weights.
        use_ema_warmup: warm up by inverse gamma; otherwise by (1 + n)/(10 + n).
        inv_gamma: of that warm-up.
        power: likewise.
        foreach: accepted for compatibility; updates are made in blocks in any case.
        model_cls: class of the model, for :meth:`save_pretrained`.
        model_config: its configuration, likewise.
        rule: any averaging rule in place of that EMA.

    Raises:
        ValueError: if an argument is out of range.

    >>> import torch, lagless
    >>> model = torch.nn.Linear(2, 1)
    >>> ema = EMAModel(model.parameters(), rule=lagless.BEMA(half_life_fraction=0.05))
    >>> ema.step(model.parameters())  # after each optimizer step
    >>> ema.store(model.parameters()); ema.copy_to(model.parameters()); ema.restore(model.parameters())
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter] | nn.Module,
        decay: float = 0.9999,
        min_decay: float = 0.0,
        update_after_step: int = 0,
        use_ema_warmup: bool = False,
        inv_gamma: float = 1.0,
        power: float = 2 / 3,
        foreach: bool = False,
        model_cls: Any = None,
        model_config: Any = None,
        *,
        rule: Rule | None = None,
    ) -> None:
        self.decay, self.min_decay, self.update_after_step = decay, min_decay, update_after_step
        self.use_ema_warmup, self.inv_gamma, self.power = use_ema_warmup, inv_gamma, power
        self.model_cls, self.model_config, self.foreach = model_cls, model_config, foreach
        self.temp_stored_params: list[Tensor] | None = None
        self._own_rule = rule is None
        self._all = _listed(parameters)
        self._following = FollowingAverager(_trained(self._all), rule or self._original_rule())

    @property
    def rule(self) -> Rule:
        """The averaging rule."""
        return self._following.rule

    @property
    def optimization_step(self) -> int:
        """Steps so far."""
        return self._following.step

    @property
    def cur_decay_value(self) -> float | None:
        """The decay of the latest step; None before the first one."""
        return self.get_decay(self.optimization_step) if self.optimization_step else None

    @property
    def shadow_params(self) -> list[Tensor]:
        """The averaged parameters, formed when asked for; frozen ones are the live tensors themselves."""
        averages = self._following.values()
        return [averages.get(str(i), parameter.detach()) for i, parameter in enumerate(self._all)]

    def get_decay(self, optimization_step: int) -> float:
        """Return by what the latest iterate's share in the last buffer falls short of 1 at a step."""
        number = optimization_step - self.rule.update_after
        if number <= 0:
            return 0.0
        return 1.0 - self.rule.update(Tick(optimization_step, optimization_step - 1, number)).live[-1]

    @torch.no_grad()
    def step(self, parameters: Iterable[nn.Parameter] | nn.Module) -> None:
        """Count one optimizer step of these parameters."""
        self._all = self._checked(parameters)
        self._following.update(_trained(self._all))

    @torch.no_grad()
    def copy_to(self, parameters: Iterable[nn.Parameter] | nn.Module) -> None:
        """Copy the average into parameters."""
        for value, parameter in zip(self.shadow_params, self._checked(parameters), strict=True):
            parameter.data.copy_(value.to(parameter.device))

    def store(self, parameters: Iterable[nn.Parameter] | nn.Module) -> None:
        """Keep the parameters' values for :meth:`restore`."""
        self.temp_stored_params = [parameter.detach().cpu().clone() for parameter in _listed(parameters)]

    @torch.no_grad()
    def restore(self, parameters: Iterable[nn.Parameter] | nn.Module) -> None:
        """Put back what :meth:`store` kept.

        Raises:
            RuntimeError: if nothing is stored.
        """
        if self.temp_stored_params is None:
            raise RuntimeError("restore: nothing is stored; call store(parameters) before copy_to(parameters).")
        for value, parameter in zip(self.temp_stored_params, _listed(parameters), strict=True):
            parameter.data.copy_(value)
        self.temp_stored_params = None

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None, non_blocking: bool = False
    ) -> None:
        """Keep the average on another device; in bfloat16 it is rounded stochastically, other types change nothing."""
        self._following.place(device, dtype if dtype in (torch.bfloat16, torch.float64) else None)

    def pin_memory(self) -> None:
        """Do nothing: averages on the host are copied through pinned memory already."""

    def state_dict(self) -> dict[str, Any]:
        """Return the original's entries, and the state of the Averager under ``lagless``."""
        known = {name: getattr(self, name) for name in _SCALARS}
        own = {"rule": rule_to_dict(self.rule), "state": self._following.state_dict()}
        return {
            **known,
            "optimization_step": self.optimization_step,
            "shadow_params": self.shadow_params,
            "lagless": own,
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from a state of this class, or from one of diffusers' own, whose EMA then goes on.

        Raises:
            ValueError: if it is one of another rule, or of other parameters.
        """
        own = state_dict.get("lagless")
        if own is None and not self._own_rule:
            raise ValueError(
                f"state_dict: is one of diffusers' EMAModel, which {self.rule} cannot go on from; leave rule out, or "
                "start a new average."
            )
        for name in _SCALARS:
            setattr(self, name, state_dict.get(name, getattr(self, name)))
        if own is not None:
            self._following = FollowingAverager(_trained(self._all), rule_from_dict(own["rule"]))
            self._following.load_state_dict(own["state"])
            return
        shadow = state_dict.get("shadow_params") or self.shadow_params
        values = {name: shadow[int(name)].to(live.device) for name, live in _trained(self._all).items()}
        joined = FollowingAverager(values, self._original_rule(), step=int(state_dict.get("optimization_step", 0)))
        joined.bind(_trained(self._all))
        self._following = joined

    def save_pretrained(self, path: str | PathLike[str]) -> None:
        """Write the averaged model as ``model_cls`` does, with a record and the state to go on from.

        Raises:
            ValueError: if ``model_cls`` or ``model_config`` was not given.
        """
        if self.model_cls is None or self.model_config is None:
            raise ValueError("save_pretrained: needs model_cls and model_config, which EMAModel(...) was not given.")
        folder = Path(path)
        model = self.model_cls.from_config(self.model_config)
        known = {name: getattr(self, name) for name in _SCALARS}
        if hasattr(model, "register_to_config"):
            model.register_to_config(**known, optimization_step=self.optimization_step)
        self.copy_to(model.parameters())
        model.save_pretrained(folder)
        record = complete({"name": "ema", "weights": "average", "rule": rule_to_dict(self.rule)})
        record |= {"step": self.optimization_step, "dtype": "auto"}
        (folder / RECORD).write_text(as_text(record), encoding="utf-8")
        (folder / CARD).write_text(model_card(record, folder), encoding="utf-8")
        self._following.save(folder / STATE_FILE)

    @classmethod
    def from_pretrained(cls, path: str | PathLike[str], model_cls: Any, foreach: bool = False) -> EMAModel:
        """Return what :meth:`save_pretrained` wrote, of this class or of diffusers' own."""
        folder = Path(path)
        model = model_cls.from_pretrained(folder)
        _, given = model_cls.from_config(model_cls.load_config(folder), return_unused_kwargs=True)
        known = {name: given[name] for name in _SCALARS if name in given}
        record = folder / RECORD
        rule = rule_from_dict(json.loads(record.read_text(encoding="utf-8"))["rule"]) if record.is_file() else None
        ema = cls(
            model.parameters(), **known, foreach=foreach, model_cls=model_cls, model_config=model.config, rule=rule
        )
        if rule is not None:
            ema._following.load(folder / STATE_FILE)
        elif given:
            ema.load_state_dict({**given, "shadow_params": [p.detach() for p in ema._all]})
        return ema

    def _original_rule(self) -> WarmupEMA:
        return WarmupEMA(
            decay=self.decay,
            min_decay=self.min_decay,
            warmup="inverse_gamma" if self.use_ema_warmup else "ratio",
            inv_gamma=self.inv_gamma,
            power=self.power,
            update_after=self.update_after_step,
        )

    def _checked(self, parameters: Iterable[nn.Parameter] | nn.Module) -> list[Tensor]:
        listed = _listed(parameters)
        if len(listed) != len(self._all):
            raise ValueError(
                f"parameters: there are {len(listed)}, and there were {len(self._all)} when the average began; give "
                "those of the same model, in the same order."
            )
        return listed


_SCALARS = ("decay", "min_decay", "update_after_step", "use_ema_warmup", "inv_gamma", "power")


def _listed(parameters: Iterable[nn.Parameter] | nn.Module) -> list[Tensor]:
    return list(parameters.parameters() if isinstance(parameters, nn.Module) else parameters)


def _trained(parameters: list[Tensor]) -> dict[str, Tensor]:
    """Those that train, by their places; a model all frozen, as a copy made for the average may be, trains in all."""
    trained = {str(i): p for i, p in enumerate(parameters) if p.requires_grad}
    return trained or {str(i): p for i, p in enumerate(parameters)}
