"""The encoder of the original reader: every hypothesis is encoded anew at every step."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, SupportsIndex

import numpy as np
import torch
from numpy.typing import NDArray

from fastmrc.errors import InputError, UnsupportedModelError
from fastmrc.pretrained import first_position, max_positions
from fastmrc.reference._checks import require_int, token_lists
from fastmrc.reference.beam_search import NextLogits

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["ReencodingEncoder"]


class ReencodingEncoder:
    """Next-token log-probabilities of a UniLM reader, without a cache.

    For each passage and hypothesis it encodes ``[CLS] passage [SEP] question [SEP] prefix`` from
    scratch, takes language-model head and softmax at every position, as the original does, and
    reads the last one.

    Parameters
    ----------
    model
        A masked language model of transformers (``BertForMaskedLM`` and its like) in evaluation
        mode, with the attention implementation ``"sdpa"``.
    end_id
        The token that ends each input, [SEP]; it also fills the padding, which nothing reads.
    batch_rows
        Largest number of rows (passage x hypothesis) per forward pass.

    Raises
    ------
    UnsupportedModelError
        If the model is a decoder, is in training mode or does not use sdpa: other
        implementations read a boolean mask differently.
    InputError, TypeError
        If `end_id` or `batch_rows` is wrong.
    """

    def __init__(self, model: PreTrainedModel, *, end_id: int, batch_rows: int = 32) -> None:
        config = model.config
        attention = getattr(config, "_attn_implementation", None)
        if attention != "sdpa":
            raise UnsupportedModelError(
                f"model: expected the attention implementation 'sdpa', got {attention!r}"
            )
        if getattr(config, "is_decoder", False):
            raise UnsupportedModelError("model: expected an encoder, got is_decoder=True")
        if model.training:
            raise UnsupportedModelError("model: expected evaluation mode, got training mode")
        self._model = model
        self._end_id = require_int("end_id", end_id, 0, config.vocab_size - 1)
        self._batch_rows = require_int("batch_rows", batch_rows, 1)
        self._answer_type = 1 if getattr(config, "type_vocab_size", 1) > 1 else 0
        self._longest = max_positions(config) or 0
        self._first_position = first_position(config)

    def next_logits_for(self, rows: Iterable[Iterable[SupportsIndex]]) -> NextLogits:
        """Return the `next_logits` of `fastmrc.reference.beam_search` for one question.

        Parameters
        ----------
        rows
            For each passage the whole input, ``[CLS] passage [SEP] question [SEP]``.

        Returns
        -------
        Callable
            From prefixes (K token lists) and n indices into `rows` to log-probabilities, NumPy
            float32 [n, K, V], each row a log-softmax taken in float32. The search takes them for
            logits: a softmax of them gives the same probabilities.

        Raises
        ------
        InputError
            If an input does not end in the end token, or later if input and prefix are longer
            than the model's positions or an index is out of range.
        """
        inputs = token_lists("rows", rows)
        for p, row in enumerate(inputs):
            if not row or row[-1] != self._end_id:
                raise InputError(f"rows[{p}]: expected the end token {self._end_id} at the end")

        def next_logits(prefixes: list[list[int]], passage_ids: list[int]) -> NDArray[np.float32]:
            for p in passage_ids:
                require_int("passage_ids", p, 0, len(inputs) - 1)
            pairs = [(inputs[p], prefix) for p in passage_ids for prefix in prefixes]
            parts = [
                self._last_log_probs(pairs[i : i + self._batch_rows])
                for i in range(0, len(pairs), self._batch_rows)
            ]
            shape = (len(passage_ids), len(prefixes), self._model.config.vocab_size)
            if not parts:
                return np.zeros(shape, np.float32)
            return np.concatenate(parts).reshape(shape)

        return next_logits

    @torch.inference_mode()
    def _last_log_probs(self, pairs: Sequence[tuple[list[int], list[int]]]) -> NDArray[np.float32]:
        """Encode (input, prefix) pairs [B]; return log-probabilities [B, V] after the prefixes."""
        logits = self._model(**self._batch(pairs)).logits
        # One row at a time: the softmax at all positions of all rows need not be in memory.
        last = [
            torch.log_softmax(row.float(), dim=-1)[len(tokens) + len(prefix) - 1]
            for row, (tokens, prefix) in zip(logits, pairs, strict=True)
        ]
        log_probs: NDArray[np.float32] = torch.stack(last).cpu().numpy()
        return log_probs

    def _batch(self, pairs: Sequence[tuple[list[int], list[int]]]) -> dict[str, Any]:
        """Build the model's arguments, padded on the right to length L."""
        size, length = len(pairs), max(len(tokens) + len(prefix) for tokens, prefix in pairs)
        if length > self._longest:
            raise InputError(
                f"rows: expected input and prefix of at most {self._longest} tokens, got {length}"
            )
        input_ids = torch.full((size, length), self._end_id)
        token_types = torch.zeros((size, length), dtype=torch.long)
        mask = torch.zeros((size, 1, length, length), dtype=torch.bool)  # query, key
        for b, (tokens, prefix) in enumerate(pairs):
            start, stop = len(tokens), len(tokens) + len(prefix)
            input_ids[b, :stop] = torch.tensor(tokens + prefix)
            token_types[b, start:stop] = self._answer_type
            mask[b, 0, :stop, :start] = True
            mask[b, 0, start:stop, start:stop] = torch.ones(len(prefix), len(prefix)).tril() > 0
            mask[b, 0, stop:, 0] = True  # a query that sees nothing would be NaN
        positions = torch.arange(length).expand(size, length) + self._first_position
        batch = {
            "input_ids": input_ids,
            "token_type_ids": token_types,
            "position_ids": positions,
            "attention_mask": mask,
        }
        return {name: tensor.to(self._model.device) for name, tensor in batch.items()}
