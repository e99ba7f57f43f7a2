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

__all__ = ["REGISTERED_TASK", "pipeline", "register_pipeline"]

_TASK: Literal["question-answering"] = "question-answering"

REGISTERED_TASK = "extractive-question-answering"
"""Name of the task in transformers' registry, after `register_pipeline`."""


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
    register: bool = False,
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
    register
        Whether ``transformers.pipeline`` is to make such readers, too: see `register_pipeline`.
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
    if register:
        register_pipeline()
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


def register_pipeline() -> tuple[str, ...]:
    """Let ``transformers.pipeline`` make span readers.

    Afterwards ``transformers.pipeline("extractive-question-answering", model=...)`` returns one.
    ``transformers.pipeline("question-answering", ...)`` does, too, where transformers asks its
    registry for that name; 5.23 refuses before.

    Returns
    -------
    tuple of str
        The names of tasks that now give span readers.
    """
    from transformers import AutoModelForQuestionAnswering
    from transformers.pipelines import PIPELINE_REGISTRY, check_task

    names = []
    for name in (REGISTERED_TASK, _TASK):
        PIPELINE_REGISTRY.register_pipeline(
            name, pipeline_class=_RegisteredPipeline, pt_model=AutoModelForQuestionAnswering
        )
        try:
            check_task(name)
        except KeyError:
            del PIPELINE_REGISTRY.supported_tasks[name]
        else:
            names.append(name)
    return tuple(names)


class _RegisteredPipeline:
    """What transformers' registry takes for a pipeline class; calling it gives a span reader."""

    # What transformers is to load beside the model.
    _load_tokenizer = True
    _load_image_processor = False
    _load_video_processor = False
    _load_feature_extractor = False
    _load_processor = False

    def __new__(  # type: ignore[misc]
        cls,
        model: PreTrainedModel,
        tokenizer: Any = None,
        task: str | None = None,
        device: int | str | torch.device | None = None,
        **options: Any,
    ) -> SpanReader | Callable[..., Any]:
        if device is not None:
            cast("torch.nn.Module", model).to(_device_name(device))
        for name in ("dtype", "framework", "torch_dtype"):  # the model is loaded already
            options.pop(name, None)
        cast("torch.nn.Module", model).eval()
        return pipeline(_TASK, model=model, tokenizer=tokenizer, **options)


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
