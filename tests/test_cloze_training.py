"""Training of the cloze reader: sources, batches, the loss, whole runs on tiny models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastmrc import InputError
from fastmrc.cli import main
from fastmrc.cloze import BLANK, ClozeDocument, ClozeReader
from fastmrc.cloze.bilstm import BiLSTMEncoder
from fastmrc.cloze.encoder import ClozeEncoder
from fastmrc.cloze.model import load_cloze_encoder, save_cloze_encoder
from fastmrc.cloze.transformer import TransformerEncoder
from fastmrc.pretrained import load_model
from fastmrc.recipes import zh_cloze
from fastmrc.training import ClozeOptions, TrainingOptions, train
from fastmrc.training.cloze import ClozeBatches, ClozeSource, cloze_targets
from fastmrc.training.job import DataSummary
from fastmrc.training.objectives import batch_loss
from fastmrc.training.options import LossWeights
from fastmrc.training.trainer import ReaderTrainer
from fastmrc.training.word_vectors import learn_vectors

pytest.importorskip("accelerate", reason="training needs the extra `train`")
pytest.importorskip("gensim", reason="training needs the extra `cloze`")
pytestmark = pytest.mark.usefixtures("one_thread")

NAMES = ["大山", "小水", "北京", "上海"]


def story(rng: np.random.Generator) -> list[str]:
    """Words in which some names are before 天气, the others before 时间."""
    parts = [[name, "天气" if i < 2 else "时间", "。"] for i, name in enumerate(NAMES)]
    chosen = [parts[int(rng.integers(0, 2))], parts[int(rng.integers(2, 4))]]
    return [word for i in [*rng.integers(0, 2, 8), 0, 1, 0, 1] for word in chosen[i]]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("cloze")
    rng = np.random.default_rng(0)
    for name, count in (("train", 40), ("held", 20)):
        lines = []
        for i in range(count):
            words = story(rng)
            place = int(
                rng.choice([j for j, w in enumerate(words) if words.count(w) > 2 and w in NAMES])
            )
            blanked = [*words[:place], BLANK, *words[place + 1 :]]
            record = {"id": f"{name}{i}", "words": blanked, "answer": words[place]}
            lines.append(json.dumps(record, ensure_ascii=False) + "\n")
        (folder / f"{name}.jsonl").write_text("".join(lines), "utf-8")
    texts = ["".join(story(rng)) + "\n" for _ in range(20)]
    (folder / "texts.txt").write_text("".join(texts), "utf-8")
    return {name: folder / f"{name}.jsonl" for name in ("train", "held")} | {
        "texts": folder / "texts.txt"
    }


def options_of(encoder: Any = "bilstm", **changes: Any) -> TrainingOptions:
    cloze = {"encoder": encoder, "hidden": 8, "dimension": 16} | changes.pop("cloze", {})
    given = {"batch_size": 4, "max_steps": 4, "eval_steps": 2, "dropout": 0.0, "bfloat16": False}
    return TrainingOptions(task="cloze", cloze_reader=ClozeOptions(**cloze), **given | changes)


def read_source(*paths: Path) -> tuple[ClozeSource, DataSummary]:
    source, summary = ClozeSource(), DataSummary()
    source.read(paths, summary)
    return source, summary


@pytest.fixture(params=["bilstm", "transformer"])
def encoder(request: pytest.FixtureRequest, tiny_bert_dir: Path) -> ClozeEncoder:
    torch.manual_seed(0)
    if request.param == "transformer":
        return TransformerEncoder(load_model(tiny_bert_dir))
    return BiLSTMEncoder([*NAMES, "天气", "时间"], np.eye(7, dtype=np.float32), hidden=4)


def test_what_is_read(data: dict[str, Path], tmp_path: Path) -> None:
    lost = tmp_path / "lost.jsonl"
    records = [
        {"id": "a", "words": [BLANK, "北京"], "answer": "上海"},
        {"id": "b", "words": [BLANK, "北京", BLANK], "answer": "北京"},
        {"id": "c", "words": [BLANK, "北京"]},
        {"id": "d", "words": [BLANK, "北京"], "answer": "北京"},
    ]
    lost.write_text("".join(json.dumps(r) + "\n" for r in records) + "{\n", "utf-8")
    source, summary = read_source(data["train"], data["texts"], lost)
    assert summary.not_found == ["a"] and len(summary.issues) == 3
    assert "expected one blank and its answer, got 2" in str(summary.issues[0])
    assert summary.questions == len(source.documents) == 41
    assert summary.passages == len(source.texts) == 20
    whole = source.all_texts()
    assert len(whole) == 61 and all(BLANK not in words for words in whole)


def test_batches_ask_for_words_that_stay(data: dict[str, Path], encoder: ClozeEncoder) -> None:
    source, _ = read_source(data["train"], data["texts"])
    batches = ClozeBatches(source, encoder, options_of(encoder.kind), 40)
    again = ClozeBatches(source, encoder, options_of(encoder.kind), 40)
    names = set()
    for number in (0, 1, 17, 39):
        batch = batches[number]
        assert batch["ids"] == again[number]["ids"]  # also out of order
        torch.testing.assert_close(batch["targets"], again[number]["targets"])
        torch.testing.assert_close(batch["targets"].sum(dim=1), torch.ones(len(batch["targets"])))
        names |= {name.split()[0].rstrip("0123456789") for name in batch["ids"]}
        for row in batch["rows"]:
            assert not set(row.blanks.tolist()) & set(row.positions.tolist())
    assert names == {"train", "text"}


def test_renamed_words_are_renamed_everywhere(data: dict[str, Path], encoder: ClozeEncoder) -> None:
    source, _ = read_source(data["train"], data["texts"])
    batches = ClozeBatches(source, encoder, options_of(cloze={"rename_share": 1.0}), 4)
    rng = np.random.default_rng(0)
    changed = 0
    for document in source.documents:
        (blank,) = document.blanks
        words, taken = batches._renamed(document.words, {blank: document.answer}, rng)
        new = dict(zip(document.words, words, strict=True))
        assert [new[word] for word in document.words] == list(words)  # one for each
        assert taken[blank] == new.get(document.answer, document.answer)
        assert new["。"] == "。" and new[BLANK] == BLANK
        changed += list(words) != list(document.words)
    assert changed > 3
    for number in range(4):
        targets = batches[number]["targets"]
        torch.testing.assert_close(targets.sum(dim=1), torch.ones(len(targets)))


def test_targets_are_spread_over_the_occurrences(encoder: ClozeEncoder) -> None:
    words = ["北京", "天气", "上海", "北京", "。", "北京"]
    rows = encoder.rows(words, [3])
    targets = cloze_targets(rows, [encoder.word_ids(words)])
    assert rows[0].positions.tolist() == [0, 1, 2, 5]
    assert targets.tolist() == [[0.5, 0.0, 0.0, 0.5]]


def test_the_loss_by_hand(encoder: ClozeEncoder) -> None:
    documents = [["北京", "天气", "北京", "北京"], ["上海", "上海"]]
    rows = [row for words in documents for row in encoder.rows(words, [0])]
    targets = torch.from_numpy(cloze_targets(rows, [encoder.word_ids(w) for w in documents]))
    batch = {"objective": "cloze", "rows": rows, "targets": targets, "ids": ["a", "b"]}
    loss, parts = batch_loss(encoder, batch, LossWeights(), "mean")
    log_probs = encoder(rows).log_softmax(dim=1)
    expected = -(log_probs[0, 1] + log_probs[0, 2]) / 2 - log_probs[1, 0]
    torch.testing.assert_close(loss, expected / 2)
    assert set(parts) == {"attention"}
    loss.backward()
    gradients = [w.grad for w in encoder.parameters() if w.grad is not None]
    assert gradients and all(torch.isfinite(g).all() for g in gradients)


def test_word_vectors() -> None:
    texts = [["北京", "天气"] * 5, ["上海", "天气", "名"] * 3]
    words, vectors = learn_vectors(texts, 6, min_count=3)
    assert words[0] == "天气" and set(words) == {"天气", "北京", "上海", "名"}
    assert vectors.shape == (5, 6) and vectors.dtype == np.float32
    np.testing.assert_allclose(vectors[0], vectors[1:].mean(axis=0), atol=1e-6)
    again = learn_vectors(texts, 6, min_count=3)
    np.testing.assert_array_equal(vectors, again[1])
    with pytest.raises(InputError, match="data: expected words that occur 99 times, got none"):
        learn_vectors(texts, 6, min_count=99)


@pytest.mark.parametrize("match", ["states", "embeddings"])
def test_a_bilstm_learns(match: Any, data: dict[str, Path], tmp_path: Path) -> None:
    cloze = {"match": match, "hidden": 16, "dimension": 32}
    options = options_of(
        max_steps=200, eval_steps=200, learning_rate=0.02, batch_size=16, cloze=cloze
    )
    files = [data["train"], data["texts"]]
    result = train(None, files, tmp_path / "out", options, held_out=data["held"])
    assert result.data.questions == 40 and result.steps == 200
    log = json.loads((tmp_path / "out" / "training_log.json").read_text("utf-8"))
    losses = [entry["loss"] for entry in log if "loss" in entry]
    # Vectors learned from so little are nearly alike, which the query is compared with.
    assert losses[-1] < losses[0] - (0.15 if match == "states" else 0.0)
    reader = ClozeReader.from_pretrained(tmp_path / "out")
    assert reader.fill([*story(np.random.default_rng(9)), BLANK, "天气"]).words
    card = (tmp_path / "out" / "README.md").read_text("utf-8")
    assert "bilstm" in card and "Base: none." in card


def test_a_transformer_is_trained_and_loaded(
    data: dict[str, Path], tiny_bert_dir: Path, tmp_path: Path
) -> None:
    options = options_of("transformer", learning_rate=5e-3)
    output = tmp_path / "out"
    result = train(tiny_bert_dir, [data["train"]], output, options, held_out=data["held"])
    held = [json.loads(line) for line in data["held"].read_text("utf-8").splitlines()]
    answers = ClozeReader.from_pretrained(output).fill_batch([h["words"] for h in held])
    right = [a.text == h["answer"] for a, h in zip(answers, held, strict=True)]
    assert 100 * np.mean(right) == pytest.approx(result.scores["accuracy"])


def test_upper_layers_of_the_packaged_model(data: dict[str, Path], tmp_path: Path) -> None:
    changes = {"layers": 2, "train_layers": 1}
    options = options_of("transformer", max_steps=2, learning_rate=1e-3, cloze=changes)
    output = tmp_path / "out"
    train(None, [data["train"]], output, options)
    assert not (output / "model.safetensors").exists()
    encoder: Any = ClozeReader.from_pretrained(output).encoder
    packaged: Any = load_model().model.base_model
    assert len(encoder.body.encoder.layer) == 2
    lower = [layer.encoder.layer[0].output.dense.weight for layer in (encoder.body, packaged)]
    upper = [layer.encoder.layer[1].output.dense.weight for layer in (encoder.body, packaged)]
    torch.testing.assert_close(*lower)
    assert not torch.equal(*upper)
    # Trained on from there, the lower layer is the packaged one's still.
    train(output, [data["train"]], tmp_path / "on", options)
    assert not (tmp_path / "on" / "model.safetensors").exists()
    onward: Any = load_cloze_encoder(tmp_path / "on")
    assert not torch.equal(onward.pointer.query.weight, encoder.pointer.query.weight)
    # Packaged, as factors of the changes: of full rank the same weights, but for int8.
    name = "body.encoder.layer.1.output.dense.weight"
    weight = encoder.state_dict()[name]
    change = (weight - packaged.state_dict()[name.removeprefix("body.")]).norm()
    for rank, tolerance in ((384, 0.02), (4, 0.9)):
        packed = tmp_path / f"rank{rank}"
        packed.mkdir()
        save_cloze_encoder(encoder, packed, layers=1, rank=rank)
        again = load_cloze_encoder(packed).state_dict()
        assert (again[name] - weight).norm() < tolerance * change
        pointer = encoder.state_dict()["pointer.query.weight"]
        torch.testing.assert_close(again["pointer.query.weight"], pointer, atol=2e-3, rtol=0)
    assert (tmp_path / "rank4" / "cloze.safetensors").stat().st_size < 900_000


@pytest.mark.parametrize("blanks", [1, 8])
def test_long_texts_give_one_input_each(blanks: int, tiny_bert_dir: Path) -> None:
    source = ClozeSource()
    rng = np.random.default_rng(0)
    long_words = ["New York 2024", "北京大山小水上海", "北京", "天气"]
    source.texts = [tuple(rng.choice(long_words, 200).tolist()) for _ in range(5)]
    encoder = TransformerEncoder(load_model(tiny_bert_dir), 40)
    batches = ClozeBatches(source, encoder, options_of("transformer", cloze={"blanks": blanks}), 64)
    for number in range(0, 64, 16):
        assert all(len(row.tokens) <= 40 for row in batches[number]["rows"])


def test_a_run_keeps_the_layers_that_the_one_before_changed(
    data: dict[str, Path], tmp_path: Path
) -> None:
    lower = []
    base = None
    for count, name in ((2, "first"), (1, "second")):
        changes = {"layers": 2, "train_layers": count}
        options = options_of("transformer", max_steps=2, learning_rate=1e-3, cloze=changes)
        train(base, [data["train"]], tmp_path / name, options)
        base = tmp_path / name
        encoder: Any = load_cloze_encoder(base)
        lower.append(encoder.body.encoder.layer[0].output.dense.weight)
    packaged: Any = load_model().model.base_model
    assert not torch.equal(lower[0], packaged.encoder.layer[0].output.dense.weight)
    torch.testing.assert_close(lower[0], lower[1])


class Killed(Exception):
    pass


def test_a_killed_run_goes_on_as_if_it_had_not_been(
    data: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = options_of(max_steps=6)
    train(None, [data["train"]], tmp_path / "whole", options)
    compute = ReaderTrainer.compute_loss

    def dying(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step + 1 == 4:
            raise Killed
        return compute(self, *args, **kwargs)

    monkeypatch.setattr(ReaderTrainer, "compute_loss", dying)
    with pytest.raises(Killed):
        train(None, [data["train"]], tmp_path / "killed", options)
    monkeypatch.setattr(ReaderTrainer, "compute_loss", compute)
    train(None, [data["train"]], tmp_path / "killed", options)
    weights = [
        ClozeReader.from_pretrained(tmp_path / name).encoder.state_dict()
        for name in ("whole", "killed")
    ]
    for name, weight in weights[0].items():
        torch.testing.assert_close(weight, weights[1][name], rtol=0, atol=1e-6)


def test_what_a_run_refuses(data: dict[str, Path], tiny_bert_dir: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty.txt"
    empty.write_text("\n", "utf-8")
    with pytest.raises(InputError, match="data: expected questions with answers or texts"):
        train(None, [empty], tmp_path / "a", options_of())
    empty.write_text("北京的天气\n", "utf-8")
    with pytest.raises(InputError, match="in which a noun-like word occurs twice, got none"):
        train(None, [empty], tmp_path / "b", options_of())
    with pytest.raises(InputError, match="base: expected none for a bilstm"):
        train(tiny_bert_dir, [data["train"]], tmp_path / "c", options_of())
    with pytest.raises(InputError, match="held_out: expected questions with answers"):
        train(None, [data["train"]], tmp_path / "d", options_of(), held_out=empty)
    with pytest.raises(InputError, match="base: expected a directory or hub id for the task mlm"):
        train(None, [data["train"]], tmp_path / "e", TrainingOptions(task="mlm"))
    with pytest.raises(InputError, match="layers: expected 1 to 12, got 99"):
        train(
            None, [data["train"]], tmp_path / "f", options_of("transformer", cloze={"layers": 99})
        )
    with pytest.raises(InputError, match="train_layers: expected 1 to 2, got 3"):
        changes = {"layers": 2, "train_layers": 3}
        train(None, [data["train"]], tmp_path / "g", options_of("transformer", cloze=changes))
    with pytest.raises(InputError, match="layers: expected none for a bilstm, got 3"):
        ClozeOptions(encoder="bilstm", layers=3)
    for wrong in ({"encoder": "cnn"}, {"depth": 0}, {"labelled_share": 1.5}, {"layers": 0}):
        with pytest.raises(InputError, match=f"{next(iter(wrong))}: expected"):
            ClozeOptions(**wrong)  # type: ignore[arg-type]


def test_command_train(data: dict[str, Path], tmp_path: Path, capsys: Any) -> None:
    command = ["train", "--task", "cloze", "--encoder", "bilstm", "--data", str(data["train"])]
    command += ["--output", str(tmp_path / "out"), "--max-steps", "2", "--hidden", "4"]
    assert main([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["data"]["questions"] == 40


def test_the_recipe_divides_by_story(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    folder = tmp_path / "data" / "cmrc2017"
    folder.mkdir(parents=True)
    shared = ["大山 和 小水 一起 去 了 很 远 的 北京 。", "上海 的 天气 今年 冬天 不 太 冷 了 。"]
    query, answers = "", ""
    for i in range(12):
        sentence = (
            shared[i % 2]
            if i < 4
            else f"{' '.join(rng.permutation(list('甲乙丙丁戊己庚辛壬癸子丑')))} 。"
        )
        query += f"1 ||| {sentence}\n2 ||| {BLANK} 在 {i} 。 北京 。\n<qid_{i}> ||| {BLANK}\n"
        answers += f"<qid_{i}> ||| 北京\n"
    (folder / "cloze.doc_query").write_text(query, "utf-8")
    (folder / "cloze.answer").write_text(answers, "utf-8")
    passage = shared[0].replace(" ", "")
    for name in zh_cloze._TEXTS:
        record = {"id": "a", "question": "谁", "passages": [passage, f"{name}的文章。"]}
        (folder.parent / name).write_text(json.dumps(record) + "\n", "utf-8")
    monkeypatch.setattr(zh_cloze, "TEST_QUESTIONS", 6)
    monkeypatch.setattr(zh_cloze, "_DEV_QUESTIONS", 2)
    zh_cloze.prepare_data(folder.parent, tmp_path)

    def lines(name: str) -> list[Any]:
        return [json.loads(x) for x in (tmp_path / f"{name}.jsonl").read_text("utf-8").splitlines()]

    parts = {name: {d["id"] for d in lines(name)} for name in ("train", "dev", "test")}
    assert sum(map(len, parts.values())) == 12 and len(parts["test"]) >= 6
    for story_ids in ({"qid_0", "qid_2"}, {"qid_1", "qid_3"}):
        assert sum(bool(story_ids & part) for part in parts.values()) == 1
    texts = {record["passage"] for record in lines("texts")}
    in_training = "qid_0" in parts["train"]
    assert (passage in texts) == in_training and len(texts) == len(zh_cloze._TEXTS) + in_training
    assert ClozeDocument.of([BLANK]).blanks == (0,)
