"""The gradients of a masked weight, against their closed forms."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck

from masksolve.torch import Sparsifier, finalize
from masksolve.torch._training import masking
from masksolve.torch._training.masking import GRADIENTS, Gradient, MaskedWeight, Shared, attach, masked_product
from tests.torch.masked import held

DECAY = 0.03


def any_mask(mask: Tensor) -> None:
    """Refuse no mask."""


def masked(weight: Tensor, mask: Tensor, gradient: Gradient) -> nn.Module:
    """A module whose `weight` is masked."""
    module = nn.Module()
    module.weight = nn.Parameter(weight.detach().clone())
    options: Any = {"mask": mask, "gradient": gradient, "decay": DECAY, "shared": Shared(), "fault": any_mask}
    attach(module, "weight", MaskedWeight(module, "weight", **options))
    return module


class _Read(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self) -> Tensor:
        return self.module.weight * 1


def closed_form(gradient: Gradient, grad: Tensor, mask: Tensor, weight: Tensor) -> Tensor:
    """The gradient of the dense weight for that of the masked one, spelled out entry by entry."""
    found = torch.empty_like(weight)
    for i, j in torch.cartesian_prod(*map(torch.arange, weight.shape)).tolist():
        kept = float(mask[i, j])
        g, w = float(grad[i, j]), float(weight[i, j])
        found[i, j] = {"ste": g, "sr-ste": g + DECAY * (1 - kept) * w, "masked": kept * g, "soft": g}[gradient]
    return found


def problem() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(5, 6, generator=generator, dtype=torch.float64)
    return weight, torch.randn(5, 6, generator=generator) > 0.2, torch.randn(5, 6, generator=generator).double()


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_the_dense_weight_gets_the_closed_form(gradient: Gradient) -> None:
    weight, mask, grad = problem()
    module = masked(weight, mask, gradient)
    module.weight.backward(grad)  # type: ignore[operator]
    torch.testing.assert_close(held(module)[0].grad, closed_form(gradient, grad, mask, weight), rtol=1e-7, atol=1e-9)


# PyTorch itself scripts formulas of forward derivatives.
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is")
def test_masked_is_the_derivative_of_masking() -> None:
    weight, mask, _ = problem()
    module = masked(weight, mask, "masked")

    def read(weight: Tensor) -> Tensor:
        return torch.func.functional_call(_Read(module), {"module.weight": weight}, ())  # type: ignore[no-any-return]

    assert gradcheck(read, weight.requires_grad_(), check_forward_ad=True)


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_a_loss_of_the_masked_weight_sends_its_numerical_gradient(gradient: Gradient) -> None:
    """The gradient that reaches the closed form is that of the loss at the masked weight, by central differences."""
    weight, mask, _ = problem()

    def loss(masked: Tensor) -> Tensor:
        return (masked.sin() * torch.arange(30.0, dtype=torch.float64).view(5, 6)).sum()

    at = torch.where(mask, weight, 0)
    numerical = torch.empty_like(at)
    for k in range(at.numel()):
        step = torch.zeros(at.numel(), dtype=torch.float64)
        step[k] = 1e-6
        numerical.view(-1)[k] = (loss(at + step.view_as(at)) - loss(at - step.view_as(at))) / 2e-6
    module = masked(weight, mask, gradient)
    loss(module.weight).backward()  # type: ignore[arg-type]
    torch.testing.assert_close(
        held(module)[0].grad, closed_form(gradient, numerical, mask, weight.detach()), rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_pruned_weights_stand_still_under_masked_only(gradient: Gradient) -> None:
    torch.manual_seed(0)
    model = nn.Linear(8, 8)
    sparsifier = Sparsifier(model, "1:4", gradient=gradient, refresh_every=None)
    weight, mask = held(model)
    before = weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.ones(2, 8)).square().sum().backward()
        optimizer.step()
        sparsifier.step()
    stood_still = bool((weight[~mask] == before[~mask]).all())
    assert stood_still == (gradient == "masked")
    assert not (weight[mask] == before[mask]).any()


def test_decay_pulls_pruned_weights_to_zero() -> None:
    model = nn.Linear(8, 8, bias=False)
    Sparsifier(model, "2:4", gradient="sr-ste", decay=0.5)
    weight, mask = held(model)
    model(torch.zeros(1, 8)).sum().backward()
    torch.testing.assert_close(weight.grad, torch.where(mask, 0, 0.5 * weight.detach()))


def test_the_decay_can_be_set_for_scaled_gradients() -> None:
    """Four backwards under a loss scale of 1024 give what one gives, once unscaled."""
    x = torch.randn(8, 8)
    grads = []
    for parts, scale in ((1, 1.0), (4, 1024.0)):
        torch.manual_seed(0)
        model = nn.Linear(8, 8)
        sparsifier = Sparsifier(model, "3:4", gradient="sr-ste", decay=0.5)
        assert sparsifier.decay == 0.5
        sparsifier.decay = 0.5 * scale
        for part in x.chunk(parts):
            (scale * model(part).square().sum()).backward()
        grad = held(model)[0].grad
        assert grad is not None
        grads.append(grad / scale)
    torch.testing.assert_close(*grads)


def test_a_tied_weight_decays_once() -> None:
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
    model[1].weight = model[0].weight
    Sparsifier(model, "2:4", gradient="sr-ste", decay=0.5)
    weight, mask = held(model[0])
    model(torch.zeros(1, 8)).sum().backward()
    torch.testing.assert_close(weight.grad, torch.where(mask, 0, 0.5 * weight.detach()))


def test_under_frozen_masks_of_0_and_1_all_gradients_train_the_same_model() -> None:
    kept = []
    for gradient in (each for each in GRADIENTS if each != "soft"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 8))
        sparsifier = Sparsifier(model, "3:8", gradient=gradient, decay=0.1, refresh_every=None)
        optimizer = torch.optim.AdamW(model.parameters(), 0.01, weight_decay=0.1)
        for _ in range(5):
            optimizer.zero_grad()
            model(torch.ones(2, 16)).square().sum().backward()
            optimizer.step()
            sparsifier.step()
        sparsifier.finalize()
        kept.append(model.state_dict())
    for other in kept[1:]:
        assert all(torch.equal(kept[0][name], value) for name, value in other.items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_masking_is_the_product_of_weight_and_mask(dtype: torch.dtype) -> None:
    weight, mask = torch.randn(24, 3, 5).to(dtype), torch.rand(24, 3, 5) > 0.6
    for one, other in ((weight, mask), (weight[:, 1:], mask[:, 1:]), (weight.mT, mask.mT)):
        found = masked_product(one, other)
        assert found.dtype == dtype
        assert found.stride() == (one * other).stride()
        assert torch.equal(found, torch.where(other, one, 0))


def test_attention_masks_each_weight_once_in_a_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    layer, inputs = nn.MultiheadAttention(16, 2, batch_first=True), torch.randn(2, 4, 16)
    Sparsifier(layer, "3:8")
    shapes: list[tuple[int, ...]] = []

    def noting(weight: Tensor, mask: Tensor) -> Tensor:
        shapes.append(tuple(weight.shape))
        return masked_product(weight, mask)

    monkeypatch.setattr(masking, "masked_product", noting)
    found, _ = layer(inputs, inputs, inputs)
    assert sorted(shapes) == [(16, 16), (48, 16)]
    # Only while it runs.
    with torch.no_grad():
        layer.in_proj_weight.mul_(2)
    doubled, _ = layer(inputs, inputs, inputs)
    assert not torch.equal(doubled, found)
    with pytest.raises(AssertionError, match="embedding dimension"):
        layer(inputs[..., 1:], inputs, inputs)
    plain = copy.deepcopy(layer)
    finalize(plain)
    torch.testing.assert_close(plain(inputs, inputs, inputs)[0], doubled)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is")
def test_masked_gradients_have_gradients() -> None:
    layer = nn.Linear(8, 8, bias=False).double()
    Sparsifier(layer, "3:8", gradient="masked")
    weight, mask = held(layer)
    inputs = torch.randn(4, 8, dtype=torch.double)

    def output(of: Tensor) -> Tensor:
        return (inputs @ masking._apply(masking._Masking, of, mask).t()).tanh()

    assert torch.autograd.gradcheck(output, weight, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(output, weight)
    torch.testing.assert_close(layer(inputs).tanh(), output(weight))
