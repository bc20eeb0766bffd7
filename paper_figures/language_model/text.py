"""Windows of tokens from the documentation of Python, as Debian's package python3-doc has it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# Which of the folders of sources are read for what: the parts have no page in common.
CALIBRATION = ("library",)
EVALUATION = ("tutorial", "howto", "reference")


def debian() -> Path | None:
    """Return the folder of the sources that the newest of Debian's packages has."""
    found = sorted(Path("/usr/share/doc").glob("python3*/html/_sources"))
    return found[-1] if found else None


def windows(tokenizer: Any, folder: Path | None, parts: Sequence[str], number: int, length: int) -> Tensor:
    """Return different windows of `length` tokens each, (number, length), drawn at random and always the same."""
    files = [] if folder is None else sorted(file for part in parts for file in (folder / part).rglob("*.rst.txt"))
    if not files:
        raise SystemExit(
            f"no {' or '.join(f'{part}/*.rst.txt' for part in parts)} in {folder or '/usr/share/doc/python3*'}; "
            "apt-get install python3-doc, or give --text FOLDER"
        )
    tokens = torch.tensor(tokenizer("\n".join(file.read_text(encoding="utf-8") for file in files))["input_ids"])
    if len(tokens) < number * length:
        raise SystemExit(f"{folder} has {len(tokens):,} tokens in {', '.join(parts)}, not {number} times {length}")
    chosen = torch.randperm(len(tokens) // length, generator=torch.Generator().manual_seed(0))[:number]
    return tokens[: len(tokens) // length * length].view(-1, length)[chosen]
