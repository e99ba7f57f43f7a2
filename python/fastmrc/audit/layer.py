"""Output layers: their weights and bias from arrays or files, of which only the layer is read."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fastmrc.data import StrPath
from fastmrc.errors import InputError
from fastmrc.pretrained import weight_files

__all__ = ["Floats", "OutputLayer", "fold_layer_norm", "load_layer", "make_layer", "norm_plane"]

Floats = NDArray[np.floating[Any]]

# Rows that are looked at together: bounds what is held twice.
_BLOCK = 8192
_LEAST, _LARGEST = 1e-100, 1e100
_NOTHING = 1e-20
# Where models keep their output layer; then, tied to it, their word embeddings.
_WEIGHTS = (
    "lm_head.weight",
    "cls.predictions.decoder.weight",
    "lm_head.decoder.weight",
    "embed_out.weight",
    "output.weight",
    "generator.weight",
    "model.embed_tokens.weight",
    "model.shared.weight",
    "shared.weight",
    "transformer.wte.weight",
    "wte.weight",
    "bert.embeddings.word_embeddings.weight",
    "roberta.embeddings.word_embeddings.weight",
    "embeddings.word_embeddings.weight",
)
_BIASES = (
    "lm_head.bias",
    "cls.predictions.bias",
    "cls.predictions.decoder.bias",
    "lm_head.decoder.bias",
    "final_logits_bias",
)


@dataclass(frozen=True, slots=True)
class OutputLayer:
    """Weights and bias of a linear layer over a vocabulary.

    Attributes
    ----------
    weight
        float32 or float64 [V, d]; half precision is widened, which is exact.
    bias
        float64 [V], or None. All numbers of both are 0 or of a size from 1e-100 to 1e100, so that
        scaling them by powers of two is exact.
    weight_name, bias_name
        Where they were read from.
    sphere
        Norm that all inputs have, or None if they may have any.
    rounding
        By how much a row (in norm) and a bias may be off; 0 but for a layer norm.
    norm_names
        Of scale and shift of the layer norm that was taken in.
    identity
        Digest of what the layer was made of, where it is not as it was read.
    """

    weight: Floats
    bias: NDArray[np.float64] | None
    weight_name: str = "weight"
    bias_name: str | None = None
    sphere: float | None = None
    rounding: tuple[float, float] = (0.0, 0.0)
    norm_names: tuple[str, str] | None = None
    identity: str | None = None

    def digest(self) -> str:
        """Return the SHA-256 of shape, weights and bias, in hexadecimal."""
        if self.identity is not None:
            return self.identity
        digest = hashlib.sha256(repr((self.weight.shape, self.weight.dtype.str)).encode())
        for start in range(0, len(self.weight), _BLOCK):
            digest.update(np.ascontiguousarray(self.weight[start : start + _BLOCK]).tobytes())
        if self.bias is not None:
            digest.update(self.bias.tobytes())
        return digest.hexdigest()


def make_layer(
    weight: Any, bias: Any = None, *, weight_name: str = "weight", bias_name: str | None = None
) -> OutputLayer:
    """Check weights and bias.

    Parameters
    ----------
    weight
        [V, d], floating-point, NumPy or torch.
    bias
        [V], likewise, or None.
    weight_name, bias_name
        Where they are from.

    Raises
    ------
    InputError
        For a wrong shape, no rows or columns, NaN, infinity, or numbers that are no 0 but below
        1e-100 or above 1e100.
    TypeError
        For another dtype.
    """
    rows = _to_numpy("weight", weight)
    if rows.ndim != 2 or 0 in rows.shape:
        raise InputError(f"weight: expected shape [V, d], each at least 1, got {list(rows.shape)}")
    for start in range(0, len(rows), _BLOCK):
        _require_finite("weight", rows[start : start + _BLOCK], start)
    values = None
    if bias is not None:
        values = _to_numpy("bias", bias).astype(np.float64)
        values = values[0] if values.ndim == 2 and len(values) == 1 else values
        if values.shape != rows.shape[:1]:
            raise InputError(f"bias: expected shape [{len(rows)}], got {list(values.shape)}")
        _require_finite("bias", values, 0)
    return OutputLayer(rows, values, weight_name, bias_name)


def _to_numpy(name: str, value: Any) -> Floats:
    if isinstance(value, torch.Tensor):
        half = value.is_floating_point() and value.dtype.itemsize < 4
        value = (value.detach().float() if half else value.detach()).cpu().numpy()
    array: NDArray[Any] = np.asarray(value)
    if array.dtype.kind != "f":
        raise TypeError(f"{name}: expected floating-point numbers, got {array.dtype}")
    if array.dtype.itemsize > 8:
        raise TypeError(f"{name}: expected at most float64, got {array.dtype}")
    wide = np.float64 if array.dtype.itemsize == 8 else np.float32
    return np.ascontiguousarray(array, dtype=wide)


def _require_finite(name: str, values: NDArray[Any], start: int) -> None:
    sizes = np.abs(values, dtype=np.float64)
    wrong = np.argwhere(~((sizes <= _LARGEST) & ((sizes >= _LEAST) | (sizes == 0))))
    if len(wrong):
        place = tuple(int(i) for i in wrong[0])
        got = values[place]
        raise InputError(
            f"{name}: expected finite numbers, 0 or from {_LEAST} to {_LARGEST} in size, "
            f"got {got} in row {place[0] + start}"
            + (f", column {place[1]}" if len(place) > 1 else "")
        )


def load_layer(
    path: StrPath,
    *,
    weight: str | None = None,
    bias: str | None = None,
    norm: Sequence[str] | None = None,
) -> OutputLayer:
    """Read an output layer.

    Parameters
    ----------
    path
        A model directory (safetensors, in shards or not), a safetensors file, an ``.npy`` file that
        holds the weights, or an ``.npz`` file. Of these only the layer is read.
    weight
        Name of the weights; by default the first that is found of ``weight`` and the names in use,
        those of the word embeddings (to which a tied output layer is equal) after those of output
        layers, or the only tensor.
    bias
        Name of the bias, or an ``.npy`` file that holds it; ``""`` for none. By default, the first
        found of the names in use; where `weight` is named, only the bias beside it.
    norm
        Names of scale and shift of a last layer norm, which `fold_layer_norm` takes in.

    Returns
    -------
    OutputLayer

    Raises
    ------
    InputError
        Naming what is missing, damaged or of a wrong shape.
    """
    tensors = _open(Path(path))
    name = _choose(weight, tensors, path)
    rows = tensors.read(name)
    if bias is not None and bias.endswith(".npy") and bias not in tensors:
        layer = make_layer(rows, _open(Path(bias)).read("weight"), weight_name=name, bias_name=bias)
    else:
        shift = _choose_bias(bias, tensors, name if weight is not None else None, path)
        values = None if shift is None else tensors.read(shift)
        layer = make_layer(rows, values, weight_name=name, bias_name=shift)
    if norm is None:
        return layer
    if len(norm) != 2:
        raise InputError(f"norm: expected the names of scale and shift, got {list(norm)}")
    for part in norm:
        _require_name(part, tensors, "norm", path)
    scale, beta = (_to_numpy("norm", tensors.read(part)) for part in norm)
    return replace(fold_layer_norm(layer, scale, beta), norm_names=(norm[0], norm[1]))


def fold_layer_norm(layer: OutputLayer, scale: Floats, shift: Floats) -> OutputLayer:
    """Take the layer norm before an output layer into it.

    After a layer norm the layer's input is ``scale * n + shift``, where the d numbers n have the
    mean 0 and, but for the layer norm's epsilon, the norm sqrt(d). They lie in the plane that
    `norm_plane` spans: ``n = norm_plane(d) @ z`` with d - 1 numbers z of the same norm, which are
    the inputs of the result.

    Parameters
    ----------
    layer
        [V, d], d at least 2.
    scale, shift
        [d].

    Returns
    -------
    OutputLayer
        [V, d - 1] in float64, whose inputs have the norm sqrt(d).

    Raises
    ------
    InputError
        If shapes do not fit.
    """
    width = layer.weight.shape[1]
    if width < 2:
        raise InputError(f"norm: expected a layer of at least 2 columns, got {width}")
    identity = hashlib.sha256(layer.digest().encode())
    for name, part in (("scale", scale), ("shift", shift)):
        if part.shape != (width,):
            raise InputError(f"norm: expected {name} of shape [{width}], got {list(part.shape)}")
        _require_finite("norm", part, 0)
        identity.update(part.astype(np.float64).tobytes())
    rows = layer.weight.astype(np.float64)
    units = 4 * (width + 4) * 2.0**-53
    bias = rows @ shift.astype(np.float64)
    sizes = np.abs(rows) @ np.abs(shift.astype(np.float64))
    if layer.bias is not None:
        bias += layer.bias
        sizes += np.abs(layer.bias)
    rows *= scale
    longest = float(np.linalg.norm(rows, axis=1).max())
    folded_rows = rows @ norm_plane(width)
    # What is far below the rounding is 0.
    folded_rows[np.abs(folded_rows) < _NOTHING * longest] = 0
    bias[np.abs(bias) < _NOTHING * sizes.max()] = 0
    folded = make_layer(
        folded_rows,
        bias,
        weight_name=layer.weight_name,
        bias_name=layer.bias_name,
    )
    return replace(
        folded,
        sphere=math.sqrt(width),
        rounding=(units * longest, units * float(sizes.max())),
        identity=identity.hexdigest(),
    )


def norm_plane(width: int) -> NDArray[np.float64]:
    """Return an orthonormal basis, float64 [d, d - 1], of the vectors whose mean is 0 (Helmert)."""
    columns = np.arange(1, width)
    plane = np.triu(np.ones((width, width - 1)))
    plane[columns, columns - 1] = -columns
    return plane / np.sqrt(columns * (columns + 1.0))


class _Tensors:
    """Tensors by name, each read when asked for."""

    def __init__(self, files: Mapping[str, Path]) -> None:
        self.files = files

    def __contains__(self, name: str) -> bool:
        return name in self.files

    def shown(self) -> str:
        """Return the first names, for messages."""
        names = sorted(self.files)
        return f"{', '.join(names[:12])}{', ...' if len(names) > 12 else ''}" or "no tensor"

    def read(self, name: str) -> Any:
        path = self.files[name]
        try:
            return self._read(path, name)
        except Exception as error:  # the parsers of damaged files raise errors of many kinds
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise InputError(f"{path}: cannot read {name} ({reason})") from error

    def _read(self, path: Path, name: str) -> Any:
        from safetensors import safe_open

        with safe_open(path, framework="pt") as file:
            values = file.get_tensor(name)
            if values.dtype != torch.int8:
                return values
            from fastmrc.int8 import SCALE_SUFFIX, dequantize_rows

            return dequantize_rows(values, file.get_tensor(name + SCALE_SUFFIX))


class _Arrays(_Tensors):
    """Arrays of an npz file, or the one of an npy file, named ``weight``."""

    def __init__(self, path: Path) -> None:
        with open(path, "rb") as raw:
            if path.suffix == ".npy":
                np.lib.format.read_magic(raw)
                names = ["weight"]
            else:
                names = np.load(raw, allow_pickle=False).files
        super().__init__(dict.fromkeys(names, path))

    def _read(self, path: Path, name: str) -> Any:
        with open(path, "rb") as raw:
            loaded = np.load(raw, allow_pickle=False)
            return loaded if isinstance(loaded, np.ndarray) else loaded[name]


def _open(path: Path) -> _Tensors:
    from safetensors import SafetensorError, safe_open

    if path.suffix in (".npy", ".npz"):
        try:
            return _Arrays(path)
        except OSError:
            raise
        except Exception as error:  # as above
            raise InputError(f"{path}: cannot be read as {path.suffix} ({error})") from error
    if path.is_dir():
        files = [path / name for name in weight_files(path, str(path))]
    elif path.is_file():
        files = [path]
    else:
        raise InputError(f"{path}: expected a model directory or a file, found neither")
    names: dict[str, Path] = {}
    for part in files:
        try:
            with safe_open(part, framework="pt") as file:
                names |= dict.fromkeys(file.keys(), part)
        except (SafetensorError, OSError) as error:
            reason = str(error).splitlines()[0]
            raise InputError(
                f"{part}: expected safetensors, npy or npz, cannot be read ({reason})"
            ) from error
    return _Tensors(names)


def _choose(wanted: str | None, tensors: _Tensors, path: StrPath) -> str:
    if wanted is not None:
        return _require_name(wanted, tensors, "weight", path)
    found = [name for name in ("weight", *_WEIGHTS) if name in tensors]
    if found or len(tensors.files) == 1:
        return (found or list(tensors.files))[0]
    raise InputError(
        f"{path}: expected an output layer under a usual name, or named as the weight; it holds "
        f"{tensors.shown()}"
    )


def _choose_bias(
    wanted: str | None, tensors: _Tensors, named: str | None, path: StrPath
) -> str | None:
    if wanted is not None:
        return _require_name(wanted, tensors, "bias", path) if wanted else None
    usual: tuple[str, ...] = ("bias", *_BIASES)
    if named is not None:
        usual = (named.removesuffix("weight") + "bias",) if named.endswith("weight") else ()
    return next((name for name in usual if name in tensors), None)


def _require_name(name: str, tensors: _Tensors, role: str, path: StrPath) -> str:
    if name in tensors:
        return name
    raise InputError(f"{role}: '{path}' holds no {name!r}, but {tensors.shown()}")
