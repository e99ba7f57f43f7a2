"""Beam search in which several passages vote on every token of one answer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, SupportsIndex, get_args

import numpy as np
from numpy.typing import NDArray

from fastmrc.errors import InputError
from fastmrc.options import Finish, Mode, Vote, require_ratio
from fastmrc.reference._checks import require_choice, require_int, to_numpy, token_lists
from fastmrc.reference.constraints import DEAD, ROOT, Automaton, ngram_continuations
from fastmrc.reference.ops import (
    allowed_mask,
    candidate_scores,
    check_logits,
    checked_weights,
    select,
    softmax,
)
from fastmrc.types import Hypothesis, SearchResult

__all__ = ["NextLogits", "beam_search"]

NextLogits = Callable[[list[list[int]], list[int]], Any]
"""From prefixes (K token lists) and n passage numbers to logits [n, K, V]."""


@dataclass(frozen=True, slots=True)
class _Entry:
    """A hypothesis of the search: live, or ended by the end token (not in `tokens`)."""

    tokens: list[int]
    score: np.float32
    ended: bool = False
    state: int = ROOT

    def result(self) -> Hypothesis:
        return Hypothesis(list(self.tokens), float(self.score), self.ended)


def beam_search(
    next_logits: NextLogits,
    passages: Iterable[Iterable[SupportsIndex]],
    *,
    end_id: int,
    beam_size: int = 3,
    mode: Mode = "extractive",
    vote: Vote = "original",
    weights: Any = None,
    min_tokens: int = 0,
    max_tokens: int = 32,
    finish: Finish = "original",
    length_penalty: float = 1.0,
    no_answer_ratio: float | None = None,
    constraint: Automaton | None = None,
    literal: bool = False,
) -> SearchResult:
    """Search the answer to one question.

    A passage whose most likely first token is the end token holds no answer and leaves. At each
    step the others vote on every continuation, see `fastmrc.reference.beam_step` for the scores
    and the order of equal ones.

    Parameters
    ----------
    next_logits
        Called as ``next_logits(prefixes, passage_ids)``; returns float logits (or
        log-probabilities) [len(passage_ids), len(prefixes), V] of the next token. At first it is
        asked for all passages with ``prefixes = [[]]``, then for the voting ones only.
    passages
        Token ids of each passage, without special tokens.
    end_id
        The token that ends an answer.
    beam_size
        Number of hypotheses, at least 1.
    mode
        ``"extractive"``: answers are contiguous pieces of a voting passage;
        ``"generative"``: any tokens.
    vote, weights
        As for `fastmrc.reference.beam_step`; one weight per passage, voting or not.
    min_tokens, max_tokens
        Least number of tokens before the end token, and number of steps: an answer has at most
        `max_tokens` tokens, or one fewer and the end token.
    finish
        ``"original"``: an ended hypothesis that is the best of a step is the answer at once, others
        that ended are set aside and their places in the beam with them. ``"pool"``: ended
        hypotheses compete by score / length ** `length_penalty`, the end token counted.
    length_penalty
        Exponent of the length for ``finish="pool"``; finite.
    no_answer_ratio
        Of the passages that do not leave those vote whose probability of the end token as the
        first one is at most so many times the least (of a passage whose weight is not 0). None:
        all vote.
    constraint
        An automaton (`fastmrc.reference.Trie` or the native ones) that replaces the constraint of
        `mode`. The end token needs a final state.
    literal
        As the original program: a forbidden token has the vote 0 and thus the log vote log(eps),
        and may enter the beam when allowed ones run out. The end token below `min_tokens` stays
        out.

    Returns
    -------
    fastmrc.types.SearchResult
        Best hypothesis (or None), all of them, which passages survived and voted, and how likely
        each holds no answer.

    Raises
    ------
    InputError
        If a value is out of range, the logits have the wrong shape or a row with NaN, plus
        infinity or only minus infinity, or a passage of an extractive search holds `end_id`.
    TypeError
        If an argument has the wrong type.

    Notes
    -----
    The reading comprehension example of bert4keras, one step after the other, with its n-gram
    sets; the probabilities here are float64.
    """
    require_ratio(no_answer_ratio)
    search = _Search(
        next_logits,
        token_lists("passages", passages),
        end_id=require_int("end_id", end_id, 0),
        mode=mode,
        vote=vote,
        weights=weights,
        min_tokens=require_int("min_tokens", min_tokens, 0),
        no_answer_ratio=math.inf if no_answer_ratio is None else no_answer_ratio,
        constraint=constraint,
        literal=literal,
    )
    beam_size = require_int("beam_size", beam_size, 1)
    max_tokens = require_int("max_tokens", max_tokens, max(1, search.min_tokens))
    require_choice("finish", finish, get_args(Finish))
    if not math.isfinite(length_penalty):
        raise InputError(f"length_penalty: expected a finite number, got {length_penalty}")

    if not search.start():
        return SearchResult(None, [], search.surviving, search.voting, search.no_answer)
    if finish == "original":
        best, found = _search_original(search, beam_size, max_tokens)
    else:
        best, found = _search_pool(search, beam_size, max_tokens, length_penalty)
    return SearchResult(
        None if best is None else best.result(),
        [h.result() for h in found],
        search.surviving,
        search.voting,
        search.no_answer,
    )


def _search_original(
    search: _Search, beam_size: int, max_tokens: int
) -> tuple[_Entry | None, list[_Entry]]:
    """Return at the first step whose best continuation is the end token."""
    live = [_Entry([], np.float32(0.0))]
    finished: list[_Entry] = []
    selected: list[_Entry] = []
    for step in range(max_tokens):
        selected = search.continuations(live, step, beam_size - len(finished))
        if not selected or selected[0].ended or step == max_tokens - 1:
            break
        finished += [h for h in selected if h.ended]
        live = [h for h in selected if not h.ended]
    best = selected[0] if selected else None
    return best, _by_score(finished + selected)


def _search_pool(
    search: _Search, beam_size: int, max_tokens: int, length_penalty: float
) -> tuple[_Entry | None, list[_Entry]]:
    """Collect ended hypotheses until no live one can overtake them."""
    live = [_Entry([], np.float32(0.0))]
    pool: list[_Entry] = []
    for step in range(max_tokens):
        selected = search.continuations(live, step, 2 * beam_size)
        length = step + 1  # of every continuation, the end token counted
        last = step == max_tokens - 1
        entering = [h for h in selected[:beam_size] if h.ended or last]
        pool += [_normalized(h, length, length_penalty) for h in entering]
        pool = _by_score(pool)[:beam_size]
        live = [h for h in selected if not h.ended][:beam_size]
        if last or not live:
            break
        # Scores only fall, so the longest possible answer divides the best one most kindly.
        longest = max_tokens if length_penalty > 0 else length + 1
        bound = _normalized(live[0], longest, length_penalty)
        if len(pool) == beam_size and pool[-1].score >= bound.score:
            break
    return (pool[0] if pool else None), pool


def _normalized(entry: _Entry, length: int, length_penalty: float) -> _Entry:
    score = np.float32(float(entry.score) / float(length) ** length_penalty)
    return _Entry(entry.tokens, score, entry.ended, entry.state)


def _by_score(entries: Sequence[_Entry]) -> list[_Entry]:
    return sorted(entries, key=lambda h: -h.score)  # stable: of equal ones the earlier first


class _Search:
    """One question: its passages, what may come next, and the vote."""

    def __init__(
        self,
        next_logits: NextLogits,
        passages: list[list[int]],
        *,
        end_id: int,
        mode: Mode,
        vote: Vote,
        weights: Any,
        min_tokens: int,
        no_answer_ratio: float,
        constraint: Automaton | None,
        literal: bool,
    ) -> None:
        require_choice("mode", mode, get_args(Mode))
        require_choice("vote", vote, get_args(Vote))
        self.surviving = [True] * len(passages)
        self.voting = [True] * len(passages)
        self.no_answer = [0.0] * len(passages)
        self.min_tokens = min_tokens
        self._next_logits = next_logits
        self._passages = passages
        self._end_id = end_id
        self._extractive = mode == "extractive" and constraint is None
        self._vote = vote
        self._weights = checked_weights(vote, weights, len(passages))
        self._no_answer_ratio = no_answer_ratio
        self._constraint = constraint
        self._literal = literal
        self._ids = list(range(len(passages)))  # of the voting passages
        self._first: NDArray[Any] | None = None  # logits of step 0, used once
        if self._extractive:
            for p, passage in enumerate(passages):
                if end_id in passage:
                    raise InputError(f"passages[{p}]: expected no end token {end_id}, got one")

    def start(self) -> bool:
        """Let the passages without an answer leave; tell whether any is left to vote."""
        if not self._ids:
            return False
        logits = self._logits([[]])
        no_answer = softmax(logits[:, 0])[:, self._end_id]
        self.no_answer = no_answer.tolist()
        stays = logits[:, 0].argmax(axis=-1) != self._end_id  # argmax: the lowest id on ties
        self.surviving = stays.tolist()
        if math.isfinite(self._no_answer_ratio):
            counts = stays if self._weights is None else stays & (self._weights > 0)
            stays &= no_answer <= self._no_answer_ratio * no_answer[counts].min(initial=1.0)
        self.voting = stays.tolist()
        self._ids = np.flatnonzero(stays).tolist()
        self._passages = [self._passages[p] for p in self._ids]
        if self._weights is not None:
            self._weights = self._weights[stays]
        self._first = logits[stays]
        return bool(self._ids)

    def continuations(self, live: list[_Entry], step: int, count: int) -> list[_Entry]:
        """Return the best `count` continuations of the live hypotheses, `step` tokens long."""
        logits, self._first = self._first, None
        if logits is None:
            logits = self._logits([h.tokens for h in live])
        allowed = self._allowed(live, step, logits.shape[-1])
        scores = candidate_scores(
            logits,
            np.array([h.score for h in live], dtype=np.float32),
            vote=self._vote,
            weights=self._weights,
            forbidden=~allowed if self._literal else None,
        )
        if self._literal:
            end_allowed = step >= self.min_tokens
            allowed = allowed_mask(
                None, np.zeros(len(live), np.int32), logits.shape[-1], self._end_id, end_allowed
            )
        chosen, tokens, parents = select(scores, allowed, count)
        return [
            self._extend(live[k], int(v), s)
            for s, v, k in zip(chosen, tokens, parents, strict=True)
        ]

    def _allowed(self, live: list[_Entry], step: int, vocabulary: int) -> NDArray[np.bool_]:
        """Mark the continuations [K, V] that constraint and least length admit."""
        allow_end = step >= self.min_tokens
        if not self._extractive:
            states = np.array([h.state for h in live], dtype=np.int32)
            return allowed_mask(self._constraint, states, vocabulary, self._end_id, allow_end)
        continuations = ngram_continuations(self._passages, step)
        mask = np.zeros((len(live), vocabulary), dtype=np.bool_)
        for k, hypothesis in enumerate(live):
            mask[k, list(continuations.get(tuple(hypothesis.tokens), ()))] = True
        mask[:, self._end_id] = allow_end
        return mask

    def _extend(self, parent: _Entry, token: int, score: np.float32) -> _Entry:
        if token == self._end_id:
            return _Entry(parent.tokens, score, True, parent.state)
        state = parent.state
        if self._constraint is not None and state != DEAD:
            state = int(self._constraint.advance(np.array([state]), np.array([token]))[0])
        return _Entry([*parent.tokens, token], score, False, state)

    def _logits(self, prefixes: list[list[int]]) -> NDArray[Any]:
        """Ask for the logits [n, K, V] and check them."""
        asked = (len(self._ids), len(prefixes))
        prefixes = [list(prefix) for prefix in prefixes]
        logits = np.asarray(to_numpy(self._next_logits(prefixes, list(self._ids))))
        if logits.ndim != 3 or logits.shape[:2] != asked:
            raise InputError(
                f"next_logits: expected shape [{asked[0]}, {asked[1]}, V], got {logits.shape}"
            )
        if not np.issubdtype(logits.dtype, np.floating):
            raise TypeError(f"next_logits: expected floating point, got {logits.dtype}")
        self._check_vocabulary(logits.shape[-1])
        check_logits("next_logits", logits.reshape(-1, logits.shape[-1]))
        return logits

    def _check_vocabulary(self, vocabulary: int) -> None:
        if self._end_id >= vocabulary:
            raise InputError(
                f"end_id: expected less than the vocabulary size {vocabulary}, got {self._end_id}"
            )
        if self._extractive:
            largest = max((max(passage, default=0) for passage in self._passages), default=0)
            if largest >= vocabulary:
                raise InputError(
                    f"passages: expected tokens below the vocabulary size {vocabulary}, "
                    f"got {largest}"
                )
