"""The AdaPrune study: it reads text, prunes what it says, keeps its results and draws from them."""

import csv
from pathlib import Path

import pytest
import torch

from paper_figures.adaprune import convnet, figures, minilm, text
from paper_figures.training.data import Data

pytestmark = pytest.mark.studies


def test_sentences_are_cut_at_their_ends_and_come_once(tmp_path: Path) -> None:
    body = "This is one sentence, which is broken\nover two lines. Short. And here is another, which is long enough."
    file = tmp_path / "text"
    file.write_text(f"{body}\n\t\t-- Somebody\n%\n{body}\n%\n")
    found = text.sentences([file], 2)
    assert sorted(found) == [
        "And here is another, which is long enough.",
        "This is one sentence, which is broken over two lines.",
    ]
    assert not any("Somebody" in sentence or "\n" in sentence for sentence in found)
    with pytest.raises(SystemExit, match=r"hold \d sentences of 40 to 300 letters, not 9"):
        text.sentences([file], 9)
    with pytest.raises(SystemExit, match="not found; apt-get install fortunes, or give --calibration"):
        text.sentences([tmp_path / "nothing"], 1)


@pytest.mark.slow
def test_every_start_of_the_convnet_is_pruned_and_drawn(tmp_path: Path) -> None:
    torch.manual_seed(0)
    data = Data(torch.randn(128, 1, 8, 8), torch.arange(128) % 10, torch.randn(20, 1, 8, 8), torch.arange(20) % 10)
    study = convnet.Study(tmp_path, data, epochs=1)
    for sparsity in (0.0, 0.7):
        for repair, images in (("masks alone", 1), ("lstsq", 10), ("lstsq", 100)):
            convnet.keep(tmp_path, study.run(convnet.Case(sparsity, "both", repair, images)))
    for pattern, count in (("4:8", 8), ("4:8", 16), ("2:4", 16)):
        for direction in ("both", "rows"):
            for repair in ("no repair", "lstsq", "adam"):
                case = minilm.Case(pattern, direction, "magnitude", repair, sentences=count)
                minilm.keep(tmp_path, minilm.Result(case, 0.1, 0.9, 0.5, 1.0))
    found = convnet.read(tmp_path)
    assert {each.case.sparsity for each in found} == {0.0, 0.7}
    for each in found:
        # Layers with hardly any zero keep 8:8, and are left alone.
        assert 4 <= len(each.layers) <= 8 if each.case.sparsity else not each.layers
        assert all(0 <= layer.touched <= layer.weights for layer in each.layers)
    page = tmp_path / "README.md"
    page.write_text((Path(figures.__file__).parent / "README.md").read_text())
    figures.draw(tmp_path, tmp_path)
    for name in ("minilm", "variants", "images", "conversion"):
        assert (tmp_path / f"{name}.png").stat().st_size > 1000
        with (tmp_path / f"{name}.csv").open() as file:
            assert list(csv.DictReader(file))
    assert "0.900, 50%" in page.read_text()
    assert "Adam leaves 1.00 times the error of least squares" in page.read_text()


def test_the_page_has_a_place_for_every_table_and_figure() -> None:
    page = (Path(figures.__file__).parent / "README.md").read_text()
    for name in ("minilm", "variants", "images", "conversion"):
        assert f"<!-- table {name} -->\n" in page
        assert f"]({name}.png)" in page
    assert "<!-- table answers -->\n" in page
