"""Encoder of one vector per text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from fastmrc.encoders.batches import by_length, padded_inputs
from fastmrc.encoders.pooling import pooled
from fastmrc.errors import InputError, UnsupportedModelError
from fastmrc.pretrained import LoadedModel, load_pooler, max_positions
from fastmrc.text import TextCodec, join_tokens

if TYPE_CHECKING:
    from fastmrc.pretrained import Pooling

__all__ = ["VectorEncoder"]


class VectorEncoder:
    """Pooled, normalised vectors of texts; immutable, may be used by several threads.

    Parameters
    ----------
    loaded
        A model with its tokenizer.
    pooling
        How a vector is made of the last hidden states; None: as the model says, else ``"linear"``
        if its checkpoint holds a pooler, else ``"mean"``.

    Raises
    ------
    UnsupportedModelError
        For ``"linear"`` if the checkpoint holds no pooler.
    """

    def __init__(self, loaded: LoadedModel, pooling: Pooling | None = None) -> None:
        self._model: Any = loaded.model
        self.codec = TextCodec(loaded.tokenizer, "none")
        pooling = loaded.pooling if pooling is None else pooling
        self._linear = load_pooler(loaded) if pooling in (None, "linear") else None
        if pooling == "linear" and self._linear is None:
            raise UnsupportedModelError(
                f"{loaded.source}: pooling 'linear' needs the weights of a pooler, got none"
            )
        self.pooling: Pooling = pooling or ("mean" if self._linear is None else "linear")
        self._pad_id = int(loaded.model.config.pad_token_id or 0)
        self.dimension = int(loaded.model.config.hidden_size)
        self.max_tokens = (max_positions(loaded.model.config) or 512) - 2

    def rows(self, texts: Sequence[str], max_tokens: int | None = None) -> list[NDArray[np.int32]]:
        """Return the inputs ``[CLS] text [SEP]`` of texts, int32 [n] each.

        Parameters
        ----------
        texts
            Longer ones are cut, at a sentence mark where there is one.
        max_tokens
            Most tokens of a text; None: as many as the model has positions for.

        Raises
        ------
        InputError
            If `max_tokens` is more than the model has positions for.
        """
        if max_tokens is None:
            max_tokens = self.max_tokens
        if not 1 <= max_tokens <= self.max_tokens:
            raise InputError(
                f"max_tokens: expected 1 to {self.max_tokens}, the positions of the model without "
                f"[CLS] and [SEP], got {max_tokens}"
            )
        cls, sep = [self.codec.cls_id], [self.codec.sep_id]
        return [join_tokens(cls, own, sep) for own in self.codec.encode_texts(texts, max_tokens)]

    @torch.inference_mode()
    def batches(
        self, rows: Sequence[NDArray[np.int32]]
    ) -> Iterator[tuple[list[int], NDArray[np.float32]]]:
        """Yield places in `rows` and their vectors, float32 [places, dimension], batch by batch,
        longest first."""
        for places in by_length([len(row) for row in rows], device=self._model.device):
            inputs = padded_inputs([rows[i] for i in places], self._pad_id, self._model.device)
            hidden = self._model.base_model(**inputs).last_hidden_state
            lengths = inputs["attention_mask"].sum(dim=1)
            yield places, pooled(hidden, lengths, self.pooling, self._linear).cpu().numpy()
