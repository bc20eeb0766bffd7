"""permute_model: models compute what they did, and their best masks keep what the report says, which is more."""

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import masksolve as ms
from masksolve.torch import PermutedAxis, Sparsifier, permute_model
from tests.extras import need
from tests.tables import Pair, name_of
from tests.torch import transformer_models

need("permute")

PATTERNS = [(2, 4), (1, 4), (3, 8)]


class Gated(nn.Module):
    def __init__(self, width: int = 16, hidden: int = 48) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(width, hidden), nn.Linear(width, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.down_proj(self.gate_proj(x).sigmoid() * self.up_proj(x))
        return found


class Normed(Gated):
    """With a norm of the hidden axis that weights each channel, which names do not tell."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(48))

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.down_proj(self.gate_proj(x).sigmoid() * self.up_proj(x) * self.scale)
        return found


class Experts(nn.Module):
    """Three of them, of which all inputs go through all."""

    def __init__(self, transposed: bool) -> None:
        super().__init__()
        self.transposed = transposed
        up, down = ((3, 12, 48), (3, 24, 12)) if transposed else ((3, 48, 12), (3, 12, 24))
        self.gate_up_proj, self.down_proj = nn.Parameter(torch.randn(up)), nn.Parameter(torch.randn(down))

    def forward(self, x: Tensor) -> Tensor:
        up, down = (each if self.transposed else each.mT for each in (self.gate_up_proj, self.down_proj))
        gate, other = (x @ up).chunk(2, dim=-1)
        return ((gate.sigmoid() * other) @ down).sum(0)


class Grouped(nn.Module):
    """Two heads of values, each for two heads of queries."""

    head_dim = 16

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(16, 64), nn.Linear(16, 32), nn.Linear(16, 32)
        self.o_proj = nn.Linear(64, 16)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (-1, 16)) for layer in (self.q_proj, self.k_proj, self.v_proj))
        q, k, v = (each.transpose(1, 2) for each in (q, k, v))
        k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
        found: Tensor = self.o_proj(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return found


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(8, 24, 3, padding=1), nn.BatchNorm2d(24)
        self.conv2, self.bn2 = nn.Conv2d(24, 8, 3, padding=1), nn.BatchNorm2d(8)
        for norm in (self.bn1, self.bn2):
            nn.init.uniform_(norm.weight)
            nn.init.normal_(norm.bias)
            nn.init.normal_(norm.running_mean)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        return x + self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))  # type: ignore[no-any-return]


def sequential() -> nn.Module:
    return nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Dropout(0.5), nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, 5))


def convnet() -> nn.Module:
    layers = [nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 8, 1)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(72, 5))


def encoder() -> nn.Module:
    return nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)


# What makes the model, what it takes, and the names of its axes with their kinds.
MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], dict[str, str]]] = {
    "gated": (Gated, (2, 5, 16), {"down_proj": "hidden"}),
    "grouped": (Grouped, (2, 5, 16), {"o_proj": "value"}),
    "residual": (Residual, (2, 8, 6, 6), {"conv2": "channels"}),
    "sequential": (sequential, (2, 16), {"3": "channels", "5": "channels"}),
    "convnet": (convnet, (2, 3, 8, 8), {"4": "channels"}),
    "encoder": (encoder, (2, 5, 16), {"linear2": "hidden", "self_attn.out_proj": "value"}),
}


def made(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    make, shape, _ = MODELS[name]
    return make().eval(), torch.randn(shape)


def kept(model: nn.Module, axis: PermutedAxis, pattern: Pair, direction: Any = "both") -> float:
    """The oracle: what the best masks of the axis' weights keep of them, the parts of stacked ones by themselves."""
    kept_sum = total = 0.0
    for name in axis.weights:
        weight = model.get_parameter(name).detach().double().numpy()
        if name.endswith("in_proj_weight"):
            weight = weight[2 * len(weight) // 3 :]
        for k in np.ndindex(weight.shape[2:]):
            matrix = np.abs(weight[(..., *k)])
            kept_sum += matrix[ms.solve_matrix(matrix, *pattern, direction=direction)].sum()
            total += matrix.sum()
    return float(kept_sum / total)


@pytest.mark.parametrize("pattern", PATTERNS, ids=name_of)
@pytest.mark.parametrize("name", MODELS)
def test_a_model_computes_the_same_and_its_masks_keep_what_is_said(name: str, pattern: Pair) -> None:
    model, x = made(name)
    before, expected = copy.deepcopy(model), model(x)
    report = permute_model(model, pattern, x)
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    assert {axis.name: axis.kind for axis in report.axes} == MODELS[name][2]
    moved = [axis for axis in report.axes if axis.reason is None]
    # The second axis of the same weight begins where the first ends.
    for axis in moved[:1] if name == "sequential" else moved:
        assert axis.kept_before == pytest.approx(kept(before, axis, pattern), abs=1e-6)
    assert all(axis.kept_after > axis.kept_before for axis in moved)
    last = moved[-1]
    assert last.kept_after == pytest.approx(kept(model, last, pattern), abs=1e-6)
    for name_, parameter in model.named_parameters():
        assert torch.equal(parameter.flatten().sort().values, before.get_parameter(name_).flatten().sort().values)


@pytest.mark.parametrize(
    ("direction", "names"),
    [("rows", ("down_proj.weight",)), ("columns", ("gate_proj.weight", "up_proj.weight"))],
)
def test_under_one_sided_masks_the_layer_counts_whose_groups_lie_along_the_axis(
    direction: Any, names: tuple[str, ...]
) -> None:
    model, x = made("gated")
    expected = model(x)
    (axis,) = permute_model(model, "2:4", x, direction=direction).axes
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    counted = PermutedAxis(**{**axis.to_dict(), "weights": names})
    assert axis.kept_after == pytest.approx(kept(model, counted, (2, 4), direction), abs=1e-6)
    assert axis.kept_after > axis.kept_before


def test_heads_stay_apart_and_those_that_share_values_are_reordered_alike() -> None:
    model, x = made("grouped")
    before = copy.deepcopy(model)
    (axis,) = permute_model(model, "2:4", x).axes
    assert (axis.length, axis.groups) == (32, 2)
    old, new = before.get_parameter("v_proj.weight"), model.get_parameter("v_proj.weight")
    order = [int((old == row).all(1).nonzero()[0, 0]) for row in new]
    assert [sorted(order[:16]), sorted(order[16:])] == [list(range(16)), list(range(16, 32))]
    assert order != list(range(32))


def test_a_block_that_computes_something_else_is_put_back_and_named() -> None:
    torch.manual_seed(0)
    model = nn.ModuleList([Normed(), Gated()])
    model.forward = lambda x: model[1](model[0](x))  # type: ignore[method-assign]
    x = torch.randn(2, 16)
    before, expected = copy.deepcopy(model[0]), model(x)
    report = permute_model(model, "2:4", x)
    assert [axis.reason is None for axis in report.axes] == [False, True]
    assert "computes something else in another order (outputs change by" in (report.axes[0].reason or "")
    assert all(torch.equal(a, b) for a, b in zip(model[0].parameters(), before.parameters(), strict=True))
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    assert report.untouched == ("0.gate_proj.weight", "0.up_proj.weight", "0.down_proj.weight")


TRANSFORMERS = ["GPT2", "T5", "GPTNeoX", "Llama", "Llama, tied", "BERT", "Whisper", "Mixtral", "Qwen3-MoE", "Phi3"]


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_models_of_transformers_compute_the_same(name: str) -> None:
    need("transformers")
    model = transformer_models.build(name).eval()
    tokens = torch.arange(12).view(2, 6) % 7 + 3
    given: dict[str, Any] = {"input_ids": tokens}
    if name == "T5":
        given["decoder_input_ids"] = tokens
    if name == "Whisper":
        given = {"input_features": torch.randn(2, 8, 48), "decoder_input_ids": tokens}
    expected = model(**given).logits
    report = permute_model(model, "1:2", **given)
    torch.testing.assert_close(model(**given).logits, expected, rtol=1e-3, atol=1e-4)
    kinds = {axis.kind for axis in report.axes if axis.reason is None}
    # Queries, keys and values of these are one matrix of its own order.
    assert kinds - {"channels"} == ({"hidden"} if name in ("GPTNeoX", "Phi3") else {"hidden", "value"})
    assert all(axis.reason is None for axis in report.axes)
    experts = [axis.name for axis in report.axes if "experts" in axis.name]
    assert len(experts) == (8 if name in ("Mixtral", "Qwen3-MoE") else 0)


def test_lines_that_alternate_are_left_as_they_are() -> None:
    need("transformers")
    model = transformer_models.build("GPT-OSS").eval()
    report = permute_model(model, "1:2", input_ids=torch.arange(12).view(2, 6))
    reasons = {axis.reason for axis in report.axes if axis.kind == "hidden"}
    assert reasons == {"its lines do not begin at a multiple of 2 in every weight"}


@pytest.mark.parametrize("transposed", [False, True])
def test_experts_of_a_stack_are_reordered_each_by_itself(transposed: bool) -> None:
    torch.manual_seed(0)
    model = Experts(transposed)
    before, x = copy.deepcopy(model), torch.randn(6, 12)
    expected = model(x)
    report = permute_model(model, "2:4", x)
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    assert [axis.name for axis in report.axes] == ["down_proj.0", "down_proj.1", "down_proj.2"]
    assert all(axis.kept_after > axis.kept_before for axis in report.axes)
    moves = [not torch.equal(new, old) for new, old in zip(model.down_proj, before.down_proj, strict=True)]
    assert moves == [True, True, True]
    for expert, axis in enumerate(report.axes):
        matrices = [model.gate_up_proj[expert], model.down_proj[expert]]
        sums = [(np.abs(each.detach().double().numpy()), (2, 4)) for each in matrices]
        kept_sum = sum(each[ms.solve_matrix(each, *pattern)].sum() for each, pattern in sums)
        assert axis.kept_after == pytest.approx(kept_sum / sum(each.sum() for each, _ in sums), abs=1e-6)


def test_scores_of_a_callable_decide() -> None:
    model, x = made("gated")
    scores = {name: torch.rand(weight.shape) for name, weight in model.named_parameters()}
    report = permute_model(model, "2:4", x, importance=lambda name, _: scores[name])
    matrices = [scores["gate_proj.weight"], scores["up_proj.weight"], scores["down_proj.weight"].t()]
    found = ms.permute.search([each.numpy() for each in matrices], "2:4", axes="rows")
    assert report.axes[0].kept_after == pytest.approx(found.kept_after)


def test_no_assignment_begins_after_the_time_limit_of_an_axis() -> None:
    model, x = made("sequential")
    report = permute_model(model, "2:4", x, time_limit=1e-9)
    assert [axis.kept_after - axis.kept_before for axis in report.axes] == [0, 0]


def test_the_same_seed_gives_the_same_order_and_modes_and_dtypes_stay() -> None:
    orders = []
    for seed in (1, 1, 2):
        model, x = made("sequential")
        model.to(torch.float64).train()
        assert permute_model(model, "2:4", x.double(), seed=seed).deviation < 1e-12
        assert model.training
        assert model[2].training  # type: ignore[index]
        orders.append(model[0].weight.detach())  # type: ignore[index, union-attr]
    assert torch.equal(orders[0], orders[1])
    assert not torch.equal(orders[0], orders[2])


def test_small_unaligned_and_shared_axes_are_named() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 6), nn.ReLU(), nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU())
    model.append(nn.Linear(16, 16))
    model[6].weight = model[4].weight
    report = permute_model(model, "2:4", torch.randn(2, 16))
    assert {axis.name: axis.reason for axis in report.axes} == {
        "2": "6 lines are fewer than two stripes of 4",
        "4": "a weight of it is used in several places",
        "6": "a weight of it is used in several places",
    }
    grouped = Grouped()
    report = permute_model(grouped, "2:16", torch.randn(2, 5, 16))
    assert report.axes[0].reason == "16 lines are fewer than two stripes of 16"
    report = permute_model(grouped, "1:3", torch.randn(2, 5, 16))
    assert report.axes[0].reason == "heads of 16 channels are not whole stripes of 3"


def test_what_cannot_be_reordered_is_refused() -> None:
    model, x = made("gated")
    Sparsifier(model, "2:4")
    with pytest.raises(ValueError, match=r"'weight' of a \w+ is masked by a Sparsifier; permute the model before"):
        permute_model(model, "2:4", x)
    with pytest.raises(ValueError, match="this Linear has no axis that is known to be free"):
        permute_model(nn.Linear(8, 8), "2:4", x)
    model, x = made("gated")
    model.forward = lambda x: torch.rand(3)  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="returns something else when it is called again"):
        permute_model(model, "2:4", x)
    model.forward = lambda x: "text"  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="returns no tensor of floats"):
        permute_model(model, "2:4", x)
    with pytest.raises(ValueError, match="on the meta device"):
        permute_model(Gated().to("meta"), "2:4", x)
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module"):
        permute_model("model", "2:4", x)  # type: ignore[arg-type]


def test_an_interrupted_model_is_as_it_was() -> None:
    model, x = made("sequential")
    before = copy.deepcopy(model)

    def stop(axis: PermutedAxis) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        permute_model(model, "2:4", x, on_axis=stop)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters(), strict=True))


def test_after_it_a_sparsifier_keeps_more() -> None:
    model, x = made("gated")
    plain = Sparsifier(copy.deepcopy(model), "2:4").last_refresh
    permute_model(model, "2:4", x)
    better = Sparsifier(model, "2:4").last_refresh
    assert better.means()["masks/kept_importance"] > plain.means()["masks/kept_importance"] + 0.01
