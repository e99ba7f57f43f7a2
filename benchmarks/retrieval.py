"""How often is the passage that holds the answer among those found for its question?

    python -m benchmarks.retrieval --data FILE [FILE ...] [--also FILE ...]

The questions of the files of ``--data`` are asked of all their passages and those of ``--also``.
Reported is the share of questions whose own passage is among the first 1, 5 and 10: found by its
best piece, as `fastmrc search` and `fastmrc answer --corpus` do, and by one vector for the whole of
it (``SimilarityModel.search``); and by BM25 over characters and pairs of them, for comparison
(needs ``bm25s``).
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import fastmrc
from benchmarks.machine import machine
from fastmrc.corpus_index import PIECE_TOKENS, CorpusIndex
from fastmrc.data import Question, read_questions
from fastmrc.similarity import SimilarityModel

FIRST = (1, 5, 10)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", nargs="+", required=True, metavar="FILE")
    parser.add_argument("--also", nargs="+", default=[], metavar="FILE")
    parser.add_argument("--model", help="directory or hub id (default: the packaged model)")
    parser.add_argument("--dtype", default="float32", help="of the encoder")
    parser.add_argument("--pieces-only", action="store_true", help="make no vectors of passages")
    parser.add_argument("--threads", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
        fastmrc.set_num_threads(arguments.threads)
    questions = _read(arguments.data)
    texts = [p.text for q in questions + _read(arguments.also) for p in q.passages]
    passages = list(dict.fromkeys(texts))
    place = {text: i for i, text in enumerate(passages)}
    own = [{place[p.text] for p in q.passages if p.answer} for q in questions]
    asked = [q.question for q, gold in zip(questions, own, strict=True) if gold]
    gold = [ids for ids in own if ids]
    model = SimilarityModel.from_pretrained(arguments.model, dtype=arguments.dtype)
    result = measure(model, asked, passages, gold, whole=not arguments.pieces_only)
    print(json.dumps(machine() | {"dtype": model.dtype} | result, indent=2))
    return 0


def _read(paths: Sequence[str]) -> list[Question]:
    return [q for path in paths for q in read_questions(path, on_error=lambda issue: None)]


def measure(
    model: SimilarityModel,
    asked: list[str],
    passages: list[str],
    gold: list[set[int]],
    *,
    whole: bool = True,
) -> dict[str, Any]:
    """Return recall of each kind of search, and seconds."""
    begin = time.perf_counter()
    queries = model.encode(asked)
    asking = time.perf_counter() - begin
    begin = time.perf_counter()
    pieces, owners = model.cut(passages, PIECE_TOKENS)
    index = CorpusIndex(passages, owners, model.encode(pieces))
    indexing = time.perf_counter() - begin
    begin = time.perf_counter()
    by_piece = index.search(queries, max(FIRST)).ids
    searching = time.perf_counter() - begin
    recall = {"pieces": _recall(by_piece, gold), "bm25": _bm25(asked, passages, gold)}
    if whole:
        recall["whole passages"] = _recall(model.search(queries, passages, max(FIRST)).ids, gold)
    return {
        "questions": len(asked),
        "passages": len(passages),
        "pieces": len(pieces),
        "recall": recall,
        "seconds": {"questions": asking, "passages": indexing, "search": searching},
    }


def _recall(ids: NDArray[Any], gold: Sequence[set[int]]) -> dict[str, float]:
    found = [[i in own for i in row] for row, own in zip(ids.tolist(), gold, strict=True)]
    return {f"recall@{k}": float(np.mean([any(row[:k]) for row in found])) for k in FIRST}


def _bm25(
    asked: Sequence[str], passages: Sequence[str], gold: Sequence[set[int]]
) -> dict[str, float] | None:
    try:
        import bm25s
    except ImportError:
        return None

    def terms(text: str) -> list[str]:
        return [*text, *(a + b for a, b in zip(text, text[1:], strict=False))]

    index = bm25s.BM25()
    index.index([terms(text) for text in passages], show_progress=False)
    ids, _ = index.retrieve([terms(text) for text in asked], k=max(FIRST), show_progress=False)
    return _recall(np.asarray(ids), gold)


if __name__ == "__main__":
    raise SystemExit(main())
