"""Results of an audit while it runs, and the file in which a stopped one is kept."""

from __future__ import annotations

import math
import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastmrc.audit.verdicts import Stage, TokenStatus
from fastmrc.data import StrPath
from fastmrc.errors import InputError

__all__ = ["AuditState", "Results", "TokenWeights"]

TokenWeights = tuple[NDArray[np.int64], NDArray[np.float64]]


_ARRAYS = ("status", "stage", "margin", "norm", "tried", "near", "seconds")


class Results:
    """Verdicts on the tokens of a layer, a struct of arrays.

    Parameters
    ----------
    size
        Tokens of the layer.

    Attributes
    ----------
    status, stage
        int8 [V].
    margin
        float64 [V], as in `TokenVerdict`.
    norm
        float64 [V], of the witness.
    tried
        int64 [V], a bit for each stage that gave the token up.
    near
        bool [V], whether `weights` would do for NEAR.
    witnesses
        By token; those of the stage WHITENED that are not here are in the direction of
        ``basis @ basis.T @ (w - centre)`` and of the norm noted.
    weights
        Tokens and weights, by token.
    seconds
        float64 [stages], spent by each.
    """

    def __init__(self, size: int) -> None:
        self.status = np.zeros(size, np.int8)
        self.stage = np.zeros(size, np.int8)
        self.margin = np.full(size, np.nan)
        self.norm = np.full(size, np.nan)
        self.tried = np.zeros(size, np.int64)
        self.near = np.zeros(size, bool)
        self.witnesses: dict[int, NDArray[np.floating[Any]]] = {}
        self.weights: dict[int, TokenWeights] = {}
        self.seconds = np.zeros(len(Stage))

    def decide(
        self,
        token: int,
        status: TokenStatus,
        stage: Stage,
        margin: float,
        norm: float = math.nan,
    ) -> None:
        """Note a verdict; with a witness its norm."""
        self.status[token], self.stage[token] = status, stage
        self.margin[token], self.norm[token] = margin, norm

    def counts(self, tokens: NDArray[np.int64]) -> dict[str, int]:
        """Return how many of `tokens` have each status, those of none left out."""
        found = Counter(self.status[tokens].tolist())
        return {status.name: found[status] for status in TokenStatus if found[status]}

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Return all as arrays."""
        plain = {name: getattr(self, name) for name in _ARRAYS}
        witnesses = {f"witness_{token}": witness for token, witness in self.witnesses.items()}
        return plain | self.weight_arrays() | witnesses

    def weight_arrays(self) -> dict[str, NDArray[Any]]:
        """Return the weights of all tokens as arrays."""
        begins = np.cumsum([0, *(len(tokens) for tokens, _ in self.weights.values())])
        pairs = list(self.weights.values())
        return {
            "weight_tokens": np.array(list(self.weights), np.int64),
            "weight_begin": begins.astype(np.int64),
            "weight_others": np.concatenate([np.empty(0, np.int64), *(t for t, _ in pairs)]),
            "weight_values": np.concatenate([np.empty(0), *(v for _, v in pairs)]),
        }

    def fill(self, arrays: dict[str, NDArray[Any]]) -> None:
        """Take over what `arrays` returned."""
        for name in _ARRAYS:
            getattr(self, name)[:] = arrays[name]
        begins = arrays["weight_begin"].tolist()
        for i, token in enumerate(arrays["weight_tokens"].tolist()):
            part = slice(begins[i], begins[i + 1])
            self.weights[token] = (arrays["weight_others"][part], arrays["weight_values"][part])
        for name, values in arrays.items():
            if name.startswith("witness_"):
                self.witnesses[int(name.removeprefix("witness_"))] = values


class AuditState:
    """The file of an audit that may be stopped and go on.

    Parameters
    ----------
    path
        The file, or None for none.
    key
        What layer and which options it belongs to.
    """

    def __init__(self, path: StrPath | None, key: str) -> None:
        self.path = None if path is None else Path(path)
        self.key = key

    def load(self, results: Results) -> dict[str, NDArray[Any]]:
        """Fill `results` and return the other arrays; nothing if there is no file yet.

        Raises
        ------
        InputError
            If the file is of another audit or cannot be read.
        """
        if self.path is None or not self.path.exists():
            return {}
        try:
            # Opened here: NumPy leaves a file open that turns out to be broken.
            with open(self.path, "rb") as raw:
                file = np.load(raw, allow_pickle=False)
                arrays = {name: file[name] for name in getattr(file, "files", ())}
            key = str(arrays["key"])
        except OSError:
            raise
        except Exception as error:  # the parsers of damaged files raise errors of many kinds
            raise InputError(f"state: '{self.path}' is no file of a stopped audit") from error
        if key != self.key:
            raise InputError(
                f"state: '{self.path}' is of another layer or of other options; name another file"
            )
        results.fill(arrays)
        return arrays

    def save(self, results: Results, **more: NDArray[Any]) -> None:
        """Write the file, whole or not at all."""
        if self.path is None:
            return
        part = self.path.with_name(f"{self.path.name}.part")
        with open(part, "wb") as file:
            arrays: dict[str, Any] = results.arrays() | more
            np.savez(file, **arrays, key=np.array(self.key))
        os.replace(part, self.path)
