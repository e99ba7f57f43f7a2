"""What may come next: spans of the passages, or a closed set of answers.

The classes answer the questions of the automata in ``fastmrc.constraints``, by dictionaries of
n-grams and by a trie of dictionaries. State 0 is the root, -1 is the dead state; every other
state is a number handed out when its prefix is first seen, so only the answers are comparable
with the native automata, not the numbers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol, SupportsIndex

import numpy as np
from numpy.typing import NDArray

from fastmrc.errors import InputError
from fastmrc.reference._checks import int_vector, token_list, token_lists

__all__ = ["Automaton", "SpanIndex", "TextSpanIndex", "Trie", "ngram_continuations"]

ROOT = 0
DEAD = -1


class Automaton(Protocol):
    """What the search asks of a constraint; see `SpanIndex` for the meaning of each method."""

    def advance(self, states: Any, tokens: Any, /) -> NDArray[np.int32]: ...

    def allowed(self, states: Any, /) -> tuple[NDArray[np.int64], NDArray[np.int32]]: ...

    def is_final(self, states: Any, /) -> NDArray[np.bool_]: ...


def ngram_continuations(
    passages: Iterable[Sequence[int]], length: int
) -> dict[tuple[int, ...], set[int]]:
    """Collect, for each piece of `length` tokens, the tokens that follow it somewhere.

    Parameters
    ----------
    passages
        Token ids of each passage; no piece crosses from one to the next.
    length
        Number of tokens before the continuation, at least 0.

    Returns
    -------
    dict
        From the piece to the set of its continuations.

    Notes
    -----
    This is the n-gram set of the original reader (bert4keras, reading comprehension by seq2seq),
    which builds it anew at every step.
    """
    continuations: dict[tuple[int, ...], set[int]] = {}
    for passage in passages:
        for i in range(len(passage) - length):
            piece = tuple(passage[i : i + length])
            continuations.setdefault(piece, set()).add(passage[i + length])
    return continuations


class SpanIndex:
    """Contiguous pieces of some passages, found by enumeration.

    Parameters
    ----------
    passages
        Token ids of each passage, each id in [0, 2**31).

    Raises
    ------
    InputError
        If a token id is out of range.
    TypeError
        If a token id is not an integer.
    """

    def __init__(self, passages: Iterable[Iterable[SupportsIndex]]) -> None:
        self._passages = token_lists("passages", passages)
        self._spans: list[tuple[int, ...]] = [()]  # the span of each state
        self._states: dict[tuple[int, ...], int] = {(): ROOT}
        self._continuations: dict[int, dict[tuple[int, ...], set[int]]] = {}  # by span length

    @property
    def num_states(self) -> int:
        """Number of distinct pieces, the empty one included; more than an automaton needs."""
        return self.num_edges + 1

    @property
    def num_edges(self) -> int:
        """Number of pieces of at least one token: each has one last token."""
        return len(
            {
                tuple(passage[i:j])
                for passage in self._passages
                for i in range(len(passage))
                for j in range(i + 1, len(passage) + 1)
            }
        )

    def advance(self, states: Any, tokens: Any) -> NDArray[np.int32]:
        """Follow one token from each state.

        Parameters
        ----------
        states
            States [n], integers; -1 stays -1.
        tokens
            Token ids [n], integers.

        Returns
        -------
        numpy.ndarray
            New states, int32 [n]; -1 where no passage holds the longer span.
        """
        checked, following = _states_and_tokens(states, tokens, len(self._spans))
        reached = [self._step(s, v) for s, v in zip(checked, following, strict=True)]
        return np.array(reached, dtype=np.int32)

    def allowed(self, states: Any) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
        """List the tokens that may follow each state.

        Parameters
        ----------
        states
            States [n], integers; -1 has no continuation.

        Returns
        -------
        offsets : numpy.ndarray
            int64 [n + 1]; the tokens of state i are ``tokens[offsets[i]:offsets[i + 1]]``.
        tokens : numpy.ndarray
            int32, ascending for each state.
        """
        checked = _checked_states(states, len(self._spans))
        return _to_csr([self._following(s) for s in checked])

    def is_final(self, states: Any) -> NDArray[np.bool_]:
        """Tell for states [n] whether an answer may end there: everywhere but in -1."""
        checked = _checked_states(states, len(self._spans))
        return np.array([s != DEAD for s in checked], dtype=np.bool_)

    def occurrences(self, span: Iterable[SupportsIndex]) -> NDArray[np.int32]:
        """Find every place of a span.

        Parameters
        ----------
        span
            Token ids.

        Returns
        -------
        numpy.ndarray
            int32 [m, 2], rows (passage, first token) in order; none for the empty span.
        """
        wanted = token_list("span", span)
        places = [
            (p, i)
            for p, passage in enumerate(self._passages)
            for i in range(len(passage) - len(wanted) + 1)
            if wanted and passage[i : i + len(wanted)] == wanted
        ]
        return np.array(places, dtype=np.int32).reshape(-1, 2)

    def _following(self, state: int) -> set[int]:
        if state == DEAD:
            return set()
        span = self._spans[state]
        if len(span) not in self._continuations:
            self._continuations[len(span)] = ngram_continuations(self._passages, len(span))
        return self._continuations[len(span)].get(span, set())

    def _step(self, state: int, token: int) -> int:
        if token not in self._following(state):
            return DEAD
        span = (*self._spans[state], token)
        if span not in self._states:
            self._states[span] = len(self._spans)
            self._spans.append(span)
        return self._states[span]


class TextSpanIndex:
    """Token sequences that spell a piece of some texts, found by enumeration.

    A piece begins and ends at a character and may be empty. A sequence that spells the beginning of
    a piece inside a character is not final, and is left out if no tokens complete that character.

    Parameters
    ----------
    passages
        Texts.
    first, following
        The bytes that each token stands for at the beginning, maybe none, and after another token.
    """

    def __init__(
        self, passages: Iterable[str], first: Mapping[int, bytes], following: Mapping[int, bytes]
    ) -> None:
        self._first, self._following = dict(first), dict(following)
        ends = [passage[i:].encode() for passage in passages for i in range(len(passage))]
        self._beginnings = {b"", *(text[:i] for text in ends for i in range(1, len(text) + 1))}
        self._complete: dict[bytes, bool] = {}
        # The text of each state; None for the root, where `first` is read.
        self._texts: list[bytes | None] = [None]
        self._states: dict[bytes, int] = {}

    def advance(self, states: Any, tokens: Any) -> NDArray[np.int32]:
        """Follow one token from each state; arguments and result as in `SpanIndex.advance`."""
        checked, following = _states_and_tokens(states, tokens, len(self._texts))
        reached = [self._step(s, v) for s, v in zip(checked, following, strict=True)]
        return np.array(reached, dtype=np.int32)

    def allowed(self, states: Any) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
        """List the tokens that may follow each state; as `SpanIndex.allowed`."""
        checked = _checked_states(states, len(self._texts))
        return _to_csr([self._continuations(s) for s in checked])

    def is_final(self, states: Any) -> NDArray[np.bool_]:
        """Tell for states [n] whether whole characters were read; -1 is not final."""
        checked = _checked_states(states, len(self._texts))
        texts = [self._texts[s] or b"" for s in checked]
        final = [s != DEAD and _is_text(text) for s, text in zip(checked, texts, strict=True)]
        return np.array(final, dtype=np.bool_)

    def _continuations(self, state: int) -> dict[int, bytes]:
        """Return the text after each token that may follow."""
        if state == DEAD:
            return {}
        text = self._texts[state]
        spelling = self._first if text is None else self._following
        longer = {token: (text or b"") + more for token, more in spelling.items()}
        return {token: read for token, read in longer.items() if self._leads_on(read)}

    def _leads_on(self, text: bytes) -> bool:
        """Tell whether `text`, maybe with more tokens, is a piece of a passage."""
        if text not in self._beginnings:
            return False
        if text not in self._complete:
            self._complete[text] = _is_text(text) or any(
                self._leads_on(text + more) for more in self._following.values()
            )
        return self._complete[text]

    def _step(self, state: int, token: int) -> int:
        text = self._continuations(state).get(token)
        if text is None:
            return DEAD
        if text not in self._states:
            self._states[text] = len(self._texts)
            self._texts.append(text)
        return self._states[text]


class Trie:
    """A closed set of token sequences.

    Parameters
    ----------
    sequences
        The sequences, each of ids in [0, 2**31); repeated ones count once. An empty sequence
        makes the root final.

    Raises
    ------
    InputError
        If a token id is out of range.
    TypeError
        If a token id is not an integer.
    """

    def __init__(self, sequences: Iterable[Iterable[SupportsIndex]]) -> None:
        self._children: list[dict[int, int]] = [{}]
        self._final: list[bool] = [False]
        for sequence in token_lists("sequences", sequences):
            self._insert(sequence)

    @property
    def num_states(self) -> int:
        """Number of distinct prefixes, the empty one included."""
        return len(self._children)

    @property
    def num_edges(self) -> int:
        """Number of edges."""
        return sum(len(children) for children in self._children)

    def advance(self, states: Any, tokens: Any) -> NDArray[np.int32]:
        """Follow one token from each state; arguments and result as in `SpanIndex.advance`."""
        checked, following = _states_and_tokens(states, tokens, self.num_states)
        reached = [
            DEAD if s == DEAD else self._children[s].get(v, DEAD)
            for s, v in zip(checked, following, strict=True)
        ]
        return np.array(reached, dtype=np.int32)

    def allowed(self, states: Any) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
        """List the tokens that may follow each state; as `SpanIndex.allowed`."""
        checked = _checked_states(states, self.num_states)
        return _to_csr([() if s == DEAD else self._children[s] for s in checked])

    def is_final(self, states: Any) -> NDArray[np.bool_]:
        """Tell for states [n] whether a whole sequence ends there; -1 is not final."""
        checked = _checked_states(states, self.num_states)
        return np.array([s != DEAD and self._final[s] for s in checked], dtype=np.bool_)

    def _insert(self, sequence: Sequence[int]) -> None:
        state = ROOT
        for token in sequence:
            if token not in self._children[state]:
                self._children[state][token] = len(self._children)
                self._children.append({})
                self._final.append(False)
            state = self._children[state][token]
        self._final[state] = True


def _is_text(text: bytes) -> bool:
    try:
        text.decode()
    except UnicodeDecodeError:
        return False
    return True


def _checked_states(states: Any, count: int) -> list[int]:
    checked: list[int] = int_vector("states", states).tolist()
    for i, state in enumerate(checked):
        if not DEAD <= state < count:
            raise InputError(f"states[{i}]: expected -1 to {count - 1}, got {state}")
    return checked


def _states_and_tokens(states: Any, tokens: Any, count: int) -> tuple[list[int], list[int]]:
    checked = _checked_states(states, count)
    return checked, int_vector("tokens", tokens, len(checked)).tolist()


def _to_csr(sets: Sequence[Iterable[int]]) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
    rows = [sorted(tokens) for tokens in sets]
    offsets = np.zeros(len(rows) + 1, dtype=np.int64)
    np.cumsum([len(row) for row in rows], out=offsets[1:])
    return offsets, np.array([token for row in rows for token in row], dtype=np.int32)
