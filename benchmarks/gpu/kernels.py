"""Times of the pass over rows: statistics against a copy, top-k against torch.

A share of the copy bandwidth is bytes of logits per second over those that `copy_` of 1 GiB reads
and writes. "bare" is the kernel with results and workspace allocated before. "rotating" are calls
one after the other on inputs that together exceed the cache.
"""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.gpu.context import DTYPES, Context, dtype_name
from fastmrc import ops
from fastmrc.cuda.runtime import deferred_checks, kernels, no_fault, stream_of


def part_kernels(context: Context) -> None:
    """Row pass and top-k, as shares of the copy bandwidth."""
    bandwidth = _copy_bandwidth(context)
    nothing = context.watch.seconds(lambda: None, cache="as it is")
    context.report.figure("between two events with nothing between them", 1e6 * nothing, "us")
    for shape in context.sizes.kernel_shapes:
        for dtype in DTYPES:
            of = _shape_name(shape, dtype)
            if context.may_go_on(of):
                with context.report.guard(of):
                    x = context.normal(*shape, dtype=dtype)
                    _time_row_pass(context, f"row pass {of}", x, bandwidth, stats=True)
                    _time_row_pass(context, f"top-k, k 8, {of}", x, bandwidth, k=8)


def part_topk(context: Context) -> None:
    """Top-k and log-softmax + top-k against torch."""
    for shape in context.sizes.kernel_shapes:
        for dtype in DTYPES:
            x = context.normal(*shape, dtype=dtype)
            for k in context.sizes.topk:
                for of_log_softmax in (False, True):
                    name = f"{_shape_name(shape, dtype)} k {k}"
                    context.attempt(name, _time_topk, context, name, x, k, of_log_softmax)


class BareRowPass:
    """The pass over rows alone: results and workspace are allocated once."""

    def __init__(
        self, x: torch.Tensor, *, stats: bool = False, k: int = 0, log_softmax: bool = False
    ) -> None:
        rows, columns = x.shape

        def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device=x.device)

        self._x = x
        self._arguments: dict[str, Any] = {
            "live": None,
            "max": empty(rows) if stats else None,
            "argmax": empty(rows, dtype=torch.int32) if stats else None,
            "logsumexp": empty(rows, dtype=torch.float64) if stats else None,
            "k": k,
            "values": empty(rows, k),
            "ids": empty(rows, k, dtype=torch.int32),
            "log_softmax": log_softmax,
            "fault": no_fault(x.device),
            "counters": torch.zeros(rows, dtype=torch.int32, device=x.device),
            "workspace": empty(kernels().row_pass_bytes(rows, columns, k), dtype=torch.uint8),
            "stream": stream_of(x.device),
        }

    def __call__(self, x: torch.Tensor | None = None) -> None:
        kernels().row_pass(x=self._x if x is None else x, **self._arguments)


def _copy_bandwidth(context: Context) -> float:
    """Return the bytes per second that a copy reads and writes."""
    source, target = (
        torch.ones(context.sizes.copied // 4, device=context.device) for _ in range(2)
    )
    seconds = context.watch.seconds(lambda: target.copy_(source), cache="as it is")
    bandwidth = 2 * context.sizes.copied / seconds
    context.report.figure("copy bandwidth", bandwidth / 1e9, "GB/s")
    return bandwidth


def _time_row_pass(
    context: Context, name: str, x: torch.Tensor, bandwidth: float, **arguments: Any
) -> None:
    call, watch = BareRowPass(x, **arguments), context.watch

    def operation() -> None:
        if arguments.get("stats"):
            ops.row_stats(x)
        else:
            ops.topk(x, arguments["k"])

    seconds = {
        "bare": watch.seconds(call),
        "left dirty": watch.seconds(call, cache="dirty"),
        "rotating": _rotating_seconds(context, call, x),
    }
    with deferred_checks():
        seconds["operation"] = watch.seconds(operation)
    shares = {key: x.nbytes / value / bandwidth for key, value in seconds.items()}
    context.report.figure(
        name,
        shares["bare"],
        "of the copy bandwidth",
        ">= 0.70",
        microseconds={key: 1e6 * value for key, value in seconds.items()},
        shares=shares,
    )


def _rotating_seconds(context: Context, call: BareRowPass, x: torch.Tensor) -> float:
    """Return the time of a call among many, each on an input that is not in the cache."""
    copies = max(1, 4 * context.watch.l2_bytes // x.nbytes)
    inputs = [x] + [x.clone() for _ in range(copies)]

    def all_of_them() -> None:
        for own in inputs:
            call(own)

    return context.watch.seconds(all_of_them, cache="as it is", calls=len(inputs))


def _time_topk(context: Context, name: str, x: torch.Tensor, k: int, of_log_softmax: bool) -> None:
    def of_torch() -> None:
        given = torch.log_softmax(x, 1, dtype=torch.float32) if of_log_softmax else x
        torch.topk(given, k)

    own = ops.log_softmax_topk if of_log_softmax else ops.topk
    with deferred_checks():
        ours = context.watch.seconds(lambda: own(x, k))
    bare = context.watch.seconds(BareRowPass(x, k=k, log_softmax=of_log_softmax))
    theirs = context.watch.seconds(of_torch)
    context.report.figure(
        f"log_softmax + topk / log_softmax_topk {name}" if of_log_softmax else f"topk {name}",
        theirs / ours,
        "times torch's speed",
        None if of_log_softmax else ">= 3",
        microseconds={"operation": 1e6 * ours, "bare": 1e6 * bare, "torch": 1e6 * theirs},
        bare=theirs / bare,
    )


def _shape_name(shape: tuple[int, int], dtype: torch.dtype) -> str:
    return f"[{shape[0]}, {shape[1]}] {dtype_name(dtype)}"
