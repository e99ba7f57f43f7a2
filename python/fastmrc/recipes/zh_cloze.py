"""Train the cloze readers.

``python -m fastmrc.recipes.zh_cloze --data DIR --work DIR --hours 1.8 --output DIR``

`--data` is a folder with these files:

==========================  ====================================================================
cmrc2017/cloze.doc_query,   CMRC 2017 cloze validation questions (github ymcui/cmrc2017,
cmrc2017/cloze.answer       CC BY-SA 4.0)
cmrc2017_user.jsonl         CMRC 2017 user questions (likewise), whose passages are of the same kind
cmrc2018_trial.jsonl        CMRC 2018 trial set (github ymcui/cmrc2018, CC BY-SA 4.0)
drcd_dev_simp.jsonl,        DRCD in Simplified Chinese (github DRCKnowledgeTeam/DRCD,
drcd_test_simp.jsonl        CC BY-SA 3.0)
chinesesquad_dev.jsonl      ChineseSquad (github pluto-junzeng/ChineseSquad, after SQuAD,
                            CC BY-SA 4.0)
xquad_zh.jsonl              XQuAD (github google-deepmind/xquad, CC BY-SA 4.0)
==========================  ====================================================================

Many questions of CMRC 2017 are on the same stories. The questions are therefore divided by story:
those that share a sentence stay together. `TEST_QUESTIONS` are kept for the test, some for choices
(``dev``), and passages that share a sentence with either are left out of the training.

The packaged model is the transformer, the mean of two stages of training: the first eight layers of
the packaged reader, whose changes are kept as factors of rank `RANK`.
"""

from __future__ import annotations

import argparse
import json
import random
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from fastmrc.cloze.documents import BLANK, ClozeDocument, read_cloze
from fastmrc.cloze.model import load_cloze_encoder, save_cloze_encoder
from fastmrc.corpus import corpus_texts, searched_texts
from fastmrc.data import DataIssue
from fastmrc.model_files import new_directory
from fastmrc.training import ClozeOptions, TrainingOptions, train
from fastmrc.training.run import is_finished

__all__ = [
    "BILSTM",
    "RANK",
    "RENAMED",
    "TEST_QUESTIONS",
    "TRANSFORMER",
    "main",
    "package_model",
    "prepare_data",
]

TEST_QUESTIONS = 720
_DEV_QUESTIONS = 60
RANK = 80
# Shorter ones may be alike by chance.
_SENTENCE = 12
# Files of texts and how often each is seen in a pass.
_TEXTS = {
    "cmrc2017_user.jsonl": 2,
    "drcd_dev_simp.jsonl": 1,
    "drcd_test_simp.jsonl": 1,
    "cmrc2018_trial.jsonl": 1,
    "chinesesquad_dev.jsonl": 1,
    "xquad_zh.jsonl": 1,
}

TRANSFORMER = TrainingOptions(
    task="cloze",
    batch_size=8,
    learning_rate=2e-4,
    dropout=0.0,
    eval_steps=500,
    cloze_reader=ClozeOptions(layers=8, train_layers=8, blanks=12, labelled_share=0.4),
)
# Then against learning the stories by heart. Dropout would turn torch's fused attention off on a
# CPU: 18 batches a minute instead of 50.
RENAMED = replace(
    TRANSFORMER,
    learning_rate=1.5e-4,
    seed=1,
    cloze_reader=replace(TRANSFORMER.cloze_reader, rename_share=0.5),
)
_FIRST_SHARE = 0.44
BILSTM = replace(
    TRANSFORMER,
    batch_size=64,
    learning_rate=2e-3,
    cloze_reader=ClozeOptions(encoder="bilstm", labelled_share=0.4, rename_share=0.5),
)


def prepare_data(data: Path, work: Path) -> None:
    """Write ``train.jsonl``, ``dev.jsonl``, ``test.jsonl`` and ``texts.jsonl`` below `work`."""
    documents = list(read_cloze(data / "cmrc2017" / "cloze.doc_query"))
    stories = _stories(documents)
    random.Random(0).shuffle(stories)
    parts: dict[str, list[ClozeDocument]] = {"test": [], "dev": [], "train": []}
    for story in stories:
        if len(parts["test"]) < TEST_QUESTIONS:
            parts["test"] += story
        elif len(parts["dev"]) < _DEV_QUESTIONS:
            parts["dev"] += story
        else:
            parts["train"] += story
    for name, part in parts.items():
        lines = (
            {"id": document.id, "words": document.words, "answer": document.answer}
            for document in part
        )
        _write_lines(work / f"{name}.jsonl", lines)
    kept = {s for d in (*parts["test"], *parts["dev"]) for s in _sentences(d)}
    texts = []
    for name, repeats in _TEXTS.items():
        texts_of = corpus_texts([data / name], on_error=_pass_over, of_record=searched_texts)
        own = dict.fromkeys(texts_of)
        sound = [text for text in own if not any(sentence in text for sentence in kept)]
        texts += sound * repeats
    _write_lines(work / "texts.jsonl", ({"passage": text} for text in texts))


def _pass_over(issue: DataIssue) -> None:
    """Leave out a record without a question: its neighbours have the same passage."""


def _sentences(document: ClozeDocument) -> set[str]:
    """Return the longer sentences of a document, without the one with the blank."""
    sentences = "".join(document.words).replace("。", "\n").replace("！", "\n").split("\n")  # noqa: RUF001
    return {s for s in sentences if len(s) >= _SENTENCE and BLANK not in s}


def _stories(documents: Sequence[ClozeDocument]) -> list[list[ClozeDocument]]:
    """Divide documents into groups that share no sentence."""
    group = list(range(len(documents)))

    def root(i: int) -> int:
        while group[i] != i:
            i = group[i]
        return i

    first: dict[str, int] = {}
    for i, document in enumerate(documents):
        for sentence in _sentences(document):
            group[root(i)] = root(first.setdefault(sentence, i))
    stories: dict[int, list[ClozeDocument]] = defaultdict(list)
    for i, document in enumerate(documents):
        stories[root(i)].append(document)
    return list(stories.values())


def _write_lines(path: Path, values: Iterable[object]) -> None:
    part = path.with_suffix(".part")
    with open(part, "w", encoding="utf-8") as file:
        for value in values:
            file.write(json.dumps(value, ensure_ascii=False) + "\n")
    part.replace(path)


def package_model(trained: Sequence[Path], output: Path, rank: int = RANK) -> None:
    """Write the mean of trained transformers as changes of the packaged reader."""
    encoders = [load_cloze_encoder(path) for path in trained]
    weights = [encoder.state_dict() for encoder in encoders]
    mean = {n: torch.stack([own[n] for own in weights]).mean(dim=0) for n in weights[0]}
    encoders[0].load_state_dict(mean)
    with new_directory(output) as directory:
        layers = TRANSFORMER.cloze_reader.train_layers
        save_cloze_encoder(encoders[0], directory, layers=layers, rank=rank)


def main() -> None:
    """Prepare the data, train and package; run again, it goes on where it stopped."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--data", required=True, type=Path)
    parser.add_argument("--work", required=True, type=Path)
    parser.add_argument("--encoder", choices=("transformer", "bilstm"), default="transformer")
    parser.add_argument("--hours", type=float, default=1.0)
    parser.add_argument("--output", type=Path, help="where the transformer is packaged")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    if not (args.work / "texts.jsonl").exists():
        prepare_data(args.data, args.work)
    if args.encoder == "bilstm":
        _train(args.work, "bilstm", None, replace(BILSTM, max_hours=args.hours))
        return
    first = replace(TRANSFORMER, max_hours=_FIRST_SHARE * args.hours)
    base = _train(args.work, "transformer", None, first)
    second = replace(RENAMED, max_hours=(1 - _FIRST_SHARE) * args.hours)
    trained = _train(args.work, "renamed", base, second)
    if args.output is not None:
        package_model([base, trained], args.output)


def _train(work: Path, name: str, base: Path | None, options: TrainingOptions) -> Path:
    """Train one stage, if it is not finished; the weights of the last step are kept, as the few
    questions that are left for choices would choose by chance."""
    output = work / name
    if not is_finished(output):
        data = [work / "train.jsonl", work / "texts.jsonl"]
        train(base, data, output, options, progress=True)
    return output


if __name__ == "__main__":
    main()
