"""Which parameters are masked, and that what they become in a GEMM is N:M both ways."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import masksolve as ms
from masksolve._tiles import Direction
from masksolve.torch import Sparsifier, semi_structured
from tests import oracle
from tests.tables import Pair, name_of
from tests.torch.masked import held
from tests.torch.transformer_models import build

PATTERNS = [(2, 4), (1, 4), (3, 4), (4, 8)]


def mask_of(module: nn.Module, attribute: str = "weight") -> Tensor:
    return held(module, attribute)[1]


def reasons(sparsifier: Sparsifier) -> dict[str, str | None]:
    return {line.name: line.reason for line in sparsifier.report if not line.sparse}


def groups_of(matrix: Tensor, m: int) -> np.ndarray[Any, Any]:
    """How many entries of each m consecutive ones of each row are not zero."""
    nonzero = (matrix.detach() != 0).numpy()
    return nonzero.reshape(len(nonzero), -1, m).sum(axis=2)


CONVOLUTIONS = [
    nn.Conv1d(16, 8, 3, bias=False),
    nn.Conv2d(16, 8, (3, 2), stride=2, padding=1, bias=False),
    nn.Conv3d(8, 16, 2, bias=False),
    nn.Conv2d(16, 16, 3, groups=2, bias=False),
    nn.ConvTranspose1d(16, 8, 3, bias=False),
    nn.ConvTranspose2d(8, 16, 3, stride=2, bias=False),
    nn.ConvTranspose3d(8, 8, 2, bias=False),
    nn.ConvTranspose2d(16, 16, 3, groups=2, bias=False),
]


@pytest.mark.parametrize("layer", CONVOLUTIONS, ids=lambda layer: f"{type(layer).__name__} groups={layer.groups}")
@pytest.mark.parametrize("pattern", PATTERNS, ids=name_of)
def test_both_gemms_of_a_lowered_convolution_are_sparse(layer: Any, pattern: Pair) -> None:
    """Along the channels that each sums over, at every kernel position: the forward's and the input gradient's."""
    n, m = pattern
    layer = copy.deepcopy(layer)
    Sparsifier(layer, f"{n}:{m}")
    weight = layer.weight
    for group in weight.chunk(layer.groups):
        # im2col: a row for each output channel, columns ordered by kernel position, then input channel.
        rows, columns, *kernel = group.shape
        forward = group.reshape(rows, columns, -1).permute(0, 2, 1).reshape(rows, -1)
        backward = group.reshape(rows, columns, -1).permute(1, 2, 0).reshape(columns, -1)
        assert (groups_of(forward, m) == n).all()
        assert (groups_of(backward, m) == n).all()
        assert forward.shape == (rows, columns * int(np.prod(kernel)))


@pytest.mark.parametrize("pattern", PATTERNS, ids=name_of)
def test_the_lowered_matrices_are_those_that_the_convolution_multiplies_with(pattern: Pair) -> None:
    n, m = pattern
    torch.manual_seed(0)
    layer = nn.Conv2d(16, 8, 3, padding=1, bias=False)
    sparsifier = Sparsifier(layer, f"{n}:{m}")
    weight = layer.weight.detach()
    x, g = torch.randn(2, 16, 5, 6), torch.randn(2, 8, 5, 6)
    # Columns: kernel position, then channel; unfold gives channel, then position.
    columns = functional.unfold(x, 3, padding=1).view(2, 16, 9, -1).permute(0, 2, 1, 3).reshape(2, 144, -1)
    forward = weight.view(8, 16, 9).permute(0, 2, 1).reshape(8, 144)
    torch.testing.assert_close((forward @ columns).view(2, 8, 5, 6), layer(x), rtol=1e-4, atol=1e-5)
    # The input gradient is the convolution of g with the flipped kernel, input and output channels exchanged.
    backward = weight.flip(2, 3).view(8, 16, 9).permute(1, 2, 0).reshape(16, 72)
    columns = functional.unfold(g, 3, padding=1).view(2, 8, 9, -1).permute(0, 2, 1, 3).reshape(2, 72, -1)
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(layer(x), x, g)
    torch.testing.assert_close((backward @ columns).view(2, 16, 5, 6), gradient, rtol=1e-4, atol=1e-5)
    for matrix in (forward, backward):
        assert (groups_of(matrix, m) == n).all()
    sparsifier.finalize()


@pytest.mark.parametrize("layer", CONVOLUTIONS, ids=lambda layer: f"{type(layer).__name__} groups={layer.groups}")
def test_masks_of_a_convolution_are_optimal_in_every_group_and_position(layer: Any) -> None:
    layer = copy.deepcopy(layer)
    Sparsifier(layer, "3:8")
    weight = held(layer)[0].detach()
    for part, mask in zip(weight.chunk(layer.groups), mask_of(layer).chunk(layer.groups), strict=True):
        for position in np.ndindex(*weight.shape[2:]):
            where = (slice(None), slice(None), *position)
            assert oracle.is_optimal(part[where].numpy(), mask[where].numpy(), 3, 8)


def test_groups_that_are_too_small_are_skipped_with_the_reason() -> None:
    model = nn.Sequential(
        nn.Conv2d(16, 16, 3, groups=16), nn.Conv2d(16, 16, 1, groups=8), nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 1)
    )
    found = reasons(Sparsifier(model, "2:4"))
    assert found["0.weight"] == "each of its 16 groups is 1x1 and holds no whole 4x4 tile"
    assert found["1.weight"] == "each of its 8 groups is 2x2 and holds no whole 4x4 tile"
    assert found["2.weight"] == "16x3 holds no whole 4x4 tile"
    assert "3.weight" not in found


def test_ragged_matrices_are_masked_or_skipped_as_asked() -> None:
    def model() -> nn.Module:
        return nn.Sequential(nn.Linear(10, 8), nn.Linear(8, 8))

    sparsifier = Sparsifier(model(), "2:4")
    assert all(line.sparse for line in sparsifier.report if line.name.endswith("weight"))
    found = reasons(Sparsifier(model(), "2:4", ragged="skip"))
    assert found["0.weight"] == "8x10 is not a multiple of 4 both ways, and ragged='skip'"
    assert "1.weight" not in found


def test_a_ragged_edge_keeps_at_most_n() -> None:
    model = nn.Linear(10, 9)
    Sparsifier(model, "3:4")
    weight = held(model)[0].detach().numpy()
    assert oracle.is_optimal(weight, mask_of(model).numpy(), 3, 4)


class Everything(nn.Module):
    """One of each."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(12, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.other = nn.MultiheadAttention(8, 2, kdim=16, vdim=12, batch_first=True)
        self.norm = nn.LayerNorm(8)
        self.experts = nn.Parameter(torch.randn(3, 8, 16))
        self.table = nn.Parameter(torch.randn(8, 8))
        self.head = nn.Linear(8, 12)


def test_weights_of_linears_convolutions_and_attention_are_masked_by_default() -> None:
    sparsifier = Sparsifier(Everything(), "2:4")
    assert [line.name for line in sparsifier.report if line.sparse] == [
        "attention.in_proj_weight",
        "attention.out_proj.weight",
        "other.q_proj_weight",
        "other.k_proj_weight",
        "other.v_proj_weight",
        "other.out_proj.weight",
        "head.weight",
    ]
    found = reasons(sparsifier)
    assert found["norm.weight"] == "1-D: not a matrix"
    assert found["embedding.weight"] == "an embedding; include it to mask it"
    assert found["experts"] == "a stack of 3 experts; include it to mask it"
    assert found["table"] == (
        "not the weight of a Linear, a convolution, an attention or a recurrent layer; include it to mask it"
    )


RECURRENT = [
    nn.RNN(16, 32),
    nn.GRU(16, 32, num_layers=2, bidirectional=True),
    nn.LSTM(16, 32, num_layers=2, batch_first=True),
    nn.LSTM(16, 32, proj_size=8),
    nn.GRUCell(16, 32),
    nn.LSTMCell(16, 32),
    # 2:4 tiles of the stack of its gates would lie across two.
    nn.GRU(16, 30),
]


@pytest.mark.filterwarnings("ignore:LSTM with projections")
@pytest.mark.parametrize("layer", RECURRENT, ids=str)
def test_a_recurrent_layer_runs_with_masked_matrices_of_every_gate(layer: Any) -> None:
    layer = copy.deepcopy(layer)
    sparsifier = Sparsifier(layer, "2:4")
    x = torch.randn(5, 16) if isinstance(layer, nn.RNNCellBase) else torch.randn(3, 5, 16)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    for _ in range(2):
        layer(x)[0].square().sum().backward()
        optimizer.step()
        sparsifier.step()
        optimizer.zero_grad()
    masked = layer(x)[0]
    sparsifier.finalize()
    assert type(layer) in (nn.RNN, nn.GRU, nn.LSTM, nn.GRUCell, nn.LSTMCell)
    torch.testing.assert_close(layer(x)[0], masked)
    matrices = {name: weight for name, weight in layer.named_parameters() if weight.ndim == 2}
    assert sum(line.sparse for line in sparsifier.report) == len(matrices)
    for name, weight in matrices.items():
        gates = 1 if "_hr_" in name else weight.shape[0] // layer.hidden_size
        for gate in weight.chunk(gates):
            assert oracle.is_valid(gate.detach().numpy() != 0, 2, 4, len(gate) % 4 == 0)


@pytest.mark.parametrize("direction", ["rows", "columns"])
@pytest.mark.parametrize("name", ["GPT2", "GPT-OSS", "Mixtral", "Llama"])
def test_groups_of_inputs_are_found_however_a_weight_is_stored(name: str, direction: Direction) -> None:
    model = build(name)
    sparsifier = Sparsifier(model, "2:8", direction=direction)
    sparsifier.finalize()
    for line in (line for line in sparsifier.report if line.sparse):
        is_turned = name in ("GPT2", "GPT-OSS") and ("c_" in line.name or "experts" in line.name)
        stored = model.get_parameter(line.name).detach()
        matrix = (stored.mT if is_turned else stored).numpy()
        assert ms.is_valid_mask(matrix != 0, 2, 8, direction=direction), line.name


def test_experts_of_which_nothing_says_how_they_lie_get_no_one_sided_mask() -> None:
    model = build("Mixtral")
    for module in model.modules():
        vars(module).pop("is_transposed", None)
    assert Sparsifier(copy.deepcopy(model), "4:8").report
    found = reasons(Sparsifier(copy.deepcopy(model), "4:8", direction="rows"))
    name = "model.layers.0.mlp.experts.down_proj"
    words = "a stack of 8 experts of which nothing says along which axis inputs lie"
    assert found[name] == f"{words}; include it to mask it as (expert, out, in)"
    included = Sparsifier(model, "4:8", direction="rows", include=name)
    assert [line.name for line in included.report if line.sparse] == [name]


def test_each_layer_gets_the_pattern_of_the_first_glob_that_matches() -> None:
    model = build("Llama")
    patterns = {"q_proj": "1:4", "*.self_attn.*": (2, 8), "*": "4:8"}
    sparsifier = Sparsifier(model, patterns, exclude="lm_head")
    expected = {"q_proj": ms.Pattern(1, 4), "*.self_attn.*": ms.Pattern(2, 8), "*": ms.Pattern(4, 8)}
    assert sparsifier.pattern == expected
    state = sparsifier.state_dict()
    assert state["pattern"] == "q_proj=1:4, *.self_attn.*=2:8, *=4:8"
    sparsifier.load_state_dict(state)
    with torch.no_grad():
        model.get_submodule("model.layers.0.mlp.up_proj").weight.neg_()
    sparsifier.refresh()
    sparsifier.finalize()
    for name, weight in model.named_parameters():
        if "_proj" in name:
            n, m = (1, 4) if "q_proj" in name else (2, 8) if "self_attn" in name else (4, 8)
            assert ms.is_valid_mask(weight.detach().numpy() != 0, n, m), name


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        ({"3": "2:4"}, r"pattern '3' = 2:4 matches none of the 4 parameter names \(0.weight, 0.bias, 2.weight, ...\)"),
        ({"*": "2:4", "2": "4:8"}, "pattern '2' = 4:8 is never used: the globs before it match all of its names"),
        (
            {"2.bias": "2:4", "*": "4:8"},
            r"'2.bias' = 2:4 is for nothing that can be pruned \(2.bias: 1-D: not a matrix",
        ),
        ({"0": "2:4"}, r"no pattern is given for 2.weight \(1 of the weights to prune\); add '\*' with a pattern for"),
        ({}, "pattern is an empty mapping; give the pattern of at least one glob"),
    ],
)
def test_patterns_that_do_not_go_with_the_model_are_refused(patterns: dict[str, str], message: str) -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
    with pytest.raises(ValueError, match=message):
        Sparsifier(model, patterns)
    assert type(model[0]) is nn.Linear
    with pytest.raises(TypeError, match="pattern maps globs of names to patterns"):
        Sparsifier(model, {2: "2:4"})  # type: ignore[dict-item]


def test_any_parameter_of_two_or_more_dimensions_can_be_included() -> None:
    model = Everything()
    sparsifier = Sparsifier(model, "3:4", include=["experts", "embedding.*"])
    assert [line.name for line in sparsifier.report if line.sparse] == ["experts", "embedding.weight"]
    assert reasons(sparsifier)["head.weight"] == "not included"
    for attribute, owner in (("experts", model), ("weight", model.embedding)):
        weight = held(owner, attribute)[0].detach().numpy()
        assert oracle.is_optimal(weight, mask_of(owner, attribute).numpy(), 3, 4)


def test_excluded_parameters_say_by_what() -> None:
    sparsifier = Sparsifier(Everything(), "2:4", exclude=["other.*", "head.weight"])
    found = reasons(sparsifier)
    assert found["head.weight"] == "excluded by 'head.weight'"
    assert found["other.q_proj_weight"] == "excluded by 'other.*'"
    assert [line.name for line in sparsifier.report if line.sparse] == [
        "attention.in_proj_weight",
        "attention.out_proj.weight",
    ]


def test_attention_attends_with_masked_projections_in_training_and_in_evaluation() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    sparsifier = Sparsifier(layer, "1:4")
    assert (groups_of(layer.self_attn.in_proj_weight, 4) == 1).all()
    assert (groups_of(layer.self_attn.in_proj_weight.T, 4) == 1).all()
    x = torch.randn(2, 3, 16)
    trained = layer(x)
    layer.eval()
    with torch.no_grad():
        evaluated = layer(x)
    sparsifier.finalize()
    with torch.no_grad():
        final = layer(x)
    torch.testing.assert_close(evaluated, trained)
    torch.testing.assert_close(final, trained)


@pytest.mark.parametrize("width", [8, 10])
def test_queries_keys_and_values_in_one_weight_are_sparse_each_for_itself(width: int) -> None:
    """Where the width is not a multiple of m, tiles of the stack would lie across two of them."""
    layer = nn.MultiheadAttention(width, 2)
    sparsifier = Sparsifier(layer, "3:4", refresh_every=1)
    for _ in range(2):
        weight, mask = held(layer, "in_proj_weight")
        for part, ones in zip(weight.detach().chunk(3), mask.chunk(3), strict=True):
            assert oracle.is_optimal(part.numpy(), ones.numpy(), 3, 4)
        with torch.no_grad():
            weight.normal_()
        sparsifier.refresh()
    pruned = semi_structured(nn.MultiheadAttention(width, 2), "in_proj_weight", "3:4")
    assert all(oracle.is_valid(part.numpy() != 0, 3, 4) for part in pruned.in_proj_weight_mask.chunk(3))  # type: ignore[union-attr, operator]


def test_a_recurrent_layer_multiplies_with_the_masked_weights_too() -> None:
    torch.manual_seed(0)
    layer = nn.GRU(8, 8)
    sparsifier = Sparsifier(layer, "1:4", include="weight_*")
    x = torch.randn(5, 1, 8)
    optimizer = torch.optim.SGD(layer.parameters(), 0.5)
    layer(x)[0].square().sum().backward()
    optimizer.step()
    sparsifier.refresh()
    found = layer(x)[0]
    sparsifier.finalize()
    torch.testing.assert_close(layer(x)[0], found)
    assert (groups_of(layer.weight_hh_l0, 4) == 1).all()


class Listed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ParameterList([nn.Parameter(torch.randn(8, 8)) for _ in range(2)])
        self.named = nn.ParameterDict({"last": nn.Parameter(torch.randn(8, 8))})


def test_parameters_in_lists_and_dictionaries_can_be_included() -> None:
    model = Listed()
    keys = list(model.state_dict())
    sparsifier = Sparsifier(model, "3:4", include=["layers.*", "named.last"])
    for weight in (*model.layers, model.named["last"]):
        assert (groups_of(weight, 4) == 3).all()
    sparsifier.finalize()
    assert list(model.state_dict()) == keys
    assert (groups_of(model.layers[1], 4) == 3).all()


def test_a_masked_weight_keeps_its_memory_format() -> None:
    layer = nn.Conv2d(8, 16, 3).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    sparsifier = Sparsifier(layer, "1:4")
    assert layer.weight.is_contiguous(memory_format=torch.channels_last)
    sparsifier.refresh()
    assert layer.weight.is_contiguous(memory_format=torch.channels_last)
    for position in np.ndindex(3, 3):
        assert (groups_of(layer.weight[(..., *position)], 4) == 1).all()


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(12, 8)
        self.head = nn.Linear(8, 12, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.embedding(tokens))  # type: ignore[no-any-return]


def test_tied_weights_have_one_mask_and_stay_tied() -> None:
    model = Tied()
    tokens = torch.tensor([1, 2])
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    sparsifier = Sparsifier(model, "3:4", include="head.weight", refresh_every=1)
    assert [(line.name, line.sparse, line.reason) for line in sparsifier.report] == [
        ("embedding.weight", True, None),
        ("head.weight", True, "tied to embedding.weight"),
    ]
    model(tokens).square().sum().backward()
    optimizer.step()
    record = sparsifier.step()
    assert record is not None
    assert [layer.name for layer in record.layers] == ["embedding.weight"]
    assert torch.equal(model.embedding.weight, model.head.weight)
    model.double()
    sparsifier.refresh()
    assert torch.equal(model.embedding.weight, model.head.weight)
    sparsifier.finalize()
    assert model.embedding.weight is model.head.weight
    assert (groups_of(model.head.weight, 4) == 3).all()


def test_excluding_one_name_of_a_tied_weight_excludes_the_others() -> None:
    with pytest.raises(ValueError, match=r"head.weight: excluded by 'embedding.*', to which embedding.weight is tied"):
        Sparsifier(Tied(), "2:4", exclude="embedding.*")


def test_a_module_that_is_used_twice_is_masked_once() -> None:
    shared = nn.Linear(8, 8)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    sparsifier = Sparsifier(model, "2:4")
    assert [line.name for line in sparsifier.report if line.sparse] == ["0.weight"]
    sparsifier.finalize()
    assert sorted(model.state_dict()) == ["0.bias", "0.weight", "2.bias", "2.weight"]


def test_parametrized_and_masked_parameters_are_skipped() -> None:
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)), nn.Linear(8, 8), nn.Linear(8, 8))
    Sparsifier(model, "2:4", include="1.weight")
    found = reasons(Sparsifier(model, "1:4"))
    assert found["0.weight"] == "already parametrized by _WeightNorm; remove that parametrization first"
    assert found["1.weight"] == "already masked by a Sparsifier; finalize it first"
    assert "2.weight" not in found


def test_lazy_parameters_wait_for_the_first_run() -> None:
    model = nn.Sequential(nn.LazyLinear(8), nn.Linear(8, 8))
    assert reasons(Sparsifier(model, "2:4"))["0.weight"] == "not initialised yet; run the model once first"


def test_frozen_weights_are_masked_too() -> None:
    model = nn.Linear(8, 8).requires_grad_(False)
    sparsifier = Sparsifier(model, "2:4", refresh_every=1)
    record = sparsifier.step()
    assert record is not None
    assert record.layers[0].sad == 0
    assert not model.weight.requires_grad


@pytest.mark.parametrize("pattern", PATTERNS, ids=name_of)
def test_the_bridge_prunes_as_torch_does_with_the_exact_mask(pattern: Pair) -> None:
    n, m = pattern
    layer = nn.Conv2d(8, 16, 3)
    weight = layer.weight.detach().clone()
    assert semi_structured(layer, "weight", f"{n}:{m}") is layer
    mask = layer.weight_mask
    assert torch.equal(layer.weight, weight * mask)
    for position in np.ndindex(3, 3):
        where = (..., *position)
        assert oracle.is_optimal(weight[where].numpy(), mask[where].numpy() != 0, n, m)
    nn.utils.prune.remove(layer, "weight")
    assert sorted(layer.state_dict()) == ["bias", "weight"]


def test_the_bridge_takes_scores() -> None:
    layer = nn.Linear(8, 8)
    scores = torch.randn(8, 8).abs()
    semi_structured(layer, "weight", "1:4", importance=scores)
    assert oracle.is_optimal(scores.numpy(), layer.weight_mask.numpy() != 0, 1, 4)


def test_the_bridge_prunes_what_is_pruned_already() -> None:
    layer = semi_structured(nn.Linear(8, 8), "weight", "3:4")
    first = layer.weight_mask.clone()
    semi_structured(layer, "weight", "2:4")
    second = layer.weight_mask.bool()
    assert oracle.is_valid(second.numpy(), 2, 4, saturated=False)
    assert bool((second <= first.bool()).all())
    assert not torch.equal(second, first.bool())


def test_the_bridge_refuses_what_it_cannot_prune() -> None:
    layer = nn.Linear(8, 8)
    with pytest.raises(ValueError, match="Linear has no parameter 'weights'"):
        semi_structured(layer, "weights", "2:4")
    with pytest.raises(ValueError, match=r"has shape \(8,\); parameter 'weight' needs \(8, 8\)"):
        semi_structured(layer, "weight", "2:4", importance=torch.ones(8))
    with pytest.raises(ValueError, match=r"importance of parameter 'weight' holds negative scores"):
        semi_structured(layer, "weight", "2:4", importance=torch.full((8, 8), -1.0))
    for scores in (None, ["magnitude"], lambda name, weight: weight.abs()):
        with pytest.raises(TypeError, match="importance must be 'magnitude' or a Tensor of scores, got "):
            semi_structured(layer, "weight", "2:4", importance=scores)  # type: ignore[arg-type]
    for scores in (torch.ones(8, 8, device="meta"), torch.ones(8, 8).bool(), torch.ones(8, 8).to(torch.complex64)):
        with pytest.raises(TypeError, match=rf"importance is {scores.dtype} on device {scores.device}; .* needs real"):
            semi_structured(layer, "weight", "2:4", importance=scores)
    with pytest.raises(TypeError, match=r"module must be a torch\.nn\.Module, got NoneType"):
        semi_structured(None, "weight", "2:4")  # type: ignore[arg-type]
    other = nn.Module()
    other.register_buffer("table", torch.ones(8, 8))
    with pytest.raises(ValueError, match="Module has no parameter 'table'"):
        semi_structured(other, "table", "2:4")
    with pytest.raises(ValueError, match="at least two dimensions"):
        semi_structured(layer, "bias", "2:4")
    with pytest.raises(ValueError, match=r"'weight' is on the meta device and has no values; materialise"):
        semi_structured(nn.Linear(8, 8, device="meta"), "weight", "2:4")
    masked = nn.Linear(8, 8)
    Sparsifier(masked, "2:4")
    with pytest.raises(ValueError, match="'weight' is masked by a Sparsifier; finalize it before"):
        semi_structured(masked, "weight", "2:4")
    assert sorted(layer.state_dict()) == ["bias", "weight"]
