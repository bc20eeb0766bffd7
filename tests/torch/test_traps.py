"""Traps: silent errors where masks move parameters or hand out copies; here it is right, or reported."""

import copy
import io
import pickle
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jacfwd, jacrev, jvp, stack_module_state, vmap

from masksolve import solve_matrix
from masksolve.torch import Sparsifier
from masksolve.torch._training.masking import GRADIENTS, Gradient, masked_parameter
from tests.torch.masked import held


def mlp(seed: int = 0) -> nn.Sequential:
    """Two layers of one shape, whose optimizer states could be exchanged unnoticed."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))


def data(step: int = 0) -> Tensor:
    return torch.randn(8, 16, generator=torch.Generator().manual_seed(step))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, sparsifier: Sparsifier, steps: range) -> list[int]:
    """Steps after which masks were refreshed."""
    refreshed = []
    for step in steps:
        model(data(step)).square().mean().backward()
        optimizer.step()
        if sparsifier.step() is not None:
            refreshed.append(sparsifier.last_refresh.step)
        optimizer.zero_grad()
    return refreshed


def test_masks_leave_every_parameter_its_name_and_place() -> None:
    model = mlp()
    before = list(model.named_parameters())
    sparsifier = Sparsifier(model, "2:4")
    assert [(name, id(each)) for name, each in model.named_parameters()] == [(name, id(each)) for name, each in before]
    assert set(mlp().state_dict()) <= set(model.state_dict())
    sparsifier.finalize()
    assert [(name, id(each)) for name, each in model.named_parameters()] == [(name, id(each)) for name, each in before]


def test_groups_by_name_find_masked_weights() -> None:
    model = mlp()
    sparsifier = Sparsifier(model, "2:4", refresh_every=None)
    weights = [each for name, each in model.named_parameters() if name.endswith(".weight")]
    before = [each.detach().clone() for each in weights]
    train(model, torch.optim.SGD(weights, 0.1), sparsifier, range(1))
    assert len(weights) == 2
    assert not any(torch.equal(each, old) for each, old in zip(weights, before, strict=True))


@pytest.mark.parametrize("optimizer_first", [True, False])
def test_a_saved_optimizer_state_belongs_to_the_same_parameters_in_any_order_of_making(optimizer_first: bool) -> None:
    def make(optimizer_first: bool) -> tuple[nn.Module, torch.optim.Optimizer, Sparsifier]:
        model = mlp()
        early = torch.optim.Adam(model.parameters(), 0.01) if optimizer_first else None
        sparsifier = Sparsifier(model, "2:4")
        return model, early or torch.optim.Adam(model.parameters(), 0.01), sparsifier

    model, optimizer, sparsifier = make(optimizer_first)
    train(model, optimizer, sparsifier, range(2))
    twin, other, _ = make(not optimizer_first)
    twin.load_state_dict(model.state_dict())
    other.load_state_dict(optimizer.state_dict())
    for one, two in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(optimizer.state[one]["exp_avg"], other.state[two]["exp_avg"])


def without(model: nn.Module, left_out: str, **options: Any) -> torch.optim.Optimizer:
    chosen = [each for name, each in model.named_parameters() if name != left_out]
    return torch.optim.Adam(chosen, 0.01, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [{}, {"foreach": True}, {"fused": True}], ids=str)
def test_a_masked_weight_that_no_step_changes_is_named_at_the_first_step(
    options: dict[str, Any], dtype: torch.dtype
) -> None:
    model = mlp().to(dtype)
    sparsifier = Sparsifier(model, "2:4")
    optimizer = without(model, "2.weight", **options)
    model(data().to(dtype)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    with pytest.warns(UserWarning, match=r"changed other parameters, but not '2.weight', which got gradients"):
        sparsifier.step()
    # Once.
    model(data().to(dtype)).sum().backward()
    optimizer.step()
    sparsifier.step()


def frozen(model: nn.Module) -> torch.optim.Optimizer:
    model[2].weight.requires_grad_(False)  # type: ignore[index]
    return without(model, "2.weight")


def without_learning_rate(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(
        [{"params": model[0].parameters(), "lr": 0.1}, {"params": model[2].parameters(), "lr": 0.0}]  # type: ignore[index]
    )


class BehindTheBack(torch.optim.SGD):
    """As optimizers with kernels of their own: some parameters change without a new version."""

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for index, parameter in enumerate(group["params"]):
                if index % 2:
                    parameter.data.sub_(parameter.grad)
                else:
                    with torch.no_grad():
                        parameter.sub_(parameter.grad)


@pytest.mark.parametrize(
    "make", [frozen, without_learning_rate, lambda model: BehindTheBack(model.parameters(), 1.0)], ids=range(3)
)
def test_weights_that_are_meant_to_stand_still_or_change_unseen_are_not_named(
    make: Callable[[nn.Module], torch.optim.Optimizer],
) -> None:
    model = mlp()
    sparsifier = Sparsifier(model, "2:4")
    train(model, make(model), sparsifier, range(3))


def test_steps_of_a_fused_optimizer_that_16_bits_round_away_are_not_taken_for_none() -> None:
    model = mlp().bfloat16()
    for name, parameter in model.named_parameters():
        nn.init.ones_(parameter) if name.endswith("weight") else nn.init.zeros_(parameter)
    sparsifier = Sparsifier(model, "3:8", ragged="allow")
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4, fused=True)
    for _ in range(2):
        model(data().bfloat16()).square().mean().backward()
        optimizer.step()
        sparsifier.step()
        optimizer.zero_grad()
    # Biases moved, unseen by their version; weights, of which the step is below the rounding, stand still.
    assert bool((model[0].bias != 0).any())
    assert bool((held(model[0])[0] == 1).all())


class Master(torch.optim.AdamW):
    """Trains float32 copies of parameters, and writes them back."""

    def __init__(self, parameters: Any, rate: float) -> None:
        self.parameters = list(parameters)
        self.copies = [nn.Parameter(each.detach().float()) for each in self.parameters]
        super().__init__(self.copies, rate)

    def step(self, closure: Any = None) -> None:
        for each, own in zip(self.parameters, self.copies, strict=True):
            own.grad = None if each.grad is None else each.grad.float()
        super().step()
        for each, own in zip(self.parameters, self.copies, strict=True):
            each.data.copy_(own.data)


def test_steps_of_master_weights_that_16_bits_round_away_are_not_taken_for_none() -> None:
    model = mlp().bfloat16()
    for name, parameter in model.named_parameters():
        nn.init.ones_(parameter) if name.endswith("weight") else nn.init.zeros_(parameter)
    sparsifier = Sparsifier(model, "3:8")
    optimizer = Master(model.parameters(), 1e-4)
    model(data().bfloat16()).square().mean().backward()
    optimizer.step()
    sparsifier.step()
    assert bool((model[0].bias != 0).any())


def test_optimizers_step_while_sparsifiers_come_and_go() -> None:
    model = mlp()
    sparsifier = Sparsifier(model, "3:8")
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    other = Sparsifier(mlp(), "3:8")
    hook = optimizer.register_step_pre_hook(lambda *_: other.finalize())
    model(data()).sum().backward()
    optimizer.step()
    hook.remove()
    sparsifier.step()


def test_a_first_step_that_a_scaler_skips_is_not_judged_but_the_next_one_is() -> None:
    model = mlp()
    sparsifier = Sparsifier(model, "2:4")
    optimizer = without(model, "2.weight")
    nn.init.ones_(model[0].bias)
    for step in range(3):
        model(data()).sum().backward()
        if step < 2:
            sparsifier.step()
        optimizer.zero_grad()
    model(data()).sum().backward()
    optimizer.step()
    with pytest.warns(UserWarning, match="'2.weight'"):
        sparsifier.step()


def unfreeze(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    model(data()).sum().backward()
    for parameter in model.parameters():
        parameter.grad = None


def by_autograd(model: nn.Module) -> None:
    parameters = list(model.parameters())
    torch.autograd.grad(model(data()).sum(), parameters)


def head_apart(model: nn.Module) -> None:
    with torch.no_grad():
        features = model(data())
    nn.Linear(16, 2)(features).sum().backward()


def new_head(model: nn.Module) -> None:
    model.requires_grad_(False)
    model.append(nn.Linear(16, 2))  # type: ignore[operator]
    model(data()).sum().backward()
    model.zero_grad()


def compiled(model: nn.Module) -> None:
    torch.compile(model, backend="aot_eager")(data()).sum().backward()
    model.zero_grad()


@pytest.mark.filterwarnings("ignore:.*should not be instantiated")
@pytest.mark.parametrize("begin", [unfreeze, by_autograd, head_apart, new_head, compiled])
@pytest.mark.parametrize("is_frozen", [True, False])
def test_a_step_after_any_kind_of_training_is_no_mistake(begin: Callable[[nn.Module], None], is_frozen: bool) -> None:
    if is_frozen and begin in (by_autograd, compiled):
        is_frozen = False
    model = mlp().requires_grad_(not is_frozen)
    sparsifier = Sparsifier(model, "2:4")
    begin(model)
    sparsifier.step()
    assert sparsifier.steps == 1


def clamp(weight: Tensor) -> None:
    with torch.no_grad():
        weight.clamp_(-0.05, 0.05)


def multiply(weight: Tensor) -> None:
    weight.data *= 3


def add_to_data(weight: Tensor) -> None:
    weight.data.add_(2.0)


def assign_data(weight: Tensor) -> None:
    weight.data = torch.linspace(1, 2, 256).view(16, 16)


def assign_what_was_read(weight: Tensor) -> None:
    weight.data = weight.data.contiguous()
    weight.data = weight.data


def assign_rows(weight: Tensor) -> None:
    with torch.no_grad():
        weight[2:4] = 7.0
        weight[:, 1].mul_(5)
        weight.t()[3].zero_()
        for row in weight.chunk(2):
            row[0].fill_(-1)


def initialise(weight: Tensor) -> None:
    torch.manual_seed(1)
    nn.init.kaiming_uniform_(weight)
    nn.init.trunc_normal_(weight.data, std=0.3)


def into_out(weight: Tensor) -> None:
    with torch.no_grad():
        torch.mul(torch.ones(16, 16), 3.0, out=weight)


def into_several_outs(weight: Tensor) -> None:
    with torch.no_grad():
        torch.max(torch.arange(256.0).view(16, 16), 0, out=(weight[0], torch.empty(16, dtype=torch.long)))


def together(weight: Tensor) -> None:
    torch._foreach_mul_([weight.data], 2.0)


def through_a_shallow_copy(weight: Tensor) -> None:
    with torch.no_grad():
        copy.copy(weight).add_(3.0)


def set_memory(weight: Tensor) -> None:
    with torch.no_grad():
        weight.set_(torch.ones(16, 16))  # type: ignore[call-overload]


CHANGES = [clamp, multiply, add_to_data, assign_data, assign_what_was_read, assign_rows, initialise, into_out]
CHANGES += [into_several_outs, together, through_a_shallow_copy, set_memory]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("gradient", GRADIENTS)
def test_what_changes_a_masked_weight_in_place_changes_the_dense_one(
    gradient: Gradient, change: Callable[[Tensor], None]
) -> None:
    model, plain = mlp(), mlp()
    Sparsifier(model, "2:4", gradient=gradient)
    factor = masked_parameter(model[0], "weight").masked.factor.clone()  # type: ignore[union-attr]
    change(model[0].weight)
    change(plain[0].weight)
    assert torch.equal(held(model[0])[0], plain[0].weight)
    assert torch.equal(model[0].weight, plain[0].weight * factor)


def test_operators_on_the_attribute_change_the_dense_weight() -> None:
    model, plain = mlp(), mlp()
    Sparsifier(model, "2:4")
    parameter = held(model[0])[0]
    for each in (model, plain):
        with torch.no_grad():
            each[0].weight *= 2
            each[0].weight[3] += 1
        each[0].weight.data -= 0.5
    assert held(model[0])[0] is parameter
    assert torch.equal(parameter, plain[0].weight)


def test_what_was_read_follows_a_change_through_it() -> None:
    model = mlp()
    Sparsifier(model, "2:4")
    read = model[0].weight
    with torch.no_grad():
        read.fill_(3.0)
        read[0].fill_(4.0)
    assert torch.equal(read, model[0].weight)
    assert int((read == 3).sum()) == 15 * 8


def test_a_change_of_the_leaf_that_autograd_refuses_is_refused() -> None:
    model = mlp()
    Sparsifier(model, "2:4")
    with pytest.raises(RuntimeError, match="leaf Variable that requires grad"):
        model[0].weight.mul_(2)
    with pytest.raises(RuntimeError, match=r"dropout\(inplace=True\) of a masked parameter would change a copy"):
        nn.functional.dropout(model[0].weight, inplace=True)


def test_the_gradient_hooks_and_freezing_of_a_masked_weight_are_those_of_the_dense_one() -> None:
    model = mlp()
    Sparsifier(model, "2:4")
    seen: list[Tensor] = []
    model[0].weight.register_hook(seen.append)
    model(data()).sum().backward()
    parameter = held(model[0])[0]
    assert len(seen) == 1
    assert model[0].weight.grad is parameter.grad
    model[0].weight.grad = None
    assert parameter.grad is None
    model[0].weight.requires_grad_(False)
    assert not parameter.requires_grad
    model[0].weight.requires_grad = True
    assert parameter.requires_grad
    with torch.no_grad():
        assert model[0].weight.requires_grad
    assert not model[0].weight.detach().requires_grad


def take_grad_of_detached(read: Tensor) -> Tensor:
    return read.detach().requires_grad_()


def take_grad_of_data(read: Tensor) -> Tensor:
    values = read.data
    values.requires_grad = True
    return values


@pytest.mark.parametrize("take", [take_grad_of_detached, take_grad_of_data])
def test_detached_values_that_get_gradients_of_their_own_are_the_masked_ones(take: Callable[[Tensor], Tensor]) -> None:
    model = mlp()
    Sparsifier(model, "2:4")
    values = take(model[0].weight)
    output = nn.functional.linear(data(), values, model[0].bias)
    assert torch.equal(output, model[0](data()))
    output.sum().backward()
    assert values.grad is not None
    assert values.is_leaf
    assert held(model[0])[0].grad is None


def test_what_a_change_of_detached_values_returns_is_the_masked_values() -> None:
    model = mlp()
    Sparsifier(model, "2:4")
    for changed in (model[0].weight.detach().mul_(2), model[0].weight.data.clamp_(-0.1, 0.1)):
        assert int((changed != 0).sum()) == changed.numel() // 2
    assert torch.equal(changed, model[0].weight)


@pytest.mark.parametrize("is_trained", [True, False])
def test_a_parameter_made_of_a_masked_weight_is_a_plain_one_of_its_own(is_trained: bool) -> None:
    model = mlp()
    Sparsifier(model, "2:4")
    dense = held(model[0])[0].detach().clone()
    for read in (model[0].weight, model[0].weight.data, model[0].weight[:4]):
        made = nn.Parameter(read, requires_grad=is_trained)
        assert type(made) is nn.Parameter
        assert made.requires_grad is is_trained
        assert made.is_leaf
        assert torch.equal(made, read)
        assert not vars(made)
        with torch.no_grad():
            made.add_(1)
    assert torch.equal(held(model[0])[0], dense)


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_autograd_grad_of_the_attribute_is_that_of_the_parameter(gradient: Gradient) -> None:
    model = mlp()
    Sparsifier(model, "2:4", gradient=gradient)
    loss = model(data()).sum()
    wanted = torch.autograd.grad(loss, [held(model[0])[0], model[0].bias], retain_graph=True)
    got = torch.autograd.grad(loss, [model[0].weight, model[0].bias], retain_graph=True)
    (alone,) = torch.autograd.grad(loss, model[0].weight)
    assert all(map(torch.equal, got, wanted))
    assert torch.equal(alone, wanted[0])


def test_results_are_plain_tensors_and_what_is_saved_needs_no_masksolve() -> None:
    model = mlp()
    Sparsifier(model, "2:4")
    read = model[0].weight
    for result in (read * 2, read.sum(), read @ data().t(), model(data()), read.clone(), copy.deepcopy(read)):
        assert type(result) is Tensor
    rows = torch.zeros(4, *read.shape[1:])
    rows[:2] = read[:2]
    held(model[2])[0].detach()[2:4, : read.shape[1]] = read[2:4]
    assert torch.equal(rows[:2], read[:2])
    assert torch.equal(held(model[2])[0][2:4, : read.shape[1]], read[2:4])
    buffer = io.BytesIO()
    torch.save({"read": read, "detached": read.detach()}, buffer)
    assert b"masksolve" not in buffer.getvalue()
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=True)["read"], read)


class Scaled(Tensor):
    """Another subclass, that has a say in what is computed with it."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is nn.functional.linear:
            return "asked"
        return super().__torch_function__(func, types, args, kwargs or {})


def test_another_subclass_of_tensor_is_asked_too() -> None:
    model = mlp()
    Sparsifier(model, "2:4")
    assert model[0](data().as_subclass(Scaled)) == "asked"


def test_the_model_alone_brings_masks_and_steps_back() -> None:
    options: dict[str, Any] = {"refresh_every": 3, "until": 7}
    model = mlp()
    whole = Sparsifier(model, "2:4", **options)
    assert train(model, torch.optim.SGD(model.parameters(), 0.3), whole, range(8)) == [3, 6]
    half = mlp()
    train(half, torch.optim.SGD(half.parameters(), 0.3), Sparsifier(half, "2:4", **options), range(4))
    resumed = mlp(1)
    sparsifier = Sparsifier(resumed, "2:4", **options)
    resumed.load_state_dict(half.state_dict())
    assert sparsifier.steps == 4
    assert train(resumed, torch.optim.SGD(resumed.parameters(), 0.3), sparsifier, range(4, 8)) == [6]
    assert sparsifier.steps == 8
    assert all(torch.equal(value, resumed.state_dict()[key]) for key, value in model.state_dict().items())
    assert held(resumed[0])[1].all()


@pytest.mark.parametrize("model_first", [True, False])
def test_steps_are_not_counted_twice_where_model_and_sparsifier_are_both_loaded(model_first: bool) -> None:
    source, target = mlp(), mlp(1)
    saved = Sparsifier(source, "2:4", refresh_every=2)
    train(source, torch.optim.SGD(source.parameters(), 0.1), saved, range(3))
    sparsifier = Sparsifier(target, "2:4", refresh_every=2)
    loads = [
        lambda: target.load_state_dict(source.state_dict()),
        lambda: sparsifier.load_state_dict(saved.state_dict()),
    ]
    for load in loads if model_first else reversed(loads):
        load()
    assert sparsifier.steps == 3
    assert train(target, torch.optim.SGD(target.parameters(), 0.1), sparsifier, range(3, 5)) == [4]


def test_two_sparsifiers_of_a_model_count_apart() -> None:
    model = mlp()
    one, other = Sparsifier(model, "2:4", include="0.weight"), Sparsifier(model, "1:4", include="2.weight")
    train(model, torch.optim.SGD(model.parameters(), 0.1), one, range(1))
    assert (one.steps, other.steps) == (1, 0)
    other.step()
    one.finalize()
    other.step()
    assert (one.steps, other.steps) == (1, 2)


@pytest.mark.parametrize("compile_it", [False, True])
def test_a_weight_that_is_used_twice_decays_once(compile_it: bool) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(8, 8, bias=False)
    Sparsifier(layer, "2:4", gradient="sr-ste", decay=0.5)

    def twice(inputs: Tensor) -> Tensor:
        return layer(layer(inputs))  # type: ignore[no-any-return]

    run = torch.compile(twice, backend="aot_eager", fullgraph=True) if compile_it else twice
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*should not be instantiated")
        run(torch.zeros(1, 8)).sum().backward()
    weight, mask = held(layer)
    torch.testing.assert_close(weight.grad, torch.where(mask, 0, 0.5 * weight.detach()))


def clear_to_none(weight: nn.Parameter) -> None:
    weight.grad = None


def clear_to_zero(weight: nn.Parameter) -> None:
    assert weight.grad is not None
    weight.grad.zero_()


@pytest.mark.parametrize("clear", [clear_to_none, clear_to_zero])
@pytest.mark.parametrize("backwards", [1, 3])
def test_a_gradient_has_the_decay_once_however_many_backwards_it_takes(
    backwards: int, clear: Callable[[nn.Parameter], None]
) -> None:
    layer = nn.Linear(8, 8, bias=False)
    Sparsifier(layer, "3:8", gradient="sr-ste", decay=0.5)
    weight, mask = held(layer)
    inputs = torch.randn(6, 8)
    of_loss = torch.ones(8, 1) @ inputs.sum(0, keepdim=True)
    for _ in range(3):
        for part in inputs.chunk(backwards):
            layer(part).sum().backward()
        # A look at the gradient in between changes nothing.
        (looked,) = torch.autograd.grad(layer(inputs).sum(), [weight])
        torch.testing.assert_close(weight.grad, of_loss + torch.where(mask, 0, 0.5 * weight.detach()))
        assert looked.shape == weight.shape
        clear(weight)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated")
def test_what_is_unfrozen_later_decays_in_a_compiled_model_too() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
    model[0].weight.requires_grad_(False)
    sparsifier = Sparsifier(model, "3:8", gradient="sr-ste", decay=0.5, refresh_every=None)
    run = torch.compile(model, backend="eager")
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(3):
        run(torch.ones(1, 8)).sum().backward()
        optimizer.step()
        sparsifier.step()
    model[0].weight.requires_grad_(True)
    sparsifier.step()
    optimizer.zero_grad()
    run(torch.zeros(1, 8)).sum().backward()
    weight, mask = held(model[0])
    torch.testing.assert_close(weight.grad, torch.where(mask, 0, 0.5 * weight.detach()))


def test_a_tied_layer_can_be_copied_by_itself() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].weight = model[0].weight
    Sparsifier(model, "3:8", gradient="sr-ste", decay=0.5)
    for twin in (copy.deepcopy(model[1]), pickled(model[1])):
        weight, mask = held(twin)
        assert torch.equal(weight * mask, model[1].weight)
        twin(torch.zeros(1, 8)).sum().backward()
        torch.testing.assert_close(weight.grad, torch.where(mask, 0, 0.5 * weight.detach()))


def test_attention_is_read_in_several_threads() -> None:
    attention = nn.MultiheadAttention(16, 2)
    Sparsifier(attention, "3:8")
    inputs = data()[:, None]
    expected = attention(inputs, inputs, inputs)[0].detach()

    def run(_: int) -> bool:
        with torch.no_grad():
            return torch.equal(attention(inputs, inputs, inputs)[0], expected)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(run, range(600)))


@pytest.mark.parametrize("how", [copy.deepcopy, lambda model: pickled(model)], ids=["deepcopy", "pickle"])
def test_copies_decay_too(how: Callable[[nn.Module], nn.Module]) -> None:
    layer = nn.Linear(8, 8, bias=False)
    Sparsifier(layer, "2:4", gradient="sr-ste", decay=0.5)
    twin = how(layer)
    twin(torch.zeros(1, 8)).sum().backward()
    weight, mask = held(twin)
    torch.testing.assert_close(weight.grad, torch.where(mask, 0, 0.5 * weight.detach()))
    assert held(layer)[0].grad is None


def pickled(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)  # type: ignore[no-any-return]


@pytest.mark.parametrize("accelerate", [False, True])
def test_a_masked_model_can_be_pickled_whole(accelerate: bool) -> None:
    model = nn.Sequential(mlp(), nn.MultiheadAttention(16, 2), nn.LSTM(16, 16))
    sparsifier = Sparsifier(model, "2:4", accelerate=accelerate)
    twin = pickled(model)
    assert [type(each) for each in twin.modules()] == [type(each) for each in model.modules()]
    assert torch.equal(twin[0](data()), model[0](data()))
    sparsifier.finalize(twin)
    assert type(twin[0][0]) is nn.Linear  # type: ignore[index]
    assert sparsifier.steps == 0
    sparsifier.finalize()


def test_the_schedule_can_be_changed_at_any_time() -> None:
    model = mlp()
    sparsifier = Sparsifier(model, "2:4", refresh_every=None)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    assert train(model, optimizer, sparsifier, range(2)) == []
    sparsifier.refresh_every = 2
    assert train(model, optimizer, sparsifier, range(2, 4)) == [4]
    sparsifier.until = 5
    assert (sparsifier.refresh_every, sparsifier.until) == (2, 5)
    train(model, optimizer, sparsifier, range(4, 6))
    assert held(model[0])[1].all()
    # Dense masks are those of the final phase, and may be loaded.
    model.load_state_dict(model.state_dict())
    sparsifier.until = None
    weight, mask = held(model[0])
    assert torch.equal(mask, torch.from_numpy(solve_matrix(weight.detach().numpy(), 2, 4)))


def test_nothing_else_can_be_set_and_nothing_is_ignored() -> None:
    sparsifier = Sparsifier(mlp(), "2:4")
    for name in ("refresh_evry", "pattern", "gradient", "importance", "steps", "last_refresh"):
        with pytest.raises(
            AttributeError, match=rf"no attribute '{name}' that can be set to 7, as decay, refresh_every, "
        ):
            setattr(sparsifier, name, 7)
    with pytest.raises(ValueError, match="refresh_every must be at least 1, got 0"):
        sparsifier.refresh_every = 0
    assert sparsifier.refresh_every == 40


def test_finalizing_a_copy_by_its_sparsifier_leaves_the_model_in_training() -> None:
    model = mlp()
    sparsifier = Sparsifier(model, "2:4", refresh_every=1)
    average = copy.deepcopy(model)
    sparsifier.finalize(average)
    assert list(average.state_dict()) == list(mlp().state_dict())
    assert float((average[0].weight != 0).float().mean()) == 0.5
    assert train(model, torch.optim.SGD(model.parameters(), 0.1), sparsifier, range(1)) == [1]
    sparsifier.finalize(nn.Sequential(model))
    with pytest.raises(RuntimeError, match="this Sparsifier is finalized"):
        sparsifier.finalize()


def test_a_copy_of_a_masked_module_inside_of_the_model_is_refused() -> None:
    """As PEFT makes one with `modules_to_save`."""
    model = mlp()
    sparsifier = Sparsifier(model, "3:8")
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    train(model, optimizer, sparsifier, range(1))
    model.append(copy.deepcopy(model[2]))

    def become_dense() -> None:
        sparsifier.until = 2
        try:
            sparsifier.step()
        finally:
            sparsifier.until = None

    calls: list[Callable[[], object]] = [sparsifier.refresh, become_dense]
    for call in calls:
        with pytest.raises(RuntimeError, match=r"'3.weight' is in a copy of a masked module, whose mask this Spars"):
            call()
    # One that does not train is no mistake, and finalized with the model.
    model[3].requires_grad_(False)
    sparsifier.refresh()
    sparsifier.finalize()
    assert list(model.state_dict()) == list(nn.Sequential(*mlp(), nn.Linear(16, 16)).state_dict())
    assert float((model[3].weight != 0).float().mean()) == 0.375


def test_a_copy_of_a_masked_module_is_refused_at_the_first_step() -> None:
    model = mlp()
    sparsifier = Sparsifier(model, "3:8")
    model.append(copy.deepcopy(model[2]))
    model(data()).sum().backward()
    with pytest.raises(RuntimeError, match=r"'3.weight' is in a copy"):
        sparsifier.step()


def test_a_sparsifier_and_its_model_are_copied_together() -> None:
    model = mlp()
    two = Sparsifier(model, "3:8", include="0.weight"), Sparsifier(model, "1:4", include="2.weight")
    twin, (sparsifier, other) = copy.deepcopy((model, two))
    before = held(model[0])[1].clone()
    nn.init.normal_(twin[0].weight)
    assert sparsifier.refresh().layers[0].sad > 0
    assert torch.equal(held(model[0])[1], before)
    assert other.refresh().layers[0].name == "2.weight"
    sparsifier.finalize()
    assert type(twin[0]) is nn.Linear


def test_modules_of_several_masked_weights_are_copied_with_their_sparsifier() -> None:
    model = nn.ModuleList([nn.LSTM(16, 16), nn.MultiheadAttention(16, 2, kdim=8, vdim=8)])
    twin, sparsifier = copy.deepcopy((model, Sparsifier(model, "3:8")))
    assert len(sparsifier.refresh().layers) == 6
    sparsifier.finalize()
    assert [type(each) for each in twin] == [nn.LSTM, nn.MultiheadAttention]


@pytest.mark.parametrize("trains", [True, False])
def test_a_layer_may_be_replaced_by_its_own_copy(trains: bool) -> None:
    """As where the best of several states is kept as a copy."""
    model = mlp()
    sparsifier = Sparsifier(model, "3:8", refresh_every=1)
    model[2] = copy.deepcopy(model[2]).requires_grad_(trains)
    train(model, torch.optim.SGD(model.parameters(), 0.1), sparsifier, range(2))
    assert sparsifier.last_refresh.layers[1].name == "2.weight"
    sparsifier.finalize()
    assert list(model.state_dict()) == list(mlp().state_dict())
    assert float((model[2].weight != 0).float().mean()) == 0.375


def test_a_frozen_average_inside_of_the_model_is_finalized_with_it() -> None:
    model = mlp()
    sparsifier = Sparsifier(model, "3:8", refresh_every=1)
    model.average = copy.deepcopy(model).requires_grad_(False)
    sparsifier.refresh()
    sparsifier.finalize()
    assert b"masksolve" not in pickle.dumps(model)
    assert [type(each) for each in model.average] == [type(each) for each in mlp()]


def test_a_shallow_copy_of_a_module_has_the_masks_of_the_module() -> None:
    layer = nn.Linear(16, 16)
    Sparsifier(layer, "3:8")
    twin = copy.copy(layer)
    before, after = masked_parameter(layer, "weight"), masked_parameter(twin, "weight")
    assert before is not None
    assert after is not None
    assert before.masked is after.masked
    assert not before.masked.is_copy


def test_a_layer_that_was_removed_is_not_taken_for_the_next_one() -> None:
    model = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
    sparsifier = Sparsifier(model, {"0": "1:4", "*": "2:4"})
    del model[0]
    with pytest.raises(RuntimeError, match=r"'0.weight' is not masked any more: its module was removed"):
        sparsifier.refresh()
    assert [float(each.weight.count_nonzero()) for each in model] == [32, 32]


def test_a_layer_that_was_wrapped_is_masked_on() -> None:
    """As by PEFT: the layer has another name, and in-place changes reach it."""

    class Adapted(nn.Module):
        def __init__(self, layer: nn.Module) -> None:
            super().__init__()
            self.base_layer = layer

        def forward(self, inputs: Tensor) -> Tensor:
            return self.base_layer(inputs)  # type: ignore[no-any-return]

    model = mlp()
    sparsifier = Sparsifier(model, "2:4", refresh_every=1)
    model[0] = Adapted(model[0])
    assert train(model, torch.optim.SGD(model.parameters(), 0.1), sparsifier, range(1)) == [1]
    model[0].base_layer.weight.data += torch.ones(16, 16)  # type: ignore[union-attr, operator]
    sparsifier.finalize()
    assert float((model[0].base_layer.weight != 0).float().mean()) == 0.5  # type: ignore[union-attr, operator]


def plain(model: nn.Sequential, masks: dict[str, Tensor], gradient: Gradient) -> Callable[..., Tensor]:
    """The model spelled out, with a function of each weight in its place."""

    def run(weights: dict[str, Tensor], inputs: Tensor) -> Tensor:
        found = dict(weights)
        for name, mask in masks.items():
            masked = weights[name] * mask
            found[name] = masked if gradient == "masked" else weights[name] + (masked - weights[name]).detach()
        hidden = nn.functional.linear(inputs, found["0.weight"], found["0.bias"]).relu()
        return nn.functional.linear(hidden, found["2.weight"], found["2.bias"])

    return run


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is")
@pytest.mark.parametrize("gradient", ["ste", "masked"])
def test_transformations_of_torch_func_pass_through_the_mask(gradient: Gradient) -> None:
    model = mlp().double()
    Sparsifier(model, "2:4", gradient=gradient)
    masks = {f"{k}.weight": held(model[k])[1] for k in (0, 2)}
    weights = {name: each.detach() for name, each in model.named_parameters()}
    expected, inputs = plain(model, masks, gradient), data().double()

    def found(weights: dict[str, Tensor], inputs: Tensor) -> Tensor:
        return functional_call(model, weights, (inputs,))  # type: ignore[no-any-return]

    def compare(transform: Callable[[Callable[..., Tensor]], Any]) -> None:
        torch.testing.assert_close(transform(found), transform(expected))

    tangents = {name: torch.randn_like(each) for name, each in weights.items()}
    compare(lambda f: f(weights, inputs))
    compare(lambda f: vmap(f, (None, 0))(weights, inputs))
    compare(lambda f: jvp(lambda w: f(w, inputs), (weights,), (tangents,)))
    compare(lambda f: jvp(lambda x: f(weights, x), (inputs,), (data(1).double(),)))
    compare(lambda f: vmap(grad(lambda w, x: f(w, x).square().sum()), (None, 0))(weights, inputs))
    compare(lambda f: jacfwd(lambda w: f({**weights, "0.weight": w}, inputs))(weights["0.weight"]))
    compare(lambda f: jacrev(lambda w: f({**weights, "0.weight": w}, inputs))(weights["0.weight"]))


def test_an_ensemble_of_masked_models_runs_under_vmap() -> None:
    models = [mlp(seed) for seed in range(3)]
    for model in models:
        Sparsifier(model, "2:4")
    parameters, buffers = stack_module_state(models)  # type: ignore[arg-type]
    inputs = data()
    found = vmap(lambda p, b: functional_call(models[0], (p, b), (inputs,)))(parameters, buffers)
    torch.testing.assert_close(found, torch.stack([model(inputs) for model in models]))


@pytest.mark.filterwarnings("ignore:`torch.jit", "ignore:.*deprecated")
def test_torch_script_asks_for_finalized_models() -> None:
    model = mlp()
    sparsifier = Sparsifier(model, "2:4")
    with pytest.raises(RuntimeError, match=r"torch.jit.script cannot compile this Linear .* its weight; finalize the"):
        torch.jit.script(model)
    expected = model(data())
    assert torch.equal(torch.jit.trace(model, data())(data()), expected)
    sparsifier.finalize()
    assert torch.equal(torch.jit.script(model)(data()), expected)


# Dynamo itself makes an instance of every autograd function that it traces.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated")
def test_an_exported_model_computes_with_the_masked_weights() -> None:
    model = mlp()
    Sparsifier(model, "2:4")
    for strict in (True, False):
        exported = torch.export.export(model, (data(),), strict=strict).module()
        torch.testing.assert_close(exported(data()), model(data()))


def test_a_replica_of_data_parallel_computes_with_the_masked_weights() -> None:
    layer = nn.Linear(16, 16)
    Sparsifier(layer, "2:4")
    replica = layer._replicate_for_data_parallel()  # type: ignore[no-untyped-call]
    for name, parameter in layer.named_parameters():
        setattr(replica, name, parameter.clone())
    assert torch.equal(replica(data()), layer(data()))


def test_a_name_that_a_mask_would_take_is_refused() -> None:
    layer = nn.Linear(16, 16)
    layer.register_buffer("weight_mask", torch.ones(16, 16))
    with pytest.raises(
        ValueError, match="the mask of parameter 'weight' is to be the buffer 'weight_mask', but its Linear"
    ):
        Sparsifier(layer, "2:4")


def test_a_parameter_that_was_taken_away_is_not_read_dense() -> None:
    layer = nn.Linear(16, 16)
    Sparsifier(layer, "2:4")
    del vars(layer)["_masked"]
    with pytest.raises(RuntimeError, match="masked parameter 'weight' cannot be read"):
        layer(data())
    del layer._parameters["weight"]
    with pytest.raises(RuntimeError, match="'weight' is masked by a Sparsifier and was taken away"):
        layer.weight = torch.ones(16, 16)  # type: ignore[assignment]
