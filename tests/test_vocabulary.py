"""Fewer tokens: which ones go, what is written, and what stays equal."""

from __future__ import annotations

import errno
import json
import random
import string
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import (
    BERT_TOKENS,
    CHINESE,
    ROBERTA_TOKENS,
    assert_same_answer,
    make_vocabulary,
    random_cases,
    save_model,
)
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

import fastmrc
from fastmrc.cli import main
from fastmrc.corpus import corpus_texts
from fastmrc.data import DataIssue
from fastmrc.errors import InputError, UnsupportedModelError
from fastmrc.model_files import new_directory
from fastmrc.pretrained import LoadedModel, load_model, packaged_model_path
from fastmrc.quantize import quantize_model
from fastmrc.vocabulary import (
    PruningReport,
    Selection,
    WordPieces,
    needed_tokens,
    prune_vocabulary,
    pruning,
    reachability,
    select_tokens,
    unreachable_tokens,
)
from fastmrc.vocabulary.corpus import Cut

EditJson = Callable[[Path, dict[str, Any]], None]

# What a lower-casing BERT tokenizer never gives, and why.
NEVER = ["Upper", "É", "é", "café", "##é", "한", "\u0301", "a\u200db", "New", "##が", "a\u3000b"]
CHINESE_JOINED = ["##中", "##北京", "中国", "北京a", "a山", "2024年", "豈豈"]
OTHER_JOINED = ["a.b", "##.", "——", "...", "[unused1]", "##", "[x]", "##，"]
# What it may give, though it looks alike.
REACHABLE = [
    *["café".replace("é", "e"), "ß", "##ß", "々", "##々", "〇", "##〇", "あい", "##い", "ー"],
    *[
        "😀",
        "##😀",
        "😀😀",
        "—",
        "…",
        "ａ",
        "##ａ",
        "①",
        "\u1112",
        "##\u1161",
        "2024",
        "##24",
        "豈",
    ],
    *["\U00020000", "\U0002b820a", "\u3400", "ing", "##york", "##new", "n", "㈱", "##㈱"],
]

LIKE_TEXT = [
    "北京是中国的首都，2024年有café、Naïve的New York人（约１２个）。",
    "ＡＢＣ公司①号：“你好——世界……”；e-mail: a.b@c.d! 한국어、かがやき、ー々〇㈱",
    "a\u200db c\u0301a\u030a\u0301 \ufeffx\u00ady\u3000z\n\t😀👨‍👩‍👧🇨🇳 [SEP] [unused1] [MASK]中",
    "豈\uf900\U0002f800𠀀㐀 ##中 ##ing İIıſK Ǆ ﬁ ½ ∉≠ \ue000",
]


# Of tokens that single tests add.
OTHER_CHARACTERS = "Ü队"


def all_tokens() -> list[str]:
    """Reachable and unreachable tokens mixed, special tokens not at the start."""
    extra = [*NEVER, *CHINESE_JOINED, *OTHER_JOINED, *REACHABLE]
    tokens = list(dict.fromkeys([*make_vocabulary(list(BERT_TOKENS.values())), *extra]))
    random.Random(0).shuffle(tokens)
    return tokens


def make_tokenizer(
    tokens: Sequence[str], normalizer: Any = None, pre_tokenizer: Any = None
) -> Tokenizer:
    ids = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.WordPiece(ids, unk_token="[UNK]"))
    tokenizer.normalizer = normalizer or normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizer or pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    ends = [(token, ids[token]) for token in ("[CLS]", "[SEP]") if token in ids]
    if ends:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=ends
        )
        tokenizer.enable_padding(pad_id=ids["[PAD]"], pad_token="[PAD]")
    return tokenizer


def take_apart(tokenizer: Tokenizer) -> WordPieces:
    return WordPieces(tokenizer, json.loads(tokenizer.to_str()), tokenizer.get_vocab())


def without(tokenizer: Tokenizer, dropped: set[str]) -> Tokenizer:
    parts = json.loads(tokenizer.to_str())
    kept = [t for t in parts["model"]["vocab"] if t not in dropped - set(BERT_TOKENS.values())]
    parts["model"]["vocab"] = {token: i for i, token in enumerate(kept)}
    return Tokenizer.from_str(json.dumps(parts | {"post_processor": None, "padding": None}))


def tokens_of(tokenizer: Tokenizer, text: str) -> list[str]:
    tokens: list[str] = tokenizer.encode(text, add_special_tokens=False).tokens
    return tokens


# Texts that come close to every kind of token.
PIECES = [t.removeprefix("##") for t in all_tokens()] + LIKE_TEXT + ["##", " "]
TEXTS = st.lists(
    st.sampled_from(PIECES)
    | st.text(st.sampled_from("中a.é한ÉＡａ１①々😀\u0301\u200d ㈱㊥-'\U0002b820\uf900"), max_size=4)
    | st.text(max_size=3),
    max_size=12,
).map("".join)


@pytest.fixture(scope="module", autouse=True)
def each_thing_once() -> Iterator[None]:
    """Load each full model once, and ask about all code points once per kind of tokenizer."""
    threads = torch.get_num_threads()
    # Two gain nothing on models this small.
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pruning, "load_model", load_full)
        patch.setattr(reachability, "characters_of_words", characters_of_words)
        yield
    torch.set_num_threads(threads)


load_full = cache(load_model)
ask = reachability.characters_of_words
# By normaliser and pre-tokenizer: alphabets, and what was found with each.
known: dict[str, list[tuple[set[str], tuple[set[str], set[str]]]]] = defaultdict(list)


def characters_of_words(pieces: WordPieces, alphabet: set[str]) -> tuple[set[str], set[str]]:
    """Answer from what was asked before: a larger alphabet tells the same about each character."""
    answers = known[json.dumps([pieces.parts["normalizer"], pieces.parts["pre_tokenizer"]])]
    for asked, found in answers:
        if alphabet <= asked:
            return found
    asked = alphabet.union(*all_tokens(), string.printable, OTHER_CHARACTERS)
    answers.append((asked, ask(pieces, asked)))
    return answers[-1][1]


# --- the rule ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mixed() -> WordPieces:
    return take_apart(make_tokenizer(all_tokens()))


@pytest.fixture(scope="module")
def mixed_reasons(mixed: WordPieces) -> dict[str, str]:
    return dict(unreachable_tokens(mixed))


def test_rule_finds_what_no_text_gives_and_nothing_else(mixed_reasons: dict[str, str]) -> None:
    expected = dict.fromkeys([*NEVER, *BERT_TOKENS.values()], "never_in_text")
    expected |= dict.fromkeys(CHINESE_JOINED, "chinese_stands_alone")
    expected |= dict.fromkeys(OTHER_JOINED, "other_stands_alone")
    assert mixed_reasons == expected


def test_rule_drops_all_that_the_original_drops(mixed_reasons: dict[str, str]) -> None:
    """bert4keras: tokens of several characters with a Chinese character or punctuation."""
    for token in all_tokens():
        stem = token.removeprefix("##")
        if len(token) > 1 and any(c in CHINESE or c in ".[]—，" for c in stem):
            assert token in mixed_reasons


@pytest.fixture(scope="module")
def mixed_without(mixed: WordPieces, mixed_reasons: dict[str, str]) -> Tokenizer:
    return without(mixed.backend, set(mixed_reasons))


@random_cases(200)
@given(TEXTS)
def test_rule_changes_no_text(mixed: WordPieces, mixed_without: Tokenizer, text: str) -> None:
    assert tokens_of(mixed_without, text) == tokens_of(mixed.backend, text)


def test_rule_changes_no_text_of_the_packaged_model(
    packaged_pieces: WordPieces, packaged_reasons: dict[str, str]
) -> None:
    pruned = without(packaged_pieces.backend, set(packaged_reasons))
    for text in LIKE_TEXT:
        assert tokens_of(pruned, text) == tokens_of(packaged_pieces.backend, text)


@pytest.fixture(scope="module")
def packaged_pieces(packaged_model: LoadedModel) -> WordPieces:
    return WordPieces.of(packaged_model)


@pytest.fixture(scope="module")
def packaged_reasons(packaged_pieces: WordPieces) -> dict[str, str]:
    return dict(unreachable_tokens(packaged_pieces))


def test_every_dropped_token_of_the_packaged_model_is_cut_otherwise(
    packaged_pieces: WordPieces, packaged_reasons: dict[str, str]
) -> None:
    assert 100 < len(packaged_reasons) < 1000
    for token in packaged_reasons:
        for text in (token, token.removeprefix("##"), "a" + token.removeprefix("##") + "a"):
            packaged_pieces.backend.encode_special_tokens = True
            assert token not in tokens_of(packaged_pieces.backend, text)


Bert = normalizers.BertNormalizer
OTHER_TOKENIZERS: dict[str, tuple[Any, Any]] = {
    "cased": (Bert(lowercase=False), None),
    "accents": (Bert(lowercase=True, strip_accents=False), None),
    "joined Chinese": (Bert(handle_chinese_chars=False), None),
    "words": (Bert(), pre_tokenizers.WhitespaceSplit()),
    "word characters": (normalizers.Lowercase(), pre_tokenizers.Whitespace()),
    "digits": (
        normalizers.Sequence([normalizers.NFKC(), normalizers.StripAccents()]),
        pre_tokenizers.Sequence(
            [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Digits(individual_digits=True)]
        ),
    ),
    "punctuation": (
        normalizers.NFC(),
        pre_tokenizers.Sequence(
            [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation("merged_with_next")]
        ),
    ),
    "replaced": (
        normalizers.Sequence(
            [Bert(), normalizers.Replace("①", "中"), normalizers.Replace("ａ", "É")]
        ),
        None,
    ),
    # ㊥ is no Chinese character for the first, and becomes one by the second.
    "compatibility": (normalizers.Sequence([Bert(), normalizers.NFKD()]), None),
    "delimiter": (normalizers.NFKD(), pre_tokenizers.CharDelimiterSplit("a")),
}


@dataclass(frozen=True)
class Other:
    name: str
    full: Tokenizer
    reasons: dict[str, str]
    pruned: Tokenizer


# Planes 2 and 3, half of all that is asked about, hold Chinese characters that stay themselves,
# but for compatibility forms. The tokenizers above are asked about all of them.
FEWER_CODE_POINTS = (range(0xD800), range(0xE000, 0x20000), range(0x2F800, 0x2FA20))


@pytest.fixture(scope="module", params=OTHER_TOKENIZERS)
def other(request: pytest.FixtureRequest) -> Other:
    pieces = take_apart(make_tokenizer(all_tokens(), *OTHER_TOKENIZERS[request.param]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reachability, "_CODE_POINTS", FEWER_CODE_POINTS)
        reasons = dict(unreachable_tokens(pieces))
    return Other(request.param, pieces.backend, reasons, without(pieces.backend, set(reasons)))


@random_cases(60)
@given(TEXTS)
def test_rule_changes_no_text_of_other_tokenizers(other: Other, text: str) -> None:
    assert tokens_of(other.pruned, text) == tokens_of(other.full, text)


def test_other_tokenizers_give_other_tokens(other: Other) -> None:
    kept = {
        "cased": ["Upper", "New"],
        "accents": ["café", "##é", "##が"],
        "joined Chinese": ["中国", "##中", "2024年"],
        "words": ["##", "a.b", "..."],
        "word characters": ["中国", "——"],
        "digits": ["中国", "a.b"],
        "punctuation": ["a山", "Upper"],
        "replaced": ["##中", "É"],
        "compatibility": ["##中"],
        "delimiter": ["##中", "New"],
    }
    dropped = {
        "cased": ["a\u200db", "##中"],
        "accents": ["Upper", "中国"],
        "joined Chinese": ["a.b", "É"],
        "words": ["中国", "É"],
        "word characters": ["Upper", "a\u3000b"],
        "digits": ["2024", "##24", "2024年", "①"],
        "punctuation": ["a\u3000b"],
        "replaced": ["New", "——"],
        "compatibility": ["①", "é"],
        "delimiter": ["a", "é"],
    }
    assert not set(kept[other.name]) & set(other.reasons)
    assert set(dropped[other.name]) <= set(other.reasons)


def test_word_that_begins_like_the_inside_of_one() -> None:
    words = pre_tokenizers.WhitespaceSplit()
    pieces = take_apart(make_tokenizer(["[UNK]", "##", "##é", "##中"], Bert(), words))
    reasons = unreachable_tokens(pieces)
    assert tokens_of(pieces.backend, "##") == ["##"]
    assert set(reasons) == {"[UNK]", "##é", "##中"}


@pytest.mark.parametrize(
    ("normalizer", "pre_tokenizer", "named"),
    [
        (normalizers.Replace("ab", "c"), None, "normalizer Replace"),
        (normalizers.Sequence([Bert(), normalizers.NFC()]), None, "normalizer NFC"),
        (normalizers.Prepend("x"), None, "normalizer Prepend"),
        (None, pre_tokenizers.Metaspace(), "pre_tokenizer Metaspace"),
        (
            None,
            pre_tokenizers.Sequence([pre_tokenizers.Split("a", "isolated")]),
            "pre_tokenizer Split",
        ),
    ],
)
def test_rule_refuses_what_it_cannot_judge(normalizer: Any, pre_tokenizer: Any, named: str) -> None:
    pieces = take_apart(make_tokenizer(all_tokens(), normalizer, pre_tokenizer))
    with pytest.raises(UnsupportedModelError, match=f"the {named} makes .* corpus can be used"):
        unreachable_tokens(pieces)


def test_tokenizer_without_normalizer_and_pre_tokenizer() -> None:
    backend = Tokenizer(models.WordPiece({"[UNK]": 0, "中 国": 1, "##É": 2}, unk_token="[UNK]"))
    assert unreachable_tokens(take_apart(backend)) == {}


def test_selection() -> None:
    selection = select_tokens(
        7,
        {"a": 0, "b": 2, "c": 3, "[X]": 5},
        {"b": "not_in_corpus", "[X]": "never_in_text", "gone": "never_in_text"},
        {5, 6},
    )
    # Rows 1 and 4 have no token; 6 has none either, but a configuration names it.
    assert selection == Selection((0, 3, 5, 6), {"not_in_corpus": 1, "no_token": 2})
    assert selection.new_ids == {0: 0, 3: 1, 5: 2, 6: 3}


# --- the corpus --------------------------------------------------------------------------------


def cut(pieces: WordPieces, texts: Sequence[str]) -> Iterator[Any]:
    import numpy as np

    for text in texts:
        encoding = pieces.backend.encode(text, add_special_tokens=False)
        offsets = np.array(encoding.offsets, dtype=np.int32).reshape(-1, 2)
        yield Cut(text, np.array(encoding.ids, dtype=np.int32), offsets[:, 0], offsets[:, 1])


def test_corpus_keeps_the_way_to_an_unknown_word() -> None:
    """Without "ab", which is in no text, "abc" would become a + ##bc."""
    pieces = take_apart(make_tokenizer(["[UNK]", "a", "ab", "##bc", "xy", "##b", "a9"]))
    assert tokens_of(pieces.backend, "abc a") == ["[UNK]", "a"]
    # ASCII letters stay in any case.
    assert needed_tokens(pieces, cut(pieces, ["abc"])) & set(pieces.vocabulary) == {
        *["[UNK]", "a", "ab", "##b"]
    }
    text = "ΣΤΥ"
    pieces = take_apart(make_tokenizer(["[UNK]", "σ", "στ", "##τυ", "##τ"]))
    assert needed_tokens(pieces, cut(pieces, [text])) & set(pieces.vocabulary) == {"[UNK]", "στ"}
    assert tokens_of(without(pieces.backend, {"στ"}), text) == ["σ", "##τυ"]


GREEK = st.text("στυ ", max_size=12)


@random_cases(100)
@given(
    vocabulary=st.sets(
        st.text("στυ", min_size=1, max_size=3).flatmap(lambda t: st.sampled_from([t, "##" + t])),
        max_size=25,
    ),
    texts=st.lists(GREEK, min_size=1, max_size=4),
)
def test_corpus_changes_none_of_its_texts(vocabulary: set[str], texts: list[str]) -> None:
    pieces = take_apart(make_tokenizer(["[UNK]", *sorted(vocabulary)]))
    needed = needed_tokens(pieces, cut(pieces, texts))
    pruned = without(pieces.backend, set(pieces.vocabulary) - needed)
    for text in texts:
        assert tokens_of(pruned, text) == tokens_of(pieces.backend, text)


@random_cases(100)
@given(TEXTS)
def test_matches_are_those_of_the_tokenizer(mixed: WordPieces, text: str) -> None:
    for word in mixed.words(text):
        tokens = [token.value for token in mixed.backend.model.tokenize(word)]
        if tokens != ["[UNK]"]:
            assert mixed.matches(word) == tokens


def test_a_word_that_is_too_long_needs_nothing(mixed: WordPieces) -> None:
    assert mixed.matches("a" * 100) == ["a", *["##a"] * 99]
    assert mixed.matches("a" * 101) == []
    assert tokens_of(mixed.backend, "a" * 101) == ["[UNK]"]


# --- models ------------------------------------------------------------------------------------


def save_tokens(directory: Path, tokens: Sequence[str]) -> None:
    """Put a tokenizer with these tokens into the directory of a model."""
    from transformers import PreTrainedTokenizerFast

    make_fast: Any = PreTrainedTokenizerFast
    fast = make_fast(tokenizer_object=make_tokenizer(tokens), model_max_length=512, **BERT_TOKENS)
    fast.save_pretrained(directory)


def save_mixed(directory: Path, class_name: str = "BertForMaskedLM", **options: Any) -> Path:
    tokens = all_tokens()
    ids = {
        "bos_token_id": tokens.index("[CLS]"),
        "eos_token_id": tokens.index("[SEP]"),
        "pad_token_id": tokens.index("[PAD]"),
    }
    settings = {"vocab_size": len(tokens)} | ids | options
    save_model(directory, class_name, BERT_TOKENS, **settings)
    save_tokens(directory, tokens)
    return directory


@pytest.fixture(scope="session")
def mixed_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_mixed(tmp_path_factory.mktemp("mixed"))


def kept_ids(full: LoadedModel, pruned: LoadedModel) -> list[int]:
    """Old id of each new one, by the text of the token."""
    before, after = full.tokenizer.get_vocab(), pruned.tokenizer.get_vocab()
    by_id = sorted(after, key=after.__getitem__)
    assert [after[token] for token in by_id] == list(range(len(by_id)))
    old = [before[token] for token in by_id]
    assert old == sorted(old)
    return old


def assert_agrees(source: Path, output: Path) -> list[int]:
    """Both models give the same logits to the tokens that stay; return their old ids."""
    full, pruned = load_full(source, attention=None), load_model(output, attention=None)
    old = kept_ids(full, pruned)
    assert pruned.model.config.vocab_size == len(old)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(len(old), (3, 20), generator=generator)
    with torch.inference_mode():
        before = full.model(input_ids=torch.tensor(old)[ids]).logits[..., old]
        after = pruned.model(input_ids=ids).logits
    torch.testing.assert_close(after, before, rtol=0, atol=1e-5)
    assert pruned.normalization == full.normalization
    for text in LIKE_TEXT:
        a, b = (m.tokenizer(text, "谁", padding=True) for m in (full, pruned))
        assert [old[i] for i in b["input_ids"]] == a["input_ids"]
    return old


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


@dataclass(frozen=True)
class Pruned:
    source: Path
    output: Path
    report: PruningReport
    old_ids: list[int]

    @property
    def directories(self) -> tuple[Path, Path]:
        return self.source, self.output


def prune(source: Path, folder: Path) -> Pruned:
    """Prune by the rule, and compare both models."""
    output = folder / "out"
    report = prune_vocabulary(source, output, rule="simplified")
    return Pruned(source, output, report, assert_agrees(source, output))


@pytest.fixture(scope="module")
def pruned_mixed(mixed_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Pruned:
    """Do not change its files."""
    return prune(mixed_dir, tmp_path_factory.mktemp("pruned"))


def test_report_and_files(pruned_mixed: Pruned, tmp_path: Path) -> None:
    mixed_dir, output, report = pruned_mixed.source, pruned_mixed.output, pruned_mixed.report
    tokens = all_tokens()
    dropped = {*NEVER, *CHINESE_JOINED, *OTHER_JOINED}
    kept = [token for token in tokens if token not in dropped]
    assert report == PruningReport(
        len(tokens),
        len(kept),
        (mixed_dir / "model.safetensors").stat().st_size,
        (output / "model.safetensors").stat().st_size,
        {
            "never_in_text": len(NEVER),
            "chinese_stands_alone": len(CHINESE_JOINED),
            "other_stands_alone": len(OTHER_JOINED),
        },
    )
    assert report.bytes_after < report.bytes_before
    assert list(output.parent.iterdir()) == [output]
    names = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert {path.name for path in output.iterdir()} == names
    # Others may read it as they may read what else is written here.
    (tmp_path / "usual").mkdir()
    (tmp_path / "usual" / "file").touch()
    for path, usual in ((output, "usual"), (output / "model.safetensors", "usual/file")):
        assert path.stat().st_mode == (tmp_path / usual).stat().st_mode
    config = read_json(output / "config.json")
    roles = {"bos_token_id": "[CLS]", "eos_token_id": "[SEP]", "pad_token_id": "[PAD]"}
    assert {key: kept[config[key]] for key in roles} == roles
    parts = read_json(output / "tokenizer.json")
    assert list(parts["model"]["vocab"]) == kept
    assert {e["content"]: e["id"] for e in parts["added_tokens"]} == {
        token: kept.index(token) for token in BERT_TOKENS.values()
    }
    assert parts["padding"]["pad_id"] == kept.index("[PAD]")
    special = parts["post_processor"]["special_tokens"]
    assert special["[SEP]"]["ids"] == [kept.index("[SEP]")]


def test_stored_rows_are_cut_out(pruned_mixed: Pruned) -> None:
    old = pruned_mixed.old_ids
    before, after = (load_file(d / "model.safetensors") for d in pruned_mixed.directories)
    assert set(before) == set(after)
    changed = [name for name in before if before[name].shape != after[name].shape]
    assert sorted(changed) == [
        "bert.embeddings.word_embeddings.weight",
        "cls.predictions.bias",
    ]
    for name, tensor in before.items():
        assert torch.equal(tensor[old] if name in changed else tensor, after[name])


@pytest.mark.parametrize("hidden", [32, 2 * len(all_tokens())])
def test_untied_output_layer(tmp_path: Path, hidden: int) -> None:
    """Also where other weights have as many rows as there are tokens."""
    source = save_mixed(
        tmp_path / "full", tie_word_embeddings=False, intermediate_size=hidden // 2 or 32
    )
    old = prune(source, tmp_path).old_ids
    before, after = (load_file(d / "model.safetensors") for d in (source, tmp_path / "out"))
    name = "cls.predictions.decoder.weight"
    assert torch.equal(before[name][old], after[name])
    assert not torch.equal(after[name], after["bert.embeddings.word_embeddings.weight"])


def test_tied_weights_that_are_stored_twice(mixed_dir: Path, tmp_path: Path) -> None:
    source = copy(mixed_dir, tmp_path / "full")
    weights = load_file(source / "model.safetensors")
    embeddings = weights["bert.embeddings.word_embeddings.weight"]
    weights["cls.predictions.decoder.weight"] = embeddings.clone()
    weights["cls.predictions.decoder.bias"] = weights["cls.predictions.bias"].clone()
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    prune(source, tmp_path)


def copy(source: Path, target: Path) -> Path:
    target.mkdir()
    for path in source.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target


def test_int8_keeps_levels_and_scales(mixed_dir: Path, tmp_path: Path) -> None:
    source = copy(mixed_dir, tmp_path / "full")
    (source / "fastmrc.json").write_text('{"normalization": "original"}', encoding="utf-8")
    quantize_model(source, tmp_path / "int8")
    old = prune(tmp_path / "int8", tmp_path).old_ids
    assert read_json(tmp_path / "out" / "fastmrc.json") == {
        "format": "int8-per-row",
        "normalization": "original",
    }
    before, after = (load_file(tmp_path / d / "model.safetensors") for d in ("int8", "out"))
    assert set(before) == set(after)
    for name in ("bert.embeddings.word_embeddings.weight", "cls.predictions.bias"):
        assert torch.equal(before[name][old], after[name])
    name = "bert.embeddings.word_embeddings.weight.scale"
    assert torch.equal(before[name][old], after[name])
    assert after["bert.embeddings.word_embeddings.weight"].dtype == torch.int8


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays(mixed_dir: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    source = copy(mixed_dir, tmp_path / "full")
    weights = load_file(source / "model.safetensors")
    halves = {name: tensor.to(dtype) for name, tensor in weights.items()}
    save_file(halves, source / "model.safetensors", metadata={"format": "pt"})
    prune(source, tmp_path)
    assert {t.dtype for t in load_file(tmp_path / "out" / "model.safetensors").values()} == {dtype}


def test_shards_become_one_file(mixed_dir: Path, tmp_path: Path) -> None:
    source = copy(mixed_dir, tmp_path / "full")
    loaded = load_model(source)
    (source / "model.safetensors").unlink()
    loaded.model.save_pretrained(source, max_shard_size="20KB")
    shards = list(source.glob("model-*.safetensors"))
    assert len(shards) > 1
    report = prune(source, tmp_path).report
    assert report.bytes_before == sum(shard.stat().st_size for shard in shards)
    assert not list((tmp_path / "out").glob("*.index.json"))


def test_every_family(masked_lm_dir: Path, tmp_path: Path) -> None:
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("北京的天气\nNew York 2024\n", encoding="utf-8")
    report = prune_vocabulary(masked_lm_dir, tmp_path / "out", corpus=[corpus])
    assert report.dropped["not_in_corpus"] > 40
    full = load_full(masked_lm_dir, attention=None)
    pruned = load_model(tmp_path / "out", attention=None)
    old = kept_ids(full, pruned)
    ids = torch.arange(3, 20)[None]
    with torch.inference_mode():
        before = full.model(input_ids=torch.tensor(old)[ids]).logits[..., old]
        after = pruned.model(input_ids=ids).logits
    torch.testing.assert_close(after, before, rtol=0, atol=1e-5)


def test_added_tokens_and_files_beside_the_model(
    mixed_dir: Path, tmp_path: Path, edit_json: EditJson
) -> None:
    """Tokens behind the vocabulary, vocab.txt, ids in a settings file, a licence."""
    source = copy(mixed_dir, tmp_path / "full")
    loaded = load_model(source)
    tokens = all_tokens()
    loaded.tokenizer.add_tokens(["中国队", "Ünormal"])
    loaded.tokenizer.save_pretrained(source)
    loaded.model.resize_token_embeddings(len(tokens) + 5)
    loaded.model.save_pretrained(source)
    decoder = {str(tokens.index("[SEP]")): {"content": "[SEP]", "special": True}}
    edit_json(source / "tokenizer_config.json", {"added_tokens_decoder": decoder})
    (source / "vocab.txt").write_text("\n".join(tokens) + "\n", encoding="utf-8")
    (source / "LICENSE.md").write_text("free", encoding="utf-8")
    (source / "README.md").write_text("old", encoding="utf-8")
    report = prune_vocabulary(source, tmp_path / "out", rule="simplified")
    assert report.dropped["no_token"] == 3
    output = tmp_path / "out"
    pruned = load_model(output).tokenizer
    ids = pruned.encode("a中国队b", add_special_tokens=False)
    assert ids == pruned.convert_tokens_to_ids(["a", "中国队", "b"])
    assert pruned.convert_tokens_to_ids("Ünormal") == report.tokens_after - 1
    lines = (output / "vocab.txt").read_text(encoding="utf-8").splitlines()
    assert lines == [t for t in tokens if t in pruned.get_vocab()]
    settings = read_json(output / "tokenizer_config.json")
    assert settings["added_tokens_decoder"] == {
        str(lines.index("[SEP]")): {"content": "[SEP]", "special": True}
    }
    assert (output / "LICENSE.md").read_text(encoding="utf-8") == "free"
    assert not (output / "README.md").exists()


def test_tokenizer_of_a_vocabulary_file_only(mixed_dir: Path, tmp_path: Path) -> None:
    source = copy(mixed_dir, tmp_path / "full")
    (source / "tokenizer.json").unlink()
    (source / "vocab.txt").write_text("\n".join(all_tokens()) + "\n", encoding="utf-8")
    settings = {"tokenizer_class": "BertTokenizer", "do_lower_case": True}
    (source / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    prune(source, tmp_path)


def test_bert_post_processor(mixed_dir: Path, tmp_path: Path) -> None:
    source = copy(mixed_dir, tmp_path / "full")
    tokens = all_tokens()
    ends = {
        role: [f"[{role.upper()}]", tokens.index(f"[{role.upper()}]")] for role in ("sep", "cls")
    }
    parts = read_json(source / "tokenizer.json")
    parts["post_processor"] = {
        "type": "Sequence",
        "processors": [{"type": "BertProcessing", **ends}],
    }
    (source / "tokenizer.json").write_text(json.dumps(parts), encoding="utf-8")
    prune(source, tmp_path)


def test_a_configured_id_stays(mixed_dir: Path, tmp_path: Path, edit_json: EditJson) -> None:
    source = copy(mixed_dir, tmp_path / "full")
    tokens = all_tokens()
    edit_json(source / "config.json", {"eos_token_id": [tokens.index("中国"), tokens.index("a")]})
    prune_vocabulary(source, tmp_path / "out", rule="simplified")
    vocabulary = load_model(tmp_path / "out").tokenizer.get_vocab()
    config = read_json(tmp_path / "out" / "config.json")
    assert config["eos_token_id"] == [vocabulary["中国"], vocabulary["a"]]


# --- readers -----------------------------------------------------------------------------------

PASSAGES = ["北京的天气是大山，2024年。", "上海有水火木金土，New York！", "北京的山水。"]
QUESTION = "北京的天气？"


@pytest.fixture(scope="module")
def silent_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that gives no probability to tokens that go, so that softmaxes agree as well."""
    source = save_mixed(tmp_path_factory.mktemp("silent"))
    weights = load_file(source / "model.safetensors")
    dropped = {*NEVER, *CHINESE_JOINED, *OTHER_JOINED}
    rows = [i for i, token in enumerate(all_tokens()) if token in dropped]
    weights["cls.predictions.bias"][rows] = -1e4
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    return source


@pytest.fixture(scope="module")
def pruned_silent(silent_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Pruned:
    return prune(silent_dir, tmp_path_factory.mktemp("pruned_silent"))


@cache
def make_reader(module: Any, name: str, directory: Path) -> Any:
    return getattr(module, name).from_pretrained(directory)


@pytest.mark.parametrize(
    ("reader", "options"),
    [
        ("Seq2SeqReader", {}),
        ("Seq2SeqReader", {"mode": "generative", "max_answer_tokens": 6}),
        ("MLMReader", {}),
        ("MLMReader", {"decoding": "exact"}),
    ],
)
def test_readers_give_the_same_answers(
    pruned_silent: Pruned, reader: str, options: dict[str, Any]
) -> None:
    full, pruned = (make_reader(fastmrc, reader, d) for d in pruned_silent.directories)
    old = pruned_silent.old_ids
    options = {"min_answer_tokens": 1, **options}
    before = full.answer(QUESTION, PASSAGES, **options)
    after = pruned.answer(QUESTION, PASSAGES, **options)
    assert before.text
    assert [old[i] for i in after.token_ids] == list(before.token_ids)
    assert (after.text, after.spans) == (before.text, before.spans)
    assert after.score == pytest.approx(before.score, abs=1e-5)
    assert len(after.candidates) == len(before.candidates)
    for a, b in zip(after.candidates, before.candidates, strict=True):
        assert (a.text, a.score) == (b.text, pytest.approx(b.score, abs=1e-5))
    reference = make_reader(fastmrc.reference, reader, pruned_silent.output)
    assert_same_answer(after, reference.answer(QUESTION, PASSAGES, **options), 1e-5)


@pytest.mark.parametrize("rule", ["simplified", None])
def test_packaged_model(
    packaged_model: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rule: Any
) -> None:
    monkeypatch.setattr(pruning, "load_model", lambda *_, **__: packaged_model)
    samples = Path(fastmrc.__file__).parent / "samples" / "passages.txt"
    corpus = None if rule else [samples]
    if corpus:
        question = tmp_path / "q.txt"
        question.write_text("造纸术在东汉由谁改进？", encoding="utf-8")
        corpus.append(question)
    report = prune_vocabulary(packaged_model_path(), tmp_path / "out", rule=rule, corpus=corpus)
    assert report.tokens_before == 19083
    assert report.tokens_after == 18682 if rule else report.tokens_after < 1000
    assert (tmp_path / "out" / "LICENSE").is_file()
    before, after = (
        load_file(d / "model.safetensors") for d in (packaged_model_path(), tmp_path / "out")
    )
    pruned = load_model(tmp_path / "out")
    old = kept_ids(packaged_model, pruned)
    for suffix in ("", ".scale"):
        name = "bert.embeddings.word_embeddings.weight" + suffix
        assert torch.equal(before[name][old], after[name])
    passages = samples.read_text(encoding="utf-8").splitlines()
    text = pruned.tokenizer(passages[0], "造纸术在东汉由谁改进？", return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        full: Any = packaged_model.model
        expected = full(input_ids=torch.tensor(old)[text]).logits[..., old]
        got: Any = pruned.model
        torch.testing.assert_close(got(input_ids=text).logits, expected, rtol=1e-5, atol=1e-5)
    mlm = fastmrc.MLMReader(pruned)
    assert mlm.answer("造纸术在东汉由谁改进？", passages).text == "蔡伦"


# --- corpus files ------------------------------------------------------------------------------


@dataclass(frozen=True)
class File:
    name: str
    content: str | bytes
    texts: list[str]
    issues: list[str]


RECORD = {
    "id": "1",
    "question": "谁？",
    "passages": [{"passage": "北京。", "answer": "京"}, "上海"],
    "answers": ["大山"],
}
SQUAD = {
    "data": [
        {
            "paragraphs": [
                {
                    "context": "山水",
                    "qas": [{"id": "1", "question": "何？", "answers": [{"text": "水"}]}],
                }
            ]
        }
    ]
}
TEXTS_OF_RECORD = ["谁？", "北京。", "京", "上海", "大山"]
LINE = json.dumps(RECORD, ensure_ascii=False)
PAIR = '{"text": "二", "synonyms": ["三", "四"]}'
FILES = [
    File("lines.jsonl", f"{LINE}\n", TEXTS_OF_RECORD, []),
    File("lines", f"\ufeff\n{LINE}\n", TEXTS_OF_RECORD, []),
    File("array.json", f"[\n{LINE}\n]", TEXTS_OF_RECORD, []),
    File("array", f"[{LINE},\n{LINE.replace('1', '2')}]", TEXTS_OF_RECORD * 2, []),
    File("squad.json", json.dumps(SQUAD), ["何？", "山水", "水", "水"], []),
    File("squad", json.dumps(SQUAD, indent=1), ["何？", "山水", "水", "水"], []),
    File("pairs.jsonl", f"{PAIR}\n", ["二", "三", "四"], []),
    File("pairs", f"[{PAIR},\n{LINE}]", ["二", "三", "四", *TEXTS_OF_RECORD], []),
    File(
        "broken.jsonl",
        f'{PAIR}\n{LINE}\n{{"text": "山", "synonyms": []}}\n',
        ["二", "三", "四", *TEXTS_OF_RECORD],
        ["3: expected a text and at least one synonym"],
    ),
    File("text.txt", '\ufeff"山"\n\n {水} \r\n[火', ['"山"', " {水} ", "[火"], []),
    File("text", "[1] 山\n水", ["[1] 山", "水"], []),
    File("text.txt", "山\n".encode() + b"\xff\n" + "水".encode(), ["山", "水"], ["2: not UTF-8"]),
    File("strings.jsonl", '"山"\n{"passage": "水"}\n', ["山", "水"], []),
    File("objects", '{"passage": "水"}\n\n"山"\n', ["水", "山"], []),
    File(
        "broken.jsonl",
        '{"pass\n"山"\n7\n{"passage": 1}\n"\\ud800"\n',
        ["山"],
        [
            "1: not JSON",
            "3: passage: expected a s",
            "4: passage: expected a s",
            "5: passage: expected",
        ],
    ),
    File(
        "broken.jsonl",
        f'{{"id"\n{LINE}\n{{}}\n',
        TEXTS_OF_RECORD,
        ["1: not JSON", "3: question: mi"],
    ),
]


@pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.name}-{len(file.issues)}")
def test_corpus_files(file: File, tmp_path: Path) -> None:
    path = tmp_path / file.name
    content = file.content
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    issues: list[DataIssue] = []
    assert list(corpus_texts([path], issues.append)) == file.texts
    assert len(issues) == len(file.issues)
    for issue, start in zip(issues, file.issues, strict=True):
        assert str(issue).startswith(f"{path}:{start}")


def test_corpus_keeps_what_it_needs(mixed_dir: Path, tmp_path: Path) -> None:
    first, second, third = tmp_path / "a.jsonl", tmp_path / "b.txt", tmp_path / "c.jsonl"
    first.write_text(f"{LINE}\n{{\n", encoding="utf-8")
    second.write_text("newing newest [MASK] ㈱\n", encoding="utf-8")
    third.write_text(PAIR, encoding="utf-8")
    issues: list[DataIssue] = []
    report = prune_vocabulary(
        mixed_dir, tmp_path / "out", corpus=[first, str(second), third], on_error=issues.append
    )
    assert [issue.line for issue in issues] == [2]
    assert report.skipped == 1
    assert (report.corpus_texts, report.corpus_tokens) == (9, 26)
    assert set(report.dropped) == {"not_in_corpus"}
    vocabulary = set(load_model(tmp_path / "out").tokenizer.get_vocab())
    assert {"new", "##ing", "㈱", "北", "京", "谁", "。", "[UNK]", "[CLS]"} <= vocabulary
    assert {"二", "三", "四"} <= vocabulary
    assert {"a", "##a", "z", "##z", "0", "##9", "?", "(", "est"} - vocabulary == {"est"}
    assert not {"york", "中", "中国", "##new", "，", "Upper", "ing"} & vocabulary
    assert_corpus_agrees(mixed_dir, tmp_path / "out", [*TEXTS_OF_RECORD, "newing newest [MASK] ㈱"])


def assert_corpus_agrees(source: Path, output: Path, texts: Sequence[str]) -> None:
    full, pruned = load_model(source).tokenizer, load_model(output).tokenizer
    for text in texts:
        assert pruned.tokenize(text) == full.tokenize(text)


def test_corpus_as_the_model_reads_it(mixed_dir: Path, tmp_path: Path) -> None:
    """With the normalization "original" a passage is read with commas for spaces."""
    source = copy(mixed_dir, tmp_path / "full")
    (source / "fastmrc.json").write_text('{"normalization": "original"}', encoding="utf-8")
    parts = read_json(source / "tokenizer.json")
    parts["pre_tokenizer"] = {"type": "WhitespaceSplit"}
    vocabulary = parts["model"]["vocab"]
    vocabulary["new,york"] = vocabulary.pop("Upper")
    (source / "tokenizer.json").write_text(json.dumps(parts), encoding="utf-8")
    corpus = tmp_path / "c.txt"
    corpus.write_text("New York", encoding="utf-8")
    prune_vocabulary(source, tmp_path / "out", corpus=[corpus])
    vocabulary = load_model(tmp_path / "out").tokenizer.get_vocab()
    assert {"new", "york", "new,york"} <= set(vocabulary)


# --- what is refused ---------------------------------------------------------------------------


def assert_untouched(folder: Path, *names: str) -> None:
    assert sorted(path.name for path in folder.iterdir()) == sorted(names)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "rule, corpus: expected one of them, got neither"),
        ({"rule": "simplified", "corpus": ["x"]}, "expected one of them, got both"),
        ({"rule": "other"}, "rule: expected one of simplified, got 'other'"),
        ({"corpus": []}, "corpus: expected at least one file"),
        ({"corpus": "c.txt"}, "corpus: expected a list of files"),
    ],
)
def test_wrong_options(
    tiny_bert_dir: Path, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        prune_vocabulary(tiny_bert_dir, tmp_path / "out", **options)
    assert_untouched(tmp_path)


def test_output_in_use(
    tiny_bert_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pruning, "load_model", lambda *_, **__: pytest.fail("loads too early"))
    used = tmp_path / "used"
    used.mkdir()
    (used / "precious").write_text("x", encoding="utf-8")
    (tmp_path / "file").write_text("y", encoding="utf-8")
    for output, message in (
        (used, "output_dir: expected a new or empty directory, '.*used' is in use"),
        (tiny_bert_dir, "is in use"),
        (tmp_path / "file", "output_dir: expected a directory, got the file"),
        (tmp_path / "file" / "no" / "out", "expected a place in a directory, got '.*out'"),
    ):
        with pytest.raises(InputError, match=message):
            prune_vocabulary(tiny_bert_dir, output, rule="simplified")
        with pytest.raises(InputError, match=message), new_directory(output):
            pytest.fail("gives a directory that cannot take its place")
    assert_untouched(tmp_path, "file", "used")
    assert_untouched(used, "precious")


def test_empty_output_and_a_link_to_one(tiny_bert_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    prune_vocabulary(tiny_bert_dir, tmp_path / "link", rule="simplified")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "empty" / "model.safetensors").is_file()
    assert_untouched(tmp_path, "empty", "link")


def test_directories_above_the_output_are_made(tiny_bert_dir: Path, tmp_path: Path) -> None:
    output = tmp_path / "a" / "b" / "out"
    prune_vocabulary(tiny_bert_dir, output, rule="simplified")
    assert (output / "model.safetensors").is_file()
    assert_untouched(tmp_path / "a" / "b", "out")


def test_directories_above_the_output_go_with_it(tmp_path: Path) -> None:
    """Unless they hold something else by then."""
    with pytest.raises(ValueError), new_directory(tmp_path / "a" / "b" / "out"):
        raise ValueError
    assert_untouched(tmp_path)
    with pytest.raises(ValueError), new_directory(tmp_path / "a" / "b" / "out"):
        (tmp_path / "a" / "precious").touch()
        raise ValueError
    assert_untouched(tmp_path / "a", "precious")


def test_wrong_models(
    tiny_bert_dir: Path, bert_copy: Path, byte_level_dir: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    with pytest.raises(InputError, match="model_dir: there is no directory 'no/such'"):
        prune_vocabulary("no/such", output, rule="simplified")
    with pytest.raises(UnsupportedModelError, match="expected a WordPiece tokenizer, .* kind BPE"):
        prune_vocabulary(byte_level_dir, output, rule="simplified")
    (bert_copy / "config.json").unlink()
    with pytest.raises(UnsupportedModelError, match="there is no config.json"):
        prune_vocabulary(bert_copy, output, rule="simplified")
    assert not output.exists()


def test_unigram_tokenizer(bert_copy: Path, tmp_path: Path) -> None:
    parts = read_json(bert_copy / "tokenizer.json")
    tokens = [[token, -1.0] for token in parts["model"]["vocab"]]
    parts["model"] = {"type": "Unigram", "unk_id": 1, "vocab": tokens, "byte_fallback": False}
    (bert_copy / "tokenizer.json").write_text(json.dumps(parts), encoding="utf-8")
    with pytest.raises(UnsupportedModelError, match="WordPiece tokenizer, got one of kind Unigram"):
        prune_vocabulary(bert_copy, tmp_path / "out", rule="simplified")


def test_model_whose_head_has_a_column_per_token(tmp_path: Path) -> None:
    source = save_model(
        tmp_path / "mobile",
        "MobileBertForMaskedLM",
        BERT_TOKENS,
        embedding_size=16,
        intra_bottleneck_size=32,
        true_hidden_size=32,
    )
    corpus = tmp_path / "c.txt"
    corpus.write_text("北京", encoding="utf-8")
    with pytest.raises(UnsupportedModelError, match="cannot be pruned, .* does not fit"):
        prune_vocabulary(source, tmp_path / "out", corpus=[corpus])
    assert_untouched(tmp_path, "c.txt", "mobile")


def test_positions_that_depend_on_the_padding_token(tmp_path: Path) -> None:
    """RoBERTa counts positions from the id of the padding token, which would change here."""
    tokens = ["中国", *make_vocabulary(list(ROBERTA_TOKENS.values()))]
    source = save_model(
        tmp_path / "full",
        "RobertaForMaskedLM",
        ROBERTA_TOKENS,
        vocab_size=len(tokens),
        pad_token_id=tokens.index("<pad>"),
        bos_token_id=tokens.index("<s>"),
        max_position_embeddings=514,
    )
    parts = read_json(source / "tokenizer.json")
    parts["model"]["vocab"] = {token: i for i, token in enumerate(tokens)}
    for entry in parts["added_tokens"]:
        entry["id"] += 1
    for special in parts["post_processor"]["special_tokens"].values():
        special["ids"] = [special["ids"][0] + 1]
    (source / "tokenizer.json").write_text(json.dumps(parts), encoding="utf-8")
    with pytest.raises(UnsupportedModelError, match="cannot be pruned, as its logits would differ"):
        prune_vocabulary(source, tmp_path / "out", rule="simplified")
    assert_untouched(tmp_path, "full")


@pytest.mark.parametrize("content", ["", "\n \n", '{"id": 1}\n{\n', "7\n"])
def test_corpus_without_texts(tiny_bert_dir: Path, tmp_path: Path, content: str) -> None:
    path = tmp_path / "c.jsonl"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(InputError, match="corpus: expected texts, got none .* in '.*c.jsonl'"):
        prune_vocabulary(tiny_bert_dir, tmp_path / "out", corpus=[path])
    assert_untouched(tmp_path, "c.jsonl")


def test_missing_corpus(tiny_bert_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        prune_vocabulary(tiny_bert_dir, tmp_path / "out", corpus=[tmp_path / "none.jsonl"])
    assert_untouched(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
@pytest.mark.parametrize("kind", ["disk", "interrupt"])
def test_a_write_that_fails_leaves_nothing(
    tiny_bert_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, kind: str
) -> None:
    write = Path.write_bytes

    def write_some(path: Path, data: bytes) -> int:
        if path.name != name:
            return write(path, data)
        write(path, data[: len(data) // 2])
        raise OSError(errno.ENOSPC, "No space left on device") if kind == "disk" else interrupted

    interrupted = KeyboardInterrupt()
    monkeypatch.setattr(Path, "write_bytes", write_some)
    monkeypatch.setattr(
        Path, "write_text", lambda path, text, encoding: write_some(path, text.encode(encoding))
    )
    output = tmp_path / "out"
    output.mkdir()
    expected: type[BaseException] = OSError if kind == "disk" else KeyboardInterrupt
    with pytest.raises(expected) as caught:
        prune_vocabulary(tiny_bert_dir, output, rule="simplified")
    if isinstance(caught.value, OSError):
        assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(output))
    assert_untouched(tmp_path, "out")
    assert_untouched(output)


def test_output_that_is_taken_meanwhile(
    tiny_bert_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"

    def check(*_: object) -> None:
        output.mkdir()
        (output / "precious").write_text("x", encoding="utf-8")

    monkeypatch.setattr(pruning, "check_result", check)
    with pytest.raises(OSError) as caught:
        prune_vocabulary(tiny_bert_dir, output, rule="simplified")
    assert caught.value.filename == str(output)
    assert_untouched(tmp_path, "out")
    assert_untouched(output, "precious")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("embeddings", "its embeddings would differ"),
        ("head", "its logits would differ"),
        ("tokens", "its tokens would get other ids"),
        ("bytes", "would not load .*model.safetensors is damaged"),
    ],
)
def test_a_result_that_differs_is_refused(
    mixed_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str, message: str
) -> None:
    original = pruning.write_model

    def write_model(full: Any, pieces: Any, selection: Any, directory: Path) -> None:
        original(full, pieces, selection, directory)
        path = directory / "model.safetensors"
        weights = load_file(path)
        if damage == "embeddings":
            weights["bert.embeddings.word_embeddings.weight"][-1, 0] += 1e-3
        if damage == "head":
            weights["cls.predictions.bias"][-1] += 1e-3
        save_file(weights, path, metadata={"format": "pt"})
        if damage == "bytes":
            path.write_bytes(path.read_bytes()[:-4])
        if damage == "tokens":
            tokenizer = directory / "tokenizer.json"
            text = tokenizer.read_text(encoding="utf-8")
            tokenizer.write_text(text.replace('"york"', '"yorks"'), encoding="utf-8")

    monkeypatch.setattr(pruning, "write_model", write_model)
    with pytest.raises(UnsupportedModelError, match=f"cannot be pruned, as .*{message}") as caught:
        prune_vocabulary(mixed_dir, tmp_path / "out", rule="simplified")
    assert str(mixed_dir) in str(caught.value)
    assert str(tmp_path / ".out") not in str(caught.value)
    assert_untouched(tmp_path)


def test_a_corpus_that_would_be_cut_otherwise_is_refused(
    mixed_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = tmp_path / "c.txt"
    corpus.write_text("New York\n北京\n", encoding="utf-8")
    monkeypatch.setattr(
        pruning, "needed_tokens", lambda pieces, cuts: needed_tokens(pieces, cuts) - {"york"}
    )
    with pytest.raises(UnsupportedModelError, match="corpus would be cut otherwise: 'New York'"):
        prune_vocabulary(mixed_dir, tmp_path / "out", corpus=[corpus])
    assert_untouched(tmp_path, "c.txt")


# --- the command -------------------------------------------------------------------------------

Output = pytest.CaptureFixture[str]


def run(source: Path, output: Path, *options: str) -> int:
    return main(["prune-vocab", "--model", str(source), "--output", str(output), *options])


def test_command_with_the_rule(mixed_dir: Path, tmp_path: Path, capsys: Output) -> None:
    output = tmp_path / "out"
    assert run(mixed_dir, output, "--rule", "simplified") == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    lines = captured.out.splitlines()
    before, after = len(all_tokens()), len(load_model(output).tokenizer)
    assert lines[0] == f"{before} -> {after} tokens; 0.2 -> 0.2 MB"
    assert lines[1:] == [
        f"  {len(NEVER):>7}  hold a character that normalised text never holds",
        f"  {len(CHINESE_JOINED):>7}  join a Chinese character, which is a word by itself",
        f"  {len(OTHER_JOINED):>7}  join another character that is a word by itself",
        f"written to  {output}",
    ]


def test_command_with_a_corpus(mixed_dir: Path, tmp_path: Path, capsys: Output) -> None:
    corpus = [tmp_path / "a.jsonl", tmp_path / "b.txt"]
    for path in corpus:
        path.write_text(LINE + "\n", encoding="utf-8")
    options = ["--corpus", *map(str, corpus)]
    assert run(mixed_dir, tmp_path / "out", *options) == 0
    assert "corpus      6 texts, " in capsys.readouterr().out
    corpus[0].write_text(f"{LINE}\n{{\n", encoding="utf-8")
    assert run(mixed_dir, tmp_path / "json", *options, "--json") == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"fastmrc: skipped: {corpus[0]}:2: not JSON")
    assert captured.err.count("\n") == 1
    report = json.loads(captured.out)
    assert report["corpus_texts"] == 6
    assert report["skipped"] == 1
    assert report["tokens_before"] - report["tokens_after"] == report["dropped"]["not_in_corpus"]
    assert run(mixed_dir, tmp_path / "again", *options) == 2
    assert "skipped     1\n" in capsys.readouterr().out


def test_command_without_anything_to_drop(
    tiny_bert_dir: Path, tmp_path: Path, capsys: Output
) -> None:
    assert run(tiny_bert_dir, tmp_path / "out", "--rule", "simplified") == 0
    assert "nothing to drop" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "one of the arguments --rule --corpus is required"),
        (["--rule", "simplified", "--corpus", "x"], "not allowed with argument"),
        (["--rule", "other"], "invalid choice: 'other'"),
        (["--corpus", "no-such-file"], "no-such-file: No such file or directory"),
        (["--rule", "simplified", "--output", "."], "is in use"),
        (["--rule", "simplified", "--model", "no-such"], "there is no directory 'no-such'"),
    ],
)
def test_command_errors(
    tiny_bert_dir: Path, tmp_path: Path, capsys: Output, options: list[str], message: str
) -> None:
    assert run(tiny_bert_dir, tmp_path / "out", *options) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("fastmrc: error: ")
    assert captured.err.count("\n") == 1
    assert message in captured.err
    assert_untouched(tmp_path)
