"""Names in docstrings: a public one of masksolve is a link to where it is documented, all else is code."""

from __future__ import annotations

import re
from importlib import import_module
from typing import Any

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx

_NAME = re.compile(r"(?:masksolve\.)?[\w.]+(\(\))?")
_MODULES = (
    "masksolve",
    "masksolve.budget",
    "masksolve.checkpoint",
    "masksolve.diversity",
    "masksolve.odds",
    "masksolve.permute",
    "masksolve.torch",
    "masksolve.torch.dynamic",
    "masksolve.torch.filters",
)


def public_names() -> dict[str, str]:
    """Return the full name of every public name, by itself and by its last part where that is the only one."""
    found: dict[str, str] = {}
    twice: set[str] = set()
    for path in _MODULES:
        module = import_module(path)
        # Some names of `checkpoint` are imported when they are asked for.
        for name in (*module.__all__, *getattr(module, "_WITH_TORCH", ())):
            full = f"{path}.{name}"
            if full in _MODULES:
                continue
            found[full] = full
            if name in found:
                twice.add(name)
            found[name] = full
    return {name: full for name, full in found.items() if name not in twice}


def name_role(
    role: str, raw: str, text: str, line: int, inliner: Any, *rest: Any
) -> tuple[list[nodes.Node], list[Any]]:
    """Link a public name; show everything else as code."""
    names = inliner.document.settings.env.app.masksolve_names
    literal = nodes.literal(raw, text, classes=["name"])
    target = names.get(text.removesuffix("()")) if _NAME.fullmatch(text) else None
    if target is None:
        return [literal], []
    link = addnodes.pending_xref(
        raw, literal, refdomain="py", reftype="obj", reftarget=target, refexplicit=True, refwarn=True
    )
    return [link], []


_STARRED = re.compile(r"(?<![*\w])\*(?=\w+[),])")


def escape_signs(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Keep |w| and (out, in, *kernel) what they are: docutils takes them for markup."""
    in_example = False
    for place, line in enumerate(lines):
        in_example = line.lstrip().startswith(">>>") or (in_example and bool(line.strip()))
        if not in_example:
            lines[place] = _STARRED.sub(r"\\*", line.replace("|", r"\|"))


def setup(app: Sphinx) -> dict[str, Any]:
    """Add the role and the hook."""
    app.masksolve_names = public_names()  # type: ignore[attr-defined]
    app.add_role("name", name_role)
    # Before napoleon, which knows what is a section.
    app.connect("autodoc-process-docstring", escape_signs, priority=400)
    return {"parallel_read_safe": True}
