"""What was built and what runs: version, compiler, instruction set, threads."""

from __future__ import annotations

import sys
from typing import TypedDict

from fastmrc import _C
from fastmrc.cuda import runtime

__all__ = ["BuildInfo", "__version__", "build_info", "get_num_threads", "set_num_threads"]

__version__ = _C.version()

_threads_were_set = False


class BuildInfo(TypedDict):
    """Return type of ``build_info``."""

    version: str
    compiler: str
    isa: str
    threads: int
    cuda: bool


def build_info() -> BuildInfo:
    """Describe the native extension.

    Returns
    -------
    BuildInfo
        ``version``; ``compiler``; ``isa``: the instruction set in use (``generic``, ``avx2`` or
        ``avx512``; the environment variable ``FASTMRC_FORCE_ISA`` chooses another before the first
        import); ``threads``: threads the kernels may use; ``cuda``: whether CUDA kernels are built.
    """
    return BuildInfo(
        version=__version__,
        compiler=_C.compiler(),
        isa=_C.isa(),
        threads=get_num_threads(),
        cuda=runtime.kernels() is not None,
    )


def set_num_threads(n: int) -> None:
    """Set how many threads the native kernels use, the caller's included.

    Results do not depend on it. Until this is called the kernels follow
    ``torch.get_num_threads()`` once torch is imported, else the processors of this process.

    Raises
    ------
    ValueError
        If ``n`` is below 1.
    """
    global _threads_were_set
    _C.set_num_threads(n)
    _threads_were_set = True


def get_num_threads() -> int:
    """Return how many threads the native kernels use."""
    follow_torch()
    return _C.num_threads()


def follow_torch() -> None:
    """Take over torch's number of threads unless ``set_num_threads`` was called."""
    torch = sys.modules.get("torch")
    if not _threads_were_set and torch is not None and hasattr(torch, "get_num_threads"):
        _C.set_num_threads(torch.get_num_threads())
