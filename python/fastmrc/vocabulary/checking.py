"""The smaller model against the full one: same tokens, same rows, same logits."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastmrc.data import StrPath
from fastmrc.errors import UnsupportedModelError
from fastmrc.pretrained import LoadedModel, load_model, max_positions
from fastmrc.vocabulary.corpus import Cutter, corpus_batches
from fastmrc.vocabulary.selection import Selection

if TYPE_CHECKING:
    import torch

__all__ = ["check_corpus", "check_result", "load_result"]

_TOLERANCE = 1e-5
_CHECKED_TOKENS = 30


def load_result(full: LoadedModel, directory: Path) -> LoadedModel:
    """Load the smaller model.

    Parameters
    ----------
    full
        Model that it was made from, for messages.
    directory
        Where the smaller one is.

    Returns
    -------
    LoadedModel

    Raises
    ------
    UnsupportedModelError
        If it cannot be loaded.
    """
    try:
        return load_model(directory, attention=None)
    except UnsupportedModelError as error:
        message = str(error).removeprefix(f"{directory}: ")
        raise UnsupportedModelError(
            f"{full.source}: the model cannot be pruned, as the result would not load ({message})"
        ) from error


def check_result(full: LoadedModel, pruned: LoadedModel, selection: Selection) -> None:
    """Compare tokens, rows, and logits of the tokens that stay.

    Parameters
    ----------
    full, pruned
        Models.
    selection
        Rows that stay.

    Raises
    ------
    UnsupportedModelError
        If they differ.
    """
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


def check_corpus(
    full: LoadedModel, pruned: LoadedModel, selection: Selection, corpus: Sequence[StrPath]
) -> None:
    """Compare the tokens of each text of the corpus.

    Parameters
    ----------
    full, pruned
        Models.
    selection
        Rows that stay.
    corpus
        Files; possibly none.

    Raises
    ------
    UnsupportedModelError
        If a text would be cut otherwise.
    """
    new_ids = np.full(len(selection.kept) + sum(selection.dropped.values()), -1, dtype=np.int32)
    new_ids[list(selection.kept)] = np.arange(len(selection.kept), dtype=np.int32)
    cutters = Cutter(full), Cutter(pruned)
    # The first reading has reported what cannot be used.
    for texts in corpus_batches(corpus, lambda issue: None):
        before, after = (chain.from_iterable(cutter.cut(texts)) for cutter in cutters)
        for old, new in zip(before, after, strict=True):
            if not np.array_equal(new_ids[old.ids], new.ids):
                _refuse_result(full, f"a text of the corpus would be cut otherwise: {old.text!r}")
