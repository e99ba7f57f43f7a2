"""Loading of models: the packaged one, directories, the hub's cache, and what is refused."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import BERT_TOKENS, save_model, save_tokenizer
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from fastmrc import pretrained
from fastmrc.errors import InputError, UnsupportedModelError
from fastmrc.pretrained import LoadedModel, load_model, max_positions, packaged_model_path

FULL_WIDTH = "０１２３４５６７８９ＡＢＣＸＹＺａｂｃｘｙｚ"
TEXT = "中国的天气, 2012年"
EditJson = Callable[[Path, dict[str, Any]], None]


def logits_of(loaded: LoadedModel, text: str = TEXT) -> torch.Tensor:
    inputs = loaded.tokenizer(text, return_tensors="pt")
    with torch.inference_mode():
        logits: torch.Tensor = loaded.model(**inputs).logits
    return logits


# The packaged model


def test_packaged_model_is_complete_and_small() -> None:
    directory = packaged_model_path()
    files = {path.name: path.stat().st_size for path in directory.iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"} < set(
        files
    )
    assert {"fastmrc.json", "README.md", "LICENSE"} < set(files)
    assert sum(files.values()) <= 40_000_000


def test_packaged_model_names_no_paths_of_a_machine() -> None:
    for path in packaged_model_path().iterdir():
        if path.suffix != ".safetensors" and path.name != "tokenizer.json":
            text = path.read_text(encoding="utf-8")
            assert not re.search(r"(?<![\w/.-])/(root|work|home|tmp|Users)/", text), path.name


def test_packaged_model_loads(packaged_model: LoadedModel) -> None:
    model: Any = packaged_model.model
    assert type(model).__name__ == "BertForMaskedLM"
    assert not model.training
    assert model.config._attn_implementation == "sdpa"
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    tied = model.get_output_embeddings().weight.data_ptr()
    assert tied == model.get_input_embeddings().weight.data_ptr()
    assert packaged_model.normalization == "none"
    assert packaged_model.source == str(packaged_model_path())
    assert torch.isfinite(logits_of(packaged_model)).all()


def test_packaged_model_knows_chinese(packaged_model: LoadedModel) -> None:
    inputs = packaged_model.tokenizer("北京是中国的首都。")
    unknown = packaged_model.tokenizer.unk_token_id
    assert len(inputs["input_ids"]) == 11
    assert unknown not in inputs["input_ids"]


@pytest.mark.parametrize("character", FULL_WIDTH)
def test_full_width_letters_and_digits_are_known(
    packaged_model: LoadedModel, character: str
) -> None:
    tokenizer = packaged_model.tokenizer
    half_width = chr(ord(character) - 0xFEE0)
    for text in ("{}", "中{}国", "{0}{0}", "a{}1"):
        expected = tokenizer(text.format(half_width))["input_ids"]
        assert tokenizer(text.format(character))["input_ids"] == expected


def test_full_width_punctuation_stays(packaged_model: LoadedModel) -> None:
    text = "（甲），乙：丙；丁！戊？"
    tokens = packaged_model.tokenizer.tokenize(text)
    assert tokens == list(text)


def test_offsets_are_those_of_the_callers_text(packaged_model: LoadedModel) -> None:
    text = "在Ｎａｍｅ　（２０１２年）\u3000é①ＡＢ。"
    inputs = packaged_model.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    tokens = packaged_model.tokenizer.convert_ids_to_tokens(inputs["input_ids"])
    pieces = [text[start:end] for start, end in inputs["offset_mapping"]]
    assert tokens[:4] == ["在", "name", "（", "2"]
    assert pieces[:7] == ["在", "Ｎａｍｅ", "（", "２", "０", "１", "２"]
    assert pieces[-2:] == ["ＡＢ", "。"] or pieces[-3:] == ["Ａ", "Ｂ", "。"]


def test_normalizer_costs_little() -> None:
    path = packaged_model_path() / "tokenizer.json"
    mended = Tokenizer.from_file(str(path))
    parts = json.loads(path.read_text(encoding="utf-8"))
    parts["normalizer"] = parts["normalizer"]["normalizers"][0]
    plain = Tokenizer.from_str(json.dumps(parts))
    passages = [("北京是中国的首都，2012年有NAME个人。" * 20)[i : i + 250] for i in range(100)]

    def seconds(tokenizer: Tokenizer) -> float:
        start = time.perf_counter()
        for passage in passages:
            tokenizer.encode(passage)
        return time.perf_counter() - start

    rounds = [(seconds(plain), seconds(mended)) for _ in range(7)]
    # About 1.1 on a quiet machine; the best of several rounds keeps other work out.
    assert min(after for _, after in rounds) < 1.5 * min(before for before, _ in rounds)


def test_loading_prints_nothing_and_restores_the_library(
    capfd: pytest.CaptureFixture[str],
) -> None:
    from transformers.utils import logging as library_logging

    library_logging.set_verbosity(logging.INFO)
    try:
        load_model()
        assert library_logging.get_verbosity() == logging.INFO
        assert library_logging.is_progress_bar_enabled()
    finally:
        library_logging.set_verbosity(logging.WARNING)
    captured = capfd.readouterr()
    assert captured.out + captured.err == ""


def test_import_does_not_load_torch_or_transformers() -> None:
    code = (
        "import sys, fastmrc.pretrained, fastmrc.quantize\n"
        "print([m for m in ('torch', 'transformers', 'huggingface_hub') if m in sys.modules])"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ
    )
    assert run.stdout.strip() == "[]"


# Directories and the hub's cache


def test_every_family_loads(tiny_model_dir: Path) -> None:
    loaded = load_model(tiny_model_dir)
    assert loaded.tokenizer.is_fast
    assert loaded.normalization == "none"
    assert loaded.source == str(tiny_model_dir)
    assert torch.isfinite(logits_of(loaded)).all()


def test_path_may_be_text(tiny_bert_dir: Path) -> None:
    assert load_model(str(tiny_bert_dir)).source == str(tiny_bert_dir)


@pytest.mark.parametrize("dtype", ["bfloat16", torch.float16, "float32"])
def test_dtype(tiny_bert_dir: Path, dtype: torch.dtype | str) -> None:
    model = load_model(tiny_bert_dir, dtype=dtype, device="cpu").model
    assert str(model.dtype).removeprefix("torch.") == str(dtype).removeprefix("torch.")


def test_dtype_auto(monkeypatch: pytest.MonkeyPatch, tiny_bert_dir: Path) -> None:
    for flags, dtype in (
        (set(), torch.float32),
        ({"amx_bf16"}, torch.bfloat16),
        ({"avx2"}, torch.float32),
    ):
        monkeypatch.setattr(pretrained, "_cpu_flags", lambda flags=flags: flags)
        assert load_model(tiny_bert_dir, dtype="auto").model.dtype == dtype


def test_sharded_weights(tiny_bert_dir: Path, bert_copy: Path) -> None:
    loaded = load_model(bert_copy)
    (bert_copy / "model.safetensors").unlink()
    loaded.model.save_pretrained(bert_copy, max_shard_size="20KB")
    assert (bert_copy / "model.safetensors.index.json").is_file()
    assert torch.equal(logits_of(load_model(bert_copy)), logits_of(loaded))
    shard = sorted(bert_copy.glob("model-*.safetensors"))[0]
    shard.unlink()
    with pytest.raises(UnsupportedModelError, match=f"{shard.name} is named in .* but missing"):
        load_model(bert_copy)


def test_settings_file_may_only_name_the_normalization(bert_copy: Path) -> None:
    (bert_copy / "fastmrc.json").write_text('{"normalization": "original"}', encoding="utf-8")
    assert load_model(bert_copy).normalization == "original"


def test_hub_model_from_the_cache(
    tiny_bert_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    commit = "0" * 40
    cached = tmp_path / "models--someone--tiny"
    shutil.copytree(tiny_bert_dir, cached / "snapshots" / commit)
    for name in ("main", "v1"):
        (cached / "refs").mkdir(exist_ok=True)
        (cached / "refs" / name).write_text(commit, encoding="utf-8")
    loaded = load_model("someone/tiny", revision="v1", local_files_only=True)
    assert loaded.source == "someone/tiny"
    assert torch.equal(logits_of(loaded), logits_of(load_model(tiny_bert_dir)))
    with pytest.raises(InputError, match="'someone/tiny' is no directory.* at revision 'v2'"):
        load_model("someone/tiny", revision="v2", local_files_only=True)


# Tasks and positions


@pytest.mark.parametrize("attention", [None, "eager"])
def test_question_answering_model(bert_qa_dir: Path, attention: str | None) -> None:
    loaded = load_model(bert_qa_dir, task="question-answering", attention=attention)
    assert type(loaded.model).__name__ == "BertForQuestionAnswering"
    assert not loaded.model.training
    assert loaded.model.config._attn_implementation == (attention or "sdpa")
    inputs = loaded.tokenizer("谁", TEXT, return_tensors="pt")
    with torch.inference_mode():
        assert torch.isfinite(loaded.model(**inputs).start_logits).all()


def test_head_of_another_task(bert_qa_dir: Path, tiny_bert_dir: Path, no_head_dir: Path) -> None:
    assert "no trained masked-LM model: 6 weights are missing, such as cls." in refusal(bert_qa_dir)
    for directory in (tiny_bert_dir, no_head_dir):
        message = refusal(directory, task="question-answering")
        assert "no trained question-answering model: 2 weights are missing, such as qa_" in message


def test_model_type_without_question_answering(bert_copy: Path) -> None:
    (bert_copy / "config.json").write_text('{"model_type": "vit"}', encoding="utf-8")
    message = refusal(bert_copy, task="question-answering")
    assert "model type 'vit' has no question-answering head" in message


def test_only_a_masked_language_model_is_packaged() -> None:
    with pytest.raises(
        InputError,
        match="path_or_id: expected a directory or hub id, as no question-answering model comes",
    ):
        load_model(task="question-answering")


def test_unknown_task(tiny_bert_dir: Path) -> None:
    unknown: Any = "translation"
    with pytest.raises(InputError, match="task: expected one of masked-LM, question-answering"):
        load_model(tiny_bert_dir, task=unknown)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("tiny_bert", 512),
        ("tiny_roberta", 512),
        ("tiny_xlm_roberta", 512),
        ("tiny_electra", 512),
        ("tiny_distilbert", 512),
        ("tiny_modernbert", 512),
        ("roberta_qa", 512),
    ],
)
def test_max_positions(name: str, expected: int, request: pytest.FixtureRequest) -> None:
    """As many tokens as the model can take, and no more."""
    from transformers import AutoConfig, AutoModel

    config = AutoConfig.from_pretrained(request.getfixturevalue(f"{name}_dir"))
    assert max_positions(config) == expected
    if config.model_type == "modernbert":
        return  # rotary positions go on
    model = AutoModel.from_config(config).eval()
    with torch.inference_mode():
        model(torch.full((1, expected), 9))
        with pytest.raises((IndexError, RuntimeError)):
            model(torch.full((1, expected + 1), 9))


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"max_position_embeddings": 40}, 40),
        ({"max_position_embeddings": -1}, None),
        ({"max_position_embeddings": 0}, None),
        ({"max_position_embeddings": None}, None),
        ({}, None),
        ({"model_type": "roberta", "max_position_embeddings": 514, "pad_token_id": 1}, 512),
        ({"model_type": "mpnet", "max_position_embeddings": 514, "pad_token_id": 1}, 512),
        ({"model_type": "esm", "max_position_embeddings": 30, "pad_token_id": 0}, 29),
    ],
)
def test_max_positions_of_settings(settings: dict[str, Any], expected: int | None) -> None:
    config: Any = SimpleNamespace(**{"model_type": "bert", "pad_token_id": 0} | settings)
    assert max_positions(config) == expected


# What is refused


def refusal(directory: Path | str, **options: Any) -> str:
    with pytest.raises(UnsupportedModelError) as caught:
        load_model(directory, **options)
    message = str(caught.value)
    assert str(directory) in message
    assert "\n" not in message
    return message


@pytest.mark.parametrize("name", ["/no/such/dir", "./no-such", "a/b/c", "~/no-such-dir", ""])
def test_missing_directory(name: str) -> None:
    with pytest.raises(InputError, match="there is no directory|hub"):
        load_model(name or Path("no-such-dir"), local_files_only=True)


def test_unknown_hub_id() -> None:
    with pytest.raises(InputError, match="'no/such-model' is no directory, and the hub's cache"):
        load_model("no/such-model", local_files_only=True)
    with pytest.raises(InputError, match="'no/such-model' is no directory"):
        load_model("no/such-model")


def test_wrong_arguments(tiny_bert_dir: Path) -> None:
    wrong_path: Any = 3
    with pytest.raises(InputError, match="path_or_id: expected a path or a hub id, got int"):
        load_model(wrong_path)
    with pytest.raises(InputError, match="expected a directory, got the file"):
        load_model(tiny_bert_dir / "config.json")
    with pytest.raises(InputError, match="dtype: expected one of .*, got 'int8'"):
        load_model(tiny_bert_dir, dtype="int8")
    with pytest.raises(InputError, match="device: expected .*, got 'abacus'"):
        load_model(tiny_bert_dir, device="abacus")


def test_no_config(tmp_path: Path) -> None:
    assert "no config.json" in refusal(tmp_path)


@pytest.mark.parametrize("text", ["{", '{"model_type": "no-such-type"}', "[]", "{}"])
def test_bad_config(bert_copy: Path, text: str) -> None:
    (bert_copy / "config.json").write_text(text, encoding="utf-8")
    assert "config.json" in refusal(bert_copy)


def test_model_type_without_masked_lm(bert_copy: Path) -> None:
    (bert_copy / "config.json").write_text('{"model_type": "gpt2"}', encoding="utf-8")
    assert "model type 'gpt2' has no masked-LM head" in refusal(bert_copy)


def test_encoder_without_head(no_head_dir: Path) -> None:
    message = refusal(no_head_dir)
    assert "no trained masked-LM model" in message
    assert "cls.predictions" in message


def test_electra_discriminator(tmp_path: Path) -> None:
    save_model(tmp_path, "ElectraForPreTraining", BERT_TOKENS, embedding_size=16)
    assert "no trained masked-LM model" in refusal(tmp_path)


def test_slow_tokenizer(slow_tokenizer_dir: Path) -> None:
    assert "expected a fast tokenizer (tokenizer.json), got EsmTokenizer" in refusal(
        slow_tokenizer_dir
    )


def test_pickle_is_never_loaded(pickle_only_dir: Path) -> None:
    message = refusal(pickle_only_dir)
    assert "only pickle files (pytorch_model.bin)" in message


def test_no_weights(bert_copy: Path) -> None:
    (bert_copy / "model.safetensors").unlink()
    assert "got no such file" in refusal(bert_copy)


@pytest.mark.parametrize("size", [0, 4, 100, -1])
def test_truncated_weights(bert_copy: Path, size: int) -> None:
    path = bert_copy / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:size])
    assert "model.safetensors is damaged or not complete" in refusal(bert_copy)


def test_weights_that_are_not_safetensors(bert_copy: Path) -> None:
    (bert_copy / "model.safetensors").write_bytes(b"\xff" * 1000)
    assert "model.safetensors is damaged" in refusal(bert_copy)


def test_damaged_shard_index(bert_copy: Path) -> None:
    (bert_copy / "model.safetensors").unlink()
    (bert_copy / "model.safetensors.index.json").write_text("[]", encoding="utf-8")
    assert "cannot read model.safetensors.index.json" in refusal(bert_copy)


def test_weights_of_another_shape(bert_copy: Path, edit_json: EditJson) -> None:
    edit_json(bert_copy / "config.json", {"intermediate_size": 48})
    assert "does not fit config.json" in refusal(bert_copy)


def test_missing_tokenizer(bert_copy: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (bert_copy / name).unlink()
    assert "the tokenizer is missing" in refusal(bert_copy)


@pytest.mark.parametrize("text", ["{", "{}"])
def test_damaged_tokenizer(bert_copy: Path, text: str) -> None:
    (bert_copy / "tokenizer.json").write_text(text, encoding="utf-8")
    assert "the tokenizer is missing or cannot be read" in refusal(bert_copy)


def test_tokenizer_of_another_model(bert_copy: Path) -> None:
    extra = {f"additional_{i}_token": f"[extra{i}]" for i in range(3)}
    save_tokenizer(bert_copy, BERT_TOKENS | extra)
    assert re.search(r"ids up to \d+, the model only \d+ entries", refusal(bert_copy))


def test_tokenizer_without_separator(bert_copy: Path, edit_json: EditJson) -> None:
    path = bert_copy / "tokenizer_config.json"
    edit_json(path, {"sep_token": None})
    assert "the tokenizer names no [SEP] token" in refusal(bert_copy)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{", "cannot read fastmrc.json"),
        ("[]", "not a JSON object"),
        ('{"format": "int4"}', "format: expected 'int8-per-row' or none, got 'int4'"),
        ('{"normalization": "other"}', "normalization: expected one of none, original"),
        ('{"normalization": []}', "normalization: expected one of none, original"),
        ('{"reading": 1}', "reading: expected an object of options for each kind of reader, got 1"),
        ('{"reading": {"mlm": [2]}}', 'kind of reader, got {"mlm": [2]}'),
        ('{"reading": {"MLM": {}}}', "reading: expected seq2seq, mlm, span, got MLM"),
    ],
)
def test_bad_settings_file(bert_copy: Path, text: str, expected: str) -> None:
    (bert_copy / "fastmrc.json").write_text(text, encoding="utf-8")
    assert expected in refusal(bert_copy)


def test_one_missing_weight(bert_copy: Path) -> None:
    path = bert_copy / "model.safetensors"
    weights = load_file(path)
    del weights["cls.predictions.transform.dense.weight"]
    save_file(weights, path, metadata={"format": "pt"})
    assert "1 weights are missing, such as cls.predictions.transform.dense.weight" in refusal(
        bert_copy
    )
