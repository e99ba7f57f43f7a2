"""The beam search whose state stays on the device: the host enqueues and looks a step behind."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from fastmrc import _C
from fastmrc.constraints import Automaton, SpanIndex, native_automata
from fastmrc.cuda.automata import DeviceAutomata
from fastmrc.cuda.runtime import current, kernels, no_fault, raise_fault, stream_of
from fastmrc.encoders.batches import to_device
from fastmrc.readers.voting import voting_windows
from fastmrc.types import Hypothesis, SearchResult

if TYPE_CHECKING:
    from fastmrc.decoding import DeviceLogitsSource
    from fastmrc.encoders.device import StepInputs
    from fastmrc.options import SearchOptions

__all__ = ["search_on_device"]


def search_on_device(
    source: DeviceLogitsSource,
    questions: Sequence[Sequence[Sequence[int] | NDArray[np.int32]]],
    *,
    end_id: int,
    vocabulary_size: int,
    options: SearchOptions,
    weights: NDArray[np.float32] | None,
    constraints: Sequence[Automaton | None],
) -> tuple[list[SearchResult], float, float]:
    """Search the answers to a batch of questions; see `fastmrc.decoding.beam_search`.

    The arguments are checked already. The host waits for the device after step 0, when passages
    leave, and at the end; in between it looks at which questions still go on one step behind, so
    that the device never waits for it. Tokens are not looked ahead to.

    Returns
    -------
    results, encode_seconds, decode_seconds
        The first seconds are those until the passages are encoded, the others all that follow.
    """
    begin = time.perf_counter()
    with current(source.device):
        search = _Search(source, questions, end_id, vocabulary_size, options, weights)
        logits = source.prefill()
        search.read_first(logits)
        search.build_indices(constraints)  # of all passages, while the device encodes them
        search.choose_passages()
        encoded = time.perf_counter()
        if search.active.any():
            search.constrain(constraints)
            search.set_inputs(*source.begin(search.passages))
            search.step(logits, 0)
            del logits
            _go_on(search, source, options.max_answer_tokens)
        results = search.results()
    return results, encoded - begin, time.perf_counter() - encoded


def _go_on(search: _Search, source: DeviceLogitsSource, max_tokens: int) -> None:
    """Enqueue the steps after step 0 until no question goes on."""
    for t in range(1, max_tokens):
        search.step(source.step(), t)
        live = search.live_before(t)
        if not live.any():
            return
        if t + 2 < max_tokens and search.is_worth_dropping(live):
            search.keep(live)
            search.set_inputs(*source.begin(search.passages))
            search.prepare(t)


class _Search:
    """The state of one search, and what the host knows of it."""

    def __init__(
        self,
        source: DeviceLogitsSource,
        questions: Sequence[Sequence[Sequence[int] | NDArray[np.int32]]],
        end_id: int,
        vocabulary_size: int,
        options: SearchOptions,
        weights: NDArray[np.float32] | None,
    ) -> None:
        self._device = device = source.device
        self._questions = questions
        self._options = options
        self._weights = weights
        self._offsets = np.cumsum([0] + [len(passages) for passages in questions])
        self._of_passage = np.repeat(np.arange(len(questions)), np.diff(self._offsets))
        count, beams, steps = len(questions), options.beam_size, options.max_answer_tokens
        rows = max(source.rows, len(self._of_passage)) * beams
        native = kernels()
        self._state = torch.empty(
            native.beams_items(count, beams, steps), dtype=torch.int32, device=device
        )
        bytes_ = native.BeamSearch.workspace_bytes(
            count, beams, vocabulary_size, options.finish, rows
        )
        self._fault = no_fault(device)
        self._limits = vocabulary_size, end_id

        def zeros(items: int) -> torch.Tensor:
            return torch.zeros(items, dtype=torch.uint8, device=device)

        self._native: Any = native.BeamSearch(
            questions=count,
            slots=beams,
            steps=steps,
            vocabulary_size=vocabulary_size,
            end_id=end_id,
            min_tokens=options.min_answer_tokens,
            vote=options.vote,
            finish=options.finish,
            length_penalty=options.length_penalty,
            rows=rows,
            state=self._state,
            ancestors=zeros(2 * count * beams * beams * steps),
            zeros=zeros(count),
            fault=self._fault,
            workspace=zeros(bytes_),
        )
        self._progress = _Progress(device, count)

    @property
    def _stream(self) -> int:
        return stream_of(self._device)

    # --- step 0 ----------------------------------------------------------------------------------

    def read_first(self, logits: torch.Tensor) -> None:
        """Enqueue the test which passages hold no answer."""
        passages = len(self._of_passage)
        self._surviving = torch.empty(passages, dtype=torch.uint8, device=self._device)
        self._no_answer = torch.empty(passages, dtype=torch.float64, device=self._device)
        self._native.first_step(
            logits=logits,
            surviving=self._surviving,
            no_answer=self._no_answer,
            stream=self._stream,
        )

    def build_indices(self, constraints: Sequence[Automaton | None]) -> None:
        """Index the passages of each question that its mode constrains to them."""
        extractive = self._options.mode == "extractive"
        self._indices = [
            SpanIndex(passages)._native if extractive and constraint is None else None
            for passages, constraint in zip(self._questions, constraints, strict=True)
        ]

    def choose_passages(self) -> None:
        """Wait for the test; leave the passages that vote."""
        found = torch.cat(
            [self._no_answer.view(torch.int64), self._surviving.to(torch.int64), self._fault]
        ).cpu()
        raise_fault(int(found[-1]), "logits", *self._limits)
        number = len(self._of_passage)
        self._no_answers: NDArray[np.float64] = found[:number].view(torch.float64).numpy()
        self._survivors: NDArray[np.bool_] = found[number:-1].numpy().astype(bool)
        self._votes = np.zeros(number, dtype=bool)
        for first, last in zip(self._offsets[:-1], self._offsets[1:], strict=True):
            own = slice(first, last)
            survivors = self._survivors[own].tolist()
            weights = np.ones(len(survivors)) if self._weights is None else self._weights[own]
            ratio = self._options.no_answer_ratio
            for i in voting_windows(
                survivors, self._no_answers[own].tolist(), weights.tolist(), ratio
            ):
                self._votes[first + i] = survivors[i]
        self.passages: NDArray[np.int64] = np.flatnonzero(self._votes)
        self.active = np.zeros(len(self._questions), dtype=bool)
        self.active[self._of_passage[self.passages]] = True

    def constrain(self, constraints: Sequence[Automaton | None]) -> None:
        """Hand over the voting passages, the constraints and the first state."""
        given = native_automata("constraints", constraints, len(self._questions))
        automata = DeviceAutomata.of(self._automata(given), self._device)
        self._first = np.searchsorted(self._of_passage[self.passages], np.arange(len(given) + 1))
        weights = None
        if self._weights is not None:
            weights = self._to_device(self._weights[self.passages])
        self._native.set_passages(
            passages=len(self.passages),
            first_passage=self._to_device(self._first.astype(np.int64)),
            first_rows=self._to_device(self.passages),
            weights=weights,
            automata=automata.native,
            automaton_of=automata.automaton_of,
            all_constrained=automata.all_constrained,
        )
        self._voters = self.passages
        self._state.copy_(self._to_device(self._first_state()))

    def _automata(self, given: Sequence[_C.Automaton | None]) -> list[_C.Automaton | None]:
        """Return the automaton of each question."""
        automata = list(given)
        for q, index in enumerate(self._indices):
            if index is None or not self.active[q]:
                continue
            own = slice(self._offsets[q], self._offsets[q + 1])
            if not self._votes[own].all():  # fewer passages than were indexed
                pairs = zip(self._questions[q], self._votes[own], strict=True)
                index = SpanIndex([passage for passage, votes in pairs if votes])._native
            automata[q] = index
        some = next((a for a in automata if a is not None), None)
        # One that is done is not looked at, but counts as constrained.
        return [a if self.active[q] else some for q, a in enumerate(automata)]

    def _first_state(self) -> NDArray[np.int32]:
        """Return csrc/cuda/beam_search.h's arrays before step 0."""
        questions, beams = len(self._questions), self._options.beam_size
        state = np.zeros(len(self._state), dtype=np.int32)
        state[:questions] = self.active
        state[2 * questions : 3 * questions] = -1  # best
        slots = questions * beams
        sizes = len(state) - 3 * slots - questions
        state[sizes : sizes + questions] = beams
        state[-slots:] = -1  # nodes
        return state

    # --- the loop --------------------------------------------------------------------------------

    def set_inputs(self, inputs: StepInputs, rows: NDArray[np.int64]) -> None:
        """Let the kernels write the inputs of the encoder, whose rows `self.passages` have."""
        row_of = np.zeros(len(self._of_passage), dtype=np.int64)
        row_of[self.passages] = rows
        question_of = np.full(inputs.rows, -1, dtype=np.int32)
        question_of[rows] = self._of_passage[self.passages]
        inputs.question_of.copy_(self._to_device(question_of))
        self._rows = len(rows)
        self._native.set_inputs(
            passage_row=self._to_device(row_of[self._voters] * self._options.beam_size),
            **inputs.arguments(),
        )

    def step(self, logits: torch.Tensor, t: int) -> None:
        """Enqueue step `t`."""
        self._native.step(logits=logits, t=t, stream=self._stream)
        self._progress.note(self._state[: len(self._questions)], t)

    def prepare(self, t: int) -> None:
        """Write the inputs of step `t` again, for the present rows."""
        self._native.prepare(t=t, stream=self._stream)

    def live_before(self, t: int) -> NDArray[np.bool_]:
        """Return which questions went on after step `t` - 1."""
        return self._progress.read(t - 1) > 0

    def is_worth_dropping(self, live: NDArray[np.bool_]) -> bool:
        """Return whether at most half of the rows belong to questions that go on."""
        return 2 * int(live[self._of_passage[self.passages]].sum()) <= self._rows

    def keep(self, live: NDArray[np.bool_]) -> None:
        """Leave the passages of these questions."""
        self.passages = self.passages[live[self._of_passage[self.passages]]]

    # --- results ---------------------------------------------------------------------------------

    def results(self) -> list[SearchResult]:
        """Wait for the device and read what was found."""
        questions, beams = len(self._questions), self._options.beam_size
        steps = self._options.max_answer_tokens
        if not self.active.any():
            return [self._result(q, None, []) for q in range(questions)]
        length = 3 * questions + (3 + 2 * steps) * questions * beams
        state = torch.cat([self._state[:length], self._fault.view(torch.int32)]).cpu().numpy()
        raise_fault(int(state[-2:].view(np.int64)[0]), "logits", *self._limits)
        _, entries, best = state[: 3 * questions].reshape(3, questions)
        rest = state[3 * questions : length]
        of_entries = rest[: 3 * questions * beams].reshape(3, questions, beams)
        nodes, finished = of_entries[0], of_entries[1]
        scores = of_entries[2].view(np.float32)
        tokens, parents = rest[3 * questions * beams :].reshape(2, questions, steps * beams)
        results = []
        for q in range(questions):
            found = [
                Hypothesis(_path(tokens[q], parents[q], n), float(s), bool(f))
                for n, s, f in zip(
                    nodes[q, : entries[q]].tolist(),
                    scores[q, : entries[q]],
                    finished[q],
                    strict=False,
                )
            ]
            chosen = found[best[q]] if best[q] >= 0 else None
            results.append(self._result(q, chosen, sorted(found, key=lambda h: -h.score)))
        return results

    def _result(
        self, question: int, best: Hypothesis | None, hypotheses: list[Hypothesis]
    ) -> SearchResult:
        own = slice(self._offsets[question], self._offsets[question + 1])
        of_passages = (self._survivors, self._votes, self._no_answers)
        return SearchResult(best, hypotheses, *(values[own].tolist() for values in of_passages))

    def _to_device(self, array: NDArray[Any]) -> torch.Tensor:
        return to_device(array, self._device)


class _Progress:
    """How many hypotheses the questions have, read without holding the device up."""

    def __init__(self, device: torch.device, questions: int) -> None:
        self._on_gpu = device.type == "cuda"
        self._copies = [
            torch.empty(questions, dtype=torch.int32, pin_memory=self._on_gpu) for _ in range(2)
        ]
        self._events = [torch.Event(device) for _ in range(2)] if self._on_gpu else []

    def note(self, hypotheses: torch.Tensor, t: int) -> None:
        """Enqueue a copy of what step `t` left."""
        self._copies[t % 2].copy_(hypotheses, non_blocking=True)
        if self._on_gpu:
            self._events[t % 2].record()

    def read(self, t: int) -> NDArray[np.int32]:
        """Return what step `t` left; the step after it may still run."""
        if self._on_gpu:
            self._events[t % 2].synchronize()
        copy: NDArray[np.int32] = self._copies[t % 2].numpy()
        return copy


def _path(tokens: NDArray[np.int32], parents: NDArray[np.int32], node: int) -> list[int]:
    path = []
    while node >= 0:
        path.append(int(tokens[node]))
        node = int(parents[node])
    return path[::-1]
