"""The int8 form of a checkpoint: one file, a scale per row, nothing to unpickle.

A 2-D weight ``name`` of shape [rows, columns] is stored as two tensors of ``model.safetensors``:

``name``
    int8 [rows, columns], between -127 and 127.
``name.scale``
    float32 [rows]; the weight is ``name * name.scale[:, None]``.

All other tensors are stored as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from fastmrc.errors import InputError, UnsupportedModelError
from fastmrc.model_files import write_weights

if TYPE_CHECKING:
    import torch

__all__ = [
    "SCALE_SUFFIX",
    "dequantize_rows",
    "load_int8_weights",
    "quantize_rows",
    "save_int8_weights",
]

SCALE_SUFFIX = ".scale"
_LEVELS = 127


def quantize_rows(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Round each row to 255 levels, symmetric about zero; halves go to the even level.

    Parameters
    ----------
    weight
        Floating-point tensor [rows, columns], finite.

    Returns
    -------
    tuple
        int8 [rows, columns] and the float32 scale [rows], ``max|row| / 127``. An entry is off by
        half its row's scale at most. A row of zeros has scale 0.

    Raises
    ------
    InputError
        If `weight` is not 2-D and floating-point, or holds NaN or infinity.
    """
    import torch

    if weight.ndim != 2 or not weight.is_floating_point():
        raise InputError(
            "weight: expected a floating-point tensor with 2 dimensions, "
            f"got {weight.dtype} with {weight.ndim}"
        )
    if not torch.isfinite(weight).all():
        raise InputError("weight: expected finite numbers, got NaN or infinity")
    # In float64 the quotient of the largest entry cannot round beyond 127.
    exact = weight.double()
    scale = (exact.abs().amax(dim=1) / _LEVELS).float()
    divisor = torch.where(scale > 0, scale, 1.0).double()[:, None]
    levels = torch.round(exact / divisor).clamp_(-_LEVELS, _LEVELS).to(torch.int8)
    return levels, scale


def dequantize_rows(levels: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Multiply int8 [rows, columns] by the scale [rows]; float32 [rows, columns]."""
    return levels.float().mul_(scale.float()[:, None])


def save_int8_weights(weights: Mapping[str, torch.Tensor], path: Path) -> None:
    """Write `weights` to the safetensors file `path`, the 2-D floating-point ones as int8.

    Raises
    ------
    InputError
        If a 2-D weight holds NaN or infinity; the message names it.
    """
    stored: dict[str, torch.Tensor] = {}
    for name, weight in weights.items():
        if weight.ndim != 2 or not weight.is_floating_point():
            stored[name] = weight.contiguous()
            continue
        try:
            stored[name], stored[name + SCALE_SUFFIX] = quantize_rows(weight.contiguous())
        except InputError as error:
            raise InputError(f"{name}: {error}") from None
    write_weights(path, stored)


def load_int8_weights(path: Path) -> dict[str, torch.Tensor]:
    """Read what `save_int8_weights` wrote; the quantised weights come back as float32.

    Raises
    ------
    UnsupportedModelError
        If an int8 tensor has no scale that fits its rows.
    """
    import torch
    from safetensors.torch import load_file

    stored = load_file(path)
    quantized = [name for name, tensor in stored.items() if tensor.dtype == torch.int8]
    for name in quantized:
        levels = stored[name]
        scale = stored.pop(name + SCALE_SUFFIX, None)
        if scale is None or levels.ndim != 2 or scale.shape != levels.shape[:1]:
            got = "none" if scale is None else f"shape {list(scale.shape)}"
            raise UnsupportedModelError(
                f"{path}: expected a scale per row for the int8 tensor {name} of shape "
                f"{list(levels.shape)}, got {got}"
            )
        stored[name] = dequantize_rows(levels, scale)
    return stored
