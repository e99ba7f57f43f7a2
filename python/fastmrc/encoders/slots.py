"""Masked-LM encoder whose output layer runs on the slots of the input only."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from fastmrc.cuda.runtime import has_kernels
from fastmrc.encoders.batches import padded_inputs
from fastmrc.errors import UnsupportedModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["SlotEncoder"]


class _SlotsOf(torch.nn.Module):
    """Stands for the body of a model and gives its output at the slots only, in float32."""

    def __init__(self, body: torch.nn.Module, slots: int) -> None:
        super().__init__()
        self.body = body
        self._slots = slots

    def __getattr__(self, name: str) -> Any:
        # What a head reads of its body, such as its embeddings.
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("body"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = self.body(*args, **kwargs)
        hidden = output[0][:, 1 : 1 + self._slots].float()
        if isinstance(output, tuple):
            return (hidden, *output[1:])
        output["last_hidden_state"] = hidden
        return output


class SlotEncoder:
    """Logits of the [MASK] slots behind [CLS]; immutable, may be used by several threads.

    Works with any ``...ForMaskedLM`` of transformers that applies a head to what its body returns:
    a copy of the model without its weights gets a body that returns the slots alone, so that the
    head, copied in float32 if the model is not, sees nothing else.

    Parameters
    ----------
    model
        In evaluation mode.

    Raises
    ------
    UnsupportedModelError
        If the logits so found are not those that the whole model gives at the slots.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._body_name = str(model.base_model_prefix)
        if model._modules.get(self._body_name) is None:
            raise UnsupportedModelError(
                f"model: expected a body and a head, got {type(model).__name__}"
            )
        self._head = {
            name: module for name, module in model._modules.items() if name != self._body_name
        }
        if model.dtype != torch.float32:  # logits are float32 also where the body is not
            self._head = {
                name: copy.deepcopy(module).float() if module is not None else None
                for name, module in self._head.items()
            }
        self._pad_id = int(model.config.pad_token_id or 0)
        self._check()

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self._model.device

    @torch.inference_mode()
    def logits(self, rows: Sequence[NDArray[np.int32]], slots: int) -> torch.Tensor:
        """Encode inputs ``[CLS] [MASK]*slots ...``; return float32 [rows, slots, V].

        On the CPU unless there are kernels for the device.
        """
        inputs = padded_inputs(rows, self._pad_id, self._model.device)
        logits: torch.Tensor = self._at_slots(slots)(**inputs).logits.float()
        return logits if has_kernels(logits.device) else logits.cpu()

    def _at_slots(self, slots: int) -> Any:
        """Return the model with a body that gives the slots only; shares all weights."""
        shell = copy.copy(self._model)
        body = getattr(self._model, self._body_name)
        shell._modules = dict(self._model._modules) | self._head
        shell._modules[self._body_name] = _SlotsOf(body, slots)
        return shell

    @torch.inference_mode()
    def _check(self) -> None:
        """Compare with the whole model on a few tokens."""
        slots = 3
        generator = np.random.default_rng(0)
        vocabulary = int(self._model.config.vocab_size)
        row = generator.integers(min(10, vocabulary - 1), vocabulary, 2 + slots + 4)
        try:
            ours = self.logits([row.astype(np.int32)], slots)
            whole = self._model(input_ids=torch.from_numpy(row)[None].to(self._model.device))
            theirs = whole.logits[:, 1 : 1 + slots].float().cpu()
            difference = float((ours.cpu() - theirs).abs().max())
        except Exception as error:  # whatever a model of another kind may raise
            hint = "" if self._model.dtype == torch.float32 else "; try dtype='float32'"
            raise UnsupportedModelError(
                f"model: {type(self._model).__name__} cannot run on slots alone "
                f"({type(error).__name__}: {error}){hint}"
            ) from error
        # Rounding; in bfloat16 the whole model rounds its head, too.
        if not difference < (1e-3 if self._model.dtype == torch.float32 else 1.0):
            raise UnsupportedModelError(
                f"model: expected the logits of the slots to equal those of the whole model, got "
                f"a largest difference of {difference:.3g}"
            )
