"""The cached tree decoding against re-encoding, on tiny models of every supported family."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import BERT_TOKENS, save_model
from numpy.typing import NDArray

import fastmrc
from fastmrc import decoding
from fastmrc.encoders import batches
from fastmrc.encoders import unilm as encoder
from fastmrc.encoders.unilm import SUPPORTED_MODEL_TYPES, EncoderSession, UniLMEncoder
from fastmrc.errors import InputError, UnsupportedModelError
from fastmrc.options import SearchOptions
from fastmrc.pretrained import load_model
from fastmrc.readers.seq2seq import Seq2SeqReader
from fastmrc.reference.encoder import ReencodingEncoder

END = 3  # [SEP] of the tiny BERT models
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.25}


pytestmark = pytest.mark.usefixtures("one_thread")


class Compared:
    """A logits source that compares every row of the session with re-encoding."""

    def __init__(
        self, model: Any, end_id: int, rows: Sequence[NDArray[np.int32]], max_steps: int
    ) -> None:
        self.session = UniLMEncoder(model).session(rows, max_steps)
        self._next_logits = ReencodingEncoder(model, end_id=end_id).next_logits_for(
            row.tolist() for row in rows
        )
        self._rows = rows
        self._columns: list[NDArray[np.int32]] = []  # per answer column: token of each question
        self._seen: dict[tuple[int, int], NDArray[np.intp]] = {}  # by question and column
        self.cached_rows: list[int] = []
        self.widths: list[int] = []
        self.computed_ahead: list[bool] = []
        self.largest = 0.0

    def prefill(self) -> Any:
        logits = self.session.prefill()
        self._compare(logits, [[]] * len(self._rows), range(len(self._rows)))
        return logits

    def step(self, request: Any) -> Any:
        logits = self.session.step(request)
        self.cached_rows.append(self.session._cache.rows)
        self.widths.append(request.width)
        self.computed_ahead.append(self.session._ahead is not None)
        questions = request.questions.tolist()
        for k in range(request.width):
            column = np.zeros(99, np.int32)
            column[questions] = request.tokens[:, k]
            self._columns.append(column)
            for a, q in enumerate(questions):
                self._seen[q, len(self._columns) - 1] = np.flatnonzero(request.ancestors[a, k])
        prefixes = []
        for a, c in zip(request.row_question, request.row_column.tolist(), strict=True):
            q = questions[a]
            prefixes.append([int(self._columns[i][q]) for i in self._seen[q, c]])
        self._compare(logits, prefixes, request.row_passage.tolist())
        return logits

    def _compare(self, logits: Any, prefixes: list[list[int]], passages: Any) -> None:
        assert logits.dtype == torch.float32
        ours = torch.log_softmax(logits, -1).cpu().numpy()
        passages = np.array(passages)
        for passage in np.unique(passages):
            mine = np.flatnonzero(passages == passage)
            theirs = self._next_logits([prefixes[i] for i in mine], [int(passage)])[0]
            self.largest = max(self.largest, float(np.abs(ours[mine] - theirs).max()))


def _inputs(
    rng: np.random.Generator, lengths: Sequence[int], vocabulary: int, end_id: int
) -> list[NDArray[np.int32]]:
    rows = []
    for length in lengths:
        row = rng.integers(5, vocabulary, length + 3)
        row[-1] = end_id
        rows.append(row.astype(np.int32))
    return rows


def _decode(
    model: Any, lengths: Sequence[Sequence[int]], seed: int = 0, **options: Any
) -> tuple[Compared, list[Any]]:
    """Search questions with passages of these lengths, comparing every row of logits."""
    end_id = END if model.config.model_type in ("bert", "electra", "ernie") else 2
    rng = np.random.default_rng(seed)
    rows = _inputs(
        rng, [n for question in lengths for n in question], model.config.vocab_size, end_id
    )
    spans = iter(row[1:-2].tolist() for row in rows)
    questions = [[next(spans) for _ in question] for question in lengths]
    chosen = SearchOptions(**options)
    source = Compared(model, end_id, rows, chosen.max_answer_tokens - 1)
    batch = decoding.beam_search(
        source,
        questions,
        end_id=end_id,
        vocabulary_size=model.config.vocab_size,
        options=chosen,
    )
    return source, batch.results


@pytest.mark.parametrize("mode", ["extractive", "generative"])
def test_cached_equals_reencoded(tiny_model_dir: Path, mode: str) -> None:
    model = load_model(tiny_model_dir).model
    lengths = [[7, 20, 3], [1], [], [12, 12, 5, 0, 9]]
    source, results = _decode(
        model, lengths, mode=mode, min_answer_tokens=5, max_answer_tokens=6, beam_size=3
    )
    assert len(source.cached_rows) == 5
    assert [len(result.surviving) for result in results] == [3, 1, 0, 5]
    assert source.largest < TOLERANCE[torch.float32]


def test_bfloat16(tiny_model_dir: Path) -> None:
    model = load_model(tiny_model_dir, dtype="bfloat16").model
    source, _ = _decode(model, [[7, 20, 3], [4]], min_answer_tokens=4, max_answer_tokens=5)
    assert 0 < source.largest < 1.0
    head = UniLMEncoder(model)._head
    assert all(p.dtype == torch.float32 for module in head for p in module.parameters())
    assert model.dtype == torch.bfloat16


class Leaving(Compared):
    """Ends questions and rejects passages when told, whatever the model says."""

    def __init__(self, *args: Any, reject: Sequence[int], end: dict[int, int]) -> None:
        super().__init__(*args)
        self.reject, self.end, self.t = reject, end, 0

    def prefill(self) -> Any:
        logits = super().prefill().clone()
        logits[:, END] = -100.0
        logits[list(self.reject), END] = 100.0
        return logits

    def step(self, request: Any) -> Any:
        self.t += 1
        logits = super().step(request).clone()
        questions = request.questions[request.row_question]
        ends = torch.tensor([self.end.get(int(q)) == self.t for q in questions])
        logits[:, END] = torch.where(ends, 100.0, -100.0)
        return logits


def test_rows_move_when_passages_and_questions_leave(tiny_bert_dir: Path) -> None:
    model = load_model(tiny_bert_dir).model
    rng = np.random.default_rng(1)
    rows = _inputs(rng, [9, 4, 17, 30, 6, 8, 21, 2], model.config.vocab_size, END)
    passages = [row[1:-2].tolist() for row in rows]
    source = Leaving(model, END, rows, 7, reject=[1, 3], end={0: 2, 1: 4})
    batch = decoding.beam_search(
        source,
        [passages[:3], passages[3:5], passages[5:]],
        end_id=END,
        vocabulary_size=model.config.vocab_size,
        options=SearchOptions(mode="generative", beam_size=2, max_answer_tokens=8),
    )
    assert batch.results[0].surviving == [True, False, True]
    assert source.cached_rows == [6, 6, 4, 4, 3, 3, 3]
    assert source.largest < TOLERANCE[torch.float32]


def test_the_beam_may_grow(tiny_bert_dir: Path) -> None:
    """A trie may have one first token and many second ones: the cache must hold them."""
    model = load_model(tiny_bert_dir).model
    rows = _inputs(np.random.default_rng(2), [8, 5], model.config.vocab_size, END)
    sequences = [[40, 50 + i, 60 + j, 70, 71] for i in range(2) for j in range(4)]
    source = Compared(model, END, rows, 5)
    batch = decoding.beam_search(
        source,
        [[row[1:-2].tolist() for row in rows]],
        end_id=END,
        vocabulary_size=model.config.vocab_size,
        options=SearchOptions(beam_size=6, min_answer_tokens=5, max_answer_tokens=6),
        constraints=[fastmrc.Trie(sequences)],
    )
    assert source.widths == [1, 2, 6 * 3, 0, 0]  # from the third token on there is no choice
    assert source.largest < TOLERANCE[torch.float32]
    assert len(batch.results[0].hypotheses) == 6


@pytest.mark.parametrize("limit", [0, encoder._LOGITS_AHEAD])
def test_look_ahead_saves_calls_and_changes_nothing(
    tiny_bert_dir: Path, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    """Tokens encoded before they are chosen have the logits that they would have had later, be
    these computed at once or, above a limit, when they are asked for."""
    monkeypatch.setattr(encoder, "_LOGITS_AHEAD", limit)
    model = load_model(tiny_bert_dir).model
    lengths = [[30, 12, 17]]
    found = {}
    for look_ahead in (0, 1, 4):
        source, results = _decode(
            model, lengths, min_answer_tokens=7, max_answer_tokens=8, look_ahead=look_ahead
        )
        assert source.largest < TOLERANCE[torch.float32]
        calls = sum(width > 0 for width in source.widths)
        assert any(source.computed_ahead) == (look_ahead > 0 and limit > 0)
        found[look_ahead] = calls, [[h.token_ids for h in r.hypotheses] for r in results]
    assert found[0][1] == found[1][1] == found[4][1]
    assert found[0][0] > found[1][0] > found[4][0]


def test_prefill_batches(tiny_bert_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut into several forward passes by the token budget, the rows stay the same."""
    model = load_model(tiny_bert_dir).model
    lengths = [[30, 2, 17, 9], [28, 28], [1, 40]]
    one, results = _decode(model, lengths, min_answer_tokens=3, max_answer_tokens=4)
    monkeypatch.setattr(batches, "MAX_BATCH_TOKENS", 64)
    several, again = _decode(model, lengths, min_answer_tokens=3, max_answer_tokens=4)
    assert one.largest < 1e-4 and several.largest < 1e-4
    for a, b in zip(results, again, strict=True):
        assert [h.token_ids for h in a.hypotheses] == [h.token_ids for h in b.hypotheses]


def test_padding_is_bounded(tiny_bert_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "MAX_BATCH_TOKENS", 100)
    model = load_model(tiny_bert_dir).model
    shapes: list[tuple[int, ...]] = []
    unilm = UniLMEncoder(model)
    forward = unilm.forward

    def counted(tokens: torch.Tensor, *args: Any) -> torch.Tensor:
        shapes.append(tuple(tokens.shape))
        return forward(tokens, *args)

    monkeypatch.setattr(unilm, "forward", counted)
    lengths = [50, 3, 47, 4, 120, 5, 49, 2]
    rows = _inputs(np.random.default_rng(3), lengths, model.config.vocab_size, END)
    EncoderSession(unilm, rows, 1).prefill()
    assert sum(rows for rows, _ in shapes) == len(lengths)
    assert all(rows == 1 or rows * tokens <= 100 for rows, tokens in shapes)
    assert [tokens for _, tokens in shapes] == sorted((t for _, t in shapes), reverse=True)
    assert sum(rows * tokens for rows, tokens in shapes) < 1.2 * sum(n + 3 for n in lengths)


def test_the_head_sees_only_rows_that_count(tiny_model_dir: Path) -> None:
    loaded = load_model(tiny_model_dir)
    rows: list[int] = []
    unilm = UniLMEncoder(loaded.model)
    for module in unilm._head[:1]:
        module.register_forward_hook(lambda m, args, out: rows.append(len(args[0])))
    whole = []
    loaded.model.register_forward_hook(lambda *_: whole.append(1))
    asked = []

    class Counted:
        def __init__(self) -> None:
            inputs = _inputs(np.random.default_rng(4), [6, 9, 3, 5], 60, 2)
            self.session = unilm.session(inputs, 3)

        def prefill(self) -> Any:
            asked.append(4)
            logits = self.session.prefill().clone()
            logits[:, 2], logits[0, 2] = -50.0, 99.0  # the first passage leaves
            return logits

        def step(self, request: Any) -> Any:
            asked.append(len(request.row_passage))
            logits = self.session.step(request).clone()
            logits[:, 2] = -50.0
            return logits

    decoding.beam_search(
        Counted(),
        [[[10], [11], [12]], [[13]]],
        end_id=2,
        vocabulary_size=loaded.model.config.vocab_size,
        options=SearchOptions(mode="generative", beam_size=3, max_answer_tokens=4),
        constraints=[None, fastmrc.Trie([range(13, 18)])],  # a narrow beam beside a wide one
    )
    assert rows == asked == [4, 7, 7, 7]
    assert not whole


def test_no_rows(tiny_bert_dir: Path) -> None:
    model = load_model(tiny_bert_dir).model
    logits = UniLMEncoder(model).session([], 4).prefill()
    assert logits.shape == (0, model.config.vocab_size)


def test_input_longer_than_the_positions(tiny_model_dir: Path) -> None:
    unilm = UniLMEncoder(load_model(tiny_model_dir).model)
    assert unilm.max_positions == 512
    row = np.full(510, 7, np.int32)
    unilm.session([row], 2).prefill()
    with pytest.raises(InputError, match=r"at most 512 tokens.*got 510 \+ 3; lower max_passage"):
        unilm.session([row], 3)


# --- models that are refused ---------------------------------------------------------------------


def test_supported_families_are_the_tested_ones() -> None:
    assert set(SUPPORTED_MODEL_TYPES) == {"bert", "electra", "ernie", "roberta", "xlm-roberta"}


@pytest.mark.parametrize(
    "class_name", ["AlbertForMaskedLM", "DistilBertForMaskedLM", "MobileBertForMaskedLM"]
)
def test_other_families_are_refused(class_name: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"AlbertForMaskedLM": {"embedding_size": 16}}.get(class_name, {})
    if class_name == "DistilBertForMaskedLM":
        options = {"dim": 32, "n_layers": 1, "n_heads": 2, "hidden_dim": 32}
    if class_name == "MobileBertForMaskedLM":
        options = {"embedding_size": 16, "intra_bottleneck_size": 16, "true_hidden_size": 16}
    settings = {"hidden_size": 32, "num_hidden_layers": 1} if class_name[0] != "D" else {}
    import transformers

    config = (
        getattr(transformers, class_name).config_class(
            vocab_size=30, num_attention_heads=2, intermediate_size=32, **(settings | options)
        )
        if class_name[0] != "D"
        else transformers.DistilBertConfig(vocab_size=30, **options)
    )
    model = getattr(transformers, class_name)(config).eval()
    with pytest.raises(UnsupportedModelError, match="expected a type that takes a cache.*got '"):
        UniLMEncoder(model)


def test_other_families_are_refused_by_the_reader(tmp_path: Path) -> None:
    save_model(
        tmp_path / "albert",
        "AlbertForMaskedLM",
        BERT_TOKENS,
        embedding_size=16,
        num_hidden_groups=1,
    )
    with pytest.raises(UnsupportedModelError, match="bert, electra, ernie.*got 'albert'"):
        Seq2SeqReader.from_pretrained(tmp_path / "albert")


def test_a_decoder_is_refused(tiny_bert_dir: Path) -> None:
    model = load_model(tiny_bert_dir).model
    model.config.is_decoder = True
    with pytest.raises(UnsupportedModelError, match="expected an encoder, got is_decoder=True"):
        UniLMEncoder(model)


def test_a_model_without_head_is_refused(no_head_dir: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="holds no trained masked-LM model"):
        Seq2SeqReader.from_pretrained(no_head_dir)


def test_a_slow_tokenizer_is_refused(slow_tokenizer_dir: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="expected a fast tokenizer"):
        Seq2SeqReader.from_pretrained(slow_tokenizer_dir)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_check_passes_right_models(tiny_model_dir: Path, dtype: str) -> None:
    Seq2SeqReader.from_pretrained(tiny_model_dir, dtype=dtype)


def _shifted_values(update: Any) -> Any:
    def wrong(cache: Any, keys: Any, values: Any, layer: int, *rest: Any) -> Any:
        k, v = update(cache, keys, values, layer, *rest)
        return k, v.roll(1, dims=2)

    return wrong


def test_the_check_refuses_wrong_logits(
    tiny_bert_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if transformers had changed what it does with cache, mask, positions or types."""
    loaded = load_model(tiny_bert_dir)
    forward = UniLMEncoder.forward

    def without_mask(self: Any, tokens: Any, positions: Any, mask: Any, *rest: Any) -> Any:
        return forward(self, tokens, positions, None, *rest)

    def without_positions(self: Any, tokens: Any, positions: Any, *rest: Any) -> Any:
        return forward(self, tokens, torch.zeros_like(positions), *rest)

    def without_types(self: Any, tokens: Any, positions: Any, mask: Any, t: int, cache: Any) -> Any:
        return forward(self, tokens, positions, mask, 0, cache)

    def nan(self: Any, *args: Any) -> Any:
        return forward(self, *args) * float("nan")

    Seq2SeqReader(loaded)
    faults: list[tuple[Any, str, Any]] = [
        (UniLMEncoder, "forward", wrong)
        for wrong in (without_mask, without_positions, without_types, nan)
    ]
    faults.append((encoder._Cache, "update", _shifted_values(encoder._Cache.update)))
    for owner, name, wrong in faults:
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, wrong)
            with pytest.raises(UnsupportedModelError, match="expected the cached logits to equal"):
                Seq2SeqReader(loaded)


def test_the_check_sees_another_head(tiny_bert_dir: Path) -> None:
    loaded = load_model(tiny_bert_dir)
    unilm = UniLMEncoder(loaded.model)
    unilm._head = [copy.deepcopy(module) for module in unilm._head]
    with torch.no_grad():
        next(unilm._head[0].parameters()).mul_(1.5)
    with pytest.raises(UnsupportedModelError, match="largest difference of"):
        unilm.check(END)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"dtype": "float64"},
            "dtype: expected one of float32, float16, bfloat16, auto, got 'float64'",
        ),
        ({"normalization": "nfkc"}, "normalization: expected original or none, got 'nfkc'"),
        ({"device": "nowhere"}, "device: expected a device that torch can use"),
    ],
)
def test_loading_refuses(arguments: dict[str, Any], message: str, tiny_bert_dir: Path) -> None:
    with pytest.raises(InputError, match=message):
        Seq2SeqReader.from_pretrained(tiny_bert_dir, **arguments)


def test_a_reader_in_training_mode_of_torch_keeps_no_graph(tiny_bert_dir: Path) -> None:
    unilm = UniLMEncoder(load_model(tiny_bert_dir).model)
    rows = _inputs(np.random.default_rng(5), [4], 60, END)
    assert not unilm.session(rows, 1).prefill().requires_grad


def test_the_model_of_a_reader_is_not_changed(tiny_bert_dir: Path) -> None:
    loaded = load_model(tiny_bert_dir)
    before = {name: tensor.clone() for name, tensor in loaded.model.state_dict().items()}
    reader = Seq2SeqReader(replace(loaded, normalization="original"))
    reader.answer("谁在北京", ["上海 北京", "天气"], mode="generative")
    for name, tensor in loaded.model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
