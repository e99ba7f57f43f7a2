"""How long does the audit of an output layer take, and how far from its floor is it?

    python -m benchmarks.audit MODEL|FILE [--threads N] [--planted 45]
    python -m benchmarks.audit --rows 250000 --width 1024 [--seconds 120]

The first form audits a layer and lets the separate checker verify every verdict; then one in which
rows are replaced by mixtures of at least 400 others, rounded to float32, which can never have the
largest logit. The floor is the product of one triangle of the rows at the speed that torch
multiplies large matrices with, measured in the same run. The baseline is the published search
(reflections) in NumPy, token by token, on a few tokens that are drawn. The second form measures
memory, and the time of a part of the product, from which that of all is extrapolated, on a random
layer.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

import fastmrc
from benchmarks.machine import machine
from fastmrc import reference
from fastmrc.audit import (
    AuditReport,
    TokenStatus,
    find_unargmaxable,
    load_layer,
    verify_certificates,
)
from fastmrc.audit.layer import OutputLayer, make_layer
from fastmrc.audit.rows import Rows
from fastmrc.audit.witnesses import TILE_ROWS, BestOthers

_DRAWN = 20
_MIXED = 400


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("layer", nargs="?", metavar="MODEL|FILE")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--planted", type=int, default=45)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--rows", type=int)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--seconds", type=float, default=60.0, help="measured, of the product")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
        fastmrc.set_num_threads(arguments.threads)
    if (arguments.layer is None) == (arguments.rows is None):
        parser.error("expected a layer or --rows")
    if arguments.rows is not None:
        found = memory(arguments.rows, arguments.width, arguments.seconds)
        sound = True
    else:
        found, sound = audits(load_layer(arguments.layer), arguments.planted, arguments.repeat)
    print(json.dumps(machine() | found, indent=2))
    return 0 if sound else 1


def audits(layer: OutputLayer, planted: int, repeat: int) -> tuple[dict[str, Any], bool]:
    """Return the figures, and whether the checker accepted all."""
    flops = _product_speed(layer)
    seconds = []
    for _ in range(repeat):
        begin = time.perf_counter()
        report = find_unargmaxable(layer)
        seconds.append(time.perf_counter() - begin)
    plain = _described(report) | {"seconds": seconds, "median seconds": median(seconds)}
    rows, width = layer.weight.shape
    plain["floor seconds"] = rows * (rows + 1) * width / flops
    plain["published search, seconds a token"] = _published(layer)
    plain["times the published search"] = plain["published search, seconds a token"] * rows
    plain["times the published search"] /= median(seconds)
    ids, mixed = _planted(layer, planted)
    begin = time.perf_counter()
    report = find_unargmaxable(mixed)
    taken = time.perf_counter() - begin
    dead = _described(report) | {"seconds": taken}
    dead["of the planted"] = report.results.status[ids].tolist()
    expected = {int(TokenStatus.UNARGMAXABLE), int(TokenStatus.NEAR)}
    sound = plain["rejected"] == dead["rejected"] == 0 and "UNDECIDED" not in plain["counts"]
    sound = sound and set(dead["of the planted"]) <= expected
    return {"layer": plain, "with planted rows": dead}, sound


def _described(report: AuditReport) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "certificates.npz"
        report.save_certificates(path)
        begin = time.perf_counter()
        found = verify_certificates(path, report.layer.weight, report.layer.bias)
        seconds = time.perf_counter() - begin
    return {
        "shape": list(report.layer.weight.shape),
        "counts": report.counts,
        "stages": report.stages(),
        "accepted": found.accepted,
        "rejected": len(found.rejected),
        "seconds to verify": seconds,
    }


def _product_speed(layer: OutputLayer) -> float:
    """Return the floating-point operations a second of a large product in float32."""
    part = torch.from_numpy(layer.weight[:4096].astype(np.float32))
    part @ part.T
    seconds = []
    for _ in range(5):
        begin = time.perf_counter()
        part @ part.T
        seconds.append(time.perf_counter() - begin)
    return 2 * len(part) ** 2 * part.shape[1] / median(seconds)


def _published(layer: OutputLayer) -> float:
    tokens = np.random.default_rng(0).choice(len(layer.weight), _DRAWN, replace=False)
    weight = layer.weight.astype(np.float64)
    begin = time.perf_counter()
    for token in tokens.tolist():
        reference.reflection_search(weight, token, layer.bias)
    return (time.perf_counter() - begin) / _DRAWN


def _planted(layer: OutputLayer, count: int) -> tuple[np.ndarray, OutputLayer]:
    """Return tokens, and the layer in which their rows are mixtures of others, in float32."""
    rng = np.random.default_rng(0)
    weight = layer.weight.copy()
    ids = rng.choice(len(weight), count, replace=False)
    others = np.setdiff1d(np.arange(len(weight)), ids)
    for token in ids:
        mixed = rng.choice(others, rng.integers(_MIXED, 2 * _MIXED), replace=False)
        shares = rng.dirichlet(np.ones(len(mixed)))
        weight[token] = (shares @ layer.weight[mixed].astype(np.float64)).astype(np.float32)
    return ids, make_layer(weight, layer.bias)


def memory(rows: int, width: int, limit: float) -> dict[str, Any]:
    """Return the peak of the memory, and the time that a random layer of that size would take."""
    torch.manual_seed(0)
    weight = torch.randn(rows, width).numpy()
    held = Rows(make_layer(weight), np.arange(rows), torch.device("cpu"))
    others = BestOthers(held, None)
    begin = time.perf_counter()
    columns = 0
    while others.done < others.total and time.perf_counter() - begin < limit:
        columns += rows - others.done * TILE_ROWS
        others.step()
    seconds = time.perf_counter() - begin
    every = sum(rows - block * TILE_ROWS for block in range(others.total))
    return {
        "shape": [rows, width],
        "layer, GiB": weight.nbytes / 2**30,
        "peak resident memory, GiB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "part of the product": columns / every,
        "seconds of that part": seconds,
        "extrapolated hours of the product": seconds * every / columns / 3600,
    }


if __name__ == "__main__":
    raise SystemExit(main())
