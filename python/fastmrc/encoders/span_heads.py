"""Encoder with a start and an end head, as question-answering models of transformers have."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from fastmrc.cuda.runtime import has_kernels
from fastmrc.encoders.batches import padded, padded_inputs
from fastmrc.errors import UnsupportedModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["SpanEncoder"]


class SpanEncoder:
    """Start and end logits of inputs; immutable, may be used by several threads.

    Parameters
    ----------
    model
        ``...ForQuestionAnswering`` of transformers in evaluation mode.
    with_types
        Whether the model is told question and passage apart by token types.
    sample
        Token ids and token types of a short input, to try the model with.

    Raises
    ------
    UnsupportedModelError
        If the model does not return one start and one end logit per token.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        with_types: bool,
        sample: tuple[NDArray[np.int32], NDArray[np.int32]],
    ) -> None:
        self._model = model
        self._pad_id = int(model.config.pad_token_id or 0)
        self._with_types = with_types
        self._check(*sample)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self._model.device

    @torch.inference_mode()
    def logits(
        self, rows: Sequence[NDArray[np.int32]], token_types: Sequence[NDArray[np.int32]]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Encode inputs; return start and end logits, float32 [rows, longest].

        On the CPU unless there are kernels for the device.
        """
        device = self._model.device
        inputs = padded_inputs(rows, self._pad_id, device)
        if self._with_types:
            inputs["token_type_ids"] = padded(token_types, 0, device)
        output = self._model(**inputs)
        start, end = output.start_logits.float(), output.end_logits.float()
        return (start, end) if has_kernels(device) else (start.cpu(), end.cpu())

    def _check(self, row: NDArray[np.int32], token_types: NDArray[np.int32]) -> None:
        try:
            start, end = self.logits([row], [token_types])
        except Exception as error:  # whatever a model of another kind may raise
            raise UnsupportedModelError(
                f"model: {type(self._model).__name__} gives no start and end logits "
                f"({type(error).__name__}: {error})"
            ) from error
        if not start.shape == end.shape == (1, len(row)):
            raise UnsupportedModelError(
                f"model: expected one start and one end logit per token, got shapes "
                f"{tuple(start.shape)} and {tuple(end.shape)} for {len(row)} tokens"
            )
