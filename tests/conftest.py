"""Tiny models with random weights, built on disk once per test session."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import string
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

# Before any test imports the library: no test may reach the network.
os.environ["HF_HUB_OFFLINE"] = "1"

import cases
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

if TYPE_CHECKING:
    from fastmrc import Answer

CHINESE = (
    "中国北京上海天气是在有年月日的了人大小山水火木金土一二三四五六七八九十问答谁何哪里时间名字"
)
PUNCTUATION = ",.?!'-()[]，。？！、；：（）《》"
HIDDEN_SIZE = 32


# Where the CUDA extension lies that was built with FASTMRC_CUDA_EMULATION=ON: its kernels run on
# the host, for tests where there is no GPU.
EMULATION = os.environ.get("FASTMRC_CUDA_EMULATION")
# Run all tests that use torch on the GPU, or on its emulation, not only those marked "gpu".
ALL_ON_DEVICE = os.environ.get("FASTMRC_TEST_ON_DEVICE", "") == "1"


def _load_emulation(directory: str) -> None:
    path = next(Path(directory).glob("_cuda.*.so"))
    spec = importlib.util.spec_from_file_location("fastmrc._cuda", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["fastmrc._cuda"] = module
    spec.loader.exec_module(module)


if EMULATION:
    _load_emulation(EMULATION)


def _kernel_device() -> str:
    """Name the device that the kernels run on: a GPU, or the host where they are emulated."""
    from fastmrc.cuda import runtime

    if runtime.device_count() > 0:
        return "cuda"
    if runtime.kernels() is None or not runtime.kernels().is_emulated():
        pytest.skip("needs an NVIDIA GPU and FASTMRC_CUDA=ON, or an emulation: see CONTRIBUTING.md")
    return "cpu"


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> str:
    """Name the device that the kernels run on, and let them run there."""
    from fastmrc.cuda import runtime

    name = _kernel_device()
    monkeypatch.setattr(runtime, "device_type", name)
    return name


@pytest.fixture(autouse=True)
def rows_on_device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the random cases of tests marked "gpu" be on the device."""
    if request.node.get_closest_marker("gpu") is not None:
        monkeypatch.setattr(cases, "device", request.getfixturevalue("device"))


@pytest.fixture(scope="session", autouse=ALL_ON_DEVICE)
def everything_on_device() -> Iterator[None]:
    """Let models be on the device unless a test names another, and the kernels run there."""
    import fastmrc.pretrained
    from fastmrc.cuda import runtime

    name = _kernel_device()
    resolve = fastmrc.pretrained.resolve_device
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runtime, "device_type", name)
        patch.setattr(fastmrc.pretrained, "resolve_device", lambda own: resolve(own or name))
        yield


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Keep torch on one thread: two gain nothing on models this small."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# Chinese and English, an unknown character; no two of them differ in case or spaces only.
WORDS = [*"北京上海天气山水一二", "New York", "newing", "2024", "年😀年", ",", "。", " [SEP] "]
PASSAGES = st.lists(
    st.lists(st.sampled_from(WORDS), max_size=12).map("".join) | st.sampled_from(["", " ", "北京"]),
    max_size=6,
)
QUESTIONS = st.lists(st.sampled_from([*WORDS, "谁", "?"]), min_size=1, max_size=8).map("".join)
VOTES = ("original", "mean", "max", "product", "weighted")

QUESTION_BATCHES = st.lists(st.tuples(QUESTIONS, PASSAGES), min_size=1, max_size=3)


def random_cases(count: int) -> settings:
    """`count` examples; the fixtures hold nothing that an example changes."""
    health = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
    return settings(deadline=None, max_examples=count, suppress_health_check=health)


def draw_weights(data: st.DataObject, questions: Sequence[tuple[str, list[str]]]) -> Any:
    """Draw one weight per passage of each question."""
    weight = st.sampled_from([0.0, 0.5, 1.0, 3.0])
    return [
        data.draw(st.lists(weight, min_size=len(passages), max_size=len(passages)))
        for _, passages in questions
    ]


def without_seconds(answer: Answer) -> Answer:
    from fastmrc import Timings

    return replace(answer, timings=Timings())


def cut(answer: Answer, passages: Sequence[str]) -> list[str]:
    """Return the cited characters of each span."""
    return [passages[span.passage][span.start : span.end] for span in answer.spans]


def assert_same_answer(ours: Answer, theirs: Answer, tolerance: float = 1e-6) -> None:
    """Everything but the seconds; scores within `tolerance`."""
    assert (ours.text, ours.token_ids, ours.spans) == (theirs.text, theirs.token_ids, theirs.spans)
    assert ours.score == pytest.approx(theirs.score, abs=tolerance)
    assert ours.no_answer_score == pytest.approx(theirs.no_answer_score, abs=tolerance)
    assert len(ours.candidates) == len(theirs.candidates)
    for a, b in zip(ours.candidates, theirs.candidates, strict=True):
        assert replace(a, score=0.0) == replace(b, score=0.0)
        assert a.score == pytest.approx(b.score, abs=tolerance)


def make_vocabulary(special: Sequence[str]) -> list[str]:
    """Return the entries of the tiny vocabulary, `special` first; no entry occurs twice."""
    letters = string.ascii_lowercase
    entries = [*special, *PUNCTUATION, *string.digits, *letters, *CHINESE]
    entries += [f"##{c}" for c in letters + string.digits]
    entries += ["new", "york", "the", "##ing"]
    return list(dict.fromkeys(entries))


def save_tokenizer(
    directory: Path,
    special: dict[str, str],
    pair: str | None = None,
    input_names: Sequence[str] | None = None,
) -> int:
    """Write a fast, lower-casing word-piece tokenizer; return the size of its vocabulary.

    `special` maps roles (``cls_token`` and so on) to the texts of the tokens, in order of id;
    `pair` is the template of two texts (default: BERT's), `input_names` what the model is given.
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
        pair=pair or f"{cls} $A {sep} $B:1 {sep}:1",
        special_tokens=[(cls, vocabulary[cls]), (sep, vocabulary[sep])],
    )
    make_fast: Any = PreTrainedTokenizerFast
    names = {} if input_names is None else {"model_input_names": list(input_names)}
    fast = make_fast(tokenizer_object=tokenizer, model_max_length=512, **special, **names)
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
    directory: Path,
    class_name: str,
    special: dict[str, str],
    seed: int = 0,
    pair: str | None = None,
    input_names: Sequence[str] | None = None,
    **options: Any,
) -> Path:
    """Write a model of transformers with random weights, and its tokenizer.

    The weights are drawn with a deviation that makes the predictions differ clearly.
    """
    import torch
    import transformers

    directory.mkdir(parents=True, exist_ok=True)
    vocab_size = save_tokenizer(directory, special, pair, input_names)
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
def byte_level_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A RoBERTa with its own kind of tokens: bytes, and words with the space before them."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    entries = [*ROBERTA_TOKENS.values(), *sorted(pre_tokenizers.ByteLevel.alphabet())]
    merges = [("n", "e"), ("ne", "w"), ("Ġ", "new"), ("o", "r"), ("Ġ", "y"), ("Ġy", "or")]
    entries += [first + second for first, second in merges]
    vocabulary = {entry: i for i, entry in enumerate(entries)}
    directory = save_model(
        tmp_path_factory.mktemp("byte_level"),
        "RobertaForMaskedLM",
        ROBERTA_TOKENS,
        vocab_size=len(vocabulary),
        type_vocab_size=1,
        max_position_embeddings=514,
    )
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    ends = [(token, vocabulary[token]) for token in ("</s>", "<s>")]
    # Without trimming, the characters of a token begin with its space.
    tokenizer.post_processor = processors.RobertaProcessing(
        *ends, trim_offsets=False, add_prefix_space=False
    )
    make_fast: Any = PreTrainedTokenizerFast
    fast = make_fast(tokenizer_object=tokenizer, model_max_length=512, **ROBERTA_TOKENS)
    fast.save_pretrained(directory)
    return directory


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
def tiny_distilbert_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(
        tmp_path_factory.mktemp("distilbert"), "DistilBertForMaskedLM", BERT_TOKENS, hidden_dim=64
    )


@pytest.fixture(scope="session")
def tiny_albert_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(
        tmp_path_factory.mktemp("albert"), "AlbertForMaskedLM", BERT_TOKENS, embedding_size=16
    )


@pytest.fixture(scope="session")
def tiny_modernbert_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rotary positions, and layers that see a window of a few tokens only."""
    return save_model(
        tmp_path_factory.mktemp("modernbert"),
        "ModernBertForMaskedLM",
        BERT_TOKENS,
        global_attn_every_n_layers=2,
        local_attention=8,
        bos_token_id=2,
        cls_token_id=2,
        eos_token_id=3,
        sep_token_id=3,
    )


# Relative positions, as DeBERTa-v3 has them.
DEBERTA_OPTIONS: dict[str, Any] = {
    "type_vocab_size": 0,
    "relative_attention": True,
    "pos_att_type": ["p2c", "c2p"],
    "position_buckets": 8,
    "position_biased_input": False,
}


@pytest.fixture(scope="session")
def tiny_deberta_v2_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(
        tmp_path_factory.mktemp("deberta_v2"),
        "DebertaV2ForMaskedLM",
        BERT_TOKENS,
        **DEBERTA_OPTIONS,
    )


WITHOUT_TYPES = ("input_ids", "attention_mask")
WITH_TYPES = (*WITHOUT_TYPES, "token_type_ids")


@pytest.fixture(scope="session")
def bert_qa_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Start and end heads; question and passage are told apart by token types."""
    return save_model(
        tmp_path_factory.mktemp("bert_qa"),
        "BertForQuestionAnswering",
        BERT_TOKENS,
        input_names=WITH_TYPES,
    )


@pytest.fixture(scope="session")
def bert_qa_without_types_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(
        tmp_path_factory.mktemp("bert_qa_without_types"),
        "BertForQuestionAnswering",
        BERT_TOKENS,
        input_names=WITHOUT_TYPES,
    )


@pytest.fixture(scope="session")
def roberta_qa_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(
        tmp_path_factory.mktemp("roberta_qa"),
        "RobertaForQuestionAnswering",
        ROBERTA_TOKENS,
        pair="<s> $A </s> </s> $B </s>",
        input_names=WITHOUT_TYPES,
        type_vocab_size=1,
        max_position_embeddings=514,
    )


@pytest.fixture(scope="session")
def distilbert_qa_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(
        tmp_path_factory.mktemp("distilbert_qa"),
        "DistilBertForQuestionAnswering",
        BERT_TOKENS,
        input_names=WITHOUT_TYPES,
        hidden_dim=64,
    )


@pytest.fixture(scope="session")
def deberta_v2_qa_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(
        tmp_path_factory.mktemp("deberta_v2_qa"),
        "DebertaV2ForQuestionAnswering",
        BERT_TOKENS,
        input_names=WITH_TYPES,
        **DEBERTA_OPTIONS,
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


@pytest.fixture(
    params=[
        "bert",
        "roberta",
        "xlm_roberta",
        "electra",
        "ernie",
        "distilbert",
        "albert",
        "modernbert",
        "deberta_v2",
    ]
)
def masked_lm_dir(request: pytest.FixtureRequest) -> Path:
    """Each of the tiny masked language models in turn, those without a prefix cache included."""
    directory: Path = request.getfixturevalue(f"tiny_{request.param}_dir")
    return directory


@pytest.fixture(
    params=["bert_qa", "bert_qa_without_types", "roberta_qa", "distilbert_qa", "deberta_v2_qa"]
)
def qa_dir(request: pytest.FixtureRequest) -> Path:
    """Each of the tiny models with start and end heads in turn."""
    directory: Path = request.getfixturevalue(f"{request.param}_dir")
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
