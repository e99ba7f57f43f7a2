"""Tiny models with random weights, their tokenizer and their text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

CHARACTERS = "中国北京上海天气是在有年月日的了人大小山水火木金土一二三四五六七八九十问答谁何哪里"
SPECIAL_TOKENS = {
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}
TINY = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
}


def make_tokenizer(characters: str, size: int = 0) -> Any:
    """Make a BERT tokenizer of single characters, filled up to `size` entries."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    entries = [*SPECIAL_TOKENS.values(), *dict.fromkeys(characters)]
    entries += [f"[unused{i}]" for i in range(size - len(entries))]
    vocabulary = {entry: i for i, entry in enumerate(entries)}
    tokenizer: Any = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(token, vocabulary[token]) for token in ("[CLS]", "[SEP]")],
    )
    fast: Any = PreTrainedTokenizerFast
    return fast(tokenizer_object=tokenizer, model_max_length=512, **SPECIAL_TOKENS)


def save_tiny(directory: Path, class_name: str, seed: int) -> None:
    """Write a tiny model with random weights whose predictions differ clearly, and its
    tokenizer."""
    import transformers

    from fastmrc.pretrained import quiet_transformers

    tokenizer = make_tokenizer(CHARACTERS + "，。？！,.?abcdefghijklmnopqrstuvwxyz0123456789")
    tokenizer.save_pretrained(directory)
    model_class = getattr(transformers, class_name)
    config = model_class.config_class(
        vocab_size=len(tokenizer),
        **TINY,
        max_position_embeddings=512,
        initializer_range=0.3,
        pad_token_id=0,
    )
    torch.manual_seed(seed)
    model = model_class(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # biases and LayerNorm are constant at the start
                parameter.add_(0.1 * torch.randn_like(parameter))
    with quiet_transformers():
        model.save_pretrained(directory)


def random_bilstm() -> Any:
    """Make a small encoder of the cloze reader with random weights."""
    from fastmrc.cloze.bilstm import BiLSTMEncoder

    rng = np.random.default_rng(0)
    words = sorted({"".join(rng.choice(list(CHARACTERS), 2)) for _ in range(200)})
    vectors = rng.standard_normal((len(words) + 1, 16)).astype(np.float32)
    torch.manual_seed(0)
    return BiLSTMEncoder(words, vectors, hidden=8).eval()


def recorded_steps(encoder: Any) -> int | str:
    """Return how many shapes of a step a graph was recorded for."""
    if not encoder.graphs:
        return "none: a step could not be recorded"
    return sum(len(buffers.graphs) for buffers in encoder.pool._kept)
