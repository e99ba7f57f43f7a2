"""One training run: from a base and data files to a model directory."""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import set_seed

from fastmrc.data import DataIssue, Pair, Question, StrPath, read_training_data
from fastmrc.encoders.unilm import SUPPORTED_MODEL_TYPES
from fastmrc.errors import InputError, TrainingError, UnsupportedModelError
from fastmrc.model_files import write_json
from fastmrc.pretrained import (
    SETTINGS_FILE,
    LoadedModel,
    load_base,
    max_positions,
    multiplies_bfloat16,
    quiet_transformers,
)
from fastmrc.pretrained import Task as ModelTask
from fastmrc.text import TextCodec
from fastmrc.training.batches import TrainingBatches, drawn_objectives
from fastmrc.training.card import write_card
from fastmrc.training.copying import initialize_copying
from fastmrc.training.evaluation import evaluate_model, reading_options
from fastmrc.training.examples import Corpus
from fastmrc.training.options import TrainingOptions
from fastmrc.training.trainer import ReaderTrainer, last_checkpoint

__all__ = ["DataSummary", "TrainingResult", "is_finished", "train"]

_RUN_FILE = "training.json"
_LOG_FILE = "training_log.json"
_CHECKPOINTS = "checkpoints"
_LOCK = ".lock"
# What torch's file writer says of a full disk.
_WRITER_ERRORS = ("PytorchStreamWriter", "inline_container", "iostream error")
# Steps of a run that only time bounds.
_ENDLESS = 10_000_000


@dataclass(slots=True)
class DataSummary:
    """What the data files held.

    Attributes
    ----------
    questions, answered, passages, pairs
        Counts of what is trained on.
    not_found
        Ids of questions that were left out, since their answer is in none of their passages.
    issues
        Records that could not be read.
    """

    questions: int = 0
    answered: int = 0
    passages: int = 0
    pairs: int = 0
    not_found: list[str] = field(default_factory=list)
    issues: list[DataIssue] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class TrainingResult:
    """What a run did.

    Attributes
    ----------
    steps
        Batches trained on, those of interrupted runs included.
    hours
        Time, likewise.
    loss
        Mean over the last logged batches.
    scores
        Of the model that was kept, by name; empty without held-out data.
    data
        What was trained on.
    initialized
        Weights that the base did not hold and that began at random.
    """

    steps: int
    hours: float
    loss: float
    scores: dict[str, float]
    data: DataSummary
    initialized: tuple[str, ...]


def train(
    base: StrPath,
    data: Sequence[StrPath],
    output_dir: StrPath,
    options: TrainingOptions,
    *,
    held_out: StrPath | None = None,
    device: str | None = None,
    progress: bool = False,
    on_start: Callable[[DataSummary, tuple[str, ...]], None] | None = None,
) -> TrainingResult:
    """Fine-tune a masked language model for the readers.

    Run again with the same arguments after an interruption, it goes on from the last checkpoint;
    its bounds (`epochs`, `max_steps`, `max_hours`) may be others then.

    Parameters
    ----------
    base
        Directory or hub id of a model; an output layer that it lacks begins at random.
    data
        Files that `fastmrc.data.read_training_data` reads.
    output_dir
        New or empty, or that of an interrupted run.
    options
        Of the run.
    held_out
        A file like those of `data`, read at each evaluation; the best checkpoint is kept. Without
        it the last one is.
    device
        ``"cpu"`` or ``"cuda"``; by default CUDA where there is one.
    progress
        Whether to print losses, scores and the time left on the standard error.
    on_start
        Called with what the data holds and the weights that begin at random, before the first step.

    Returns
    -------
    TrainingResult

    Raises
    ------
    InputError
        If an argument is wrong, there is nothing to train on, or `output_dir` is in use.
    UnsupportedModelError
        If the base cannot serve the task.
    TrainingError
        If the loss or its gradients are not finite; the message names the step and the questions.
    """
    _require_extra()
    output = Path(output_dir)
    with _locked(output):
        run = _fingerprint(base, data, held_out, options)
        _check_output(output, run)
        loaded = _load(base, options, device)
        codec = TextCodec(loaded.tokenizer, loaded.normalization)
        _check_fit(loaded, codec, options)
        corpus, summary = _read(data, codec, options)
        held = None if held_out is None else _held_out(held_out, options, summary)
        if on_start is not None:
            on_start(summary, loaded.missing)
        resumed = last_checkpoint(output / _CHECKPOINTS)
        if resumed is None and options.copy_heads:
            initialize_copying(
                loaded.model, codec, corpus.documents, options.copy_heads, options.seed
            )
        _claim(output, run)
        trainer = _trainer(loaded, codec, corpus, options, held, output, progress)
        with _disk_errors(output), quiet_transformers():
            trainer.train(resume_from_checkpoint=None if resumed is None else str(resumed))
        result = _result(trainer, summary, loaded.missing)
        _save(output, loaded, trainer, options, base, data, result)
    return result


def _require_extra() -> None:
    # Without accelerate transformers says so late and at length.
    for package in ("accelerate", "bm25s"):
        if importlib.util.find_spec(package) is None:
            raise InputError(f"train needs the package {package}: pip install 'fastmrc[train]'")


def _load(base: StrPath, options: TrainingOptions, device: str | None) -> LoadedModel:
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda:") and device != "cuda:0":
        raise InputError(
            f"device: expected cpu or cuda, got {device!r}; choose a GPU by CUDA_VISIBLE_DEVICES"
        )
    set_seed(options.seed)  # for weights that begin at random
    task: ModelTask = "question-answering" if options.task == "span" else "masked-LM"
    path = base if isinstance(base, str) else Path(base)  # a plain string may be a hub id
    loaded = load_base(path, task=task, device=device)
    for module in loaded.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = options.dropout
    if options.normalization is not None:
        loaded = replace(loaded, normalization=options.normalization)
    return loaded


def _check_fit(loaded: LoadedModel, codec: TextCodec, options: TrainingOptions) -> None:
    """Refuse a model that cannot take the inputs of the task."""
    config = loaded.model.config
    if config.model_type not in SUPPORTED_MODEL_TYPES:
        raise UnsupportedModelError(
            f"base: expected a model of type {', '.join(SUPPORTED_MODEL_TYPES)}, got "
            f"{config.model_type!r}"
        )
    if getattr(config, "is_decoder", False):
        raise UnsupportedModelError("base: expected an encoder, got is_decoder=True")
    masks = "mlm" in options.objectives or options.mask_share > 0
    if masks and codec.mask_id is None:
        raise UnsupportedModelError("base: expected a tokenizer with a [MASK] token, got none")
    passage, question = options.windows.window_tokens[1], options.windows.question_tokens
    needed = {
        "seq2seq": passage + question + 3 + options.answer_tokens,
        "mlm": passage + question + 4 + options.slots,
        "simbert": 2 * question + 3,
        "retrieval": max(passage, question) + 2,
        "span": passage + question + 4,
    }
    longest = max(needed[objective] for objective in options.objectives)
    most = max_positions(config)
    if most is not None and longest > most:
        raise InputError(
            f"window_tokens: expected inputs of at most {most} tokens, the positions of the model, "
            f"got up to {longest} with question_tokens, answer_tokens or slots"
        )


def _read(
    data: Sequence[StrPath], codec: TextCodec, options: TrainingOptions
) -> tuple[Corpus, DataSummary]:
    summary = DataSummary()
    corpus = Corpus(codec, options.windows)
    for path in data:
        for record in read_training_data(path, on_error=summary.issues.append):
            if isinstance(record, Pair):
                corpus.add_pair(record)
            else:
                corpus.add_question(record)
    summary.questions, summary.answered = corpus.num_questions, corpus.num_answered
    summary.passages, summary.pairs = len(corpus.documents), len(corpus.pairs)
    summary.not_found = corpus.not_found
    needs_pairs = options.task == "simbert"
    if not (corpus.pairs if needs_pairs else corpus.num_questions):
        raise InputError(
            f"data: expected {'pairs' if needs_pairs else 'questions'} for the task "
            f"{options.task}, got {summary.questions} questions and {summary.pairs} pairs, "
            f"{len(summary.not_found)} answers that are not in their passages and "
            f"{len(summary.issues)} records that cannot be read"
        )
    return corpus, summary


def _trainer(
    loaded: LoadedModel,
    codec: TextCodec,
    corpus: Corpus,
    options: TrainingOptions,
    held: tuple[list[Question], list[Pair]] | None,
    output: Path,
    progress: bool,
) -> ReaderTrainer:
    batches = TrainingBatches(
        corpus, codec, loaded.model.config, options, _num_steps(options, corpus)
    )
    bfloat16 = options.bfloat16
    if bfloat16 is None:
        bfloat16 = multiplies_bfloat16(loaded.model.device)
    score = None
    if held is not None:
        questions, pairs = held
        objectives = drawn_objectives(options, len(corpus.pairs))

        def score() -> dict[str, float]:
            return evaluate_model(loaded, objectives, questions, pairs, options)

    return ReaderTrainer(
        loaded.model, options, batches, output / _CHECKPOINTS, score, bfloat16, progress
    )


def _held_out(
    path: StrPath, options: TrainingOptions, summary: DataSummary
) -> tuple[list[Question], list[Pair]]:
    records = list(read_training_data(path, on_error=summary.issues.append))
    questions = [record for record in records if isinstance(record, Question)]
    pairs = [record for record in records if isinstance(record, Pair)]
    if not (pairs if options.task == "simbert" else questions):
        raise InputError(f"held_out: expected something to read for the task, got none in {path}")
    return questions[: options.eval_questions], pairs[: options.eval_questions]


def _num_steps(options: TrainingOptions, corpus: Corpus) -> int:
    """Return the number of batches that the bounds other than time allow."""
    bounds = [] if options.max_steps is None else [options.max_steps]
    epochs = options.epochs
    if epochs is None and not bounds and options.max_hours is None:
        epochs = 3.0
    if epochs is not None:
        examples = 2 * len(corpus.pairs) if options.task == "simbert" else corpus.num_questions
        size = options.retrieval_pairs if options.task == "retrieval" else options.batch_size
        bounds.append(max(1, round(epochs * examples / size)))
    return min(bounds, default=_ENDLESS)


# --- the output directory ----------------------------------------------------------------------


@contextmanager
def _locked(output: Path) -> Iterator[None]:
    """Keep the directory for one run at a time; the lock goes with the process."""
    output.mkdir(parents=True, exist_ok=True)
    with open(output / _LOCK, "w", encoding="ascii") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"output_dir: another run is writing to '{output}'") from None
        try:
            yield
        finally:
            (output / _LOCK).unlink(missing_ok=True)


@contextmanager
def _disk_errors(output: Path) -> Iterator[None]:
    """Say what is left when a file cannot be written."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        # torch reports a full disk as RuntimeError of its file writer.
        written = any(name in str(error) for name in _WRITER_ERRORS)
        if isinstance(error, RuntimeError) and not written:
            raise
        last = last_checkpoint(output / _CHECKPOINTS)
        kept = "there is no checkpoint yet" if last is None else f"{last.name} is kept"
        raise TrainingError(
            f"output_dir: cannot write to '{output}' ({error}); {kept}, and the same command goes "
            "on from there"
        ) from error


def _fingerprint(
    base: StrPath, data: Sequence[StrPath], held_out: StrPath | None, options: TrainingOptions
) -> dict[str, Any]:
    """Return what a run must have in common with the one that it resumes: not its bounds."""
    bounds = ("epochs", "max_steps", "max_hours")
    settings = {name: value for name, value in asdict(options).items() if name not in bounds}
    return {
        "base": os.path.basename(os.path.normpath(os.fspath(base))),
        "options": json.loads(json.dumps(settings)),  # lists for tuples, as they are read back
        "data": [_digest(path) for path in data],
        "held_out": None if held_out is None else _digest(held_out),
    }


def _digest(path: StrPath) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_finished(output: Path) -> bool:
    """Return whether a directory holds what a whole run has written."""
    return (output / _RUN_FILE).is_file() and not (output / _CHECKPOINTS).exists()


def _check_output(output: Path, run: dict[str, Any]) -> None:
    """Accept a new directory, or one of an interrupted run with the same arguments."""
    if is_finished(output):
        raise InputError(f"output_dir: '{output}' holds a finished run; choose another")
    path = output / _RUN_FILE
    if not path.is_file():
        ours = (_LOCK, _CHECKPOINTS)
        others = sorted(entry.name for entry in output.iterdir() if entry.name not in ours)
        if others:
            raise InputError(
                f"output_dir: expected a new or empty directory, got '{output}' with {others[0]}"
            )
    elif last_checkpoint(output / _CHECKPOINTS) is not None:
        earlier = json.loads(path.read_text(encoding="utf-8"))
        changed = [key for key in run if earlier.get(key) != run[key]]
        if changed:
            raise InputError(
                f"output_dir: '{output}' holds an interrupted run with other {', '.join(changed)}; "
                "give the same to go on, or choose another directory"
            )


def _claim(output: Path, run: dict[str, Any]) -> None:
    """Make the directory that of this run, now that nothing but the training is to come."""
    (output / _CHECKPOINTS).mkdir(exist_ok=True)
    partial = output / (_RUN_FILE + ".part")
    write_json(partial, run)
    partial.replace(output / _RUN_FILE)


def _result(
    trainer: ReaderTrainer, summary: DataSummary, initialized: tuple[str, ...]
) -> TrainingResult:
    history = trainer.state.log_history
    losses = [entry["loss"] for entry in history if "loss" in entry]
    scored = [entry for entry in history if "eval_score" in entry]
    best = max(scored, key=lambda entry: entry["eval_score"], default={})
    scores = {
        name.removeprefix("eval_"): value
        for name, value in best.items()
        if name.startswith("eval_")
    }
    return TrainingResult(
        trainer.state.global_step,
        trainer.schedule.spent / 3600,
        losses[-1] if losses else float("nan"),
        scores,
        summary,
        initialized,
    )


def _save(
    output: Path,
    loaded: LoadedModel,
    trainer: ReaderTrainer,
    options: TrainingOptions,
    base: StrPath,
    data: Sequence[StrPath],
    result: TrainingResult,
) -> None:
    """Write the model; the checkpoints go when everything else is on the disk."""
    with _disk_errors(output), quiet_transformers():
        loaded.model.save_pretrained(output)
        loaded.tokenizer.save_pretrained(output)
        objectives = drawn_objectives(options, result.data.pairs)
        settings = {
            "normalization": loaded.normalization,
            "pooling": options.pooling,
            "reading": reading_options(options, objectives),
        }
        write_json(output / SETTINGS_FILE, settings)
        write_json(output / _LOG_FILE, trainer.state.log_history)
        write_card(output / "README.md", base, data, options, objectives, result)
    done = output / (_CHECKPOINTS + ".done")
    (output / _CHECKPOINTS).rename(done)  # from here on the run is finished
    shutil.rmtree(done)
