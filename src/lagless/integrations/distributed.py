"""From sharded averages to a model folder that ``from_pretrained`` loads."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import ExitStack
from os import PathLike
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import Tensor, nn

from lagless.averaging import Averager, HoldsAverages, gather, plain_name, ranks_of, unwrap
from lagless.checkpoints import (
    CARD,
    OUTPUT_DTYPES,
    RECORD,
    Layout,
    ModelWriter,
    TensorInfo,
    check_destination,
    model_card,
    plan_layout,
)
from lagless.integrations._exports import as_text, base_model_name, complete, describe
from lagless.optim import AveragedOptimizer


def export_model(
    averager: HoldsAverages,
    model: nn.Module,
    out: str | PathLike[str],
    name: str | None = None,
    *,
    tokenizer: Any = None,
    dtype: str = "auto",
    max_shard_size: int | str = "5GB",
    overwrite: bool = False,
) -> None:
    """Write an average as a model folder, without the whole model on any rank.

    All ranks call this together where parameters are sharded; replicas (DDP) have one rank call it. Tensor by tensor is
    gathered, and the first rank writes it: memory holds one whole tensor more. The folder appears when it is complete;
    if one rank fails, all raise, and what was there before stays.

    Args:
        averager: whose average is written: an Averager, or an optimizer that keeps an average in its state.
        model: the model that it follows; frozen parameters, buffers and configuration are taken from it.
        out: the folder.
        name: which average; may be left out if there is only one.
        tokenizer: a tokenizer or processor to save along, anything with ``save_pretrained``.
        dtype: of the weights written: ``"auto"`` for that of the parameters, or float32, bfloat16, float16, float64.
        max_shard_size: largest weight file.
        overwrite: replace ``out`` if it holds an earlier average.

    Raises:
        CheckpointError: if the folder cannot be written.
        NotImplementedError: for adapters of PEFT.
        RuntimeError: before the first update of that rule.
        ValueError: if ``model`` is not the one averaged.
    """
    module, out = unwrap(model), Path(out).expanduser()
    if hasattr(module, "peft_config"):
        raise NotImplementedError(
            "export_model writes whole models. An adapter is small: gather what read() gives with full_tensor() on "
            "every rank, and pass it to save_pretrained(state_dict=...) on the first."
        )
    name, averages = _averages_of(averager, module, name)
    tensors = _tensors(module)
    ranks = ranks_of(tensors.values())
    infos = {key: TensorInfo(tensor.dtype, tuple(tensor.shape)) for key, tensor in tensors.items()}
    layout = plan_layout(infos, dtype, max_shard_size)
    record = complete({**describe(averager, name), "dtype": dtype})
    with ExitStack() as stack:
        writers: list[ModelWriter] = []

        def begin() -> None:
            if ranks.rank == 0:
                check_destination(out, [], overwrite)
                companions = Path(stack.enter_context(TemporaryDirectory()))
                _save_companions(module, tokenizer, companions)
                writer = ModelWriter(out, [""], layout, companions, _one_dtype(layout), overwrite=overwrite)
                writers.append(stack.enter_context(writer))
                writers[0].write_texts(RECORD, [as_text(record)])
                writers[0].write_texts(CARD, [model_card(record, companions, base_model_name(module))])

        def write(key: str, whole: Tensor) -> None:
            for writer in writers:
                writer(key, 0, whole.detach().cpu().reshape(1, -1))

        ranks.require_same(list(tensors), "the tensors")
        ranks.together(begin)
        for key, tensor in _averaged(averages, tensors):
            whole = gather(tensor)
            ranks.together(lambda key=key, whole=whole: write(key, whole))
        ranks.together(stack.close)


def _averages_of(
    holder: HoldsAverages, module: nn.Module, name: str | None
) -> tuple[str, Iterator[tuple[str, Tensor]]]:
    """An average's name, and its weights under the module's names."""
    if isinstance(holder, AveragedOptimizer):
        averages = holder.named_averages(name, module=module)
        return holder.average_name, ((plain_name(key), value) for key, value in averages)
    only = next(iter(holder.rules)) if isinstance(holder, Averager) else "average"
    return name or only, holder.named_averages(name)


def _averaged(averages: Iterator[tuple[str, Tensor]], tensors: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The averages, then whatever else the model has."""
    left = dict(tensors)
    for key, average in averages:
        if left.pop(key, None) is None:
            raise ValueError(f"model has no tensor {key!r}, which the Averager follows; give the model it was made of.")
        yield key, average
    yield from left.items()


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """The state dict without further names of tied parameters."""
    once, all_names = (
        {plain_name(name) for name, _ in module.named_parameters(remove_duplicate=only)} for only in (True, False)
    )
    state = {plain_name(name): tensor for name, tensor in module.state_dict().items() if isinstance(tensor, Tensor)}
    return {name: tensor for name, tensor in state.items() if name in once or name not in all_names}


def _one_dtype(layout: Layout) -> str:
    """The type that ``config.json`` is to name: that of the weights, if they have only one."""
    found = {info.dtype for info in layout.tensors.values() if info.dtype.is_floating_point}
    return next((name for name, dtype in OUTPUT_DTYPES.items() if found == {dtype}), "auto")


def _save_companions(module: nn.Module, tokenizer: Any, folder: Path) -> None:
    if (config := getattr(module, "config", None)) is not None:
        config = copy.deepcopy(config)
        config.architectures = [type(module).__name__.removeprefix("FSDP")]  # fully_shard puts that before the name
        config.save_pretrained(folder)
    for companion in (getattr(module, "generation_config", None), tokenizer):
        if companion is not None:
            companion.save_pretrained(folder)
