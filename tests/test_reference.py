"""The reference against answers worked out by hand and against brute force."""

from __future__ import annotations

import copy
import itertools
import math
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from fastmrc.errors import InputError, UnsupportedModelError
from fastmrc.reference import (
    SpanIndex,
    Trie,
    beam_search,
    beam_step,
    log_softmax_topk,
    row_stats,
    topk,
)
from fastmrc.types import SearchResult

END = 0
EPS = 1e-12

# Two passages over a vocabulary of four, and what each vote makes of them.
HALVES = [[0.5, 0.25, 0.125, 0.125], [0.25, 0.25, 0.25, 0.25]]
VOTES = {
    "original": [0.3125 / 1.75, 0.125 / 1.5, 0.078125 / 1.375, 0.078125 / 1.375],
    "mean": [0.375, 0.25, 0.1875, 0.1875],
    "max": [0.5, 0.25, 0.25, 0.25],
    "product": [math.sqrt(0.125), 0.25, math.sqrt(0.03125), math.sqrt(0.03125)],
    "weighted": [0.5625 / 2.25, 0.1875 / 1.75, 0.09375 / 1.5, 0.09375 / 1.5],
}


def log32(probs: Any) -> NDArray[np.float32]:
    with np.errstate(divide="ignore"):
        return np.log(np.asarray(probs, dtype=np.float64)).astype(np.float32)


class Table:
    """A `next_logits` that looks up probabilities; an unknown prefix is a uniform row."""

    def __init__(self, rows: Mapping[Any, Any], vocabulary: int) -> None:
        self.rows, self.vocabulary = rows, vocabulary
        self.calls: list[tuple[list[list[int]], list[int]]] = []

    def __call__(self, prefixes: list[list[int]], passage_ids: list[int]) -> NDArray[np.float64]:
        self.calls.append((prefixes, passage_ids))
        uniform = np.full(self.vocabulary, 1.0 / self.vocabulary)
        with np.errstate(divide="ignore"):
            return np.log([[self._row(y, p, uniform) for y in prefixes] for p in passage_ids])

    def _row(self, prefix: list[int], passage: int, default: Any) -> Any:
        rows = self.rows.get(tuple(prefix))
        return default if rows is None else rows[passage]


def random_table(seed: int, vocabulary: int, sharpness: float = 2.0) -> Callable[..., Any]:
    """Logits that depend on prefix and passage only, by a seeded generator."""

    def next_logits(prefixes: list[list[int]], passage_ids: list[int]) -> NDArray[np.float32]:
        return np.array(
            [
                [
                    np.random.default_rng([seed, p, len(y), *y]).normal(size=vocabulary) * sharpness
                    for y in prefixes
                ]
                for p in passage_ids
            ],
            dtype=np.float32,
        )

    return next_logits


def tokens_of(result: SearchResult) -> list[list[int]]:
    return [h.token_ids for h in result.hypotheses]


def scores_of(result: SearchResult) -> list[float]:
    return [h.score for h in result.hypotheses]


# --- top-k and row statistics -------------------------------------------------------------------


def test_topk_orders_ties_by_id_and_pads() -> None:
    x = np.array([[1, 3, 3, -np.inf], [-np.inf] * 4], dtype=np.float32)
    values, ids = topk(x, 5)
    assert ids.tolist() == [[1, 2, 0, -1, -1], [-1] * 5]
    assert values.tolist() == [[3, 3, 1, -np.inf, -np.inf], [-np.inf] * 5]
    assert (values.dtype, ids.dtype) == (np.float32, np.int32)


def test_topk_keeps_plus_infinity_and_half_precision() -> None:
    values, ids = topk(np.array([1, np.inf, 2], dtype=np.float16), 2)
    assert ids.tolist() == [1, 2]
    assert values.tolist() == [np.inf, 2.0]


def test_log_softmax_topk_by_hand() -> None:
    x = log32([[0.5, 0.25, 0.25, 0.0]]) + np.float32(3.0)
    log_probs, ids = log_softmax_topk(x, 4)
    assert ids.tolist() == [[0, 1, 2, -1]]
    assert log_probs[0, :3] == pytest.approx(np.log([0.5, 0.25, 0.25]), abs=1e-6)
    assert log_probs[0, 3] == -np.inf


def test_row_stats_by_hand() -> None:
    x = np.array([[0, 0], [-np.inf, -np.inf], [-1000, -1001]], dtype=np.float32)
    largest, argmax, logsumexp = row_stats(x)
    assert largest.tolist() == [0, -np.inf, -1000]
    assert argmax.tolist() == [0, -1, 0]
    expected = [math.log(2), -np.inf, -1000 + math.log1p(math.exp(-1))]
    assert logsumexp == pytest.approx(expected, abs=1e-12)
    assert (largest.dtype, argmax.dtype, logsumexp.dtype) == (np.float32, np.int32, np.float64)


def test_vectors_lose_the_row_dimension() -> None:
    x = np.array([1, 2], dtype=np.float32)
    assert [a.shape for a in topk(x, 3)] == [(3,), (3,)]
    assert [a.shape for a in row_stats(x)] == [(), (), ()]


def test_torch_in_torch_out() -> None:
    torch = pytest.importorskip("torch")
    x = torch.tensor([[1.0, 3.0, 3.0]], dtype=torch.bfloat16, requires_grad=True)
    values, ids = topk(x, 2)
    assert (values.dtype, ids.dtype) == (torch.float32, torch.int32)
    assert ids.tolist() == [[1, 2]]
    logsumexp = row_stats(x)[2]
    assert logsumexp.dtype == torch.float64
    assert logsumexp.item() == pytest.approx(math.log(math.e + 2 * math.e**3))
    found = beam_step(
        x, torch.zeros(1), passages=1, hypotheses=1, beam_size=1, end_id=0, states=torch.tensor([0])
    )
    assert [type(a) for a in found] == [torch.Tensor] * 3


@pytest.mark.parametrize("function", [lambda x: topk(x, 1), lambda x: log_softmax_topk(x, 1)])
def test_nan_names_its_row(function: Callable[[Any], Any]) -> None:
    with pytest.raises(InputError, match="x: .*NaN.*row 1"):
        function(np.array([[1, 2], [np.nan, 3]], dtype=np.float32))


@pytest.mark.parametrize(
    ("x", "k", "error", "message"),
    [
        (np.zeros((1, 2), np.float32), 0, InputError, "k: expected at least 1, got 0"),
        (np.zeros((1, 2), np.float32), 1.0, TypeError, "k: expected an integer, got float"),
        (np.zeros((1, 2), np.float64), 1, TypeError, "x: expected float32.*got float64"),
        (np.zeros((1, 2, 3), np.float32), 1, InputError, "x: expected 1 or 2 dimensions, got 3"),
        (np.zeros((2, 0), np.float32), 1, InputError, "x: expected at least one column"),
        ([[1.0]], 1, TypeError, "x: expected a NumPy array or torch tensor, got list"),
    ],
)
def test_topk_refuses(x: Any, k: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        topk(x, k)


def test_row_stats_refuses_plus_infinity() -> None:
    with pytest.raises(InputError, match=r"x: .*\+inf.*row 0"):
        row_stats(np.array([[np.inf, 0]], dtype=np.float32))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.sampled_from([-np.inf, -1.5, 0.0, 0.25, 7.0]), min_size=1, max_size=12),
    st.integers(1, 15),
)
def test_topk_is_a_sort(row: list[float], k: int) -> None:
    values, ids = topk(np.array([row], dtype=np.float32), k)
    best = sorted((-x, i) for i, x in enumerate(row) if x > -np.inf)[:k]
    padding = k - len(best)
    assert ids[0].tolist() == [i for _, i in best] + [-1] * padding
    assert values[0].tolist() == [-x for x, _ in best] + [-np.inf] * padding


# --- one step -----------------------------------------------------------------------------------


@pytest.mark.parametrize("vote", list(VOTES))
def test_votes_by_hand(vote: Any) -> None:
    weights = np.array([2, 1], dtype=np.float32) if vote == "weighted" else None
    scores, tokens, parents = beam_step(
        log32(HALVES),
        np.array([-1.0], dtype=np.float32),
        passages=2,
        hypotheses=1,
        beam_size=5,
        end_id=END,
        vote=vote,
        weights=weights,
    )
    by_token = dict(zip(tokens[0].tolist(), scores[0].tolist(), strict=True))
    assert by_token.pop(-1) == -np.inf
    expected = {v: -1.0 + math.log(s + EPS) for v, s in enumerate(VOTES[vote])}
    assert by_token == pytest.approx(expected, abs=2e-6)
    assert parents.tolist() == [[0, 0, 0, 0, -1]]
    assert (scores.dtype, tokens.dtype, parents.dtype) == (np.float32, np.int32, np.int32)


def test_a_vote_of_zero_is_log_eps() -> None:
    votes: tuple[Any, ...] = ("original", "mean", "max")
    for vote in votes:
        scores, tokens, _ = beam_step(
            log32([[1.0, 0.0]]),
            [0.0],
            passages=1,
            hypotheses=1,
            beam_size=2,
            end_id=END,
            vote=vote,
        )
        assert tokens.tolist() == [[0, 1]]
        assert scores[0, 1] == np.float32(math.log(EPS))


def test_ties_go_to_lower_token_then_lower_parent() -> None:
    scores, tokens, parents = beam_step(
        np.zeros((3, 4), np.float32),
        np.array([-2.0, -1.0, -1.0], dtype=np.float32),
        passages=1,
        hypotheses=3,
        beam_size=9,
        end_id=END,
    )
    assert tokens.tolist() == [[0, 0, 1, 1, 2, 2, 3, 3, 0]]
    assert parents.tolist() == [[1, 2, 1, 2, 1, 2, 1, 2, 0]]
    assert len(set(scores[0, :8].tolist())) == 1


def test_a_tie_is_equality_of_float32_scores() -> None:
    # The votes differ in float64; added to -1000, the scores are the same float32.
    logits = np.array([[0.0, 1e-6, 2e-6]], dtype=np.float32)
    near = beam_step(logits, [0.0], passages=1, hypotheses=1, beam_size=3, end_id=END)
    far = beam_step(logits, [-1000.0], passages=1, hypotheses=1, beam_size=3, end_id=END)
    assert near[1].tolist() == [[2, 1, 0]]
    assert far[1].tolist() == [[0, 1, 2]]


def test_ragged_step_equals_single_steps() -> None:
    rng = np.random.default_rng(7)
    passages, hypotheses, vocabulary = [2, 1, 3, 1], [1, 3, 0, 2], 6
    blocks = [
        rng.normal(size=(n * k, vocabulary)).astype(np.float32)
        for n, k in zip(passages, hypotheses, strict=True)
    ]
    scores = [rng.normal(size=k).astype(np.float32) for k in hypotheses]
    weights = [rng.random(n).astype(np.float32) for n in passages]
    constraints = [Trie([[1, 2], [3]]), None, None, SpanIndex([[5, 4, 5]])]
    states = [[0], [0, 0, 0], [], [0, -1]]
    allow_end = [True, False, True, True]
    common: dict[str, Any] = {"beam_size": 4, "end_id": END, "vote": "weighted"}
    together = beam_step(
        np.concatenate(blocks),
        np.concatenate(scores),
        passages=passages,
        hypotheses=np.array(hypotheses),
        weights=np.concatenate(weights),
        constraint=constraints,
        states=np.concatenate(states).astype(np.int32),
        allow_end=allow_end,
        **common,
    )
    for q in (0, 1, 3):
        alone = beam_step(
            blocks[q],
            scores[q],
            passages=passages[q],
            hypotheses=hypotheses[q],
            weights=weights[q],
            constraint=constraints[q],
            states=states[q],
            allow_end=allow_end[q],
            **common,
        )
        for whole, part in zip(together, alone, strict=True):
            assert whole[q].tolist() == part[0].tolist()
    assert together[1][2].tolist() == [-1] * 4
    assert sorted(together[1][0].tolist()) == [-1, -1, 1, 3]  # the root is not final
    assert END not in together[1][1]
    assert sorted(together[1][3].tolist()) == [-1, 0, 4, 5]
    assert set(together[2][3].tolist()) == {-1, 0}  # the dead state has no continuation


def test_rows_run_over_passages_then_hypotheses() -> None:
    # Hypothesis 0 wants token 1 in both passages, hypothesis 1 wants token 2.
    one, two = [0.1, 0.8, 0.1], [0.1, 0.1, 0.8]
    _, tokens, parents = beam_step(
        log32([one, two, one, two]),
        [0.0, 0.0],
        passages=2,
        hypotheses=2,
        beam_size=2,
        end_id=END,
    )
    assert tokens.tolist() == [[1, 2]]
    assert parents.tolist() == [[0, 1]]


def test_dead_scores_have_no_continuation() -> None:
    _, tokens, parents = beam_step(
        np.zeros((2, 2), np.float32),
        np.array([-np.inf, 0], dtype=np.float32),
        passages=1,
        hypotheses=2,
        beam_size=3,
        end_id=END,
    )
    assert tokens.tolist() == [[0, 1, -1]]
    assert parents.tolist() == [[1, 1, -1]]


def step(**changes: Any) -> Any:
    arguments: dict[str, Any] = {
        "logits": np.zeros((4, 3), np.float32),
        "scores": np.zeros(2, np.float32),
        "passages": 2,
        "hypotheses": 2,
        "beam_size": 2,
        "end_id": END,
    }
    arguments.update(changes)
    return beam_step(arguments.pop("logits"), arguments.pop("scores"), **arguments)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"logits": np.zeros((5, 3), np.float32)}, "logits: expected 4 rows.*got 5"),
        ({"logits": np.zeros(3, np.float32)}, "logits: expected 2 dimensions, got 1"),
        ({"scores": np.zeros(3, np.float32)}, "scores: expected a multiple of hypotheses=2, got 3"),
        ({"scores": np.array([0, np.nan], np.float32)}, "scores: expected no NaN"),
        ({"hypotheses": [1, 2]}, "scores: expected 3, the sum of hypotheses, got 2"),
        ({"hypotheses": -1}, "hypotheses: expected at least 0, got -1"),
        ({"hypotheses": [2], "passages": [1, 1]}, "passages: expected as many as hypotheses"),
        ({"passages": [0], "hypotheses": [2]}, "passages: expected at least 1 where"),
        ({"beam_size": 0}, "beam_size: expected at least 1, got 0"),
        ({"end_id": 3}, "end_id: expected at most 2, got 3"),
        ({"vote": "median"}, "vote: expected one of original.*got 'median'"),
        ({"vote": "weighted"}, "weights: expected one weight per passage.*got None"),
        ({"vote": "weighted", "weights": [1.0]}, "weights: expected 2 entries, got 1"),
        ({"vote": "weighted", "weights": [1.0, -1.0]}, "weights: expected finite weights"),
        ({"weights": [1.0, 1.0]}, "weights: expected None with vote='original'"),
        ({"constraint": [None, None]}, "constraint: expected one for each of 1 questions, got 2"),
        ({"constraint": Trie([[1, 3]]), "states": [1, 0]}, "constraint: .*below.* size 3, got 3"),
        ({"constraint": SpanIndex([[1, END]]), "states": [1, 0]}, "states.0.: expected -1 to 0"),
        ({"constraint": SpanIndex([[END]])}, "constraint: expected no edge with the end token 0"),
        ({"states": [0]}, "states: expected 2 entries, got 1"),
        ({"allow_end": [True, False]}, "allow_end: expected 1 entries"),
        (
            {"logits": np.array([[0, 1], [0, 1], [0, np.nan], [0, 1]], np.float32)},
            "logits: .*NaN.*row 2",
        ),
        (
            {"logits": np.array([[0, 1], [0, np.inf], [0, 1], [0, 1]], np.float32)},
            r"logits: .*\+inf.*row 1",
        ),
        (
            {"logits": np.array([[0, 1]] * 3 + [[-np.inf] * 2], np.float32)},
            "logits: .*only -inf.*row 3",
        ),
    ],
)
def test_beam_step_refuses_values(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        step(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scores": np.zeros(2)}, "scores: expected float32, got float64"),
        ({"logits": np.zeros((4, 3), np.int32)}, "logits: expected float32.*got int32"),
        ({"passages": 2.0}, "passages: expected an integer, got float"),
        ({"beam_size": True}, "beam_size: expected an integer, got bool"),
        ({"states": [0.0, 1.0]}, "states: expected integers, got float64"),
        ({"allow_end": 1}, "allow_end: expected bool, got int"),
    ],
)
def test_beam_step_refuses_types(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        step(**changes)


def test_inputs_are_not_modified() -> None:
    logits = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
    scores = np.zeros(2, np.float32)
    logits.setflags(write=False)
    scores.setflags(write=False)
    step(logits=logits, scores=scores)
    log_softmax_topk(logits, 2)


# --- the search ---------------------------------------------------------------------------------


def test_a_passage_that_ends_at_once_leaves() -> None:
    # Passage 0 prefers the end token (lowest id of a tie); only passage 1 holds token 1.
    table = Table({(): [[0.4, 0.2, 0.4], [0.2, 0.5, 0.3]], (1,): [None, [0.8, 0.1, 0.1]]}, 3)
    result = beam_search(table, [[2, 2], [1]], end_id=END, beam_size=1)
    assert result.surviving == [False, True]
    assert result.best is not None
    assert (result.best.token_ids, result.best.finished) == ([1], True)
    expected = math.log(0.25 / 1.5) + math.log(0.64 / 1.8)
    assert result.best.score == pytest.approx(expected, abs=1e-6)
    assert table.calls == [([[]], [0, 1]), ([[1]], [1])]


def test_tokens_of_a_passage_that_left_are_not_allowed() -> None:
    table = Table({(): [[0.6, 0.2, 0.2], [0.1, 0.2, 0.7]]}, 3)
    result = beam_search(table, [[2], [1]], end_id=END, beam_size=3, max_tokens=1)
    assert tokens_of(result) == [[1], []]


def test_no_survivor_is_no_answer() -> None:
    table = Table({(): [[0.6, 0.4]]}, 2)
    finishes: tuple[Any, ...] = ("original", "pool")
    for finish in finishes:
        result = beam_search(table, [[1]], end_id=END, finish=finish)
        assert result == SearchResult(None, [], [False], [False], [pytest.approx(0.6)])
    assert beam_search(table, [], end_id=END) == SearchResult(None, [], [], [], [])


def test_leaving_comes_before_min_tokens_and_constraint() -> None:
    table = Table({(): [[0.6, 0.4]]}, 2)
    result = beam_search(table, [[1]], end_id=END, min_tokens=1, constraint=Trie([[1]]))
    assert result == SearchResult(None, [], [False], [False], [pytest.approx(0.6)])


def test_the_vote_may_end_at_once() -> None:
    # No passage has the end token first, but the vote has.
    table = Table({(): [[0.45, 0.55, 0.0, 0.0], [0.45, 0.0, 0.55, 0.0], [0.45, 0.0, 0.0, 0.55]]}, 4)
    result = beam_search(table, [[1], [2], [3]], end_id=END, beam_size=2)
    assert result.surviving == [True] * 3
    assert result.best is not None
    assert (result.best.token_ids, result.best.finished) == ([], True)
    assert result.best.score == pytest.approx(math.log(3 * 0.45**2 / 2.35), abs=1e-6)
    assert tokens_of(result) == [[], [1]]  # of the equal 1, 2 and 3 the lowest token


def test_passages_vote_on_spans_of_other_passages() -> None:
    # Only passage 1 continues token 1 with 2, yet both vote on it.
    rows = {(): [[0.1, 0.9, 0.0], [0.1, 0.9, 0.0]], (1,): [[0.1, 0.1, 0.8], [0.3, 0.1, 0.6]]}
    result = beam_search(Table(rows, 3), [[1], [1, 2]], end_id=END, beam_size=1, max_tokens=2)
    assert result.best is not None
    assert (result.best.token_ids, result.best.finished) == ([1, 2], False)
    expected = math.log(1.62 / 2.8) + math.log((0.64 + 0.36) / 2.4)
    assert result.best.score == pytest.approx(expected, abs=1e-6)


def test_spans_do_not_cross_passages() -> None:
    rows = {(): [[0.1, 0.9, 0.0]] * 2, (1,): [[0.05, 0.05, 0.9]] * 2}
    result = beam_search(Table(rows, 3), [[1], [2]], end_id=END, beam_size=1)
    assert result.best is not None and result.best.token_ids == [1]
    free = beam_search(
        Table(rows, 3), [[1], [2]], end_id=END, beam_size=1, mode="generative", max_tokens=2
    )
    assert free.best is not None and free.best.token_ids == [1, 2]


def test_ended_hypotheses_leave_and_the_beam_shrinks() -> None:
    # Step 0 keeps 1, the end and 2; the end is not the best, so the beam shrinks to two.
    rows = {
        (): [[0.3, 0.4, 0.2, 0.1]],
        (1,): [[0.2, 0.1, 0.1, 0.6]],
        (2,): [[0.9, 0.0, 0.0, 0.1]],
        (1, 3): [[0.9, 0.1, 0.0, 0.0]],
    }
    table = Table(rows, 4)
    result = beam_search(table, [[1]], end_id=END, beam_size=3, mode="generative")

    def vote(p: float) -> float:
        return math.log(p * p / (1 + p))

    # Step 1: (1,3) 0.4 * 0.6 before (2,end); step 2: (1,3,end) is the best.
    assert [c[0] for c in table.calls] == [[[]], [[1], [2]], [[1, 3]]]
    assert result.best is not None
    assert result.best.token_ids == [1, 3]
    assert result.best.finished
    assert result.best.score == pytest.approx(vote(0.4) + vote(0.6) + vote(0.9), abs=1e-6)
    assert tokens_of(result) == [[], [2], [1, 3]]
    expected = [vote(0.3), vote(0.2) + vote(0.9), vote(0.4) + vote(0.6) + vote(0.9)]
    assert scores_of(result) == pytest.approx(expected, abs=1e-6)
    assert all(h.finished for h in result.hypotheses)


def test_the_last_step_returns_the_best_unfinished() -> None:
    rows = {(): [[0.1, 0.5, 0.4]], (1,): [[0.3, 0.1, 0.6]]}
    result = beam_search(Table(rows, 3), [[1, 2]], end_id=END, beam_size=2, max_tokens=2)
    assert result.best is not None
    assert (result.best.token_ids, result.best.finished) == ([1, 2], False)
    assert tokens_of(result) == [[1, 2], [1]]
    assert [h.finished for h in result.hypotheses] == [False, True]


def test_min_tokens_forbids_the_end() -> None:
    rows = {(): [[0.4, 0.6, 0.0]], (1,): [[0.9, 0.05, 0.05]], (1, 2): [[0.9, 0.05, 0.05]]}
    for least, expected in ((0, [1]), (1, [1]), (2, [1, 2])):
        result = beam_search(
            Table(rows, 3), [[1, 2, 1]], end_id=END, beam_size=1, min_tokens=least, max_tokens=3
        )
        assert result.best is not None and result.best.token_ids == expected


def test_an_empty_beam_is_the_empty_answer() -> None:
    # The passage is used up after one token, and the end is not allowed yet.
    rows = {(): [[0.1, 0.9]]}
    finishes: tuple[Any, ...] = ("original", "pool")
    for finish in finishes:
        result = beam_search(
            Table(rows, 2), [[1]], end_id=END, min_tokens=2, max_tokens=4, finish=finish
        )
        assert result == SearchResult(None, [], [True], [True], [pytest.approx(0.1)])


def test_trie_allows_its_sequences_only() -> None:
    rows = {
        (): [[0.1, 0.2, 0.3, 0.4]],
        (1,): [[0.5, 0.1, 0.3, 0.1]],
        (1, 2): [[0.7, 0.1, 0.1, 0.1]],
    }
    trie = Trie([[1, 2], [1, 3, 3]])
    result = beam_search(Table(rows, 4), [[3, 3]], end_id=END, beam_size=2, constraint=trie)
    assert result.best is not None
    assert (result.best.token_ids, result.best.finished) == ([1, 2], True)
    # After [1] the end is likely but not final; [] and [1] never appear.
    assert [1] not in tokens_of(result)
    assert [] not in tokens_of(result)


def test_span_index_as_constraint_equals_extractive_mode() -> None:
    passages = [[1, 2, 3, 1, 4], [2, 3, 3]]
    for seed in range(20):
        table = random_table(seed, 6)
        plain = beam_search(table, passages, end_id=5, max_tokens=4)
        if all(plain.surviving):
            index = SpanIndex(passages)
            assert beam_search(table, [[], []], end_id=5, max_tokens=4, constraint=index) == plain


def test_weights_follow_the_survivors() -> None:
    rows = {(): [[0.9, 0.1, 0.0], [0.0, 0.75, 0.25], [0.0, 0.25, 0.75]]}
    for weights, expected in (([9, 4, 1], [1]), ([9, 1, 4], [2])):
        result = beam_search(
            Table(rows, 3),
            [[1], [1], [2]],
            end_id=END,
            beam_size=1,
            vote="weighted",
            weights=weights,
            max_tokens=1,
        )
        assert result.best is not None and result.best.token_ids == expected
        s = (4 * 0.75**2 + 0.25**2) / (1 + 4 * 0.75 + 0.25)
        assert result.best.score == pytest.approx(math.log(s), abs=1e-6)


def test_literal_mode_fills_the_beam_with_forbidden_tokens() -> None:
    rows = {(): [[0.1, 0.2, 0.3, 0.4]], (1,): [[0.2, 0.1, 0.3, 0.4]]}
    common: dict[str, Any] = {"end_id": END, "beam_size": 4, "max_tokens": 1}
    strict = beam_search(Table(rows, 4), [[1]], **common)
    literal = beam_search(Table(rows, 4), [[1]], literal=True, **common)
    assert tokens_of(strict) == [[1], []]
    assert tokens_of(literal) == [[1], [], [2], [3]]
    assert scores_of(literal)[:2] == scores_of(strict)
    assert scores_of(literal)[2:] == [float(np.float32(math.log(EPS)))] * 2


def test_literal_mode_goes_on_from_forbidden_tokens_to_the_end_only() -> None:
    # With one step more, the forbidden [2] may end by its own probability, or add log(eps).
    rows = {(): [[0.1, 0.9, 0.0]], (1,): [[0.4, 0.3, 0.3]], (2,): [[0.5, 0.4, 0.1]]}
    result = beam_search(
        Table(rows, 3),
        [[1]],
        end_id=END,
        beam_size=4,
        max_tokens=2,
        min_tokens=1,
        literal=True,
    )
    assert result.best is not None and result.best.token_ids == [1]
    assert tokens_of(result) == [[1], [1, 1], [1, 2], [2]]
    start, forbidden = math.log(0.81 / 1.9), math.log(EPS)
    expected = [
        start + math.log(0.16 / 1.4),
        start + forbidden,
        start + forbidden,
        forbidden + math.log(0.25 / 1.5),
    ]
    assert scores_of(result) == pytest.approx(expected, abs=1e-5)


def test_literal_mode_keeps_the_end_out_below_min_tokens() -> None:
    rows = {(): [[0.4, 0.6]]}
    result = beam_search(
        Table(rows, 2),
        [[1]],
        end_id=END,
        beam_size=2,
        max_tokens=1,
        min_tokens=1,
        literal=True,
    )
    assert tokens_of(result) == [[1]]


# The mean of one passage is the probability itself: easy to follow.
POOL_ROWS = {
    (): [[0.35, 0.4, 0.25]],
    (1,): [[0.1, 0.1, 0.8]],
    (2,): [[0.6, 0.2, 0.2]],
    (1, 2): [[0.9, 0.05, 0.05]],
}


@pytest.mark.parametrize(
    ("penalty", "best", "score"),
    [
        (0.0, [], math.log(0.35)),
        (1.0, [1, 2], math.log(0.4 * 0.8 * 0.9) / 3),
        (-1.0, [], math.log(0.35)),
    ],
)
def test_pool_divides_by_the_length_with_end(penalty: float, best: list[int], score: float) -> None:
    result = beam_search(
        Table(POOL_ROWS, 3),
        [[1, 2]],
        end_id=END,
        beam_size=2,
        mode="generative",
        vote="mean",
        finish="pool",
        length_penalty=penalty,
        max_tokens=4,
    )
    assert result.best is not None
    assert result.best.token_ids == best
    assert result.best.score == pytest.approx(score, abs=1e-6)
    assert result.best == result.hypotheses[0]


def test_pool_takes_ended_ones_of_the_first_ranks_only() -> None:
    # The end is third of four candidates: outside of the first K = 2 it is discarded.
    rows = {(): [[0.2, 0.4, 0.3, 0.1]], (1,): [[0.9, 0.1, 0.0, 0.0]], (2,): [[0.9, 0.1, 0.0, 0.0]]}
    table = Table(rows, 4)
    result = beam_search(
        table,
        [[1]],
        end_id=END,
        beam_size=2,
        mode="generative",
        vote="mean",
        finish="pool",
        length_penalty=0.0,
        max_tokens=8,
    )
    assert [c[0] for c in table.calls] == [[[]], [[1], [2]]]  # full pool, nothing can overtake
    assert tokens_of(result) == [[1], [2]]
    assert scores_of(result) == pytest.approx(np.log([0.36, 0.27]), abs=1e-6)


def search_pool(rows: Mapping[Any, Any], vocabulary: int, **changes: Any) -> SearchResult:
    options: dict[str, Any] = {"end_id": END, "mode": "generative", "vote": "mean"}
    return beam_search(Table(rows, vocabulary), [[1]], finish="pool", **options, **changes)


def test_pool_never_takes_a_discarded_end() -> None:
    # The end at once, 0.2, is better than [2] and its end, 0.09, but came third of K = 2.
    rows = {(): [[0.2, 0.4, 0.3, 0.1]], (1,): [[0.9, 0.1, 0.0, 0.0]], (2,): [[0.3, 0.3, 0.2, 0.2]]}
    result = search_pool(rows, 4, beam_size=2, length_penalty=0.0)
    assert tokens_of(result) == [[1], [2]]
    assert scores_of(result) == pytest.approx(np.log([0.36, 0.09]), abs=1e-6)


def test_pool_waits_while_a_longer_answer_may_win() -> None:
    # 0.135 is far behind 0.72 after two tokens, but by the twentieth nothing more is lost.
    last = 20
    certain = {(1, 2) + (1,) * n: [[0.0, 1.0, 0.0]] for n in range(last)}
    rows = {(): [[0.1, 0.9, 0.0]], (1,): [[0.8, 0.05, 0.15]], **certain}
    result = search_pool(rows, 3, beam_size=1, max_tokens=last)
    assert tokens_of(result) == [[1, 2] + [1] * (last - 2)]
    assert scores_of(result) == pytest.approx([math.log(0.135) / last], abs=1e-6)


def test_pool_that_rewards_short_answers_waits_for_the_next_one() -> None:
    rows = {
        (): [[0.1, 0.9, 0.0]],
        (1,): [[0.05, 0.0, 0.95]],
        (1, 2): [[0.99, 0.01, 0.0]],
    }
    result = search_pool(rows, 3, beam_size=2, max_tokens=50, length_penalty=-1.0)
    assert tokens_of(result) == [[1, 2], []]
    expected = [3 * math.log(0.9 * 0.95 * 0.99), math.log(0.1)]
    assert scores_of(result) == pytest.approx(expected, abs=1e-6)


def test_pool_keeps_its_beam_after_an_end() -> None:
    rows = {(): [[0.3, 0.4, 0.2, 0.1]]}
    table = Table(rows, 4)
    beam_search(
        table,
        [[1]],
        end_id=END,
        beam_size=2,
        mode="generative",
        vote="mean",
        finish="pool",
        max_tokens=2,
    )
    assert [c[0] for c in table.calls] == [[[]], [[1], [2]]]


def test_pool_takes_unfinished_ones_at_the_last_step() -> None:
    rows = {(): [[0.1, 0.9]], (1,): [[0.4, 0.6]]}
    result = beam_search(
        Table(rows, 2),
        [[1, 1]],
        end_id=END,
        beam_size=1,
        vote="mean",
        finish="pool",
        max_tokens=2,
    )
    assert tokens_of(result) == [[1, 1]]
    assert result.best is not None and not result.best.finished
    assert result.best.score == pytest.approx(math.log(0.9 * 0.6) / 2, abs=1e-6)


def test_pool_of_equal_scores_keeps_the_earlier() -> None:
    # The tie is exact: all rows are uniform, and a length penalty of 1 levels the lengths.
    result = beam_search(
        Table({(): [[0.2, 0.2, 0.6]], (2,): [[0.5, 0.25, 0.25]]}, 3),
        [[2, 2]],
        end_id=END,
        beam_size=3,
        mode="generative",
        vote="mean",
        finish="pool",
        length_penalty=0.0,
        max_tokens=2,
    )
    assert tokens_of(result)[0] == [2]
    uniform = beam_search(
        lambda prefixes, ids: np.zeros((len(ids), len(prefixes), 3)),
        [[1]],
        end_id=2,
        beam_size=3,
        mode="generative",
        vote="mean",
        finish="pool",
        max_tokens=3,
    )
    # After step 0 the pool holds []; later entries score the same and stay behind it.
    assert uniform.best is not None and uniform.best.token_ids == []


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.lists(st.integers(1, 4), max_size=4), min_size=1, max_size=3),
    st.integers(0, 10**6),
    st.sampled_from(["original", "mean", "max", "product"]),
    st.sampled_from([0.0, 0.6, 1.0, -0.5]),
    st.integers(0, 2),
)
def test_a_wide_pool_is_exhaustive(
    passages: list[list[int]], seed: int, vote: Any, penalty: float, least: int
) -> None:
    """With room for every candidate the pool's best is the best of all spans."""
    table, last, wide = random_table(seed, 5), 3, 64
    result = beam_search(
        table,
        passages,
        end_id=END,
        beam_size=wide,
        vote=vote,
        finish="pool",
        length_penalty=penalty,
        min_tokens=least,
        max_tokens=last,
    )
    ids = [p for p in range(len(passages)) if int(table([[]], [p])[0, 0].argmax()) != END]
    assert result.surviving == [p in ids for p in range(len(passages))]
    if not ids:
        assert result.best is None
        return

    def log_vote(prefix: Sequence[int], token: int) -> float:
        total = [math.fsum(math.exp(x) for x in row) for row in table([list(prefix)], ids)[:, 0]]
        p = [
            math.exp(x) / t
            for x, t in zip(table([list(prefix)], ids)[:, 0, token], total, strict=True)
        ]
        if vote == "original":
            s = math.fsum(x * x for x in p) / (1 + math.fsum(p))
        elif vote == "product":
            s = math.exp(math.fsum(math.log(x + EPS) for x in p) / len(p))
        else:
            s = max(p) if vote == "max" else math.fsum(p) / len(p)
        return math.log(s + EPS)

    spans = {
        tuple(passages[p][i:j])
        for p in ids
        for i in range(len(passages[p]) + 1)
        for j in range(i, len(passages[p]) + 1)
    }
    ended = {s + (END,) for s in spans if least <= len(s) < last}
    finals = ended | {s for s in spans if len(s) == last}
    values = [
        math.fsum(log_vote(y[:i], y[i]) for i in range(len(y))) / len(y) ** penalty for y in finals
    ]
    if not finals:
        assert result.best is None
        return
    assert result.best is not None
    assert result.best.score == pytest.approx(max(values), abs=1e-5)
    found = {(*h.token_ids, END) if h.finished else tuple(h.token_ids) for h in result.hypotheses}
    assert found == finals


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.lists(st.integers(1, 5), max_size=7), min_size=1, max_size=3),
    st.integers(0, 10**6),
    st.integers(1, 4),
    st.sampled_from(["original", "pool"]),
)
def test_answers_are_spans_and_the_beam_keeps_its_size(
    passages: list[list[int]], seed: int, beam_size: int, finish: Any
) -> None:
    result = beam_search(
        random_table(seed, 6),
        passages,
        end_id=END,
        beam_size=beam_size,
        finish=finish,
        max_tokens=5,
    )
    surviving = [x for x, kept in zip(passages, result.surviving, strict=True) if kept]
    index = SpanIndex(surviving)
    assert len(result.hypotheses) <= beam_size
    assert scores_of(result) == sorted(scores_of(result), reverse=True)
    for h in result.hypotheses:
        assert not h.token_ids or len(index.occurrences(h.token_ids))
        assert len(h.token_ids) <= (4 if h.finished else 5)
        assert h.score == float(np.float32(h.score))
    if result.best is not None:
        assert result.best in result.hypotheses


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"beam_size": 0}, "beam_size: expected at least 1"),
        ({"mode": "free"}, "mode: expected one of extractive, generative, got 'free'"),
        ({"vote": "median"}, "vote: expected one of"),
        ({"finish": "late"}, "finish: expected one of original, pool"),
        ({"length_penalty": math.nan}, "length_penalty: expected a finite number"),
        ({"min_tokens": 3, "max_tokens": 2}, "max_tokens: expected at least 3, got 2"),
        ({"max_tokens": 0}, "max_tokens: expected at least 1"),
        ({"end_id": 9}, "end_id: expected less than the vocabulary size 3, got 9"),
        ({"end_id": 1}, r"passages\[0\]: expected no end token 1"),
        ({"passages": [[3]]}, "passages: expected tokens below the vocabulary size 3, got 3"),
        ({"passages": [[-1]]}, r"passages\[0\]\[0\]: expected at least 0, got -1"),
        ({"vote": "weighted", "weights": [1, 2]}, "weights: expected 1 entries, got 2"),
        ({"constraint": Trie([[END]])}, "constraint: expected no edge with the end token"),
        ({"next_logits": lambda y, p: np.zeros((1, 3))}, "next_logits: expected shape .1, 1, V."),
        (
            {"next_logits": lambda y, p: np.full((1, 1, 3), np.nan)},
            "next_logits: .*NaN.*row 0",
        ),
    ],
)
def test_beam_search_refuses(changes: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "next_logits": Table({(): [[0.1, 0.6, 0.3]]}, 3),
        "passages": [[1, 2]],
        "end_id": END,
    }
    arguments.update(changes)
    with pytest.raises(InputError, match=message):
        beam_search(arguments.pop("next_logits"), arguments.pop("passages"), **arguments)


def test_the_end_token_in_a_passage_is_fine_when_not_extracting() -> None:
    table = Table({(): [[0.1, 0.9]]}, 2)
    result = beam_search(table, [[END]], end_id=END, mode="generative", max_tokens=1)
    assert tokens_of(result) == [[1], []]


# --- constraints --------------------------------------------------------------------------------

Sequences = st.lists(st.lists(st.integers(0, 3), max_size=6), max_size=4)


def walk(automaton: SpanIndex | Trie, tokens: Sequence[int]) -> int:
    state = 0
    for token in tokens:
        state = int(automaton.advance([state], [token])[0])
    return state


def allowed_after(automaton: SpanIndex | Trie, state: int) -> list[int]:
    offsets, tokens = automaton.allowed([state])
    assert offsets.dtype == np.int64
    assert tokens.dtype == np.int32
    assert offsets.tolist() == [0, len(tokens)]
    return list(tokens.tolist())


@settings(max_examples=60, deadline=None)
@given(Sequences)
def test_span_index_against_brute_force(passages: list[list[int]]) -> None:
    index = SpanIndex(passages)
    places: dict[tuple[int, ...], list[tuple[int, int]]] = {}
    for p, passage in enumerate(passages):
        for i in range(len(passage)):
            for j in range(i + 1, len(passage) + 1):
                places.setdefault(tuple(passage[i:j]), []).append((p, i))
    assert index.num_edges == len(places)
    assert index.num_states == len(places) + 1
    for length in range(4):
        for span in itertools.product(range(4), repeat=length):
            state = walk(index, span)
            assert (state >= 0) == (span in places or not span)
            assert index.is_final([state]).tolist() == [state >= 0]
            following = [v for v in range(4) if (*span, v) in places]
            assert allowed_after(index, state) == following
            found = index.occurrences(span)
            assert found.dtype == np.int32
            assert [tuple(x) for x in found.tolist()] == places.get(span, [])


@settings(max_examples=60, deadline=None)
@given(Sequences)
def test_trie_against_brute_force(sequences: list[list[int]]) -> None:
    trie = Trie(sequences)
    wanted = {tuple(s) for s in sequences}
    prefixes = {s[:i] for s in wanted for i in range(len(s) + 1)} | {()}
    assert (trie.num_states, trie.num_edges) == (len(prefixes), len(prefixes) - 1)
    for length in range(4):
        for tokens in itertools.product(range(4), repeat=length):
            state = walk(trie, tokens)
            assert (state >= 0) == (tokens in prefixes)
            assert trie.is_final([state]).tolist() == [tokens in wanted]
            following = [v for v in range(4) if (*tokens, v) in prefixes]
            assert allowed_after(trie, state) == following


@pytest.mark.parametrize("automaton", [SpanIndex([[1, 2]]), Trie([[1, 2]])])
def test_automata_work_on_batches(automaton: Any) -> None:
    states = automaton.advance(np.array([0, 0, -1], dtype=np.int32), [1, 3, 1])
    assert states.dtype == np.int32
    assert (states >= 0).tolist() == [True, False, False]
    offsets, tokens = automaton.allowed([-1, 0, states[0]])
    rows = [tokens[a:b].tolist() for a, b in itertools.pairwise(offsets)]
    assert rows[0] == []
    assert 1 in rows[1]
    assert rows[2] == [2]
    assert automaton.is_final(states).dtype == np.bool_
    assert automaton.advance([], []).shape == (0,)
    assert automaton.allowed([])[0].tolist() == [0]


@pytest.mark.parametrize("automaton", [SpanIndex([[1, 2]]), Trie([[1, 2]])])
def test_automata_refuse(automaton: Any) -> None:
    with pytest.raises(InputError, match=r"states\[1\]: expected -1 to \d+, got 99"):
        automaton.allowed([0, 99])
    with pytest.raises(InputError, match=r"states\[0\]: expected -1"):
        automaton.is_final([-2])
    with pytest.raises(InputError, match="tokens: expected 1 entries, got 2"):
        automaton.advance([0], [1, 2])
    with pytest.raises(TypeError, match="tokens: expected integers, got float64"):
        automaton.advance([0], [1.5])
    with pytest.raises(InputError, match=r"\[0\]\[1\]: expected at least 0, got -3"):
        type(automaton)([[1, -3]])
    with pytest.raises(InputError, match=r"\[0\]\[0\]: expected at most 2147483647"):
        type(automaton)([[2**31]])
    with pytest.raises(TypeError, match="expected an integer, got str"):
        type(automaton)([["1"]])
    with pytest.raises(TypeError, match=r"\[0\]: expected token ids, got int"):
        type(automaton)([1, 2])


# --- the re-encoding encoder --------------------------------------------------------------------

SEP = 3


def bert(**changes: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=20,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=32,
        initializer_range=0.3,
        attn_implementation="sdpa",
        **changes,
    )
    return transformers.BertForMaskedLM(config).eval()


def naive_log_probs(model: Any, tokens: list[int], prefix: list[int]) -> Any:
    """The last row of a BERT under the UniLM mask, one query at a time, from its weights.

    `model` is in float64, so that all rounding is the tested one's.
    """
    import torch
    from torch.nn.functional import gelu

    body, heads = model.bert, model.config.num_attention_heads
    ids = tokens + prefix
    answer_type = 1 if model.config.type_vocab_size > 1 else 0
    types = [0] * len(tokens) + [answer_type] * len(prefix)
    embeddings = body.embeddings
    x = torch.stack(
        [
            embeddings.word_embeddings.weight[v]
            + embeddings.position_embeddings.weight[i]
            + embeddings.token_type_embeddings.weight[s]
            for i, (v, s) in enumerate(zip(ids, types, strict=True))
        ]
    )
    x = embeddings.LayerNorm(x)
    for layer in body.encoder.layer:
        own, size = layer.attention.self, x.shape[1] // heads
        q, k, v = own.query(x), own.key(x), own.value(x)
        context = torch.zeros_like(x)
        for i in range(len(ids)):
            visible = range(len(tokens)) if i < len(tokens) else range(i + 1)
            for h in range(heads):
                part = slice(h * size, (h + 1) * size)
                weights = torch.stack([q[i, part] @ k[j, part] for j in visible]) / math.sqrt(size)
                context[i, part] = weights.softmax(0) @ v[: len(visible), part]
        output = layer.attention.output
        x = output.LayerNorm(output.dense(context) + x)
        x = layer.output.LayerNorm(layer.output.dense(gelu(layer.intermediate.dense(x))) + x)
    return model.cls(x)[-1].log_softmax(-1).detach().numpy()


@pytest.mark.parametrize("type_vocab_size", [1, 2])
@pytest.mark.parametrize("batch_rows", [1, 4, 32])
def test_reencoding_equals_a_naive_loop(type_vocab_size: int, batch_rows: int) -> None:
    from fastmrc.reference import ReencodingEncoder

    model = bert(type_vocab_size=type_vocab_size)
    exact = copy.deepcopy(model).double()
    rows = [[1, 5, 6, 7, 8, SEP, 9, SEP], [1, 10, SEP, 9, SEP], [1, 11, 12, SEP, 9, SEP]]
    next_logits = ReencodingEncoder(model, end_id=SEP, batch_rows=batch_rows).next_logits_for(rows)
    calls: list[tuple[list[list[int]], list[int]]] = [
        ([[]], [0, 1, 2]),
        ([[13, 14], [13, 15], [16, 2]], [2, 0]),
    ]
    for prefixes, ids in calls:
        found = next_logits(prefixes, ids)
        assert found.dtype == np.float32
        assert found.shape == (len(ids), len(prefixes), 20)
        expected = [[naive_log_probs(exact, rows[p], y) for y in prefixes] for p in ids]
        np.testing.assert_allclose(found, np.array(expected), atol=2e-5)
        np.testing.assert_allclose(np.exp(found).sum(-1), 1.0, atol=1e-5)


def test_without_a_prefix_it_is_the_plain_model() -> None:
    """The library's own positions and mask, also where positions start after the padding."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from fastmrc.reference import ReencodingEncoder

    torch.manual_seed(0)
    config = transformers.RobertaConfig(
        vocab_size=20,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=12,
        type_vocab_size=1,
        pad_token_id=1,
        initializer_range=0.3,
        attn_implementation="sdpa",
    )
    for model in (bert(), transformers.RobertaForMaskedLM(config).eval()):
        row = [0, 5, 6, SEP, 7, SEP]
        encoder = ReencodingEncoder(model, end_id=SEP)
        found = encoder.next_logits_for([row, [0, *row]])([[]], [0])
        with torch.inference_mode():
            expected = model(torch.tensor([row])).logits[0, -1].log_softmax(-1)
        np.testing.assert_allclose(found[0, 0], expected.numpy(), atol=1e-5)
    with pytest.raises(InputError, match="rows: expected .* at most 10 tokens, got 11"):
        encoder.next_logits_for([row])([[4] * 5], [0])


def test_search_over_the_encoder() -> None:
    from fastmrc.reference import ReencodingEncoder

    model, passages, question = bert(), [[5, 6, 7, 8], [10, 5, 6]], [9]
    rows = [[1, *p, SEP, *question, SEP] for p in passages]
    next_logits = ReencodingEncoder(model, end_id=SEP).next_logits_for(rows)
    result = beam_search(next_logits, passages, end_id=SEP, max_tokens=4, min_tokens=1)
    assert result.best is not None
    index = SpanIndex(passages)
    assert all(len(index.occurrences(h.token_ids)) for h in result.hypotheses)


def test_encoder_refuses() -> None:
    from fastmrc.reference import ReencodingEncoder

    with pytest.raises(UnsupportedModelError, match="model: expected evaluation mode"):
        ReencodingEncoder(bert().train(), end_id=SEP)
    eager = bert()
    eager.set_attn_implementation("eager")
    with pytest.raises(UnsupportedModelError, match="'sdpa', got 'eager'"):
        ReencodingEncoder(eager, end_id=SEP)
    with pytest.raises(UnsupportedModelError, match="expected an encoder"):
        ReencodingEncoder(bert(is_decoder=True), end_id=SEP)
    with pytest.raises(InputError, match="end_id: expected at most 19, got 20"):
        ReencodingEncoder(bert(), end_id=20)
    encoder = ReencodingEncoder(bert(), end_id=SEP)
    with pytest.raises(InputError, match=r"rows\[1\]: expected the end token 3"):
        encoder.next_logits_for([[1, SEP], [1, 2]])
    with pytest.raises(InputError, match="passage_ids: expected at most 0, got 1"):
        encoder.next_logits_for([[1, SEP]])([[]], [1])


def test_the_reference_does_not_import_torch() -> None:
    code = (
        "import sys, fastmrc.reference as r; assert 'torch' not in sys.modules; "
        "r.ReencodingEncoder; assert 'torch' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
