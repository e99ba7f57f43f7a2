"""The readers in plain Python: the oracle of the native engine and the baseline of its speed.

Everything here follows the definitions word for word and is written to be read. It needs NumPy
only, except for `ReencodingEncoder` and `Seq2SeqReader`, which import torch when first asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastmrc.reference.beam_search import NextLogits, beam_search
from fastmrc.reference.constraints import Automaton, SpanIndex, Trie
from fastmrc.reference.ops import beam_step, log_softmax_topk, row_stats, topk

if TYPE_CHECKING:
    from fastmrc.reference.encoder import ReencodingEncoder
    from fastmrc.reference.reader import Seq2SeqReader

__all__ = [
    "Automaton",
    "NextLogits",
    "ReencodingEncoder",
    "Seq2SeqReader",
    "SpanIndex",
    "Trie",
    "beam_search",
    "beam_step",
    "log_softmax_topk",
    "row_stats",
    "topk",
]


def __getattr__(name: str) -> Any:
    if name == "ReencodingEncoder":
        from fastmrc.reference.encoder import ReencodingEncoder

        return ReencodingEncoder
    if name == "Seq2SeqReader":
        from fastmrc.reference.reader import Seq2SeqReader

        return Seq2SeqReader
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
