"""AdaPrune runs only what follows the layer that it repaired last, and finds what running the whole model finds."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from masksolve.torch import adaprune
from masksolve.torch._adaprune.replay import Replay
from tests.tables import spread


@contextmanager
def whole_runs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The obvious way: every run is one of the whole model."""
    with monkeypatch.context() as patch:
        patch.setattr(Replay, "learn", lambda self, *rest: None)
        patch.setattr(Replay, "_keep", lambda self, *rest: None)
        yield


def mlp() -> tuple[nn.Module, list[Any]]:
    layers = [layer for _ in range(4) for layer in (nn.Linear(16, 16), nn.ReLU(inplace=True))]
    return nn.Sequential(*layers), list(torch.randn(60, 16).split(15))


class Residual(nn.Module):
    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, out, 3, padding=1, bias=False), nn.BatchNorm2d(out)
        self.conv2, self.bn2 = nn.Conv2d(out, out, 3, padding=1, bias=False), nn.BatchNorm2d(out)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut = nn.Sequential(nn.Conv2d(channels, out, 1), nn.BatchNorm2d(out)) if channels != out else None

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out += x if self.shortcut is None else self.shortcut(x)
        return self.relu(out)  # type: ignore[no-any-return]


def resnet() -> tuple[nn.Module, list[Any]]:
    stages = [nn.Sequential(Residual(a, b), Residual(b, b)) for a, b in ((8, 8), (8, 16))]
    stem = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True)]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 8)]
    model = nn.Sequential(*stem, *stages, *head)
    model(torch.randn(20, 3, 9, 9))
    return model, list(torch.randn(12, 3, 9, 9).split(4))


def encoder() -> tuple[nn.Module, list[Any]]:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.3)
    return nn.TransformerEncoder(layer, 3, enable_nested_tensor=False), list(torch.randn(12, 5, 16).split(4))


def tokens() -> list[Any]:
    # Lengths differ between batches, as those of lines of text do.
    return [{"input_ids": torch.randint(0, 48, (4, length))} for length in (6, 9, 9)]


def llama() -> tuple[nn.Module, list[Any]]:
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=48,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return transformers.LlamaForCausalLM(config), tokens()


def bert() -> tuple[nn.Module, list[Any]]:
    import transformers

    config = transformers.BertConfig(
        vocab_size=48, hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2
    )
    return transformers.BertForSequenceClassification(config), tokens()


def t5() -> tuple[nn.Module, list[Any]]:
    """Two stacks; a block's output has the bias of positions beside the hidden states."""
    import transformers

    config = transformers.T5Config(
        vocab_size=48, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, decoder_start_token_id=0
    )
    return transformers.T5ForConditionalGeneration(config), [
        {**batch, "decoder_input_ids": batch["input_ids"][:, :4]} for batch in tokens()
    ]


class Skips(nn.Module):
    """Reads every hidden state again at the end, and some in between."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList([nn.Linear(16, 16) for _ in range(3)])
        self.up = nn.ModuleList([nn.Linear(32, 16) for _ in range(3)])
        self.head = nn.Linear(48, 8)

    def forward(self, x: Tensor) -> Tensor:
        states = []
        for layer in self.down:
            x = layer(x).tanh()
            states.append(x)
        for layer in self.up:
            x = layer(torch.cat([x, states.pop()], 1)).tanh()
        return self.head(torch.cat([x, self.down[0](x), x], 1))  # type: ignore[no-any-return]


def skips() -> tuple[nn.Module, list[Any]]:
    return Skips(), list(torch.randn(60, 16).split(20))


class Keeper(nn.Module):
    """Its first block leaves something behind that a later one reads: not where its output stands in."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(index) for index in range(4)])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        Block.memory.clear()
        return x


class Block(nn.Module):
    memory: ClassVar[dict[str, Tensor]] = {}

    def __init__(self, index: int) -> None:
        super().__init__()
        self.index, self.linear = index, nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x).tanh()
        if self.index == 0:
            self.memory["first"] = x
        return x + self.memory["first"] if self.index == 2 else x  # type: ignore[no-any-return]


def keeper() -> tuple[nn.Module, list[Any]]:
    return Keeper(), list(torch.randn(60, 16).split(20))


class Routed(nn.Module):
    """Each batch calls other experts, one calls one twice, and the last goes a way that no other goes."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(16, 16) for _ in range(4)])
        self.merge, self.again, self.head = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor, experts: list[int]) -> Tensor:
        for expert in experts:
            x = x + self.experts[expert](x).tanh()
        first = self.merge(x)
        x = self.again(self.again(first).tanh())
        return self.head(first * x if experts[0] == 3 else x)  # type: ignore[no-any-return]


def routed() -> tuple[nn.Module, list[Any]]:
    order = ([1, 2], [0, 1], [2, 0, 0], [3, 1])
    return Routed(), [[torch.randn(15, 16), experts] for experts in order]


class Recurrent(nn.Module):
    """Modules of several weights, which are repaired one after the other; the first states are zero."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.first, self.second = nn.Linear(16, 8), nn.RNN(8, 8), nn.LSTM(8, 8)
        self.after = nn.Linear(8, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.first(self.before(x)[:, 0])[0].flip(0))[0]
        return self.after(x)  # type: ignore[no-any-return]


def recurrent() -> tuple[nn.Module, list[Any]]:
    return Recurrent(), list(torch.randn(60, 2, 16).split(20))


def gpt2() -> tuple[nn.Module, list[Any]]:
    import transformers

    config = transformers.GPT2Config(vocab_size=48, n_positions=12, n_embd=16, n_layer=3, n_head=2)
    return transformers.GPT2LMHeadModel(config), tokens()


def mixtral() -> tuple[nn.Module, list[Any]]:
    import transformers

    config = transformers.MixtralConfig(
        vocab_size=48,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=3,
    )
    return transformers.MixtralForCausalLM(config), tokens()


MODELS: dict[str, Callable[[], tuple[nn.Module, list[Any]]]] = {
    "MLP": mlp,
    "ResNet": resnet,
    "encoder": encoder,
    "Llama": llama,
    "BERT": bert,
    "T5": t5,
    "skips": skips,
    "keeper": keeper,
    "routed": routed,
    "recurrent": recurrent,
    "GPT-2": gpt2,
    "Mixtral": mixtral,
}


def made(name: str) -> tuple[nn.Module, list[Any]]:
    torch.manual_seed(0)
    model, batches = MODELS[name]()
    # Masks of nearly equal scores would depend on rounding.
    return model.double().eval(), torch.utils._pytree.tree_map_only(
        Tensor, lambda x: x.double() if x.is_floating_point() else x, batches
    )


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "sequential"), spread(MODELS, [True, False], one_in=2))
def test_running_what_follows_finds_what_running_the_whole_model_finds(
    name: str, sequential: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batches = made(name)
    obvious = copy.deepcopy(model)
    options: dict[str, Any] = {"importance": "hessian", "keep_first_last": False, "sequential": sequential}
    # None of the layers' moments fits, so that each is a run of its own.
    report = adaprune(model, batches, "3:4", memory_mib=0, **options)
    with whole_runs(monkeypatch):
        expected = adaprune(obvious, batches, "3:4", memory_mib=0, **options)
    assert [layer.name for layer in report.layers] == [layer.name for layer in expected.layers]
    assert report.batch_norms == expected.batch_norms
    for (key, value), other in zip(model.state_dict().items(), obvious.state_dict().values(), strict=True):
        torch.testing.assert_close(value, other, rtol=1e-9, atol=1e-9, msg=key)
        assert torch.equal(value == 0, other == 0), key
    assert not any("forward" in module.__dict__ for module in model.modules())
    assert not any(module._forward_pre_hooks for module in model.modules())


class Sliced(nn.Module):
    """A part of a finished layer's output goes into a module of two weights, of which one first sees zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.inner, self.after = nn.Linear(8, 8), nn.RNN(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.inner(self.before(x)[:, 0])[0])  # type: ignore[no-any-return]


def test_a_module_gets_its_input_for_each_of_its_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model, batches = Sliced().double(), list(torch.randn(72, 2, 8).double().split(9))
    obvious = copy.deepcopy(model)
    report = adaprune(model, batches, "2:4")
    assert [layer.name for layer in report.layers] == ["inner.weight_ih_l0", "inner.weight_hh_l0"]
    with whole_runs(monkeypatch):
        adaprune(obvious, batches, "2:4")
    for value, other in zip(model.parameters(), obvious.parameters(), strict=True):
        torch.testing.assert_close(value, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("sequential", [True, False])
@pytest.mark.parametrize("name", ["MLP", "Llama", "BERT"])
def test_every_layer_runs_about_twice_per_batch(name: str, sequential: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once to see what is called, once to calibrate; and a few times more with the two batches that are tried."""
    model, batches = made(name)
    batches = batches * 8
    forward, calls = nn.Linear.forward, dict.fromkeys((m for m in model.modules() if isinstance(m, nn.Linear)), 0)

    def counted(self: nn.Linear, x: Tensor) -> Tensor:
        calls[self] += 1
        return forward(self, x)

    monkeypatch.setattr(nn.Linear, "forward", counted)
    report = adaprune(model, batches, "3:4", importance="wanda", sequential=sequential, memory_mib=0)
    assert len(report.layers) >= 2
    assert max(calls.values()) <= 2.5 * len(batches)


def test_batch_norms_cost_one_more_run(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batches = made("ResNet")
    batches = batches * 8
    forward, calls = nn.Conv2d.forward, dict.fromkeys((m for m in model.modules() if isinstance(m, nn.Conv2d)), 0)

    def counted(self: nn.Conv2d, x: Tensor) -> Tensor:
        calls[self] += 1
        return forward(self, x)

    monkeypatch.setattr(nn.Conv2d, "forward", counted)
    report = adaprune(model, batches, "3:4")
    assert len(report.batch_norms) > 5
    assert max(calls.values()) <= 3.5 * len(batches)
