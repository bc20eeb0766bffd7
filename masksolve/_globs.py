"""Globs of the names of parameters and tensors."""

from __future__ import annotations

import re
from collections.abc import Sequence
from fnmatch import fnmatchcase


def matches(name: str, globs: Sequence[str]) -> bool:
    """Return whether one of several globs is that of a name, or is one of the parts that its dots separate."""
    return any(fnmatchcase(name, glob) or glob in name.split(".") for glob in globs)


def escaped(name: str) -> str:
    """Return the glob that takes every character of a name for itself."""
    return re.sub(r"[*?[]", r"[\g<0>]", name)


class GlobTable:
    """Many globs, of which those without wildcards are looked up instead of tried one after the other."""

    def __init__(self, globs: Sequence[str]) -> None:
        # Of whole names, and of parts of them.
        self._names: dict[str, int] = {}
        self._parts: dict[str, int] = {}
        self._wild: list[tuple[int, str]] = []
        for index, glob in enumerate(globs):
            text = re.sub(r"\[([*?[])\]", r"\1", glob)
            if escaped(text) == glob:
                self._names[text] = index
                self._parts[glob] = index
            else:
                self._wild.append((index, glob))

    def matching(self, name: str) -> list[int]:
        """Return which globs match a name, in their order, as `matches` says."""
        found = {self._parts[part] for part in name.split(".") if part in self._parts}
        if name in self._names:
            found.add(self._names[name])
        return sorted(found.union(index for index, glob in self._wild if matches(name, [glob])))


def none_of(names: Sequence[str], what: str) -> str:
    """Return the words for a glob that matches none of these names of parameters or tensors."""
    return f"none of the {len(names)} {what} names ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
