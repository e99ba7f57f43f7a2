"""The readers in plain Python: the oracle of the native engine and the baseline of its speed.

Everything here follows the definitions word for word and is written to be read. It needs NumPy
only, except for `ReencodingEncoder` and the readers, which import torch when first asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastmrc.reference.audit import largest_lead, min_norm_point, reflection_search
from fastmrc.reference.autoregressive import AutoRegressiveDecoder
from fastmrc.reference.beam_search import NextLogits, beam_search
from fastmrc.reference.cloze import attention_sum, bilstm_logits
from fastmrc.reference.constraints import Automaton, SpanIndex, Trie
from fastmrc.reference.ops import beam_step, log_softmax_topk, row_stats, topk
from fastmrc.reference.retrieval import search_vectors
from fastmrc.reference.sampling import sample, sample_sequences
from fastmrc.reference.slots import slot_argmax, slot_topk
from fastmrc.reference.spans import best_spans

if TYPE_CHECKING:
    from fastmrc.reference.encoder import ReencodingEncoder
    from fastmrc.reference.readers import MLMReader, Seq2SeqReader, SpanReader

__all__ = [
    "AutoRegressiveDecoder",
    "Automaton",
    "MLMReader",
    "NextLogits",
    "ReencodingEncoder",
    "Seq2SeqReader",
    "SpanIndex",
    "SpanReader",
    "Trie",
    "attention_sum",
    "beam_search",
    "beam_step",
    "best_spans",
    "bilstm_logits",
    "largest_lead",
    "log_softmax_topk",
    "min_norm_point",
    "reflection_search",
    "row_stats",
    "sample",
    "sample_sequences",
    "search_vectors",
    "slot_argmax",
    "slot_topk",
    "topk",
]


def __getattr__(name: str) -> Any:
    if name == "ReencodingEncoder":
        from fastmrc.reference.encoder import ReencodingEncoder

        return ReencodingEncoder
    if name in ("MLMReader", "Seq2SeqReader", "SpanReader"):
        from fastmrc.reference import readers

        return getattr(readers, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
