"""Whether a token can have the largest logit: the whole linear programme, and published searches.

The linear programme needs SciPy.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["largest_lead", "min_norm_point", "reflection_search"]

Vector = NDArray[np.float64]


def largest_lead(weight: Any, token: int, bias: Any = None) -> float:
    """Return the largest r for which some z with ``|z_j| <= 1`` scores a token r above all others.

    With a bias the inputs are z / t with 0 < t <= 1, and t has to be at least r too, so that the
    result is above 0 iff the token is argmaxable for inputs of any size. Grivas, Bogoychev and
    Lopez, "Low-Rank Softmax Can Have Unargmaxable Classes in Theory but Rarely in Practice", 2022,
    without its bounds of z.

    Parameters
    ----------
    weight
        [V, d]; rows differ from that of the token, for differences are scaled to the norm 1.
    token
        Row in question.
    bias
        [V], or None.

    Returns
    -------
    float
        0 or more, to the 1e-9 or so of the solver.
    """
    from scipy.optimize import linprog

    rows = np.asarray(weight, np.float64)
    if bias is not None:
        rows = np.column_stack([rows, np.asarray(bias, np.float64)])
    differences = rows[token] - np.delete(rows, token, axis=0)
    if bias is not None:
        differences = np.vstack([differences, np.eye(rows.shape[1])[-1]])
    differences /= np.linalg.norm(differences, axis=1, keepdims=True)
    width = rows.shape[1]
    # Maximise r subject to r - D z <= 0.
    solved = linprog(
        np.append(np.zeros(width), -1.0),
        A_ub=np.column_stack([-differences, np.ones(len(differences))]),
        b_ub=np.zeros(len(differences)),
        bounds=[(-1, 1)] * width + [(0, None)],
        method="highs",
        options={"primal_feasibility_tolerance": 1e-10, "dual_feasibility_tolerance": 1e-10},
    )
    return float(solved.x[-1])


def reflection_search(
    weight: Any, token: int, bias: Any = None, patience: int = 2500
) -> Vector | None:
    """Return an input at which the token leads, or None: "braid swap" of the same paper.

    From the token's own row on, the point is reflected through the hyperplane on which the token
    and the one that leads score the same.
    """
    rows = np.asarray(weight, np.float64)
    biases = np.zeros(len(rows)) if bias is None else np.asarray(bias, np.float64)
    point: Vector = rows[token].copy()
    for _ in range(patience):
        leader = int(np.argmax(rows @ point + biases))
        if leader == token:
            return point
        across = rows[token] - rows[leader]
        gap = across @ point + biases[token] - biases[leader]
        point -= 2 * gap / (across @ across) * across
    return None


def min_norm_point(weight: Any, token: int, steps: int) -> tuple[Vector, Vector]:
    """Return the point of least norm in the hull of the differences, and its weights.

    Frank-Wolfe steps with exact line search, for a layer without bias: the token is argmaxable iff
    the point is not 0. Frank and Wolfe, "An algorithm for quadratic programming", 1956.

    Returns
    -------
    point, weights
        float64 [d] and [V]; the weights of all rows, 0 for the token's, add up to 1.
    """
    rows = np.asarray(weight, np.float64)
    differences = rows[token] - rows
    others = np.flatnonzero(np.arange(len(rows)) != token)
    weights = np.zeros(len(rows))
    weights[others[0]] = 1.0
    point = differences[others[0]].copy()
    for _ in range(steps):
        least = int(others[np.argmin(differences[others] @ point)])
        towards = differences[least] - point
        length = towards @ towards
        if length == 0:
            break
        share = float(np.clip(-(point @ towards) / length, 0.0, 1.0))
        weights *= 1 - share
        weights[least] += share
        point += share * towards
    return point, weights
