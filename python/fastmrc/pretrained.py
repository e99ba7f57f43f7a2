"""Load a model with its tokenizer: the packaged one, a directory or a hub id.

Weights come from safetensors only, so that loading a model never runs code from its files.
"""

from __future__ import annotations

import json
import re
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

from fastmrc.errors import InputError, UnsupportedModelError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

__all__ = [
    "INT8_FORMAT",
    "SETTINGS_FILE",
    "LoadedModel",
    "Method",
    "Normalization",
    "Pooling",
    "Task",
    "first_position",
    "load_base",
    "load_model",
    "load_pooler",
    "max_positions",
    "multiplies_bfloat16",
    "packaged_model_path",
    "quiet_transformers",
    "resolve_device",
    "weight_files",
]

Normalization = Literal["none", "original"]
Pooling = Literal["linear", "mean", "cls"]
"""How a text's vector is made of its last hidden states: [CLS] through the linear layer of the
pooler, their mean, or [CLS]."""
Task = Literal["masked-LM", "question-answering"]
Method = Literal["seq2seq", "mlm", "span"]
"""Kind of reader."""

INT8_FORMAT = "int8-per-row"
SETTINGS_FILE = "fastmrc.json"

_PACKAGED_MODEL = "zh-reader"
_WEIGHTS_FILE = "model.safetensors"
_SHARDS_FILE = "model.safetensors.index.json"
_PICKLE_PATTERNS = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_HUB_PATTERNS = ["*.json", "*.txt", "*.model", "model*.safetensors"]
_HUB_ID = re.compile(r"(\w[\w.-]*/)?\w[\w.-]*")
_DTYPES = ("float32", "float16", "bfloat16", "auto")
# Models whose positions start after the index of the padding token.
_POSITIONS_AFTER_PADDING = (
    "camembert",
    "data2vec-text",
    "esm",
    "ibert",
    "lilt",
    "longformer",
    "luke",
    "mpnet",
    "roberta",
    "roberta-prelayernorm",
    "xlm-roberta",
    "xlm-roberta-xl",
    "xmod",
)

# Verbosity and progress bars of transformers are global to the process.
_quiet_lock = threading.RLock()


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model that is ready to run.

    Attributes
    ----------
    model
        ``...ForMaskedLM`` or ``...ForQuestionAnswering`` of transformers in evaluation mode.
    tokenizer
        Its fast tokenizer, with a [CLS] and a [SEP] token.
    normalization
        What is done to the characters of a passage before tokenising: ``"none"``, or
        ``"original"`` (space and 、；， become a comma).
    source
        The directory or hub id that was asked for; the directory of the packaged model if none was.
    directory
        Where its files are.
    reading
        For each kind of reader (``"seq2seq"``, ``"mlm"``, ``"span"``) the options that hold where a
        call gives none.
    pooling
        How the model makes one vector of a text; None if it does not say.
    missing
        Weights of the head that the checkpoint lacks; always none where a head is required.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    normalization: Normalization
    source: str
    directory: Path = field(default_factory=Path)
    reading: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    pooling: Pooling | None = None
    missing: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _Settings:
    """What ``fastmrc.json`` beside a model says."""

    int8: bool = False
    normalization: Normalization = "none"
    reading: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    pooling: Pooling | None = None


def packaged_model_path() -> Path:
    """Return the directory of the model that comes with the package."""
    return Path(__file__).resolve().parent / "models" / _PACKAGED_MODEL


def load_model(
    path_or_id: str | Path | None = None,
    *,
    task: Task = "masked-LM",
    head: bool = True,
    attention: str | None = "sdpa",
    revision: str | None = None,
    local_files_only: bool = False,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
) -> LoadedModel:
    """Load a model and its tokenizer.

    Parameters
    ----------
    path_or_id
        A directory, the id of a model on the hub, or nothing for the packaged model (a masked
        language model).
    task
        Which head the model must have.
    head
        Whether a model without a trained head is refused; if not, it is told by `missing`.
    attention
        Attention implementation of transformers; None: the model's own choice.
    revision
        Branch, tag or commit of a hub model; a directory has none.
    local_files_only
        Whether to use only what the hub's cache on this machine holds.
    dtype
        float32 (the default), float16 or bfloat16, as a torch dtype or its name; ``"auto"``:
        bfloat16 where the hardware multiplies it natively.
    device
        Where the model goes; the CPU by default.

    Returns
    -------
    LoadedModel

    Raises
    ------
    InputError
        If there is no such directory or hub model, or `dtype` or `device` cannot be used.
    UnsupportedModelError
        If the model has no trained head for the task, comes as pickle only, is damaged, or has
        no fast tokenizer that fits it.

    Notes
    -----
    A directory may hold a file ``fastmrc.json`` with the keys ``format`` (``"int8-per-row"``, see
    `fastmrc.int8`; without it the weights are read as transformers wrote them), ``normalization``
    (``"none"``, the default, or ``"original"``) and ``reading`` (for each kind of reader an object
    of its options, as in ``{"mlm": {"no_answer_ratio": 2.0}}``) and ``pooling`` (``"mean"``,
    ``"cls"`` or ``"linear"``).
    """
    import torch

    torch_device = resolve_device(device)
    torch_dtype = _resolve_dtype(dtype, torch_device)
    if task not in get_args(Task):
        raise InputError(f"task: expected one of {', '.join(get_args(Task))}, got {task!r}")
    if path_or_id is None and task != "masked-LM":
        raise InputError(
            f"path_or_id: expected a directory or hub id, as no {task} model comes with fastmrc"
        )
    directory = _resolve_directory(path_or_id, revision, local_files_only)
    source = str(directory if path_or_id is None else path_or_id)
    arguments: dict[str, Any] = {"dtype": torch_dtype}
    if attention is not None:
        arguments["attn_implementation"] = attention
    loaded, report = _load_directory(directory, source, task, arguments)
    if head:
        _refuse_missing(report, task, source)
    _refuse_missing_body(loaded)
    torch.nn.Module.to(loaded.model, torch_device)
    return loaded


def load_base(
    path_or_id: str | Path, *, task: Task = "masked-LM", device: torch.device | str | None = None
) -> LoadedModel:
    """Load a model to be trained, in float32 with eager attention, which returns its weights.

    Parameters
    ----------
    path_or_id
        A directory or hub id.
    task
        The head that the model gets.
    device
        Where the model goes; the CPU by default.

    Returns
    -------
    LoadedModel
        Weights that the checkpoint lacks, `missing`, begin at random: those of a head that was
        never trained.

    Raises
    ------
    InputError
        As `load_model`.
    UnsupportedModelError
        As `load_model`, but for a missing head.
    """
    import torch

    torch_device = resolve_device(device)
    directory = _resolve_directory(path_or_id, None, False)
    arguments: dict[str, Any] = {"dtype": torch.float32, "attn_implementation": "eager"}
    loaded, _ = _load_directory(directory, str(path_or_id), task, arguments)
    _refuse_missing_body(loaded)
    torch.nn.Module.to(loaded.model, torch_device)
    return loaded


def load_pooler(loaded: LoadedModel) -> torch.nn.Linear | None:
    """Return the linear layer of a model's pooler, which its masked-LM class leaves out; None if
    the checkpoint holds none."""
    import torch
    from safetensors import safe_open

    from fastmrc.int8 import SCALE_SUFFIX, dequantize_rows

    found: dict[str, torch.Tensor] = {}
    for name in weight_files(loaded.directory, loaded.source):
        with safe_open(loaded.directory / name, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 (a file is no mapping)
                kind = key.rpartition("pooler.dense.")[2]
                if "pooler.dense." not in key or kind not in ("weight", "bias"):
                    continue
                tensor = file.get_tensor(key)
                if tensor.dtype == torch.int8:
                    tensor = dequantize_rows(tensor, file.get_tensor(key + SCALE_SUFFIX))
                found[kind] = tensor.float()
    if set(found) != {"weight", "bias"}:
        return None
    rows, columns = found["weight"].shape
    layer = torch.nn.Linear(columns, rows)
    layer.load_state_dict(found)
    return layer.requires_grad_(False).to(loaded.model.device)


def _load_directory(
    directory: Path, source: str, task: Task, arguments: dict[str, Any]
) -> tuple[LoadedModel, dict[str, Any]]:
    """Return the model and what transformers says about its weights."""
    settings = _read_settings(directory, source)
    with quiet_transformers():
        config = _load_config(directory, source)
        model_class = _model_class(config, task, source)
        _check_weight_files(directory, source)
        tokenizer = _load_tokenizer(directory, source)
        _check_vocabulary(tokenizer, config, task, source)
        model, report = _load_weights(
            model_class, directory, config, settings.int8, source, **arguments
        )
    _refuse_mismatched(report, source)
    loaded = LoadedModel(
        model,
        tokenizer,
        settings.normalization,
        source,
        directory,
        settings.reading,
        settings.pooling,
        tuple(sorted(report["missing_keys"])),
    )
    return loaded, report


def max_positions(config: PreTrainedConfig) -> int | None:
    """Return how many tokens a model can take; None if its positions have no table."""
    positions = getattr(config, "max_position_embeddings", None)
    if not positions or positions < 0:
        return None
    after_padding = config.model_type in _POSITIONS_AFTER_PADDING
    return int(positions) - (config.pad_token_id + 1 if after_padding else 0)


def first_position(config: PreTrainedConfig) -> int:
    """Return the index of the first token's position: 0, or what padding leaves (RoBERTa)."""
    positions = max_positions(config)
    return 0 if positions is None else int(config.max_position_embeddings) - positions


def _resolve_dtype(dtype: torch.dtype | str | None, device: torch.device) -> torch.dtype:
    import torch

    name = "float32" if dtype is None else str(dtype).removeprefix("torch.")
    if name not in _DTYPES:
        raise InputError(f"dtype: expected one of {', '.join(_DTYPES)}, got {dtype!r}")
    if name == "auto":
        name = "bfloat16" if multiplies_bfloat16(device) else "float32"
    resolved: torch.dtype = getattr(torch, name)
    return resolved


def multiplies_bfloat16(device: torch.device) -> bool:
    """Return whether a device multiplies bfloat16 natively."""
    import torch

    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported())
    return bool(_cpu_flags() & {"avx512_bf16", "amx_bf16", "bf16"})


def _cpu_flags() -> set[str]:
    try:
        with open("/proc/cpuinfo", encoding="ascii", errors="replace") as file:
            for line in file:
                if line.startswith(("flags", "Features")):
                    return set(line.split(":", 1)[1].split())
    except OSError:
        pass
    return set()


def resolve_device(device: torch.device | str | None) -> torch.device:
    """Return a device; InputError if torch cannot use it here."""
    import torch

    try:
        resolved = torch.device("cpu" if device is None else device)
        torch.empty(0, device=resolved)
    except (RuntimeError, AssertionError, NotImplementedError):
        # torch raises AssertionError where it was built without the device's backend.
        raise InputError(
            f"device: expected a device that torch can use here, got {str(device)!r}"
        ) from None
    return resolved


def _resolve_directory(
    path_or_id: str | Path | None, revision: str | None, local_files_only: bool
) -> Path:
    if path_or_id is None:
        return packaged_model_path()
    if not isinstance(path_or_id, str | Path):
        raise InputError(
            f"path_or_id: expected a path or a hub id, got {type(path_or_id).__name__}"
        )
    path = Path(path_or_id).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise InputError(f"path_or_id: expected a directory, got the file '{path_or_id}'")
    if isinstance(path_or_id, Path) or not _HUB_ID.fullmatch(path_or_id):
        raise InputError(f"path_or_id: there is no directory '{path_or_id}'")
    return _download(path_or_id, revision, local_files_only)


def _download(hub_id: str, revision: str | None, local_files_only: bool) -> Path:
    from huggingface_hub import snapshot_download

    # Progress belongs on a terminal only.
    bars = nullcontext() if sys.stderr.isatty() else quiet_transformers()
    try:
        with bars:
            directory = snapshot_download(
                hub_id,
                revision=revision,
                local_files_only=local_files_only,
                allow_patterns=_HUB_PATTERNS,
                ignore_patterns=["*/*"],
            )
    except (OSError, ValueError) as error:
        at = "" if revision is None else f" at revision '{revision}'"
        where = "the hub's cache on this machine" if local_files_only else "the hub or its cache"
        raise InputError(
            f"path_or_id: '{hub_id}' is no directory, and {where} gives no model of that name{at} "
            f"({type(error).__name__})"
        ) from error
    return Path(directory)


def _read_settings(directory: Path, source: str) -> _Settings:
    path = directory / SETTINGS_FILE
    if not path.is_file():
        return _Settings()
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UnsupportedModelError(f"{source}: cannot read {SETTINGS_FILE} ({error})") from None
    if not isinstance(values, dict):
        raise UnsupportedModelError(f"{source}: {SETTINGS_FILE} is not a JSON object")
    model_format = values.get("format")
    if model_format not in (None, INT8_FORMAT):
        raise UnsupportedModelError(
            f"{source}: {SETTINGS_FILE}: format: expected '{INT8_FORMAT}' or none, "
            f"got {model_format!r}"
        )
    normalization = values.get("normalization", "none")
    if normalization not in get_args(Normalization):
        raise UnsupportedModelError(
            f"{source}: {SETTINGS_FILE}: normalization: expected one of "
            f"{', '.join(get_args(Normalization))}, got {normalization!r}"
        )
    reading = values.get("reading", {})
    if not isinstance(reading, dict) or not all(isinstance(v, dict) for v in reading.values()):
        raise UnsupportedModelError(
            f"{source}: {SETTINGS_FILE}: reading: expected an object of options for each kind of "
            f"reader, got {json.dumps(reading, ensure_ascii=False):.60}"
        )
    if not reading.keys() <= set(get_args(Method)):
        raise UnsupportedModelError(
            f"{source}: {SETTINGS_FILE}: reading: expected {', '.join(get_args(Method))}, "
            f"got {', '.join(reading)}"
        )
    pooling = values.get("pooling")
    if pooling is not None and pooling not in get_args(Pooling):
        raise UnsupportedModelError(
            f"{source}: {SETTINGS_FILE}: pooling: expected one of {', '.join(get_args(Pooling))}, "
            f"got {json.dumps(pooling, ensure_ascii=False):.60}"
        )
    return _Settings(model_format is not None, normalization, reading, pooling)


def _load_config(directory: Path, source: str) -> PreTrainedConfig:
    from transformers import AutoConfig

    if not (directory / "config.json").is_file():
        raise UnsupportedModelError(f"{source}: there is no config.json, so this is not a model")
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(
            directory, local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UnsupportedModelError(
            f"{source}: transformers does not know the model of config.json ({_first_line(error)})"
        ) from error
    return config


def _model_class(config: PreTrainedConfig, task: Task, source: str) -> type[PreTrainedModel]:
    import transformers

    mapping: Any = {
        "masked-LM": transformers.MODEL_FOR_MASKED_LM_MAPPING,
        "question-answering": transformers.MODEL_FOR_QUESTION_ANSWERING_MAPPING,
    }[task]
    if type(config) not in mapping:
        raise UnsupportedModelError(
            f"{source}: model type '{config.model_type}' has no {task} head in transformers"
        )
    return cast("type[PreTrainedModel]", mapping[type(config)])


def _check_weight_files(directory: Path, source: str) -> None:
    """Open every safetensors file, which compares its header with its length."""
    from safetensors import SafetensorError, safe_open

    for name in weight_files(directory, source):
        path = directory / name
        if not path.is_file():
            raise UnsupportedModelError(f"{source}: {name} is named in {_SHARDS_FILE} but missing")
        try:
            with safe_open(path, framework="numpy"):
                pass
        except (SafetensorError, OSError) as error:
            raise UnsupportedModelError(
                f"{source}: {name} is damaged or not complete ({_first_line(error)})"
            ) from error


def weight_files(directory: Path, source: str) -> list[str]:
    """Return the names of a model's files of weights, one or several shards.

    Raises
    ------
    UnsupportedModelError
        If there are none in safetensors; the message begins with `source`.
    """
    if (directory / _WEIGHTS_FILE).is_file():
        return [_WEIGHTS_FILE]
    if (directory / _SHARDS_FILE).is_file():
        try:
            index = json.loads((directory / _SHARDS_FILE).read_text(encoding="utf-8"))
            return sorted(set(index["weight_map"].values()))
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            raise UnsupportedModelError(f"{source}: cannot read {_SHARDS_FILE}") from None
    pickles = sorted(p.name for pattern in _PICKLE_PATTERNS for p in directory.glob(pattern))
    if pickles:
        raise UnsupportedModelError(
            f"{source}: expected weights in safetensors, got only pickle files "
            f"({', '.join(pickles)}), which are never loaded"
        )
    raise UnsupportedModelError(f"{source}: expected weights in {_WEIGHTS_FILE}, got no such file")


def _load_tokenizer(directory: Path, source: str) -> PreTrainedTokenizerFast:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            directory, use_fast=True, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # the tokenizers library raises bare Exception for a bad file
        raise UnsupportedModelError(
            f"{source}: the tokenizer is missing or cannot be read ({_first_line(error)})"
        ) from error
    if not tokenizer.is_fast:
        raise UnsupportedModelError(
            f"{source}: expected a fast tokenizer (tokenizer.json), got "
            f"{type(tokenizer).__name__}, which gives no character offsets"
        )
    fast = cast("PreTrainedTokenizerFast", tokenizer)
    # Without its files transformers makes a tokenizer of special tokens only, without a word.
    if set(fast.get_vocab()) <= set(fast.all_special_tokens):
        raise UnsupportedModelError(
            f"{source}: the tokenizer is missing (no tokenizer.json or vocabulary file)"
        )
    return fast


def _check_vocabulary(
    tokenizer: PreTrainedTokenizerFast, config: PreTrainedConfig, task: Task, source: str
) -> None:
    for role in ("cls", "sep") if task == "masked-LM" else ():
        if getattr(tokenizer, f"{role}_token_id") is None:
            raise UnsupportedModelError(f"{source}: the tokenizer names no [{role.upper()}] token")
    largest = max(tokenizer.get_vocab().values())
    size = getattr(config, "vocab_size", None)
    if size is not None and largest >= size:
        raise UnsupportedModelError(
            f"{source}: the tokenizer has ids up to {largest}, the model only {size} entries"
        )


def _load_weights(
    model_class: type[PreTrainedModel],
    directory: Path,
    config: PreTrainedConfig,
    int8: bool,
    source: str,
    **arguments: Any,
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Return the model and what transformers says about its weights."""
    arguments["pretrained_model_name_or_path"] = directory
    if int8:
        from fastmrc.int8 import load_int8_weights

        weights = load_int8_weights(directory / _WEIGHTS_FILE)
        arguments |= {"pretrained_model_name_or_path": None, "state_dict": weights}
    load: Any = model_class.from_pretrained
    try:
        model, report = load(
            **arguments,
            config=config,
            use_safetensors=True,
            local_files_only=True,
            # Both faults are reported and refused later instead of a warning or a long message.
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise UnsupportedModelError(
            f"{source}: transformers cannot load the model ({_first_line(error)})"
        ) from error
    return model, report


def _refuse_missing(report: dict[str, Any], task: Task, source: str) -> None:
    """Refuse a model in which transformers filled in random weights."""
    missing = sorted(report["missing_keys"])
    if missing:
        raise UnsupportedModelError(
            f"{source}: the checkpoint holds no trained {task} model: {len(missing)} weights "
            f"are missing, such as {missing[0]}"
        )


def _refuse_missing_body(loaded: LoadedModel) -> None:
    body = f"{loaded.model.base_model_prefix}."
    of_body = [name for name in loaded.missing if name.startswith(body)]
    if of_body:
        raise UnsupportedModelError(
            f"{loaded.source}: expected a trained encoder, but {len(of_body)} of its weights are "
            f"missing, such as {of_body[0]}"
        )


def _refuse_mismatched(report: dict[str, Any], source: str) -> None:
    mismatched = sorted(str(entry[0]) for entry in report["mismatched_keys"])
    if mismatched:
        raise UnsupportedModelError(
            f"{source}: the shape of {mismatched[0]} does not fit config.json"
        )


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence the progress bars and warnings of transformers, and restore them after."""
    from transformers.utils import logging

    control: Any = logging
    with _quiet_lock:
        verbosity = control.get_verbosity()
        bars = control.is_progress_bar_enabled()
        control.set_verbosity_error()
        control.disable_progress_bar()
        try:
            yield
        finally:
            control.set_verbosity(verbosity)
            if bars:
                control.enable_progress_bar()


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
