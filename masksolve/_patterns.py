"""Patterns by layer: which pattern each of many weights gets, by its name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from masksolve._globs import GlobTable, escaped, none_of
from masksolve._kinds import each_reason_once
from masksolve._pattern import Pattern, PatternLike, as_pattern

# One pattern for all weights, or one for those that each glob matches.
PatternsLike = PatternLike | Mapping[str, PatternLike]
_ALL = "*"


@dataclass(frozen=True)
class Patterns:
    """Patterns by globs of names; a weight gets that of the first glob that matches its name.

    One pattern for all is that of the glob "*".
    """

    by_glob: tuple[tuple[str, Pattern], ...]

    def of(self, name: str) -> Pattern | None:
        """Return the pattern of a weight, or None if no glob matches its name."""
        found = self._table.matching(name)
        return self.by_glob[found[0]][1] if found else None

    @cached_property
    def _table(self) -> GlobTable:
        return GlobTable([glob for glob, _ in self.by_glob])

    @property
    def only(self) -> Pattern | None:
        """The pattern that all weights get, if there is one for all."""
        (glob, pattern), *others = self.by_glob
        return pattern if glob == _ALL and not others else None

    @property
    def given(self) -> Pattern | dict[str, Pattern]:
        """The pattern, or the mapping of globs to patterns, that it was made from."""
        return self.only or dict(self.by_glob)

    def check(self, reasons: Mapping[str, str | None], what: str) -> None:
        """Refuse globs that match no name, or none that an earlier glob has left, or nothing that is pruned.

        Parameters
        ----------
        reasons : mapping of str to str or None
            All names, and why each is not pruned.
        what : str
            What has these names, in a word.

        Raises
        ------
        ValueError
            With the glob.
        """
        if self.only is not None:
            return
        names: list[list[str]] = [[] for _ in self.by_glob]
        own: list[list[str]] = [[] for _ in self.by_glob]
        for name in reasons:
            found = self._table.matching(name)
            for index in found:
                names[index].append(name)
            if found:
                own[found[0]].append(name)
        for (glob, pattern), matched, used in zip(self.by_glob, names, own, strict=True):
            if not matched:
                raise ValueError(f"pattern {glob!r} = {pattern} matches {none_of(list(reasons), what)}")
            if not used:
                raise ValueError(
                    f"pattern {glob!r} = {pattern} is never used: the globs before it match all of its names; put it "
                    "before them"
                )
            if glob != _ALL and all(reasons[name] is not None for name in used):
                why = each_reason_once([(name, reasons[name] or "") for name in used])
                raise ValueError(f"pattern {glob!r} = {pattern} is for nothing that can be pruned ({why})")

    def describe(self) -> str:
        """Return the patterns in words, so that nobody reads them the other way round."""
        if self.only is not None:
            return self.only.describe()
        return ", ".join(f"{glob}={pattern.describe()}" for glob, pattern in self.by_glob)

    def __str__(self) -> str:
        return str(self.only or ", ".join(f"{glob}={pattern}" for glob, pattern in self.by_glob))


def as_patterns(pattern: PatternsLike) -> Patterns:
    """Return the patterns that one for all, or a mapping of globs, stands for.

    Raises
    ------
    TypeError, ValueError
        As for `as_pattern`; for globs that are not strings, and an empty mapping.

    Examples
    --------
    >>> patterns = as_patterns({"q_proj": "2:4", "*": "4:8"})
    >>> patterns.of("layers.0.q_proj.weight"), patterns.of("layers.0.k_proj.weight")
    (Pattern(n=2, m=4), Pattern(n=4, m=8))
    """
    if not isinstance(pattern, Mapping):
        return Patterns(((_ALL, as_pattern(pattern)),))
    if not pattern:
        raise ValueError("pattern is an empty mapping; give the pattern of at least one glob, such as {'*': '2:4'}")
    for glob in pattern:
        if not isinstance(glob, str):
            raise TypeError(f"pattern maps globs of names to patterns, such as {{'q_proj': '2:4'}}; got {glob!r}")
    return Patterns(tuple((glob, as_pattern(each)) for glob, each in pattern.items()))


def globs_of_names(patterns: Mapping[str, Pattern]) -> dict[str, Pattern]:
    """Return a mapping of globs in which the first that matches each of these names is the name's own.

    Examples
    --------
    >>> patterns = globs_of_names({"w": Pattern(1, 4), "layers.w": Pattern(2, 4), "a.*": Pattern(3, 4)})
    >>> {glob: str(pattern) for glob, pattern in patterns.items()}
    {'layers.w': '2:4', 'a.[*]': '3:4', 'w': '1:4'}
    """
    # A glob without a dot is also that of each longer name of which it is a part, so these come first.
    names = sorted(patterns, key=lambda name: ("." not in name, 0 if "." in name else -len(name)))
    return {escaped(name): patterns[name] for name in names}


def check_all_have_one(missing: Sequence[str]) -> None:
    """Refuse weights to prune, of these names, that no glob has a pattern for.

    Raises
    ------
    ValueError
        With some of the names, if there are any.
    """
    if missing:
        raise ValueError(
            f"no pattern is given for {', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''} ({len(missing)} of "
            "the weights to prune); add '*' with a pattern for all others, or exclude them"
        )
