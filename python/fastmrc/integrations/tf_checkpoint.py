"""Reads checkpoints of TensorFlow ("tensor bundles") without TensorFlow.

``NAME.index`` is a sorted table of LevelDB's format (uncompressed, as TensorFlow writes it): names
of tensors and a protocol buffer ``BundleEntryProto`` each (dtype, shape, shard, offset, size).
``NAME.data-00000-of-00001`` and further shards hold the numbers. Sources:
tensorflow/core/protobuf/tensor_bundle.proto, tensorflow/core/lib/io/format.cc.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fastmrc.errors import InputError

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["TensorBundle", "bundle_prefix"]

_MAGIC = 0xDB4775248B80FB57
_FOOTER_BYTES = 48
_TRAILER_BYTES = 5  # behind a block: kind of compression, checksum
# DT_FLOAT, DT_DOUBLE, DT_INT32, DT_INT64, DT_HALF of tensorflow/core/framework/types.proto.
_DTYPES = {1: "<f4", 2: "<f8", 3: "<i4", 9: "<i8", 19: "<f2"}


@dataclass(frozen=True, slots=True)
class _Entry:
    dtype: int
    shape: tuple[int, ...]
    shard: int
    offset: int
    size: int


def bundle_prefix(path: Path) -> Path | None:
    """Return the prefix of a checkpoint: itself, its index file or the one checkpoint of a
    directory; None if there is none."""
    if path.is_dir():
        found = sorted(path.glob("*.index"))
        return found[0].with_suffix("") if len(found) == 1 else None
    if path.suffix == ".index":
        return path.with_suffix("") if path.is_file() else None
    return path if Path(f"{path}.index").is_file() else None


class TensorBundle:
    """The tensors of one checkpoint.

    Parameters
    ----------
    prefix
        Path without ``.index``.

    Raises
    ------
    InputError
        If the index is damaged.
    """

    def __init__(self, prefix: Path) -> None:
        self._prefix = prefix
        index = Path(f"{prefix}.index")
        try:
            entries = dict(_table(index.read_bytes()))
            header = _fields(entries.pop(b""))
            self._shards = int(header.get(1, [0])[0])
            self._entries = {name.decode(): _entry(value) for name, value in entries.items()}
        except (IndexError, KeyError, struct.error, UnicodeDecodeError, ValueError) as error:
            raise InputError(
                f"{index}: not an index of a TensorFlow checkpoint ({error})"
            ) from None

    @property
    def names(self) -> list[str]:
        """Names of the tensors, sorted."""
        return sorted(self._entries)

    def read(self, name: str) -> NDArray[np.generic]:
        """Return a tensor.

        Raises
        ------
        InputError
            If it has another dtype than float and integer ones, or its file is missing or short.
        """
        entry = self._entries[name]
        if entry.dtype not in _DTYPES:
            raise InputError(f"{self._prefix}: {name} has TensorFlow's dtype {entry.dtype}")
        dtype = np.dtype(_DTYPES[entry.dtype])
        expected = int(np.prod(entry.shape, dtype=np.int64)) * dtype.itemsize
        path = Path(f"{self._prefix}.data-{entry.shard:05d}-of-{self._shards:05d}")
        try:
            with open(path, "rb") as file:
                file.seek(entry.offset)
                data = file.read(entry.size)
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({error.strerror})") from None
        if len(data) != entry.size or entry.size != expected:
            raise InputError(
                f"{path}: expected {expected} bytes of {name} at {entry.offset}, got {len(data)}"
            )
        return np.frombuffer(data, dtype).reshape(entry.shape)


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7


def _table(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yield keys and values of a sorted table."""
    if len(data) < _FOOTER_BYTES or struct.unpack("<Q", data[-8:])[0] != _MAGIC:
        raise ValueError("wrong magic number")
    footer = data[-_FOOTER_BYTES:]
    _, at = _handle(footer, 0)  # of the meta index
    index, _ = _handle(footer, at)
    for _, handle in _block(data, *index):
        place, _ = _handle(handle, 0)
        yield from _block(data, *place)


def _handle(data: bytes, at: int) -> tuple[tuple[int, int], int]:
    offset, at = _varint(data, at)
    size, at = _varint(data, at)
    return (offset, size), at


def _block(data: bytes, offset: int, size: int) -> Iterator[tuple[bytes, bytes]]:
    """Yield the entries of a block, whose keys share their beginnings with the one before."""
    if offset + size + _TRAILER_BYTES > len(data):
        raise ValueError("a block is cut")
    if data[offset + size] != 0:
        raise ValueError("compressed blocks are not supported")
    block = data[offset : offset + size]
    restarts = struct.unpack("<I", block[-4:])[0]
    end = len(block) - 4 * (restarts + 1)
    at, key = 0, b""
    while at < end:
        shared, at = _varint(block, at)
        own, at = _varint(block, at)
        length, at = _varint(block, at)
        key = key[:shared] + block[at : at + own]
        yield key, block[at + own : at + own + length]
        at += own + length


def _fields(message: bytes) -> dict[int, list[int | bytes]]:
    """Take a protocol buffer apart: values by field number, as they come."""
    fields: dict[int, list[int | bytes]] = {}
    at = 0
    while at < len(message):
        tag, at = _varint(message, at)
        number, kind = tag >> 3, tag & 7
        value: int | bytes
        if kind == 0:
            value, at = _varint(message, at)
        elif kind == 2:
            size, at = _varint(message, at)
            value, at = message[at : at + size], at + size
        elif kind == 5:
            value, at = message[at : at + 4], at + 4
        elif kind == 1:
            value, at = message[at : at + 8], at + 8
        else:
            raise ValueError(f"wire type {kind}")
        fields.setdefault(number, []).append(value)
    return fields


def _entry(value: bytes) -> _Entry:
    fields = _fields(value)
    if 7 in fields:
        raise ValueError("sliced tensors are not supported")

    def number(field: int) -> int:
        return int(fields.get(field, [0])[0])

    shape = fields.get(2, [b""])[0]
    dimensions = _fields(shape if isinstance(shape, bytes) else b"").get(2, [])
    sizes = tuple(int(_fields(bytes(d)).get(1, [0])[0]) for d in dimensions if isinstance(d, bytes))
    return _Entry(number(1), sizes, number(3), number(4), number(5))
