"""The blocks of docs/trainers.md run as they stand."""

import re
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

PAGE = Path(__file__).parents[3] / "docs" / "trainers.md"
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")  # TRL's default
@pytest.mark.parametrize("block", [block for block in BLOCKS if "transformers" in block])
def test_blocks_run(hf, tmp_path, monkeypatch, block):
    monkeypatch.chdir(tmp_path)
    quiet = "report_to='none', disable_tqdm=True, use_cpu=True, dataloader_pin_memory=False, learning_rate=1e-2, "
    quiet += "bf16=False, " * ("trl" in block)
    short = block.replace("max_steps=200", f"{quiet} max_steps=20").replace("steps=50", "steps=10")
    assert short.count("max_steps=20") == 1
    rows = {"train_dataset": hf.rows(0, 20), "eval_dataset": hf.rows(24, 6)}
    if "trl" in block:
        datasets = pytest.importorskip("datasets")
        pytest.importorskip("trl")
        texts = {"train_dataset": range(20), "eval_dataset": range(24, 30)}
        text = {key: [{"text": " ".join(hf.words[i : i + 8])} for i in numbers] for key, numbers in texts.items()}
        rows = {key: datasets.Dataset.from_list(value) for key, value in text.items()}
    names = {"model": hf.model(), "tokenizer": hf.tokenizer, **rows}
    exec(short, names)
    trainer = names["trainer"]
    assert isinstance(trainer, Trainer) and isinstance(trainer.args, TrainingArguments)
    average = "pace" if "PACE" in block else "ema"
    assert any(f"eval_{average}_loss" in entry for entry in trainer.state.log_history)
    averaged = AutoModelForCausalLM.from_pretrained(Path(trainer.args.output_dir) / "averaged" / average)
    if "returned" in block:
        returned = AutoModelForCausalLM.from_pretrained("returned")
        assert Path("returned/lagless.json").is_file() and hf.same(hf.weights(returned), hf.weights(averaged))
    if "best" in block:
        best = hf.weights(AutoModelForCausalLM.from_pretrained("best"))
        assert hf.same(best, hf.weights(AutoModelForCausalLM.from_pretrained("sft/averaged/ema")))
