"""Checkpoints whose numbers mean different weights are not averaged."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, strategies as st
from safetensors.torch import save_file
from tests.model_files import make_state

from lagless.checkpoints import CheckpointError, find_checkpoints
from lagless.checkpoints._model_settings import _differences

Make = Callable[..., Path]

LLAMA = {
    **{"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2},
    **{"rms_norm_eps": 1e-5, "rope_theta": 1e4, "rope_scaling": None, "tie_word_embeddings": False},
    **{"layer_types": ["full", "sliding"], "transformers_version": "4.57.1", "use_cache": True},
    "text_config": {"head_dim": 16, "dtype": "bfloat16"},
}
LORA = {
    **{"peft_type": "LORA", "r": 8, "lora_alpha": 16, "use_rslora": False, "use_dora": False, "bias": "none"},
    **{"target_modules": ["q_proj", "v_proj", "k_proj"], "alpha_pattern": {}, "base_model_name_or_path": "base"},
}
MEANING: list[tuple[dict[str, Any], str, Any]] = [
    *[(LLAMA, key, value) for key, value in (("num_attention_heads", 8), ("num_key_value_heads", 4))],
    *[(LLAMA, key, value) for key, value in (("rope_theta", 1e6), ("rms_norm_eps", 1e-6), ("model_type", "mistral"))],
    *[(LLAMA, key, value) for key, value in (("layer_types", ["sliding", "full"]), ("text_config", {"head_dim": 8}))],
    (LLAMA, "rope_scaling", {"rope_type": "yarn", "factor": 4.0}),
    *[(LORA, key, value) for key, value in (("lora_alpha", 32), ("use_rslora", True), ("use_dora", True), ("r", 4))],
    *[(LORA, key, value) for key, value in (("base_model_name_or_path", "other"), ("alpha_pattern", {"q_proj": 4}))],
    *[(LORA, "target_modules", ["q_proj", "v_proj"]), (LORA, "peft_type", "LOHA")],
]
HARMLESS: list[tuple[dict[str, Any], str, Any]] = [
    *[(LLAMA, key, value) for key, value in (("use_cache", False), ("transformers_version", "5.0.0"), ("dtype", "x"))],
    *[(LLAMA, key, value) for key, value in (("_name_or_path", "/a"), ("pad_token_id", 3), ("attention_dropout", 0.1))],
    *[(LLAMA, "text_config", {"head_dim": 16, "dtype": "float32"}), (LLAMA, "new_switch", False)],
    *[(LORA, key, value) for key, value in (("inference_mode", True), ("lora_dropout", 0.1), ("revision", "x"))],
    *[(LORA, "target_modules", ["v_proj", "k_proj", "q_proj"]), (LORA, "init_lora_weights", "gaussian")],
]


def make(folder: Path, configurations: list[Any]) -> Path:
    adapter = any("peft_type" in item for item in configurations if isinstance(item, dict))
    for i, content in enumerate(configurations, 1):
        path = folder / f"checkpoint-{i}"
        path.mkdir(parents=True)
        save_file(make_state(i), path / ("adapter_model.safetensors" if adapter else "model.safetensors"))
        (path / ("adapter_config.json" if adapter else "config.json")).write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize("where", [0, 1, 2])
@pytest.mark.parametrize("settings, key, value", MEANING)
def test_settings_that_give_weights_their_meaning_must_agree(
    tmp_path: Path, settings: dict[str, Any], key: str, value: Any, where: int
) -> None:
    configurations = [settings] * 3
    configurations[where] = settings | {key: value}
    named = key.removesuffix("_scaling")
    with pytest.raises(CheckpointError, match=rf"{named}.* is .*checkpoint-\d.*, but .*checkpoint-3.*other weights"):
        find_checkpoints(make(tmp_path, configurations))


@pytest.mark.parametrize("settings, key, value", HARMLESS)
def test_settings_of_place_and_training_may_differ(
    tmp_path: Path, settings: dict[str, Any], key: str, value: Any
) -> None:
    assert len(find_checkpoints(make(tmp_path, [settings, settings | {key: value}])).steps) == 2


def test_a_start_may_have_another_configuration(tmp_path: Path) -> None:
    """Its numbers are those with which the run began, whatever its file says of them."""
    run, base = make(tmp_path / "run", [LLAMA, LLAMA]), make(tmp_path / "base", [LLAMA | {"rope_theta": 5e5}])
    assert find_checkpoints(run, start=base / "checkpoint-1").steps == (0, 1, 2)


def test_versions_write_one_model_in_several_ways(tmp_path: Path) -> None:
    newer = {key: value for key, value in LLAMA.items() if not key.startswith("rope")} | {
        **{"rope_parameters": {"rope_theta": 1e4, "rope_type": "default"}, "transformers_version": "5.1.0"},
        "another_default": 16,
    }
    assert not list(_differences(LLAMA, newer))
    changed = newer | {"rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}}
    assert [key for key, *_ in _differences(LLAMA, changed)] == ["rope_theta"]
    yarn = {"type": "yarn", "factor": 2.0}
    assert not list(
        _differences(
            LLAMA | {"rope_scaling": yarn},
            newer | {"rope_parameters": {"rope_theta": 1e4, "rope_type": "yarn", "factor": 2.0}},
        )
    )


def test_what_is_switched_on_in_one_version_alone_is_a_difference() -> None:
    older = {key: value for key, value in LORA.items() if key != "use_rslora"} | {"peft_version": "0.6"}
    assert not list(_differences(older, LORA))
    assert [key for key, *_ in _differences(older, LORA | {"use_rslora": True})] == ["use_rslora"]


@pytest.mark.parametrize("content", ["[]", "3", "{", "[" * 5000, "\ud800"])
def test_configurations_that_are_none_are_named(tmp_path: Path, content: str) -> None:
    run = make(tmp_path, [LORA, LORA])
    (run / "checkpoint-1" / "adapter_config.json").write_bytes(content.encode("utf-8", "surrogatepass"))
    with pytest.raises(CheckpointError, match="checkpoint-1/adapter_config.json: not a JSON object"):
        find_checkpoints(run)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("abrope_", max_size=4), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.sampled_from(["rope_scaling", "target_modules", "a", "b"]), JSON), st.randoms())
def test_no_configuration_differs_from_itself(settings: dict[str, Any], chance: random.Random) -> None:
    shuffled = list(settings.items())
    chance.shuffle(shuffled)
    assert not list(_differences(settings, dict(shuffled)))
