"""Tokens and character offsets of the caller's text."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import BERT_TOKENS, ROBERTA_TOKENS, save_tokenizer

from fastmrc.errors import InputError
from fastmrc.text import TextCodec, window_starts


def _codec(directory: Path, normalization: Any = "none") -> TextCodec:
    from transformers import AutoTokenizer

    return TextCodec(AutoTokenizer.from_pretrained(directory), normalization)


@pytest.fixture
def codec(tiny_bert_dir: Path) -> TextCodec:
    return _codec(tiny_bert_dir)


def _pieces(codec: TextCodec, text: str) -> list[str]:
    tokens = codec.encode_passages([text])[0]
    assert len(tokens) == len(tokens.starts) == len(tokens.ends)
    assert (tokens.starts < tokens.ends).all()
    assert (tokens.ends[:-1] <= tokens.starts[1:]).all()
    return [text[a:b] for a, b in zip(tokens.starts, tokens.ends, strict=True)]


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("", []),
        (" \t\n\u3000", []),
        ("\u200b\u0000", []),
        ("北京", ["北", "京"]),
        (" 北 京\u3000", ["北", "京"]),
        ("NEW York", ["NEW", "York"]),
        ("Newing", ["New", "ing"]),
        ("2024年", ["2", "0", "2", "4", "年"]),
        ("北😀京", ["北", "😀", "京"]),
        ("👩\u200d👩\u200d👧京", ["👩\u200d👩\u200d👧", "京"]),
        ("the\u0301 北", ["the\u0301", "北"]),
        ("a\u0301\u0302b", ["a\u0301\u0302", "b"]),
        ("北\ufe0f京", ["北\ufe0f", "京"]),
        ("É", ["É"]),
        ("「北」", ["「", "北", "」"]),
        ("北\ufffd京", ["北", "京"]),
    ],
)
def test_offsets(codec: TextCodec, text: str, pieces: list[str]) -> None:
    assert _pieces(codec, text) == pieces


@pytest.mark.parametrize("fixture", ["tiny_bert_dir", "tiny_roberta_dir"])
def test_special_tokens_are_plain_text(fixture: str, request: pytest.FixtureRequest) -> None:
    codec = _codec(request.getfixturevalue(fixture))
    special = [*BERT_TOKENS.values(), *ROBERTA_TOKENS.values()]
    for text in special:
        for ids in (
            codec.encode_passages([f"北{text}京"])[0].token_ids,
            codec.encode_question(f"北{text}京"),
        ):
            assert not {codec.cls_id, codec.sep_id} & set(ids.tolist()), text
            assert len(ids) >= 5, text
    assert _pieces(codec, "北[SEP]京") == ["北", "[", "S", "E", "P", "]", "京"]


def test_normalization_of_passages(tiny_bert_dir: Path) -> None:
    text = "北京、上海；天 大，小,New York"  # noqa: RUF001
    comma = _codec(tiny_bert_dir).encode_passages([","])[0].token_ids[0]
    original = _codec(tiny_bert_dir, "original")
    tokens = original.encode_passages([text])[0]
    places = [text[a] for a, t in zip(tokens.starts, tokens.token_ids, strict=True) if t == comma]
    assert places == list("、； ，, ")  # noqa: RUF001
    assert _pieces(original, text) == [*"北京、上海；天 大，小,", "New", " ", "York"]  # noqa: RUF001
    # Questions are left alone.
    plain = _codec(tiny_bert_dir)
    for question in (text, "a b"):
        np.testing.assert_array_equal(
            original.encode_question(question), plain.encode_question(question)
        )


def test_unknown_texts_have_one_token_and_their_own_offsets(codec: TextCodec) -> None:
    one, other = codec.encode_passages(["😀", "🎉"])
    assert one.token_ids.tolist() == other.token_ids.tolist() == [codec.unk_id]


@pytest.mark.parametrize(
    ("text", "decoded"),
    [
        ("北京 天气", "北京天气"),
        ("New York", "new york"),
        ("Newing 北 the 京", "newing北the京"),
        ("北京 , 上海。", "北京,上海。"),
        ("2024 年", "2024年"),
        ("", ""),
    ],
)
def test_decode(codec: TextCodec, text: str, decoded: str) -> None:
    ids = codec.encode_passages([text])[0].token_ids.tolist()
    assert codec.decode(ids) == decoded


def test_special_tokens_are_not_decoded(codec: TextCodec) -> None:
    ids = codec.encode_passages(["北"])[0].token_ids.tolist()
    assert codec.decode([codec.cls_id, *ids, codec.sep_id]) == "北"


def test_decode_takes_any_token_of_the_vocabulary(codec: TextCodec) -> None:
    for token in range(codec._backend.get_vocab_size()):
        assert isinstance(codec.decode([token, token]), str)


def test_lone_surrogate(codec: TextCodec) -> None:
    with pytest.raises(InputError, match="passages: expected text that UTF-8 can encode"):
        codec.encode_passages(["北", "\ud800"])
    with pytest.raises(InputError, match="question: expected text that UTF-8 can encode"):
        codec.encode_question("\udfff")


def test_the_tokenizer_given_is_not_changed(tiny_bert_dir: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_bert_dir)
    before = tokenizer("北[SEP]京")["input_ids"]
    TextCodec(tokenizer, "original").encode_passages(["北[SEP]京"])
    assert tokenizer("北[SEP]京")["input_ids"] == before


def test_a_tokenizer_that_truncates_or_pads(tiny_bert_dir: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_bert_dir)
    tokenizer("北京", padding="max_length", truncation=True, max_length=4)
    codec = TextCodec(tokenizer, "none")
    assert [len(t) for t in codec.encode_passages(["北" * 9, "北"])] == [9, 1]


@pytest.mark.parametrize(
    ("length", "size", "stride", "starts"),
    [
        (0, 5, None, [0]),
        (5, 5, None, [0]),
        (50, 5, None, [0]),
        (5, 5, 0, [0]),
        (6, 5, 0, [0, 5]),
        (10, 5, 0, [0, 5]),
        (11, 5, 2, [0, 3, 6]),
        (12, 5, 4, [0, 1, 2, 3, 4, 5, 6, 7]),
        (3, 5, 4, [0]),
    ],
)
def test_windows(length: int, size: int, stride: int | None, starts: list[int]) -> None:
    assert list(window_starts(length, size, stride)) == starts


def test_windows_cover_every_token_once_or_share_the_stride() -> None:
    for length in range(1, 40):
        for size in range(1, 9):
            for stride in range(size):
                starts = list(window_starts(length, size, stride))
                covered = {t for s in starts for t in range(s, min(length, s + size))}
                assert covered == set(range(length))
                assert all(b - a == size - stride for a, b in zip(starts, starts[1:], strict=False))
                assert len(starts) == 1 or starts[-2] + size < length


def test_piece() -> None:
    from fastmrc.text import TokenizedText

    whole = TokenizedText(np.arange(5), np.arange(5) * 2, np.arange(5) * 2 + 1, np.arange(5) // 2)
    piece = whole.piece(3, 9)
    assert (piece.token_ids.tolist(), piece.starts.tolist()) == ([3, 4], [6, 8])
    assert (piece.ends.tolist(), piece.words.tolist()) == ([7, 9], [1, 2])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", []),
        ("New York", ["New", "York"]),
        ("newing 2024", ["newing", "2024"]),
        ("北京newing,", ["北", "京", "newing", ","]),
        ("😀the", ["😀the"]),
    ],
)
def test_words(codec: TextCodec, text: str, words: list[str]) -> None:
    tokens = codec.encode_passages([text])[0]
    assert len(tokens.words) == len(tokens)
    found: dict[int, str] = {}
    for word, a, b in zip(tokens.words.tolist(), tokens.starts, tokens.ends, strict=True):
        found[word] = found.get(word, "") + text[a:b]
    assert list(found.values()) == words
    assert list(found) == sorted(found)


def test_tokens_without_a_word(codec: TextCodec) -> None:
    from types import SimpleNamespace

    from fastmrc.text import _tokenized

    encoding = SimpleNamespace(ids=[5, 6], offsets=[(0, 1), (1, 2)], word_ids=[None, 3])
    assert _tokenized("ab", encoding).words.tolist() == [-1, 3]


# Two texts


def test_pair_layout_of_bert(codec: TextCodec) -> None:
    layout = codec.pair_layout()
    assert layout.before.tolist() == [codec.cls_id]
    assert layout.between.tolist() == layout.after.tolist() == [codec.sep_id]
    assert layout.types == (0, 0, 0, 1, 1)
    assert layout.num_special == 3
    assert [layout.second_at(n) for n in (0, 1, 7)] == [2, 3, 9]


def test_pair_layout_of_roberta(roberta_qa_dir: Path) -> None:
    codec = _codec(roberta_qa_dir)
    layout = codec.pair_layout()
    assert layout.before.tolist() == [codec.cls_id]
    assert layout.between.tolist() == [codec.sep_id, codec.sep_id]
    assert layout.after.tolist() == [codec.sep_id]
    assert layout.types == (0, 0, 0, 0, 0)
    assert layout.num_special == 4
    assert layout.second_at(2) == 5


@pytest.mark.parametrize(
    "pair", ["$A [SEP] $B:1 [SEP]:1 [CLS]:1", "[CLS]:1 $A:1 [SEP] $B", "$A $B", "$A:1 [SEP] $B:1"]
)
def test_pair_layout_of_any_template(tmp_path: Path, pair: str) -> None:
    save_tokenizer(tmp_path, BERT_TOKENS, pair=pair)
    assert_joins_as_the_tokenizer(tmp_path)


@pytest.mark.parametrize("fixture", ["tiny_bert_dir", "roberta_qa_dir"])
def test_pairs_are_joined_as_the_tokenizer_joins_them(
    fixture: str, request: pytest.FixtureRequest
) -> None:
    assert_joins_as_the_tokenizer(request.getfixturevalue(fixture))


def assert_joins_as_the_tokenizer(directory: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory)
    codec = TextCodec(tokenizer, "none")
    layout = codec.pair_layout()
    texts = ["谁", "谁 new", "2024年", "0", " "]
    for first, second in product(texts, repeat=2):
        expected = tokenizer(first, second, return_token_type_ids=True)
        own = codec.encode_question(first), codec.encode_question(second)
        ids, types = layout.join(*own)
        assert ids.dtype == types.dtype == np.int32
        assert (ids.tolist(), types.tolist()) == (
            expected["input_ids"],
            expected["token_type_ids"],
        )
        start = layout.second_at(len(own[0]))
        assert ids[start : start + len(own[1])].tolist() == own[1].tolist()
        assert layout.num_special == len(ids) - len(own[0]) - len(own[1])


@pytest.mark.parametrize(
    ("text", "most", "pieces"),
    [
        ("", 3, [""]),
        (" \n", 3, [" \n"]),
        ("北京上海", 4, ["北京上海"]),
        ("北京上海", 3, ["北京上", "海"]),
        ("北京。上海天气", 5, ["北京。", "上海天气"]),
        ("北京。上海。天气", 7, ["北京。上海。", "天气"]),
        ("北京，上海天气", 5, ["北京，", "上海天气"]),
        ("北京，上海。天气，山", 8, ["北京，上海。", "天气，山"]),
        ("北。京上，海天气", 7, ["北。京上，", "海天气"]),
        ("。北京上海天", 4, ["。北京上", "海天"]),
        ("，北京上海", 3, ["，北京", "上海"]),
        ("北京。 上海 天气", 4, ["北京。 ", "上海 天气"]),
        ("(北京。)上海天气", 6, ["(北京。)", "上海天气"]),
        ("(北京。)上海天气", 4, ["(北京。", ")上海天", "气"]),
        ("the new york", 2, ["the new ", "york"]),
        (" 北京 ", 1, [" 北", "京 "]),
        ("北京\n上海", 3, ["北京\n", "上海"]),
    ],
)
def test_long_texts_are_cut_at_marks(
    codec: TextCodec, text: str, most: int, pieces: list[str]
) -> None:
    assert codec.cut_pieces(text, most) == pieces
    whole = codec.encode_passages([text])[0].token_ids.tolist()
    parts = [codec.encode_passages([piece])[0].token_ids.tolist() for piece in pieces]
    assert sum(parts, []) == whole and all(len(part) <= most for part in parts)
    assert codec.encode_texts([text], most)[0].tolist() == parts[0]
