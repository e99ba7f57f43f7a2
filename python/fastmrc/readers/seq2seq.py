"""The native UniLM seq2seq reader: several passages, one answer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

from tqdm import tqdm

from fastmrc.cuda.runtime import has_kernels
from fastmrc.decoding import BatchResult, beam_search
from fastmrc.encoders.batches import return_freed_memory
from fastmrc.encoders.device import tokens_that_fit
from fastmrc.encoders.unilm import UniLMEncoder
from fastmrc.options import SearchOptions
from fastmrc.pretrained import LoadedModel
from fastmrc.readers.base import PreparedQuestion
from fastmrc.readers.beam import BeamReader, Decoded
from fastmrc.types import SearchResult

__all__ = ["Seq2SeqReader"]

# Input tokens decoded together, padding included: a step costs about one read of the weights
# however many rows share it, and BERT-base keeps 74 kB of float32 keys and values per token.
_GROUP_TOKENS = 8192
# The same on a GPU whose memory holds them: 64 questions with ten passages of 256 tokens at once.
_GPU_GROUP_TOKENS = 1 << 18
_MOST_ROWS = 65_535  # of an attention kernel, by CUDA's limit of a grid


class Seq2SeqReader(BeamReader):
    """UniLM reader that decodes one answer over several passages, on the native engine.

    The passages vote on every token (the multi-passage reading comprehension example of bert4keras,
    kexue.fm/archives/7809 describes the vote); the input of each passage is encoded once.
    `fastmrc.reference.Seq2SeqReader` gives the same answers in plain Python. May be used from
    several threads.
    """

    def __init__(self, loaded: LoadedModel) -> None:
        super().__init__(loaded)
        self._encoder = UniLMEncoder(loaded.model)
        self._encoder.check(self._codec.sep_id)

    def _decode(
        self, questions: Sequence[PreparedQuestion], options: SearchOptions, progress: bool
    ) -> list[Decoded]:
        decoded = [
            Decoded(SearchResult(None, [], [], [], []), 0.0, 0.0) for _ in questions
        ]  # of questions without windows
        with tqdm(total=len(questions), disable=not progress, unit="question") as bar:
            for group in _groups(questions, self._group_tokens()):
                batch = self._search([questions[i] for i in group], options)
                for i, result in zip(group, batch.results, strict=True):
                    decoded[i] = Decoded(
                        result,
                        batch.encode_seconds / len(group),
                        batch.decode_seconds / len(group),
                    )
                bar.update(len(group))
                if len(questions) > 1:
                    return_freed_memory()
            bar.update(len(questions) - bar.n)
        return decoded

    def _search(self, questions: Sequence[PreparedQuestion], options: SearchOptions) -> BatchResult:
        rows = [window.input_ids for question in questions for window in question.windows]
        weights = [question.window_weights() for question in questions]
        shape = rows, options.max_answer_tokens - 1, options.beam_size
        search = partial(
            beam_search,
            questions=[[window.text.token_ids for window in q.windows] for q in questions],
            end_id=self._codec.sep_id,
            vocabulary_size=self._vocabulary_size,
            options=options,
            weights=weights if options.vote == "weighted" else None,
            constraints=[question.constraint for question in questions],
        )
        if has_kernels(self._encoder.device):
            with self._encoder.device_session(*shape).lent() as session:
                return search(session)
        return search(self._encoder.session(*shape))

    def _group_tokens(self) -> int:
        """Return how many input tokens are decoded together."""
        device = self._encoder.device
        if device.type != "cuda" or not has_kernels(device):
            return _GROUP_TOKENS
        return max(_GROUP_TOKENS, min(_GPU_GROUP_TOKENS, tokens_that_fit(self._encoder)))


def _groups(questions: Sequence[PreparedQuestion], most_tokens: int) -> Iterator[list[int]]:
    """Yield questions of similar length, at most `most_tokens` input tokens together."""
    lengths = [[len(window.input_ids) for window in q.windows] for q in questions]
    order = sorted((i for i, n in enumerate(lengths) if n), key=lambda i: -max(lengths[i]))
    group: list[int] = []
    rows = longest = 0
    for i in order:
        more = rows + len(lengths[i])
        if group and (more * longest > most_tokens or more > _MOST_ROWS):
            yield group
            group, rows = [], 0
        if not group:
            longest = max(lengths[i])  # of all that follow, too
        group.append(i)
        rows += len(lengths[i])
    if group:
        yield group
