"""The UniLM encoder for a search on the device: shapes that stay the same from step to step.

Every step encodes one token for each hypothesis that a question has room for, at columns that a
tensor names, and attends over the whole cache; the mask hides what is not written yet. So a step is
the same work on the same memory, and is replayed as a CUDA graph where shapes repeat.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from fastmrc.encoders.batches import by_length, padded, to_device

if TYPE_CHECKING:
    from fastmrc.encoders.unilm import UniLMEncoder

__all__ = ["BufferPool", "DeviceSession", "StepInputs", "tokens_that_fit"]

# Inputs are padded to a multiple of this many tokens, so that shapes repeat.
_PREFIX_STEP = 32
# Attention kernels want masks whose rows are aligned.
_COLUMN_STEP = 8
# Sets of buffers that are kept for the next batch of the same shape, if memory allows.
_MOST_KEPT = 2
# Graphs of a set, one for each number of rows.
_MOST_GRAPHS = 8
# Of a GPU's memory that is not in use one decode may take this much for keys and values; logits and
# activations need room, too.
_CACHE_SHARE = 0.5
# Answer columns and padding, beside the input tokens themselves.
_CACHE_OVERHEAD = 1.3

# One thread at a time records a graph: the others' calls would end up in it or break it.
_recording = threading.Lock()


def _round_up(n: int, step: int) -> int:
    return (n + step - 1) // step * step


def _rounded_rows(n: int) -> int:
    """Round a number of rows up to one of four significant bits, so that shapes repeat."""
    return _round_up(max(1, n), 1 << max(0, n.bit_length() - 4))


@dataclass(frozen=True, slots=True)
class StepInputs:
    """What a step reads; the search's kernels write it.

    Attributes
    ----------
    rows, prefix, columns
        Rows, columns of the inputs and all columns of the mask.
    tokens, positions
        int64 [rows, beam size].
    mask
        bool [rows, 1, beam size, columns].
    cache_columns
        int64 [beam size], where keys and values go.
    live
        bool [rows * beam size], whose logits are read.
    question_of
        int32 [rows], the question of a row, -1: none.
    first_position
        int64 [rows], position of the first token of the answer.
    """

    rows: int
    prefix: int
    columns: int
    tokens: torch.Tensor
    positions: torch.Tensor
    mask: torch.Tensor
    cache_columns: torch.Tensor
    live: torch.Tensor
    question_of: torch.Tensor
    first_position: torch.Tensor

    def arguments(self) -> dict[str, Any]:
        """Return all of it by name."""
        return {name: getattr(self, name) for name in self.__slots__}


@dataclass
class _Graph:
    """A recorded step for one number of rows, and the logits that it writes."""

    graph: Any
    logits: torch.Tensor


class _Buffers:
    """Memory of one session: keys and values of all layers, and the inputs of a step.

    Parameters
    ----------
    rows, prefix, columns, beam_size
        Most rows, columns of the inputs, all columns, hypotheses.
    device
        Where.
    """

    def __init__(
        self, rows: int, prefix: int, columns: int, beam_size: int, device: torch.device
    ) -> None:
        self.rows, self.prefix, self.columns, self.beam_size = rows, prefix, columns, beam_size
        self.memory: torch.Tensor | None = None  # [layers, 2, rows, heads, columns, d]
        self.sessions = 0
        self.graphs: dict[int, _Graph] = {}  # by rows
        self.graph_pool: Any = None  # memory that the graphs share, as they never run at once

        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self._tokens = zeros(rows, beam_size)
        self._positions = zeros(rows, beam_size)
        self._mask = zeros(rows, 1, beam_size, columns, dtype=torch.bool)
        self._cache_columns = zeros(beam_size)
        self._live = zeros(rows * beam_size, dtype=torch.bool)
        self._question_of = zeros(rows, dtype=torch.int32)
        self._first_position = zeros(rows)

    def inputs(self, rows: int) -> StepInputs:
        """Return the inputs of the first rows."""
        return StepInputs(
            rows,
            self.prefix,
            self.columns,
            self._tokens[:rows],
            self._positions[:rows],
            self._mask[:rows],
            self._cache_columns,
            self._live[: rows * self.beam_size],
            self._question_of[:rows],
            self._first_position[:rows],
        )


class _Cache:
    """Keys and values as transformers' attention layers see them; writes in place.

    Parameters
    ----------
    buffers
        Whose memory it writes.
    layers
        Of the model.
    rows
        Of all layers' memory these are written and returned.
    columns
        int64 on the device: where the tokens of this pass go; None: from the first column on.
    """

    def __init__(
        self, buffers: _Buffers, layers: int, rows: slice, columns: torch.Tensor | None = None
    ) -> None:
        self._buffers, self._layers, self._rows, self._columns = buffers, layers, rows, columns

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0 if self._columns is None else self._buffers.prefix

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, layer_idx: int, *_: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        buffers = self._buffers
        if buffers.memory is None:  # zeros: what is masked out must still be finite
            shape = (buffers.rows, keys.shape[1], buffers.columns, keys.shape[3])
            buffers.memory = keys.new_zeros((self._layers, 2, *shape))
        layer = buffers.memory[layer_idx]
        return self._write(layer[0], keys), self._write(layer[1], values)

    def _write(self, array: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        array = array[self._rows]
        if self._columns is None:
            array[..., : new.shape[-2], :] = new
            return new
        return array.index_copy_(-2, self._columns, new)


@dataclass
class BufferPool:
    """Buffers that wait for the next session of their shape; for several threads."""

    _kept: list[_Buffers] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @contextmanager
    def lend(
        self,
        rows: int,
        prefix: int,
        columns: int,
        beam_size: int,
        device: torch.device,
        cache_bytes: int = 0,
    ) -> Iterator[_Buffers]:
        """Lend buffers of this shape while the context lasts; `cache_bytes` are those of their keys
        and values."""
        wanted = (rows, prefix, columns, beam_size)
        with self._lock:
            found = next((b for b in self._kept if _shape_of(b) == wanted), None)
            if found is not None:
                self._kept.remove(found)
            while found is None and self._kept and not self._is_room(device, cache_bytes):
                del self._kept[0]
        buffers = found or _Buffers(*wanted, device)
        buffers.sessions += 1
        yield buffers
        with self._lock:  # not after an error: a step may have been left half done
            self._kept.append(buffers)
            del self._kept[:-_MOST_KEPT]

    def free_bytes(self, device: torch.device) -> int:
        """Return how much memory of a GPU a decode could have if no buffers were kept."""
        with self._lock:
            kept = sum(b.memory.nbytes for b in self._kept if b.memory is not None)
        return _unused_bytes(device) + kept

    def _is_room(self, device: torch.device, cache_bytes: int) -> bool:
        if len(self._kept) >= _MOST_KEPT:
            return False
        return device.type != "cuda" or cache_bytes <= _CACHE_SHARE * _unused_bytes(device)


def _unused_bytes(device: torch.device) -> int:
    """Return the memory of a GPU that nobody uses, with what torch holds back for later."""
    held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0]) + held


def _shape_of(buffers: _Buffers) -> tuple[int, int, int, int]:
    return buffers.rows, buffers.prefix, buffers.columns, buffers.beam_size


def tokens_that_fit(encoder: UniLMEncoder) -> int:
    """Return how many input tokens a GPU's memory can hold in one decode."""
    free = encoder.pool.free_bytes(encoder.device)
    return int(free * _CACHE_SHARE / _CACHE_OVERHEAD) // encoder.cache_bytes_per_token


class DeviceSession:
    """The encoder's side of one search on the device. For one thread, as a context.

    Parameters
    ----------
    encoder
        On the device.
    rows
        For each passage of all questions its input.
    max_steps, beam_size
        Most tokens of an answer and hypotheses of a question.
    """

    def __init__(
        self,
        encoder: UniLMEncoder,
        rows: Sequence[NDArray[np.int32]],
        max_steps: int,
        beam_size: int,
    ) -> None:
        self._encoder = encoder
        self._inputs = rows
        lengths = np.array([len(row) for row in rows], dtype=np.int64)
        # Inputs by falling length, so that those of a prefill batch are of like length.
        self._passages = np.argsort(-lengths, kind="stable")  # passage of each row
        self._lengths = lengths
        prefix = _round_up(max(1, int(lengths.max(initial=1))), _PREFIX_STEP)
        self._shape = (
            _rounded_rows(len(rows)),
            prefix,
            # The last step's tokens have columns, too, though no call encodes them.
            _round_up(prefix + (max_steps + 1) * beam_size, _COLUMN_STEP),
            beam_size,
        )

    @property
    def device(self) -> torch.device:
        """Where the logits are."""
        return self._encoder.device

    @property
    def rows(self) -> int:
        """Most rows of the logits of one hypothesis each."""
        return self._shape[0]

    @contextmanager
    def lent(self) -> Iterator[DeviceSession]:
        """Hold the memory of the session while the context lasts."""
        rows, _, columns, _ = self._shape
        cache_bytes = rows * columns * self._encoder.cache_bytes_per_token
        lent = self._encoder.pool.lend(*self._shape, self.device, cache_bytes)
        with lent as self._buffers:
            yield self

    @torch.inference_mode()
    def prefill(self) -> torch.Tensor:
        """Encode all inputs; return the logits after them, float32 [passages, V]."""
        encoder, device = self._encoder, self.device
        count = len(self._inputs)
        if count == 0:
            return torch.zeros(0, encoder.vocabulary_size, device=device)
        lengths = self._lengths[self._passages]
        # All inputs go to the device before it has work: a copy would wait for that.
        batches = []
        for batch in by_length(lengths.tolist(), device=device):
            rows = slice(batch[0], batch[-1] + 1)  # the rows are in this order already
            own = lengths[rows]
            width = _round_up(int(own[0]), _PREFIX_STEP)  # few widths: kernels are chosen by them
            inputs = [self._inputs[p] for p in self._passages[rows]]
            tokens = padded(inputs, encoder.pad_id, device, width)
            positions = torch.arange(width, device=device).expand_as(tokens)
            visible = np.arange(width)[None, :] < own[:, None]
            mask = None if visible.all() else to_device(visible, device)[:, None, None, :]
            batches.append((rows, tokens, positions, mask, to_device(own - 1, device)))
        order = to_device(np.argsort(self._passages), device)
        last = []
        for rows, tokens, positions, mask, ends in batches:
            cache: Any = _Cache(self._buffers, encoder.num_layers, rows)
            hidden = encoder.forward(tokens, positions, mask, 0, cache)
            last.append(hidden[torch.arange(len(ends), device=device), ends])
        return encoder.logits(torch.cat(last)[order])

    @torch.inference_mode()
    def begin(self, passages: NDArray[np.int64]) -> tuple[StepInputs, NDArray[np.int64]]:
        """Keep these passages; return what `step` reads and the row of each passage.

        May be called again, for fewer passages.
        """
        kept = np.isin(self._passages, passages)
        self._passages = self._move(kept)
        row_of = np.zeros(len(self._inputs), dtype=np.int64)
        row_of[self._passages] = np.arange(len(self._passages))
        self._rows = min(_rounded_rows(len(passages)), self._buffers.rows)
        inputs = self._buffers.inputs(self._rows)
        # A row of padding sees its first column, so nothing is NaN.
        lengths = np.ones(self._rows, dtype=np.int64)
        lengths[: len(passages)] = self._lengths[self._passages]
        own = to_device(lengths, self.device)
        inputs.first_position.copy_(own)
        sees = torch.arange(inputs.prefix, device=self.device)[None, :] < own[:, None]
        inputs.mask[..., : inputs.prefix] = sees[:, None, None, :]
        return inputs, row_of[passages]

    def _move(self, kept: NDArray[np.bool_]) -> NDArray[np.int64]:
        """Move the last kept rows into the gaps; return the passage of each row."""
        size = int(kept.sum())
        holes = np.flatnonzero(~kept[:size])
        movers = size + np.flatnonzero(kept[size:])
        passages = self._passages[:size].copy()
        passages[holes] = self._passages[movers]
        memory = self._buffers.memory
        if len(holes) and memory is not None:
            to, source = (to_device(rows, self.device) for rows in (holes, movers))
            for array in memory.flatten(0, 1):
                array.index_copy_(0, to, array.index_select(0, source))
        return passages

    @torch.inference_mode()
    def step(self) -> torch.Tensor:
        """Encode what the inputs hold; return logits, float32 [rows * beam size, V]."""
        buffers = self._buffers
        graph = buffers.graphs.get(self._rows)
        if graph is None and self._is_worth_recording():
            graph = self._record()
        if graph is None:
            return self._forward()
        graph.graph.replay()
        return graph.logits

    def _is_worth_recording(self) -> bool:
        """Return whether the shape has come again, so that it may come more often."""
        buffers = self._buffers
        again = buffers.sessions > 1 and len(buffers.graphs) < _MOST_GRAPHS
        return again and self.device.type == "cuda" and self._encoder.graphs

    def _forward(self) -> torch.Tensor:
        inputs = self._buffers.inputs(self._rows)
        rows = slice(0, self._rows)
        cache: Any = _Cache(self._buffers, self._encoder.num_layers, rows, inputs.cache_columns)
        hidden = self._encoder.forward(
            inputs.tokens, inputs.positions, inputs.mask, self._encoder.answer_type, cache
        )
        return self._encoder.logits(hidden.flatten(0, 1))

    def _record(self) -> _Graph | None:
        """Record the step as a CUDA graph; where the model cannot be recorded it goes on without.

        On a stream of its own, which nothing else uses, and after a first run there by this thread,
        which loads and plans what must not be loaded or planned while a graph is recorded. That
        writes what the step writes.
        """
        buffers, device = self._buffers, self.device
        graph = torch.cuda.CUDAGraph()
        before = torch.cuda.current_stream(device)
        with _recording:
            buffers.graph_pool = buffers.graph_pool or torch.cuda.graph_pool_handle()
            stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            stream.wait_stream(before)
            try:
                with torch.cuda.stream(stream):  # which leaves `before` current in any case
                    self._forward()
                    with torch.cuda.graph(
                        graph,
                        pool=buffers.graph_pool,
                        stream=stream,
                        capture_error_mode="thread_local",
                    ):
                        logits = self._forward()
            except RuntimeError:
                self._encoder.graphs = False
                self._encoder.broken_graph = graph  # torch's allocator still knows it
                return None
            finally:
                before.wait_stream(stream)
        buffers.graphs[self._rows] = _Graph(graph, logits)
        return buffers.graphs[self._rows]
