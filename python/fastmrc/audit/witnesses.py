"""Witnesses found for many tokens at once: the product of all whitened rows, and reflections.

About any centre c, for any positive definite A, ``z_k = A (w_k - c)`` is a witness of token k if
its own logit there is the largest. With A the inverse square root of the covariance (which
certifies more tokens of a real layer than the inverse or none) the logits of all are one symmetric
matrix ``Y Y^T`` of whitened rows, of which one triangle is computed.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from fastmrc import ops
from fastmrc.audit.rows import UNIT32, UNIT64, Rows

__all__ = ["TILE_ROWS", "BestOthers", "lead_errors", "reflect"]

# Tiles of the matrix of scores: 1,024 rows at a time, 16 MB.
TILE_ROWS, _TILE_COLUMNS = 1024, 4096
# Coordinates of a point that has lost its way.
_FAR = 1e25


class BestOthers:
    """The largest logit of another row at each whitened row, row block by row block.

    Parameters
    ----------
    rows
        The rows.
    asked
        Numbers of the rows at which logits are wanted; None for all, which takes half the work.

    Attributes
    ----------
    best
        float32 [asked], complete when `done` is `total`.
    done, total
        Blocks of rows.
    """

    def __init__(self, rows: Rows, asked: torch.Tensor | None) -> None:
        self.rows = rows
        self.asked = asked
        count = len(rows) if asked is None else len(asked)
        self.best = torch.full((count,), -torch.inf, dtype=torch.float32)
        self.done = 0
        self.total = -(-count // TILE_ROWS)

    def step(self) -> None:
        """Do one block of rows."""
        white = self.rows.white
        start = self.done * TILE_ROWS
        if self.asked is None:
            numbers = torch.arange(start, min(start + TILE_ROWS, len(white)))
            first = start
        else:
            numbers = self.asked[start : start + TILE_ROWS]
            first = 0
        points = white[numbers.to(white.device)]
        own = slice(start, start + len(numbers))
        for column in range(first, len(white), _TILE_COLUMNS):
            scores = points @ white[column : column + _TILE_COLUMNS].T
            inside = (numbers >= column) & (numbers < column + scores.shape[1])
            place = inside.nonzero()[:, 0].to(scores.device)
            scores[place, (numbers[inside] - column).to(scores.device)] = -torch.inf
            self.best[own] = torch.maximum(self.best[own], _row_max(scores))
            if self.asked is None:
                # The other triangle: what these rows are to those of the columns.
                part = self.best[column : column + scores.shape[1]]
                torch.maximum(part, scores.amax(dim=0).cpu(), out=part)
        self.done += 1


def _row_max(scores: torch.Tensor) -> torch.Tensor:
    if scores.device.type != "cpu":
        largest: torch.Tensor = scores.amax(dim=1).cpu()
        return largest
    values: torch.Tensor = ops.topk(scores, 1)[0]
    return values[:, 0]


def lead_errors(rows: Rows, white: torch.Tensor, point_norms: torch.Tensor) -> torch.Tensor:
    """Bound the error of leads that are computed of whitened rows in float32.

    Counted are the rounding of whitened rows and of their products, that of the witness to float32,
    that of the whitening, which is done in float64, and that of a lead in float64.

    Parameters
    ----------
    rows
        The rows.
    white
        [n, r], the whitened rows.
    point_norms
        float64 [n], norms of the witnesses ``basis @ white``.
    """
    norms = torch.linalg.vector_norm(white.double(), dim=1).cpu()
    largest = rows.white_norm
    products = 2 * (rows.rank + 8) * UNIT32 * norms * largest
    rounded = 2 * UNIT32 * point_norms * rows.reach
    whitening = 8 * rows.width * UNIT64 * rows.spread * norms * rows.reach
    vanished = rows.rank * 2.0**-120  # of products below the normal numbers of float32
    total: torch.Tensor = products + rounded + whitening + vanished + rows.lead_error(point_norms)
    return total


def reflect(
    rows: Rows,
    numbers: torch.Tensor,
    starts: torch.Tensor,
    steps: int,
    vectors: torch.Tensor,
    go_on: Callable[[], bool],
) -> torch.Tensor:
    """Search for points at which rows lead, by reflections; published as "braid swap".

    The point is reflected through the hyperplane on which the row and the one that leads score the
    same, until the row leads. Grivas, Bogoychev and Lopez, "Low-Rank Softmax Can Have Unargmaxable
    Classes in Theory but Rarely in Practice", 2022.

    Parameters
    ----------
    rows
        The rows, for their bias.
    numbers
        int64 [n].
    starts
        [n, r], first points.
    steps
        Reflections at most.
    vectors
        [U, r], what points are multiplied with.
    go_on
        Asked before each step.

    Returns
    -------
    torch.Tensor
        [n, r], points, of which those of rows that lead, as far as float32 tells, do not move.
    """
    points = starts.clone()
    index = torch.arange(len(numbers))
    own_rows = vectors[numbers.to(vectors.device)]
    bias = None if rows.bias is None else rows.bias.to(vectors.device, vectors.dtype)
    for _ in range(steps):
        if not len(index) or not go_on():
            break
        at = index.to(vectors.device)
        scores = points[at] @ vectors.T
        if bias is not None:
            scores += bias
        leader = _leaders(scores)
        moving = leader != numbers[index]
        index, leader = index[moving], leader[moving].to(vectors.device)
        at = index.to(vectors.device)
        across = own_rows[at] - vectors[leader]
        gap = (across * points[at]).sum(dim=1)
        if bias is not None:
            gap += bias[numbers[index].to(bias.device)] - bias[leader]
        squares = (across * across).sum(dim=1)
        moved = points[at] - (2 * gap / squares)[:, None] * across
        # Rows that are equal in this precision have no hyperplane between them.
        sound = (moved.abs() < _FAR).all(dim=1)
        points[at[sound]] = moved[sound]
        index = index[sound.cpu()]
    return points


def _leaders(scores: torch.Tensor) -> torch.Tensor:
    if scores.device.type != "cpu" or scores.dtype != torch.float32:
        return scores.argmax(dim=1).cpu()
    ids: torch.Tensor = ops.topk(scores, 1)[1]
    return ids[:, 0].long()
