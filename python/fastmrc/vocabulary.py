"""Drop tokens that a model does not need: from its tokenizer, embeddings and output layer.

There are two ways to choose them.

the rule ``"simplified"``
    Drops what no text is ever cut into, as ``load_vocab(simplified=True)`` of bert4keras does:
    ``##`` with a Chinese character, Chinese tokens of several characters, and the like. Every
    text keeps its tokens.
a corpus
    Keeps what its texts are cut into, special and added tokens, and single ASCII letters, digits
    and punctuation with their ``##`` forms. Every text of the corpus keeps its tokens.

The logits of the tokens that stay are those of the full model; their probabilities share what
the dropped ones had. Rows are cut out of the stored tensors, so an int8 model keeps its levels.
"""

from __future__ import annotations

import json
import shutil
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray

from fastmrc.data import BOM, DataIssue, StrPath, check_text, decode_utf8, read_questions
from fastmrc.errors import InputError, UnsupportedModelError
from fastmrc.model_files import (
    check_new_directory,
    copy_config,
    copy_tokenizer,
    new_directory,
    write_json,
)
from fastmrc.pretrained import SETTINGS_FILE, LoadedModel, load_model, max_positions
from fastmrc.text import TextCodec

if TYPE_CHECKING:
    import torch
    from tokenizers import Tokenizer

__all__ = [
    "REASONS",
    "PruningReport",
    "Reason",
    "Rule",
    "Selection",
    "WordPieces",
    "needed_tokens",
    "prune_vocabulary",
    "select_tokens",
    "unreachable_tokens",
]

Rule = Literal["simplified"]
Reason = Literal[
    "never_in_text", "chinese_stands_alone", "other_stands_alone", "not_in_corpus", "no_token"
]
OnError: TypeAlias = Callable[[DataIssue], None]

REASONS: dict[Reason, str] = {
    "never_in_text": "hold a character that normalised text never holds",
    "chinese_stands_alone": "join a Chinese character, which is a word by itself",
    "other_stands_alone": "join another character that is a word by itself",
    "not_in_corpus": "are not needed by the corpus",
    "no_token": "are rows without a token",
}

_WEIGHTS_FILE = "model.safetensors"
_SHARDS_FILE = "model.safetensors.index.json"
_SCALE_SUFFIX = ".scale"

# Stages that map each character by itself, or cut a text by the kinds of its characters.
_LOCAL_NORMALIZERS = ("BertNormalizer", "Lowercase", "NFD", "NFKD", "Nmt", "Strip", "StripAccents")
_LOCAL_PRE_TOKENIZERS = (
    "BertPreTokenizer",
    "CharDelimiterSplit",
    "Digits",
    "Punctuation",
    "Whitespace",
    "WhitespaceSplit",
)
_COMPOSING_NORMALIZERS = ("NFC", "NFKC")
# Planes 4 to 13 are empty, 15 and 16 private: no normaliser maps their characters to others.
_CODE_POINTS = (range(0xD800), range(0xE000, 0x40000), range(0xE0000, 0xE1000))
_LETTER = "a"
_PROBES_AT_ONCE = 64

_BATCH = 256
_TOLERANCE = 1e-5
_CHECKED_TOKENS = 30


@dataclass(frozen=True, slots=True)
class PruningReport:
    """What `prune_vocabulary` did.

    Attributes
    ----------
    tokens_before, tokens_after
        Rows of the embeddings.
    bytes_before, bytes_after
        Size of the files of weights.
    dropped
        How many rows went, by reason; the reasons that occurred, in the order of `REASONS`.
    corpus_texts, corpus_tokens
        Texts of the corpus and the tokens they are cut into; None for a rule.
    skipped
        Records of the corpus that could not be used.
    """

    tokens_before: int
    tokens_after: int
    bytes_before: int
    bytes_after: int
    dropped: dict[Reason, int]
    corpus_texts: int | None = None
    corpus_tokens: int | None = None
    skipped: int = 0


@dataclass(frozen=True)
class Selection:
    """Rows that stay.

    Attributes
    ----------
    kept
        Ascending; the new id of a token is its rank here.
    dropped
        Number of the other rows, by reason.
    """

    kept: tuple[int, ...]
    dropped: dict[Reason, int]

    @cached_property
    def new_ids(self) -> dict[int, int]:
        """New id by old id."""
        return {old: new for new, old in enumerate(self.kept)}


@dataclass(slots=True)
class _CorpusCount:
    texts: int = 0
    tokens: int = 0
    skipped: int = 0


def prune_vocabulary(
    model_dir: StrPath,
    output_dir: StrPath,
    *,
    rule: Rule | None = None,
    corpus: Sequence[StrPath] | None = None,
    on_error: OnError | None = None,
) -> PruningReport:
    """Write a copy of a masked language model with fewer tokens.

    The copy is compared with the full model before it takes its place, so `output_dir` holds
    either a model that agrees or nothing.

    Parameters
    ----------
    model_dir
        Directory of a model with a WordPiece tokenizer that
        `fastmrc.pretrained.load_model` accepts.
    output_dir
        A missing or empty directory in an existing one.
    rule
        ``"simplified"``; this or `corpus`.
    corpus
        Files of questions (see `fastmrc.data`), of passages in JSON lines (strings, or objects
        with ``"passage"``), or of plain text with one text a line, as all ``.txt`` files are read.
        They are read twice.
    on_error
        Called with each record of the corpus that cannot be used; they are left out and counted.

    Returns
    -------
    PruningReport

    Raises
    ------
    InputError
        If neither or both of `rule` and `corpus` are given, a directory does not fit, or the
        corpus holds no text.
    UnsupportedModelError
        If the model cannot be loaded, has no WordPiece tokenizer, or the rule cannot tell what
        its tokenizer makes of a text; or if the result would differ from the full model.
    OSError
        If a file cannot be read or written.
    """
    _check_choice(rule, corpus)
    source, output = Path(model_dir).expanduser(), Path(output_dir).expanduser()
    if not source.is_dir():
        raise InputError(f"model_dir: there is no directory '{source}'")
    check_new_directory(output)
    # Not every model has the attention that load_model asks for by default.
    full = load_model(source, attention=None)
    pieces = WordPieces.of(full)
    count = _CorpusCount()
    if corpus is None:
        reasons = unreachable_tokens(pieces)
    else:
        needed = needed_tokens(pieces, _cut_corpus(full, corpus, count, on_error))
        reasons = {t: "not_in_corpus" for t in pieces.vocabulary if t not in needed}
    embeddings: Any = full.model.get_input_embeddings()
    rows = len(embeddings.weight)
    required = _required_ids(full, pieces, rows)
    selection = select_tokens(rows, pieces.vocabulary, reasons, required)

    with new_directory(output) as directory:
        _write_model(full, pieces, selection, directory)
        pruned = _load_result(full, directory)
        _check_result(full, pruned, selection)
        _check_corpus(full, pruned, selection, corpus or ())
        sizes = [sum(p.stat().st_size for p in _weight_files(d)) for d in (source, directory)]
    return PruningReport(
        tokens_before=rows,
        tokens_after=len(selection.kept),
        bytes_before=sizes[0],
        bytes_after=sizes[1],
        dropped=selection.dropped,
        corpus_texts=None if corpus is None else count.texts,
        corpus_tokens=None if corpus is None else count.tokens,
        skipped=count.skipped,
    )


def _check_choice(rule: Rule | None, corpus: Sequence[StrPath] | None) -> None:
    if (rule is None) == (corpus is None):
        given = "neither" if rule is None else "both"
        raise InputError(f"rule, corpus: expected one of them, got {given}")
    if rule is not None and rule not in get_args(Rule):
        raise InputError(f"rule: expected one of {', '.join(get_args(Rule))}, got {rule!r}")
    if isinstance(corpus, str | bytes):
        raise InputError("corpus: expected a list of files, got one path")
    if corpus is not None and not corpus:
        raise InputError("corpus: expected at least one file, got none")


# --- which tokens stay -------------------------------------------------------------------------


@dataclass(frozen=True)
class WordPieces:
    """A WordPiece tokenizer, taken apart.

    Attributes
    ----------
    backend
        The tokenizer, without padding and truncation.
    parts
        Its JSON form.
    vocabulary
        Ids by token, added tokens included.
    """

    backend: Tokenizer
    parts: dict[str, Any]
    vocabulary: dict[str, int]

    @classmethod
    def of(cls, loaded: LoadedModel) -> WordPieces:
        """Take the tokenizer of a model; UnsupportedModelError if it is of another kind."""
        from tokenizers import Tokenizer

        backend = Tokenizer.from_str(loaded.tokenizer.backend_tokenizer.to_str())
        backend.no_padding()
        backend.no_truncation()
        parts = json.loads(backend.to_str())
        kind = parts["model"]["type"]
        if kind != "WordPiece":
            raise UnsupportedModelError(
                f"{loaded.source}: expected a WordPiece tokenizer, got one of kind {kind}"
            )
        return cls(backend, parts, loaded.tokenizer.get_vocab())

    @property
    def prefix(self) -> str:
        """What a token inside a word begins with."""
        return str(self.parts["model"]["continuing_subword_prefix"])

    @property
    def unknown(self) -> str:
        """Token of words that cannot be cut into others."""
        return str(self.parts["model"]["unk_token"])

    def normalize(self, text: str) -> str:
        """Return a text as its words are cut from it."""
        normalizer = self.backend.normalizer
        return text if normalizer is None else str(normalizer.normalize_str(text))

    def words(self, text: str) -> list[str]:
        """Return the normalised words of a text, which are then cut into tokens."""
        cutter = self.backend.pre_tokenizer
        text = self.normalize(text)
        return [text] if cutter is None else [w for w, _ in cutter.pre_tokenize_str(text)]

    def matches(self, word: str) -> list[str]:
        """Return the longest matches from the start of a word, up to where nothing matches."""
        if len(word) > self.parts["model"]["max_input_chars_per_word"]:
            return []
        found: list[str] = []
        start = 0
        while start < len(word):
            head = self.prefix if start else ""
            ends = range(len(word), start, -1)
            end = next((e for e in ends if head + word[start:e] in self.vocabulary), None)
            if end is None:
                break
            found.append(head + word[start:end])
            start = end
        return found


def select_tokens(
    rows: int,
    vocabulary: Mapping[str, int],
    reasons: Mapping[str, Reason],
    required: Collection[int],
) -> Selection:
    """Choose the rows that stay.

    Parameters
    ----------
    rows
        Rows of the embeddings; some may have no token.
    vocabulary
        Ids by token.
    reasons
        Tokens that may go, and why.
    required
        Ids that stay in any case.

    Returns
    -------
    Selection
    """
    tokens = {token_id: token for token, token_id in vocabulary.items()}
    why = {
        row: reasons.get(tokens[row]) if row in tokens else "no_token"
        for row in range(rows)
        if row not in required
    }
    counts = Counter(reason for reason in why.values() if reason is not None)
    return Selection(
        tuple(row for row in range(rows) if why.get(row) is None),
        {reason: counts[reason] for reason in REASONS if counts[reason]},
    )


def unreachable_tokens(pieces: WordPieces) -> dict[str, Reason]:
    """Return the tokens that no text is ever cut into, and why.

    Parameters
    ----------
    pieces
        Tokenizer whose normaliser maps characters one by one and whose words are cut by the
        kinds of their characters, as BERT's are.

    Returns
    -------
    dict
        Added and special tokens may be among them: they are found by other means.

    Raises
    ------
    UnsupportedModelError
        If it has another normaliser or pre-tokenizer.

    Notes
    -----
    A token stands for a piece of a word. One that is a whole word of one character needs that
    character to occur; any other needs all of its characters to occur in words of several. Both
    sets are found by asking normaliser and pre-tokenizer about every code point between letters.
    More may be in them than a text can join, so that in doubt a token stays.

    Dropping such tokens changes no text. Cutting takes the longest match at each place of a word,
    and whatever matches there, even if the word turns out to be unknown, is a piece of a word and
    hence stays; no token comes that could match instead.
    """
    _check_locality(pieces.parts)
    alphabet = set(chain.from_iterable(pieces.vocabulary))
    single, joined = _characters_of_words(pieces, alphabet)
    reasons: dict[str, Reason] = {}
    for token in pieces.vocabulary:
        # Without a pre-tokenizer that cuts off "#", a word may itself begin with "##".
        as_word = set(token) <= (joined if len(token) > 1 else single)
        inside = token.startswith(pieces.prefix)
        body = token.removeprefix(pieces.prefix) if inside else token
        if as_word or (inside and body and set(body) <= joined):
            continue
        reasons[token] = _reason(body, single, joined)
    return reasons


def _reason(body: str, single: set[str], joined: set[str]) -> Reason:
    if not set(body) <= single:
        return "never_in_text"
    alone = set(body) - joined
    chinese = any(unicodedata.name(c, "").startswith("CJK ") for c in alone)
    return "chinese_stands_alone" if chinese else "other_stands_alone"


def _check_locality(parts: Mapping[str, Any]) -> None:
    for place, stage in enumerate(_stages(parts["normalizer"], "normalizers")):
        kind = stage["type"]
        one_character = kind == "Replace" and len(stage["pattern"].get("String", "")) == 1
        # What composing makes of several characters is a character that it leaves alone, but
        # only as the first stage does it see that character in a text as well.
        composing = kind in _COMPOSING_NORMALIZERS and place == 0
        if not (kind in _LOCAL_NORMALIZERS or one_character or composing):
            _refuse_stage("normalizer", kind)
    for stage in _stages(parts["pre_tokenizer"], "pretokenizers"):
        if stage["type"] not in _LOCAL_PRE_TOKENIZERS:
            _refuse_stage("pre_tokenizer", stage["type"])


def _stages(part: Mapping[str, Any] | None, key: str) -> Iterator[Mapping[str, Any]]:
    if part is None:
        return
    if part["type"] == "Sequence":
        for stage in part[key]:
            yield from _stages(stage, key)
    else:
        yield part


def _refuse_stage(part: str, kind: str) -> None:
    raise UnsupportedModelError(
        f"rule: 'simplified' cannot tell what a tokenizer with the {part} {kind} makes of every "
        "text; a corpus can be used instead"
    )


def _characters_of_words(pieces: WordPieces, alphabet: set[str]) -> tuple[set[str], set[str]]:
    """Return the characters that occur in words, and in words of more than one."""
    single: set[str] = set()
    joined: set[str] = set()
    for word in chain.from_iterable(map(pieces.words, _probes(pieces, alphabet))):
        single.update(word)
        if len(word) > 1:
            joined.update(word)
    return single, joined


def _probes(pieces: WordPieces, alphabet: set[str]) -> Iterator[str]:
    """Yield texts that show what becomes of every character, if it may become one of `alphabet`."""

    # Twice, as some characters join only their own kind.
    def probe(character: str) -> str:
        return _LETTER + character + character + _LETTER

    named = json.dumps(pieces.parts["normalizer"], ensure_ascii=False)
    listed = alphabet.union(named, _LETTER)
    yield from map(probe, listed)
    others = (probe(chr(code)) for code in chain(*_CODE_POINTS) if chr(code) not in listed)
    for probes in _batches(others, _PROBES_AT_ONCE):
        found = set(pieces.normalize("".join(probes))) - {_LETTER}
        if not found.isdisjoint(alphabet):
            yield from probes


def _batches(values: Iterable[Any], size: int) -> Iterator[list[Any]]:
    iterator = iter(values)
    while batch := list(islice(iterator, size)):
        yield batch


@dataclass(frozen=True, slots=True)
class _Cut:
    """A text, its token ids, and the characters [start, end) of each."""

    text: str
    ids: NDArray[np.int32]
    starts: NDArray[np.int32]
    ends: NDArray[np.int32]


def needed_tokens(pieces: WordPieces, cuts: Iterable[_Cut]) -> set[str]:
    """Return the tokens without which texts would be cut otherwise, and those of ASCII.

    Parameters
    ----------
    pieces
        Tokenizer.
    cuts
        Texts as it cuts them.

    Returns
    -------
    set

    Notes
    -----
    Where a word could be cut, each match is the longest of the full vocabulary, and stays so. A
    word that could not be cut is different: it is unknown because the longest matches led to a
    place where nothing matches, and without them shorter ones might lead past it. So the matches
    up to that place are needed as well, though they occur in no text.
    """
    unknown_id = pieces.vocabulary[pieces.unknown]
    ids: set[int] = {unknown_id}
    unknown: set[str] = set()
    for cut in cuts:
        ids.update(np.unique(cut.ids).tolist())
        for i in np.flatnonzero(cut.ids == unknown_id).tolist():
            unknown.add(cut.text[cut.starts[i] : cut.ends[i]])
    needed = {token for token, token_id in pieces.vocabulary.items() if token_id in ids}
    for text in unknown:
        for word in pieces.words(text):
            needed.update(pieces.matches(word))
    ascii_characters = string.ascii_letters + string.digits + string.punctuation
    return needed.union(*((c, pieces.prefix + c) for c in ascii_characters))


def _required_ids(full: LoadedModel, pieces: WordPieces, rows: int) -> set[int]:
    """Return the ids that a tokenizer or a configuration names."""
    names = {pieces.unknown, *full.tokenizer.all_special_tokens}
    names.update(_processor_tokens(pieces.parts["post_processor"]))
    ids = {pieces.vocabulary[name] for name in names if name in pieces.vocabulary}
    ids.update(pieces.backend.get_added_tokens_decoder())
    ids.update(chain.from_iterable(_configured_ids(full).values()))
    return {token_id for token_id in ids if 0 <= token_id < rows}


def _configured_ids(full: LoadedModel) -> dict[str, list[int]]:
    """Return the token ids in a configuration, by key."""
    found: dict[str, list[int]] = {}
    for key, value in full.model.config.to_dict().items():
        values = value if isinstance(value, list) else [value]
        if key.endswith("_token_id") and all(type(v) is int for v in values):
            found[key] = values
    return found


def _processor_tokens(processor: Any) -> Iterator[str]:
    if processor is None:
        return
    for part in processor.get("processors", ()):
        yield from _processor_tokens(part)
    for special in (processor.get("special_tokens") or {}).values():
        yield from special["tokens"]
    for role in ("cls", "sep"):
        if role in processor:
            yield processor[role][0]


# --- the corpus --------------------------------------------------------------------------------


class _Cutter:
    """Cuts texts in each way that fastmrc and other programs do with one tokenizer."""

    def __init__(self, loaded: LoadedModel) -> None:
        names = dict.fromkeys(("none", loaded.normalization))
        self._codecs = [TextCodec(loaded.tokenizer, name) for name in names]
        # Here a text that looks like a special token is one.
        self._plain = WordPieces.of(loaded).backend

    def cut(self, texts: Sequence[str]) -> Iterator[list[_Cut]]:
        """Yield the texts as cut in each way."""
        for codec in self._codecs:
            tokenized = codec.encode_passages(texts)
            yield [
                _Cut(text, t.token_ids, t.starts, t.ends)
                for text, t in zip(texts, tokenized, strict=True)
            ]
        yield [
            _Cut(text, np.array(e.ids, dtype=np.int32), *_offsets(e.offsets))
            for text, e in zip(
                texts, self._plain.encode_batch(texts, add_special_tokens=False), strict=True
            )
        ]


def _offsets(pairs: Sequence[tuple[int, int]]) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    offsets = np.array(pairs, dtype=np.int32).reshape(-1, 2)
    return offsets[:, 0], offsets[:, 1]


def _cut_corpus(
    full: LoadedModel, corpus: Sequence[StrPath], count: _CorpusCount, on_error: OnError | None
) -> Iterator[_Cut]:
    def skip(issue: DataIssue) -> None:
        count.skipped += 1
        if on_error is not None:
            on_error(issue)

    cutter = _Cutter(full)
    for texts in _batches(_corpus_texts(corpus, skip), _BATCH):
        count.texts += len(texts)
        for i, cuts in enumerate(cutter.cut(texts)):
            if i == 0:
                count.tokens += sum(len(cut.ids) for cut in cuts)
            yield from cuts
    if not count.tokens:
        files = ", ".join(f"'{path}'" for path in corpus)
        raise InputError(f"corpus: expected texts, got none that can be used in {files}")


def _corpus_texts(corpus: Sequence[StrPath], on_error: OnError) -> Iterator[str]:
    for path in corpus:
        kind = _file_kind(path)
        if kind != "questions":
            yield from _lines(path, kind == "passages", on_error)
            continue
        for question in read_questions(path, on_error=on_error):
            yield question.question
            for passage in question.passages:
                yield passage.text
                if passage.answer:
                    yield passage.answer
            yield from question.answers


def _file_kind(path: StrPath) -> Literal["questions", "passages", "text"]:
    """Tell by its name, or else by its first line with content, what a file holds."""
    suffix = Path(path).suffix
    if suffix == ".txt":
        return "text"
    with open(path, "rb") as file:
        for content in filter(None, (line.removeprefix(BOM).strip() for line in file)):
            value = _json_or_none(content)
            if isinstance(value, str) or (isinstance(value, dict) and "passage" in value):
                return "passages"
            # A broken line of JSON lines tells nothing.
            if value is not None or suffix != ".jsonl":
                is_json = content.startswith((b"{", b"[{")) or content == b"["
                return "questions" if is_json or suffix.startswith(".json") else "text"
    return "text"


def _json_or_none(content: bytes) -> Any:
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        return None


def _lines(path: StrPath, as_json: bool, on_error: OnError) -> Iterator[str]:
    with open(path, "rb") as file:
        for number, raw in enumerate(file, start=1):
            content = raw.removeprefix(BOM) if number == 1 else raw
            if not content.strip():
                continue
            try:
                text = decode_utf8(content).strip("\r\n")
                yield _passage(text) if as_json else text
            except InputError as error:
                on_error(DataIssue(str(path), number, str(error)))


def _passage(line: str) -> str:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"not JSON: {error}") from None
    text = value.get("passage") if isinstance(value, dict) else value
    if not isinstance(text, str):
        raise InputError("expected a JSON string, or an object with the key 'passage'")
    return check_text("passage", text)


# --- writing -----------------------------------------------------------------------------------


def _write_model(
    full: LoadedModel, pieces: WordPieces, selection: Selection, directory: Path
) -> None:
    source = Path(full.source)
    _write_weights(full, selection, directory)
    copy_config(source, directory, _config_changes(full, selection))
    copy_tokenizer(source, directory)
    _write_tokenizer(source, pieces, selection, directory)
    for path in source.iterdir():
        if path.is_file() and (path.name == SETTINGS_FILE or path.name.startswith("LICENSE")):
            shutil.copyfile(path, directory / path.name)


def _weight_files(directory: Path) -> list[Path]:
    if (directory / _WEIGHTS_FILE).is_file():
        return [directory / _WEIGHTS_FILE]
    index = json.loads((directory / _SHARDS_FILE).read_text(encoding="utf-8"))
    return [directory / name for name in sorted(set(index["weight_map"].values()))]


def _write_weights(full: LoadedModel, selection: Selection, directory: Path) -> None:
    import torch
    from safetensors import safe_open
    from safetensors.torch import save

    names = _vocabulary_weights(full.model)
    kept = torch.tensor(selection.kept)
    tensors: dict[str, torch.Tensor] = {}
    for path in _weight_files(Path(full.source)):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - no mapping
                tensor = file.get_tensor(name)
                has_tokens = name in names or name.removesuffix(_SCALE_SUFFIX) in names
                tensors[name] = tensor[kept] if has_tokens else tensor
    # Not save_file, which leaves the file readable by its owner only.
    (directory / _WEIGHTS_FILE).write_bytes(save(tensors, metadata={"format": "pt"}))


def _vocabulary_weights(model: Any) -> set[str]:
    """Return the names of the weights with a row for each token, those of tied ones included."""
    head = model.get_output_embeddings()
    parts = (model.get_input_embeddings().weight, head.weight, getattr(head, "bias", None))
    storages = {part.data_ptr() for part in parts if part is not None}
    # Where nothing is tied, some heads have a bias of their own that is loaded but not used.
    place = next(name for name, layer in model.named_modules() if layer is head)
    around = place.rpartition(".")[0] + ".bias"
    return {
        name
        for name, weight in model.named_parameters(remove_duplicate=False)
        if weight.data_ptr() in storages or (name == around and len(weight) == len(head.weight))
    }


def _config_changes(full: LoadedModel, selection: Selection) -> dict[str, object]:
    changes: dict[str, object] = {"vocab_size": len(selection.kept)}
    config = full.model.config.to_dict()
    for key, ids in _configured_ids(full).items():
        new = [selection.new_ids.get(token_id, token_id) for token_id in ids]
        if new != ids:
            changes[key] = new if isinstance(config[key], list) else new[0]
    return changes


def _write_tokenizer(
    source: Path, pieces: WordPieces, selection: Selection, directory: Path
) -> None:
    def new_id(token: str) -> int | None:
        return selection.new_ids.get(pieces.vocabulary.get(token, -1))

    def renumber(entry: dict[str, Any], token: str, key: str) -> None:
        number = new_id(token)
        if number is not None:
            entry[key] = number

    path = source / "tokenizer.json"
    parts = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else pieces.parts
    kept = {token: new for token in parts["model"]["vocab"] if (new := new_id(token)) is not None}
    parts["model"]["vocab"] = dict(sorted(kept.items(), key=lambda item: item[1]))
    for entry in parts.get("added_tokens") or ():
        renumber(entry, entry["content"], "id")
    parts["added_tokens"] = sorted(parts.get("added_tokens") or (), key=lambda e: int(e["id"]))
    if parts.get("padding"):
        renumber(parts["padding"], parts["padding"]["pad_token"], "pad_id")
    _renumber_processor(parts.get("post_processor"), new_id)
    write_json(directory / "tokenizer.json", parts)
    if (source / "vocab.txt").is_file():
        lines = "".join(f"{token}\n" for token in parts["model"]["vocab"])
        (directory / "vocab.txt").write_text(lines, encoding="utf-8")
    _renumber_added_tokens(directory / "tokenizer_config.json", selection)


def _renumber_processor(processor: Any, new_id: Callable[[str], int | None]) -> None:
    if processor is None:
        return
    for part in processor.get("processors", ()):
        _renumber_processor(part, new_id)
    for special in (processor.get("special_tokens") or {}).values():
        special["ids"] = [new_id(token) for token in special["tokens"]]
    for role in ("cls", "sep"):
        if role in processor:
            processor[role][1] = new_id(processor[role][0])


def _renumber_added_tokens(path: Path, selection: Selection) -> None:
    settings = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if "added_tokens_decoder" in settings:
        entries = settings["added_tokens_decoder"].items()
        settings["added_tokens_decoder"] = {
            str(selection.new_ids[int(old)]): entry
            for old, entry in entries
            if int(old) in selection.new_ids
        }
        write_json(path, settings)


# --- the result --------------------------------------------------------------------------------


def _load_result(full: LoadedModel, directory: Path) -> LoadedModel:
    try:
        return load_model(directory, attention=None)
    except UnsupportedModelError as error:
        message = str(error).removeprefix(f"{directory}: ")
        raise UnsupportedModelError(
            f"{full.source}: the model cannot be pruned, as the result would not load ({message})"
        ) from error


def _check_result(full: LoadedModel, pruned: LoadedModel, selection: Selection) -> None:
    """Compare tokens, rows, and logits of the tokens that stay."""
    import torch

    models: list[Any] = [full.model, pruned.model]
    new_ids = selection.new_ids
    vocabulary = full.tokenizer.get_vocab().items()
    expected = {token: new_ids[old] for token, old in vocabulary if old in new_ids}
    if pruned.tokenizer.get_vocab() != expected:
        _refuse_result(full, "its tokens would get other ids")
    kept = torch.tensor(selection.kept)
    for name in ("get_input_embeddings", "get_output_embeddings"):
        before, after = (getattr(model, name)() for model in models)
        if not torch.equal(before.weight[kept], after.weight):
            _refuse_result(full, "its embeddings would differ")
    inputs = _sample(full, selection)
    with torch.inference_mode():
        before = models[0](input_ids=kept[inputs]).logits[..., kept]
        after = models[1](input_ids=inputs).logits
    if not torch.allclose(before, after, rtol=_TOLERANCE, atol=_TOLERANCE):
        _refuse_result(full, f"its logits would differ by {(before - after).abs().max():.1e}")


def _refuse_result(full: LoadedModel, what: str) -> None:
    raise UnsupportedModelError(f"{full.source}: the model cannot be pruned, as {what}")


def _sample(full: LoadedModel, selection: Selection) -> torch.Tensor:
    """Return two inputs of new ids: tokens from all over the vocabulary between [CLS] and [SEP]."""
    import torch

    limit = max_positions(full.model.config) or _CHECKED_TOKENS + 2
    count = len(selection.kept)
    tokens = torch.linspace(0, count - 1, 2 * min(_CHECKED_TOKENS, limit - 2)).long().view(2, -1)
    ends = [
        torch.full((2, 1), selection.new_ids[token_id])
        for token_id in (full.tokenizer.cls_token_id, full.tokenizer.sep_token_id)
    ]
    return torch.cat([ends[0], tokens, ends[1]], dim=1)


def _check_corpus(
    full: LoadedModel, pruned: LoadedModel, selection: Selection, corpus: Sequence[StrPath]
) -> None:
    """Compare the tokens of each text of the corpus."""
    new_ids = np.full(len(selection.kept) + sum(selection.dropped.values()), -1, dtype=np.int32)
    new_ids[list(selection.kept)] = np.arange(len(selection.kept), dtype=np.int32)
    cutters = _Cutter(full), _Cutter(pruned)
    # The first reading has reported what cannot be used.
    for texts in _batches(_corpus_texts(corpus, lambda issue: None), _BATCH):
        before, after = (chain.from_iterable(cutter.cut(texts)) for cutter in cutters)
        for old, new in zip(before, after, strict=True):
            if not np.array_equal(new_ids[old.ids], new.ids):
                _refuse_result(full, f"a text of the corpus would be cut otherwise: {old.text!r}")
