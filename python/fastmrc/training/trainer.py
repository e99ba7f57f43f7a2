"""The training loop: `transformers.Trainer` with the losses and readers of this package."""

from __future__ import annotations

import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import SequentialSampler
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from fastmrc.errors import TrainingError
from fastmrc.training.job import Job
from fastmrc.training.objectives import batch_loss
from fastmrc.training.options import TrainingOptions

__all__ = ["ReaderTrainer", "Schedule", "last_checkpoint"]

# A run that is killed loses no more.
_SECONDS_BETWEEN_CHECKPOINTS = 600.0


class Schedule:
    """Share of the peak learning rate at a step, and the clock of the run.

    Rises linearly over the share `warmup` of the run, then falls linearly to 0. How far the run is,
    is the larger of its shares of steps and of seconds.
    """

    # `torch.optim.lr_scheduler.LambdaLR` keeps the __dict__ of an instance in its checkpoints and
    # overwrites it from them: the time spent goes there, so that the clock of a run that resumes
    # goes on, and what belongs to this process stays out.
    __slots__ = ("__dict__", "_now", "seconds", "steps", "warmup")

    def __init__(self, steps: int, seconds: float | None, warmup: float) -> None:
        self.steps = steps
        self.seconds = seconds
        self.warmup = warmup
        self.spent = 0.0
        self._now = time.monotonic()

    def tick(self) -> None:
        """Count the time since the last call."""
        now = time.monotonic()
        self.spent += now - self._now
        self._now = now

    def __call__(self, step: int) -> float:
        self.tick()
        done = self.progress(step)
        if done < self.warmup:
            return min(1.0, (done + 1 / self.steps) / self.warmup)
        return max(0.0, (1 - done) / (1 - self.warmup)) if self.warmup < 1 else 1.0

    def progress(self, step: int) -> float:
        """Return how far the run is, 0 to 1."""
        by_time = 0.0 if self.seconds is None else self.spent / self.seconds
        return min(1.0, max(step / self.steps, by_time))


class ReaderTrainer(Trainer):
    """Trains a model on batches that say their objective.

    Parameters
    ----------
    job
        Its model in float32, with eager attention where attention is trained. Where it can be
        scored, the checkpoint with the highest score is kept, else the last one.
    options
        Of the run.
    output_dir
        Of the checkpoints.
    bfloat16
        Whether products are taken in bfloat16.
    progress
        Whether to print the losses, scores and the time left on the standard error.
    """

    def __init__(
        self,
        job: Job,
        options: TrainingOptions,
        output_dir: Path,
        bfloat16: bool,
        progress: bool = False,
    ) -> None:
        model, batches, score = job.model, job.batches, job.score
        seconds = None if options.max_hours is None else options.max_hours * 3600
        self.schedule = Schedule(len(batches), seconds, options.warmup)
        self._options = options
        self._batches = batches
        self._score = score
        self._bfloat16 = bfloat16
        self._parts: dict[str, list[torch.Tensor]] = {}
        evaluates = score is not None
        args = TrainingArguments(
            output_dir=str(output_dir),
            max_steps=len(batches),
            per_device_train_batch_size=1,  # an item is a batch already
            learning_rate=options.learning_rate,
            weight_decay=options.weight_decay,
            optim="adamw_torch_fused",
            seed=options.seed,
            use_cpu=model.device.type == "cpu",
            logging_steps=min(50, options.eval_steps),
            save_strategy="steps",
            save_steps=options.eval_steps,
            save_total_limit=2,
            eval_strategy="steps" if evaluates else "no",
            eval_steps=options.eval_steps,
            load_best_model_at_end=evaluates,
            metric_for_best_model="score" if evaluates else None,
            greater_is_better=True if evaluates else None,
            remove_unused_columns=False,
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=model.device.type != "cpu",
        )
        # Only now does n_gpu count; more than one and the Trainer would spread a batch over them.
        args._n_gpu = min(1, args.n_gpu)
        super().__init__(
            model=model,
            args=args,
            data_collator=lambda items: items[0],
            train_dataset=batches,
            eval_dataset=batches if evaluates else None,  # only asked whether there is one
            callbacks=[_Clock(self.schedule)],
        )
        self.remove_callback(PrinterCallback)
        if progress:
            self.add_callback(_Report(self.schedule))

    def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
        return SequentialSampler(self._batches)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        if self.lr_scheduler is None:
            adamw: Any = self.optimizer if optimizer is None else optimizer
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(adamw, self.schedule)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        # Not the Trainer's own mixed precision, which wraps `forward` of the whole model only; the
        # losses call its body and its output layer.
        with torch.autocast(self.args.device.type, torch.bfloat16, enabled=self._bfloat16):
            loss, parts = batch_loss(model, inputs, self._options.losses, self._options.pooling)
        for name, part in parts.items():
            self._parts.setdefault(f"{inputs['objective']}_{name}", []).append(part)
        return loss

    def training_step(self, model: Any, inputs: dict[str, Any], *rest: Any, **named: Any) -> Any:
        loss = super().training_step(model, inputs, *rest, **named)
        self._check_finite("loss", loss, inputs)
        # A finite loss may have gradients that are not: the step would ruin the weights, and a
        # checkpoint would keep them.
        gradients = [weight.grad for weight in model.parameters() if weight.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        self._check_finite("norm of the gradients", norm, inputs)
        return loss

    def _check_finite(self, name: str, value: torch.Tensor, inputs: dict[str, Any]) -> None:
        if not math.isfinite(float(value)):
            raise TrainingError(
                f"{name}: expected a finite number, got {float(value)} at step "
                f"{self.state.global_step + 1} ({inputs['objective']}; questions "
                f"{', '.join(inputs['ids'])})"
            )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            means = {n: round(float(torch.stack(p).mean()), 4) for n, p in self._parts.items()}
            logs |= means | {"hours": round(self.schedule.spent / 3600, 4)}
            self._parts.clear()
        super().log(logs, start_time)

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        assert self._score is not None
        scores = {f"eval_{name}": value for name, value in self._score().items()}
        self.schedule.tick()
        self.log(scores)
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, scores
        )
        return scores


class _Clock(TrainerCallback):
    """Writes checkpoints, and ends a run whose time is up with an evaluation and a checkpoint."""

    def __init__(self, schedule: Schedule) -> None:
        self._schedule = schedule
        self._saved = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        if self._schedule.progress(state.global_step) >= 1:
            control.should_evaluate = args.eval_strategy != "no"
            control.should_log = control.should_save = control.should_training_stop = True
        elif time.monotonic() - self._saved > _SECONDS_BETWEEN_CHECKPOINTS:
            control.should_save = True
        return control

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        self._saved = time.monotonic()
        return control


class _Report(TrainerCallback):
    """Prints what is logged, a line each."""

    def __init__(self, schedule: Schedule) -> None:
        self._schedule = schedule

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any
    ) -> None:
        values = {
            name: value
            for name, value in (logs or {}).items()
            if isinstance(value, float) and name not in ("epoch", "grad_norm", "hours")
        }
        if "loss" not in values and "eval_score" not in values:
            return
        done = self._schedule.progress(state.global_step)
        left = self._schedule.spent * (1 / done - 1) / 60 if done else 0.0
        shown = ", ".join(f"{name} {value:.3g}" for name, value in values.items())
        print(
            f"fastmrc: step {state.global_step:,} ({done:.1%}, {left:.0f} minutes left): {shown}",
            file=sys.stderr,
            flush=True,
        )


def last_checkpoint(directory: Path) -> Path | None:
    """Return the newest complete checkpoint: its trainer state is written last."""
    found = [path for path in directory.glob("checkpoint-*") if _is_complete(path)]
    return max(found, key=lambda path: int(path.name.split("-")[1]), default=None)


def _is_complete(checkpoint: Path) -> bool:
    try:
        json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True
