"""The native beam search against the oracle, over logits that are a function of the prefix."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from cases import (
    MARGIN,
    Prefix,
    Question,
    SearchCase,
    TableSource,
    Tally,
    compare_search,
    count_cases,
    random_search,
    score_tolerance,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import fastmrc
from fastmrc import decoding, reference
from fastmrc.options import SearchOptions

COUNTS = [2_000, pytest.param(100_000, marks=pytest.mark.exhaustive)]


@pytest.mark.parametrize("cases", COUNTS)
def test_search(cases: int) -> None:
    tally, line = count_cases(40, cases, lambda rng, t: compare_search(random_search(rng), t))
    print(f"search: {line}")
    tally.check()


def test_cases_reach_every_corner() -> None:
    """The generator is worth nothing if it does not draw what it promises."""
    rng = np.random.default_rng(41)
    seen: set[str] = set()
    for _ in range(600):
        case = random_search(rng)
        for q, result in enumerate(case.native()):
            surviving = result.surviving
            live = [len(prefixes) for prefixes in case.native_traces[q]]
            best = result.best
            seen |= {
                name
                for name, holds in {
                    "no passages": not surviving,
                    "all rejected": bool(surviving) and not any(surviving),
                    "some rejected": any(surviving) and not all(surviving),
                    "outvoted": result.voting != surviving,
                    "no answer from survivors": any(surviving) and best is None,
                    "empty answer": best is not None and not best.token_ids,
                    "one token": best is not None and len(best.token_ids) == 1,
                    "unfinished": best is not None and not best.finished,
                    "empty passage": any(not p for p in case.questions[q].passages),
                    "beam shrinks": any(b < a for a, b in zip(live, live[1:], strict=False)),
                    "beam grows late": any(b > a for a, b in zip(live[1:], live[2:], strict=False)),
                    "equal scores": len({h.score for h in result.hypotheses})
                    < len(result.hypotheses),
                    f"{case.options.finish} {case.options.vote}": best is not None,
                    f"beam {case.options.beam_size}": best is not None,
                    f"penalty {np.sign(case.options.length_penalty)}": best is not None,
                    f"{case.dtype}": best is not None,
                    "minimum": best is not None and case.options.min_answer_tokens > 1,
                    "constraint": bool(case.constraints) and best is not None,
                    "looked ahead": 0 in case.native_widths and best is not None,
                }.items()
                if holds
            }
    expected = {"no passages", "all rejected", "some rejected", "no answer from survivors"}
    expected |= {"outvoted"}
    expected |= {"empty answer", "one token", "unfinished", "empty passage", "beam shrinks"}
    expected |= {"beam grows late", "equal scores", "minimum", "constraint", "looked ahead"}
    expected |= {f"{f} {v}" for f in ("original", "pool") for v in ("original", "mean", "max")}
    expected |= {f"{f} {v}" for f in ("original", "pool") for v in ("product", "weighted")}
    expected |= {f"beam {k}" for k in range(1, 7)} | {f"penalty {s}" for s in (-1.0, 0.0, 1.0)}
    expected |= {"float32", "float16", "bfloat16"}
    assert not expected - seen


def test_the_comparison_sees_a_wrong_search(monkeypatch: pytest.MonkeyPatch) -> None:
    """Errors of the kinds that a search may have must not pass for near-ties."""
    faults: dict[str, Any] = {
        "passage forgotten": lambda case: case.questions[0].first.__setitem__(
            0, np.roll(case.questions[0].first[0], 1)
        ),
        "beam": lambda case: setattr(
            case, "options", replace(case.options, beam_size=case.options.beam_size - 1)
        ),
        "vote": lambda case: setattr(case, "options", replace(case.options, vote="max")),
        "finish": lambda case: setattr(case, "options", replace(case.options, finish="pool")),
        "ratio": lambda case: setattr(
            case,
            "options",
            replace(case.options, no_answer_ratio=None if case.options.no_answer_ratio else 1.0),
        ),
    }
    native = SearchCase.native
    for name, damage in faults.items():
        caught = tried = 0
        for seed in range(300):
            case = random_search(np.random.default_rng([seed, 42]))
            usable = case.options.beam_size > 1 and case.options.vote == "original"
            if not (usable and case.options.finish == "original" and case.questions[0].passages):
                continue

            def damaged(self: SearchCase, damage: Any = damage) -> Any:
                kept = self.options, [q.first.copy() for q in self.questions]
                damage(self)
                try:
                    return native(self)
                finally:
                    self.options = kept[0]
                    for question, first in zip(self.questions, kept[1], strict=True):
                        question.first = first

            tried += 1
            with monkeypatch.context() as patch:
                patch.setattr(SearchCase, "native", damaged)
                try:
                    compare_search(case, Tally())
                except AssertionError:
                    caught += 1
        assert caught >= tried // 8, f"{name}: caught {caught} of {tried}"


def test_the_same_rows_at_every_step() -> None:
    """Scores of "ab" and "ba" differ by rounding alone: only the margin is certain there."""
    tally = Tally()
    rng = np.random.default_rng(43)
    while tally.cases < 500:
        compare_search(random_search(rng, lengths=1), tally)
    print(f"same rows at every step: {tally.cases} cases, {tally.near_ties} near-ties")


@pytest.mark.parametrize("penalty", [-1.0, 0.0, 0.5, 2.0])
def test_when_the_pool_is_settled(penalty: float) -> None:
    """Full pools, live hypotheses that may or may not overtake them."""
    tally = Tally()
    rng = np.random.default_rng(46)
    while tally.cases < 1500:
        case = random_search(rng, vocabulary=4)
        case.constraints, case.oracle_constraints = [], []
        case.options = replace(
            case.options,
            finish="pool",
            mode="generative",
            length_penalty=penalty,
            beam_size=int(rng.integers(1, 4)),
            min_answer_tokens=0,
            max_answer_tokens=6,
        )
        compare_search(case, tally)
    tally.check()


@pytest.mark.parametrize("finish", ["original", "pool"])
@pytest.mark.parametrize("vocabulary", [9000, 21128])
def test_large_vocabulary(vocabulary: int, finish: Any) -> None:
    rng = np.random.default_rng(vocabulary)
    tally = Tally()
    for _ in range(4):
        case = random_search(rng, vocabulary)
        case.options = replace(case.options, finish=finish, beam_size=3)
        compare_search(case, tally)
    tally.check()


def test_batch_equals_singles() -> None:
    rng = np.random.default_rng(44)
    for _ in range(200):
        case = random_search(rng)
        together = case.native()
        alone = [case.native(only=q)[0] for q in range(len(case.questions))]
        assert together == alone  # to the last bit


def test_searches_are_deterministic_and_leave_inputs_alone() -> None:
    rng = np.random.default_rng(45)
    for _ in range(100):
        case = random_search(rng)
        before = [
            (q.first.copy(), q.table.copy(), [*map(list, q.passages)]) for q in case.questions
        ]
        assert case.native() == case.native()
        for question, (first, table, passages) in zip(case.questions, before, strict=True):
            np.testing.assert_array_equal(question.first, first)
            np.testing.assert_array_equal(question.table, table)
            assert question.passages == passages


class Permuted(Question):
    """A question with its passages in another order."""

    def __init__(self, base: Question, order: list[int]) -> None:
        super().__init__([base.passages[p] for p in order], base.table, base.first[order])
        self._base, self._order = base, order

    def row(self, passage: int, prefix: Prefix) -> NDArray[np.float32]:
        return self._base.row(self._order[passage], prefix)


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**32 - 1),
    order=st.permutations(range(4)),
    mode=st.sampled_from(["extractive", "generative"]),
    finish=st.sampled_from(["original", "pool"]),
    vote=st.sampled_from(["original", "mean", "max", "product", "weighted"]),
)
def test_order_of_passages(seed: int, order: list[int], mode: Any, finish: Any, vote: Any) -> None:
    rng = np.random.default_rng(seed)
    base = Question(
        [rng.integers(1, 12, 6).tolist() for _ in range(4)],
        rng.normal(size=(9, 40, 12)).astype(np.float32),
        rng.normal(size=(4, 12)).astype(np.float32),
    )
    weights = rng.random(4)
    options = SearchOptions(beam_size=3, mode=mode, finish=finish, vote=vote, max_answer_tokens=5)
    results = []
    for question, w in ((base, weights), (Permuted(base, order), weights[order])):
        batch = decoding.beam_search(
            TableSource([question], 12),
            [question.passages],
            end_id=0,
            vocabulary_size=12,
            options=options,
            weights=[w.tolist()] if vote == "weighted" else None,
        )
        results.append(batch.results[0])
    one, other = results
    assert [one.surviving[p] for p in order] == other.surviving
    assert [h.token_ids for h in one.hypotheses] == [h.token_ids for h in other.hypotheses]
    for a, b in zip(one.hypotheses, other.hypotheses, strict=True):
        assert abs(a.score - b.score) <= score_tolerance(b.score) < MARGIN * 10


def test_no_questions() -> None:
    batch = decoding.beam_search(
        TableSource([], 5), [], end_id=0, vocabulary_size=5, options=SearchOptions()
    )
    assert batch.results == []


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 2**32 - 1))
def test_answers_are_pieces_of_voters(seed: int) -> None:
    case = random_search(np.random.default_rng(seed))
    if case.constraints or case.options.mode == "generative":
        return
    for question, result in zip(case.questions, case.native(), strict=True):
        kept = [p for p, v in zip(question.passages, result.voting, strict=True) if v]
        index = reference.SpanIndex(kept)
        for hypothesis in result.hypotheses:
            assert not hypothesis.token_ids or len(index.occurrences(hypothesis.token_ids))
            assert len(hypothesis.token_ids) <= case.options.max_answer_tokens
            if hypothesis.finished:
                assert len(hypothesis.token_ids) >= case.options.min_answer_tokens
        assert len(result.hypotheses) <= case.options.beam_size
        scores = [h.score for h in result.hypotheses]
        assert scores == sorted(scores, reverse=True)


# --- what is refused -----------------------------------------------------------------------------


class Fixed:
    """Gives these logits at the first step, zeros later; or the other way round."""

    def __init__(self, first: Any, later: Any = None) -> None:
        self.first, self.later = first, later

    def prefill(self) -> Any:
        return self.first

    def step(self, request: Any) -> Any:
        if self.later is not None:
            return self.later
        return np.zeros((len(request.row_passage), 6), np.float32)


def _search(source: Any = None, passages: Any = None, **changes: Any) -> Any:
    first = np.zeros((2, 6), np.float32)
    first[:, 1] = 1.0
    options = {
        name: changes.pop(name)
        for name in ("beam_size", "vote", "max_answer_tokens", "mode")
        if name in changes
    }
    arguments = {"end_id": 0, "vocabulary_size": 6} | changes
    return decoding.beam_search(
        Fixed(first) if source is None else source,
        [[[1, 2, 3], [2, 1]]] if passages is None else passages,
        options=SearchOptions(**options),
        **arguments,
    )


def test_the_search_of_the_refusals_works() -> None:
    assert _search().results[0].best is not None


def _spoiled(row: int, value: float) -> NDArray[np.float32]:
    rows = np.zeros((2, 6), np.float32)
    rows[row, 3 if np.isnan(value) or value > 0 else slice(None)] = value
    return rows


@pytest.mark.parametrize("first_step", [True, False])
@pytest.mark.parametrize(
    ("value", "message"),
    [(np.nan, "NaN in row 1"), (np.inf, "inf in row 1"), (-np.inf, "only -inf in row 1")],
)
def test_bad_logits(value: float, message: str, first_step: bool) -> None:
    bad = _spoiled(1, value)
    good = np.zeros((2, 6), np.float32)
    good[:, 1] = 1.0
    source = Fixed(bad) if first_step else Fixed(good, bad)
    with pytest.raises(ValueError, match=message):
        _search(source, beam_size=1)


@pytest.mark.parametrize(
    ("logits", "error", "message"),
    [
        (
            np.zeros((3, 6), np.float32),
            ValueError,
            r"logits: expected shape \[2, 6\], got \[3, 6\]",
        ),
        (
            np.zeros((2, 7), np.float32),
            ValueError,
            r"logits: expected shape \[2, 6\], got \[2, 7\]",
        ),
        (np.zeros((2, 6)), TypeError, "logits: expected float32.*got float64"),
        (np.zeros((6, 2), np.float32).T, ValueError, "logits: expected rows that are contiguous"),
        (np.zeros((1, 2, 6), np.float32), ValueError, "logits: expected 1 or 2 dimensions"),
        ([[0.0] * 6] * 2, TypeError, "logits: expected a NumPy array"),
        (None, TypeError, "logits: expected a NumPy array"),
    ],
)
def test_logits_of_another_form(logits: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        _search(Fixed(logits))
    good = np.zeros((2, 6), np.float32)
    good[:, 1] = 1.0
    if logits is not None:
        with pytest.raises(error, match=message):
            _search(Fixed(good, logits), beam_size=1)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"beam_size": 7}, ValueError, "beam_size: expected at most the vocabulary size 6, got 7"),
        ({"end_id": 6}, ValueError, "end_id: expected a token below 6, got 6"),
        ({"end_id": -1}, ValueError, "end_id: expected a token below 6, got -1"),
        ({"vocabulary_size": 0}, ValueError, "vocabulary_size: expected at least 1, got 0"),
        ({"passages": [[[1, 0]]]}, ValueError, "passages: expected tokens.*end token 0, got 0"),
        ({"passages": [[[6]]]}, ValueError, r"passages: expected tokens in \[0, 6\).*got 6"),
        ({"passages": [[[-1]]]}, ValueError, "passages: expected tokens.*got -1"),
        ({"passages": [[["a"]]]}, TypeError, "passages: expected integers"),
        ({"passages": [[1, 2]]}, TypeError, "passages: expected sequences of token ids"),
        ({"weights": [[1.0, 1.0]]}, ValueError, "weights: expected none unless"),
        ({"vote": "weighted"}, ValueError, "weights: expected one per passage, 2, got 0"),
        ({"vote": "weighted", "weights": [[1.0]]}, ValueError, r"weights: .*\[2\], got \[1\]"),
        (
            {"vote": "weighted", "weights": [[1.0], [1.0]]},
            ValueError,
            r"weights: expected one per passage of each question, \[2\], got \[1, 1\]",
        ),
        ({"vote": "weighted", "weights": [[1.0, np.nan]]}, ValueError, "weights: expected finite"),
        ({"vote": "weighted", "weights": [[1.0, -1.0]]}, ValueError, "weights: expected finite"),
        ({"constraints": [None, None]}, ValueError, "constraints: expected one per question, 1"),
        ({"constraints": [reference.Trie([[1]])]}, TypeError, "constraints: expected a fastmrc"),
        ({"constraints": [fastmrc.Trie([[0]])]}, ValueError, "constraint: expected no end token 0"),
        ({"constraints": [fastmrc.Trie([[6]])]}, ValueError, "constraint: expected tokens below"),
    ],
)
def test_search_refuses(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        _search(**changes)


def test_an_error_of_the_source_comes_through() -> None:
    class Broken(Fixed):
        def step(self, request: Any) -> Any:
            raise RuntimeError("lost the encoder")

    first = np.zeros((2, 6), np.float32)
    first[:, 1] = 1.0
    with pytest.raises(RuntimeError, match="lost the encoder"):
        _search(Broken(first))
