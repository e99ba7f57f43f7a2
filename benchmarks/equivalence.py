"""Compare the engine's answers with the reference's on real questions.

    python -m benchmarks.equivalence --data questions.jsonl -n 300 --oracle oracle.jsonl
    python -m benchmarks.equivalence --method mlm --data questions.jsonl -n 300

Every question is read with each of the method's settings (seq2seq: each beam size and mode). A
different answer counts as a mismatch when the reference scores the two answers more than 1e-5
apart; smaller differences are listed. The same tokens with another score, text or citation are a
mismatch, too.

What the reference computes of a question is kept for its other settings, since they ask for the
same logits; this changes its speed, not its answers. Its answers are kept in the file
``--oracle``: an interrupted run goes on from there, and another build of the engine is compared
without computing them again. Nothing is timed here.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

import fastmrc
from fastmrc import reference
from fastmrc.cli.common import METHODS
from fastmrc.data import read_questions
from fastmrc.pretrained import packaged_model_path
from fastmrc.types import Answer, Candidate, Span

MARGIN = 1e-5


def main() -> int:
    arguments = _parse_arguments()
    if arguments.threads:
        import torch

        torch.set_num_threads(arguments.threads)
    cases = _load_cases(arguments.data, arguments.n)
    engine = getattr(fastmrc, METHODS[arguments.method].reader).from_pretrained(arguments.model)
    compared = mismatches = 0
    near_ties: list[dict[str, Any]] = []
    settings = _settings(arguments)
    for (question, passages), answers in zip(
        cases, _oracle_answers(arguments, cases, settings), strict=True
    ):
        for options, expected in zip(settings, answers, strict=True):
            got = engine.answer(question, passages, **options)
            compared += 1
            if _same(got, expected):
                continue
            entry = {"question": question, **options, "got": got.text, "want": expected.text}
            margin = abs(_oracle_score(expected, got) - expected.score)
            if margin > MARGIN or got.token_ids == expected.token_ids:
                mismatches += 1
                print("mismatch", json.dumps(entry, ensure_ascii=False), file=sys.stderr)
            else:
                near_ties.append(entry)
    print(
        json.dumps(
            {
                "questions": len(cases),
                "passages": sum(len(passages) for _, passages in cases),
                "compared": compared,
                "mismatches": mismatches,
                "near_ties": near_ties,
                "settings": settings,
            },
            ensure_ascii=False,
        )
    )
    return 1 if mismatches else 0


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", default=None, help="default: the packaged model")
    parser.add_argument("-n", type=int, default=300, help="number of questions")
    parser.add_argument("--method", choices=list(METHODS), default="seq2seq")
    parser.add_argument("--beam-sizes", type=int, nargs="+", default=[1, 3, 5], help="of seq2seq")
    parser.add_argument("--max-passage-tokens", type=int, help="default: the reader's")
    parser.add_argument("--max-answer-tokens", type=int, help="default: the reader's")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--oracle", type=Path, help="file that keeps the reference's answers")
    return parser.parse_args()


def _settings(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    limits = {
        name: getattr(arguments, name)
        for name in ("max_passage_tokens", "max_answer_tokens")
        if getattr(arguments, name) is not None
    }
    settings: dict[str, list[dict[str, Any]]] = {
        "seq2seq": [
            {"mode": mode, "beam_size": beam_size}
            for mode in ("extractive", "generative")
            for beam_size in arguments.beam_sizes
        ],
        "mlm": [
            {"decoding": "greedy"},
            {"decoding": "exact"},
            {"decoding": "exact", "top_k": 5},
            {"mode": "generative"},
        ],
        "span": [
            {"top_k": 1},
            {"top_k": 5},
            {"align_to_words": False, "top_k": 5},
            {"handle_impossible_answer": True},
        ],
    }
    return [options | limits for options in settings[arguments.method]]


def _load_cases(path: Path, n: int) -> list[tuple[str, list[str]]]:
    """Take n questions; the i-th gets 1 + i % 10 passages, its own and those of its neighbours."""
    questions = list(read_questions(path))
    random.Random(0).shuffle(questions)
    cases = []
    for i, question in enumerate(questions[:n]):
        pool = [p for other in questions[i : i + 10] for p in other.pair[1]]
        passages = list(dict.fromkeys(pool))[: 1 + i % 10]
        random.Random(i).shuffle(passages)
        cases.append((question.pair[0], passages))
    return cases


def _oracle_answers(
    arguments: argparse.Namespace,
    cases: list[tuple[str, list[str]]],
    settings: list[dict[str, Any]],
) -> Iterator[list[Answer]]:
    """Yield the reference's answers to each case, one per setting; from the file as far as it
    goes, then computed and appended to it."""
    common = {"model": _weights_digest(arguments.model), "settings": settings}
    known = []
    if arguments.oracle is not None and arguments.oracle.exists():
        content = arguments.oracle.read_bytes()
        # What follows the last line end was being written when the run was stopped.
        end = content.rfind(b"\n") + 1
        os.truncate(arguments.oracle, end)
        known = [json.loads(line) for line in content[:end].splitlines()][: len(cases)]
    for case, entry in tqdm(
        zip(cases, known, strict=False), total=len(cases), desc="known answers"
    ):
        if any(entry[key] != value for key, value in (common | {"case": list(case)}).items()):
            raise SystemExit(f"--oracle: {arguments.oracle} is of another model, data or settings")
        yield [_read_answer(answer) for answer in entry["answers"]]
    if len(known) == len(cases):
        return
    oracle = getattr(reference, METHODS[arguments.method].reader).from_pretrained(arguments.model)
    forget = _remember(oracle)
    for case in tqdm(cases[len(known) :], initial=len(known), total=len(cases)):
        forget()
        answers = [oracle.answer(*case, **options) for options in settings]
        if arguments.oracle is not None:
            entry = common | {"case": case, "answers": [asdict(a) for a in answers]}
            with open(arguments.oracle, "a", encoding="utf-8") as file:
                file.write(json.dumps(entry, ensure_ascii=False) + "\n")
        yield answers


def _weights_digest(model: str | None) -> str:
    """Return a digest of the weights, or the name of a model that is no directory."""
    directory = packaged_model_path() if model is None else Path(model)
    if not directory.is_dir():
        return str(model)
    digest = hashlib.sha256()
    for path in sorted(directory.glob("*.safetensors")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _read_answer(entry: dict[str, Any]) -> Answer:
    spans = [Span(**span) for span in entry["spans"]]
    candidates = [
        Candidate(**{**candidate, "spans": [Span(**span) for span in candidate["spans"]]})
        for candidate in entry["candidates"]
    ]
    return Answer(entry["text"], entry["score"], entry["token_ids"], spans, candidates)


def _same(a: Answer, b: Answer) -> bool:
    return (
        a.token_ids == b.token_ids
        and a.text == b.text
        and a.spans == b.spans
        and abs(a.score - b.score) <= 1e-3
    )


def _oracle_score(expected: Answer, got: Answer) -> float:
    """Score that the reference gives to the engine's answer, if it kept it."""
    for candidate in expected.candidates:
        if candidate.token_ids == got.token_ids:
            return candidate.score
    return float("inf")


def _remember(oracle: Any) -> Callable[[], None]:
    """Let the reference keep what it computes until the returned function is called."""
    if isinstance(oracle, reference.Seq2SeqReader):
        return _Memory(oracle).clear
    if isinstance(oracle, reference.MLMReader):
        compute, known = oracle.slot_logits, dict[int, Any]()

        def slot_logits(windows: Any, slots: int) -> Any:
            if slots not in known:  # the windows of a question are the same in all settings
                known[slots] = compute(windows, slots)
            return known[slots]

        oracle.slot_logits = slot_logits  # type: ignore[method-assign]
        return known.clear
    return lambda: None


class _Memory:
    """Keeps the reference's log-probabilities per passage input and prefix."""

    def __init__(self, reader: reference.Seq2SeqReader) -> None:
        self._known: dict[tuple[tuple[int, ...], tuple[int, ...]], np.ndarray] = {}
        encoder = reader._encoder
        self._next_logits_for = encoder.next_logits_for
        encoder.next_logits_for = self._remembering  # type: ignore[method-assign]

    def clear(self) -> None:
        self._known.clear()

    def _remembering(self, rows: Sequence[list[int]]) -> Callable[..., np.ndarray]:
        inputs = [tuple(row) for row in rows]
        compute = self._next_logits_for(inputs)

        def next_logits(prefixes: list[list[int]], passage_ids: list[int]) -> np.ndarray:
            for prefix in prefixes:
                missing = [p for p in passage_ids if (inputs[p], tuple(prefix)) not in self._known]
                if missing:
                    for p, row in zip(missing, compute([prefix], missing)[:, 0], strict=True):
                        self._known[inputs[p], tuple(prefix)] = row
            return np.stack(
                [
                    np.stack([self._known[inputs[p], tuple(prefix)] for prefix in prefixes])
                    for p in passage_ids
                ]
            )

        return next_logits


if __name__ == "__main__":
    sys.exit(main())
