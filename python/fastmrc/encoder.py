"""UniLM encoder with the input encoded once and all hypotheses as queries of one row.

With the UniLM mask (Dong et al. 2019) the input ``[CLS] passage [SEP] question [SEP]`` never sees
the answer, so its keys and values are computed once. The newest tokens of a question's K
hypotheses then are K query positions of the same row; a mask lets each see its own ancestors
(tree attention), and reordering the beam moves no cache.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from fastmrc.errors import InputError, UnsupportedModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from fastmrc import _C

__all__ = ["SUPPORTED_MODEL_TYPES", "EncoderSession", "UniLMEncoder", "resolve_dtype"]


@dataclass(frozen=True)
class _Family:
    """What differs between the model families: the path of the head, where positions start."""

    head: tuple[str, ...]
    positions_after_padding: bool = False


_FAMILIES = {
    "bert": _Family(("cls",)),
    "electra": _Family(("generator_predictions", "generator_lm_head")),
    "ernie": _Family(("cls",)),
    "roberta": _Family(("lm_head",), positions_after_padding=True),
    "xlm-roberta": _Family(("lm_head",), positions_after_padding=True),
}
SUPPORTED_MODEL_TYPES = tuple(_FAMILIES)

# Padded tokens of one forward pass of the inputs: enough to keep two to sixteen cores busy, little
# enough that the activations of a BERT-base layer stay in tens of megabytes.
_PREFILL_TOKENS = 4096


def resolve_dtype(dtype: str, device: str) -> str:
    """Turn ``auto`` into bfloat16 where the hardware multiplies it natively, else float32."""
    if dtype != "auto":
        return dtype
    if torch.device(device).type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported() else "float32"
    flags = _cpu_flags()
    return "bfloat16" if flags & {"avx512_bf16", "amx_bf16", "bf16"} else "float32"


def _cpu_flags() -> set[str]:
    try:
        with open("/proc/cpuinfo", encoding="ascii", errors="replace") as file:
            for line in file:
                if line.startswith(("flags", "Features")):
                    return set(line.split(":", 1)[1].split())
    except OSError:
        pass
    return set()


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
        family = _FAMILIES.get(config.model_type)
        if family is None:
            raise UnsupportedModelError(
                f"model: expected a type that takes a cache and a 4-D mask "
                f"({', '.join(SUPPORTED_MODEL_TYPES)}), got {config.model_type!r}"
            )
        if getattr(config, "is_decoder", False):
            raise UnsupportedModelError("model: expected an encoder, got is_decoder=True")
        self._model = model
        self._body: Callable[..., Any] = model.base_model
        self._head = [getattr(model, name) for name in family.head]
        if model.dtype != torch.float32:  # logits are float32 also where the body is not
            self._head = [copy.deepcopy(module).float() for module in self._head]
        self._layers = int(config.num_hidden_layers)
        self._answer_type = 1 if config.type_vocab_size > 1 else 0
        self._first_position = config.pad_token_id + 1 if family.positions_after_padding else 0
        self._pad_id = int(config.pad_token_id or 0)
        self.vocabulary_size = int(config.vocab_size)
        self.max_positions = int(config.max_position_embeddings) - self._first_position

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self._model.device

    def session(self, rows: Sequence[NDArray[np.int32]], max_steps: int) -> EncoderSession:
        """Begin decoding a batch of inputs.

        Parameters
        ----------
        rows
            For each passage of all questions its input, ``[CLS] passage [SEP] question [SEP]``.
        max_steps
            Largest number of tokens that will follow an input.

        Raises
        ------
        InputError
            If input and answer are longer than the model's positions.
        """
        longest = max((len(row) for row in rows), default=0)
        if longest + max_steps > self.max_positions:
            raise InputError(
                f"passages: expected input and answer of at most {self.max_positions} tokens, the "
                f"positions of the model, got {longest} + {max_steps}; lower max_passage_tokens, "
                f"max_question_tokens or max_answer_tokens"
            )
        return EncoderSession(self, rows, max_steps)

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
        for t in range(len(prefix)):
            cached = session.append(
                np.full((1, 1), prefix[t]), np.ones((1, 1, t + 1)), np.zeros(2, dtype=np.int64)
            )
        reference = ReencodingEncoder(self._model, end_id=sep_id).next_logits_for(
            row.tolist() for row in rows
        )([prefix], [0, 1])[:, 0]
        difference = float(
            (torch.log_softmax(cached, -1) - torch.from_numpy(reference)).abs().max()
        )
        # Rounding: measured 1e-5 (float32) and 0.1 (bfloat16) on models of 2 to 12 layers.
        if not difference < (1e-3 if self._model.dtype == torch.float32 else 1.0):
            raise UnsupportedModelError(
                f"model: expected the cached logits to equal those of re-encoding, got a largest "
                f"difference of {difference:.3g}; this version of transformers is not supported"
            )

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Apply the LM head to [n, hidden]; float32 [n, V] on the CPU, where the search is."""
        hidden = hidden.float()
        for module in self._head:
            hidden = module(hidden)
        return hidden.cpu()

    def forward(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        mask: torch.Tensor | None,
        token_type: int,
        cache: _Recorder | _TreeCache,
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

    @property
    def pad_id(self) -> int:
        """Token that fills short rows; its positions are never read."""
        return self._pad_id

    @property
    def answer_type(self) -> int:
        """Token type of the answer."""
        return self._answer_type

    @property
    def num_layers(self) -> int:
        """Number of layers that keep keys and values."""
        return self._layers


class _Recorder:
    """Takes the keys and values of each layer while the inputs are encoded; copies nothing."""

    def __init__(self) -> None:
        self.layers: list[tuple[torch.Tensor, torch.Tensor]] = []  # each [rows, heads, tokens, d]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, layer_idx: int, *_: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.layers.append((keys, values))
        return keys, values


class _TreeCache:
    """Keys and values of inputs and answer tokens, written in place.

    Columns [0, prefix) hold the input of a row, the following ones its answer tokens. Allocated
    once, and again only where a beam grows after its first step.
    """

    def __init__(self, prefix: int, keys: list[torch.Tensor], values: list[torch.Tensor]) -> None:
        self.keys = keys  # per layer [rows, heads, prefix + answer columns, d]
        self.values = values
        self.prefix = prefix
        self.rows = keys[0].shape[0]
        self.columns = 0  # answer columns in use

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.prefix + self.columns

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, layer_idx: int, *_: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        begin = self.prefix + self.columns
        end = begin + keys.shape[2]
        self.keys[layer_idx][: self.rows, :, begin:end] = keys
        self.values[layer_idx][: self.rows, :, begin:end] = values
        return self.keys[layer_idx][: self.rows, :, :end], self.values[layer_idx][
            : self.rows, :, :end
        ]

    @property
    def capacity(self) -> int:
        """Answer columns that fit."""
        return int(self.keys[0].shape[2]) - self.prefix

    def grow(self, columns: int) -> None:
        """Make room for so many answer columns in all."""
        for layers in (self.keys, self.values):
            for i, old in enumerate(layers):
                rows, heads, _, size = old.shape
                new = old.new_zeros((rows, heads, self.prefix + columns, size))
                new[:, :, : old.shape[2]] = old
                layers[i] = new

    def keep(self, kept: NDArray[np.bool_]) -> NDArray[np.int64]:
        """Drop rows; the last ones move into the gaps. Returns the old index of each new row."""
        size = int(kept.sum())
        order = np.arange(size)
        holes = np.flatnonzero(~kept[:size])
        movers = size + np.flatnonzero(kept[size:])
        order[holes] = movers
        if len(holes):
            used = self.prefix + self.columns
            for layer in (*self.keys, *self.values):
                layer[holes, :, :used] = layer[movers, :, :used]
        self.rows = size
        return order


class EncoderSession:
    """The encoder's side of one search over a batch of questions. For one thread."""

    def __init__(
        self, encoder: UniLMEncoder, rows: Sequence[NDArray[np.int32]], max_steps: int
    ) -> None:
        self._encoder = encoder
        self._rows = rows
        self._max_steps = max_steps
        self._lengths = np.array([len(row) for row in rows], dtype=np.int64)
        # Per prefill batch: the passages in it and the recorded layers.
        self._recorded: list[tuple[NDArray[np.int64], _Recorder]] = []
        self._cache: _TreeCache | None = None
        self._cached_passages = np.zeros(0, dtype=np.int64)  # passage of each cache row
        self._step = 0

    @torch.inference_mode()
    def prefill(self) -> torch.Tensor:
        """Encode all inputs; return the logits after them, float32 [passages, V]."""
        encoder = self._encoder
        last = [torch.empty(0)] * len(self._rows)
        for batch in self._batches():
            recorder = _Recorder()
            tokens, mask = self._padded(batch)
            positions = torch.arange(tokens.shape[1], device=encoder.device).expand_as(tokens)
            hidden = encoder.forward(tokens, positions, mask, 0, recorder)
            for row, passage in enumerate(batch):
                last[passage] = hidden[row, self._lengths[passage] - 1]
            self._recorded.append((batch, recorder))
        if not last:
            return torch.zeros(0, encoder.vocabulary_size)
        return encoder.logits(torch.stack(last))

    @torch.inference_mode()
    def step(self, request: _C.StepRequest) -> torch.Tensor:
        """Encode the newest tokens of all live hypotheses; return the logits of the request's
        rows, float32 [rows, V]."""
        passages, first = np.unique(request.row_passage.astype(np.int64), return_index=True)
        self._keep(passages, request.width)
        question_of = np.zeros(len(self._rows), dtype=np.int64)
        question_of[passages] = request.row_question[first]
        hidden = self._append(request.tokens, request.ancestors, question_of[self._cached_passages])
        cache_row = np.zeros(len(self._rows), dtype=np.int64)
        cache_row[self._cached_passages] = np.arange(len(self._cached_passages))
        index = cache_row[request.row_passage] * request.width + request.row_hypothesis
        flat = hidden.flatten(0, 1)
        return self._encoder.logits(flat[torch.from_numpy(index).to(flat.device)])

    @torch.inference_mode()
    def append(
        self,
        tokens: NDArray[np.integer],
        ancestors: NDArray[Any],
        question_of_row: NDArray[np.int64],
    ) -> torch.Tensor:
        """Append tokens below all inputs, one hypothesis per question; logits [passages, V].

        Parameters
        ----------
        tokens
            [questions, 1].
        ancestors
            [questions, 1, columns], non-zero where a token sees an answer column.
        question_of_row
            Question of each input.
        """
        self._keep(np.arange(len(self._rows)), 1)
        return self._encoder.logits(self._append(tokens, ancestors, question_of_row)[:, 0])

    def _batches(self) -> list[NDArray[np.int64]]:
        """Passages by falling length, cut where the padded tokens would exceed the budget."""
        order = np.argsort(-self._lengths, kind="stable")
        batches = []
        begin = 0
        while begin < len(order):
            size = max(1, _PREFILL_TOKENS // int(self._lengths[order[begin]]))
            batches.append(order[begin : begin + size])
            begin += size
        return batches

    def _padded(self, batch: NDArray[np.int64]) -> tuple[torch.Tensor, torch.Tensor | None]:
        lengths = self._lengths[batch]
        tokens = np.full((len(batch), int(lengths[0])), self._encoder.pad_id, dtype=np.int64)
        for row, passage in enumerate(batch):
            tokens[row, : lengths[row]] = self._rows[passage]
        device = self._encoder.device
        # Queries of the padding see the row's input, so nothing is NaN; they are never read.
        mask = None
        if lengths[-1] < lengths[0]:
            visible = np.arange(lengths[0])[None, :] < lengths[:, None]
            mask = torch.from_numpy(visible)[:, None, None, :].to(device)
        return torch.from_numpy(tokens).to(device), mask

    def _keep(self, passages: NDArray[np.int64], width: int) -> None:
        """Hold cache rows for these passages only."""
        if self._cache is None:
            self._cache = self._build_cache(passages, width)
            self._cached_passages = passages
        elif len(passages) < self._cache.rows:
            order = self._cache.keep(np.isin(self._cached_passages, passages))
            self._cached_passages = self._cached_passages[order]

    def _build_cache(self, passages: NDArray[np.int64], width: int) -> _TreeCache:
        """Copy what was recorded for the surviving passages into the cache of the search."""
        prefix = int(self._lengths[passages].max())
        _, heads, _, size = self._recorded[0][1].layers[0][0].shape
        columns = prefix + width * self._max_steps
        row_of = np.full(len(self._rows), -1, dtype=np.int64)
        row_of[passages] = np.arange(len(passages))
        like = self._recorded[0][1].layers[0][0]
        both: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
        for layer in range(self._encoder.num_layers):
            for kind in (0, 1):
                target = like.new_empty((len(passages), heads, columns, size))
                target[:, :, prefix:] = 0  # what is masked out must still be finite
                for batch, recorder in self._recorded:
                    _copy_rows(target, recorder.layers[layer][kind], row_of[batch], prefix)
                both[kind].append(target)
            for _, recorder in self._recorded:
                recorder.layers[layer] = (like, like)  # frees the recorded layer
        self._recorded.clear()
        return _TreeCache(prefix, *both)

    def _append(
        self,
        tokens: NDArray[np.integer],
        ancestors: NDArray[Any],
        question_of_row: NDArray[np.int64],
    ) -> torch.Tensor:
        cache = self._cache
        if cache is None:
            raise RuntimeError("append: expected prefill before")
        device = self._encoder.device
        lengths = self._lengths[self._cached_passages]
        row_tokens = torch.from_numpy(tokens[question_of_row].astype(np.int64)).to(device)
        positions = torch.from_numpy(lengths + self._step)[:, None].expand(row_tokens.shape)
        sees_input = np.arange(cache.prefix)[None, :] < lengths[:, None]
        queries = row_tokens.shape[1]
        if cache.columns + queries > cache.capacity:
            # The first step was narrower, as where a trie has few first tokens.
            cache.grow(cache.columns + queries * max(1, self._max_steps - self._step))
        visible = np.concatenate(
            [
                np.repeat(sees_input[:, None, :], queries, axis=1),
                ancestors[question_of_row].astype(bool),
            ],
            axis=2,
        )
        hidden = self._encoder.forward(
            row_tokens,
            positions.to(device),
            torch.from_numpy(visible)[:, None].to(device),
            self._encoder.answer_type,
            cache,
        )
        cache.columns += queries
        self._step += 1
        return hidden


def _copy_rows(
    target: torch.Tensor, source: torch.Tensor, rows: NDArray[np.int64], prefix: int
) -> None:
    """Copy recorded rows [batch, heads, tokens, d] to rows of the cache; -1: left out.

    Where the batch was shorter than the prefix, the gap is filled with zeros.
    """
    tokens = min(prefix, source.shape[2])
    kept = np.flatnonzero(rows >= 0)
    if len(kept) == 0:
        return
    to = rows[kept]
    if (np.diff(to) == 1).all() and len(kept) == len(rows):  # nothing left out: one copy
        place = slice(int(to[0]), int(to[-1]) + 1)
        target[place, :, :tokens] = source[:, :, :tokens]
        target[place, :, tokens:prefix] = 0
        return
    for row, place in zip(kept.tolist(), to.tolist(), strict=True):
        target[place, :, :tokens] = source[row, :, :tokens]
        target[place, :, tokens:prefix] = 0
