"""Bias-corrected optimizers under gradient accumulation of Hugging Face's Trainer."""

import pytest
import torch

transformers = pytest.importorskip("transformers")

from lagless.optim import BiasCorrectedAdamW, BiasCorrectedShampoo, BiasCorrectedSophia, sampled_label_loss  # noqa: E402

SETTINGS = [
    {"cross_fit": "leave_one_out", "inverse_correction": "jackknife"},
    {"cross_fit": "split", "inverse_correction": "pre_ema"},
]


def make_model():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        tie_word_embeddings=True,
        use_cache=False,
    )
    return transformers.LlamaForCausalLM(config)


def make_optimizer(model, settings):
    return BiasCorrectedAdamW(model.named_parameters(), lr=0.01, warm_start=1, **settings)


class Sentences(torch.utils.data.Dataset):
    """Sequences of 12 tokens, of which between 2 and 11 are to be predicted."""

    def __len__(self):
        return 64

    def __getitem__(self, i):
        generator = torch.Generator().manual_seed(i)
        tokens = torch.randint(50, (12,), generator=generator)
        labels = tokens.clone()
        labels[: 1 + i % 10] = -100
        return {"input_ids": tokens, "labels": labels}


def trainer(model, optimizer, folder, **arguments):
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        **{
            "max_steps": 4,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 4,
            "lr_scheduler_type": "constant",
            "max_grad_norm": 0.5,
            "report_to": [],
            "use_cpu": True,
            "save_strategy": "no",
            "disable_tqdm": True,
            "logging_strategy": "no",
            "dataloader_pin_memory": False,
        }
        | arguments,
    )
    return transformers.Trainer(model, arguments, train_dataset=Sentences(), optimizers=(optimizer, None))


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: s["cross_fit"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("weighed", [False, True])
def test_trainer_equals_a_plain_loop(settings, checkpointing, weighed, tmp_path):
    """Tied embeddings, unequal token counts, clipping; one forward pass per microbatch."""
    model, seen = make_model(), []
    handle = model.register_forward_pre_hook(lambda _, __, kwargs: seen.append(dict(kwargs)), with_kwargs=True)
    if checkpointing:
        renamed = hasattr(model, "activation_checkpointing_enable")
        (model.activation_checkpointing_enable if renamed else model.gradient_checkpointing_enable)()
    optimizer = make_optimizer(model, settings)
    if weighed:
        optimizer.weigh_by_tokens(model)
    trainer(model, optimizer, tmp_path).train()
    handle.remove()
    assert len(seen) == 16

    twin = make_model()
    optimizer = make_optimizer(twin, settings)
    for step in range(4):
        batch = seen[4 * step : 4 * step + 4]
        tokens = sum(int((inputs["labels"] != -100).sum()) for inputs in batch)
        assert len({int((inputs["labels"] != -100).sum()) for inputs in batch}) > 1
        for inputs in batch:
            logits = twin(input_ids=inputs["input_ids"]).logits[:, :-1].flatten(0, 1)
            loss = torch.nn.functional.cross_entropy(logits, inputs["labels"][:, 1:].flatten(), reduction="sum")
            if weighed:
                optimizer.set_microbatch_weight(int((inputs["labels"][:, 1:] != -100).sum()))
            (loss / tokens).backward()
        torch.nn.utils.clip_grad_norm_(twin.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=2e-5)
    report = optimizer.correction_report()[0]
    assert report.cross_fit == settings["cross_fit"] and 0.0 < report.relative < 2.0


def test_losses_that_are_means_of_their_microbatches_weigh_the_same():
    """Without num_items_in_batch, in evaluation and after the handle's removal nothing is weighed."""
    model = make_model()
    optimizer = make_optimizer(model, SETTINGS[0])
    handle = optimizer.weigh_by_tokens(model)
    batch = {name: t[None] for name, t in Sentences()[3].items()}
    model(**batch)
    model.eval()(**batch, num_items_in_batch=40)
    with torch.no_grad():
        model.train()(**batch, num_items_in_batch=40)
    assert optimizer._microbatches.weights.announced is None
    model(**batch, num_items_in_batch=40)
    assert optimizer._microbatches.weights.announced == 8.0
    handle.remove()
    optimizer.set_microbatch_weight(5)
    model(**batch, num_items_in_batch=40)
    assert optimizer._microbatches.weights.announced == 5.0


def test_resumed_training_equals_never_stopped(tmp_path):
    whole = make_model()
    trainer(whole, make_optimizer(whole, SETTINGS[0]), tmp_path, save_strategy="steps", save_steps=2).train()
    part = make_model()
    again = trainer(part, make_optimizer(part, SETTINGS[0]), tmp_path)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), part.parameters(), strict=True))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_sophia_samples_labels_in_the_trainer(checkpointing, tmp_path):
    """Curvature from the forward passes that there are anyway, every second step."""
    model = make_model()
    optimizer = BiasCorrectedSophia(model.named_parameters(), lr=1e-3, hessian_freq=2, inverse_correction="post_ema")
    optimizer.estimate_curvature(model)
    if checkpointing:
        renamed = hasattr(model, "activation_checkpointing_enable")
        (model.activation_checkpointing_enable if renamed else model.gradient_checkpointing_enable)()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    forwards = []
    model.register_forward_hook(lambda *_: forwards.append(1))
    trainer(model, optimizer, tmp_path).train()
    assert len(forwards) == 16
    assert all(not torch.equal(before[name], p) and p.isfinite().all() for name, p in model.named_parameters())
    assert all(state["hessian"].abs().sum() > 0 for state in optimizer.state.values())


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # TRL's
@pytest.mark.parametrize("remedy", [False, True])
def test_sophia_with_a_loss_that_forms_no_logits(remedy, tmp_path):
    """TRL's SFTTrainer fuses loss and last layer: refused, unless curvature comes from a forward pass of its own."""
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    tokenizers = pytest.importorskip("tokenizers")
    words = {"<pad>": 0, "<eos>": 1} | {f"w{i}": i for i in range(2, 50)}
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<pad>")),
        pad_token="<pad>",
        eos_token="<eos>",
    )
    model = make_model()
    optimizer = BiasCorrectedSophia(model.named_parameters(), lr=1e-3, hessian_freq=2, inverse_correction="post_ema")

    class WithCurvature(trl.SFTTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            if optimizer.curvature_due and model.training:
                logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
                optimizer.add_curvature(sampled_label_loss(logits, inputs["labels"]))
            return super().compute_loss(model, inputs, *args, **kwargs)

    settings = {"max_steps": 3, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "report_to": []}
    settings |= {"use_cpu": True, "bf16": False, "dataloader_pin_memory": False}
    settings |= {"save_strategy": "no", "logging_strategy": "no", "disable_tqdm": True}
    settings |= {"gradient_checkpointing": False, "activation_checkpointing": False}  # old name and new
    training = (WithCurvature if remedy else trl.SFTTrainer)(
        model=model,
        args=trl.SFTConfig(str(tmp_path), **settings),
        train_dataset=datasets.Dataset.from_list(
            [{"input_ids": Sentences()[i]["input_ids"].tolist()} for i in range(32)]
        ),
        processing_class=tokenizer,
        optimizers=(optimizer, None),
    )
    if remedy:
        training.train()
        assert all(state["hessian"].abs().sum() > 0 for state in optimizer.state.values())
    else:
        optimizer.estimate_curvature(model)
        with pytest.raises(RuntimeError, match="LlamaForCausalLM returned no logits.*optimizer.add_curvature"):
            training.train()


def test_shampoo_in_the_trainer(tmp_path):
    model = make_model()
    optimizer = BiasCorrectedShampoo(model.named_parameters(), lr=1e-3, root_freq=2, inverse_correction="post_ema")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    forwards = []
    model.register_forward_hook(lambda *_: forwards.append(1))
    trainer(model, optimizer, tmp_path).train()
    assert len(forwards) == 16
    assert all(not torch.equal(before[name], p) and p.isfinite().all() for name, p in model.named_parameters())
