"""Pages of the repository that are pages of the site too: copied into docs/from, with links that are right there."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path, PurePosixPath
from typing import Any

from sphinx.application import Sphinx

ROOT = Path(__file__).parents[2]
# Where they are in the repository, and under docs/.
PAGES = {
    "CONTRIBUTING.md": "from/contributing.md",
    "CHANGELOG.md": "from/changelog.md",
    "SECURITY.md": "from/security.md",
    "RELEASING.md": "from/releasing.md",
    "examples/README.md": "from/examples.md",
    "benchmarks/README.md": "from/benchmarks.md",
    "paper_figures/README.md": "from/figures.md",
    **{
        f"paper_figures/{name}/README.md": f"from/{name}.md"
        for name in sorted(path.parent.name for path in (ROOT / "paper_figures").glob("*/README.md"))
    },
}
_LINK = re.compile(r"(?<=\]\()(?!\w+:|#)([^)#\s]+)(#[^)\s]*)?(?=\))")


def moved(text: str, source: str, target: str, images: dict[str, Path]) -> str:
    """Return a page's text with its relative links as seen from its new place; note the images that go with it."""

    def link(found: re.Match[str]) -> str:
        path = os.path.normpath(PurePosixPath(source).parent / found[1])
        anchor = found[2] or ""
        if path.endswith((".png", ".svg")):
            name = path.replace("/", "-")
            images[name] = ROOT / path
            return name
        # The README is the site's first page; what is no page of it is in the repository.
        new = PAGES.get(path, "index.md" if path == "README.md" else path.removeprefix("docs/"))
        if new == path and not path.startswith("docs/"):
            return f"https://github.com/masksolve/masksolve/blob/main/{path}{anchor}"
        return os.path.relpath(new, PurePosixPath(target).parent) + anchor

    return _LINK.sub(link, text)


def copy_pages(app: Sphinx) -> None:
    """Write the pages whose text has changed, so that others are not built again."""
    folder = Path(app.srcdir) / "from"
    folder.mkdir(exist_ok=True)
    images: dict[str, Path] = {}
    for source, target in PAGES.items():
        text = moved((ROOT / source).read_text(encoding="utf-8"), source, target, images)
        path = Path(app.srcdir) / target
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")
    for name, image in images.items():
        shutil.copy2(image, folder / name)


def close_up(app: Sphinx, name: str, source: list[str]) -> None:
    """Drop the empty line that doctest wants at the end of an example."""
    source[0] = source[0].replace("\n\n```\n", "\n```\n")


def setup(app: Sphinx) -> dict[str, Any]:
    """Copy pages before anything is read."""
    app.connect("builder-inited", copy_pages)
    app.connect("source-read", close_up)
    return {"parallel_read_safe": True}
