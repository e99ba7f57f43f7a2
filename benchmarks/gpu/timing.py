"""Time of the device, and of the host.

Device time is taken between CUDA events, the device being kept busy while the host enqueues. Before
each call the L2 cache is overwritten, and then filled by reading, so that what was written is not
written back at the cost of the kernel; "left dirty" is without that reading.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any, Literal

import torch

Cache = Literal["clean", "dirty", "as it is"]


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(device: torch.device, work: Callable[[], Any]) -> float:
    """Return the seconds until the device has done some work, on the host's clock."""
    synchronize(device)
    begin = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - begin


def median_seconds(device: torch.device, work: Callable[[], Any], rounds: int) -> float:
    return statistics.median(seconds_of(device, work) for _ in range(rounds))


def host_seconds(device: torch.device, work: Callable[[], Any]) -> float:
    """Return what the host takes to enqueue a call."""
    synchronize(device)
    begin = time.perf_counter()
    for _ in range(5):
        work()
    seconds = (time.perf_counter() - begin) / 5
    synchronize(device)
    return seconds


class Watch:
    """Times work on the device; on the host, where there is none, by the clock.

    Parameters
    ----------
    device
        Whose time is taken.
    repeats
        How often, for a median.
    """

    # About a millisecond, in which the host enqueues what is timed.
    _BUSY_CYCLES = 2_000_000
    _L2_BYTES = 50 << 20  # if torch does not say

    def __init__(self, device: torch.device, repeats: int) -> None:
        self._device, self._repeats = device, repeats
        self.l2_bytes = 1 << 16
        if device.type == "cuda":
            properties = torch.cuda.get_device_properties(device)
            self.l2_bytes = int(getattr(properties, "L2_cache_size", 0)) or self._L2_BYTES
        self._written, self._read = (
            torch.zeros(2 * self.l2_bytes // 4, dtype=torch.int32, device=device) for _ in range(2)
        )
        begin = time.perf_counter()
        while device.type == "cuda" and time.perf_counter() - begin < 0.5:  # clocks rise
            self.flush("clean")
            synchronize(device)

    def flush(self, cache: Cache) -> None:
        """Put the L2 cache into a state."""
        if cache == "as it is":
            return
        self._written.add_(1)
        if cache == "clean":
            self._read.max()

    def seconds(
        self,
        work: Callable[[], Any],
        cache: Cache = "clean",
        before: Callable[[], Any] | None = None,
        calls: int = 1,
    ) -> float:
        """Return the median time of a call; `work` makes `calls` of them, `before` is not timed."""
        times = []
        for i in range(self._repeats + 3):
            if before is not None:
                before()
            self.flush(cache)
            pair = self._time(work)
            if i >= 3:  # the first ones load and allocate
                times.append(pair)
        synchronize(self._device)
        return statistics.median(pair() for pair in times) / calls

    def _time(self, work: Callable[[], Any]) -> Callable[[], float]:
        """Do the work; what is returned gives its seconds, after a synchronization."""
        if self._device.type != "cuda":
            taken = seconds_of(self._device, work)
            return lambda: taken
        event: Any = torch.cuda.Event
        begin, end = (event(enable_timing=True) for _ in range(2))
        self._keep_busy()
        begin.record()
        work()
        end.record()
        return lambda: begin.elapsed_time(end) / 1e3

    def _keep_busy(self) -> None:
        sleep = getattr(torch.cuda, "_sleep", None)
        if sleep is not None:
            sleep(self._BUSY_CYCLES)
            return
        for _ in range(8):
            self._read.max()
