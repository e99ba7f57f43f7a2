"""Exceptions that name what the caller gave."""

from __future__ import annotations

__all__ = ["InputError", "TrainingError", "UnsupportedModelError"]


class InputError(ValueError):
    """An argument or a file line is not what was expected."""


class UnsupportedModelError(InputError):
    """A model or tokenizer cannot serve a reader; the message says why."""


class TrainingError(RuntimeError):
    """A training run cannot go on; the message says where it stopped and why."""
