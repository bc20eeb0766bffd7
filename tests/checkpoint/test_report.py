"""Output for users: the report as a page and as data, the plan, and the comparison."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from masksolve import Pattern
from masksolve.checkpoint import (
    CheckpointError,
    PruneReport,
    compare_checkpoints,
    page,
    plan_checkpoint,
    prune_checkpoint,
)
from tests.checkpoints import PRUNED, contents, tensors_of, write_shard, write_sharded

HOSTILE = "<script>alert(1)</script>'\"&[bold]"


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> PruneReport:
    folder = tmp_path_factory.mktemp("report")
    source = write_sharded(folder / "in")
    tensors = tensors_of(source / "model-00001-of-00003.safetensors")
    write_shard(source / "model-00001-of-00003.safetensors", {**tensors, HOSTILE: np.eye(16)})
    index = json.loads((source / "model.safetensors.index.json").read_text())
    index["weight_map"][HOSTILE] = "model-00001-of-00003.safetensors"
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    return prune_checkpoint(source, folder / "out", Pattern(3, 8), method="greedy")


class Parsed(HTMLParser):
    """The text of a page, its tags, and whether every tag is closed."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.texts: list[str] = []
        self.tags: list[str] = []
        self.open: list[str] = []
        self.feed(content)

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.tags.append(tag)
        if tag not in ("meta", "br", "input"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: object) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_the_page_needs_nothing_but_itself(report: PruneReport) -> None:
    content = page(report)
    assert not re.search(r"https?:|//|<link|<img|@import|url\(|fetch|XMLHttp|import\(", content.replace("</", ""))
    # The page's own, and none of a tensor's name.
    assert content.count("<script") == 1


def test_the_page_is_well_formed_and_tells_everything(report: PruneReport) -> None:
    parsed = Parsed(page(report))
    assert parsed.open == []
    assert parsed.tags.count("script") == 1
    text = "\n".join(parsed.texts)
    for tensor in report.tensors:
        assert tensor.name in text
        assert f"{tensor.kept_importance:.2%}" in text
        assert str(tensor.pattern) in text
    for skipped in report.skipped:
        assert skipped.reason in text
    assert HOSTILE in text
    assert report.command in text
    assert report.versions["numpy"] in text
    assert parsed.tags.count("figure") == len(report.worst_tiles) == 8


def test_the_worst_tiles_are_drawn_with_their_weights(report: PruneReport) -> None:
    source = Path(report.input)
    tensors = {name: w for shard in source.glob("*.safetensors") for name, w in tensors_of(shard).items()}
    for worst in report.worst_tiles:
        tile = worst.tile
        w = tensors[worst.tensor][(..., *tile.matrix)] if tile.matrix else tensors[worst.tensor]
        part = w[tile.row : tile.row + 8, tile.column : tile.column + 8].astype(float)
        assert np.array_equal(part, worst.weights)
        kept = np.array([[entry == "1" for entry in line] for line in tile.mask])
        assert np.abs(part)[kept].sum() == pytest.approx(tile.kept)
        assert np.abs(part).sum() == pytest.approx(tile.importance)
    assert [worst.tile.gap for worst in report.worst_tiles] == sorted(
        (worst.tile.gap for worst in report.worst_tiles), reverse=True
    )


def test_the_data_say_what_the_page_says(report: PruneReport) -> None:
    record = json.loads(json.dumps(report.to_dict()))
    assert {tensor["name"] for tensor in record["tensors"]} == PRUNED | {HOSTILE}
    assert record["command"] == report.command
    assert record["versions"] == report.versions
    assert [tensor["tile_gaps"] for tensor in record["tensors"]] == [list(each.tile_gaps) for each in report.tensors]
    assert len(record["worst_tiles"]) == 8
    assert len(record["skipped"]) == len(report.skipped)


def browse(path: Path, *options: str) -> str:
    """What a real browser makes of a page, at its end."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no chromium is installed")
    plain = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=1100,1600"]
    done = subprocess.run(
        [browser, *plain, f"--user-data-dir={path.parent / 'profile'}", *options, path.as_uri()],
        capture_output=True,
        check=True,
        timeout=60,
    )
    return done.stdout.decode()


def test_a_browser_draws_the_page(report: PruneReport, tmp_path: Path) -> None:
    from matplotlib.image import imread

    path, shot = tmp_path / "report.html", tmp_path / "shot.png"
    path.write_text(page(report), encoding="utf-8")
    browse(path, f"--screenshot={shot}")
    pixels = np.round(imread(shot)[..., :3] * 255).astype(int)
    for colour in ((0x2F, 0x6F, 0xBA), (0xE7, 0xEB, 0xEF), (0x2E, 0x85, 0x40)):
        # A bar of each kind is hundreds of pixels.
        assert (np.abs(pixels - colour).max(axis=-1) <= 2).sum() > 300


def test_a_browser_sorts_and_filters_the_tables(report: PruneReport, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    # A reader's clicks, and what is then to be seen.
    clicks = """<script>
      const table = [...document.querySelectorAll("table.data")].find(t => t.textContent.includes("kept importance"));
      const names = () => [...table.tBodies[0].rows].filter(r => !r.hidden).map(r => r.cells[0].textContent);
      const buttons = [...table.tHead.querySelectorAll("button")], input = table.previousSibling.firstChild;
      const kept = buttons.find(b => b.textContent === "kept importance"), seen = [names()];
      kept.click(); seen.push(names());
      kept.click(); seen.push(names());
      buttons[0].click(); seen.push(names());
      input.value = "LAYERS.1"; input.oninput(); seen.push(names());
      const note = table.previousSibling.lastChild.textContent;
      document.title = JSON.stringify([...seen, [note]]);
    </script>"""
    path.write_text(page(report).replace("</body>", f"{clicks}</body>"), encoding="utf-8")
    title = re.search("<title>(.*?)</title>", browse(path, "--dump-dom"), re.DOTALL)
    assert title is not None
    first, up, down, by_name, filtered, (note,) = json.loads(unescape(title[1]))
    kept = {tensor.name: tensor.kept_importance for tensor in report.tensors}
    assert first == list(kept)
    assert [kept[name] for name in up] == sorted(kept.values())
    assert [kept[name] for name in down] == sorted(kept.values(), reverse=True)
    assert sorted(by_name) == sorted(kept)
    assert by_name.index("layers.0.weight") < by_name.index("layers.1.weight")
    assert filtered == [name for name in by_name if "layers.1" in name]
    assert note == f"{len(filtered)} of {len(kept)}"


def test_a_comparison_has_a_page(report: PruneReport) -> None:
    assert report.output is not None
    compared = compare_checkpoints(report.input, report.output)
    parsed = Parsed(page(compared))
    assert parsed.open == []
    text = "\n".join(parsed.texts)
    for tensor in compared.tensors:
        assert (tensor.name in text) == (not tensor.is_same)
    changed = {tensor.name for tensor in compared.tensors if not tensor.is_same}
    assert len(changed) > 5
    assert all(f"{each.kept_importance:.2%}" in text for each in report.tensors if each.name in changed)
    assert parsed.tags.count("script") == 1
    assert all(file in text for file in compared.files)
    same = Parsed(page(compare_checkpoints(report.input, report.input)))
    assert "all are the same" in same.texts


def test_the_plan_is_what_is_done(report: PruneReport) -> None:
    source = Path(report.input)
    before = contents(source.parent)
    plan = plan_checkpoint(source, [Pattern(3, 8), Pattern(16, 32), Pattern(1, 128)], method="greedy", workers=2)
    assert contents(source.parent) == before
    first, second = plan.plans
    assert [tensor.name for tensor in first.chosen] == [tensor.name for tensor in report.tensors]
    assert first.skipped == report.skipped
    assert first.nbytes == sum(file.stat().st_size for file in source.rglob("*") if file.is_file())
    assert len(second.chosen) < len(first.chosen)
    assert list(plan.misfits) == ["1:128"]
    assert 0 < first.seconds < 60
    assert first.memory is None or 50 << 20 < first.memory < 4 << 30


def test_a_plan_refuses_what_a_prune_would(tmp_path: Path) -> None:
    bad = np.ones((8, 8))
    bad[2, 5] = np.inf
    write_shard(tmp_path / "in", {"fine": np.ones((64, 64)), "bad": bad})  # of which the larger is read whole
    with pytest.raises(CheckpointError, match=r"tensor 'bad': weights\[2, 5\] is inf"):
        plan_checkpoint(tmp_path / "in", [Pattern(3, 8)])
    for workers in (0, -1):
        with pytest.raises(ValueError, match=f"workers must be at least 1, got {workers}"):
            plan_checkpoint(tmp_path / "in", [Pattern(3, 8)], exclude=["bad"], workers=workers)


def test_a_comparison_tells_what_changed(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    w = rng.standard_normal((16, 16)).astype(np.float32)
    w[0, :2] = 0
    after = w.copy()
    after[0, 0] = 5  # one zero gone,
    after[1, :3] = 0  # three made,
    after[2, 0] += 1  # and one weight moved
    shared = {"same": w, "ids": np.arange(10)}
    write_shard(tmp_path / "a", {**shared, "w": w, "gone": w, "cast": w}, {"by": "a"})
    write_shard(
        tmp_path / "b", {"new": w, "w": after, "cast": w.astype(np.float16), **shared, "ids": np.arange(10) // 2}
    )
    result = compare_checkpoints(tmp_path / "a", tmp_path / "b")
    by_name = {tensor.name: tensor for tensor in result.tensors}
    assert by_name["same"].is_same
    assert (by_name["ids"].changed, by_name["ids"].entries) == (9, 10)
    assert by_name["gone"].difference == "only in the first"
    assert by_name["new"].difference == "only in the second"
    assert by_name["cast"].difference == "F32 16x16, then F16 16x16"
    changed = by_name["w"]
    assert (changed.entries, changed.changed, changed.zeroed, changed.zeros) == (256, 5, 3, (2, 4))
    assert changed.importance == pytest.approx((np.abs(w).sum(), np.abs(after).sum()), rel=1e-6)
    assert result.files == ("a: other metadata",)


def test_pruning_changes_the_pruned_tensors_and_adds_nothing_but_a_record(report: PruneReport) -> None:
    assert report.output is not None
    result = compare_checkpoints(report.input, report.output, workers=2)
    changed = {tensor.name for tensor in result.tensors if not tensor.is_same}
    assert changed == PRUNED  # a diagonal matrix is 3:8 already
    assert result.files == ("masksolve.json: only in the second",)
    (Path(report.output) / "config.json").write_text("other")
    (Path(report.output) / "nothing.txt").unlink()
    result = compare_checkpoints(report.input, report.output)
    assert result.files == (
        "config.json: other content",
        "masksolve.json: only in the second",
        "nothing.txt: only in the first",
    )
