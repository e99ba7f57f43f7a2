"""The question-answering pipeline that transformers had up to 5.2, on the native engine.

Code written for it changes one import::

    from fastmrc.integrations.transformers import pipeline  # was: from transformers import pipeline

    qa = pipeline("question-answering", model="some/model")
    qa(question="Where do I live?", context="My name is Ada and I live in London.")
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from fastmrc.errors import InputError
from fastmrc.pretrained import LoadedModel
from fastmrc.readers.span import SpanReader

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

__all__ = ["pipeline"]

_TASK = "question-answering"


def pipeline(
    task: str | None = None,
    model: str | PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerFast | None = None,
    *,
    device: int | str | torch.device | None = None,
    dtype: str = "float32",
    revision: str | None = None,
    local_files_only: bool = False,
    **defaults: Any,
) -> SpanReader | Callable[..., Any]:
    """Return a span reader that is called as the question-answering pipeline was.

    Parameters
    ----------
    task
        ``"question-answering"``, or nothing.
    model
        Directory, hub id or a loaded ``...ForQuestionAnswering``.
    tokenizer
        Fast tokenizer; needed with a loaded model, refused otherwise.
    device
        As torch names it; a number is that GPU, -1 the CPU. A loaded model stays where it is.
    dtype, revision, local_files_only
        As for `fastmrc.SpanReader.from_pretrained`.
    **defaults
        Keywords of every call, such as ``top_k``; see `fastmrc.SpanReader.__call__`.

    Returns
    -------
    fastmrc.SpanReader
        Or, with `defaults`, a function that calls it with them.

    Raises
    ------
    InputError
        If an argument is wrong.
    UnsupportedModelError
        If the model cannot serve a span reader.
    """
    if task not in (None, _TASK):
        raise InputError(f"task: expected {_TASK!r}, got {task!r}")
    if model is None or isinstance(model, str):
        if tokenizer is not None:
            raise InputError("tokenizer: expected none beside a model that is loaded by its name")
        reader = SpanReader.from_pretrained(
            model,
            device=_device_name(device),
            dtype=dtype,
            revision=revision,
            local_files_only=local_files_only,
        )
    else:
        reader = SpanReader(_loaded(model, tokenizer))
    return partial(reader, **defaults) if defaults else reader


def _device_name(device: int | str | torch.device | None) -> str | None:
    if isinstance(device, int):
        return "cpu" if device < 0 else f"cuda:{device}"
    return None if device is None else str(device)


def _loaded(model: PreTrainedModel, tokenizer: Any) -> LoadedModel:
    if tokenizer is None or not getattr(tokenizer, "is_fast", False):
        raise InputError(
            f"tokenizer: expected the fast tokenizer of the loaded model, "
            f"got {type(tokenizer).__name__}"
        )
    if model.training:
        raise InputError("model: expected evaluation mode, got training mode; call model.eval()")
    return LoadedModel(model, tokenizer, "none", type(model).__name__)
