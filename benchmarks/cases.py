"""Inputs shared by the kernel benchmarks: shapes of a BERT-base reader on ten passages."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

VOCABULARY = 21128
PASSAGES = 10
PASSAGE_TOKENS = 256
BEAM_SIZE = 3
STEPS = 6
SLOTS = 32
END_ID = 102


def standard_normal_rows(rows: int = PASSAGES * BEAM_SIZE) -> NDArray[np.float32]:
    """Return standard-normal logits, float32 [rows, V]."""
    return np.random.default_rng(0).standard_normal((rows, VOCABULARY), dtype=np.float32)


def passages() -> list[NDArray[np.int32]]:
    """Return ten passages of 256 tokens, drawn from 800 tokens by a law like Zipf's."""
    generator = np.random.default_rng(1)
    weights = 1.0 / np.arange(1, 801)
    tokens = generator.choice(800, (PASSAGES, PASSAGE_TOKENS), p=weights / weights.sum())
    return list((1000 + tokens).astype(np.int32))


def slot_logits() -> NDArray[np.float32]:
    """Return slot logits, float32 [10 passages, 32 slots, V], that spell six tokens of each passage
    and the end."""
    logits = standard_normal_rows(PASSAGES * SLOTS).reshape(PASSAGES, SLOTS, VOCABULARY)
    for p, passage in enumerate(passages()):
        start = 20 * p
        for slot, token in enumerate(passage[start : start + STEPS]):
            logits[p, slot, token] += 14
        logits[p, STEPS, END_ID] += 14
    return logits


def span_logits() -> NDArray[np.float32]:
    """Return start and end logits, float32 [2, 64, 384]."""
    generator = np.random.default_rng(2)
    return generator.normal(0, 3, (2, 64, 384)).astype(np.float32)


def bert4keras_draw(logits: NDArray[np.float32], top_k: int) -> NDArray[np.int64]:
    """Draw one token from each row as `AutoRegressiveDecoder.random_sample` of bert4keras 0.11
    does, its softmax included; [rows]."""
    logits = logits / 1  # the temperature
    exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
    probs = exponentials / exponentials.sum(axis=1, keepdims=True)
    probs /= probs.sum(axis=1, keepdims=True)
    ids = probs.argpartition(-top_k, axis=1)[:, -top_k:]
    probs = np.take_along_axis(probs, ids, axis=1)
    probs /= probs.sum(axis=1, keepdims=True)
    drawn = np.apply_along_axis(lambda p: np.random.choice(len(p), p=p), 1, probs)
    tokens: NDArray[np.int64] = np.take_along_axis(ids, drawn.reshape(-1, 1), axis=1)[:, 0]
    return tokens


def cloze_positions() -> tuple[NDArray[np.float32], NDArray[np.int32]]:
    """Return logits and word ids of 256 documents of 800 words, [256, 800]: words of a vocabulary
    of `VOCABULARY`, as frequent as Zipf's law has it."""
    rng = np.random.default_rng(4)
    logits = 2 * rng.standard_normal((256, 800), dtype=np.float32)
    shares = 1 / np.arange(1, VOCABULARY + 1)
    ids = rng.choice(VOCABULARY, size=logits.shape, p=shares / shares.sum())
    return logits, ids.astype(np.int32)


def unit_vectors(count: int, dimension: int = 384) -> NDArray[np.float32]:
    """Return vectors of length 1 in random directions, float32 [count, dimension]."""
    vectors = np.random.default_rng(3).standard_normal((count, dimension), dtype=np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


class RecordedLogits:
    """Logits of a search of `STEPS` steps, computed beforehand: stands in for an encoder."""

    def __init__(self) -> None:
        rows = standard_normal_rows(PASSAGES * (1 + BEAM_SIZE * (STEPS - 1)))
        first, rest = rows[:PASSAGES], rows[PASSAGES:]
        self._steps = [first, *rest.reshape(STEPS - 1, PASSAGES * BEAM_SIZE, VOCABULARY)]
        self._next = 0

    def _take(self) -> NDArray[np.float32]:
        self._next += 1
        return self._steps[self._next - 1]

    def prefill(self) -> NDArray[np.float32]:
        """For the engine: [passages, V]."""
        self._next = 0
        return self._take()

    def step(self, request: object) -> NDArray[np.float32]:
        """For the engine: [passages x hypotheses, V]."""
        return self._take()

    def next_logits(
        self, prefixes: Sequence[Sequence[int]], passage_ids: Sequence[int]
    ) -> NDArray[np.float32]:
        """For the reference: [passages, hypotheses, V]."""
        if prefixes == [[]]:
            self._next = 0
        return self._take().reshape(len(passage_ids), len(prefixes), VOCABULARY)
