"""Constraints and a native beam search for `generate` of transformers.

What the model may write is a piece of some passages, or one of many sequences::

    from fastmrc.integrations.generation import SpanLogitsProcessor

    spans = SpanLogitsProcessor(passages, end_token_id=model.generation_config.eos_token_id)
    model.generate(**inputs, logits_processor=[spans], num_beams=4)

The processors take the place of ``prefix_allowed_tokens_fn`` and work with every mode of
`generate`; `beam_search` takes the place of its beam search::

    spans = fastmrc.SpanIndex(passages)
    model.generate(**inputs, custom_generate=beam_search, constraint=spans, num_beams=4)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from numbers import Integral
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from transformers import LogitsProcessor
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria
from transformers.generation.utils import (
    GenerateBeamDecoderOnlyOutput,
    GenerateBeamEncoderDecoderOutput,
)

from fastmrc import ops
from fastmrc.constraints import Automaton, SpanIndex, Trie
from fastmrc.cuda.runtime import has_kernels
from fastmrc.errors import InputError, UnsupportedModelError

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["SpanLogitsProcessor", "TrieLogitsProcessor", "beam_search"]

_ROOT = 0
# Of the vocabulary, or of all cells: from here on whole rows are faster than single places.
_MANY = 1 / 16


class _ConstraintLogitsProcessor(LogitsProcessor):
    """What the two processors have in common: all but the way tokens become an automaton."""

    # The states of the rows are kept from call to call.
    supports_continuous_batching = False

    def __init__(
        self,
        automata: list[Automaton],
        end_token_id: int | Sequence[int],
        prompt_length: int | Sequence[int] | None,
        num_beams: int | None,
    ) -> None:
        if num_beams is not None:
            _require_int("num_beams", num_beams, 1)
        lengths = _prompt_lengths(prompt_length)
        if lengths is not None and 1 < len(automata) != len(lengths) > 1:
            raise InputError(
                f"prompt_length: expected one, or one per constraint ({len(automata)}), "
                f"got {len(lengths)}"
            )
        self.constraints = tuple(automata)
        self._batch = _BatchConstraint(automata, _end_ids("end_token_id", end_token_id))
        self._lengths = lengths
        self._num_items = max(len(automata), 1 if lengths is None else len(lengths))
        self._num_beams = num_beams
        self._rows = self._batch.rows(np.zeros(0, dtype=np.int64))  # of the last call
        self._prompt: tuple[int, bytes] | None = None  # width and tokens, of the running generate
        self._history = _StateHistory(self._batch)
        self._mask = _MaskedScores()

    def reset(self) -> None:
        """Forget the last call of `generate`.

        Needed with ``prompt_length=None`` alone, and there before a prompt that seems to go on with
        the last call: see `SpanLogitsProcessor`.
        """
        self._prompt = None
        self._history.clear()

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return the scores with -inf for every token that may not follow.

        Parameters
        ----------
        input_ids
            Integers [rows, length], the rows of an item of the batch one after the other.
        scores
            Floating point [rows, V], on any device; not modified.

        Returns
        -------
        torch.Tensor
            [rows, V]. On the CPU its memory is used again once no tensor holds it.

        Raises
        ------
        InputError
            If the shapes do not fit each other or the constraints.
        """
        rows = self._layout(input_ids, scores)
        ids = input_ids.cpu().numpy()
        states, waiting = self._states(ids, rows)
        if waiting is not None and waiting.all():
            return scores
        allowed = self._batch.allowed(states, rows, scores.shape[1])
        masked, alive = self._mask(scores, allowed)
        if waiting is not None:
            passed = _index(np.flatnonzero(waiting), scores.device)
            masked[passed] = scores[passed]
        if not alive:
            self._revive(masked, allowed, waiting)
        return masked

    def _layout(self, input_ids: torch.Tensor, scores: torch.Tensor) -> _Rows:
        """Check the shapes; return the items that the rows belong to."""
        number = input_ids.shape[0] if input_ids.ndim == 2 and scores.ndim == 2 else -1
        if number != scores.shape[0]:
            raise InputError(
                "input_ids: expected [rows, length] beside scores [rows, V], got "
                f"{list(input_ids.shape)} and {list(scores.shape)}"
            )
        if number != len(self._rows.items):
            if number % self._num_items:
                raise InputError(
                    f"input_ids: expected a multiple of {self._num_items} rows, as many per item "
                    f"of the batch, got {number}"
                )
            items = np.arange(number) // max(1, number // self._num_items)
            starts = 0
            if self._lengths is not None:
                lengths = np.broadcast_to(self._lengths, self._num_items)
                starts = (lengths - lengths.min())[items]
            self._rows = self._batch.rows(items, starts)
        return self._rows

    def _states(
        self, ids: NDArray[Any], rows: _Rows
    ) -> tuple[NDArray[np.int32], NDArray[np.bool_] | None]:
        """Return the state of each row, and whose prompt is still being written; None: no one's."""
        if self._lengths is None:
            return self._states_after_prompt(ids, rows), None
        begin = int(self._lengths.min())
        tokens = ids[:, begin:]
        states = self._history.continued(tokens, rows)
        if states is None:
            states = self._history.begun(tokens, rows)
        waiting = rows.starts > ids.shape[1] - begin
        return states, waiting if waiting.any() else None

    def _states_after_prompt(self, ids: NDArray[Any], rows: _Rows) -> NDArray[np.int32]:
        if self._prompt is not None:
            width, prompt = self._prompt
            if width < ids.shape[1] and ids[:, :width].tobytes() == prompt:
                states = self._history.continued(ids[:, width:], rows)
                if states is not None:
                    return states
        self._prompt = ids.shape[1], ids.tobytes()  # another call of generate has begun
        return self._history.begun(ids[:, ids.shape[1] :], rows)

    def _revive(
        self, masked: torch.Tensor, allowed: _Allowed, waiting: NDArray[np.bool_] | None
    ) -> None:
        """Let the allowed tokens score 0 in items that other processors left none of.

        transformers does so for ``prefix_allowed_tokens_fn``.
        """
        rows, vocabulary = masked.shape
        group = self._num_beams or rows // self._num_items
        if rows % group:
            raise InputError(f"num_beams: expected a divisor of the {rows} rows, got {group}")
        dead = masked.amax(dim=-1).isneginf().view(-1, group).all(dim=-1).cpu().numpy()
        revived = np.repeat(dead, group)
        if waiting is not None:
            revived &= ~waiting
        if not revived.any():
            return
        cells = allowed.all_cells(vocabulary)
        chosen = cells[revived[cells // vocabulary]]
        masked.view(-1)[_index(chosen, masked.device)] = 0


class SpanLogitsProcessor(_ConstraintLogitsProcessor):
    """Admit contiguous pieces of passages only.

    Everything below holds for `TrieLogitsProcessor`, too.

    Parameters
    ----------
    constraint
        `fastmrc.SpanIndex` or another automaton of fastmrc, or the token ids of the passages; or
        several of either, one per item of the batch.
    end_token_id
        The tokens that end an output: they may follow where the state is final, which it is after
        every piece of a passage, and are all that may follow a row that has left the constraint or
        has no continuation.
    prompt_length
        How many columns of ``input_ids`` stand before the constrained text: one number, or one per
        item of the batch (counted with the padding on the left). While ``input_ids`` are shorter,
        as before a ``forced_bos_token_id``, scores pass unchanged. None (default): all that the
        first call of `generate` brings, i.e. the prompt of a decoder-only model and the start token
        of an encoder-decoder model. Which one is the first is told by the tokens: a call goes on
        with the last one if each row is one that was seen, and one token more. So does, it seems, a
        prompt that is the last one with all or the first of what was written after it; it needs
        `reset` before, or its length here.
    num_beams
        Matters only where other processors forbid all that the constraint allows. Of rows that
        compete, as many as this, transformers lets the allowed tokens score 0 if all of them are
        such rows; so does this. None (default): all rows of an item of the batch, or all rows where
        there is one constraint and one `prompt_length` for all.

    Attributes
    ----------
    constraints
        The automata, one or one per item of the batch.

    Raises
    ------
    TypeError
        If `constraint` is neither an automaton nor token ids, or a number no integer.
    InputError
        If a value is out of range, or the numbers of items differ.

    Notes
    -----
    Scores are those of ``prefix_allowed_tokens_fn`` with the same rule, which `generate` applies
    before other processors of its own, such as ``forced_eos_token_id``, where processors that it is
    given come after them.

    A processor may be used for any number of calls of `generate`, one at a time. The state of a row
    is found by its tokens among the rows of the call before, so that one token is followed per
    call and row, whichever way beams were reordered.
    """

    def __init__(
        self,
        constraint: Automaton | Iterable[Any],
        end_token_id: int | Sequence[int],
        *,
        prompt_length: int | Sequence[int] | None = None,
        num_beams: int | None = None,
    ) -> None:
        automata = _automata(constraint, SpanIndex)
        super().__init__(automata, end_token_id, prompt_length, num_beams)


class TrieLogitsProcessor(_ConstraintLogitsProcessor):
    """Admit the sequences of a closed set only.

    Parameters
    ----------
    constraint
        `fastmrc.Trie` or another automaton of fastmrc, or the token ids of the sequences; or
        several of either, one per item of the batch. Sequences need no end token: those of
        `end_token_id` may follow where one ends.
    end_token_id, prompt_length, num_beams
        As `SpanLogitsProcessor` takes them; errors and notes are the same.
    """

    def __init__(
        self,
        constraint: Automaton | Iterable[Any],
        end_token_id: int | Sequence[int],
        *,
        prompt_length: int | Sequence[int] | None = None,
        num_beams: int | None = None,
    ) -> None:
        automata = _automata(constraint, Trie)
        super().__init__(automata, end_token_id, prompt_length, num_beams)


@dataclass(frozen=True, slots=True)
class _Allowed:
    """What may follow each row of scores.

    Attributes
    ----------
    cells
        Places in [rows, V], row after row laid out.
    shared
        Rows that may be followed by the same, many tokens, which `cells` does not list: all rows at
        the root of a large trie, say.
    """

    cells: NDArray[np.int64]
    shared: list[tuple[slice, NDArray[np.integer]]]

    def all_cells(self, vocabulary: int) -> NDArray[np.int64]:
        """Return the places of all tokens, those shared by rows, too."""
        groups = [
            (np.arange(own.start, own.stop)[:, None] * vocabulary + tokens).ravel()
            for own, tokens in self.shared
        ]
        return np.concatenate([self.cells, *groups])


@dataclass(frozen=True, slots=True)
class _Rows:
    """What rows belong to; those of an item are one after the other.

    Attributes
    ----------
    items, numbers, starts
        int64 [rows]: item of the batch, place of the row, and column from which on the constraint
        holds, after the first column where one does.
    late
        Whether there is a start other than 0.
    runs
        Each automaton with its rows.
    """

    items: NDArray[np.int64]
    numbers: NDArray[np.int64]
    starts: NDArray[np.int64]
    late: bool
    runs: list[tuple[Automaton, slice]]


class _BatchConstraint:
    """One automaton for all rows or one per item of the batch, and the end tokens."""

    def __init__(self, automata: Sequence[Automaton], end_ids: NDArray[np.int64]) -> None:
        self._automata = automata
        self._end_ids = end_ids
        self._largest_end = int(end_ids.max())

    def rows(self, items: NDArray[np.int64], starts: NDArray[np.int64] | int = 0) -> _Rows:
        """Describe the rows of these items, [rows], ascending."""
        if len(self._automata) == 1:
            runs = [(self._automata[0], slice(0, len(items)))]
        else:
            bounds = np.searchsorted(items, np.arange(len(self._automata) + 1)).tolist()
            spans = [slice(*pair) for pair in pairwise(bounds)]
            served = zip(self._automata, spans, strict=True)
            runs = [(one, own) for one, own in served if own.start < own.stop]
        starts = np.broadcast_to(np.asarray(starts, dtype=np.int64), len(items))
        return _Rows(items, np.arange(len(items)), starts, bool(starts.any()), runs)

    def advance(
        self, states: NDArray[np.int32], tokens: NDArray[np.int32], rows: _Rows
    ) -> NDArray[np.int32]:
        """Follow one token from each state; int32 [rows], -1 where nothing follows."""
        parts = [one._native.advance(states[own], tokens[own]) for one, own in rows.runs]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def allowed(self, states: NDArray[np.int32], rows: _Rows, vocabulary: int) -> _Allowed:
        """List what may follow each row of scores [rows, vocabulary]."""
        if self._largest_end >= vocabulary:
            raise _too_large("end_token_id", "less than", self._largest_end, vocabulary)
        cells: list[NDArray[np.int64]] = []
        shared: list[tuple[slice, NDArray[np.integer]]] = []
        for one, own in rows.runs:
            of_rows = states[own]
            first = of_rows[:1]
            same = len(of_rows) == 1 or bool((of_rows == first).all())
            offsets, tokens = one._native.allowed(first if same else of_rows)
            if tokens.size and tokens.max() >= vocabulary:
                raise _too_large("constraint", "tokens below", tokens.max(), vocabulary)
            begins = rows.numbers[own] * vocabulary
            if same:
                following = tokens
                if not tokens.size or one._native.is_final(first)[0]:
                    following = np.concatenate([tokens, self._end_ids])
                if len(of_rows) > 1 and len(following) > _MANY * vocabulary:
                    shared.append((own, following))
                else:
                    cells.append((begins[:, None] + following).ravel())
            else:
                counts = offsets[1:] - offsets[:-1]
                cells.append(np.add(begins.repeat(counts), tokens, dtype=np.int64))
                ending = begins[one._native.is_final(of_rows) | (counts == 0)]
                cells.append((ending[:, None] + self._end_ids).ravel())
        if len(cells) != 1:
            cells = [np.concatenate([*cells, self._end_ids[:0]])]
        return _Allowed(cells[0], shared)


def _too_large(name: str, expected: str, token: int, vocabulary: int) -> InputError:
    return InputError(f"{name}: expected {expected} the vocabulary size {vocabulary}, got {token}")


# State after a beginning of a row, and the same one token before.
_Node = tuple[int, "_Node | None"]


class _StateHistory:
    """The states along each row of the last call, found again by the tokens of the rows.

    The state of a row depends on its tokens and its item alone. So a row of the last call that
    begins alike tells it, whichever row that was before a beam reorder, and also where a call takes
    tokens back, as assisted decoding does. A table of rows as bytes needs the fewest calls: with
    few rows these are what costs.
    """

    def __init__(self, constraint: _BatchConstraint) -> None:
        self._constraint = constraint
        self.clear()

    def clear(self) -> None:
        self._length = 0
        self._nodes: dict[tuple[int, bytes], _Node] = {}

    def continued(self, tokens: NDArray[Any], rows: _Rows) -> NDArray[np.int32] | None:
        """Return the state of each row; None if one is no row of the last call and one token.

        `tokens` is [rows, n], from the column on where the first constraint begins.
        """
        known = tokens.shape[1] - 1
        if not 0 <= known <= self._length:
            return None
        size = known * tokens.itemsize
        nodes = self._nodes if known == self._length else self._shortened(known, size)
        keys = _keys(tokens, rows.items)
        found = [nodes.get((item, text[:size])) for item, text in keys]
        parents = [node for node in found if node is not None]
        if len(parents) < len(found):
            return None
        return self._followed(parents, known, tokens, keys, rows)

    def begun(self, tokens: NDArray[Any], rows: _Rows) -> NDArray[np.int32]:
        """Return the state of each row, followed from its first token."""
        roots: list[_Node] = [(_ROOT, None)] * len(tokens)
        return self._followed(roots, 0, tokens, _keys(tokens, rows.items), rows)

    def _followed(
        self,
        nodes: list[_Node],
        known: int,
        tokens: NDArray[Any],
        keys: list[tuple[int, bytes]],
        rows: _Rows,
    ) -> NDArray[np.int32]:
        """Follow the tokens from column `known` on, and remember the states."""
        states = np.array([state for state, _ in nodes], dtype=np.int32)
        for column in range(known, tokens.shape[1]):
            states = self._constraint.advance(states, tokens[:, column].astype(np.int32), rows)
            if rows.late:
                states = np.where(rows.starts > column, np.int32(_ROOT), states)
            nodes = list(zip(states.tolist(), nodes, strict=True))
        self._length = tokens.shape[1]
        self._nodes = dict(zip(keys, nodes, strict=True))
        return states

    def _shortened(self, length: int, size: int) -> dict[tuple[int, bytes], _Node]:
        """Return the table for the first tokens of the rows, `size` bytes."""
        table = {}
        for (item, text), found in self._nodes.items():
            node: _Node | None = found
            for _ in range(self._length - length):
                assert node is not None
                node = node[1]
            assert node is not None
            table[item, text[:size]] = node
        return table


def _keys(tokens: NDArray[Any], items: NDArray[np.int64]) -> list[tuple[int, bytes]]:
    """Return item and tokens of each row in a form that can be looked up."""
    size = tokens.shape[1] * tokens.itemsize
    joined = tokens.tobytes()
    return [
        (item, joined[row * size : (row + 1) * size]) for row, item in enumerate(items.tolist())
    ]


class _MaskedScores:
    """Scores that are -inf but for what is allowed, on the host in memory that is used again.

    Filling [rows, V] costs more than all else in a step, and new memory of this size several times
    that. A buffer is taken again once its storage has no other user: `generate` holds the scores of
    one step while it asks for those of the next. If nobody has written to it, which torch counts,
    the cells of the last time alone are set back. (What writes past that counter, by NumPy say, can
    put -inf there unseen and nothing else.)
    """

    _MOST = 2

    def __init__(self) -> None:
        self._buffers: list[_Buffer] = []

    def __call__(self, scores: torch.Tensor, allowed: _Allowed) -> tuple[torch.Tensor, bool]:
        """Return the masked scores [rows, V], and whether no row can be -inf altogether."""
        if scores.dtype not in _NUMPY_DTYPES or scores.device.type != "cpu" or scores.requires_grad:
            return _new_masked(scores, allowed)
        buffer = self._buffer(scores)
        alive = buffer.write(scores, allowed)
        return buffer.tensor.detach(), alive

    def _buffer(self, scores: torch.Tensor) -> _Buffer:
        for buffer in self._buffers:
            if buffer.fits(scores) and buffer.is_free():
                return buffer
        buffer = _Buffer(scores)
        self._buffers = [buffer, *self._buffers][: self._MOST]
        return buffer


_NUMPY_DTYPES = (torch.float32, torch.float64, torch.float16)


def _new_masked(scores: torch.Tensor, allowed: _Allowed) -> tuple[torch.Tensor, bool]:
    """Return what `_MaskedScores` does, for any device and dtype, in new memory."""
    cells = _index(allowed.all_cells(scores.shape[1]), scores.device)
    values = scores.reshape(-1).index_select(0, cells)
    masked = torch.full_like(scores, -torch.inf, memory_format=torch.contiguous_format)
    masked.view(-1).scatter_(0, cells, values)
    return masked, not bool(values.isneginf().any())


class _Buffer:
    """A tensor of -inf but for what was written last."""

    def __init__(self, like: torch.Tensor) -> None:
        with torch.inference_mode(False):  # tensors made in that mode do not count writes
            self.tensor = torch.empty(like.shape, dtype=like.dtype)
        # Writes by NumPy are not counted, and wait for no thread of torch.
        self._array = self.tensor.numpy()
        self._array.fill(-np.inf)
        self._flat = self._array.reshape(-1)
        self._cells = np.zeros(0, dtype=np.int64)
        self._version = self.tensor._version
        self._idle = self._users()

    def _users(self) -> int:
        return torch._C._storage_Use_Count(self.tensor.untyped_storage()._cdata)

    def is_free(self) -> bool:
        """Return whether nobody else has the memory."""
        return self._users() == self._idle

    def fits(self, like: torch.Tensor) -> bool:
        return self.tensor.shape == like.shape and self.tensor.dtype == like.dtype

    def write(self, scores: torch.Tensor, allowed: _Allowed) -> bool:
        """Take what is allowed from the scores; return whether no row can be -inf altogether."""
        few = len(self._cells) < _MANY * len(self._flat)
        if few and self._version == self.tensor._version:
            self._flat[self._cells] = -np.inf
        else:
            self._array.fill(-np.inf)
            self._version = self.tensor._version
        source = scores.numpy()
        self._cells = allowed.cells
        values = source.reshape(-1)[self._cells]
        self._flat[self._cells] = values
        alive = values.min(initial=0) > -np.inf
        for own, tokens in allowed.shared:
            addend = np.full(source.shape[1], -np.inf, dtype=source.dtype)
            addend[tokens] = 0
            np.add(source[own], addend, out=self._array[own])
            self._version = -1
            alive = alive and source[own, tokens[0]].min() > -np.inf
        return bool(alive)


def _index(places: NDArray[np.int64], device: torch.device) -> torch.Tensor:
    index = torch.from_numpy(places)
    return index if device.type == "cpu" else index.to(device)


def _automata(given: Any, build: Callable[[Any], Automaton]) -> list[Automaton]:
    """Return one automaton or one per item of the batch, built where token ids are given."""
    if isinstance(given, Automaton):
        return [given]
    if isinstance(given, str) or not isinstance(given, Iterable):
        raise TypeError(
            "constraint: expected a fastmrc.SpanIndex or Trie, token ids, or one of these per item "
            f"of the batch, got {type(given).__name__}"
        )
    parts = list(given)
    if not parts:
        raise InputError("constraint: expected at least one sequence or constraint, got none")
    if not any(isinstance(part, Automaton) or _holds_sequences(part) for part in parts):
        return [build(parts)]
    return [part if isinstance(part, Automaton) else build(part) for part in parts]


def _holds_sequences(part: Any) -> bool:
    if isinstance(part, np.ndarray):
        return part.ndim > 1
    if isinstance(part, str) or not isinstance(part, Sequence) or not len(part):
        return False
    return isinstance(part[0], Sequence | np.ndarray)


def _require_int(name: str, value: Any, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name}: expected an integer, got {type(value).__name__}")
    if int(value) < least:
        raise InputError(f"{name}: expected at least {least}, got {value}")
    return int(value)


def _integers(name: str, given: Any) -> NDArray[np.int64]:
    """Return one or several integers that are not negative."""
    several = isinstance(given, Sequence | np.ndarray | torch.Tensor) and not isinstance(given, str)
    values = np.asarray(given).tolist() if several else [given]
    values = values if isinstance(values, list) else [values]  # an array without dimensions
    if not values:
        raise InputError(f"{name}: expected at least one, got none")
    return np.array([_require_int(name, value, 0) for value in values], dtype=np.int64)


def _end_ids(name: str, given: Any) -> NDArray[np.int64]:
    if given is None:
        raise TypeError(f"{name}: expected an integer or several, got None")
    return _integers(name, given)


def _prompt_lengths(given: Any) -> NDArray[np.int64] | None:
    return None if given is None else _integers("prompt_length", given)


def beam_search(
    model: Any,
    input_ids: torch.Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    constraint: Automaton | Sequence[Automaton] | None = None,
    **model_kwargs: Any,
) -> Any:
    """Run the beam search of `generate`; to be passed as its ``custom_generate``.

    ``model.generate(**inputs, custom_generate=beam_search, num_beams=4, max_new_tokens=20)``, for
    decoder-only and encoder-decoder models with a key-value cache. Of the options of `generate`
    these count: ``num_beams``, ``max_new_tokens`` (or ``max_length``), ``eos_token_id``,
    ``length_penalty``, ``num_return_sequences``, ``pad_token_id``, ``return_dict_in_generate``,
    all that make logits processors (``min_new_tokens``, ``repetition_penalty`` and so on), and
    `constraint`.

    Parameters
    ----------
    model, input_ids, logits_processor, stopping_criteria, generation_config, **model_kwargs
        As `generate` passes them.
    constraint
        What may be written after the prompt: one automaton of fastmrc, or one per item of the
        batch; None (default): anything. End tokens are allowed in final states, and where nothing
        else is.

    Returns
    -------
    torch.Tensor or transformers.utils.ModelOutput
        int64 [batch * num_return_sequences, length], the prompt of a decoder-only model first and
        filled up as by transformers; or the output class of its beam search, with ``sequences``
        and ``sequences_scores`` (also without ``output_scores``). Rows for which there is no
        sequence hold the prompt, and score -inf.

    Raises
    ------
    InputError
        For options it cannot serve: ``do_sample``, other stopping criteria, ``use_cache=False``,
        ``output_logits``, ``output_attentions``, ``output_hidden_states``; for a constraint that
        does not fit.
    ValueError
        If logits hold NaN or +inf.
    TypeError
        If `constraint` holds something else than automata.
    UnsupportedModelError
        If the model's cache is none that transformers can reorder.

    Notes
    -----
    *Same result as transformers.* With ``early_stopping="never"``, or with
    ``length_penalty <= 0`` and ``early_stopping=False``, sequences and scores are those of
    transformers' own beam search but for rounding and the order of equal scores (here the lower
    token, then the better hypothesis). With a constraint they are those that it gives with
    `SpanLogitsProcessor` or `TrieLogitsProcessor`; it fills a beam that the constraint leaves short
    with copies whose scores are near -1e9, which here are no sequences.

    *Other results.* The search of an item ends when its `num_beams` finished sequences cannot be
    overtaken by a live one, whatever its length: an exact rule. transformers' default,
    ``early_stopping=False`` with ``length_penalty > 0``, takes the present length for the final one
    and so may stop before a better, longer sequence; ``early_stopping=True`` stops at the first
    `num_beams` finished ones. Both have no effect here. One beam is not greedy search: it goes on
    while a longer sequence may score better.

    *Speed.* The prompt is encoded once per item, not once per beam; items that have ended and
    hypotheses that do not exist are not computed; keys and values of the encoder are moved only
    when an item ends. With logits processors, which may count on `num_beams` rows per item, all
    rows are kept.
    """
    rules = _rules(input_ids, stopping_criteria, generation_config)
    cache = _cache(model_kwargs)
    batch = len(input_ids) // rules.beam_size
    automata = _batch_constraint(constraint, batch, rules.end_ids)
    compact = not logits_processor and _can_grow(cache, model_kwargs)
    search = _Search(rules, automata, batch, compact)
    rows = search.first_rows()
    ids = input_ids[_index(rows, input_ids.device)]
    model_kwargs = _take_rows(model_kwargs, rows)
    outputs = model._prefill(ids, generation_config, model_kwargs)
    is_encoder_decoder = model.config.is_encoder_decoder
    while True:
        model_kwargs = model._update_model_kwargs_for_generation(
            outputs, model_kwargs, is_encoder_decoder=is_encoder_decoder
        )
        logits = outputs.logits[:, -1, :].float()
        search.step(*_continuations(search, logits, ids, logits_processor))
        if search.done:
            return _result(search, input_ids, generation_config, is_encoder_decoder)
        model_kwargs = _reorder(model_kwargs, search)
        newest = torch.from_numpy(search.tokens[:, -1:]).to(ids.device)
        ids = torch.cat([ids[_index(search.parents, ids.device)], newest], dim=1)
        inputs = model.prepare_inputs_for_generation(ids, next_sequence_length=1, **model_kwargs)
        outputs = model(**inputs, return_dict=True)


@dataclass(frozen=True, slots=True)
class _Rules:
    """What a search keeps and when it ends."""

    beam_size: int
    max_tokens: int
    end_ids: NDArray[np.int64]
    length_penalty: float

    @property
    def continuations(self) -> int:
        """So many that `beam_size` are left when the likeliest of them have ended."""
        return self.beam_size * max(2, 1 + len(self.end_ids))

    def normalized(self, score: np.float32, length: int) -> np.float32:
        return np.float32(float(score) / float(length) ** self.length_penalty)


class _Search:
    """The hypotheses of a batch: fastmrc's beam search with the finishing rule ``"pool"``.

    Live hypotheses are rows, those of an item one after the other, best first.

    Attributes
    ----------
    items, scores, states
        int64, float32, int32 [rows]: item of the batch, sum of log-probabilities, automaton state.
    tokens
        int64 [rows, n], without the prompt.
    parents
        int64 [rows]: the row before the last step that each row continues.
    same_items
        Whether the last step changed neither number nor items of the rows.
    pools
        For each item the best finished sequences, by falling score.
    """

    def __init__(
        self, rules: _Rules, automata: _BatchConstraint | None, batch: int, compact: bool
    ) -> None:
        self.rules = rules
        self.automata = automata
        self._compact = compact
        self._mask = _MaskedScores()
        self.pools: list[list[tuple[np.float32, NDArray[np.int64]]]] = [[] for _ in range(batch)]
        slots = 1 if compact else rules.beam_size
        self.items = np.repeat(np.arange(batch), slots)
        self.scores = np.full(len(self.items), -np.inf, dtype=np.float32)
        self.scores[::slots] = 0
        self.states = np.full(len(self.items), _ROOT, dtype=np.int32)
        self._rows = automata.rows(self.items) if automata else None
        self.tokens = np.zeros((len(self.items), 0), dtype=np.int64)
        self.parents = np.arange(len(self.items))
        self.same_items = True
        self.done = False

    def first_rows(self) -> NDArray[np.int64]:
        """Return which of the rows of `generate`, `beam_size` per item, are encoded first."""
        step = self.rules.beam_size if self._compact else 1
        return np.arange(0, len(self.pools) * self.rules.beam_size, step)

    def masked(self, scores: torch.Tensor) -> torch.Tensor:
        """Return scores [rows, V] that are -inf where the constraint forbids a token."""
        if self.automata is None or self._rows is None:
            return scores
        allowed = self.automata.allowed(self.states, self._rows, scores.shape[1])
        return self._mask(scores, allowed)[0]

    def step(self, log_probs: NDArray[np.float32], tokens: NDArray[np.int64]) -> None:
        """Take the likeliest continuations of each row, both [rows, n]; padding is -inf."""
        rows, chosen, scores = self._candidates(log_probs, tokens)
        items = self.items[rows]
        live = []
        for item in range(len(self.pools)):
            begin, end = np.searchsorted(items, [item, item + 1]).tolist()
            end = min(end, begin + self.rules.continuations)
            own = slice(begin, end)
            live.append(begin + self._finish(item, rows[own], chosen[own], scores[own]))
        self._go_on(live, rows, chosen, scores)

    def _candidates(
        self, log_probs: NDArray[np.float32], tokens: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]:
        """Return row, token and score of what may follow, by item and falling score."""
        scores = self.scores[:, None] + log_probs
        rows, columns = np.nonzero(scores > -np.inf)
        chosen, scores = tokens[rows, columns], scores[rows, columns]
        order = np.lexsort((rows, chosen, -scores, self.items[rows]))
        return rows[order], chosen[order], scores[order]

    def _finish(
        self,
        item: int,
        rows: NDArray[np.int64],
        chosen: NDArray[np.int64],
        scores: NDArray[np.float32],
    ) -> NDArray[np.int64]:
        """Put what has ended into the pool; return the candidates that go on."""
        rules, pool = self.rules, self.pools[item]
        length = self.tokens.shape[1] + 1
        last = length == rules.max_tokens
        ended = np.isin(chosen, rules.end_ids)
        for c in np.flatnonzero((ended | last)[: rules.beam_size]).tolist():
            sequence = np.append(self.tokens[rows[c]], chosen[c])
            pool.append((rules.normalized(scores[c], length), sequence))
        pool.sort(key=lambda entry: -entry[0])  # stable: of equal ones the earlier first
        del pool[rules.beam_size :]
        live = np.flatnonzero(~ended)[: rules.beam_size]
        if last or not len(live) or self._is_settled(pool, scores[live[0]], length):
            return live[:0]
        return live

    def _is_settled(self, pool: list[Any], best: np.float32, length: int) -> bool:
        """Return whether no live hypothesis can enter the pool: scores only fall."""
        if len(pool) < self.rules.beam_size:
            return False
        longest = self.rules.max_tokens if self.rules.length_penalty > 0 else length + 1
        return bool(pool[-1][0] >= self.rules.normalized(best, longest))

    def _go_on(
        self,
        live: list[NDArray[np.int64]],
        rows: NDArray[np.int64],
        chosen: NDArray[np.int64],
        scores: NDArray[np.float32],
    ) -> None:
        """Make these candidates, a list for each item, the rows of the next step."""
        self.done = not any(len(own) for own in live)
        if self.done:
            return
        before = self.items
        if self._compact:
            kept = np.concatenate(live)
            self.parents, newest, self.scores = rows[kept], chosen[kept], scores[kept]
        else:
            self.parents, newest, self.scores = self._with_fillers(live, rows, chosen, scores)
        self.items = before[self.parents]
        self.same_items = np.array_equal(before, self.items)
        if self.automata is not None:
            self._rows = self.automata.rows(self.items)
            states, tokens = self.states[self.parents], newest.astype(np.int32)
            self.states = self.automata.advance(states, tokens, self._rows)
        self.tokens = np.concatenate([self.tokens[self.parents], newest[:, None]], axis=1)

    def _with_fillers(
        self,
        live: list[NDArray[np.int64]],
        rows: NDArray[np.int64],
        chosen: NDArray[np.int64],
        scores: NDArray[np.float32],
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]:
        """Return parents, tokens and scores with `beam_size` rows for every item."""
        size = self.rules.beam_size
        parents = np.repeat(np.arange(len(live)) * size, size)
        newest = np.zeros(len(parents), dtype=np.int64)
        totals = np.full(len(parents), -np.inf, dtype=np.float32)
        for item, own in enumerate(live):
            at = slice(item * size, item * size + len(own))
            parents[at], newest[at], totals[at] = rows[own], chosen[own], scores[own]
        return parents, newest, totals


def _continuations(
    search: _Search, logits: torch.Tensor, ids: torch.Tensor, logits_processor: Any
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Return log-probabilities and tokens of the likeliest continuations of each row."""
    count = search.rules.continuations
    if logits_processor:
        scores = logits_processor(ids, logits.to(ids.device).log_softmax(dim=-1))
        values, tokens = ops.topk(_for_kernels(search.masked(scores)), count)
    elif search.automata is None:
        values, tokens = ops.log_softmax_topk(_for_kernels(logits), count)
    else:
        logits = _for_kernels(logits)
        total = ops.row_stats(logits)[2]
        values, tokens = ops.topk(search.masked(logits), count)
        values = torch.where(tokens < 0, -torch.inf, values - total[:, None])
    return values.float().cpu().numpy(), tokens.long().cpu().numpy()


def _for_kernels(rows: torch.Tensor) -> torch.Tensor:
    """Return the rows where the kernels of this build can read them."""
    return rows if has_kernels(rows.device) else rows.cpu()


def _rules(input_ids: torch.Tensor, stopping_criteria: Any, config: Any) -> _Rules:
    if config.do_sample:
        raise InputError("do_sample: expected False, as a beam search draws nothing, got True")
    for name in ("output_logits", "output_attentions", "output_hidden_states"):
        if getattr(config, name, None) and config.return_dict_in_generate:
            raise InputError(f"{name}: expected False, as they are not kept, got True")
    for criterion in stopping_criteria:
        if not isinstance(criterion, MaxLengthCriteria | EosTokenCriteria):
            raise InputError(
                "stopping_criteria: expected none but max_new_tokens and eos_token_id, "
                f"got {type(criterion).__name__}"
            )
    ends = config._eos_token_tensor
    return _Rules(
        beam_size=config.num_beams,
        max_tokens=config.max_length - input_ids.shape[1],
        end_ids=np.zeros(0, dtype=np.int64) if ends is None else _integers("eos_token_id", ends),
        length_penalty=float(config.length_penalty),
    )


def _cache(model_kwargs: dict[str, Any]) -> Cache:
    cache = model_kwargs.get("past_key_values")
    if not model_kwargs.get("use_cache", True):
        raise InputError("use_cache: expected True, as the search runs on a cached model")
    if not isinstance(cache, Cache):
        raise UnsupportedModelError(
            f"model: expected a key-value cache of transformers, got {type(cache).__name__}"
        )
    return cache


def _can_grow(cache: Cache, model_kwargs: dict[str, Any]) -> bool:
    """Return whether prompts can be encoded once and their rows be repeated afterwards."""
    own = cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
    if not isinstance(own, DynamicCache) or cache.get_seq_length() > 0:
        return False
    return model_kwargs.get("mm_encoder_outputs") is None


def _batch_constraint(
    constraint: Any, batch: int, end_ids: NDArray[np.int64]
) -> _BatchConstraint | None:
    if constraint is None:
        return None
    automata = [constraint] if isinstance(constraint, Automaton) else constraint
    if isinstance(automata, str) or not isinstance(automata, Sequence):
        automata = [automata]
    for automaton in automata:
        if not isinstance(automaton, Automaton):
            raise TypeError(
                "constraint: expected a fastmrc.SpanIndex or Trie, or one per item of the batch, "
                f"got {type(automaton).__name__}"
            )
    if len(automata) not in (1, batch):
        raise InputError(
            f"constraint: expected one, or one per item of the batch ({batch}), got {len(automata)}"
        )
    if not len(end_ids):
        raise InputError("eos_token_id: expected one beside a constraint, got None")
    return _BatchConstraint(automata, end_ids)


def _take_rows(model_kwargs: dict[str, Any], rows: NDArray[np.int64]) -> dict[str, Any]:
    """Select rows of all inputs of the model but its cache, as `generate` repeated them."""
    taken = {}
    for name, value in model_kwargs.items():
        if isinstance(value, torch.Tensor):
            dim = 1 if name == "position_ids" and value.ndim == 3 else 0
            value = value.index_select(dim, _index(rows, value.device))
        elif name == "encoder_outputs":
            value = type(value)(**_take_rows(dict(value), rows))
        taken[name] = value
    return taken


def _reorder(model_kwargs: dict[str, Any], search: _Search) -> dict[str, Any]:
    """Let the inputs and the cache of the model hold the rows of the next step."""
    parents, cache = search.parents, model_kwargs["past_key_values"]
    if search.same_items:
        # What comes from the encoder is the same for all rows of an item.
        own = cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
        if not np.array_equal(parents, np.arange(len(parents))):
            own.reorder_cache(cast("torch.LongTensor", torch.from_numpy(parents)))
        return model_kwargs
    cache.reorder_cache(cast("torch.LongTensor", torch.from_numpy(parents)))
    return _take_rows(model_kwargs, parents)


def _result(search: _Search, input_ids: torch.Tensor, config: Any, is_encoder_decoder: bool) -> Any:
    """Lay out the finished sequences as transformers' beam search does."""
    count = config.num_return_sequences
    entries = [pool[i] if i < len(pool) else None for pool in search.pools for i in range(count)]
    longest = max(len(entry[1]) if entry else 0 for entry in entries)
    prompt = input_ids.shape[1]
    sequences = torch.full((len(entries), prompt + longest), _filler(config), dtype=torch.int64)
    step = search.rules.beam_size
    sequences[:, :prompt] = input_ids[::step].cpu().repeat_interleave(count, dim=0)
    for row, entry in enumerate(entries):
        if entry:
            sequences[row, prompt : prompt + len(entry[1])] = torch.from_numpy(entry[1])
    sequences = sequences.to(input_ids.device)
    if not config.return_dict_in_generate:
        return sequences
    scores = [float(entry[0]) if entry else -np.inf for entry in entries]
    output: Any = GenerateBeamDecoderOnlyOutput
    if is_encoder_decoder:
        output = GenerateBeamEncoderDecoderOutput
    return output(
        sequences=sequences,
        sequences_scores=torch.tensor(scores, dtype=torch.float32, device=input_ids.device),
    )


def _filler(config: Any) -> int:
    """Return the token after the end of a sequence, the same as transformers' beam search.

    A pad token 0 counts as none there.
    """
    if config._eos_token_tensor is None:
        return -1
    pad = config._pad_token_tensor
    return int(pad) if pad else int(config._eos_token_tensor.reshape(-1)[0])
