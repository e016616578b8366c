"""A stand-in for vLLM, which needs a GPU: what lm-evaluation-harness uses of its documented interface, on the CPU.

Names, arguments and results are those of vLLM's documentation of ``LLM``, ``EngineArgs``, ``SamplingParams`` and
``RequestOutput``; unknown arguments are refused, as there. Transformers samples from the model in the folder.
``ENGINES`` records the arguments of every engine, and how many were alive when it started.
"""

from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

ENGINES: list[dict[str, Any]] = []
ALIVE: set[int] = set()

_DTYPES = ("auto", "half", "float16", "bfloat16", "float", "float32")


@dataclass
class SamplingParams:
    n: int = 1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True


def TokensPrompt(prompt_token_ids: list[int]) -> dict[str, list[int]]:  # noqa: N802 (a typed dictionary there)
    return {"prompt_token_ids": prompt_token_ids}


@dataclass
class CompletionOutput:
    index: int
    text: str
    token_ids: list[int]


@dataclass
class RequestOutput:
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput] = field(default_factory=list)


class LLM:
    def __init__(
        self,
        model: str,
        *,
        tokenizer: str | None = None,
        tokenizer_mode: str = "auto",
        trust_remote_code: bool = False,
        tensor_parallel_size: int = 1,
        dtype: str = "auto",
        quantization: str | None = None,
        revision: str | None = None,
        tokenizer_revision: str | None = None,
        seed: int | None = None,
        gpu_memory_utilization: float = 0.9,
        enforce_eager: bool = False,
        max_model_len: int | None = None,
        max_num_seqs: int | None = None,
        enable_lora: bool = False,
        max_lora_rank: int = 16,
    ) -> None:
        if dtype not in _DTYPES:
            raise ValueError(f"Unknown dtype: {dtype!r}")
        if tensor_parallel_size > 2:
            raise ValueError(f"World size ({tensor_parallel_size}) is larger than the number of available GPUs (2)")
        loaded: Any = AutoModelForCausalLM.from_pretrained(Path(model), dtype=dtype)
        longest = loaded.config.max_position_embeddings
        if max_model_len is not None and max_model_len > longest:
            raise ValueError(f"User-specified max_model_len ({max_model_len}) is greater than the derived {longest}")
        settings = {k: v for k, v in locals().items() if k not in ("self", "loaded", "longest")}
        ENGINES.append({**settings, "torch_dtype": loaded.dtype, "alive": len(ALIVE)})
        ALIVE.add(id(self))
        self._model, self._tokenizer = loaded.eval(), AutoTokenizer.from_pretrained(model)
        self.llm_engine = SimpleNamespace(model_config=SimpleNamespace(max_model_len=max_model_len or longest))

    def __del__(self) -> None:
        ALIVE.discard(id(self))

    @torch.no_grad()
    def generate(
        self, prompts: Any, sampling_params: Any = None, *, use_tqdm: bool = True, lora_request: Any = None
    ) -> list[RequestOutput]:
        found = []
        for prompt, parameters in zip(prompts, sampling_params, strict=True):
            ids = prompt["prompt_token_ids"]
            if len(ids) + 1 > self.llm_engine.model_config.max_model_len:
                raise ValueError("The decoder prompt is longer than the maximum model length")
            taken = self._model.generate(
                torch.tensor([ids]), do_sample=parameters.temperature > 0, temperature=parameters.temperature or None,
                top_k=parameters.top_k, top_p=parameters.top_p, max_new_tokens=parameters.max_tokens,
            )[0, len(ids) :]  # fmt: skip
            text = self._tokenizer.decode(taken, skip_special_tokens=True)
            stops = [parameters.stop] if isinstance(parameters.stop, str) else parameters.stop or []
            for stop in filter(None, stops):
                text = text.partition(stop)[0]
            found.append(RequestOutput(ids, [CompletionOutput(0, text, taken.tolist())]))
        return found
