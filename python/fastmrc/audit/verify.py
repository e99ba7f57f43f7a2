"""Check certificates of an audit against a layer, in NumPy and exact fractions only.

This shares no code with the search: it reads the file and the layer and does the sums again, in
float64, with bounds of their rounding.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastmrc.data import StrPath
from fastmrc.errors import InputError

__all__ = ["Verification", "read_settings", "verify_certificates"]

_U = 2.0**-53
_BLOCK = 2048
_NEAR = 1e-6
# Weights of so many tokens are also checked in fractions.
_FRACTIONS = 32
_UNDECIDED, _ARGMAXABLE, _UNARGMAXABLE, _NEARLY, _TIE = range(5)
_NAMES = (
    "settings",
    "ids",
    "status",
    "judge",
    "weight_tokens",
    "weight_begin",
    "weight_others",
    "weight_values",
    "witness_tokens",
    "witnesses",
    "wide_tokens",
    "wide_witnesses",
)

Matrix = NDArray[np.floating[Any]]
Vector = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Verification:
    """What the check found.

    Attributes
    ----------
    accepted
        Number of verdicts that their certificates prove.
    undecided
        Number of tokens without a verdict, which need none.
    rejected
        Reasons by token.
    """

    accepted: int
    undecided: int
    rejected: dict[int, str]


def read_settings(path: StrPath) -> dict[str, Any]:
    """Return the settings in a file of certificates: names of ``weight``, ``bias`` and ``norm``,
    ``radius``, ``sha256`` of the layer.

    Raises
    ------
    InputError
        If the file is none of certificates.
    """
    return _read(path, ("settings",))[0]


def verify_certificates(
    path: StrPath,
    weight: Matrix,
    bias: Vector | None = None,
    *,
    report: Callable[[int, int], None] | None = None,
) -> Verification:
    """Check every verdict in a file of certificates.

    Parameters
    ----------
    path
        What `AuditReport.save_certificates` wrote.
    weight
        float32 or float64 [V, d].
    bias
        float64 [V], or None.
    report
        Told how many of how many checks are done.

    Returns
    -------
    Verification

    Raises
    ------
    InputError
        If the file cannot be read or is of a layer of another shape.
    """
    settings, arrays = _read(path, _NAMES)
    _check_shapes(path, arrays, weight)
    checker = _Checker(weight, bias, settings.get("radius"))
    return checker.run(arrays, report or (lambda done, total: None))


def _read(path: StrPath, names: Sequence[str]) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    """Return the settings and arrays of a file of certificates."""
    # Opened here: NumPy leaves a file open that turns out to be broken.
    with open(path, "rb") as raw:
        try:
            file = np.load(raw, allow_pickle=False)
            if isinstance(file, np.ndarray) or any(name not in file.files for name in _NAMES):
                raise InputError(f"{path}: expected certificates of an audit, got other arrays")
            arrays = {name: file[name] for name in names}
            settings: dict[str, Any] = json.loads(str(arrays.pop("settings")))
        except (EOFError, KeyError, OSError, ValueError, zipfile.BadZipFile) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"{path}: no certificates of an audit ({error})") from error
    return settings, arrays


def _check_shapes(path: StrPath, arrays: dict[str, NDArray[Any]], weight: Matrix) -> None:
    size, width = weight.shape
    tokens = ("ids", "judge", "weight_tokens", "weight_others", "witness_tokens", "wide_tokens")
    fits = all(arrays[name].ndim == 1 and arrays[name].dtype.kind in "iu" for name in tokens)
    fits = fits and all(((arrays[n] >= 0) & (arrays[n] < size)).all() for n in tokens)
    begins = arrays["weight_begin"]
    fits = fits and begins.shape == (len(arrays["weight_tokens"]) + 1,) and begins[0] == 0
    fits = fits and begins[-1] == len(arrays["weight_others"]) == len(arrays["weight_values"])
    fits = fits and bool((np.diff(begins) >= 0).all())
    fits = fits and len(arrays["ids"]) == len(arrays["status"]) == len(arrays["judge"])
    for names, points in (("witness_tokens", "witnesses"), ("wide_tokens", "wide_witnesses")):
        fits = fits and arrays[points].shape == (len(arrays[names]), width)
    if not fits:
        raise InputError(f"{path}: certificates do not fit a layer of shape [{size}, {width}]")


class _Checker:
    def __init__(self, weight: Matrix, bias: Vector | None, radius: float | None) -> None:
        self.weight = weight
        self.bias = bias
        self.radius = radius
        blocks = range(0, len(weight), _BLOCK)
        self.largest = max(
            float(np.linalg.norm(weight[b : b + _BLOCK].astype(np.float64), axis=1).max())
            for b in blocks
        )
        self.largest_bias = 0.0 if bias is None else float(np.abs(bias).max())
        # Columns in which rows differ.
        self.moving = np.zeros(weight.shape[1], bool)
        for b in blocks:
            self.moving |= (weight[b : b + _BLOCK] != weight[0]).any(axis=0)

    def run(
        self, arrays: dict[str, NDArray[Any]], report: Callable[[int, int], None]
    ) -> Verification:
        begins = arrays["weight_begin"].tolist()
        parts = {
            token: slice(begins[i], begins[i + 1])
            for i, token in enumerate(arrays["weight_tokens"].tolist())
        }
        ids, status = arrays["ids"].tolist(), arrays["status"].tolist()
        tied = {j for j, s in zip(arrays["judge"].tolist(), status, strict=True) if s == _TIE}
        leads = self._leads(arrays, tied, report, len(ids))
        rejected: dict[int, str] = {}
        accepted = undecided = 0
        total = len(ids)
        for done, (token, verdict, judge) in enumerate(
            zip(ids, status, arrays["judge"].tolist(), strict=True)
        ):
            reason = None
            if verdict == _UNDECIDED:
                undecided += 1
                continue
            if verdict in (_ARGMAXABLE, _TIE):
                reason = leads.get(judge, "there is no witness")
                if not reason and verdict == _ARGMAXABLE and token != judge:
                    reason = "the witness is of another token"
                if not reason and verdict == _TIE and not self._equal(token, judge):
                    reason = "the rows of the tie differ"
            elif verdict in (_UNARGMAXABLE, _NEARLY):
                part = parts.get(token)
                if part is None and self._equal(token, judge):
                    part = parts.get(judge)
                if part is None:
                    reason = "there are no weights"
                else:
                    others, values = arrays["weight_others"][part], arrays["weight_values"][part]
                    reason = self._weights(token, others, values, verdict == _NEARLY)
            else:
                reason = f"unknown verdict {verdict}"
            if reason:
                rejected[token] = reason
            else:
                accepted += 1
            report(done + 1, total)
        return Verification(accepted, undecided, rejected)

    # --- witnesses -----------------------------------------------------------------------------

    def _leads(
        self,
        arrays: dict[str, NDArray[Any]],
        tied: set[int],
        report: Callable[[int, int], None],
        total: int,
    ) -> dict[int, str]:
        """Return, by token with a witness, why it proves nothing, or an empty text."""
        reasons: dict[int, str] = {}
        for names, points in (("witness_tokens", "witnesses"), ("wide_tokens", "wide_witnesses")):
            for start in range(0, len(arrays[names]), _BLOCK):
                tokens = arrays[names][start : start + _BLOCK]
                block = arrays[points][start : start + _BLOCK].astype(np.float64)
                for token, reason in zip(
                    tokens.tolist(), self._block_leads(tokens, block, tied), strict=True
                ):
                    reasons[token] = reason
                report(min(total, len(reasons)), total)
        return reasons

    def _block_leads(self, tokens: NDArray[Any], points: Vector, tied: set[int]) -> list[str]:
        own = np.einsum("nd,nd->n", self.weight[tokens].astype(np.float64), points)
        if self.bias is not None:
            own = own + self.bias[tokens]
        best = np.full(len(tokens), -np.inf)
        for start in range(0, len(self.weight), _BLOCK):
            part = self.weight[start : start + _BLOCK].astype(np.float64)
            scores = points @ part.T
            if self.bias is not None:
                scores += self.bias[start : start + _BLOCK]
            for i, token in enumerate(tokens.tolist()):
                if token in tied:
                    same = (self.weight[start : start + _BLOCK] == self.weight[token]).all(axis=1)
                    if self.bias is not None:
                        same &= self.bias[start : start + _BLOCK] == self.bias[token]
                    scores[i, same] = -np.inf
                elif start <= token < start + len(part):
                    scores[i, token - start] = -np.inf
            best = np.maximum(best, scores.max(axis=1))
        lengths = np.linalg.norm(points, axis=1)
        rounding = 2 * (points.shape[1] + 2) * _U * lengths * self.largest
        rounding += 8 * _U * self.largest_bias
        reasons = []
        for lead, error, length in zip(own - best, rounding, lengths, strict=True):
            if not np.isfinite(length):
                reasons.append("the witness is not finite")
            elif self.radius is not None and length > self.radius:
                reasons.append(f"the norm of the witness, {length:.6g}, is above the radius")
            elif not lead > error:
                reasons.append(f"another token leads at the witness by {-lead:.3g}")
            else:
                reasons.append("")
        return reasons

    def _equal(self, token: int, other: int) -> bool:
        same = bool((self.weight[token] == self.weight[other]).all())
        return same and (self.bias is None or bool(self.bias[token] == self.bias[other]))

    # --- weights -------------------------------------------------------------------------------

    def _weights(self, token: int, others: NDArray[Any], values: Vector, near: bool) -> str:
        """Return why weights do not prove a verdict, or an empty text."""
        if not len(others) or not np.isfinite(values).all() or not (values > 0).all():
            return "weights are missing, not finite or not positive"
        if (others == token).any():
            return "the token has a weight itself"
        if not near and len(others) <= _FRACTIONS and self._exactly(token, others, values):
            return ""
        values = values / values.sum()
        own = self.weight[token].astype(np.float64)
        differences = self.weight[others].astype(np.float64) - own
        units = (len(others) + 10) * _U
        mean = values @ differences
        rounding = units * (values @ np.abs(differences))
        residual = float(np.linalg.norm(mean) + np.linalg.norm(rounding))
        rise = rise_error = 0.0
        rises = np.zeros(len(others))
        if self.bias is not None:
            rises = self.bias[others] - self.bias[token]
            rise = float(values @ rises)
            rise_error = units * float(values @ np.abs(rises))
        if near:
            close = residual <= _NEAR * self.largest * (1 + 1e-6)
            close = close and -rise <= _NEAR * self.largest_bias + rise_error
            return "" if close else f"the mean row is {residual:.3g} away, too far for NEAR"
        if self.radius is not None and self.radius * residual <= rise - rise_error:
            return ""
        reason = self._exist_near(differences, values, residual, rises, rise - rise_error)
        if reason and self.bias is not None:
            # Exact weights may keep the mean bias just as it is: one equation more.
            scale = float(np.linalg.norm(differences, axis=1).max()) / (np.abs(rises).max() or 1.0)
            lifted = np.column_stack([differences, rises * scale])
            residual += scale * (abs(rise) + rise_error)
            reason = self._exist_near(lifted, values, residual, rises * 0, 0.0)
        return reason

    def _exist_near(
        self, differences: Vector, values: Vector, residual: float, rises: Vector, rise: float
    ) -> str:
        """Check that exact weights exist beside `values`, which add up to 1 but for rounding."""
        moving = np.ones(differences.shape[1], bool)
        moving[: len(self.moving)] = self.moving
        scale = max(float(np.linalg.norm(differences, axis=1).max()), 1e-300)
        system = np.vstack([differences[:, moving].T / scale, np.ones(len(values))])
        if system.shape[1] < system.shape[0]:
            return "too few tokens for a proof that exact weights exist"
        least = float(np.linalg.svd(system, compute_uv=False)[-1])
        if least < 1e-10 * len(values):
            return "the rows with weights are too near a plane for a proof"
        error = residual / scale + abs(float(values.sum()) - 1) + 4 * len(values) * _U
        move = 2 * error / least
        if not move < values.min():
            return f"exact weights may be {move:.3g} away, the least weight is {values.min():.3g}"
        if rise < move * float(np.linalg.norm(rises)):
            return "the mean bias may be lower than the token's"
        return ""

    def _exactly(self, token: int, others: NDArray[Any], values: Vector) -> bool:
        weights = [Fraction(float(v)) for v in values]
        own = self.weight[token]
        rows = self.weight[others]
        # A first look in floating point keeps fractions for what may be exact.
        mean = values @ (rows.astype(np.float64) - own) / values.sum()
        if np.abs(mean).max(initial=0.0) > 1e-12 * self.largest:
            return False
        for column in range(self.weight.shape[1]):
            base = Fraction(float(own[column]))
            terms = (
                a * (Fraction(float(x)) - base)
                for a, x in zip(weights, rows[:, column], strict=True)
            )
            if sum(terms) != 0:
                return False
        if self.bias is None:
            return True
        base = Fraction(float(self.bias[token]))
        rises = zip(weights, self.bias[others], strict=True)
        return sum(a * (Fraction(float(b)) - base) for a, b in rises) >= 0
