"""How passages agree on finished answers."""

from __future__ import annotations

import math
from collections.abc import Sequence

from fastmrc.options import Vote

__all__ = ["EPS", "answer_vote", "voting_windows"]

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


def voting_windows(
    surviving: Sequence[bool],
    no_answer: Sequence[float],
    weights: Sequence[float],
    ratio: float | None,
) -> list[int]:
    """Return the indices of the windows that take part in the vote on finished answers.

    Parameters
    ----------
    surviving
        Whether each window gave an answer.
    no_answer
        For each window the probability that it holds none.
    weights
        One per window.
    ratio
        Of the surviving windows those vote whose `no_answer` is at most so many times the least
        (of a window whose weight is not 0). None or infinity: all vote, rejected ones without an
        answer.
    """
    if ratio is None or math.isinf(ratio):
        return list(range(len(surviving)))
    seen = [i for i, stays in enumerate(surviving) if stays]
    least = min((no_answer[i] for i in seen if weights[i] > 0), default=1.0)
    return [i for i in seen if no_answer[i] <= ratio * least]
