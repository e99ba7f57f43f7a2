"""Drop tokens that a model does not need: from its tokenizer, embeddings and output layer.

There are two ways to choose them.

the rule ``"simplified"``
    Drops what no text is ever cut into, as ``load_vocab(simplified=True)`` of bert4keras does:
    ``##`` with a Chinese character, Chinese tokens of several characters, and the like. Every
    text keeps its tokens.
a corpus
    Keeps what its texts are cut into, special and added tokens, and single ASCII letters, digits
    and punctuation with their ``##`` forms. Every text of the corpus keeps its tokens.

The logits of the tokens that stay are those of the full model; their probabilities share what
the dropped ones had. Rows are cut out of the stored tensors, so an int8 model keeps its levels.
"""

from fastmrc.vocabulary.pruning import PruningReport, Rule, prune_vocabulary
from fastmrc.vocabulary.reachability import unreachable_tokens
from fastmrc.vocabulary.reasons import REASONS, Reason
from fastmrc.vocabulary.selection import Selection, needed_tokens, select_tokens
from fastmrc.vocabulary.wordpieces import WordPieces

__all__ = [
    "REASONS",
    "PruningReport",
    "Reason",
    "Rule",
    "Selection",
    "WordPieces",
    "needed_tokens",
    "prune_vocabulary",
    "select_tokens",
    "unreachable_tokens",
]
