"""Causal self-attention of small heads on a CPU: torch's kernel takes over a third of a step of a 0.26 M model.

The functions of ``attention.cpp`` take queries, keys and values as the projections return them, turn them by their
rotary positions and attend; ``use_small_heads`` puts them in the place of a Llama's own. They are compiled for the
machine they run on, by ``c++`` or ``$CXX``.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaAttention

SOURCE = Path(__file__).with_suffix(".cpp")
FLAGS = ("-O3", "-march=native", "-shared", "-fPIC")
OF_LENGTH = 16  # divides the number of positions
LONGEST = 1024


@functools.cache
def _library(head: int) -> ctypes.CDLL:
    command = [os.environ.get("CXX", "c++"), *FLAGS, f"-DD={head}", str(SOURCE)]
    digest = hashlib.sha256((" ".join(command) + SOURCE.read_text()).encode()).hexdigest()[:16]
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / f"attention-{digest}.so"
        subprocess.run([*command, "-o", str(made)], check=True, capture_output=True)
        return ctypes.CDLL(str(made))  # which stays mapped when the file goes


def _call(function: str, head: int, *arguments: int | float | Tensor) -> None:
    taken = [
        ctypes.c_void_p(each.data_ptr()) if isinstance(each, Tensor)
        else ctypes.c_float(each) if isinstance(each, float) else ctypes.c_int64(each)
        for each in arguments
    ]  # fmt: skip
    if getattr(_library(head), function)(*taken):
        raise ValueError(f"{function} takes sequences of a multiple of {OF_LENGTH} tokens, at most {LONGEST}.")


@torch.library.custom_op("experiments::attention", mutates_args=())
def attention(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Return what every query attends to, and the logarithms of the sums of exponentials.

    Args:
        q: queries before rotation, shape (batch, length, heads, head size), float32.
        k: keys likewise, with the number of key heads; every ``heads / key heads`` queries share one.
        v: values, like the keys.
        cos: of the rotary positions, shape (length, head size / 2).
        sin: likewise.
        scale: of the scores.
    """
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    (batch, length, heads, head), kv_heads = q.shape, k.shape[2]
    out, sums = torch.empty_like(q), q.new_empty(batch, heads, length)
    _call("attention_forward", head, batch, length, heads, kv_heads, scale, q, k, v, cos, sin, out, sums)
    return out, sums


@attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[0], q.shape[2], q.shape[1])


@torch.library.custom_op("experiments::attention_backward", mutates_args=())
def attention_backward(
    gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, out: Tensor, sums: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of queries, keys and values."""
    q, k, v, gradient = q.contiguous(), k.contiguous(), v.contiguous(), gradient.contiguous()
    (batch, length, heads, head), kv_heads = q.shape, k.shape[2]
    found = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    shape = batch, length, heads, kv_heads
    _call("attention_backward", head, *shape, scale, q, k, v, cos, sin, out, sums, gradient, *found)
    return found


@attention_backward.register_fake
def _(
    gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, out: Tensor, sums: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output)


def _backward(ctx: Any, gradient: Tensor, of_sums: Tensor) -> tuple[Tensor | None, ...]:
    return *attention_backward(gradient, *ctx.saved_tensors, ctx.scale), None, None, None


attention.register_autograd(_backward, setup_context=_remember)


def use_small_heads(model: PreTrainedModel) -> None:
    """Let a Llama in float32 on a CPU attend by ``attention``, causally, without a mask or a cache."""
    for module in model.modules():
        if isinstance(module, LlamaAttention):
            module.forward = functools.partial(_forward, module)  # type: ignore[method-assign]


def _forward(
    self: LlamaAttention, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor], **unused: Any
) -> tuple[Tensor, None]:
    batch, length, _ = hidden_states.shape
    q, k, v = (
        project(hidden_states).view(batch, length, -1, self.head_dim)
        for project in (self.q_proj, self.k_proj, self.v_proj)
    )
    cos, sin = (each[0, :, : self.head_dim // 2].contiguous() for each in position_embeddings)  # halves are equal
    out, _ = attention(q, k, v, cos, sin, self.scaling)
    return self.o_proj(out.view(batch, length, -1)), None
