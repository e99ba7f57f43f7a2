"""One vector of a text from the hidden states of its tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn import functional

if TYPE_CHECKING:
    from fastmrc.pretrained import Pooling

__all__ = ["pooled"]


def pooled(
    hidden: torch.Tensor,
    lengths: torch.Tensor,
    pooling: Pooling,
    linear: torch.nn.Linear | None = None,
) -> torch.Tensor:
    """Return one vector of length 1 per text, float32 [B, hidden].

    Parameters
    ----------
    hidden
        Last hidden states [B, T, hidden].
    lengths
        Tokens of each text, special ones included, int64 [B].
    pooling
        ``"mean"`` over the tokens, ``"cls"``, the first one, or ``"linear"``, the first one through
        the pooler's layer without its tanh (SimBERT).
    linear
        The pooler's layer, for ``"linear"``.
    """
    if pooling == "mean":
        inside = torch.arange(hidden.shape[1], device=hidden.device)[None] < lengths[:, None]
        vectors = (hidden.float() * inside[:, :, None]).sum(dim=1)
    else:
        vectors = hidden[:, 0].float()
        if pooling == "linear":
            assert linear is not None
            vectors = linear(vectors)
    return functional.normalize(vectors, dim=-1)
