"""BERT checkpoints in other layouts, as directories that transformers and fastmrc load.

Two layouts: that of the original TensorFlow BERT (``bert/encoder/layer_0/...``), in which SimBERT
and other models for bert4keras are published, and the names that bert4torch gives its layers
(``encoderLayer.0...``). transformers 5 reads neither.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastmrc.errors import InputError
from fastmrc.integrations.tf_checkpoint import TensorBundle, bundle_prefix
from fastmrc.model_files import new_directory, write_weights

if TYPE_CHECKING:
    import torch

    from fastmrc.data import StrPath

__all__ = ["convert_checkpoint"]

# Kept as transformers names them; the output layer is tied to the embeddings.
_BIAS = "cls.predictions.bias"
# Not weights: what an optimiser kept, and counters.
_NOT_WEIGHTS = re.compile(
    r"(adam_[mv]|AdamWeightDecay.*|global_step|_CHECKPOINTABLE.*|save_counter.*)"
)

_TF_PARTS = (
    (r"^layer_(\d+)$", r"layer.\1"),
    (r"^(kernel|gamma|output_weights)$", "weight"),
    (r"^(beta|output_bias)$", "bias"),
)
# Of bert4torch, the first that matches.
_BLOCK = r"^encoderLayer\.(\d+)\."
_BERT4TORCH = (
    (r"^embeddings\.segment_embeddings\.", "bert.embeddings.token_type_embeddings."),
    (r"^embeddings\.layerNorm\.", "bert.embeddings.LayerNorm."),
    (r"^embeddings\.", "bert.embeddings."),
    (_BLOCK + r"multiHeadAttention\.q\.", r"bert.encoder.layer.\1.attention.self.query."),
    (_BLOCK + r"multiHeadAttention\.k\.", r"bert.encoder.layer.\1.attention.self.key."),
    (_BLOCK + r"multiHeadAttention\.v\.", r"bert.encoder.layer.\1.attention.self.value."),
    (_BLOCK + r"multiHeadAttention\.o\.", r"bert.encoder.layer.\1.attention.output.dense."),
    (_BLOCK + r"attnLayerNorm\.", r"bert.encoder.layer.\1.attention.output.LayerNorm."),
    (_BLOCK + r"feedForward\.intermediateDense\.", r"bert.encoder.layer.\1.intermediate.dense."),
    (_BLOCK + r"feedForward\.outputDense\.", r"bert.encoder.layer.\1.output.dense."),
    (_BLOCK + r"ffnLayerNorm\.", r"bert.encoder.layer.\1.output.LayerNorm."),
    (r"^pooler\.", "bert.pooler.dense."),
    (r"^mlmDense\.", "cls.predictions.transform.dense."),
    (r"^mlmLayerNorm\.", "cls.predictions.transform.LayerNorm."),
    (r"^(mlmBias$|mlmDecoder\.bias$)", _BIAS),
    (r"^nsp\.", "cls.seq_relationship."),
)


def convert_checkpoint(
    source: StrPath,
    output_dir: StrPath,
    *,
    config: StrPath | None = None,
    vocabulary: StrPath | None = None,
    lower_case: bool = True,
) -> Path:
    """Write a BERT checkpoint of another layout as a directory of transformers.

    Parameters
    ----------
    source
        Of TensorFlow: the prefix (``.../bert_model.ckpt``), its ``.index`` file or a directory with
        one checkpoint. Of bert4torch: a ``.safetensors`` file, or one of ``torch.save`` (``.pt``,
        ``.pth``, ``.bin``, read as weights only).
    output_dir
        New or empty.
    config
        The model's JSON; None: ``bert_config.json`` or ``config.json`` beside the source.
    vocabulary
        One token a line; None: ``vocab.txt`` beside the source.
    lower_case
        Whether the tokenizer lowers letters.

    Returns
    -------
    Path
        `output_dir`, for ``Seq2SeqReader``, ``MLMReader`` or ``SimilarityModel.from_pretrained``. A
        pooler is kept, whose layer makes the vectors of SimBERT.

    Raises
    ------
    InputError
        If a file is missing or damaged, tensors are missing, or have other shapes than the
        configuration says.
    """
    import torch

    path, output = Path(source), Path(output_dir)
    named, folder = _read(path)
    weights = {name: torch.from_numpy(np.array(array, order="C")) for name, array in named}
    settings = _config(config, folder)
    words = Path(vocabulary) if vocabulary is not None else folder / "vocab.txt"
    if not words.is_file():
        raise InputError(f"vocabulary: expected a file with one token a line, '{words}' is none")
    with new_directory(output) as directory:
        _check(weights, settings, str(source))
        settings.save_pretrained(directory)
        _save_tokenizer(words, directory, lower_case, settings.vocab_size)
        write_weights(directory / "model.safetensors", weights)
    return output


def _read(path: Path) -> tuple[Iterable[tuple[str, Any]], Path]:
    """Return the weights under transformers' names and the folder they come from."""
    prefix = bundle_prefix(path)
    if prefix is not None:
        return _from_tensorflow(TensorBundle(prefix)), prefix.parent
    if path.is_file():
        return _from_bert4torch(_load_torch(path), path), path.parent
    raise InputError(
        f"source: expected a TensorFlow checkpoint (prefix, .index or a directory with one) or a "
        f"file of weights, got '{path}'"
    )


def _from_tensorflow(bundle: TensorBundle) -> Iterable[tuple[str, Any]]:
    for name in bundle.names:
        parts = name.split("/")
        if any(_NOT_WEIGHTS.fullmatch(part) for part in parts):
            continue
        array = bundle.read(name)
        if parts[-1] == "kernel":
            array = array.T
        for pattern, replacement in _TF_PARTS:
            parts = [re.sub(pattern, replacement, part) for part in parts]
        if parts[-1].endswith("_embeddings"):
            parts.append("weight")
        yield ".".join(parts), array


def _load_torch(path: Path) -> dict[str, Any]:
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        if path.suffix == ".safetensors":
            return dict(load_file(path))
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, SafetensorError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise InputError(f"{path}: cannot be read as weights ({error})") from None
    except Exception as error:  # pickle.UnpicklingError: more than weights
        raise InputError(f"{path}: expected weights only ({str(error).splitlines()[0]})") from None
    if not isinstance(loaded, dict) or not all(
        isinstance(t, torch.Tensor) for t in loaded.values()
    ):
        raise InputError(f"{path}: expected a dictionary of tensors")
    return loaded


def _from_bert4torch(tensors: dict[str, torch.Tensor], path: Path) -> Iterable[tuple[str, Any]]:
    if not any(name.startswith("encoderLayer.") for name in tensors):
        raise InputError(
            f"{path}: expected the names of bert4torch (encoderLayer.0...), got "
            f"{next(iter(tensors), 'nothing')!r}; transformers' own need no conversion"
        )
    for name, tensor in tensors.items():
        if name == "mlmDecoder.weight":  # tied to the embeddings
            continue
        for pattern, replacement in _BERT4TORCH:
            renamed, count = re.subn(pattern, replacement, name)
            if count:
                yield renamed, tensor.float().numpy()
                break


def _config(given: StrPath | None, folder: Path) -> Any:
    from transformers import BertConfig

    names = (
        [Path(given)]
        if given is not None
        else [
            folder / "bert_config.json",
            folder / "config.json",
        ]
    )
    path = next((name for name in names if name.is_file()), None)
    if path is None:
        raise InputError(f"config: expected a JSON file of the model, '{names[0]}' is none")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        known = {name: values[name] for name in BertConfig().to_dict() if name in values}
        return BertConfig(**known | {"model_type": "bert", "architectures": ["BertForMaskedLM"]})
    except (ValueError, TypeError, AttributeError) as error:
        raise InputError(
            f"{path}: cannot be read as the configuration of a BERT ({error})"
        ) from None


def _check(weights: dict[str, torch.Tensor], config: Any, source: str) -> None:
    """Compare names and shapes with those of the model that the configuration describes."""
    import torch
    from transformers import BertForMaskedLM

    with torch.device("meta"):
        expected = BertForMaskedLM(config).state_dict()
    expected.pop("cls.predictions.decoder.weight", None)  # tied
    expected.pop("cls.predictions.decoder.bias", None)
    expected.pop("bert.embeddings.position_ids", None)
    missing = sorted(set(expected) - set(weights))
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise InputError(f"{source}: expected the tensor {missing[0]}{more}, which it lacks")
    for name, tensor in expected.items():
        if tuple(weights[name].shape) != tuple(tensor.shape):
            raise InputError(
                f"{source}: expected {name} of shape {list(tensor.shape)} by the configuration, "
                f"got {list(weights[name].shape)}"
            )


def _save_tokenizer(vocabulary: Path, directory: Path, lower_case: bool, size: int) -> None:
    from transformers import BertTokenizer

    tokens = vocabulary.read_text(encoding="utf-8").splitlines()
    needed = [
        token for token in ("[UNK]", "[SEP]", "[PAD]", "[CLS]", "[MASK]") if token not in tokens
    ]
    if needed or len(tokens) > size:
        what = f"lacks {needed[0]}" if needed else f"has {len(tokens)} tokens for {size} embeddings"
        raise InputError(f"vocabulary: '{vocabulary}' {what}")
    ids = {token: i for i, token in enumerate(tokens)}
    make: Callable[..., Any] = BertTokenizer
    make(vocab=ids, do_lower_case=lower_case).save_pretrained(directory)
