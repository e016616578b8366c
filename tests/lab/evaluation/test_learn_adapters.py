"""``lagless learn`` on LoRA checkpoints: weights over A and B, the loss through PEFT."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from lagless.checkpoints import CheckpointError, find_checkpoints
from lagless.lab.evaluation import pad, sequence_losses
from lagless.lab.learn import Document, StreamedModel, learn, write_learned
from lagless.posthoc import combine_checkpoints

from .conftest import build

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture
def adapters(tokenizer, tmp_path):
    """Five checkpoints of an adapter beside its base model."""
    build(tokenizer).save_pretrained(tmp_path / "base")
    base = type(build(tokenizer)).from_pretrained(tmp_path / "base")
    torch.manual_seed(0)
    model = peft.get_peft_model(
        base, peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    )
    tokens = torch.tensor(tokenizer("The cat sat on the mat and the dog sat on the log. " * 8)["input_ids"])
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=5.0)
    for step in range(5):
        model.save_pretrained(tmp_path / "run" / f"checkpoint-{step}")
        batch = tokens[32 * step : 32 * step + 64][None]
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return tmp_path / "run"


@pytest.fixture
def documents(tokenizer):
    animals = ["cat", "dog", "cow", "pig", "hen", "fox", "owl", "bee", "elk", "eel", "ant", "bat"]
    texts = [f"The {animal} sat on the mat and the dog sat on the log. " for animal in animals]
    return [
        Document(text, ((tokenizer(text)["input_ids"], 0),), len(tokenizer(text)["input_ids"]) - 1) for text in texts
    ]


def test_weights_over_a_and_b_are_learned_and_written_as_an_adapter(adapters, documents, tmp_path):
    found = learn(adapters, documents, modes=["free"], ridges=[0.01], evaluations=4, targets_per_weight=1, device="cpu")
    trajectory = find_checkpoints(adapters)
    write_learned(trajectory, found, tmp_path / "out")
    written = load_file(tmp_path / "out" / "adapter_model.safetensors")
    (expected,) = combine_checkpoints(trajectory.checkpoints, found.weights)
    assert written.keys() == expected.keys() and all("lora_" in name for name in written)
    for name, tensor in expected.items():
        torch.testing.assert_close(written[name], tensor, rtol=1e-6, atol=1e-7)
    assert json.loads((tmp_path / "out" / "lagless.json").read_text())["learned"]["mode"] == found.setting.mode
    model = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    windows = [window for document in found.parts.report.documents for window in document.items]
    assert sequence_losses(model, pad(windows)).mean.value == pytest.approx(found.loss.value, abs=1e-5)
    assert found.evaluations[0].fit > min(e.fit for e in found.evaluations)


def test_slopes_along_adapters_are_those_of_finite_differences(adapters, documents):
    from lagless.lab.learn._losses import cross_entropy
    from lagless.lab.learn._source import model_and_tensors, source_of

    source = source_of(adapters, None)
    model, tensors = model_and_tensors(source, None, "cpu")
    streamed = StreamedModel(model, source.checkpoints, tensors=tensors)
    items = [window for document in documents[:3] for window in document.items]

    def loss_at(w):
        streamed.load(w)
        return cross_entropy(streamed.model, items)[0].double().sum()

    weights = np.array([0.1, 0.3, 0.2, 0.3, 0.1])
    loss_at(weights).backward()
    gradient = streamed.take_gradient()
    assert gradient and all("lora_" in name for name in gradient)
    slopes, _, _ = streamed.slopes([gradient])
    for i in range(5):
        move = np.eye(5)[i] - np.eye(5)[-1]
        with torch.no_grad():
            difference = float(loss_at(weights + 0.05 * move) - loss_at(weights - 0.05 * move)) / 0.1
        assert slopes[0, i] == pytest.approx(difference, rel=0.02, abs=0.02)


def test_a_model_without_the_adapter_is_refused(adapters, documents, model):
    with pytest.raises(CheckpointError, match=r"is an adapter, but the model is a LlamaForCausalLM"):
        learn(adapters, documents, targets_per_weight=1, model=model)
