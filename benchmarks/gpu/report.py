"""What a part has found: checks, figures, notes and errors, as JSON.

Integers must be equal; numbers may differ by 1e-5 of their size, scores of readers by 1e-4. What
differs in integers or texts, at scores that do not differ by more than that, is a near tie; few are
allowed, and none where scores are equal by construction.
"""

from __future__ import annotations

import json
import math
import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastmrc.types import Answer

TOLERANCE = 1e-5  # of scores of operations, relative above 1
NEAR_TIE = 1e-4  # of scores of readers, whose encoders round differently on the two devices
MOST_EXAMPLES = 5  # of mismatches

# The results of a call on the host, or what it raised and what it had got.
Outcome = tuple[NDArray[Any], ...] | str


@dataclass
class Report:
    """What a part has found so far, kept in a file."""

    path: Path
    judged: bool = True  # whether figures are compared with what is wanted
    checks: list[dict[str, Any]] = field(default_factory=list)
    figures: list[dict[str, Any]] = field(default_factory=list)
    notes: dict[str, Any] = field(default_factory=dict)
    errors: list[dict[str, str]] = field(default_factory=list)
    seconds: float = 0.0

    def check(self, check: Check) -> None:
        self.checks.append(check.entry())
        _say(check.name, "equal" if check.passed else "NOT EQUAL")
        self.save()

    def figure(
        self, name: str, got: float, unit: str, wanted: str | None = None, **details: Any
    ) -> None:
        """Note a figure; `wanted` is ``">= n"`` or ``"<= n"``."""
        entry: dict[str, Any] = {"name": name, "got": got, "unit": unit}
        if wanted is not None:
            relation, limit = wanted.split()
            met = got >= float(limit) if relation == ">=" else got <= float(limit)
            entry |= {"wanted": wanted, "met": met if self.judged else None}
        self.figures.append(entry | details)
        _say(name, f"{got:.4g} {unit}")
        self.save()

    def note(self, name: str, value: Any) -> None:
        self.notes[name] = value
        self.save()

    @contextmanager
    def guard(self, name: str) -> Iterator[None]:
        """Let what fails in here be told and the rest go on."""
        try:
            yield
        except Exception as error:
            where = "".join(traceback.format_exception(error)[-4:])
            self.errors.append({"of": name, "error": _message(error), "traceback": where[-3000:]})
            _say(name, f"ERROR: {_message(error)}")
            self.save()

    def save(self) -> None:
        entry = {
            "seconds": round(self.seconds, 1),
            "error": None if not self.errors else self.errors[0]["error"],
            "errors": self.errors,
            "checks": self.checks,
            "figures": self.figures,
            "notes": self.notes,
        }
        write_json(self.path, entry)


def _message(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:500]


def _say(name: str, result: str) -> None:
    print(f"  {name}: {result}", file=sys.stderr, flush=True)


def write_json(path: Path, value: Any) -> None:
    beside = path.with_name(path.name + ".part")
    beside.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(beside, path)


@dataclass
class Check:
    """Results of the device beside those of the CPU path.

    Attributes
    ----------
    name
        What is compared.
    ties_allowed
        Share of what is compared that may differ at equal scores.
    """

    name: str
    ties_allowed: float = 0.002
    compared: int = 0
    mismatches: int = 0
    near_ties: int = 0
    largest_difference: float = 0.0
    examples: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        few = self.near_ties <= 1 + self.ties_allowed * self.compared
        return self.compared > 0 and self.mismatches == 0 and few

    def entry(self) -> dict[str, Any]:
        """Return what the JSON says of it."""
        return {**vars(self), "passed": self.passed}

    def arrays(self, case: str, ours: Outcome, theirs: Outcome, exact: bool) -> None:
        """Compare results of an operation, or what it raised; `exact`: no near ties."""
        if isinstance(ours, str) or isinstance(theirs, str) or len(ours) != len(theirs):
            same = isinstance(ours, str) and ours == theirs
            self._count(case, 1, 0 if same else 1, f"{ours!s:.200} != {theirs!s:.200}")
            return
        for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            name = f"{case}, result {i}"
            if a.shape != b.shape or a.dtype != b.dtype:
                got = f"{a.dtype} {a.shape} != {b.dtype} {b.shape}"
                self._count(name, 1, 1, got)
            elif a.dtype.kind == "f":
                self._floats(name, a.astype(np.float64), b.astype(np.float64))
            else:
                wrong = a != b
                n = int(wrong.sum())
                self.near_ties += 0 if exact else n
                got = f"{a[wrong][:5]} != {b[wrong][:5]}" if n else ""
                self._count(name, a.size, n if exact else 0, got)

    def _floats(self, name: str, a: NDArray[np.float64], b: NDArray[np.float64]) -> None:
        same = (a == b) | (np.isnan(a) & np.isnan(b))
        with np.errstate(invalid="ignore"):
            difference = np.where(same, 0.0, np.abs(a - b) / np.maximum(1.0, np.abs(b)))
        difference = np.where(np.isnan(difference), math.inf, difference)
        self.largest_difference = max(self.largest_difference, float(difference.max(initial=0)))
        wrong = difference > TOLERANCE
        n = int(wrong.sum())
        self._count(name, a.size, n, f"{a[wrong][:5]} != {b[wrong][:5]}" if n else "")

    def answers(self, case: str, ours: Sequence[Answer], theirs: Sequence[Answer]) -> None:
        """Compare answers of a reader, with their candidates and citations."""
        for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            scores = [(a.score, b.score), (a.no_answer_score or 0.0, b.no_answer_score or 0.0)]
            both = zip(a.candidates, b.candidates, strict=False)
            scores += [(c.score, d.score) for c, d in both]
            same = (a.text, a.token_ids, a.spans) == (b.text, b.token_ids, b.spans)
            same = same and _candidates(a) == _candidates(b)
            self.entries(f"{case}, question {i}", same, scores, f"{a.text!r} != {b.text!r}")

    def entries(
        self, case: str, same: bool, scores: Sequence[tuple[float, float]], got: str
    ) -> None:
        """Compare one entry with its scores, ours and theirs."""
        pairs = [(x, y) for x, y in scores if x != y]
        differences = [abs(x - y) / max(1.0, abs(y)) for x, y in pairs]
        difference = max(differences, default=0.0)
        close = difference <= NEAR_TIE
        if close:
            self.largest_difference = max(self.largest_difference, difference)
            self.near_ties += 0 if same else 1
        self._count(case, 1, 0 if close else 1, f"{got}, scores {difference:.3g} apart")

    def _count(self, case: str, compared: int, mismatches: int, got: str) -> None:
        self.compared += compared
        self.mismatches += mismatches
        if mismatches and len(self.examples) < MOST_EXAMPLES:
            self.examples.append(f"{case}: {got}"[:500])


def _candidates(answer: Answer) -> list[Any]:
    return [(c.text, c.token_ids, c.spans, c.finished) for c in answer.candidates]
