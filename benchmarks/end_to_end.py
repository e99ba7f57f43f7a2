"""The whole reader against the pure-Python baseline, and its memory over many questions.

    python -m benchmarks.end_to_end                   # BERT-base shape, random weights
    python -m benchmarks.end_to_end --memory          # resident memory over 1,000 questions

The first form reads one question with ten passages whose inputs have 256 tokens each, beam 3,
exactly six answer tokens, float32; with ``--mode generative`` anything may follow, so nothing is
looked ahead to. Answers are compared before anything is timed; the contenders alternate; medians
are reported. "prefill" is the encoder's one pass over the inputs with the LM head at their ends.
Weights are random: the time does not depend on their values.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

import fastmrc
from fastmrc import reference
from fastmrc.decoding import beam_search
from fastmrc.encoders.unilm import UniLMEncoder
from fastmrc.options import SearchOptions
from fastmrc.reference import ReencodingEncoder

PASSAGES = 10
INPUT_TOKENS = 256
QUESTION_TOKENS = 20
END_ID = 102
STEPS = 6


def main() -> int:
    arguments = _parse_arguments()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    result = measure_memory(arguments.questions) if arguments.memory else measure_speed(arguments)
    print(json.dumps(_machine() | result, indent=2))
    return 0


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--questions", type=int, default=1000, help="for --memory")
    parser.add_argument("--mode", choices=["extractive", "generative"], default="extractive")
    parser.add_argument("--rounds", type=int, default=11, help="timed rounds of the engine")
    parser.add_argument("--baseline-rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=0)
    return parser.parse_args()


def _machine() -> dict[str, Any]:
    import transformers

    return {
        "processor": _processor_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "numpy": np.__version__,
        "fastmrc": dict(fastmrc.build_info()),
    }


def _processor_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.split(":")[1].strip() for line in file if "model name" in line)
    except (OSError, StopIteration):
        return platform.machine()


def measure_speed(arguments: argparse.Namespace) -> dict[str, Any]:
    """Time prefill, whole decode and baseline on a model of BERT-base shape."""
    model = _bert_base()
    encoder = UniLMEncoder(model)
    baseline = ReencodingEncoder(model, end_id=END_ID)
    generator = np.random.default_rng(0)
    passages, rows = [], []
    question = generator.integers(1000, 20000, QUESTION_TOKENS)
    for _ in range(PASSAGES):
        passage = generator.integers(1000, 20000, INPUT_TOKENS - QUESTION_TOKENS - 3)
        passages.append(passage.astype(np.int32))
        rows.append(np.concatenate([[101], passage, [END_ID], question, [END_ID]]).astype(np.int32))
    options = SearchOptions(mode=arguments.mode, min_answer_tokens=STEPS, max_answer_tokens=STEPS)

    def prefill() -> Any:
        return encoder.session(rows, STEPS - 1, options.beam_size).prefill()

    def decode() -> Any:
        return beam_search(
            encoder.session(rows, STEPS - 1, options.beam_size),
            [passages],
            end_id=END_ID,
            vocabulary_size=encoder.vocabulary_size,
            options=options,
        )

    def reference_decode() -> Any:
        return reference.beam_search(
            baseline.next_logits_for([row.tolist() for row in rows]),
            [passage.tolist() for passage in passages],
            end_id=END_ID,
            mode=arguments.mode,
            min_tokens=STEPS,
            max_tokens=STEPS,
        )

    got, expected = decode().results[0], reference_decode()  # the warm-up, too
    if [h.token_ids for h in got.hypotheses] != [h.token_ids for h in expected.hypotheses]:
        raise SystemExit("engine and reference differ; nothing was timed")
    prefill()
    seconds: dict[str, list[float]] = {"prefill": [], "decode": [], "baseline": []}
    for i in range(arguments.rounds):
        seconds["prefill"].append(_seconds(prefill))
        seconds["decode"].append(_seconds(decode))
        if i < arguments.baseline_rounds:
            seconds["baseline"].append(_seconds(reference_decode))
    median = {name: statistics.median(values) for name, values in seconds.items()}
    batch = decode()
    return {
        "mode": arguments.mode,
        "seconds": seconds,
        "median": median,
        "baseline / engine": median["baseline"] / median["decode"],
        "decode / prefill": median["decode"] / median["prefill"],
        "share outside the encoder": batch.decode_seconds
        / (batch.encode_seconds + batch.decode_seconds),
    }


def _bert_base() -> Any:
    from transformers import BertConfig, BertForMaskedLM

    torch.manual_seed(0)
    config = BertConfig(vocab_size=21128, attn_implementation="sdpa")
    return BertForMaskedLM(config).eval()


def _seconds(function: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin


def measure_memory(questions: int) -> dict[str, Any]:
    """Resident memory after each hundred questions of mixed sizes through ``answer_batch``."""
    reader = fastmrc.Seq2SeqReader.from_pretrained()
    generator = np.random.default_rng(0)
    text = "中国古代的造纸术与印刷术在世界历史上有重要地位，许多城市在河流两岸发展起来。"
    resident = {}
    for done in range(100, questions + 1, 100):
        batch = []
        for _ in range(100):
            lengths = generator.integers(5, 60, generator.integers(1, 4))
            characters = [generator.choice(list(text), n) for n in lengths]
            batch.append(("谁改进了造纸术？", ["".join(c) for c in characters]))
        reader.answer_batch(batch, max_answer_tokens=8)
        resident[done] = _resident_mebibytes()
    last = max(resident)
    return {"resident MiB": resident, f"after {last} / after 100": resident[last] / resident[100]}


def _resident_mebibytes() -> float:
    with open("/proc/self/statm", encoding="ascii") as file:
        pages = int(file.read().split()[1])
    return pages * 4096 / 2**20


if __name__ == "__main__":
    sys.exit(main())
