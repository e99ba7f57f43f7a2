"""Tiny models with random weights, built on disk once per test session."""

from __future__ import annotations

import json
import os
import shutil
import string
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

# Before any test imports the library: no test may reach the network.
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest

CHINESE = (
    "中国北京上海天气是在有年月日的了人大小山水火木金土一二三四五六七八九十问答谁何哪里时间名字"
)
PUNCTUATION = ",.?!'-()[]，。？！、；：（）《》"
HIDDEN_SIZE = 32


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Keep torch on one thread: two gain nothing on models this small."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make_vocabulary(special: Sequence[str]) -> list[str]:
    """Return the entries of the tiny vocabulary, `special` first; no entry occurs twice."""
    letters = string.ascii_lowercase
    entries = [*special, *PUNCTUATION, *string.digits, *letters, *CHINESE]
    entries += [f"##{c}" for c in letters + string.digits]
    entries += ["new", "york", "the", "##ing"]
    return list(dict.fromkeys(entries))


def save_tokenizer(directory: Path, special: dict[str, str]) -> int:
    """Write a fast, lower-casing word-piece tokenizer; return the size of its vocabulary.

    `special` maps roles (``cls_token`` and so on) to the texts of the tokens, in order of id.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: i for i, token in enumerate(make_vocabulary(list(special.values())))}
    cls, sep, unknown = (special[f"{role}_token"] for role in ("cls", "sep", "unk"))
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token=unknown))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{cls} $A {sep}",
        pair=f"{cls} $A {sep} $B:1 {sep}:1",
        special_tokens=[(cls, vocabulary[cls]), (sep, vocabulary[sep])],
    )
    make_fast: Any = PreTrainedTokenizerFast
    fast = make_fast(tokenizer_object=tokenizer, model_max_length=512, **special)
    fast.save_pretrained(directory)
    return len(vocabulary)


BERT_TOKENS = {
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}
ROBERTA_TOKENS = {
    "cls_token": "<s>",
    "pad_token": "<pad>",
    "sep_token": "</s>",
    "unk_token": "<unk>",
    "mask_token": "<mask>",
}


def save_model(
    directory: Path, class_name: str, special: dict[str, str], seed: int = 0, **options: Any
) -> Path:
    """Write a model of transformers with random weights, and its tokenizer.

    The weights are drawn with a deviation that makes the predictions differ clearly.
    """
    import torch
    import transformers

    directory.mkdir(parents=True, exist_ok=True)
    vocab_size = save_tokenizer(directory, special)
    model_class = getattr(transformers, class_name)
    settings = {
        "vocab_size": vocab_size,
        "hidden_size": HIDDEN_SIZE,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 2 * HIDDEN_SIZE,
        "max_position_embeddings": 512,
        "initializer_range": 0.3,
        "pad_token_id": list(special).index("pad_token"),
    }
    config = model_class.config_class(**(settings | options))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:  # biases and LayerNorm are constant at the start
                    parameter.add_(0.1 * torch.randn_like(parameter))
        model.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def tiny_bert_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("bert"), "BertForMaskedLM", BERT_TOKENS)


@pytest.fixture(scope="session")
def tiny_roberta_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(
        tmp_path_factory.mktemp("roberta"),
        "RobertaForMaskedLM",
        ROBERTA_TOKENS,
        type_vocab_size=1,
        max_position_embeddings=514,
    )


@pytest.fixture(scope="session")
def tiny_xlm_roberta_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(
        tmp_path_factory.mktemp("xlm_roberta"),
        "XLMRobertaForMaskedLM",
        ROBERTA_TOKENS,
        type_vocab_size=1,
        max_position_embeddings=514,
    )


@pytest.fixture(scope="session")
def tiny_electra_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(
        tmp_path_factory.mktemp("electra"),
        "ElectraForMaskedLM",
        BERT_TOKENS,
        embedding_size=HIDDEN_SIZE // 2,
    )


@pytest.fixture(scope="session")
def tiny_ernie_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(
        tmp_path_factory.mktemp("ernie"), "ErnieForMaskedLM", BERT_TOKENS, use_task_id=True
    )


@pytest.fixture(scope="session")
def no_head_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT encoder alone: transformers would draw the output layer at random."""
    return save_model(tmp_path_factory.mktemp("no_head"), "BertModel", BERT_TOKENS)


@pytest.fixture
def bert_copy(tiny_bert_dir: Path, tmp_path: Path) -> Path:
    """A copy of the tiny BERT that a test may damage."""
    return Path(shutil.copytree(tiny_bert_dir, tmp_path / "copy"))


@pytest.fixture
def slow_tokenizer_dir(bert_copy: Path) -> Path:
    """A tiny BERT with a tokenizer class that transformers has in Python only."""
    (bert_copy / "tokenizer.json").unlink()
    special = ["<cls>", "<pad>", "<eos>", "<unk>", "<mask>"]
    (bert_copy / "vocab.txt").write_text("\n".join(make_vocabulary(special)), encoding="utf-8")
    settings = {"tokenizer_class": "EsmTokenizer", "cls_token": "<cls>", "eos_token": "<eos>"}
    (bert_copy / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return bert_copy


@pytest.fixture
def pickle_only_dir(bert_copy: Path) -> Path:
    import torch
    from safetensors.torch import load_file

    weights = load_file(bert_copy / "model.safetensors")
    torch.save(weights, bert_copy / "pytorch_model.bin")
    (bert_copy / "model.safetensors").unlink()
    return bert_copy


@pytest.fixture(params=["bert", "roberta", "xlm_roberta", "electra", "ernie"])
def tiny_model_dir(request: pytest.FixtureRequest) -> Path:
    """Each of the tiny masked language models in turn."""
    directory: Path = request.getfixturevalue(f"tiny_{request.param}_dir")
    return directory


@pytest.fixture(scope="session")
def packaged_model() -> Any:
    """The packaged model, loaded once; do not change it."""
    from fastmrc.pretrained import load_model

    return load_model()


@pytest.fixture
def edit_json() -> Callable[[Path, dict[str, Any]], None]:
    """Return a function that sets keys of a JSON file."""

    def edit(path: Path, changes: dict[str, Any]) -> None:
        values = json.loads(path.read_text(encoding="utf-8"))
        path.write_text(json.dumps(values | changes), encoding="utf-8")

    return edit
