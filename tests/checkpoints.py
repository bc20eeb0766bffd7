"""Sharded checkpoints for the tests, and what is compared of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

DTYPES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "float8_e4m3fn": "F8_E4M3",
    "int64": "I64",
    "uint8": "U8",
}


def write_shard(path: Path, tensors: dict[str, np.ndarray], metadata: dict[str, str] | None = None) -> None:
    """A safetensors file, written by hand: the library has no bfloat16 for NumPy."""
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    position = 0
    for name, array in tensors.items():
        offsets = [position, position + array.nbytes]
        header[name] = {"dtype": DTYPES[array.dtype.name], "shape": array.shape, "data_offsets": offsets}
        position = offsets[1]
    text = json.dumps(header, ensure_ascii=False).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(each.tobytes() for each in tensors.values()))


def write_sharded(folder: Path, seed: int = 0) -> Path:
    """A folder of three shards with tensors of every kind and name, and files that are none of them."""
    rng = np.random.default_rng(seed)

    def normal(*shape: int, dtype: Any = np.float32) -> np.ndarray:
        return rng.standard_normal(shape).astype(dtype)

    shards = {
        "model-00001-of-00003.safetensors": {
            "layers.0.weight": normal(72, 40),
            "layers.0.bias": normal(72),
            "layers.0.half": normal(33, 24, dtype=np.float16),
            'quo"te/slash\\weight \u00fc\u4e16\u754c': normal(16, 16),
            "empty": np.zeros((0, 16), np.float32),
        },
        "model-00002-of-00003.safetensors": {
            "layers.1.weight": normal(48, 64, dtype=ml_dtypes.bfloat16),
            "layers.1.fp8": normal(16, 16, dtype=ml_dtypes.float8_e4m3fn),
            "layers.1.ids": np.arange(64).reshape(8, 8),
            "conv.weight": normal(24, 16, 3, 3),
            "empty columns": np.zeros((16, 0), np.float16),
            "empty kernel": np.zeros((16, 16, 0), np.float16),
        },
        "model-00003-of-00003.safetensors": {
            "layers.2.weight": normal(40, 100, dtype=np.float64),
            "tokens.embedding": normal(50, 8),
            "patch": normal(16, 8, 5, 1, dtype=ml_dtypes.bfloat16),
        },
    }
    folder.mkdir()
    for name, tensors in shards.items():
        write_shard(folder / name, tensors, {"format": "pt", "shard": name})
    weight_map = {tensor: name for name, tensors in shards.items() for tensor in tensors}
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    (folder / "config.json").write_text('{"hidden": 8}')
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "vocabulary.txt").write_bytes(b"a\r\nb\xff")
    (folder / "nothing.txt").touch()
    return folder


PRUNED = {
    "layers.0.weight",
    "layers.0.half",
    'quo"te/slash\\weight \u00fc\u4e16\u754c',
    "layers.1.weight",
    "conv.weight",
    "layers.2.weight",
    "patch",
}


def tensors_of(path: Path) -> dict[str, np.ndarray]:
    """The tensors of one file, read by hand."""
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    names = {short: np.dtype(getattr(ml_dtypes, name, name)) for name, short in DTYPES.items()}
    tensors = {}
    for name, entry in json.loads(content[8 : 8 + size]).items():
        if name != "__metadata__":
            start, stop = entry["data_offsets"]
            flat = np.frombuffer(content[8 + size + start : 8 + size + stop], names[entry["dtype"]])
            tensors[name] = flat.reshape(entry["shape"])
    return tensors


RECORD = "masksolve.json"


def contents(path: Path) -> dict[str, bytes]:
    """Every byte of a file, or of all files in a folder by their names."""
    if path.is_file():
        return {"": path.read_bytes()}
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


class HereExecutor(Executor):
    """Does the work where it is given out, in order; `before(call)` may spoil the n-th call."""

    def __init__(self, before: Callable[[int], None] = lambda call: None) -> None:
        self.calls = 0
        self._before = before

    def submit(self, work: Callable[..., Any], /, *arguments: Any, **options: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_running_or_notify_cancel()
        try:
            if work.__name__ in ("prune_unit", "pack_unit", "unpack_unit"):
                self._before(self.calls)
                self.calls += 1
            future.set_result(work(*arguments, **options))
        except Exception as error:  # as every executor does
            future.set_exception(error)
        return future
