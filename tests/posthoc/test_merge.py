"""Merges of models of several runs, by fixed weights."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from lagless.checkpoints import CheckpointError, find_models
from lagless.posthoc import TensorGroups, average_checkpoints, combine_checkpoints, merge_models

SHAPES = {"embed.weight": (7, 4), "layers.0.mlp.weight": (4, 5), "layers.0.norm.weight": (4,), "head.weight": (7, 4)}


def save(folder, seed, dtype=torch.float32, shapes=SHAPES, config=None):
    generator = torch.Generator().manual_seed(seed)
    folder.mkdir(parents=True)
    tensors = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"model_type": "toy", "hidden_size": 4, **(config or {})}))
    return folder


@pytest.fixture
def models(tmp_path):
    return [save(tmp_path / name / "model", seed) for seed, name in enumerate(("one", "two", "three"))]


def linear_merge(tensors, weights):
    """The linear merge: Σ w_i θ_i / Σ w_i, tensor by tensor."""
    rows = torch.tensor(weights, dtype=torch.float32).reshape(-1, *[1] * tensors[0].dim())
    return (torch.stack([tensor.float() for tensor in tensors]) * rows).sum(dim=0) / rows.sum()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weights", [[0.5, 0.5], [0.3, 0.7], [1.4, -0.4], [3.0, 1.0]])
def test_two_models_merge_as_the_linear_formula_has_it(tmp_path, dtype, weights):
    paths = [save(tmp_path / name, seed, dtype) for seed, name in enumerate("ab")]
    normalized = np.array(weights) / sum(weights)
    merge_models(paths, normalized, tmp_path / "out")
    written, (summed,) = load_file(tmp_path / "out" / "model.safetensors"), combine_checkpoints(paths, normalized)
    average_checkpoints(_as_run(tmp_path, paths), normalized, tmp_path / "averaged")
    averaged = load_file(tmp_path / "averaged" / "model.safetensors")
    one, two = (load_file(path / "model.safetensors") for path in paths)
    for name in SHAPES:
        expected = linear_merge([one[name], two[name]], weights)
        torch.testing.assert_close(summed[name], expected, rtol=1e-6, atol=1e-6)
        tolerance = 1e-6 if dtype == torch.float32 else 2**-8
        torch.testing.assert_close(written[name].float(), expected, rtol=tolerance, atol=1e-6)
        assert written[name].dtype == dtype and torch.equal(written[name], averaged[name])


def _as_run(tmp_path, paths):
    run = tmp_path / "as-run"
    run.mkdir()
    for i, path in enumerate(paths):
        (run / f"checkpoint-{i}").symlink_to(path)
    return run


def test_the_record_and_the_card_say_what_was_merged(models, tmp_path):
    merge_models(models, [0.2, 0.5, 0.3], tmp_path / "out", remarks={"loss": "x"})
    record = json.loads((tmp_path / "out" / "lagless.json").read_text())
    assert [source["name"] for source in record["sources"]] == ["one/model", "two/model", "three/model"]
    assert [source["weight"] for source in record["sources"]] == [0.2, 0.5, 0.3] == record["weights"]
    assert len({source["fingerprint"] for source in record["sources"]}) == 3 and record["loss"] == "x"
    assert "step" not in record and "equivalent_schedule" not in record and str(tmp_path) not in json.dumps(record)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "# Merge of models" in card and "| `two/model` | +0.500000 |" in card and "learning rate" not in card
    again = json.loads((tmp_path / "out" / "lagless.json").read_text())
    merge_models(models, again["weights"], tmp_path / "again", groups=again.get("groups"))
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "again"))
    assert all(torch.equal(one[name], two[name]) for name in SHAPES)


def test_groups_have_weights_of_their_own(models, tmp_path):
    groups, weights = {"embeddings": "embed|head", "norms": r"norm\."}, [[1, 0, 0], [0, 2, -1], [0.25, 0.25, 0.5]]
    merge_models(models, weights, tmp_path / "out", groups=groups)
    written = load_file(tmp_path / "out" / "model.safetensors")
    stored = [load_file(model / "model.safetensors") for model in models]
    of = {"embed.weight": 0, "head.weight": 0, "layers.0.norm.weight": 1, "layers.0.mlp.weight": 2}
    for name, group in of.items():
        expected = sum(w * tensors[name] for w, tensors in zip(weights[group], stored, strict=True))
        torch.testing.assert_close(written[name], expected, rtol=1e-6, atol=1e-6)
    record = json.loads((tmp_path / "out" / "lagless.json").read_text())
    assert record["groups"] == groups and record["weights"] == weights
    assert record["sources"][1]["weights"] == {"embeddings": 0, "norms": 2, "rest": 0.25}
    assert "| model | embeddings | norms | rest |" in (tmp_path / "out" / "README.md").read_text()


def test_a_run_stands_for_its_last_checkpoint(models, tmp_path):
    for step in (5, 10):
        save(tmp_path / "run" / f"checkpoint-{step}", step)
    found = find_models([models[0], tmp_path / "run"])
    assert found.names == ("model", "checkpoint-10")
    twin = find_models([tmp_path / "run", save(tmp_path / "other" / "checkpoint-10", 7)])
    assert twin.names == ("run/checkpoint-10", "other/checkpoint-10")


@pytest.mark.parametrize(
    "weights, groups, message",
    [
        ([0.5, 0.5], None, r"shape \(2,\); it must be \(3,\)"),
        ([0.5, 0.5, 0.5], None, "sum to 1"),
        ([float("nan"), 0.5, 0.5], None, "finite"),
        ([0.2, 0.4, 0.4], {"norms": "norm"}, r"must be \(2, 3\).*norms, rest"),
        ([[0.2, 0.4, 0.4], [1, 1, 1]], {"norms": "norm"}, "of group 'rest'"),
        ([1, 0, 0], {"norms": "("}, "no regular expression"),
        ([1, 0, 0], {"norms": "nothing"}, "finds no tensor.*embed.weight"),
        ([1, 0, 0], {"rest": "norm"}, "choose another name"),
    ],
)
def test_bad_weights_and_groups_are_refused(models, tmp_path, weights, groups, message):
    with pytest.raises(ValueError, match=message):
        merge_models(models, weights, tmp_path / "out", groups=groups)
    assert not (tmp_path / "out").exists()


def test_models_that_do_not_fit_are_refused(models, tmp_path):
    wide = save(tmp_path / "wide", 4, shapes=SHAPES | {"head.weight": (8, 4)})
    with pytest.raises(CheckpointError, match=r"'head.weight' is .*do not belong together"):
        find_models([models[0], wide])
    other = save(tmp_path / "rope", 5, config={"rope_theta": 5.0})
    with pytest.raises(CheckpointError, match="rope_theta"):
        find_models([models[0], other])
    with pytest.raises(CheckpointError, match="1 given"):
        find_models(models[:1])
    (tmp_path / "link").symlink_to(models[0])
    for again in (models[0], tmp_path / "link"):
        with pytest.raises(CheckpointError, match="are the same files"):
            find_models([models[0], again])


def test_every_tensor_is_in_one_group():
    groups = TensorGroups({"all": "weight", "norms": "bias"}, [*SHAPES, "norm.bias"])
    assert groups.names == ("all", "norms") and [groups.of(t) for t in (*SHAPES, "norm.bias")] == [0, 0, 0, 0, 1]
    assert TensorGroups({}, SHAPES).names == ("rest",)
