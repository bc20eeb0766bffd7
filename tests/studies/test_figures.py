"""The paper's figures: each regenerates as committed, and the page shows all of them."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.studies

FOLDER = Path(__file__).parents[2] / "paper_figures"
SCRIPTS = sorted(path.stem for path in FOLDER.glob("[!_]*.py"))


def names(pattern: str) -> list[str]:
    return sorted(path.stem for path in FOLDER.glob(pattern))


@pytest.mark.parametrize(
    "name",
    [
        "mask_diversity",
        pytest.param("flow_network", marks=pytest.mark.slow),
        pytest.param("bits_per_weight", marks=pytest.mark.slow),
        pytest.param("approximation_ratio", marks=pytest.mark.slow),
    ],
)
def test_a_figure_regenerates_as_committed(name: str, tmp_path: Path) -> None:
    page = (FOLDER / "README.md").read_text()
    (tmp_path / "README.md").write_text(page)
    subprocess.run([sys.executable, FOLDER / f"{name}.py", "--into", tmp_path], check=True)
    assert (tmp_path / f"{name}.csv").read_text() == (FOLDER / f"{name}.csv").read_text()
    assert (tmp_path / "README.md").read_text() == page
    assert (tmp_path / f"{name}.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_the_page_shows_every_figure_and_its_data() -> None:
    page = (FOLDER / "README.md").read_text()
    assert len(SCRIPTS) == 8
    assert SCRIPTS == names("*.png") == names("*.csv")
    assert sorted(re.findall(r"!\[.+\]\((\w+)\.png\)", page)) == SCRIPTS
    tables = dict(re.findall(r"<!-- table (\w+) -->\n(.*?)<!-- end -->", page, flags=re.DOTALL))
    assert sorted(tables) == SCRIPTS
    assert all(table.count("\n") > 2 for table in tables.values())


def test_a_script_without_the_real_matrices_says_where_to_get_them(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, FOLDER / "conversion_odds.py", "--into", tmp_path], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stderr == "give --weights FILE; `make figures` downloads the file and passes it\n"
    assert not list(tmp_path.iterdir())
