"""Adapters under the zeros of a sparse model: what they compute, what they train, and that no merge loses a zero."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.func import functional_call, vmap
from torch.func import grad as gradient_of
from torch.nn import functional
from torch.optim.swa_utils import AveragedModel

import masksolve as ms
from masksolve.torch import Sparsifier, adaprune, add_adapters, merge_adapters
from masksolve.torch._layers import layout_of


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 8))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.TransformerEncoderLayer(16, 4, 24, dropout=0.0, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.layer(x.view(1, -1, 16)))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.second(self.first(x).relu()))


def convolutions() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Unflatten(1, (4, 2, 2)), nn.Conv2d(4, 16, 2), nn.ReLU(), nn.Conv2d(16, 16, 1, groups=2), nn.Flatten()
    )


MODELS: dict[str, Callable[[], nn.Module]] = {
    "mlp": mlp,
    "attention": Attention,
    "tied": Tied,
    "convolutions": convolutions,
    "channels last": lambda: convolutions().to(memory_format=torch.channels_last),  # type: ignore[call-overload]
}


def sparse(make: Callable[[], nn.Module] = mlp, pattern: str = "1:4", **options: Any) -> nn.Module:
    model = make()
    Sparsifier(model, pattern, **options).finalize()
    return model


def adapted(make: Callable[[], nn.Module] = mlp, rank: int = 3, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A sparse model with adapters as training leaves them: B is not zero any more."""
    model = sparse(make).to(dtype)
    add_adapters(model, rank, scale=0.5)
    with torch.no_grad():
        for name, each in model.named_parameters():
            if name.endswith("lora_b"):
                each.normal_()
    return model


def data(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(8, 16, generator=torch.Generator().manual_seed(1)).to(dtype)


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: each.detach().clone() for name, each in model.state_dict().items() if "lora" not in name}


def same(before: dict[str, Tensor], model: nn.Module) -> bool:
    """Bit for bit: torch.equal takes -0.0 for 0.0."""
    now = model.state_dict()
    return list(before) == list(now) and all(
        torch.equal(before[name], now[name]) and torch.equal(before[name].signbit(), now[name].signbit())
        for name in now
    )


def parameter(model: nn.Module, name: str) -> nn.Parameter:
    """The Parameter itself: an attribute of this name is its sum with the adapter."""
    return dict(model.named_parameters())[name]


DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])


@DTYPES
@pytest.mark.parametrize("name", MODELS)
def test_the_merged_model_computes_what_the_adapted_one_did_and_no_zero_is_lost(name: str, dtype: torch.dtype) -> None:
    model = adapted(MODELS[name], dtype=dtype)
    x = data(dtype)
    before, expected = weights(model), model(x)
    merge_adapters(model)
    close = {"rtol": 0, "atol": 0} if name != "channels last" else {"rtol": 2e-2, "atol": 2e-2}
    torch.testing.assert_close(model(x), expected, **close)
    after = weights(model)
    assert list(after) == list(before)
    changed = 0
    for each, weight in before.items():
        assert bool((after[each][weight == 0] == 0).all())
        changed += int((after[each] != weight).sum())
        assert after[each].dtype == dtype
    assert changed > 50
    assert not any("Adapted" in type(module).__name__ for module in model.modules())


@pytest.mark.parametrize("direction", ["both", "rows"])
@pytest.mark.parametrize("pattern", ["1:4", "3:8", "2:4"])
def test_a_trained_and_merged_model_is_as_sparse_as_it_was(pattern: str, direction: Any) -> None:
    model = sparse(pattern=pattern, direction=direction)
    n, m = map(int, pattern.split(":"))
    add_adapters(model, 4)
    trained = [each for each in model.parameters() if each.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.02, weight_decay=0.1)
    losses = []
    for _ in range(30):
        loss = (model(data()) - 1).square().mean()
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.6 * losses[0]
    merge_adapters(model)
    for layer in (model[0], model[2]):
        ms.check_mask((layer.weight != 0).numpy(), n, m, direction=direction)
    assert (model(data()) - 1).square().mean().item() < 0.6 * losses[0]


@pytest.mark.parametrize("name", MODELS)
def test_adding_and_merging_without_training_changes_nothing(name: str) -> None:
    model = sparse(MODELS[name])
    first = next(iter(model.parameters()))
    with torch.no_grad():
        for each in model.parameters():
            # As weights that were multiplied with a mask have them.
            each.copy_(torch.where(each == 0, -0.0, each))
    first.requires_grad_(False)
    before = weights(model)
    state = [each.requires_grad for each in model.parameters()]
    outputs = model(data())
    add_adapters(model, 2)
    assert torch.equal(model(data()), outputs) or name == "channels last"
    merge_adapters(model)
    assert same(before, model)
    assert [each.requires_grad for each in model.parameters()] == state
    assert list(vars(model)) == list(vars(MODELS[name]()))


@pytest.mark.parametrize("name", MODELS)
def test_only_adapters_get_gradients_and_they_are_those_of_the_formula(name: str) -> None:
    model = adapted(MODELS[name], dtype=torch.float64)
    model(data(torch.float64)).square().sum().backward()
    got = {each: value.grad for each, value in model.named_parameters() if value.grad is not None}
    names = [each for each, _ in model.named_parameters() if "lora" in each]
    assert list(got) == names

    plain = MODELS[name]().double()
    leaves = {each: value.detach().requires_grad_() for each, value in model.named_parameters()}
    values = {}
    for each, weight in model.named_parameters():
        if f"{each}_lora_a" in leaves:
            path, _, attribute = each.rpartition(".")
            layout = layout_of(plain.get_submodule(path), attribute)
            product = leaves[f"{each}_lora_b"] @ leaves[f"{each}_lora_a"]
            product = product if product.ndim == 3 else product[None]
            values[each] = leaves[each] + 0.5 * layout.weight_of(product, weight.shape) * (weight != 0)
        elif "lora" not in each:
            values[each] = leaves[each]
    functional_call(plain, values, (data(torch.float64),)).square().sum().backward()
    for each, grad in got.items():
        torch.testing.assert_close(grad, leaves[each].grad, rtol=1e-9, atol=1e-9)


def test_second_derivatives_are_right() -> None:
    layer = nn.Linear(4, 4).double()
    Sparsifier(layer, "1:4").finalize()
    add_adapters(layer, 2, scale=2.0)
    names = ["weight_lora_a", "weight_lora_b"]
    x = torch.randn(3, 4, dtype=torch.float64)

    def output(a: Tensor, b: Tensor) -> Tensor:
        return functional_call(layer, dict(zip(names, (a, b), strict=True)), (x,)).square()

    inputs = tuple(torch.randn_like(layer.get_parameter(name)).requires_grad_() for name in names)
    assert torch.autograd.gradcheck(output, inputs)
    assert torch.autograd.gradgradcheck(output, inputs)


def test_a_base_weight_that_is_trained_all_the_same_keeps_its_zeros() -> None:
    model = adapted()
    parameter(model, "0.weight").requires_grad_(True)
    model(data()).square().sum().backward()
    weight = parameter(model, "0.weight")
    assert bool((weight.grad[weight == 0] == 0).all())  # type: ignore[index]
    assert int((weight.grad != 0).sum()) == int((weight != 0).sum())


def test_nothing_but_the_sum_is_kept_for_the_backward_pass() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(64, 64, bias=False)
    Sparsifier(layer, "2:4").finalize()
    add_adapters(layer, 2)
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    x = torch.randn(2, 64, requires_grad=True)
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(x)
    own = {each.untyped_storage().data_ptr() for each in (x, *layer.parameters(), *layer.buffers())}
    # The sum itself, which the gradient of the inputs needs.
    assert [tuple(each.shape) for place, each in kept.items() if place not in own] == [(64, 64)]


def test_tied_weights_share_one_adapter() -> None:
    model = Tied()
    lines = add_adapters(model, 2)
    assert [(line.name, line.adapted, line.reason) for line in lines if "weight" in line.name] == [
        ("first.weight", True, None),
        ("second.weight", True, "tied to first.weight"),
    ]
    parts = ["first.weight_lora_a", "first.weight_lora_b", "first.weight_lora_scale"]
    assert [name for name in model.state_dict() if "lora" in name] == parts
    merge_adapters(model)
    assert model.second.weight is model.first.weight


def test_the_report_says_what_is_adapted() -> None:
    model = nn.Module()
    model.table, model.layer = nn.Embedding(8, 8), sparse(lambda: nn.Linear(8, 12), "3:4")
    model.again, model.memory = nn.ConvTranspose1d(8, 8, 3), nn.LSTM(8, 8)
    lines = add_adapters(model, 2)
    assert repr(lines[1]) == "AdapterReport('layer.weight', 12x8, adapted, 25.0% zeros)"
    found = {line.name: line.reason for line in lines if len(line.shape) > 1}
    recurrent = "of a recurrent layer, which keeps its weights elsewhere too and would not see an adapter"
    assert found == {
        "table.weight": "an embedding; include it to adapt it",
        "layer.weight": None,
        "again.weight": "of a transposed convolution, for which there are no adapters",
        "memory.weight_ih_l0": recurrent,
        "memory.weight_hh_l0": recurrent,
    }
    assert lines[1].to_dict() == {
        "name": "layer.weight",
        "shape": (12, 8),
        "adapted": True,
        "reason": None,
        "zeros": 0.25,
    }
    assert lines[0].zeros is None


def test_globs_choose() -> None:
    model = mlp()
    add_adapters(model, 2, exclude="2.*")
    assert [name for name, _ in model.named_parameters() if "lora" in name] == ["0.weight_lora_a", "0.weight_lora_b"]


# --- surroundings -----------------------------------------------------------------------------------------------------


def test_narrow_weights_have_float32_adapters() -> None:
    model = adapted(dtype=torch.float64)
    assert parameter(model, "0.weight_lora_a").dtype == torch.float64
    for dtype in (torch.bfloat16, torch.float16):
        model = sparse().to(dtype)
        add_adapters(model, 2)
        assert parameter(model, "0.weight_lora_b").dtype == torch.float32
        assert model(data(dtype)).dtype == dtype


def test_autocast_rounds_the_sum_and_not_the_product() -> None:
    model = adapted()
    x = data()
    with torch.autocast("cpu", torch.bfloat16):
        found = model(x)
        found.float().sum().backward()
    gradients = [each.grad.clone() for each in model.parameters() if each.grad is not None]
    assert all(each.dtype == torch.float32 for each in gradients)
    merge_adapters(model)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model(x), found)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated")  # Dynamo does it
def test_a_compiled_model_computes_the_same() -> None:
    model = adapted()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = data()
    results = []
    for run in (model, compiled):
        model.zero_grad()
        output = run(x)
        output.square().sum().backward()
        results.append((output, [each.grad.clone() for each in model.parameters() if each.grad is not None]))
    torch.testing.assert_close(results[0], results[1])


def test_copies_and_pickles_have_adapters_of_their_own() -> None:
    model = adapted()
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(stream, weights_only=False)]
    for each in copies:
        assert torch.equal(each(data()), model(data()))
        merge_adapters(each)
        assert type(each[0]) is nn.Linear
        assert each[0].weight.requires_grad
    assert "AdaptedLinear" in repr(model)


def test_a_state_dict_brings_adapters_to_another_model() -> None:
    model, other = adapted(), sparse()
    add_adapters(other, 3, scale=4.0)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(data()), model(data()))
    with pytest.raises(RuntimeError, match=r'Missing key.*"0.weight_lora_a"'):
        other.load_state_dict(sparse().state_dict())


def test_functions_of_torch_see_the_adapters() -> None:
    model = adapted()
    x = data()
    parameters = {name: each.detach() for name, each in model.named_parameters()}

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return cast(Tensor, functional_call(model, parameters, (x,)).square().sum())

    model(x).square().sum().backward()
    grads = gradient_of(loss)(parameters, x)
    of_each = vmap(gradient_of(loss), in_dims=(None, 0))(parameters, x)
    for name, each in model.named_parameters():
        if each.grad is not None:
            torch.testing.assert_close(grads[name], each.grad)
            torch.testing.assert_close(of_each[name].sum(0), each.grad, rtol=1e-4, atol=1e-4)
    exported = torch.export.export(model, (x,)).module()
    torch.testing.assert_close(exported(x), model(x))
    with pytest.raises(RuntimeError, match="cannot compile this Linear while its weight has an adapter"):
        cast(Any, model[0]).__prepare_scriptable__()  # type: ignore[index]


def test_a_fused_path_that_reads_the_weights_reads_them_with_their_adapters() -> None:
    model = adapted(Attention)
    expected = model(data())
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(model(data()), expected)
        merge_adapters(model)
        torch.testing.assert_close(model(data()), expected)


CHANGES: dict[str, Callable[[Any], object]] = {
    "add_": lambda layer: layer.weight.add_(1),
    "data": lambda layer: layer.weight.data.add_(1),
    "view": lambda layer: layer.weight.data.view(-1).mul_(2),
    "item": lambda layer: layer.weight.detach().__setitem__(0, 1),
    "assigned data": lambda layer: setattr(layer.weight, "data", torch.zeros(24, 16)),
    "init": lambda layer: nn.init.zeros_(layer.weight),
    "out": lambda layer: torch.add(torch.ones(24, 16), 1, out=layer.weight.data),
    "requires_grad_": lambda layer: layer.weight.requires_grad_(False),
    "inplace": lambda layer: functional.relu(layer.weight, inplace=True),
}


@pytest.mark.parametrize("case", CHANGES)
def test_a_change_that_would_be_lost_is_refused(case: str) -> None:
    model = adapted()
    before = {name: each.clone() for name, each in model.state_dict().items()}
    with pytest.raises(RuntimeError, match="a change of it would be lost; change the Parameters"), torch.no_grad():
        CHANGES[case](model[0])  # type: ignore[index]
    assert same(before, model)


# --- bad input --------------------------------------------------------------------------------------------------------


def masked() -> nn.Module:
    model = mlp()
    Sparsifier(model, "2:4")
    return model


def taken() -> nn.Module:
    model = mlp()
    model[0].weight_lora_b = 1
    return model


REFUSED: list[tuple[Callable[[], Any], dict[str, Any], type[Exception], str]] = [
    (lambda: 3, {}, TypeError, "model must be a torch.nn.Module, got int"),
    (mlp, {"rank": 0}, ValueError, "rank must be at least 1, got 0"),
    (mlp, {"rank": 2.0}, TypeError, r"rank must be an integer, got 2\.0"),
    (mlp, {"scale": 0.0}, ValueError, r"scale must be finite and not 0, got 0\.0"),
    (mlp, {"scale": float("nan")}, ValueError, "scale must be finite and not 0, got nan"),
    (mlp, {"scale": "1"}, TypeError, "scale"),
    (mlp, {"include": "3.*"}, ValueError, r"include '3\.\*' matches none of the 4 parameter names"),
    (mlp, {"include": "0.bias"}, ValueError, r"matches nothing that can be adapted \(0.bias: 1-D: not a matrix\)"),
    (lambda: nn.LayerNorm(8), {}, ValueError, "no parameter of this LayerNorm can be adapted"),
    (masked, {}, ValueError, "0.weight: already masked by a Sparsifier; finalize it first"),
    (adapted, {}, ValueError, "0 has adapters already; merge them first"),
    (
        taken,
        {},
        ValueError,
        "the adapter of parameter '0.weight' is to have the name 'weight_lora_b', but its Linear",
    ),
    (lambda: mlp().to("meta"), {}, ValueError, r"parameter '0.weight' is on the meta device"),
]


@pytest.mark.parametrize(("make", "options", "error", "message"), REFUSED)
def test_bad_input_is_named_and_the_model_stays_as_it_was(
    make: Callable[[], Any], options: dict[str, Any], error: type[Exception], message: str
) -> None:
    model = make()
    before = [(name, each.requires_grad) for name, each in model.named_parameters()] if model != 3 else []
    with pytest.raises(error, match=message):
        add_adapters(model, **{"rank": 2, **options})
    assert before == ([(name, each.requires_grad) for name, each in model.named_parameters()] if model != 3 else [])


def test_an_adapter_that_has_diverged_is_not_merged() -> None:
    model = adapted()
    with torch.no_grad():
        parameter(model, "2.weight_lora_b")[1, 1] = float("inf")
    before = {name: each.clone() for name, each in model.state_dict().items()}
    with pytest.raises(
        RuntimeError, match=r"parameter '2.weight' would not be finite with its adapter; it has diverged"
    ):
        merge_adapters(model)
    assert same(before, model)
    # Even so no pruned weight has a value.
    weight = parameter(model, "2.weight")
    assert bool((model[2].weight[weight == 0] == 0).all())  # type: ignore[index, union-attr]


def test_a_wrapped_or_averaged_model_is_merged_too() -> None:
    model = adapted()
    average = AveragedModel(model)
    wrapped = nn.Sequential(model)
    expected = model(data())
    for each in (average, wrapped):
        merge_adapters(each)
        assert torch.equal(each(data()), expected)
        assert all(parameter.requires_grad for parameter in each.parameters())
        assert not any("lora" in name or "frozen" in name for module in each.modules() for name in vars(module))


def test_data_parallel_is_refused() -> None:
    layer = cast(Any, adapted(lambda: nn.Linear(16, 24)))
    replica = layer._replicate_for_data_parallel()
    with pytest.raises(RuntimeError, match="DataParallel replicates no adapters; use DistributedDataParallel"):
        replica.weight = torch.ones(24, 16)
    with pytest.raises(RuntimeError, match="the adapted parameter 'weight' cannot be read"):
        replica(data())


def test_stacks_of_matrices_that_are_included_get_an_adapter_for_each() -> None:
    class Stack(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.matrices = nn.Parameter(torch.randn(3, 8, 12))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.matrices.mT

    model = Stack()
    Sparsifier(model, "3:4", include="matrices").finalize()
    add_adapters(model, 2, include="matrices")
    shapes = {name: tuple(each.shape) for name, each in model.named_parameters()}
    assert shapes == {"matrices": (3, 8, 12), "matrices_lora_a": (3, 2, 12), "matrices_lora_b": (3, 8, 2)}
    with torch.no_grad():
        parameter(model, "matrices_lora_b").normal_()
    x = torch.randn(3, 5, 12)
    expected = model(x)
    merge_adapters(model)
    assert torch.equal(model(x), expected)
    assert int((model.matrices == 0).sum()) == 3 * 8 * 12 // 4


def test_what_has_no_adapters_or_has_others_on_top_is_named() -> None:
    with pytest.raises(ValueError, match="this Sequential has no adapters; there is nothing to merge"):
        merge_adapters(mlp())
    model = adapted()
    model[0].__class__ = type("Other", (type(model[0]),), {})  # type: ignore[index]
    with pytest.raises(
        RuntimeError, match=r"parameter '0.weight' was given the class Other after its adapter was added"
    ):
        merge_adapters(model)
    model = adapted()
    with pytest.raises(RuntimeError, match="has an adapter: it can be neither deleted nor parametrized"):
        del model[0].weight  # type: ignore[index, union-attr]


def test_no_mask_is_put_on_an_adapted_weight() -> None:
    with pytest.raises(ValueError, match=r"0.weight: has an adapter; merge_adapters first"):
        Sparsifier(adapted(), "2:4")
    with pytest.raises(ValueError, match=r"0.weight: has an adapter; merge_adapters first"):
        adaprune(adapted(), [data()], "2:4")


# --- what others do ---------------------------------------------------------------------------------------------------


def lora(layer: nn.Linear) -> Tensor:
    """The product of an adapter as PEFT's."""
    torch.manual_seed(3)
    return 2.0 * (torch.randn(layer.out_features, 4) @ torch.randn(4, layer.in_features))


def merge_in_place(layer: nn.Linear, delta: Tensor) -> None:
    """As PEFT merges by default."""
    layer.weight.data += delta


def merge_safely(layer: nn.Linear, delta: Tensor) -> None:
    """As PEFT merges with safe_merge=True."""
    merged = layer.weight.data.clone()
    merged += delta
    layer.weight.data = merged


MERGES = pytest.mark.parametrize("merge", [merge_in_place, merge_safely])


@MERGES
def test_a_lora_that_is_merged_under_a_mask_is_not_lost(merge: Callable[[nn.Linear, Tensor], None]) -> None:
    layer = nn.Linear(16, 24)
    sparsifier = Sparsifier(layer, "3:8", refresh_every=None)
    before, delta = layer.weight.detach().clone(), lora(layer)
    merge(layer, delta)
    expected = before + delta * (before != 0)
    torch.testing.assert_close(layer.weight.detach().clone(), expected)
    sparsifier.finalize()
    torch.testing.assert_close(layer.weight.detach(), expected)


@MERGES
def test_a_lora_that_is_merged_into_a_finalized_model_loses_all_zeros(
    merge: Callable[[nn.Linear, Tensor], None],
) -> None:
    layer = nn.Linear(16, 24)
    Sparsifier(layer, "3:8").finalize()
    merge(layer, lora(layer))
    assert int((layer.weight == 0).sum()) == 0


@MERGES
def test_a_lora_cannot_be_merged_under_an_adapter(merge: Callable[[nn.Linear, Tensor], None]) -> None:
    layer = adapted(lambda: nn.Linear(16, 24))
    with pytest.raises(RuntimeError, match="a change of it would be lost"):
        merge(cast(nn.Linear, layer), torch.ones(24, 16))


@pytest.mark.parametrize("scheme", ["tensor", "symmetric", "channel"])
def test_fake_quantisation_after_finalize_keeps_every_zero(scheme: str) -> None:
    layer = nn.Linear(16, 24)
    Sparsifier(layer, "3:8").finalize()
    weight = layer.weight.detach() + 0.1 * (layer.weight.detach() != 0)
    low, high = weight.aminmax(dim=1) if scheme == "channel" else weight.aminmax()
    if scheme == "symmetric":
        low, high = -weight.abs().max(), weight.abs().max()
    for bits in (2, 4, 8):
        step = (high - low).clamp(min=1e-6) / (2**bits - 1)
        point = (-low / step).round().clamp(0, 2**bits - 1).to(torch.int32)
        if scheme == "channel":
            found = torch.fake_quantize_per_channel_affine(weight, step, point, 0, 0, 2**bits - 1)
        else:
            found = torch.fake_quantize_per_tensor_affine(weight, step, point, 0, 2**bits - 1)
        assert bool((found[weight == 0] == 0).all())
        assert ms.is_valid_mask((found != 0).numpy(), 3, 8)


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated", "ignore:Please use quant_min and quant_max")
@pytest.mark.parametrize(
    ("scheme", "keeps"),
    [
        ("per_tensor_affine", True),
        ("per_tensor_symmetric", True),
        ("per_channel_affine", True),
        ("per_channel_symmetric", True),
        ("per_channel_affine_float_qparams", False),
    ],
)
def test_observers_of_torch_find_quantisations_that_keep_zeros_but_for_those_with_floats(
    scheme: str, keeps: bool
) -> None:
    quantization = pytest.importorskip("torch.ao.quantization")
    layer = nn.Linear(16, 24)
    Sparsifier(layer, "3:8").finalize()
    observer = quantization.PerChannelMinMaxObserver if "channel" in scheme else quantization.MinMaxObserver
    dtype = torch.qint8 if "symmetric" in scheme else torch.quint8
    low = -128 if "symmetric" in scheme else 0
    options = {"dtype": dtype, "qscheme": getattr(torch, scheme), **({"ch_axis": 0} if "channel" in scheme else {})}
    fake = quantization.FakeQuantize(observer=observer, quant_min=low, quant_max=low + 255, **options)
    found = fake(layer.weight)
    assert bool((found[layer.weight == 0] == 0).all()) is keeps


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated", "ignore:Please use quant_min and quant_max")
@pytest.mark.parametrize("keep", ["nothing", "masks", "adapters"])
def test_training_with_fake_quantisation_keeps_zeros_under_masks_and_adapters_alone(keep: str) -> None:
    quantization = pytest.importorskip("torch.ao.quantization")
    model = sparse(pattern="3:8").train()
    zeros = [int((model[k].weight == 0).sum()) for k in (0, 2)]  # type: ignore[index, operator, union-attr]
    model.qconfig = quantization.get_default_qat_qconfig("fbgemm")
    model = quantization.prepare_qat(model)
    sparsifier = Sparsifier(model, "3:8", refresh_every=None) if keep == "masks" else None
    if keep == "adapters":
        add_adapters(model, 4)
    optimizer = torch.optim.SGD([each for each in model.parameters() if each.requires_grad], 0.05)
    for _ in range(3):
        (model(data()) - 1).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    if sparsifier is not None:
        sparsifier.finalize()
    if keep == "adapters":
        merge_adapters(model)
    left = [int((model[k].weight_fake_quant(model[k].weight) == 0).sum()) for k in (0, 2)]
    if keep == "nothing":
        assert left[0] < zeros[0]
    else:
        assert all(each >= before for each, before in zip(left, zeros, strict=True))
        assert ms.is_valid_mask((model[0].weight != 0).numpy(), 3, 8)
