"""What a run trains: a model, batches for it, how it is scored and how it is written."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from fastmrc.data import DataIssue, StrPath
from fastmrc.errors import InputError
from fastmrc.training.options import TrainingOptions

__all__ = [
    "Batches",
    "DataSummary",
    "Job",
    "base_name",
    "num_steps",
    "require_packages",
    "training_device",
]

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


class Batches(Protocol):
    """Batches by number; a pure function of the seed and the number."""

    def __len__(self) -> int:
        """Return their number."""

    def __getitem__(self, number: int) -> dict[str, Any]:
        """Return a batch; it says its ``objective`` and the ``ids`` of its questions."""


class Job(Protocol):
    """What a run needs to know of its task."""

    @property
    def model(self) -> Any:
        """The model, with the attribute ``device``."""

    @property
    def batches(self) -> Batches:
        """What it is trained on."""

    @property
    def score(self) -> Callable[[], dict[str, float]] | None:
        """Returns the scores of the model by name, ``score`` among them; None: there is nothing to
        score it on."""

    @property
    def summary(self) -> DataSummary:
        """What the data files held."""

    @property
    def missing(self) -> tuple[str, ...]:
        """Weights that begin at random."""

    @property
    def base(self) -> str:
        """The model that training begins from, for the card."""

    @property
    def inputs(self) -> tuple[str, ...]:
        """What the model reads, a line each, for its card."""

    def initialize(self) -> None:
        """Set the weights that are computed from the data, at the start of a new run."""

    def save(self, directory: Path) -> None:
        """Write the model."""


def base_name(base: StrPath) -> str:
    """Return the last part of a directory or hub id."""
    return f"`{os.path.basename(os.path.normpath(os.fspath(base)))}`"


def require_packages(task: str, packages: tuple[str, ...], extra: str) -> None:
    """Refuse a task whose packages are not installed."""
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise InputError(f"{task} needs the package {package}: pip install 'fastmrc[{extra}]'")


def training_device(device: str | None) -> str:
    """Return the device of a run: CUDA where there is one, unless another is asked for."""
    if device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda:") and device != "cuda:0":
        raise InputError(
            f"device: expected cpu or cuda, got {device!r}; choose a GPU by CUDA_VISIBLE_DEVICES"
        )
    return device


def num_steps(options: TrainingOptions, examples: int, batch_size: int) -> int:
    """Return the number of batches that the bounds other than time allow."""
    bounds = [] if options.max_steps is None else [options.max_steps]
    epochs = options.epochs
    if epochs is None and not bounds and options.max_hours is None:
        epochs = 3.0
    if epochs is not None:
        bounds.append(max(1, round(epochs * examples / batch_size)))
    return min(bounds, default=_ENDLESS)
