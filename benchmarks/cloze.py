"""How often is the word right that a cloze reader chooses, and how many questions a second?

    python -m benchmarks.cloze --data FILE [--model DIR]

`FILE` holds CMRC 2017 documents (with their answers beside them) or JSON lines with answers. Beside
the accuracy stands that of the most frequent word of two or more characters, and that on the
questions whose answer occurs often enough to be found by counting or not. Before anything is timed
the words of some questions are compared with those of the reference.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

import fastmrc
from benchmarks.machine import machine
from fastmrc import reference
from fastmrc.cloze import ClozeDocument, ClozeReader, read_cloze
from fastmrc.cloze.bilstm import BiLSTMEncoder
from fastmrc.cloze.words import is_word

COMPARED = 20


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, metavar="FILE")
    parser.add_argument("--model", help="directory (default: the packaged model)")
    parser.add_argument("-n", "--questions", type=int, help="only the first ones")
    parser.add_argument("--threads", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
        fastmrc.set_num_threads(arguments.threads)
    documents = [d for d in read_cloze(arguments.data) if d.answer][: arguments.questions]
    reader = ClozeReader.from_pretrained(arguments.model)
    result = measure(reader, documents)
    print(json.dumps(machine() | {"encoder": reader.encoder.settings()} | result, indent=2))
    return 0 if result["different"] == 0 else 1


def measure(reader: ClozeReader, documents: Sequence[ClozeDocument]) -> dict[str, Any]:
    """Return accuracies, words that differ from the reference, and questions a second."""
    different = [d.id for d in documents[:COMPARED] if not _same(reader, d)]
    begin = time.perf_counter()
    answers = reader.fill_batch(documents, top_words=5)
    seconds = time.perf_counter() - begin
    right = np.array([a.text == d.answer for a, d in zip(answers, documents, strict=True)])
    among = [d.answer in {w.text for w in a.words} for a, d in zip(answers, documents, strict=True)]
    frequent = np.array([_most_frequent(d) == d.answer for d in documents])
    return {
        "questions": len(documents),
        "compared": min(COMPARED, len(documents)),
        "different": len(different),
        "accuracy": float(right.mean()),
        "among the first five": float(np.mean(among)),
        "most frequent word": float(frequent.mean()),
        "accuracy where that is wrong": float(right[~frequent].mean()),
        "questions per second": len(documents) / seconds,
    }


def _same(reader: ClozeReader, document: ClozeDocument) -> bool:
    """Fill one document with the reference's attention-sum, and its BiLSTM for one."""
    encoder = reader.encoder
    words, (blank, *_) = document.words, document.blanks
    logits = np.full((1, len(words)), -np.inf, np.float32)
    ids = encoder.word_ids(words)
    for row in encoder.rows(words, [blank]):
        if isinstance(encoder, BiLSTMEncoder):
            weights = {name: w.numpy() for name, w in encoder.lstm.state_dict().items()}
            weights["vectors"] = torch.cat([encoder.unknown, encoder.known]).numpy()
            lstm = encoder.lstm.depth
            exact = reference.bilstm_logits(
                ids.tolist(), blank, weights, depth=lstm, match=encoder.match
            )
            logits[0, row.positions] = exact[row.positions]
        else:
            with torch.inference_mode():
                logits[0, row.positions] = encoder([row])[0].numpy()
    best, scores, _ = reference.attention_sum(logits, ids[None], 1)
    answer = reader.fill(document)
    same = [i for i, word in enumerate(words) if word == answer.text]
    return bool(ids[same[0]] == best[0, 0]) and abs(answer.words[0].score - scores[0, 0]) < 1e-4


def _most_frequent(document: ClozeDocument) -> str:
    counts = Counter(word for word in document.words if len(word) > 1 and is_word(word))
    del counts[fastmrc.cloze.BLANK]
    return counts.most_common(1)[0][0] if counts else ""


if __name__ == "__main__":
    raise SystemExit(main())
