from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tests.model_files import files_under, make_state, save_model, save_sharded

import lagless
from lagless import BEMA, DEMA, EMA, OUEMA, UniformAverage, trajectory_weights
from lagless.checkpoints import CheckpointError, fingerprint, open_checkpoint
from lagless.posthoc import average_checkpoints, combine_checkpoints, inspect_run

Make = Callable[..., Path]
RULES = {
    "ema": EMA(decay=0.9),
    "bema": BEMA.paper(update_freq=10),
    "ou": OUEMA.paper(update_freq=10),
    "dema": DEMA.paper(update_freq=10),
}


@pytest.mark.parametrize("rules", [RULES, RULES["bema"]])
def test_averages_have_the_weights_of_their_rules(make_run: Make, tmp_path: Path, rules: object) -> None:
    states = [make_state(i) for i in range(5)]
    run = make_run(states)
    summaries = average_checkpoints(run, rules, tmp_path / "out")  # type: ignore[arg-type]
    named = rules if isinstance(rules, dict) else {"": rules}
    assert [summary.name for summary in summaries] == list(named)
    for (name, rule), summary in zip(named.items(), summaries, strict=True):
        weights = trajectory_weights(rule, [10, 20, 30, 40, 50])
        assert summary.weights == tuple(weights) and summary.path == tmp_path / "out" / name
        found = load_file(tmp_path / "out" / name / "model.safetensors")
        for tensor in ("embed.weight", "scale", "nothing", "mlp.weight"):
            expected = sum(w * state[tensor].double() for w, state in zip(weights, states, strict=True))
            assert torch.allclose(found[tensor].double(), expected, rtol=1e-5, atol=1e-6)
        assert torch.equal(found["position"], states[-1]["position"]) and torch.equal(found["mask"], states[-1]["mask"])


def test_the_record_says_what_the_average_is_made_of(make_run: Make, tmp_path: Path) -> None:
    run, rule = make_run([make_state(i) for i in range(3)]), BEMA.paper(update_freq=10)
    save_sharded(make_state(9), tmp_path / "base", 2)
    (summary,) = average_checkpoints(run, rule, tmp_path / "out", start=tmp_path / "base", dtype="float64")
    text = (tmp_path / "out" / "lagless.json").read_text()
    record = json.loads(text)
    assert str(tmp_path) not in text
    assert record["lagless"] == lagless.__version__
    assert lagless.rules.rule_from_dict(record["rule"]) == rule
    assert record["start"] == {"name": "base", "step": 0, "chosen": "given"}
    assert [source["step"] for source in record["sources"]] == [0, 10, 20, 30] and record["step"] == 30
    assert [source["weight"] for source in record["sources"]] == list(summary.weights)
    assert record["sources"][0]["files"] == [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    assert [s["fingerprint"] for s in record["sources"][1:]] == [fingerprint(p) for p in sorted(run.iterdir())]
    assert record["accumulate"] == "float32" and record["dtype"] == "float64"
    assert record["anchor"] == {"name": "base", "step": 0, "weight": summary.weights[0]}
    for key in ("mean_age", "effective_iterates"):
        assert record[key] == getattr(summary, key)


def test_at_leaves_later_checkpoints_out(make_run: Make, tmp_path: Path) -> None:
    states = [make_state(i) for i in range(4)]
    states[3]["scale"].fill_(float("nan"))
    run = make_run(states)
    average_checkpoints(run, EMA(decay=0.5), tmp_path / "at", at=35)
    average_checkpoints(run, EMA(decay=0.5), tmp_path / "steps", steps=[10, 20, 30])
    assert fingerprint(tmp_path / "at") == fingerprint(tmp_path / "steps")
    record = json.loads((tmp_path / "at" / "lagless.json").read_text())
    assert record["step"] == 30 and record["start"]["chosen"] == "earliest checkpoint"


def test_checkpoints_without_weight_are_not_read(make_run: Make, tmp_path: Path) -> None:
    states = [make_state(i) for i in range(4)]
    states[1]["scale"].fill_(float("nan"))
    average_checkpoints(make_run(states), EMA(decay=0.5, update_freq=40), tmp_path / "out")
    record = json.loads((tmp_path / "out" / "lagless.json").read_text())
    assert [source["fingerprint"] is None for source in record["sources"]] == [False, True, True, False]


def test_a_rule_without_updates_is_refused_before_anything_is_made(make_run: Make, tmp_path: Path) -> None:
    run = make_run([make_state(i) for i in range(3)], [500, 1000, 1500])
    with pytest.raises(
        ValueError, match="BEMA: update_freq=400, .* no update at the stored steps 1000, 1500 .*e.g. 500"
    ):
        average_checkpoints(run, BEMA.paper(), tmp_path / "out")
    with pytest.raises(
        ValueError, match="late: .*update_after=1500 give no update.*update_after below the last step, 1500"
    ):
        average_checkpoints(run, {"late": EMA(update_after=1500)}, tmp_path / "out")
    with pytest.raises(ValueError, match="BEMA: update_freq=400"):
        inspect_run(run, BEMA.paper())
    assert not (tmp_path / "out").exists()


def test_a_dry_run_checks_and_writes_nothing(make_run: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run([make_state(i) for i in range(3)])
    monkeypatch.setattr("os.preadv", None)
    (summary,) = average_checkpoints(run, EMA(decay=0.5), tmp_path / "out", dry_run=True)
    assert summary.weights == (0.25, 0.25, 0.5) and summary.nbytes > 0
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "x").touch()
    with pytest.raises(CheckpointError, match="is not empty"):
        average_checkpoints(run, EMA(), tmp_path / "out", dry_run=True)


def test_overwrite_replaces_only_what_is_complete(make_run: Make, tmp_path: Path) -> None:
    states = [make_state(i) for i in range(3)]
    run, out = make_run(states), tmp_path / "out"
    average_checkpoints(run, {"a": EMA(), "b": EMA()}, out)
    before = fingerprint(out / "a")
    with pytest.raises(CheckpointError, match="not empty"):
        average_checkpoints(run, EMA(), out)
    save_model(states[2] | {"scale": torch.tensor(float("nan"))}, run / "checkpoint-30")
    with pytest.raises(CheckpointError, match="'scale' has nan"):
        average_checkpoints(run, EMA(), out, overwrite=True)
    assert fingerprint(out / "a") == before
    average_checkpoints(run, EMA(), out, overwrite=True, allow_nonfinite=True)
    assert files_under(out) == ["README.md", "config.json", "lagless.json", "model.safetensors"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "run"]


def test_an_error_in_the_middle_leaves_nothing(make_run: Make, tmp_path: Path) -> None:
    run = make_run([make_state(i) for i in range(3)])

    def interrupt(done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        average_checkpoints(run, RULES, tmp_path / "out", progress=interrupt)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("name", ["", "a/b", "..", ".hidden"])
def test_names_that_are_no_folders(make_run: Make, tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="cannot be the name of a folder"):
        average_checkpoints(make_run([make_state(0)] * 2), {name: EMA()}, tmp_path / "out")
    with pytest.raises(ValueError, match="rules is empty"):
        average_checkpoints(make_run([make_state(0)] * 2), {}, tmp_path / "out")


def test_bfloat16_stays_unless_another_type_is_asked_for(make_run: Make, tmp_path: Path) -> None:
    states = [make_state(i, torch.bfloat16) | {"norm.weight": torch.randn(5)} for i in range(3)]
    run = make_run(states)
    average_checkpoints(run, EMA(decay=0.5), tmp_path / "auto")
    average_checkpoints(run, EMA(decay=0.5), tmp_path / "wide", dtype="float32")
    auto, wide = (load_file(tmp_path / name / "model.safetensors") for name in ("auto", "wide"))
    assert auto["mlp.weight"].dtype == torch.bfloat16 and auto["norm.weight"].dtype == torch.float32
    assert wide["mlp.weight"].dtype == torch.float32
    assert torch.equal(auto["mlp.weight"], wide["mlp.weight"].bfloat16())


def test_inspection(make_run: Make, tmp_path: Path) -> None:
    state = {"w": torch.zeros(30, 2, dtype=torch.bfloat16), "n": torch.zeros(3), "i": torch.arange(4)}
    run = make_run([state] * 3, [100, 200, 300])
    found = inspect_run(run, {"uniform": UniformAverage()}, steps=[100, 200, 300])
    assert found.steps == (100, 200, 300) and found.names == ("checkpoint-100", "checkpoint-200", "checkpoint-300")
    assert (found.tensors, found.parameters, found.nbytes) == (3, 63, 120 + 12 + 32)
    assert found.dtypes == {"BF16": 60, "F32": 3, "I64": 4}
    assert (found.shards, found.is_adapter, found.start_given) == (1, False, False)
    (uniform,) = found.averages
    assert np.allclose(uniform.weights, 1 / 3) and np.isclose(uniform.mean_age, 100)
    assert np.isclose(uniform.effective_iterates, 3) and np.isclose(uniform.anchor.weight, 1 / 3)
    assert inspect_run(run).averages == ()


@pytest.mark.parametrize("dtype", ["auto", "float32"])
def test_transformers_loads_the_average(tmp_path: Path, dtype: str) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        tie_word_embeddings=True,
    )
    words = {f"w{i}": i for i in range(63)} | {"<unk>": 63}
    raw = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    raw.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>")
    states = []
    for step in (10, 20, 30):
        torch.manual_seed(step)
        model = transformers.LlamaForCausalLM(config).bfloat16()
        folder = tmp_path / "run" / f"checkpoint-{step}"
        model.save_pretrained(folder, max_shard_size="5KB" if step == 20 else "5GB")
        tokenizer.save_pretrained(folder)
        torch.save({"state": 1}, folder / "optimizer.pt")
        states.append({name: tensor.double() for name, tensor in model.state_dict().items()})
    average_checkpoints(tmp_path / "run", EMA(decay=0.5), tmp_path / "out", dtype=dtype, max_shard_size="4KB")
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    kept = torch.bfloat16 if dtype == "auto" else torch.float32
    assert loaded.dtype == kept
    for name, tensor in loaded.state_dict().items():
        expected = 0.25 * states[0][name] + 0.25 * states[1][name] + 0.5 * states[2][name]
        assert torch.equal(tensor, expected.float().to(kept))
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "out")("w3 w5")["input_ids"] == [3, 5]
    assert not (tmp_path / "out" / "optimizer.pt").exists()


@pytest.mark.filterwarnings("ignore::FutureWarning")  # peft reads a name that transformers has deprecated
def test_peft_loads_the_average_of_adapters(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    peft = pytest.importorskip("peft")
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    base = transformers.LlamaForCausalLM(config)
    base.save_pretrained(tmp_path / "base")
    for step in (10, 20):
        torch.manual_seed(step)
        settings = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
        base = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base")
        peft.get_peft_model(base, settings).save_pretrained(tmp_path / "run" / f"checkpoint-{step}")
    average_checkpoints(tmp_path / "run", EMA(decay=0.5), tmp_path / "out", max_shard_size=10)
    files = ["README.md", "adapter_config.json", "adapter_model.safetensors", "lagless.json"]
    assert files_under(tmp_path / "out") == files
    base = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base")
    model = peft.PeftModel.from_pretrained(base, tmp_path / "out")
    found = peft.get_peft_model_state_dict(model)
    expected = combine_checkpoints(sorted((tmp_path / "run").iterdir()), [0.5, 0.5])[0]
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
    assert open_checkpoint(tmp_path / "out").is_adapter
