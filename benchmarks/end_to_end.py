"""The whole reader against the pure-Python baseline, and its memory over many questions.

    python -m benchmarks.end_to_end                   # BERT-base shape, random weights
    python -m benchmarks.end_to_end --method mlm      # the same for the masked slots
    python -m benchmarks.end_to_end --memory          # resident memory over 1,000 questions

The first form reads one question with ten passages whose inputs have 256 tokens each, beam 3,
exactly six answer tokens, float32; with ``--mode generative`` anything may follow, so nothing is
looked ahead to. Answers are compared before anything is timed; the contenders alternate; medians
are reported. "prefill" is the encoder's one pass over the inputs with the LM head at their ends.
Weights are random: the time does not depend on their values.

With ``--method mlm`` the inputs have 256 tokens with their 16 slots; "prefill" is the encoder's
pass with the LM head on the slots, and the baseline runs the LM head at every position, as the
original does.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import fastmrc
from benchmarks.machine import machine
from fastmrc import ops, reference
from fastmrc.cli.common import METHODS
from fastmrc.decoding import beam_search
from fastmrc.encoders.slots import SlotEncoder
from fastmrc.encoders.unilm import UniLMEncoder
from fastmrc.options import SearchOptions
from fastmrc.reference import ReencodingEncoder
from fastmrc.text import join_tokens

PASSAGES = 10
INPUT_TOKENS = 256
QUESTION_TOKENS = 20
END_ID = 102
STEPS = 6
SLOTS = 16
MASK_ID = 103


def main() -> int:
    arguments = _parse_arguments()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if arguments.memory:
        result = measure_memory(METHODS[arguments.method].reader, arguments.questions)
    else:
        contenders = slot_contenders if arguments.method == "mlm" else search_contenders
        result = measure_speed(contenders(arguments), arguments)
    print(json.dumps(machine() | result, indent=2))
    return 0


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--questions", type=int, default=1000, help="for --memory")
    parser.add_argument("--method", choices=["seq2seq", "mlm"], default="seq2seq")
    parser.add_argument("--mode", choices=["extractive", "generative"], default="extractive")
    parser.add_argument("--rounds", type=int, default=11, help="timed rounds of the engine")
    parser.add_argument("--baseline-rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=0)
    return parser.parse_args()


@dataclass(frozen=True)
class Contenders:
    """What is timed on one question; both decodes return what must be equal."""

    prefill: Callable[[], Any]
    decode: Callable[[], Any]
    baseline: Callable[[], Any]


def search_contenders(arguments: argparse.Namespace) -> Contenders:
    """Beam search of six tokens over ten passages."""
    model = _bert_base()
    encoder = UniLMEncoder(model)
    baseline = ReencodingEncoder(model, end_id=END_ID)
    question, passages = _tokens(INPUT_TOKENS - QUESTION_TOKENS - 3)
    rows = [join_tokens([101], passage, [END_ID], question, [END_ID]) for passage in passages]
    options = SearchOptions(mode=arguments.mode, min_answer_tokens=STEPS, max_answer_tokens=STEPS)

    def decode() -> Any:
        batch = beam_search(
            encoder.session(rows, STEPS - 1, options.beam_size),
            [passages],
            end_id=END_ID,
            vocabulary_size=encoder.vocabulary_size,
            options=options,
        )
        return [h.token_ids for h in batch.results[0].hypotheses]

    def reference_decode() -> Any:
        result = reference.beam_search(
            baseline.next_logits_for([row.tolist() for row in rows]),
            [passage.tolist() for passage in passages],
            end_id=END_ID,
            mode=arguments.mode,
            min_tokens=STEPS,
            max_tokens=STEPS,
        )
        return [h.token_ids for h in result.hypotheses]

    def prefill() -> Any:
        return encoder.session(rows, STEPS - 1, options.beam_size).prefill()

    return Contenders(prefill, decode, reference_decode)


def slot_contenders(arguments: argparse.Namespace) -> Contenders:
    """Greedy answers of 16 slots over ten passages."""
    model = _bert_base()
    encoder = SlotEncoder(model)
    question, passages = _tokens(INPUT_TOKENS - QUESTION_TOKENS - SLOTS - 4)
    before = join_tokens([101], [MASK_ID] * SLOTS, [END_ID], question, [END_ID])
    rows = [join_tokens(before, passage, [END_ID]) for passage in passages]

    def prefill() -> Any:
        return encoder.logits(rows, SLOTS)

    def decode() -> Any:
        indices = [fastmrc.SpanIndex([passage]) for passage in passages]
        return ops.slot_argmax(prefill(), end_id=END_ID, constraint=indices)[0].tolist()

    @torch.inference_mode()
    def reference_decode() -> Any:
        tokens = torch.from_numpy(np.stack(rows)).long()
        logits = model(input_ids=tokens).logits[:, 1 : 1 + SLOTS].numpy()
        indices = [reference.SpanIndex([passage.tolist()]) for passage in passages]
        return reference.slot_argmax(logits, end_id=END_ID, constraint=indices)[0].tolist()

    return Contenders(prefill, decode, reference_decode)


def _tokens(passage_tokens: int) -> tuple[NDArray[np.int32], list[NDArray[np.int32]]]:
    """Draw a question and the passages."""
    generator = np.random.default_rng(0)
    lengths = [QUESTION_TOKENS] + [passage_tokens] * PASSAGES
    drawn = [generator.integers(1000, 20000, n).astype(np.int32) for n in lengths]
    return drawn[0], drawn[1:]


def measure_speed(contenders: Contenders, arguments: argparse.Namespace) -> dict[str, Any]:
    """Time prefill, whole decode and baseline on a model of BERT-base shape."""
    if contenders.decode() != contenders.baseline():  # the warm-up, too
        raise SystemExit("engine and reference differ; nothing was timed")
    contenders.prefill()
    seconds: dict[str, list[float]] = {"prefill": [], "decode": [], "baseline": []}
    for i in range(arguments.rounds):
        seconds["prefill"].append(_seconds(contenders.prefill))
        seconds["decode"].append(_seconds(contenders.decode))
        if i < arguments.baseline_rounds:
            seconds["baseline"].append(_seconds(contenders.baseline))
    median = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "method": arguments.method,
        "mode": arguments.mode,
        "seconds": seconds,
        "median": median,
        "baseline / engine": median["baseline"] / median["decode"],
        "decode / prefill": median["decode"] / median["prefill"],
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


def measure_memory(reader_name: str, questions: int) -> dict[str, Any]:
    """Resident memory after each hundred questions of mixed sizes through ``answer_batch``."""
    reader = getattr(fastmrc, reader_name).from_pretrained()
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
