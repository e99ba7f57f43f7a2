"""Directories of cloze models.

``fastmrc.json`` has the key ``cloze``, an object with ``encoder`` and its settings;
``cloze.safetensors`` holds the weights. A ``bilstm`` has its words in ``words.txt``, one a line. A
``transformer`` is a directory that transformers reads, to which ``cloze.safetensors`` adds the
pointer; with ``"body": "packaged"`` the body is that of fastmrc's own reader, and
``cloze.safetensors`` holds what is to be changed in it: a weight ``name``, or, for a matrix, two
factors ``name.up`` [rank, out] and ``name.down`` [rank, in] in the form of `fastmrc.int8`, of which
``up.T @ down`` is added to it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError

from fastmrc.cloze.bilstm import BiLSTMEncoder
from fastmrc.cloze.encoder import ClozeEncoder
from fastmrc.cloze.transformer import TransformerEncoder
from fastmrc.errors import InputError, UnsupportedModelError
from fastmrc.int8 import load_int8_weights, save_int8_weights
from fastmrc.model_files import write_json, write_weights
from fastmrc.pretrained import SETTINGS_FILE, load_model, packaged_model_path, quiet_transformers

if TYPE_CHECKING:
    from fastmrc.data import StrPath

__all__ = ["cloze_settings", "load_cloze_encoder", "packaged_cloze_path", "save_cloze_encoder"]

_WEIGHTS_FILE = "cloze.safetensors"
_WORDS_FILE = "words.txt"
_UP, _DOWN = ".up", ".down"
_PACKAGED_MODEL = "zh-cloze"


def packaged_cloze_path() -> Path:
    """Return the directory of the cloze model that comes with the package."""
    return packaged_model_path().parent / _PACKAGED_MODEL


def load_cloze_encoder(
    path: StrPath | None = None, *, device: torch.device | str | None = None
) -> ClozeEncoder:
    """Load an encoder in float32, ready to read.

    Parameters
    ----------
    path
        Directory; None: the packaged model.
    device
        Where it goes; the CPU by default.

    Raises
    ------
    InputError
        If there is no such directory.
    UnsupportedModelError
        If it holds no cloze model, or a damaged one.
    """
    directory = packaged_cloze_path() if path is None else Path(path).expanduser()
    if not directory.is_dir():
        raise InputError(f"path: there is no directory '{directory}'")
    settings = _read_settings(directory)
    try:
        weights = load_int8_weights(directory / _WEIGHTS_FILE)
        encoder = _made(directory, settings)
        _multiply_factors(encoder, weights)
        difference = encoder.load_state_dict(weights, strict=False)
        unknown = difference.unexpected_keys
        needed = [name for name in difference.missing_keys if not name.startswith("body.")]
        if unknown or needed:
            raise UnsupportedModelError(
                f"{directory}: {_WEIGHTS_FILE}: expected the weights of a {encoder.kind}, got "
                f"none for {needed[:3]} and unknown ones {unknown[:3]}"
            )
    except UnsupportedModelError:
        raise
    except (OSError, SafetensorError, RuntimeError, KeyError, TypeError, ValueError) as error:
        raise UnsupportedModelError(f"{directory}: cannot load the cloze model ({error})") from None
    return encoder.eval().requires_grad_(False).to(device or "cpu")


def cloze_settings(directory: Path) -> Any:
    """Return what a directory says of a cloze model; None if it says nothing."""
    try:
        values = json.loads((directory / SETTINGS_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UnsupportedModelError(f"{directory}: cannot read {SETTINGS_FILE} ({error})") from None
    return values.get("cloze") if isinstance(values, dict) else None


def _read_settings(directory: Path) -> dict[str, Any]:
    settings = cloze_settings(directory)
    if not isinstance(settings, dict) or settings.get("encoder") not in ("bilstm", "transformer"):
        raise UnsupportedModelError(
            f'{directory}: expected "cloze" with the encoder bilstm or transformer in '
            f"{SETTINGS_FILE}; `fastmrc train --task cloze` makes such a directory"
        )
    return settings


def _made(directory: Path, settings: Mapping[str, Any]) -> ClozeEncoder:
    if settings["encoder"] == "transformer":
        packaged = settings.get("body") == "packaged"
        if packaged and settings.get("body_digest") != _packaged_digest():
            raise UnsupportedModelError(
                f"{directory}: made for another version of the packaged reader; train it again"
            )
        loaded = load_model(None if packaged else directory, head=False)
        return TransformerEncoder(loaded, settings["max_tokens"], layers=settings["layers"])
    words = (directory / _WORDS_FILE).read_text(encoding="utf-8").split("\n")[:-1]
    return BiLSTMEncoder(
        words,
        settings["dimension"],
        hidden=settings["hidden"],
        depth=settings["depth"],
        match=settings["match"],
    )


def _packaged_digest() -> str:
    """Return what tells the weights of the packaged reader from others."""
    with open(packaged_model_path() / "model.safetensors", "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def _multiply_factors(encoder: ClozeEncoder, weights: dict[str, torch.Tensor]) -> None:
    """Replace pairs of factors by the weights that they change."""
    own = encoder.state_dict()
    for up in [name for name in weights if name.endswith(_UP)]:
        name = up.removesuffix(_UP)
        product = weights.pop(up).T @ weights.pop(name + _DOWN)
        weights[name] = own[name] + product


def save_cloze_encoder(
    encoder: ClozeEncoder, directory: Path, *, layers: int | None = None, rank: int | None = None
) -> None:
    """Write an encoder into an existing directory.

    Parameters
    ----------
    encoder
        To be written.
    directory
        Where its files go; ``fastmrc.json`` is written anew.
    layers
        For a transformer made of the packaged reader: only so many upper layers have changed and
        are written; None: the whole body is.
    rank
        With `layers`: of the changes of matrices only the nearest of this rank are written (Eckart
        and Young 1936), in int8, and vectors in float16; None: all as they are.
    """
    settings = encoder.settings()
    weights = {name: tensor.detach().cpu() for name, tensor in encoder.state_dict().items()}
    if isinstance(encoder, BiLSTMEncoder):
        text = "".join(f"{word}\n" for word in encoder.vocabulary)
        (directory / _WORDS_FILE).write_text(text, encoding="utf-8")
        write_weights(directory / _WEIGHTS_FILE, weights)
    elif isinstance(encoder, TransformerEncoder) and layers is not None:
        upper = encoder.upper_layers(layers)
        kept = {name: w for name, w in weights.items() if name.startswith(("pointer.", *upper))}
        if rank is None:
            write_weights(directory / _WEIGHTS_FILE, kept)
        else:
            save_int8_weights(_factored(kept, rank), directory / _WEIGHTS_FILE)
        settings |= {"body": "packaged", "body_digest": _packaged_digest()}
    elif isinstance(encoder, TransformerEncoder):
        pointer = {name: w for name, w in weights.items() if name.startswith("pointer.")}
        with quiet_transformers():
            encoder.body.save_pretrained(directory)
            encoder.tokenizer.save_pretrained(directory)
        write_weights(directory / _WEIGHTS_FILE, pointer)
    write_json(directory / SETTINGS_FILE, {"cloze": settings})


def _factored(weights: Mapping[str, torch.Tensor], rank: int) -> dict[str, torch.Tensor]:
    """Return factors of the changes of matrices of the packaged body, vectors in float16 and other
    matrices as they are."""
    base = load_model().model.base_model.state_dict()
    out: dict[str, torch.Tensor] = {}
    for name, weight in weights.items():
        before = base.get(name.removeprefix("body."))
        if before is None or weight.ndim != 2:
            out[name] = weight if weight.ndim == 2 else weight.half()
            continue
        u, s, v = torch.linalg.svd(weight.float() - before, full_matrices=False)
        out[name + _UP] = s[:rank, None] * u[:, :rank].T
        out[name + _DOWN] = v[:rank]
    return out
