"""Spans of texts: every tokenisation of a piece, against enumeration and the tokenizers' decoders,
and where an output stands."""

from __future__ import annotations

import gc
import time
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cases import Generator, Tally, count_cases
from conftest import BERT_TOKENS, random_cases, save_tokenizer
from hypothesis import given
from hypothesis import strategies as st

import fastmrc
from fastmrc import _C, InputError, Span, SpanIndex, decoding
from fastmrc.options import SearchOptions
from fastmrc.reference.constraints import TextSpanIndex as Oracle
from fastmrc.text_constraints import TextSpanIndex, TokenSpanIndex, spelling_of

COUNTS = [1_000, pytest.param(100_000, marks=pytest.mark.exhaustive)]
SENTENCES = [
    "New York is newer than the old York, isn't it?",
    "He is the thin man in the inn, 1234 times.",
    "北京天气，上海山水。中国的北京在北方。",
    "né à l'été, cafe\u0301 and café",
    "a 😀 face 😀😀 and 👩\u200d👧",
]


def _flat(texts: Sequence[bytes]) -> tuple[Any, Any]:
    ends = np.cumsum([0, *map(len, texts)], dtype=np.int64)
    return np.frombuffer(bytearray().join(texts), np.uint8), ends


def _spellings(spelt: dict[int, bytes]) -> _C.TokenSpellings:
    ids = sorted(spelt)
    return _C.TokenSpellings(np.array(ids, np.int32), *_flat([spelt[i] for i in ids]))


def _native(
    passages: Sequence[str], first: dict[int, bytes], following: dict[int, bytes]
) -> _C.TextIndex:
    texts = _flat([passage.encode() for passage in passages])
    return _C.TextIndex(*texts, _spellings(first), _spellings(following))


def _same_language(native: Any, oracle: Any) -> int:
    """Walk both automata through all states of the oracle; returns how many there are."""
    level, seen = [(0, 0)], {0}
    while level:
        states = np.array([a for a, _ in level], np.int32)
        oracle_states = np.array([b for _, b in level], np.int32)
        np.testing.assert_array_equal(native.is_final(states), oracle.is_final(oracle_states))
        offsets, tokens = native.allowed(states)
        want_offsets, want_tokens = oracle.allowed(oracle_states)
        np.testing.assert_array_equal(offsets, want_offsets)
        np.testing.assert_array_equal(tokens, want_tokens)
        parents = np.repeat(np.arange(len(level)), np.diff(offsets))
        reached = native.advance(states[parents], tokens).tolist()
        theirs = oracle.advance(oracle_states[parents], tokens).tolist()
        level = [
            (a, b) for b, a in dict(zip(theirs, reached, strict=True)).items() if b not in seen
        ]
        seen.update(theirs)
    return len(seen)


def _random_spelling(rng: Generator, passages: list[str]) -> dict[int, bytes]:
    """Draw tokens: pieces of the passages' bytes, and some that no passage has."""
    text = "".join(passages).encode() + b"xyz"
    spelt: dict[int, bytes] = {}
    for token in range(int(rng.integers(1, 14))):
        start, length = int(rng.integers(len(text))), int(rng.integers(1, 6))
        spelt[3 * token + int(rng.integers(3))] = text[start : start + length]
    return spelt


def _compare(rng: Generator, tally: Tally) -> None:
    tally.cases += 1
    alphabet = list("ab é中中国😀")[: int(rng.integers(1, 9))]
    passages = [
        "".join(rng.choice(alphabet, int(rng.integers(0, 9)))) for _ in range(rng.integers(0, 4))
    ]
    following = _random_spelling(rng, passages)
    first = following
    if rng.random() < 0.5:  # word beginnings and continuations, and a first token without bytes
        kept = [token for token in following if rng.random() < 0.7]
        first = {token: following[token].removeprefix(b" ") for token in kept} | {90: b""}
    native, oracle = _native(passages, first, following), Oracle(passages, first, following)
    _same_language(native, oracle)
    assert native.num_states <= 2 * sum(len(passage.encode()) for passage in passages) + 2


@pytest.mark.parametrize("cases", COUNTS)
def test_text_index(cases: int) -> None:
    _, line = count_cases(41, cases, _compare)
    print(f"text index: {line}")


SPELT = st.dictionaries(st.integers(0, 20), st.binary(min_size=1, max_size=4), max_size=6)
TEXTS = st.lists(st.text(st.sampled_from("ab é中😀"), max_size=6), max_size=3)


@random_cases(200)
@given(TEXTS, SPELT, st.lists(st.text(st.sampled_from("ab é中😀"), min_size=1, max_size=3)))
def test_text_index_property(
    passages: list[str], spelt: dict[int, bytes], words: list[str]
) -> None:
    following = spelt | {50 + i: word.encode() for i, word in enumerate(words)}
    _same_language(_native(passages, following, following), Oracle(passages, following, following))


# Real tokenizers


def _fast(tokenizer: Any, **special: str) -> Any:
    from transformers import PreTrainedTokenizerFast

    make_fast: Any = PreTrainedTokenizerFast
    return make_fast(tokenizer_object=tokenizer, **special)


def _trained(tokenizer: Any, trainer: Any) -> Any:
    tokenizer.train_from_iterator(SENTENCES * 3, trainer)
    return _fast(tokenizer, eos_token="</s>", pad_token="<pad>", unk_token="<unk>")


SPECIAL = ["<pad>", "</s>", "<unk>"]


@cache
def _byte_level(add_prefix_space: bool = False, nfc: bool = False) -> Any:
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    if nfc:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    return _trained(tokenizer, trainer)


@cache
def _metaspace(kind: str = "bpe") -> Any:
    """Return a tokenizer as of XLM-R ("unigram"), T5 ("bpe"), or with spaces kept ("spaces")."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.Unigram() if kind == "unigram" else models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.NFKC()
    steps = [] if kind == "spaces" else [pre_tokenizers.WhitespaceSplit()]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*steps, pre_tokenizers.Metaspace()])
    tokenizer.decoder = decoders.Metaspace()
    options = {"vocab_size": 200, "special_tokens": SPECIAL, "show_progress": False}
    if kind == "unigram":
        return _trained(tokenizer, trainers.UnigramTrainer(unk_token="<unk>", **options))
    return _trained(tokenizer, trainers.BpeTrainer(**options))


@cache
def _byte_fallback(prefix: bool = True) -> Any:
    """Return a tokenizer as of Llama, or (without prefix) of Gemma: unknown characters in bytes."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    words = ["▁", *"abcdehinortwY", "▁t", "he", "▁the", "in", "▁▁", "天气", "北"]
    entries = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    merges = [("▁", "t"), ("h", "e"), ("▁t", "he"), ("i", "n"), ("▁", "▁")]
    vocabulary = {entry: i for i, entry in enumerate(entries)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, byte_fallback=True, unk_token="<unk>"))
    spaces = normalizers.Replace(" ", "▁")
    begin = [normalizers.Prepend("▁")] if prefix else []
    tokenizer.normalizer = normalizers.Sequence([*begin, spaces])
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.add_special_tokens(SPECIAL)
    return _fast(tokenizer, eos_token="</s>", pad_token="<pad>", unk_token="<unk>")


@cache
def _wordpiece(lowercase: bool = True) -> Any:
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    letters = {c for text in SENTENCES for c in text.lower() + text if not c.isspace()}
    pieces = ["new", "york", "the", "##er", "##in", "in", "##ew", "##n", "thin", "##京", "is"]
    entries = [*BERT_TOKENS.values(), *sorted(letters), *(f"##{c}" for c in sorted(letters))]
    vocabulary = {entry: i for i, entry in enumerate(dict.fromkeys([*entries, *pieces]))}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    return _fast(tokenizer, **BERT_TOKENS)


TOKENIZERS: dict[str, Callable[[], Any]] = {
    "byte level": _byte_level,
    "byte level, space added": lambda: _byte_level(add_prefix_space=True),
    "byte level, NFC": lambda: _byte_level(nfc=True),
    "SentencePiece BPE": _metaspace,
    "SentencePiece Unigram": lambda: _metaspace("unigram"),
    "SentencePiece BPE, spaces kept": lambda: _metaspace("spaces"),
    "byte fallback": _byte_fallback,
    "byte fallback, no space added": lambda: _byte_fallback(prefix=False),
    "WordPiece": _wordpiece,
    "WordPiece, cased": lambda: _wordpiece(lowercase=False),
}
NAMES = list(TOKENIZERS)


def _encode(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
    return ids


def _decode(name: str, ids: Sequence[int]) -> str:
    """Return the tokens' text by the tokenizer's own decoder; what no text has if that fails."""
    text: str = TOKENIZERS[name]().backend_tokenizer.decode(list(ids), skip_special_tokens=False)
    text = text.removeprefix(" ") if name == "byte level, space added" else text
    return "\ue000" if "\ufffd" in text else text


def _read(name: str, text: str) -> str:
    """Return a text as the tokenizer reads it, by its decoder; it must know all characters."""
    return _decode(name, _encode(TOKENIZERS[name](), text))


def _walk(index: Any, ids: Sequence[int]) -> int:
    state = 0
    for token in ids:
        state = int(index.advance([state], [token])[0])
    return state


def _accepts(index: Any, ids: Sequence[int]) -> bool:
    return bool(index.is_final([_walk(index, ids)])[0])


# Parts of passages whose characters all tokenizers above know.
PARTS = ["new", "ne", " York", "the", " the", "in", " in", "北京", "京", "，", " ", "is", "n", "1"]
PASSAGES = st.lists(
    st.lists(st.sampled_from(PARTS), max_size=6).map("".join).map(str.lstrip), max_size=3
)


def _tokens_of(name: str, passages: Sequence[str], data: st.DataObject) -> list[int]:
    """Draw some tokens: those of pieces of the passages, and any."""
    tokenizer = TOKENIZERS[name]()
    pieces = {p[i:j] for p in passages for i in range(len(p)) for j in range(i + 1, i + 4)}
    likely = sorted({token for piece in pieces for token in _encode(tokenizer, piece)})
    chosen = data.draw(st.lists(st.sampled_from(likely), max_size=9)) if likely else []
    anything = data.draw(st.lists(st.integers(0, len(tokenizer) - 1), max_size=3))
    return sorted({*chosen, *anything} - set(tokenizer.all_special_ids))


@pytest.mark.parametrize("name", NAMES)
@random_cases(60)
@given(PASSAGES, st.data())
def test_accepts_what_decodes_to_a_piece(
    name: str, passages: list[str], data: st.DataObject
) -> None:
    tokenizer = TOKENIZERS[name]()
    index = SpanIndex.from_text(passages, tokenizer, unit="text")
    read = [_read(name, passage) for passage in passages]
    tokens = np.array(_tokens_of(name, passages, data), np.int32)
    level = {(): 0}
    for _ in range(4):
        for ids, state in level.items():
            text = _decode(name, ids)
            # Of a continuing piece at the beginning nothing is text.
            is_piece = text == "" or any(text in passage for passage in read)
            assert bool(index.is_final([state])[0]) == is_piece, (passages, ids, text)
            found = index.locate(ids)
            assert bool(found) == (is_piece and bool(text.strip()))
            for span in found:
                cited = passages[span.passage][span.start : span.end]
                assert _read(name, cited).strip() == text.strip()
        longer = [(*ids, token) for ids in level for token in tokens.tolist()]
        before = np.repeat(np.array(list(level.values()), np.int32), len(tokens))
        level = dict(
            zip(longer, index.advance(before, np.tile(tokens, len(level))).tolist(), strict=True)
        )
        if len(level) > 1500:
            break


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("text", [*SENTENCES, "", " ", "a\nb\t c", "北 京", "  the  thin inn  "])
def test_accepts_what_the_token_index_does(name: str, text: str) -> None:
    """Spans of the passage's own tokens, unless they begin inside a word or a character."""
    tokenizer = TOKENIZERS[name]()
    texts, tokens = (
        SpanIndex.from_text([text], tokenizer, unit=unit) for unit in ("text", "token")
    )
    assert isinstance(texts, TextSpanIndex) and isinstance(tokens, TokenSpanIndex)
    assert isinstance(tokens, SpanIndex)
    ids = _encode(tokenizer, text)
    unknown = tokenizer.unk_token_id
    for i in range(len(ids)):
        for j in range(i, len(ids) + 1):
            span = ids[i:j]
            assert _accepts(tokens, span)
            begins = tokenizer.convert_ids_to_tokens(ids[i]).startswith("##")
            if begins or unknown in span or _decode(name, span) == "\ue000":
                continue
            assert _accepts(texts, span), tokenizer.convert_ids_to_tokens(span)
            assert set(tokens.locate(span)) <= set(texts.locate(span))


def _reachable(index: Any) -> tuple[list[int], set[int]]:
    """Return the states and the tokens of all edges."""
    states, tokens = [0], set()
    for state in states:
        allowed = index.allowed([state])[1]
        tokens.update(allowed.tolist())
        reached = index.advance(np.full(len(allowed), state), allowed).tolist()
        states += [s for s in dict.fromkeys(reached) if s not in states]
    return states, tokens


@pytest.mark.parametrize("name", NAMES)
def test_never_admits_special_tokens(name: str) -> None:
    tokenizer = TOKENIZERS[name]()
    special = "".join(tokenizer.all_special_tokens)
    index = SpanIndex.from_text([f"the {special}", special], tokenizer, unit="text")
    states, tokens = _reachable(index)
    assert len(states) == index.num_states
    assert not tokens & set(tokenizer.all_special_ids)


def test_no_span_crosses_passages() -> None:
    for name in NAMES:
        tokenizer = TOKENIZERS[name]()
        index = SpanIndex.from_text(["the in", "is new"], tokenizer, unit="text")
        assert _accepts(index, _encode(tokenizer, "in"))
        assert not _accepts(index, _encode(tokenizer, "in is"))
        assert not _accepts(index, _encode(tokenizer, "inis"))


def test_dead_ends_are_left_out() -> None:
    # The first byte of 中 has a token, the other two have none.
    index = _native(["a中b"], {1: b"a", 2: b"\xe4"}, {1: b"a", 2: b"\xe4", 3: b"b"})
    assert (index.num_states, index.num_edges) == (2, 1)
    assert index.allowed(np.array([0, 1], np.int32))[1].tolist() == [1]


def test_several_tokens_of_one_spelling() -> None:
    spelt = {7: b"a", 2: b"a", 5: b"ab"}
    index = _native(["ab"], spelt, spelt)
    assert index.allowed(np.zeros(1, np.int32))[1].tolist() == [2, 5, 7]


def test_bytes_have_the_names_of_the_library() -> None:
    from tokenizers import pre_tokenizers

    from fastmrc.text_constraints import _BYTES

    assert set(_BYTES) == set(pre_tokenizers.ByteLevel.alphabet())
    text = "".join(map(chr, range(0x180))) + "\u07ff\u0800\uffff\U0010ffff"
    pieces = pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str(text)
    assert bytes(_BYTES[c] for piece, _ in pieces for c in piece) == text.encode()


# Where an output stands


def _all_places(passages: Sequence[str], piece: str) -> list[Span]:
    """Return the occurrences of a piece, without white space at its ends."""
    places = [
        (p, i + len(piece) - len(piece.lstrip()), i + len(piece.rstrip()))
        for p, passage in enumerate(passages)
        for i in range(len(passage))
        if piece.strip() and passage.startswith(piece, i)
    ]
    return [Span(*place) for place in sorted(places)]


@random_cases(300)
@given(st.lists(st.text(st.sampled_from("ab é\u0301中😀\n"), max_size=9), max_size=4), st.data())
def test_locate_property(passages: list[str], data: st.DataObject) -> None:
    tokenizer = _byte_level()
    index = SpanIndex.from_text(passages, tokenizer, unit="text")
    pieces = {p[i:j] for p in passages for i in range(len(p)) for j in range(i + 1, len(p) + 1)}
    piece = data.draw(st.sampled_from(sorted(pieces | {"b中b", "", " "})))
    want = _all_places(passages, piece)
    assert index.locate(piece) == want
    assert index.locate(_encode(tokenizer, piece)) == want
    if not want and piece.strip():
        assert not _accepts(index, _encode(tokenizer, piece))


@pytest.mark.parametrize("unit", ["token", "text"])
@pytest.mark.parametrize(
    ("text", "cited"),
    [
        ("new york", ["NEW  York", "New York"]),
        ("New York", ["NEW  York", "New York"]),
        ("york", ["York", "York"]),
        ("cafe", ["Cafe\u0301", "CAFÉ"]),
        ("京北", []),
        ("北京", ["北京", "北京", "北 京"]),
        ("", []),
        ("  ", []),
    ],
)
def test_locates_what_was_normalised(unit: Any, text: str, cited: list[str]) -> None:
    tokenizer = _wordpiece()
    passages = ["In NEW  York, 北京。北京", "", "Cafe\u0301s CAFÉ", "New York北 京"]
    index = SpanIndex.from_text(passages, tokenizer, unit=unit)
    for output in (text, _encode(tokenizer, text)):
        if unit == "token" and text == "cafe" and output is not text:
            continue  # "cafés" has other tokens
        found = index.locate(output)
        assert [passages[s.passage][s.start : s.end] for s in found] == cited
        assert found == sorted(found, key=lambda s: (s.passage, s.start, s.end))


@pytest.mark.parametrize("unit", ["token", "text"])
@pytest.mark.parametrize("name", NAMES)
def test_ignores_special_tokens_around_the_text(name: str, unit: Any) -> None:
    tokenizer = TOKENIZERS[name]()
    index = SpanIndex.from_text(["the inn", "in the", "the"], tokenizer, unit=unit)
    ids = _encode(tokenizer, "the")
    end = tokenizer.eos_token_id or tokenizer.sep_token_id
    pad = tokenizer.pad_token_id
    want = index.locate(ids)
    assert want[0] == Span(0, 0, 3) and want[-1] == Span(2, 0, 3)
    assert len(want) == 3 or unit == "token"
    assert index.locate([pad, *ids, end, pad, pad]) == want
    assert index.locate(np.array([*ids, end])) == want
    assert index.locate([*ids, end, *ids]) == []
    assert index.locate([end]) == index.locate([]) == []
    if unit == "text":
        assert index.locate([*ids, len(tokenizer) + 5]) == []


def test_takes_tensors() -> None:
    import torch

    index = SpanIndex.from_text(["the inn"], _byte_level(), unit="text")
    assert index.locate(torch.tensor(_encode(_byte_level(), "inn"))) == [Span(0, 4, 7)]


def test_overlapping_and_repeated_occurrences() -> None:
    index = SpanIndex.from_text(["aaaa", "aa", "aa"], _byte_level(), unit="text")
    want = [Span(0, 0, 2), Span(0, 1, 3), Span(0, 2, 4), Span(1, 0, 2), Span(2, 0, 2)]
    assert index.locate("aa") == want
    assert index.locate(_encode(_byte_level(), "a") * 2) == want
    assert [s.start for s in index.locate("aaa")] == [0, 1]


def test_unknown_text_is_that_of_the_first_occurrence() -> None:
    tokenizer = _wordpiece()
    index = SpanIndex.from_text(["the ☃ in", "☃", "♞ in"], tokenizer)
    unknown = tokenizer.unk_token_id
    assert index.locate([unknown]) == [Span(0, 4, 5), Span(1, 0, 1)]
    assert index.locate([unknown, *_encode(tokenizer, "in")]) == [Span(0, 4, 8)]
    text = SpanIndex.from_text(["the ☃ in"], tokenizer, unit="text")
    assert text.locate([unknown]) == []
    assert text.locate("☃ in") == [Span(0, 4, 8)]
    assert not _accepts(text, [*_encode(tokenizer, "the"), unknown])


@pytest.mark.parametrize("name", NAMES)
@random_cases(100)
@given(st.text(max_size=12), st.data())
def test_reads_any_text(name: str, text: str, data: st.DataObject) -> None:
    tokenizer = TOKENIZERS[name]()
    read = spelling_of(tokenizer).read("text", text)
    assert len(read.text) == len(read.starts) == len(read.ends)
    assert (read.starts <= read.ends).all() and (read.ends[:-1] <= read.ends[1:]).all()
    assert (read.starts >= 0).all() and (read.ends <= len(text)).all()
    index = SpanIndex.from_text([text], tokenizer, unit="text")
    assert bool(index.locate(text)) == bool(read.text.strip())
    start = data.draw(st.integers(0, len(text)))
    piece = text[start : data.draw(st.integers(start, len(text)))]
    if name.startswith("byte level") and "NFC" not in name and piece.strip():
        white = len(piece) - len(piece.lstrip())
        assert Span(0, start + white, start + len(piece.rstrip())) in index.locate(piece)


def test_a_decoder_that_drops_spaces_of_the_first_token() -> None:
    """What "▁a▁b" stands for at the beginning differs from what a passage has: not admitted."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    backend = Tokenizer(models.BPE({"▁a▁b": 0, "▁a": 1, "▁": 2, "▁▁": 3, "a": 4}, []))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(split=False)
    backend.decoder = decoders.Metaspace()
    assert backend.decode([0]) == "ab"
    index = SpanIndex.from_text(["a a b ab"], _fast(backend), unit="text")
    assert index.allowed([0])[1].tolist() == [1, 2, 4]
    assert _accepts(index, [1, 0]) and index.locate([1, 0]) == [Span(0, 0, 5)]
    assert index.locate([0]) == []


def test_a_space_before_the_text_stands_for_nothing() -> None:
    for name in ("byte level, space added", "SentencePiece BPE", "byte fallback"):
        tokenizer = TOKENIZERS[name]()
        index = SpanIndex.from_text(["the(inn)", "in"], tokenizer, unit="text")
        ids = _encode(tokenizer, "in")
        assert tokenizer.convert_ids_to_tokens(ids[0])[0] in "Ġ▁"
        want = [Span(0, 4, 6), Span(1, 0, 2)]
        assert _accepts(index, ids)
        assert index.locate(ids) == index.locate(tokenizer.decode(ids)) == want
    index = SpanIndex.from_text(["the(inn)", "in"], _byte_level(), unit="text")
    assert not _accepts(index, _encode(_byte_level(), " in"))


@pytest.mark.parametrize("name", ["SentencePiece BPE", "SentencePiece BPE, spaces kept"])
@pytest.mark.parametrize(
    ("text", "start", "end"), [("in  the", 2, 9), ("n  th", 3, 8), ("new", 11, 14)]
)
def test_places_of_spaces(name: str, text: str, start: int, end: int) -> None:
    index = SpanIndex.from_text(["  in  the \tnew "], TOKENIZERS[name](), unit="text")
    assert index.locate(text) == [Span(0, start, end)]


def test_both_spaces_of_a_text_that_begins_with_one() -> None:
    """The one that the tokenizer puts before it stands for nothing, its own is text."""
    tokenizer = _byte_fallback()
    index = SpanIndex.from_text([" the"], tokenizer, unit="text")
    space, word = tokenizer.convert_tokens_to_ids(["▁", "▁the"])
    assert _accepts(index, [word]) and _accepts(index, [space, word])
    assert not _accepts(index, [space, space, word])
    assert index.locate([space, word]) == [Span(0, 1, 4)]


def test_wordpiece_begins_and_ends_inside_words() -> None:
    tokenizer = _wordpiece()
    index = SpanIndex.from_text(["newer york"], tokenizer, unit="text")

    def accepts(*tokens: str) -> bool:
        return _accepts(index, tokenizer.convert_tokens_to_ids(list(tokens)))

    assert accepts("new") and accepts("new", "##er") and accepts("n", "##ew", "##e", "##r")
    assert accepts("e", "##r", "york") and accepts("w", "##er", "y", "##o")
    assert not accepts("new", "york") and not accepts("new", "e") and not accepts("##er")
    chinese = SpanIndex.from_text(["北京"], tokenizer, unit="text")
    north, capital, inside = tokenizer.convert_tokens_to_ids(["北", "京", "##京"])
    assert _accepts(chinese, [north, capital]) and not _accepts(chinese, [north, inside])


def test_characters_are_whole() -> None:
    tokenizer = _byte_level()
    index = SpanIndex.from_text(["a😀b中"], tokenizer, unit="text")
    face = [tokenizer.convert_tokens_to_ids(c) for c in "ðŁĺĢ"]  # its four bytes
    assert [_accepts(index, face[:n]) for n in range(1, 5)] == [False, False, False, True]
    assert _walk(index, face[:3]) > 0 and _walk(index, face[1:]) == -1
    assert index.locate(face) == [Span(0, 1, 2)]
    assert index.locate(face[:3]) == index.locate(face[1:]) == []


@pytest.mark.parametrize("unit", ["token", "text"])
@pytest.mark.parametrize("passages", [[], [""], ["", " ", ""], ()])
@pytest.mark.parametrize("name", NAMES)
def test_nothing_to_quote(name: str, passages: Any, unit: Any) -> None:
    tokenizer = TOKENIZERS[name]()
    index = SpanIndex.from_text(passages, tokenizer, unit=unit)
    assert index.is_final([0, -1]).tolist() == [True, False]
    assert index.locate("the") == index.locate("") == index.locate(_encode(tokenizer, "the")) == []
    assert not _accepts(index, _encode(tokenizer, "the"))


# A vocabulary and its cache


def test_a_tokenizer_is_read_once_and_not_kept() -> None:
    tokenizer = _byte_level.__wrapped__()
    assert spelling_of(tokenizer) is spelling_of(tokenizer)
    for unit in ("token", "text"):
        index = SpanIndex.from_text(["the inn"], tokenizer, unit=unit)
        assert index.locate("inn") == [Span(0, 4, 7)]
    alive = weakref.ref(tokenizer)
    del tokenizer
    gc.collect()
    assert alive() is None
    assert index.locate("the") == [Span(0, 0, 3)]


@pytest.mark.parametrize("name", ["byte level", "WordPiece", "SentencePiece BPE"])
def test_added_tokens(name: str) -> None:
    from copy import deepcopy

    tokenizer = deepcopy(TOKENIZERS[name]())
    assert _accepts(
        SpanIndex.from_text(["the inn"], tokenizer, unit="text"), _encode(tokenizer, "inn")
    )
    tokenizer.add_tokens(["inn"])
    tokenizer.add_special_tokens({"additional_special_tokens": ["the"]})
    index = SpanIndex.from_text(["the inn", "inner"], tokenizer, unit="text")
    word, special = tokenizer.convert_tokens_to_ids(["inn", "the"])
    assert _accepts(index, [word]) and not _accepts(index, [special])
    assert index.locate([word, special]) == [Span(0, 4, 7), Span(1, 0, 3)]


def test_unsupported_kinds() -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({"the": 0, "inn": 1, "<unk>": 2}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    clip = Tokenizer(models.BPE({"a</w>": 0}, [], end_of_word_suffix="</w>"))
    clip.decoder = decoders.ByteLevel()
    undecoded = Tokenizer(models.BPE({"a": 0}, []))
    for tokenizer, kind in (
        (words, "WordLevel with decoder none"),
        (clip, "BPE with decoder ByteLevel"),
        (undecoded, "BPE with decoder none"),
    ):
        with pytest.raises(InputError, match=f"byte-level BPE, .*WordPiece; got a model {kind}"):
            SpanIndex.from_text(["the"], _fast(tokenizer), unit="text")
    index = SpanIndex.from_text(["the inn the", "the"], _fast(words, unk_token="<unk>"))
    assert index.locate([0]) == [Span(0, 0, 3), Span(0, 8, 11), Span(1, 0, 3)]
    assert index.locate("inn the") == [Span(0, 4, 11)]


@pytest.mark.parametrize(
    ("passages", "unit", "error", "message"),
    [
        ("the", "text", TypeError, "passages: expected a list of strings, got str"),
        (3, "token", TypeError, "passages: expected a list of strings, got int"),
        (["a", 3], "text", TypeError, r"passages\[1\]: expected a string, got int"),
        (["a", None], "token", TypeError, r"passages\[1\]: expected a string, got NoneType"),
        (["a", "\ud800"], "text", InputError, r"passages\[1\]: expected text that UTF-8 can"),
        (["a", "\ud800"], "token", InputError, "passages: expected text that UTF-8 can"),
        (["a"], "word", InputError, "unit: expected 'token' or 'text', got 'word'"),
    ],
)
def test_from_text_refuses(passages: Any, unit: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        SpanIndex.from_text(passages, _byte_level(), unit=unit)


def test_refuses_other_tokenizers_and_outputs() -> None:
    for unit in ("token", "text"):
        with pytest.raises(TypeError, match="tokenizer: expected a fast tokenizer .* got object"):
            SpanIndex.from_text(["a"], object(), unit=unit)  # type: ignore[call-overload]
        index: Any = SpanIndex.from_text(["a"], _byte_level(), unit=unit)
        with pytest.raises(TypeError, match="output: expected integers"):
            index.locate([0.5])
        for output, dimensions in (([[1]], 2), (1, 0)):
            with pytest.raises(ValueError, match=f"output: expected 1 dimension, got {dimensions}"):
                index.locate(output)
        with pytest.raises(InputError, match="output: expected text that UTF-8 can encode"):
            index.locate("\ud800")


@pytest.mark.parametrize(
    ("ids", "texts", "message"),
    [
        ([3, 3], [b"a", b"b"], r"ids\[1\]: expected a token id > 3, got 3"),
        ([-1], [b"a"], r"ids\[0\]: expected a token id > -1, got -1"),
        ([1], [b"a", b"b"], "ids: expected one per spelling, 2, got 1"),
    ],
)
def test_spellings_refuse(ids: list[int], texts: list[bytes], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _C.TokenSpellings(np.array(ids, np.int32), *_flat(texts))


def test_native_index_refuses() -> None:
    with pytest.raises(ValueError, match="following: expected no token without bytes, got token 4"):
        _native(["a"], {}, {4: b"", 5: b"a"})
    text, offsets = _flat([b"ab"])
    spelt = _spellings({})
    with pytest.raises(ValueError, match="the last to be the number of bytes, 2"):
        _C.TextIndex(text, offsets[:1], spelt, spelt)
    with pytest.raises(ValueError, match=r"offsets\[1\]: expected a value >= 0"):
        _C.TextIndex(text, np.array([0, -1, 2]), spelt, spelt)


# In a search, and in size


@pytest.mark.parametrize("name", ["byte level", "SentencePiece BPE", "WordPiece"])
def test_a_search_quotes(name: str) -> None:
    """Whatever a model of random logits writes under the constraint stands in a passage."""
    tokenizer = TOKENIZERS[name]()
    passages = SENTENCES[:3] if name == "WordPiece" else SENTENCES
    index = SpanIndex.from_text(passages, tokenizer, unit="text")
    end = tokenizer.eos_token_id or tokenizer.sep_token_id

    class Source:
        def __init__(self, seed: int) -> None:
            self.rng = np.random.default_rng(seed)

        def prefill(self) -> Any:
            return self.rng.normal(size=(1, len(tokenizer))).astype(np.float32)

        def step(self, request: Any) -> Any:
            size = (len(request.row_passage), len(tokenizer))
            return self.rng.normal(size=size).astype(np.float32)

    written = set()
    for seed in range(20):
        batch = decoding.beam_search(
            Source(seed),
            [[[5, 6]]],
            end_id=end,
            vocabulary_size=len(tokenizer),
            options=SearchOptions(beam_size=3, min_answer_tokens=2, max_answer_tokens=8),
            constraints=[index],
        )
        best = batch.results[0].best
        if best is None or not best.finished:
            continue
        text = _decode(name, best.token_ids)
        assert any(text in _read(name, passage) for passage in passages)
        assert bool(index.locate([*best.token_ids, end])) == bool(text.strip())
        written.add(text)
    assert len(written) > 5


@pytest.mark.parametrize("name", ["byte level", "SentencePiece BPE", "WordPiece"])
def test_long_passages(name: str) -> None:
    rng = np.random.default_rng(5)
    words = [*SENTENCES[0].split(), *SENTENCES[1].split(), *SENTENCES[2]]
    passage = " ".join(rng.choice(words, 40_000))[:100_000]
    assert len(passage) == 100_000
    tokenizer = TOKENIZERS[name]()
    SpanIndex.from_text([], tokenizer, unit="text")
    begin = time.perf_counter()
    index = SpanIndex.from_text([passage], tokenizer, unit="text")
    seconds = time.perf_counter() - begin
    print(f"{name}: {index.num_states} states, {index.num_edges} edges, {seconds:.2f} s")
    assert index.num_states <= 2 * len(passage.encode()) + 2
    assert index.num_edges <= 10 * len(passage.encode())
    quote = passage[70_000:70_050].strip()
    assert index.locate(quote)
    assert _accepts(index, _encode(tokenizer, quote))


def test_several_threads() -> None:
    tokenizer = _byte_level()
    passages = [text * 20 for text in SENTENCES]

    def build(unit: Any) -> list[Any]:
        index = SpanIndex.from_text(passages, tokenizer, unit=unit)
        return [index.num_states, index.num_edges, index.locate(SENTENCES[0])]

    units = ["text", "token"] * 8
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(build, units)) == [build(unit) for unit in units]


def test_saved_word_pieces(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    save_tokenizer(tmp_path, BERT_TOKENS)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    passages = ["In NEWING YORK 2024", "北京天气"]
    index = SpanIndex.from_text(passages, tokenizer, unit="text")
    assert isinstance(index, fastmrc.constraints.Automaton)
    for text, want in [
        ("Newing york", Span(0, 3, 14)),
        ("wing", Span(0, 5, 9)),
        ("24", Span(0, 17, 19)),
        ("京天", Span(1, 1, 3)),
    ]:
        ids = tokenizer.encode(text)  # with [CLS] and [SEP]
        assert _accepts(index, ids[1:-1])
        assert index.locate(ids) == index.locate(text) == index.locate(ids[1:]) == [want]
