"""Exceptions that name what the caller gave."""

from __future__ import annotations

__all__ = ["InputError", "UnsupportedModelError"]


class InputError(ValueError):
    """An argument or a file line is not what was expected."""


class UnsupportedModelError(InputError):
    """A model or tokenizer cannot serve a reader; the message says why."""
