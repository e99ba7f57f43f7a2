"""Whether kernels for a device are built, the stream they run on, and faults that it finds."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

__all__ = [
    "Faults",
    "call_on",
    "current",
    "deferred_checks",
    "device_count",
    "has_kernels",
    "kernels",
    "no_fault",
    "on_device",
    "raise_fault",
    "stream_of",
    "to_host",
]

# What the kernels run on. The tests set "cpu" where they are emulated on the host.
device_type = "cuda"


@cache
def kernels() -> Any:
    """Return the extension with the kernels; None where the package was built without."""
    if importlib.util.find_spec("fastmrc._cuda") is None:
        return None
    return importlib.import_module("fastmrc._cuda")


def device_count() -> int:
    """Return how many devices there are for the kernels; 0 without kernels or driver."""
    return 0 if kernels() is None else int(kernels().device_count())


def has_kernels(device: torch.device) -> bool:
    """Return whether the kernels run on tensors of this device: built for it, with its driver."""
    return device.type == device_type and kernels() is not None and _runs_on(device.index or 0)


@cache
def _runs_on(device: int) -> bool:
    return bool(kernels().runs_on(device))


def current(device: torch.device) -> AbstractContextManager[Any]:
    """Return a context in which a GPU is the current one, as torch's exports demand."""
    if device.type != "cuda":
        return nullcontext()
    import torch

    context: AbstractContextManager[Any] = torch.cuda.device(device)
    return context


def on_device(x: Any) -> bool:
    """Return whether `x` is a torch tensor that the kernels run on."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(x, torch.Tensor) and has_kernels(x.device)


def to_host(x: Any) -> NDArray[Any]:
    """Return an array on the host; waits for the device of a tensor."""
    return np.asarray(x.cpu() if on_device(x) else x)


def stream_of(device: torch.device) -> int:
    """Return torch's current stream of the device, as a number."""
    if device.type != "cuda":
        return 0
    import torch

    return int(torch.cuda.current_stream(device).cuda_stream)


class Faults:
    """Faults of inputs that only the device sees: NaN in logits, say.

    A kernel notes the first one in a tensor and goes on; `check` reads these tensors.
    """

    def __init__(self) -> None:
        self._noted: list[tuple[torch.Tensor, tuple[str, int, int]]] = []

    def new(
        self, device: torch.device, name: str, vocabulary_size: int = 0, end_id: int = 0
    ) -> torch.Tensor:
        """Return a place for the fault of one call, int64 [1].

        `name` is that of the argument with the rows; messages on constraints name the other two.
        """
        fault = no_fault(device)
        self._noted.append((fault, (name, vocabulary_size, end_id)))
        return fault

    def check(self) -> None:
        """Wait for the device and forget the faults noted so far.

        Raises
        ------
        ValueError
            If there is one; the message is that of the first.
        """
        import torch

        noted, self._noted = self._noted, []
        if not noted:
            return
        codes = torch.cat([fault for fault, _ in noted]).tolist()
        for code, (_, context) in zip(codes, noted, strict=True):
            raise_fault(code, *context)


def no_fault(device: torch.device) -> torch.Tensor:
    """Return a place where kernels note a fault, int64 [1]."""
    import torch

    return torch.full((1,), kernels().NO_FAULT, dtype=torch.int64, device=device)


def raise_fault(code: int, name: str, vocabulary_size: int, end_id: int) -> None:
    """Raise ValueError for what a kernel noted, if it noted something."""
    if code != kernels().NO_FAULT:
        raise ValueError(kernels().fault_message(code, name, vocabulary_size, end_id))


_deferred: ContextVar[Faults | None] = ContextVar("deferred", default=None)


@contextmanager
def deferred_checks() -> Iterator[Faults]:
    """Let operations on a GPU return without waiting for it.

    Otherwise each waits until the device has told whether its input holds NaN, as an operation on
    the CPU would say at once. Rows at fault have results of NaN and -1. Call `check` of what this
    gives when the results are read. On the CPU nothing changes.

    Examples
    --------
    >>> with deferred_checks() as faults:
    ...     values, ids = fastmrc.ops.topk(x, 8)
    ...     first = ids[:, 0].cpu()
    >>> faults.check()
    """
    faults = Faults()
    token = _deferred.set(faults)
    try:
        yield faults
    finally:
        _deferred.reset(token)


@contextmanager
def call_on(device: torch.device) -> Iterator[Faults]:
    """Make a device current for one operation.

    Gives the operation's faults, which are checked at its end unless that is deferred.
    """
    deferred = _deferred.get()
    faults = deferred or Faults()
    with current(device):
        yield faults
        if deferred is None:
            faults.check()
