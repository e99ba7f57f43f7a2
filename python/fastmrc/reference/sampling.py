"""Random sequences in plain Python and NumPy: the definition that the native sampler must meet."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, SupportsIndex

import numpy as np
from numpy.typing import NDArray

from fastmrc.errors import InputError
from fastmrc.options import NUCLEUS_SLACK, SamplingOptions
from fastmrc.reference._checks import int_vector, like, require_int, to_numpy
from fastmrc.reference.constraints import DEAD, ROOT, Automaton
from fastmrc.reference.ops import allowed_mask, check_logits, logit_rows
from fastmrc.types import SampledSequence

__all__ = ["NextRows", "philox", "sample", "sample_sequences", "uniform"]

NextRows = Callable[[list[list[int]]], Any]
"""From n prefixes, token lists after one prompt, to logits [n, V]."""

_WORD = 2**32 - 1


def philox(key: int, counter: Sequence[int]) -> tuple[int, int, int, int]:
    """Return the four 32-bit words of Philox4x32-10 for a 64-bit key and four counter words.

    Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
    """
    low, high = key & _WORD, key >> 32
    c0, c1, c2, c3 = counter
    for _ in range(10):
        a, b = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (b >> 32) ^ c1 ^ low, b & _WORD, (a >> 32) ^ c3 ^ high, a & _WORD
        low, high = (low + 0x9E3779B9) & _WORD, (high + 0xBB67AE85) & _WORD
    return c0, c1, c2, c3


def uniform(seed: int, stream: int, position: int) -> float:
    """Return number `position` of a stream: a multiple of 2**-53 in [0, 1)."""
    first, second, _, _ = philox(seed, (stream & _WORD, stream >> 32, position, 0))
    return ((first << 32 | second) >> 11) * 2.0**-53


def sample(
    logits: Any,
    *,
    end_id: SupportsIndex,
    seed: SupportsIndex,
    streams: Any = None,
    positions: Any = 0,
    top_k: int | None = None,
    top_p: float = 1.0,
    temperature: float = 1.0,
    constraint: Automaton | Sequence[Automaton | None] | None = None,
    states: Any = None,
    allow_end: bool | Sequence[bool] = True,
) -> tuple[Any, Any]:
    """Draw one token from each row.

    Of the tokens that may follow the `top_k` likeliest are kept (of equal logits the lower token),
    of these the fewest likeliest whose share of the weights ``exp(logit / temperature)`` reaches
    `top_p`. The token drawn is the first, by rising id, at which the running sum of the weights
    exceeds ``uniform(seed, stream, position)`` times their total.

    Parameters
    ----------
    logits
        [rows, V], float32 or float16 (torch: also bfloat16).
    end_id
        The token that ends a sequence.
    seed
        0 to 2**64 - 1.
    streams, positions
        Integers [rows] or one for all: which random number a row gets; by default the streams are
        0, 1, ...
    top_k, top_p, temperature
        As `fastmrc.options.SamplingOptions`.
    constraint
        Nothing, one automaton for all rows, or one per row (or None). The end token needs a final
        state.
    states
        int [rows], automaton states, -1 if dead; None: the root 0.
    allow_end
        Whether the end token may be drawn: one bool for all, or [rows].

    Returns
    -------
    tokens
        int32 [rows]; -1 where nothing may follow.
    log_probs
        float64 [rows], logarithm of the token's probability in the softmax of the whole row at
        temperature 1; -inf where nothing may follow.

    Raises
    ------
    InputError
        If shapes or values do not fit, a row holds NaN, plus infinity or only minus infinity, or an
        edge of the constraint is the end token or not in the vocabulary.
    TypeError
        If an argument has the wrong type.
    """
    options = SamplingOptions(top_k=top_k, top_p=top_p, temperature=temperature)
    rows = logit_rows("logits", logits)
    count, vocabulary = rows.shape
    end_id = require_int("end_id", end_id, 0, vocabulary - 1)
    seed = require_int("seed", seed, 0, 2**64 - 1)
    stream_of = _numbers("streams", range(count) if streams is None else streams, count, 64)
    position_of = _numbers("positions", positions, count, 32)
    state_of = int_vector("states", np.full(count, ROOT) if states is None else states, count)
    ends = np.broadcast_to(allow_end, count)
    automata = constraint if isinstance(constraint, Sequence) else [constraint] * count
    if len(automata) != count:
        raise InputError(f"constraint: expected one per row, {count}, got {len(automata)}")
    check_logits("logits", rows)
    tokens = np.full(count, -1, dtype=np.int32)
    log_probs = np.full(count, -np.inf)
    for i, row in enumerate(rows):
        allowed = allowed_mask(automata[i], state_of[i : i + 1], vocabulary, end_id, bool(ends[i]))
        weights = _weights(row, allowed[0], options)
        if not weights.any():
            continue
        running = np.cumsum(weights)
        u = uniform(seed, stream_of[i], position_of[i])
        tokens[i] = np.flatnonzero(running > u * running[-1])[0]
        shifted = row.astype(np.float64) - float(row.max())
        log_probs[i] = shifted[tokens[i]] - np.log(np.exp(shifted).sum())
    return like(tokens, logits), like(log_probs, logits)


def _numbers(name: str, values: Any, count: int, bits: int) -> list[int]:
    """Return one number for each row; one alone counts for all."""
    given = values if isinstance(values, Iterable) else [values] * count
    numbers = [require_int(name, value, 0, 2**bits - 1) for value in given]
    if len(numbers) != count:
        raise InputError(f"{name}: expected one per row, {count}, got {len(numbers)}")
    return numbers


def _weights(
    row: NDArray[np.float32], allowed: NDArray[np.bool_], options: SamplingOptions
) -> NDArray[np.float64]:
    """Return the weight of each token [V], 0 for those that may not be drawn."""
    weights = np.zeros(len(row))
    kept = np.flatnonzero(allowed & (row > -np.inf))
    if len(kept):
        kept = kept[np.argsort(-row[kept], kind="stable")][: options.top_k]
        logits = row[kept].astype(np.float64)
        own = np.exp((logits - logits[0]) / options.temperature)
        if options.top_p < 1:
            reached = np.cumsum(own) >= (options.top_p - NUCLEUS_SLACK) * own.sum()
            own = own[: int(np.argmax(reached)) + 1]
        weights[kept[: len(own)]] = own
    return weights


def sample_sequences(
    next_rows: NextRows,
    count: SupportsIndex,
    *,
    end_id: int,
    options: SamplingOptions,
    seed: int,
    constraint: Automaton | None = None,
) -> list[SampledSequence]:
    """Draw sequences after one prompt.

    Parameters
    ----------
    next_rows
        Called with the prefixes of the sequences that go on; returns logits [n, V] of their next
        tokens.
    count
        Number of sequences. Sequence i takes its random numbers from stream i, that of its token t
        at position t.
    end_id
        The token that ends a sequence.
    options
        Truncation, temperature and lengths.
    seed
        0 to 2**64 - 1.
    constraint
        What may follow; an end token that does not finish the sequence leads back to its root.

    Returns
    -------
    list of SampledSequence
        In order.

    Raises
    ------
    InputError, TypeError
        As `sample`.
    """
    sequences = [SampledSequence([], 0.0, False) for _ in range(require_int("count", count, 0))]
    live = list(range(len(sequences)))
    states = [ROOT] * len(sequences)
    for step in range(options.max_tokens):
        if not live:
            break
        tokens, log_probs = sample(
            to_numpy(next_rows([list(sequences[i].token_ids) for i in live])),
            end_id=end_id,
            seed=seed,
            streams=live,
            positions=step,
            top_k=options.top_k,
            top_p=options.top_p,
            temperature=options.temperature,
            constraint=constraint,
            states=[states[i] for i in live],
            allow_end=step >= options.min_tokens,
        )
        for i, token, log_prob in zip(live, tokens.tolist(), log_probs.tolist(), strict=True):
            if token < 0:
                states[i] = DEAD
                continue
            before = sequences[i]
            ends = before.token_ids.count(end_id) + (token == end_id)
            finished = token == end_id and ends == options.min_ends
            token_ids = before.token_ids if finished else [*before.token_ids, token]
            sequences[i] = SampledSequence(token_ids, before.log_prob + log_prob, finished)
            if token == end_id:
                states[i] = ROOT
            elif constraint is not None:
                states[i] = int(constraint.advance(np.array([states[i]]), np.array([token]))[0])
        live = [i for i in live if not sequences[i].finished and states[i] != DEAD]
    return sequences
