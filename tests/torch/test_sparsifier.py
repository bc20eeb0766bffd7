"""The Sparsifier's life: attach, step, refresh, finalize, save and load."""

import copy
import io
import math
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import masksolve as ms
from masksolve.torch import RefreshRecord, Sparsifier, finalize
from tests import oracle, processes
from tests.tables import Pair, name_of
from tests.torch import masked

PATTERNS = [(2, 4), (1, 4), (3, 4), (4, 8), (2, 5)]


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3),
        nn.Flatten(),
        nn.Linear(64, 24),
        nn.Linear(24, 10),
    )


def images(seed: int = 0) -> Tensor:
    return torch.randn(4, 3, 4, 4, generator=torch.Generator().manual_seed(seed))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, sparsifier: Sparsifier | None, steps: range) -> list[Any]:
    records = []
    for step in steps:
        optimizer.zero_grad()
        model(images(step)).square().mean().backward()
        optimizer.step()
        if sparsifier is not None:
            records.append(sparsifier.step())
    return records


def sparse_names(sparsifier: Sparsifier) -> list[str]:
    return [line.name for line in sparsifier.report if line.sparse]


def effective(model: nn.Module, name: str) -> Tensor:
    path, _, attribute = name.rpartition(".")
    return getattr(model.get_submodule(path), attribute).detach()  # type: ignore[no-any-return]


def held(model: nn.Module, name: str) -> tuple[Tensor, Tensor]:
    """The dense weight and the mask."""
    path, _, attribute = name.rpartition(".")
    return masked.held(model.get_submodule(path), attribute)


def matrices(weight: Tensor) -> np.ndarray[Any, Any]:
    """(out, in, *kernel) as one matrix for each kernel position, spelled out."""
    flat = weight.detach().reshape(weight.shape[0], weight.shape[1], -1)
    return np.stack([flat[:, :, k].numpy() for k in range(flat.shape[2])])


def masks_of(model: nn.Module, sparsifier: Sparsifier) -> dict[str, Tensor]:
    return {name: held(model, name)[1].clone() for name in sparse_names(sparsifier)}


@pytest.mark.parametrize("pattern", PATTERNS, ids=name_of)
def test_every_effective_weight_is_the_dense_one_under_its_exact_mask(pattern: Pair) -> None:
    n, m = pattern
    model = net()
    sparsifier = Sparsifier(model, f"{n}:{m}", refresh_every=2)
    train(model, torch.optim.SGD(model.parameters(), 0.5), sparsifier, range(4))
    assert len(sparse_names(sparsifier)) == 3
    for name in sparse_names(sparsifier):
        weight, mask = held(model, name)
        assert torch.equal(effective(model, name), torch.where(mask, weight.detach(), 0))
        assert oracle.is_optimal(matrices(weight), matrices(mask), n, m)


@pytest.mark.parametrize("saturated", [True, False])
def test_masks_hold_exactly_n_or_at_most_n(saturated: bool) -> None:
    model = nn.Linear(24, 24)
    Sparsifier(model, "2:8", saturated=saturated)
    weight, mask = held(model, "weight")
    assert oracle.is_optimal(weight.detach().numpy(), mask.numpy(), 2, 8, saturated)


@pytest.mark.parametrize("method", ["greedy", "two-approx", "flow"])
def test_any_method_makes_valid_masks(method: str) -> None:
    model = nn.Linear(16, 16)
    sparsifier = Sparsifier(model, "1:4", method=method)
    assert ms.is_valid_mask(held(model, "weight")[1].numpy(), 1, 4)
    assert sparsifier.refresh().layers[0].sad == 0


def test_a_callable_method_may_make_masks_of_any_structure() -> None:
    def half(scores: Tensor, pattern: ms.Pattern) -> Tensor:
        return scores.abs() > scores.abs().median()

    model = nn.Linear(16, 16)
    Sparsifier(model, "2:4", method=half)
    assert int(held(model, "weight")[1].sum()) == 128


def test_parameters_stay_the_same_objects_from_before_attaching_until_after_finalizing() -> None:
    model = net()
    before = [id(p) for p in model.parameters()]
    sparsifier = Sparsifier(model, "2:4")
    assert {id(p) for p in model.parameters()} == set(before)
    sparsifier.finalize()
    assert [id(p) for p in model.parameters()] == before


def test_finalize_leaves_a_plain_model_of_the_same_outputs_keys_and_classes() -> None:
    model = net()
    keys, classes = list(model.state_dict()), [type(module) for module in model.modules()]
    sparsifier = Sparsifier(model, "3:4", refresh_every=1)
    train(model, torch.optim.SGD(model.parameters(), 0.1), sparsifier, range(3))
    expected, names = model(images()), sparse_names(sparsifier)
    sparsifier.finalize()
    assert torch.equal(model(images()), expected)
    assert list(model.state_dict()) == keys
    assert [type(module) for module in model.modules()] == classes
    assert [vars(module).keys() for module in model.modules()] == [vars(module).keys() for module in net().modules()]
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())  # type: ignore[attr-defined]
    for name in names:
        nonzero = matrices(effective(model, name) != 0)
        assert oracle.is_valid(nonzero, 3, 4, saturated=False)
        assert nonzero.mean() == 0.75
        assert not torch.signbit(effective(model, name)[effective(model, name) == 0]).any()


def test_a_finalized_checkpoint_loads_without_masksolve() -> None:
    model = net()
    Sparsifier(model, "2:4").finalize()
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    script = """
import io, sys, torch
state = torch.load(io.BytesIO(bytes.fromhex(sys.stdin.read())), weights_only=True)
print("masksolve" in sys.modules, *state)
"""
    printed = processes.run(script, stdin=buffer.getvalue().hex())
    assert printed.split() == ["False", *net().state_dict()]


@pytest.mark.parametrize(
    ("refresh_every", "expected"),
    [(1, [1, 2, 3, 4, 5, 6]), (3, [3, 6]), (None, []), (40, []), (lambda step: step in (2, 5), [2, 5])],
)
def test_masks_are_refreshed_when_the_schedule_says(
    refresh_every: int | Callable[[int], bool] | None, expected: list[int]
) -> None:
    model = net()
    sparsifier = Sparsifier(model, "2:4", refresh_every=refresh_every)
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    for step in range(1, 7):
        before = masks_of(model, sparsifier)
        (record,) = train(model, optimizer, sparsifier, range(step, step + 1))
        changed = any(not torch.equal(before[name], mask) for name, mask in masks_of(model, sparsifier).items())
        assert (record is not None) == (step in expected)
        assert not changed or step in expected
    assert sparsifier.steps == 6


def test_static_masks_are_those_of_the_pretrained_weights() -> None:
    model = net()
    expected = {name: matrices(effective(model, name)) for name in ("2.weight", "4.weight")}
    sparsifier = Sparsifier(model, "1:4", include=list(expected), refresh_every=None)
    train(model, torch.optim.SGD(model.parameters(), 0.5), sparsifier, range(5))
    for name, weight in expected.items():
        assert (matrices(held(model, name)[1]) == ms.solve_matrix(weight, 1, 4)).all()


def test_the_final_phase_is_dense() -> None:
    model = net()
    sparsifier = Sparsifier(model, "2:4", refresh_every=1, until=3)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    assert [record is not None for record in train(model, optimizer, sparsifier, range(2))] == [True, True]
    assert not all(mask.all() for mask in masks_of(model, sparsifier).values())
    assert train(model, optimizer, sparsifier, range(2, 5)) == [None, None, None]
    assert all(mask.all() for mask in masks_of(model, sparsifier).values())
    with pytest.raises(RuntimeError, match="dense phase began at step 3"):
        sparsifier.refresh()
    dense = held(model, "4.weight")[0].detach().clone()
    sparsifier.finalize()
    assert torch.equal(effective(model, "4.weight"), dense)


def test_evaluation_changes_no_mask_and_uses_that_of_training() -> None:
    model = net()
    sparsifier = Sparsifier(model, "2:4", refresh_every=1)
    train(model, torch.optim.SGD(model.parameters(), 0.5), sparsifier, range(2))
    masks, trained = masks_of(model, sparsifier), model(images())
    model.eval()
    with torch.no_grad():
        assert torch.equal(model(images()), trained)
    assert all(torch.equal(masks[name], mask) for name, mask in masks_of(model, sparsifier).items())


def test_scores_other_than_magnitudes_choose_the_mask() -> None:
    def wanda(name: str, weight: nn.Parameter) -> Tensor:
        assert name == "weight"
        return weight.abs() * torch.arange(1.0, 9.0)

    model = nn.Linear(8, 8)
    Sparsifier(model, "2:4", importance=wanda)
    weight, mask = held(model, "weight")
    scores = weight.detach().abs() * torch.arange(1.0, 9.0)
    assert oracle.is_optimal(scores.numpy(), mask.numpy(), 2, 4)


def test_scores_may_use_the_gradient() -> None:
    def taylor(name: str, weight: nn.Parameter) -> Tensor:
        return weight.abs() if weight.grad is None else (weight * weight.grad).abs()

    model = nn.Linear(8, 8)
    sparsifier = Sparsifier(model, "3:4", importance=taylor)
    model(torch.randn(5, 8)).square().sum().backward()
    record = sparsifier.refresh()
    weight, mask = held(model, "weight")
    assert weight.grad is not None
    scores = (weight * weight.grad).detach().abs()
    assert oracle.is_optimal(scores.numpy(), mask.numpy(), 3, 4)
    assert record.layers[0].kept_importance == pytest.approx(float(scores[mask].sum() / scores.sum()), rel=1e-5)


def test_two_sparsifiers_on_two_models_do_not_meet() -> None:
    first, second = net(0), net(1)
    one, other = Sparsifier(first, "2:4", refresh_every=1), Sparsifier(second, "1:8", refresh_every=None)
    before = masks_of(second, other)
    train(first, torch.optim.SGD(first.parameters(), 0.5), one, range(3))
    assert all(torch.equal(before[name], mask) for name, mask in masks_of(second, other).items())
    one.finalize()
    assert other.refresh().step == 0


def test_two_sparsifiers_share_a_model_between_them() -> None:
    model = net()
    one = Sparsifier(model, "2:4", include="2.weight")
    other = Sparsifier(model, "1:8")
    assert sparse_names(other) == ["4.weight", "5.weight"]
    one.finalize()
    other.refresh()
    other.finalize()
    assert list(model.state_dict()) == list(net().state_dict())
    assert float((model[2].weight != 0).float().mean()) == 0.5


def test_a_copy_of_the_model_has_masks_of_its_own_that_finalize_writes() -> None:
    model = net()
    sparsifier = Sparsifier(model, "2:4", refresh_every=1)
    twin = copy.deepcopy(model)
    before = masks_of(twin, sparsifier)
    train(model, torch.optim.SGD(model.parameters(), 0.5), sparsifier, range(3))
    assert all(torch.equal(before[name], mask) for name, mask in masks_of(twin, sparsifier).items())
    expected = twin(images())
    finalize(twin)
    assert torch.equal(twin(images()), expected)
    assert list(twin.state_dict()) == list(net().state_dict())
    with pytest.raises(ValueError, match="Sequential has no masked parameter"):
        finalize(twin)


def test_records_tell_what_is_kept_and_what_has_changed() -> None:
    model = net()
    sparsifier = Sparsifier(model, "2:4", refresh_every=2)
    assert math.isnan(sparsifier.last_refresh.share)
    first = sparsifier.last_refresh
    before = masks_of(model, sparsifier)
    records = train(model, torch.optim.SGD(model.parameters(), 0.5), sparsifier, range(2))
    record = records[-1]
    assert (first.step, records[0], record.step, record) == (0, None, 2, sparsifier.last_refresh)
    assert 0 < record.share < 1
    assert record.seconds > 0
    for layer in record.layers:
        weight, mask = held(model, layer.name)
        flips = int((before[layer.name] != mask).sum())
        assert (layer.sad, layer.flip_rate) == (flips, flips / mask.numel())
        importance = weight.detach().abs().double()
        assert layer.kept_importance == pytest.approx(float(importance[mask].sum() / importance.sum()), rel=1e-5)
    assert sum(layer.sad for layer in record.layers) > 0
    assert all(layer.sad == 0 for layer in first.layers)


def test_records_can_be_read_and_are_plain_numbers_as_dicts() -> None:
    model = net()
    record = Sparsifier(model, "2:4").last_refresh
    layer = record.layers[0]
    assert repr(layer) == f"LayerRecord('2.weight', 2:4, kept importance {layer.kept_importance:.2%}, flip rate 0.00%)"
    assert repr(record).startswith("RefreshRecord(step 0, 3 layers, mean kept importance ")
    found = record.to_dict()
    assert (
        found["layers"][0]
        == layer.to_dict()
        == {
            "name": "2.weight",
            "pattern": "2:4",
            "kept_importance": layer.kept_importance,
            "sad": 0,
            "flip_rate": 0.0,
            "solved_on_cpu": 0,
        }
    )
    assert (found["step"], found["seconds"]) == (0, record.seconds)


def test_a_layer_of_zeros_keeps_all_its_importance() -> None:
    model = nn.Linear(8, 8)
    nn.init.zeros_(model.weight)
    assert Sparsifier(model, "2:4").last_refresh.layers[0].kept_importance == 1.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_resumed_run_is_the_uninterrupted_one(dtype: torch.dtype) -> None:
    """Bit for bit, in bfloat16 too, where weights tie and the potentials choose among optimal masks."""

    def start() -> tuple[nn.Module, torch.optim.Optimizer, Sparsifier]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(48, 32, dtype=dtype), nn.Linear(32, 8, dtype=dtype))
        optimizer = torch.optim.SGD(model.parameters(), 0.3, momentum=0.9)
        return model, optimizer, Sparsifier(model, "2:4", refresh_every=3)

    def run(model: nn.Module, optimizer: torch.optim.Optimizer, sparsifier: Sparsifier, steps: range) -> None:
        for step in steps:
            x = torch.randn(16, 48, generator=torch.Generator().manual_seed(step)).to(dtype)
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
            sparsifier.step()

    whole = start()
    run(*whole, range(11))
    half = start()
    run(*half, range(5))
    buffer = io.BytesIO()
    torch.save([part.state_dict() for part in half], buffer)
    buffer.seek(0)
    resumed = start()
    for part, state in zip(resumed, torch.load(buffer, weights_only=True), strict=True):
        part.load_state_dict(state)
    run(*resumed, range(5, 11))
    assert resumed[2].steps == 11
    for (key, expected), value in zip(whole[0].state_dict().items(), resumed[0].state_dict().values(), strict=True):
        assert torch.equal(expected, value), key


def test_loading_replaces_masks_and_the_step_count() -> None:
    source, target = net(0), net(1)
    saved = Sparsifier(source, "2:4", refresh_every=1)
    train(source, torch.optim.SGD(source.parameters(), 0.5), saved, range(3))
    sparsifier = Sparsifier(target, "2:4")
    sparsifier.load_state_dict(saved.state_dict())
    assert sparsifier.steps == 3
    for name, mask in masks_of(source, saved).items():
        assert torch.equal(held(target, name)[1], mask)


@pytest.mark.parametrize("until", [1, None])
def test_loading_into_a_dense_phase_stays_or_becomes_dense(until: int | None) -> None:
    model = net()
    saved = Sparsifier(model, "2:4", refresh_every=1, until=until)
    train(model, torch.optim.SGD(model.parameters(), 0.1), saved, range(2))
    twin = net()
    sparsifier = Sparsifier(twin, "2:4", refresh_every=1, until=1)
    sparsifier.load_state_dict(saved.state_dict())
    assert sparsifier.step() is None
    assert all(mask.all() for mask in masks_of(twin, sparsifier).values())


def test_parameters_are_looked_up_at_every_refresh() -> None:
    model = nn.Linear(8, 8)
    sparsifier = Sparsifier(model, "2:4")
    other = torch.randn(8, 8)
    model.weight = nn.Parameter(other.clone())
    sparsifier.refresh()
    assert oracle.is_optimal(other.numpy(), held(model, "weight")[1].numpy(), 2, 4)


def test_a_weight_that_is_assigned_is_the_dense_one() -> None:
    model = nn.Linear(8, 8)
    sparsifier = Sparsifier(model, "2:4")
    model.weight = nn.Parameter(torch.ones(8, 8))
    assert held(model, "weight")[0].eq(1).all()
    sparsifier.refresh()
    assert int(model.weight.sum()) == 32


def test_kept_importance_is_that_of_the_solver() -> None:
    model = nn.Linear(64, 64)
    layer = Sparsifier(model, "4:8").last_refresh.layers[0]
    weights = held(model, "weight")[0].detach().numpy()
    mask = ms.solve_matrix(weights, 4, 8)
    assert layer.kept_importance == pytest.approx(np.abs(weights[mask]).sum() / np.abs(weights).sum(), rel=1e-6)


@pytest.mark.parametrize("pattern", ["1:4", "4:8"])
def test_later_refreshes_start_from_the_potentials_of_the_last_if_tiles_are_large(
    monkeypatch: pytest.MonkeyPatch, pattern: str
) -> None:
    from masksolve.torch._solver import solve as solver

    given: list[Any] = []
    solve = solver.solve_matrix

    def noting(*arguments: Any, potentials: Any = None, **options: Any) -> Any:
        given.append(potentials)
        return solve(*arguments, potentials=potentials, **options)

    monkeypatch.setattr(solver, "solve_matrix", noting)
    sparsifier = Sparsifier(nn.Linear(16, 8), pattern)
    sparsifier.refresh()
    cold, warm = given
    assert cold is None
    if pattern == "1:4":
        assert warm is None
    else:
        assert warm.shape == (1, 2, 8)
        assert warm.any()


def test_a_resumed_refresh_starts_from_the_potentials_that_were_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    from masksolve.torch._solver import solve as solver

    torch.manual_seed(0)
    saved = Sparsifier(nn.Linear(16, 8), "4:8").state_dict()
    resumed = Sparsifier(nn.Linear(16, 8), "4:8")
    assert not torch.equal(saved["potentials"]["weight"], resumed.state_dict()["potentials"]["weight"])
    resumed.load_state_dict(saved)
    given: list[Any] = []
    solve = solver.solve_matrix

    def noting(*arguments: Any, potentials: Any = None, **options: Any) -> Any:
        given.append(potentials.copy())
        return solve(*arguments, potentials=potentials, **options)

    monkeypatch.setattr(solver, "solve_matrix", noting)
    resumed.refresh()
    assert given[0].tolist() == saved["potentials"]["weight"].tolist()


def test_scalars_name_every_figure_of_every_layer() -> None:
    def numbers(record: RefreshRecord) -> Iterator[str]:
        yield from ("masks/seconds", "masks/share")
        for layer in record.layers:
            yield from (
                f"masks/{figure}/{layer.name}" for figure in ("kept_importance", "sad", "flip_rate", "solved_on_cpu")
            )

    record = Sparsifier(net(), "2:4").last_refresh
    assert list(record.scalars()) == list(numbers(record))


def test_weights_that_stand_still_keep_their_masks() -> None:
    model = net()
    sparsifier = Sparsifier(model, "2:4")
    records = [sparsifier.refresh() for _ in range(3)]
    assert all(layer.flip_rate == 0 for record in records for layer in record.layers)
    assert all(one.layers == other.layers for one, other in pairwise(records))
