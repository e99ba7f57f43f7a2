"""Equality of the readers: each in float32 on the device and on the CPU path."""

from __future__ import annotations

import functools
import random
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

import fastmrc
from benchmarks.gpu.context import Context
from benchmarks.gpu.device import on_host
from benchmarks.gpu.models import CHARACTERS, random_bilstm, recorded_steps, save_tiny
from benchmarks.gpu.report import Check
from fastmrc import Answer, Trie
from fastmrc.cloze.reader import ClozeAnswer, ClozeReader

Questions = list[tuple[str, list[str]]]
MLM_SETTINGS: tuple[dict[str, Any], ...] = (
    {"decoding": "greedy"},
    {"decoding": "exact"},
    {"decoding": "exact", "top_k": 3, "vote": "mean"},
    {"mode": "generative", "max_answer_tokens": 5},
    {"min_answer_tokens": 2, "no_answer_ratio": 3.0},
)
SPAN_SETTINGS: tuple[dict[str, Any], ...] = (
    {"top_k": 1},
    {"top_k": 5, "vote": "max"},
    {"align_to_words": False, "handle_impossible_answer": True},
    {"max_passage_tokens": 25, "stride": 10},
)


def part_readers(context: Context) -> None:
    """Every reader against the CPU path."""
    torch.backends.cudnn.allow_tf32 = False  # float32 against float32; torch's default for LSTMs
    context.do_all(
        (
            _check_tiny_readers,
            _check_packaged_readers,
            _check_cloze,
            _check_graphs,
            _changed_answers,
            _tf32_of_cloze,
        ),
    )


def _load(reader: str, path: Path | None, device: torch.device, dtype: str = "float32") -> Any:
    """Load a reader of a class of fastmrc, in any dtype."""
    from fastmrc.pretrained import load_model

    kind = getattr(fastmrc, reader)
    loaded = load_model(
        path, task=kind.task, attention=kind.attention, dtype=dtype, device=str(device)
    )
    return kind(loaded)


def _random_questions(count: int, seed: int) -> Questions:
    """Draw questions with up to six passages of up to 60 characters."""
    rng = random.Random(seed)

    def text(least: int, most: int) -> str:
        return "".join(rng.choices(CHARACTERS + "，。", k=rng.randint(least, most)))

    return [(text(2, 12), [text(0, 60) for _ in range(rng.randint(1, 6))]) for _ in range(count)]


def _sample_questions(count: int) -> Questions:
    """Take the packaged sample questions, with one to ten passages of theirs and of others."""
    from fastmrc.data import read_questions

    path = Path(fastmrc.__file__).parent / "samples" / "questions.jsonl"
    pairs = [question.pair for question in read_questions(path)]
    pool = [passage for _, passages in pairs for passage in passages]
    rng = random.Random(0)
    made: Questions = []
    for i in range(count):
        question, own = pairs[i % len(pairs)]
        others = rng.sample(pool, i // len(pairs) % 5 * 2)
        passages = list(dict.fromkeys([*own, *others]))
        rng.shuffle(passages)
        made.append((question, passages))
    return made


def _check_tiny_readers(context: Context) -> None:
    questions = _random_questions(context.sizes.questions, 0)
    settings: dict[str, Sequence[dict[str, Any]]] = {
        "Seq2SeqReader": _seq2seq_settings(questions),
        "MLMReader": MLM_SETTINGS,
        "SpanReader": SPAN_SETTINGS,
    }
    with tempfile.TemporaryDirectory() as directory:
        for reader, own in settings.items():
            head = "QuestionAnswering" if reader == "SpanReader" else "MaskedLM"
            for seed in (0, 1):
                if context.may_go_on(reader):
                    with context.report.guard(f"{reader}, random model {seed}"):
                        path = Path(directory) / f"{reader}{seed}"
                        save_tiny(path, f"BertFor{head}", seed)
                        _check_reader(context, f"random {seed}", path, reader, questions, own)
        with context.report.guard("SimilarityModel, random model"):
            path = Path(directory) / "similarity"
            save_tiny(path, "BertForMaskedLM", 2)
            _check_similarity(context, "random", path)


def _seq2seq_settings(questions: Questions) -> list[dict[str, Any]]:
    common: dict[str, Any] = {"max_answer_tokens": 8}
    settings: list[dict[str, Any]] = [
        {"mode": mode, "finish": finish, "vote": vote, "beam_size": beam_size}
        for mode, finish, vote, beam_size in (
            ("extractive", "original", "original", 3),
            ("extractive", "pool", "mean", 3),
            ("extractive", "original", "max", 1),
            ("extractive", "pool", "product", 5),
            ("generative", "original", "original", 3),
            ("generative", "pool", "max", 4),
            ("generative", "original", "product", 1),
        )
    ]
    rng = random.Random(1)
    weights = [[rng.choice([0.0, 0.5, 1.0, 3.0]) for _ in own] for _, own in questions]
    settings.append({"vote": "weighted", "passage_weights": weights})
    settings.append({"combine": "answer", "no_answer_ratio": 2.0})
    settings.append({"min_answer_tokens": 3, "max_passage_tokens": 20, "stride": 5})
    trie = Trie([[rng.randint(5, 40) for _ in range(rng.randint(1, 4))] for _ in range(50)])
    settings.append({"constraints": [trie if i % 3 else None for i in range(len(questions))]})
    return [common | options for options in settings]


def _check_packaged_readers(context: Context) -> None:
    questions = _sample_questions(context.sizes.packaged)
    settings: dict[str, Sequence[dict[str, Any]]] = {
        "Seq2SeqReader": (
            {},
            {"finish": "pool", "beam_size": 5},
            {"mode": "generative", "max_answer_tokens": 12},
        ),
        "MLMReader": ({}, {"decoding": "exact", "top_k": 3}),
    }
    for reader, own in settings.items():
        name, some = f"{reader}, packaged model", own[:1] if context.quick else own
        context.attempt(name, _check_reader, context, "packaged", None, reader, questions, some)
    name = "SimilarityModel, packaged model"
    context.attempt(name, _check_similarity, context, "packaged", None)


def _check_reader(
    context: Context,
    name: str,
    path: Path | None,
    reader: str,
    questions: Questions,
    settings: Sequence[dict[str, Any]],
) -> None:
    """Compare the answers of a reader in float32."""
    check = Check(f"{reader}, {name} model", ties_allowed=0.01)
    ours = _load(reader, path, context.device)
    theirs = on_host(_load, reader, path, torch.device("cpu"))
    for options in settings:
        case = ", ".join(f"{key}={value!s:.30}" for key, value in options.items())
        if context.may_go_on(f"{check.name}: {case}"):
            found = ours.answer_batch(questions, **options)
            wanted = on_host(theirs.answer_batch, questions, **options)
            check.answers(case, found, wanted)
    context.report.check(check)


def _check_similarity(context: Context, name: str, path: Path | None) -> None:
    from fastmrc import SimilarityModel

    load = functools.partial(SimilarityModel.from_pretrained, path, pooling="mean")
    ours, theirs = load(device=str(context.device)), on_host(load, device="cpu")
    texts = [question for question, _ in _sample_questions(context.sizes.drawn)]
    vectors = Check(f"SimilarityModel.encode, {name} model")
    found, wanted = ours.encode(texts), on_host(theirs.encode, texts)
    vectors.arrays("encode", (found,), (wanted,), exact=True)
    context.report.check(vectors)
    # Where a random number falls between two tokens, rounding may decide.
    check = Check(f"SimilarityModel.generate, {name} model", ties_allowed=0.02)
    most = 3 if context.quick else 12
    options: dict[str, Any] = {"n": context.sizes.drawn, "max_tokens": most, "seed": 5}
    for further in ({"top_k": 5}, {"top_k": None, "top_p": 0.9, "temperature": 1.3}):
        drawn = ours.generate(texts[0], **options, **further)
        expected = on_host(theirs.generate, texts[0], **options, **further)
        for i, (a, b) in enumerate(zip(drawn, expected, strict=True)):
            same = (a.text, a.token_ids, a.finished) == (b.text, b.token_ids, b.finished)
            scores = [(a.log_prob, b.log_prob)] if same else []
            check.entries(f"{further}, text {i}", same, scores, f"{a.text!r} != {b.text!r}")
    context.report.check(check)


def _check_cloze(context: Context) -> None:
    encoder = random_bilstm()
    documents = _cloze_documents(encoder.vocabulary, context.sizes.questions)
    readers: dict[str, Callable[[str], ClozeReader]] = {
        "random bilstm": lambda device: ClozeReader(encoder.to(device)),
        "packaged": lambda device: ClozeReader.from_pretrained(device=device),
    }
    for name, load in readers.items():
        own = documents if name != "packaged" else documents[: context.sizes.packaged // 2]
        context.attempt(f"ClozeReader, {name}", _check_cloze_reader, context, name, load, own)


def _check_cloze_reader(
    context: Context,
    name: str,
    load: Callable[[str], ClozeReader],
    documents: Sequence[Sequence[str]],
) -> None:
    check = Check(f"ClozeReader, {name} model", ties_allowed=0.01)

    def fill(device: str) -> list[ClozeAnswer]:
        return load(device).fill_batch(documents, top_words=4)

    both = zip(fill(str(context.device)), on_host(fill, "cpu"), strict=True)
    for i, (a, b) in enumerate(both):
        _compare_cloze(check, f"document {i}", a.blanks, b.blanks)
    context.report.check(check)


def _cloze_documents(words: Sequence[str], count: int) -> list[list[str]]:
    made = []
    for seed in range(count):
        rng = random.Random(seed)
        document = rng.choices(words, k=rng.randint(8, 60))
        for _ in range(rng.randint(1, 2)):
            document[rng.randrange(len(document))] = "XXXXX"
        made.append(document)
    return made


def _compare_cloze(check: Check, case: str, ours: Sequence[Any], theirs: Sequence[Any]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        both = list(zip(a.words, b.words, strict=False))
        same = len(a.words) == len(b.words)
        same = same and all((x.text, x.positions) == (y.text, y.positions) for x, y in both)
        scores = [(x.score, y.score) for x, y in both]
        check.entries(case, same, scores, f"{a.text!r} != {b.text!r}")


def _check_graphs(context: Context) -> None:
    """Compare steps that are replayed as CUDA graphs with steps that are not."""
    check = Check("Seq2SeqReader: graphs against none", ties_allowed=0.01)
    questions = _sample_questions(context.sizes.packaged)
    plain, recorded = (_load("Seq2SeqReader", None, context.device) for _ in range(2))
    plain._encoder.graphs = False
    options = {"mode": "generative", "max_answer_tokens": 2 if context.quick else 8}
    wanted = plain.answer_batch(questions, **options)
    for i in range(1 if context.emulated else 3):
        check.answers(f"run {i}", recorded.answer_batch(questions, **options), wanted)
    context.report.note("steps recorded as graphs", recorded_steps(recorded._encoder))
    context.report.check(check)


def _changed_answers(context: Context) -> None:
    """Count the answers of the packaged reader that change in half precision."""
    questions = _sample_questions(context.sizes.packaged)
    for reader in ("Seq2SeqReader", "MLMReader"):
        with context.report.guard(f"{reader} in half precision"):
            exact = _load(reader, None, context.device).answer_batch(questions)
            for dtype in ("float16", "bfloat16"):
                if context.may_go_on(f"{reader}, {dtype}"):
                    found = _load(reader, None, context.device, dtype).answer_batch(questions)
                    _count_changes(context, f"{reader}, encoder in {dtype}", found, exact)


def _count_changes(
    context: Context, name: str, found: Sequence[Answer], exact: Sequence[Answer]
) -> None:
    pairs = list(zip(found, exact, strict=True))
    context.report.figure(
        f"{name}: answers that change",
        sum(a.text != b.text for a, b in pairs) / len(pairs),
        "of all",
        questions=len(pairs),
        largest_score_difference=max(abs(a.score - b.score) for a, b in pairs if a.text == b.text),
    )


def _tf32_of_cloze(context: Context) -> None:
    """How far scores of the cloze reader with an LSTM are off as torch is set up by itself."""
    encoder = random_bilstm().to(context.device)
    reader = ClozeReader(encoder)
    documents = _cloze_documents(encoder.vocabulary, context.sizes.questions)
    scores = []
    for allowed in (False, True):
        torch.backends.cudnn.allow_tf32 = allowed
        answers = reader.fill_batch(documents, top_words=1)
        scores.append([blank.words[0].score for answer in answers for blank in answer.blanks])
    torch.backends.cudnn.allow_tf32 = False
    difference = max(abs(a - b) for a, b in zip(*scores, strict=True))
    context.report.figure("ClozeReader, bilstm: scores with TF32, torch's default", difference, "")
