"""Check certificates of an audit against a layer, in NumPy and exact fractions only.

This shares no code with the search: it reads the file and the layer and does the sums again, in
float64, with bounds of their rounding.
"""

from __future__ import annotations

import hashlib
import json
import math
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
    rounding: tuple[float, float] = (0.0, 0.0),
    report: Callable[[int, int], None] | None = None,
) -> Verification:
    """Check every verdict in a file of certificates; whose layer it is, the caller knows.

    Parameters
    ----------
    path
        What `AuditReport.save_certificates` wrote.
    weight
        float32 or float64 [V, d].
    bias
        float64 [V], or None.
    sphere, rounding
        Norm that all inputs have, or None, and by how much rows and biases may be off, as in
        `OutputLayer`.
    report
        Told how many of how many checks are done.

    Returns
    -------
    Verification

    Raises
    ------
    InputError
        If the file cannot be read or is of a layer of another shape, or numbers of the layer are
        no 0 but below 1e-100 or above 1e100.
    """
    settings, arrays = _read(path, _NAMES)
    rows = np.asarray(weight)
    radius = settings["radius"]
    if sphere is not None and radius != sphere:
        raise InputError(f"{path}: expected the radius {sphere} of the layer norm, got {radius}")
    _check_shapes(path, arrays, rows)
    biases = None if bias is None else np.asarray(bias, np.float64)
    checker = _Checker(rows, biases, radius, sphere is not None, rounding)
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
            _check_settings(settings)
        except (InputError, OSError):
            raise
        except Exception as error:  # the parsers of damaged files raise errors of many kinds
            raise InputError(f"{path}: no certificates of an audit ({error})") from error
    return settings, arrays


def _check_settings(settings: Any) -> None:
    """Raise ValueError for settings that no audit writes."""
    if not isinstance(settings, dict):
        raise ValueError("its settings are no object")
    norm, radius = settings.get("norm"), settings.setdefault("radius", None)
    names = [settings.get(name) for name in ("weight", "bias", "sha256")]
    sound = all(name is None or isinstance(name, str) for name in names)
    sound = sound and (norm is None or (isinstance(norm, list) and len(norm) == 2))
    sound = sound and all(isinstance(name, str) for name in norm or ())
    if radius is not None:
        sound = sound and type(radius) in (int, float) and 1e-30 <= radius <= 1e30
    if not sound:
        raise ValueError("its settings are of other kinds")


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


def _check_sizes(values: NDArray[Any] | None) -> None:
    """Refuse numbers that scaling by powers of two might round."""
    sizes = np.abs(np.zeros(1) if values is None else values, dtype=np.float64)
    if not ((sizes <= 1e100) & ((sizes >= 1e-100) | (sizes == 0))).all():
        raise InputError(
            "weight, bias: expected numbers that are 0 or from 1e-100 to 1e100 in size"
        )


def _power(values: NDArray[Any]) -> float:
    """Return the power of two that brings the largest of numbers to 0.5 to 1; 1 if all are 0."""
    largest = float(np.abs(values).max(initial=0.0))
    return math.ldexp(1.0, max(-1000, min(1000, -math.frexp(largest)[1]))) if largest else 1.0


class _Checker:
    """Checks against rows and biases that are scaled by powers of two, against overflow."""

    def __init__(
        self,
        weight: Matrix,
        bias: Vector | None,
        radius: float | None,
        on_sphere: bool,
        rounding: tuple[float, float],
    ) -> None:
        self.weight = weight
        for part in [weight[b : b + _BLOCK] for b in range(0, len(weight), _BLOCK)] + [bias]:
            _check_sizes(part)
        tops = [np.abs(weight[b : b + _BLOCK]).max() for b in range(0, len(weight), _BLOCK)]
        self.scale = _power(np.array(tops, np.float64))
        self.bias: Vector | None = None
        self.row_rounding, self.bias_rounding = rounding[0] * self.scale, 0.0
        self.unit = 1.0  # inputs are divided by it
        if bias is not None:
            bias_scale = _power(bias)
            self.bias = bias * bias_scale
            self.unit = self.scale / bias_scale
            self.bias_rounding = rounding[1] * bias_scale
        self.radius = radius
        self.on_sphere = on_sphere
        self.exact = rounding == (0.0, 0.0)
        # Columns in which rows differ, the norm of the longest row, rows that are equal.
        self.moving = np.full(weight.shape[1], not self.exact)
        self.largest = 0.0
        first: dict[bytes, int] = {}
        self.group = np.empty(len(weight), np.int64)
        for b in range(0, len(weight), _BLOCK):
            part = self._rows(slice(b, b + _BLOCK))
            self.moving |= (weight[b : b + _BLOCK] != weight[0]).any(axis=0)
            self.largest = max(self.largest, float(np.linalg.norm(part, axis=1).max()))
            for i, row in enumerate(part + 0.0, b):
                key = hashlib.sha256(row.tobytes()).digest()
                self.group[i] = first.setdefault(key, i) if self.exact else i
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
        shared = np.flatnonzero(self.sizes[self.group[tokens]] > 1)
        for start in range(0, len(self.weight), _BLOCK):
            part = self._rows(slice(start, start + _BLOCK))
            scores = points @ part.T
            if self.bias is not None:
                rises = self.bias[start : start + _BLOCK] - self.bias[tokens][:, None]
                scores += rises + 4 * _U * np.abs(rises)  # and what rounding may have taken
            here = np.flatnonzero((tokens >= start) & (tokens < start + len(part)))
            scores[here, tokens[here] - start] = -np.inf
            for i in shared:
                # Of equal rows the bias alone decides, exactly; equal ones are for TIE.
                same = self.group[start : start + _BLOCK] == self.group[tokens[i]]
                if self.bias is not None:
                    same &= self.bias[start : start + _BLOCK] <= self.bias[tokens[i]]
                scores[i, same] = -np.inf
            best = np.maximum(best, scores.max(axis=1))
        lengths = np.linalg.norm(points, axis=1)
        rounding = 2 * (points.shape[1] + 2) * _U * lengths * self.largest
        rounding += 2 * (self.row_rounding * lengths + self.bias_rounding) + _LEAST
        if self.radius is not None and self.on_sphere:
            # What the lead may lose on the way to an input of the very norm.
            rounding += 2 * self.largest * np.abs(lengths - self.radius / self.unit)
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
        in_fractions = self.exact and not near and len(others) <= _FRACTIONS
        if in_fractions and self._exactly(token, others, values):
            return ""
        values = values / values.max()
        if values.min() < 1e-100:
            return "weights are too far apart"
        values = values / values.sum()
        differences = self._rows(others) - self._rows(token)
        units = (len(others) + 10) * _U
        residual = _length(values @ differences, units * (values @ np.abs(differences)))
        residual += 2 * self.row_rounding + _LEAST
        rise = rise_error = size = 0.0
        rises = np.zeros(len(others))
        if self.bias is not None:
            rises = self.bias[others] - self.bias[token]
            rise = float(values @ rises)
            if rises.any() or self.bias_rounding:
                rise_error = units * float(values @ np.abs(rises)) + 2 * self.bias_rounding + _LEAST
            size = float(values @ np.abs(self.bias[others]) + abs(self.bias[token]))
        if near:
            close = residual <= _NEAR * self.largest * (1 + 1e-6)
            close = close and -rise <= _NEAR * size * (1 + 1e-6) + rise_error
            return "" if close else f"the mean row is {residual:.3g} away, too far for NEAR"
        # No input of at most a norm gains more from the residual than the bias costs.
        reach = np.inf if self.radius is None else self.radius / self.unit
        if self.bias is not None and reach * residual <= rise - rise_error:
            return ""
        given = self.row_rounding
        reason = _none_near(differences[:, self.moving], values, rises, rise - rise_error, given)
        if reason and self.bias is not None:
            # Exact weights may keep the mean bias just as it is: one equation more.
            lifted = np.column_stack([differences[:, self.moving], rises])
            given += self.bias_rounding
            if not _none_near(lifted, values, rises * 0, 0.0, given):
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


def _none_near(
    differences: Vector, values: Vector, rises: Vector, rise: float, given: float
) -> str:
    """Return why no exact weights need exist beside `values`, or an empty text; rows may be off by
    `given`.

    Exact ones solve ``system @ a = (0, ..., 0, 1)``; the nearest are as far as the residual by the
    least singular value, if the system has full row rank.
    """
    equations = differences.T
    # Powers of two change no solution, and columns of unlike size make no plane of a space.
    powers = np.array([_power(equation) for equation in equations])
    system = np.vstack([equations * powers[:, None], np.ones(len(values))])
    given = 2 * given * float(powers.max(initial=1.0))
    if system.shape[1] < system.shape[0]:
        return "too few tokens for a proof that exact weights exist"
    singular = np.linalg.svd(system, compute_uv=False)
    least = float(singular[-1]) - given * len(values) ** 0.5
    if least < 64 * max(system.shape) * _U * singular[0]:
        return "the rows with weights are too near a plane for a proof"
    residual = system @ values
    residual[-1] -= 1.0
    error = _length(residual, (len(values) + 10) * _U * (np.abs(system) @ values))
    move = 2 * (error + given) / least
    if not move < values.min():
        return f"exact weights may be {move:.3g} away, the least weight is {values.min():.3g}"
    if rise < move * float(np.linalg.norm(rises)):
        return "the mean bias may be lower than the token's"
    return ""
