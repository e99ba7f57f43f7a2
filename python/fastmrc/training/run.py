"""One training run: from a base and data files to a model directory."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from fastmrc.cloze.documents import answers_beside
from fastmrc.data import StrPath
from fastmrc.errors import InputError, TrainingError
from fastmrc.model_files import write_json
from fastmrc.pretrained import multiplies_bfloat16, quiet_transformers
from fastmrc.training.card import write_card
from fastmrc.training.job import DataSummary, Job
from fastmrc.training.options import TrainingOptions
from fastmrc.training.reading import ReadingJob
from fastmrc.training.trainer import ReaderTrainer, last_checkpoint

__all__ = ["DataSummary", "TrainingResult", "is_finished", "train"]

_RUN_FILE = "training.json"
_LOG_FILE = "training_log.json"
_CHECKPOINTS = "checkpoints"
_LOCK = ".lock"
# What torch's file writer says of a full disk.
_WRITER_ERRORS = ("PytorchStreamWriter", "inline_container", "iostream error")


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
    base: StrPath | None,
    data: Sequence[StrPath],
    output_dir: StrPath,
    options: TrainingOptions,
    *,
    held_out: StrPath | None = None,
    device: str | None = None,
    progress: bool = False,
    on_start: Callable[[DataSummary, tuple[str, ...]], None] | None = None,
) -> TrainingResult:
    """Train a model for the readers.

    Run again with the same arguments after an interruption, it goes on from the last checkpoint;
    its bounds (`epochs`, `max_steps`, `max_hours`) may be others then.

    Parameters
    ----------
    base
        Directory or hub id of a model; an output layer that it lacks begins at random. For the task
        ``"cloze"`` also the directory of a cloze transformer, which is trained on; None for the
        packaged reader, or nothing for a ``bilstm``.
    data
        Files that `fastmrc.data.read_training_data` reads; for ``"cloze"`` documents with blanks
        (`fastmrc.cloze.read_cloze`) and files of texts (`fastmrc.corpus.corpus_texts`), of which
        questions are made.
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
    output = Path(output_dir)
    with _locked(output):
        run = _fingerprint(base, data, held_out, options)
        _check_output(output, run)
        job = _job(base, data, held_out, options, device)
        if on_start is not None:
            on_start(job.summary, job.missing)
        resumed = last_checkpoint(output / _CHECKPOINTS)
        if resumed is None:
            job.initialize()
        _claim(output, run)
        bfloat16 = options.bfloat16
        if bfloat16 is None:
            bfloat16 = multiplies_bfloat16(job.model.device)
        trainer = ReaderTrainer(job, options, output / _CHECKPOINTS, bfloat16, progress)
        with _disk_errors(output), quiet_transformers():
            trainer.train(resume_from_checkpoint=None if resumed is None else str(resumed))
        result = _result(trainer, job)
        _save(output, job, trainer, options, data, result)
    return result


def _job(
    base: StrPath | None,
    data: Sequence[StrPath],
    held_out: StrPath | None,
    options: TrainingOptions,
    device: str | None,
) -> Job:
    if options.task == "cloze":
        from fastmrc.training.cloze import ClozeJob

        return ClozeJob(base, data, held_out, options, device)
    if base is None:
        raise InputError(f"base: expected a directory or hub id for the task {options.task}")
    return ReadingJob(base, data, held_out, options, device)


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
    base: StrPath | None,
    data: Sequence[StrPath],
    held_out: StrPath | None,
    options: TrainingOptions,
) -> dict[str, Any]:
    """Return what a run must have in common with the one that it resumes: not its bounds."""
    bounds = ("epochs", "max_steps", "max_hours")
    settings = {name: value for name, value in asdict(options).items() if name not in bounds}
    return {
        "base": None if base is None else os.path.basename(os.path.normpath(os.fspath(base))),
        "options": json.loads(json.dumps(settings)),  # lists for tuples, as they are read back
        "data": [_digest(own) for path in data for own in _files_of(path)],
        "held_out": None if held_out is None else [_digest(own) for own in _files_of(held_out)],
    }


def _files_of(path: StrPath) -> list[StrPath]:
    """Return a file and what is read with it."""
    answers = answers_beside(path)
    return [path] if answers is None else [path, answers]


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


def _result(trainer: ReaderTrainer, job: Job) -> TrainingResult:
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
        job.summary,
        job.missing,
    )


def _save(
    output: Path,
    job: Job,
    trainer: ReaderTrainer,
    options: TrainingOptions,
    data: Sequence[StrPath],
    result: TrainingResult,
) -> None:
    """Write the model; the checkpoints go when everything else is on the disk."""
    with _disk_errors(output), quiet_transformers():
        job.save(output)
        write_json(output / _LOG_FILE, trainer.state.log_history)
        write_card(output / "README.md", job.base, data, options, job.inputs, result)
    done = output / (_CHECKPOINTS + ".done")
    (output / _CHECKPOINTS).rename(done)  # from here on the run is finished
    shutil.rmtree(done)
