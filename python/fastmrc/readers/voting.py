"""How passages agree on finished answers."""

from __future__ import annotations

import math
from collections.abc import Sequence

from fastmrc.options import Vote

__all__ = ["EPS", "answer_vote"]

EPS = 1e-12
"""Added to a score before its logarithm (vote ``"product"``)."""


def answer_vote(
    scores: Sequence[float], weights: Sequence[float], voters: int, vote: Vote
) -> float:
    """Return the vote for one answer.

    Parameters
    ----------
    scores
        Score of the answer, 0 to 1, in each of the voters that gave it.
    weights
        One per score; all 1 unless the vote is ``"weighted"``.
    voters
        Number of all voters; those that did not give the answer count with 0.
    vote
        The rule; see `fastmrc.options.ReaderOptions`.

    Notes
    -----
    ``original`` is the vote of the bert4keras reader by masked language model.
    """
    if vote == "mean":
        return sum(scores) / voters
    if vote == "max":
        return max(scores)
    if vote == "product":
        logarithms = [math.log(s + EPS) for s in scores]
        return math.exp(sum([*logarithms, (voters - len(scores)) * math.log(EPS)]) / voters)
    total = sum(w * s for s, w in zip(scores, weights, strict=True))
    squares = sum(w * s * s for s, w in zip(scores, weights, strict=True))
    return squares / (1.0 + total)
