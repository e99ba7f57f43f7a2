"""Turn a model directory into its int8 form: ``python -m fastmrc.quantize SOURCE OUTPUT``."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from fastmrc.errors import InputError
from fastmrc.int8 import save_int8_weights
from fastmrc.model_files import copy_config, copy_tokenizer, write_json
from fastmrc.pretrained import INT8_FORMAT, SETTINGS_FILE, load_model, load_pooler

__all__ = ["main", "quantize_model"]


def quantize_model(source_dir: str | Path, output_dir: str | Path) -> None:
    """Write the int8 form of a masked language model (see `fastmrc.int8`).

    Parameters
    ----------
    source_dir
        A model directory that `fastmrc.pretrained.load_model` accepts.
    output_dir
        Where the new model goes; made if needed. Tied weights are stored once.

    Raises
    ------
    InputError
        If there is no such directory, or both are the same.
    UnsupportedModelError
        If the model cannot be loaded.
    """
    source, output = Path(source_dir), Path(output_dir)
    if source.resolve() == output.resolve():
        raise InputError(f"output_dir: expected another directory than the source '{source}'")
    loaded = load_model(source)
    tied = set(loaded.model.all_tied_weights_keys)
    weights = {k: v for k, v in loaded.model.state_dict().items() if k not in tied}
    pooler = load_pooler(loaded)
    if pooler is not None:  # which the class of the model leaves out
        prefix = f"{loaded.model.base_model_prefix}.pooler.dense."
        weights |= {prefix + name: weight for name, weight in pooler.state_dict().items()}

    output.mkdir(parents=True, exist_ok=True)
    save_int8_weights(weights, output / "model.safetensors")
    copy_config(source, output)
    copy_tokenizer(source, output)
    path = source / SETTINGS_FILE
    settings = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    settings |= {"format": INT8_FORMAT, "normalization": loaded.normalization}
    write_json(output / SETTINGS_FILE, settings)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit code."""
    parser = argparse.ArgumentParser(prog="python -m fastmrc.quantize", description=__doc__)
    parser.add_argument("source", help="model directory (safetensors, fast tokenizer)")
    parser.add_argument("output", help="directory to write")
    options = parser.parse_args(arguments)
    try:
        quantize_model(options.source, options.output)
    except (InputError, OSError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
