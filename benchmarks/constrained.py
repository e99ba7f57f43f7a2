"""What do constraints cost in `generate` of transformers, and what does a large trie cost?

    python -m benchmarks.constrained [--parts generate spans tries]

generate  beam search of 8 items with 4 beams each, held to 100,000 sequences: `TrieLogitsProcessor`
          against ``prefix_allowed_tokens_fn`` with a trie of dictionaries, as GENRE has it. The
          outputs must be equal before anything is timed; what is timed is each call of the
          processor, of the one and the other in turns.
spans     new passages for each request, 1,000 tokens, of which 32 are written: building
          `SpanLogitsProcessor` and calling it, against the substring grammars of xgrammar and
          llguidance, where they are installed. By tokens: pieces of the passage's own tokens; the
          grammars take the text of each token, and must allow what `SpanLogitsProcessor` allows
          (they know text, and allow other tokens with the same text, too). By text: every token
          sequence that spells a piece, ``SpanIndex.from_text(unit="text")``; the grammars take
          characters, and masks must be equal. Checked before anything is timed.
tries     1,000,000 sequences of 8 tokens: time to build and memory of `fastmrc.Trie`, of a
          trie of dictionaries and of marisa-trie, where it is installed, each in a process of its
          own. What may follow some of the prefixes must be the same.

All inputs are drawn at random with a fixed seed: tokens near 0 are more frequent, so that sequences
share beginnings; texts are made of syllables, and a byte-level tokenizer is trained on them.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import hashlib
import importlib.metadata
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import GPT2Config, GPT2LMHeadModel, LogitsProcessor
from transformers.generation import PrefixConstrainedLogitsProcessor

import fastmrc
from benchmarks.machine import machine
from fastmrc.integrations.generation import SpanLogitsProcessor, TrieLogitsProcessor

VOCABULARY = 50_257
END = 0
BATCH, BEAMS, STEPS = 8, 4, 12
SEQUENCES = 100_000
PASSAGE_TOKENS, SPAN_TOKENS = 1_000, 32
TRIE_SEQUENCES, TRIE_TOKENS = 1_000_000, 8
PARTS = ("generate", "spans", "tries")
CONTENDERS = ("fastmrc", "dictionary", "marisa-trie")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--build", choices=CONTENDERS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
        fastmrc.set_num_threads(arguments.threads)
    if arguments.build:
        result = build_trie(arguments.build)
    else:
        measures: dict[str, Callable[[], Any]] = {
            "generate": lambda: measure_generate(arguments.rounds),
            "spans": lambda: measure_spans(arguments.rounds),
            "tries": lambda: measure_tries(arguments.rounds),
        }
        result = machine() | {part: measures[part]() for part in arguments.parts}
    print(json.dumps(result, indent=2))
    return 0


def draw_tokens(rng: np.random.Generator, shape: tuple[int, ...]) -> NDArray[np.int32]:
    """Draw tokens of the vocabulary but END, those near 0 more often."""
    return (1 + (VOCABULARY - 1) * rng.random(shape, dtype=np.float32) ** 3).astype(np.int32)


def median(values: Sequence[float]) -> float:
    return statistics.median(values)


# Part "generate".


class DictionaryTrie:
    """A dictionary of dictionaries, the end token where a sequence ends."""

    def __init__(self, sequences: Sequence[Sequence[int]]) -> None:
        self.root: dict[int, Any] = {}
        for sequence in sequences:
            node = self.root
            for token in sequence:
                node = node.setdefault(token, {})

    def get(self, prefix: Sequence[int]) -> list[int]:
        node = self.root
        for token in prefix:
            if token not in node:
                return []
            node = node[token]
        return list(node)


class Timed(LogitsProcessor):
    """Any processor, and the seconds of each of its calls."""

    def __init__(self, inner: LogitsProcessor) -> None:
        self.inner = inner
        self.seconds: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        begin = time.perf_counter()
        result: torch.Tensor = self.inner(input_ids, scores)
        self.seconds.append(time.perf_counter() - begin)
        return result


def measure_generate(rounds: int) -> dict[str, Any]:
    """Time the calls of both processors in the same beam search."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(3, 11, SEQUENCES).tolist()
    sequences = [draw_tokens(rng, (length,)) for length in lengths]
    begin = time.perf_counter()
    trie = fastmrc.Trie(sequences)
    middle = time.perf_counter()
    dictionary = DictionaryTrie([[*sequence.tolist(), END] for sequence in sequences])
    end = time.perf_counter()
    inputs = _prompts(rng)
    prompt = inputs["input_ids"].shape[1]
    in_function = []

    def allowed_tokens(item: int, row: torch.Tensor) -> list[int]:
        begin = time.perf_counter()
        tokens = dictionary.get(row[prompt:].tolist()) or [END]
        in_function.append(time.perf_counter() - begin)
        return tokens

    model = _small_model()
    contenders: dict[str, LogitsProcessor] = {
        "fastmrc": TrieLogitsProcessor(trie, END),
        "dictionary": PrefixConstrainedLogitsProcessor(allowed_tokens, BEAMS),
    }
    outputs = {name: _generate(model, inputs, one) for name, one in contenders.items()}
    if not torch.equal(outputs["fastmrc"], outputs["dictionary"]):
        raise SystemExit("generate: the contenders wrote different sequences")
    in_function.clear()
    calls: dict[str, list[list[float]]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, one in contenders.items():
            timed = Timed(one)
            _generate(model, inputs, timed)
            calls[name].append(timed.seconds)
    steps = len(calls["fastmrc"][0])
    figures = {
        name: {
            "mean_of_steps": median([statistics.mean(run) for run in runs]),
            "first_step": median([run[0] for run in runs]),
            "later_steps": median([seconds for run in runs for seconds in run[1:]]),
        }
        for name, runs in calls.items()
    }
    figures["dictionary"]["of_which_in_the_function"] = sum(in_function) / rounds / steps
    ratio = {key: figures["dictionary"][key] / value for key, value in figures["fastmrc"].items()}
    return {
        "sequences": SEQUENCES,
        "rows": BATCH * BEAMS,
        "vocabulary": VOCABULARY,
        "steps": steps,
        "seconds_per_step": figures,
        "ratio": ratio,
        "wanted_ratio": 20,
        "build_seconds": {"fastmrc": middle - begin, "dictionary": end - middle},
    }


def _small_model() -> Any:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=64,
        n_embd=64,
        n_layer=2,
        n_head=2,
        bos_token_id=END,
        eos_token_id=END,
        pad_token_id=END,
    )
    return GPT2LMHeadModel(config).eval()


def _prompts(rng: np.random.Generator) -> dict[str, torch.Tensor]:
    """Prompts of different lengths, padded on the left."""
    ids = torch.from_numpy(draw_tokens(rng, (BATCH, 24))).long()
    mask = torch.ones_like(ids)
    for row, padding in enumerate(rng.integers(0, 12, BATCH).tolist()):
        mask[row, :padding] = 0
        ids[row, :padding] = END
    return {"input_ids": ids, "attention_mask": mask}


def _generate(model: Any, inputs: dict[str, torch.Tensor], one: LogitsProcessor) -> torch.Tensor:
    sequences: torch.Tensor = model.generate(
        **inputs,
        logits_processor=[one],
        num_beams=BEAMS,
        num_return_sequences=BEAMS,
        max_new_tokens=STEPS,
        do_sample=False,
    )
    return sequences


# Part "spans".


@dataclass(frozen=True)
class Request:
    """A passage and what is written of it.

    Attributes
    ----------
    tokens, texts
        The tokens of the passage, and the text of each.
    ids
        int64 [1, 1 + SPAN_TOKENS]: a prompt of one token, and a piece of the passage.
    """

    tokens: list[int]
    texts: list[str]
    ids: torch.Tensor

    @property
    def text(self) -> str:
        """The passage."""
        return "".join(self.texts)

    def pieces(self, unit: str) -> list[str]:
        """Return what a span may begin and end with: the text of each token, or characters."""
        return list(self.text) if unit == "text" else self.texts


Maker = Callable[[Request, str], Any]
UNITS = ("token", "text")


class Fastmrc:
    """Reads the tokens written so far from the ids that `generate` hands over."""

    def __init__(self, tokenizer: Any, request: Request, unit: str) -> None:
        if unit == "text":
            spans: Any = fastmrc.SpanIndex.from_text([request.text], tokenizer, unit="text")
        else:
            spans = [request.tokens]
        self.processor = SpanLogitsProcessor(spans, END)
        self.ids = request.ids
        self.length = 1

    def masked(self, scores: torch.Tensor) -> torch.Tensor:
        return self.processor(self.ids[:, : self.length], scores)

    def accept(self, token: int) -> None:
        self.length += 1


class XGrammar:
    """The macro for substrings."""

    def __init__(self, compiler: Any, request: Request, unit: str) -> None:
        import xgrammar

        self.library = xgrammar
        pieces = ", ".join(json.dumps(piece) for piece in request.pieces(unit))
        grammar = xgrammar.Grammar.from_ebnf(f"root ::= Substring({pieces})")
        self.matcher = xgrammar.GrammarMatcher(compiler.compile_grammar(grammar))
        self.bits = xgrammar.allocate_token_bitmask(1, VOCABULARY)

    def masked(self, scores: torch.Tensor) -> torch.Tensor:
        self.matcher.fill_next_token_bitmask(self.bits)
        self.library.apply_token_bitmask_inplace(scores, self.bits)
        return scores

    def accept(self, token: int) -> None:
        if not self.matcher.accept_token(token):
            raise SystemExit("spans: xgrammar does not accept a token of the passage")


class LLGuidance:
    """The regular expression for substrings."""

    def __init__(self, tokenizer: Any, request: Request, unit: str) -> None:
        import llguidance
        import llguidance.torch

        self.library = llguidance.torch
        pieces = json.dumps(request.pieces(unit))
        grammar = 'start: SPAN\nSPAN: %regex { "substring_chunks": ' + pieces + " }"
        self.matcher = llguidance.LLMatcher(tokenizer, grammar)
        self.bits = llguidance.torch.allocate_token_bitmask(1, VOCABULARY)

    def masked(self, scores: torch.Tensor) -> torch.Tensor:
        self.library.fill_next_token_bitmask(self.matcher, self.bits, 0)
        self.library.apply_token_bitmask_inplace(scores, self.bits)
        return scores

    def accept(self, token: int) -> None:
        if not self.matcher.consume_token(token):
            raise SystemExit(f"spans: llguidance: {self.matcher.get_error()}")


def measure_spans(rounds: int) -> dict[str, Any]:
    """Time a request with passages of its own: building, then 32 masks."""
    rng = np.random.default_rng(1)
    words = _words(rng)
    tokenizer = _train_tokenizer(rng, words)
    makers, left_out = _span_contenders(tokenizer)
    scores = torch.randn(1, VOCABULARY)
    requests = [_draw_request(rng, words, tokenizer) for _ in range(rounds + 1)]
    return {
        "passage_tokens": PASSAGE_TOKENS,
        "steps": SPAN_TOKENS,
        "vocabulary": VOCABULARY,
        "by": {unit: _measure_unit(unit, makers, requests, scores) for unit in UNITS},
        "wanted_ratio": 5,
        "versions": {
            name: importlib.metadata.version(name) for name in makers if name != "fastmrc"
        },
        "left_out": left_out,
    }


def _measure_unit(
    unit: str, makers: dict[str, Maker], requests: list[Request], scores: torch.Tensor
) -> dict[str, Any]:
    _check_masks(unit, makers, requests[0], scores)  # and warm up
    build: dict[str, list[float]] = {name: [] for name in makers}
    steps: dict[str, list[float]] = {name: [] for name in makers}
    for request in requests[1:]:
        for name, make in makers.items():
            seconds = _time_request(partial(make, request, unit), request, scores)
            build[name].append(seconds[0])
            steps[name].append(seconds[1])
    total = {
        name: median([sum(both) for both in zip(build[name], steps[name], strict=True)])
        for name in makers
    }
    return {
        "seconds": {
            name: {"build": median(build[name]), "steps": median(steps[name]), "all": total[name]}
            for name in makers
        },
        "ratio": {name: seconds / total["fastmrc"] for name, seconds in total.items()},
    }


def _span_contenders(tokenizer: Any) -> tuple[dict[str, Maker], dict[str, str]]:
    """Return what builds each contender, and why some are left out."""
    makers: dict[str, Maker] = {"fastmrc": partial(Fastmrc, tokenizer)}
    left_out = {}
    try:
        import xgrammar

        info = xgrammar.TokenizerInfo.from_huggingface(
            tokenizer, vocab_size=VOCABULARY, stop_token_ids=[END]
        )
        compiler = xgrammar.GrammarCompiler(
            info, max_threads=torch.get_num_threads(), cache_enabled=False
        )
        makers["xgrammar"] = partial(XGrammar, compiler)
    except ImportError as error:
        left_out["xgrammar"] = f"not installed: {error}"
    try:
        import llguidance.hf

        ready = llguidance.hf.from_tokenizer(tokenizer, n_vocab=VOCABULARY)
        makers["llguidance"] = partial(LLGuidance, ready)
    except ImportError as error:
        left_out["llguidance"] = f"not installed: {error}"
    return makers, left_out


def _words(rng: np.random.Generator) -> list[str]:
    """Draw distinct words of ASCII letters: a token then is a piece of text."""
    starts = [*"bcdfglmnprstv", "br", "pr", "st", "tr"]
    syllables = [a + b + c for a in starts for b in "aeiou" for c in ("", "n", "r", "s")]
    lengths = rng.integers(1, 5, 60_000)
    picked = rng.integers(0, len(syllables), (60_000, 4))
    words = [
        "".join(syllables[i] for i in row[:length])
        for row, length in zip(picked.tolist(), lengths.tolist(), strict=True)
    ]
    return list(dict.fromkeys(words))


def _draw_text(rng: np.random.Generator, words: list[str], count: int) -> str:
    ranks = (len(words) * rng.random(count) ** 2).astype(np.int64)
    return " ".join(words[rank] for rank in ranks.tolist())


def _train_tokenizer(rng: np.random.Generator, words: list[str]) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    def texts() -> Iterator[str]:
        for _ in range(3_000):
            yield _draw_text(rng, words, 200)

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|endoftext|>"],  # END
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts(), trainer)
    if tokenizer.get_vocab_size() != VOCABULARY:
        raise SystemExit(f"spans: the tokenizer has {tokenizer.get_vocab_size()} tokens only")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")


def _draw_request(rng: np.random.Generator, words: list[str], tokenizer: Any) -> Request:
    tokens = tokenizer(_draw_text(rng, words, PASSAGE_TOKENS))["input_ids"][:PASSAGE_TOKENS]
    begin = int(rng.integers(0, PASSAGE_TOKENS - SPAN_TOKENS))
    texts = [tokenizer.decode([token]) for token in tokens]
    ids = torch.tensor([[END, *tokens[begin : begin + SPAN_TOKENS]]])
    return Request(tokens, texts, ids)


def _check_masks(
    unit: str, makers: dict[str, Maker], request: Request, scores: torch.Tensor
) -> None:
    running = {name: make(request, unit) for name, make in makers.items()}
    for token in request.ids[0, 1:].tolist():
        allowed = {name: one.masked(scores.clone()).isfinite() for name, one in running.items()}
        for name, one in running.items():
            if not allowed[name][allowed["fastmrc"]].all():
                raise SystemExit(f"spans: {name} forbids what fastmrc allows")
            if unit == "text" and not torch.equal(allowed[name], allowed["fastmrc"]):
                raise SystemExit(f"spans: {name} allows what fastmrc forbids")
            one.accept(token)


def _time_request(
    make: Callable[[], Any], request: Request, scores: torch.Tensor
) -> tuple[float, float]:
    """Return seconds to build and to mask at every step."""
    begin = time.perf_counter()
    one = make()
    building = time.perf_counter() - begin
    masking = 0.0
    own = torch.empty_like(scores)
    for token in request.ids[0, 1:].tolist():
        own.copy_(scores)  # the others work in place
        begin = time.perf_counter()
        one.masked(own)
        one.accept(token)
        masking += time.perf_counter() - begin
    return building, masking


# Part "tries".


def measure_tries(rounds: int) -> dict[str, Any]:
    """Build each kind of trie in processes of its own."""
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in CONTENDERS}
    left_out = {}
    for _ in range(rounds):
        for name in CONTENDERS:
            if name not in left_out:
                done = _run_build(name)
                if "left_out" in done:
                    left_out[name] = done["left_out"]
                else:
                    runs[name].append(done)
    found = {name: own for name, own in runs.items() if own}
    if len({own[0]["followers"] for own in found.values()}) != 1:
        raise SystemExit("tries: the contenders tell different tokens that may follow")
    keys = ("build_seconds", "peak_bytes", "kept_bytes")
    figures = {
        name: {key: median([run[key] for run in own]) for key in keys}
        for name, own in found.items()
    }
    return {
        "sequences": TRIE_SEQUENCES,
        "tokens": TRIE_TOKENS,
        "states": found["fastmrc"][0]["states"],
        "tries": figures,
        "memory_to_dictionary": {
            key: figures["fastmrc"][key] / figures["dictionary"][key] for key in keys[1:]
        },
        "wanted": {"memory_to_dictionary": 0.1, "build_seconds": 10},
        "left_out": left_out,
    }


def _run_build(name: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.constrained", "--build", name]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def build_trie(name: str) -> dict[str, Any]:
    """Build one kind of trie; return seconds, bytes beyond the input, and a digest of answers."""
    rng = np.random.default_rng(2)
    rows = draw_tokens(rng, (TRIE_SEQUENCES, TRIE_TOKENS))
    try:
        build = _trie_builder(name)
    except ImportError as error:
        return {"left_out": f"not installed: {error}"}
    _give_back()
    _forget_peak()
    before = _memory()[0]
    begin = time.perf_counter()
    states, followers = build(rows)
    seconds = time.perf_counter() - begin
    peak = _memory()[1]
    _give_back()
    kept = _memory()[0]
    digest = hashlib.sha256()
    for row in rows[rng.integers(0, TRIE_SEQUENCES, 300)].tolist():
        for length in (2, 3, 6, 8):
            digest.update(np.array(sorted(followers(row[:length])), dtype=np.int32).tobytes())
    return {
        "build_seconds": seconds,
        "peak_bytes": peak - before,
        "kept_bytes": kept - before,
        "states": states,
        "followers": digest.hexdigest(),
    }


Followers = Callable[[list[int]], Sequence[int]]


def _trie_builder(name: str) -> Callable[[NDArray[np.int32]], tuple[int | None, Followers]]:
    """Return what builds a trie of rows, and then what tells the tokens after a prefix."""
    if name == "fastmrc":
        return _build_fastmrc
    if name == "dictionary":
        return _build_dictionary
    import marisa_trie

    def build(rows: NDArray[np.int32]) -> tuple[None, Followers]:
        # A character for each token, as GENRE does it.
        trie = marisa_trie.Trie(rows.view(f"U{TRIE_TOKENS}").ravel().tolist())

        def followers(prefix: list[int]) -> list[int]:
            text = "".join(map(chr, prefix))
            longer = [key for key in trie.keys(text) if len(key) > len(text)]
            return list({ord(key[len(text)]) for key in longer})

        return None, followers

    return build


def _build_fastmrc(rows: NDArray[np.int32]) -> tuple[int, Followers]:
    trie = fastmrc.Trie(rows)

    def followers(prefix: list[int]) -> Sequence[int]:
        state = np.zeros(1, dtype=np.int32)
        for token in prefix:
            state = trie.advance(state, np.array([token]))
        return trie.allowed(state)[1].tolist()

    return trie.num_states, followers


def _build_dictionary(rows: NDArray[np.int32]) -> tuple[None, Followers]:
    # Row after row: the lists of all of them at once would count as memory of the trie.
    trie = DictionaryTrie(())
    for row in rows:
        node = trie.root
        for token in row.tolist():
            node = node.setdefault(token, {})
    return None, trie.get


def _memory() -> tuple[int, int]:
    """Return bytes in memory now and at most so far.

    The process's own peak: that of `resource` counts the process that started it, too.
    """
    with open("/proc/self/status", encoding="ascii") as file:
        fields = dict(line.split(":", 1) for line in file)
    now, peak = (int(fields[name].split()[0]) * 1024 for name in ("VmRSS", "VmHWM"))
    return now, max(now, peak)


def _give_back() -> None:
    """Let the allocator (of glibc) give what is free back to the system."""
    gc.collect()
    if hasattr(library := ctypes.CDLL(None), "malloc_trim"):
        library.malloc_trim(0)


def _forget_peak() -> None:
    try:
        with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
            file.write("5")
    except OSError:  # then the input, too, counts as part of the peak
        pass


if __name__ == "__main__":
    raise SystemExit(main())
