"""Where it runs: a GPU, or an emulation of it on the host, and the CPU path beside it."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import torch

from benchmarks.machine import machine
from fastmrc.cuda import runtime
from fastmrc.cuda.runtime import kernels

P = ParamSpec("P")
T = TypeVar("T")
REPOSITORY = Path(__file__).resolve().parents[2]


def on_host(work: Callable[P, T], *arguments: P.args, **options: P.kwargs) -> T:
    """Let the CPU path work on tensors on the CPU, also where kernels are emulated."""
    before = runtime.device_type
    runtime.device_type = "cuda"
    try:
        return work(*arguments, **options)
    finally:
        runtime.device_type = before


def load_emulation() -> None:
    """Load the extension that FASTMRC_CUDA_EMULATION names, whose kernels run on the host."""
    directory = os.environ.get("FASTMRC_CUDA_EMULATION", "")
    path = next(Path(directory).glob("_cuda.*.so"), None) if directory else None
    if path is None:
        raise SystemExit("--emulated: FASTMRC_CUDA_EMULATION names no directory with _cuda.*.so")
    spec = importlib.util.spec_from_file_location("fastmrc._cuda", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["fastmrc._cuda"] = module
    spec.loader.exec_module(module)
    runtime.device_type = "cpu"


def nothing_to_run_on(emulated: bool) -> str | None:
    if kernels() is None:
        return "fastmrc was built without CUDA kernels; see benchmarks/gpu_build.sh"
    if emulated:
        return None if kernels().is_emulated() else "--emulated: the kernels are no emulation"
    if not torch.cuda.is_available():
        return "torch sees no GPU"
    return None if runtime.device_count() > 0 else "the kernels see no GPU"


def gpu_machine(emulated: bool) -> dict[str, Any]:
    """Return what it runs on, the state of the repository included."""
    found = machine()
    git = "git", "-C", str(REPOSITORY)
    found["commit"] = _output_of(*git, "rev-parse", "HEAD")
    changed = _output_of(*git, "status", "--porcelain") or ""
    found["changed files"] = len(changed.splitlines())
    found["python"] = sys.version.split()[0]
    if emulated:
        return found | {"device": "emulated on the host"}
    properties = torch.cuda.get_device_properties(0)
    return found | {
        "device": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "memory GiB": round(properties.total_memory / 2**30, 1),
        "L2 MiB": round(getattr(properties, "L2_cache_size", 0) / 2**20, 1),
        "cuda": torch.version.cuda,
        "driver": _output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
    }


def _output_of(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
