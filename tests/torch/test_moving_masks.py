"""Masks that are given, that grow, and that move only where it pays; and the decay that calms them."""

import copy
import re
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import masksolve as ms
from masksolve.checkpoint import CheckpointError, prune_checkpoint, read_masks
from masksolve.torch import RefreshRecord, Sparsifier, cubic_schedule, find_decay
from masksolve.torch._training.schedule import Schedule
from tests import oracle
from tests.tables import Pair, name_of
from tests.torch import masked

PATTERNS = [(2, 4), (1, 4), (3, 8), (4, 8), (2, 5)]
DIRECTIONS = ("both", "rows", "columns")


def mask_of(layer: nn.Module) -> NDArray[np.bool_]:
    return masked.held(layer, "weight")[1].numpy().copy()


def weight_of(layer: nn.Module) -> NDArray[np.float32]:
    return masked.held(layer, "weight")[0].detach().numpy().copy()


def step(sparsifier: Sparsifier, layer: nn.Module, change: float = 0.0, seed: int = 0) -> RefreshRecord | None:
    """An optimizer step that moves the dense weights at random."""
    layer(torch.ones(1, layer.in_features))
    noise = torch.randn(layer.weight.shape, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        masked.held(layer, "weight")[0].add_(noise, alpha=change)
    return sparsifier.step()


class TestSparsitySchedule:
    @pytest.mark.parametrize("direction", DIRECTIONS)
    @pytest.mark.parametrize("pattern", PATTERNS, ids=name_of)
    def test_masks_are_the_best_of_every_n_on_the_way(self, pattern: Pair, direction: Any) -> None:
        n, m = pattern
        layer, zeros = nn.Linear(21, 26), m - n
        sparsifier = Sparsifier(
            layer,
            pattern,
            direction=direction,
            refresh_every=1,
            sparsity_schedule=lambda step: min(step / zeros, 1.0),
        )
        assert mask_of(layer).all()
        for number in range(1, zeros + 2):
            record = step(sparsifier, layer, 0.1, number)
            now = max(m - number, n)
            assert oracle.is_optimal(weight_of(layer), mask_of(layer), now, m, direction=direction)
            assert record is not None
            assert str(record.layers[0].pattern) == f"{now}:{m}"
        assert sparsifier.pattern == ms.Pattern(n, m)

    def test_a_mapping_of_patterns_grows_at_the_same_pace(self) -> None:
        model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
        patterns = {"0.*": "2:4", "1.*": "2:8"}
        sparsifier = Sparsifier(model, patterns, refresh_every=1, sparsity_schedule=lambda step: 0.5)
        assert [str(layer.pattern) for layer in sparsifier.last_refresh.layers] == ["3:4", "5:8"]

    def test_the_cubic_schedule_is_that_of_zhu_and_gupta(self) -> None:
        schedule = cubic_schedule(10, 50)
        for t in range(100):
            left = Fraction(min(max(50 - t, 0), 40), 40)
            assert schedule(t) == pytest.approx(float(1 - left**3), abs=1e-15)

    def test_a_share_of_whole_zeros_is_not_rounded_down_by_its_last_digit(self) -> None:
        for zeros in range(11):
            schedule = Schedule(1, None, lambda step, zeros=zeros: zeros * 0.1)  # type: ignore[misc]
            assert schedule.pattern_at(0, ms.Pattern(0, 10)).zeros == zeros

    def test_training_goes_on_from_masks_on_the_way(self) -> None:
        def made() -> tuple[nn.Linear, Sparsifier]:
            torch.manual_seed(0)
            layer = nn.Linear(16, 16)
            return layer, Sparsifier(layer, "2:8", refresh_every=1, sparsity_schedule=cubic_schedule(0, 6))

        layer, sparsifier = made()
        for number in range(3):
            step(sparsifier, layer, 0.1, number)
        other, resumed = made()
        other.load_state_dict(layer.state_dict())
        resumed.load_state_dict(sparsifier.state_dict())
        for number in range(3, 7):
            step(sparsifier, layer, 0.1, number)
            step(resumed, other, 0.1, number)
            assert np.array_equal(mask_of(layer), mask_of(other))
        assert oracle.is_valid(mask_of(other), 2, 8)

    @pytest.mark.parametrize("saturated", [True, False])
    def test_to_finalize_on_the_way_warns(self, saturated: bool) -> None:
        layer = nn.Linear(16, 16)
        sparsifier = Sparsifier(
            layer, "3:8", refresh_every=4, sparsity_schedule=cubic_schedule(0, 10), saturated=saturated
        )
        for _ in range(10):
            step(sparsifier, layer)
        with pytest.warns(UserWarning, match="schedule was at its end: 'weight' is not 3:8: .*; let it"):
            sparsifier.finalize()
        assert oracle.is_valid(layer.weight.detach().numpy() != 0, 4, 8, saturated=saturated)

    def test_to_finalize_at_the_end_or_in_a_dense_phase_does_not(self) -> None:
        for until in (None, 8):
            layer = nn.Linear(16, 16)
            sparsifier = Sparsifier(layer, "3:8", refresh_every=4, sparsity_schedule=cubic_schedule(0, 8), until=until)
            for _ in range(8):
                step(sparsifier, layer)
            sparsifier.finalize()
            assert oracle.is_valid(layer.weight.detach().numpy() != 0, 3, 8) == (until is None)

    def test_masks_of_another_m_or_fewer_are_refused_all_the_same(self) -> None:
        schedule = cubic_schedule(0, 6)
        saved = Sparsifier(nn.Linear(16, 16), "1:8", refresh_every=None).state_dict()
        sparsifier = Sparsifier(nn.Linear(16, 16), "2:8", refresh_every=1, sparsity_schedule=schedule)
        with pytest.raises(ValueError, match="cannot make"):
            sparsifier.load_state_dict({**saved, "pattern": "2:8"})

    @pytest.mark.parametrize("share", [-0.1, 1.1, float("nan"), "half", None])
    def test_what_is_no_share_is_refused_with_its_step_and_masks_stay(self, share: Any) -> None:
        layer = nn.Linear(8, 8)
        shares = [0.5, share]
        sparsifier = Sparsifier(layer, "2:4", refresh_every=1, sparsity_schedule=lambda step: shares[min(step, 1)])
        before = mask_of(layer)
        with pytest.raises(
            ValueError, match=rf"returned {re.escape(repr(share))} for step 1; it is to return the share"
        ):
            step(sparsifier, layer)
        assert np.array_equal(mask_of(layer), before)

    def test_what_cannot_be_scheduled_is_refused(self) -> None:
        with pytest.raises(TypeError, match="sparsity_schedule must be a callable of the step"):
            Sparsifier(nn.Linear(8, 8), "2:4", sparsity_schedule=0.5)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="refresh_every=None has none"):
            Sparsifier(nn.Linear(8, 8), "2:4", refresh_every=None, sparsity_schedule=cubic_schedule(0, 9))
        sparsifier = Sparsifier(nn.Linear(8, 8), "2:4", sparsity_schedule=cubic_schedule(0, 9))
        with pytest.raises(ValueError, match="refresh_every=None has none"):
            sparsifier.refresh_every = None
        with pytest.raises(ValueError, match="from step begin=5 to a later one, got end=5"):
            cubic_schedule(5, 5)


class TestHysteresis:
    @pytest.mark.parametrize("saturated", [True, False])
    @pytest.mark.parametrize("direction", DIRECTIONS)
    @pytest.mark.parametrize("pattern", PATTERNS, ids=name_of)
    def test_a_tile_changes_only_for_a_mask_that_keeps_more_by_the_share(
        self, pattern: Pair, direction: Any, saturated: bool
    ) -> None:
        n, m = pattern
        share = 0.05
        layer = nn.Linear(18, 21)
        sparsifier = Sparsifier(
            layer, pattern, direction=direction, saturated=saturated, refresh_every=1, hysteresis=share
        )
        changed = stayed = 0
        for number in range(4):
            before = mask_of(layer)
            step(sparsifier, layer, 0.05, number)
            weight, now = weight_of(layer), mask_of(layer)
            best = ms.solve_matrix(weight, n, m, saturated=saturated, direction=direction)
            assert oracle.is_valid(now, n, m, saturated=saturated, direction=direction)
            height, width = (1 if direction == "rows" else m), (1 if direction == "columns" else m)
            for rows in oracle.groups(21, height):
                for columns in oracle.groups(18, width):
                    tile = rows, columns
                    old, new = (np.abs(weight[tile])[mask[tile]].sum(dtype=float) for mask in (before, best))
                    wanted = best if new > (1 + share) * old else before
                    # An edge of a few lines may gain ones, which a saturated mask of the same lines has.
                    if before[tile].sum() >= best[tile].sum():
                        assert np.array_equal(now[tile], wanted[tile])
                        changed += wanted is best
                        stayed += wanted is before
        assert changed > 0
        assert stayed > 0

    def test_none_means_the_best_mask_at_every_refresh(self) -> None:
        layer = nn.Linear(16, 16)
        sparsifier = Sparsifier(layer, "2:4", refresh_every=1)
        step(sparsifier, layer, 0.01)
        assert oracle.is_optimal(weight_of(layer), mask_of(layer), 2, 4)

    @pytest.mark.parametrize("options", [{}, {"saturated": False}, {"method": "greedy"}], ids=str)
    def test_masks_of_another_n_go_whatever_they_keep(self, options: dict[str, Any]) -> None:
        layer = nn.Linear(16, 16)
        shares = [0.0, 0.5, 1.0, 0.5]
        sparsifier = Sparsifier(
            layer, "2:4", refresh_every=1, hysteresis=1e9, sparsity_schedule=lambda step: shares[step], **options
        )
        for n in (3, 2, 3):
            step(sparsifier, layer)
            assert np.array_equal(mask_of(layer), ms.solve_matrix(weight_of(layer), n, 4, **options))

    def test_a_tile_that_is_less_full_than_it_may_be_stays_too(self) -> None:
        layer = nn.Linear(8, 8, bias=False)
        with torch.no_grad():
            layer.weight.copy_(torch.eye(8))
            layer.weight[:4, :4] = 1
        sparsifier = Sparsifier(layer, "2:4", saturated=False, hysteresis=0.5)
        before = mask_of(layer)
        with torch.no_grad():
            masked.held(layer, "weight")[0][4:, 4:] += 1e-6
        sparsifier.refresh()
        assert np.array_equal(mask_of(layer), before)

    @pytest.mark.parametrize("method", ["greedy", "two-approx"])
    def test_masks_of_an_approximation_stay_too(self, method: str) -> None:
        layer = nn.Linear(64, 64)
        sparsifier = Sparsifier(layer, "3:8", refresh_every=1, hysteresis=1e9, method=method)
        assert all(step(sparsifier, layer, 0.1, number).layers[0].sad == 0 for number in range(3))  # type: ignore[union-attr]

    def test_every_kernel_position_has_its_own_tiles(self) -> None:
        conv = nn.Conv2d(8, 8, 3)
        sparsifier = Sparsifier(conv, "2:4", hysteresis=0.02)
        before = mask_of(conv)
        with torch.no_grad():
            weight = masked.held(conv, "weight")[0]
            weight.mul_(1 + 0.01 * torch.rand(weight.shape))
            weight[:, :, 0, 0] = weight[:, :, 0, 0].flip(0, 1)
        sparsifier.refresh()
        assert np.array_equal(mask_of(conv)[:, :, 1:], before[:, :, 1:])
        assert not np.array_equal(mask_of(conv)[:, :, 0, 0], before[:, :, 0, 0])

    def test_it_can_be_set_at_any_time_and_bad_values_are_refused(self) -> None:
        layer = nn.Linear(16, 16)
        sparsifier = Sparsifier(layer, "2:4", refresh_every=1, hysteresis=1e9)
        assert step(sparsifier, layer, 1.0).layers[0].sad == 0  # type: ignore[union-attr]
        sparsifier.hysteresis = 0
        assert step(sparsifier, layer).layers[0].sad > 0  # type: ignore[union-attr]
        for value in (-0.1, float("inf"), float("nan")):
            with pytest.raises(ValueError, match="hysteresis must be finite and not negative"):
                sparsifier.hysteresis = value
        with pytest.raises(TypeError, match="hysteresis"):
            Sparsifier(nn.Linear(8, 8), "2:4", hysteresis="a little")  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="compares masks tile by tile, and a callable method"):
            Sparsifier(nn.Linear(8, 8), "2:4", method=lambda scores, pattern: scores > 0, hysteresis=0.1)


class TestGivenMasks:
    @pytest.mark.parametrize("direction", DIRECTIONS)
    @pytest.mark.parametrize("pattern", PATTERNS, ids=name_of)
    def test_training_is_under_the_masks_as_they_are(self, pattern: Pair, direction: Any) -> None:
        n, m = pattern
        other = np.random.default_rng(0).normal(size=(21, 18))
        mask = ms.solve_matrix(other, n, m, direction=direction)
        layer = nn.Linear(18, 21)
        sparsifier = Sparsifier(
            layer, pattern, direction=direction, refresh_every=None, masks={"weight": torch.from_numpy(mask)}
        )
        for number in range(3):
            assert step(sparsifier, layer, 0.1, number) is None
        assert np.array_equal(mask_of(layer), mask)
        weight = weight_of(layer)
        assert np.array_equal(layer.weight.detach().numpy(), np.where(mask, weight, 0))

    def test_their_record_says_what_they_keep(self) -> None:
        layer = nn.Linear(8, 8)
        mask = ms.random_mask(2, 4, rng=0)
        whole = np.tile(mask, (2, 2))
        sparsifier = Sparsifier(layer, "2:4", refresh_every=None, masks={"weight": whole})
        weight = np.abs(weight_of(layer))
        assert sparsifier.last_refresh.layers[0].kept_importance == pytest.approx(weight[whole].sum() / weight.sum())

    def test_masks_of_a_file_are_those_that_the_command_found(self, tmp_path: Path) -> None:
        from safetensors.torch import save_file

        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(5, 8, 3), nn.Flatten(), nn.Linear(8, 12))
        save_file(model.state_dict(), tmp_path / "model.safetensors")
        prune_checkpoint(tmp_path / "model.safetensors", None, "1:4", masks=tmp_path / "masks", include="*weight")
        masks = read_masks(tmp_path / "masks")
        assert {name: mask.shape for name, mask in masks.items()} == {
            "0.weight": (8, 5, 3, 3),
            "2.weight": (12, 8),
        }
        own = Sparsifier(nn.Sequential(*map(copy.deepcopy, model)), "1:4").state_dict()["masks"]
        sparsifier = Sparsifier(model, "1:4", refresh_every=None, masks=masks)
        for name, mask in sparsifier.state_dict()["masks"].items():
            assert torch.equal(mask, own[name])

    def test_a_stack_of_matrices_has_its_shape_again(self, tmp_path: Path) -> None:
        from safetensors.numpy import save_file

        stack = np.random.default_rng(0).normal(size=(3, 8, 12)).astype(np.float32)
        save_file({"experts": stack}, tmp_path / "model.safetensors")
        prune_checkpoint(
            tmp_path / "model.safetensors", None, "2:4", masks=tmp_path / "masks", include="*", stack="experts"
        )
        assert np.array_equal(read_masks(tmp_path / "masks")["experts"], ms.solve_matrix(stack, 2, 4))

    def test_what_is_no_file_of_masks_is_refused(self, tmp_path: Path) -> None:
        from safetensors.numpy import save_file

        save_file({"w": np.ones((4, 4))}, tmp_path / "model.safetensors")
        with pytest.raises(CheckpointError, match="holds no masks"):
            read_masks(tmp_path / "model.safetensors")

    def test_a_tied_weight_may_go_by_any_of_its_names(self) -> None:
        model = nn.ModuleDict({"one": nn.Linear(8, 8), "two": nn.Linear(8, 8)})
        model["two"].weight = model["one"].weight
        mask = ms.solve_matrix(np.random.default_rng(0).normal(size=(8, 8)), 2, 4)
        with pytest.raises(ValueError, match=r"different ones for 'one.weight' and 'two.weight', which are one param"):
            Sparsifier(model, "2:4", refresh_every=None, masks={"two.weight": mask, "one.weight": ~mask})
        mask.flags.writeable = False
        Sparsifier(model, "2:4", refresh_every=None, masks={"two.weight": mask, "one.weight": mask.copy()})
        assert np.array_equal(mask_of(model["one"]), mask)

    @pytest.mark.parametrize(
        ("masks", "error"),
        [
            ({}, "masks has none for '0.weight', '2.weight'; add it, or exclude the parameter"),
            ({"0.weight": True}, "masks has none for '2.weight'"),
            ({"0.weight": True, "2.weight": True, "3.weight": True}, "'3.weight', which is no parameter of the model"),
            (
                {"0.weight": True, "2.weight": True, "0.bias": True},
                r"'0.bias', which stays dense \(1-D: not a matrix\)",
            ),
        ],
    )
    def test_names_have_to_be_those_of_the_sparse_parameters(self, masks: dict[str, bool], error: str) -> None:
        model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
        mask = ms.solve_matrix(np.random.default_rng(0).normal(size=(8, 8)), 2, 4)
        with pytest.raises(ValueError, match=error):
            Sparsifier(model, "2:4", refresh_every=None, masks=dict.fromkeys(masks, mask))
        assert type(model[0]) is nn.Linear

    @pytest.mark.parametrize(
        ("mask", "error"),
        [
            (torch.ones(8, 8), r"masks has torch.float32 of shape \(8, 8\) for 'weight'"),
            (torch.ones(4, 8, dtype=torch.bool), r"it takes bools of shape \(8, 8\)"),
            ([[True]], "masks has a list for 'weight'"),
            (np.ones((8, 8), dtype=object), "masks has a ndarray for 'weight'"),
            (torch.ones(8, 8, dtype=torch.bool), "that is not 2:4: "),
        ],
    )
    def test_masks_have_to_fit(self, mask: Any, error: str) -> None:
        with pytest.raises(ValueError, match=error):
            Sparsifier(nn.Linear(8, 8), "2:4", refresh_every=None, masks={"weight": mask})

    def test_masks_are_not_replaced_in_silence(self) -> None:
        with pytest.raises(ValueError, match="refresh_every=40 would replace them; give refresh_every=None"):
            Sparsifier(nn.Linear(8, 8), "2:4", masks={})
        with pytest.raises(TypeError, match="masks must be a mapping of names to bool tensors, got a list"):
            Sparsifier(nn.Linear(8, 8), "2:4", refresh_every=None, masks=[])  # type: ignore[arg-type]


class TestDecaySearch:
    """Weights that walk at random, and that a decay pulls to zero where they are pruned."""

    @staticmethod
    def train(attach: Any, steps: int = 40, watched: list[Tensor] | None = None) -> None:
        torch.manual_seed(0)
        layer = nn.Linear(16, 16)
        optimizer = torch.optim.SGD(layer.parameters(), 0.1)
        sparsifier = attach(layer)
        for _ in range(steps):
            optimizer.zero_grad()
            layer(torch.randn(8, 16)).square().mean().backward()
            optimizer.step()
            sparsifier.step()
            if watched is not None:
                watched.append(layer.weight.detach().clone())

    def test_the_decay_found_calms_masks_as_it_should(self) -> None:
        decays = [0.01 * 1.3**power for power in range(16)]
        found = find_decay(self.train, "2:4", decays=decays, refresh_every=2)
        assert 0.6 <= found.flip_rates[found.decay] / found.dense_flip_rate <= 0.95
        assert len(found.flip_rates) <= 4

    @pytest.mark.parametrize("pattern", PATTERNS, ids=name_of)
    def test_the_dense_flip_rate_is_that_of_masks_which_nothing_is_trained_under(self, pattern: Pair) -> None:
        weights: list[Tensor] = []

        def train(attach: Any) -> None:
            # The first run is the dense one.
            self.train(attach, 9, None if weights else weights)

        found = find_decay(train, pattern, decays=[1e-9], refresh_every=3, lowest=0, highest=1e9)
        torch.manual_seed(0)
        masks = [ms.solve_matrix(nn.Linear(16, 16).weight.detach().numpy(), *pattern)]
        masks += [ms.solve_matrix(weight.numpy(), *pattern) for weight in weights[2::3]]
        flips = [(old != new).mean() for old, new in pairwise(masks)]
        assert found.dense_flip_rate == pytest.approx(np.mean(flips))

    @pytest.mark.parametrize(
        ("options", "error", "message"),
        [
            ({"decay": 0.1}, TypeError, "find_decay decides on decay itself, got 0.1"),
            ({"masks": {}}, TypeError, "find_decay decides on masks itself"),
            ({"decays": []}, ValueError, r"in increasing order, got \[\]"),
            ({"decays": [2.0, 1.0]}, ValueError, "in increasing order"),
            ({"decays": [0.0, 1.0]}, ValueError, "positive, finite"),
            ({"lowest": 2.0}, ValueError, "sought from lowest to highest, got 2.0 and 0.95"),
            ({"refresh_every": 0}, ValueError, "refresh_every"),
            ({"refresh_every": 50}, ValueError, r"called step\(\) 40 times, and the first refresh comes after 50"),
            ({"gradient_": 1}, TypeError, "gradient_"),
        ],
    )
    def test_bad_input_is_refused(self, options: dict[str, Any], error: type[Exception], message: str) -> None:
        with pytest.raises(error, match=message):
            find_decay(self.train, "2:4", **options)

    def test_training_that_does_not_do_as_told_is_refused(self) -> None:
        with pytest.raises(ValueError, match="train did not call attach"):
            find_decay(lambda attach: None, "2:4")
        with pytest.raises(ValueError, match="attached twice"):
            find_decay(lambda attach: [attach(nn.Linear(8, 8)) for _ in range(2)], "2:4")

        def still(attach: Any) -> None:
            sparsifier = attach(nn.Linear(8, 8))
            for _ in range(3):
                sparsifier.step()

        with pytest.raises(ValueError, match="dense training changes no mask"):
            find_decay(still, "2:4", refresh_every=1)
