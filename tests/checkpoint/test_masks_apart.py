"""Masks stored apart from their weights, and put on them again."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

import masksolve as ms
from masksolve import Pattern
from masksolve.checkpoint import CheckpointError, apply_masks, prune_checkpoint
from tests.checkpoints import PRUNED, HereExecutor, contents, tensors_of, write_shard, write_sharded

PATTERN = Pattern(3, 8)


def test_masks_alone_are_those_of_the_pruned_weights(tmp_path: Path) -> None:
    source = write_sharded(tmp_path / "in")
    prune_checkpoint(source, None, PATTERN, masks=tmp_path / "masks.safetensors")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "masks.safetensors"]
    prune_checkpoint(source, tmp_path / "out", PATTERN)
    packed = tensors_of(tmp_path / "masks.safetensors")
    assert set(packed) == PRUNED
    for shard in (tmp_path / "out").glob("*.safetensors"):
        for name, w in tensors_of(shard).items():
            if name in PRUNED:
                count = w[0].size
                assert packed[name].shape == (len(w), -(-count // 8))
                bits = np.unpackbits(packed[name], axis=1, count=count, bitorder="little")
                assert np.array_equal(bits.reshape(w.shape), w != 0)


def test_the_metadata_tells_the_pattern_and_the_weights(tmp_path: Path) -> None:
    w = np.random.default_rng(0).standard_normal((16, 24)).astype(np.float32)
    hashes = []
    for name, weights in (("a", w), ("b", w), ("c", w + 1)):
        write_shard(tmp_path / f"{name}.safetensors", {"w": weights})
        prune_checkpoint(tmp_path / f"{name}.safetensors", None, PATTERN, masks=tmp_path / name)
        with safe_open(tmp_path / name, framework="numpy") as file:
            metadata = file.metadata()
        described = json.loads(metadata["weights"])["w"]
        assert (described["pattern"], described["direction"]) == ("3:8", "both")
        assert described["shape"] == [16, 24]
        hashes.append(described["hash"])
    assert hashes[0] == hashes[1] != hashes[2]


def test_applied_masks_give_the_pruned_checkpoint(tmp_path: Path) -> None:
    source = write_sharded(tmp_path / "in")
    prune_checkpoint(source, tmp_path / "out", PATTERN, masks=tmp_path / "masks")
    report = apply_masks(source, tmp_path / "masks", tmp_path / "applied")
    assert contents(tmp_path / "applied") == contents(tmp_path / "out")
    assert report.optimal
    assert report.pattern == PATTERN
    assert {tensor.name for tensor in report.tensors} == PRUNED


def test_applying_is_resumed_too(tmp_path: Path) -> None:
    source = write_sharded(tmp_path / "in")
    prune_checkpoint(source, tmp_path / "out", PATTERN, masks=tmp_path / "masks")

    def before(call: int) -> None:
        if call >= 5:
            raise OSError("full")

    with pytest.raises(OSError, match="full"):
        apply_masks(source, tmp_path / "masks", tmp_path / "applied", workers=HereExecutor(before))
    masks = (tmp_path / "masks").read_bytes()
    times = (tmp_path / "masks").stat()
    (tmp_path / "masks").write_bytes(masks[:-1] + bytes([masks[-1] ^ 1]))
    os.utime(tmp_path / "masks", ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(CheckpointError, match=r"the hash of the masks was [0-9a-f]{32}, now it is [0-9a-f]{32};"):
        apply_masks(source, tmp_path / "masks", tmp_path / "applied", resume=True)
    (tmp_path / "masks").write_bytes(masks)  # at another time
    apply_masks(source, tmp_path / "masks", tmp_path / "applied", resume=True)
    assert contents(tmp_path / "applied") == contents(tmp_path / "out")


def test_masks_of_other_weights_are_applied_only_when_asked(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    w, later = rng.standard_normal((2, 24, 16)).astype(np.float32)
    write_shard(tmp_path / "in", {"w": w})
    write_shard(tmp_path / "later", {"w": later})
    prune_checkpoint(tmp_path / "in", tmp_path / "out", PATTERN, masks=tmp_path / "masks")
    with pytest.raises(CheckpointError, match=r"made for other weights of tensor 'w'; pass `other_weights=True`"):
        apply_masks(tmp_path / "later", tmp_path / "masks", tmp_path / "applied")
    assert not (tmp_path / "applied").exists()
    report = apply_masks(tmp_path / "later", tmp_path / "masks", tmp_path / "applied", other_weights=True)
    mask = tensors_of(tmp_path / "out")["w"] != 0
    assert np.array_equal(tensors_of(tmp_path / "applied")["w"], np.where(mask, later, 0))
    certificate = ms.certify(later, mask, 3, 8)
    assert report.command.endswith(f"--output {tmp_path / 'applied'} --other-weights")
    assert not report.optimal
    assert report.tensors[0].gap == pytest.approx(certificate.gap)
    assert report.tensors[0].kept == pytest.approx(certificate.kept)


def test_masks_that_do_not_fit_are_named(tmp_path: Path) -> None:
    ones = np.ones((16, 16), np.float32)
    write_shard(tmp_path / "in", {"v": ones, "w": ones})
    prune_checkpoint(tmp_path / "in", None, PATTERN, masks=tmp_path / "masks")
    refused = {
        "name": ({"v": ones, "x": ones}, "has a mask of tensor 'w', which"),
        "shape": ({"v": ones, "w": ones[:, 8:]}, r"mask of shape \(16, 16\) for tensor 'w', whose shape is \(16, 8\)"),
        "dtype": ({"v": ones, "w": ones.astype(int)}, "not every mask in .* can be applied: w: dtype I64"),
    }
    for name, (tensors, message) in refused.items():
        write_shard(tmp_path / name, tensors)
        with pytest.raises(CheckpointError, match=message):
            apply_masks(tmp_path / name, tmp_path / "masks", tmp_path / "out")
    text = b'{"__metadata__":null}'
    (tmp_path / "null").write_bytes(len(text).to_bytes(8, "little") + text)
    for name in ("in", "null"):
        with pytest.raises(CheckpointError, match="holds no masks; name a file that"):
            apply_masks(tmp_path / "in", tmp_path / name, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_masks_that_break_the_pattern_are_named(tmp_path: Path) -> None:
    write_shard(tmp_path / "in", {"w": np.ones((16, 16), np.float32)})
    prune_checkpoint(tmp_path / "in", None, PATTERN, masks=tmp_path / "masks")
    content = bytearray((tmp_path / "masks").read_bytes())
    content[-1] = 255
    (tmp_path / "masks").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"masks of tensor 'w' are not 3:8: mask\[15, 8:16\] keeps 8"):
        apply_masks(tmp_path / "in", tmp_path / "masks", tmp_path / "out")


@pytest.mark.parametrize(("name", "value"), [("shape", [16, 16.0]), ("shape", 16), ("stack", "no"), ("stack", None)])
def test_masks_whose_metadata_is_spoilt_are_refused(name: str, value: Any, tmp_path: Path) -> None:
    write_shard(tmp_path / "in", {"w": np.ones((16, 16), np.float32)})
    prune_checkpoint(tmp_path / "in", None, PATTERN, masks=tmp_path / "masks")
    with safe_open(tmp_path / "masks", framework="numpy") as file:
        metadata, masks = file.metadata(), {"w": file.get_tensor("w")}
    weights = json.loads(metadata["weights"])
    weights["w"][name] = value
    save_file(masks, tmp_path / "masks", {**metadata, "weights": json.dumps(weights)})
    with pytest.raises(CheckpointError, match=r"masks holds masks, but says .*; write it again"):
        apply_masks(tmp_path / "in", tmp_path / "masks", tmp_path / "out")


def test_a_file_of_no_masks_is_refused(tmp_path: Path) -> None:
    write_shard(tmp_path / "in", {"w": np.ones((16, 16), np.float32)})
    prune_checkpoint(tmp_path / "in", None, PATTERN, masks=tmp_path / "masks")
    with safe_open(tmp_path / "masks", framework="numpy") as file:
        save_file({}, tmp_path / "none", file.metadata())
    with pytest.raises(CheckpointError, match="none holds no mask of any tensor; write it again"):
        apply_masks(tmp_path / "in", tmp_path / "none", tmp_path / "out")


@pytest.mark.parametrize("masks", ["out", "out/masks"])
def test_masks_never_lie_in_the_output(masks: str, tmp_path: Path) -> None:
    source = write_sharded(tmp_path / "in")
    write_sharded(tmp_path / "out")
    with pytest.raises((CheckpointError, IsADirectoryError)):
        prune_checkpoint(source, tmp_path / "out", PATTERN, masks=tmp_path / masks, overwrite=True)


def test_masks_are_never_replaced_by_what_they_are_applied_to(tmp_path: Path) -> None:
    source = write_sharded(tmp_path / "in")
    single = source / "model-00001-of-00003.safetensors"
    out = tmp_path / "out"
    prune_checkpoint(source, out, PATTERN)
    for weights, masks, target in ((source, out / "masks", out), (single, tmp_path / "masks", tmp_path / "masks")):
        prune_checkpoint(weights, None, PATTERN, masks=masks)
        before = masks.read_bytes()
        with pytest.raises(CheckpointError, match="name another"):
            apply_masks(weights, masks, target, overwrite=True)
        assert masks.read_bytes() == before


def test_nothing_to_write_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nothing to write"):
        prune_checkpoint(write_sharded(tmp_path / "in"), None, PATTERN)
