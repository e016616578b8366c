"""Models under vLLM, one at a time."""

from __future__ import annotations

import gc
import importlib
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lagless.lab.evaluation._closed_loop import require_harness

if TYPE_CHECKING:
    from lm_eval.api.model import LM


def vllm_model(folder: str | Path, seed: int = 0, **arguments: Any) -> LM:
    """Return a stored model under vLLM, for :class:`ClosedLoop`.

    Args:
        folder: a model folder or hub name.
        seed: of vLLM's sampling.
        arguments: further ones of the harness's vLLM model, such as ``tensor_parallel_size``, and of vLLM's engine.

    Raises:
        ImportError: without vLLM.
        ValueError: if the engine does not start, saying why.
    """
    require_harness()
    if importlib.util.find_spec("vllm") is None:
        raise ImportError("the vllm backend needs vLLM: pip install 'lagless[vllm]'; or evaluate with the hf backend.")
    from lm_eval.api.registry import get_model

    try:
        return get_model("vllm").create_from_arg_obj({"pretrained": str(folder), "seed": seed, **arguments})
    except (RuntimeError, ValueError, TypeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"vLLM does not start with {folder} and {', '.join(f'{k}={v}' for k, v in arguments.items())} ({reason}). "
            "Lower --max-model-len or --gpu-memory, divide the model by --tensor-parallel, or see vLLM's own log above."
        ) from error


@contextmanager
def served(folder: str | Path, seed: int = 0, **arguments: Any) -> Iterator[LM]:
    """Yield a stored model under vLLM, and free its memory afterwards; the arguments are :func:`vllm_model`'s."""
    lm = vllm_model(folder, seed, **arguments)
    try:
        yield lm
    finally:
        lm.model = None  # pyright: ignore[reportAttributeAccessIssue]
        del lm
        gc.collect()
        clean_up = getattr(importlib.import_module("vllm.distributed"), "cleanup_dist_env_and_memory", None)
        if clean_up is not None:  # since vLLM 0.6.5
            clean_up()
