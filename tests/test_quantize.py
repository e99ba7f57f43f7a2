"""The int8 form: rounding, files, tied weights, and the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import BERT_TOKENS, save_model
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from fastmrc.errors import InputError, UnsupportedModelError
from fastmrc.int8 import dequantize_rows, load_int8_weights, quantize_rows, save_int8_weights
from fastmrc.pretrained import load_model
from fastmrc.quantize import main, quantize_model
from fastmrc.similarity import SimilarityModel


@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(0, 6),
    columns=st.integers(1, 40),
    exponent=st.integers(-20, 20),
    seed=st.integers(0, 1000),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
)
def test_error_is_half_a_step_at_most(
    rows: int, columns: int, exponent: int, seed: int, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(seed)
    scale = 10.0 ** (exponent if dtype != torch.float16 else exponent / 10)
    weight = (torch.randn(rows, columns, generator=generator) * scale).to(dtype)
    levels, steps = quantize_rows(weight)
    assert levels.dtype == torch.int8
    assert steps.dtype == torch.float32
    assert levels.shape == weight.shape
    restored = dequantize_rows(levels, steps)
    error = (restored.double() - weight.double()).abs()
    assert (error <= 0.5 * steps.double()[:, None] * (1 + 1e-5)).all()
    assert (levels.abs().amax(dim=1) == 127).all()


def test_halves_go_to_the_even_level() -> None:
    levels, scale = quantize_rows(torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5]]))
    assert scale.tolist() == [1.0]
    assert levels.tolist() == [[127, 0, 2, 2, 0, -2]]


def test_row_of_zeros() -> None:
    levels, scale = quantize_rows(torch.tensor([[0.0, -0.0], [2.0, -1.0]]))
    assert scale[0] == 0
    assert dequantize_rows(levels, scale)[0].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite(bad: float, tmp_path: Path) -> None:
    weight = torch.tensor([[1.0, bad]])
    with pytest.raises(InputError, match="expected finite numbers"):
        quantize_rows(weight)
    with pytest.raises(InputError, match="layer.weight: weight: expected finite"):
        save_int8_weights({"layer.weight": weight}, tmp_path / "model.safetensors")


@pytest.mark.parametrize("weight", [torch.ones(3), torch.ones(2, 2, dtype=torch.int64)])
def test_only_matrices_are_quantised(weight: torch.Tensor, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="expected a floating-point tensor with 2 dimensions"):
        quantize_rows(weight)
    path = tmp_path / "model.safetensors"
    save_int8_weights({"other": weight}, path)
    assert torch.equal(load_int8_weights(path)["other"], weight)


def test_model_round_trip(tiny_model_dir: Path, tmp_path: Path) -> None:
    quantize_model(tiny_model_dir, tmp_path)
    before = load_model(tiny_model_dir)
    after = load_model(tmp_path)
    assert type(after.model) is type(before.model)
    assert after.tokenizer.get_vocab() == before.tokenizer.get_vocab()
    stored = load_file(tmp_path / "model.safetensors")
    state = before.model.state_dict()
    for name, weight in after.model.state_dict().items():
        if weight.ndim == 2:
            step = state[name].abs().amax(dim=1, keepdim=True) / 127
            assert ((weight - state[name]).abs() <= 0.5 * step * (1 + 1e-5)).all()
        else:
            assert torch.equal(weight, state[name])
    tied = set(before.model.all_tied_weights_keys)
    assert tied
    assert not tied & set(stored)
    assert {stored[n].dtype for n in stored if n.endswith(".scale")} == {torch.float32}
    matrices = [t for t in stored.values() if t.ndim == 2]
    assert {t.dtype for t in matrices} == {torch.int8}


def test_written_files(bert_copy: Path, tmp_path: Path) -> None:
    config = json.loads((bert_copy / "config.json").read_text(encoding="utf-8"))
    config["_name_or_path"] = str(bert_copy)
    (bert_copy / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (bert_copy / "fastmrc.json").write_text('{"normalization": "original"}', encoding="utf-8")
    output = tmp_path / "new" / "int8"
    quantize_model(str(bert_copy), str(output))
    assert {path.name for path in output.iterdir()} == {
        "config.json",
        "fastmrc.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    settings_file = json.loads((output / "fastmrc.json").read_text(encoding="utf-8"))
    assert settings_file == {"format": "int8-per-row", "normalization": "original"}
    assert str(tmp_path) not in (output / "config.json").read_text(encoding="utf-8")
    again = tmp_path / "again"
    quantize_model(output, again)
    first, second = (load_file(d / "model.safetensors") for d in (output, again))
    assert all(torch.equal(first[n], second[n]) for n in first if not n.endswith(".scale"))


def test_source_must_differ_from_output(bert_copy: Path) -> None:
    with pytest.raises(InputError, match="output_dir: expected another directory"):
        quantize_model(bert_copy, bert_copy / ".")


@pytest.mark.parametrize("change", ["drop", "shorten"])
def test_int8_without_its_scale(tiny_bert_dir: Path, tmp_path: Path, change: str) -> None:
    quantize_model(tiny_bert_dir, tmp_path)
    path = tmp_path / "model.safetensors"
    stored = load_file(path)
    name = "bert.embeddings.position_embeddings.weight"
    scale = stored.pop(f"{name}.scale")
    if change == "shorten":
        stored[f"{name}.scale"] = scale[:-1].clone()
    save_file(stored, path)
    with pytest.raises(UnsupportedModelError, match=f"scale per row for the int8 tensor {name}"):
        load_model(tmp_path)


def test_truncated_int8_weights(tiny_bert_dir: Path, tmp_path: Path) -> None:
    quantize_model(tiny_bert_dir, tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(UnsupportedModelError, match="damaged or not complete"):
        load_model(tmp_path)


def test_command_line(
    tiny_bert_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(tiny_bert_dir), str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "model.safetensors").is_file()
    assert main([str(tmp_path / "none"), str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "there is no directory" in error


def test_the_pooler_stays(tmp_path: Path) -> None:
    source = save_model(tmp_path / "source", "BertForPreTraining", BERT_TOKENS)
    quantize_model(source, tmp_path / "int8")
    texts = ["北京天气", "水"]
    vectors = []
    for directory in (source, tmp_path / "int8"):
        model = SimilarityModel.from_pretrained(directory)
        assert model.pooling == "linear"
        vectors.append(model.encode(texts))
    assert (vectors[0] * vectors[1]).sum(axis=1).min() > 0.99
