"""The study of training from scratch: its rivals compute what they say, every recipe trains, and all is drawn."""

import csv
import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import masksolve as ms
from paper_figures._results import path_of
from paper_figures.language_model import text
from paper_figures.pretraining import __main__ as program
from paper_figures.pretraining import figures
from paper_figures.pretraining.models import GPT, Images, Text
from paper_figures.pretraining.recipes import RECIPES, Recipe
from paper_figures.pretraining.rivals import DECAY, DoublyMasked
from paper_figures.pretraining.run import Run, read, run, train
from paper_figures.training.data import FILES
from tests import oracle
from tests.studies.test_training import write_idx
from tests.tables import Pair, name_of

pytestmark = pytest.mark.studies


def problem(folder: Path) -> Text:
    for part in (*text.CALIBRATION, *text.EVALUATION):
        (folder / part).mkdir(parents=True, exist_ok=True)
        (folder / part / "page.rst.txt").write_text("a few words of no meaning at all; " * 600)
    return Text(folder, 32, 1, 2, 1e-2, 42, 3, 5)


@pytest.mark.parametrize("is_random", [True, False])
@pytest.mark.parametrize("pattern", [(2, 4), (1, 4), (3, 8)], ids=name_of)
def test_the_rivals_mask_once_for_the_forward_product_and_once_more_for_the_backward_one(
    pattern: Pair, is_random: bool
) -> None:
    torch.manual_seed(0)
    dense = nn.Linear(16, 24)
    layer = DoublyMasked(dense, ms.Pattern(*pattern), is_random=is_random, rng=np.random.default_rng(0))
    n, m = pattern
    once, twice = layer.forward_mask.numpy(), layer.backward_mask.numpy()
    assert oracle.is_valid(once, n, m, direction="rows")
    assert not (twice & ~once).any()
    assert oracle.is_valid(twice[layer._order], n, m, saturated=False, direction="columns")
    if not is_random:
        assert oracle.is_optimal(dense.weight.detach().numpy(), once, n, m, direction="rows")

    x = torch.randn(2, 5, 16, requires_grad=True)
    g = torch.randn(2, 5, 24)
    layer(x).backward(g)
    weight = dense.weight.detach()
    torch.testing.assert_close(layer(x), nn.functional.linear(x, weight * layer.forward_mask, dense.bias))
    torch.testing.assert_close(x.grad, g @ (weight * layer.backward_mask))
    decay = 0.0 if is_random else DECAY
    expected = g.flatten(0, 1).t() @ x.detach().flatten(0, 1) + decay * weight * ~layer.forward_mask
    torch.testing.assert_close(layer.weight.grad, expected)


def test_slope_never_changes_the_forward_mask_and_bi_mask_keeps_more_than_without_an_order() -> None:
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    fixed, free = (
        DoublyMasked(nn.Linear(32, 32), ms.Pattern(2, 4), is_random=is_random, rng=rng) for is_random in (True, False)
    )
    before = fixed.forward_mask.clone()
    with torch.no_grad():
        for layer in (fixed, free):
            layer.weight.normal_()
            layer.renew(100)
    assert torch.equal(fixed.forward_mask, before)
    assert free.backward_mask.sum() > free._backward(np.arange(32)).sum()


def test_a_gpt_sees_no_byte_before_its_turn() -> None:
    torch.manual_seed(0)
    model, tokens = GPT(32, 2, 2), torch.randint(256, (1, 20))
    changed = tokens.clone()
    changed[0, 12] = (tokens[0, 12] + 1) % 256
    differs = (model(tokens) - model(changed)).abs().amax(2)[0] > 1e-6
    assert differs.nonzero()[0] == 12
    assert sum(weight.numel() for weight in GPT(384, 6, 6).blocks.parameters() if weight.ndim > 1) == 10_616_832


@pytest.mark.parametrize(
    ("recipe", "work"),
    [
        (Recipe("dense"), 1),
        (Recipe("one-sided", "2:4", "ste"), 5 / 6),
        (Recipe("transposable", "8:16", "ste"), 2 / 3),
        (Recipe("transposable", "1:4", "ste", "2:4"), 1 / 3),
        (Recipe("slope", "2:4"), 2 / 3),
    ],
)
def test_the_work_left_is_counted_product_by_product(recipe: Recipe, work: float) -> None:
    assert recipe.work == pytest.approx(work)


def test_every_recipe_trains_and_all_is_drawn(tmp_path: Path) -> None:
    small = problem(tmp_path / "text")
    for recipe in RECIPES:
        if recipe.pattern in ("-", "2:4", "16:32"):
            run(tmp_path, {"gpt 0.8M": small}, "gpt 0.8M", recipe, 0)
    found = read(tmp_path)
    assert all(len(each.losses) >= 8 and each.losses[-1][0] == 42 for each in found)
    assert all(each.losses[-1][1] < each.losses[0][1] for each in found)
    assert len({each.losses[-1][1] for each in found}) == len(found)
    for task in program.tasks(program.SEEDS):
        path = path_of(tmp_path, *task)
        if not path.exists():
            name, recipe, seed = task
            losses = [(step, 3.0 - step / 50) for step, _ in found[0].losses]
            made = Run(name, recipe.name, seed, 42, losses, 0.1, 0.7, 0.01, 9.0, 0.1)
            path.write_text(json.dumps(asdict(made)))
    page = tmp_path / "README.md"
    page.write_text((Path(figures.__file__).parent / "README.md").read_text())
    figures.draw(read(tmp_path), tmp_path)
    assert (tmp_path / "loss.png").stat().st_size > 1000
    with (tmp_path / "loss.csv").open() as file:
        assert len(list(csv.DictReader(file))) == len(program.tasks(program.SEEDS))
    assert "| transposable 16:32 ste mvue 2:4 | 3 | 0.5 |" in page.read_text()


def test_images_are_learnt_too(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for name, (number, shape) in zip(FILES, [(384, (28, 28)), (384, ()), (50, (28, 28)), (50, ())], strict=True):
        write_idx(tmp_path / name, rng.integers(0, 10, (number, *shape)).astype(np.uint8), False)
    found = train("vision transformer", Images(tmp_path, 384, 2, 50), Recipe("transposable", "4:8", "soft"), 0)
    assert (found.steps, found.losses[-1][0]) == (6, 6)
    assert found.in_masks > 0
    assert found.flips is not None


def test_a_run_is_the_same_from_the_same_seed(tmp_path: Path) -> None:
    small = problem(tmp_path)
    recipe = Recipe("transposable", "4:8", "ste", "2:4")
    first, again, other = (train("gpt", small, recipe, seed).losses for seed in (1, 1, 2))
    assert first == again != other


def test_results_that_are_not_there_are_not_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["pretraining", "--only-draw", "--results", str(tmp_path)])
    with pytest.raises(SystemExit):
        program.main()
    assert f"no results in {tmp_path}" in capsys.readouterr().err
