"""The losses: reading (seq2seq and slots), SimBERT, retrieval, start and end heads, cloze."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

from fastmrc.encoders.pooling import pooled
from fastmrc.encoders.unilm import head_modules
from fastmrc.training.options import LossWeights

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from fastmrc.pretrained import Pooling

__all__ = ["batch_loss"]

# SimBERT multiplies cosines by this before the softmax.
_SIMILARITY_SCALE = 30.0
_LEAST_ATTENTION = 1e-6


def batch_loss(
    model: Any, batch: dict[str, Any], weights: LossWeights, pooling: Pooling
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return the loss to minimise and its parts, without their weights, detached.

    Parameters
    ----------
    model
        In training mode; with eager attention where attention is trained.
    batch
        As `fastmrc.training.batches.TrainingBatches` gives it.
    weights
        Of the parts.
    pooling
        For the objectives SimBERT and retrieval.
    """
    if batch["objective"] == "cloze":
        parts = {"attention": (1.0, _cloze_loss(model, batch))}
    elif batch["objective"] == "span":
        parts = {"span": (1.0, _span_loss(model, batch))}
    elif batch["objective"] == "retrieval":
        parts = {"similarity": (1.0, _retrieval_loss(model, batch, pooling))}
    else:
        parts = _token_losses(model, batch, weights, pooling)
    total = torch.stack([weight * loss for weight, loss in parts.values()]).sum()
    return total, {name: loss.detach() for name, (_, loss) in parts.items()}


def _token_losses(
    model: PreTrainedModel, batch: dict[str, Any], weights: LossWeights, pooling: Pooling
) -> dict[str, tuple[float, torch.Tensor]]:
    """Return weight and loss of each part of an objective that predicts tokens."""
    attends = weights.attention > 0 and len(batch["copy_target"]) > 0
    output = model.base_model(**_inputs(batch), output_attentions=attends)
    hidden = output.last_hidden_state
    targets = hidden[batch["row"], batch["column"]]
    for module in head_modules(model):
        targets = module(targets)
    targets = targets.float()
    parts = {"token": (1.0, functional.cross_entropy(targets, batch["label"]))}
    if batch["objective"] == "simbert":
        if weights.similarity > 0:
            vectors = pooled(hidden, batch["prefix"], pooling)
            parts["similarity"] = weights.similarity, _similarity_loss(vectors)
    elif weights.passage > 0:
        parts["passage"] = weights.passage, _passage_loss(targets, batch)
    if attends:
        attention = output.attentions[-1][:, : weights.attention_heads]
        parts["attention"] = weights.attention, _attention_loss(attention, batch)
    return parts


def _inputs(batch: dict[str, Any]) -> dict[str, torch.Tensor]:
    inputs = dict(batch["inputs"])
    if torch.is_autocast_enabled(inputs["attention_mask"].device.type):
        # A float32 mask would take the whole attention with it.
        inputs["attention_mask"] = inputs["attention_mask"].bfloat16()
    return inputs


def _passage_loss(logits: torch.Tensor, batch: dict[str, Any]) -> torch.Tensor:
    """Cross-entropy over the tokens that the input holds, [SEP] among them."""
    input_ids = batch["inputs"]["input_ids"]
    columns = torch.arange(input_ids.shape[1], device=logits.device)
    rows, inside = (columns < batch["prefix"][:, None]).nonzero(as_tuple=True)
    present = torch.zeros((len(input_ids), logits.shape[1]), dtype=torch.bool, device=logits.device)
    present[rows, input_ids[rows, inside]] = True
    allowed = present[batch["row"]]
    allowed[torch.arange(len(allowed), device=logits.device), batch["label"]] = True
    return functional.cross_entropy(logits.masked_fill(~allowed, -torch.inf), batch["label"])


def _attention_loss(attention: torch.Tensor, batch: dict[str, Any]) -> torch.Tensor:
    """Minus the logarithm of the attention to the places of the token to copy.

    attention [B, heads, T, T]; each target's mass is summed over its places and averaged over the
    heads.
    """
    target, column = batch["copy_target"], batch["copy_column"]
    rows, queries = batch["row"][target], batch["column"][target]
    paid = attention[rows, :, queries, column].float()  # [copies, heads]
    mass = torch.zeros((len(batch["label"]), paid.shape[1]), device=paid.device)
    mass = mass.index_add(0, target, paid)[torch.unique(target)]
    return -(mass + _LEAST_ATTENTION).log().mean()


def _similarity_loss(vectors: torch.Tensor) -> torch.Tensor:
    """Softmax cross-entropy over in-batch cosines x 30: row 2i belongs to row 2i + 1 (SimBERT)."""
    device = vectors.device
    with torch.autocast(device.type, enabled=False):  # bfloat16 has too few digits for this
        scores = vectors @ vectors.T * _SIMILARITY_SCALE
    scores = scores.masked_fill(torch.eye(len(scores), dtype=torch.bool, device=device), -1e12)
    partner = torch.arange(len(scores), device=device) ^ 1
    return functional.cross_entropy(scores, partner)


def _retrieval_loss(
    model: PreTrainedModel, batch: dict[str, Any], pooling: Pooling
) -> torch.Tensor:
    """The similarity loss with questions in the even rows and their passages in the odd ones."""
    inputs, lengths = _inputs(batch), batch["prefix"]
    parts = []
    for first in (0, 1):
        own = lengths[first::2]
        # Questions are padded to the longest of themselves, not to the passages.
        size = int(own.max())
        cut = {name: tensor[first::2, ..., :size] for name, tensor in inputs.items()}
        cut["attention_mask"] = cut["attention_mask"][:, :, :size]
        hidden = model.base_model(**cut).last_hidden_state
        parts.append(pooled(hidden, own, pooling))
    return _similarity_loss(torch.stack(parts, dim=1).flatten(0, 1))


def _cloze_loss(model: Any, batch: dict[str, Any]) -> torch.Tensor:
    """Cross-entropy of the attention with equal shares for the occurrences of the answer."""
    log_probs = functional.log_softmax(model(batch["rows"]), dim=1)
    shares: torch.Tensor = batch["targets"]
    # Not 0 * -inf where a row has fewer positions.
    return -(shares * log_probs.masked_fill(shares == 0, 0.0)).sum(dim=1).mean()


def _span_loss(model: PreTrainedModel, batch: dict[str, Any]) -> torch.Tensor:
    """Mean of the cross-entropies of start and end; [CLS] is both where there is no answer."""
    output = model(**_inputs(batch))
    ends = batch["column"].view(-1, 2)
    hidden = batch["inputs"]["attention_mask"][:, 0, 0] != 0  # padding is no place
    scores = [
        logits.float().masked_fill(hidden, -torch.inf)
        for logits in (output.start_logits, output.end_logits)
    ]
    losses = [functional.cross_entropy(score, ends[:, i]) for i, score in enumerate(scores)]
    return (losses[0] + losses[1]) / 2
