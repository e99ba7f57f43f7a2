"""One token at a time: Newton steps on a working set of rows.

For the differences D_i of the row in question and the others, ``f(z) = log sum_i exp(-D_i z)``
falls without bound iff the row has a witness; at a minimum its gradient, ``-sum p_i D_i`` with the
softmax weights p, is 0, so that the weights prove that there is none. A proof on some of the rows
is one for all; a witness of some is tested on all, and those that score most there join.

With a bias the differences have the bias as one more coordinate, and one more difference, (0, 1),
asks that this coordinate of z be positive, by which the others are then divided.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from fastmrc import ops
from fastmrc.audit.rows import Rows
from fastmrc.audit.weights import Weights, best_proof

__all__ = ["Found", "Lifted", "equal_in_effect", "newton_search", "tested_witness"]

_ROUNDS, _STEPS = 40, 80
# Rows of the first working set and rows added to it, by dimension.
_FIRST, _MORE, _MORE_LEAST = 3, 2, 16


@dataclass(frozen=True, slots=True)
class Found:
    """A witness [d] with its lead, or weights, or neither."""

    witness: torch.Tensor | None = None
    lead: float = float("nan")
    weights: Weights | None = None


class Lifted:
    """Rows with the scaled bias as one more coordinate, if they have one.

    Parameters
    ----------
    rows
        The rows.
    """

    def __init__(self, rows: Rows) -> None:
        self.rows = rows
        self.width = rows.rank
        self.bias: torch.Tensor | None = None
        if rows.bias is not None:
            centred = rows.bias - rows.bias.mean()
            spread = float(rows.white_norm) or 1.0
            self.scale = spread / (float(centred.abs().max()) or 1.0)
            self.bias = centred * self.scale
            self.width += 1

    def vectors(self, numbers: torch.Tensor) -> torch.Tensor:
        """Return float64 [n, width]."""
        white = self.rows.whitened(numbers)
        if self.bias is None:
            return white
        return torch.cat([white, self.bias[numbers, None]], dim=1)

    def differences(self, number: int, others: torch.Tensor) -> torch.Tensor:
        """Return the differences to a row, float64 [n, width]."""
        return self.vectors(torch.tensor([number])) - self.vectors(others)

    def upwards(self) -> torch.Tensor:
        """Return the difference that stands for a positive coordinate of the bias, float64
        [0 or 1, width]."""
        upwards = torch.zeros(self.width - self.rows.rank, self.width).double()
        upwards[:, -1] = self.rows.white_norm or 1.0
        return upwards

    def first_rows(self, number: int, start: torch.Tensor) -> torch.Tensor:
        """Return the other rows that score most near a point [r] of the rows without bias."""
        up = torch.ones(self.width - self.rows.rank).double()
        scores = self.scores(torch.cat([start.cpu().double(), up]))
        return _largest_others(scores, number, _FIRST * self.width)

    def more_rows(self, number: int, working: torch.Tensor, point: torch.Tensor) -> torch.Tensor:
        """Return the rows beside those at work that score most at a point [width]."""
        scores = self.scores(point)
        scores[working] = -torch.inf
        return _largest_others(scores, number, max(_MORE_LEAST, _MORE * self.width))

    def scores(self, point: torch.Tensor) -> torch.Tensor:
        """Return the scores of all rows at a point [width], in float32 on the CPU."""
        white = self.rows.white
        scores = (white @ point[: self.rows.rank].to(white.device, torch.float32)).cpu()
        if self.bias is not None:
            scores += (self.bias * point[-1]).float()
        return scores

    def witness(self, point: torch.Tensor) -> torch.Tensor | None:
        """Return a point [width] as an input [d] of the layer; None if it stands for none."""
        if self.bias is None:
            found: torch.Tensor = self.rows.basis @ point
            found /= torch.linalg.vector_norm(found)
            return found
        if point[-1] <= 0:
            return None
        return torch.mv(self.rows.basis, point[:-1] / (self.scale * point[-1]))


def tested_witness(
    rows: Rows, number: int, point: torch.Tensor | None
) -> tuple[torch.Tensor, float] | None:
    """Return an input, rounded to float32 if that will do, at which the row leads, and its lead."""
    if point is None or not bool(torch.isfinite(point).all()):
        return None
    for rounded in (point.float(), point):
        lead, error = rows.leads(rounded[None], torch.tensor([number]))
        if lead[0] > error[0]:
            return rounded, float(lead[0])
    return None


def equal_in_effect(rows: Rows, number: int, twins: torch.Tensor) -> Found:
    """Return what is to be said of a row that others differ from by no more than rounding."""
    return Found(weights=best_proof(rows, number, twins[:1], torch.ones(1, dtype=torch.float64)))


def newton_search(
    lifted: Lifted, number: int, start: torch.Tensor, go_on: Callable[[], bool]
) -> Found:
    """Search for a witness of a row, or for the proof that there is none.

    Parameters
    ----------
    lifted
        The rows.
    number
        The row.
    start
        float [r], a point near which rows that matter lead.
    go_on
        Asked between steps; False ends the search.

    Returns
    -------
    Found
    """
    rows = lifted.rows
    point = torch.zeros(lifted.width).double()
    working = lifted.first_rows(number, start)
    weights = torch.empty(0)
    for _ in range(_ROUNDS):
        differences = lifted.differences(number, working)
        twins = working[(differences == 0).all(dim=1)]
        if len(twins):
            return equal_in_effect(rows, number, twins)
        differences = torch.cat([differences, lifted.upwards()])
        point, weights, leads = _descend(differences, point, go_on)
        if not leads:
            break
        found = tested_witness(rows, number, lifted.witness(point))
        if found is not None:
            return Found(*found)
        more = lifted.more_rows(number, working, point)
        if not len(more) or not go_on():
            return Found()
        working = torch.cat([working, more])
    return Found(weights=best_proof(rows, number, working, weights[: len(working)]))


def _largest_others(scores: torch.Tensor, number: int, count: int) -> torch.Tensor:
    """Return the other rows with the largest scores, those of -inf apart."""
    scores[number] = -torch.inf
    ids: torch.Tensor = ops.topk(scores, min(count, len(scores)))[1]
    return ids[ids >= 0].long()


def _descend(
    differences: torch.Tensor, point: torch.Tensor, go_on: Callable[[], bool]
) -> tuple[torch.Tensor, torch.Tensor, bool]:
    """Go down to a point where all differences are positive (True), or as far as it goes."""
    sizes = torch.linalg.vector_norm(differences, dim=1)
    small = 1e-14 * float(sizes.max())
    leads = differences @ point
    value = torch.logsumexp(-leads, 0)
    weights = torch.softmax(-leads, 0)
    for _ in range(_STEPS):
        length = float(torch.linalg.vector_norm(point))
        if length and bool((leads > 1e-12 * length * sizes).all()):
            return point, weights, True
        pull = differences.T @ weights
        if float(torch.linalg.vector_norm(pull)) <= small or not go_on():
            break
        step = _newton_step(differences, weights, pull)
        along = differences @ step
        most = float(along.abs().max())
        if not most < float("inf") or most == 0.0:
            break
        size = min(1.0, 4 * float(torch.log1p(torch.tensor(most))) / most)
        for _ in range(30):
            trial = torch.logsumexp(-(leads + size * along), 0)
            if trial < value:
                break
            size /= 2
        else:
            break  # as low as rounding lets it
        point = point + size * step
        leads = differences @ point
        value = torch.logsumexp(-leads, 0)
        weights = torch.softmax(-leads, 0)
    return point, weights, False


def _newton_step(
    differences: torch.Tensor, weights: torch.Tensor, pull: torch.Tensor
) -> torch.Tensor:
    curvature = differences.T @ (weights[:, None] * differences) - torch.outer(pull, pull)
    ridge = 1e-14 * float(curvature.diagonal().max()) + 1e-300
    eye = torch.eye(len(pull)).double()
    for _ in range(12):
        factor, failed = torch.linalg.cholesky_ex(curvature + ridge * eye)
        if not failed:
            return torch.cholesky_solve(pull[:, None], factor)[:, 0]
        ridge *= 100
    return pull
