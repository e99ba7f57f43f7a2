"""Options of a training run, validated in one place."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal, get_args

from fastmrc.errors import InputError
from fastmrc.pretrained import Normalization, Pooling

__all__ = [
    "ClozeOptions",
    "MIXTURE",
    "TRAINED_POOLINGS",
    "LossWeights",
    "Objective",
    "Task",
    "TrainingOptions",
    "WindowOptions",
]

Objective = Literal["seq2seq", "mlm", "simbert", "retrieval", "span", "cloze"]
Task = Literal["seq2seq", "mlm", "simbert", "retrieval", "mixed", "span", "cloze"]
MIXTURE: tuple[Objective, ...] = ("seq2seq", "mlm", "simbert", "retrieval")
TRAINED_POOLINGS = ("mean", "cls")
_SHARES = (
    "warmup",
    "cloze",
    "simbert_share",
    "retrieval_share",
    "mask_share",
    "mlm_share",
    "dropout",
    "weight_decay",
)


@dataclass(frozen=True, kw_only=True)
class WindowOptions:
    """How examples are cut from passages.

    Attributes
    ----------
    window_tokens
        Shortest and longest window; drawn evenly for each example.
    question_tokens
        Longest question; the rest is cut off.
    negatives
        Share of the windows drawn anywhere in the passage instead of around the answer. The target
        of one that does not hold the answer is the empty answer.
    distractors
        Share of the questions that get a window of another passage, one that shares words with the
        question (`fastmrc.training.near`) and is without its answer; the target is the empty
        answer.
    cloze_question_words
        What stands for the span that a cloze question asks for.
    cloze_drop
        Share of a cloze sentence's tokens that are left out of the question.
    """

    window_tokens: tuple[int, int] = (96, 254)
    question_tokens: int = 63
    negatives: float = 0.25
    distractors: float = 0.0
    cloze_question_words: tuple[str, ...] = ("什么", "谁", "哪里", "多少", "哪个", "何时")
    cloze_drop: float = 0.2

    def __post_init__(self) -> None:
        least, most = self.window_tokens
        _require("window_tokens", 1 <= least <= most, "1 <= shortest <= longest", (least, most))
        _require("question_tokens", self.question_tokens >= 1, "at least 1", self.question_tokens)
        for name in ("negatives", "distractors", "cloze_drop"):
            value = getattr(self, name)
            _require(name, 0 <= value <= 1, "a share between 0 and 1", value)


@dataclass(frozen=True, kw_only=True)
class LossWeights:
    """Weights of the losses beside the cross-entropy over the whole vocabulary, which has 1.

    Attributes
    ----------
    passage
        Cross-entropy over the tokens of the input (passage, question, special ones) only.
    attention
        Minus the logarithm of the attention that `attention_heads` heads of the last layer pay to
        the tokens to copy.
    attention_heads
        Number of these heads.
    similarity
        Of the in-batch similarities in the SimBERT objective.
    """

    passage: float = 0.5
    attention: float = 0.5
    attention_heads: int = 6
    similarity: float = 1.0

    def __post_init__(self) -> None:
        for name in ("passage", "attention", "similarity"):
            value = getattr(self, name)
            holds = math.isfinite(value) and value >= 0
            _require(name, holds, "a finite weight of at least 0", value)
        _require("attention_heads", self.attention_heads >= 1, "at least 1", self.attention_heads)


@dataclass(frozen=True, kw_only=True)
class ClozeOptions:
    """The cloze reader and its questions.

    Attributes
    ----------
    encoder
        ``"transformer"`` or ``"bilstm"``.
    blanks
        Questions asked of a document at once; None: 8 for a transformer. A bilstm takes 1.
    labelled_share
        Share of the examples drawn from documents with a blank of their own; the others are made
        from texts. Half of the former ask for other words of the document.
    rename_share
        Share of the examples in whose documents half of the repeated noun-like words are replaced
        by others, everywhere: against learning few documents by heart.
    max_tokens
        Longest input of a transformer; None: as many tokens as the model has positions.
    layers
        How many layers of the base a transformer keeps, from the first; None: all.
    train_layers
        How many upper ones of these are trained; None: all, and the embeddings.
    dimension, min_count
        Size of the word vectors that a bilstm learns, and how often a word must occur to get one.
    hidden, depth
        Size of an LSTM's state in each direction, and layers.
    match
        What its query is compared with: ``"states"`` or ``"embeddings"``.
    """

    encoder: Literal["transformer", "bilstm"] = "transformer"
    blanks: int | None = None
    labelled_share: float = 0.3
    rename_share: float = 0.0
    max_tokens: int | None = None
    layers: int | None = None
    train_layers: int | None = None
    dimension: int = 128
    min_count: int = 2
    hidden: int = 128
    depth: int = 2
    match: Literal["states", "embeddings"] = "states"

    def __post_init__(self) -> None:
        kinds = ("transformer", "bilstm")
        _require("encoder", self.encoder in kinds, " or ".join(kinds), self.encoder)
        matches = ("states", "embeddings")
        _require("match", self.match in matches, " or ".join(matches), self.match)
        for name in ("dimension", "min_count", "hidden", "depth"):
            _require(name, getattr(self, name) >= 1, "at least 1", getattr(self, name))
        for name in ("blanks", "max_tokens", "layers", "train_layers"):
            value = getattr(self, name)
            _require(name, value is None or value >= 1, "at least 1", value)
            if self.encoder == "bilstm" and not (name == "blanks" and value == 1):
                _require(name, value is None, "none for a bilstm", value)
        for name in ("labelled_share", "rename_share"):
            value = getattr(self, name)
            _require(name, 0 <= value <= 1, "a share between 0 and 1", value)

    @property
    def blanks_at_once(self) -> int:
        """Questions asked of a document at once."""
        return self.blanks or (1 if self.encoder == "bilstm" else 8)


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """Options of `fastmrc.training.train`.

    Attributes
    ----------
    task
        ``"seq2seq"``, ``"mlm"``, ``"simbert"``, ``"retrieval"`` (vectors of questions near those of
        their passages), ``"span"`` (start and end heads, read by `fastmrc.SpanReader`),
        ``"cloze"`` (words for blanks, `fastmrc.ClozeReader`) or ``"mixed"``: the first four in turn
        on one set of weights.
    epochs
        How often each question is seen, over all objectives together; None: 3 if there is no
        other bound. The first bound ends the run.
    max_steps
        Bound on the number of batches; None: none.
    max_hours
        Bound on the time, evaluation included, over all runs that resume each other. The learning
        rate falls to 0 at whichever bound comes first.
    batch_size
        Examples in a batch.
    learning_rate, warmup, weight_decay
        Peak of the learning rate, share of the run in which it rises, and AdamW's decay.
    cloze
        Share of the reading examples that are cloze questions made from the passages.
    simbert_share
        Share of the batches for the SimBERT objective in a mixture that has pairs.
    retrieval_share
        Share of the batches for the retrieval objective in a mixture.
    retrieval_pairs
        Questions in a batch of the retrieval objective; each passage of the batch is a wrong one
        for all questions but its own, so more are better.
    mask_share
        Share of the tokens of the first text that [MASK] replaces in the SimBERT objective.
    mlm_share
        Share of the other batches of a mixture for the MLM objective; the rest is for seq2seq.
    dropout
        Of the model; 0 is faster on a CPU.
    copy_heads
        Heads of the last layer that begin as a channel for copied tokens (see
        `fastmrc.training.copying`); 0: none. For a base whose output layer was never trained; what
        these heads did before is lost.
    slots
        [MASK] slots of the MLM objective.
    answer_tokens
        Longest answer of the seq2seq objective, its end token included.
    pooling
        How one vector is made of a text: ``"mean"`` over its last hidden states, or ``"cls"``, the
        first of them. (The original's linear pool has a layer that the masked-LM models of
        transformers do not keep.)
    normalization
        Of passages, stored with the model; None: the base's own.
    eval_questions
        Questions of the held-out file that are read at each evaluation.
    eval_steps
        Batches between two evaluations; a checkpoint is written at each.
    seed
        Of everything that is drawn.
    bfloat16
        Whether products are taken in bfloat16; None: where the hardware has them.
    """

    task: Task
    epochs: float | None = None
    max_steps: int | None = None
    max_hours: float | None = None
    batch_size: int = 32
    learning_rate: float = 2e-4
    warmup: float = 0.05
    weight_decay: float = 0.01
    cloze: float = 0.0
    simbert_share: float = 0.1
    retrieval_share: float = 0.1
    retrieval_pairs: int = 32
    mask_share: float = 0.0
    mlm_share: float = 0.5
    dropout: float = 0.1
    copy_heads: int = 0
    slots: int = 16
    answer_tokens: int = 32
    pooling: Pooling = "mean"
    normalization: Normalization | None = None
    eval_questions: int = 100
    eval_steps: int = 500
    seed: int = 0
    bfloat16: bool | None = None
    windows: WindowOptions = field(default_factory=WindowOptions)
    losses: LossWeights = field(default_factory=LossWeights)
    cloze_reader: ClozeOptions = field(default_factory=ClozeOptions)

    def __post_init__(self) -> None:
        _require(
            "task", self.task in get_args(Task), f"one of {', '.join(get_args(Task))}", self.task
        )
        for name in ("batch_size", "slots", "answer_tokens", "eval_questions", "eval_steps"):
            _require(name, getattr(self, name) >= 1, "at least 1", getattr(self, name))
        # One question alone has no wrong passage.
        _require("retrieval_pairs", self.retrieval_pairs >= 2, "at least 2", self.retrieval_pairs)
        _require(
            "pooling", self.pooling in TRAINED_POOLINGS, " or ".join(TRAINED_POOLINGS), self.pooling
        )
        for name in ("epochs", "max_steps", "max_hours", "learning_rate"):
            value = getattr(self, name)
            if value is not None:
                _require(name, math.isfinite(value) and value > 0, "a number above 0", value)
        for name in _SHARES:
            value = getattr(self, name)
            _require(name, 0 <= value <= 1, "a share between 0 and 1", value)
        of_pairs = self.simbert_share + self.retrieval_share
        _require("retrieval_share", of_pairs <= 1, "at most 1 with simbert_share", of_pairs)
        _require("seed", 0 <= self.seed < 2**32, "0 to 2**32 - 1", self.seed)
        _require("copy_heads", self.copy_heads >= 0, "at least 0", self.copy_heads)
        copies = self.copy_heads == 0 or not {"seq2seq", "mlm"}.isdisjoint(self.objectives)
        _require("copy_heads", copies, f"0 for the task {self.task}", self.copy_heads)

    @property
    def objectives(self) -> tuple[Objective, ...]:
        """The objectives that the task is made of."""
        return MIXTURE if self.task == "mixed" else (self.task,)


def _require(name: str, holds: bool, expected: str, got: object) -> None:
    if not holds:
        raise InputError(f"{name}: expected {expected}, got {got!r}")
