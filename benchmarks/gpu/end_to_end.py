"""Times of whole decodes: engine against baseline and prefill, and the readers on texts.

A model of BERT-base shape with random weights, float16, 64 questions with ten passages, inputs of
256 tokens. Weights are random, so answers end where they are told to. "six tokens": all have six,
by the least and the greatest length; the baseline, in plain Python, encoding anew, reads one or two
such questions, and its time is taken times 64. "4 to 6 tokens": `max_answer_tokens` is 32, and the
end token's logit is raised by 40 behind the token where a question's answer is to end. "prefill" is
`DeviceSession.prefill` alone.
"""

from __future__ import annotations

import functools
import random
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import fastmrc
from benchmarks.cases import BEAM_SIZE, END_ID
from benchmarks.gpu.context import Context
from benchmarks.gpu.models import make_tokenizer, recorded_steps
from benchmarks.gpu.timing import median_seconds, seconds_of, synchronize
from fastmrc import reference
from fastmrc.decoding import beam_search
from fastmrc.options import SearchOptions
from fastmrc.text import join_tokens
from fastmrc.types import SearchResult

SIX_TOKENS = SearchOptions(min_answer_tokens=6, max_answer_tokens=6, beam_size=BEAM_SIZE)
FOUR_TO_SIX = SearchOptions(min_answer_tokens=4, max_answer_tokens=32, beam_size=BEAM_SIZE)


def part_end_to_end(context: Context) -> None:
    """Engine against baseline and prefill; the readers' throughput."""
    from fastmrc.encoders.unilm import UniLMEncoder

    report, sizes = context.report, context.sizes
    model = _bert(context, "BertForMaskedLM", torch.float16)
    engine = Engine(context, UniLMEncoder(model), *_draw_questions(context))
    report.note("inputs", f"{sizes.batch} x {sizes.passages} x {sizes.input_tokens} tokens")
    lengths = torch.arange(sizes.batch, device=context.device) % 3 + 4
    with report.guard("six tokens"):
        seconds = _time_engine(engine, "six tokens", SIX_TOKENS, None)
        with report.guard("baseline"):
            _time_baseline(engine, model, seconds)
    with report.guard("4 to 6 tokens"):
        _time_engine(engine, "4 to 6 tokens", FOUR_TO_SIX, lengths)
    if not context.emulated:
        with report.guard("profile"):
            work = functools.partial(engine.search, SIX_TOKENS, None)
            report.note("kernels of one decode, six tokens", _kernel_times(context, work))
        report.note("GiB used", torch.cuda.max_memory_allocated(context.device) / 2**30)
    del engine
    _time_readers(context, model)


class EndingSession:
    """A session whose answers end after a number of tokens that is set for each question."""

    def __init__(self, session: Any, lengths: torch.Tensor) -> None:
        self._session, self._lengths = session, lengths
        self.device, self.rows = session.device, session.rows
        self._step = 0

    def prefill(self) -> torch.Tensor:
        self._step = 0
        logits: torch.Tensor = self._session.prefill()
        return logits

    def begin(self, passages: NDArray[np.int64]) -> tuple[Any, NDArray[np.int64]]:
        self._inputs, rows = self._session.begin(passages)
        return self._inputs, rows

    @torch.inference_mode()
    def step(self) -> torch.Tensor:
        self._step += 1
        logits: torch.Tensor = self._session.step()
        question = self._inputs.question_of.clamp(min=0).long()
        over = self._lengths[question] <= self._step
        logits[:, END_ID] += 40.0 * over.repeat_interleave(logits.shape[0] // len(over))
        return logits


@dataclass
class Engine:
    """The encoder of BERT-base shape and what it is asked."""

    context: Context
    encoder: Any
    questions: list[list[NDArray[np.int32]]]  # the passages of each
    rows: list[NDArray[np.int32]]  # the inputs of all passages

    def search(self, options: SearchOptions, lengths: torch.Tensor | None) -> list[SearchResult]:
        with self._session(options) as lent:
            return beam_search(
                lent if lengths is None else EndingSession(lent, lengths),
                self.questions,
                end_id=END_ID,
                vocabulary_size=self.encoder.vocabulary_size,
                options=options,
            ).results

    def prefill_seconds(self, options: SearchOptions) -> float:
        with self._session(options) as lent:
            return seconds_of(self.context.device, lent.prefill)

    def step_seconds(self, options: SearchOptions) -> float:
        """Return the time of one call of the encoder for all rows, with the LM head."""
        with self._session(options) as lent:
            lent.prefill()
            inputs, _ = lent.begin(np.arange(len(self.rows)))
            inputs.cache_columns.copy_(inputs.prefix + torch.arange(options.beam_size))
            for _ in range(3):  # records it, unless that was done
                lent.step()
            return median_seconds(self.context.device, lent.step, self.context.sizes.rounds)

    def _session(self, options: SearchOptions) -> AbstractContextManager[Any]:
        steps = options.max_answer_tokens - 1
        session = self.encoder.device_session(self.rows, steps, options.beam_size)
        lent: AbstractContextManager[Any] = session.lent()
        return lent


def _bert(context: Context, class_name: str, dtype: torch.dtype) -> Any:
    import transformers

    sizes = context.sizes
    torch.manual_seed(0)
    make_config: Any = transformers.BertConfig
    config = make_config(vocab_size=sizes.vocabulary, attn_implementation="sdpa", **sizes.model)
    model = getattr(transformers, class_name)(config).eval()
    return model.to(context.device, dtype)


def _draw_questions(
    context: Context,
) -> tuple[list[list[NDArray[np.int32]]], list[NDArray[np.int32]]]:
    """Draw passages and inputs as `benchmarks.end_to_end` does."""
    sizes = context.sizes
    rng = np.random.default_rng(0)
    least = min(1000, END_ID + 1)
    questions, rows = [], []
    for _ in range(sizes.batch):
        lengths = [sizes.question_tokens] + [sizes.context_tokens] * sizes.passages
        question, *passages = (
            rng.integers(least, sizes.vocabulary, n).astype(np.int32) for n in lengths
        )
        questions.append(passages)
        rows += [join_tokens([101], p, [END_ID], question, [END_ID]) for p in passages]
    return questions, rows


def _time_engine(
    engine: Engine, name: str, options: SearchOptions, lengths: torch.Tensor | None
) -> float:
    """Report the speed of the engine and return its seconds for the batch."""
    context, device = engine.context, engine.context.device
    seconds: dict[str, list[float]] = {"prefill": [], "decode": []}
    for _ in range(3):  # steps are recorded as graphs when a shape comes again
        results = engine.search(options, lengths)
    for _ in range(context.sizes.rounds):
        seconds["prefill"].append(engine.prefill_seconds(options))
        seconds["decode"].append(seconds_of(device, lambda: engine.search(options, lengths)))
    median = {key: statistics.median(values) for key, values in seconds.items()}
    report = context.report
    best = [result.best for result in results]
    counts = [0 if one is None else len(one.token_ids) for one in best]
    details = {
        "seconds": seconds,
        "answer tokens": {n: counts.count(n) for n in sorted(set(counts))},
        "graphs": recorded_steps(engine.encoder),
    }
    rate = context.sizes.batch / median["decode"]
    report.figure(f"{name}: engine", rate, "questions/s", None, **details)
    ratio = median["decode"] / median["prefill"]
    report.figure(f"{name}: whole decode / prefill", ratio, "", "<= 1.25", **median)
    report.figure(f"{name}: one encoder step", 1e3 * engine.step_seconds(options), "ms")
    return median["decode"]


def _time_baseline(engine: Engine, model: Any, engine_seconds: float) -> None:
    """Time the baseline on a few questions, and compare its answers."""
    context, sizes = engine.context, engine.context.sizes
    baseline = reference.ReencodingEncoder(model, end_id=END_ID)
    ours = engine.search(SIX_TOKENS, None)

    def read(q: int) -> SearchResult:
        rows = engine.rows[q * sizes.passages : (q + 1) * sizes.passages]
        return reference.beam_search(
            baseline.next_logits_for([row.tolist() for row in rows]),
            [passage.tolist() for passage in engine.questions[q]],
            end_id=END_ID,
            min_tokens=6,
            max_tokens=6,
            beam_size=BEAM_SIZE,
        )

    read(0)  # kernels are loaded and chosen
    seconds: list[float] = []
    same = 0
    for q in range(sizes.baseline):
        if seconds and not context.may_go_on(f"question {q} of the baseline"):
            break
        begin = time.perf_counter()
        theirs = read(q)
        seconds.append(time.perf_counter() - begin)
        both = [one and one.token_ids for one in (theirs.best, ours[q].best)]
        same += both[0] == both[1]
    of_batch = statistics.mean(seconds) * sizes.batch
    context.report.figure(
        "six tokens: engine / baseline",
        of_batch / engine_seconds,
        "times its speed",
        ">= 50",
        baseline_seconds_per_question=seconds,
        extrapolated_from=f"{len(seconds)} of {sizes.batch} questions",
        same_answers=f"{same} of {len(seconds)}: one rounds its LM head to float16, one does not",
    )


def _kernel_times(context: Context, work: Callable[[], Any]) -> list[dict[str, Any]]:
    """Return where the device's time goes, by kernel."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        work()
        synchronize(context.device)
    events = [e for e in profiled.key_averages() if str(e.device_type).endswith("CUDA")]
    events.sort(key=lambda e: -e.self_device_time_total)
    return [
        {"kernel": e.key[:120], "calls": e.count, "ms": round(e.self_device_time_total / 1e3, 3)}
        for e in events[:30]
    ]


def _time_readers(context: Context, model: Any) -> None:
    """Time the readers on texts, tokenising included."""
    from fastmrc.pretrained import LoadedModel

    sizes = context.sizes
    characters = "".join(chr(0x4E00 + i) for i in range(min(20902, sizes.vocabulary - 5)))
    tokenizer = make_tokenizer(characters, sizes.vocabulary)
    rng = random.Random(0)

    def text(count: int) -> str:
        return "".join(rng.choices(characters, k=count))

    questions = [
        (text(sizes.question_tokens), [text(sizes.context_tokens) for _ in range(sizes.passages)])
        for _ in range(sizes.batch)
    ]
    options: dict[str, dict[str, Any]] = {
        "Seq2SeqReader": {"min_answer_tokens": 6, "max_answer_tokens": 6},
        "MLMReader": {"max_answer_tokens": sizes.slots},
        "SpanReader": {},
    }
    for name, given in options.items():
        if context.may_go_on(name):
            with context.report.guard(name):
                if name == "SpanReader":
                    model = _bert(context, "BertForQuestionAnswering", torch.float16)
                reader = getattr(fastmrc, name)(LoadedModel(model, tokenizer, "none", "benchmark"))
                work = functools.partial(reader.answer_batch, questions, **given)
                work()
                work()
                rate = len(questions) / median_seconds(context.device, work, 3)
                name = f"{name}, texts, float16"
                context.report.figure(name, rate, "questions/s", options=given)
