"""Check certificates of an audit against a layer, in NumPy and exact fractions only.

This shares no code with the search: it reads the file and the layer and does the sums again, in
float64, with bounds of their rounding.
"""

from __future__ import annotations

import hashlib
import json
import math
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
_VERDICTS = ("UNDECIDED", "ARGMAXABLE", "UNARGMAXABLE", "NEAR", "TIE")
# Of products that are too small for normal numbers.
_LEAST = 1e-300
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
        Verdicts that their certificates prove, by name.
    undecided
        Number of tokens without a verdict, which need no certificate.
    rejected
        Reasons by token.
    """

    accepted: dict[str, int]
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
    weight: Any,
    bias: Any = None,
    *,
    sphere: float | None = None,
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
    sphere
        Norm that all inputs have, as in `OutputLayer`, or None.
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
    rows = np.asarray(weight)
    radius = settings.get("radius")
    if radius is not None and not (isinstance(radius, float | int) and 0 < radius < np.inf):
        raise InputError(f"{path}: expected a radius above 0 or none, got {radius!r}")
    if sphere is not None and radius != sphere:
        raise InputError(f"{path}: expected the radius {sphere} of the layer norm, got {radius}")
    _check_shapes(path, arrays, rows)
    checker = _Checker(rows, None if bias is None else np.asarray(bias, np.float64), radius)
    checker.on_sphere = sphere is not None
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
            settings = json.loads(str(arrays.pop("settings")))
            if not isinstance(settings, dict):
                raise ValueError("its settings are no object")
        except (EOFError, KeyError, OSError, ValueError, zipfile.BadZipFile) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"{path}: no certificates of an audit ({error})") from error
    return settings, arrays


def _check_shapes(path: StrPath, arrays: dict[str, NDArray[Any]], weight: Matrix) -> None:
    """Refuse arrays that no audit of a layer of this shape has written."""
    size, width = weight.shape
    kinds = {"weight_values": "f", "witnesses": "f", "wide_witnesses": "f"}
    fits = all(a.dtype.kind in kinds.get(name, "iu") for name, a in arrays.items())
    flat = [a for name, a in arrays.items() if not name.endswith("witnesses")]
    fits = fits and all(array.ndim == 1 for array in flat)
    tokens = ("ids", "judge", "weight_tokens", "weight_others", "witness_tokens", "wide_tokens")
    fits = fits and all(((arrays[n] >= 0) & (arrays[n] < size)).all() for n in tokens)
    fits = fits and bool((np.diff(arrays["ids"].astype(np.int64)) > 0).all())
    begins = arrays["weight_begin"].astype(np.int64)
    fits = fits and len(begins) == len(arrays["weight_tokens"]) + 1 and begins[0] == 0
    fits = fits and begins[-1] == len(arrays["weight_others"]) == len(arrays["weight_values"])
    fits = fits and bool((np.diff(begins) >= 0).all())
    fits = fits and len(arrays["ids"]) == len(arrays["status"]) == len(arrays["judge"])
    for names, points in (("witness_tokens", "witnesses"), ("wide_tokens", "wide_witnesses")):
        fits = fits and arrays[points].shape == (len(arrays[names]), width)
    if not fits:
        raise InputError(f"{path}: certificates do not fit a layer of shape [{size}, {width}]")


def _power(values: NDArray[Any]) -> float:
    """Return the power of two that brings the largest of numbers to 0.5 to 1; 1 if all are 0."""
    largest = float(np.abs(values).max(initial=0.0))
    return math.ldexp(1.0, max(-1000, min(1000, -math.frexp(largest)[1]))) if largest else 1.0


class _Checker:
    """Checks against rows and biases that are scaled by powers of two, against overflow."""

    def __init__(self, weight: Matrix, bias: Vector | None, radius: float | None) -> None:
        self.weight = weight
        self.scale = min(_power(weight[b : b + _BLOCK]) for b in range(0, len(weight), _BLOCK))
        self.bias: Vector | None = None
        self.bias_range = 0.0
        self.unit = 1.0  # inputs are divided by it
        if bias is not None:
            bias_scale = _power(bias)
            self.bias = bias * bias_scale
            self.bias_range = float(self.bias.max() - self.bias.min())
            self.unit = self.scale / bias_scale
        self.radius = radius
        self.on_sphere = False
        # Columns in which rows differ, the norm of the longest row, rows that are equal.
        self.moving = np.zeros(weight.shape[1], bool)
        self.largest = 0.0
        first: dict[bytes, int] = {}
        self.group = np.empty(len(weight), np.int64)
        for b in range(0, len(weight), _BLOCK):
            part = self._rows(slice(b, b + _BLOCK))
            self.moving |= (weight[b : b + _BLOCK] != weight[0]).any(axis=0)
            self.largest = max(self.largest, float(np.linalg.norm(part, axis=1).max()))
            for i, row in enumerate(part + 0.0, b):
                self.group[i] = first.setdefault(hashlib.sha256(row.tobytes()).digest(), i)
        self.sizes = np.bincount(self.group, minlength=len(weight))

    def _rows(self, index: Any) -> Vector:
        scaled: Vector = self.weight[index].astype(np.float64) * self.scale
        return scaled

    def run(
        self, arrays: dict[str, NDArray[Any]], report: Callable[[int, int], None]
    ) -> Verification:
        begins = arrays["weight_begin"].tolist()
        parts = {
            token: slice(begins[i], begins[i + 1])
            for i, token in enumerate(arrays["weight_tokens"].tolist())
        }
        points = len(arrays["witness_tokens"]) + len(arrays["wide_tokens"])
        total = points + len(arrays["ids"])
        leads = self._leads(arrays, lambda done: report(done, total))
        accepted: dict[str, int] = {}
        rejected: dict[int, str] = {}
        undecided = 0
        triples = zip(*(arrays[name].tolist() for name in ("ids", "status", "judge")), strict=True)
        for done, (token, verdict, judge) in enumerate(triples):
            if verdict == _UNDECIDED:
                undecided += 1
                continue
            reason = self._refuted(token, verdict, judge, arrays, parts, leads)
            if reason:
                rejected[token] = reason
            else:
                accepted[_VERDICTS[verdict]] = accepted.get(_VERDICTS[verdict], 0) + 1
            report(points + done + 1, total)
        return Verification(accepted, undecided, rejected)

    def _refuted(
        self,
        token: int,
        verdict: int,
        judge: int,
        arrays: dict[str, NDArray[Any]],
        parts: dict[int, slice],
        leads: dict[int, str],
    ) -> str:
        """Return why a verdict is not proven, or an empty text."""
        equal = self._equal(token)
        if verdict in (_ARGMAXABLE, _TIE):
            if verdict == _ARGMAXABLE and len(equal) > 1:
                return "another token has the same row and bias"
            if verdict == _TIE and len(equal) == 1:
                return "no other token has the same row and bias"
            if judge not in equal:
                return "the witness is of another row"
            return leads.get(judge, "there is no witness")
        if verdict not in (_UNARGMAXABLE, _NEARLY):
            return f"unknown verdict {verdict}"
        part = parts.get(token)
        if part is None and judge in equal:
            part = parts.get(judge)
        if part is None:
            return "there are no weights"
        others, values = arrays["weight_others"][part], arrays["weight_values"][part]
        return self._weights(token, others, values.astype(np.float64), verdict == _NEARLY)

    def _equal(self, token: int) -> list[int]:
        """Return the tokens with the row and bias of one, itself among them."""
        if self.sizes[self.group[token]] == 1:
            return [token]
        same = np.flatnonzero(self.group == self.group[token])
        if self.bias is not None:
            same = same[self.bias[same] == self.bias[token]]
        found: list[int] = same.tolist()
        return found

    # --- witnesses -----------------------------------------------------------------------------

    def _leads(
        self, arrays: dict[str, NDArray[Any]], report: Callable[[int], None]
    ) -> dict[int, str]:
        """Return, by token with a witness, why it proves nothing, or an empty text."""
        reasons: dict[int, str] = {}
        done = 0
        for names, points in (("witness_tokens", "witnesses"), ("wide_tokens", "wide_witnesses")):
            for start in range(0, len(arrays[names]), _BLOCK):
                tokens = arrays[names][start : start + _BLOCK]
                block = arrays[points][start : start + _BLOCK].astype(np.float64)
                found = self._block_leads(tokens, block)
                reasons |= dict(zip(tokens.tolist(), found, strict=True))
                done += len(tokens)
                report(done)
        return reasons

    def _block_leads(self, tokens: NDArray[Any], given: Vector) -> list[str]:
        points = given / self.unit
        if self.bias is None and self.radius is None:
            # Their length is free; a power of two loses nothing.
            points = given * np.array([_power(point) for point in given])[:, None]
        own = np.einsum("nd,nd->n", self._rows(tokens), points)
        best = np.full(len(tokens), -np.inf)
        shared = self.sizes[self.group[tokens]] > 1
        for start in range(0, len(self.weight), _BLOCK):
            part = self._rows(slice(start, start + _BLOCK))
            scores = points @ part.T
            if self.bias is not None:
                scores += self.bias[start : start + _BLOCK] - self.bias[tokens][:, None]
            for i, token in enumerate(tokens.tolist()):
                if start <= token < start + len(part):
                    scores[i, token - start] = -np.inf
                if shared[i]:
                    # Of equal rows the bias alone decides, exactly; equal ones are for TIE.
                    same = self.group[start : start + _BLOCK] == self.group[token]
                    if self.bias is not None:
                        same &= self.bias[start : start + _BLOCK] <= self.bias[token]
                    scores[i, same] = -np.inf
            best = np.maximum(best, scores.max(axis=1))
        lengths = np.linalg.norm(points, axis=1)
        rounding = 2 * (points.shape[1] + 2) * _U * lengths * self.largest
        rounding += 8 * _U * self.bias_range + _LEAST
        return [
            self._not_leading(lead, error, length)
            for lead, error, length in zip(
                (own - best).tolist(), rounding.tolist(), lengths.tolist(), strict=True
            )
        ]

    def _not_leading(self, lead: float, error: float, length: float) -> str:
        if not math.isfinite(length):
            return "the witness is not finite"
        norm = length * self.unit
        if self.radius is not None and norm > self.radius:
            return f"the norm of the witness, {norm:.9g}, is above the radius"
        if self.radius is not None and self.on_sphere and norm < self.radius * (1 - 1e-6):
            return f"the norm of the witness, {norm:.9g}, is not that of inputs"
        if not lead > error:
            return f"another token leads at the witness by {-lead:.3g}, or rounding does"
        return ""

    # --- weights -------------------------------------------------------------------------------

    def _weights(self, token: int, others: NDArray[Any], values: Vector, near: bool) -> str:
        """Return why weights do not prove a verdict, or an empty text."""
        if not len(others) or not np.isfinite(values).all() or not (values > 0).all():
            return "weights are missing, not finite or not positive"
        if np.isin(others, self._equal(token)).any():
            return "the token, or one with the same row and bias, has a weight"
        if not near and len(others) <= _FRACTIONS and self._exactly(token, others, values):
            return ""
        values = values / values.max()
        values = values / values.sum()
        differences = self._rows(others) - self._rows(token)
        units = (len(others) + 10) * _U
        residual = _length(values @ differences, units * (values @ np.abs(differences)))
        rise = rise_error = 0.0
        rises = np.zeros(len(others))
        if self.bias is not None:
            rises = self.bias[others] - self.bias[token]
            rise = float(values @ rises)
            rise_error = units * float(values @ np.abs(rises))
        if near:
            close = residual <= _NEAR * self.largest * (1 + 1e-6)
            close = close and -rise <= _NEAR * self.bias_range * (1 + 1e-6) + rise_error
            return "" if close else f"the mean row is {residual:.3g} away, too far for NEAR"
        # No input of at most a norm gains more from the residual than the bias costs.
        reach = np.inf if self.radius is None else self.radius / self.unit
        if self.bias is not None and reach * residual <= rise - rise_error:
            return ""
        reason = _none_near(differences[:, self.moving], values, rises, rise - rise_error)
        if reason and self.bias is not None:
            # Exact weights may keep the mean bias just as it is: one equation more.
            lifted = np.column_stack([differences[:, self.moving], rises])
            if not _none_near(lifted, values, rises * 0, 0.0):
                return ""
        return reason

    def _exactly(self, token: int, others: NDArray[Any], values: Vector) -> bool:
        weights = [Fraction(float(v)) for v in values]
        own, rows = self._rows(token), self._rows(others)
        # A first look in floating point keeps fractions for what may be exact.
        mean = values / values.max() @ (rows - own)
        if np.abs(mean).max(initial=0.0) > 1e-12 * len(values) * self.largest:
            return False
        for column in range(self.weight.shape[1]):
            base = Fraction(float(own[column]))
            pairs = zip(weights, rows[:, column].tolist(), strict=True)
            if sum(a * (Fraction(x) - base) for a, x in pairs) != 0:
                return False
        if self.bias is None:
            return True
        base = Fraction(float(self.bias[token]))
        rises = zip(weights, self.bias[others].tolist(), strict=True)
        return sum(a * (Fraction(b) - base) for a, b in rises) >= 0


def _length(vector: Vector, rounding: Vector) -> float:
    return float(np.linalg.norm(vector) + np.linalg.norm(rounding))


def _none_near(differences: Vector, values: Vector, rises: Vector, rise: float) -> str:
    """Return why no exact weights need exist beside `values`, or an empty text.

    Exact ones solve ``system @ a = (0, ..., 0, 1)``; the nearest are as far as the residual by the
    least singular value, if the system has full row rank.
    """
    equations = differences.T
    # Powers of two change no solution, and columns of unlike size make no plane of a space.
    equations = equations * np.array([_power(equation) for equation in equations])[:, None]
    system = np.vstack([equations, np.ones(len(values))])
    if system.shape[1] < system.shape[0]:
        return "too few tokens for a proof that exact weights exist"
    singular = np.linalg.svd(system, compute_uv=False)
    if singular[-1] < 64 * max(system.shape) * _U * singular[0]:
        return "the rows with weights are too near a plane for a proof"
    residual = system @ values
    residual[-1] -= 1.0
    error = _length(residual, (len(values) + 10) * _U * (np.abs(system) @ values))
    move = 2 * error / float(singular[-1])
    if not move < values.min():
        return f"exact weights may be {move:.3g} away, the least weight is {values.min():.3g}"
    if rise < move * float(np.linalg.norm(rises)):
        return "the mean bias may be lower than the token's"
    return ""
