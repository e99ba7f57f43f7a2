"""Proofs that a token can never have the largest logit.

Weights a >= 0 with ``sum a_i (w_i - w_k) = 0``, ``sum a_i > 0`` and ``sum a_i (b_i - b_k) >= 0``
exclude a witness z: the weighted mean of the other logits is never below that of token k. Numbers
found in floating point miss that by a residual. They are a proof all the same where exact weights
must exist beside them: with ``A = [w_i - w_k; 1]`` (a column per token) and ``e = A a - (0, 1)``
the smallest correction ``-A^+ e`` has a norm of at most ``|e| / sigma_min(A)``, which keeps all
weights positive if it is below the least of them. For few tokens exact weights are found in
fractions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import torch
from numpy.typing import NDArray

from fastmrc.audit.rows import UNIT64, Rows

__all__ = ["Weights", "best_proof", "bounded_proof"]

# Weights below these shares of the largest are left out, one after the other.
_CUTS = (1e-2, 1e-3, 1e-5, 1e-7, 1e-9, 1e-11)
_DROPS = 8
# And such a share is no weight at all.
_NOTHING = 1e-30
# A residual must be so many times smaller than what is safe.
_SAFETY = 16.0
# Tokens at most of which weights are looked for in fractions, and the ratio of two weights in turn
# behind which the others are taken for 0.
_FEW, _CLIFF = 12, 1e3


@dataclass(frozen=True, slots=True)
class Weights:
    """Weights of other rows.

    Attributes
    ----------
    numbers
        int64, of the rows.
    values
        float64, positive; they add up to 1 unless `proven` by fractions.
    residual
        Bound of the norm of ``sum a_i (w_i - w_k)``; 0 for exact ones.
    bias_gap
        By how much the mean of the biases is below the row's own; 0 without.
    bias_size
        Mean size of the biases in question.
    proven
        Whether no witness can exist.
    """

    numbers: NDArray[np.int64]
    values: NDArray[np.float64]
    residual: float
    bias_gap: float
    bias_size: float
    proven: bool


def best_proof(
    rows: Rows, number: int, others: torch.Tensor, weights: torch.Tensor
) -> Weights | None:
    """Make weights that were found in floating point into a proof, or into what comes nearest.

    Parameters
    ----------
    rows
        The rows.
    number
        The row in question.
    others
        int64 [n], rows with weights, this one not among them.
    weights
        float64 [n], not negative.

    Returns
    -------
    Weights or None
        None if no weight is positive.
    """
    order = torch.argsort(weights, descending=True, stable=True)
    order = order[weights[order] > _NOTHING * weights.max()]
    if not len(order):
        return None
    others, weights = others[order], weights[order]
    if rows.row_rounding == 0 and rows.bias_rounding == 0:
        few = _few_tokens(rows, number, others, weights)
        if few is not None:
            return few
    best: Weights | None = None
    for cut in _CUTS:
        count = int((weights >= cut * weights[0]).sum())
        if count <= len(rows.moving) and count < len(weights):
            continue
        # The bias is an equation more for weights whose mean bias is just that of the row.
        for lifted in (False, True)[: 1 if rows.bias is None else 2]:
            found = _refined(rows, number, others[:count], weights[:count], lifted)
            if found is None:
                continue
            if found.proven:
                return found
            if best is None or found.residual + found.bias_gap < best.residual + best.bias_gap:
                best = found
        if count == len(weights):
            break
    return best


def bounded_proof(
    rows: Rows, number: int, others: torch.Tensor, weights: torch.Tensor, radius: float
) -> Weights | None:
    """Return weights that prove that no input of at most a norm is a witness; None if they do not.

    The lead there is at most ``radius * |sum a_i (w_k - w_i)| + sum a_i (b_k - b_i)``.
    """
    assert rows.bias is not None
    kept = weights > _CUTS[-1] * weights.max()
    others, weights = others[kept], weights[kept] / weights[kept].sum()
    residual = _residual(rows, number, others, weights)
    rises = rows.bias[others] - rows.bias[number]
    rounding = (len(weights) + 16) * UNIT64 * float(weights @ rises.abs())
    slack = float(weights @ rises) - rounding - 2 * rows.bias_rounding
    if radius * residual > slack:
        return None
    return Weights(others.numpy().copy(), weights.numpy().copy(), residual, 0.0, 0.0, True)


def _refined(
    rows: Rows, number: int, others: torch.Tensor, weights: torch.Tensor, lifted: bool
) -> Weights | None:
    """Move weights to the nearest ones whose residual is 0, as far as rounding lets them."""
    for _ in range(_DROPS):
        equations, factor = _equations(rows, number, others, lifted)
        squares = equations @ equations.T
        if not bool(torch.isfinite(squares).all()):
            return None
        moved = _corrected(equations, squares, weights / weights.sum())
        kept = moved > _NOTHING * moved.max()
        if kept.all():
            return _judged(rows, number, others, moved, equations, factor, squares, lifted)
        if not (moved > 0).any():
            return None
        others, weights = others[kept], moved[kept]
    return None


def _equations(
    rows: Rows, number: int, others: torch.Tensor, lifted: bool
) -> tuple[torch.Tensor, float]:
    """Return the matrix A, its rows divided by powers of two, which changes no solution, and by how
    much that makes the rounding of the layer larger at most."""
    own = rows.rows(torch.tensor([number]))[:, rows.moving]
    equations = (rows.rows(others)[:, rows.moving] - own).T
    if lifted and rows.bias is not None:
        equations = torch.cat([equations, (rows.bias[others] - rows.bias[number])[None]])
    _, exponents = torch.frexp(equations.abs().amax(dim=1, keepdim=True))
    factors = torch.exp2(-exponents.double())
    ones = torch.ones(1, len(others), dtype=torch.float64)
    return torch.cat([equations * factors, ones]), float(factors.amax()) if len(factors) else 1.0


def _corrected(
    equations: torch.Tensor, squares: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    ridge = torch.eye(len(squares)).double() * (UNIT64 * squares.diagonal().max())
    factor, failed = torch.linalg.cholesky_ex(squares + ridge)
    if failed:
        return weights
    for _ in range(3):
        residual = equations @ weights
        residual[-1] -= 1.0
        step = torch.cholesky_solve(residual[:, None], factor)[:, 0]
        weights = weights - equations.T @ step
    return weights


def _judged(
    rows: Rows,
    number: int,
    others: torch.Tensor,
    weights: torch.Tensor,
    equations: torch.Tensor,
    factor: float,
    squares: torch.Tensor,
    lifted: bool,
) -> Weights:
    units = (len(weights) + 8) * UNIT64
    residual = equations @ weights
    residual[-1] -= 1.0
    rounding = units * (equations.abs() @ weights)
    error = float(torch.linalg.vector_norm(residual) + torch.linalg.vector_norm(rounding))
    given = 2 * factor * (rows.row_rounding + (rows.bias_rounding if lifted else 0.0))
    error += given
    least = float(torch.linalg.eigvalsh(squares)[0])
    sound = least > 64 * len(squares) * UNIT64 * float(squares.diagonal().sum())
    sound &= least > 16 * len(weights) * given**2
    move = _SAFETY * error / least**0.5 if sound else math.inf
    proven = move < float(weights.min())
    gap = size = 0.0
    if rows.bias is not None:
        rises = rows.bias[others] - rows.bias[number]
        slack = float(weights @ rises)
        gap = max(0.0, -slack) / float(weights.sum())
        size = float(weights / weights.sum() @ rows.bias[others].abs() + rows.bias[number].abs())
        rounded = units * float(weights @ rises.abs()) + 2 * rows.bias_rounding
        proven &= lifted or slack >= move * float(torch.linalg.vector_norm(rises)) + rounded
    away = _residual(rows, number, others, weights)
    return Weights(others.numpy().copy(), weights.numpy().copy(), away, gap, size, bool(proven))


def _residual(rows: Rows, number: int, others: torch.Tensor, weights: torch.Tensor) -> float:
    """Bound the norm of ``sum a_i (w_i - w_k)``, the weights brought to a sum of 1."""
    weights = weights / weights.sum()
    differences = rows.rows(others) - rows.rows(torch.tensor([number]))
    rounding = (len(weights) + 16) * UNIT64 * (differences.abs().T @ weights)
    mean = differences.T @ weights
    length = float(torch.linalg.vector_norm(mean) + torch.linalg.vector_norm(rounding))
    return length + 2 * rows.row_rounding


def _few_tokens(
    rows: Rows, number: int, others: torch.Tensor, weights: torch.Tensor
) -> Weights | None:
    """Look for exact weights of the few tokens whose weights stand out."""
    for count in range(1, min(_FEW, len(weights)) + 1):
        if count < len(weights) and weights[count] * _CLIFF > weights[count - 1]:
            continue
        found = _in_fractions(rows, number, others[:count])
        if found is not None:
            return found
    return None


def _in_fractions(rows: Rows, number: int, others: torch.Tensor) -> Weights | None:
    own = rows.rows(torch.tensor([number]))[0].tolist()
    given = rows.rows(others).tolist()
    exact = [[Fraction(x) - Fraction(y) for x, y in zip(row, own, strict=True)] for row in given]
    solved = _null_vector(exact)
    if solved is None or min(solved) <= 0:
        return None
    if rows.bias is not None:
        biases = [Fraction(b) for b in rows.bias[others].tolist()]
        base = Fraction(float(rows.bias[number]))
        if sum(a * (b - base) for a, b in zip(solved, biases, strict=True)) < 0:
            return None
    shared = math.lcm(*(a.denominator for a in solved))
    whole = [int(a * shared) for a in solved]
    common = math.gcd(*whole)
    whole = [a // common for a in whole]
    if any(a > 2**1000 or int(float(a)) != a for a in whole):
        return None  # no numbers that a file could hold
    return Weights(others.numpy().copy(), np.array(whole, np.float64), 0.0, 0.0, 0.0, True)


def _null_vector(vectors: list[list[Fraction]]) -> list[Fraction] | None:
    """Return the coefficients, the last 1, by which vectors add up to 0; None if there are none or
    several."""
    count = len(vectors)
    equations = zip(*vectors, strict=True)
    pivots: list[tuple[int, list[Fraction]]] = []
    for equation in equations:
        row = list(equation)
        for column, pivot in pivots:
            if row[column]:
                factor = row[column]
                row = [a - factor * b for a, b in zip(row, pivot, strict=True)]
        column = next((c for c in range(count) if row[c]), count)
        if column == count:
            continue
        row = [a / row[column] for a in row]
        pivots = [(c, [a - p[column] * b for a, b in zip(p, row, strict=True)]) for c, p in pivots]
        pivots.append((column, row))
        if len(pivots) == count:
            return None  # independent
    if len(pivots) != count - 1:
        return None
    free = next(c for c in range(count) if all(c != column for column, _ in pivots))
    solution = [Fraction(0)] * count
    solution[free] = Fraction(1)
    for column, row in pivots:
        solution[column] = -row[free]
    return solution
