"""Random cases for the native kernels and the search, and their comparison with the oracle.

"Equal" is what the design asks for: a different choice counts as a mismatch if the oracle's margin
at the first differing decision is above `MARGIN`; smaller ones are near-ties, which are counted.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, get_args

import numpy as np
import pytest
from numpy.typing import NDArray

import fastmrc
from fastmrc import decoding, ops, reference
from fastmrc.options import SearchOptions, Vote
from fastmrc.reference.ops import allowed_mask, candidate_scores
from fastmrc.types import Hypothesis, SearchResult

MARGIN = 1e-5
VOTES = get_args(Vote)
DTYPES = ("float32", "float16", "bfloat16")

Prefix = tuple[int, ...]
Generator = np.random.Generator


@dataclass
class Tally:
    """Cases that were compared, and the near-ties among them."""

    cases: int = 0
    near_ties: int = 0
    margins: list[float] = field(default_factory=list)

    def near_tie(self, margin: float) -> None:
        self.near_ties += 1
        self.margins.append(margin)

    def check(self) -> None:
        """Refuse more than one near-tie in 10,000 cases."""
        allowed = max(1, self.cases // 10_000)
        assert self.near_ties <= allowed, f"{self.near_ties} near-ties in {self.cases} cases"


def score_tolerance(score: float) -> float:
    """Largest difference of two scores that rounding explains."""
    return 2e-6 + 5e-7 * abs(score)


def same_scores(ours: Any, theirs: Any) -> bool:
    """Compare two arrays of scores within rounding; minus infinity equals itself only."""
    a, b = np.asarray(ours, dtype=np.float64), np.asarray(theirs, dtype=np.float64)
    if a.shape != b.shape or (np.isneginf(a) != np.isneginf(b)).any():
        return False
    finite = ~np.isneginf(a)
    return bool((np.abs(a[finite] - b[finite]) <= 2e-6 + 5e-7 * np.abs(b[finite])).all())


# Where `cast` puts rows: a torch device, whose kernels then get them; None: the host. Set by
# conftest.py for the tests marked "gpu".
device: str | None = None

# Random cases of a property: as a rule, on request, and on a GPU or its emulation.
COUNTS = [
    2_000,
    pytest.param(100_000, marks=pytest.mark.exhaustive),
    pytest.param(
        300 if os.environ.get("FASTMRC_CUDA_EMULATION") else 2_000, marks=pytest.mark.gpu, id="gpu"
    ),
]


def host(array: Any) -> NDArray[Any]:
    """Return a result as a NumPy array."""
    return np.asarray(array if device is None else array.cpu())


def cast(rows: NDArray[np.float32], dtype: str) -> Any:
    """Return the rows in a dtype of the kernels: NumPy, or torch for bfloat16 and on a device."""
    if device is not None:
        import torch

        return torch.from_numpy(rows).to(device=device, dtype=getattr(torch, dtype))
    if dtype == "bfloat16":
        import torch

        return torch.from_numpy(rows).bfloat16()
    return rows.astype(dtype)


def rounded(rows: NDArray[np.float32], dtype: str) -> NDArray[np.float32]:
    """Return the float32 values that the rows have after `cast`."""
    if dtype == "bfloat16":
        import torch

        values: NDArray[np.float32] = torch.from_numpy(rows).bfloat16().float().numpy()
        return values
    return rows.astype(dtype).astype(np.float32)


def random_rows(rng: Generator, rows: int, vocabulary: int) -> NDArray[np.float32]:
    """Draw logits of one of several kinds, most of them with ties; no row is all -inf."""
    kind = rng.integers(7)
    if kind < 2:
        values = rng.normal(size=(rows, vocabulary)) * rng.choice([0.1, 1.0, 4.0, 20.0])
    elif kind == 2:
        values = rng.integers(-2, 3, size=(rows, vocabulary)) * rng.choice([0.5, 1.0, 3.0])
    elif kind == 3:
        values = rng.normal(size=(rows, vocabulary))
        values[rng.random(values.shape) < rng.choice([0.1, 0.6, 0.95])] = -np.inf
        values[np.arange(rows), rng.integers(0, vocabulary, rows)] = 1.0
    elif kind == 4:
        values = np.full((rows, vocabulary), rng.choice([0.0, -3.0, 50.0]))
    elif kind == 5:
        values = rng.normal(size=(rows, vocabulary))
        values[np.arange(rows), rng.integers(0, vocabulary, rows)] += 6.0
    else:  # the same row again and again
        values = np.repeat(rng.normal(size=(1, vocabulary)), rows, axis=0)
    return values.astype(np.float32)


def random_sequences(
    rng: Generator, count: int, longest: int, alphabet: NDArray[np.int64]
) -> list[list[int]]:
    """Draw token sequences; some are empty, some repeat a piece of an earlier one."""
    sequences: list[list[int]] = []
    for _ in range(count):
        length = int(rng.integers(0, longest + 1)) if len(alphabet) else 0
        if sequences and rng.random() < 0.2:
            source = sequences[int(rng.integers(len(sequences)))]
            sequences.append(source[:length])
        else:
            sequences.append(rng.choice(alphabet, length).tolist() if length else [])
    return sequences


def random_alphabet(rng: Generator, vocabulary: int, end_id: int) -> NDArray[np.int64]:
    """Draw the tokens that sequences may use: without the end token, often only a few."""
    tokens = np.delete(np.arange(vocabulary), end_id)
    size = int(rng.choice([1, 2, 3, 5, 1000]))
    return rng.permutation(tokens)[:size] if len(tokens) else tokens


# --- one step of the beam ------------------------------------------------------------------------


@dataclass
class StepCase:
    """Arguments of ``beam_step`` for both sides."""

    logits: NDArray[np.float32]
    scores: NDArray[np.float32]
    dtype: str
    constraints: list[Any]  # native
    oracle_constraints: list[Any]
    states: NDArray[np.int32]  # native
    oracle_states: NDArray[np.int32]
    keywords: dict[str, Any]  # the rest

    def native(self) -> tuple[Any, Any, Any]:
        arguments = self.keywords | {"constraint": self.constraints, "states": self.states}
        result = ops.beam_step(cast(self.logits, self.dtype), self.scores, **arguments)
        scores, tokens, parents = (host(array) for array in result)
        return scores, tokens, parents

    def oracle(self) -> tuple[Any, Any, Any]:
        arguments = self.keywords | {
            "constraint": self.oracle_constraints,
            "states": self.oracle_states,
        }
        scores, tokens, parents = reference.beam_step(self.logits, self.scores, **arguments)
        return scores, tokens, parents

    def question(self, q: int) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """Return the oracle's scores of all continuations of a question, and which are allowed."""
        p, h = self.keywords["passages"], self.keywords["hypotheses"]
        n, k = p[q], h[q]
        row = sum(a * b for a, b in zip(p[:q], h[:q], strict=True))
        own = slice(sum(h[:q]), sum(h[:q]) + k)
        weights = self.keywords["weights"]
        if weights is not None:
            weights = weights[sum(p[:q]) : sum(p[:q]) + n]
        vocabulary = self.logits.shape[1]
        block = self.logits[row : row + n * k].reshape(n, k, vocabulary)
        candidates = candidate_scores(
            block, self.scores[own], vote=self.keywords["vote"], weights=weights
        )
        allowed = allowed_mask(
            self.oracle_constraints[q],
            self.oracle_states[own],
            vocabulary,
            self.keywords["end_id"],
            self.keywords["allow_end"][q],
        )
        return candidates, allowed & (self.scores[own] > -np.inf)[:, None]


def random_automata(
    rng: Generator, vocabulary: int, end_id: int, hypotheses: int
) -> tuple[Any, Any, list[int], list[int]]:
    """Draw a constraint for both sides, and the states of hypotheses that walked it at random."""
    kind = rng.integers(3)
    if kind == 0:
        dead = [-int(rng.random() < 0.05) for _ in range(hypotheses)]
        return None, None, dead, dead
    alphabet = random_alphabet(rng, vocabulary, end_id)
    sequences = random_sequences(rng, int(rng.integers(0, 5)), 8, alphabet)
    name = "SpanIndex" if kind == 1 else "Trie"
    native, oracle = getattr(fastmrc, name)(sequences), getattr(reference, name)(sequences)
    states, oracle_states = [], []
    for _ in range(hypotheses):
        pair = (np.zeros(1, np.int32), np.zeros(1, np.int32))
        for token in random_sequences(rng, 1, 3, alphabet)[0]:
            pair = (native.advance(pair[0], [token]), oracle.advance(pair[1], [token]))
        states.append(int(pair[0][0]))
        oracle_states.append(int(pair[1][0]))
    return native, oracle, states, oracle_states


def random_step(rng: Generator, vocabulary: int | None = None) -> StepCase:
    """Draw a batch of questions for ``beam_step``, ragged in every way."""
    if vocabulary is None:
        vocabulary = int(
            rng.choice([1, 2, 3, 5, 17, 64, 65, 200, 1100], p=[0.125] * 7 + [0.1, 0.025])
        )
    questions = int(rng.integers(1, 4))
    passages = rng.integers(1, 6, questions).tolist()
    hypotheses = rng.integers(0, 5, questions).tolist()
    passages = [
        n if k else int(rng.integers(0, 2)) * n for n, k in zip(passages, hypotheses, strict=True)
    ]
    rows = sum(n * k for n, k in zip(passages, hypotheses, strict=True))
    total = sum(hypotheses)
    dtype = str(rng.choice(DTYPES, p=[0.6, 0.2, 0.2]))
    scores = -np.abs(rng.normal(size=total) * rng.choice([0.0, 1.0, 30.0]))
    scores[rng.random(total) < 0.05] = -np.inf
    end_id = int(rng.integers(vocabulary))
    vote = str(rng.choice(VOTES))
    weights = None
    if vote == "weighted":
        weights = (rng.random(sum(passages)) * rng.choice([0.0, 1.0, 9.0])).astype(np.float32)
    drawn = [random_automata(rng, vocabulary, end_id, k) for k in hypotheses]
    return StepCase(
        rounded(random_rows(rng, rows, vocabulary), dtype),
        scores.astype(np.float32),
        dtype,
        [d[0] for d in drawn],
        [d[1] for d in drawn],
        np.array([s for d in drawn for s in d[2]], dtype=np.int32),
        np.array([s for d in drawn for s in d[3]], dtype=np.int32),
        {
            "passages": passages,
            "hypotheses": hypotheses,
            "beam_size": int(rng.integers(1, min(6, vocabulary) + 1)),
            "end_id": end_id,
            "vote": vote,
            "weights": weights,
            "allow_end": rng.integers(0, 2, questions).astype(bool).tolist(),
        },
    )


def compare_step(case: StepCase, tally: Tally) -> None:
    """Compare the native step with the oracle's, question by question."""
    ours, theirs = case.native(), case.oracle()
    for q in range(len(case.keywords["passages"])):
        tally.cases += 1
        scores, tokens, parents = (array[q] for array in ours)
        want_scores, want_tokens, want_parents = (array[q] for array in theirs)
        different = (tokens != want_tokens) | (parents != want_parents)
        if not different.any():
            assert same_scores(scores, want_scores), (case, q, scores, want_scores)
            continue
        candidates, allowed = case.question(q)
        i = int(different.argmax())
        assert tokens[i] >= 0 and want_tokens[i] >= 0, (case, q, ours, theirs)
        assert allowed[parents[i], tokens[i]], (case, q, ours, theirs)
        margin = abs(
            float(candidates[parents[i], tokens[i]])
            - float(candidates[want_parents[i], want_tokens[i]])
        )
        assert margin <= MARGIN, (case, q, ours, theirs, margin)
        tally.near_tie(margin)


# --- the whole search ----------------------------------------------------------------------------


class Question:
    """Logits that depend on passage and prefix only: rows of a small table, chosen by a hash.

    Each length of the prefix has its own rows. With the same rows at every step, "ab" and "ba"
    would have scores that are equal but for the rounding of their sum, which float32 decides.
    """

    def __init__(
        self, passages: list[list[int]], table: NDArray[np.float32], first: NDArray[np.float32]
    ) -> None:
        self.passages = passages
        self.table = table  # [lengths, rows, V]
        self.first = first  # [passages, V], of the empty prefix
        self.trace: list[
            list[Prefix]
        ] = []  # live hypotheses of each step that the oracle asked for

    def row(self, passage: int, prefix: Prefix) -> NDArray[np.float32]:
        if not prefix:
            return self.first[passage]
        rows = self.table[len(prefix) % len(self.table)]
        return rows[hash((passage, *prefix)) % len(rows)]

    def next_logits(self, prefixes: list[list[int]], passage_ids: list[int]) -> NDArray[np.float32]:
        self.trace.append([tuple(prefix) for prefix in prefixes])
        return np.array([[self.row(p, tuple(y)) for y in prefixes] for p in passage_ids])

    def score(self, prefix: Prefix, voting: Sequence[bool], **vote: Any) -> np.float32:
        """Return the oracle's score of a sequence of tokens (the end token included)."""
        kept = [p for p, votes in enumerate(voting) if votes]
        score = np.zeros(1, np.float32)
        for t, token in enumerate(prefix):
            block = np.array([[self.row(p, prefix[:t])] for p in kept])
            score = candidate_scores(block, score, **vote)[0, token : token + 1]
        return score[0]


class TableSource:
    """The logits source of the native search; reads the prefixes off the ancestor masks."""

    def __init__(
        self, questions: Sequence[Question], vocabulary: int, dtype: str = "float32"
    ) -> None:
        self.questions = questions
        self.vocabulary = vocabulary
        self.dtype = dtype
        self.traces: list[list[list[Prefix]]] = [[[()]] if q.passages else [] for q in questions]
        self._first_passage = np.cumsum([0] + [len(q.passages) for q in questions])
        self._prefixes: list[dict[int, Prefix]] = [{} for _ in questions]  # of each answer column
        self.widths: list[int] = []

    def prefill(self) -> Any:
        rows = [row for question in self.questions for row in question.first]
        return self._cast(rows)

    def step(self, request: Any) -> Any:
        self._encode(request)
        rows = []
        lives: list[list[Prefix]] = [[] for _ in request.questions]
        asked = zip(
            request.row_question.tolist(),
            request.row_passage.tolist(),
            request.row_column.tolist(),
            strict=True,
        )
        for a, p, column in asked:
            q = int(request.questions[a])
            prefix = self._prefixes[q][column]
            if len(lives[a]) < request.hypotheses[a]:  # those of the first passage
                lives[a].append(prefix)
            rows.append(self.questions[q].row(p - self._first_passage[q], prefix))
        for q, live in zip(request.questions.tolist(), lives, strict=True):
            self.traces[q].append(live)
        return self._cast(rows)

    def _encode(self, request: Any) -> None:
        """Take the tokens of the request as an encoder does: each sees its ancestors only."""
        tokens, depths, ancestors = request.tokens, request.depths, request.ancestors
        assert ancestors.shape == (*tokens.shape, request.columns)
        self.widths.append(request.width)
        for a, q in enumerate(request.questions.tolist()):
            known = self._prefixes[q]
            for i in range(request.width):
                column = request.columns - request.width + i
                seen = np.flatnonzero(ancestors[a, i])
                if len(seen) == 0:  # padding
                    continue
                parent = known[seen[-2]] if len(seen) > 1 else ()
                known[column] = (*parent, int(tokens[a, i]))
                assert seen[-1] == column and len(seen) == len(known[column]) == depths[a, i] + 1
                assert [known[c] for c in seen] == [
                    known[column][: t + 1] for t in range(len(seen))
                ]

    def _cast(self, rows: list[NDArray[np.float32]]) -> Any:
        stacked = np.array(rows, dtype=np.float32).reshape(len(rows), self.vocabulary)
        return cast(stacked, self.dtype)


@dataclass
class SearchCase:
    """A batch of questions for both searches."""

    questions: list[Question]
    vocabulary: int
    end_id: int
    dtype: str
    options: SearchOptions
    weights: list[list[float]] | None
    constraints: list[Any]  # native, empty or one per question
    oracle_constraints: list[Any]
    native_traces: list[list[list[Prefix]]] = field(default_factory=list)
    native_widths: list[int] = field(default_factory=list)

    def native(self, only: int | None = None) -> list[SearchResult]:
        """Run the native search over the whole batch or one question of it."""
        chosen = slice(None) if only is None else slice(only, only + 1)
        source = TableSource(self.questions[chosen], self.vocabulary, self.dtype)
        batch = decoding.beam_search(
            source,
            [question.passages for question in self.questions[chosen]],
            end_id=self.end_id,
            vocabulary_size=self.vocabulary,
            options=self.options,
            weights=None if self.weights is None else self.weights[chosen],
            constraints=self.constraints[chosen],
        )
        self.native_traces, self.native_widths = source.traces, source.widths
        return batch.results

    def oracle(self, q: int) -> SearchResult:
        question = self.questions[q]
        question.trace = []
        o = self.options
        return reference.beam_search(
            question.next_logits,
            question.passages,
            end_id=self.end_id,
            beam_size=o.beam_size,
            mode=o.mode,
            vote=o.vote,
            weights=None if self.weights is None else self.weights[q],
            min_tokens=o.min_answer_tokens,
            max_tokens=o.max_answer_tokens,
            finish=o.finish,
            length_penalty=o.length_penalty,
            no_answer_ratio=o.no_answer_ratio,
            constraint=self.oracle_constraints[q] if self.oracle_constraints else None,
        )

    def vote_keywords(self, q: int, voting: Sequence[bool]) -> dict[str, Any]:
        weights = None
        if self.weights is not None:
            kept = [w for w, votes in zip(self.weights[q], voting, strict=True) if votes]
            weights = np.array(kept, dtype=np.float32)
        return {"vote": self.options.vote, "weights": weights}


def random_table(
    rng: Generator, vocabulary: int, end_id: int, dtype: str, lengths: int
) -> NDArray[np.float32]:
    """Draw the rows of a question, [lengths, rows, V]; every length has its own temperature."""
    rows = int(rng.choice([1, 3, 40]))
    table = random_rows(rng, lengths * rows, vocabulary).reshape(lengths, rows, vocabulary)
    table[..., end_id] += np.float32(rng.choice([0.0, 0.0, -3.0, -8.0, 3.0]))
    table *= (1 + 0.13 * np.arange(lengths, dtype=np.float32))[:, None, None]
    return rounded(table, dtype)


def random_first(
    rng: Generator, passages: int, vocabulary: int, end_id: int, dtype: str
) -> NDArray[np.float32]:
    """Draw the first rows: none, some or all passages hold no answer."""
    first = random_rows(rng, passages, vocabulary)
    leaves = rng.random(passages) < rng.choice([0.0, 0.3, 1.0], p=[0.5, 0.4, 0.1])
    finite = np.where(np.isneginf(first), -60.0, first)
    highest = finite.max(axis=1, initial=-60.0)
    stays_low = highest - np.float32(rng.choice([0.0, 1.0, 9.0]))
    first[:, end_id] = np.where(leaves, highest + 1, np.minimum(first[:, end_id], stays_low))
    return rounded(first, dtype)


def random_search(rng: Generator, vocabulary: int | None = None, lengths: int = 9) -> SearchCase:
    """Draw a batch of questions, ragged in every way, for the whole search.

    `lengths` is the number of prefix lengths with rows of their own, see `Question`.
    """
    if vocabulary is None:
        vocabulary = int(
            rng.choice([1, 2, 3, 4, 6, 9, 17, 40, 130], p=[0.02, 0.08] + [0.9 / 7] * 7)
        )
    end_id = int(rng.integers(vocabulary))
    dtype = str(rng.choice(DTYPES, p=[0.8, 0.1, 0.1]))
    alphabet = random_alphabet(rng, vocabulary, end_id)
    questions = []
    for _ in range(int(rng.integers(1, 5))):
        count = int(rng.choice([0, 1, 2, 3, 6], p=[0.05, 0.3, 0.3, 0.25, 0.1]))
        passages = random_sequences(rng, count, 10, alphabet)
        first = random_first(rng, count, vocabulary, end_id, dtype)
        questions.append(
            Question(passages, random_table(rng, vocabulary, end_id, dtype, lengths), first)
        )
    vote = str(rng.choice(VOTES))
    least = int(rng.choice([0, 0, 0, 1, 2, 4]))
    options = SearchOptions(
        beam_size=int(rng.integers(1, min(6, vocabulary) + 1)),
        mode=str(rng.choice(["extractive", "extractive", "generative"])),  # type: ignore[arg-type]
        vote=vote,  # type: ignore[arg-type]
        min_answer_tokens=least,
        max_answer_tokens=max(1, least + int(rng.integers(0, 6))),
        finish=str(rng.choice(["original", "pool"])),  # type: ignore[arg-type]
        length_penalty=float(rng.choice([0.0, 0.5, 1.0, 2.0, -0.5, -1.0])),
        look_ahead=int(rng.integers(0, 5)),
        no_answer_ratio=[None, None, 1.0, 1.3, 3.0][int(rng.integers(5))],
    )
    weights = None
    if vote == "weighted":
        weights = [rng.choice([0.0, 0.5, 1.0, 3.0], len(q.passages)).tolist() for q in questions]
    constraints: list[Any] = []
    oracle_constraints: list[Any] = []
    if rng.random() < 0.3:
        for _ in questions:
            sequences = random_sequences(rng, int(rng.integers(0, 8)), 5, alphabet)
            kind = rng.choice(["none", "Trie", "Trie", "SpanIndex"])
            nothing = kind == "none"
            constraints.append(None if nothing else getattr(fastmrc, kind)(sequences))
            oracle_constraints.append(None if nothing else getattr(reference, kind)(sequences))
    return SearchCase(
        questions, vocabulary, end_id, dtype, options, weights, constraints, oracle_constraints
    )


def compare_search(case: SearchCase, tally: Tally) -> None:
    """Compare the native search over a batch with the oracle, question by question."""
    results = case.native()
    for q, ours in enumerate(results):
        tally.cases += 1
        theirs = case.oracle(q)
        np.testing.assert_allclose(ours.no_answer, theirs.no_answer, rtol=1e-5, atol=1e-7)
        assert ours.surviving == theirs.surviving, (case, q)
        if ours.voting != theirs.voting:
            margin = voting_margin(case, q, ours, theirs)
            assert margin <= MARGIN, (case, q, ours, theirs, margin)
            tally.near_tie(margin)
            continue
        if _same_result(ours, theirs):
            continue
        margin = first_margin(case, q, ours, theirs)
        assert margin <= MARGIN, (case, q, ours, theirs, margin)
        tally.near_tie(margin)


def voting_margin(case: SearchCase, q: int, ours: SearchResult, theirs: SearchResult) -> float:
    """Return how far the oracle sees passages that only one side kept from the bar."""
    ratio = case.options.no_answer_ratio
    if ratio is None:
        return np.inf
    weights = np.ones(len(theirs.no_answer)) if case.weights is None else np.array(case.weights[q])
    no_answer = np.array(theirs.no_answer)
    bar = ratio * no_answer[np.array(theirs.surviving) & (weights > 0)].min(initial=1.0)
    differ = np.array(ours.voting) != np.array(theirs.voting)
    return float(np.abs(no_answer[differ] - bar).max())


def _same_result(ours: SearchResult, theirs: SearchResult) -> bool:
    def shape(result: SearchResult) -> list[Any]:
        return [(h.token_ids, h.finished) for h in result.hypotheses]

    if shape(ours) != shape(theirs) or (ours.best is None) != (theirs.best is None):
        return False
    if not same_scores([h.score for h in ours.hypotheses], [h.score for h in theirs.hypotheses]):
        return False
    if ours.best is None or theirs.best is None:
        return True
    a, b = ours.best, theirs.best
    same_best = (a.token_ids, a.finished) == (b.token_ids, b.finished)
    return same_best and abs(a.score - b.score) <= score_tolerance(b.score)


def first_margin(case: SearchCase, q: int, ours: SearchResult, theirs: SearchResult) -> float:
    """Return the oracle's margin between the two choices at the first differing decision.

    Infinity if the two sides took the same decisions and yet differ, or if one of them chose what
    the other could not.
    """
    question, options = case.questions[q], case.options
    keywords = case.vote_keywords(q, theirs.voting)

    def score(prefix: Prefix) -> float:
        return float(question.score(prefix, theirs.voting, **keywords))

    native, oracle = case.native_traces[q], question.trace
    for t in range(1, max(len(native), len(oracle))):
        a = native[t] if t < len(native) else []
        b = oracle[t] if t < len(oracle) else []
        for x, y in zip(a, b, strict=False):
            if x != y:
                return abs(score(x) - score(y))
        if len(a) != len(b):
            # One side took an end token in place of the other's first additional hypothesis.
            extra = score(max(a, b, key=len)[min(len(a), len(b))])
            ends = [score((*prefix, case.end_id)) for prefix in oracle[t - 1]]
            return min((abs(extra - end) for end in ends), default=np.inf)

    def final(hypothesis: Hypothesis) -> float:
        tokens = tuple(hypothesis.token_ids) + (case.end_id,) * hypothesis.finished
        total = score(tokens)
        if options.finish == "pool":
            total /= float(len(tokens)) ** options.length_penalty
        return total

    for h, g in zip(ours.hypotheses, theirs.hypotheses, strict=False):
        if (h.token_ids, h.finished) != (g.token_ids, g.finished):
            return abs(final(h) - final(g))
    return np.inf


def count_cases(
    seed: int, cases: int, compare: Callable[[Generator, Tally], None]
) -> tuple[Tally, str]:
    """Run `compare` until it has counted so many cases; return the tally and a line about it."""
    rng = np.random.default_rng(seed)
    tally = Tally()
    while tally.cases < cases:
        compare(rng, tally)
    margins = f", margins {tally.margins[:5]}" if tally.margins else ""
    return tally, f"{tally.cases} cases, {tally.near_ties} near-ties{margins} (seed {seed})"
