"""The cloze encoder on a model of the BERT family: the blank is [MASK], words are pointed at."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fastmrc.cloze.documents import BLANK
from fastmrc.cloze.encoder import ClozeEncoder, ClozeRow, IntArray, masked_logits
from fastmrc.cloze.words import is_word
from fastmrc.encoders.batches import padded, padded_inputs
from fastmrc.errors import InputError, UnsupportedModelError
from fastmrc.pretrained import LoadedModel, max_positions
from fastmrc.text import TextCodec, join_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

__all__ = ["TransformerEncoder"]

# Tokens around the blank that every window away from it begins with.
_CONTEXT_TOKENS = 64
# Bounds the memory of a reader that runs for long.
_CACHED_WORDS = 100_000


class _Pointer(torch.nn.Module):
    """Scaled inner products of a blank's state with those of words, each through a layer of its
    own. States are normalised first: those of some models differ little, and learning is slow."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.norm = torch.nn.LayerNorm(hidden, elementwise_affine=False)
        self.query = torch.nn.Linear(hidden, hidden)
        self.key = torch.nn.Linear(hidden, hidden)
        self.scale = torch.nn.Parameter(torch.ones(()))
        for layer in (self.query, self.key):  # at first a word is liked as far as it is alike
            torch.nn.init.eye_(layer.weight)
            torch.nn.init.zeros_(layer.bias)

    def forward(
        self, blanks: torch.Tensor, words: torch.Tensor, row_of: torch.Tensor
    ) -> torch.Tensor:
        """Return logits [blanks, words], float32, for blanks [blanks, hidden] of rows `row_of` of
        words [rows, words, hidden]."""
        queries = self.query(self.norm(blanks)).float()
        keys = self.key(self.norm(words)).float()
        scores = torch.einsum("qh,qph->qp", queries, keys[row_of])
        logits: torch.Tensor = scores * (self.scale / queries.shape[1] ** 0.5)
        return logits


class TransformerEncoder(ClozeEncoder):
    """Logits by the inner product of the state of [MASK] with the words' states.

    A word's state is the mean of those of its first and last token. A document that the model has
    too few positions for is read in windows: one around the blank and, for the words beyond it,
    windows that begin with what stands next to the blank; the query of each is its own.

    Parameters
    ----------
    loaded
        The model; its output layer is not used.
    max_tokens
        Longest input; None: as many tokens as the model has positions.
    layers
        How many layers of the model are used, from the first; None: all.

    Raises
    ------
    UnsupportedModelError
        If there is no [MASK] token.
    InputError
        If `max_tokens` is less than 32 or more than the positions of the model, or it has fewer
        layers.
    """

    kind = "transformer"
    body: Any

    def __init__(
        self, loaded: LoadedModel, max_tokens: int | None = None, *, layers: int | None = None
    ) -> None:
        super().__init__()
        body: Any = loaded.model.base_model
        if layers is not None:
            most_layers = len(body.encoder.layer)
            if not 1 <= layers <= most_layers:
                raise InputError(f"layers: expected 1 to {most_layers}, got {layers}")
            body.encoder.layer = body.encoder.layer[:layers]
            body.config.num_hidden_layers = len(body.encoder.layer)
        self.body = body
        self.tokenizer: PreTrainedTokenizerFast = loaded.tokenizer
        self._codec = TextCodec(loaded.tokenizer, "none")
        if self._codec.mask_id is None:
            raise UnsupportedModelError(f"{loaded.source}: expected a [MASK] token, got none")
        most = max_positions(loaded.model.config)
        self.max_tokens = max_tokens or most or 512
        if self.max_tokens < 32 or (most is not None and self.max_tokens > most):
            raise InputError(
                f"max_tokens: expected 32 to {most or 'any number'}, got {self.max_tokens}"
            )
        hidden = int(loaded.model.config.hidden_size)
        self.pointer = _Pointer(hidden)
        self._tokens: dict[str, IntArray] = {}

    def settings(self) -> dict[str, Any]:
        return {
            "encoder": self.kind,
            "max_tokens": self.max_tokens,
            "layers": len(self.body.encoder.layer),
        }

    def upper_layers(self, count: int) -> list[str]:
        """Return the beginnings of the names of the weights of the last `count` layers."""
        layers = len(self.body.encoder.layer)
        if not 1 <= count <= layers:
            raise InputError(f"train_layers: expected 1 to {layers}, got {count}")
        return [f"body.encoder.layer.{i}." for i in range(layers - count, layers)]

    def word_ids(self, words: Sequence[str]) -> IntArray:
        numbers: dict[str, int] = {}
        return np.array([numbers.setdefault(word, len(numbers)) for word in words], np.int32)

    def crop(self, words: Sequence[str], centre: int) -> tuple[int, int]:
        # Of all words, as it is not known yet which of them will be masked.
        lengths = np.array([len(own) for own in self._tokens_of(words, [])])
        return _around(lengths, centre, self.max_tokens - 2)

    def rows(self, words: Sequence[str], blanks: Sequence[int]) -> list[ClozeRow]:
        tokens = self._tokens_of(words, blanks)
        lengths = np.array([len(own) for own in tokens])
        room = self.max_tokens - 2
        if lengths.sum() <= room:
            return [self._row(words, tokens, blanks, 0, len(words))]
        rows = []
        for blank in blanks:
            start, stop = _around(lengths, blank, room)
            inside = [i for i in blanks if start <= i < stop]
            rows.append(self._row(words, tokens, inside, start, stop, only=blank))
            context = _around(lengths, blank, min(_CONTEXT_TOKENS, room // 2 - 2))
            used = int(lengths[context[0] : context[1]].sum()) + 1
            for first, last in ((0, start), (stop, len(words))):
                for a, b in _pieces(lengths, first, last, room - used):
                    rows.append(self._away(words, tokens, blank, blanks, context, (a, b)))
        return rows

    def _tokens_of(self, words: Sequence[str], blanks: Sequence[int]) -> list[IntArray]:
        """Return the tokens of each word, at most half an input; at least one."""
        # Other threads may exchange the cache meanwhile; nothing is taken out of one.
        cache = self._tokens if len(self._tokens) < _CACHED_WORDS else {}
        new = [word for word in dict.fromkeys(words) if word not in cache]
        unknown = np.array([self._codec.unk_id or 0], np.int32)
        longest = self.max_tokens // 2 - 2
        for word, own in zip(new, self._codec.encode_texts(new, longest), strict=True):
            cache[word] = own if len(own) else unknown
        self._tokens = cache
        mask = np.array([self._codec.mask_id], np.int32)
        hidden = set(blanks)
        return [
            mask if i in hidden or word == BLANK else cache[word] for i, word in enumerate(words)
        ]

    def _row(
        self,
        words: Sequence[str],
        tokens: Sequence[IntArray],
        blanks: Sequence[int],
        start: int,
        stop: int,
        only: int | None = None,
    ) -> ClozeRow:
        """Return ``[CLS] words [SEP]`` of a part of the document."""
        asked = list(blanks) if only is None else [only]
        ids = join_tokens([self._codec.cls_id], *tokens[start:stop], [self._codec.sep_id])
        return _made(words, tokens, asked, set(blanks), range(start, stop), ids, 1)

    def _away(
        self,
        words: Sequence[str],
        tokens: Sequence[IntArray],
        blank: int,
        blanks: Sequence[int],
        context: tuple[int, int],
        piece: tuple[int, int],
    ) -> ClozeRow:
        """Return ``[CLS] words around the blank [SEP] words of another place [SEP]``."""
        sep = [self._codec.sep_id]
        before = join_tokens([self._codec.cls_id], *tokens[context[0] : context[1]], sep)
        ids = join_tokens(before, *tokens[piece[0] : piece[1]], sep)
        made = _made(words, tokens, [], set(blanks), range(*piece), ids, len(before))
        at = 1 + sum(len(own) for own in tokens[context[0] : blank])
        return ClozeRow(
            np.array([blank], np.int32),
            made.positions,
            ids,
            np.array([at], np.int32),
            made.word_columns,
        )

    def forward(self, rows: Sequence[ClozeRow]) -> torch.Tensor:
        device = self.device
        padding = int(self.body.config.pad_token_id or 0)
        inputs = padded_inputs([row.tokens for row in rows], padding, device)
        hidden = self.body(**inputs).last_hidden_state
        row_of = np.repeat(np.arange(len(rows)), [len(row.blanks) for row in rows])
        asked = np.concatenate([row.blank_columns for row in rows])
        ends = padded([row.word_columns for row in rows], 0, device)  # [rows, positions, 2]
        flat = ends.flatten(1)[..., None].expand(-1, -1, hidden.shape[2])
        words = hidden.gather(1, flat).unflatten(1, (-1, 2)).mean(dim=2)
        logits = self.pointer(hidden[row_of, asked], words, torch.from_numpy(row_of).to(device))
        return masked_logits(logits, rows)


def _made(
    words: Sequence[str],
    tokens: Sequence[IntArray],
    asked: Sequence[int],
    blanks: set[int],
    part: range,
    ids: IntArray,
    column: int,
) -> ClozeRow:
    """Return a row for the words of a part, the first of which stands at `column`."""
    positions, ends, at = [], [], {}
    for i in part:
        last = column + len(tokens[i]) - 1
        at[i] = column
        if i not in blanks and is_word(words[i]) and words[i] != BLANK:
            positions.append(i)
            ends.append((column, last))
        column = last + 1
    return ClozeRow(
        np.array(asked, np.int32),
        np.array(positions, np.int32),
        ids,
        np.array([at[i] for i in asked], np.int32),
        np.array(ends, np.int32).reshape(-1, 2),
    )


def _around(lengths: IntArray, centre: int, room: int) -> tuple[int, int]:
    """Return the words around one, as many on both sides as fit into so many tokens."""
    start, stop = centre, centre + 1
    used = int(lengths[centre])
    grows = True
    while grows:
        grows = False
        if start > 0 and used + lengths[start - 1] <= room:
            start -= 1
            used += int(lengths[start])
            grows = True
        if stop < len(lengths) and used + lengths[stop] <= room:
            used += int(lengths[stop])
            stop += 1
            grows = True
    return start, stop


def _pieces(lengths: IntArray, start: int, stop: int, room: int) -> list[tuple[int, int]]:
    """Return words [start, stop) in pieces of at most so many tokens, or one word."""
    pieces = []
    while start < stop:
        end, used = start, 0
        while end < stop and (end == start or used + lengths[end] <= room):
            used += int(lengths[end])
            end += 1
        pieces.append((start, end))
        start = end
    return pieces
