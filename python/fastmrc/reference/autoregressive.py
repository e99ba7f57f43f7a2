"""bert4keras' decoder in plain NumPy: the definition that the drop-in decoder must meet.

The algorithm is that of ``AutoRegressiveDecoder`` in bert4keras 0.11
(github.com/bojone/bert4keras, ``snippets.py``) with one addition: where it leaves the order of
equal scores to ``argpartition``, they are sorted here.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any, Literal, SupportsIndex, get_args

import numpy as np
from numpy.typing import NDArray

from fastmrc.reference._checks import require_choice, require_int

__all__ = ["AutoRegressiveDecoder", "best_continuations", "sampling_distribution"]

EPS = 1e-12
"""Added to a probability before its logarithm."""

Rtype = Literal["probas", "logits"]
Array = NDArray[Any]


class AutoRegressiveDecoder:
    """Decoder of a model that a subclass calls in `predict`.

    The interface is that of `fastmrc.integrations.bert4keras.AutoRegressiveDecoder`, which
    documents it, but for ``last_token``. What `predict` returns is not checked.
    """

    def __init__(
        self, start_id: int | None, end_id: int, maxlen: int, minlen: SupportsIndex = 1
    ) -> None:
        self.start_id = start_id
        self.end_id = end_id
        self.maxlen = require_int("maxlen", maxlen, 1)
        self.minlen = minlen
        if start_id is None:
            self.first_output_ids: Array = np.empty((1, 0), dtype=int)
        else:
            self.first_output_ids = np.array([[start_id]])

    @staticmethod
    def wraps(
        default_rtype: Rtype = "probas", use_states: bool = False
    ) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Give a `predict` of three arguments temperature, result type and states."""
        require_choice("default_rtype", default_rtype, get_args(Rtype))

        def decorate(predict: Callable[..., Any]) -> Callable[..., Any]:
            @functools.wraps(predict)
            def complete(
                self: Any,
                inputs: Any,
                output_ids: Any,
                states: Any = None,
                temperature: float = 1,
                rtype: Rtype = default_rtype,
            ) -> tuple[Array, Any]:
                require_choice("rtype", rtype, get_args(Rtype))
                rows = predict(self, inputs, output_ids, states)
                rows, states = rows if use_states else (rows, None)
                if default_rtype == "logits":
                    rows = _softmax(rows / temperature)
                elif temperature != 1:
                    rows = np.power(rows, 1.0 / temperature)
                    rows = rows / rows.sum(axis=-1, keepdims=True)
                if rtype == "logits":
                    with np.errstate(divide="ignore"):  # float16 has no number as small as EPS
                        rows = np.log(rows + EPS)
                return rows, states

            return complete

        return decorate

    def predict(self, inputs: Any, output_ids: Array, states: Any = None, *more: Any) -> Any:
        """Return the distribution of the next token of each row of `output_ids`."""
        raise NotImplementedError("predict: expected a method of the subclass")

    def beam_search(
        self,
        inputs: Iterable[Any],
        topk: int,
        states: Any = None,
        temperature: float = 1,
        min_ends: int = 1,
    ) -> Array:
        """Return the best sequence."""
        topk = require_int("topk", topk, 1)
        min_ends = require_int("min_ends", min_ends, 1)
        inputs = [np.array([entry]) for entry in inputs]
        output_ids, output_scores = self.first_output_ids, np.zeros(1)
        for step in range(self.maxlen):
            scores, states = self.predict(inputs, output_ids, states, temperature, "logits")
            if step == 0:
                inputs = [np.repeat(rows, topk, axis=0) for rows in inputs]
            output_scores, tokens, parents = best_continuations(
                output_scores[:, None] + scores, topk
            )
            output_ids = np.concatenate([output_ids[parents], tokens[:, None]], axis=1)
            if output_ids.shape[1] < self.minlen:
                continue
            finished = self._finished(output_ids, min_ends)
            if finished[0]:  # the best
                break
            inputs = [rows[~finished] for rows in inputs]
            output_ids, output_scores = output_ids[~finished], output_scores[~finished]
            topk = int((~finished).sum())
        best: Array = output_ids[0]
        return best

    def random_sample(
        self,
        inputs: Iterable[Any],
        n: int,
        topk: int | None = None,
        topp: float | None = None,
        states: Any = None,
        temperature: float = 1,
        min_ends: int = 1,
    ) -> list[Array]:
        """Return `n` sequences that are drawn with NumPy's global generator."""
        n = require_int("n", n, 1)
        min_ends = require_int("min_ends", min_ends, 1)
        inputs = [np.array([entry]) for entry in inputs]
        output_ids = self.first_output_ids
        results: list[Array] = []
        for step in range(self.maxlen):
            probas, states = self.predict(inputs, output_ids, states, temperature, "probas")
            if step == 0:
                probas = np.repeat(probas, n, axis=0)
                inputs = [np.repeat(rows, n, axis=0) for rows in inputs]
                output_ids = np.repeat(output_ids, n, axis=0)
            tokens = [
                np.random.choice(len(row), p=row)
                for row in sampling_distribution(probas, topk, topp)
            ]
            output_ids = np.concatenate([output_ids, np.array(tokens)[:, None]], axis=1)
            if output_ids.shape[1] < self.minlen:
                continue
            finished = self._finished(output_ids, min_ends)
            results.extend(output_ids[finished])
            inputs = [rows[~finished] for rows in inputs]
            output_ids = output_ids[~finished]
            if len(output_ids) == 0:
                break
        return [*results, *output_ids]

    def _finished(self, output_ids: Array, min_ends: int) -> NDArray[np.bool_]:
        """Mark the sequences whose last token is an end token and their `min_ends`-th or later."""
        ends = output_ids == self.end_id
        finished: NDArray[np.bool_] = ends[:, -1] & (ends.sum(axis=1) >= min_ends)
        return finished


def best_continuations(scores: Array, count: int) -> tuple[Array, Array, Array]:
    """Choose the best `count` of all continuations.

    Parameters
    ----------
    scores
        Floating point [K, V], of token v after hypothesis k.
    count
        1 to K x V.

    Returns
    -------
    scores, tokens, parents
        [count], the last two int64: score falling, then token, then parent rising.
    """
    parents, tokens = np.divmod(np.arange(scores.size), scores.shape[1])
    flat = scores.ravel()
    order = np.lexsort((parents, tokens, -flat))[:count]
    return flat[order], tokens[order], parents[order]


def sampling_distribution(probas: Array, topk: int | None, topp: float | None) -> Array:
    """Return what a token is drawn from.

    Parameters
    ----------
    probas
        Floating point [n, V], at least 0, no row of zeros only; need not add up to 1.
    topk
        Only so many of the likeliest tokens are kept, 1 to V; None: all.
    topp
        Of these, after they were made to add up to 1, only the fewest likeliest that reach this
        share; None: all.

    Returns
    -------
    numpy.ndarray
        [n, V], each row adds up to 1. Of equal probabilities the lower token comes first.
    """
    probas = probas / probas.sum(axis=1, keepdims=True)
    order = np.argsort(-probas, axis=1, kind="stable")
    falling = np.take_along_axis(probas, order, axis=1)
    if topk is not None:
        falling[:, topk:] = 0
        falling /= falling.sum(axis=1, keepdims=True)
    if topp is not None:
        reached = np.cumsum(falling, axis=1) >= topp
        falling[:, 1:][reached[:, :-1]] = 0  # behind the first token at which it is reached
        falling /= falling.sum(axis=1, keepdims=True)
    kept = np.empty_like(falling)
    np.put_along_axis(kept, order, falling, axis=1)
    return kept


def _softmax(rows: Array) -> Array:
    exponentials = np.exp(rows - rows.max(axis=-1, keepdims=True))
    probas: Array = exponentials / exponentials.sum(axis=-1, keepdims=True)
    return probas
