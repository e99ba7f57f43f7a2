"""The native attention-sum against the oracle, and what it refuses."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from cases import COUNTS, DTYPES, Generator, Tally, cast, count_cases, host, rounded
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fastmrc import ops, reference


def compare(rng: Generator, tally: Tally) -> None:
    """Compare one batch: words and positions equal, probabilities to rounding, no near-tie."""
    rows = int(rng.integers(0, 4))
    positions = int(rng.choice([1, 2, 3, 8, 31, 64, 70]))
    dtype = str(rng.choice(DTYPES, p=[0.8, 0.1, 0.1]))
    logits = rng.normal(size=(rows, positions)) * rng.choice([0.1, 1.0, 5.0, 300.0])
    if rng.random() < 0.5:  # few different logits, so that words tie
        logits = rng.integers(-2, 3, size=logits.shape).astype(float)
    logits[rng.random(logits.shape) < rng.choice([0.0, 0.3, 1.0], p=[0.7, 0.2, 0.1])] = -np.inf
    logits = rounded(logits.astype(np.float32), dtype)
    word_ids = rng.integers(0, int(rng.integers(1, 2 * positions + 1)), logits.shape)
    word_ids = (word_ids * rng.choice([1, 12_345_677])).astype(np.int32)
    keywords: dict[str, Any] = {}
    if rng.random() < 0.5:
        keywords["mask"] = rng.random(logits.shape) < rng.choice([0.0, 0.5, 0.9])
    if rng.random() < 0.5:
        keywords["lengths"] = rng.integers(0, positions + 1, rows)
    k = int(rng.integers(1, positions + 3))
    ours = [host(x) for x in ops.attention_sum(cast(logits, dtype), word_ids, k, **keywords)]
    theirs = reference.attention_sum(logits, word_ids, k, **keywords)
    np.testing.assert_array_equal(ours[0], theirs[0], err_msg=str(keywords))
    np.testing.assert_array_equal(ours[2], theirs[2])
    np.testing.assert_allclose(ours[1], theirs[1], rtol=1e-14, atol=1e-300)
    tally.cases += max(1, rows)


@pytest.mark.parametrize("cases", COUNTS)
def test_words_as_the_oracle(cases: int) -> None:
    tally, line = count_cases(17, cases, compare)
    print(line)
    assert tally.near_ties == 0


@settings(max_examples=300, deadline=None)
@given(
    hnp.arrays(np.float32, (2, 9), elements=st.floats(-60, 60, width=32) | st.just(-np.inf)),
    hnp.arrays(np.int32, (2, 9), elements=st.integers(0, 4)),
    st.integers(1, 6),
)
def test_any_logits(logits: Any, word_ids: Any, k: int) -> None:
    ours = ops.attention_sum(logits, word_ids, k)
    theirs = reference.attention_sum(logits, word_ids, k)
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-14, atol=0)


def test_repeated_words_are_summed() -> None:
    logits = np.log(np.array([[1, 2, 3, 4]], np.float32))
    words, probs, positions = ops.attention_sum(logits, np.array([[5, 9, 5, 7]], np.int32), 3)
    assert words.tolist() == [[5, 7, 9]]
    assert positions.tolist() == [[0, 3, 1]]
    np.testing.assert_allclose(probs, [[0.4, 0.4, 0.2]], rtol=1e-6)


@pytest.mark.parametrize("order", [[0, 1, 2, 3, 4, 5], [5, 3, 1, 4, 2, 0]])
def test_equal_weights_tie_in_any_order(order: list[int]) -> None:
    # Two words with the same three logits; plain sums of doubles differ by their order.
    logits = np.array([[0.1, 0.2, 0.3, 0.3, 0.2, 0.1]], np.float32)[:, order]
    words, probs, _ = ops.attention_sum(logits, np.array([[8, 8, 8, 2, 2, 2]], np.int32), 2)
    if sorted(order[:3]) in ([0, 1, 2], [3, 4, 5]):
        assert words.tolist() == [[8, 2]]
    assert probs[0, 0] >= probs[0, 1]
    expected = reference.attention_sum(logits, np.array([[8, 8, 8, 2, 2, 2]], np.int32), 2)
    assert words.tolist() == expected[0].tolist()


def test_nothing_counts() -> None:
    logits = np.zeros((3, 4), np.float32)
    logits[1] = -np.inf
    keywords = {"mask": np.array([[False] * 4, [True] * 4, [True] * 4]), "lengths": [4, 4, 0]}
    for module in (ops, reference):
        words, probs, positions = module.attention_sum(logits, np.zeros((3, 4), int), 2, **keywords)
        assert (words == -1).all() and (positions == -1).all() and (probs == 0).all()


def test_no_rows() -> None:
    for module in (ops, reference):
        words, probs, _ = module.attention_sum(
            np.zeros((0, 4), np.float32), np.zeros((0, 4), np.int32), 2
        )
        assert words.shape == probs.shape == (0, 2)


def test_torch_tensors_give_torch_tensors() -> None:
    logits = torch.randn(2, 5, requires_grad=True)
    words, probs, positions = ops.attention_sum(logits, torch.arange(10).view(2, 5), 2)
    assert words.dtype == positions.dtype == torch.int32 and probs.dtype == torch.float64
    assert math.isclose(float(probs[0].sum()), float(probs[0][0] + probs[0][1]))


GOOD: dict[str, Any] = {
    "logits": np.zeros((2, 3), np.float32),
    "word_ids": np.zeros((2, 3), np.int32),
    "k": 1,
}
BAD = [
    ({"logits": np.zeros((2, 3, 1), np.float32)}, ValueError, "logits: expected"),
    ({"logits": np.zeros((2, 3))}, TypeError, "logits: expected"),
    ({"logits": np.full((2, 3), np.nan, np.float32)}, ValueError, "logits: expected numbers below"),
    ({"logits": np.full((2, 3), np.inf, np.float32)}, ValueError, "row 0, position 0"),
    ({"word_ids": np.zeros((2, 4), np.int32)}, ValueError, "word_ids: expected shape"),
    ({"word_ids": np.zeros((2, 3))}, TypeError, "word_ids: expected integers"),
    ({"word_ids": np.full((2, 3), -5)}, ValueError, "word_ids: expected 0 or more, got -5"),
    ({"k": 0}, ValueError, "k: expected at least 1"),
    ({"k": 1.5}, TypeError, "k: expected an integer"),
    ({"mask": np.ones((2, 3), int)}, TypeError, "mask: expected bool"),
    ({"mask": np.ones((3, 2), bool)}, ValueError, "mask: expected shape"),
    ({"lengths": [1, 4]}, ValueError, "lengths: expected 0 to 3, got 4"),
    ({"lengths": [1, -1]}, ValueError, "lengths: expected 0 to 3, got -1"),
    ({"lengths": [1]}, ValueError, "lengths: expected"),
]


@pytest.mark.parametrize("module", [ops, reference], ids=["native", "reference"])
@pytest.mark.parametrize(("change", "error", "message"), BAD)
def test_bad_input(
    module: Any, change: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        module.attention_sum(**GOOD | change)
