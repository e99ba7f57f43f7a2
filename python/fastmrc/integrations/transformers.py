"""The question-answering pipeline that transformers had up to 5.2, on the native engine.

Code written for it changes one import::

    from fastmrc.integrations.transformers import pipeline  # was: from transformers import pipeline

    qa = pipeline("question-answering", model="some/model")
    qa(question="Where do I live?", context="My name is Ada and I live in London.")
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from fastmrc.errors import InputError
from fastmrc.pretrained import LoadedModel, load_model
from fastmrc.readers.pipeline import answer_as_pipeline
from fastmrc.readers.span import SpanReader

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

__all__ = ["pipeline"]

_TASK: Literal["question-answering"] = "question-answering"


def pipeline(
    task: str | None = None,
    model: str | Path | PreTrainedModel | None = None,
    config: None = None,
    tokenizer: str | Path | PreTrainedTokenizerFast | None = None,
    *,
    device: int | str | torch.device | None = None,
    dtype: str | torch.dtype = "float32",
    torch_dtype: str | torch.dtype | None = None,
    framework: object = None,
    use_fast: object = None,
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
    config
        Nothing: the model's own is used.
    tokenizer
        A fast tokenizer; needed with a loaded model. With the name of a model, its own one (which
        may be named, too) if there is none.
    device
        As torch names it; a number is that GPU, -1 the CPU. A loaded model stays where it is.
    dtype
        float32 (default), float16, bfloat16 or ``"auto"``. A loaded model keeps its own.
    torch_dtype
        The older name of `dtype`.
    framework, use_fast
        Accepted and without effect.
    revision, local_files_only
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
    TypeError
        For an unknown keyword.
    UnsupportedModelError
        If the model cannot serve a span reader.
    """
    if task not in (None, _TASK):
        raise InputError(f"task: expected {_TASK!r}, got {task!r}")
    if config is not None:
        raise InputError("config: expected none, as the model's own is used")
    known = set(signature(answer_as_pipeline).parameters) - {"reader", "inputs"}
    unknown = sorted(set(defaults) - known)
    if unknown:
        raise TypeError(f"pipeline: unexpected keyword {', '.join(unknown)}")
    if model is None or isinstance(model, str | Path):
        if isinstance(tokenizer, str | Path) and str(tokenizer) == str(model):
            tokenizer = None
        loaded = load_model(
            model,
            task=_TASK,
            attention=None,
            revision=revision,
            local_files_only=local_files_only,
            dtype=dtype if torch_dtype is None else torch_dtype,
            device=_device_name(device),
        )
        if tokenizer is not None:
            loaded = replace(loaded, tokenizer=_fast(tokenizer))
    else:
        if model.training:
            raise InputError(
                "model: expected evaluation mode, got training mode; call model.eval()"
            )
        loaded = LoadedModel(model, _fast(tokenizer), "none", type(model).__name__)
    reader = SpanReader(loaded)
    return partial(reader, **defaults) if defaults else reader


def _device_name(device: int | str | torch.device | None) -> str | None:
    if isinstance(device, int):
        return "cpu" if device < 0 else f"cuda:{device}"
    return None if device is None else str(device)


def _fast(tokenizer: Any) -> PreTrainedTokenizerFast:
    if not getattr(tokenizer, "is_fast", False):
        got = tokenizer if isinstance(tokenizer, str | Path) else type(tokenizer).__name__
        raise InputError(
            f"tokenizer: expected a fast tokenizer, or none beside the name of a model, got {got}"
        )
    return cast("PreTrainedTokenizerFast", tokenizer)
