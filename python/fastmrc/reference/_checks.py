"""Argument checks shared by the reference modules; messages give name, expected and got."""

from __future__ import annotations

import operator
import sys
from collections.abc import Iterable, Sequence
from typing import Any, SupportsIndex

import numpy as np
from numpy.typing import NDArray

from fastmrc.errors import InputError

MAX_TOKEN = 2**31 - 1


def require_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Refuse a value that is not one of `choices`."""
    if value not in choices:
        raise InputError(f"{name}: expected one of {', '.join(choices)}, got {value!r}")


def require_int(name: str, value: SupportsIndex, least: int, most: int | None = None) -> int:
    """Return `value` as an int between `least` and `most`, both included."""
    if isinstance(value, (bool, np.bool_)) or not hasattr(value, "__index__"):
        raise TypeError(f"{name}: expected an integer, got {type(value).__name__}")
    number = operator.index(value)
    if number < least:
        raise InputError(f"{name}: expected at least {least}, got {number}")
    if most is not None and number > most:
        raise InputError(f"{name}: expected at most {most}, got {number}")
    return number


def token_list(name: str, tokens: Iterable[SupportsIndex]) -> list[int]:
    """Return `tokens` as Python ints, each in the range of a non-negative int32."""
    if isinstance(tokens, (str, bytes)) or not isinstance(tokens, Iterable):
        raise TypeError(f"{name}: expected token ids, got {type(tokens).__name__}")
    return [require_int(f"{name}[{i}]", token, 0, MAX_TOKEN) for i, token in enumerate(tokens)]


def token_lists(name: str, sequences: Iterable[Iterable[SupportsIndex]]) -> list[list[int]]:
    """Return a list of token lists, as `token_list` does for each."""
    if isinstance(sequences, (str, bytes)) or not isinstance(sequences, Iterable):
        raise TypeError(f"{name}: expected sequences of token ids, got {type(sequences).__name__}")
    return [token_list(f"{name}[{i}]", tokens) for i, tokens in enumerate(sequences)]


def int_vector(name: str, values: Any, length: int | None = None) -> NDArray[np.int64]:
    """Return `values` as a vector of int64, of `length` entries if it is given."""
    array = np.asarray(to_numpy(values))
    if array.ndim != 1:
        raise InputError(f"{name}: expected a vector, got {array.ndim} dimensions")
    if length is not None and len(array) != length:
        raise InputError(f"{name}: expected {length} entries, got {len(array)}")
    if array.size == 0:
        return np.zeros(0, np.int64)
    if not np.issubdtype(array.dtype, np.integer):
        raise TypeError(f"{name}: expected integers, got {array.dtype}")
    return array.astype(np.int64)


def float32_vector(name: str, values: Any, length: int | None = None) -> NDArray[np.float32]:
    """Return `values` as a vector of float32; arrays must be float32, lists are converted."""
    array = np.asarray(to_numpy(values))
    if array.ndim != 1:
        raise InputError(f"{name}: expected a vector, got {array.ndim} dimensions")
    if length is not None and len(array) != length:
        raise InputError(f"{name}: expected {length} entries, got {len(array)}")
    if not isinstance(values, Sequence) and array.dtype != np.float32:
        raise TypeError(f"{name}: expected float32, got {array.dtype}")
    try:
        return array.astype(np.float32)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name}: expected numbers, got {array.dtype}") from error


def weight_vector(name: str, values: Any, length: int) -> NDArray[np.float32]:
    """Return `length` finite weights, none negative, as float32."""
    weights = np.asarray(to_numpy(values), dtype=np.float32)
    weights = float32_vector(name, weights, length)
    if not np.isfinite(weights).all() or (weights < 0).any():
        raise InputError(f"{name}: expected finite weights of at least 0, got {weights.tolist()}")
    return weights


def is_torch(value: object) -> bool:
    """Tell whether `value` is a torch tensor, without importing torch."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def to_numpy(value: Any) -> Any:
    """Return a torch tensor as a NumPy array (bfloat16 as float32), anything else as it is."""
    if not is_torch(value):
        return value
    tensor = value.detach().cpu()
    if str(tensor.dtype) == "torch.bfloat16":  # NumPy has no such type
        tensor = tensor.float()
    return tensor.numpy()


def like(array: NDArray[Any], model: object) -> Any:
    """Return `array` as a torch tensor on the device of `model` if that is a torch tensor."""
    if not is_torch(model):
        return array
    tensor = sys.modules["torch"].from_numpy(np.ascontiguousarray(array))
    return tensor.to(model.device)  # type: ignore[attr-defined]
