"""Kernels against their baselines: ``pytest benchmarks``.

Every group holds one task on the same inputs; results are checked for equality before they are
timed. Ratios stand in brackets beside the medians. The contenders of torch and the engine use the
number of threads in the group's name, NumPy uses one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

import fastmrc
from benchmarks import cases
from fastmrc import ops, reference
from fastmrc.decoding import beam_search
from fastmrc.options import SearchOptions
from fastmrc.retrieval import search_vectors

THREADS = (1, 2)


@pytest.fixture(params=THREADS, ids=lambda n: f"{n}thread")
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    fastmrc.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)
    fastmrc.set_num_threads(before)


def run(benchmark: Any, group: str, function: Callable[[], Any], rounds: int = 200) -> None:
    benchmark.group = group
    benchmark.pedantic(function, rounds=rounds, warmup_rounds=max(2, rounds // 10), iterations=1)


@pytest.mark.parametrize("k", [3, 8])
@pytest.mark.parametrize("contender", ["fastmrc", "torch.topk", "torch.amax", "numpy"])
def test_topk(benchmark: Any, threads: int, k: int, contender: str) -> None:
    x = torch.from_numpy(cases.standard_normal_rows())
    array = x.numpy()
    values, ids = ops.topk(x, k)
    expected = torch.topk(x, k)
    assert torch.equal(values, expected.values)
    assert torch.equal(ids.long(), expected.indices)
    contenders: dict[str, Callable[[], Any]] = {
        "fastmrc": lambda: ops.topk(x, k),
        "torch.topk": lambda: torch.topk(x, k),
        "torch.amax": lambda: x.amax(1),  # one read: the floor
        "numpy": lambda: np.argpartition(array, -k, axis=1)[:, -k:],
    }
    rounds = 20 if contender == "numpy" else 200
    run(benchmark, f"top-{k} [30, 21128], {threads} threads", contenders[contender], rounds)


@pytest.mark.parametrize("contender", ["fastmrc", "torch.logsumexp", "torch.amax"])
def test_row_stats(benchmark: Any, threads: int, contender: str) -> None:
    x = torch.from_numpy(cases.standard_normal_rows())
    assert torch.allclose(ops.row_stats(x)[2], x.double().logsumexp(1), atol=1e-6)
    contenders: dict[str, Callable[[], Any]] = {
        "fastmrc": lambda: ops.row_stats(x),  # maximum and argmax too
        "torch.logsumexp": lambda: x.logsumexp(1),
        "torch.amax": lambda: x.amax(1),
    }
    run(benchmark, f"row pass [30, 21128], {threads} threads", contenders[contender])


@pytest.mark.parametrize("mode", ["extractive", "generative"])
@pytest.mark.parametrize("contender", ["fastmrc", "reference"])
def test_beam_step(benchmark: Any, threads: int, mode: str, contender: str) -> None:
    """One step from logits, softmax included: the second token, after three different ones."""
    logits = cases.standard_normal_rows()
    scores = np.array([-1.0, -1.5, -2.0], dtype=np.float32)
    fixed = {
        "passages": cases.PASSAGES,
        "hypotheses": cases.BEAM_SIZE,
        "beam_size": cases.BEAM_SIZE,
        "end_id": cases.END_ID,
    }
    passages = cases.passages()
    indices = fastmrc.SpanIndex(passages), reference.SpanIndex([p.tolist() for p in passages])
    first = [int(passage[0]) for passage in passages[: cases.BEAM_SIZE]]

    def step(module: Any, index: Any) -> Any:
        if mode == "generative":
            return lambda: module.beam_step(logits, scores, **fixed)
        states = index.advance([0] * cases.BEAM_SIZE, first)
        return lambda: module.beam_step(logits, scores, constraint=index, states=states, **fixed)

    engine, baseline = step(ops, indices[0]), step(reference, indices[1])
    for got, expected in zip(engine()[1:], baseline()[1:], strict=True):
        np.testing.assert_array_equal(got, expected)
    function, rounds = (engine, 500) if contender == "fastmrc" else (baseline, 30)
    run(benchmark, f"beam step, {mode}, {threads} threads", function, rounds)


@pytest.mark.parametrize("mode", ["extractive", "generative"])
@pytest.mark.parametrize("contender", ["fastmrc", "reference"])
def test_search(benchmark: Any, threads: int, mode: Any, contender: str) -> None:
    """A whole search of six steps on logits computed beforehand, softmax included. The index of the
    engine and the n-gram sets of the reference are built inside."""
    passages = cases.passages()
    lists = [passage.tolist() for passage in passages]
    source = cases.RecordedLogits()
    options = SearchOptions(mode=mode, min_answer_tokens=cases.STEPS, max_answer_tokens=cases.STEPS)

    def engine() -> Any:
        return beam_search(
            source,
            [passages],
            end_id=cases.END_ID,
            vocabulary_size=cases.VOCABULARY,
            options=options,
        ).results[0]

    def baseline() -> Any:
        return reference.beam_search(
            source.next_logits,
            lists,
            end_id=cases.END_ID,
            mode=mode,
            min_tokens=cases.STEPS,
            max_tokens=cases.STEPS,
        )

    got, expected = engine(), baseline()
    assert [h.token_ids for h in got.hypotheses] == [h.token_ids for h in expected.hypotheses]
    function, rounds = (engine, 200) if contender == "fastmrc" else (baseline, 10)
    run(benchmark, f"search of six steps, {mode}, {threads} threads", function, rounds)


@pytest.mark.parametrize("contender", ["fastmrc", "reference"])
def test_span_index(benchmark: Any, contender: str) -> None:
    """Build over 10 x 256 tokens; the reference's n-gram dictionary is for one length only."""
    passages = cases.passages()
    lists = [passage.tolist() for passage in passages]
    native = fastmrc.SpanIndex(passages)
    oracle = reference.SpanIndex(lists)
    states = [index.advance([0], [int(passages[0][0])]) for index in (native, oracle)]
    np.testing.assert_array_equal(native.allowed(states[0])[1], oracle.allowed(states[1])[1])
    contenders: dict[str, Callable[[], Any]] = {
        "fastmrc": lambda: fastmrc.SpanIndex(passages),
        "reference": lambda: reference.SpanIndex(lists).allowed([0]),
    }
    run(benchmark, "span index 10 x 256 tokens", contenders[contender])


@pytest.mark.parametrize("decoding", ["greedy", "exact"])
@pytest.mark.parametrize("contender", ["fastmrc", "reference", "torch + NumPy"])
def test_slots(benchmark: Any, threads: int, decoding: str, contender: str) -> None:
    """Answers of six tokens from the logits of 32 slots of ten passages; softmax and the index of
    each passage (the reference: its n-gram sets) are inside."""
    if decoding == "greedy" and contender == "torch + NumPy":
        pytest.skip("only the exact search is a sum over whole arrays")
    logits = cases.slot_logits()
    passages = cases.passages()

    def decode(module: Any, index: Any) -> Any:
        arguments = {"end_id": cases.END_ID, "constraint": [index([p]) for p in passages]}
        if decoding == "greedy":
            return module.slot_argmax(logits, **arguments)
        return module.slot_topk(logits, 1, **arguments)

    contenders: dict[str, Callable[[], Any]] = {
        "fastmrc": lambda: decode(ops, fastmrc.SpanIndex),
        "reference": lambda: decode(reference, reference.SpanIndex),
        "torch + NumPy": lambda: exact_by_arrays(logits, passages),
    }
    got, expected = contenders["fastmrc"](), contenders[contender]()
    np.testing.assert_array_equal(np.squeeze(got[1]), np.squeeze(expected[1]))
    np.testing.assert_allclose(np.squeeze(got[2]), np.squeeze(expected[2]), rtol=1e-5)
    if contender != "torch + NumPy":
        np.testing.assert_array_equal(got[0], expected[0])
    rounds = {"fastmrc": 200, "torch + NumPy": 50}.get(contender, 3)
    group = f"slots, {decoding}, [10, 32, 21128], {threads} threads"
    run(benchmark, group, contenders[contender], rounds)


def exact_by_arrays(logits: Any, passages: Any) -> tuple[None, Any, Any]:
    """Find lengths and scores of the best spans by array operations: the peer of `slot_topk`."""
    probs = torch.softmax(torch.from_numpy(logits), -1).numpy()
    slots = probs.shape[1]
    lengths, scores = [], []
    for own, tokens in zip(probs, passages, strict=True):
        of_tokens, of_end = own[:, tokens].astype(np.float64), own[:, cases.END_ID]
        sums = np.zeros(len(tokens) + 1)
        best = (float(of_end[0]), 0)
        for m in range(1, slots + 1):
            # Sums of the spans of m tokens from each start.
            sums = sums[:-1] + of_tokens[m - 1, m - 1 :]
            end = float(of_end[m]) if m < slots else 0.0
            best = max(best, ((sums.max() + end) / min(m + 1, slots), m))
        scores.append(best[0])
        lengths.append(best[1])
    return None, np.array(lengths), np.array(scores)


@pytest.mark.parametrize("contender", ["fastmrc", "reference"])
def test_best_spans(benchmark: Any, threads: int, contender: str) -> None:
    """Top 20 of 64 windows of 384 tokens, answers of at most 15, softmax included. The reference is
    the NumPy method of the pipeline that transformers removed."""
    start, end = cases.span_logits()
    mask = np.ones(start.shape, dtype=np.bool_)
    mask[:, :20] = False  # [CLS] and the question

    def find(module: Any) -> Any:
        return module.best_spans(start, end, 20, 15, mask=mask, null_position=0)

    for got, expected in zip(find(ops), find(reference), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-5)
    function = {"fastmrc": lambda: find(ops), "reference": lambda: find(reference)}[contender]
    rounds = 300 if contender == "fastmrc" else 10
    run(benchmark, f"best spans, 64 x 384 tokens, top 20, {threads} threads", function, rounds)


@pytest.mark.parametrize("contender", ["fastmrc", "bert4keras", "torch"])
def test_sample_step(benchmark: Any, threads: int, contender: str) -> None:
    """Draw the next tokens of 100 sequences from the five likeliest, softmax included."""
    array = cases.standard_normal_rows(100)
    logits = torch.from_numpy(array)
    drawn = ops.sample(array, end_id=cases.END_ID, seed=1, top_k=5)
    expected = reference.sample(array, end_id=cases.END_ID, seed=1, top_k=5)
    np.testing.assert_array_equal(drawn[0], expected[0])
    np.testing.assert_allclose(drawn[1], expected[1], atol=1e-5)
    likeliest = np.argsort(-array, axis=1)[:, :5]
    others = cases.bert4keras_draw(array, 5)
    assert (likeliest == others[:, None]).any(axis=1).all()

    def torch_draw() -> Any:
        values, ids = torch.topk(logits, 5)
        places = torch.multinomial(torch.softmax(values, dim=1), 1)
        log_probs = torch.log_softmax(logits, dim=1)
        tokens = ids.gather(1, places)
        return tokens, log_probs.gather(1, tokens)

    contenders: dict[str, Callable[[], Any]] = {
        "fastmrc": lambda: ops.sample(array, end_id=cases.END_ID, seed=1, top_k=5),
        "bert4keras": lambda: cases.bert4keras_draw(array, 5),
        "torch": torch_draw,
    }
    rounds = 20 if contender == "bert4keras" else 200
    name = f"sample step, top 5 [100, 21128], {threads} threads"
    run(benchmark, name, contenders[contender], rounds)


@pytest.mark.parametrize("contender", ["fastmrc", "reference", "torch"])
def test_attention_sum(benchmark: Any, threads: int, contender: str) -> None:
    """The five words with the most attention, of 256 documents of 800 words, softmax included."""
    logits, word_ids = cases.cloze_positions()
    rows, columns = torch.from_numpy(logits), torch.from_numpy(word_ids).long()

    def torch_sums() -> Any:
        sums = torch.zeros(len(rows), cases.VOCABULARY)
        return torch.topk(sums.scatter_add_(1, columns, torch.softmax(rows, dim=1)), 5)

    words, probs, _ = ops.attention_sum(logits, word_ids, 5)
    expected = reference.attention_sum(logits, word_ids, 5)
    np.testing.assert_array_equal(words, expected[0])
    np.testing.assert_allclose(probs, expected[1], rtol=1e-14)
    np.testing.assert_allclose(torch_sums()[0], probs, rtol=1e-4)  # in float32
    contenders: dict[str, Callable[[], Any]] = {
        "fastmrc": lambda: ops.attention_sum(logits, word_ids, 5),
        "reference": lambda: reference.attention_sum(logits, word_ids, 5),
        "torch": torch_sums,
    }
    rounds = 5 if contender == "reference" else 100
    name = f"attention-sum, top 5 [256, 800], {threads} threads"
    run(benchmark, name, contenders[contender], rounds)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the import of faiss
@pytest.mark.parametrize("contender", ["fastmrc", "faiss", "torch", "torch.mm"])
def test_exact_search(benchmark: Any, threads: int, contender: str) -> None:
    """1,000 queries, 100,000 vectors of 384 numbers, the ten nearest; the product alone is the
    floor. Only fastmrc decides in float64."""
    faiss = pytest.importorskip("faiss", reason="faiss is not installed")
    faiss.omp_set_num_threads(threads)
    corpus, queries = cases.unit_vectors(101_000)[:100_000], cases.unit_vectors(101_000)[100_000:]
    index = faiss.IndexFlatIP(corpus.shape[1])
    index.add(corpus)
    rows, columns = torch.from_numpy(queries), torch.from_numpy(corpus).T
    found = search_vectors(queries, corpus, 10).ids
    exact = queries[:20].astype(np.float64) @ corpus.T.astype(np.float64)
    np.testing.assert_array_equal(found[:20], np.argsort(-exact, axis=1)[:, :10])
    contenders: dict[str, Callable[[], Any]] = {
        "fastmrc": lambda: search_vectors(queries, corpus, 10),
        "faiss": lambda: index.search(queries, 10),
        "torch": lambda: torch.topk(rows @ columns, 10),
        "torch.mm": lambda: rows @ columns,
    }
    for other in (contenders["faiss"]()[1], contenders["torch"]()[1].numpy()):
        assert (other == found).mean() > 0.999  # the others decide in float32
    run(benchmark, f"exact search, {threads} threads", contenders[contender], 10)
