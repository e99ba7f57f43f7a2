"""Checkpoints in the layouts of TensorFlow and bert4torch."""

from __future__ import annotations

import json
import re
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import fastmrc
from fastmrc import InputError
from fastmrc.cli import main
from fastmrc.integrations.checkpoints import convert_checkpoint
from fastmrc.integrations.tf_checkpoint import TensorBundle, bundle_prefix
from fastmrc.pretrained import load_model

# --- a writer of TensorFlow's format, for tests --------------------------------------------------

DTYPES = {"float32": 1, "float64": 2, "int32": 3, "int64": 9, "float16": 19}


def _varint(value: int) -> bytes:
    out = b""
    while value >= 0x80:
        out += bytes([value & 0x7F | 0x80])
        value >>= 7
    return out + bytes([value])


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value) if value else b""


def _message(field: int, value: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(value)) + value


def _entry(array: NDArray[Any], offset: int) -> bytes:
    shape = b"".join(_message(2, _number(1, size)) for size in array.shape)
    return (
        _number(1, DTYPES[array.dtype.name])
        + _message(2, shape)
        + _number(4, offset)
        + _number(5, array.nbytes)
        + _varint(6 << 3 | 5)
        + b"\0\0\0\0"
    )


def _block(pairs: list[tuple[bytes, bytes]]) -> bytes:
    """Write entries whose keys share their beginnings, from every fourth on anew."""
    out, restarts, before = b"", [], b""
    for i, (key, value) in enumerate(pairs):
        if i % 4 == 0:
            restarts.append(len(out))
            before = b""
        shared = 0
        while shared < min(len(before), len(key)) and before[shared] == key[shared]:
            shared += 1
        out += _varint(shared) + _varint(len(key) - shared) + _varint(len(value))
        out += key[shared:] + value
        before = key
    return out + b"".join(struct.pack("<I", r) for r in restarts) + struct.pack("<I", len(restarts))


def write_bundle(prefix: Path, tensors: dict[str, NDArray[Any]]) -> None:
    data, pairs = b"", [(b"", _number(1, 1))]
    for name in sorted(tensors):
        array = np.ascontiguousarray(tensors[name])
        pairs.append((name.encode(), _entry(array, len(data))))
        data += array.tobytes()
    Path(f"{prefix}.data-00000-of-00001").write_bytes(data)
    table, index = b"", []
    for first in range(0, len(pairs), 10):  # several blocks
        part = pairs[first : first + 10]
        block = _block(part)
        index.append((part[-1][0], _varint(len(table)) + _varint(len(block))))
        table += block + b"\0" * 5
    places = []
    for block in (_block([]), _block(index)):
        places.append(_varint(len(table)) + _varint(len(block)))
        table += block + b"\0" * 5
    footer = b"".join(places).ljust(40, b"\0") + struct.pack("<Q", 0xDB4775248B80FB57)
    Path(f"{prefix}.index").write_bytes(table + footer)


# --- the same weights in three layouts -----------------------------------------------------------


def _weights(directory: Path) -> dict[str, torch.Tensor]:
    state = load_model(directory).model.state_dict()
    hidden = state["bert.encoder.layer.0.output.dense.bias"].shape[0]
    generator = torch.Generator().manual_seed(3)
    state["bert.pooler.dense.weight"] = torch.randn(hidden, hidden, generator=generator)
    state["bert.pooler.dense.bias"] = torch.randn(hidden, generator=generator)
    skipped = ("cls.predictions.decoder.", "bert.embeddings.position_ids")
    return {name: tensor for name, tensor in state.items() if not name.startswith(skipped)}


def _tensorflow(weights: dict[str, torch.Tensor]) -> dict[str, NDArray[Any]]:
    tensors: dict[str, NDArray[Any]] = {"global_step": np.array(7, np.int64)}
    for name, tensor in weights.items():
        array, own = tensor.numpy(), re.sub(r"\.layer\.(\d+)\.", r".layer_\1.", name)
        parts = own.split(".")
        if parts[-2] == "LayerNorm":
            parts[-1] = {"weight": "gamma", "bias": "beta"}[parts[-1]]
        elif parts[-2].endswith("_embeddings"):
            del parts[-1]
        elif own == "cls.predictions.bias":
            parts[-1] = "output_bias"
        elif parts[-1] == "weight":
            parts[-1], array = "kernel", array.T
        tensors["/".join(parts)] = array
        tensors["/".join([*parts, "adam_m"])] = array * 0
    return tensors


def _bert4torch(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    names = [
        ("bert.embeddings.token_type_embeddings", "embeddings.segment_embeddings"),
        ("bert.embeddings.LayerNorm", "embeddings.layerNorm"),
        ("bert.embeddings", "embeddings"),
        ("attention.self.query", "multiHeadAttention.q"),
        ("attention.self.key", "multiHeadAttention.k"),
        ("attention.self.value", "multiHeadAttention.v"),
        ("attention.output.dense", "multiHeadAttention.o"),
        ("attention.output.LayerNorm", "attnLayerNorm"),
        ("intermediate.dense", "feedForward.intermediateDense"),
        ("output.LayerNorm", "ffnLayerNorm"),
        ("output.dense", "feedForward.outputDense"),
        ("bert.encoder.layer", "encoderLayer"),
        ("bert.pooler.dense", "pooler"),
        ("cls.predictions.transform.dense", "mlmDense"),
        ("cls.predictions.transform.LayerNorm", "mlmLayerNorm"),
        ("cls.predictions.bias", "mlmBias"),
    ]
    renamed = {}
    for name, tensor in weights.items():
        for theirs, ours in names:
            name = name.replace(theirs, ours)
        renamed[name] = tensor
    renamed["mlmDecoder.weight"] = renamed["embeddings.word_embeddings.weight"].clone()
    renamed["mlmDecoder.bias"] = renamed["mlmBias"].clone()
    return renamed


@pytest.fixture
def source(tiny_bert_dir: Path, tmp_path: Path) -> Path:
    """Configuration and vocabulary of the tiny model, as they lie beside a checkpoint."""
    folder = tmp_path / "source"
    folder.mkdir()
    config = json.loads((tiny_bert_dir / "config.json").read_text(encoding="utf-8"))
    kept = {name: value for name, value in config.items() if name != "architectures"}
    (folder / "bert_config.json").write_text(json.dumps(kept), encoding="utf-8")
    vocabulary = load_model(tiny_bert_dir).tokenizer.get_vocab()
    words = sorted(vocabulary, key=lambda word: int(vocabulary[word]))
    (folder / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    return folder


@pytest.mark.parametrize("layout", ["tensorflow", "bert4torch", "bert4torch safetensors"])
def test_the_model_is_the_same(
    tiny_bert_dir: Path, source: Path, tmp_path: Path, layout: str
) -> None:
    from safetensors.torch import save_file

    weights = _weights(tiny_bert_dir)
    if layout == "tensorflow":
        given = source / "bert_model.ckpt"
        write_bundle(given, _tensorflow(weights))
    elif layout == "bert4torch":
        given = source / "pytorch_model.bin"
        torch.save(_bert4torch(weights), given)
    else:
        given = source / "model.safetensors"
        save_file({name: t.clone() for name, t in _bert4torch(weights).items()}, given)
    output = convert_checkpoint(given, tmp_path / "new" / "model")
    ours, theirs = load_model(output), load_model(tiny_bert_dir)
    for name, tensor in theirs.model.state_dict().items():
        assert torch.equal(ours.model.state_dict()[name], tensor), name
    for text in ("北京在New York 2024", "!"):
        encode: tuple[Any, Any] = ours.tokenizer, theirs.tokenizer
        assert encode[0](text)["input_ids"] == encode[1](text)["input_ids"]
    passages = ["中国北京在二月天气大", "上海New York山水"]
    answers = [
        fastmrc.Seq2SeqReader.from_pretrained(path).answer("北京在哪里?", passages).text
        for path in (output, tiny_bert_dir)
    ]
    assert answers[0] == answers[1]
    model = fastmrc.SimilarityModel.from_pretrained(output)
    assert model.pooling == "linear"  # the pooler came along
    assert model.encode(["北京"]).shape == (1, model.dimension)


def test_what_tensorflow_writes(tmp_path: Path) -> None:
    tf = pytest.importorskip("tensorflow")
    prefix = str(tmp_path / "model.ckpt")
    arrays = {f"scope/kernel_{i}": np.full((2, i % 3 + 1), i, np.float32) for i in range(100)}
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        for name, array in arrays.items():
            tf.compat.v1.get_variable(name, initializer=array)
        session.run(tf.compat.v1.global_variables_initializer())
        tf.compat.v1.train.Saver().save(session, prefix)
    bundle = TensorBundle(Path(prefix))
    assert bundle.names == sorted(arrays)
    for name, array in arrays.items():
        np.testing.assert_array_equal(bundle.read(name), array)


def test_places_of_a_checkpoint(tmp_path: Path) -> None:
    prefix = tmp_path / "bert_model.ckpt"
    assert bundle_prefix(prefix) is None and bundle_prefix(tmp_path) is None
    tensors = {
        "a": np.array([1.5, -2], np.float16),
        "b/c": np.arange(6, dtype=np.int32).reshape(2, 3),
        "d": np.array(3, np.int64),
    }
    write_bundle(prefix, tensors)
    for place in (prefix, tmp_path, Path(f"{prefix}.index")):
        assert bundle_prefix(place) == prefix
    bundle = TensorBundle(prefix)
    for name, array in tensors.items():
        np.testing.assert_array_equal(bundle.read(name), array)
    write_bundle(tmp_path / "other.ckpt", tensors)
    assert bundle_prefix(tmp_path) is None  # which one?


def _truncate(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda s: _truncate(s / "bert_model.ckpt.index", 60), "not an index of a TensorFlow"),
        (lambda s: (s / "bert_model.ckpt.index").write_bytes(b""), "not an index of a TensorFlow"),
        (
            lambda s: _truncate(s / "bert_model.ckpt.data-00000-of-00001", 1000),
            "expected .* bytes of",
        ),
        (
            lambda s: (s / "bert_model.ckpt.data-00000-of-00001").unlink(),
            "cannot be read",
        ),
        (lambda s: (s / "vocab.txt").unlink(), "vocabulary: expected a file with one token a line"),
        (lambda s: (s / "vocab.txt").write_text("[UNK]\n"), "vocabulary: .* lacks \\[SEP\\]"),
        (lambda s: (s / "bert_config.json").unlink(), "config: expected a JSON file of the model"),
        (lambda s: (s / "bert_config.json").write_text("{"), "cannot be read as the configuration"),
        (
            lambda s: (s / "bert_config.json").write_text(
                (s / "bert_config.json")
                .read_text()
                .replace('"num_hidden_layers": 2', '"num_hidden_layers": 3')
            ),
            "expected the tensor bert.encoder.layer.2.* more, which it lacks",
        ),
        (
            lambda s: (s / "bert_config.json").write_text(
                (s / "bert_config.json")
                .read_text()
                .replace('"hidden_size": 32', '"hidden_size": 64')
            ),
            "expected bert.* of shape .* by the configuration, got",
        ),
    ],
)
def test_what_is_refused(
    tiny_bert_dir: Path, source: Path, tmp_path: Path, break_it: Any, message: str
) -> None:
    write_bundle(source / "bert_model.ckpt", _tensorflow(_weights(tiny_bert_dir)))
    break_it(source)
    with pytest.raises(InputError, match=message):
        convert_checkpoint(source / "bert_model.ckpt.index", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_files_that_are_no_weights(source: Path, tmp_path: Path, tiny_bert_dir: Path) -> None:
    for given, message in (
        (source / "nothing", "source: expected a TensorFlow checkpoint"),
        (source / "vocab.txt", "cannot be read as weights|expected weights only"),
        (tiny_bert_dir / "model.safetensors", "expected the names of bert4torch"),
    ):
        with pytest.raises(InputError, match=message):
            convert_checkpoint(given, tmp_path / "out")
    torch.save([1, 2], source / "list.pt")
    with pytest.raises(InputError, match="expected a dictionary of tensors"):
        convert_checkpoint(source / "list.pt", tmp_path / "out")

    class Harmful:
        def __reduce__(self) -> Any:
            return (print, ("executed",))

    torch.save({"encoderLayer.0": Harmful()}, source / "harmful.pt")
    with pytest.raises(InputError, match="expected weights only"):
        convert_checkpoint(source / "harmful.pt", tmp_path / "out")


def test_command(tiny_bert_dir: Path, source: Path, tmp_path: Path, capsys: Any) -> None:
    write_bundle(source / "bert_model.ckpt", _tensorflow(_weights(tiny_bert_dir)))
    output = tmp_path / "out"
    assert main(["convert", str(source / "bert_model.ckpt"), str(output), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"output": str(output)}
    assert main(["convert", str(source / "bert_model.ckpt"), str(output)]) == 2
    assert "expected a new or empty directory" in capsys.readouterr().err
    assert main(["convert", str(source), str(tmp_path / "cased"), "--cased"]) == 0
    assert load_model(tmp_path / "cased").tokenizer.tokenize("N") == ["[UNK]"]
