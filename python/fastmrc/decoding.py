"""Drives the native searches with the logits of an encoder."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from fastmrc import _C
from fastmrc._build import follow_torch
from fastmrc.constraints import Automaton, flatten_sequences, native_automata
from fastmrc.cuda.runtime import on_device
from fastmrc.options import SamplingOptions, SearchOptions
from fastmrc.types import Hypothesis, SampledSequence, SearchResult

if TYPE_CHECKING:
    import torch

    from fastmrc.encoders.device import StepInputs

__all__ = ["BatchResult", "DeviceLogitsSource", "LogitsSource", "beam_search", "sample_sequences"]


class LogitsSource(Protocol):
    """What computes the logits of a search; `fastmrc.encoders.unilm.EncoderSession` does."""

    def prefill(self) -> Any:
        """Return the logits of the first token, [passages of all questions, V]."""

    def step(self, request: _C.StepRequest) -> Any:
        """Return the logits of the rows that the request lists, [rows, V]."""


@runtime_checkable
class DeviceLogitsSource(Protocol):
    """What computes the logits of a search on a GPU, as `fastmrc.encoders.device.DeviceSession`."""

    @property
    def device(self) -> torch.device:
        """Where the logits are."""

    @property
    def rows(self) -> int:
        """Most rows that `step` returns, divided by the beam size."""

    def prefill(self) -> torch.Tensor:
        """Return the logits of the first token, [passages of all questions, V]."""

    def begin(self, passages: NDArray[np.int64]) -> tuple[StepInputs, NDArray[np.int64]]:
        """Keep these passages; return what `step` reads and the row of each passage."""

    def step(self) -> torch.Tensor:
        """Encode what the inputs hold; return logits [rows * beam size, V]."""


@dataclass(frozen=True, slots=True)
class BatchResult:
    """Results of a batch of questions and the seconds spent in each part.

    Of a search on a GPU, whose parts run into each other there, the first are those until the
    passages are encoded and the second all others.
    """

    results: list[SearchResult]
    encode_seconds: float
    decode_seconds: float


def beam_search(
    source: LogitsSource | DeviceLogitsSource,
    questions: Sequence[Sequence[Sequence[int] | NDArray[np.int32]]],
    *,
    end_id: int,
    vocabulary_size: int,
    options: SearchOptions,
    weights: Sequence[Sequence[float]] | None = None,
    constraints: Sequence[Automaton | None] = (),
) -> BatchResult:
    """Search the answers to a batch of questions.

    Parameters
    ----------
    source
        Computes the logits; where it does so on a GPU, a `DeviceLogitsSource`, the search is there,
        too.
    questions
        For each question the token ids of its passages, without special tokens.
    end_id
        The token that ends an answer.
    vocabulary_size
        Columns of the logits.
    options
        Beam size, mode, vote, lengths and finishing rule.
    weights
        One weight per passage of each question, for the vote ``"weighted"``.
    constraints
        Empty, or one automaton per question that replaces the constraint of the mode.

    Raises
    ------
    ValueError
        If a value is out of range or the logits hold NaN, +inf or a row of -inf.
    """
    follow_torch()
    tokens, passage_offsets = flatten_sequences(
        "passages", [passage for passages in questions for passage in passages]
    )
    question_offsets = np.zeros(len(questions) + 1, dtype=np.int32)
    np.cumsum([len(passages) for passages in questions], out=question_offsets[1:])
    flat_weights = None if weights is None else _flatten_weights(weights, question_offsets)
    search = _C.BeamSearch(  # checks all arguments, also for a GPU
        tokens,
        passage_offsets,
        question_offsets,
        vocabulary_size=vocabulary_size,
        end_id=end_id,
        beam_size=options.beam_size,
        min_tokens=options.min_answer_tokens,
        max_tokens=options.max_answer_tokens,
        vote=options.vote,
        finish=options.finish,
        length_penalty=options.length_penalty,
        no_answer_ratio=math.inf if options.no_answer_ratio is None else options.no_answer_ratio,
        spans_only=options.mode == "extractive",
        look_ahead=options.look_ahead,
        constraints=native_automata("constraints", constraints, len(questions)),
        weights=flat_weights,
    )
    if isinstance(source, DeviceLogitsSource):
        from fastmrc.cuda.beam_search import search_on_device

        given = list(constraints) if constraints else [None] * len(questions)
        return BatchResult(
            *search_on_device(
                source,
                questions,
                end_id=end_id,
                vocabulary_size=vocabulary_size,
                options=options,
                weights=flat_weights,
                constraints=given,
            )
        )
    encode_seconds = decode_seconds = 0.0
    while not search.done:
        begin = time.perf_counter()
        logits = source.prefill() if search.steps == 0 else source.step(search.request)
        middle = time.perf_counter()
        search.step(logits)
        encode_seconds += middle - begin
        decode_seconds += time.perf_counter() - middle
    of_passages = [search.surviving, search.voting, search.no_answer]
    results = []
    for q in range(len(questions)):
        own = slice(question_offsets[q], question_offsets[q + 1])
        results.append(_result(search, q, [values[own].tolist() for values in of_passages]))
    return BatchResult(results, encode_seconds, decode_seconds)


def sample_sequences(
    source: LogitsSource,
    counts: Sequence[int],
    *,
    end_id: int,
    vocabulary_size: int,
    options: SamplingOptions,
    seed: int,
    first_stream: int = 0,
    constraints: Sequence[Automaton | None] = (),
) -> list[list[SampledSequence]]:
    """Draw sequences after each of a batch of prompts.

    Parameters
    ----------
    source
        Computes the logits; its passages are the prompts. Beginnings that sequences share are
        asked for once.
    counts
        Number of sequences for each prompt. Sequence i of a prompt takes its random numbers from
        stream `first_stream` + i, that of its token t at position t: what it becomes depends on
        seed, stream and logits alone.
    end_id
        The token that ends a sequence.
    vocabulary_size
        Columns of the logits.
    options
        Truncation, temperature and lengths.
    seed, first_stream
        0 to 2**64 - 1.
    constraints
        Empty, or one automaton per prompt (or None); an end token that does not finish a sequence
        leads back to the root.

    Raises
    ------
    ValueError
        If a value is out of range or the logits hold NaN, +inf or a row of -inf.
    """
    follow_torch()
    sampler = _C.SequenceSampler(
        list(counts),
        vocabulary_size=vocabulary_size,
        end_id=end_id,
        top_k=options.top_k or 0,
        top_p=options.top_p,
        temperature=options.temperature,
        seed=seed,
        first_stream=first_stream,
        min_tokens=options.min_tokens,
        max_tokens=options.max_tokens,
        min_ends=options.min_ends,
        constraints=native_automata("constraints", constraints, len(counts)),
    )
    while not sampler.done:
        logits = source.prefill() if sampler.steps == 0 else source.step(sampler.request)
        if on_device(logits):
            _draw_on_device(sampler, logits, end_id, options, seed, constraints)
        else:
            sampler.step(logits)
    return [
        [SampledSequence(*entry) for entry in sampler.sequences(prompt)]
        for prompt in range(len(counts))
    ]


def _draw_on_device(
    sampler: _C.SequenceSampler,
    logits: Any,
    end_id: int,
    options: SamplingOptions,
    seed: int,
    constraints: Sequence[Automaton | None],
) -> None:
    """Make a step of the sampler with draws from logits on a GPU; only those come to the host."""
    from fastmrc.cuda import ops

    rows, streams, prompts, states = sampler.draws()
    tokens, log_probs = ops.sample(
        logits,
        end_id=end_id,
        seed=seed,
        streams=streams,
        positions=np.full(len(rows), sampler.steps, dtype=np.uint32),
        top_k=options.top_k or 0,
        top_p=options.top_p,
        temperature=options.temperature,
        constraint=[constraints[prompt] for prompt in prompts] if constraints else None,
        states=states,
        allow_end=np.full(len(states), sampler.steps >= options.min_tokens),
        row_of=rows,
    )
    sampler.take(tokens.cpu().numpy(), log_probs.cpu().numpy())


def _flatten_weights(
    weights: Sequence[Sequence[float]], question_offsets: NDArray[np.int32]
) -> NDArray[np.float32]:
    given = [len(group) for group in weights]
    expected = np.diff(question_offsets).tolist()
    if given != expected:
        raise ValueError(
            f"weights: expected one per passage of each question, {expected}, got {given}"
        )
    return np.array([w for group in weights for w in group], dtype=np.float32)


def _result(search: _C.BeamSearch, question: int, of_passages: list[Any]) -> SearchResult:
    hypotheses = [Hypothesis(*entry) for entry in search.hypotheses(question)]
    best = search.best(question)
    return SearchResult(None if best < 0 else hypotheses[best], hypotheses, *of_passages)
