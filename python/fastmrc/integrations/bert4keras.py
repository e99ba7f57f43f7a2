"""bert4keras' decoder, choosing and drawing tokens by the native core.

Code written for bert4keras 0.11 changes one import::

    from fastmrc.integrations.bert4keras import AutoRegressiveDecoder
    # was: from bert4keras.snippets import AutoRegressiveDecoder

Arrays are NumPy's, on both sides; neither Keras nor bert4keras is needed.
`fastmrc.reference.AutoRegressiveDecoder` is the same in plain NumPy.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import math
import operator
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, SupportsIndex, get_args

import numpy as np
from numpy.typing import NDArray

from fastmrc import ops
from fastmrc.errors import InputError
from fastmrc.options import NUCLEUS_SLACK, Mode

if TYPE_CHECKING:
    from fastmrc.readers.seq2seq import Seq2SeqReader

__all__ = ["AutoRegressiveDecoder", "ReadingComprehension"]

Rtype = Literal["probas", "logits"]
"""What a prediction holds: probabilities, or logits (for the search: log-probabilities)."""
Array = NDArray[Any]

_EPS = 1e-12  # added to a probability before its logarithm
# How much of a share rounding may cost: the sums of the original, and its input, are float32.
_SHARE_ROUNDING = 1e-6
_BLOCK = 64  # entries whose maximum is looked at before they are


class AutoRegressiveDecoder:
    """Beam search and sampling with a model that a subclass calls in `predict`.

    The interface is that of ``AutoRegressiveDecoder`` in bert4keras 0.11
    (github.com/bojone/bert4keras, ``snippets.py``), and so are beam search and the distribution of
    samples, with equal scores in a defined order, checked arguments and checked predictions.

    Parameters
    ----------
    start_id
        First token of every sequence; None: sequences begin empty.
    end_id
        The token that ends a sequence.
    maxlen
        Number of steps, at least 1.
    minlen
        A sequence shorter than this is not finished by an end token. The start token and the end
        token count.

    Attributes
    ----------
    start_id, end_id, maxlen, minlen
        As given; may be changed.
    first_output_ids
        int [1, 1], or [1, 0] without a start token: what `predict` is called with at first. May be
        replaced by a longer prefix.

    Raises
    ------
    InputError, TypeError
        If an argument is wrong.
    """

    def __init__(
        self, start_id: int | None, end_id: int, maxlen: int, minlen: SupportsIndex = 1
    ) -> None:
        self.start_id = None if start_id is None else _whole_number("start_id", start_id)
        self.end_id = _whole_number("end_id", end_id)
        self.maxlen = _whole_number("maxlen", maxlen, 1)
        self.minlen = _whole_number("minlen", minlen)
        self.models: dict[Any, Any] = {}  # of last_token
        start = [] if self.start_id is None else [self.start_id]
        self.first_output_ids: Array = np.array([start], dtype=int)

    @staticmethod
    def wraps(
        default_rtype: Rtype = "probas", use_states: bool = False
    ) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Return the decorator for the `predict` of a subclass.

        Parameters
        ----------
        default_rtype
            What the decorated method returns: ``"probas"``, which need not add up to 1, or
            ``"logits"``.
        use_states
            Whether it returns a pair of prediction and states rather than the prediction.

        Returns
        -------
        Callable
            From ``predict(self, inputs, output_ids, states)`` to the method that the search calls,
            ``predict(self, inputs, output_ids, states, temperature=1, rtype=default_rtype)``. That
            returns a pair: probabilities, or for the rtype ``"logits"`` log(P + 1e-12), in the
            dtype of the prediction, and the states (None without `use_states`). Logits are divided
            by the temperature before their softmax; probabilities are raised to 1 / temperature and
            made to add up to 1, but left as they are at temperature 1.

        Raises
        ------
        InputError
            For another type of prediction; later, if the prediction holds NaN, plus infinity,
            negative probabilities or, where they are to add up to 1, zeros only.
        TypeError
            Later, if the prediction is not floating point or, with `use_states`, no pair.
        """
        _require_choice("default_rtype", default_rtype, get_args(Rtype))

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
                _require_choice("rtype", rtype, get_args(Rtype))
                _require_temperature(temperature)
                prediction = predict(self, inputs, output_ids, states)
                states = None
                if use_states:
                    prediction, states = _pair(prediction)
                probas = _to_probas(_floats(prediction), default_rtype, temperature)
                return (probas if rtype == "probas" else _log(probas)), states

            return complete

        return decorate

    def last_token(self, model: Any) -> Any:
        """Return a Keras model with the outputs of `model` at the last position only.

        Parameters
        ----------
        model
            Keras model whose outputs are [batch, length, ...].

        Returns
        -------
        keras.Model
            Made once per model; of the Keras that bert4keras uses if that is imported.

        Raises
        ------
        ImportError
            If Keras is not installed.
        """
        if model not in self.models:
            keras = _keras()
            last = [keras.layers.Lambda(lambda x: x[:, -1])(output) for output in model.outputs]
            self.models[model] = keras.models.Model(model.inputs, last)
        return self.models[model]

    def predict(self, inputs: Any, output_ids: Array, states: Any = None, *more: Any) -> Any:
        """Return the distribution of the next token; to be written, and decorated by `wraps`.

        Parameters
        ----------
        inputs
            List of arrays [rows, ...], each entry of the caller's inputs repeated. They are the
            same arrays from call to call, so that a change made in them stays.
        output_ids
            int [rows, t], the sequences so far. One row in the first call.
        states
            What the caller gave, then what the last call returned: never reordered or cut.

        Returns
        -------
        numpy.ndarray
            Floating point [rows, V], the same V in all rows; with ``use_states=True`` a pair of it
            and the next states.
        """
        raise NotImplementedError(
            "predict: expected a method of the subclass, decorated by AutoRegressiveDecoder.wraps"
        )

    def beam_search(
        self,
        inputs: Iterable[Any],
        topk: int,
        states: Any = None,
        temperature: float = 1,
        min_ends: int = 1,
    ) -> Array:
        """Return the best sequence.

        Scores are sums of log(P + 1e-12) in float64. Each step keeps the best `topk` continuations
        of all, of equal scores that with the lower token, then the lower parent. If the best of
        them is finished, it is returned; otherwise the finished ones leave and `topk` falls by
        their number. Forbidden tokens, of probability 0, score log(1e-12) and fill the beam where
        others run out.

        Parameters
        ----------
        inputs
            Inputs of the model, without a batch axis; `predict` gets them with one.
        topk
            Size of the beam, at least 1.
        states
            What the first call of `predict` gets.
        temperature
            Above 0; see `wraps`.
        min_ends
            A sequence is finished by its end token of this number, or a later one, once it is
            `minlen` tokens long.

        Returns
        -------
        numpy.ndarray
            int [t], the start and the end token included.

        Raises
        ------
        InputError
            If an argument or a prediction is not as expected, or there are fewer than `topk`
            continuations in the first step.
        TypeError
            If one has the wrong type.
        """
        topk = _whole_number("topk", topk, 1)
        batch = self._checked_call(inputs, temperature, min_ends)
        output_ids = self.first_output_ids
        totals: Array = np.zeros(len(output_ids))
        for step in range(self.maxlen):
            scores, states = self._predicted(batch, output_ids, states, temperature, "logits")
            if step == 0:
                batch = [np.repeat(rows, topk, axis=0) for rows in batch]
                if topk > scores.size:
                    raise InputError(
                        f"topk: expected at most {scores.size}, the continuations that the "
                        f"vocabulary gives in the first step, got {topk}"
                    )
            totals, tokens, parents = _best_continuations(totals, scores, topk)
            output_ids = np.concatenate([output_ids[parents], tokens[:, None]], axis=1)
            finished = self._finished(output_ids, min_ends)
            if finished[0]:
                break
            if finished.any():
                batch = [rows[~finished] for rows in batch]
                output_ids, totals = output_ids[~finished], totals[~finished]
                topk = len(output_ids)
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
        """Return sequences that are drawn at random.

        Parameters
        ----------
        inputs, states, temperature, min_ends
            As for `beam_search`.
        n
            Number of sequences, at least 1.
        topk
            Each token is drawn from so many of the likeliest, 1 to V, of equal ones the lower; None
            (default): all.
        topp
            Of these, after they were made to add up to 1, only from the fewest likeliest that reach
            this share, above 0 and at most 1; None (default): all. A share that misses `topp` by
            1e-6 or less counts as reached, and where `topp` is within 1e-5 of 1 all are drawn from.

        Returns
        -------
        list of numpy.ndarray
            int [t] each: first the finished sequences, step by step, then the others.

        Raises
        ------
        InputError, TypeError
            As for `beam_search`; also if a prediction holds a row of zeros only.

        Notes
        -----
        One number from NumPy's global generator seeds the draws (`fastmrc.ops.sample`), so that
        ``np.random.seed`` makes them reproducible. They are not those that bert4keras draws from
        the same seed; their distribution is the same.
        """
        n = _whole_number("n", n, 1)
        topk = None if topk is None else _whole_number("topk", topk, 1)
        share = 1.0 if topp is None else _nucleus_share(topp)
        batch = self._checked_call(inputs, temperature, min_ends)
        output_ids = self.first_output_ids
        streams = np.arange(len(output_ids) * n)  # random numbers of each sequence
        seed = int(np.random.randint(2**63, dtype=np.uint64))
        results: list[Array] = []
        for step in range(self.maxlen):
            probas, states = self._predicted(batch, output_ids, states, temperature, "probas")
            logits = _sampling_logits(probas, topk)
            if step == 0:
                logits, output_ids, *batch = (
                    np.repeat(rows, n, axis=0) for rows in (logits, output_ids, *batch)
                )
            # The end token of the sampler may always be drawn here: any will do.
            tokens, _ = ops.sample(
                logits,
                end_id=0,
                seed=seed,
                streams=streams,
                positions=step,
                top_k=topk,
                top_p=share,
            )
            output_ids = np.concatenate([output_ids, tokens[:, None]], axis=1)
            finished = self._finished(output_ids, min_ends)
            if finished.any():
                results.extend(output_ids[finished])
                output_ids, streams, *batch = (
                    rows[~finished] for rows in (output_ids, streams, *batch)
                )
                if len(output_ids) == 0:
                    break
        return [*results, *output_ids]

    def _checked_call(self, inputs: Any, temperature: float, min_ends: int) -> list[Array]:
        """Check what both searches take; return the inputs with a batch axis."""
        _require_temperature(temperature)
        _whole_number("min_ends", min_ends, 1)
        _whole_number("maxlen", self.maxlen, 1)
        _require_complete(self.predict)
        return _batched(inputs)

    def _predicted(
        self,
        inputs: list[Array],
        output_ids: Array,
        states: Any,
        temperature: float,
        rtype: Rtype,
    ) -> tuple[Array, Any]:
        """Call `predict`; return its checked rows [rows, V] and the states."""
        result = self.predict(inputs, output_ids, states, temperature, rtype)
        prediction, states = _pair(result)
        rows = np.ascontiguousarray(_floats(prediction))
        if rows.ndim != 2 or len(rows) != len(output_ids):
            raise InputError(
                f"predict: expected shape [{len(output_ids)}, V], one row for each of output_ids, "
                f"got {list(rows.shape)}"
            )
        if rtype == "probas":
            _require_probas(rows)
        else:
            _require_below_infinity(rows)
        return rows, states

    def _finished(self, output_ids: Array, min_ends: int) -> NDArray[np.bool_]:
        """Mark the sequences [rows, t] whose last token finishes them."""
        if output_ids.shape[1] < self.minlen:
            return np.zeros(len(output_ids), dtype=np.bool_)
        ends = output_ids == self.end_id
        finished: NDArray[np.bool_] = ends[:, -1] & (ends.sum(axis=1) >= min_ends)
        return finished


class ReadingComprehension(AutoRegressiveDecoder):
    """The multi-passage reader of bert4keras' examples, on the cached engine.

    Takes the place of the class of this name in ``task_reading_comprehension_by_seq2seq.py``, where
    the model is one that `fastmrc.Seq2SeqReader` can load; that encodes each passage once, where
    the example encodes it for each hypothesis at each step. A reader with a vote or a model of its
    own is a subclass of `AutoRegressiveDecoder`, as there.

    Parameters
    ----------
    start_id
        None, as in the example: the answer follows the question.
    end_id
        The [SEP] token of the model, or None.
    maxlen
        Most tokens of an answer, at least 1.
    mode
        ``"extractive"`` (default): the answer is a piece of a passage; ``"generative"``: any text.
    model
        A `fastmrc.Seq2SeqReader`, the directory or hub id of its model, or nothing for the packaged
        model.

    Attributes
    ----------
    mode
        As given.
    reader
        The `fastmrc.Seq2SeqReader`, which also tells scores and places, and answers in batches.

    Raises
    ------
    InputError, TypeError
        If an argument is wrong.
    UnsupportedModelError
        If the model cannot serve this reader.

    Notes
    -----
    Two things differ from the example. Forbidden tokens never fill the beam. The text of an
    extractive answer is cut from the passage as it was given, where the example decodes tokens, in
    lower case and with commas for spaces.
    """

    def __init__(
        self,
        start_id: None,
        end_id: int | None,
        maxlen: int,
        mode: Mode = "extractive",
        model: Seq2SeqReader | str | Path | None = None,
    ) -> None:
        if start_id is not None:
            raise InputError(
                f"start_id: expected None, as answers follow the question, got {start_id!r}"
            )
        _require_choice("mode", mode, get_args(Mode))
        self.mode = mode
        self.reader = _load_reader(model)
        sep_id = self.reader._codec.sep_id
        if end_id not in (None, sep_id):
            raise InputError(
                f"end_id: expected {sep_id}, the [SEP] of the model's tokenizer, got {end_id!r}"
            )
        super().__init__(None, sep_id, maxlen)

    def answer(self, question: str, passages: Sequence[str], topk: int = 1) -> str:
        """Return the answer that the passages agree on, empty if they hold none.

        Parameters
        ----------
        question
            Not empty.
        passages
            Any number.
        topk
            Size of the beam, 1 to V.

        Returns
        -------
        str

        Raises
        ------
        InputError
            If an argument is wrong.
        TypeError
            If one has the wrong type.
        """
        beam_size = _whole_number("topk", topk, 1)
        answer = self.reader.answer(
            question,
            passages,
            beam_size=beam_size,
            mode=self.mode,
            max_answer_tokens=self.maxlen,
        )
        return answer.text


# --- predictions ----------------------------------------------------------------------------------


def _to_probas(rows: Array, rtype: Rtype, temperature: float) -> Array:
    """Make probabilities of what a model returned, which is not changed."""
    if rtype == "logits":
        return _softmax(rows, temperature)
    _require_probas(rows)
    if temperature == 1:
        return rows
    probas: Array = np.power(rows, 1.0 / temperature)
    sums = probas.sum(axis=-1, keepdims=True)
    _refuse(~(sums > 0), "a probability above 0 (to the power of 1 / temperature)", sums)
    probas /= sums
    return probas


def _softmax(rows: Array, temperature: float) -> Array:
    with np.errstate(over="ignore", invalid="ignore"):
        scaled = rows if temperature == 1 else rows / temperature
        largest = scaled.max(axis=-1, keepdims=True)  # inherits NaN
    _refuse(~np.isfinite(largest), "a finite largest logit", largest)
    probas: Array = scaled - largest
    np.exp(probas, out=probas)
    probas /= probas.sum(axis=-1, keepdims=True)
    return probas


def _log(probas: Array) -> Array:
    logits: Array = probas + _EPS
    with np.errstate(divide="ignore"):  # float16 has no number so small
        np.log(logits, out=logits)
    return logits


def _sampling_logits(probas: Array, topk: int | None) -> Array:
    """Return log-probabilities of checked probabilities [rows, V], float32, -inf for 0."""
    if topk is not None and topk > probas.shape[1]:
        raise InputError(
            f"topk: expected at most the vocabulary size, {probas.shape[1]}, got {topk}"
        )
    largest = probas.max(axis=1)
    _refuse(largest <= 0, "a probability above 0", largest)
    wide = probas.astype(np.float32) if probas.dtype == np.float16 else probas
    with np.errstate(divide="ignore"):
        logits: Array = np.log(wide).astype(np.float32, copy=False)
    return logits


def _require_probas(rows: Array) -> None:
    """Refuse NaN, infinity and negative numbers."""
    _require_below_infinity(rows)
    # One fast read where all is well.
    if rows.min() < 0:
        least = rows.min(axis=-1)
        _refuse(least < 0, "no negative probability", least)


def _require_below_infinity(rows: Array) -> None:
    """Refuse NaN and plus infinity."""
    with np.errstate(invalid="ignore"):
        if not rows.max() < np.inf:  # which inherits NaN
            largest = rows.max(axis=-1)
            _refuse(~(largest < np.inf), "no NaN or infinity", largest)


def _refuse(bad: Any, expected: str, values: Any) -> None:
    """Refuse the first row that is marked."""
    if np.any(bad):
        row = int(np.argmax(bad))
        raise InputError(
            f"predict: expected {expected} in each row, got {np.ravel(values)[row]} in row {row}"
        )


def _floats(prediction: Any) -> Array:
    if isinstance(prediction, tuple):
        raise TypeError(
            "predict: expected an array, got a tuple; a pair of prediction and states needs "
            "wraps(use_states=True)"
        )
    try:
        array = np.asarray(prediction)
    except ValueError:  # rows of different lengths
        array = np.empty(0, dtype=object)
    if array.dtype.kind != "f":
        got = type(prediction).__name__ if array.dtype == object else f"{array.dtype}"
        raise TypeError(f"predict: expected an array of floating point, got {got}")
    if array.ndim == 0 or array.size == 0:
        raise InputError(f"predict: expected shape [rows, V], got {list(array.shape)}")
    return array


def _pair(result: Any) -> tuple[Any, Any]:
    if not isinstance(result, tuple | list) or len(result) != 2:
        got = f"{len(result)} entries" if isinstance(result, tuple) else type(result).__name__
        raise TypeError(f"predict: expected a pair of prediction and states, got {got}")
    return result[0], result[1]


def _require_complete(predict: Callable[..., Any]) -> None:
    """Refuse a method that nobody decorated."""
    try:
        inspect.signature(predict, follow_wrapped=False).bind(*range(5))
    except TypeError:
        raise TypeError(
            "predict: expected the decorator AutoRegressiveDecoder.wraps, or a method that takes "
            "inputs, output_ids, states, temperature and rtype"
        ) from None


# --- selection ------------------------------------------------------------------------------------


def _best_continuations(totals: Array, scores: Array, count: int) -> tuple[Array, Array, Array]:
    """Choose the best `count` of the sums of `totals` [K] and `scores` [K, V].

    Returns
    -------
    scores, tokens, parents
        [count]: falling, equal scores by token, then by parent; ids are int64.
    """
    found = _best_of_rows(totals, scores, count)
    tokens, parents = _best_of_all(totals, scores, count) if found is None else found
    sums = totals[parents] + scores[parents, tokens]
    order = np.lexsort((parents, tokens, -sums))[:count]
    return sums[order], tokens[order], parents[order]


def _best_of_rows(totals: Array, scores: Array, count: int) -> tuple[Array, Array] | None:
    """Return tokens and parents of the best `count` of each row, found by the native core.

    A total added to a row keeps its order, so that the best of all are among them. None if that is
    not certain: scores in float64, too few above -inf, or the sum of the last that is kept, rounded
    to float64, may also be that of a different score; equal sums go by token.
    """
    if scores.dtype not in (np.float32, np.float16):
        return None
    width = min(count, scores.shape[1])
    values, ids = ops.topk(scores, width + 1)
    sums, last = totals[:, None] + values, values[:, width - 1]
    certain = sums[:, width] < sums[:, width - 1]
    if not certain.all():
        with np.errstate(over="ignore"):
            below, above = (np.nextafter(last, np.float32(end)) for end in (-np.inf, np.inf))
        certain |= (totals + below < totals + last) & (totals + last < totals + above)
    if not certain.all():
        return None
    parents = np.repeat(np.arange(len(scores)), width)
    return ids[:, :width].ravel().astype(np.int64), parents


def _best_of_all(totals: Array, scores: Array, count: int) -> tuple[Array, Array]:
    """Return tokens and parents of the best `count` of all sums, in NumPy."""
    sums = (totals[:, None] + scores).ravel()
    near = _near_best(sums, count)
    least = np.partition(sums[near], -count)[-count]
    better, equal = near[sums[near] > least], near[sums[near] == least]
    parents, tokens = np.divmod(equal, scores.shape[1])
    equal = equal[np.lexsort((parents, tokens))][: count - len(better)]
    parents, tokens = np.divmod(np.concatenate([better, equal]), scores.shape[1])
    return tokens, parents


def _near_best(sums: Array, count: int) -> NDArray[np.intp]:
    """Return places among which are all entries of at least the `count`-th largest."""
    maxima = np.maximum.reduceat(sums, np.arange(0, len(sums), _BLOCK))
    if len(maxima) < count:
        return np.arange(len(sums))
    # So many blocks hold an entry that is not below it.
    return np.flatnonzero(sums >= np.partition(maxima, -count)[-count])


# --- arguments ------------------------------------------------------------------------------------


def _batched(inputs: Any) -> list[Array]:
    """Return each input as an array with a batch axis of length 1."""
    if (
        isinstance(inputs, str | bytes | Mapping | Set)
        or not isinstance(inputs, Iterable)
        or getattr(inputs, "ndim", 1) == 0
    ):
        raise TypeError(
            f"inputs: expected a sequence of arrays or token lists, got {type(inputs).__name__}"
        )
    batch = []
    for i, entry in enumerate(inputs):
        try:
            batch.append(np.array([entry]))
        except ValueError:
            raise InputError(
                f"inputs[{i}]: expected an array or a list of equally long rows, got {entry!r:.60}"
            ) from None
    return batch


def _whole_number(name: str, value: Any, least: int | None = None) -> int:
    if isinstance(value, bool | np.bool_) or not hasattr(value, "__index__"):
        raise TypeError(f"{name}: expected an integer, got {type(value).__name__}")
    number = operator.index(value)
    if least is not None and number < least:
        raise InputError(f"{name}: expected at least {least}, got {number}")
    return number


def _require_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise InputError(f"{name}: expected one of {', '.join(choices)}, got {value!r}")


def _require_temperature(temperature: Any) -> None:
    number = _real_number("temperature", temperature)
    if not 0 < number < math.inf:
        raise InputError(f"temperature: expected a finite number above 0, got {temperature}")


def _nucleus_share(topp: Any) -> float:
    """Return what the native sampler is asked for, which has a slack of its own."""
    share = _real_number("topp", topp)
    if not 0 < share <= 1:
        raise InputError(f"topp: expected a share above 0 and at most 1, got {topp}")
    return min(1.0, share + NUCLEUS_SLACK - _SHARE_ROUNDING)


def _real_number(name: str, value: Any) -> float:
    if isinstance(value, bool | np.bool_ | str) or not hasattr(value, "__float__"):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    return float(value)


# --- other libraries ------------------------------------------------------------------------------


def _keras() -> Any:
    """Return the Keras that bert4keras uses, or else the one that is installed."""
    backend = sys.modules.get("bert4keras.backend")
    if backend is not None:
        return backend.keras
    try:
        return importlib.import_module("keras")
    except ImportError:
        raise ImportError(
            "last_token: expected Keras to be installed; without it, let predict return the last "
            "position itself, as in model.predict(inputs)[:, -1]"
        ) from None


def _load_reader(model: Any) -> Seq2SeqReader:
    from fastmrc.readers.seq2seq import Seq2SeqReader

    if isinstance(model, Seq2SeqReader):
        return model
    if model is None or isinstance(model, str | Path):
        return Seq2SeqReader.from_pretrained(model)
    raise TypeError(
        f"model: expected a fastmrc.Seq2SeqReader, a path, a hub id or None, got "
        f"{type(model).__name__}"
    )
