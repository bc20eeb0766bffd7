"""Kinds of weights: how their axes are read, which are left dense unless they are asked for, and the words for that.

One rule for a model in memory and for a checkpoint: the type of the module decides; without modules, the name.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Axes = Literal["matrix", "convolution", "stack"]

EMBEDDING = "an embedding"
ROUTER = "the router of a mixture of experts"
ADAPTER = "part of a PEFT adapter"
SCALES = "what a quantized weight is scaled by"
OTHER = "not the weight of a Linear, a convolution, an attention or a recurrent layer"

# Names of modules and parameters, whole: a "reembedder" is none of them.
_EMBEDDINGS = frozenset(
    [
        "wte",
        "wpe",
        "shared",
        "emb",
        "embed",
        "embed_in",
        "embed_positions",
        "embed_tokens",
        "embed_tokens_per_layer",
        "embedding",
        "embeddings",
        "entity_embeddings",
        "language_embeddings",
        "patch_position_embeddings",
        "pos_emb",
        "pos_embed",
        "pos_embedding",
        "position_embedding",
        "position_embedding_table",
        "position_embeddings",
        "positional_embedding",
        "positional_embeddings",
        "prompt_embeddings",
        "rel_embeddings",
        "rel_pos_h",
        "rel_pos_w",
        "relative_attention_bias",
        "relative_position_bias_table",
        "segment_embeddings",
        "tok_emb",
        "tok_embed",
        "tok_embeddings",
        "token_emb",
        "token_embed",
        "token_embedding",
        "token_embeddings",
        "token_type_embeddings",
        "word_embedding",
        "word_embeddings",
    ]
)
_ROUTERS = frozenset(["router", "routers"])
_GATES = frozenset(["gate", "gating", "shared_expert_gate", "wg"])
# transformers.Conv1D, whose weights are (in, out), and Linear alike have these names.
_EITHER_WAY = frozenset(["c_attn", "c_fc", "c_proj"])
_REASONS = 5
_ADAPTERS = frozenset(["lora_A", "lora_B", "lora_down", "lora_embedding_A", "lora_embedding_B", "lora_up"])
# Of quantized weights, which have a dtype that is not pruned: what is left of a matrix without them.
_SCALES = re.compile(r"(.*_)?(scales?|zeros?|zero_points?|absmax|amax)(_inv)?(_?\d+)?")


@dataclass(frozen=True)
class Kind:
    """The kind of a weight.

    Attributes
    ----------
    axes : {"matrix", "convolution", "stack"} or None
        (out, in); (out, in, *kernel); (..., out, in), one matrix at each index of the leading axes. None where
        nothing distinguishes a stack from a convolution.
    dense : str or None
        Why it is left dense unless it is asked for, in words; None for a weight that is pruned.
    transposed : bool or None
        Whether out and in are exchanged; None where nothing says so.
    """

    axes: Axes | None
    dense: str | None = None
    transposed: bool | None = False


def tied_to(name: str) -> str:
    """Return the words for an output layer whose weight is an embedding's."""
    return f"tied to {name}, {EMBEDDING}"


def stack_of_experts(shape: Sequence[int]) -> str:
    """Return the words for a tensor that holds a matrix for each expert."""
    return f"a stack of {shape[0]} experts"


def dense_by_name(name: str) -> str | None:
    """Return why a weight of this name is left dense unless it is asked for, or None. Names are compared by parts."""
    parts = name.split(".")
    own = parts[-2] if parts[-1] == "weight" and len(parts) > 1 else parts[-1]
    if own in _EMBEDDINGS:
        return f"{EMBEDDING} by its name"
    if is_router(own) or own in _GATES or any(map(is_router, parts)):
        return f"{ROUTER} by its name"
    if any(part in _ADAPTERS for part in parts):
        return f"{ADAPTER} by its name"
    if own == "bias" or own.endswith("_bias"):
        return "a bias by its name"
    if _SCALES.fullmatch(parts[-1]):
        return f"{SCALES} by its name"
    return None


def transposed_by_name(name: str) -> bool | None:
    """Return whether a weight of this name is stored (in, out), as far as that says it; None where it may be."""
    return None if _EITHER_WAY.intersection(name.split(".")) else False


def is_router(name: str) -> bool:
    """Return whether a module of this name, whatever it is, chooses the experts."""
    return name in _ROUTERS


def is_gate(name: str) -> bool:
    """Return whether a module of this name chooses the experts, if it stands beside some."""
    return name in _GATES


def each_reason_once(reasons: Sequence[tuple[str, str]]) -> str:
    """Return the first name of each of a few reasons in words, and how many more names there are of each."""
    names: dict[str, list[str]] = {}
    for name, reason in reasons:
        names.setdefault(reason, []).append(name)
    described = [
        f"{found[0]}: {reason}{f' (and {len(found) - 1} more)' if len(found) > 1 else ''}"
        for reason, found in names.items()
    ]
    return "; ".join(described[:_REASONS]) + ("; ..." if len(described) > _REASONS else "")
