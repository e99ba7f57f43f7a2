"""Constraints and beam search under `generate`, against transformers' own."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    DynamicCache,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LogitsProcessor,
    MaxTimeCriteria,
    T5Config,
    T5ForConditionalGeneration,
)

from fastmrc import SpanIndex, Trie
from fastmrc.errors import InputError, UnsupportedModelError
from fastmrc.integrations.generation import (
    SpanLogitsProcessor,
    TrieLogitsProcessor,
    _Allowed,
    _BatchConstraint,
    _MaskedScores,
    beam_search,
)

pytestmark = pytest.mark.usefixtures("one_thread")

VOCABULARY = 40
PAD, END, START = 0, 1, 2
FIRST = 3  # the lowest token of texts
IDS = {"pad_token_id": PAD, "eos_token_id": END, "bos_token_id": START}


def make_gpt2(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=64,
        n_embd=16,
        n_layer=2,
        n_head=2,
        initializer_range=0.5,
        **IDS,
    )
    return GPT2LMHeadModel(config).eval()


def make_llama() -> Any:
    """Rotary positions, and keys that heads share."""
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.5,
        **IDS,
    )
    return LlamaForCausalLM(config).eval()


def make_t5() -> Any:
    torch.manual_seed(2)
    config = T5Config(
        vocab_size=VOCABULARY,
        d_model=16,
        d_kv=8,
        d_ff=32,
        num_layers=2,
        num_heads=2,
        initializer_factor=2.0,
        decoder_start_token_id=PAD,
        pad_token_id=PAD,
        eos_token_id=END,
    )
    return T5ForConditionalGeneration(config).eval()


def make_bart() -> Any:
    torch.manual_seed(3)
    sizes = {
        f"{side}_{name}": value
        for side in ("encoder", "decoder")
        for name, value in (("layers", 1), ("attention_heads", 2), ("ffn_dim", 32))
    }
    config = BartConfig(
        vocab_size=VOCABULARY,
        d_model=16,
        max_position_embeddings=64,
        init_std=0.5,
        decoder_start_token_id=END,
        forced_eos_token_id=None,
        **sizes,
        **IDS,
    )
    return BartForConditionalGeneration(config).eval()


MAKERS = {"gpt2": make_gpt2, "llama": make_llama, "t5": make_t5, "bart": make_bart}


def let_end(model: Any, inputs: Any, outputs: Any) -> None:
    """Flatten the distributions and make the end likely: sequences of all lengths compete."""
    logits = outputs.logits
    logits /= logits.std(dim=-1, keepdim=True)
    logits[..., END] = logits.amax(dim=-1) - 0.6 * logits[..., FIRST].abs()


def make(name: str) -> Any:
    model = MAKERS[name]()
    model.register_forward_hook(let_end)
    return model


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    return {name: make(name) for name in MAKERS}


@pytest.fixture(scope="module", params=list(MAKERS))
def model(request: pytest.FixtureRequest, models: dict[str, Any]) -> Any:
    return models[request.param]


@pytest.fixture(scope="module")
def gpt2(models: dict[str, Any]) -> Any:
    return models["gpt2"]


def draw_sequences(rng: random.Random, count: int, longest: int, tokens: int = 8) -> Any:
    """Sequences that share beginnings: few different tokens."""
    return [
        [rng.randrange(FIRST, FIRST + tokens) for _ in range(rng.randint(1, longest))]
        for _ in range(count)
    ]


def draw_inputs(rng: random.Random, batch: int) -> dict[str, torch.Tensor]:
    """Prompts of different lengths, padded on the left."""
    rows = draw_sequences(rng, batch, 6, VOCABULARY - FIRST)
    width = max(len(row) for row in rows)
    padded = [[PAD] * (width - len(row)) + row for row in rows]
    ids = torch.tensor(padded)
    return {"input_ids": ids, "attention_mask": (ids != PAD).long()}


class DictionaryTrie:
    """The trie of GENRE: a dictionary for each prefix; "end of sequence" is a set of prefixes."""

    def __init__(self, sequences: Sequence[Sequence[int]]) -> None:
        self.root: dict[int, Any] = {}
        self.whole = {tuple(sequence) for sequence in sequences}
        for sequence in sequences:
            node = self.root
            for token in sequence:
                node = node.setdefault(token, {})

    def __call__(self, prefix: list[int]) -> list[int]:
        node = self.root
        for token in prefix:
            if token not in node:
                return []
            node = node[token]
        return [*node, *([END] if tuple(prefix) in self.whole else [])]


class NGrams:
    """What follows each piece of the passages."""

    def __init__(self, passages: Sequence[Sequence[int]]) -> None:
        self.next: dict[tuple[int, ...], set[int]] = {(): set()}
        for passage in passages:
            for begin in range(len(passage)):
                for end in range(begin, len(passage)):
                    self.next.setdefault(tuple(passage[begin:end]), set()).add(passage[end])
                self.next.setdefault(tuple(passage[begin:]), set())

    def __call__(self, prefix: list[int]) -> list[int]:
        found = self.next.get(tuple(prefix))
        return [] if found is None else [*found, END]


ORACLES: dict[Any, Any] = {SpanLogitsProcessor: NGrams, TrieLogitsProcessor: DictionaryTrie}
PROCESSORS = pytest.mark.parametrize("processor_class", list(ORACLES))


def allowed_tokens(
    oracles: Sequence[Callable[[list[int]], list[int]]], prompt: int
) -> Callable[[int, torch.Tensor], list[int]]:
    """Return a ``prefix_allowed_tokens_fn``; at a dead end it allows the end token."""

    def function(item: int, row: torch.Tensor) -> list[int]:
        oracle = oracles[item if len(oracles) > 1 else 0]
        return oracle(row[prompt:].tolist()) or [END]

    return function


def prompt_length(model: Any, inputs: dict[str, torch.Tensor]) -> int:
    return 1 if model.config.is_encoder_decoder else inputs["input_ids"].shape[1]


def run(model: Any, inputs: Any, seed: int = 0, **options: Any) -> torch.Tensor:
    torch.manual_seed(seed)
    settings = {"max_new_tokens": 7, "do_sample": False} | options
    tokens: torch.Tensor = model.generate(**inputs, **settings)
    return tokens


def check_same(
    model: Any, inputs: Any, processor: Any, oracles: Any, seed: int = 0, **options: Any
) -> torch.Tensor:
    """Assert that the processor and the function of the oracles give the same output."""
    function = allowed_tokens(oracles, prompt_length(model, inputs))
    expected = run(model, inputs, seed, prefix_allowed_tokens_fn=function, **options)
    got = run(model, inputs, seed, logits_processor=[processor], **options)
    assert torch.equal(got, expected)
    return got


MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "2 beams": {"num_beams": 2},
    "3 beams": {"num_beams": 3, "num_return_sequences": 2, "length_penalty": 0.5},
    "4 beams": {"num_beams": 4, "num_return_sequences": 4, "early_stopping": True},
    "never": {"num_beams": 4, "early_stopping": "never", "length_penalty": 2.0},
    "sampling": {"do_sample": True, "top_k": 0, "num_return_sequences": 3},
    "warped": {"do_sample": True, "top_k": 5, "temperature": 1.7},
    "penalties": {"num_beams": 3, "repetition_penalty": 1.5, "min_new_tokens": 3},
    "scores": {"output_scores": True, "num_beams": 2},
}


@PROCESSORS
@pytest.mark.parametrize("mode", list(MODES))
def test_same_output_as_a_function_of_prefixes(model: Any, processor_class: Any, mode: str) -> None:
    rng = random.Random(mode)
    for batch in (1, 3):
        sequences = draw_sequences(rng, 12, 6)
        options = MODES[mode]
        beams = options.get("num_beams", 1)
        processor = processor_class(sequences, END, num_beams=beams)
        oracle = ORACLES[processor_class](sequences)
        check_same(model, draw_inputs(rng, batch), processor, [oracle], batch, **options)


@PROCESSORS
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"do_sample": True}], ids=str)
def test_one_constraint_per_item(model: Any, processor_class: Any, options: Any) -> None:
    rng = random.Random(4)
    groups = [draw_sequences(rng, count, 5) for count in (3, 5, 1)]
    oracles = [ORACLES[processor_class](group) for group in groups]
    processor = processor_class(groups, END)
    check_same(model, draw_inputs(rng, 3), processor, oracles, **options)


def test_several_samples_of_an_item_keep_its_constraint(gpt2: Any) -> None:
    groups = [[[5, 6, 7]], [[8, 9]]]
    processor = TrieLogitsProcessor(groups, END)
    inputs = draw_inputs(random.Random(5), 2)
    options = {"do_sample": True, "num_return_sequences": 4}
    got = run(gpt2, inputs, logits_processor=[processor], **options)
    answers = got[:, inputs["input_ids"].shape[1] :].tolist()
    expected = [[5, 6, 7, END]] * 4 + [[8, 9, END, PAD]] * 4
    assert answers == expected


@PROCESSORS
def test_forms_of_a_constraint(gpt2: Any, processor_class: Any) -> None:
    passages = [[3, 4, 5, 6], [4, 5, 7]]
    build = SpanIndex if processor_class is SpanLogitsProcessor else Trie
    ready = build(passages)
    oracle = ORACLES[processor_class](passages)
    inputs = draw_inputs(random.Random(6), 2)
    forms = [
        passages,
        tuple(map(tuple, passages)),
        [np.array(passage) for passage in passages],
        ready,
        [ready, ready],
        [passages, ready],
        [passages, [np.array(passage) for passage in passages]],
    ]
    for form in forms:
        check_same(gpt2, inputs, processor_class(form, END), [oracle], num_beams=2)
    rows = np.array([[3, 4, 5], [6, 7, 8]])
    check_same(gpt2, inputs, processor_class(rows, END), [ORACLES[processor_class](rows.tolist())])
    assert processor_class(ready, END).constraints == (ready,)


def test_several_end_tokens(gpt2: Any) -> None:
    inputs = draw_inputs(random.Random(7), 2)
    width = inputs["input_ids"].shape[1]
    ends = [END, 30]

    def function(item: int, row: torch.Tensor) -> list[int]:
        prefix = row[width:].tolist()
        return {(): [5], (5,): [6], (5, 6): ends}.get(tuple(prefix), ends)

    options = {"num_beams": 2, "eos_token_id": ends}
    expected = run(gpt2, inputs, prefix_allowed_tokens_fn=function, **options)
    processor = TrieLogitsProcessor([[5, 6]], ends)
    assert torch.equal(run(gpt2, inputs, logits_processor=[processor], **options), expected)


def test_end_tokens_inside_the_sequences(gpt2: Any) -> None:
    """As GENRE stores them; they end the output whether or not the state is final."""
    sequences = [[5, 6, END], [5, 7, END]]
    processor = TrieLogitsProcessor(sequences, END)
    inputs = draw_inputs(random.Random(8), 2)
    check_same(gpt2, inputs, processor, [DictionaryTrie(sequences)], num_beams=3)


def test_dead_ends(gpt2: Any) -> None:
    """Another processor drives rows out of the constraint: then only the end may follow."""

    class Force(LogitsProcessor):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            forced = torch.full_like(scores, -torch.inf)
            forced[:, 33] = 0
            return forced if input_ids.shape[1] == width + 1 else scores

    inputs = draw_inputs(random.Random(9), 2)
    width = inputs["input_ids"].shape[1]
    processor = TrieLogitsProcessor([[5, 6, 7]], END)
    got = run(gpt2, inputs, logits_processor=[processor, Force()])
    assert got[:, width:].tolist() == [[5, 33, END]] * 2


def test_an_empty_constraint_allows_the_end_only(gpt2: Any) -> None:
    inputs = draw_inputs(random.Random(10), 2)
    for constraint in (Trie([]), SpanIndex([]), Trie([[]])):
        got = run(gpt2, inputs, logits_processor=[TrieLogitsProcessor(constraint, END)])
        assert got[:, inputs["input_ids"].shape[1] :].tolist() == [[END], [END]]


@PROCESSORS
def test_a_processor_may_be_used_again(models: dict[str, Any], processor_class: Any) -> None:
    rng = random.Random(11)
    sequences = draw_sequences(rng, 15, 6)
    processor = processor_class(sequences, END)
    oracle = ORACLES[processor_class](sequences)
    names = list(models)
    previous = draw_inputs(rng, 2)
    for turn in range(24):
        batch = rng.choice([1, 2, 4])
        inputs = previous if turn % 4 == 1 else draw_inputs(rng, batch)
        mode = rng.choice(["greedy", "2 beams", "4 beams", "never", "sampling"])
        model = models[rng.choice(names)]
        steps = rng.randint(1, 6)
        options = MODES[mode] | {"max_new_tokens": steps}
        check_same(model, inputs, processor, [oracle], turn, **options)
        previous = inputs


def test_longer_prompts_with_the_same_beginning(gpt2: Any) -> None:
    """A new turn is told from a new step by its length, the words of a user behind the output."""
    sequences = draw_sequences(random.Random(12), 10, 6)
    processor = TrieLogitsProcessor(sequences, END)
    oracle = DictionaryTrie(sequences)
    ids = torch.tensor([[9, 10]])
    for _ in range(4):
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        output = check_same(gpt2, inputs, processor, [oracle], max_new_tokens=3)
        ids = torch.cat([output, torch.tensor([[11]])], dim=1)


def test_continuing_an_output(gpt2: Any) -> None:
    """An output that becomes a prompt looks like one more step: `reset`, or a length, tells."""
    sequences = [[5, 6, 7, 8, 9]]
    processor = TrieLogitsProcessor(sequences, END)
    inputs = draw_inputs(random.Random(13), 1)
    width = inputs["input_ids"].shape[1]
    first = run(gpt2, inputs, logits_processor=[processor], max_new_tokens=2)
    follow = {"input_ids": first, "attention_mask": torch.ones_like(first)}
    resumed = run(gpt2, follow, logits_processor=[processor], max_new_tokens=2)
    assert resumed[0, width:].tolist() == [5, 6, 7, 8]
    processor.reset()
    begun = run(gpt2, follow, logits_processor=[processor], max_new_tokens=2)
    assert begun[0, width:].tolist() == [5, 6, 5, 6]
    fixed = TrieLogitsProcessor(sequences, END, prompt_length=width)
    resumed = run(gpt2, follow, logits_processor=[fixed], max_new_tokens=2)
    assert resumed[0, width:].tolist() == [5, 6, 7, 8]


@PROCESSORS
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"do_sample": True}], ids=str)
def test_prompt_lengths(gpt2: Any, processor_class: Any, options: Any) -> None:
    """Part of a prompt may count as constrained text, more or less of it in each item."""
    sequences = [[5, 6, 7, 8, 9, 10], [5, 6, 7, 9, 8, 10]]
    oracle = ORACLES[processor_class](sequences)
    ids = torch.tensor([[20, 21, 5, 6], [20, 22, 23, 5], [20, 21, 22, 23]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    lengths = [2, 3, 4]

    def function(item: int, row: torch.Tensor) -> list[int]:
        return oracle(row[lengths[item] :].tolist()) or [END]

    expected = run(gpt2, inputs, prefix_allowed_tokens_fn=function, **options)
    processor = processor_class(sequences, END, prompt_length=lengths)
    for _ in range(2):
        got = run(gpt2, inputs, logits_processor=[processor], **options)
        assert torch.equal(got, expected)
    per_item = processor_class([sequences] * 3, END, prompt_length=lengths)
    assert torch.equal(run(gpt2, inputs, logits_processor=[per_item], **options), expected)


def test_forced_first_token(models: dict[str, Any]) -> None:
    """The constraint begins behind a start token that `generate` forces."""
    model = models["bart"]
    sequences = draw_sequences(random.Random(14), 8, 5)
    inputs = draw_inputs(random.Random(15), 2)
    oracle = DictionaryTrie(sequences)

    def function(item: int, row: torch.Tensor) -> list[int]:
        return list(range(VOCABULARY)) if len(row) < 2 else oracle(row[2:].tolist()) or [END]

    options = {"num_beams": 3, "forced_bos_token_id": START}
    expected = run(model, inputs, prefix_allowed_tokens_fn=function, **options)
    processor = TrieLogitsProcessor(sequences, END, prompt_length=2)
    got = run(model, inputs, logits_processor=[processor], **options)
    assert torch.equal(got, expected)
    assert (got[:, 1] == START).all()


@PROCESSORS
def test_assisted_decoding(gpt2: Any, processor_class: Any) -> None:
    """Steps are taken back where the assistant is not followed."""
    rng = random.Random(16)
    assistant = make_gpt2(5)
    sequences = draw_sequences(rng, 30, 12)
    oracle = ORACLES[processor_class](sequences)
    for length in (None, 3):
        processor = processor_class(sequences, END, prompt_length=length)
        for ids in ([[9, 10, 11]], [[12, 20, 21]], [[9, 10, 11]]):
            inputs = {"input_ids": torch.tensor(ids), "attention_mask": torch.ones(1, 3).long()}
            options = {"max_new_tokens": 12, "assistant_model": assistant}
            check_same(gpt2, inputs, processor, [oracle], **options)


def test_one_token_is_followed_per_call(gpt2: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    advance = _BatchConstraint.advance
    monkeypatch.setattr(_BatchConstraint, "advance", lambda *a: calls.append(a) or advance(*a))
    sequences = draw_sequences(random.Random(17), 40, 8)
    processor = TrieLogitsProcessor(sequences, END)
    inputs = draw_inputs(random.Random(18), 3)
    run(gpt2, inputs, logits_processor=[processor], num_beams=4, early_stopping="never")
    assert 1 <= len(calls) <= 6  # 7 steps, the first at the root


def test_forbidden_everywhere() -> None:
    """Where others leave nothing, the allowed tokens score 0, as transformers has it."""
    processor = TrieLogitsProcessor([[5], [6]], END)
    ids = torch.tensor([[9], [10]])
    scores = torch.zeros(2, VOCABULARY)
    scores[0, [5, 6]] = -torch.inf
    some = processor(ids, scores)
    assert some[0].isneginf().all()  # the other row of the item goes on
    alone = TrieLogitsProcessor([[5], [6]], END, num_beams=1)(ids, scores)
    assert alone[0, [5, 6]].tolist() == [0, 0] and alone.isfinite().sum() == 4
    scores[1, [5, 6]] = -torch.inf
    assert processor(ids, scores)[:, [5, 6]].tolist() == [[0, 0], [0, 0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_scores_are_kept_and_the_input_is_not_modified(dtype: torch.dtype) -> None:
    processor = SpanLogitsProcessor([[5, 6]], END)
    scores = torch.randn(4, VOCABULARY, 2).to(dtype)[:, :, 0]  # rows and columns apart
    before = scores.clone()
    got = processor(torch.full((4, 3), 9), scores)
    assert torch.equal(scores, before)
    assert got.dtype == dtype and got.shape == scores.shape
    assert torch.equal(got[:, [END, 5, 6]], scores[:, [END, 5, 6]])
    assert got.isneginf().sum() == 4 * (VOCABULARY - 3)


def test_results_that_are_kept_do_not_change() -> None:
    processor = SpanLogitsProcessor([[5, 6, 7]], END)
    ids = torch.full((2, 3), 9)
    kept, copies, addresses = [], [], set()
    for step in range(6):
        got = processor(ids, torch.randn(2, VOCABULARY))
        addresses.add(got.data_ptr())
        kept.append(got[:1] if step % 2 else got)  # a view keeps the memory, too
        copies.append(kept[-1].clone())
        del got
        ids = torch.cat([ids, torch.full((2, 1), 5 + step)], dim=1)
    assert all(torch.equal(*pair) for pair in zip(kept, copies, strict=True))
    assert len(addresses) == 6


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_memory_is_used_again(mode: Any) -> None:
    """Also where a later processor has written to it."""
    mask = _MaskedScores()
    rng = np.random.default_rng(0)
    addresses = set()
    with mode():
        for step in range(30):
            scores = torch.from_numpy(rng.normal(size=(3, 70)))
            cells = rng.choice(210, size=1 + step, replace=False)
            shared = [(slice(1, 3), np.arange(0, 70, 2))] if step % 7 == 3 else []
            allowed = _Allowed(cells[cells < 70] if shared else cells, shared)
            expected = torch.full((210,), -torch.inf, dtype=torch.float64)
            places = allowed.all_cells(70)
            expected[places] = scores.view(-1)[places]
            got, alive = mask(scores, allowed)  # while the one before is alive
            assert torch.equal(got.view(-1), expected) and alive
            if step % 3 == 1:
                got[1:] = 5.0
            addresses.add(got.data_ptr())
    assert len(addresses) == 2
    other = mask(torch.zeros(1, 5), _Allowed(np.array([0]), []))[0]
    assert other.tolist() == [[0] + [-torch.inf] * 4]


def test_gradients_pass() -> None:
    scores = torch.zeros(2, VOCABULARY, requires_grad=True)
    processor = TrieLogitsProcessor([[5]], END)
    processor(torch.zeros(2, 1).long(), scores)[:, 5].sum().backward()
    assert scores.grad is not None and scores.grad.nonzero().tolist() == [[0, 5], [1, 5]]


@pytest.mark.parametrize(
    "mode", [torch.inference_mode, torch.enable_grad], ids=lambda m: m.__name__
)
def test_modes_of_autograd(gpt2: Any, mode: Any) -> None:
    processor = TrieLogitsProcessor([[5, 6], [7]], END)
    inputs = draw_inputs(random.Random(19), 2)
    expected = run(gpt2, inputs, logits_processor=[processor], num_beams=2)
    with mode():
        assert torch.equal(run(gpt2, inputs, logits_processor=[processor], num_beams=2), expected)


WRONG_ARGUMENTS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"constraint": 5}, TypeError, "constraint: expected a fastmrc.SpanIndex or Trie, .* got int"),
    ({"constraint": "text"}, TypeError, "constraint: expected .* got str"),
    ({"constraint": [5, 6]}, TypeError, "expected sequences of token ids, got single items"),
    ({"constraint": [[5, 6], "text"]}, TypeError, "expected sequences of token ids"),
    ({"constraint": [[0.5]]}, TypeError, "expected integers, got float64"),
    ({"constraint": [[-5]]}, ValueError, "-5"),
    ({"constraint": []}, InputError, "constraint: expected at least one .* got none"),
    ({"end_token_id": None}, TypeError, "end_token_id: expected an integer or several, got None"),
    ({"end_token_id": "end"}, TypeError, "end_token_id: expected an integer, got str"),
    ({"end_token_id": [1, 1.5]}, TypeError, "end_token_id: expected an integer, got float"),
    ({"end_token_id": True}, TypeError, "end_token_id: expected an integer, got bool"),
    ({"end_token_id": []}, InputError, "end_token_id: expected at least one, got none"),
    ({"end_token_id": -1}, InputError, "end_token_id: expected at least 0, got -1"),
    ({"prompt_length": -1}, InputError, "prompt_length: expected at least 0, got -1"),
    ({"prompt_length": 1.0}, TypeError, "prompt_length: expected an integer, got float"),
    ({"prompt_length": []}, InputError, "prompt_length: expected at least one, got none"),
    (
        {"constraint": [[[5]], [[6]]], "prompt_length": [1, 2, 3]},
        InputError,
        r"prompt_length: expected one, or one per constraint \(2\), got 3",
    ),
    ({"num_beams": 0}, InputError, "num_beams: expected at least 1, got 0"),
    ({"num_beams": 2.0}, TypeError, "num_beams: expected an integer, got float"),
]


@PROCESSORS
@pytest.mark.parametrize(("change", "error", "message"), WRONG_ARGUMENTS, ids=str)
def test_wrong_arguments(
    processor_class: Any, change: dict[str, Any], error: type[Exception], message: str
) -> None:
    arguments = {"constraint": [[5, 6]], "end_token_id": END} | change
    with pytest.raises(error, match=message):
        processor_class(arguments.pop("constraint"), arguments.pop("end_token_id"), **arguments)


def test_wrong_calls() -> None:
    two = TrieLogitsProcessor([[[5]], [[6]]], END)
    scores = torch.zeros(3, VOCABULARY)
    ids = torch.zeros(3, 1, dtype=torch.long)
    with pytest.raises(InputError, match="input_ids: expected a multiple of 2 rows, .* got 3"):
        two(ids, scores)
    with pytest.raises(InputError, match=r"input_ids: expected \[rows, length\] .* \[2, 1\]"):
        two(ids[:2], scores)
    with pytest.raises(InputError, match=r"input_ids: expected \[rows, length\] .* \[3\]"):
        two(ids[:, 0], scores)
    with pytest.raises(InputError, match="constraint: expected tokens below .* 40, got 40"):
        TrieLogitsProcessor([[5], [40]], END)(ids, scores)
    with pytest.raises(InputError, match="end_token_id: expected less than .* 40, got 41"):
        TrieLogitsProcessor([[5]], [END, 41])(ids, scores)
    processor = TrieLogitsProcessor([[5]], END, num_beams=2)
    scores[:, 5] = -torch.inf
    with pytest.raises(InputError, match="num_beams: expected a divisor of the 3 rows, got 2"):
        processor(ids, scores)


# The search as custom_generate.

EXACT: list[dict[str, Any]] = [
    {"early_stopping": "never", "length_penalty": 1.0},
    {"early_stopping": "never", "length_penalty": 2.5},
    {"early_stopping": "never", "length_penalty": 0.0},
    {"early_stopping": "never", "length_penalty": -1.0},
    {"early_stopping": False, "length_penalty": 0.0},
    {"early_stopping": False, "length_penalty": -0.5},
]
native = partial(run, custom_generate=beam_search)


def check_search(
    model: Any, inputs: Any, constraint: Any = None, processor: Any = None, **options: Any
) -> None:
    """Assert sequences and scores of transformers' own search, its stopgaps left out."""
    options = {"return_dict_in_generate": True, "output_scores": True} | options
    own: Any = {} if processor is None else {"logits_processor": [processor]}
    expected: Any = run(model, inputs, **own, **options)
    got: Any = native(model, inputs, constraint=constraint, **options)
    assert type(got) is type(expected)
    real = expected.sequences_scores > -1e6
    assert real.any()
    torch.testing.assert_close(got.sequences_scores[real], expected.sequences_scores[real])
    assert got.sequences_scores[~real].isneginf().all()
    width = min(got.sequences.shape[1], expected.sequences.shape[1])
    assert torch.equal(got.sequences[real, :width], expected.sequences[real, :width])
    if real.all():
        assert got.sequences.shape == expected.sequences.shape
    options["return_dict_in_generate"] = False
    assert torch.equal(native(model, inputs, constraint=constraint, **options), got.sequences)


@pytest.mark.parametrize("options", EXACT, ids=str)
def test_same_search_as_transformers(model: Any, options: Any) -> None:
    rng = random.Random(20)
    for beams in (1, 2, 4):
        inputs = draw_inputs(rng, 3)
        if beams > 1:
            returned = min(3, beams)
            check_search(model, inputs, num_beams=beams, num_return_sequences=returned, **options)
        else:
            assert native(model, inputs, num_beams=1).shape[0] == 3


@PROCESSORS
@pytest.mark.parametrize("options", EXACT[:4], ids=str)
def test_same_constrained_search(model: Any, processor_class: Any, options: Any) -> None:
    rng = random.Random(21)
    for count in (2, 20):
        sequences = draw_sequences(rng, count, 6)
        processor = processor_class(sequences, END)
        constraint = processor.constraints[0]
        options = options | {"num_beams": 4, "num_return_sequences": 4}
        check_search(model, draw_inputs(rng, 3), constraint, processor, **options)


def test_search_with_a_constraint_per_item(model: Any) -> None:
    rng = random.Random(22)
    groups = [draw_sequences(rng, count, 5) for count in (1, 4, 12)]
    processor = TrieLogitsProcessor(groups, END)
    constraints = list(processor.constraints)
    options = EXACT[0] | {"num_beams": 3, "num_return_sequences": 2}
    check_search(model, draw_inputs(rng, 3), constraints, processor, **options)


@pytest.mark.parametrize(
    "options",
    [
        {"min_new_tokens": 3},
        {"repetition_penalty": 1.8, "no_repeat_ngram_size": 2},
        {"eos_token_id": [END, 30, 31]},
        {"max_new_tokens": 1},
        {"cache_implementation": "static"},
    ],
    ids=str,
)
def test_options_of_generate(models: dict[str, Any], options: Any) -> None:
    for name in ("llama", "t5"):
        inputs = draw_inputs(random.Random(23), 2)
        check_search(
            models[name], inputs, num_beams=3, num_return_sequences=3, **EXACT[0], **options
        )


def test_search_with_processors_that_count_rows(gpt2: Any) -> None:
    rng = random.Random(24)
    groups = [draw_sequences(rng, count, 6) for count in (4, 9)]
    inputs = draw_inputs(rng, 2)
    oracles = [DictionaryTrie(group) for group in groups]
    function = allowed_tokens(oracles, inputs["input_ids"].shape[1])
    options = EXACT[0] | {"num_beams": 3}
    expected = run(gpt2, inputs, prefix_allowed_tokens_fn=function, **options)
    assert torch.equal(native(gpt2, inputs, prefix_allowed_tokens_fn=function, **options), expected)
    processor = TrieLogitsProcessor(groups, END)
    assert torch.equal(native(gpt2, inputs, logits_processor=[processor], **options), expected)
    both = {"constraint": list(processor.constraints), "min_new_tokens": 2, **options}
    assert native(gpt2, inputs, **both).shape[0] == 2


def test_search_from_a_filled_cache(gpt2: Any) -> None:
    ids = torch.tensor([[9, 10, 11, 12]]).repeat(2, 1)

    def inputs() -> dict[str, Any]:
        cache = DynamicCache(config=gpt2.config)
        with torch.no_grad():
            gpt2(ids.repeat_interleave(3, dim=0)[:, :2], past_key_values=cache)
        mask = torch.ones_like(ids)
        return {"input_ids": ids, "attention_mask": mask, "past_key_values": cache}

    options = EXACT[0] | {"num_beams": 3}
    expected = run(gpt2, inputs(), **options)
    assert torch.equal(native(gpt2, inputs(), **options), expected)


def test_search_from_embeddings(gpt2: Any) -> None:
    ids = torch.tensor([[9, 10, 11], [12, 13, 14]])
    inputs = {"inputs_embeds": gpt2.get_input_embeddings()(ids).detach()}
    options = EXACT[0] | {"num_beams": 3}
    assert torch.equal(native(gpt2, inputs, **options), run(gpt2, inputs, **options))


def test_the_prompt_is_encoded_once_per_item(
    models: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = models["gpt2"]
    shapes = []
    forward = model.transformer.forward
    monkeypatch.setattr(
        model.transformer,
        "forward",
        lambda ids, **rest: shapes.append(tuple(ids.shape)) or forward(ids, **rest),
    )
    inputs = draw_inputs(random.Random(25), 2)
    constraints = [Trie([[5, 6]]), Trie([[5, 6, 7, 8], [5, 7, 7, 8]])]
    native(model, inputs, num_beams=4, constraint=constraints)
    assert shapes[0] == tuple(inputs["input_ids"].shape)
    assert [rows for rows, _ in shapes[1:]] == [2, 3, 2, 2]  # live hypotheses alone
    assert all(width == 1 for _, width in shapes[1:])


def test_better_than_the_heuristic(gpt2: Any) -> None:
    """With a length penalty the default of transformers may stop early, never the pool."""
    better = 0
    for seed in range(10):
        inputs = draw_inputs(random.Random(100 + seed), 2)
        options = {"num_beams": 2, "length_penalty": 1.0, "max_new_tokens": 20}
        options |= {"return_dict_in_generate": True, "output_scores": True}
        theirs: Any = run(gpt2, inputs, early_stopping=False, **options)
        ours: Any = native(gpt2, inputs, **options)
        assert (ours.sequences_scores >= theirs.sequences_scores - 1e-5).all()
        better += int((ours.sequences_scores > theirs.sequences_scores + 1e-5).sum())
    assert better > 0


def test_rows_without_a_sequence(gpt2: Any) -> None:
    inputs = draw_inputs(random.Random(26), 1)
    options = {"num_beams": 3, "num_return_sequences": 3, "return_dict_in_generate": True}
    got: Any = native(gpt2, inputs, constraint=Trie([[5, 6], [7]]), **options)
    answers = got.sequences[:, inputs["input_ids"].shape[1] :].tolist()
    assert sorted(answers[:2]) == [[5, 6, END], [7, END, END]]
    assert answers[2] == [END] * 3 and got.sequences_scores[2].isneginf()


WRONG_OPTIONS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"do_sample": True}, InputError, "do_sample: expected False, .* got True"),
    ({"use_cache": False}, InputError, "use_cache: expected True"),
    ({"output_logits": True}, InputError, "output_logits: expected False"),
    ({"output_attentions": True}, InputError, "output_attentions: expected False"),
    (
        {"stopping_criteria": [MaxTimeCriteria(1.0)]},
        InputError,
        "stopping_criteria: expected none but max_new_tokens .* got MaxTimeCriteria",
    ),
    ({"constraint": [[5]]}, TypeError, "constraint: expected a fastmrc.SpanIndex .* got list"),
    ({"constraint": 5}, TypeError, "constraint: expected a fastmrc.SpanIndex .* got int"),
    ({"constraint": "text"}, TypeError, "constraint: expected a fastmrc.SpanIndex .* got str"),
    (
        {"constraint": [Trie([[5]])] * 3},
        InputError,
        r"constraint: expected one, or one per item of the batch \(2\), got 3",
    ),
    ({"constraint": Trie([[99]])}, InputError, "constraint: expected tokens below .* got 99"),
]


@pytest.mark.parametrize(("change", "error", "message"), WRONG_OPTIONS, ids=str)
def test_wrong_options(
    gpt2: Any, change: dict[str, Any], error: type[Exception], message: str
) -> None:
    options = {"num_beams": 2, "return_dict_in_generate": True} | change
    with pytest.raises(error, match=message):
        native(gpt2, draw_inputs(random.Random(27), 2), **options)


def test_models_without_a_cache(gpt2: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpt2, "_supports_default_dynamic_cache", lambda: False)
    with pytest.raises(UnsupportedModelError, match="model: expected a key-value cache"):
        native(gpt2, draw_inputs(random.Random(28), 2), num_beams=2)


def test_a_constraint_needs_an_end_token(gpt2: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpt2.generation_config, "eos_token_id", None)
    inputs = draw_inputs(random.Random(29), 2)
    with pytest.raises(InputError, match="eos_token_id: expected one beside a constraint"):
        native(gpt2, inputs, num_beams=2, constraint=Trie([[5]]))
    options = EXACT[0] | {"num_beams": 3, "num_return_sequences": 3}
    check_search(gpt2, inputs, **options)
