"""Files of a model directory: copies, and directories that appear whole or not at all."""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from fastmrc.errors import InputError

if TYPE_CHECKING:
    import torch

__all__ = [
    "check_new_directory",
    "copy_config",
    "copy_tokenizer",
    "new_directory",
    "write_json",
    "write_weights",
]

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
_VOCABULARY_FILES = ("vocab.txt", "vocab.json", "merges.txt", "sentencepiece.bpe.model")


def copy_config(source: Path, output: Path, changes: Mapping[str, object] | None = None) -> None:
    """Copy config.json from one directory to another, with `changes` of its keys."""
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    # transformers once wrote the path that a model had been loaded from.
    config.pop("_name_or_path", None)
    write_json(output / "config.json", config | dict(changes or {}))


def copy_tokenizer(source: Path, output: Path) -> None:
    """Copy the files of a tokenizer from one directory to another."""
    complete = (source / "tokenizer.json").is_file()
    for name in _TOKENIZER_FILES if complete else _TOKENIZER_FILES + _VOCABULARY_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, output / name)


def write_json(path: Path, value: object) -> None:
    """Write a value in lines that people can read."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_weights(path: Path, weights: dict[str, torch.Tensor]) -> None:
    """Write a safetensors file as transformers reads it."""
    from safetensors.torch import save

    # Not save_file, which leaves the file readable by its owner only.
    path.write_bytes(save(weights, metadata={"format": "pt"}))


def check_new_directory(output: Path) -> None:
    """Raise InputError unless `output` is an empty directory or could be made as one."""
    if output.is_dir():
        if any(output.iterdir()):
            raise InputError(f"output_dir: expected a new or empty directory, '{output}' is in use")
    elif output.exists():
        raise InputError(f"output_dir: expected a directory, got the file '{output}'")
    elif not next(place for place in output.resolve().parents if place.exists()).is_dir():
        raise InputError(f"output_dir: expected a place in a directory, got '{output}'")


@contextmanager
def new_directory(output: Path) -> Iterator[Path]:
    """Give a directory to write, which becomes `output` at the end.

    Whatever ends the block early, a full disk or Ctrl-C included, leaves nothing behind.

    Parameters
    ----------
    output
        A missing or empty directory; missing ones above it are made.

    Raises
    ------
    InputError
        If `output` is in use, or below a file.
    OSError
        With the name of `output` if writing fails, or of what cannot be made above it.
    """
    check_new_directory(output)
    final = output.resolve()
    missing = [above for above in final.parents if not above.exists()]
    # Beside the final place, as only a rename within a file system cannot stop half-way.
    temporary = final.with_name(f".{final.name}.{secrets.token_hex(4)}")
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
        yield temporary
        # Fails where something has been put there in the meantime.
        os.rename(temporary, final)
    except OSError as error:
        ours = error.filename is None or Path(os.fsdecode(error.filename)).is_relative_to(temporary)
        if ours and error.errno is not None:
            raise OSError(error.errno, error.strerror, str(output)) from error
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        for above in missing:
            # Fails, as it should, for those that hold `output` or what others put there.
            with suppress(OSError):
                above.rmdir()
