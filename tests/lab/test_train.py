"""Training by recipes: every small twin, resumption, and what is refused."""

import json
import math
import random
import shutil

import pytest
import torch

datasets = pytest.importorskip("datasets")
pytest.importorskip("trl")

from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM  # noqa: E402

from lagless.checkpoints import find_checkpoints  # noqa: E402
from lagless.lab.data import Document, train_tokenizer  # noqa: E402
from lagless.lab.evaluate import TRAIN, VALIDATION, EvaluationPlan, evaluate_models  # noqa: E402
from lagless.lab.recipes import (  # noqa: E402
    _method as methods,  # noqa: E402
    describe,
    load_recipe,
)
from lagless.lab.training import _run, dry_run, read_result, train  # noqa: E402
from lagless.lab.training._folder import claimed, last_checkpoint  # noqa: E402
from lagless.lab.training._model import build_model, build_tokenizer  # noqa: E402
from lagless.lab.training._optimizer import build_optimizer, schedule_factor  # noqa: E402

from ..processes import launch, run_command  # noqa: E402

TINY = {
    "training.max_steps": 4,
    "training.batch_size": 4,
    "training.micro_batch_size": 2,
    "training.evaluation_batch_size": 4,
    "training.save_every": 2,
    "training.log_every": 1,
    "evaluation.sequences": 4,
    "evaluation.every": 2,
    "data.validation_fraction": 0.2,
}
PRETRAINING = {
    "model.config": {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2},
    "model.tokenizer": 300,
    "data.sequence_length": 16,
    "data.noise": None,
}
AVERAGES = {
    "bema": {"rule": "BEMA", "update_freq": 1},
    "ouema": {"rule": "OUEMA", "update_freq": 2},
}


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        datasets.disable_progress_bars()
        yield
        datasets.enable_progress_bars()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A text, instructions, and a pretrained model without a chat template."""
    folder = tmp_path_factory.mktemp("files")
    words = random.Random(0).choices("the cat sat on a mat and saw it run to me".split(), k=4000)
    documents = [" ".join(words[i : i + 40]) for i in range(0, 4000, 40)]
    (folder / "text.txt").write_text("\n<|endoftext|>\n".join(documents))
    rows = [{"instruction": d[:20], "output": d[20:40]} for d in documents]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = train_tokenizer([Document("all", " ".join(documents))], 280)
    config = LlamaConfig(
        vocab_size=len(tokenizer), num_key_value_heads=2, max_position_embeddings=256, **PRETRAINING["model.config"]
    )
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return folder


@pytest.fixture
def recipe(files):
    def load(name, **changes):
        if "sft" in name:
            where = {"data.path": str(files / "pairs.jsonl"), "model.path": str(files / "model"), "data.max_length": 64}
        else:
            where = PRETRAINING | {"data.path": str(files / "text.txt")}
        if "bema" in name:
            where |= {"method.averages": AVERAGES}
        return load_recipe(name, TINY | where | {key.replace("__", "."): value for key, value in changes.items()})

    return load


def weights(folder):
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


SMALL = {
    "bema-sft-small": ["live", "bema", "ouema"],
    "pace-sft-small": ["optimizer"],
    "bias-sft-small": ["live"],
    "pace-pretrain-small": ["optimizer"],
    "bias-pretrain-small": ["live"],
    "bias-pretrain-noisy-small": ["live"],
}


@pytest.mark.parametrize("name", SMALL)
def test_small_twins(name, recipe, tmp_path):
    noise = {"data__noise": {"block": 4, "sequences": 0.5}} if "noisy" in name else {}
    chosen, out = recipe(name, **noise), tmp_path / "run"
    said = []
    result = train(chosen, out, seed=3, notify=said.append)
    assert result == read_result(out)
    assert result["format"] == 1 and result["seed"] == 3
    assert result["recipe"] == chosen.resolved(3).model_dump(mode="json")
    assert result["recipe_digest"] == chosen.digest()
    assert result["seconds"] > 0 and result["machine"]["cores"] and result["versions"]["torch"] == torch.__version__
    assert list(result["final"]) == SMALL[name]
    assert chosen.method.returned in result["final"]
    assert all(0 < metrics["loss"] < 10 for metrics in result["final"].values())
    assert load_recipe(out / "recipe.yaml") == chosen.resolved(3)
    assert [line.split(":")[0] for line in said] == ["step 2 of 4", "step 4 of 4"]

    records = metrics(out)
    assert all(record.keys() == {"step", "weights", "split", "metric", "value"} for record in records)
    assert [r["step"] for r in records if r["split"] == "train" and r["metric"] == "loss"] == [1, 2, 3, 4]
    last = {r["weights"]: r["value"] for r in records if (r["step"], r["split"], r["metric"]) == (4, "valid", "loss")}
    assert last == {weights: metrics["loss"] for weights, metrics in result["final"].items()}

    # The trajectory, from θ_0 on, as lagless average and inspect read it.
    trajectory = find_checkpoints(out)
    assert list(trajectory.steps) == [0, 2, 4]
    assert not equal(weights(out / "checkpoint-0"), weights(out / "checkpoint-4"))
    assert [path.parent.name for path in out.glob("checkpoint-*/optimizer.pt")] == ["checkpoint-4"]
    averages = [weights for weights in SMALL[name] if weights != "live"]
    assert sorted(path.name for path in (out / "averaged").glob("*")) == sorted(averages)
    for average in averages:
        assert not equal(weights(out / "averaged" / average), weights(out / "checkpoint-4"))


OPTIMIZERS = [
    {"kind": "adamw"},
    {"kind": "sophia", "batch_size": 4, "hessian_freq": 2},
    {"kind": "shampoo", "root_freq": 2, "inverse_correction": "post_ema"},
    {"kind": "schedule_free", "betas": [0.98, 0.95], "weight_decay": 0.05},
    {"kind": "primal_averaging", "base": {"kind": "adamw", "betas": [0, 0.99]}, "average": {"rule": "WarmupAverage"}},
]


@pytest.mark.parametrize("name", ["bema-sft-small", "pace-pretrain-small"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda optimizer: optimizer["kind"])
def test_every_optimizer_trains_both_ways(optimizer, name, recipe, tmp_path):
    if optimizer["kind"] == "schedule_free":
        pytest.importorskip("schedulefree")
    chosen = recipe(name, method__optimizer=optimizer, method__returned="live", training__max_steps=3)
    result = train(chosen, tmp_path / "run")
    own = "optimizer" if optimizer["kind"] in ("schedule_free", "primal_averaging") else "live"
    assert set(result["final"]) - set(AVERAGES) == {own}
    assert not equal(weights(tmp_path / "run" / "checkpoint-0"), weights(tmp_path / "run" / "checkpoint-3"))


def test_sophia_sees_curvature(recipe, tmp_path, monkeypatch):
    """Both trainers hand the model labels and get logits, which is what its estimate is made of."""
    calls = []
    from lagless.optim import BiasCorrectedSophia

    add = BiasCorrectedSophia.add_curvature
    monkeypatch.setattr(BiasCorrectedSophia, "add_curvature", lambda *a, **o: (calls.append(1), add(*a, **o)))
    for name in ("bias-sft-small", "bias-pretrain-small"):
        calls.clear()
        train(recipe(name, method__optimizer=OPTIMIZERS[1], training__max_steps=3), tmp_path / name)
        assert len(calls) >= 2  # at steps 1 and 3


def test_loss_is_that_of_the_exported_average(recipe, tmp_path):
    """The loss reported for PACE's average is the exported model's, not the live weights'."""
    chosen = recipe("pace-pretrain-small")
    result = train(chosen, tmp_path / "run")
    from lagless.lab.training._datasets import prepare

    tokens = torch.tensor(prepare(chosen).validation["input_ids"])
    losses = {}
    for folder in ("averaged/optimizer", "checkpoint-4"):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / folder).eval()
        with torch.no_grad():
            losses[folder] = model(input_ids=tokens, labels=tokens).loss.item()
    assert result["final"]["optimizer"]["loss"] == pytest.approx(losses["averaged/optimizer"], abs=1e-5)
    assert abs(losses["averaged/optimizer"] - losses["checkpoint-4"]) > 1e-4


class Stopped(BaseException):
    """What kills a process, as far as Python code can tell."""


@pytest.mark.parametrize("name", ["bema-sft-small", "pace-pretrain-small"])
def test_interrupted_run_goes_on(name, recipe, tmp_path):
    chosen = recipe(name, training__max_steps=6)
    straight = train(chosen, tmp_path / "straight")

    def stop(line):
        if line.startswith("step 4"):
            raise Stopped

    broken = tmp_path / "broken"
    with pytest.raises(Stopped):
        train(chosen, broken, notify=stop)
    assert read_result(broken) is None
    # As if it had been killed while it wrote the checkpoint of step 4.
    shutil.copytree(broken / "checkpoint-0", broken / "checkpoint-4")
    assert last_checkpoint(broken, averages="bema" in name).name == "checkpoint-2"
    resumed = train(chosen, broken)
    assert resumed["final"] == straight["final"]
    for folder in ["checkpoint-6", *(f"averaged/{path.name}" for path in (broken / "averaged").iterdir())]:
        assert equal(weights(broken / folder), weights(tmp_path / "straight" / folder))
    steps = [
        [(r["step"], r["weights"], r["metric"]) for r in metrics(folder)] for folder in (broken, tmp_path / "straight")
    ]
    assert steps[0] == steps[1]


@pytest.mark.parametrize("name", ["bema-sft-small", "pace-pretrain-small"])
def test_killed_after_the_last_step(name, recipe, tmp_path, monkeypatch):
    chosen = recipe(name)
    straight = train(chosen, tmp_path / "straight")
    with monkeypatch.context() as patch:
        patch.setattr(_run, "write_result", lambda *arguments: (_ for _ in ()).throw(Stopped()))
        with pytest.raises(Stopped):
            train(chosen, tmp_path / "broken")
    shutil.rmtree(tmp_path / "broken" / "averaged")
    assert train(chosen, tmp_path / "broken")["final"] == straight["final"]
    assert metrics(tmp_path / "broken")[-1]["step"] == 4
    for folder in (tmp_path / "straight" / "averaged").iterdir():
        assert equal(weights(tmp_path / "broken" / "averaged" / folder.name), weights(folder))


def test_finished_run_is_not_repeated(recipe, tmp_path, monkeypatch):
    chosen = recipe("pace-pretrain-small")
    result = train(chosen, tmp_path / "run")
    monkeypatch.setattr(_run, "prepare", lambda recipe: pytest.fail("computed again"))
    assert train(chosen, tmp_path / "run") == result
    with pytest.raises(ValueError, match=r"run of another recipe \(training\.learning_rate: 0.002 there, 0.1 here\)"):
        train(recipe("pace-pretrain-small", training__learning_rate=0.1), tmp_path / "run")
    with pytest.raises(ValueError, match=r"run of another recipe \(seed: 0 there, 1 here\)"):
        train(chosen, tmp_path / "run", seed=1)


def test_seeds(recipe, tmp_path):
    chosen = recipe("pace-pretrain-small", training__max_steps=2)
    finals = [train(chosen, tmp_path / str(i), seed=seed)["final"] for i, seed in enumerate((0, 0, 1))]
    assert finals[0] == finals[1] != finals[2]
    starts = [weights(tmp_path / str(i) / "checkpoint-0") for i in range(3)]
    assert equal(starts[0], starts[1]) and not equal(starts[0], starts[2])


def test_folders_that_are_refused(recipe, tmp_path):
    chosen = recipe("pace-pretrain-small")
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="is a file"):
        train(chosen, tmp_path / "file")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("x")
    with pytest.raises(ValueError, match="is not empty and holds no run"):
        train(chosen, tmp_path / "other")
    with claimed(tmp_path / "busy", chosen.resolved()), pytest.raises(ValueError, match="another process trains in it"):
        train(chosen, tmp_path / "busy")


def test_dry_run_writes_nothing(recipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("bema-sft-small", "pace-pretrain-small"):
        rehearsal = dry_run(recipe(name, training__max_steps=40))
        assert (rehearsal.steps, rehearsal.evaluations) == (40, 20)
        assert math.isfinite(rehearsal.loss) and rehearsal.memory > 1_000_000 and rehearsal.disk > 100_000
        assert "the run: 40 steps and 20 evaluations" in rehearsal.lines()[-1]
    assert not list(tmp_path.iterdir())
    by_epochs = dry_run(recipe("bema-sft-small", training__max_steps=None, training__epochs=2))
    # 100 rows, about a fifth of them held out, batches of 4
    assert 2 * 60 / 4 < by_epochs.steps < 2 * 95 / 4
    unknown = dry_run(recipe("pace-pretrain-small", training__max_steps=None, training__epochs=1))
    assert unknown.steps is None and "set training.max_steps" in unknown.lines()[-1]


@pytest.mark.parametrize(
    ("name", "loss_on"), [("bema-sft-small", "all"), ("bema-sft-small", "assistant"), ("pace-pretrain-small", None)]
)
def test_evaluation_counts_the_tokens_that_training_counted(name, loss_on, recipe, tmp_path):
    """The held-out loss of training again, from the stored models: in one batch it is the mean over counted tokens."""
    changes = {} if loss_on is None else {"data__loss_on": loss_on}
    out = tmp_path / "run"
    result = train(recipe(name, **changes), out)
    plan = EvaluationPlan(("loss",), {"loss": VALIDATION})
    [row] = evaluate_models([out], plan, at=[4])
    if loss_on is not None:  # PACE's checkpoints hold the live weights, and its loss is that of the average
        assert row.results["loss"].mean.value == pytest.approx(result["final"]["live"]["loss"], rel=1e-5)
    else:
        shutil.rmtree(out / "checkpoint-4")
        shutil.copytree(out / "averaged" / "optimizer", out / "checkpoint-4")
        [average] = evaluate_models([out], plan, at=[4])
        assert average.results["loss"].mean.value == pytest.approx(result["final"]["optimizer"]["loss"], rel=1e-5)
    [trained] = evaluate_models([out], EvaluationPlan(("loss",), {"loss": TRAIN}), at=[4])
    assert trained.results["loss"].mean.n > row.results["loss"].mean.n
    with pytest.raises(ValueError, match="give its folder first"):
        list(evaluate_models([out / "checkpoint-4"], plan))


def test_bad_input_is_found_before_training(recipe, files, tmp_path, monkeypatch):
    def refused(message, name="bema-sft-small", **changes):
        with pytest.raises(ValueError, match=message):
            train(recipe(name, **changes), tmp_path / "run")
        with pytest.raises(ValueError, match=message):
            dry_run(recipe(name, **changes))

    refused("no_such.jsonl does not exist", data__path="no_such.jsonl")
    refused(r"prompt_column: .*pairs.jsonl has no column question", data__prompt_column="question")
    refused("model.chat_template: the tokenizer .* has no chat template", model__chat_template=None)
    refused(r"chat_template: no.jinja does not exist", model__chat_template="no.jinja")
    refused("model: .*nowhere cannot be loaded", model__path=str(tmp_path / "nowhere"))
    refused("batch_size=4 is no multiple of training.micro_batch_size=3", training__micro_batch_size=3)
    refused(
        "update_freq", **{"method.averages": {"bema": {"rule": "BEMA", "update_freq": 400}}, "training__max_steps": 4}
    )
    refused("model.config: llama has no hidden", name="pace-pretrain-small", **{"model.config": {"hidden": 16}})
    refused("needs an accelerator", name="bema-sft-small", needs_accelerator=True)
    refused("float16 needs an accelerator", training__precision="float16")
    # All of them were to go to the same folder, which is free still.
    assert train(recipe("pace-pretrain-small"), tmp_path / "run")["final"]


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_out_of_memory(error, recipe, tmp_path, monkeypatch):
    def exhausted(self, **options):
        raise error

    monkeypatch.setattr("transformers.Trainer.training_step", lambda *args, **options: exhausted(None))
    with pytest.raises(ValueError, match=r"micro_batch_size=2 .* gradient accumulation goes from 2 to 4 microbatches"):
        train(recipe("pace-pretrain-small"), tmp_path / "run")


def test_other_errors_keep_their_names(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.Trainer.training_step", lambda *args, **options: torch.zeros(2) @ torch.zeros(3))
    with pytest.raises(RuntimeError, match="inconsistent tensor size"):
        train(recipe("pace-pretrain-small"), tmp_path / "run")


def test_two_processes_train_like_one(recipe, tmp_path):
    chosen = recipe("pace-pretrain-small", training__micro_batch_size=1)
    one = train(chosen, tmp_path / "one")
    (tmp_path / "recipe.yaml").write_text(describe(chosen))
    command = ["train", str(tmp_path / "recipe.yaml"), "--out", str(tmp_path / "two")]
    for rank in launch(run_command, 2, tmp_path / "cache", *command):
        assert rank.exitcode == 0, rank.output
    two = read_result(tmp_path / "two")
    assert two["machine"]["processes"] == 2
    assert two["final"]["optimizer"]["loss"] == pytest.approx(one["final"]["optimizer"]["loss"], abs=1e-5)
    lines = [[(r["step"], r["metric"]) for r in metrics(tmp_path / run)] for run in ("one", "two")]
    assert lines[0] == lines[1]


def test_chatml_marks_what_the_assistant_says(recipe):
    chosen = recipe("pace-sft-small")
    tokenizer = build_tokenizer(chosen, ())
    messages = [{"role": "user", "content": "a mat"}, {"role": "assistant", "content": "it sat"}]
    text = "<|im_start|>user\na mat<|im_end|>\n<|im_start|>assistant\nit sat<|im_end|>\n"
    assert tokenizer.apply_chat_template(messages, tokenize=False) == text
    found = tokenizer.apply_chat_template(messages, return_assistant_tokens_mask=True, return_dict=True)
    marked = [token for token, mark in zip(found["input_ids"], found["assistant_masks"], strict=True) if mark]
    assert tokenizer.decode(marked) == "it sat<|im_end|>" and marked[-1] == tokenizer.eos_token_id
    model = build_model(chosen, tokenizer)
    assert len(model.get_input_embeddings().weight) == len(tokenizer)
    assert tokenizer.decode(tokenizer.encode("<|im_start|>")) == "<|im_start|>"


def test_new_models_follow_from_the_seed_and_the_config(recipe):
    chosen = recipe("pace-pretrain-small")
    tokenizer = build_tokenizer(chosen, ["the cat sat on a mat"] * 20)
    models = [build_model(chosen.resolved(seed), tokenizer).state_dict() for seed in (1, 1, 2)]
    assert equal(models[0], models[1]) and not equal(models[0], models[2])
    qwen = load_recipe("bias-pretrain-qwen2.5-0.5b").model.config
    small = qwen | {"hidden_size": 28, "intermediate_size": 8, "num_hidden_layers": 1, "vocab_size": 300}
    changed = load_recipe("bias-pretrain-qwen2.5-0.5b", {"model.config": small})
    config = build_model(changed, tokenizer).config
    assert config.rope_parameters["rope_theta"] == 1e6 and config.tie_word_embeddings and config.model_type == "qwen2"


def test_learning_rates_of_embeddings(recipe):
    chosen = recipe("pace-pretrain-small", training__embedding_learning_rate=0.5)
    tokenizer = build_tokenizer(chosen, ["the cat sat on a mat"] * 20)
    model = build_model(chosen, tokenizer)
    others, embeddings = build_optimizer(chosen, model).param_groups
    assert (others["lr"], embeddings["lr"]) == (0.002, 0.5)
    assert embeddings["param_names"] == ["model.embed_tokens.weight", "lm_head.weight"]
    assert len(others["params"]) + 2 == len(list(model.parameters()))


T, W = 100, 10
SCHEDULES = [
    (methods.Constant(kind="constant", warmup_steps=W), {1: 0.1, 10: 1.0, 11: 1.0, 100: 1.0}),
    (methods.Linear(kind="linear", warmup_steps=W, floor=0.2), {5: 0.5, 11: 1.0, 56: 0.6, 100: 0.2 + 0.8 / 90}),
    (methods.Cosine(kind="cosine", warmup_steps=W), {11: 1.0, 56: 0.5, 41: (1 + math.cos(math.pi / 3)) / 2}),
    (methods.Cosine(kind="cosine", floor=0.2), {1: 1.0, 51: 0.6}),
    (methods.WarmupStableDecay(kind="wsd", decay=0.2), {1: 1.0, 81: 1.0, 91: 0.5, 100: 0.05}),
    (methods.Power(kind="power", exponent=0.5), {1: 2**-0.5, 3: 0.5, 99: 0.1}),
    (methods.Power(kind="power", exponent=0.5, warmup_steps=6), {3: 0.25, 8: 1 / 3}),
]


@pytest.mark.parametrize(("schedule", "expected"), SCHEDULES)
def test_schedules(schedule, expected):
    factor = schedule_factor(schedule, T)
    assert {t: factor(t - 1) for t in expected} == pytest.approx(expected)
