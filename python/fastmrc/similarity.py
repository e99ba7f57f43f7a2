"""SimBERT: similar sentences by generation and by retrieval, with one model.

The model is a UniLM fine-tuned on pairs of texts, ``[CLS] a [SEP] b [SEP]``: it writes `b` after
`a`, and its vectors of similar texts lie near each other (Su Jianlin, "SimBERT",
kexue.fm/archives/7427).
"""

from __future__ import annotations

import hashlib
import operator
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from fastmrc.constraints import Automaton
from fastmrc.decoding import sample_sequences
from fastmrc.encoders.unilm import UniLMEncoder
from fastmrc.encoders.vectors import VectorEncoder
from fastmrc.errors import InputError, UnsupportedModelError
from fastmrc.options import SamplingOptions
from fastmrc.pretrained import LoadedModel, Pooling, load_model, weight_files
from fastmrc.retrieval import SearchHits, search_vectors

__all__ = ["GeneratedText", "SimilarText", "SimilarityModel"]

# Texts that are drawn together: each looks at the tokens of all of them, in vain but for its own.
_SEQUENCES = 128
# Room in the cache for the answers of so many sequences; it grows where beginnings differ more.
_CACHED_SEQUENCES = 16


@dataclass(frozen=True, slots=True)
class GeneratedText:
    """A text that was drawn.

    Attributes
    ----------
    text
        Decoded, without spaces next to Chinese characters.
    log_prob
        Natural logarithm of the probability of its tokens and, if it is finished, the end, under
        the model, at temperature 1 and with no token left out.
    token_ids
        Without the end token that finished it.
    finished
        Whether the model ended it; else it was cut at `max_tokens`, or a constraint let nothing
        follow.
    """

    text: str
    log_prob: float
    token_ids: list[int]
    finished: bool


@dataclass(frozen=True, slots=True)
class SimilarText:
    """A text and its cosine with the one asked for."""

    text: str
    score: float


class SimilarityModel:
    """Vectors, search and generation of similar texts; may be used from several threads."""

    def __init__(self, loaded: LoadedModel, pooling: Pooling | None = None) -> None:
        self._loaded = loaded
        self._vectors = VectorEncoder(loaded, pooling)
        self._codec = self._vectors.codec

    @classmethod
    def from_pretrained(
        cls,
        path_or_id: str | Path | None = None,
        *,
        device: str | None = None,
        dtype: str = "float32",
        pooling: Pooling | None = None,
        revision: str | None = None,
        local_files_only: bool = False,
    ) -> Self:
        """Load a model.

        Parameters
        ----------
        path_or_id
            Directory or hub id; nothing: the packaged model. One without a trained masked-LM head
            gives vectors but generates nothing.
        device
            ``"cpu"`` (default) or a CUDA device.
        dtype
            ``"float32"``, ``"bfloat16"``, ``"float16"`` or ``"auto"``, as for the readers. Vectors
            are float32.
        pooling
            How a vector is made of the last hidden states: ``"mean"`` over the tokens, ``"cls"``,
            the first one, or ``"linear"``, that one through the pooler's layer without its tanh, as
            SimBERT. None: as the model says in its ``fastmrc.json``, else ``"linear"`` if its
            checkpoint holds a pooler, else ``"mean"``.
        revision, local_files_only
            As in transformers.

        Raises
        ------
        InputError
            If the model does not exist or an argument is wrong.
        UnsupportedModelError
            If the model gives no vectors of this kind.
        """
        if pooling not in (None, "mean", "cls", "linear"):
            raise InputError(f"pooling: expected mean, cls or linear, got {pooling!r}")
        loaded = load_model(
            path_or_id,
            head=False,
            attention=None,  # not every encoder has sdpa, which generation needs
            revision=revision,
            local_files_only=local_files_only,
            dtype=dtype,
            device=device,
        )
        return cls(loaded, pooling)

    @property
    def dimension(self) -> int:
        """Numbers in a vector."""
        return self._vectors.dimension

    @property
    def pooling(self) -> Pooling:
        """How vectors are made."""
        return self._vectors.pooling

    @property
    def dtype(self) -> str:
        """What the encoder computes in, such as ``"float32"``."""
        return str(self._loaded.model.dtype).removeprefix("torch.")

    def fingerprint(self) -> str:
        """Return a hash of all that vectors depend on: weights, configuration, tokenizer, pooling
        and dtype."""
        loaded = self._loaded
        backend: Any = loaded.tokenizer.backend_tokenizer
        parts = [backend.to_str(), self.pooling, self.dtype]
        hashes = hashlib.sha256("\0".join(parts).encode("utf-8", "surrogatepass"))
        names = ["config.json", *weight_files(loaded.directory, loaded.source)]
        for name in names:
            with open(loaded.directory / name, "rb") as file:
                hashes.update(hashlib.file_digest(file, "sha256").digest())
        return hashes.hexdigest()

    def encode(
        self,
        texts: str | Sequence[str],
        *,
        max_tokens: int | None = None,
        progress: bool = False,
    ) -> NDArray[np.float32]:
        """Return the vectors of texts.

        Parameters
        ----------
        texts
            Texts of any length; a single one counts as one of one. An empty text has the vector of
            ``[CLS] [SEP]``.
        max_tokens
            Longer texts are cut behind the last mark that ends a sentence, else behind the last
            mark between clauses, unless that leaves less than half; else anywhere. None: as many
            tokens as the model has positions.
        progress
            Whether to show a progress bar on stderr.

        Returns
        -------
        numpy.ndarray
            float32 [texts, dimension], of length 1.

        Raises
        ------
        InputError
            If `max_tokens` does not fit the model.
        TypeError
            If a text is no string.
        """
        rows = self._vectors.rows(_checked_texts("texts", texts), max_tokens)
        vectors = np.zeros((len(rows), self.dimension), dtype=np.float32)
        with tqdm(total=len(rows), disable=not progress, unit="text") as bar:
            for places, own in self._vectors.batches(rows):
                vectors[places] = own
                bar.update(len(places))
        return vectors

    def cut(self, texts: Sequence[str], max_tokens: int) -> tuple[list[str], NDArray[np.int64]]:
        """Cut texts into pieces of at most `max_tokens` tokens, where `encode` would cut them.

        Returns
        -------
        pieces, owners
            At least one of each text, in order, and the indices of the texts, int64 [pieces].

        Raises
        ------
        InputError
            If `max_tokens` is below 1.
        """
        if max_tokens < 1:
            raise InputError(f"max_tokens: expected at least 1, got {max_tokens}")
        pieces = [self._codec.cut_pieces(text, max_tokens) for text in texts]
        counts = [len(own) for own in pieces]
        return [piece for own in pieces for piece in own], np.repeat(np.arange(len(texts)), counts)

    def search(
        self,
        queries: str | Sequence[str] | NDArray[np.floating],
        corpus: str | Sequence[str] | NDArray[np.floating],
        k: int = 10,
        *,
        progress: bool = False,
    ) -> SearchHits:
        """Find the `k` most similar entries of a corpus for each query.

        Parameters
        ----------
        queries, corpus
            Texts, or vectors of `encode` [n, dimension], float32 or float16; the corpus may be a
            memory-mapped array that is larger than the memory.
        k
            At least 1.
        progress
            Whether to show progress bars on stderr.

        Returns
        -------
        SearchHits
            ids int64 and cosines float32, [queries, k] each; see `fastmrc.retrieval`.

        Raises
        ------
        InputError, TypeError
            As `encode` and `fastmrc.retrieval.search_vectors`.
        """
        asked = self._as_vectors("queries", queries, progress)
        return search_vectors(
            asked, self._as_vectors("corpus", corpus, progress), k, progress=progress
        )

    def generate(
        self,
        text: str,
        n: int = 10,
        top_k: int | None = 5,
        *,
        top_p: float = 1.0,
        temperature: float = 1.0,
        min_tokens: int = 0,
        max_tokens: int = 64,
        min_ends: int = 1,
        seed: int | None = None,
        constraint: Automaton | None = None,
    ) -> list[GeneratedText]:
        """Draw texts that say the same.

        Parameters
        ----------
        text
            With at least one token; cut as by `encode` where it leaves no room for `max_tokens`.
        n
            How many are drawn; equal ones stay.
        top_k, top_p, temperature, min_tokens, max_tokens, min_ends
            As `fastmrc.options.SamplingOptions`.
        seed
            0 to 2**64 - 1; equal seeds and logits give equal texts, whatever `n`: text i is the
            same. None: another one each time.
        constraint
            Automaton over token ids, such as a `fastmrc.Trie` of the admissible texts.

        Returns
        -------
        list of GeneratedText
            In the order of their random numbers.

        Raises
        ------
        InputError
            If an argument is wrong.
        UnsupportedModelError
            If the model has no trained masked-LM head, or cannot be run with a cache.
        TypeError
            If the text is no string.
        """
        (text,) = _checked_texts("text", [text])
        if isinstance(n, bool) or not isinstance(n, (int, np.integer)) or n < 0:
            raise InputError(f"n: expected an integer of at least 0, got {n!r}")
        options = SamplingOptions(
            top_k=top_k,
            top_p=top_p,
            temperature=temperature,
            min_tokens=min_tokens,
            max_tokens=max_tokens,
            min_ends=min_ends,
        )
        if seed is None:
            seed = secrets.randbits(64)
        elif isinstance(seed, bool) or not hasattr(seed, "__index__") or not 0 <= seed < 2**64:
            raise InputError(f"seed: expected an integer from 0 to 2**64 - 1, got {seed!r}")
        room = self._vectors.max_tokens - max_tokens
        if room < 1:
            raise InputError(
                f"max_tokens: expected at most {self._vectors.max_tokens - 1}, the positions of "
                f"the model without [CLS], [SEP] and one token of the text, got {max_tokens}"
            )
        encoder = self._generator
        row = self._vectors.rows([text], room)[0]
        if len(row) == 2:
            raise InputError("text: expected a text with at least one token, got none")
        drawn: list[GeneratedText] = []
        for first in range(0, int(n), _SEQUENCES):
            count = min(_SEQUENCES, int(n) - first)
            sequences = sample_sequences(
                encoder.session([row], max_tokens - 1, min(count, _CACHED_SEQUENCES)),
                [count],
                end_id=self._codec.sep_id,
                vocabulary_size=encoder.vocabulary_size,
                options=options,
                seed=operator.index(seed),
                first_stream=first,
                constraints=[constraint],
            )[0]
            drawn += [
                GeneratedText(self._codec.decode(s.token_ids), s.log_prob, s.token_ids, s.finished)
                for s in sequences
            ]
        return drawn

    def similar(self, text: str, n: int = 100, k: int = 20, **options: Any) -> list[SimilarText]:
        """Draw `n` texts, drop duplicates and the text itself, and rank the rest.

        Parameters
        ----------
        text, n
            As for `generate`.
        k
            Most texts that are returned, at least 1.
        **options
            Keywords of `generate`.

        Returns
        -------
        list of SimilarText
            By falling cosine with the text; of equal ones the likelier to be drawn first.

        Raises
        ------
        InputError, UnsupportedModelError, TypeError
            As `generate`.
        """
        if isinstance(k, bool) or not isinstance(k, (int, np.integer)) or k < 1:
            raise InputError(f"k: expected an integer of at least 1, got {k!r}")
        drawn = self.generate(text, n, **options)
        # What the tokenizer makes of the text, such as lower case, is the text itself.
        (own,) = self._codec.encode_texts([text], self._vectors.max_tokens)
        same = {"", text.strip(), self._codec.decode(own.tolist())}
        likeliest = sorted(drawn, key=lambda one: -one.log_prob)
        texts = [one for one in dict.fromkeys(g.text for g in likeliest) if one not in same]
        if not texts:
            return []
        ids, scores = self.search(text, texts, min(int(k), len(texts)))
        found = zip(ids[0].tolist(), scores[0].tolist(), strict=True)
        return [SimilarText(texts[i], score) for i, score in found]

    @cached_property
    def _generator(self) -> UniLMEncoder:
        if self._loaded.missing:
            raise UnsupportedModelError(
                f"{self._loaded.source}: the checkpoint holds no trained masked-LM head, so it "
                f"gives vectors only; {self._loaded.missing[0]} is missing"
            )
        encoder = UniLMEncoder(self._loaded.model)
        encoder.check(self._codec.sep_id)
        return encoder

    def _as_vectors(self, name: str, given: Any, progress: bool) -> Any:
        if isinstance(given, str) or (isinstance(given, Sequence) and not hasattr(given, "dtype")):
            return self.encode(_checked_texts(name, given), progress=progress)
        return given


def _checked_texts(name: str, texts: Any) -> list[str]:
    """Return texts as a list; one alone counts as one of one."""
    if isinstance(texts, str):
        return [texts]
    if not isinstance(texts, Sequence):
        raise TypeError(f"{name}: expected texts, got {type(texts).__name__}")
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(f"{name}[{i}]: expected a string, got {type(text).__name__}")
    return list(texts)
