"""The native automata against the enumerations of the oracle, and what they refuse."""

from __future__ import annotations

import gc
from typing import Any

import numpy as np
import pytest
from cases import Generator, Tally, count_cases, random_alphabet, random_sequences
from hypothesis import given, settings
from hypothesis import strategies as st

import fastmrc
from fastmrc import decoding, reference
from fastmrc.constraints import flatten_sequences, int_vector
from fastmrc.options import SearchOptions

COUNTS = [2_000, pytest.param(100_000, marks=pytest.mark.exhaustive)]


def _same_language(native: Any, oracle: Any, sequences: list[list[int]], depth: int) -> int:
    """Walk both automata together, `depth` tokens deep; returns the number of states visited."""
    level = [(0, 0)]
    visited = 0
    alphabet = sorted({token for sequence in sequences for token in sequence})
    for _ in range(depth + 1):
        if not level:
            break
        states = np.array([a for a, _ in level], np.int32)
        oracle_states = np.array([b for _, b in level], np.int32)
        visited += len(level)
        np.testing.assert_array_equal(native.is_final(states), oracle.is_final(oracle_states))
        offsets, tokens = native.allowed(states)
        want_offsets, want_tokens = oracle.allowed(oracle_states)
        np.testing.assert_array_equal(offsets, want_offsets)
        np.testing.assert_array_equal(tokens, want_tokens)
        assert (offsets.dtype, tokens.dtype) == (np.int64, np.int32)
        parents = np.repeat(np.arange(len(level)), np.diff(offsets))
        level = list(
            zip(
                native.advance(states[parents], tokens).tolist(),
                oracle.advance(oracle_states[parents], tokens).tolist(),
                strict=True,
            )
        )
        assert all(state >= 0 for state, _ in level)
        for token in alphabet[:3]:  # and what is not allowed is dead
            steps = np.full(len(states), token)
            np.testing.assert_array_equal(
                native.advance(states, steps) < 0, oracle.advance(oracle_states, steps) < 0
            )
    return visited


def _compare(rng: Generator, tally: Tally) -> None:
    tally.cases += 1
    vocabulary = int(rng.choice([2, 3, 5, 40, 100_000]))
    alphabet = random_alphabet(rng, vocabulary, 0)
    sequences = random_sequences(rng, int(rng.integers(0, 5)), int(rng.choice([1, 4, 9])), alphabet)
    if rng.random() < 0.5:
        trie, oracle_trie = fastmrc.Trie(sequences), reference.Trie(sequences)
        assert (trie.num_states, trie.num_edges) == (oracle_trie.num_states, oracle_trie.num_edges)
        _same_language(trie, oracle_trie, sequences, 9)
        return
    index, oracle_index = fastmrc.SpanIndex(sequences), reference.SpanIndex(sequences)
    total = sum(map(len, sequences))
    assert index.num_states <= max(1, 2 * total)
    assert index.num_edges <= 3 * total
    assert _same_language(index, oracle_index, sequences, 9) == oracle_index.num_states
    span = random_sequences(rng, 1, 3, alphabet)[0]
    if sequences and rng.random() < 0.7:
        source = sequences[int(rng.integers(len(sequences)))]
        start = int(rng.integers(0, len(source) + 1))
        span = source[start : start + int(rng.integers(0, 4))]
    found = index.occurrences(span)
    assert found.dtype == np.int32
    np.testing.assert_array_equal(found, oracle_index.occurrences(span))


@pytest.mark.parametrize("cases", COUNTS)
def test_automata(cases: int) -> None:
    _, line = count_cases(30, cases, _compare)
    print(f"automata: {line}")


SEQUENCES = st.lists(st.lists(st.integers(0, 3), max_size=7), max_size=4)


@settings(deadline=None, max_examples=100)
@given(SEQUENCES)
def test_span_index_property(sequences: list[list[int]]) -> None:
    oracle = reference.SpanIndex(sequences)
    visited = _same_language(fastmrc.SpanIndex(sequences), oracle, sequences, 7)
    assert visited == oracle.num_states


@settings(deadline=None, max_examples=100)
@given(SEQUENCES)
def test_trie_property(sequences: list[list[int]]) -> None:
    oracle = reference.Trie(sequences)
    assert _same_language(fastmrc.Trie(sequences), oracle, sequences, 7) == oracle.num_states


def test_no_span_crosses_passages() -> None:
    index = fastmrc.SpanIndex([[1, 2], [3, 4]])
    state = index.advance([0], [2])
    assert index.advance(state, [3]).tolist() == [-1]


def test_many_equal_tokens_take_linear_space() -> None:
    index = fastmrc.SpanIndex([[5] * 20_000, [5] * 10_000])
    assert index.num_states <= 60_000
    assert len(index.occurrences([5] * 19_999)) == 2


@pytest.mark.parametrize("automaton", [fastmrc.SpanIndex([]), fastmrc.SpanIndex([[], []])])
def test_a_span_index_of_nothing(automaton: fastmrc.SpanIndex) -> None:
    assert automaton.num_states == 1
    assert automaton.is_final([0, -1]).tolist() == [True, False]
    assert automaton.allowed([0])[1].tolist() == []
    assert automaton.occurrences([]).shape == automaton.occurrences([1]).shape == (0, 2)


def test_a_trie_of_nothing_has_no_end() -> None:
    assert fastmrc.Trie([]).is_final([0]).tolist() == [False]
    assert fastmrc.Trie([[]]).is_final([0]).tolist() == [True]


def test_arrays_and_lists_are_equal() -> None:
    lists = [[1, 2, 3], [2, 3]]
    for dtype in (np.int64, np.int32, np.uint16, ">i4"):
        index = fastmrc.SpanIndex([np.array(sequence, dtype) for sequence in lists])
        assert index.occurrences(np.array([2, 3], dtype)).tolist() == [[0, 1], [1, 0]]
    assert fastmrc.SpanIndex([np.arange(9)[::-2]]).occurrences([4]).tolist() == [[0, 2]]


def test_inputs_are_not_modified() -> None:
    states, tokens = np.array([0, -1, 0], np.int32), np.array([1, 1, 9], np.int32)
    trie = fastmrc.Trie([[1, 2]])
    assert trie.advance(states, tokens).tolist() == [1, -1, -1]
    assert (states.tolist(), tokens.tolist()) == ([0, -1, 0], [1, 1, 9])


@pytest.mark.parametrize("make", [fastmrc.SpanIndex, fastmrc.Trie])
@pytest.mark.parametrize(
    ("sequences", "error", "message"),
    [
        ([[1, -1]], ValueError, "-1"),
        ([[2**31]], ValueError, "32 bits"),
        ([[2**70]], (ValueError, TypeError, OverflowError), ""),
        ([[1.5]], TypeError, "expected integers, got float64"),
        ([["a"]], TypeError, "expected integers"),
        ([[None]], TypeError, "expected integers"),
        ([[[1]]], (TypeError, ValueError), "expected"),
        ([1, 2], TypeError, "expected sequences of token ids, got single items"),
        (["ab"], TypeError, "expected sequences of token ids, got single items"),
    ],
)
def test_builders_refuse(make: Any, sequences: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message or None):
        make(sequences)


@pytest.mark.parametrize("automaton", [fastmrc.SpanIndex([[1, 2]]), fastmrc.Trie([[1, 2]])])
def test_automata_refuse(automaton: Any) -> None:
    size = automaton.num_states
    for bad in (-2, size, 2**31 - 1):
        for call in (automaton.allowed, automaton.is_final, lambda s: automaton.advance(s, [1, 1])):
            with pytest.raises(ValueError, match=f"{bad}"):
                call([0, bad])
    with pytest.raises(ValueError, match="one per state, 2, got 1"):
        automaton.advance([0, 0], [1])
    with pytest.raises(TypeError, match="states: expected integers"):
        automaton.allowed([0.5])
    with pytest.raises(ValueError, match="states: expected 1 dimension, got 2"):
        automaton.allowed([[0]])
    with pytest.raises(ValueError, match="states: expected 1 dimension, got 0"):
        automaton.is_final(0)
    assert automaton.advance([0], [-5]).tolist() == [-1]


def test_int_vector() -> None:
    assert int_vector("x", []).dtype == np.int32
    assert int_vector("x", np.array([], float)).tolist() == []
    with pytest.raises(TypeError, match="x: expected integers, got bool"):
        int_vector("x", [True])


def test_flatten_sequences() -> None:
    tokens, offsets = flatten_sequences("x", iter([[1], [], np.array([2, 3])]))
    assert (tokens.tolist(), offsets.tolist()) == ([1, 2, 3], [0, 1, 1, 3])
    tokens, offsets = flatten_sequences("x", [])
    assert (tokens.tolist(), offsets.tolist()) == ([], [0])


def test_a_search_keeps_its_constraints_alive() -> None:
    class Source:
        def prefill(self) -> Any:
            gc.collect()
            return np.zeros((1, 9), np.float32)

        def step(self, request: Any) -> Any:
            gc.collect()
            return np.zeros((len(request.row_passage), 9), np.float32)

    for _ in range(3):
        batch = decoding.beam_search(
            Source(),
            [[[1, 2]]],
            end_id=8,
            vocabulary_size=9,
            options=SearchOptions(beam_size=1, max_answer_tokens=3),
            constraints=[fastmrc.Trie([[4, 5, 6]])],
        )
        assert batch.results[0].hypotheses[0].token_ids == [4, 5, 6]
