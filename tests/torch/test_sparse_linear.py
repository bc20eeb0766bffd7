"""Products under a 2:4 mask: on sparse tensor cores, as here imitated on the CPU, or dense; why, in words."""

import copy
import re
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import masksolve as ms
from masksolve.torch import Sparsifier, acceleration_reason, finalize
from masksolve.torch._training import sparse_linear
from masksolve.torch._training.masking import GRADIENTS, Gradient, masked_parameter
from masksolve.torch._training.sparse_linear import _multiply, _obstacles, masked_linear, sparse_product
from tests.tables import spread

HOPPER = ("cuda", 0, (128, 64), torch.bfloat16)
REFUSAL = sparse_linear._refusal.__wrapped__
EVERY_DTYPE = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

# Here _cslt_compress and _cslt_sparse_mm have to be imitated before it is called.
sparse_product.register_kernel("cpu")(_multiply)


def compress(matrix: Tensor) -> Tensor:
    """The first two of every four whose bits are not all zero, -0.0 among them, as a dense matrix."""
    assert matrix.is_contiguous()
    groups = matrix.unflatten(1, (-1, 4))
    is_value = (groups != 0) | torch.signbit(groups)
    return torch.where(is_value & (is_value.cumsum(-1) <= 2), groups, 0).flatten(1)


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Sparse tensor cores that are none, for any float and for small matrices; the packed matrices are noted."""
    packed: list[Tensor] = []

    def multiply(matrix: Tensor, columns: Tensor, *, transpose_result: bool) -> Tensor:
        assert transpose_result
        assert columns.shape[1] % 8 == 0
        assert columns.t().is_contiguous()
        assert columns.data_ptr() % 16 == 0
        packed.append(matrix.clone())
        return (matrix @ columns).t().contiguous()

    monkeypatch.setattr(torch, "_cslt_compress", compress)
    monkeypatch.setattr(torch, "_cslt_sparse_mm", multiply)
    monkeypatch.setattr(sparse_linear, "_DEVICE", "cpu")
    monkeypatch.setattr(sparse_linear, "_refusal", lambda index: None)
    monkeypatch.setattr(sparse_linear, "_DTYPES", EVERY_DTYPE)
    monkeypatch.setattr(sparse_linear, "_MULTIPLE", 8)
    return packed


def mlp(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 24, dtype=dtype), nn.ReLU(), nn.Linear(24, 8, bias=False, dtype=dtype))


def data(step: int = 0) -> Tensor:
    return torch.randn(6, 16, generator=torch.Generator().manual_seed(step))


def masked(layer: nn.Module) -> Any:
    return masked_parameter(layer, "weight")[1]  # type: ignore[index]


def dense_weight(layer: nn.Module) -> nn.Parameter:
    return masked_parameter(layer, "weight")[0]  # type: ignore[index]


def grads(model: nn.Module) -> list[Tensor]:
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


def training(accelerate: bool, backend: Any = None, parts: int = 1, **options: Any) -> tuple[list[float], nn.Module]:
    """The losses of five steps with a refresh at every other one, and the model."""
    model = mlp()
    sparsifier = Sparsifier(model, "2:4", refresh_every=2, accelerate=accelerate, **options)
    optimizer = torch.optim.SGD(model.parameters(), 0.3)
    run = model if backend is None else torch.compile(model, backend=backend, fullgraph=True)
    losses = []
    for step in range(5):
        optimizer.zero_grad()
        for part in data(step).chunk(parts):
            loss = run(part).square().mean() / parts
            loss.backward()
            losses.append(float(loss.detach()))
        optimizer.step()
        sparsifier.step()
    return losses, model


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("shape", [(16,), (1, 16), (6, 16), (2, 3, 16)], ids=str)
def test_packed_products_and_their_gradients_are_the_masked_dense_ones(
    shape: tuple[int, ...], gradient: Gradient, products: list[Tensor]
) -> None:
    outputs = []
    for accelerate in (False, True):
        model = mlp(torch.float64)
        Sparsifier(model, "2:4", gradient=gradient, accelerate=accelerate)
        inputs = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
        assert products == []
        output = model(inputs)
        output.square().sum().backward()
        outputs.append((output, inputs.grad, *grads(model)))
    torch.testing.assert_close(*outputs)
    # Both layers, forward and backward.
    assert len(products) == 4


def test_what_needs_no_gradient_is_not_computed(products: list[Tensor]) -> None:
    model = mlp()
    Sparsifier(model, "2:4", accelerate=True)
    model(data()).sum().backward()
    assert len(products) == 3
    with torch.no_grad():
        model(data())
    assert len(products) == 5


@pytest.mark.parametrize(
    ("thin", "is_packed"), [("2:4", True), ("1:2", True), ("2:8", True), ("3:4", False), ("4:8", False)]
)
@pytest.mark.parametrize("pattern", ["2:4", "4:8"])
def test_the_product_with_thinned_gradients_is_packed_where_two_of_four_are_kept(
    pattern: str, thin: str, is_packed: bool, products: list[Tensor]
) -> None:
    found = []
    for accelerate in (False, True):
        model = mlp()
        Sparsifier(model, pattern, accelerate=accelerate, gradient_sparsity=thin)
        torch.manual_seed(3)
        # 13 tokens, which no group divides.
        model(torch.randn(13, 16)).square().sum().backward()
        found.append(grads(model))
    torch.testing.assert_close(*found)
    assert len(products) == (3 if pattern == "2:4" else 0) + (2 if is_packed else 0)


def test_gradients_are_those_of_the_product(products: list[Tensor]) -> None:
    weight = torch.randn(8, 16, dtype=torch.float64)
    mask = torch.from_numpy(ms.solve_matrix(weight.numpy(), 2, 4))

    def product(inputs: Tensor, dense: Tensor) -> Tensor:
        return masked_linear(inputs, dense * mask)

    inputs = torch.randn(3, 16, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(product, (inputs, weight.requires_grad_())) is True
    assert torch.autograd.gradgradcheck(product, (inputs, weight)) is True
    assert len(products) > 2


@pytest.mark.parametrize("rows", [1, 7, 8, 9])
def test_rows_are_filled_up_and_aligned_and_no_negative_zero_is_packed(rows: int, products: list[Tensor]) -> None:
    weight = -torch.rand(16, 24) - 1
    weight = weight * torch.from_numpy(ms.solve_matrix(weight.numpy(), 2, 4))
    assert torch.signbit(weight[weight == 0]).all()
    inputs = torch.randn(rows * 24 + 1)[1:].view(rows, 24)
    torch.testing.assert_close(masked_linear(inputs, weight), functional.linear(inputs, weight))
    torch.testing.assert_close(masked_linear(inputs[:, :16], weight.t()), inputs[:, :16] @ weight)
    assert not torch.signbit(products[0][products[0] == 0]).any()


def test_every_product_packs_the_weights_as_they_are(products: list[Tensor]) -> None:
    model = nn.Linear(16, 8)
    sparsifier = Sparsifier(model, "2:4", refresh_every=None, accelerate=True)

    def assert_up_to_date() -> None:
        products.clear()
        output = model(data())
        (packed,) = products
        assert torch.equal(packed, dense_weight(model).detach() * masked(model).mask + 0.0)
        torch.testing.assert_close(output, functional.linear(data(), model.weight, model.bias))

    assert_up_to_date()
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    model(data()).sum().backward()
    optimizer.step()
    assert_up_to_date()
    dense_weight(model).data.mul_(-3)
    assert_up_to_date()
    sparsifier.refresh()
    assert_up_to_date()
    other = nn.Linear(16, 8)
    state = Sparsifier(other, "2:4").state_dict()
    model.load_state_dict(other.state_dict())
    assert_up_to_date()
    sparsifier.load_state_dict(state)
    assert_up_to_date()


@pytest.mark.parametrize("options", [{}, {"parts": 3}, {"until": 4}, {"gradient": "sr-ste"}, {"saturated": False}])
def test_a_training_is_that_of_masked_dense_products(options: dict[str, Any], products: list[Tensor]) -> None:
    expected, _ = training(False, **options)
    found, model = training(True, **options)
    assert found == pytest.approx(expected, rel=1e-5)
    # The first layer has no gradient of its inputs, and a dense phase no packed form.
    assert len(products) == 3 * (4 if "until" in options else 5) * options.get("parts", 1)
    finalize(model)


@pytest.fixture
def compiling() -> Iterator[None]:
    torch._dynamo.reset()
    with warnings.catch_warnings():
        # Dynamo itself makes an instance of every autograd function that it traces.
        warnings.filterwarnings("ignore", r".*autograd\.function\.Function.* should not be instantiated")
        yield
    torch._dynamo.reset()


@pytest.mark.parametrize(("backend", "until"), spread(["eager", "aot_eager"], [None, 4], one_in=2))
def test_compiled_in_one_graph_that_only_the_dense_phase_compiles_again(
    backend: str, until: int | None, products: list[Tensor], compiling: None
) -> None:
    counter = CompileCounterWithBackend(backend)
    found, _ = training(True, counter, until=until)
    assert counter.frame_count == (1 if until is None else 2)
    assert len(products) == 3 * (5 if until is None else 4)
    assert found == pytest.approx(training(False, until=until)[0], rel=1e-5)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_for_any_number_of_rows(backend: str, products: list[Tensor], compiling: None) -> None:
    warnings.simplefilter("ignore")
    model = mlp()
    Sparsifier(model, "2:4", accelerate=True)
    run = torch.compile(model, backend=backend, fullgraph=True, dynamic=True)
    for rows in (3, 8, 9):
        inputs = torch.randn(rows, 16)
        torch.testing.assert_close(run(inputs), model(inputs))
    assert len(products) == 3 * 2 * 2


def test_a_compiled_graph_follows_masks_that_are_loaded(products: list[Tensor], compiling: None) -> None:
    model, other = nn.Linear(16, 8), nn.Linear(16, 8)
    Sparsifier(model, "2:4", accelerate=True, until=9)
    run = torch.compile(model, backend="eager", fullgraph=True)
    run(data())
    assert len(products) == 1
    # As in the dense phase.
    Sparsifier(other, "4:4")
    model.load_state_dict(other.state_dict())
    assert torch.equal(run(data()), other(data()))
    assert len(products) == 1


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("compiled", [False, True])
def test_under_autocast_products_are_in_its_dtype_and_gradients_in_that_of_the_weights(
    compiled: bool, gradient: Gradient, products: list[Tensor], compiling: None
) -> None:
    found = []
    for accelerate in (False, True):
        model = mlp()
        Sparsifier(model, "2:4", gradient=gradient, accelerate=accelerate)
        run = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled and accelerate else model
        with torch.autocast("cpu", torch.bfloat16):
            output = run(data())
        assert output.dtype == torch.bfloat16
        output.float().square().mean().backward()
        found.append((output.float(), *grads(model)))
    assert all(grad.dtype == torch.float32 for grad in found[1])
    torch.testing.assert_close(*found, rtol=2**-6, atol=2**-7)
    assert [each.dtype for each in products] == [torch.bfloat16] * 3


def test_copies_and_averages_pack_what_they_hold(products: list[Tensor]) -> None:
    model = mlp()
    sparsifier = Sparsifier(model, "2:4", refresh_every=1, until=2, accelerate=True)
    twin = copy.deepcopy(model)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    for step in range(3):
        model(data(step)).sum().backward()
        sparsifier.step()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(-1.5)
        average.update_parameters(model)
        for each in (model, twin, average.module):
            plain = copy.deepcopy(each)
            finalize(plain)
            torch.testing.assert_close(each(data()), plain(data()))
    assert acceleration_reason(twin[0]) == "accelerated"
    # The dense phase of the model is that of its average.
    for each in (model, average.module):
        assert (
            "as transposable 2:4 masks do; this one keeps up to 4 along rows and 4 along columns"
            in acceleration_reason(each[0])
        )
        products.clear()
        each(data())
        assert products == []


def test_a_copy_notices_masks_that_are_written_through_data(products: list[Tensor], compiling: None) -> None:
    """As averages do that write `buffer.data`, which leaves the version as it was."""
    model = nn.Linear(16, 8)
    Sparsifier(model, "2:4", accelerate=True)
    average = copy.deepcopy(model)
    average(data())
    assert len(products) == 1
    average.weight_mask.data.copy_(torch.ones(8, 16, dtype=torch.bool))
    assert torch.equal(average(data()), functional.linear(data(), dense_weight(average), average.bias))
    assert len(products) == 1
    run = torch.compile(copy.deepcopy(model), backend="eager", fullgraph=True)
    torch.testing.assert_close(run(data()), functional.linear(data(), model.weight, model.bias))


def test_finalize_removes_every_trace(products: list[Tensor]) -> None:
    model = mlp()
    before = [(type(module), sorted(vars(module))) for module in model.modules()]
    sparsifier = Sparsifier(model, "2:4", accelerate=True)
    expected = model(data())
    sparsifier.finalize()
    assert [(type(module), sorted(vars(module))) for module in model.modules()] == before
    products.clear()
    torch.testing.assert_close(model(data()), expected)
    assert products == []
    assert list(model.state_dict()) == list(mlp().state_dict())


def of_any_structure(scores: Tensor, pattern: ms.Pattern) -> Tensor:
    return scores.abs() > scores.abs().median()


@pytest.mark.parametrize(
    ("pattern", "options", "is_packed"),
    [
        ("2:4", {}, True),
        ("2:4", {"method": "greedy"}, True),
        ("1:4", {}, True),
        ("1:2", {}, True),
        ("3:4", {}, False),
        ("4:8", {}, False),
        ("2:4", {"method": of_any_structure}, False),
    ],
)
def test_only_masks_that_hold_two_of_four_are_packed(
    pattern: str, options: dict[str, Any], is_packed: bool, products: list[Tensor]
) -> None:
    model = nn.Linear(16, 24)
    Sparsifier(model, pattern, accelerate=True, **options)
    output = model(data())
    assert bool(products) == is_packed
    assert (acceleration_reason(model) == "accelerated") == is_packed
    torch.testing.assert_close(output, functional.linear(data(), model.weight, model.bias))


def test_a_weight_that_is_not_the_masked_one_is_not_packed(products: list[Tensor]) -> None:
    model = nn.Linear(16, 8)
    Sparsifier(model, "2:4", accelerate=True)
    model.__class__ = nn.Linear
    assert torch.equal(model(data()), functional.linear(data(), model.weight, model.bias))
    assert products == []
    assert "no weight that a Sparsifier masks" in acceleration_reason(model)
    with pytest.raises(TypeError, match=r"module must be a torch\.nn\.Module, got str"):
        acceleration_reason("model")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "inputs", [torch.ones(2, 12), torch.ones(2, 16, dtype=torch.float64), torch.ones(2, 16, device="meta")]
)
def test_inputs_that_a_linear_layer_refuses_are_refused_in_its_words(inputs: Tensor, products: list[Tensor]) -> None:
    messages = []
    for accelerate in (False, True):
        model = mlp()[0]
        Sparsifier(model, "2:4", accelerate=accelerate)
        with pytest.raises(RuntimeError) as error:
            model(inputs)
        messages.append(str(error.value))
    assert messages[0] == messages[1]


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_nested_inputs_are_taken_as_before(layout: torch.layout, products: list[Tensor]) -> None:
    model = mlp()
    Sparsifier(model, "2:4", accelerate=True)
    nested = torch.nested.nested_tensor([data(0)[:2], data(1)], layout=layout)
    for found, inputs in zip(model(nested).unbind(), (data(0)[:2], data(1)), strict=True):
        torch.testing.assert_close(found, model(inputs))


def test_no_inputs_give_no_outputs(products: list[Tensor]) -> None:
    model = mlp()
    Sparsifier(model, "2:4", accelerate=True)
    assert model(torch.ones(0, 16)).shape == (0, 8)


def test_on_a_cpu_it_is_the_masked_dense_product() -> None:
    outputs = []
    for accelerate in (False, True):
        model = mlp()
        sparsifier = Sparsifier(model, "2:4", refresh_every=1, accelerate=accelerate)
        output = model(data())
        output.sum().backward()
        sparsifier.step()
        outputs.append((output, *grads(model), *model.state_dict().values()))
        assert acceleration_reason(model[0]).startswith("not accelerated: ")
    for plain, accelerated in zip(*outputs, strict=True):
        assert torch.equal(plain, accelerated)


class Doubled(nn.Linear):
    def forward(self, inputs: Tensor) -> Tensor:
        return 2 * super().forward(inputs)


def test_layers_that_are_no_plain_linear_compute_what_they_did(products: list[Tensor]) -> None:
    model = nn.ModuleList([Doubled(16, 16), nn.Conv1d(16, 16, 1), nn.MultiheadAttention(16, 2, batch_first=True)])
    plain = copy.deepcopy(model)
    Sparsifier(model, "2:4", accelerate=True)
    Sparsifier(plain, "2:4")
    inputs = torch.randn(2, 16, 16)
    for one, other in zip(model, plain, strict=True):
        arguments = (inputs,) * (3 if isinstance(one, nn.MultiheadAttention) else 1)
        found, expected = one(*arguments), other(*arguments)
        assert torch.equal(found[0], expected[0])
    assert products == []
    assert "keeps" not in acceleration_reason(model[1])
    for layer, name in [(model[0], "Doubled"), (model[1], "Conv1d"), (model[2].out_proj, "NonDynamicallyQ")]:
        assert re.search(rf"only the forward of nn.Linear is known, this {name}", acceleration_reason(layer))
    assert "no weight that a Sparsifier masks" in acceleration_reason(model[2])


def test_without_accelerate_the_reason_says_so(products: list[Tensor]) -> None:
    model = mlp()
    Sparsifier(model, "2:4")
    assert acceleration_reason(model[0]).startswith("not accelerated: the Sparsifier was made without accelerate=True")
    model(data())
    assert products == []


def test_masks_that_move_with_their_model_are_looked_at() -> None:
    model = nn.Linear(16, 8)
    Sparsifier(model, "2:4", accelerate=True)
    assert not masked(model).is_packable
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sparse_linear, "_DEVICE", "cpu")
        model.to(torch.bfloat16)
    assert masked(model).is_packable


def test_what_suits_is_accelerated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparse_linear, "_refusal", lambda index: None)
    assert _obstacles(*HOPPER) == []


@pytest.mark.parametrize(
    ("position", "value", "words"),
    [
        (0, "cpu", "need a CUDA device, the weight is on cpu"),
        (1, 1, "cuda:1 is out of order"),
        (2, (128, 72), r"multiples of 64, its shape is \(128, 72\)"),
        (2, (64,), "has to be a matrix"),
        (3, torch.float32, "not torch.float32"),
    ],
)
def test_each_obstacle_is_named_with_what_was_given(
    position: int, value: object, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sparse_linear, "_refusal", lambda index: f"cuda:{index} is out of order" if index else None)
    case: list[Any] = [*HOPPER]
    case[position] = value
    (reason,) = _obstacles(*case)
    assert re.search(words, reason)


def test_every_reason_is_given_at_once() -> None:
    layer = nn.Linear(12, 20)
    Sparsifier(layer, "4:8")
    reason = acceleration_reason(layer)
    words = ("not accelerated", "accelerate=True", "cpu", "as transposable 2:4 masks do", "float32", "(20, 12)")
    assert all(word in reason for word in words)
    with torch.autocast("cpu", torch.bfloat16):
        assert "float32" not in acceleration_reason(layer)


def refusal(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], is_available: bool) -> str | None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: is_available)
    return REFUSAL(0)


def test_a_gpu_is_asked_for_a_product(products: list[Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    assert refusal(monkeypatch, (7, 5), True) == "sparse tensor cores come with compute capability 8.0, cuda:0 has 7.5"
    assert refusal(monkeypatch, (9, 0), False) == "this build of PyTorch has no cuSPARSELt"
    assert products == []
    monkeypatch.setattr(sparse_linear, "_MULTIPLE", 64)
    assert refusal(monkeypatch, (9, 0), True) is None
    with torch.autocast("cpu", torch.float16):
        assert refusal(monkeypatch, (9, 0), True) is None
    assert len(products) == 2
    monkeypatch.setattr(sparse_linear, "pack", compress)
    assert refusal(monkeypatch, (9, 0), True) == "cuSPARSELt computes a wrong product on cuda:0"
    monkeypatch.setattr(torch, "_cslt_sparse_mm", broken)
    assert refusal(monkeypatch, (9, 0), True) == "cuSPARSELt refuses cuda:0: architecture mismatch"


def broken(*arguments: Any, **options: Any) -> Tensor:
    raise RuntimeError("architecture mismatch\nand a trace")


on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")


def gpu_layers(dtype: torch.dtype, product: torch.dtype) -> tuple[nn.Linear, nn.Linear]:
    """The same layer twice, masked dense and accelerated; skips where it cannot be."""
    torch.manual_seed(0)
    plain = nn.Linear(128, 256, device="cuda", dtype=dtype)
    layer = copy.deepcopy(plain)
    Sparsifier(plain, "2:4")
    Sparsifier(layer, "2:4", accelerate=True)
    with torch.autocast("cuda", product):
        reason = acceleration_reason(layer)
    if reason != "accelerated":
        pytest.skip(reason)
    return plain, layer


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("weights", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_sparse_tensor_cores_compute_the_masked_dense_product(
    dtype: torch.dtype, weights: torch.dtype, compiled: bool, compiling: None
) -> None:
    results = []
    for layer in gpu_layers(weights, dtype):
        run = torch.compile(layer, fullgraph=True) if compiled else layer
        inputs = torch.randn(3, 41, 128, device="cuda", generator=torch.Generator("cuda").manual_seed(1))
        inputs = inputs.to(weights).requires_grad_()
        with torch.autocast("cuda", dtype):
            output = run(inputs)
        output.float().square().mean().backward()
        results.append((output, inputs.grad, *grads(layer)))
    for dense, sparse in zip(*results, strict=True):
        tolerance = 4 * torch.finfo(dtype).eps * float(dense.float().abs().max())
        torch.testing.assert_close(sparse, dense, rtol=0, atol=tolerance)


@pytest.mark.gpu
@on_gpu
def test_a_training_on_the_gpu_is_that_of_masked_dense_products() -> None:
    losses = []
    for layer in gpu_layers(torch.bfloat16, torch.bfloat16):
        optimizer = torch.optim.SGD(layer.parameters(), 0.1)
        found = []
        for step in range(6):
            generator = torch.Generator("cuda").manual_seed(step)
            inputs = torch.randn(64, 128, device="cuda", dtype=torch.bfloat16, generator=generator)
            loss = (layer(inputs) - 1).float().square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            found.append(float(loss.detach()))
        losses.append(found)
    assert losses[1] == pytest.approx(losses[0], rel=1e-2)
