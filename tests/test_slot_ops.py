"""The native slot operations against the oracle and against brute force, and what they refuse."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from cases import (
    COUNTS,
    DTYPES,
    MARGIN,
    Generator,
    Tally,
    cast,
    count_cases,
    host,
    random_alphabet,
    random_rows,
    random_sequences,
    rounded,
    same_scores,
)
from numpy.typing import NDArray

import fastmrc
from fastmrc import ops, reference


@dataclass
class SlotCase:
    """Logits of some passages, and what their answers may be on both sides."""

    logits: NDArray[np.float32]  # [passages, slots, V]
    dtype: str
    sequences: list[list[list[int]]]  # of each passage's constraint
    kinds: list[str]  # SpanIndex, Trie or none
    end_id: int
    min_tokens: int
    k: int

    def constraints(self, module: Any) -> list[Any]:
        return [
            None if kind == "none" else getattr(module, kind)(sequences)
            for kind, sequences in zip(self.kinds, self.sequences, strict=True)
        ]

    def arguments(self, module: Any) -> dict[str, Any]:
        return {
            "end_id": self.end_id,
            "constraint": self.constraints(module),
            "min_tokens": self.min_tokens,
        }

    def native(self) -> Any:
        shape = self.logits.shape
        rows = cast(self.logits.reshape(-1, shape[2]), self.dtype)
        return rows.reshape(shape)

    def score(self, passage: int, tokens: list[int]) -> float:
        """Return the score of an answer by its definition."""
        logits = self.logits[passage].astype(np.float64)
        exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
        probs = exponentials / exponentials.sum(axis=1, keepdims=True)
        chosen = [*tokens, self.end_id][: len(probs)]
        return float(np.mean([probs[i, token] for i, token in enumerate(chosen)]))


def random_case(rng: Generator, free: bool) -> SlotCase:
    """Draw a ragged case; every kind of passage, constraint and row occurs."""
    vocabulary = int(rng.choice([1, 2, 3, 5, 17, 64, 130]))
    passages, slots = int(rng.integers(0, 4)), int(rng.integers(1, 7))
    end_id = int(rng.integers(vocabulary))
    dtype = str(rng.choice(DTYPES, p=[0.8, 0.1, 0.1]))
    alphabet = random_alphabet(rng, vocabulary, end_id)
    kinds, sequences = [], []
    for _ in range(passages):
        kind = str(rng.choice(["SpanIndex", "SpanIndex", "Trie", "none"]))
        kinds.append("SpanIndex" if kind == "none" and not free else kind)
        count = 1 if kind == "SpanIndex" else int(rng.integers(0, 6))
        sequences.append(random_sequences(rng, count, 10, alphabet))
    rows = random_rows(rng, passages * slots, vocabulary).reshape(passages, slots, vocabulary)
    # Each slot has its own temperature, none takes one token for certain: else many answers have
    # scores that are equal but for rounding, see `test_scores_that_rounding_decides`.
    spread = float(np.std(rows, where=np.isfinite(rows))) if rows.size else 0.0
    rows *= min(1.0, 4.0 / max(spread, 1e-9))
    rows *= (1 + 0.13 * np.arange(slots, dtype=np.float32))[:, None]
    return SlotCase(
        rounded(rows, dtype),
        dtype,
        sequences,
        kinds,
        end_id,
        int(rng.choice([0, 0, 0, 1, min(2, slots), slots])),
        int(rng.choice([1, 1, 2, 3, 8, 50])),
    )


def _first_margin(case: SlotCase, p: int, ours: list[int], theirs: list[int]) -> float:
    """Return the oracle's margin at the first slot in which two greedy answers differ."""
    slots = case.logits.shape[1]
    a, b = [*ours, case.end_id][:slots], [*theirs, case.end_id][:slots]
    i = next(i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)
    return abs(float(case.logits[p, i, a[i]]) - float(case.logits[p, i, b[i]]))


def compare_greedy(case: SlotCase, tally: Tally) -> None:
    arrays = ops.slot_argmax(case.native(), **case.arguments(fastmrc))
    tokens, lengths, scores = (host(array) for array in arrays)
    want = reference.slot_argmax(case.logits, **case.arguments(reference))
    assert tokens.shape == want[0].shape and tokens.dtype == np.int32
    for p in range(len(case.logits)):
        tally.cases += 1
        if lengths[p] == want[1][p] and (tokens[p] == want[0][p]).all():
            assert same_scores(scores[p], want[2][p]), (case, p)
            continue
        assert min(lengths[p], want[1][p]) >= 0, (case, p)
        ours, theirs = tokens[p, : lengths[p]].tolist(), want[0][p, : want[1][p]].tolist()
        margin = _first_margin(case, p, ours, theirs)
        assert margin <= MARGIN, (case, p, ours, theirs, margin)
        tally.near_tie(margin)


def compare_exact(case: SlotCase, tally: Tally) -> None:
    arrays = ops.slot_topk(case.native(), case.k, **case.arguments(fastmrc))
    tokens, lengths, scores = (host(array) for array in arrays)
    want = reference.slot_topk(case.logits, case.k, **case.arguments(reference))
    assert tokens.shape == want[0].shape
    for p in range(len(case.logits)):
        tally.cases += 1
        assert same_scores(scores[p], want[2][p]), (case, p, scores[p], want[2][p])
        different = (tokens[p] != want[0][p]).any(axis=1) | (lengths[p] != want[1][p])
        if not different.any():
            continue
        i = int(different.argmax())
        margin = abs(
            case.score(p, tokens[p, i, : lengths[p, i]].tolist())
            - case.score(p, want[0][p, i, : want[1][p, i]].tolist())
        )
        assert margin <= MARGIN, (case, p, i, margin)
        tally.near_tie(margin)


@pytest.mark.parametrize("cases", COUNTS)
def test_greedy(cases: int) -> None:
    tally, line = count_cases(
        50, cases, lambda rng, t: compare_greedy(random_case(rng, free=True), t)
    )
    print(f"slot_argmax: {line}")
    tally.check()


@pytest.mark.parametrize("cases", COUNTS)
def test_exact(cases: int) -> None:
    tally, line = count_cases(
        51, cases, lambda rng, t: compare_exact(random_case(rng, free=False), t)
    )
    print(f"slot_topk: {line}")
    tally.check()


@pytest.mark.parametrize("kind", ["permuted", "saturated"])
def test_scores_that_rounding_decides(kind: str) -> None:
    """Only the margin can be asked for: with permutations of one row in every slot "ab" and "ba"
    score alike, and in saturated slots what follows adds next to nothing."""
    rng = np.random.default_rng(54)
    tally = Tally()
    while tally.cases < 500:
        case = random_case(rng, free=False)
        if kind == "permuted":
            row = rng.integers(-2, 3, case.logits.shape[2]).astype(np.float32)
            for slot in np.ndindex(case.logits.shape[:2]):
                case.logits[slot] = rng.permutation(row)
        case.logits = rounded(case.logits * np.float32(8 if kind == "saturated" else 1), case.dtype)
        compare_exact(case, tally)


def _spans(passage: list[int], slots: int, least: int) -> set[tuple[int, ...]]:
    """List every span of a passage that fits into the slots."""
    return {
        tuple(passage[i : i + m])
        for i in range(len(passage) + 1)
        for m in range(least, min(slots, len(passage) - i) + 1)
    }


@pytest.mark.parametrize("cases", COUNTS)
def test_exact_is_the_best_of_all_spans(cases: int) -> None:
    """Against brute force: every span of the passage, scored by its definition."""

    def compare(rng: Generator, tally: Tally) -> None:
        case = random_case(rng, free=False)
        case.kinds = ["SpanIndex"] * len(case.kinds)
        case.sequences = [sequences[:1] or [[]] for sequences in case.sequences]
        arrays = ops.slot_topk(case.native(), 1, **case.arguments(fastmrc))
        tokens, lengths, scores = (host(array)[:, 0] for array in arrays)
        for p in range(len(case.logits)):
            tally.cases += 1
            spans = _spans(case.sequences[p][0], case.logits.shape[1], case.min_tokens)
            if not spans:
                assert lengths[p] == -1 and scores[p] == -np.inf
                continue
            ours = tuple(tokens[p, : lengths[p]].tolist())
            assert ours in spans
            best = max(case.score(p, list(span)) for span in spans)
            assert same_scores(scores[p], best), (case, p)
            assert abs(case.score(p, list(ours)) - best) <= MARGIN

    tally, line = count_cases(52, cases, compare)
    print(f"slot_topk against all spans: {line}")
    assert tally.cases >= cases


def test_cases_reach_every_corner() -> None:
    rng = np.random.default_rng(53)
    seen: set[str] = set()
    for _ in range(2_000):
        case = random_case(rng, free=True)
        tokens, lengths, scores = reference.slot_argmax(case.logits, **case.arguments(reference))
        slots = case.logits.shape[1]
        for p, length in enumerate(lengths.tolist()):
            seen |= {case.kinds[p], case.dtype}
            seen |= {
                name
                for name, holds in {
                    "no answer": length == -1,
                    "empty": length == 0,
                    "one token": length == 1,
                    "all slots": length == slots > 1,
                    "empty passage": case.sequences[p] == [[]],
                    "masked": scores[p] == 0,
                    "minimum": 0 < case.min_tokens <= length,
                    "one slot": slots == 1 == length,
                }.items()
                if holds
            }
        seen |= {"no passages"} if len(case.logits) == 0 else set()
    expected = {"SpanIndex", "Trie", "none", *DTYPES, "no answer", "empty", "one token"}
    expected |= {"all slots", "empty passage", "masked", "minimum", "one slot", "no passages"}
    assert not expected - seen


def _one_hot(slots: int, vocabulary: int, choices: list[dict[int, float]]) -> NDArray[np.float32]:
    """Return logits [1, slots, V] of rows with these probabilities, the rest spread evenly."""
    rows = np.zeros((slots, vocabulary))
    for row, given in zip(rows, choices, strict=True):
        row[:] = (1 - sum(given.values())) / (vocabulary - len(given))
        for token, p in given.items():
            row[token] = p
    return np.log(rows)[None].astype(np.float32)


def test_exact_finds_what_greedy_misses() -> None:
    """Greedy takes 5 (0.4) and is left with 6 (0.05); 7 8 has (0.3 + 0.9 + 0.9) / 3."""
    logits = _one_hot(3, 10, [{5: 0.4, 7: 0.3}, {8: 0.9, 6: 0.05, 1: 0.01}, {1: 0.9}])
    index = fastmrc.SpanIndex([[5, 6, 7, 8]])
    greedy = ops.slot_argmax(logits, end_id=1, constraint=index)
    assert greedy[0][0].tolist() == [5, 6, -1]
    assert greedy[2][0] == pytest.approx((0.4 + 0.05 + 0.9) / 3, abs=1e-6)
    tokens, lengths, scores = ops.slot_topk(logits, 2, end_id=1, constraint=index)
    assert tokens[0, 0].tolist() == [7, 8, -1] and lengths[0, 0] == 2
    assert scores[0, 0] == pytest.approx((0.3 + 0.9 + 0.9) / 3, abs=1e-6)


def test_the_score_is_the_mean_of_the_chosen_probabilities() -> None:
    logits = _one_hot(3, 6, [{4: 0.5}, {5: 0.25, 0: 0.15}, {0: 0.75}])
    index = fastmrc.SpanIndex([[4, 5, 3]])
    tokens, lengths, scores = ops.slot_argmax(logits, end_id=0, constraint=index)
    assert (tokens[0].tolist(), lengths[0]) == ([4, 5, -1], 2)
    assert scores[0] == pytest.approx((0.5 + 0.25 + 0.75) / 3, abs=1e-6)
    shorter = ops.slot_argmax(logits[:, :2], end_id=0, constraint=index)
    assert shorter[0][0].tolist() == [4, 5] and shorter[1][0] == 2
    assert shorter[2][0] == pytest.approx((0.5 + 0.25) / 2, abs=1e-6)


def test_ties_go_to_the_lower_token() -> None:
    logits = np.zeros((1, 3, 9), dtype=np.float32)
    index = fastmrc.SpanIndex([[7, 5, 6, 5, 4]])
    for end_id, want in ((8, [4]), (0, [])):
        tokens, lengths, _ = ops.slot_argmax(logits, end_id=end_id, constraint=index)
        assert tokens[0, : lengths[0]].tolist() == want
    tokens, lengths, scores = ops.slot_topk(logits, 4, end_id=8, constraint=index)
    assert (scores == scores[0, 0]).all()  # the mean of equal probabilities
    answers = [tokens[0, i, : lengths[0, i]].tolist() for i in range(4)]
    assert answers == [[], [4], [5], [5, 4]]


def test_rows_behind_the_end_are_not_read() -> None:
    logits = _one_hot(3, 6, [{4: 0.5}, {0: 0.9}, {0: 0.75}])
    logits[0, 2] = np.nan
    index = fastmrc.SpanIndex([[4, 5, 3]])
    assert ops.slot_argmax(logits, end_id=0, constraint=index)[1][0] == 1
    with pytest.raises(
        ValueError, match="logits: expected numbers below infinity, got NaN in row 2"
    ):
        ops.slot_topk(logits, 1, end_id=0, constraint=index)


def test_torch_in_torch_out() -> None:
    logits = torch.randn(2, 3, 7, requires_grad=True)
    for result in (
        ops.slot_argmax(logits, end_id=0),
        ops.slot_topk(logits, 2, end_id=0, constraint=fastmrc.Trie([[1, 2], [3]])),
    ):
        assert all(isinstance(array, torch.Tensor) for array in result)
    before = logits.detach().clone()
    ops.slot_argmax(logits.bfloat16(), end_id=0)
    assert torch.equal(before, logits)


@pytest.mark.parametrize("side", [ops, reference])
@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"logits": np.zeros((2, 5), np.float32)}, ValueError, "logits: expected"),
        ({"logits": [[1.0]]}, ValueError, "logits: expected"),
        ({"logits": np.zeros((1, 2, 5))}, TypeError, "logits: expected float32"),
        ({"logits": np.zeros((1, 0, 5), np.float32)}, ValueError, "logits: expected at least one"),
        (
            {"logits": np.full((1, 2, 5), np.nan, np.float32)},
            ValueError,
            "logits: .*NaN.* in row 0",
        ),
        (
            {"logits": np.full((1, 2, 5), np.inf, np.float32)},
            ValueError,
            "logits: .*inf.* in row 0",
        ),
        ({"logits": np.full((1, 2, 5), -np.inf, np.float32)}, ValueError, "only -inf.* in row 0"),
        ({"end_id": 5}, ValueError, "end_id: expected"),
        ({"end_id": -1}, ValueError, "end_id: expected"),
        ({"min_tokens": 3}, ValueError, "min_tokens: expected"),
        ({"min_tokens": -1}, ValueError, "min_tokens: expected"),
        ({"sequences": [[4, 9]]}, ValueError, "constraint: expected tokens below the vocabulary"),
        ({"sequences": [[0, 1]]}, ValueError, "constraint: expected no .*end token 0"),
    ],
)
@pytest.mark.parametrize("exact", [False, True])
def test_bad_input(
    side: Any, change: dict[str, Any], kind: type[Exception], message: str, exact: bool
) -> None:
    module = fastmrc if side is ops else reference
    given = {"logits": np.zeros((1, 2, 5), np.float32), "end_id": 0, "sequences": [[1]]} | change
    logits = given.pop("logits")
    given["constraint"] = module.SpanIndex(given.pop("sequences"))
    with pytest.raises(kind, match=message):
        if exact:
            side.slot_topk(logits, 1, **given)
        else:
            side.slot_argmax(logits, **given)


@pytest.mark.parametrize("side", [ops, reference])
def test_bad_constraints(side: Any) -> None:
    module = fastmrc if side is ops else reference
    logits = np.zeros((2, 2, 5), np.float32)
    with pytest.raises(ValueError, match="constraint: expected"):
        side.slot_argmax(logits, end_id=0, constraint=[module.SpanIndex([[1]])])
    with pytest.raises(ValueError, match="constraint: expected one per passage"):
        side.slot_topk(logits, 1, end_id=0, constraint=None)
    with pytest.raises(ValueError, match="k: expected at least 1, got 0"):
        side.slot_topk(logits, 0, end_id=0, constraint=module.SpanIndex([[1]]))


@pytest.mark.parametrize("side", [ops, reference])
def test_logits_decide_where_probabilities_underflow(side: Any) -> None:
    logits = np.array([[[0, -1000, -900, -2000], [0, 0, 0, 9]]], dtype=np.float32)
    module = fastmrc if side is ops else reference
    index = module.SpanIndex([[1], [2]])
    tokens, _, _ = side.slot_argmax(logits, end_id=3, constraint=index, min_tokens=1)
    assert tokens[0].tolist() == [2, -1]
