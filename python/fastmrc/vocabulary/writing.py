"""The files of the smaller model: weights, configuration, tokenizer."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastmrc.int8 import SCALE_SUFFIX
from fastmrc.model_files import copy_config, copy_tokenizer, write_json, write_weights
from fastmrc.pretrained import SETTINGS_FILE, LoadedModel, weight_files
from fastmrc.vocabulary.selection import Selection, configured_ids
from fastmrc.vocabulary.wordpieces import WordPieces

if TYPE_CHECKING:
    import torch

__all__ = ["write_model"]


def write_model(
    full: LoadedModel, pieces: WordPieces, selection: Selection, directory: Path
) -> None:
    """Write all files of the smaller model.

    Parameters
    ----------
    full
        Model to take them from.
    pieces
        Its tokenizer.
    selection
        Rows that stay.
    directory
        An empty directory.

    Raises
    ------
    OSError
        If a file cannot be read or written.
    """
    source = Path(full.source)
    _write_weights(full, selection, directory)
    copy_config(source, directory, _config_changes(full, selection))
    copy_tokenizer(source, directory)
    _write_tokenizer(source, pieces, selection, directory)
    for path in source.iterdir():
        if path.is_file() and (path.name == SETTINGS_FILE or path.name.startswith("LICENSE")):
            shutil.copyfile(path, directory / path.name)


def _write_weights(full: LoadedModel, selection: Selection, directory: Path) -> None:
    import torch
    from safetensors import safe_open

    names = _vocabulary_weights(full.model)
    kept = torch.tensor(selection.kept)
    tensors: dict[str, torch.Tensor] = {}
    source = Path(full.source)
    for weights in weight_files(source, full.source):
        with safe_open(source / weights, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - no mapping
                tensor = file.get_tensor(name)
                has_tokens = name in names or name.removesuffix(SCALE_SUFFIX) in names
                tensors[name] = tensor[kept] if has_tokens else tensor
    write_weights(directory / "model.safetensors", tensors)


def _vocabulary_weights(model: Any) -> set[str]:
    """Return the names of the weights with a row for each token, those of tied ones included."""
    head = model.get_output_embeddings()
    parts = (model.get_input_embeddings().weight, head.weight, getattr(head, "bias", None))
    storages = {part.data_ptr() for part in parts if part is not None}
    # Where nothing is tied, some heads have a bias of their own that is loaded but not used.
    place = next(name for name, layer in model.named_modules() if layer is head)
    around = place.rpartition(".")[0] + ".bias"
    return {
        name
        for name, weight in model.named_parameters(remove_duplicate=False)
        if weight.data_ptr() in storages or (name == around and len(weight) == len(head.weight))
    }


def _config_changes(full: LoadedModel, selection: Selection) -> dict[str, object]:
    changes: dict[str, object] = {"vocab_size": len(selection.kept)}
    config = full.model.config.to_dict()
    for key, ids in configured_ids(full).items():
        new = [selection.new_ids.get(token_id, token_id) for token_id in ids]
        if new != ids:
            changes[key] = new if isinstance(config[key], list) else new[0]
    return changes


def _write_tokenizer(
    source: Path, pieces: WordPieces, selection: Selection, directory: Path
) -> None:
    def new_id(token: str) -> int | None:
        return selection.new_ids.get(pieces.vocabulary.get(token, -1))

    def renumber(entry: dict[str, Any], token: str, key: str) -> None:
        number = new_id(token)
        if number is not None:
            entry[key] = number

    path = source / "tokenizer.json"
    parts = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else pieces.parts
    kept = {token: new for token in parts["model"]["vocab"] if (new := new_id(token)) is not None}
    parts["model"]["vocab"] = dict(sorted(kept.items(), key=lambda item: item[1]))
    for entry in parts.get("added_tokens") or ():
        renumber(entry, entry["content"], "id")
    parts["added_tokens"] = sorted(parts.get("added_tokens") or (), key=lambda e: int(e["id"]))
    if parts.get("padding"):
        renumber(parts["padding"], parts["padding"]["pad_token"], "pad_id")
    _renumber_processor(parts.get("post_processor"), new_id)
    write_json(directory / "tokenizer.json", parts)
    if (source / "vocab.txt").is_file():
        lines = "".join(f"{token}\n" for token in parts["model"]["vocab"])
        (directory / "vocab.txt").write_text(lines, encoding="utf-8")
    _renumber_added_tokens(directory / "tokenizer_config.json", selection)


def _renumber_processor(processor: Any, new_id: Callable[[str], int | None]) -> None:
    if processor is None:
        return
    for part in processor.get("processors", ()):
        _renumber_processor(part, new_id)
    for special in (processor.get("special_tokens") or {}).values():
        special["ids"] = [new_id(token) for token in special["tokens"]]
    for role in ("cls", "sep"):
        if role in processor:
            processor[role][1] = new_id(processor[role][0])


def _renumber_added_tokens(path: Path, selection: Selection) -> None:
    settings = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if "added_tokens_decoder" in settings:
        entries = settings["added_tokens_decoder"].items()
        settings["added_tokens_decoder"] = {
            str(selection.new_ids[int(old)]): entry
            for old, entry in entries
            if int(old) in selection.new_ids
        }
        write_json(path, settings)
