"""fastmrc: native decoding for machine reading with masked-language-model encoders.

Importing the package loads only NumPy and the native extension; torch and transformers are
imported when a reader is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from fastmrc._build import __version__, build_info, get_num_threads, set_num_threads
from fastmrc.errors import InputError, UnsupportedModelError
from fastmrc.types import Answer, Candidate, Span, Timings

if TYPE_CHECKING:
    from fastmrc import audit, cloze, integrations, metrics, ops, reference
    from fastmrc.audit.search import find_unargmaxable
    from fastmrc.cloze.reader import ClozeReader
    from fastmrc.constraints import SpanIndex, Trie
    from fastmrc.readers.mlm import MLMReader
    from fastmrc.readers.seq2seq import Seq2SeqReader
    from fastmrc.readers.span import SpanReader
    from fastmrc.similarity import SimilarityModel

__all__ = [
    "Answer",
    "Candidate",
    "ClozeReader",
    "InputError",
    "MLMReader",
    "Seq2SeqReader",
    "SimilarityModel",
    "Span",
    "SpanIndex",
    "SpanReader",
    "Timings",
    "Trie",
    "UnsupportedModelError",
    "__version__",
    "audit",
    "build_info",
    "cloze",
    "find_unargmaxable",
    "get_num_threads",
    "integrations",
    "metrics",
    "ops",
    "reference",
    "set_num_threads",
]

# Public names that are imported on first use: name -> (module, attribute or None for the module).
_LAZY = {
    "ClozeReader": ("fastmrc.cloze.reader", "ClozeReader"),
    "MLMReader": ("fastmrc.readers.mlm", "MLMReader"),
    "Seq2SeqReader": ("fastmrc.readers.seq2seq", "Seq2SeqReader"),
    "SimilarityModel": ("fastmrc.similarity", "SimilarityModel"),
    "SpanIndex": ("fastmrc.constraints", "SpanIndex"),
    "SpanReader": ("fastmrc.readers.span", "SpanReader"),
    "Trie": ("fastmrc.constraints", "Trie"),
    "audit": ("fastmrc.audit", None),
    "cloze": ("fastmrc.cloze", None),
    "find_unargmaxable": ("fastmrc.audit.search", "find_unargmaxable"),
    "integrations": ("fastmrc.integrations", None),
    "metrics": ("fastmrc.metrics", None),
    "ops": ("fastmrc.ops", None),
    "reference": ("fastmrc.reference", None),
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'fastmrc' has no attribute {name!r}")
    module_name, attribute = _LAZY[name]
    module = importlib.import_module(module_name)
    value = module if attribute is None else getattr(module, attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
