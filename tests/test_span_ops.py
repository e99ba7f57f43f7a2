"""The native best spans against the oracle, and what they refuse."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from cases import COUNTS, DTYPES, Generator, Tally, cast, count_cases, host, rounded, same_scores
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from fastmrc import ops, reference


@dataclass
class SpanCase:
    """Start and end logits of some rows, and the other arguments."""

    start: NDArray[np.float32]
    end: NDArray[np.float32]
    dtype: str
    k: int
    max_length: int
    mask: NDArray[np.bool_] | None
    null_position: int | None

    def keywords(self) -> dict[str, Any]:
        return {"mask": self.mask, "null_position": self.null_position}


def _random_logits(rng: Generator, rows: int, n: int) -> NDArray[np.float32]:
    kind = rng.integers(5)
    values = rng.normal(size=(rows, n)) * rng.choice([0.1, 1.0, 5.0, 300.0])
    if kind == 1:
        values = rng.integers(-2, 3, size=(rows, n)).astype(float)
    elif kind == 2:
        values[rng.random(values.shape) < rng.choice([0.2, 0.9, 1.0])] = -np.inf
    elif kind == 3:
        values[:] = rng.choice([0.0, -7.0])
    return values.astype(np.float32)


def random_case(rng: Generator) -> SpanCase:
    n = int(rng.choice([1, 2, 3, 8, 31, 64, 70]))
    rows = int(rng.integers(0, 4))
    dtype = str(rng.choice(DTYPES, p=[0.8, 0.1, 0.1]))
    mask = None
    if rng.random() < 0.7:
        mask = rng.random((rows, n)) < rng.choice([0.0, 0.3, 0.8, 1.0])
    return SpanCase(
        rounded(_random_logits(rng, rows, n), dtype),
        rounded(_random_logits(rng, rows, n), dtype),
        dtype,
        int(rng.choice([1, 1, 2, 5, 20, 200])),
        int(rng.choice([1, 2, 3, 7, 15, n, 1000])),
        mask,
        None if rng.random() < 0.4 else int(rng.integers(n)),
    )


def compare(case: SpanCase, tally: Tally) -> None:
    """Spans are exact, ties included; scores are right to float32."""
    arrays = ops.best_spans(
        cast(case.start, case.dtype),
        cast(case.end, case.dtype),
        case.k,
        case.max_length,
        **case.keywords(),
    )
    scores, starts, ends, nulls = (host(array) for array in arrays)
    want = reference.best_spans(case.start, case.end, case.k, case.max_length, **case.keywords())
    tally.cases += max(1, len(case.start))
    np.testing.assert_array_equal(starts, want[1])
    np.testing.assert_array_equal(ends, want[2])
    assert same_scores(scores, want[0]), (case, scores, want[0])
    assert same_scores(nulls, want[3]), (case, nulls, want[3])


@pytest.mark.parametrize("cases", COUNTS)
def test_best_spans(cases: int) -> None:
    tally, line = count_cases(60, cases, lambda rng, t: compare(random_case(rng), t))
    print(f"best_spans: {line}")
    assert tally.cases >= cases


def test_best_spans_of_long_rows() -> None:
    rng = np.random.default_rng(61)
    for _ in range(20):
        start, end = rng.normal(size=(2, 3, 384)).astype(np.float32) * 4
        mask = rng.random((3, 384)) < 0.9
        compare(SpanCase(start, end, "float32", 20, 15, mask, 0), Tally())


def test_cases_reach_every_corner() -> None:
    rng = np.random.default_rng(62)
    seen: set[str] = set()
    for _ in range(3_000):
        case = random_case(rng)
        if not len(case.start):
            seen.add("no rows")
            continue
        scores, starts, ends, nulls = reference.best_spans(
            case.start, case.end, case.k, case.max_length, **case.keywords()
        )
        found = starts >= 0
        seen |= {
            name
            for name, holds in {
                "nothing found": not found.any(),
                "padded": found.any() and not found.all(),
                "longest": (ends - starts == case.max_length - 1)[found].any() > 0,
                "equal scores": bool((np.diff(scores[0][found[0]]) == 0).any()),
                "null": bool((nulls > 0).any()),
                "masked": case.mask is not None and not case.mask.any(),
                "single token": case.start.shape[1] == 1 and found.any(),
                case.dtype: True,
            }.items()
            if holds
        }
    expected = {"no rows", "nothing found", "padded", "longest", "equal scores", "null", "masked"}
    assert not (expected | {"single token", *DTYPES}) - seen


LOGITS = st.one_of(st.floats(-50, 50, width=32), st.sampled_from([0.0, -0.0, 1.0]))


@settings(deadline=None, max_examples=100)
@given(
    pair=hnp.arrays(
        np.float32,
        st.tuples(st.just(2), st.integers(1, 3), st.integers(1, 40)),
        elements=LOGITS,
    ),
    k=st.integers(1, 12),
    max_length=st.integers(1, 50),
)
def test_any_values(pair: NDArray[np.float32], k: int, max_length: int) -> None:
    compare(SpanCase(pair[0], pair[1], "float32", k, max_length, None, None), Tally())


def test_scores_are_products_of_probabilities() -> None:
    """Softmax over the mask and the null position; worked out in NumPy, span by span."""
    start = np.array([[1.0, 5.0, 0.0, 2.0, 9.0]], dtype=np.float32)
    end = np.array([[0.5, 7.0, 3.0, 1.0, 9.0]], dtype=np.float32)
    mask = np.array([[False, False, True, True, False]])
    a, b = np.exp(start[0, [0, 2, 3]]), np.exp(end[0, [0, 2, 3]])
    a, b = a / a.sum(), b / b.sum()  # of positions 0, 2 and 3
    scores, starts, ends, nulls = ops.best_spans(start, end, 4, 9, mask=mask, null_position=0)
    assert list(zip(starts[0], ends[0], strict=True)) == [(2, 2), (3, 3), (2, 3), (-1, -1)]
    want = [a[1] * b[1], a[2] * b[2], a[1] * b[2]]
    np.testing.assert_allclose(scores[0, :3], want, rtol=1e-6)
    assert scores[0, 3] == -np.inf
    np.testing.assert_allclose(nulls[0], a[0] * b[0], rtol=1e-6)


def test_torch_in_torch_out() -> None:
    start, end = torch.randn(2, 3, 9)
    result = ops.best_spans(start, end.bfloat16(), 2, 3, mask=torch.ones(3, 9, dtype=torch.bool))
    assert all(isinstance(array, torch.Tensor) for array in result)


@pytest.mark.parametrize("side", [ops, reference])
@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"end": np.zeros((2, 4), np.float32)}, ValueError, "end: expected the shape of start"),
        ({"start": np.zeros((1, 3))}, TypeError, "start: expected float32"),
        ({"k": 0}, ValueError, "k: expected at least 1, got 0"),
        ({"max_length": 0}, ValueError, "max_length: expected at least 1, got 0"),
        ({"mask": np.ones((1, 4), bool)}, ValueError, "mask: expected shape"),
        ({"mask": np.ones((1, 3), int)}, TypeError, "mask: expected bool"),
        ({"null_position": 3}, ValueError, "null_position: expected"),
        ({"null_position": -1}, ValueError, "null_position: expected"),
        ({"end": np.array([[0, np.nan, 0]], np.float32)}, ValueError, "end: .*NaN.* in row 0"),
        ({"start": np.array([[0, np.inf, 0]], np.float32)}, ValueError, "start: .*inf.* in row 0"),
    ],
)
def test_bad_input(side: Any, change: dict[str, Any], kind: type[Exception], message: str) -> None:
    zeros = np.zeros((1, 3), np.float32)
    arguments = {"start": zeros, "end": zeros, "k": 1, "max_length": 2} | change
    with pytest.raises(kind, match=message):
        side.best_spans(**arguments)


def test_what_the_mask_leaves_out_may_hold_anything() -> None:
    start = np.array([[np.nan, 1.0, np.inf]], np.float32)
    end = np.array([[np.inf, 1.0, np.nan]], np.float32)
    mask = np.array([[False, True, False]])
    for side in (ops, reference):
        scores, starts, ends, _ = side.best_spans(start, end, 1, 3, mask=mask)
        assert (scores[0, 0], starts[0, 0], ends[0, 0]) == (1.0, 1, 1)
