"""Fine-tuning of masked language models for the readers.

Needs the extra ``train``. `train` is the whole of it; the command ``fastmrc train`` calls it. The
options can be imported without torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastmrc.training.options import ClozeOptions, LossWeights, TrainingOptions, WindowOptions

if TYPE_CHECKING:
    from fastmrc.training.run import DataSummary, TrainingResult, train

__all__ = [
    "ClozeOptions",
    "DataSummary",
    "LossWeights",
    "TrainingOptions",
    "TrainingResult",
    "WindowOptions",
    "train",
]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from fastmrc.training import run

        return getattr(run, name)
    raise AttributeError(f"module 'fastmrc.training' has no attribute {name!r}")
