"""The different rows of an output layer, whitened, and exact leads of points.

Token k can have the largest logit iff some z gives (w_k - w_i) z + b_k - b_i > 0 for all others i.
Differences do not change when a centre is taken off all rows, and a change of basis of z changes
nothing, so the search for z works with ``y = (w - centre) @ basis``, half whitened: with the axes
of the covariance C and its eigenvalues to the power -1/4, so that ``z = basis @ y`` is
``C^-1/2 (w - centre)``. What it finds is checked in the rows as given.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray

from fastmrc.audit.layer import OutputLayer

__all__ = ["UNIT32", "UNIT64", "Rows", "group_tokens"]

UNIT32, UNIT64 = 2.0**-24, 2.0**-53
_BLOCK = 8192
# Covariances that whiten one after the other, and the least eigenvalue that one may divide by.
_PASSES, _FLOOR = 3, 1e-12
# Of a sum of products that are too small for normal numbers.
_LEAST = 1e-300


def group_tokens(layer: OutputLayer) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the tokens that stand for the different rows, and whom each token is judged by.

    Of tokens with the same row the first of those with the largest bias stands for all.

    Returns
    -------
    distinct, judge
        int64 [U], rising, and int64 [V]: ``judge[k]`` is the token that stands for row k.
    """
    first: dict[bytes, int] = {}
    judge = np.arange(len(layer.weight))
    if layer.rounding != (0.0, 0.0):
        return judge, judge  # equal ones need not have been equal
    for start, block in _blocks(layer.weight):
        for i, row in enumerate(block + 0.0, start):  # minus zero is zero
            judge[i] = first.setdefault(hashlib.blake2b(row.tobytes(), digest_size=16).digest(), i)
    if layer.bias is not None:
        order = np.lexsort((np.arange(len(judge)), -layer.bias, judge))
        heads = np.flatnonzero(np.diff(judge[order], prepend=-1))
        best = dict(zip(judge[order[heads]].tolist(), order[heads].tolist(), strict=True))
        judge = np.array([best[j] for j in judge.tolist()])
    return np.unique(judge), judge


def _blocks(weight: NDArray[np.floating]) -> Iterator[tuple[int, NDArray[np.floating]]]:
    for start in range(0, len(weight), _BLOCK):
        yield start, weight[start : start + _BLOCK]


class Rows:
    """Different rows of a layer. Rows are numbered in here, as the entries of `distinct`.

    Weights and biases are multiplied with powers of two, which is exact, so that the largest are
    about 1 and nothing overflows or vanishes: a point z in here is the input ``unit * z``.

    Parameters
    ----------
    layer
        The layer.
    distinct
        Tokens whose rows these are.
    device
        Of the whitened rows.

    Attributes
    ----------
    weight_scale, bias_scale, unit
        Powers of two: of weights, of biases, and the first by the second; `unit` is 1 without bias.
    bias
        float64 [U] on the CPU, or None if all are equal, exactly.
    white
        float32 [U, r], whitened rows, on the device.
    centre, basis
        float64 [d] and [d, r].
    moving
        int64, the columns in which rows differ.
    largest_norm, reach
        Of the rows, and of what is left of them without the centre.
    row_rounding, bias_rounding
        As those of the layer, scaled.
    spread, white_norm
        Norms of the basis and of the longest whitened row.
    """

    def __init__(
        self, layer: OutputLayer, distinct: NDArray[np.int64], device: torch.device
    ) -> None:
        self.layer = layer
        self.distinct = distinct
        self.device = device
        self._all = len(distinct) == len(layer.weight)
        self.weight_scale = 1.0
        self.weight_scale = _scale_to_one(max(float(p.abs().max()) for _, p in self.parts()))
        self.bias: torch.Tensor | None = None
        self.bias_scale, self.unit = self.weight_scale, 1.0
        if layer.bias is not None:
            bias = torch.from_numpy(layer.bias[distinct])
            if (bias != bias[0]).any() or layer.rounding[1]:
                self.bias_scale = _scale_to_one(float(bias.abs().max()))
                self.bias = bias * self.bias_scale
                self.unit = self.weight_scale / self.bias_scale
        first, total = self.rows(slice(0, 1)), torch.zeros(self.width, dtype=torch.float64)
        # Of a layer that is off by rounding every column may differ.
        moving = torch.full((self.width,), layer.rounding != (0.0, 0.0))
        self.largest_norm = 0.0
        for _, part in self.parts():
            total += part.sum(dim=0)
            moving |= (part != first).any(dim=0)
            self.largest_norm = max(self.largest_norm, _longest(part))
        self.centre = total / len(self)
        self.moving = moving.nonzero()[:, 0]
        self.basis = self._whitening()
        self.white = torch.empty(len(self), self.rank, device=device, dtype=torch.float32)
        self.white_norm = self.reach = 0.0
        for start, part in self.parts():
            centred = part - self.centre
            white = (centred @ self.basis).float()
            self.white[start : start + len(part)] = white
            self.white_norm = max(self.white_norm, _longest(white))
            self.reach = max(self.reach, _longest(centred))
        self.spread = float(torch.linalg.matrix_norm(self.basis, 2)) if self.rank else 0.0
        self.row_rounding = layer.rounding[0] * self.weight_scale
        self.bias_rounding = layer.rounding[1] * self.bias_scale if self.bias is not None else 0.0

    def __len__(self) -> int:
        return len(self.distinct)

    @property
    def width(self) -> int:
        """Return d."""
        return int(self.layer.weight.shape[1])

    @property
    def rank(self) -> int:
        """Return the dimension of the space of the differences."""
        return int(self.basis.shape[1])

    def rows(self, numbers: torch.Tensor | slice) -> torch.Tensor:
        """Return scaled rows in float64."""
        index = numbers if isinstance(numbers, slice) else numbers.numpy()
        if not self._all:
            index = self.distinct[index]
        return torch.from_numpy(self.layer.weight[index].astype(np.float64)) * self.weight_scale

    def whitened(self, numbers: torch.Tensor) -> torch.Tensor:
        """Return whitened rows in float64, more precise than those of `white`."""
        return (self.rows(numbers) - self.centre) @ self.basis

    def parts(self) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield the scaled rows, block by block in float64, with the number of the first."""
        for start in range(0, len(self), _BLOCK):
            yield start, self.rows(slice(start, min(start + _BLOCK, len(self))))

    def leads(
        self, points: torch.Tensor, numbers: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return by how much rows score more than all others at points, and the error of that.

        Parameters
        ----------
        points
            float32 or float64 [n, d].
        numbers
            int64 [n], the row that should lead at each point.

        Returns
        -------
        lead, error
            float64 [n]; the true lead is above 0 where ``lead > error``. inf if there are no
            others.
        """
        wide = points.double()
        own = (self.rows(numbers) * wide).sum(dim=1)
        best = torch.full_like(own, -torch.inf)
        for start, part in self.parts():
            scores = part @ wide.T
            if self.bias is not None:
                rises = self.bias[start : start + len(part), None] - self.bias[numbers]
                scores += rises + 16 * UNIT64 * rises.abs()  # and what rounding may have taken
            inside = (numbers >= start) & (numbers < start + len(part))
            scores[numbers[inside] - start, inside.nonzero()[:, 0]] = -torch.inf
            best = torch.maximum(best, scores.amax(dim=0))
        error = self.lead_error(torch.linalg.vector_norm(wide, dim=1))
        return own - best, error

    def lead_error(self, norms: torch.Tensor) -> torch.Tensor:
        """Bound the error of leads in float64 at points of norms [n]."""
        # Four times what it is, so that no other order of the same sums can say otherwise.
        products = 8 * (self.width + 2) * UNIT64 * norms * self.largest_norm
        given = 8 * (self.row_rounding * norms + self.bias_rounding)
        error: torch.Tensor = products + given + _LEAST
        return error

    def _whitening(self) -> torch.Tensor:
        """Return the axes of the covariance, to the power -1/4 of its eigenvalues.

        A covariance sees half the digits of the rows. That of rows which the one before has
        whitened shows what it had lost, so small directions are found step by step.
        """
        basis = torch.eye(self.width, dtype=torch.float64)
        inverse = basis.clone()
        for _ in range(_PASSES):
            products = torch.zeros_like(basis)
            for _, part in self.parts():
                along = (part - self.centre) @ basis
                products += along.T @ along
            squares, axes = torch.linalg.eigh(products / len(self))
            if not squares[-1] > 0:
                return basis[:, :0]
            sizes = squares.clamp(min=float(squares[-1]) * _FLOOR).sqrt()
            basis = basis @ (axes / sizes)
            inverse = (axes * sizes).T @ inverse
        # The covariance is inverse^T inverse.
        _, spreads, axes = torch.linalg.svd(inverse)
        largest = float(spreads[0])
        noise = self.width * UNIT64 * max(8 * largest, self.largest_norm)
        kept = spreads > noise
        whitening: torch.Tensor = axes[kept].T * (spreads[kept] / largest) ** -0.5
        return whitening


def _scale_to_one(largest: float) -> float:
    """Return the power of two that brings a number to 0.5 to 1; 1 for 0."""
    return math.ldexp(1.0, max(-1000, min(1000, -math.frexp(largest)[1]))) if largest else 1.0


def _longest(vectors: torch.Tensor) -> float:
    """Return the norm of the longest of vectors [n, c]."""
    return float(vectors.double().square().sum(dim=1).max().sqrt())
