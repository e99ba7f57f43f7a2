"""The report of an audit: verdicts, tables, JSON, certificates, a plot."""

from __future__ import annotations

import json
import math
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastmrc._build import __version__
from fastmrc.audit.layer import OutputLayer
from fastmrc.audit.results import Results
from fastmrc.audit.verdicts import Stage, TokenStatus, TokenVerdict
from fastmrc.data import StrPath

__all__ = ["EXIT_FOUND", "EXIT_UNDECIDED", "AuditReport"]

EXIT_FOUND, EXIT_UNDECIDED = 1, 3
_BLOCKERS = 5
_BLOCK = 4096


@dataclass(frozen=True, slots=True)
class AuditReport:
    """What an audit found.

    Attributes
    ----------
    layer
        The layer.
    ids
        int64, the tokens that were asked for, rising.
    radius
        Largest norm of inputs, or None for any.
    method
        As asked for.
    results
        The arrays behind `tokens`.
    judge
        int64 [V], the token by which each is judged: itself or one with the same row.
    weight_scale, centre, basis
        The last two float64 [d] and [d, r]: some witnesses are in the direction of
        ``basis @ basis.T @ (weight_scale * w - centre)``.
    complete
        False if the time ran out.
    """

    layer: OutputLayer
    ids: NDArray[np.int64]
    radius: float | None
    method: str
    results: Results
    judge: NDArray[np.int64]
    weight_scale: float
    centre: NDArray[np.float64]
    basis: NDArray[np.float64]
    complete: bool

    @property
    def tokens(self) -> Mapping[int, TokenVerdict]:
        """Return the verdicts by token; each is made when it is looked up."""
        return _Verdicts(self)

    @property
    def counts(self) -> dict[str, int]:
        """Return how many tokens have each status."""
        return self.results.counts(self.ids)

    @property
    def exit_code(self) -> int:
        """Return 0 if all are argmaxable, 1 if some are not or near, 3 if some are undecided."""
        found = self.results.status[self.ids]
        if np.isin(found, (TokenStatus.UNARGMAXABLE, TokenStatus.NEAR)).any():
            return EXIT_FOUND
        return EXIT_UNDECIDED if (found == TokenStatus.UNDECIDED).any() else 0

    def with_status(self, status: TokenStatus) -> list[int]:
        """Return the tokens of a status."""
        found: list[int] = self.ids[self.results.status[self.ids] == status].tolist()
        return found

    def smallest_margins(self, count: int = 10) -> list[tuple[int, float]]:
        """Return the argmaxable and tied tokens with the smallest margins."""
        held = np.isin(self.results.status[self.ids], (TokenStatus.ARGMAXABLE, TokenStatus.TIE))
        margins = np.where(held, self.results.margin[self.ids], np.nan)
        order = np.argsort(margins, kind="stable")
        order = order[np.isfinite(margins[order])][:count]
        return [(int(self.ids[i]), float(margins[i])) for i in order]

    def row_norms(self) -> NDArray[np.float64]:
        """Return the norms of the rows of `ids`."""
        weight = self.layer.weight
        parts = [self.ids[i : i + _BLOCK] for i in range(0, len(self.ids), _BLOCK)]
        return np.concatenate([np.linalg.norm(weight[p].astype(np.float64), axis=1) for p in parts])

    def to_json(self, text: Callable[[int], str] | None = None) -> dict[str, Any]:
        """Return the report as values for JSON; numbers that JSON lacks are null.

        Parameters
        ----------
        text
            Gives the text of a token.
        """
        return {
            "weight": self.layer.weight_name,
            "bias": self.layer.bias_name,
            "shape": list(self.layer.weight.shape),
            "sha256": self.layer.digest(),
            "norm": self.layer.norm_names,
            "radius": self.radius,
            "inputs have that norm": self.layer.sphere is not None,
            "method": self.method,
            "version": __version__,
            "complete": self.complete,
            "counts": self.counts,
            "stages": self.stages(),
            "tokens": [self._record(token, text) for token in self.ids.tolist()],
        }

    def stages(self) -> dict[str, dict[str, float]]:
        """Return of each stage at work how many tokens it decided and its seconds."""
        decided = np.bincount(self.results.stage[self.ids], minlength=len(Stage))
        return {
            stage.name: {"tokens": int(decided[stage]), "seconds": float(seconds)}
            for stage, seconds in zip(Stage, self.results.seconds, strict=True)
            if (decided[stage] and stage != Stage.NONE) or seconds
        }

    def _record(self, token: int, text: Callable[[int], str] | None) -> dict[str, Any]:
        results = self.results
        judge = int(self.judge[token])
        record: dict[str, Any] = {"id": token}
        if text is not None:
            record["text"] = text(token)
        record |= {
            "status": TokenStatus(results.status[token]).name,
            "stage": Stage(results.stage[token]).name,
            "margin": _finite(float(results.margin[token])),
            "witness_norm": _finite(float(results.norm[token])),
            "blocked_by": list(self._blockers(token)),
        }
        return record if judge == token else record | {"twin_of": judge}

    def _blockers(self, token: int) -> tuple[int, ...]:
        found = self._weights_of(token)
        if found is None:
            return ()
        tokens, values = found
        return tuple(tokens[np.argsort(-values, kind="stable")[:_BLOCKERS]].tolist())

    def _weights_of(self, token: int) -> tuple[NDArray[np.int64], NDArray[np.float64]] | None:
        own = self.results.weights.get(token)
        if own is not None or self.results.status[token] == TokenStatus.UNDECIDED:
            return own
        return self.results.weights.get(int(self.judge[token]))

    def witness_of(self, token: int) -> NDArray[np.floating[Any]] | None:
        """Return the witness of a token, or of the one that it is judged by; None if none."""
        if self.results.status[token] not in (TokenStatus.ARGMAXABLE, TokenStatus.TIE):
            return None
        judge = int(self.judge[token])
        kept = self.results.witnesses.get(judge)
        return kept if kept is not None else self._whitened(np.array([judge]))[0]

    def _whitened(self, tokens: NDArray[np.int64]) -> NDArray[np.float32]:
        centred = self.layer.weight[tokens].astype(np.float64) * self.weight_scale - self.centre
        points = (centred @ self.basis) @ self.basis.T
        # Those of tokens with other witnesses may not fit and are not used.
        with np.errstate(all="ignore"):
            lengths = self.results.norm[tokens] / np.linalg.norm(points, axis=1)
            scaled: NDArray[np.float32] = (points * lengths[:, None]).astype(np.float32)
        return scaled

    def save_certificates(self, path: StrPath) -> None:
        """Write what proves the verdicts to an ``.npz`` file, which `verify_certificates` checks.

        Raises
        ------
        OSError
            If it cannot be written; nothing is left behind then.
        """
        status = self.results.status[self.ids]
        held = np.isin(status, (TokenStatus.ARGMAXABLE, TokenStatus.TIE))
        judges = np.unique(self.judge[self.ids[held]])
        wide = [t for t, w in self.results.witnesses.items() if w.dtype == np.float64]
        wide = sorted(set(wide) & set(judges.tolist()))
        narrow = np.setdiff1d(judges, wide)
        settings = {
            "weight": self.layer.weight_name,
            "bias": self.layer.bias_name,
            "sha256": self.layer.digest(),
            "norm": self.layer.norm_names,
            "radius": self.radius,
            "method": self.method,
            "version": __version__,
        }
        part = Path(path).with_name(f"{Path(path).name}.part")
        width = self.layer.weight.shape[1]
        try:
            with zipfile.ZipFile(part, "w") as file:
                _write(file, "settings", np.array(json.dumps(settings)))
                _write(file, "ids", self.ids)
                _write(file, "status", status)
                _write(file, "judge", self.judge[self.ids])
                for name, array in self.results.weight_arrays().items():
                    _write(file, name, array)
                _write(file, "witness_tokens", narrow)
                _write_blocks(file, "witnesses", (len(narrow), width), self._witnesses(narrow))
                _write(file, "wide_tokens", np.array(wide, np.int64))
                empty = np.empty((0, width))
                _write(
                    file,
                    "wide_witnesses",
                    np.concatenate([empty, *(self.results.witnesses[t][None] for t in wide)]),
                )
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)

    def _witnesses(self, tokens: NDArray[np.int64]) -> Iterator[NDArray[np.float32]]:
        for start in range(0, len(tokens), _BLOCK):
            block = tokens[start : start + _BLOCK]
            values = self._whitened(block)
            for i, token in enumerate(block.tolist()):
                if token in self.results.witnesses:
                    values[i] = self.results.witnesses[token]
            yield values

    def verdict(self, token: int) -> TokenVerdict:
        """Return the verdict on a token of `ids`."""
        results = self.results
        judge = int(self.judge[token])
        found = self._weights_of(token)
        weights = None
        if found is not None:
            weights = dict(zip(found[0].tolist(), found[1].tolist(), strict=True))
        return TokenVerdict(
            token,
            TokenStatus(results.status[token]),
            Stage(results.stage[token]),
            float(results.margin[token]),
            self.witness_of(token),
            weights,
            self._blockers(token),
            None if judge == token else judge,
        )


class _Verdicts(Mapping[int, TokenVerdict]):
    def __init__(self, report: AuditReport) -> None:
        self._report = report

    def __getitem__(self, token: int) -> TokenVerdict:
        ids = self._report.ids
        place = int(np.searchsorted(ids, token))
        if place == len(ids) or ids[place] != token:
            raise KeyError(token)
        return self._report.verdict(int(token))

    def __iter__(self) -> Iterator[int]:
        return iter(self._report.ids.tolist())

    def __len__(self) -> int:
        return len(self._report.ids)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _write(file: zipfile.ZipFile, name: str, array: NDArray[Any]) -> None:
    with file.open(f"{name}.npy", "w", force_zip64=True) as part:
        np.lib.format.write_array(part, np.asarray(array), allow_pickle=False)


def _write_blocks(
    file: zipfile.ZipFile, name: str, shape: tuple[int, int], blocks: Iterator[NDArray[np.float32]]
) -> None:
    """Write a float32 array block by block, which never stands in memory as a whole."""
    header = {"descr": "<f4", "fortran_order": False, "shape": shape}
    with file.open(f"{name}.npy", "w", force_zip64=True) as part:
        np.lib.format.write_array_header_2_0(part, header)
        for block in blocks:
            part.write(np.ascontiguousarray(block, "<f4").tobytes())
