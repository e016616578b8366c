"""The state of an Averager as a mapping: tensors under flat names, and plain JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypedDict

from torch import Tensor

from lagless.averaging._live import LiveTensors
from lagless.averaging._rule_set import RuleSet
from lagless.rules import rule_to_dict, same_rule

FORMAT = 1


class State(TypedDict):
    """``tensors``: "{buffer}/{parameter}" → tensor. ``meta``: everything else, plain JSON."""

    tensors: dict[str, Tensor]
    meta: dict[str, Any]


def make_state(
    live: LiveTensors, rules: RuleSet, buffers: Sequence[Sequence[Tensor]], numbers: dict[str, Any]
) -> State:
    """Return the state of averages; its tensors are the buffers themselves.

    Args:
        live: what is averaged.
        rules: by which rules.
        buffers: what is stored, one list per key; an empty one is kept elsewhere.
        numbers: what else there is to know: step, seed, start.
    """
    names = rules.buffer_names()
    tensors = {
        f"{name}/{parameter}": sharding.present(part)
        for name, buffer in zip(names, buffers, strict=True)
        for parameter, sharding, part in zip(live.names, live.shardings, buffer, strict=bool(buffer))
    }
    meta = {
        "format": FORMAT,
        "step": numbers["step"],
        "seed": numbers["seed"],
        "rules": {name: rule_to_dict(rule) for name, rule in rules.rules.items()},
        "last": {name: tick._asdict() for name, tick in rules.last.items()},
        "buffers": {rule: [names[i] for i in indices] for rule, indices in rules.index.items()},
        "start": numbers["start"],
    }
    return {"tensors": tensors, "meta": meta}


def match(state: State, expected: State) -> dict[str, Tensor]:
    """The tensors of ``state`` under the names of ``expected``; refused if it belongs to something else.

    Raises:
        ValueError: if rules, parameters, storage or base checkpoint differ, naming the first difference and the remedy.
    """
    try:
        meta, wanted, have, need = state["meta"], expected["meta"], state["tensors"], expected["tensors"]
        if meta["format"] != FORMAT:
            raise ValueError(
                f"averager state has format {meta['format']!r}; this lagless reads {FORMAT}. Update lagless."
            )
        given, own = meta["rules"], wanted["rules"]
        if given.keys() != own.keys() or not all(same_rule(given[name], own[name]) for name in own):
            raise ValueError(
                f"averager state was made with rules {meta['rules']}, this Averager has {wanted['rules']}. "
                "Make the Averager with the same rules and names, or start new averages."
            )
        if (meta["start"] or {}).get("fingerprint") != (wanted["start"] or {}).get("fingerprint"):
            raise ValueError(
                f"averager state was made with start={meta['start']}, this Averager has start={wanted['start']}. "
                "Give the same base checkpoint."
            )
        # Rules in another order share buffers under other names.
        theirs = {
            own: other
            for rule, names in wanted["buffers"].items()
            for own, other in zip(names, meta["buffers"][rule], strict=True)
        }
        counters = isinstance(meta["step"], int) and isinstance(meta["seed"], int)
        if not counters or meta["last"].keys() != wanted["last"].keys():
            raise KeyError("step, seed, last")
    except (KeyError, TypeError) as error:
        raise ValueError(f"this is not the state of an Averager ({error!r}); give what state_dict returned.") from error

    renamed = {name: "/".join([theirs[name.split("/", 1)[0]], name.split("/", 1)[1]]) for name in need}
    if set(renamed.values()) != have.keys():
        missing, surplus = sorted(set(renamed.values()) - have.keys()), sorted(have.keys() - set(renamed.values()))
        raise ValueError(
            f"averager state is of another set of parameters: {len(missing)} missing {missing[:3]}, "
            f"{len(surplus)} unexpected {surplus[:3]}. Freeze and wrap the model as when the state was saved."
        )
    matched = {name: have[other] for name, other in renamed.items()}
    for name, tensor in need.items():
        if matched[name].shape != tensor.shape or matched[name].dtype != tensor.dtype:
            raise ValueError(
                f"averager state: {name} is {matched[name].dtype} {tuple(matched[name].shape)}, this Averager stores "
                f"{tensor.dtype} {tuple(tensor.shape)}. Use the same model and the same dtype argument."
            )
    return matched
