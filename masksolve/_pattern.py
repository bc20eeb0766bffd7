"""Pattern: how many entries are kept in every group of M."""

from __future__ import annotations

import operator
import re
from dataclasses import dataclass
from typing import SupportsIndex


@dataclass(frozen=True, order=True)
class Pattern:
    """An N:M sparsity pattern: **N entries are kept** of every M consecutive ones.

    The field writes "N:M" both ways; here, as in NVIDIA's tools, N counts the entries that are kept:
    1:4 keeps 1 of every 4 and zeroes 3. Use `Pattern.from_zeros` for the other convention.

    Parameters
    ----------
    n : int
        Entries kept in every group, 0 <= n <= m.
    m : int
        Length of a group, at least 1.

    Raises
    ------
    TypeError
        If n or m is not an integer; bool does not count as one.
    ValueError
        If n or m is out of range.

    Examples
    --------
    >>> pattern = Pattern(1, 4)
    >>> print(pattern)
    1:4
    >>> pattern.kept, pattern.zeros
    (1, 3)
    """

    n: int
    m: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "n", as_integer(self.n, "n"))
        object.__setattr__(self, "m", as_integer(self.m, "m"))
        if self.m < 1:
            raise ValueError(f"m must be at least 1, got m={self.m}; m is the length of a group, as 4 in 2:4")
        if not 0 <= self.n <= self.m:
            raise ValueError(
                f"n must lie between 0 and m={self.m}, got n={self.n}; n is how many entries of every m are kept"
            )

    @classmethod
    def parse(cls, text: str) -> Pattern:
        """Read a pattern written as "N:M", N of every M kept.

        Raises
        ------
        ValueError
            If the text is not two whole numbers with a colon between them, or they are out of range.

        Examples
        --------
        >>> Pattern.parse("2:4")
        Pattern(n=2, m=4)
        """
        if not isinstance(text, str):
            raise TypeError(f'a pattern is parsed from a string such as "2:4", got {text!r}')
        match = re.fullmatch(r"\s*(\d+)\s*:\s*(\d+)\s*", text, flags=re.ASCII)
        if match is None:
            raise ValueError(f'a pattern is written "N:M" with whole numbers, such as "2:4"; got {text!r}')
        return cls(int(match[1]), int(match[2]))

    @classmethod
    def from_zeros(cls, zeros: int, m: int) -> Pattern:
        """Return the pattern that zeroes `zeros` of every m: the N:M of SparseGPT, Wanda and the paper's abstract.

        Examples
        --------
        >>> print(Pattern.from_zeros(1, 4))
        3:4
        """
        zeros, m = as_integer(zeros, "zeros"), as_integer(m, "m")
        if m >= 1 and not 0 <= zeros <= m:
            raise ValueError(f"zeros must lie between 0 and m={m}, got zeros={zeros}")
        return cls(m - zeros, m)

    @property
    def kept(self) -> int:
        """Entries kept of every m."""
        return self.n

    @property
    def zeros(self) -> int:
        """Entries zeroed of every m."""
        return self.m - self.n

    def describe(self) -> str:
        """Return the pattern in words, so that nobody reads it the other way round.

        Examples
        --------
        >>> Pattern(1, 4).describe()
        '1:4 (keeps 1 of every 4, zeroes 3)'
        """
        return f"{self} (keeps {self.n} of every {self.m}, zeroes {self.zeros})"

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"


# Whatever stands for a pattern where a parameter is called `pattern`.
PatternLike = str | tuple[int, int] | Pattern


def as_pattern(pattern: PatternLike) -> Pattern:
    """Return the pattern that "N:M", the tuple (N, M) or a Pattern stands for, N of every M **kept**.

    Raises
    ------
    TypeError
        For anything else.
    ValueError
        For text that is not "N:M", and for N or M out of range.

    Examples
    --------
    >>> as_pattern("2:4") == as_pattern((2, 4)) == Pattern(2, 4)
    True
    """
    if isinstance(pattern, Pattern):
        return pattern
    if isinstance(pattern, str):
        return Pattern.parse(pattern)
    if isinstance(pattern, tuple) and len(pattern) == 2:
        return Pattern(*pattern)
    raise TypeError(f'a pattern is "N:M", (N, M) or a Pattern, such as "2:4" with 2 of every 4 kept; got {pattern!r}')


def as_integer(value: SupportsIndex, name: str) -> int:
    """Return a whole number as an int; a bool does not count as one."""
    if type(value) is int:  # nearly always, and small calls are made in loops
        return value
    try:
        if isinstance(value, bool) or type(value).__name__ == "bool":
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {value!r} of type {type(value).__name__}") from None
