"""What a benchmark ran on."""

from __future__ import annotations

import platform
from typing import Any

import numpy as np
import torch

import fastmrc

__all__ = ["machine"]


def machine() -> dict[str, Any]:
    """Return processor, threads and versions."""
    import transformers

    return {
        "processor": _processor_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "numpy": np.__version__,
        "fastmrc": dict(fastmrc.build_info()),
    }


def _processor_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.split(":")[1].strip() for line in file if "model name" in line)
    except (OSError, StopIteration):
        return platform.machine()
