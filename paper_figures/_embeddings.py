"""Code that the studies of encoders share: how near the embeddings of a pruned model stay to the dense model's."""

from torch import Tensor


def closeness(found: Tensor, expected: Tensor) -> tuple[float, float]:
    """Compare unit vectors (texts, width).

    Returns the mean cosine, and the share of texts whose nearest neighbour among the others is the same.
    """
    agreement = (_nearest(found) == _nearest(expected)).float().mean()
    return float((found * expected).sum(1).mean()), float(agreement)


def _nearest(embeddings: Tensor) -> Tensor:
    """For each text the most similar other one."""
    return (embeddings @ embeddings.T).fill_diagonal_(-2).argmax(1)
