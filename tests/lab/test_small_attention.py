"""The studies' attention for small heads against transformers' own."""

import copy
import os
import shutil

import pytest
import torch
from experiments.shared.attention import use_small_heads
from transformers import LlamaConfig, LlamaForCausalLM

pytestmark = pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "c++")) is None, reason="it is compiled where it runs"
)


def llama(heads: int, kv_heads: int, head: int) -> LlamaForCausalLM:
    torch.manual_seed(heads)
    config = LlamaConfig(
        hidden_size=heads * head, intermediate_size=32, num_hidden_layers=2, num_attention_heads=heads,
        num_key_value_heads=kv_heads, head_dim=head, vocab_size=64, initializer_range=0.4, use_cache=False,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def loss_and_gradient(model: LlamaForCausalLM, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    return loss.detach(), torch.cat([p.grad.flatten() for p in model.parameters()])  # type: ignore[union-attr]


@pytest.mark.parametrize(("heads", "kv_heads", "head"), [(4, 2, 8), (3, 3, 4), (2, 1, 16)])
@pytest.mark.parametrize("length", [16, 80])
def test_losses_and_gradients_are_those_of_transformers(heads, kv_heads, head, length):
    exact = llama(heads, kv_heads, head)
    ours = copy.deepcopy(exact)
    use_small_heads(ours)
    tokens = torch.randint(64, (2, length), generator=torch.Generator().manual_seed(length))
    expected, gradient = loss_and_gradient(exact.double(), tokens)
    found, ours_gradient = loss_and_gradient(ours, tokens)
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)
    assert (ours_gradient - gradient).norm() < 1e-5 * gradient.norm()


def test_lengths_that_it_cannot_take_are_refused():
    model = llama(2, 1, 8)
    use_small_heads(model)
    with pytest.raises(ValueError, match="multiple of 16"):
        model(input_ids=torch.zeros(1, 20, dtype=torch.long))
