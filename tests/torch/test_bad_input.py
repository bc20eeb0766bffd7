"""Bad input gets an error that says what was given and what to do, and leaves the model as it was."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from masksolve.torch import Sparsifier, finalize, patterns_from_zeros
from tests.torch.masked import held


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 8))


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def same(before: dict[str, Tensor], model: nn.Module) -> bool:
    now = model.state_dict()
    return list(before) == list(now) and all(torch.equal(before[key], now[key]) for key in now)


def with_nan() -> nn.Module:
    model = mlp()
    with torch.no_grad():
        model[2].weight[3, 7] = float("nan")
    return model


def frozen_int() -> nn.Module:
    model = nn.Module()
    model.codes = nn.Parameter(torch.ones(8, 8, dtype=torch.int8), requires_grad=False)
    return model


REFUSED: list[tuple[Callable[[], nn.Module], dict[str, Any], type[Exception], str]] = [
    (nn.ReLU, {}, ValueError, r"no parameter of this ReLU can be 2:4 sparse \(it has no parameters\)"),
    (lambda: nn.LayerNorm(8), {}, ValueError, r"no parameter of this LayerNorm .*weight: 1-D: not a matrix"),
    (mlp, {"pattern": "16:32"}, ValueError, r"can be 16:32 sparse \(0.weight: 24x16 holds no whole 32x32 tile; 2.w"),
    (mlp, {"include": "3.*"}, ValueError, r"include '3\.\*' matches none of the 4 parameter names \(0.weight, 0.bi"),
    (mlp, {"exclude": ["0.weight", "x"]}, ValueError, r"exclude 'x' matches none of the 4 parameter names"),
    (mlp, {"include": ["0.weight", "2.bias"]}, ValueError, r"include '2.bias' matches nothing .*2.bias: 1-D: not"),
    (mlp, {"include": "0.*", "exclude": "0.w*"}, ValueError, r"include '0.\*' matches .*excluded by '0.w\*'"),
    (frozen_int, {"include": "codes"}, ValueError, r"codes: dtype torch.int8 is not one of torch.float16"),
    (
        with_nan,
        {},
        ValueError,
        r"parameter '2.weight': \[3, 7\] is nan; NaN and infinities have no importance; no mask",
    ),
    (lambda: mlp().to("meta"), {}, ValueError, r"parameter '0.weight' is on the meta device .*materialise the model"),
    (mlp, {"include": 5}, TypeError, r"include and exclude take globs of parameter names, .* got 5"),
    (mlp, {"exclude": ["0.*", None]}, TypeError, r"include and exclude take globs of parameter names, .* got None"),
    (mlp, {"pattern": "5:4"}, ValueError, r"n must lie between 0 and m=4, got n=5"),
    (mlp, {"pattern": "2-4"}, ValueError, r"a pattern is written \"N:M\""),
    (mlp, {"pattern": 4}, TypeError, r"a pattern is \"N:M\", \(N, M\) or a Pattern, .*; got 4"),
    (mlp, {"gradient": "srste"}, ValueError, r"unknown gradient 'srste'; allowed .*did you mean 'sr-ste'"),
    (mlp, {"ragged": "pad"}, ValueError, r"unknown ragged 'pad'; allowed are 'allow', 'skip'"),
    (mlp, {"method": "exactly"}, ValueError, r"unknown method 'exactly'.*did you mean 'exact'"),
    (mlp, {"refresh_every": 0}, ValueError, r"refresh_every must be at least 1, got 0"),
    (mlp, {"refresh_every": 1.5}, TypeError, r"refresh_every must be an integer, got 1.5"),
    (mlp, {"until": 0}, ValueError, r"until must be at least 1, got 0"),
    (mlp, {"decay": -1.0}, ValueError, r"decay must be finite and not negative, got -1.0"),
    *(
        (mlp, {"decay": bad}, TypeError, rf"decay must be a number, got {bad!r} of type {type(bad).__name__}")
        for bad in ("2e-4", None, True)
    ),
    (mlp, {"accelerate": "no"}, TypeError, r"accelerate must be True or False, got 'no'"),
    (mlp, {"importance": "wanda"}, ValueError, r"unknown importance 'wanda'; allowed are 'magnitude'"),
    (
        mlp,
        {"importance": None},
        TypeError,
        r"importance must be one of 'magnitude', or a callable of a name .*got None",
    ),
    (mlp, {"direction": "row"}, ValueError, r"unknown direction 'row'; allowed are 'both', 'rows', 'columns'.*'rows'"),
    (
        mlp,
        {"direction": "rows", "method": lambda scores, p: scores > 0},
        ValueError,
        r"direction='rows' is for the methods of masksolve; a callable method .*leave out direction",
    ),
    (mlp, {"direction": "rows", "pattern": "16:32"}, ValueError, r"0.weight: 24x16 holds no whole group of 32 along r"),
    (mlp, {"importance": lambda name, w: w[0]}, ValueError, r"importance returned torch.float32 of shape \(16,\) for"),
    (mlp, {"importance": lambda name, w: None}, ValueError, r"importance returned None for parameter '0.weight'"),
    (mlp, {"importance": lambda name, w: w}, ValueError, r"importance returned negative scores for parameter '0.wei"),
    (mlp, {"importance": lambda name, w: w.abs() / 0}, ValueError, r"parameter '0.weight': \[0, 0\] is inf"),
    (mlp, {"method": lambda scores, p: scores}, ValueError, r"'0.weight': method returned torch.float32 of shape"),
    (with_nan, {"method": lambda scores, p: scores > 0}, ValueError, r"parameter '2.weight': \[3, 7\] is nan"),
    (mlp, {"method": lambda scores, p: None}, ValueError, r"method returned None; it must return a bool tensor"),
    (mlp, {"method": lambda scores, p: [1]}, ValueError, r"method returned a list; it must return a bool tensor"),
    (mlp, {"method": lambda s, p: (s > 0).to("meta")}, ValueError, r"returned torch.bool .* on the meta device; it mu"),
    (
        mlp,
        {"importance": lambda name, w: w.to("meta")},
        ValueError,
        r"returned torch.float32 .* on the meta device for",
    ),
    (mlp, {"importance": lambda name, w: w.detach().numpy()}, ValueError, r"returned a ndarray for parameter '0.weig"),
]


@pytest.mark.parametrize(("make", "options", "error", "message"), REFUSED, ids=lambda value: None)
def test_what_cannot_be_attached_leaves_the_model_as_it_was(
    make: Callable[[], nn.Module], options: dict[str, Any], error: type[Exception], message: str
) -> None:
    model = make()
    keys, types = list(model.state_dict()), [type(module) for module in model.modules()]
    with pytest.raises(error, match=message):
        Sparsifier(model, **{"pattern": "2:4", **options})
    assert list(model.state_dict()) == keys
    assert [type(module) for module in model.modules()] == types


def test_inference_mode_is_refused_before_anything_is_changed() -> None:
    model = mlp()
    with torch.inference_mode(), pytest.raises(RuntimeError, match=r"made under torch.inference_mode\(\) could not"):
        Sparsifier(model, "2:4")
    assert type(model[0]) is nn.Linear
    Sparsifier(model, "2:4")


def test_a_model_is_a_module() -> None:
    with pytest.raises(TypeError, match=r"model must be a torch\.nn.Module, got dict"):
        Sparsifier({}, "2:4")  # type: ignore[arg-type]
    calls: list[Callable[[Any], object]] = [
        finalize,
        Sparsifier(mlp(), "2:4").finalize,
        lambda model: patterns_from_zeros(model, 4),
    ]
    for call in calls:
        with pytest.raises(TypeError, match=r"model must be a torch\.nn.Module, got str"):
            call("model")


def test_a_step_before_any_backward_is_refused() -> None:
    model = mlp()
    sparsifier = Sparsifier(model, "2:4", refresh_every=1)
    before = snapshot(model)
    for _ in range(2):
        with pytest.raises(
            RuntimeError, match=r"step\(\) was called before any backward; call it after optimizer.step"
        ):
            sparsifier.step()
    assert sparsifier.steps == 0
    assert same(before, model)
    model(torch.ones(1, 16)).sum().backward()
    sparsifier.step()


def test_a_step_whose_gradients_are_gone_already_is_fine() -> None:
    model = mlp()
    sparsifier = Sparsifier(model, "2:4")
    model(torch.ones(1, 16)).sum().backward()
    model.zero_grad()
    sparsifier.step()
    assert sparsifier.steps == 1


def test_a_first_batch_that_passes_by_every_masked_weight_is_a_backward_too() -> None:
    """As where a mixture sends nothing to its masked experts."""
    model = nn.Sequential(mlp(), nn.LazyLinear(8), nn.Linear(8, 3))
    sparsifier = Sparsifier(model, "2:4")
    with pytest.raises(RuntimeError, match="before any backward"):
        sparsifier.step()
    model[2](torch.ones(1, 8)).sum().backward()
    model.zero_grad()
    sparsifier.step()
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())  # type: ignore[attr-defined]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_refresh_of_weights_that_are_not_finite_names_the_layer_and_keeps_every_mask(bad: float) -> None:
    model = mlp()
    sparsifier = Sparsifier(model, "2:4")
    with torch.no_grad():
        for layer in (model[0], model[2]):
            held(layer)[0].normal_()
        held(model[2])[0][5, 2] = bad
    before, record = [held(model[k])[1].clone() for k in (0, 2)], sparsifier.last_refresh
    with pytest.raises(ValueError, match=rf"parameter '2.weight': \[5, 2\] is {bad}; .*no mask was changed"):
        sparsifier.refresh()
    assert all(torch.equal(mask, held(model[k])[1]) for mask, k in zip(before, (0, 2), strict=True))
    assert sparsifier.last_refresh is record
    with torch.no_grad():
        held(model[2])[0][5, 2] = 0
    sparsifier.refresh()


def test_a_position_is_that_in_the_weight_of_a_convolution() -> None:
    model = nn.Conv2d(8, 8, 3, groups=2)
    sparsifier = Sparsifier(model, "2:4")
    with torch.no_grad():
        held(model)[0][6, 1, 2, 0] = float("nan")
    with pytest.raises(ValueError, match=r"parameter 'weight': \[6, 1, 2, 0\] is nan"):
        sparsifier.refresh()


def test_a_changed_shape_is_refused() -> None:
    model = mlp()
    sparsifier = Sparsifier(model, "2:4")
    before = held(model[0])[1].clone()
    model[2].weight = nn.Parameter(torch.randn(8, 32))
    calls: list[Callable[[], object]] = [sparsifier.refresh, sparsifier.finalize, lambda: finalize(model)]
    for call in calls:
        with pytest.raises(ValueError, match=r"parameter '2.weight' has shape \(8, 32\) now, and had \(8, 24\)"):
            call()
        assert torch.equal(held(model[0])[1], before)


def test_a_model_that_went_to_the_meta_device_is_refused() -> None:
    model = mlp()
    sparsifier = Sparsifier(model, "2:4")
    before = sparsifier.last_refresh
    model.to("meta")
    calls: list[Callable[[], object]] = [sparsifier.refresh, sparsifier.finalize, lambda: finalize(model)]
    for call in calls:
        with pytest.raises(ValueError, match=r"'0.weight' is on the meta device now and has no values; materialise"):
            call()
    assert sparsifier.last_refresh is before


def test_a_replaced_module_is_refused() -> None:
    model = mlp()
    sparsifier = Sparsifier(model, "2:4")
    model[0] = nn.Linear(16, 24)
    with pytest.raises(RuntimeError, match=r"parameter '0.weight' is not masked any more: its module was removed, r"):
        sparsifier.refresh()
    del model[2]
    with pytest.raises(RuntimeError, match=r"no module '2' any more|not masked any more"):
        sparsifier.refresh()


def test_a_state_dict_of_another_pattern_is_refused() -> None:
    model, other = mlp(), mlp()
    sparsifier = Sparsifier(model, "2:4")
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"has masks of pattern 1:4, this Sparsifier is for 2:4; make one for 1:4"):
        sparsifier.load_state_dict(Sparsifier(other, "1:4").state_dict())
    assert same(before, model)


def test_a_state_dict_of_another_model_or_of_nothing_is_refused() -> None:
    model = mlp()
    sparsifier = Sparsifier(model, "2:4")
    before = snapshot(model)
    fewer = Sparsifier(mlp(), "2:4", include="0.weight").state_dict()
    with pytest.raises(ValueError, match=r"only the model has a mask for '2.weight'"):
        sparsifier.load_state_dict(fewer)
    with pytest.raises(ValueError, match=r"it lacks direction, masks, pattern, potentials, step"):
        sparsifier.load_state_dict(model.state_dict())
    wide = Sparsifier(nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 16)), "2:4").state_dict()
    with pytest.raises(
        ValueError, match=r"mask of shape \(16, 24\) for '2.weight'; it needs torch.bool of shape \(8, 24"
    ):
        sparsifier.load_state_dict(wide)
    assert same(before, model)
    assert sparsifier.steps == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"step": "3"}, "the step of the state_dict must be an integer, got '3'"),
        ({"step": None}, "the step of the state_dict must be an integer, got None"),
        ({"masks": None}, "masks of the state_dict must map names to tensors, got None"),
        ({"masks": {"0.weight": None}}, "masks of the state_dict must map names to tensors, got {'0.weight': None}"),
        ({"potentials": [1]}, r"potentials of the state_dict must map names to tensors, got \[1\]"),
        (None, "the state_dict of a Sparsifier is a mapping of pattern, direction, .*, got None"),
    ],
)
def test_a_state_dict_of_wrong_types_is_refused_before_anything_is_loaded(
    change: dict[str, Any] | None, message: str
) -> None:
    model, source = mlp(), mlp()
    sparsifier = Sparsifier(model, "1:4")
    with torch.no_grad():
        for layer in (source[0], source[2]):
            layer.weight.normal_()
    state: Any = Sparsifier(source, "1:4").state_dict()
    before = snapshot(model)
    with pytest.raises(TypeError, match=message):
        sparsifier.load_state_dict(None if change is None else {**state, **change})  # type: ignore[arg-type]
    assert same(before, model)
    sparsifier.load_state_dict(state)
    assert not same(before, model)


def test_a_part_of_the_own_model_is_not_finalized_alone() -> None:
    model = nn.Sequential(mlp(), mlp())
    sparsifier = Sparsifier(model, "2:4")
    before = snapshot(model)
    for part in (model[1], copy.copy(model)):
        with pytest.raises(ValueError, match="this Sequential shares masked modules with the Sparsifier's own model"):
            sparsifier.finalize(part)
    assert same(before, model)
    sparsifier.refresh()
    sparsifier.finalize(nn.Sequential(model))
    assert type(model[1][0]) is nn.Linear


def test_loading_masks_of_another_pattern_into_the_model_is_refused_and_its_masks_stay() -> None:
    """Also those that keep less: a 1:4 mask is valid under 3:4, but none that a 3:4 Sparsifier makes."""
    for other in ("1:4", "2:4", "4:4"):
        model, source = mlp(), mlp()
        sparsifier = Sparsifier(model, "3:4", refresh_every=None)
        Sparsifier(source, other)
        before = held(model[0])[1].clone()
        state = snapshot(model)
        with pytest.raises(
            RuntimeError, match=r"0\.weight_mask: mask\[0, 0:4\] keeps . of 4 .* exactly 3; nothing was l"
        ):
            model.load_state_dict(source.state_dict())
        assert same(state, model)
        assert torch.equal(held(model[0])[1], before)
        sparsifier.finalize()
        assert float((model[0].weight != 0).float().mean()) == 0.75


@pytest.mark.parametrize("options", [{"until": 1}, {"saturated": False}, {"method": "greedy"}, {"method": "any"}])
def test_loading_masks_that_the_sparsifier_can_make_is_not_refused(options: dict[str, Any]) -> None:
    if options.get("method") == "any":
        options = {"method": lambda scores, pattern: scores > 0}
    model, source = mlp(), mlp()
    Sparsifier(model, "3:4", **options)
    saved = Sparsifier(source, "3:4", **options)
    source(torch.ones(1, 16)).sum().backward()
    saved.step()
    model.load_state_dict(source.state_dict())
    assert torch.equal(held(model[0])[1], held(source[0])[1])


def test_masks_without_values_are_loaded_as_torch_loads_them() -> None:
    model = mlp()
    Sparsifier(model, "2:4")
    model.load_state_dict({key: value.to("meta") for key, value in model.state_dict().items()}, assign=True)
    assert held(model[0])[1].is_meta


def test_a_state_dict_whose_masks_break_its_own_pattern_is_refused() -> None:
    model = mlp()
    sparsifier = Sparsifier(model, "1:4")
    before = snapshot(model)
    state = sparsifier.state_dict()
    state["masks"] = {**state["masks"], "2.weight": ~state["masks"]["2.weight"]}
    with pytest.raises(ValueError, match=r"a mask for '2.weight' that 1:4 cannot make: mask\[0, 0:4\] keeps 3 of 4"):
        sparsifier.load_state_dict(state)
    assert same(before, model)


def test_an_average_that_averaged_the_masks_too_is_not_finalized() -> None:
    model = mlp()
    sparsifier = Sparsifier(model, "1:4")
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True)
    for _ in range(3):
        average.update_parameters(model)
        with torch.no_grad():
            held(model[2])[0].normal_()
        sparsifier.refresh()
    before = snapshot(average)
    with pytest.raises(
        RuntimeError, match=r"'module.2.weight' has a mask that its Sparsifier cannot .* needs use_buffers=False"
    ):
        finalize(average)
    assert same(before, average)


def test_a_finalized_sparsifier_does_nothing_more() -> None:
    model = mlp()
    sparsifier = Sparsifier(model, "2:4")
    sparsifier.finalize()
    calls: list[Callable[[], object]] = [
        sparsifier.step,
        sparsifier.refresh,
        sparsifier.finalize,
        sparsifier.state_dict,
        lambda: sparsifier.load_state_dict({}),
    ]
    for call in calls:
        with pytest.raises(RuntimeError, match="this Sparsifier is finalized"):
            call()


def test_a_second_sparsifier_for_the_same_weights_is_refused() -> None:
    model = mlp()
    Sparsifier(model, "2:4")
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"0\.weight: already masked by a Sparsifier; finalize it first"):
        Sparsifier(model, "1:4")
    assert same(before, model)


def test_a_masked_weight_can_be_neither_parametrized_nor_deleted() -> None:
    model = mlp()
    sparsifier = Sparsifier(model, "2:4")
    before = snapshot(model)
    with pytest.raises(
        RuntimeError, match=r"'weight' of this Linear is masked .* neither deleted nor parametrized; fin"
    ):
        nn.utils.parametrize.register_parametrization(model[2], "weight", nn.Identity())
    with pytest.raises(RuntimeError, match=r"'weight' of this Linear is masked by a Sparsifier"):
        del model[2].weight
    assert same(before, model)
    sparsifier.finalize()


def test_a_module_that_got_another_class_is_not_finalized() -> None:
    model = mlp()
    sparsifier = Sparsifier(model, "2:4")
    nn.utils.parametrize.register_parametrization(model[2], "bias", nn.Identity())
    before = snapshot(model)
    for call in (sparsifier.finalize, lambda: finalize(model)):
        with pytest.raises(RuntimeError, match=r"of parameter '2.weight' was given the class ParametrizedMaskedLinear"):
            call()
        assert same(before, model)
    nn.utils.parametrize.remove_parametrizations(model[2], "bias")
    sparsifier.finalize()
    assert type(model[2]) is nn.Linear


def test_a_failing_schedule_or_importance_is_the_users_own_error() -> None:
    def broken(name: str, weight: nn.Parameter) -> Tensor:
        raise KeyError(name)

    model = mlp()
    with pytest.raises(KeyError, match=r"0\.weight"):
        Sparsifier(model, "2:4", importance=broken)
    assert list(model.state_dict()) == list(mlp().state_dict())


def test_a_single_layer_loads_nothing_either_if_its_mask_is_refused() -> None:
    """A model that is one masked layer is its own guard: its bias must not be loaded before the mask is judged."""
    layer, other = nn.Linear(16, 16), nn.Linear(16, 16)
    Sparsifier(layer, "2:4")
    Sparsifier(other, "1:4")
    before = snapshot(layer)
    with pytest.raises(RuntimeError, match=r"weight_mask: mask\[0, 0:4\] keeps 1 of 4 entries; .*nothing was loaded"):
        layer.load_state_dict(other.state_dict())
    assert same(before, layer)
