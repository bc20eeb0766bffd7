"""Packed checkpoints: values and bits that become the same bytes again, and nothing else."""

from __future__ import annotations

import json
import pickle
import tempfile
import tracemalloc
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from masksolve import Pattern
from masksolve.checkpoint import (
    CheckpointError,
    check_checkpoint,
    compare_checkpoints,
    pack_checkpoint,
    plan_checkpoint,
    prune_checkpoint,
    unpack_checkpoint,
)
from masksolve.checkpoint import _units as units
from masksolve.checkpoint._pack_work import join, split
from tests.checkpoints import PRUNED, HereExecutor, contents, tensors_of, write_shard, write_sharded

DTYPES = [np.dtype(name) for name in ("float64", "float32", "float16")] + [np.dtype(ml_dtypes.bfloat16)]
PATTERNS = [Pattern(2, 4), Pattern(3, 8), Pattern(1, 4), Pattern(5, 12), Pattern(2, 3), Pattern(0, 4), Pattern(7, 16)]


def sparse_bits(rng: np.random.Generator, shape: tuple[int, ...], axis: int, pattern: Pattern, size: int) -> Any:
    """Integers of any bits, -0.0 and NaN among them, of which at most N of M along an axis are not 0."""
    bits = np.moveaxis(np.zeros(shape, f"u{size}"), axis, -1)
    signed_zero = 1 << (8 * size - 1)
    infinite = int(np.array(np.inf, {2: np.float16, 4: np.float32, 8: np.float64}[size]).view(f"u{size}"))
    for line in np.ndindex(bits.shape[:-1]):
        for start in range(0, bits.shape[-1], pattern.m):
            length = min(pattern.m, bits.shape[-1] - start)
            kept = rng.permutation(length)[: rng.integers(0, min(pattern.n, length) + 1)]
            for entry in kept:
                any_bits = int.from_bytes(rng.bytes(size), "little")
                bits[(*line, start + entry)] = rng.choice([any_bits, any_bits | infinite, signed_zero, 1])
    return np.ascontiguousarray(np.moveaxis(bits, -1, axis))


def kept_by(line: np.ndarray, pattern: Pattern) -> list[bool]:
    """Which entries of a line are kept: what is not 0, and the first zeros of a group that has fewer than N others."""
    kept = [bool(entry) for entry in line]
    for start in range(0, len(line), pattern.m):
        group = range(start, min(start + pattern.m, len(line)))
        for entry in group:
            if sum(kept[each] for each in group) < pattern.n:
                kept[entry] = True
    return kept


@given(
    seed=st.integers(0, 2**32 - 1),
    dtype=st.sampled_from(DTYPES),
    pattern=st.sampled_from(PATTERNS),
    axis=st.sampled_from([0, 1]),
    shape=st.tuples(st.integers(1, 19), st.integers(1, 19)),
    kernel=st.sampled_from([(), (3,), (2, 2)]),
)
@settings(max_examples=60)
def test_a_piece_is_split_as_it_should_be_and_joined_again(
    seed: int, dtype: np.dtype[Any], pattern: Pattern, axis: int, shape: tuple[int, int], kernel: tuple[int, ...]
) -> None:
    rng = np.random.default_rng(seed)
    bits = sparse_bits(rng, (*shape, *kernel), axis, pattern, dtype.itemsize)
    mask, values = split(bits.view(dtype), pattern, axis)
    assert mask is not None
    lines, kept, found = (np.moveaxis(each, axis, -1) for each in (bits, mask, values))
    for line in np.ndindex(lines.shape[:-1]):
        assert kept[line].tolist() == kept_by(lines[line], pattern)
        assert found[line].tolist() == lines[line][kept[line]].tolist()
    assert np.array_equal(join(mask, values, axis), bits)


def test_a_piece_with_too_large_a_group_is_not_split() -> None:
    weights = np.zeros((4, 10), np.float32)
    weights[2, 8:10] = -0.0, 1.0
    assert split(weights, Pattern(1, 4), 1)[0] is None
    assert split(weights, Pattern(1, 4), 0)[0] is not None


KINDS = {
    "matrix": lambda rng: tuple(rng.integers(8, 40, 2)),
    "stack": lambda rng: (*rng.integers(1, 4, 2), *rng.integers(8, 24, 2)),
    "convolution": lambda rng: (*rng.integers(8, 24, 2), *rng.integers(1, 4, 2)),
}


@contextmanager
def small_units() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(units, "_WEIGHTS_A_BAND", 256)
        patch.setattr(units, "WEIGHTS_A_PIECE", 64)
        patch.setattr(units, "_BYTES_A_CHUNK", 50)
        yield


def write_by_hand(path: Path, tensors: dict[str, np.ndarray], rng: np.random.Generator) -> None:
    """A file whose header has its tensors in another order than its data, and blanks where no program puts them."""
    write_shard(path, tensors, {"z": "1", "a": 'ü"'})
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    entries = list(json.loads(content[8 : 8 + size]).items())
    text = json.dumps(dict(entries[i] for i in rng.permutation(len(entries))), indent=int(rng.integers(0, 3)))
    text += " " * int(rng.integers(0, 9))
    path.write_bytes(len(text.encode()).to_bytes(8, "little") + text.encode() + content[8 + size :])


@given(
    seed=st.integers(0, 2**32 - 1),
    dtype=st.sampled_from(DTYPES),
    pattern=st.sampled_from(PATTERNS),
    direction=st.sampled_from(["rows", "columns"]),
    kind=st.sampled_from(sorted(KINDS)),
)
@settings(max_examples=15)
def test_any_checkpoint_is_the_same_again(
    seed: int, dtype: np.dtype[Any], pattern: Pattern, direction: str, kind: str
) -> None:
    rng = np.random.default_rng(seed)
    shape = tuple(int(size) for size in KINDS[kind](rng))
    axis = {"matrix": 0, "stack": 2, "convolution": 0}[kind] + (direction == "rows")
    bits = sparse_bits(rng, shape, axis, pattern, dtype.itemsize)
    tensors = {
        "before": rng.standard_normal(3),
        "layer.weight": bits.view(dtype),
        "after": np.arange(5),
        "none": np.zeros((0, 3)),
        "bytes": np.arange(7, dtype=np.uint8),
    }
    with tempfile.TemporaryDirectory() as folder, small_units():
        dense, packed, again = (Path(folder, name) for name in ("dense", "packed", "again"))
        write_by_hand(dense, tensors, rng)
        options = {kind: "layer.weight"} if kind != "matrix" else {}
        report = pack_checkpoint(dense, packed, pattern, direction=direction, include="layer.*", **options)  # type: ignore[arg-type]
        assert [tensor.name for tensor in report.tensors] == ["layer.weight"]
        assert report.packed_nbytes == packed.stat().st_size
        stored = tensors_of(packed)
        assert stored["layer.shape"].tolist() == [[size] for size in shape]
        values = stored["layer.compressed" if direction == "rows" else "layer.compressed_columns"]
        assert values.nbytes + stored["layer.bitmask"].nbytes == report.tensors[0].packed_nbytes
        for name in ("before", "after", "bytes"):
            assert stored[name].tobytes() == tensors[name].tobytes()
        unpack_checkpoint(packed, again)
        assert again.read_bytes() == dense.read_bytes()


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (3, 8), (8, 16)])
def test_the_layout_is_that_of_sparse_24_bitmask(n: int, m: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(n)
    w = sparse_bits(rng, (24, 6 * m), 1, Pattern(n, m), 2).view(np.float16)
    write_shard(tmp_path / "dense", {"a.weight": w, "in_proj_weight": w})
    pack_checkpoint(tmp_path / "dense", tmp_path / "packed", (n, m))
    stored = tensors_of(tmp_path / "packed")
    for base in ("a", "in_proj_weight"):
        values, bits, shape = (stored[f"{base}.{part}"] for part in ("compressed", "bitmask", "shape"))
        assert (values.shape, values.dtype) == ((24, 6 * n), w.dtype)
        assert (bits.shape, bits.dtype) == ((24, -(-6 * m // 8)), np.uint8)
        assert (shape.dtype, shape.tolist()) == (np.int64, [[24], [6 * m]])
        # As their reader does it, whatever the pattern.
        mask = np.unpackbits(bits, axis=-1, count=6 * m, bitorder="little").astype(bool)
        dense = np.zeros(w.shape, np.uint16)
        dense[mask] = values.view(np.uint16).reshape(-1)
        assert dense.tobytes() == w.tobytes()


def test_a_packed_file_is_what_it_was_in_version_1(tmp_path: Path) -> None:
    # Readers of packed files write them again to compare: a change here is another version of the format.
    w = np.zeros((4, 10), np.float32)
    w[:, ::5] = np.arange(8).reshape(4, 2)
    write_shard(tmp_path / "dense", {"a.weight": w, "b": np.arange(3)}, {"format": "pt"})
    pack_checkpoint(tmp_path / "dense", tmp_path / "packed", "1:4", direction="rows")
    assert xxhash.xxh3_64_hexdigest((tmp_path / "packed").read_bytes()) == "063580999cb11bce"


def test_a_folder_of_shards_is_the_same_again(tmp_path: Path) -> None:
    source = write_sharded(tmp_path / "in")
    prune_checkpoint(source, tmp_path / "out", {"layers.*": "3:8", "*": "2:4"})
    report = pack_checkpoint(tmp_path / "out", tmp_path / "packed")
    assert {tensor.name for tensor in report.tensors} == PRUNED
    assert {str(tensor.pattern) for tensor in report.tensors} == {"3:8", "2:4"}
    index = json.loads((tmp_path / "packed" / "model.safetensors.index.json").read_text())
    shards = sorted((tmp_path / "packed").glob("*.safetensors"))
    held = {name: shard.name for shard in shards for name in tensors_of(shard)}
    assert index["weight_map"] == held
    sizes = [each.nbytes for shard in shards for each in tensors_of(shard).values()]
    assert index["metadata"]["total_size"] == sum(sizes)
    for shard in shards:
        with safe_open(shard, framework="numpy") as file:
            assert file.metadata()["format"] == "pt"
    unpacked = unpack_checkpoint(tmp_path / "packed", tmp_path / "again")
    assert contents(tmp_path / "again") == contents(tmp_path / "out")
    assert unpacked.tensors == report.tensors
    assert (unpacked.dense_nbytes, unpacked.packed_nbytes) == (report.dense_nbytes, report.packed_nbytes)
    assert check_checkpoint(tmp_path / "again").passed


def test_half_of_bfloat16_takes_nine_sixteenths(tmp_path: Path) -> None:
    w = np.random.default_rng(0).standard_normal((64, 4096)).astype(ml_dtypes.bfloat16)
    write_shard(tmp_path / "in", {"w": w})
    prune_checkpoint(tmp_path / "in", tmp_path / "out", "4:8")
    report = pack_checkpoint(tmp_path / "out", tmp_path / "packed", "4:8")
    assert report.tensors[0].packed_nbytes * 16 == w.nbytes * 9
    assert (tmp_path / "packed").stat().st_size < 0.5625 * (tmp_path / "out").stat().st_size + 2000


def test_what_cannot_be_packed_stays_with_the_reason(tmp_path: Path) -> None:
    w = np.tile(np.float32([1, 0, 0, 2]), (8, 4))
    dense, signed = w.copy(), w.copy()
    dense[5, 9] = signed[5, 9] = np.float32(3)
    signed[5, 9] = -0.0
    tensors = {"good.weight": w, "dense.weight": dense, "signed.weight": signed, "taken.weight": w, "taken.shape": w}
    tensors["full"] = np.ones((8, 16), np.float16)
    tensors["twice"], tensors["twice.weight"] = w, w
    write_shard(tmp_path / "in", tensors)
    report = pack_checkpoint(tmp_path / "in", tmp_path / "packed", {"full": "4:4", "*": "2:4"})
    reasons = {tensor.name: tensor.reason for tensor in report.skipped}
    assert {tensor.name for tensor in report.tensors} == {"good.weight", "taken.shape", "twice"}
    where = "mask[5, 8:12] keeps 3 of 4 entries; 2:4 along rows allows at most 2"
    assert reasons == {
        "dense.weight": f"not 2:4: {where}",
        "signed.weight": f"not 2:4: {where}, -0.0 among them; make these 0.0 first",
        "taken.weight": "would be packed as 'taken.shape', which is another tensor's name",
        "full": "would not become smaller: 4:4 keeps too much for a bit per weight",
        "twice.weight": "would be packed as 'twice.shape', which is another tensor's name",
    }
    unpack_checkpoint(tmp_path / "packed", tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == (tmp_path / "in").read_bytes()


def test_nothing_to_pack_is_an_error(tmp_path: Path) -> None:
    write_shard(tmp_path / "in", {"w": np.ones((8, 8), np.float32)})
    with pytest.raises(CheckpointError, match=r"no tensor fits the packed form \(w: not 2:4: mask\[0, 0:4\] keeps 4"):
        pack_checkpoint(tmp_path / "in", tmp_path / "packed", "2:4")
    with pytest.raises(CheckpointError, match="no record says to which pattern"):
        pack_checkpoint(tmp_path / "in", tmp_path / "packed")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    prune_checkpoint(write_sharded(tmp_path / "in"), tmp_path / "out", "3:8")
    pack_checkpoint(tmp_path / "out", tmp_path / "packed")
    return tmp_path / "packed"


def test_a_packed_checkpoint_is_taken_for_no_other(packed: Path, tmp_path: Path) -> None:
    other: dict[str, Callable[[], object]] = {
        "pack": lambda: pack_checkpoint(packed, tmp_path / "x"),
        "prune": lambda: prune_checkpoint(packed, tmp_path / "x", "2:4"),
        "check": lambda: check_checkpoint(packed),
        "plan": lambda: plan_checkpoint(packed, ["2:4"]),
        "compare": lambda: compare_checkpoints(tmp_path / "out", packed),
    }
    for call in other.values():
        with pytest.raises(CheckpointError, match=r"/packed is packed: it holds values and bits .*; unpack it first"):
            call()
    with pytest.raises(CheckpointError, match="/out is not packed"):
        unpack_checkpoint(tmp_path / "out", tmp_path / "x")
    assert not list(tmp_path.glob("*x*"))


def spoil(path: Path, tensor: str, change: Callable[[np.ndarray], None]) -> None:
    """Change the bytes of a tensor in a file."""
    content = bytearray(path.read_bytes())
    size = int.from_bytes(content[:8], "little")
    start, stop = (8 + size + at for at in json.loads(content[8 : 8 + size])[tensor]["data_offsets"])
    part = np.frombuffer(content, np.uint8)[start:stop]
    change(part)
    path.write_bytes(content)


def flip(part: np.ndarray) -> None:
    part[5] ^= 1


SPOILT: dict[str, tuple[str, str, str]] = {
    "bits": (
        "00002",
        "layers.1.bitmask",
        r"bitmask of tensor 'layers.1.weight' is corrupt: mask\[0, 40:48\] keeps [24] of",
    ),
    "bits of a convolution": (
        "00002",
        "conv.bitmask",
        r"bitmask of tensor 'conv.weight' is corrupt: mask\[\d, \d, \d+, ",
    ),
    "values": ("00002", "layers.1.compressed", "values of tensor 'layers.1.weight' are not those that were packed"),
    "shape": ("00002", "layers.1.shape", "00002.* is not as it was packed: its header or its shapes"),
}


@pytest.mark.parametrize("case", SPOILT)
def test_what_is_spoilt_is_named_and_nothing_is_written(case: str, packed: Path, tmp_path: Path) -> None:
    shard, tensor, message = SPOILT[case]
    spoil(packed / f"model-{shard}-of-00003.safetensors", tensor, flip)
    before = contents(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        unpack_checkpoint(packed, tmp_path / "again")
    assert contents(tmp_path) == before


def test_bits_of_partial_groups_and_beyond_the_row_are_checked(tmp_path: Path) -> None:
    w = np.zeros((2, 11), np.float32)
    w[:, [0, 5, 9]] = 1
    write_shard(tmp_path / "in", {"w": w})
    for change, message in (
        (
            np.array([[0, 0], [0, 2]], np.uint8),
            r"a partial group of 3 does not keep 1, in rows 0:2 of tensor 'w' in packed",
        ),
        (np.array([[0, 128], [0, 0]], np.uint8), "bits beyond the last column, in rows 0:2 of tensor 'w' in packed"),
    ):
        pack_checkpoint(tmp_path / "in", tmp_path / "packed", "1:4", direction="rows", overwrite=True)

        def xor(part: np.ndarray, change: np.ndarray = change) -> None:
            part ^= change.reshape(-1)

        spoil(tmp_path / "packed", "w.bitmask", xor)
        with pytest.raises(CheckpointError, match=f"the bitmask of tensor 'w' is corrupt: {message}"):
            unpack_checkpoint(tmp_path / "packed", tmp_path / "again")


def rewrite(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change what a packed file says of itself, and write it as `pack` writes."""
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    about = json.loads(header["__metadata__"]["masksolve_packed"])
    change(about)
    header["__metadata__"]["masksolve_packed"] = json.dumps(about)
    text = json.dumps(header, ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + size :])


def shift(about: dict[str, Any]) -> None:
    """Let the dense file begin with a hole."""
    header = json.loads(about["header"])
    for entry in header.values():
        entry["data_offsets"] = [at + 8 for at in entry["data_offsets"]]
    about["header"] = json.dumps(header)


LIES: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "version": (lambda about: about.update(version=2), r"is packed in version 2 of the format; .* knows version 1"),
    "no version": (lambda about: about.pop("version"), r"is corrupt \(KeyError\('version'\)\); get the file again"),
    "pattern": (lambda about: about["tensors"]["w"].update(pattern="2:8"), "is not as it was packed"),
    "no pattern": (lambda about: about["tensors"]["w"].update(pattern="two"), r"is corrupt \(ValueError"),
    "direction": (lambda about: about["tensors"]["w"].update(direction="up"), r"is corrupt \(ValueError"),
    "tensor": (lambda about: about["tensors"].update(v=about["tensors"].pop("w")), r"is corrupt \(KeyError\('v'\)\)"),
    "header": (lambda about: about.update(header="{}"), r"is corrupt \(KeyError\('w'\)\)"),
    "other header": (
        lambda about: about.update(header=about["header"].replace("[8, 16]", "[16, 8]")),
        "is not as it was packed",
    ),
    "hole": (shift, "is not as it was packed"),
    "hash": (
        lambda about: about["tensors"]["w"].update(hash="0" * 32),
        "the values of tensor 'w' are not those that were packed",
    ),
    "size": (lambda about: about.update(header=about["header"].replace("[0, ", "[8, ")), "is not as it was packed"),
}


@pytest.mark.parametrize("case", LIES)
def test_what_a_packed_file_says_of_itself_is_checked(case: str, tmp_path: Path) -> None:
    write_shard(tmp_path / "in", {"w": np.tile(np.float32([1, 0, 0, 2]), (8, 4)), "b": np.arange(3)})
    pack_checkpoint(tmp_path / "in", tmp_path / "packed", "2:4")
    change, message = LIES[case]
    rewrite(tmp_path / "packed", change)  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match=message):
        unpack_checkpoint(tmp_path / "packed", tmp_path / "again")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "packed"]


@pytest.mark.parametrize("change", [{}, {"metadata": {}}], ids=["written again", "without metadata"])
def test_an_index_that_something_else_has_written_is_named(
    change: dict[str, Any], packed: Path, tmp_path: Path
) -> None:
    path = packed / "model.safetensors.index.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(CheckpointError, match=r"index\.json is not as it was packed: it was written by something else"):
        unpack_checkpoint(packed, tmp_path / "again")


class StopHereError(Exception):
    """Ends a run where a test wants it to."""


def stop_at(call: int) -> HereExecutor:
    def before(number: int) -> None:
        if number >= call:
            raise StopHereError

    return HereExecutor(before)


def test_a_run_that_ends_at_any_unit_is_resumed(packed: Path, tmp_path: Path) -> None:
    runs: list[tuple[Callable[..., object], Path, Path]] = [
        (pack_checkpoint, tmp_path / "out", packed),
        (unpack_checkpoint, packed, tmp_path / "out"),
    ]
    for run, source, expected in runs:
        executor = HereExecutor()
        run(source, tmp_path / "x", workers=executor)
        assert contents(tmp_path / "x") == contents(expected)
        for call in range(1, executor.calls, 7):
            with pytest.raises(StopHereError) as caught:
                run(source, tmp_path / "x", workers=stop_at(call), overwrite=True)
            assert f"{call} of {executor.calls} parts are done and kept" in caught.value.__notes__[0]
            again = HereExecutor()
            run(source, tmp_path / "x", workers=again, resume=True, overwrite=True)
            assert again.calls == executor.calls - call
            assert contents(tmp_path / "x") == contents(expected)
        with pytest.raises(FileExistsError, match="exists; name another"):
            run(source, tmp_path / "x")
        (tmp_path / "x").rename(tmp_path / run.__name__)


def test_what_the_disk_lost_is_written_again(packed: Path, tmp_path: Path) -> None:
    for run, source, expected in (
        (pack_checkpoint, tmp_path / "out", packed),
        (unpack_checkpoint, packed, tmp_path / "out"),
    ):
        with pytest.raises(StopHereError):
            run(source, tmp_path / "x", workers=stop_at(9))
        (data,) = (tmp_path / ".x.masksolve").glob("data-*/output")
        for shard in sorted(data.glob("*.safetensors"))[:2]:
            shard.write_bytes(bytes(shard.stat().st_size))
        run(source, tmp_path / "x", resume=True)
        assert contents(tmp_path / "x") == contents(expected)
        (tmp_path / "x").rename(tmp_path / run.__name__)


def test_one_command_does_not_resume_another(packed: Path, tmp_path: Path) -> None:
    with pytest.raises(StopHereError):
        pack_checkpoint(tmp_path / "out", tmp_path / "x", workers=stop_at(3))
    with pytest.raises(CheckpointError, match="cannot be resumed: command was pack, now it is unpack"):
        unpack_checkpoint(packed, tmp_path / "x", resume=True)
    with pytest.raises(CheckpointError, match="cannot be resumed: "):
        prune_checkpoint(tmp_path / "in", tmp_path / "x", "2:4", resume=True)
    with pytest.raises(CheckpointError, match="cannot be resumed: "):
        pack_checkpoint(tmp_path / "out", tmp_path / "x", exclude="conv*", resume=True)
    pack_checkpoint(tmp_path / "out", tmp_path / "x", resume=True)
    assert contents(tmp_path / "x") == contents(packed)


class PicklingExecutor(HereExecutor):
    """Sends each call through a pickle, as processes and clusters do."""

    def submit(self, work: Callable[..., Any], /, *arguments: Any, **options: Any) -> Future[Any]:
        sent, given = pickle.loads(pickle.dumps((work, arguments)))
        return super().submit(sent, *given, **options)


def test_workers_elsewhere_do_the_same(packed: Path, tmp_path: Path) -> None:
    pack_checkpoint(tmp_path / "out", tmp_path / "x", workers=PicklingExecutor())
    assert contents(tmp_path / "x") == contents(packed)
    unpack_checkpoint(packed, tmp_path / "y", workers=PicklingExecutor())
    assert contents(tmp_path / "y") == contents(tmp_path / "out")


def test_neither_way_holds_a_tensor_in_memory(tmp_path: Path) -> None:
    w = np.zeros((1024, 1024), np.float32)
    w[:, ::2] = np.random.default_rng(0).standard_normal((1024, 512))
    write_shard(tmp_path / "in", {"w": w, "dense": w, "before": w[:4]})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(units, "_WEIGHTS_A_BAND", 1 << 16)
        patch.setattr(units, "WEIGHTS_A_PIECE", 1 << 14)
        patch.setattr(units, "_BYTES_A_CHUNK", 1 << 16)
        for run, source, target in (
            (lambda *paths: pack_checkpoint(*paths, "1:2", exclude=["dense", "before"]), "in", "packed"),
            (unpack_checkpoint, "packed", "again"),
        ):
            tracemalloc.start()
            try:
                run(tmp_path / source, tmp_path / target)
                assert tracemalloc.get_traced_memory()[1] < w.nbytes / 4
            finally:
                tracemalloc.stop()
    assert (tmp_path / "again").read_bytes() == (tmp_path / "in").read_bytes()
