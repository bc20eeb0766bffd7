"""The recipes: how a model gets sparse, or small, and what follows."""

from __future__ import annotations

from dataclasses import dataclass

ALPHAS = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
# The α that the pipeline into N:M starts from.
ALPHA = 1e-3
DENSITIES = (0.5, 0.25, 0.1, 0.05, 0.02)
SR_STE = ("4:8", "2:8", "1:8")
METHODS = ("pfp", "l1", "l2", "pfp-random", "pfp-top")
KEPT = (0.5, 0.25, 0.1)
# The share that the pipeline into N:M starts from.
PIPED = 0.25
PATTERNS = ("4:8", "8:16")


@dataclass(frozen=True)
class Recipe:
    """One way: its kind, and its numbers.

    Kinds: "dense"; "dynamic" at `amount` = α; "magnitude", the largest weights of a trained model to a density, trained
    again; "sr-ste" under a transposable `pattern`; filters cut from a trained model by `method` to a share of its
    parameters, trained again. With `pattern`, dynamic training is followed by `adaprune` to it, and a model with fewer
    filters is trained again under its masks.
    """

    kind: str
    amount: float = 1.0
    pattern: str = ""

    @property
    def name(self) -> str:
        """A file's, and a row's."""
        if self.kind == "sr-ste":
            return f"{self.kind} {self.pattern}"
        amount = "" if self.kind == "dense" else f" {self.amount:g}"
        return f"{self.kind}{amount}{f' then {self.pattern}' if self.pattern else ''}"

    @property
    def starts_trained(self) -> bool:
        """Whether it starts from the trained dense model."""
        return self.kind == "magnitude" or self.kind in METHODS


# Dense first, as others start from it.
RECIPES = (
    Recipe("dense"),
    *(Recipe("dynamic", alpha) for alpha in ALPHAS),
    *(Recipe("dynamic", ALPHA, pattern) for pattern in PATTERNS),
    *(Recipe("magnitude", density) for density in DENSITIES),
    *(Recipe("sr-ste", pattern=pattern) for pattern in SR_STE),
    *(Recipe(method, kept) for method in METHODS[:3] for kept in KEPT),
    *(Recipe(method, PIPED) for method in METHODS[3:]),
    *(Recipe(METHODS[0], PIPED, pattern) for pattern in PATTERNS),
)
