"""Many tokens at once: the point of least norm in the hull of the differences, by Frank-Wolfe.

For weights a of the simplex ``radius * |sum a_i D_i| + sum a_i B_i``, with the differences D_i of
rows and B_i of biases, bounds from above by how much the row can lead at any z of norm `radius`,
and the least such bound is attained (minimax). At ``z = radius * X / |X|``, X the weighted
difference, the lead is a bound from below. Without bias the radius does not matter: there is a
witness iff the point of least norm is not 0. Steps are pairwise: weight goes from the difference
that leads most at X to the one that leads least (Lacoste-Julien and Jaggi, "On the Global Linear
Convergence of Frank-Wolfe Optimization Variants", 2015).
"""

from __future__ import annotations

from collections.abc import Callable

import torch

__all__ = ["HullPoints", "frank_wolfe"]

# A lead is one of rounding below this share of what it could be.
_CLEAR = 1e-9
# In the place of 0 as a divisor.
_TINY = 1e-36


class HullPoints:
    """Where the steps ended; all in the precision of the rows.

    Attributes
    ----------
    points
        [n, c], weighted differences X.
    weights
        [n, U or U + 1], those of the rows and of `extra`; they add up to 1.
    upper, lower
        [n], bounds of the largest lead at norm `radius`; `lower` is that of the best point.
    best
        [n, c], the X of the best lower bound.
    """

    def __init__(self, count: int, size: int, width: int, dtype: torch.dtype) -> None:
        self.points = torch.zeros(count, width, dtype=dtype)
        self.weights = torch.zeros(count, size, dtype=dtype)
        self.upper = torch.full((count,), torch.inf, dtype=dtype)
        self.lower = torch.full((count,), -torch.inf, dtype=dtype)
        self.best = torch.zeros(count, width, dtype=dtype)


def frank_wolfe(
    numbers: torch.Tensor,
    vectors: torch.Tensor,
    bias: torch.Tensor | None,
    extra: torch.Tensor | None,
    radius: float,
    steps: int,
    go_on: Callable[[], bool],
) -> HullPoints:
    """Take pairwise Frank-Wolfe steps until leads are known to be positive or not.

    Parameters
    ----------
    numbers
        int64 [n], rows in question.
    vectors
        float64 or float32 [U, c], the rows in the coordinates in which norms are meant.
    bias
        [U], or None.
    extra
        [c], a difference to be had beside those of all rows, or None.
    radius
        Norm of the inputs; without a bias 1.
    steps
        At most.
    go_on
        Asked before each step.

    Returns
    -------
    HullPoints
    """
    hull = _Hulls(numbers, vectors, bias, extra)
    count = len(vectors) + (extra is not None)
    found = HullPoints(len(numbers), count, vectors.shape[1], vectors.dtype)
    every = torch.arange(len(numbers))
    start = hull.leads(every, vectors[numbers] - vectors.mean(dim=0), 1.0).argmin(dim=1)
    found.weights[every, start] = 1.0
    found.points, heights = hull.differences(every, start)  # X and sum a_i B_i
    running = every
    for _ in range(steps):
        if not len(running) or not go_on():
            break
        leads = hull.leads(running, found.points[running], radius)
        lengths = torch.linalg.vector_norm(found.points[running], dim=1)
        upper = torch.minimum(found.upper[running], radius * lengths + heights[running])
        found.upper[running] = upper
        lowest, least = leads.min(dim=1)
        better = lowest > found.lower[running]
        found.lower[running[better]] = lowest[better]
        found.best[running[better]] = found.points[running[better]]
        leading = found.lower[running] > _CLEAR * radius * lengths
        undecided = ~leading & (upper > 0)
        running, leads, least = running[undecided], leads[undecided], least[undecided]
        heights[running] += _pairwise_step(found, hull, running, leads, least, radius)
    return found


class _Hulls:
    """Differences of rows in question to all others, and what they lead by."""

    def __init__(
        self,
        numbers: torch.Tensor,
        vectors: torch.Tensor,
        bias: torch.Tensor | None,
        extra: torch.Tensor | None,
    ) -> None:
        self._numbers = numbers
        self._vectors = vectors
        self._bias = vectors.new_zeros(len(vectors)) if bias is None else bias
        self._extra = extra

    def leads(self, at: torch.Tensor, points: torch.Tensor, radius: float) -> torch.Tensor:
        """Return the leads over each row at ``radius * X / |X|``, [n, U or U + 1]; inf over the row
        itself."""
        lengths = torch.linalg.vector_norm(points, dim=1, keepdim=True).clamp(min=_TINY)
        ways = radius * points / lengths
        numbers = self._numbers[at]
        own = (ways * self._vectors[numbers]).sum(dim=1) + self._bias[numbers]
        leads: torch.Tensor = own[:, None] - ways @ self._vectors.T - self._bias
        leads.scatter_(1, numbers[:, None], torch.inf)
        if self._extra is not None:
            leads = torch.cat([leads, (ways @ self._extra)[:, None]], dim=1)
        return leads

    def differences(
        self, at: torch.Tensor, others: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return differences [n, c] of the rows `at` to one other row each, and of the biases."""
        rows = others.clamp(max=len(self._vectors) - 1)
        numbers = self._numbers[at]
        differences = self._vectors[numbers] - self._vectors[rows]
        rises = self._bias[numbers] - self._bias[rows]
        if self._extra is not None:
            outside = others == len(self._vectors)
            differences[outside], rises[outside] = self._extra, 0.0
        return differences, rises


def _pairwise_step(
    found: HullPoints,
    hull: _Hulls,
    running: torch.Tensor,
    leads: torch.Tensor,
    least: torch.Tensor,
    radius: float,
) -> torch.Tensor:
    """Move weight to the rows `least`; return how the heights change."""
    unused = found.weights[running] <= 0
    most = leads.masked_fill(unused, -torch.inf).argmax(dim=1)
    towards, height = hull.differences(running, least)
    away, lost = hull.differences(running, most)
    across, rise = towards - away, height - lost
    size = _line_search(found.points[running], across, rise, radius)
    size = torch.minimum(size, found.weights[running, most])
    found.weights[running, most] -= size
    found.weights[running, least] += size
    found.points[running] += size[:, None] * across
    change: torch.Tensor = size * rise
    return change


def _line_search(
    points: torch.Tensor, across: torch.Tensor, rise: torch.Tensor, radius: float
) -> torch.Tensor:
    """Return the s >= 0 that minimises ``radius * |X + s d| + s g``; inf if it falls for ever.

    With a = d d, b = X d, c = X X and q = a s + b the derivative is 0 where
    ``radius * q = -g * sqrt(q^2 / a + c - b^2 / a)``.
    """
    squares = (across * across).sum(dim=1).clamp(min=_TINY)
    slope = (points * across).sum(dim=1)
    rest = ((points * points).sum(dim=1) - slope**2 / squares).clamp(min=0)
    room = radius**2 - rise**2 / squares
    moved = -rise * (rest / room.clamp(min=_TINY)).sqrt()
    size = ((moved - slope) / squares).clamp(min=0)
    falling = torch.where(rise < 0, torch.inf, 0.0).to(size.dtype)
    return torch.where(room > 0, size, falling)
