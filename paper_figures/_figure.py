"""Code that the scripts share: one style, and saving a figure as PNG, its data as CSV and its table in README.md."""

from __future__ import annotations

import argparse
import csv
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

HERE = Path(__file__).parent

# Okabe and Ito's colours, told apart by colour-blind readers too.
BLACK, ORANGE, SKY, GREEN, BLUE, VERMILION, PURPLE = (
    "#000000",
    "#E69F00",
    "#56B4E9",
    "#009E73",
    "#0072B2",
    "#D55E00",
    "#CC79A7",
)
GREY = "#767676"
# For text, where ORANGE is too pale.
DARK_ORANGE = "#8A5F00"

mpl.use("agg")
mpl.rcParams.update(
    {
        "font.size": 13,
        "axes.titlesize": 14,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": "#dddddd",
        "legend.frameon": False,
        "lines.linewidth": 2,
        "lines.markersize": 8,
        "figure.constrained_layout.use": True,
        "savefig.dpi": 130,
    }
)

Row = Mapping[str, Any]


def arguments(description: str | None) -> argparse.Namespace:
    """Parse the command line that all scripts have."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--into", type=Path, default=HERE, help="folder for the PNG and the CSV; default: beside this")
    parser.add_argument(
        "--weights", type=Path, help="the .safetensors file of the real matrices (`make figures` has it)"
    )
    return parser.parse_args()


def encoder_matrices(path: Path | None) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """Read the weight matrices of MiniLM's encoder: 36 of 384x384, 1536x384 or 384x1536, 10.6 million weights."""
    from safetensors.numpy import load_file

    if path is None:
        raise SystemExit("give --weights FILE; `make figures` downloads the file and passes it")
    for name, tensor in sorted(load_file(path).items()):
        if name.startswith("encoder.") and tensor.ndim == 2:
            yield name, tensor


def save(figure: Figure, rows: Sequence[Row], name: str, into: Path, table: Sequence[Row] | None = None) -> None:
    """Write NAME.png and NAME.csv, and into README.md, where that is beside them, the table (default: the rows)."""
    into.mkdir(parents=True, exist_ok=True)
    figure.savefig(into / f"{name}.png")
    with (into / f"{name}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows({key: _text(value) for key, value in row.items()} for row in rows)
    readme = into / "README.md"
    if readme.exists():
        readme.write_text(with_table(readme.read_text(), name, rows if table is None else table))
    print(f"{name}: {into / name}.png and .csv")


def with_table(text: str, name: str, rows: Sequence[Row]) -> str:
    """Replace the table between the comments `<!-- table NAME -->` and `<!-- end -->` of a text."""
    before, start, rest = text.partition(f"<!-- table {name} -->\n")
    _, end, after = rest.partition("<!-- end -->")
    if not start or not end:
        raise ValueError(f"README.md has no place for the table {name}")
    lines = ["| " + " | ".join(rows[0]) + " |", "| " + " | ".join("---" for _ in rows[0]) + " |"]
    lines += ["| " + " | ".join(map(_text, row.values())) + " |" for row in rows]
    return before + start + "\n".join(lines) + "\n" + end + after


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
