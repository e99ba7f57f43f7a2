"""Make the packaged model.

``python -m fastmrc.recipes.zh_reader --data DIR --base DIR --work DIR --output DIR --hours 4``

`--data` is a folder with these files, in the format of `fastmrc.data` (one JSON object a line):

==========================  ====================================================================
cmrc2018_trial.jsonl        CMRC 2018 trial set (github ymcui/cmrc2018, CC BY-SA 4.0)
drcd_dev_simp.jsonl,        DRCD in Simplified Chinese (github DRCKnowledgeTeam/DRCD,
drcd_test_simp.jsonl        CC BY-SA 3.0)
cmrc2017_user.jsonl         CMRC 2017 user questions (github ymcui/cmrc2017, CC BY-SA 4.0)
chinesesquad_dev.jsonl      ChineseSquad (github pluto-junzeng/ChineseSquad, after SQuAD,
                            CC BY-SA 4.0)
xquad_zh.jsonl              XQuAD (github google-deepmind/xquad, CC BY-SA 4.0)
paraphrase_pairs.jsonl      pairs of questions that translate the same SQuAD question
==========================  ====================================================================

`--base` is a BERT-like encoder with a masked-LM layout; that of the packaged model is
intfloat/multilingual-e5-small (MIT) with its vocabulary cut to Chinese characters.

Every step leaves a folder below ``--work``; run again, the recipe goes on where it stopped. The
development set of CMRC 2018 plays no part in it.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import shutil
import string
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from fastmrc.errors import InputError, TrainingError
from fastmrc.mining import mine_pairs
from fastmrc.model_files import check_new_directory, new_directory, write_json, write_weights
from fastmrc.pretrained import SETTINGS_FILE
from fastmrc.quantize import quantize_model
from fastmrc.similarity import SimilarityModel
from fastmrc.training import LossWeights, TrainingOptions, WindowOptions, train
from fastmrc.training.run import is_finished

__all__ = [
    "LONG",
    "READING",
    "REJECT",
    "RETRIEVE",
    "SHORT",
    "average_weights",
    "main",
    "make_model",
    "prepare_data",
    "read_full_width",
    "write_pairs",
]

Record = dict[str, Any]

# Passages whose questions are held out for choices, from the end of each file.
_HELD_OUT = {"cmrc2018_trial.jsonl": 60, "drcd_test_simp.jsonl": 20}
_AS_THEY_ARE = (
    "drcd_dev_simp.jsonl",
    "cmrc2017_user.jsonl",
    "xquad_zh.jsonl",
    "paraphrase_pairs.jsonl",
)
# The trial set is nearest to what the reader is for, and small.
_TRIAL_REPEATS = 3
# It has more questions without an answer than with one.
_THINNED = "chinesesquad_dev.jsonl"
_KEPT_UNANSWERED = 3  # one in so many

# From an ASCII character to its full-width form.
_FULL_WIDTH = 0xFEE0

# Short windows first: they cost less, and where the answer is and how to copy it is learned from
# them as well.
SHORT = TrainingOptions(
    task="mixed",
    batch_size=16,
    learning_rate=2.5e-4,
    warmup=0.03,
    dropout=0.0,
    copy_heads=6,
    cloze=0.15,
    simbert_share=0.0625,
    retrieval_share=0.0,
    eval_questions=60,
    eval_steps=1000,
    windows=WindowOptions(window_tokens=(48, 144), negatives=0.2, distractors=0.04),
    losses=LossWeights(passage=0.5, attention=1.0),
)
LONG = replace(
    SHORT,
    learning_rate=1e-4,
    copy_heads=0,
    cloze=0.05,
    seed=1,
    windows=replace(SHORT.windows, window_tokens=(64, 254), negatives=0.25, distractors=0.08),
    losses=replace(SHORT.losses, attention=0.5),
)
# At last many passages without an answer, as a reader of several passages meets them.
REJECT = replace(
    LONG,
    learning_rate=1.5e-4,
    mlm_share=0.6,  # all slots at once is learned later than one token after the other
    eval_steps=2000,
    seed=2,
    windows=replace(LONG.windows, negatives=0.2, distractors=0.2),
)

# Then the vectors, which the stages before it have let drift, and similar sentences.
RETRIEVE = replace(
    REJECT,
    learning_rate=1e-4,
    simbert_share=0.09375,
    retrieval_share=0.375,
    mask_share=0.1,
    eval_questions=80,
    eval_steps=300,
    seed=3,
)
# Least cosine, by the base's vectors, of two questions that are taken for similar ones.
MIN_COSINE = 0.96

# Chosen on the held-out questions, with one passage and with five.
_WINDOWS = {"max_passage_tokens": 144, "stride": 72, "no_answer_ratio": 2.0}
READING = {"seq2seq": _WINDOWS, "mlm": _WINDOWS}


def prepare_data(source: Path, output: Path) -> tuple[list[Path], Path]:
    """Split and thin the data; return the files to train on and the held-out file."""
    needed = (*_AS_THEY_ARE, *_HELD_OUT, _THINNED)
    missing = [name for name in needed if not (source / name).is_file()]
    if missing:
        raise InputError(f"{source}: has not the recipe's data sets {', '.join(missing)}")
    output.mkdir(parents=True, exist_ok=True)
    files = {name: _read(source / name) for name in _AS_THEY_ARE}
    held_out = []
    for name, passages in _HELD_OUT.items():
        files[name], held = _split(_read(source / name), passages)
        held_out.append(held)
    files[_THINNED] = _thin(_read(source / _THINNED))
    for name, records in files.items():
        _write(output / name, records)
    for records in held_out:
        random.Random(0).shuffle(records)
    # One of each in turn, so that any number from the beginning holds both.
    mixed = [record for both in zip_longest(*held_out) for record in both if record is not None]
    _write(output / "held_out.jsonl", mixed)
    training = [output / name for name in files]
    training += [output / "cmrc2018_trial.jsonl"] * (_TRIAL_REPEATS - 1)
    return training, output / "held_out.jsonl"


def make_model(
    source: Path, base: str, work: Path, output: Path, hours: float, say: Callable[[str], None]
) -> None:
    """Run the whole recipe, from the data to a model with its cards.

    Parameters
    ----------
    source, base
        Folder of the data, and the encoder to begin with.
    work
        Folder for what comes between.
    output
        Of the model, new.
    hours
        For the four stages of training together.
    say
        Called with each step.
    """
    check_new_directory(output)
    say("data")
    training, held_out = prepare_data(source, work / "data")
    pairs = work / "data" / "mined_pairs.jsonl"
    if not pairs.is_file():
        say("pairs of similar questions")
        write_pairs(base, training, pairs)
    stages = [
        ("short", SHORT, 0.39, training),
        ("long", LONG, 0.13, training),
        ("reject", REJECT, 0.27, training),
        ("retrieve", RETRIEVE, 0.21, [*training, pairs]),
    ]
    for name, options, share, files in stages:
        if not is_finished(work / name):
            say(f"training, stage {name}")
            options = replace(options, max_hours=hours * share)
            train(base, files, work / name, options, held_out=held_out, progress=True)
        base = str(work / name)
    say("average")
    average_weights(work / "reject", work / "retrieve", work / "average")
    say("int8")
    with new_directory(output) as directory:
        quantize_model(work / "average", directory)
        read_full_width(directory / "tokenizer.json")
        settings = json.loads((directory / SETTINGS_FILE).read_text(encoding="utf-8"))
        write_json(directory / SETTINGS_FILE, settings | {"reading": READING})
        cards = [(work / stage[0] / "README.md").read_text(encoding="utf-8") for stage in stages]
        (directory / "README.md").write_text("\n".join(cards), encoding="utf-8")


def write_pairs(base: str, files: Sequence[Path], output: Path) -> None:
    """Write the pairs of questions that are nearest to each other by the vectors of the base."""
    model = SimilarityModel.from_pretrained(base, pooling="mean")
    records = [record for file in files for record in _read(file)]
    questions = [record["question"].strip() for record in records if "question" in record]
    mined = mine_pairs(questions, model, MIN_COSINE, progress=True)
    _write(output, ({"text": pair.text, "synonyms": [pair.synonym]} for pair in mined))


def average_weights(first: Path, second: Path, output: Path) -> None:
    """Write the second model with the mean of both models' weights.

    Between a model and what it was fine-tuned to lie some that are better at both (Wortsman et al.
    2022, "Robust fine-tuning of zero-shot models").
    """
    shutil.copytree(second, output, dirs_exist_ok=True)
    pair = [load_file(directory / "model.safetensors") for directory in (first, second)]
    mean = {name: (pair[0][name] + pair[1][name]) / 2 for name in pair[0]}
    write_weights(output / "model.safetensors", mean)


def read_full_width(path: Path) -> None:
    """Let a tokenizer file read full-width letters and digits as half-width ones, not as [UNK]."""
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    replaced = [
        {"type": "Replace", "pattern": {"String": chr(ord(c) + _FULL_WIDTH)}, "content": c}
        for c in string.digits + string.ascii_lowercase
    ]
    normalizers = [tokenizer["normalizer"], *replaced]  # the first one lower-cases
    tokenizer["normalizer"] = {"type": "Sequence", "normalizers": normalizers}
    write_json(path, tokenizer)


def _split(records: Sequence[Record], passages: int) -> tuple[list[Record], list[Record]]:
    """Keep the questions on the last passages apart."""
    texts = list(dict.fromkeys(_passage(record) for record in records))
    held = set(texts[-passages:])
    return (
        [record for record in records if _passage(record) not in held],
        [record for record in records if _passage(record) in held],
    )


def _thin(records: Iterable[Record]) -> list[Record]:
    """Drop most of the questions without an answer."""
    kept, unanswered = [], 0
    for record in records:
        if not record["passages"][0]["answer"]:
            unanswered += 1
            if unanswered % _KEPT_UNANSWERED:
                continue
        kept.append(record)
    return kept


def _passage(record: Record) -> str:
    return str(record["passages"][0]["passage"])


def _read(path: Path) -> list[Record]:
    try:
        with open(path, encoding="utf-8") as file:
            records = [json.loads(line) for line in file if line.strip()]
    except ValueError as error:
        raise InputError(f"{path}: not JSON lines in UTF-8 ({error})") from None
    if not all(isinstance(record, dict) for record in records):
        raise InputError(f"{path}: expected one JSON object a line")
    # One question of the trial set is blank.
    return [record for record in records if record.get("question", "?").strip()]


def _write(path: Path, records: Iterable[Record]) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit code."""
    parser = argparse.ArgumentParser(prog="python -m fastmrc.recipes.zh_reader")
    parser.add_argument("--data", required=True, type=Path, help="folder of the data sets")
    parser.add_argument("--base", required=True, help="directory or hub id of the encoder")
    parser.add_argument("--work", required=True, type=Path, help="folder for what comes between")
    parser.add_argument("--output", required=True, type=Path, help="directory of the model")
    parser.add_argument("--hours", type=float, default=4.0, help="of training (default: 4)")
    options = parser.parse_args(arguments)

    def say(text: str) -> None:
        print(f"{parser.prog}: {text}", file=sys.stderr)

    try:
        if not (math.isfinite(options.hours) and options.hours > 0):
            raise InputError(f"--hours: expected a number above 0, got {options.hours}")
        make_model(options.data, options.base, options.work, options.output, options.hours, say)
    except (InputError, TrainingError, OSError) as error:
        say(f"error: {error}")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
