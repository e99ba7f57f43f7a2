"""Similar texts: how fast are they drawn, and how different are they?

    python -m benchmarks.generation                 # speed against the baseline that re-encodes
    python -m benchmarks.generation --quality TEXT...   # what is drawn

The first form draws 100 texts of exactly 16 tokens after one sentence, the five likeliest tokens at
each step. The baseline encodes every sequence from the beginning at every step and draws with
`fastmrc.reference.sample`. The same seed must give the same tokens before anything is timed; the
contenders alternate; medians are reported, and how many tokens were encoded: of texts that begin
alike the beginning is encoded once.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

import fastmrc
from benchmarks.machine import machine
from fastmrc import reference
from fastmrc.options import SamplingOptions
from fastmrc.pretrained import load_model
from fastmrc.similarity import SimilarityModel

TEXT = "世界上最高的山是哪一座？"  # noqa: RUF001
COUNT = 100
TOKENS = 16


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="directory or hub id (default: the packaged model)")
    parser.add_argument("--quality", nargs="+", metavar="TEXT", help="texts to draw after")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
        fastmrc.set_num_threads(arguments.threads)
    loaded = load_model(arguments.model)
    if arguments.quality:
        result = measure_quality(SimilarityModel(loaded), arguments.quality)
    else:
        result = measure_speed(loaded, arguments.rounds)
    print(json.dumps(machine() | result, indent=2, ensure_ascii=False))
    return 0


def measure_speed(loaded: Any, rounds: int) -> dict[str, Any]:
    """Time drawing with and without the cached input."""
    model = SimilarityModel(loaded)
    options: dict[str, Any] = {"top_k": 5, "min_tokens": TOKENS, "max_tokens": TOKENS}
    end_id = int(loaded.tokenizer.sep_token_id)
    row = loaded.tokenizer(TEXT)["input_ids"]
    next_logits = reference.ReencodingEncoder(loaded.model, end_id=end_id).next_logits_for([row])

    def engine() -> list[list[int]]:
        return [g.token_ids for g in model.generate(TEXT, COUNT, seed=0, **options)]

    def baseline() -> list[list[int]]:
        sequences = reference.sample_sequences(
            lambda prefixes: next_logits(prefixes, [0])[0],
            COUNT,
            end_id=end_id,
            options=SamplingOptions(**options),
            seed=0,
        )
        return [s.token_ids for s in sequences]

    drawn, expected = engine(), baseline()
    if drawn != expected:
        raise SystemExit("generation: the contenders drew different tokens")
    seconds: dict[str, list[float]] = {"fastmrc": [], "baseline": []}
    for _ in range(rounds):
        seconds["fastmrc"].append(_seconds(engine))
        seconds["baseline"].append(_seconds(baseline))
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    beginnings = {tuple(tokens[:n]) for tokens in drawn for n in range(1, TOKENS)}
    return {
        "texts": COUNT,
        "tokens": TOKENS,
        "encoded": len(beginnings),  # tokens after the prompt, of COUNT * (TOKENS - 1)
        "seconds": medians,
        "ratio": medians["baseline"] / medians["fastmrc"],
    }


def measure_quality(model: SimilarityModel, texts: list[str]) -> dict[str, Any]:
    """Draw 100 texts after each text; say how many are distinct and different from it."""
    samples = {}
    distinct = 0.0
    for text in texts:
        drawn = [g.text for g in model.generate(text, COUNT, seed=0)]
        distinct += len({*drawn} - {text}) / len(drawn) / len(texts)
        samples[text] = [one.text for one in model.similar(text, COUNT, 3, seed=0)]
    return {"distinct": distinct, "samples": samples}


def _seconds(function: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin


if __name__ == "__main__":
    raise SystemExit(main())
