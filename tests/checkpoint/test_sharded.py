"""Sharded checkpoints: what comes out is what went in, but for the pruned weights; and what is refused."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import masksolve as ms
from masksolve import Pattern
from masksolve._pattern import PatternLike
from masksolve.checkpoint import (
    CheckpointError,
    _units,
    apply_masks,
    check_checkpoint,
    plan_checkpoint,
    prune_checkpoint,
)
from tests import processes
from tests.checkpoints import PRUNED, RECORD, HereExecutor, contents, tensors_of, write_shard, write_sharded

INDEX = "model.safetensors.index.json"
FIRST, SECOND, THIRD = (f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3))


def small_bands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_units, "_WEIGHTS_A_BAND", 1 << 10)
    monkeypatch.setattr(_units, "WEIGHTS_A_PIECE", 1 << 8)
    monkeypatch.setattr(_units, "_BYTES_A_CHUNK", 100)


def as_matrices(w: np.ndarray) -> np.ndarray:
    return np.moveaxis(w, (0, 1), (-2, -1))


@pytest.mark.parametrize("bands", ["small", "whole"])
@pytest.mark.parametrize("pattern", ["2:4", "3:8"])
def test_a_folder_comes_out_as_it_went_in_but_for_pruned_weights(
    bands: str, pattern: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if bands == "small":
        small_bands(monkeypatch)
    n, m = map(int, pattern.split(":"))
    source, target = write_sharded(tmp_path / "in"), tmp_path / "out"
    report = prune_checkpoint(source, target, Pattern(n, m))
    assert {tensor.name for tensor in report.tensors} == PRUNED
    assert report.optimal
    before, after = contents(source), contents(target)
    assert sorted([*before, RECORD]) == sorted(after)
    for name in before:
        if name in (FIRST, SECOND, THIRD):
            size = 8 + int.from_bytes(before[name][:8], "little")
            assert before[name][:size] == after[name][:size]
            for tensor, w in tensors_of(source / name).items():
                pruned = tensors_of(target / name)[tensor]
                if tensor in PRUNED:
                    assert ms.certify(as_matrices(w), as_matrices(pruned) != 0, n, m).optimal
                    assert np.array_equal(pruned, np.where(pruned != 0, w, np.zeros_like(w)))
                else:
                    assert pruned.tobytes() == w.tobytes()
        else:
            assert before[name] == after[name]


def test_what_is_skipped_is_named_with_the_reason(tmp_path: Path) -> None:
    report = prune_checkpoint(write_sharded(tmp_path / "in"), tmp_path / "out", Pattern(4, 8))
    reasons = {tensor.name: tensor.reason for tensor in report.skipped}
    assert reasons == {
        "layers.0.bias": "1-D: not a matrix",
        "empty": "has no entries",
        "layers.1.fp8": "dtype F8_E4M3 is not one of F64, F32, F16, BF16",
        "layers.1.ids": "dtype I64 is not one of F64, F32, F16, BF16",
        "empty columns": "has no entries",
        "empty kernel": "has no entries",
        "tokens.embedding": "an embedding by its name; include it to prune it",
    }


def test_a_tile_row_too_large_to_hold_is_pruned_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_bands(monkeypatch)
    w = np.random.default_rng(0).standard_normal((9, 1003)).astype(np.float32)
    write_shard(tmp_path / "in.safetensors", {"w": w})
    prune_checkpoint(tmp_path / "in.safetensors", tmp_path / "out.safetensors", Pattern(3, 8), masks=tmp_path / "m")
    pruned = tensors_of(tmp_path / "out.safetensors")["w"]
    assert ms.certify(w, pruned != 0, 3, 8).optimal
    bits = np.unpackbits(tensors_of(tmp_path / "m")["w"], axis=1, count=1003, bitorder="little")
    assert np.array_equal(bits, pruned != 0)


@pytest.mark.parametrize("shape", [(8, 1003), (9, 1003), (8, 500, 2, 2)])
def test_a_tile_row_that_is_very_wide_is_work_for_several(
    shape: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_bands(monkeypatch)
    w = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    write_shard(tmp_path / "in.safetensors", {"w": w})
    calls = HereExecutor()
    arguments = tmp_path / "in.safetensors", tmp_path / "out.safetensors", Pattern(3, 8)
    prune_checkpoint(*arguments, masks=tmp_path / "m", workers=calls)
    # Bands of at most 1024 weights, whose columns begin at whole tiles.
    assert calls.calls > w.size // 1024
    pruned = tensors_of(tmp_path / "out.safetensors")["w"]
    if w.ndim == 2:
        assert ms.certify(w, pruned != 0, 3, 8).optimal
    else:
        assert ms.certify(w.transpose(2, 3, 0, 1), pruned.transpose(2, 3, 0, 1) != 0, 3, 8).optimal
    bits = np.unpackbits(tensors_of(tmp_path / "m")["w"], axis=1, count=w[0].size, bitorder="little")
    assert np.array_equal(bits.reshape(shape), pruned != 0)
    assert not any(tensor.problem for tensor in check_checkpoint(arguments[1], Pattern(3, 8)).tensors)
    apply_masks(arguments[0], tmp_path / "m", tmp_path / "applied")
    assert contents(tmp_path / "applied") == contents(arguments[1])
    # And what is said of such a part says which it is.
    pruned = pruned.copy()
    pruned[0, 256:264] = 1
    write_shard(tmp_path / "out.safetensors", {"w": pruned})
    (found,) = check_checkpoint(arguments[1], Pattern(3, 8)).tensors
    assert "0, 256:264] keeps 8 of 8" in (found.problem or "")


def test_the_importance_of_a_tensor_is_the_same_in_bands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_sharded(tmp_path / "in")
    whole = prune_checkpoint(source, tmp_path / "whole", Pattern(2, 8), method="greedy")
    small_bands(monkeypatch)
    banded = prune_checkpoint(source, tmp_path / "banded", Pattern(2, 8), method="greedy")
    for a, b in zip(whole.tensors, banded.tensors, strict=True):
        assert (a.name, a.shape, a.dtype, a.tile_gaps, a.optimal) == (b.name, b.shape, b.dtype, b.tile_gaps, b.optimal)
        assert b.importance == pytest.approx(a.importance, rel=1e-12)
        assert b.kept == pytest.approx(a.kept, rel=1e-12)
        assert b.gap == pytest.approx(a.gap, rel=1e-9)
        assert [tile.row for tile in a.worst_tiles] == [tile.row for tile in b.worst_tiles]
        assert a.gap > 0
    assert contents(tmp_path / "whole") == contents(tmp_path / "banded")


def test_the_worst_tiles_are_those_with_the_largest_gaps(tmp_path: Path) -> None:
    w = np.random.default_rng(1).standard_normal((40, 48))
    write_shard(tmp_path / "in.safetensors", {"w": w})
    report = prune_checkpoint(tmp_path / "in.safetensors", tmp_path / "out.safetensors", Pattern(4, 8), method="greedy")
    mask = tensors_of(tmp_path / "out.safetensors")["w"] != 0
    gaps = {}
    for row in range(0, 40, 8):
        for column in range(0, 48, 8):
            tile = slice(row, row + 8), slice(column, column + 8)
            gaps[row, column] = ms.certify(w[tile], mask[tile], 4, 8).gap
    worst = sorted(gaps, key=gaps.__getitem__, reverse=True)[:4]
    assert [(tile.row, tile.column) for tile in report.tensors[0].worst_tiles] == worst
    assert [tile.gap for tile in report.tensors[0].worst_tiles] == pytest.approx([gaps[at] for at in worst])
    limits = [0, 1e-4, 1e-3, 1e-2, 1e-1, np.inf]
    counts = np.histogram(list(gaps.values()), [-1, *[np.nextafter(limit, 9) for limit in limits]])[0]
    assert list(report.tensors[0].tile_gaps) == list(counts)


@pytest.mark.parametrize("scale", [1e306, 1e-310])
def test_weights_near_the_ends_of_float64_are_pruned(scale: float, tmp_path: Path) -> None:
    w = np.random.default_rng(0).standard_normal((32, 32)) * scale
    write_shard(tmp_path / "in.safetensors", {"w": w})
    report = prune_checkpoint(tmp_path / "in.safetensors", tmp_path / "out.safetensors", Pattern(3, 8))
    assert report.optimal
    assert ms.certify(w, tensors_of(tmp_path / "out.safetensors")["w"] != 0, 3, 8).optimal


@pytest.mark.parametrize("pattern", ["0:4", "4:4", "1:1", "7:13"])
def test_patterns_that_keep_nothing_or_all_are_pruned_to(pattern: str, tmp_path: Path) -> None:
    source = write_sharded(tmp_path / "in")
    report = prune_checkpoint(source, tmp_path / "out", Pattern.parse(pattern), masks=tmp_path / "masks")
    assert report.optimal
    assert report.mean_kept_importance == {"0:4": 0, "7:13": report.mean_kept_importance}.get(pattern, 1)
    assert all(check.problem is None for check in check_checkpoint(tmp_path / "out", Pattern.parse(pattern)).tensors)


def test_what_links_lead_to_is_pruned_and_copied(tmp_path: Path) -> None:
    source, target = write_sharded(tmp_path / "in"), tmp_path / "out"
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for path in source.iterdir():  # folders too
        (snapshot / path.name).symlink_to(Path("..", "in", path.name))
    prune_checkpoint(snapshot, target, Pattern(3, 8))
    prune_checkpoint(source, tmp_path / "expected", Pattern(3, 8))
    assert contents(target) == contents(tmp_path / "expected")
    assert not any(path.is_symlink() for path in target.rglob("*"))


def test_an_index_has_any_name_before_its_ending(tmp_path: Path) -> None:
    source, target = write_sharded(tmp_path / "in"), tmp_path / "out"
    prune_checkpoint(source, tmp_path / "expected", Pattern(3, 8))
    other = "diffusion_pytorch_model.safetensors.index.json"
    for folder in (source, tmp_path / "expected"):
        (folder / INDEX).rename(folder / other)
    prune_checkpoint(source, target, Pattern(3, 8))
    assert contents(target) == contents(tmp_path / "expected")


def test_a_folder_with_one_shard_needs_no_index(tmp_path: Path) -> None:
    source = tmp_path / "in"
    source.mkdir()
    write_shard(source / "model.safetensors", {"w": np.ones((8, 8))})
    prune_checkpoint(source, tmp_path / "out", Pattern(1, 4))
    assert list(contents(tmp_path / "out")) == [RECORD, "model.safetensors"]


def test_check_names_the_first_bad_group_of_a_band(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, target = write_sharded(tmp_path / "in"), tmp_path / "out"
    prune_checkpoint(source, target, Pattern(3, 8))
    small_bands(monkeypatch)
    assert all(tensor.problem is None for tensor in check_checkpoint(target, Pattern(3, 8)).tensors)
    content = bytearray((target / FIRST).read_bytes())
    start = 8 + int.from_bytes(content[:8], "little")
    w = np.frombuffer(content, np.float32, 72 * 40, start).reshape(72, 40)
    w[66, 8:16] = 1
    (target / FIRST).write_bytes(content)
    problems = {tensor.name: tensor.problem for tensor in check_checkpoint(target, Pattern(3, 8)).tensors}
    assert problems.pop("layers.0.weight") == "mask[66, 8:16] keeps 8 of 8 entries; 3:8 along rows allows at most 3"
    assert not any(problems.values())


def edit_index(folder: Path, change: Callable[[dict[str, str]], None]) -> None:
    index = json.loads((folder / INDEX).read_text())
    change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


def header(entries: str, data: bytes = b"") -> bytes:
    return len(entries.encode()).to_bytes(8, "little") + entries.encode() + data


def one(name: str, start: int, stop: int, shape: str = "[2]") -> str:
    return f'"{name}":{{"dtype":"F32","shape":{shape},"data_offsets":[{start},{stop}]}}'


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "a shard missing from the index": (
        lambda folder: write_shard(folder / "model-00004.safetensors", {"w": np.ones((8, 8))}),
        f"model-00004.safetensors is not named in {INDEX}",
    ),
    "an index naming a tensor no shard has": (
        lambda folder: edit_index(folder, lambda names: names.update({"ghost": FIRST})),
        "names the tensor 'ghost', which no shard has",
    ),
    "a tensor that the index does not name": (
        lambda folder: edit_index(folder, lambda names: names.__delitem__("patch")),
        f"has the tensor 'patch', which {INDEX} does not name",
    ),
    "a tensor in another shard than the index says": (
        lambda folder: edit_index(folder, lambda names: names.update({"patch": FIRST})),
        f"has the tensor 'patch', which {INDEX} says is in '{FIRST}'",
    ),
    "a shard that is not there": (
        lambda folder: (folder / SECOND).unlink(),
        f"names the shard '{SECOND}', which the folder does not hold",
    ),
    "a shard outside the folder": (
        lambda folder: edit_index(folder, lambda names: names.update({"patch": "../other.safetensors"})),
        "names the shard '../other.safetensors', which the folder does not hold",
    ),
    "a shard by another name": (
        lambda folder: edit_index(folder, lambda names: names.update({"patch": f"./{THIRD}"})),
        f"names the shard './{THIRD}', which the folder does not hold",
    ),
    "a link to nothing": (
        lambda folder: (folder / "tokenizer.json").symlink_to("nowhere"),
        "tokenizer.json is a broken link",
    ),
    "a link that leads in a circle": (
        lambda folder: (folder / "tokenizer" / "circle").symlink_to(".."),
        "circle is a broken link",
    ),
    "a pipe": (lambda folder: os.mkfifo(folder / "pipe"), "pipe is a broken link, or not a file to copy"),
    "a truncated shard": (
        lambda folder: (folder / SECOND).write_bytes((folder / SECOND).read_bytes()[:-1]),
        f"{SECOND} is not a whole safetensors file",
    ),
    "overlapping offsets": (
        lambda folder: (folder / SECOND).write_bytes(header(f"{{{one('a', 0, 8)},{one('b', 4, 12)}}}", bytes(12))),
        "invalid offset for tensor `b`",
    ),
    "offsets out of range": (
        lambda folder: (folder / SECOND).write_bytes(header(f"{{{one('a', 0, 8)}}}", bytes(4))),
        "not fully covered",
    ),
    "offsets beyond any number": (
        lambda folder: (folder / SECOND).write_bytes(header(f"{{{one('a', 0, 2**63, f'[{2**61}]')}}}", bytes(4))),
        "is not a whole safetensors file",
    ),
    "a header over 100 MB": (
        lambda folder: (folder / SECOND).write_bytes(header("{}" + " " * 100_000_000)),
        "header too large",
    ),
    "a header whose length is a lie": (
        lambda folder: (folder / SECOND).write_bytes((2**60).to_bytes(8, "little") + b"{}"),
        "header too large",
    ),
    "a tensor twice in a header": (
        lambda folder: (folder / SECOND).write_bytes(header(f"{{{one('a', 0, 8)},{one('a', 0, 8)}}}", bytes(8))),
        "names 'a' twice",
    ),
    "a tensor twice in the index": (
        lambda folder: (folder / INDEX).write_text(f'{{"weight_map": {{"patch": "{THIRD}", "patch": "{THIRD}"}}}}'),
        "names 'patch' twice",
    ),
    "an index that is not JSON": (lambda folder: (folder / INDEX).write_text("{"), "is not valid JSON"),
    "an index too deep to read": (
        lambda folder: (folder / INDEX).write_text("[" * 100_000),
        "is not valid JSON: maximum recursion depth exceeded",
    ),
    "an index without a map": (lambda folder: (folder / INDEX).write_text("{}"), "has no weight_map"),
    "no index": (lambda folder: (folder / INDEX).unlink(), "holds 3 .safetensors files and no index"),
    "two indexes": (
        lambda folder: (folder / f"a{INDEX}").write_bytes((folder / INDEX).read_bytes()),
        f"holds a{INDEX} and {INDEX}; move all but one away",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_checkpoint_is_refused_and_nothing_is_written(case: str, tmp_path: Path) -> None:
    spoil, message = BROKEN[case]
    source = write_sharded(tmp_path / "in")
    spoil(source)
    with pytest.raises(CheckpointError) as caught:
        prune_checkpoint(source, tmp_path / "out", Pattern(4, 8))
    assert message in str(caught.value)
    assert str(source) in str(caught.value)
    assert sorted(tmp_path.iterdir()) == [source]


def test_a_header_of_almost_100_mb_is_read(tmp_path: Path) -> None:
    w = np.random.default_rng(0).standard_normal((8, 8))
    entry = '{"w":{"dtype":"F64","shape":[8,8],"data_offsets":[0,512]}}'
    source, target = tmp_path / "in.safetensors", tmp_path / "out.safetensors"
    source.write_bytes(header(entry + " " * (99_999_999 - len(entry)), w.tobytes()))
    prune_checkpoint(source, target, Pattern(1, 4))
    assert target.read_bytes()[:-512] == source.read_bytes()[:-512]
    assert ms.certify(w, np.frombuffer(target.read_bytes()[-512:]).reshape(8, 8) != 0, 1, 4).optimal


def test_a_folder_that_holds_no_checkpoint_is_never_replaced(tmp_path: Path) -> None:
    source, target = write_sharded(tmp_path / "in"), tmp_path / "precious"
    target.mkdir()
    (target / "letters.txt").write_text("dear")
    with pytest.raises(CheckpointError, match="holds no checkpoint, and is not replaced"):
        prune_checkpoint(source, target, Pattern(4, 8), overwrite=True)
    assert contents(target) == {"letters.txt": b"dear"}


def test_a_folder_is_replaced_when_asked(tmp_path: Path) -> None:
    source, target = write_sharded(tmp_path / "in"), write_sharded(tmp_path / "out", seed=1)
    (target / "old.txt").write_text("old")
    with pytest.raises(FileExistsError):
        prune_checkpoint(source, target, Pattern(4, 8))
    prune_checkpoint(source, target, Pattern(4, 8), overwrite=True)
    assert sorted(contents(target)) == sorted([*contents(source), RECORD])
    assert sorted(tmp_path.iterdir()) == [source, target]


@pytest.mark.parametrize("name", ["out", "masks"])
def test_an_output_that_is_a_broken_link_is_refused_before_any_work(name: str, tmp_path: Path) -> None:
    source = write_sharded(tmp_path / "in")
    (tmp_path / name).symlink_to("nowhere")
    with pytest.raises(FileExistsError, match=rf"/{name} is a broken link; remove it"):
        prune_checkpoint(source, tmp_path / "out", Pattern(4, 8), masks=tmp_path / "masks", overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["in", name])


@pytest.mark.parametrize("where", ["in/out", "."])
def test_the_output_never_lies_in_the_input_nor_the_input_in_it(where: str, tmp_path: Path) -> None:
    source = write_sharded(tmp_path / "in")
    (tmp_path / INDEX).touch()
    with pytest.raises(CheckpointError, match=r"lies within .*/in, or that in it"):
        prune_checkpoint(source, tmp_path / where, Pattern(4, 8), overwrite=True)


def test_files_that_links_of_the_input_lead_to_are_never_replaced(tmp_path: Path) -> None:
    real, source = write_sharded(tmp_path / "real"), tmp_path / "in"
    source.mkdir()
    for path in real.iterdir():
        (source / path.name).symlink_to(path)
    before = contents(real)
    with pytest.raises(CheckpointError, match=r"lies within .*, or that in it; name another place"):
        prune_checkpoint(source, real, Pattern(4, 8), overwrite=True)
    with pytest.raises(CheckpointError, match="is the input, or a file of it"):
        prune_checkpoint(source, None, Pattern(4, 8), masks=real / FIRST, overwrite=True)
    assert contents(real) == before


@pytest.mark.parametrize(
    "work", [check_checkpoint, lambda path, *rest, **more: prune_checkpoint(path, "x", *rest, **more)]
)
def test_neither_a_number_is_a_pattern_nor_none_a_glob(work: Callable[..., object], tmp_path: Path) -> None:
    source = write_sharded(tmp_path / "in")
    with pytest.raises(TypeError, match=r'a pattern is "N:M", \(N, M\) or a Pattern, .*; got 3'):
        work(source, 3)
    with pytest.raises(ValueError, match="got '3-8'"):
        work(source, "3-8")
    for name in ("include", "exclude"):
        for none in (None, [1], iter(["l*"])):
            with pytest.raises(TypeError, match=rf"{name} must be a glob or a sequence of globs, such as .*, got "):
                work(source, Pattern(3, 8), **{name: none})


def test_one_glob_is_written_without_a_list(tmp_path: Path) -> None:
    source = write_sharded(tmp_path / "in")
    (one,) = plan_checkpoint(source, ["3:8"], include="layers.*").plans
    (several,) = plan_checkpoint(source, ["3:8"], include=["layers.*"]).plans
    assert one.skipped == several.skipped
    assert one.skipped


@pytest.mark.parametrize("pattern", ["3:8", (3, 8), Pattern(3, 8)], ids=str)
def test_a_pattern_is_written_as_text_a_tuple_or_a_pattern(pattern: PatternLike, tmp_path: Path) -> None:
    write_shard(tmp_path / "in", {"w": np.random.default_rng(0).standard_normal((16, 16))})
    report = prune_checkpoint(tmp_path / "in", tmp_path / "out", pattern)
    assert report.pattern == Pattern(3, 8)
    (plan,) = plan_checkpoint(tmp_path / "in", [pattern]).plans
    assert plan.pattern == Pattern(3, 8)
    assert check_checkpoint(tmp_path / "out", pattern).tensors[0].problem is None


def test_the_patterns_of_a_plan_are_a_sequence(tmp_path: Path) -> None:
    for alone in ("3:8", Pattern(3, 8), (3, 8), None):
        with pytest.raises(TypeError, match=r"patterns must be a sequence of patterns, got .*; put it in a list"):
            plan_checkpoint(tmp_path / "in", alone)  # type: ignore[arg-type]


def test_what_is_no_flag_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    source = write_sharded(tmp_path / "in")
    masks = tmp_path / "masks.safetensors"
    ms.checkpoint.prune_checkpoint(source, None, "2:4", masks=masks)
    before = contents(tmp_path)
    for flag in ("overwrite", "resume"):
        with pytest.raises(TypeError, match=rf"{flag} must be True or False, got 'no'"):
            ms.checkpoint.prune_checkpoint(source, tmp_path / "out", "2:4", **{flag: "no"})  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="other_weights must be True or False, got 1"):
        ms.checkpoint.apply_masks(source, masks, tmp_path / "out", other_weights=1)  # type: ignore[arg-type]
    assert contents(tmp_path) == before


@processes.POSIX
def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ms.checkpoint.CheckpointError, match="pipe is neither a file nor a folder; name "):
        ms.checkpoint.check_checkpoint(tmp_path / "pipe", "2:4")
