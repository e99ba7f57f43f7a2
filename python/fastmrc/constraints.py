"""Constraints of the search: deterministic token automata in the native core."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any, Literal, cast, overload

import numpy as np

from fastmrc import _C
from fastmrc.cuda.runtime import on_device
from fastmrc.errors import InputError

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray
    from transformers import PreTrainedTokenizerFast

    from fastmrc.text_constraints import TextSpanIndex, TokenSpanIndex

__all__ = ["Automaton", "SpanIndex", "Trie", "flatten_sequences", "int_vector", "native_automata"]


def int_vector(name: str, values: ArrayLike) -> NDArray[np.int32]:
    """Convert integers to a contiguous int32 vector, or say what is wrong with them.

    Raises
    ------
    TypeError
        If the values are not integers.
    ValueError
        If there is not exactly one dimension or a value does not fit 32 bits.
    """
    array = np.asarray(values)
    if array.size == 0 and array.ndim == 1:
        return np.zeros(0, dtype=np.int32)
    if array.dtype.kind not in "iu":
        raise TypeError(f"{name}: expected integers, got {array.dtype}")
    if array.ndim != 1:
        raise ValueError(f"{name}: expected 1 dimension, got {array.ndim}")
    if array.dtype != np.int32:
        narrow = array.astype(np.int32)
        if (narrow != array).any():
            raise ValueError(f"{name}: expected values that fit 32 bits")
        array = narrow
    return np.ascontiguousarray(array)


def flatten_sequences(
    name: str, sequences: Iterable[Sequence[int] | NDArray[np.integer]]
) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """Lay token sequences end to end.

    Returns
    -------
    tokens, offsets
        int32 [total] and int64 [number + 1]; sequence ``i`` is
        ``tokens[offsets[i] : offsets[i + 1]]``.
    """
    parts = list(sequences)
    if any(isinstance(part, (int, str)) for part in parts):
        raise TypeError(f"{name}: expected sequences of token ids, got single items")
    offsets = np.zeros(len(parts) + 1, dtype=np.int64)
    np.cumsum([len(part) for part in parts], out=offsets[1:])
    if all(isinstance(part, np.ndarray) for part in parts) and parts:
        joined: ArrayLike = np.concatenate(parts)
    else:
        joined = list(chain.from_iterable(parts))
    return int_vector(name, joined), offsets


class Automaton:
    """Behaviour shared by ``SpanIndex`` and ``Trie``: a deterministic token automaton.

    State 0 is the root, -1 the dead state. Immutable; may be used by several threads. States on a
    GPU give results there, see `fastmrc.ops`.
    """

    _native: _C.Automaton

    def _on_device_of(self, states: Any) -> Any:
        """Return this automaton on the GPU of `states`; None if they are on the host."""
        if not on_device(states):
            return None
        from fastmrc.cuda.automata import single_automaton

        return single_automaton(self._native, states.device)

    def advance(self, states: ArrayLike, tokens: ArrayLike) -> NDArray[np.int32]:
        """Follow one token from each state.

        Parameters
        ----------
        states, tokens
            Integers, [n].

        Returns
        -------
        numpy.ndarray
            int32 [n]; -1 where nothing follows.
        """
        if (there := self._on_device_of(states)) is not None:
            return cast("NDArray[np.int32]", there.advance(states, tokens))
        return self._native.advance(int_vector("states", states), int_vector("tokens", tokens))

    def allowed(self, states: ArrayLike) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
        """List the tokens that may follow each state.

        Returns
        -------
        offsets, tokens
            int64 [n + 1] and int32; the tokens of state ``i``, ascending, are
            ``tokens[offsets[i] : offsets[i + 1]]``.
        """
        if (there := self._on_device_of(states)) is not None:
            return cast("tuple[NDArray[np.int64], NDArray[np.int32]]", there.allowed(states))
        return self._native.allowed(int_vector("states", states))

    def is_final(self, states: ArrayLike) -> NDArray[np.bool_]:
        """Tell whether a sequence may end in each state; bool [n]."""
        if (there := self._on_device_of(states)) is not None:
            return cast("NDArray[np.bool_]", there.is_final(states))
        return self._native.is_final(int_vector("states", states))

    @property
    def num_states(self) -> int:
        """Number of states."""
        return self._native.num_states

    @property
    def num_edges(self) -> int:
        """Number of edges."""
        return self._native.num_edges


def native_automata(
    name: str, constraints: Automaton | Sequence[Automaton | None] | None, questions: int
) -> list[_C.Automaton | None]:
    """Return the native automaton of each question; one for all is repeated.

    Raises
    ------
    TypeError
        If something else than an automaton of this module or None is given.
    """
    if constraints is None or isinstance(constraints, Automaton):
        constraints = [constraints] * questions
    several = isinstance(constraints, Sequence) and not isinstance(constraints, str)
    for automaton in constraints if several else [constraints]:
        if automaton is not None and not isinstance(automaton, Automaton):
            raise TypeError(
                f"{name}: expected a fastmrc.SpanIndex or Trie, one per question or None, "
                f"got {type(automaton).__name__}"
            )
    return [None if automaton is None else automaton._native for automaton in constraints]


class SpanIndex(Automaton):
    """The contiguous pieces of some passages, none across two passages.

    A suffix automaton (Blumer et al. 1985), linear in time and size; every state is final.

    Parameters
    ----------
    passages
        Token ids of each passage, not negative.
    """

    _native: _C.SpanIndex

    def __init__(self, passages: Iterable[Sequence[int] | NDArray[np.integer]]) -> None:
        self._native = _C.SpanIndex(*flatten_sequences("passages", passages))

    @overload
    @classmethod
    def from_text(
        cls,
        passages: Sequence[str],
        tokenizer: PreTrainedTokenizerFast,
        unit: Literal["token"] = "token",
    ) -> TokenSpanIndex: ...

    @overload
    @classmethod
    def from_text(
        cls, passages: Sequence[str], tokenizer: PreTrainedTokenizerFast, unit: Literal["text"]
    ) -> TextSpanIndex: ...

    @classmethod
    def from_text(
        cls,
        passages: Sequence[str],
        tokenizer: PreTrainedTokenizerFast,
        unit: Literal["token", "text"] = "token",
    ) -> TokenSpanIndex | TextSpanIndex:
        """Index the pieces of texts, for an output that quotes them and is found in them again.

        Parameters
        ----------
        passages
            Texts; read as the tokenizer normalises them (lower case, accents, white space), cited
            as they are.
        tokenizer
            Fast tokenizer of the model. It is read at the first call; later changes other than
            tokens added to it go unseen.
        unit
            ``"token"``: pieces of the tokens that the tokenizer makes of a passage, so an output
            begins and ends where those do, and has no other tokens. The smaller index; for a model
            trained to copy the tokens of its input. ``"text"``: every sequence of tokens that
            spells a piece of a passage, also one that begins or ends inside the passage's tokens;
            for a model that writes as its tokenizer cuts the answer by itself. Byte-level BPE,
            SentencePiece (Metaspace) BPE and Unigram, and WordPiece tokenizers.

        Returns
        -------
        Automaton
            With ``locate(output)``, which gives the passages and places of an output, token ids or
            text, as `fastmrc.Span`: `fastmrc.text_constraints.TokenSpanIndex`, a `SpanIndex`, or
            `fastmrc.text_constraints.TextSpanIndex`.

        Raises
        ------
        InputError
            If the unit is ``"text"`` and the tokenizer is of another kind; if a text is not one
            that UTF-8 can encode.
        TypeError
            If the passages are not strings or the tokenizer is not a fast one of transformers.
        """
        from fastmrc import text_constraints

        if unit == "text":
            return text_constraints.TextSpanIndex(passages, tokenizer)
        if unit == "token":
            return text_constraints.TokenSpanIndex(passages, tokenizer)
        raise InputError(f"unit: expected 'token' or 'text', got {unit!r}")

    def occurrences(self, span: Sequence[int] | NDArray[np.integer]) -> NDArray[np.int32]:
        """Find where a span stands.

        Returns
        -------
        numpy.ndarray
            int32 [m, 2]: passage and position of each occurrence, in order; none for an empty span.
        """
        return self._native.occurrences(int_vector("span", span))


class Trie(Automaton):
    """A closed set of token sequences; a state is final where a sequence ends.

    Parameters
    ----------
    sequences
        Token ids of each sequence, not negative; equal ones count once.
    """

    _native: _C.Trie

    def __init__(self, sequences: Iterable[Sequence[int] | NDArray[np.integer]]) -> None:
        self._native = _C.Trie(*flatten_sequences("sequences", sequences))
