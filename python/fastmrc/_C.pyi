"""Native engine of fastmrc; use the Python modules above it."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

def version() -> str: ...
def compiler() -> str: ...
def isa() -> str: ...
def num_threads() -> int: ...
def set_num_threads(n: int) -> None: ...
def topk(x: Any, k: int) -> tuple[NDArray[np.float32], NDArray[np.int32]]: ...
def log_softmax_topk(x: Any, k: int) -> tuple[NDArray[np.float32], NDArray[np.int32]]: ...
def topk_merge(
    scores: Any, first_id: int, values: NDArray[np.float32], ids: NDArray[np.int64]
) -> None: ...
def inner_products(queries: Any, corpus: Any, ids: NDArray[np.int64]) -> NDArray[np.float64]: ...
def row_stats(
    x: Any,
) -> tuple[NDArray[np.float32], NDArray[np.int32], NDArray[np.float64]]: ...
def beam_step(
    logits: Any,
    scores: Any,
    passages: Any,
    hypotheses: Any,
    beam_size: int,
    end_id: int,
    vote: str,
    weights: Any,
    constraints: Sequence[Automaton | None],
    states: Any,
    allow_end: Sequence[bool],
) -> tuple[NDArray[np.float32], NDArray[np.int32], NDArray[np.int32]]: ...
def slot_argmax(
    logits: Any,
    slots: int,
    end_id: int,
    min_tokens: int,
    constraints: Sequence[Automaton | None],
) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.float32]]: ...
def slot_topk(
    logits: Any,
    slots: int,
    end_id: int,
    min_tokens: int,
    constraints: Sequence[Automaton | None],
    k: int,
) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.float32]]: ...
def best_spans(
    start: Any,
    end: Any,
    k: int,
    max_length: int,
    mask: Any,
    null_position: int,
) -> tuple[NDArray[np.float32], NDArray[np.int32], NDArray[np.int32], NDArray[np.float32]]: ...
def attention_sum(
    logits: Any, word_ids: Any, k: int, mask: Any, lengths: Any
) -> tuple[NDArray[np.int32], NDArray[np.float64], NDArray[np.int32]]: ...
def sample(
    logits: Any,
    seed: int,
    streams: NDArray[np.uint64] | None,
    positions: NDArray[np.uint32] | None,
    top_k: int,
    top_p: float,
    temperature: float,
    end_id: int,
    constraints: Sequence[Automaton | None],
    states: Any,
    allow_end: NDArray[np.uint8] | None,
) -> tuple[NDArray[np.int32], NDArray[np.float64]]: ...
def pack_automata(
    automata: Sequence[Automaton | None],
) -> tuple[
    NDArray[np.int32],
    NDArray[np.int32],
    NDArray[np.int32],
    NDArray[np.uint8],
    NDArray[np.int64],
    NDArray[np.int64],
]: ...
def find_occurrences(tokens: Any, offsets: Any, span: Any) -> NDArray[np.int32]: ...

class Automaton:
    def advance(self, states: Any, tokens: Any) -> NDArray[np.int32]: ...
    def allowed(self, states: Any) -> tuple[NDArray[np.int64], NDArray[np.int32]]: ...
    def is_final(self, states: Any) -> NDArray[np.bool_]: ...
    @property
    def num_states(self) -> int: ...
    @property
    def num_edges(self) -> int: ...

class SpanIndex(Automaton):
    def __init__(self, tokens: Any, offsets: Any) -> None: ...
    def occurrences(self, span: Any) -> NDArray[np.int32]: ...

class Trie(Automaton):
    def __init__(self, tokens: Any, offsets: Any) -> None: ...

class TokenSpellings:
    def __init__(self, ids: Any, text: Any, offsets: Any) -> None: ...

class TextIndex(Automaton):
    def __init__(
        self, text: Any, offsets: Any, first: TokenSpellings, following: TokenSpellings
    ) -> None: ...

class StepRequest:
    @property
    def questions(self) -> NDArray[np.int32]: ...
    @property
    def hypotheses(self) -> NDArray[np.int32]: ...
    @property
    def width(self) -> int: ...
    @property
    def columns(self) -> int: ...
    @property
    def tokens(self) -> NDArray[np.int32]: ...
    @property
    def depths(self) -> NDArray[np.int32]: ...
    @property
    def ancestors(self) -> NDArray[np.uint8]: ...
    @property
    def row_passage(self) -> NDArray[np.int32]: ...
    @property
    def row_question(self) -> NDArray[np.int32]: ...
    @property
    def row_column(self) -> NDArray[np.int32]: ...

class BeamSearch:
    def __init__(
        self,
        tokens: Any,
        passage_offsets: Any,
        question_offsets: Any,
        vocabulary_size: int,
        end_id: int,
        beam_size: int,
        min_tokens: int,
        max_tokens: int,
        vote: str,
        finish: str,
        length_penalty: float,
        no_answer_ratio: float,
        spans_only: bool,
        look_ahead: int,
        constraints: Sequence[Automaton | None],
        weights: Any,
    ) -> None: ...
    def step(self, logits: Any) -> None: ...
    def best(self, question: int) -> int: ...
    def hypotheses(self, question: int) -> list[tuple[list[int], float, bool]]: ...
    def live_tokens(self, question: int) -> list[list[int]]: ...
    @property
    def done(self) -> bool: ...
    @property
    def steps(self) -> int: ...
    @property
    def request(self) -> StepRequest: ...
    @property
    def surviving(self) -> NDArray[np.bool_]: ...
    @property
    def voting(self) -> NDArray[np.bool_]: ...
    @property
    def no_answer(self) -> NDArray[np.float64]: ...

class SequenceSampler:
    def __init__(
        self,
        sequences: Sequence[int],
        vocabulary_size: int,
        end_id: int,
        top_k: int,
        top_p: float,
        temperature: float,
        seed: int,
        first_stream: int,
        min_tokens: int,
        max_tokens: int,
        min_ends: int,
        constraints: Sequence[Automaton | None],
    ) -> None: ...
    def step(self, logits: Any) -> None: ...
    def draws(
        self,
    ) -> tuple[NDArray[np.int32], NDArray[np.uint64], NDArray[np.int32], NDArray[np.int32]]: ...
    def take(self, tokens: NDArray[np.int32], log_probs: NDArray[np.float64]) -> None: ...
    @property
    def done(self) -> bool: ...
    @property
    def steps(self) -> int: ...
    @property
    def request(self) -> StepRequest: ...
    def sequences(self, prompt: int) -> list[tuple[list[int], float, bool]]: ...
