"""Every kind of adapter that PEFT has: averaging one that never changes gives that one, or is refused."""

import dataclasses

import pytest
import torch
from torch import nn

from lagless import EMA
from lagless.integrations.transformers._lora import MergedLoraAverager

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's own, about settings of single kinds


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.fused = nn.Parameter(torch.randn(2, 8, 8))

    def forward(self, x):
        return torch.einsum("bi,eij->bj", x, self.fused)


class Net(nn.Module):
    """A model with an embedding, linear layers, attention and experts, whose weights are random."""

    def __init__(self, tied=False):
        super().__init__()
        self.embed, self.lin, self.experts = nn.Embedding(8, 8), nn.Linear(8, 8), Experts()
        self.attention, self.head = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 8, bias=False)
        self.config = {"tie_word_embeddings": tied, "model_type": "custom"}
        if tied:
            self.head.weight = self.embed.weight

    def get_input_embeddings(self):
        return self.embed

    def get_output_embeddings(self):
        return self.head

    def forward(self, ids):
        x = self.experts(self.lin(self.embed(ids)))[None]
        return self.head(self.attention(x, x, x)[0][0])


def adapted(config, tied=False):
    torch.manual_seed(0)
    return peft.get_peft_model(Net(tied), config).eval()


def change(model):
    """The relative change of the output under the average of a constant adapter; None if it is refused."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.5 * torch.randn_like(parameter))
    ids = torch.arange(8)
    with torch.no_grad():
        before = model(ids)
    try:
        averager = MergedLoraAverager(model, EMA(decay=0.5))
    except (NotImplementedError, ValueError) as error:
        assert "leave the option out" in str(error).replace("\n", " ")
        return None
    averager.update()
    with torch.no_grad(), averager.applied():
        during = model(ids)
    return ((during - before).norm() / before.norm()).item()


LIN = {"r": 4, "target_modules": ["lin"], "init_lora_weights": False}
ACCEPTED = {
    "linear": LIN,
    "embedding": LIN | {"target_modules": ["embed"]},
    "both": LIN | {"target_modules": ["embed", "lin"]},
    "rank above the width": LIN | {"r": 12},
    "rslora": LIN | {"use_rslora": True},
    "bias": LIN | {"lora_bias": True},
    "dora": LIN | {"use_dora": True},
    "dora embedding": LIN | {"target_modules": ["embed"], "use_dora": True},
    "activated": LIN | {"alora_invocation_tokens": [1]},
    "attention": LIN | {"target_modules": ["attention"]},
    "orthogonal": LIN | {"init_lora_weights": "olora"},
    "principal": LIN | {"init_lora_weights": "pissa"},
    "saved whole": LIN | {"modules_to_save": ["head"]},
}


@pytest.mark.parametrize("kind", ACCEPTED)
def test_a_constant_adapter_averages_to_itself(kind):
    found = change(adapted(peft.LoraConfig(**ACCEPTED[kind])))
    assert found is not None and found < 1e-4


# What each needs that a flag alone does not say.
VARIANTS = {
    "use_bdlora": {"target_modules_bd_a": ["lin"], "nblocks": 2, "match_strict": False},
    "kasa_config": {},
    "velora_config": {"num_groups": 2},
    "monteclora_config": {},
    "alora_invocation_tokens": [1],
}
OTHERS = {
    "experts": {"r": 4, "target_modules": [], "target_parameters": ["experts.fused"]},
    "tied": LIN | {"target_modules": ["embed", "head"], "ensure_weight_tying": True},
    **{name: LIN | {"init_lora_weights": name} for name in ("gaussian", "mica", "orthogonal", "pissa_niter_4")},
    **{
        field.name: LIN | {field.name: VARIANTS.get(field.name, True)}
        for field in dataclasses.fields(peft.LoraConfig)
        if field.metadata.get("is_lora_variant")
    },
}
REFUSED = {"experts", "use_bdlora", "kasa_config", "monteclora_config"} & OTHERS.keys()


@pytest.mark.parametrize("kind", OTHERS)
def test_other_variants_average_to_themselves_or_are_refused(kind):
    try:
        model = adapted(peft.LoraConfig(**OTHERS[kind]), tied=kind == "tied")
    except (ValueError, TypeError, AttributeError, NotImplementedError) as error:
        if kind in VARIANTS:
            raise
        pytest.skip(f"PEFT makes none here: {error}")
    found = change(model)
    assert found is None if kind in REFUSED else found is None or found < 1e-4


TUNERS = {
    "ADALORA": {"total_step": 10},
    "VERA": {"r": 4},
    "RANDLORA": {"r": 4},
    "PVERA": {"r": 4},
}


@pytest.mark.parametrize("kind", sorted(peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING))
def test_other_tuners_average_to_themselves_or_are_refused(kind):
    make = peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING[kind]
    try:
        model = adapted(make(target_modules=["lin"], **TUNERS.get(kind, {})))
        model(torch.arange(8))
    except (ValueError, TypeError, AttributeError, RuntimeError) as error:
        if kind == "ADALORA":
            raise
        pytest.skip(f"PEFT makes none here: {error}")
    found = change(model)
    assert found is None or found < 1e-4


def test_fused_experts_are_refused_by_name():
    model = adapted(peft.LoraConfig(**OTHERS["experts"]))
    with pytest.raises(NotImplementedError, match="ParamWrapper, which is not known to compute with the product BA"):
        MergedLoraAverager(model, EMA())


@pytest.mark.parametrize("whole", [True, False])
def test_shared_factors_are_refused(whole):
    model = adapted(peft.LoraConfig(**LIN | {"target_modules": ["lin", "head"]}))
    layers = model.base_model.model
    if whole:
        layers.head.lora_A = layers.lin.lora_A
    else:
        layers.head.lora_A["default"].weight = nn.Parameter(layers.lin.lora_A["default"].weight.detach())
    with pytest.raises(NotImplementedError, match=r"lin.lora_A.* is tied to .*lin.lora_A|head.lora_A.* is tied to"):
        MergedLoraAverager(model, EMA())
