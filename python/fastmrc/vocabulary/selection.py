"""Which rows of the embeddings stay."""

from __future__ import annotations

import string
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Any

import numpy as np

from fastmrc.pretrained import LoadedModel
from fastmrc.vocabulary.corpus import Cut
from fastmrc.vocabulary.reasons import REASONS, Reason
from fastmrc.vocabulary.wordpieces import WordPieces

__all__ = ["Selection", "configured_ids", "needed_tokens", "required_ids", "select_tokens"]


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


def needed_tokens(pieces: WordPieces, cuts: Iterable[Cut]) -> set[str]:
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


def required_ids(full: LoadedModel, pieces: WordPieces, rows: int) -> set[int]:
    """Return the ids that a tokenizer or a configuration names.

    Parameters
    ----------
    full
        Model.
    pieces
        Its tokenizer.
    rows
        Rows of its embeddings; ids outside are left out.

    Returns
    -------
    set
    """
    names = {pieces.unknown, *full.tokenizer.all_special_tokens}
    names.update(_processor_tokens(pieces.parts["post_processor"]))
    ids = {pieces.vocabulary[name] for name in names if name in pieces.vocabulary}
    ids.update(pieces.backend.get_added_tokens_decoder())
    ids.update(chain.from_iterable(configured_ids(full).values()))
    return {token_id for token_id in ids if 0 <= token_id < rows}


def configured_ids(full: LoadedModel) -> dict[str, list[int]]:
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
