"""Which weights are selected: embeddings, routers and adapters are not, by any of the three faces, unless asked for."""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from masksolve._kinds import OTHER
from masksolve.torch import Sparsifier
from tests.torch.transformer_models import build

LAYER = "model.layers.0"
ATTENTION = [f"{LAYER}.self_attn.{name}_proj.weight" for name in "qkvo"]
MLP = [f"{LAYER}.mlp.{name}_proj.weight" for name in ("gate", "up", "down")]
EXPERTS = [f"{LAYER}.mlp.experts.{name}_proj" for name in ("gate_up", "down")]

# The weights of each model that 4:8 masks have, by the names of its modules.
MASKED: dict[str, list[str]] = {
    "GPT2": [f"transformer.h.0.{name}.weight" for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")],
    "T5": [
        *(f"{side}.block.0.layer.0.SelfAttention.{name}.weight" for side in ("encoder", "decoder") for name in "qkvo"),
        *(f"decoder.block.0.layer.1.EncDecAttention.{name}.weight" for name in "qkvo"),
        *(
            f"{side}.block.0.layer.{place}.DenseReluDense.{name}.weight"
            for side, place in (("encoder", 1), ("decoder", 2))
            for name in ("wi", "wo")
        ),
    ],
    "GPTNeoX": [
        "lm_head.weight",
        *(
            f"gpt_neox.layers.0.{name}.weight"
            for name in ("attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h")
        ),
    ],
    "Llama": [*ATTENTION, *MLP, "lm_head.weight"],
    "Llama, tied": [*ATTENTION, *MLP],
    "Mixtral": [*ATTENTION, *EXPERTS, "lm_head.weight"],
    "Qwen3-MoE": [*ATTENTION, *EXPERTS, "lm_head.weight"],
    "GPT-OSS": [*ATTENTION, *EXPERTS, "lm_head.weight"],
    "BERT": [
        *(
            f"bert.encoder.layer.0.{name}.weight"
            for name in (
                *(f"attention.self.{part}" for part in ("query", "key", "value")),
                *("attention.output.dense", "intermediate.dense", "output.dense"),
            )
        ),
        "cls.predictions.transform.dense.weight",
    ],
    "Whisper": [
        *(f"model.encoder.conv{index}.weight" for index in (1, 2)),
        *(
            f"model.{side}.layers.0.{attention}.{name}_proj.weight"
            for side, attention in (("encoder", "self_attn"), ("decoder", "self_attn"), ("decoder", "encoder_attn"))
            for name in ("q", "k", "v", "out")
        ),
        *(f"model.{side}.layers.0.fc{index}.weight" for side in ("encoder", "decoder") for index in (1, 2)),
    ],
}

# And why some others are dense, in words that the faces share.
DENSE: dict[str, dict[str, str]] = {
    "GPT2": {
        "transformer.wte.weight": "an embedding",
        "transformer.wpe.weight": "an embedding",
        "lm_head.weight": "tied to transformer.wte.weight, an embedding",
    },
    "T5": {
        "shared.weight": "an embedding",
        "lm_head.weight": "tied to shared.weight, an embedding",
        "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": "an embedding",
    },
    "GPTNeoX": {"gpt_neox.embed_in.weight": "an embedding"},
    "Llama": {"model.embed_tokens.weight": "an embedding"},
    "Llama, tied": {
        "model.embed_tokens.weight": "an embedding",
        "lm_head.weight": "tied to model.embed_tokens.weight, an embedding",
    },
    "Mixtral": {
        f"{LAYER}.mlp.gate.weight": "the router of a mixture of experts",
    },
    "Qwen3-MoE": {
        f"{LAYER}.mlp.gate.weight": "the router of a mixture of experts",
    },
    "GPT-OSS": {
        f"{LAYER}.mlp.router.weight": "the router of a mixture of experts",
        f"{LAYER}.mlp.experts.down_proj_bias": OTHER,
    },
    "BERT": {
        "bert.embeddings.position_embeddings.weight": "an embedding",
        "cls.predictions.decoder.weight": "tied to bert.embeddings.word_embeddings.weight, an embedding",
    },
    "Whisper": {
        "model.encoder.embed_positions.weight": "an embedding",
        "proj_out.weight": "tied to model.decoder.embed_tokens.weight, an embedding",
    },
}


@pytest.mark.parametrize("name", MASKED)
def test_a_model_is_masked_but_for_embeddings_and_routers(name: str) -> None:
    report = Sparsifier(build(name), "4:8").report
    # NeoX's output layer was called embed_out in the model too, up to transformers 5.10 at the least.
    names = [line.name.replace("embed_out", "lm_head") for line in report if line.sparse]
    assert sorted(names) == sorted(MASKED[name])
    reasons = {line.name: line.reason for line in report}
    for weight, words in DENSE[name].items():
        assert reasons[weight] == f"{words}; include it to mask it"


def test_a_model_in_which_nothing_is_selected_raises_with_every_reason() -> None:
    with pytest.raises(ValueError, match=r"no parameter of this GPT2LMHeadModel can be 2:4 sparse") as caught:
        Sparsifier(build("GPT2"), "2:4", exclude="h")
    for reason in (
        "transformer.wte.weight: an embedding; include it to mask it (and 1 more)",
        "c_attn.weight: excluded by 'h' (and 3 more)",
        "lm_head.weight: tied to transformer.wte.weight, an embedding; include it to mask it",
    ):
        assert reason in str(caught.value)


@pytest.mark.parametrize(
    ("name", "glob"),
    [
        ("GPT2", "transformer.wte.weight"),
        ("Mixtral", "*.gate.weight"),
    ],
)
def test_what_is_left_dense_is_masked_when_it_is_included(name: str, glob: str) -> None:
    model = build(name)
    sparsifier = Sparsifier(model, "4:8", include=glob)
    sparsifier.finalize()
    included = [line.name for line in sparsifier.report if line.sparse]
    for parameter in included:
        rows = dict(model.named_parameters(remove_duplicate=False))[parameter].detach().flatten(0, -2)
        for matrix in (rows, rows.T):
            assert int((matrix != 0).unflatten(-1, (-1, 8)).sum(-1).max()) == 4


class Tuner:
    """Stands for the class that every layer of PEFT's has."""


class Tuned(nn.Module, Tuner):
    """A Linear as PEFT's LoRA wraps it."""

    def __init__(self) -> None:
        super().__init__()
        self.base_layer = nn.Linear(16, 16)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(16, 8, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(8, 16, bias=False)})
        self.lora_embedding_A = nn.ParameterDict({"default": torch.randn(8, 16)})


@pytest.fixture
def peft(monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = types.ModuleType("peft.tuners.tuners_utils")
    module.BaseTunerLayer = Tuner
    monkeypatch.setitem(sys.modules, "peft.tuners.tuners_utils", module)


@pytest.mark.usefixtures("peft")
@pytest.mark.parametrize("model", [Tuned, lambda: nn.Sequential(Tuned(), nn.Linear(16, 16))])
def test_adapters_of_peft_are_left_dense(model: Any) -> None:
    report = Sparsifier(model(), "4:8").report
    assert {line.name.rpartition("0.")[2] for line in report if line.sparse} <= {"base_layer.weight", "1.weight"}
    reasons = [line.reason for line in report if "lora" in line.name]
    assert reasons == ["part of a PEFT adapter; include it to mask it"] * 3


class Mixture(nn.Module):
    """A mixture of experts as one writes it, whose gate is a Linear."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(16, 8)
        self.experts = nn.ModuleList(nn.Linear(16, 16) for _ in range(8))

    def forward(self, x: Tensor) -> Tensor:
        shares = self.gate(x).softmax(-1).unsqueeze(-2)
        found: Tensor = (torch.stack([expert(x) for expert in self.experts], -1) * shares).sum(-1)
        return found


def test_a_gate_beside_experts_is_a_router_and_one_elsewhere_is_none() -> None:
    reasons = {line.name: line.reason for line in Sparsifier(Mixture(), "4:8").report}
    assert reasons["gate.weight"] == "the router of a mixture of experts; include it to mask it"
    assert reasons["experts.0.weight"] is None
    alone = nn.ModuleDict({"gate": nn.Linear(16, 16)})
    assert [line.name for line in Sparsifier(alone, "4:8").report if line.sparse] == ["gate.weight"]
