"""What a part runs on and with: the device, the sizes, the time left."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import ParamSpec

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.cases import PASSAGES, VOCABULARY
from benchmarks.gpu.models import TINY
from benchmarks.gpu.report import Report
from benchmarks.gpu.timing import Watch

P = ParamSpec("P")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Sizes:
    """How much is checked and timed."""

    row_shapes: Sequence[tuple[int, int]] = (
        *((1, 1), (3, 5), (2, 33), (7, 4097), (2, 8191), (2, 8192), (3, 8193), (5, 21128)),
        (2, 151936),
    )
    vocabularies: Sequence[int] = (60, 21128)  # of beam steps, draws and slots
    questions: int = 48  # of the tiny readers
    packaged: int = 48  # questions of the packaged reader
    draws: int = 3  # of the random cases of operations
    drawn: int = 48  # texts
    kernel_shapes: Sequence[tuple[int, int]] = ((960, 21128), (64, 151936))
    topk: Sequence[int] = (1, 8, 32, 64)
    copied: int = 1 << 30  # bytes
    repeats: int = 50
    batch: int = 64  # questions
    passages: int = PASSAGES
    input_tokens: int = 256
    passage_tokens: int = 254  # of the beam step alone
    vocabulary: int = VOCABULARY
    rounds: int = 8
    baseline: int = 2  # questions
    model: dict[str, int] = field(default_factory=dict)  # what differs from BERT-base
    slots: int = 16

    @property
    def question_tokens(self) -> int:
        """How many of `input_tokens` are a question's, where texts and inputs are drawn."""
        return min(20, self.input_tokens // 4)

    @property
    def context_tokens(self) -> int:
        """How many are the passage's, beside the question's and three special ones."""
        return self.input_tokens - self.question_tokens - 3


FULL = Sizes()
QUICK = Sizes(
    row_shapes=((1, 1), (3, 5), (2, 8193)),
    vocabularies=(60,),
    questions=3,
    packaged=2,
    draws=1,
    drawn=3,
    kernel_shapes=((3, 9000), (2, 20000)),
    topk=(1, 8),
    copied=1 << 20,
    repeats=3,
    batch=3,
    passages=2,
    input_tokens=40,
    passage_tokens=20,
    vocabulary=1000,
    rounds=3,
    baseline=1,
    model=TINY,
    slots=4,
)


@dataclass
class Context:
    """What a part runs on and with."""

    device: torch.device
    emulated: bool
    quick: bool
    sizes: Sizes
    report: Report
    end: float  # of its time

    def may_go_on(self, name: str) -> bool:
        """Return whether there is time for one more thing; what there was none for is noted."""
        has_time = time.monotonic() < self.end
        if not has_time:
            self.report.note("left out", [*self.report.notes.get("left out", []), name])
        return has_time

    def attempt(
        self, name: str, work: Callable[P, None], *arguments: P.args, **options: P.kwargs
    ) -> None:
        """Do one more thing if there is time; let the rest go on if it fails."""
        if self.may_go_on(name):
            with self.report.guard(name):
                work(*arguments, **options)

    def do_all(self, steps: Sequence[Callable[[Context], None]]) -> None:
        """Do what there is time for, and note the seconds."""
        spent: dict[str, float] = {}
        for step in steps:
            name = step.__name__.strip("_")
            if self.may_go_on(name):
                begin = time.monotonic()
                with self.report.guard(name):
                    step(self)
                spent[name] = round(time.monotonic() - begin, 1)
                self.report.note("seconds", spent)

    @functools.cached_property
    def watch(self) -> Watch:
        return Watch(self.device, self.sizes.repeats)

    def normal(self, *shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
        """Return standard-normal numbers on the device."""
        generator = torch.Generator(self.device).manual_seed(seed)
        return torch.randn(shape, generator=generator, device=self.device, dtype=dtype)

    def passages(self) -> list[list[NDArray[np.int32]]]:
        """Draw the passages of each question, as `benchmarks.cases.passages`."""
        sizes = self.sizes
        different = min(800, sizes.vocabulary // 2)
        weights = 1.0 / np.arange(1, different + 1)
        rng = np.random.default_rng(1)
        shape = sizes.batch, sizes.passages, sizes.passage_tokens
        drawn = rng.choice(different, shape, p=weights / weights.sum())
        first = min(1000, sizes.vocabulary - different)
        return [list((first + own).astype(np.int32)) for own in drawn]


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
