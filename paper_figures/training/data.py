"""Fashion-MNIST, from the four files of Debian's package dataset-fashion-mnist or any folder that holds them."""

from __future__ import annotations

import gzip
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

DEBIAN = Path("/usr/share/datasets/fashion-mnist")
FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)


@dataclass(frozen=True)
class Data:
    """Images (B, 1, 28, 28), float32 of mean 0 and deviation 1 over the training set; labels (B,), int64."""

    images: Tensor
    labels: Tensor
    test_images: Tensor
    test_labels: Tensor

    def first(self, count: int, tested: int) -> Data:
        """So many training images and test images only."""
        return Data(self.images[:count], self.labels[:count], self.test_images[:tested], self.test_labels[:tested])


@cache
def load(folder: Path = DEBIAN) -> Data:
    """Read the four files, gzipped or not, once in a process."""
    paths = [path if (path := folder / f"{name}.gz").exists() else folder / name for name in FILES]
    missing = [path.name for path in paths if not path.exists()]
    if missing:
        raise SystemExit(
            f"{folder} has no {', '.join(missing)}; apt-get install dataset-fashion-mnist, or give --data FOLDER with "
            "the four files of Fashion-MNIST"
        )
    images, labels, test_images, test_labels = map(read_idx, paths)
    pixels = torch.from_numpy(images).float()
    mean, deviation = pixels.mean(), pixels.std()

    def normal(array: np.ndarray) -> Tensor:
        return ((torch.from_numpy(array).float() - mean) / deviation).unsqueeze(1)

    return Data(
        normal(images), torch.from_numpy(labels).long(), normal(test_images), torch.from_numpy(test_labels).long()
    )


def read_idx(path: Path) -> np.ndarray:
    """Read an array of bytes: two zeros, the type 8, the number of axes, their lengths in 32 bits each, the entries."""
    raw = path.read_bytes()
    content = gzip.decompress(raw) if path.suffix == ".gz" else raw
    if content[:3] != b"\x00\x00\x08":
        raise SystemExit(f"{path} is not an IDX file of bytes")
    shape = np.frombuffer(content, ">u4", content[3], offset=4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * len(shape)).reshape(shape.astype(int)).copy()
