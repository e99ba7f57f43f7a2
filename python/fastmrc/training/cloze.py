"""Training of the cloze reader: questions of a data set and others made from texts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import set_seed

from fastmrc.cloze.bilstm import BiLSTMEncoder
from fastmrc.cloze.documents import BLANK, ClozeDocument, cut_text, is_cloze_file, read_cloze
from fastmrc.cloze.encoder import ClozeEncoder, ClozeRow
from fastmrc.cloze.model import cloze_settings, load_cloze_encoder, save_cloze_encoder
from fastmrc.cloze.questions import draw_blanks
from fastmrc.cloze.reader import ClozeReader
from fastmrc.cloze.transformer import TransformerEncoder
from fastmrc.cloze.words import is_noun_like
from fastmrc.corpus import corpus_texts, searched_texts
from fastmrc.data import DataIssue, StrPath
from fastmrc.errors import InputError
from fastmrc.metrics import score_accuracy
from fastmrc.pretrained import load_base, packaged_model_path
from fastmrc.training.batches import permutation
from fastmrc.training.job import (
    DataSummary,
    base_name,
    num_steps,
    require_packages,
    training_device,
)
from fastmrc.training.options import ClozeOptions, TrainingOptions
from fastmrc.training.word_vectors import learn_vectors

__all__ = ["ClozeBatches", "ClozeJob", "ClozeSource", "cloze_targets"]

# Batches that are drawn together and cut by length, so that little of a batch is padding.
_CHUNK = 16
_TRIES = 1000
# Words between two blanks of a document.
_DISTANCE = 8


class ClozeSource:
    """Documents with a blank and its answer, and texts of which questions are made.

    Attributes
    ----------
    documents
        With one blank each and its answer.
    texts
        In words.
    """

    def __init__(self) -> None:
        self.documents: list[ClozeDocument] = []
        self.texts: list[tuple[str, ...]] = []

    def read(self, data: Sequence[StrPath], summary: DataSummary) -> None:
        """Read files; what no question can be made of is left out."""
        issues = summary.issues
        for path in data:
            if is_cloze_file(path):
                for document in read_cloze(path, on_error=issues.append):
                    if len(document.blanks) != 1 or not document.answer:
                        got = f"{len(document.blanks)} and the answer {document.answer!r}"
                        message = f"expected one blank and its answer, got {got}"
                        issues.append(DataIssue(document.place, None, message))
                    elif document.answer in document.words:
                        self.documents.append(document)
                    else:
                        summary.not_found.append(document.id)
                continue
            for text in corpus_texts([path], on_error=issues.append, of_record=searched_texts):
                words = tuple(cut_text(text))
                if draw_blanks(words, 1, np.random.default_rng(0)):
                    self.texts.append(words)
        summary.questions = summary.answered = len(self.documents)
        summary.passages = len(self.texts)

    def all_texts(self) -> list[tuple[str, ...]]:
        """Return the words of all texts and documents, answers in the place of blanks."""
        return [*self.texts, *(_whole(document) for document in self.documents)]


def _whole(document: ClozeDocument) -> tuple[str, ...]:
    return tuple(document.answer if word == BLANK else word for word in document.words)


def cloze_targets(
    rows: Sequence[ClozeRow], ids: Sequence[NDArray[np.int32]]
) -> NDArray[np.float32]:
    """Return the shares of attention that the positions of rows should get.

    Parameters
    ----------
    rows
        Inputs.
    ids
        Of each row: which word stands at each position of its document, int32 [words], the answers
        at the blanks.

    Returns
    -------
    numpy.ndarray
        float32 [blanks of all rows, most positions]: the occurrences of the answer have equal
        shares; 0 in a line whose answer is at no position.
    """
    most = max(len(row.positions) for row in rows)
    targets = np.zeros((sum(len(row.blanks) for row in rows), most), np.float32)
    line = 0
    for row, own in zip(rows, ids, strict=True):
        for blank in row.blanks:
            same = own[row.positions] == own[blank]
            targets[line, : len(same)] = same / max(1, int(same.sum()))
            line += 1
    return targets


class ClozeBatches(torch.utils.data.Dataset[dict[str, Any]]):
    """Batches by number, from 0: a pure function of the seed and the number.

    Parameters
    ----------
    source
        What questions are drawn from.
    encoder
        Makes its inputs.
    options
        Of the run.
    count
        Number of batches.
    """

    def __init__(
        self, source: ClozeSource, encoder: ClozeEncoder, options: TrainingOptions, count: int
    ) -> None:
        self._source = source
        self._encoder = encoder
        self._options = options
        self._count = count
        self._chunk: tuple[int, list[list[tuple[ClozeRow, NDArray[np.int32], str]]]] = (-1, [])
        # Each as often as documents repeat it.
        self._nouns = [
            word
            for words in source.all_texts()
            for word, count in Counter(words).items()
            if count > 1 and is_noun_like(word)
        ]

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, number: int) -> dict[str, Any]:
        chunk, place = divmod(number, _CHUNK)
        if self._chunk[0] != chunk:
            self._chunk = (chunk, self._draw_chunk(chunk))
        rows, ids, names = zip(*self._chunk[1][place], strict=True)
        return {
            "objective": "cloze",
            "rows": list(rows),
            "targets": torch.from_numpy(cloze_targets(rows, ids)),
            "ids": list(names),
        }

    def _draw_chunk(self, chunk: int) -> list[list[tuple[ClozeRow, NDArray[np.int32], str]]]:
        rng = np.random.default_rng([self._options.seed, chunk])
        size = self._options.batch_size
        numbers = range(chunk * _CHUNK * size, (chunk + 1) * _CHUNK * size)
        examples = [self._example(n, rng) for n in numbers]
        examples.sort(key=lambda example: len(example[0].tokens))
        batches = [examples[b : b + size] for b in range(0, len(examples), size)]
        return [batches[i] for i in rng.permutation(len(batches))]

    def _example(
        self, number: int, rng: np.random.Generator
    ) -> tuple[ClozeRow, NDArray[np.int32], str]:
        """Draw a question; where the part of a text that an input holds has none, of another."""
        for attempt in range(_TRIES):
            words, taken, name = self._draw(number if attempt == 0 else None, rng)
            if rng.random() < self._options.cloze_reader.rename_share:
                words, taken = self._renamed(words, taken, rng)
            around = taken or draw_blanks(words, 1, rng)
            if not around:
                continue
            centre = next(iter(around))
            start, stop = self._encoder.crop(words, centre)
            part = words[start:stop]
            own = {i - start: answer for i, answer in taken.items()}
            blanks = draw_blanks(
                part,
                self._options.cloze_reader.blanks_at_once,
                rng,
                taken=own,
                distance=_DISTANCE,
            )
            if blanks:
                return self._made(part, blanks, name)
        raise InputError(
            f"data: expected documents in which a noun-like word occurs twice near enough for an "
            f"input, got none in {_TRIES} draws"
        )

    def _renamed(
        self, words: Sequence[str], taken: dict[int, str], rng: np.random.Generator
    ) -> tuple[Sequence[str], dict[int, str]]:
        """Put other words in the place of half of the repeated noun-like ones, everywhere in the
        document: who does what is to be read there, not remembered."""
        counts = Counter([*words, *taken.values()])
        new = {}
        for word in counts:
            if word != BLANK and counts[word] > 1 and rng.random() < 0.5 and is_noun_like(word):
                other = self._nouns[int(rng.integers(len(self._nouns)))]
                if other not in counts:
                    new[word] = other
        renamed = [new.get(word, word) for word in words]
        return renamed, {i: new.get(word, word) for i, word in taken.items()}

    def _made(
        self, words: Sequence[str], blanks: dict[int, str], name: str
    ) -> tuple[ClozeRow, NDArray[np.int32], str]:
        full = [blanks.get(i, word) for i, word in enumerate(words)]
        (row,) = self._encoder.rows(full, sorted(blanks))
        return row, self._encoder.word_ids(full), name

    def _draw(
        self, number: int | None, rng: np.random.Generator
    ) -> tuple[Sequence[str], dict[int, str], str]:
        """Return words, perhaps a blank with its answer, and a name."""
        documents, texts = self._source.documents, self._source.texts
        labelled = rng.random() < self._options.cloze_reader.labelled_share
        if documents and (labelled or not texts):
            index = self._nth(0, number, len(documents), rng)
            document = documents[index]
            if rng.random() < 0.5:  # its own question, else others on the same text
                return document.words, {document.blanks[0]: document.answer}, document.id
            return _whole(document), {}, document.id
        index = self._nth(1, number, len(texts), rng)
        return texts[index], {}, f"text {index}"

    def _nth(self, stream: int, number: int | None, size: int, rng: np.random.Generator) -> int:
        if number is None:
            return int(rng.integers(size))
        epoch, place = divmod(number, size)
        return int(permutation(self._options.seed, stream, epoch, size)[place])


class ClozeJob:
    """A job (`fastmrc.training.job.Job`) for either encoder; arguments as for `train`."""

    def __init__(
        self,
        base: StrPath | None,
        data: Sequence[StrPath],
        held_out: StrPath | None,
        options: TrainingOptions,
        device: str | None,
    ) -> None:
        own = options.cloze_reader
        packages = ("accelerate", "jieba") + (("gensim",) if own.encoder == "bilstm" else ())
        require_packages("train", packages, "train,cloze")
        set_seed(options.seed)
        self._options = options
        settings = None if base is None else cloze_settings(Path(base))
        self._packaged = base is None or (settings or {}).get("body") == "packaged"
        self._goes_on = base is not None
        self.summary = DataSummary()
        source = ClozeSource()
        source.read(data, self.summary)
        if not source.documents and not source.texts:
            raise InputError(
                f"data: expected questions with answers or texts in which a noun-like word occurs "
                f"twice, got none, {len(self.summary.not_found)} questions whose answer is not in "
                f"the document and {len(self.summary.issues)} records that cannot be used"
            )
        held = None if held_out is None else self._held_out(held_out)
        self.model: ClozeEncoder
        self.missing: tuple[str, ...] = ()  # of the base; what is new is meant to be
        if own.encoder == "bilstm":
            if base is not None:
                raise InputError("base: expected none for a bilstm, whose vectors are learned")
            self.model = _bilstm(source, options)
            self.base = "none"
        else:
            self.model = _transformer(base, options)
            self.base = "the packaged reader" if base is None else base_name(base)
        self.model.to(training_device(device))
        examples = len(source.documents) + len(source.texts)
        count = num_steps(options, examples, options.batch_size)
        self.batches = ClozeBatches(source, self.model, options, count)
        self.score = None if held is None else lambda: self._accuracy(held)
        self.inputs = (f"documents with blanks, as a {own.encoder} (`ClozeReader`)",)

    def _held_out(self, path: StrPath) -> list[ClozeDocument]:
        found = list(read_cloze(path, on_error=self.summary.issues.append))
        held = [document for document in found if document.answer]
        if not held:
            raise InputError(f"held_out: expected questions with answers, got none in {path}")
        return held[: self._options.eval_questions]

    def _accuracy(self, held: Sequence[ClozeDocument]) -> dict[str, float]:
        self.model.eval()
        answers = ClozeReader(self.model).fill_batch(held, top_words=1)
        self.model.train()
        right = [
            score_accuracy(answer.text, [document.answer]).values["accuracy"]
            for answer, document in zip(answers, held, strict=True)
        ]
        accuracy = 100 * sum(right) / len(right)
        return {"accuracy": accuracy, "score": accuracy}

    def initialize(self) -> None:
        """Nothing is left to be set."""

    def save(self, directory: Path) -> None:
        own = self._options.cloze_reader
        layers = own.train_layers if self._packaged else None
        if layers is not None and self._goes_on:
            # Layers that are not trained here may have been changed before.
            layers = self.model.settings()["layers"]
        save_cloze_encoder(self.model.eval(), directory, layers=layers)


def _bilstm(source: ClozeSource, options: TrainingOptions) -> BiLSTMEncoder:
    own = options.cloze_reader
    words, vectors = learn_vectors(
        source.all_texts(), own.dimension, min_count=own.min_count, seed=options.seed
    )
    return BiLSTMEncoder(words, vectors, hidden=own.hidden, depth=own.depth, match=own.match)


def _transformer(base: StrPath | None, options: TrainingOptions) -> TransformerEncoder:
    own: ClozeOptions = options.cloze_reader
    encoder: ClozeEncoder
    if base is not None and cloze_settings(Path(base)) is not None:
        encoder = load_cloze_encoder(base)
        if not isinstance(encoder, TransformerEncoder):
            raise InputError(f"base: expected a transformer, got a {encoder.kind} in '{base}'")
        encoder.train().requires_grad_(True)
    else:
        path = packaged_model_path() if base is None else base
        loaded = load_base(path if isinstance(path, str) else Path(path), device="cpu")
        loaded.model.set_attn_implementation("sdpa")  # no attention weights are asked for
        encoder = TransformerEncoder(loaded, own.max_tokens, layers=own.layers)
    for module in encoder.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = options.dropout
    if own.train_layers is not None:
        encoder.body.requires_grad_(False)
        upper = tuple(encoder.upper_layers(own.train_layers))
        for name, weight in encoder.named_parameters():
            weight.requires_grad_(name.startswith(("pointer.", *upper)))
    return encoder
