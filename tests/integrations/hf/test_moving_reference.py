"""MovingReferenceCallback: the reference of DPO and GRPO is the average that the rule's weights say."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.integrations.hf.test_trl import TRAINERS, known, make, variety

from lagless import BEMA, EMA
from lagless.integrations.transformers import AveragingCallback, MovingReferenceCallback

trl = pytest.importorskip("trl")
peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning",
    "ignore:.*ref_model.*:UserWarning",
)
KINDS = ("dpo", "grpo")
RULE = EMA(half_life=3.0)


def lora(kind: str, hf: Any, folder: Path, callbacks: list[Any], dropout: float = 0.1, **settings: Any) -> Any:
    """A trainer of an adapter, as TRL makes it from peft_config."""
    trainer, config, data, own = TRAINERS[kind]
    hf.model(attention_dropout=dropout).save_pretrained(folder / "base")
    torch.manual_seed(0)
    off = {"bf16": False, "gradient_checkpointing": False, "activation_checkpointing": False}
    options = {"reward_funcs": variety} if kind == "grpo" else {}
    return trainer(
        model=str(folder / "base"),
        args=config(str(folder), **known(config, hf.quiet | off | own | settings)),
        train_dataset=data(hf, 0, 16),
        processing_class=hf.tokenizer,
        callbacks=callbacks,
        peft_config=peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
        **options,
    )


@pytest.mark.parametrize("rule", [RULE, BEMA(half_life_fraction=0.2)], ids=["ema", "bema"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_reference_of_a_whole_model_is_the_average(hf, tmp_path, kind, rule):
    recorder, callback = hf.recorder(), MovingReferenceCallback(rule)
    trainer = make(hf, tmp_path, kind, [callback, recorder])
    trainer.train()
    expected = recorder.average(rule)
    reference = dict(trainer.ref_model.named_parameters())
    hf.close({name: reference[name].detach() for name in expected}, expected)
    assert not hf.same({n: reference[n].detach() for n in expected}, recorder.iterates[0])


@pytest.mark.parametrize("rule", [RULE, BEMA(half_life_fraction=0.2)], ids=["ema", "bema"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_reference_of_an_adapter_is_the_averaged_adapter(hf, tmp_path, kind, rule):
    seen: list[dict[str, torch.Tensor]] = []

    class Watch(hf.recorder):
        """What the trainer computes with when it asks for the base model."""

        def on_step_begin(self, args, state, control, model, **kwargs):
            live = hf.weights(model)
            with model.disable_adapter():
                seen.append({n: p.detach().clone() for n, p in model.named_parameters() if n in live})
                assert not any(p.requires_grad for n, p in model.named_parameters() if n in live)
            assert hf.same(hf.weights(model), live)

    recorder = Watch()
    trainer = lora(kind, hf, tmp_path, [MovingReferenceCallback(rule), recorder])
    parameters = sum(p.numel() for p in trainer.model.parameters())
    trainer.train()
    assert trainer.ref_model is None and sum(p.numel() for p in trainer.model.parameters()) == parameters
    assert "ref" not in trainer.model.peft_config
    for step, reference in enumerate(seen):  # before step + 1
        expected = recorder.iterates[0] if step == 0 else recorder.average(rule, step)
        hf.close(reference, expected)


def test_the_trainer_compares_with_it(hf, tmp_path):
    """DPO's rewards are 0 where the reference is the policy of the step before: without averaging, decay=0."""

    def rewards(folder: str, callbacks: list[Any]) -> list[float]:
        steps = {"logging_strategy": "steps", "logging_steps": 1, "learning_rate": 0.1}
        trainer = lora("dpo", hf, tmp_path / folder, callbacks, dropout=0.0, **steps)
        trainer.train()
        return [entry["rewards/chosen"] for entry in trainer.state.log_history if "rewards/chosen" in entry]

    fixed, follows = rewards("fixed", []), rewards("moving", [MovingReferenceCallback(EMA(decay=0.0))])
    assert fixed[0] == pytest.approx(follows[0], abs=1e-6)
    assert max(map(abs, fixed)) > 1e-3
    assert follows == pytest.approx([0.0] * len(follows), abs=1e-6)


@pytest.mark.parametrize("adapter", [False, True])
def test_a_resumed_run_goes_on_bit_for_bit(hf, tmp_path, adapter):
    build = lora if adapter else lambda kind, *rest, **settings: make(rest[0], rest[1], kind, rest[2], **settings)
    rule = BEMA(half_life_fraction=0.2)
    save = {"save_strategy": "steps", "save_steps": 4}

    def reference(trainer: Any) -> dict[str, torch.Tensor]:
        if not adapter:
            return {n: p.detach().clone() for n, p in trainer.ref_model.named_parameters()}
        names = hf.weights(trainer.model)
        with trainer.model.disable_adapter():
            return {n: p.detach().clone() for n, p in trainer.model.named_parameters() if n in names}

    whole = build("dpo", hf, tmp_path / "run", [MovingReferenceCallback(rule)], **save)
    whole.train()
    assert (tmp_path / "run/checkpoint-4/reference.safetensors").is_file()
    resumed = build("dpo", hf, tmp_path / "run", [MovingReferenceCallback(rule)], **save)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run/checkpoint-4"))
    assert hf.same(hf.weights(whole.model), hf.weights(resumed.model))
    assert hf.same(reference(whole), reference(resumed))
    (tmp_path / "run/checkpoint-4/reference.safetensors").unlink()
    again = build("dpo", hf, tmp_path / "run", [MovingReferenceCallback(rule)])
    with pytest.raises(ValueError, match="reference.safetensors is missing"):
        again.train(resume_from_checkpoint=str(tmp_path / "run/checkpoint-4"))


def test_sync_every_moves_it_at_those_steps_only(hf, tmp_path):
    recorder = hf.recorder()
    trainer = make(hf, tmp_path, "dpo", [MovingReferenceCallback(RULE, sync_every=3), recorder])
    trainer.train()
    expected = recorder.average(RULE, 6)  # of 8 steps
    reference = dict(trainer.ref_model.named_parameters())
    hf.close({name: reference[name].detach() for name in expected}, expected)


def test_it_goes_beside_averages(hf, tmp_path):
    recorder = hf.recorder()
    callbacks = [AveragingCallback(EMA(decay=0.5)), MovingReferenceCallback(RULE), recorder]
    trainer = lora("dpo", hf, tmp_path, callbacks)
    trainer.train()
    assert (tmp_path / "averaged/ema/adapter_model.safetensors").is_file()
    with trainer.model.disable_adapter():
        held = {n: p.detach() for n, p in trainer.model.named_parameters() if n in recorder.iterates[0]}
    hf.close(held, recorder.average(RULE))


@pytest.mark.parametrize(
    "kind, settings, message",
    [
        ("grpo", {"beta": 0.0}, "has no reference to move .beta=0.0."),
        ("dpo", {"precompute_ref_log_probs": True}, "precompute_ref_log_probs=True leaves no reference"),
        ("dpo", {"sync_ref_model": True, "ref_model_sync_steps": 2}, "sync_ref_model=True moves the reference too"),
    ],
)
def test_without_a_reference_to_move_it_refuses(hf, tmp_path, kind, settings, message):
    trainer = make(hf, tmp_path, kind, [MovingReferenceCallback(RULE)], **settings)
    with pytest.raises(ValueError, match=message):
        trainer.train()


def test_another_model_as_reference_is_refused(hf, tmp_path):
    trainer = make(hf, tmp_path, "dpo", [MovingReferenceCallback(RULE)])
    with torch.no_grad():
        next(trainer.ref_model.parameters()).add_(1.0)
    with pytest.raises(ValueError, match="ref_model differs from the policy"):
        trainer.train()
