"""The model card that a training run writes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from fastmrc.data import StrPath
from fastmrc.training.options import TrainingOptions

if TYPE_CHECKING:
    from fastmrc.training.run import TrainingResult

__all__ = ["write_card"]


def write_card(
    path: Path,
    base: str,
    data: Sequence[StrPath],
    options: TrainingOptions,
    inputs: Sequence[str],
    result: TrainingResult,
) -> None:
    """Write a card with what is known of a run; what only its author knows is asked for."""
    files = dict.fromkeys(os.path.basename(os.fspath(file)) for file in data)
    scores = [f"| {name} | {value:.1f} |" for name, value in result.scores.items()]
    settings = [f"| {name} | {value} |" for name, value in _flat(asdict(options))]
    initialized = ", ".join(f"`{name}`" for name in result.initialized) or "none"
    lines = [
        f"# {path.parent.resolve().name}",
        "",
        f"Fine-tuned by `fastmrc train --task {options.task}`. It reads:",
        "",
        *(f"- {line}" for line in inputs),
        "",
        "## Scores",
        "",
        *(
            [
                "On held-out data during training (percent):",
                "",
                "| score | value |",
                "| --- | --- |",
            ]
            + scores
            if scores
            else ["No held-out data was given."]
        ),
        "",
        "## Data",
        "",
        f"Base: {base}. Weights that it did not hold and that began at random: {initialized}.",
        "",
        f"{result.data.questions:,} questions, {result.data.answered:,} of them with an answer, on "
        f"{result.data.passages:,} passages; {result.data.pairs:,} pairs of like meaning. Left "
        f"out: {len(result.data.not_found):,} questions whose answer is in none of their passages, "
        f"{len(result.data.issues):,} records that could not be read.",
        "",
        "| file | source and licence |",
        "| --- | --- |",
        *(f"| {name} | to be filled in |" for name in files),
        "",
        "## Licence",
        "",
        "To be filled in: that of the base and of the data.",
        "",
        "## Hyperparameters",
        "",
        f"{result.steps:,} batches in {result.hours:.2f} hours; last loss {result.loss:.3f}.",
        "",
        "| option | value |",
        "| --- | --- |",
        *settings,
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _flat(values: dict[str, object], prefix: str = "") -> list[tuple[str, object]]:
    flat: list[tuple[str, object]] = []
    for name, value in values.items():
        if isinstance(value, dict):
            flat += _flat(value, f"{prefix}{name}.")
        else:
            flat.append((prefix + name, value))
    return flat
