"""The study of neighbours: its recipes do what they say, its results are kept and drawn."""

import csv
from pathlib import Path

import pytest
import torch

import masksolve as ms
from paper_figures.neighbours import __main__ as program
from paper_figures.neighbours import figures
from paper_figures.neighbours.models import MODELS, lenet_300_100
from paper_figures.neighbours.recipes import ALPHA, ALPHAS, DENSITIES, METHODS, PIPED, RECIPES, Recipe
from paper_figures.neighbours.run import Run, apply, largest, read, run, weights_of
from paper_figures.training.data import Data

pytestmark = pytest.mark.studies


@pytest.fixture
def data() -> Data:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(256, 1, 28, 28, generator=generator)
    return Data(images, torch.arange(256) % 10, images[:100], torch.arange(100) % 10)


@pytest.mark.parametrize("density", DENSITIES)
def test_magnitude_keeps_the_largest_of_the_whole_model(density: float) -> None:
    torch.manual_seed(0)
    model = lenet_300_100()
    before = torch.cat([weight.flatten().clone() for _, weight in weights_of(model)])
    apply(model, largest(model, density))
    after = torch.cat([weight.flatten() for _, weight in weights_of(model)])
    assert float((after != 0).float().mean()) == pytest.approx(density, abs=1e-5)
    assert before[after != 0].abs().min() >= before[after == 0].abs().max()


@pytest.mark.parametrize("name", MODELS)
def test_recipes_change_models_as_they_say(name: str, data: Data, tmp_path: Path) -> None:
    recipes = [
        Recipe("dense"),
        Recipe("dynamic", 0.5),
        Recipe("dynamic", 0.5, "4:8"),
        Recipe("magnitude", 0.1),
        Recipe("sr-ste", pattern="2:8"),
        Recipe("pfp", 0.5),
        Recipe("pfp", 0.5, "4:8"),
    ]
    found = {recipe: run(tmp_path, name, recipe, 0, 1, data) for recipe in recipes}
    dense, dynamic, piped, magnitude, sr_ste, cut, both = found.values()
    assert dense.density == 1.0
    assert dynamic.density < 1
    assert piped.density <= dynamic.density
    assert magnitude.density == pytest.approx(0.1, abs=1e-3)
    # All but the ends at a quarter.
    assert all(share == pytest.approx(0.25, abs=0.02) for share in sr_ste.layers[1:-1])
    assert sr_ste.layers[0] == sr_ste.layers[-1] == 1
    assert cut.density == pytest.approx(0.5, abs=0.06)
    assert both.density < cut.density
    assert [each.before is not None for each in found.values()] == [False, False, True, True, False, True, True]
    assert {(each.model, each.recipe.name) for each in read(tmp_path)} == {(name, recipe.name) for recipe in recipes}


def test_all_is_drawn(tmp_path: Path) -> None:
    runs = [
        Run(name, recipe, seed, 0.9 + 0.01 * seed, 0.8 if recipe.starts_trained else None, 0.3, [0.1, 0.5], 10.0)
        for name, recipe, seed in program.tasks(2)
    ]
    assert len({(each.model, each.recipe.name, each.seed) for each in runs}) == len(runs)
    assert ALPHA in ALPHAS
    assert Recipe(METHODS[0], PIPED) in RECIPES
    assert all(ms.Pattern.parse(recipe.pattern) for recipe in RECIPES if recipe.pattern)
    page = tmp_path / "README.md"
    page.write_text((Path(figures.__file__).parent / "README.md").read_text())
    figures.draw(runs, tmp_path)
    kept = []
    for name in ("density", "filters"):
        assert (tmp_path / f"{name}.png").stat().st_size > 1000
        with (tmp_path / f"{name}.csv").open() as file:
            kept += [(row["model"], row["recipe"], int(row["seed"])) for row in csv.DictReader(file)]
    assert sorted(kept) == sorted((each.model, each.recipe.name, each.seed) for each in runs)
    text = page.read_text()
    assert text.count("90.50 ± 0.50") == len(runs) // 2
    assert "| LeNet-5 | dynamic 0.001 then 8:16 | 30.00 |" in text


def test_results_that_are_not_there_are_not_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["neighbours", "--only-draw", "--results", str(tmp_path)])
    with pytest.raises(SystemExit):
        program.main()
    assert f"no results in {tmp_path}" in capsys.readouterr().err
