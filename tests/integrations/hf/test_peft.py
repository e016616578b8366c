"""Adapters: only they are averaged, and exported as adapters; A and B apart, or their product."""

import pytest
import torch
from tests.integrations.hf.conftest import COMPILES_LAYERS
from transformers import AutoTokenizer

from lagless import BEMA, EMA, trajectory_weights
from lagless.integrations.transformers import AveragingCallback
from lagless.integrations.transformers._lora import MergedLoraAverager

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings(  # PEFT's own use of transformers
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)
RULES = {"bema": BEMA.paper(update_freq=2), "ema": EMA(decay=0.8)}
SETTINGS = {"max_steps": 9, "learning_rate": 0.05, "eval_strategy": "steps", "eval_steps": 3}
SAVING = {"save_strategy": "steps", "save_steps": 3}


def adapted(hf, folder, rank=2, **options):
    if not (folder / "base").exists():
        hf.model().save_pretrained(folder / "base")
    model = type(hf.model()).from_pretrained(folder / "base")
    torch.manual_seed(1)
    options = {"target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"} | options
    return peft.get_peft_model(model, peft.LoraConfig(r=rank, lora_alpha=4, **options))


def products(weights):
    """The product BA of every adapter, in float64."""
    pairs = {name: name.replace("lora_A", "lora_B").replace("lora_embedding_A", "lora_embedding_B") for name in weights}
    return {a: weights[b].double() @ weights[a].double() for a, b in pairs.items() if a != b}


def average_of_products(recorder, rule, at=None):
    iterates = recorder.iterates if at is None else recorder.iterates[: at + 1]
    shares = trajectory_weights(rule, range(len(iterates)))
    every = [products(iterate) for iterate in iterates]
    return {name: sum(w * one[name] for w, one in zip(shares, every, strict=True)) for name in every[0]}


def loaded(hf, folder, name):
    model = type(hf.model()).from_pretrained(folder / "base")
    return peft.PeftModel.from_pretrained(model, folder / "averaged" / name, is_trainable=True)


def test_only_the_adapter_is_averaged_and_exported_as_one(hf, tmp_path):
    callback, recorder = AveragingCallback(RULES), hf.recorder()
    trainer = hf.trainer(tmp_path, [callback, recorder], model=adapted(hf, tmp_path), **SETTINGS)
    trainer.train()
    state = callback.averager.state_dict()["tensors"]
    assert all("lora_" in name for name in state)
    for name, rule in RULES.items():
        files = {file.name for file in (tmp_path / "averaged" / name).iterdir()}
        assert "adapter_model.safetensors" in files and "model.safetensors" not in files
        AutoTokenizer.from_pretrained(tmp_path / "averaged" / name)
        model = loaded(hf, tmp_path, name)
        hf.close(hf.weights(model), recorder.average(rule))
        frozen = {k: p for k, p in model.named_parameters() if not p.requires_grad}
        before = dict(adapted(hf, tmp_path).named_parameters())
        assert frozen and all(torch.equal(p, before[k]) for k, p in frozen.items())


@pytest.mark.parametrize("merged_lora", [False, True])
def test_resumed_equals_never_stopped_and_training_is_what_it_was(hf, tmp_path, merged_lora):
    def run(folder, steps, resume=None, callback=True):
        callbacks = [AveragingCallback(RULES, merged_lora=merged_lora), hf.recorder()]
        settings = SETTINGS | SAVING | {"max_steps": steps, "lr_scheduler_type": "constant"}
        trainer = hf.trainer(tmp_path / folder, callbacks[not callback :], model=adapted(hf, tmp_path), **settings)
        trainer.train(resume_from_checkpoint=resume)
        return callbacks[1].iterates[-1], callback and callbacks[0].averager.read("bema")

    whole, plain = run("whole", 9), run("plain", 9, callback=False)
    assert hf.same(whole[0], plain[0])
    run("stopped", 6)
    resumed = run("stopped", 9, resume=True)
    assert hf.same(whole[0], resumed[0]) and hf.same(whole[1], resumed[1])


def test_the_merged_update_is_the_nearest_of_the_adapters_rank(hf, tmp_path):
    callback, recorder = AveragingCallback(RULES, merged_lora=True), hf.recorder()
    hf.trainer(tmp_path, [callback, recorder], model=adapted(hf, tmp_path), **SETTINGS).train()
    apart = hf.recorder()
    apart.iterates = recorder.iterates
    for name, rule in RULES.items():
        exported = products(hf.weights(loaded(hf, tmp_path, name)))
        factors = products(apart.average(rule))
        for key, exact in average_of_products(recorder, rule).items():
            lost = torch.linalg.svdvals(exact)[2:].square().sum().sqrt()
            distance = (exported[key] - exact).norm()
            assert distance == pytest.approx(float(lost), rel=1e-3, abs=1e-6)  # Eckart and Young
            assert distance < (factors[key] - exact).norm()  # averaging A and B is not averaging BA


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`")
@pytest.mark.parametrize(
    "rule", [EMA(decay=0.8), BEMA.paper(update_freq=4)]
)  # the second has a tail to count at step 9
def test_the_merged_update_is_exact_where_the_rank_allows_it(hf, tmp_path, rule):
    """Rank 20 holds any update of a layer of width 16; B A is then averaged as such."""
    callback, recorder = AveragingCallback({"average": rule}, merged_lora=True), hf.recorder()
    model = adapted(hf, tmp_path, rank=20, target_modules=["q_proj", "embed_tokens"])
    hf.trainer(tmp_path, [callback, recorder], model=model, **SETTINGS).train()
    exact = average_of_products(recorder, rule)
    hf.close(products(callback.averager.read()), exact)
    hf.close(products(hf.weights(loaded(hf, tmp_path, "average"))), exact)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # within torch.compile
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=COMPILES_LAYERS)])
def test_the_best_adapter_can_be_a_merged_average(hf, tmp_path, compiled):
    best = {"metric_for_best_model": "eval_bema_loss", "load_best_model_at_end": True}
    recorder, callback = hf.recorder(), AveragingCallback(RULES, merged_lora=True)
    model = adapted(hf, tmp_path, rank=20)
    layers = model.base_model.model.model.layers
    for index in range(len(layers) if compiled else 0):
        layers[index] = torch.compile(layers[index], backend="eager")
    trainer = hf.trainer(tmp_path, [callback, recorder], model=model, **SETTINGS | SAVING | best)
    trainer.train()
    step = trainer.state.best_global_step
    losses = {e["step"]: e["eval_bema_loss"] for e in trainer.state.log_history if "eval_bema_loss" in e}
    assert trainer.evaluate()["eval_loss"] == pytest.approx(losses[step], rel=1e-5)
    weights = {name: p.detach() for name, p in trainer.model.named_parameters() if "lora" in name}
    hf.close(products(weights), average_of_products(recorder, RULES["bema"], at=step))


def test_what_is_trained_beside_a_and_b_is_averaged_as_it_is(hf, tmp_path):
    callback, recorder = AveragingCallback(RULES, merged_lora=True), hf.recorder()
    model = adapted(hf, tmp_path, modules_to_save=["lm_head"], bias="none")
    hf.trainer(tmp_path, [callback, recorder], model=model, **SETTINGS).train()
    name = next(name for name in recorder.iterates[0] if "lm_head" in name)
    averages = callback.averager.read("ema")
    hf.close({name: averages[name]}, {name: recorder.average(RULES["ema"])[name]})
    assert averages.keys() == recorder.iterates[0].keys()
    assert callback.averager.read("ema", dtype=torch.float64)[name].dtype == torch.float64


def test_a_merged_average_is_of_the_weights_as_they_are(hf, tmp_path):
    """Between updates, too: the tail counts the present product, not the one at the last update."""
    model, recorder, rule = adapted(hf, tmp_path, rank=20), hf.recorder(), BEMA.paper(update_freq=2)
    averager = MergedLoraAverager(model, rule)
    recorder.iterates = [hf.weights(model)]
    for _ in range(3):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter) * parameter.requires_grad)
        averager.update()
        recorder.iterates.append(hf.weights(model))
    read = averager.read()
    hf.close(products(read), average_of_products(recorder, rule))
    assert hf.same(dict(averager.named_averages()), read) and read.keys() == recorder.iterates[0].keys()
    averager.copy_to_model()
    hf.close(hf.weights(model), read)


def test_swapping_a_merged_average_gives_the_live_bits_back_after_an_error(hf, tmp_path):
    callback = AveragingCallback(RULES, merged_lora=True)
    trainer = hf.trainer(tmp_path, [callback], model=adapted(hf, tmp_path), **SETTINGS)
    trainer.train()
    live = hf.weights(trainer.model)
    with pytest.raises(ZeroDivisionError), callback.averager.applied("ema"):
        assert not hf.same(hf.weights(trainer.model), live)
        _ = 1 / 0
    assert hf.same(hf.weights(trainer.model), live)


def test_a_merged_average_needs_an_adapter(hf, tmp_path):
    with pytest.raises(ValueError, match="no trainable LoRA adapter"):
        hf.trainer(tmp_path, [AveragingCallback(RULES, merged_lora=True)]).train()
    model = torch.nn.Sequential(torch.nn.Conv1d(4, 4, 3))
    model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["0"]))
    with pytest.raises(NotImplementedError, match="convolution.*leave the option out"):
        hf.trainer(tmp_path, [AveragingCallback(RULES, merged_lora=True)], model=model).train()


def test_sft_with_a_peft_config(hf, tmp_path):
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    hf.model().save_pretrained(tmp_path / "base")
    model = type(hf.model()).from_pretrained(tmp_path / "base")
    rows = [" ".join(hf.words[i : i + 8]) for i in range(16)]
    callback, recorder = AveragingCallback(RULES), hf.recorder()
    trainer = trl.SFTTrainer(
        model=model,
        args=trl.SFTConfig(str(tmp_path), **hf.quiet | {"bf16": False, "activation_checkpointing": False}),
        train_dataset=datasets.Dataset.from_dict({"text": rows}),
        processing_class=hf.tokenizer,
        peft_config=peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"),
        callbacks=[callback, recorder],
    )
    trainer.train()
    hf.close(hf.weights(loaded(hf, tmp_path, "bema")), recorder.average(RULES["bema"]))


def test_a_factor_whose_other_one_is_frozen_is_averaged_as_it_is(hf, tmp_path):
    """Its product with the other one is linear in it."""
    model = adapted(hf, tmp_path)
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            torch.nn.init.normal_(parameter)
        parameter.requires_grad = "lora_B" in name and "down_proj" in name or "lora" in name and "q_proj" in name
    callback, recorder = AveragingCallback(RULES, merged_lora=True), hf.recorder()
    hf.trainer(tmp_path, [callback, recorder], model=model, **SETTINGS).train()
    alone = [name for name in recorder.iterates[0] if "down_proj" in name]
    averages, expected = callback.averager.read("ema"), recorder.average(RULES["ema"])
    assert len(alone) == 2 and averages.keys() == expected.keys()
    hf.close({name: averages[name] for name in alone}, {name: expected[name] for name in alone})
    for name, parameter in model.named_parameters():
        parameter.requires_grad = "lora_A" in name
    with pytest.raises(ValueError, match="none of which A and B both train; leave the option out"):
        MergedLoraAverager(model, RULES)


def test_a_sharded_adapter_cannot_be_merged(hf, tmp_path):
    model = adapted(hf, tmp_path)
    next(p for name, p in model.named_parameters() if "lora_B" in name).device_mesh = object()  # as of a DTensor
    with pytest.raises(NotImplementedError, match="lora_A.*is sharded.*DDP, or leave the option out"):
        MergedLoraAverager(model, RULES)
