"""The surroundings of a training loop: low precision, compilation, accumulation, scaling, averages, copies."""

import copy
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

import masksolve.torch
from masksolve.torch import Sparsifier, finalize
from masksolve.torch._training.masking import GRADIENTS, Gradient
from tests import oracle
from tests.torch.masked import held


def test_the_public_face_is_these_names() -> None:
    assert masksolve.torch.__all__ == [
        "AdaPruneReport",
        "AdapterReport",
        "Conversion",
        "DecaySearch",
        "LayerRecord",
        "ParameterReport",
        "PermuteReport",
        "PermutedAxis",
        "PrunedLayer",
        "RefinedBlock",
        "RefreshRecord",
        "Sparsifier",
        "acceleration_reason",
        "adaprune",
        "add_adapters",
        "cubic_schedule",
        "finalize",
        "find_decay",
        "merge_adapters",
        "minimum_variance_unbiased",
        "patterns_from_zeros",
        "permute_model",
        "semi_structured",
        "sparse_state_dict",
    ]
    assert all(getattr(masksolve.torch, name).__doc__ for name in masksolve.torch.__all__)


def mlp(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 24, dtype=dtype), nn.ReLU(), nn.Linear(24, 8, dtype=dtype))


def data(step: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(8, 16, generator=torch.Generator().manual_seed(step)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_weights_of_every_float_train_under_optimal_masks(dtype: torch.dtype) -> None:
    model = mlp(dtype)
    sparsifier = Sparsifier(model, "3:8", refresh_every=1)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for step in range(2):
        optimizer.zero_grad()
        model(data(step, dtype)).square().mean().backward()
        optimizer.step()
        sparsifier.step()
    weight, mask = held(model[0])
    assert model[0].weight.dtype == dtype
    assert oracle.is_optimal(weight.detach().double().numpy(), mask.numpy(), 3, 8)


def test_changing_the_dtype_of_the_model_keeps_its_masks() -> None:
    model = mlp()
    sparsifier = Sparsifier(model, "2:4")
    mask = held(model[0])[1].clone()
    model.to(torch.bfloat16)
    assert held(model[0])[1].dtype == torch.bool
    assert torch.equal(held(model[0])[1], mask)
    sparsifier.refresh()
    sparsifier.finalize()
    assert model[0].weight.dtype == torch.bfloat16


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_autocast_sees_sparse_weights_and_the_dense_ones_get_float32_gradients(gradient: Gradient) -> None:
    model = mlp()
    Sparsifier(model, "1:4", gradient=gradient)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(data(0))
    assert out.dtype == torch.bfloat16
    out.float().square().mean().backward()
    weight, _ = held(model[0])
    assert weight.grad is not None
    assert weight.grad.dtype == torch.float32
    reference = copy.deepcopy(model)
    finalize(reference)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(reference(data(0)), out)


@contextmanager
def compiling() -> Iterator[None]:
    torch._dynamo.reset()
    with warnings.catch_warnings():
        # Dynamo itself makes an instance of every autograd function that it traces.
        warnings.filterwarnings("ignore", r".*autograd\.function\.Function.* should not be instantiated")
        yield
    torch._dynamo.reset()


def compiled_training(model: nn.Module, gradient: Gradient, backend: Any) -> list[float]:
    """The losses of training with a refresh at every other step, another decay halfway, and a dense end if it can."""
    until = None if gradient == "soft" else 7
    sparsifier = Sparsifier(model, "3:4", refresh_every=2, until=until, gradient=gradient)
    optimizer = torch.optim.SGD(model.parameters(), 0.3)
    run = model if backend is None else torch.compile(model, backend=backend, fullgraph=True)
    losses = []
    for step in range(8):
        if step == 4:
            sparsifier.decay = 0.1
        optimizer.zero_grad()
        loss = run(data(step)).square().mean()
        loss.backward()
        optimizer.step()
        sparsifier.step()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_in_one_graph_that_no_refresh_compiles_again(backend: str, gradient: Gradient) -> None:
    with compiling():
        counter = CompileCounterWithBackend(backend)
        losses = compiled_training(mlp(), gradient, counter)
        assert counter.frame_count == 1
    assert losses == pytest.approx(compiled_training(mlp(), gradient, None), rel=1e-5)


OF_ONE_CLASS_COMPILED_ONCE = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 8)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 16)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.layer(inputs).relu()  # type: ignore[no-any-return]


@pytest.mark.skipif(not OF_ONE_CLASS_COMPILED_ONCE, reason="before PyTorch 2.8 each block is compiled for itself")
def test_blocks_that_are_compiled_one_by_one_share_what_is_compiled() -> None:
    """One class for all masked layers of a kind: with a class for each, all would be compiled again, up to a limit."""
    model = nn.Sequential(*[Block() for _ in range(10)])
    Sparsifier(model, "2:4")
    with compiling():
        counter = CompileCounterWithBackend("eager")
        for block in model:
            block.compile(backend=counter)
        with torch.no_grad():
            found = model(data(0))
        assert counter.frame_count == 1
    plain = copy.deepcopy(model)
    finalize(plain)
    torch.testing.assert_close(plain(data(0)), found)


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_gives_the_same_gradients(reentrant: bool, gradient: Gradient) -> None:
    grads = []
    for checkpointed in (False, True):
        model = mlp()
        Sparsifier(model, "2:4", gradient=gradient, decay=0.5)
        inputs = data(0).requires_grad_()
        output = checkpoint(model, inputs, use_reentrant=reentrant) if checkpointed else model(inputs)
        output.square().sum().backward()
        grads.append([each.grad for each in model.parameters()])
    torch.testing.assert_close(*grads)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor compiles C++")
def test_inductor_trains_the_same() -> None:
    with compiling():
        warnings.simplefilter("ignore")
        losses = compiled_training(mlp(), "sr-ste", "inductor")
    assert losses == pytest.approx(compiled_training(mlp(), "sr-ste", None), rel=1e-4)


def test_accumulated_gradients_are_those_of_the_whole_batch() -> None:
    grads = []
    for parts in (1, 4):
        model = mlp()
        sparsifier = Sparsifier(model, "2:4", refresh_every=1)
        mask = held(model[0])[1].clone()
        for part in data(0).chunk(parts):
            (model(part).square().mean() / parts).backward()
            assert torch.equal(held(model[0])[1], mask)
        grads.append(held(model[0])[0].grad)
        sparsifier.step()
        assert sparsifier.steps == 1
    torch.testing.assert_close(*grads)


def test_a_scaler_that_skips_its_first_steps_is_no_mistake() -> None:
    """The weights stand still, and the gradients may be gone when step() is called."""
    model = mlp()
    sparsifier = Sparsifier(model, "2:4", refresh_every=1)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    before = held(model[0])[0].detach().clone()
    for step in range(12):
        scaler.scale(model(data(step) * 100).square().mean()).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        record = sparsifier.step()
        assert record is not None
        if step == 0:
            assert torch.equal(held(model[0])[0], before)
    assert not torch.equal(held(model[0])[0], before)
    assert bool(held(model[0])[0].isfinite().all())


def test_gradient_scaling_does_not_change_the_gradients() -> None:
    grads = []
    for enabled in (False, True):
        model = mlp()
        Sparsifier(model, "2:4")
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=enabled)
        scaler.scale(model(data(0)).square().mean()).backward()
        scaler.unscale_(optimizer)
        grads.append(held(model[0])[0].grad)
    torch.testing.assert_close(*grads)


def test_an_average_has_the_average_of_the_dense_weights_under_the_masks_of_the_model() -> None:
    model = mlp()
    sparsifier = Sparsifier(model, "2:4", refresh_every=1)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    expected = None
    for step in range(3):
        optimizer.zero_grad()
        model(data(step)).square().mean().backward()
        optimizer.step()
        sparsifier.step()
        average.update_parameters(model)
        weight = held(model[0])[0].detach().clone()
        expected = weight if expected is None else (expected + weight) / 2
    assert expected is not None
    weight, mask = held(average.module[0])
    torch.testing.assert_close(weight.detach(), expected)
    assert torch.equal(mask, held(model[0])[1])
    assert mask is not held(model[0])[1]
    finalize(average)
    assert sorted(average.module.state_dict()) == sorted(mlp().state_dict())
    assert torch.equal(average.module[0].weight, torch.where(mask, expected, 0))


def test_a_copy_in_training_goes_its_own_way() -> None:
    model = mlp()
    Sparsifier(model, "2:4")
    twin = copy.deepcopy(model)
    optimizer = torch.optim.SGD(twin.parameters(), 0.5)
    twin(data(0)).square().mean().backward()
    optimizer.step()
    assert not torch.equal(held(twin[0])[0], held(model[0])[0])
    assert held(model[0])[0].grad is None
    finalize(twin)
    sparsifier = Sparsifier(twin, "1:4")
    assert sparsifier.steps == 0


def test_finalizing_a_copy_leaves_the_model_and_other_copies_as_they_were() -> None:
    model = mlp()
    sparsifier = Sparsifier(model, "2:4")
    expected = model(data(0))
    twin, other = copy.deepcopy(model), copy.deepcopy(model)
    finalize(twin)
    for each in (model, other, twin):
        torch.testing.assert_close(each(data(0)), expected)
    sparsifier.finalize()
    assert [type(module) for module in model.modules()] == [type(module) for module in mlp().modules()]
    assert torch.equal(other(data(0)), expected)


def test_a_model_state_dict_carries_the_masks() -> None:
    model, other = mlp(), mlp()
    Sparsifier(model, "2:4")
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(torch.randn_like(parameter))
    Sparsifier(other, "2:4")
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(data(0)), model(data(0)))


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.RMSprop])
def test_any_optimizer_trains(optimizer: Any) -> None:
    model = mlp()
    sparsifier = Sparsifier(model, "2:4", refresh_every=2)
    chosen = optimizer(model.parameters(), lr=1e-2)
    losses = []
    for step in range(30):
        chosen.zero_grad()
        loss = (model(data(step)) - 1).square().mean()
        loss.backward()
        chosen.step()
        sparsifier.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]


def test_an_optimizer_made_before_and_one_made_after_train_the_same() -> None:
    weights = []
    for early in (True, False):
        model = mlp()
        optimizer = torch.optim.SGD(model.parameters(), 0.5) if early else None
        sparsifier = Sparsifier(model, "2:4", refresh_every=1)
        optimizer = optimizer or torch.optim.SGD(model.parameters(), 0.5)
        for step in range(3):
            optimizer.zero_grad()
            model(data(step)).square().mean().backward()
            optimizer.step()
            sparsifier.step()
        weights.append(held(model[0])[0].detach())
    assert torch.equal(*weights)
