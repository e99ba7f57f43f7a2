"""Kernels and readers on a GPU, or on its emulation, against those of the CPU.

The random cases of the kernels are those of the CPU's tests, with rows on the device: the tests
marked "gpu" of test_ops.py, test_slot_ops.py, test_span_ops.py, test_attention_sum.py and
test_sampling.py. All other tests run there with FASTMRC_TEST_ON_DEVICE=1.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import assert_same_answer

import fastmrc
from fastmrc import (
    _C,
    ClozeReader,
    MLMReader,
    Seq2SeqReader,
    SimilarityModel,
    SpanReader,
    ops,
)
from fastmrc.cuda import runtime
from fastmrc.cuda.automata import DeviceAutomata, single_automaton
from fastmrc.encoders.device import BufferPool, DeviceSession
from fastmrc.encoders.unilm import UniLMEncoder

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("one_thread")]

QUESTIONS = [
    ("北京在哪里?", ["中国北京在二月天气大", "上海New York山水,火。北京", "人名"]),
    ("谁?", ["上海"]),
    ("名字是何?", []),
    ("the name of New York 2024", ["北京上海天气山水一二" * 3, "是", "中国,上海。" * 5, "水" * 9]),
    ("二月?", ["", "二月天气"]),
]


@pytest.fixture
def on_cpu(device: str) -> Callable[[], Any]:
    """Let what runs inside run on the CPU's kernels."""

    @contextmanager
    def context() -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(runtime, "device_type", "none")
            yield

    return context


# --- kernels -------------------------------------------------------------------------------------


def _rows(device: str, rows: int = 3, cols: int = 50) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(rows, cols, generator=generator).to(device)


def test_results_are_on_the_device_and_inputs_as_before(device: str) -> None:
    x = _rows(device)
    before = x.clone()
    values, ids = ops.topk(x, 4)
    assert values.device.type == ids.device.type == device
    assert (values.dtype, ids.dtype) == (torch.float32, torch.int32)
    assert ops.topk(x[0], 4)[1].tolist() == ids[0].tolist()
    assert ops.row_stats(x[1])[1].ndim == 0
    assert torch.equal(x, before)


@pytest.mark.parametrize("k", [512, 513, 700, 3000])
@pytest.mark.parametrize("operation", [ops.topk, ops.log_softmax_topk])
def test_large_k(device: str, on_cpu: Any, operation: Any, k: int) -> None:
    x = _rows(device, 4, 2000).round()
    x[2, 5:] = -torch.inf
    values, ids = operation(x, k)
    with on_cpu():
        want_values, want_ids = operation(x.cpu(), k)
    assert torch.equal(ids.cpu(), want_ids)
    torch.testing.assert_close(values.cpu(), want_values)
    x[1, 7] = torch.nan
    with pytest.raises(ValueError, match=r"^x: .* NaN in row 1"):
        operation(x, k)


@pytest.mark.parametrize("shift", range(8))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_views_that_begin_anywhere(device: str, dtype: torch.dtype, shift: int) -> None:
    whole = _rows(device, 3, 9000).to(dtype)
    part = whole[:, shift : shift + 8500]
    assert torch.equal(ops.topk(part, 5)[1], ops.topk(part.contiguous(), 5)[1])
    assert torch.equal(ops.row_stats(part)[2], ops.row_stats(part.contiguous())[2])


def test_equal_rows_give_equal_results(device: str) -> None:
    rows = torch.empty(5, 9003, device=device)[:, 1:9002]  # of different alignment
    rows[:] = _rows(device, 1, 9001)
    for array in ops.row_stats(rows):
        assert len(array.unique()) == 1


def test_large_rows_of_the_batch_do_not_matter(device: str) -> None:
    x = _rows(device, 40, 300)
    together = ops.row_stats(x)[2]
    alone = torch.stack([ops.row_stats(row)[2] for row in x])
    assert torch.equal(together, alone)


def test_faults_are_told_by_the_call(device: str) -> None:
    x = _rows(device)
    x[2, 3] = torch.nan
    for call in (
        lambda: ops.topk(x, 2),
        lambda: ops.row_stats(x),
        lambda: ops.sample(x, end_id=0, seed=1),
        lambda: ops.best_spans(x, x, 1, 5),
        lambda: ops.attention_sum(x, torch.ones_like(x, dtype=torch.int32), 2),
        lambda: ops.slot_argmax(x[None], end_id=0),
    ):
        with pytest.raises(ValueError, match="NaN in row 2"):
            call()
    x[2] = -torch.inf
    with pytest.raises(ValueError, match="got only -inf in row 2"):
        ops.beam_step(x, [0.0] * 3, passages=1, hypotheses=[1] * 3, beam_size=2, end_id=0)


def test_deferred_checks(device: str) -> None:
    x = _rows(device)
    x[1, 0] = torch.nan
    with ops.deferred_checks() as faults:
        values, ids = ops.topk(x, 3)
        ops.row_stats(x)
    assert ids[0].min() >= 0 and ids[1].tolist() == [-1] * 3 and values[1].isnan().all()
    with pytest.raises(ValueError, match="x: .* NaN in row 1"):
        faults.check()
    faults.check()  # told once
    with ops.deferred_checks() as faults:
        ops.topk(x[:1], 3)
    faults.check()
    with pytest.raises(ValueError, match="NaN in row 1"):
        ops.topk(x, 3)  # as before


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: ops.topk(x, 0), ValueError, "k: expected at least 1, got 0"),
        (lambda x: ops.topk(x.double(), 1), TypeError, "x: expected float32, float16 or bfloat16"),
        (lambda x: ops.topk(x.T, 1), ValueError, "x: expected rows that are contiguous"),
        (lambda x: ops.topk(x[None], 1), ValueError, "x: expected 1 or 2 dimensions, got 3"),
        (lambda x: ops.topk(x[:, :0], 1), ValueError, "x: expected at least one column"),
        (lambda x: ops.best_spans(x, x[:2], 1, 1), ValueError, "end: expected the shape of start"),
        (lambda x: ops.best_spans(x, x, 0, 1), ValueError, "k: expected at least 1"),
        (lambda x: ops.best_spans(x, x, 513, 1), ValueError, "k: expected at most 512"),
        (lambda x: ops.best_spans(x, x, 1, 0), ValueError, "max_length: expected at least 1"),
        (
            lambda x: ops.best_spans(x, x, 1, 1, null_position=50),
            ValueError,
            "null_position: expected a position below 50",
        ),
        (lambda x: ops.best_spans(x, x, 1, 1, mask=x), TypeError, "mask: expected bool"),
        (lambda x: ops.attention_sum(x, x, 1), TypeError, "word_ids: expected integers"),
        (
            lambda x: ops.attention_sum(x, torch.ones(3, 50, dtype=torch.int32), 0),
            ValueError,
            "k: expected at least 1",
        ),
        (
            lambda x: ops.attention_sum(
                x, torch.ones(3, 50, dtype=torch.int32), 1, lengths=[1, 51, 2]
            ),
            ValueError,
            "lengths: expected 0 to the number of positions, got another number in row 1",
        ),
        (
            lambda x: ops.attention_sum(x, -torch.ones(3, 50, dtype=torch.int32), 1),
            ValueError,
            "word_ids: expected 0 or more, got a negative one in row 0",
        ),
        (lambda x: ops.slot_argmax(x[None], end_id=50), ValueError, "end_id: expected a token"),
        (
            lambda x: ops.slot_topk(x[None], 65, end_id=0, constraint=fastmrc.SpanIndex([[1, 2]])),
            ValueError,
            "64",
        ),
        (
            lambda x: ops.beam_step(
                x, [0.0] * 3, passages=1, hypotheses=[1, 2], beam_size=51, end_id=0
            ),
            ValueError,
            "beam_size: expected 1 to the vocabulary size 50, got 51",
        ),
        (
            lambda x: ops.beam_step(x, [0.0], passages=1, hypotheses=[3], beam_size=1, end_id=0),
            ValueError,
            "scores: expected 3 entries",
        ),
        (
            lambda x: ops.sample(
                x, end_id=0, seed=0, states=[0, 1, 99], constraint=fastmrc.SpanIndex([[1, 2]])
            ),
            ValueError,
            "states: expected -1 or a state",
        ),
    ],
)
def test_bad_arguments(device: str, call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(_rows(device))


def test_the_stub_is_that_of_the_extension(device: str) -> None:
    kernels = runtime.kernels()
    source = (Path(fastmrc.__file__).parent / "_cuda.pyi").read_text(encoding="utf-8")
    described: set[str] = set()

    def compare(owner: Any, nodes: list[ast.stmt]) -> None:
        for node in nodes:
            if isinstance(node, ast.ClassDef):
                described.add(node.name)
                compare(getattr(owner, node.name), node.body)
            elif isinstance(node, ast.FunctionDef):
                described.add(node.name)
                signature = getattr(owner, node.name).__doc__.split("\n")[0]
                names = re.findall(r"(\w+): ", signature.rsplit(" -> ", 1)[0])
                assert [arg.arg for arg in node.args.args] == names, node.name

    compare(kernels, ast.parse(source).body)
    public = {name for name, value in vars(kernels).items() if callable(value)}
    assert public - {"set_order"} <= described  # of the emulation alone


# --- automata ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "automaton",
    [
        fastmrc.SpanIndex([[5, 6, 7, 5, 6], [9]]),
        fastmrc.Trie([[1, 2], [1, 3, 4], [2]]),
        fastmrc.Trie([]),
    ],
)
def test_automata(device: str, automaton: Any) -> None:
    states = np.array([*range(automaton.num_states), -1], np.int32)
    there = torch.from_numpy(states).to(device)
    tokens = torch.full_like(there, 6)
    got = automaton.advance(there, tokens).cpu().numpy()
    np.testing.assert_array_equal(got, automaton.advance(states, tokens.cpu().numpy()))
    np.testing.assert_array_equal(
        automaton.is_final(there).cpu().numpy(), automaton.is_final(states)
    )
    for ours, theirs in zip(automaton.allowed(there), automaton.allowed(states), strict=True):
        np.testing.assert_array_equal(ours.cpu().numpy(), theirs)
    with pytest.raises(ValueError, match="states: expected -1 or a state"):
        automaton.advance(there + 1, tokens)
    with pytest.raises(TypeError, match="states: expected integers"):
        automaton.is_final(there.float())
    with pytest.raises(ValueError, match="tokens: expected one per state"):
        automaton.advance(there, tokens[1:])


def test_automata_of_a_batch(device: str) -> None:
    first, second = (fastmrc.Trie([[1]])._native for _ in range(2))
    batch = DeviceAutomata([first, None, second, first], torch.device(device))
    assert batch.automaton_of is not None
    assert batch.automaton_of.tolist() == [0, -1, 1, 0] and not batch.all_constrained
    assert DeviceAutomata([None], torch.device(device)).native is None
    one = DeviceAutomata.of([first, first], torch.device(device))
    assert (
        one.all_constrained and one.native is single_automaton(first, torch.device(device)).native
    )
    with pytest.raises(TypeError, match="automata: expected automata, got None"):
        _C.pack_automata([None])


# --- readers -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"beam_size": 5, "mode": "generative", "max_answer_tokens": 6},
        {"finish": "pool", "length_penalty": 0.7},
        {"vote": "weighted", "passage_weights": True, "min_answer_tokens": 2},
        {"combine": "answer"},
        {"no_answer_ratio": 1.05, "max_passage_tokens": 5, "stride": 2},
        {"max_answer_tokens": 1},
    ],
)
def test_seq2seq_reader(
    device: str, on_cpu: Any, tiny_bert_dir: Path, options: dict[str, Any]
) -> None:
    options = dict(options)
    if options.get("passage_weights"):
        options["passage_weights"] = [[0.5] * len(passages) for _, passages in QUESTIONS]
    reader = Seq2SeqReader.from_pretrained(tiny_bert_dir, device=device)
    ours = reader.answer_batch(QUESTIONS, **options)
    with on_cpu():
        theirs = Seq2SeqReader.from_pretrained(tiny_bert_dir, device="cpu").answer_batch(
            QUESTIONS, **options
        )
    for a, b in zip(ours, theirs, strict=True):
        assert_same_answer(a, b, 1e-4)


def test_shapes_repeat_and_rows_leave(
    device: str, on_cpu: Any, tiny_bert_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same reader again and again: buffers are lent anew, and questions that are done leave."""
    moved: list[int] = []
    begin = DeviceSession.begin

    def counted(self: DeviceSession, passages: Any) -> Any:
        moved.append(len(passages))
        return begin(self, passages)

    monkeypatch.setattr(DeviceSession, "begin", counted)
    reader = Seq2SeqReader.from_pretrained(tiny_bert_dir, device=device)
    with on_cpu():
        expected = Seq2SeqReader.from_pretrained(tiny_bert_dir, device="cpu").answer_batch(
            QUESTIONS * 3, min_answer_tokens=0
        )
    for _ in range(5):
        for a, b in zip(reader.answer_batch(QUESTIONS * 3), expected, strict=True):
            assert_same_answer(a, b, 1e-4)
    assert len(moved) > 5 and min(moved) < max(moved)
    assert len(reader._encoder.pool._kept) == 1


def test_buffers_are_kept_for_few_shapes(device: str) -> None:
    pool = BufferPool()
    for rows in (3, 4, 5, 3):
        with pool.lend(rows, 32, 64, 2, torch.device(device)) as buffers:
            assert buffers.rows == rows and buffers not in pool._kept
    assert [buffers.rows for buffers in pool._kept] == [5, 3]
    with pytest.raises(RuntimeError, match="stop"), pool.lend(5, 32, 64, 2, torch.device(device)):
        raise RuntimeError("stop")
    assert [buffers.rows for buffers in pool._kept] == [3]  # what broke is not lent again


def test_nan_of_the_model_is_told(device: str, bert_copy: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(bert_copy / "model.safetensors")
    reader = Seq2SeqReader.from_pretrained(bert_copy, device=device)
    for name, weight in weights.items():
        if name.endswith("predictions.bias"):
            weight[7] = torch.nan
    save_file(weights, bert_copy / "model.safetensors", {"format": "pt"})
    with torch.no_grad():
        reader._encoder._head[0].predictions.bias[7] = torch.nan
    with pytest.raises(ValueError, match="logits: expected numbers below infinity, got NaN"):
        reader.answer(*QUESTIONS[0])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision(device: str, tiny_bert_dir: Path, dtype: str) -> None:
    reader = Seq2SeqReader.from_pretrained(tiny_bert_dir, device=device, dtype=dtype)
    exact = Seq2SeqReader.from_pretrained(tiny_bert_dir, device=device)
    for a, b in zip(reader.answer_batch(QUESTIONS), exact.answer_batch(QUESTIONS), strict=True):
        # Roundings may change the answer of random weights; its score is near.
        assert a.score == pytest.approx(b.score, abs=0.5)


@pytest.mark.parametrize("options", [{}, {"decoding": "exact", "top_k": 3}, {"mode": "generative"}])
def test_mlm_reader(device: str, on_cpu: Any, tiny_bert_dir: Path, options: Any) -> None:
    ours = MLMReader.from_pretrained(tiny_bert_dir, device=device).answer_batch(
        QUESTIONS, **options
    )
    with on_cpu():
        theirs = MLMReader.from_pretrained(tiny_bert_dir, device="cpu").answer_batch(
            QUESTIONS, **options
        )
    for a, b in zip(ours, theirs, strict=True):
        assert_same_answer(a, b, 1e-4)


def test_span_reader(device: str, on_cpu: Any, bert_qa_dir: Path) -> None:
    ours = SpanReader.from_pretrained(bert_qa_dir, device=device).answer_batch(QUESTIONS, top_k=3)
    with on_cpu():
        theirs = SpanReader.from_pretrained(bert_qa_dir, device="cpu").answer_batch(
            QUESTIONS, top_k=3
        )
    for a, b in zip(ours, theirs, strict=True):
        assert_same_answer(a, b, 1e-4)


def test_cloze_reader(device: str, on_cpu: Any) -> None:
    words = list("小明在看书。小明喜欢书。小红也在家看书。")
    words[3] = "XXXXX"
    ours = ClozeReader.from_pretrained(device=device).fill(words)
    with on_cpu():
        theirs = ClozeReader.from_pretrained(device="cpu").fill(words)
    assert [word.text for word in ours.words] == [word.text for word in theirs.words]
    assert [word.score for word in ours.words] == pytest.approx(
        [word.score for word in theirs.words], abs=1e-4
    )


def test_similarity_model(device: str, on_cpu: Any) -> None:
    options: dict[str, Any] = {"n": 5, "seed": 3, "max_tokens": 8, "top_k": 5}
    model = SimilarityModel.from_pretrained(device=device)
    ours = model.generate("北京在哪里", **options)
    trie = fastmrc.Trie([[10, 11], [12]])
    bound = model.generate("北京", n=3, seed=4, max_tokens=4, constraint=trie)
    with on_cpu():
        cpu = SimilarityModel.from_pretrained(device="cpu")
        theirs = cpu.generate("北京在哪里", **options)
        theirs_bound = cpu.generate("北京", n=3, seed=4, max_tokens=4, constraint=trie)
    assert [text.token_ids for text in ours] == [text.token_ids for text in theirs]
    assert [text.token_ids for text in bound] == [text.token_ids for text in theirs_bound]
    np.testing.assert_allclose(
        [text.log_prob for text in ours], [text.log_prob for text in theirs], atol=1e-3
    )
    vectors = model.encode(["北京在哪里", "上海"])
    np.testing.assert_allclose(vectors, cpu.encode(["北京在哪里", "上海"]), atol=1e-4)


def test_a_long_answer_needs_positions(device: str, tiny_bert_dir: Path) -> None:
    from fastmrc.pretrained import load_model

    encoder = UniLMEncoder(load_model(tiny_bert_dir, device=device).model)
    row = np.arange(encoder.max_positions, dtype=np.int32)
    with pytest.raises(fastmrc.InputError, match="passages: expected input and answer of at most"):
        encoder.device_session([row], 1, 1)
