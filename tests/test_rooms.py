"""The import graph: it points downwards in CONTRIBUTING's table of rooms, and has no cycle."""

import re
from graphlib import TopologicalSorter
from pathlib import Path

import grimp
import pytest

TABLE = Path(__file__).parents[1] / "CONTRIBUTING.md"
LINE = re.compile(r"^\| (`[^|]*`(?: \\\| `[^|]*`)*) \|", re.MULTILINE)


@pytest.fixture(scope="module")
def graph() -> grimp.ImportGraph:
    return grimp.build_graph("masksolve", exclude_type_checking_imports=True, cache_dir=None)


@pytest.fixture(scope="module")
def rows() -> list[tuple[set[str], bool]]:
    """The rooms of each row, and whether they are apart."""
    section = TABLE.read_text(encoding="utf-8").split("## Rooms\n")[1].split("\n## ")[0]
    found = [(set(re.findall(r"`([^`]+)`", row)), "|" in row) for row in LINE.findall(section)]
    assert len(found) > 10
    return found


def layers(rows: list[tuple[set[str], bool]], within: str = "") -> list[grimp.Layer]:
    inside = [
        ({room.removeprefix(within) for room in rooms if room.startswith(within)}, apart) for rooms, apart in rows
    ]
    return [
        grimp.Layer(*own, independent=apart)
        for rooms, apart in inside
        if (own := {room for room in rooms if "." not in room})
    ]


@pytest.mark.parametrize("within", ["", "torch."])
def test_imports_point_downwards(within: str, graph: grimp.ImportGraph, rows: list[tuple[set[str], bool]]) -> None:
    container = f"masksolve.{within}".rstrip(".")
    wrong = graph.find_illegal_dependencies_for_layers(layers(rows, within), containers={container})
    assert not wrong, "\n".join(f"{each.importer} imports {each.imported}" for each in wrong)


def test_every_room_is_in_the_table(graph: grimp.ImportGraph, rows: list[tuple[set[str], bool]]) -> None:
    listed = {f"masksolve.{room}" for rooms, _ in rows for room in rooms}
    rooms = graph.find_children("masksolve") | graph.find_children("masksolve.torch")
    assert listed == rooms
    assert len(listed) == sum(len(rooms) for rooms, _ in rows)


def test_no_modules_import_each_other(graph: grimp.ImportGraph) -> None:
    TopologicalSorter({name: graph.find_modules_directly_imported_by(name) for name in graph.modules}).prepare()


@pytest.mark.parametrize("importer", ["masksolve.torch._training.records", "masksolve._pattern"])
def test_an_arrow_upwards_is_found(importer: str, graph: grimp.ImportGraph, rows: list[tuple[set[str], bool]]) -> None:
    graph.add_import(importer=importer, imported="masksolve.torch._adaprune.tasks")
    try:
        within = ["", "torch."][importer.startswith("masksolve.torch.")]
        container = f"masksolve.{within}".rstrip(".")
        assert graph.find_illegal_dependencies_for_layers(layers(rows, within), containers={container})
    finally:
        graph.remove_import(importer=importer, imported="masksolve.torch._adaprune.tasks")


@pytest.mark.parametrize("package", ["benchmarks", "paper_figures"])
def test_no_benchmarks_and_no_figures_import_each_other(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(TABLE.parent)
    graph = grimp.build_graph(package, cache_dir=None)
    assert len(graph.modules) > 20
    TopologicalSorter({name: graph.find_modules_directly_imported_by(name) for name in graph.modules}).prepare()
