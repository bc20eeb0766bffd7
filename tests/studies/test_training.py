"""The training study: it reads the data, masks as it says, keeps its results and draws from them."""

import csv
import gzip
import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch

import masksolve as ms
from masksolve.torch import Sparsifier
from paper_figures._results import path_of
from paper_figures.training import figures
from paper_figures.training.data import FILES, Data, load
from paper_figures.training.models import ARCHITECTURES
from paper_figures.training.recipes import RECIPES, Recipe
from paper_figures.training.train import Run, run

pytestmark = pytest.mark.studies


def write_idx(path: Path, array: np.ndarray, zipped: bool) -> None:
    content = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.tobytes()
    if zipped:
        path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(content))
    else:
        path.write_bytes(content)


@pytest.mark.parametrize("zipped", [True, False])
def test_the_four_files_are_read_from_any_folder(tmp_path: Path, zipped: bool) -> None:
    rng = np.random.default_rng(0)
    arrays = [
        rng.integers(0, 256, (n, 28, 28) if k % 2 == 0 else n).astype(np.uint8) for k, n in enumerate((6, 6, 4, 4))
    ]
    for name, array in zip(FILES, arrays, strict=True):
        write_idx(tmp_path / name, array, zipped)
    data = load(tmp_path)
    assert data.images.shape == (6, 1, 28, 28)
    assert abs(float(data.images.mean())) < 1e-5
    assert data.test_labels.tolist() == arrays[3].tolist()
    assert torch.equal(data.images.flatten().argsort(), torch.from_numpy(arrays[0]).flatten().float().argsort())


def test_a_folder_without_the_files_says_where_to_get_them(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"has no train-images.*apt-get install dataset-fashion-mnist, or give --data"):
        load(tmp_path)


def masks_of(sparsifier: Sparsifier) -> list[np.ndarray]:
    """One array of matrices a parameter."""
    masks = [mask.numpy() for mask in sparsifier.state_dict()["masks"].values()]
    return [np.moveaxis(mask, (0, 1), (-2, -1)) for mask in masks]


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("recipe", [each for each in RECIPES if each.structure != "dense"], ids=lambda each: each.name)
def test_every_recipe_has_the_masks_that_it_names(recipe: Recipe, name: str) -> None:
    torch.manual_seed(0)
    model = ARCHITECTURES[name].make()
    sparsifier = recipe.sparsifier(model, ARCHITECTURES[name].include, seed=0)
    assert sparsifier is not None
    n, m = (1, 2) if recipe.pattern == "-" else map(int, recipe.pattern.split(":"))
    masks = masks_of(sparsifier)
    assert len(masks) == {"residual convnet": 8, "vision transformer": 12}[name]
    for mask in masks:
        density = 0.5 if recipe.method != "greedy" else 0.49
        assert density - 0.03 < mask.mean() <= 0.5
        if recipe.structure != "unstructured":
            assert ms.is_valid_mask(mask, n, m, direction=recipe.structure, saturated=recipe.method != "greedy")
    transposable = all(ms.is_valid_mask(mask, n, m) for mask in masks)
    assert transposable == (recipe.structure == "both")


def test_a_run_is_kept_and_another_starts_from_its_weights(tmp_path: Path) -> None:
    torch.manual_seed(0)
    data = Data(torch.randn(256, 1, 28, 28), torch.arange(256) % 10, torch.randn(64, 1, 28, 28), torch.arange(64) % 10)
    with pytest.raises(FileNotFoundError):
        run(tmp_path, "residual convnet", RECIPES[-1], 0, 1, data)
    for recipe in (Recipe("dense"), RECIPES[-1]):
        found = run(tmp_path, "residual convnet", recipe, 0, 1, data)
        assert path_of(tmp_path, "residual convnet", recipe, 0).exists()
        assert found in figures.read(tmp_path)
        assert (found.recipe, found.images, found.flips) == (recipe.name, 256, [])
    assert not list(tmp_path.glob("*.tmp"))


def test_runs_of_another_setting_are_not_mixed_in(tmp_path: Path) -> None:
    record = Run("residual convnet", "dense", 0, 1, 6400, 0.8, 0.5, None, [], 0.0, 60.0)
    path = path_of(tmp_path, "residual convnet", Recipe("dense"), 0)
    path.write_text(json.dumps(asdict(record)))
    figures.check_epochs(tmp_path, 1)
    with pytest.raises(SystemExit, match="holds runs of 1 epochs, and this setting has 5; give another --results"):
        figures.check_epochs(tmp_path, 5)


def test_the_table_has_means_and_standard_errors(tmp_path: Path) -> None:
    accuracies = {0: 0.8, 1: 0.85, 2: 0.87}
    recipes = [RECIPES[0], RECIPES[1], RECIPES[5]]
    for recipe in recipes:
        for name in ARCHITECTURES:
            for seed, accuracy in accuracies.items():
                flips = [] if recipe.masks == "-" else [[40, 0.1], [80, 0.05]]
                kept = None if recipe.masks == "-" else 0.7
                record = Run(name, recipe.name, seed, 5, 100, accuracy, 0.5, kept, flips, 0.01, 60.0)  # type: ignore[arg-type]
                path_of(tmp_path, name, recipe, seed).write_text(json.dumps(asdict(record)))
    figures.draw(tmp_path, tmp_path)
    with (tmp_path / "accuracy.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["masks"] for row in rows] == [each.name for each in recipes]
    values = 100 * np.array(list(accuracies.values()))
    for row in rows:
        assert row["residual convnet, %"] == f"{values.mean():.2f} ± {values.std(ddof=1) / np.sqrt(3):.2f}"
    assert (rows[-1]["bits per weight"], rows[-1]["paper's bits"]) == ("0.5745", "0.6875")
    with (tmp_path / "flips.csv").open() as file:
        assert [row["flip rate"] for row in csv.DictReader(file)] == ["0.1", "0.05"] * 4
    assert all((tmp_path / f"{name}.png").stat().st_size > 1000 for name in ("accuracy", "flips"))


def test_the_page_has_places_for_the_tables() -> None:
    page = (Path(figures.__file__).parent / "README.md").read_text()
    for name in ("accuracy", "flips"):
        assert f"<!-- table {name} -->\n" in page
