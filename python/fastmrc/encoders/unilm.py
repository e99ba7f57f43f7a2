"""UniLM encoder with the input encoded once and all hypotheses as queries of one row.

With the UniLM mask (Dong et al. 2019) the input ``[CLS] passage [SEP] question [SEP]`` never sees
the answer, so its keys and values are computed once. The tokens of a question's hypotheses then
form a tree, whose new nodes are query positions of the same row; a mask lets each see its own
ancestors (tree attention), and reordering the beam moves no cache.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from fastmrc.cuda.runtime import has_kernels
from fastmrc.encoders.batches import by_length, padded
from fastmrc.encoders.device import BufferPool, DeviceSession
from fastmrc.errors import InputError, UnsupportedModelError
from fastmrc.pretrained import first_position, max_positions

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from fastmrc import _C

__all__ = ["SUPPORTED_MODEL_TYPES", "EncoderSession", "UniLMEncoder", "head_modules"]


# Modules of the output layer by model type, in the order of their application.
_HEADS = {
    "bert": ("cls",),
    "electra": ("generator_predictions", "generator_lm_head"),
    "ernie": ("cls",),
    "roberta": ("lm_head",),
    "xlm-roberta": ("lm_head",),
}
SUPPORTED_MODEL_TYPES = tuple(_HEADS)

# Most logits that are computed for tokens before the search comes to them: 64 MB of float32. The LM
# head of BERT-base takes 7 ms to read its weights and 0.2 ms a row, so that one call for the rows
# of five steps takes half the time of five.
_LOGITS_AHEAD = 1 << 24


def head_modules(model: PreTrainedModel) -> list[torch.nn.Module]:
    """Return the modules of the output layer, in the order of their application.

    Raises
    ------
    UnsupportedModelError
        If the model is not of a type in `SUPPORTED_MODEL_TYPES`.
    """
    names = _HEADS.get(model.config.model_type)
    if names is None:
        raise UnsupportedModelError(
            f"model: expected a type that takes a cache and a 4-D mask "
            f"({', '.join(SUPPORTED_MODEL_TYPES)}), got {model.config.model_type!r}"
        )
    return [getattr(model, name) for name in names]


class UniLMEncoder:
    """Next-token logits of a UniLM reader; immutable, may be used by several threads.

    Parameters
    ----------
    model
        ``...ForMaskedLM`` of transformers of a type in `SUPPORTED_MODEL_TYPES`, in evaluation mode
        with sdpa attention.

    Raises
    ------
    UnsupportedModelError
        If the model is of another type, is a decoder, or its cached logits differ from
        re-encoding, as a change in the internals of transformers could make them.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        config = model.config
        head = head_modules(model)
        if getattr(config, "is_decoder", False):
            raise UnsupportedModelError("model: expected an encoder, got is_decoder=True")
        self._model = model
        self._body: Callable[..., Any] = model.base_model
        self._head = head
        if model.dtype != torch.float32:  # logits are float32 also where the body is not
            self._head = [copy.deepcopy(module).float() for module in self._head]
        self.num_layers = int(config.num_hidden_layers)
        self.answer_type = 1 if config.type_vocab_size > 1 else 0
        self.pad_id = int(config.pad_token_id or 0)
        self.vocabulary_size = int(config.vocab_size)
        self.max_positions = max_positions(config) or 0
        self._first_position = first_position(config)
        self.pool = BufferPool()
        self.graphs = True  # until a step could not be recorded as a CUDA graph
        self.broken_graph: Any = None

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self._model.device

    @property
    def cache_bytes_per_token(self) -> int:
        """Memory of the keys and values of a token."""
        size: int = self._model.config.hidden_size * self._model.dtype.itemsize
        return 2 * self.num_layers * size

    def session(
        self, rows: Sequence[NDArray[np.int32]], max_steps: int, beam_size: int = 1
    ) -> EncoderSession:
        """Begin decoding a batch of inputs.

        Parameters
        ----------
        rows
            For each passage of all questions its input, ``[CLS] passage [SEP] question [SEP]``.
        max_steps
            Largest number of tokens that will follow an input.
        beam_size
            Hypotheses that the cache has room for; it grows where there are more.

        Raises
        ------
        InputError
            If input and answer are longer than the model's positions.
        """
        self._check_length(rows, max_steps)
        return EncoderSession(self, rows, max_steps * beam_size)

    def device_session(
        self, rows: Sequence[NDArray[np.int32]], max_steps: int, beam_size: int
    ) -> DeviceSession:
        """Begin decoding a batch of inputs where the search is on the device, too.

        Parameters and errors are those of `session`.
        """
        self._check_length(rows, max_steps)
        return DeviceSession(self, rows, max_steps, beam_size)

    def _check_length(self, rows: Sequence[NDArray[np.int32]], max_steps: int) -> None:
        longest = max((len(row) for row in rows), default=0)
        if longest + max_steps > self.max_positions:
            raise InputError(
                f"passages: expected input and answer of at most {self.max_positions} tokens, the "
                f"positions of the model, got {longest} + {max_steps}; lower max_passage_tokens, "
                f"max_question_tokens or max_answer_tokens"
            )

    def check(self, sep_id: int) -> None:
        """Compare cached logits with re-encoding on a few tokens; refuse the model if they differ.

        Raises
        ------
        UnsupportedModelError
            If the largest difference of log-probabilities is not small.
        """
        from fastmrc.reference.encoder import ReencodingEncoder

        generator = np.random.default_rng(0)
        rows = [
            np.append(generator.integers(0, self.vocabulary_size, n), sep_id).astype(np.int32)
            for n in (7, 5)
        ]
        prefix = generator.integers(0, self.vocabulary_size, 3).tolist()
        session = self.session(rows, len(prefix))
        cached = session.prefill()
        for token in prefix:
            cached = session.append(token)
        reference = ReencodingEncoder(self._model, end_id=sep_id).next_logits_for(
            row.tolist() for row in rows
        )([prefix], [0, 1])[:, 0]
        difference = float(
            (torch.log_softmax(cached.cpu(), -1) - torch.from_numpy(reference)).abs().max()
        )
        # Rounding: measured 1e-5 (float32) and 0.1 (bfloat16) on models of 2 to 12 layers. On
        # request torch multiplies float32 with fewer bits.
        exact = self._model.dtype == torch.float32
        exact = exact and torch.get_float32_matmul_precision() == "highest"
        if not difference < (1e-3 if exact else 1.0):
            raise UnsupportedModelError(
                f"model: expected the cached logits to equal those of re-encoding, got a largest "
                f"difference of {difference:.3g}; this version of transformers is not supported"
            )

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Apply the LM head to [n, hidden]; float32 [n, V]."""
        hidden = hidden.float()
        for module in self._head:
            hidden = module(hidden)
        return hidden

    def forward(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        mask: torch.Tensor | None,
        token_type: int,
        cache: _Cache,
    ) -> torch.Tensor:
        """Run the body; tokens and positions [rows, queries]; mask broadcasts to
        [rows, 1, queries, keys]; returns [rows, queries, hidden]."""
        output = self._body(
            input_ids=tokens,
            attention_mask=mask,
            token_type_ids=torch.full_like(tokens, token_type),
            position_ids=positions + self._first_position,
            past_key_values=cache,
        )
        hidden: torch.Tensor = output.last_hidden_state
        return hidden


class _Cache:
    """Keys, values and last hidden states of inputs and answers, written in place.

    Columns [0, prefix) hold the input of a row, the following ones the tokens of its answers.
    Everything is allocated once, and again only where more answer tokens come than expected.

    Parameters
    ----------
    layers
        Number of layers of the model.
    rows
        Number of inputs.
    prefix
        Tokens of the longest input.
    columns
        Answer tokens to make room for.
    """

    def __init__(self, layers: int, rows: int, prefix: int, columns: int) -> None:
        self._layers = layers
        self.rows = rows  # in use; those behind were dropped
        self.prefix = prefix
        self.used = 0
        self._capacity = prefix + columns
        # Keys and values of all layers [layers, 2, rows, heads, columns, d] and the last hidden
        # states [rows, columns, hidden]. One block for all layers: as many smaller ones the
        # allocator would keep and scatter over the heap.
        self._memory: torch.Tensor | None = None
        self._hidden: torch.Tensor | None = None
        self._place = (slice(0), 0, 0)

    def write_at(self, rows: slice, begin: int, end: int) -> None:
        """Let the next forward pass write columns [begin, end) of these rows."""
        if end > self._capacity:
            self._grow(end)
        self._place = (rows, begin, end)
        self.used = max(self.used, end)

    # Called by transformers' attention layers.

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self._place[1]

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, layer_idx: int, *_: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self._memory is None:
            self._memory = self._allocate((self._layers, 2), keys)
        layer = self._memory[layer_idx]
        return self._write(layer[0], keys), self._write(layer[1], values)

    def write_hidden(self, hidden: torch.Tensor) -> None:
        """Keep the hidden states of the last layer, [rows, tokens, hidden]."""
        if self._hidden is None:
            self._hidden = self._allocate((), hidden)
        self._write(self._hidden, hidden)

    def hidden(self, rows: NDArray[np.int64], columns: NDArray[np.int64]) -> torch.Tensor:
        """Return the last hidden states at these places, [n, hidden]."""
        assert self._hidden is not None
        to = self._hidden.device
        return self._hidden[torch.from_numpy(rows).to(to), torch.from_numpy(columns).to(to)]

    def newest_hidden(self, columns: int) -> torch.Tensor:
        """Return the last hidden states of the newest columns, [rows, columns, hidden]."""
        assert self._hidden is not None
        return self._hidden[: self.rows, self.used - columns : self.used]

    def keep(self, kept: NDArray[np.bool_]) -> NDArray[np.int64]:
        """Drop rows; the last ones move into the gaps. Returns the old index of each new row."""
        size = int(kept.sum())
        order = np.arange(size)
        holes = np.flatnonzero(~kept[:size])
        movers = size + np.flatnonzero(kept[size:])
        order[holes] = movers
        if len(holes):
            assert self._memory is not None and self._hidden is not None
            for array in (*self._memory.flatten(0, 1), self._hidden):
                array[holes, ..., : self.used, :] = array[movers, ..., : self.used, :]
        self.rows = size
        return order

    def _allocate(self, first: tuple[int, ...], like: torch.Tensor) -> torch.Tensor:
        """Make room, [*first, rows, ..., columns, d], for arrays [rows, ..., tokens, d]."""
        return like.new_empty(
            (*first, self.rows, *like.shape[1:-2], self._capacity, like.shape[-1])
        )

    def _write(self, array: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        """Write [rows, ..., tokens, d] at the place; return these rows up to the place's end."""
        rows, begin, end = self._place
        array = array[rows]
        array[..., begin:end, :] = new
        if end < self.prefix:  # what is masked out must still be finite
            array[..., end : self.prefix, :] = 0
        return array[..., :end, :]

    def _grow(self, least: int) -> None:
        self._capacity = max(least, 2 * self._capacity - self.prefix)  # twice the answer columns
        assert self._memory is not None and self._hidden is not None
        memory = self._allocate(self._memory.shape[:2], self._memory[0, 0])
        memory[..., : self.used, :] = self._memory[:, :, : self.rows, ..., : self.used, :]
        hidden = self._allocate((), self._hidden)
        hidden[:, : self.used] = self._hidden[: self.rows, : self.used]
        self._memory, self._hidden = memory, hidden


class EncoderSession:
    """The encoder's side of one search over a batch of questions. For one thread."""

    def __init__(
        self, encoder: UniLMEncoder, rows: Sequence[NDArray[np.int32]], answer_tokens: int
    ) -> None:
        self._encoder = encoder
        self._rows = rows
        lengths = np.array([len(row) for row in rows], dtype=np.int64)
        # Inputs by falling length, so that those of a prefill batch are of like length.
        self._passages = np.argsort(-lengths, kind="stable")  # passage of each cache row
        self._lengths = lengths[self._passages]  # of each cache row
        prefix = int(lengths.max(initial=0))
        self._cache = _Cache(encoder.num_layers, len(rows), prefix, answer_tokens)
        # First of the newest columns and their logits [rows, columns, V], if computed ahead.
        self._ahead: tuple[int, torch.Tensor] | None = None

    @torch.inference_mode()
    def prefill(self) -> torch.Tensor:
        """Encode all inputs; return the logits after them, float32 [passages, V].

        These and all others are on the CPU unless there are kernels for the device.
        """
        encoder, cache = self._encoder, self._cache
        if cache.rows == 0:
            return torch.zeros(0, encoder.vocabulary_size)
        for batch in by_length(self._lengths.tolist(), device=encoder.device):
            rows = slice(batch[0], batch[-1] + 1)  # the cache's rows are in this order already
            tokens, mask = self._padded(rows)
            positions = torch.arange(tokens.shape[1], device=encoder.device).expand_as(tokens)
            cache.write_at(rows, 0, tokens.shape[1])
            cache.write_hidden(encoder.forward(tokens, positions, mask, 0, cache))
        row_of = np.argsort(self._passages)
        return self._logits(cache.hidden(row_of, self._lengths[row_of] - 1))

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the logits of hidden states where the search is."""
        logits = self._encoder.logits(hidden)
        return logits if has_kernels(logits.device) else logits.cpu()

    @torch.inference_mode()
    def step(self, request: _C.StepRequest) -> torch.Tensor:
        """Encode the tokens of the request; return the logits of its rows, float32 [rows, V]."""
        passages, first = np.unique(request.row_passage.astype(np.int64), return_index=True)
        if len(passages) < self._cache.rows:
            order = self._cache.keep(np.isin(self._passages, passages))
            self._passages, self._lengths = self._passages[order], self._lengths[order]
            self._ahead = None
        row_of = np.zeros(len(self._rows), dtype=np.int64)
        row_of[self._passages] = np.arange(len(self._passages))
        if request.width:
            question_of_row = np.zeros(self._cache.rows, dtype=np.int64)
            question_of_row[row_of[passages]] = request.row_question[first]
            self._append(
                request.tokens[question_of_row],
                request.depths[question_of_row],
                request.ancestors[question_of_row].astype(bool),
            )
            self._ahead = self._logits_ahead(request)
        rows = row_of[request.row_passage]
        columns = self._cache.prefix + request.row_column.astype(np.int64)
        if self._ahead is not None and columns.min() >= self._ahead[0]:
            begin, logits = self._ahead
            return logits[torch.from_numpy(rows), torch.from_numpy(columns - begin)]
        return self._logits(self._cache.hidden(rows, columns))

    def _logits_ahead(self, request: _C.StepRequest) -> tuple[int, torch.Tensor] | None:
        """Compute the logits of all new tokens together, if some are for later steps.

        Only one question is looked ahead for, so no token is padding.
        """
        rows, width = self._cache.rows, request.width
        all_new = request.row_column.min() >= request.columns - width
        if len(request.questions) > 1 or not all_new or width == request.hypotheses[0]:
            return None
        if rows * width * self._encoder.vocabulary_size > _LOGITS_AHEAD:
            return None
        hidden = self._cache.newest_hidden(width)
        logits = self._logits(hidden.flatten(0, 1))
        return self._cache.used - width, logits.view(rows, width, -1)

    @torch.inference_mode()
    def append(self, token: int) -> torch.Tensor:
        """Append a token to the answer of every input; return the logits, [passages, V]."""
        rows, column = self._cache.rows, self._cache.used
        depth = column - self._cache.prefix
        self._append(
            np.full((rows, 1), token),
            np.full((rows, 1), depth),
            np.ones((rows, 1, depth + 1), dtype=bool),
        )
        row_of = np.argsort(self._passages)
        return self._logits(self._cache.hidden(row_of, np.full(rows, column)))

    def _padded(self, rows: slice) -> tuple[torch.Tensor, torch.Tensor | None]:
        lengths = self._lengths[rows]
        device = self._encoder.device
        own = [self._rows[passage] for passage in self._passages[rows]]
        # Queries of the padding see the row's input, so nothing is NaN; they are never read.
        mask = None
        if lengths[-1] < lengths[0]:
            visible = np.arange(lengths[0])[None, :] < lengths[:, None]
            mask = torch.from_numpy(visible)[:, None, None, :].to(device)
        return padded(own, self._encoder.pad_id, device), mask

    def _append(
        self,
        tokens: NDArray[np.integer],
        depths: NDArray[np.integer],
        ancestors: NDArray[np.bool_],
    ) -> None:
        """Encode answer tokens [rows, queries] that see answer columns [rows, queries, columns]."""
        cache, device = self._cache, self._encoder.device
        if cache.used == 0:
            raise RuntimeError("append: expected prefill before")
        positions = self._lengths[:, None] + depths
        sees_input = np.arange(cache.prefix)[None, :] < self._lengths[:, None]
        sees_input = np.repeat(sees_input[:, None, :], tokens.shape[1], axis=1)
        visible = np.concatenate([sees_input, ancestors], axis=2)
        cache.write_at(slice(0, cache.rows), cache.used, cache.used + tokens.shape[1])
        cache.write_hidden(
            self._encoder.forward(
                torch.from_numpy(tokens.astype(np.int64)).to(device),
                torch.from_numpy(positions).to(device),
                torch.from_numpy(visible)[:, None].to(device),
                self._encoder.answer_type,
                cache,
            )
        )
