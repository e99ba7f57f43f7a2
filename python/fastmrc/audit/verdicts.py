"""Verdicts on tokens and how they are kept."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Stage", "TokenStatus", "TokenVerdict"]


class TokenStatus(enum.IntEnum):
    """What is known of a token.

    ARGMAXABLE: some input gives it the largest logit; the witness is such an input. UNARGMAXABLE:
    none does, by the weights. NEAR: neither was found, and the weights show that a lead would be
    tiny, for a mean row is within 1e-6 of the largest norm of a row. TIE: another token has the
    same row and bias, so it is at best equal; the witness makes its group the largest. UNDECIDED:
    not found out.
    """

    UNDECIDED = 0
    ARGMAXABLE = 1
    UNARGMAXABLE = 2
    NEAR = 3
    TIE = 4


class Stage(enum.IntEnum):
    """What decided: equal rows, the product of all whitened rows, reflections, Newton steps, the
    linear programme, or Frank-Wolfe steps; NONE if nothing did."""

    NONE = 0
    DUPLICATES = 1
    WHITENED = 2
    REFLECTION = 3
    NEWTON = 4
    LP = 5
    FRANK_WOLFE = 6


@dataclass(frozen=True, slots=True)
class TokenVerdict:
    """The verdict on one token.

    Attributes
    ----------
    id
        Of the token, its row.
    status, stage
        The verdict and what decided.
    margin
        ARGMAXABLE and TIE: the lead of the token's logit over every other one at the witness
        (twins aside), divided by the norm of the witness; of the stage WHITENED a lower bound.
        UNARGMAXABLE: 0. NEAR: what no input of norm 1 can exceed. Else NaN.
    witness
        float32 or float64 [d], or None.
    weights
        Of tokens whose weighted mean row is this token's, with a mean bias that is not lower
        (within a radius: so near that the bias makes up for the rest): positive, up to a factor;
        None if there are none.
    blocked_by
        At most five tokens with the largest weights.
    twin_of
        The first token with the same row, and the largest bias among those; None if there is none.
    """

    id: int
    status: TokenStatus
    stage: Stage
    margin: float
    witness: NDArray[np.floating[Any]] | None
    weights: dict[int, float] | None
    blocked_by: tuple[int, ...]
    twin_of: int | None
