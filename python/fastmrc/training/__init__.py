"""Fine-tuning of masked language models for the readers.

Needs the extra ``train``. `train` is the whole of it; the command ``fastmrc train`` calls it.
"""

from fastmrc.training.options import LossWeights, TrainingOptions, WindowOptions
from fastmrc.training.run import DataSummary, TrainingResult, train

__all__ = [
    "DataSummary",
    "LossWeights",
    "TrainingOptions",
    "TrainingResult",
    "WindowOptions",
    "train",
]
