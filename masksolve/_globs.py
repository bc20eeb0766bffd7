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


def none_of(names: Sequence[str], what: str) -> str:
    """Return the words for a glob that matches none of these names of parameters or tensors."""
    return f"none of the {len(names)} {what} names ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
