"""Start a few attention heads of the last layer as a channel that copies tokens.

A reader answers with tokens of its passage, so its output layer must name the token that attention
points at. Trained from an encoder without a matching output layer, a model learns soon where the
answer is and late to name it. But which token stands at a position is an almost linear function of
the states before the last layer, and the best linear map of a given rank has a closed form: it
becomes the value and output matrices of the copying heads. Where they attend is then what the model
answers, from the first step on.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fastmrc.encoders.batches import by_length, padded_inputs
from fastmrc.errors import UnsupportedModelError
from fastmrc.text import TextCodec, join_tokens
from fastmrc.training.examples import Document

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["fit_copying", "initialize_copying"]

_WINDOW = 100
_WINDOWS = 300
# Of the mean diagonal of the normal equations.
_RIDGE = 1e-2
# Length of what is copied over that of its least-squares fit. On the base encoder of the packaged
# model 4 gave 63 % of the tokens back through the last layer and the output layer, 8 gave 75 %, and
# 16 no more.
_GAIN = 8.0


@torch.no_grad()
def initialize_copying(
    model: PreTrainedModel, codec: TextCodec, documents: Sequence[Document], heads: int, seed: int
) -> None:
    """Overwrite the value and output matrices of the first `heads` heads of the last layer.

    Parameters
    ----------
    model
        A masked language model with the modules of BERT.
    codec
        Of the model.
    documents
        Texts on which the map is fitted.
    heads
        Number of copying heads.
    seed
        Of the choice of windows and of how the map is spread over the heads.

    Raises
    ------
    UnsupportedModelError
        If the model's last layer has no such matrices, or fewer heads.
    """
    attention = _last_attention(model, heads)
    size = int(model.config.hidden_size) // int(model.config.num_attention_heads)
    states, tokens = _states(model, codec, documents, np.random.default_rng(seed))
    into, out, mean = fit_copying(states, _output_rows(model).cpu()[tokens], heads * size)
    # Any rotation of the map's rank gives the same product; a random one gives every head a share
    # of each direction, where the singular vectors would give the first head the largest ones.
    generator = torch.Generator().manual_seed(seed)
    rotation = torch.linalg.qr(
        torch.randn(heads * size, heads * size, dtype=torch.double, generator=generator)
    )[0]
    into, out = into @ rotation * _GAIN**0.5, out @ rotation * _GAIN**0.5
    channel = slice(0, heads * size)
    attention.self.value.weight[channel] = into.T.to(attention.self.value.weight)
    attention.self.value.bias[channel] = -(mean @ into).to(attention.self.value.bias)
    attention.output.dense.weight[:, channel] = out.to(attention.output.dense.weight)


def fit_copying(
    states: torch.Tensor, targets: torch.Tensor, rank: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Fit targets, without their mean, by a linear map of states of bounded rank.

    Reduced-rank regression: the ridge solution, projected on the leading right singular vectors of
    what it fits.

    Parameters
    ----------
    states, targets
        [n, hidden] and [n, d].
    rank
        Of the map.

    Returns
    -------
    tuple
        float64 ``into`` [hidden, rank], ``out`` [d, rank] and ``mean`` [hidden]: a target is about
        ``(state - mean) @ into @ out.T`` and the mean of the targets.
    """
    states, targets = states.double(), targets.double()
    mean = states.mean(dim=0)
    states, targets = states - mean, targets - targets.mean(dim=0)
    normal = states.T @ states
    ridge = _RIDGE * normal.diagonal().mean() * torch.eye(len(normal), dtype=torch.double)
    solution = torch.linalg.solve(normal + ridge, states.T @ targets)
    fitted = states @ solution
    # The singular vectors of the fit from its small Gram matrix; eigh sorts upwards.
    out = torch.linalg.eigh(fitted.T @ fitted).eigenvectors[:, -rank:]
    return solution @ out, out, mean


def _last_attention(model: PreTrainedModel, heads: int) -> Any:
    layers = getattr(getattr(model.base_model, "encoder", None), "layer", None)
    attention = getattr(layers[-1], "attention", None) if layers is not None else None
    value = getattr(getattr(attention, "self", None), "value", None)
    dense = getattr(getattr(attention, "output", None), "dense", None)
    if value is None or dense is None or _output_rows(model).shape[1] != dense.out_features:
        raise UnsupportedModelError(
            f"model: expected attention layers and an output layer as BERT has them, got "
            f"{type(model).__name__}"
        )
    if not 1 <= heads <= int(model.config.num_attention_heads):
        raise UnsupportedModelError(
            f"copy_heads: expected 1 to {model.config.num_attention_heads}, the heads of the "
            f"model, got {heads}"
        )
    return attention


def _output_rows(model: PreTrainedModel) -> torch.Tensor:
    """Return the rows of the output layer, [V, d]."""
    layers: Any = model
    rows: torch.Tensor = layers.get_output_embeddings().weight
    return rows


def _states(
    model: PreTrainedModel,
    codec: TextCodec,
    documents: Sequence[Document],
    rng: np.random.Generator,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the states before the last layer [n, hidden] and the tokens [n] at their places."""
    training = model.training
    torch.nn.Module.eval(model)
    states, tokens = [], []
    rows = list(_windows(codec, documents, rng))
    for batch in by_length([len(row) for row in rows]):
        inputs = padded_inputs(
            [rows[i] for i in batch], int(model.config.pad_token_id or 0), model.device
        )
        hidden = model.base_model(**inputs, output_hidden_states=True).hidden_states[-2]
        inside = inputs["attention_mask"].bool()
        states.append(hidden[inside].cpu())
        tokens.append(inputs["input_ids"][inside].cpu())
    model.train(training)
    return torch.cat(states), torch.cat(tokens)


def _windows(
    codec: TextCodec, documents: Sequence[Document], rng: np.random.Generator
) -> Iterator[Any]:
    usable = [document.tokens.token_ids for document in documents if len(document.tokens)]
    for index in rng.integers(len(usable), size=_WINDOWS if usable else 0).tolist():
        start = int(rng.integers(0, max(0, len(usable[index]) - _WINDOW) + 1))
        yield join_tokens([codec.cls_id], usable[index][start : start + _WINDOW], [codec.sep_id])
