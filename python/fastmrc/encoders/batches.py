"""Batches of inputs of different lengths: little padding, and nothing left behind."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

__all__ = [
    "MAX_BATCH_TOKENS",
    "by_length",
    "padded",
    "padded_inputs",
    "return_freed_memory",
    "to_device",
]

# Padded tokens of one forward pass: enough to keep two to sixteen cores busy, little enough that
# the activations of a BERT-base layer stay in tens of megabytes.
MAX_BATCH_TOKENS = 4096
# The same on a GPU: enough to fill a large one, while the activations of a layer stay below a
# gigabyte.
_MAX_GPU_BATCH_TOKENS = 65_536


def by_length(
    lengths: Sequence[int], most_rows: int | None = None, device: torch.device | None = None
) -> Iterator[list[int]]:
    """Yield the indices of inputs of like length, longest first, batch by batch.

    Parameters
    ----------
    lengths
        Tokens of each input.
    most_rows
        Largest number of inputs in a batch; None: as many as `MAX_BATCH_TOKENS` allows.
    device
        Where they are encoded; a GPU takes more of them at once.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    on_gpu = device is not None and device.type == "cuda"
    most_tokens = _MAX_GPU_BATCH_TOKENS if on_gpu else MAX_BATCH_TOKENS
    begin = 0
    while begin < len(order):
        size = max(1, most_tokens // max(1, lengths[order[begin]]))
        if most_rows is not None:
            size = max(1, min(size, most_rows))
        yield order[begin : begin + size]
        begin += size


def padded(
    rows: Sequence[NDArray[np.int32]], padding: int, device: torch.device, width: int = 0
) -> torch.Tensor:
    """Stack rows, filled up behind; int64 [rows, longest] (or `width` if that is more) and the
    further axes of a row."""
    longest = max(width, *(len(row) for row in rows))
    array = np.full((len(rows), longest, *rows[0].shape[1:]), padding, dtype=np.int64)
    for i, row in enumerate(rows):
        array[i, : len(row)] = row
    return to_device(array, device)


def to_device(array: NDArray[Any], device: torch.device) -> torch.Tensor:
    """Copy an array; the host does not wait for what a GPU is doing."""
    return torch.from_numpy(array).to(device, non_blocking=True)


def padded_inputs(
    rows: Sequence[NDArray[np.int32]], padding: int, device: torch.device
) -> dict[str, torch.Tensor]:
    """Return ``input_ids`` and ``attention_mask`` of a model, int64 [rows, longest]."""
    tokens = padded(rows, padding, device)
    lengths = to_device(np.array([len(row) for row in rows]), device)
    mask = torch.arange(tokens.shape[1], device=device)[None, :] < lengths[:, None]
    return {"input_ids": tokens, "attention_mask": mask.long()}


def return_freed_memory() -> None:
    """Give the pages of freed tensors back to the system.

    glibc keeps them where blocks of ever new sizes have left gaps: without this, resident memory
    grew by 40 % from question 100 to 1,000.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # musl has none
        if trim is not None:
            trim(0)
