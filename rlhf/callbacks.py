"""What every training writes beside its weights: metrics, samples of its own replies, loss curves."""

import hashlib
import json
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from matplotlib.figure import Figure
from torch import nn
from transformers import (
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from rlhf.files import read_jsonl, write_jsonl

logger = logging.getLogger(__name__)


def watch(trainer: Trainer, samples: Callable[[], list[dict[str, Any]]], sample_steps: int) -> None:
    """Add to a trainer what every training of ours has: metrics, samples, the check of precision, a quiet progress bar.

    Args:
        trainer: Before it trains.
        samples: Makes the rows of one sampling (see [`Samples`]).
        sample_steps: Optimiser steps between two samplings.
    """
    trainer.remove_callback(PrinterCallback if trainer.args.disable_tqdm else ProgressCallback)
    for callback in (MetricsFile(), PrecisionGuard(), RanksAgree(), Samples(samples, sample_steps)):
        trainer.add_callback(callback)
    if not trainer.args.disable_tqdm:
        trainer.add_callback(Progress())


class Progress(ProgressCallback):
    """The Trainer's progress bar without its print of each log event, which stands in the log already."""

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        return


class MetricsFile(TrainerCallback):
    """Append each log event to `metrics.jsonl`, and plot the curves of the training when it ends.

    After a resume the rows beyond the checkpoint are dropped, so that each step stands there once.
    """

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        if state.is_world_process_zero:
            _rewind(Path(args.output_dir) / "metrics.jsonl", state.global_step)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs=None, **kwargs
    ) -> None:
        if not state.is_world_process_zero:
            return
        row = {"step": state.global_step, **{key: value for key, value in logs.items() if key != "total_flos"}}
        numbers = {key: value if not _is_number(value) or math.isfinite(value) else None for key, value in row.items()}
        with (Path(args.output_dir) / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(numbers, allow_nan=False) + "\n")  # null for NaN and infinity, which JSON lacks
        shown = {key: round(value, 4) for key, value in row.items() if _is_number(value)}
        logger.info("%s", " ".join(f"{key}={value}" for key, value in shown.items()))

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        if state.is_world_process_zero:
            plot_curves(read_jsonl(Path(args.output_dir) / "metrics.jsonl"), Path(args.output_dir) / "curves.png")


class Samples(TrainerCallback):
    """Write samples of the model's own output to the log and to `samples.jsonl`, at step 0 and each `every` steps.

    Args:
        make: Returns the rows of one sampling; called on the main process, between two optimiser steps.
        every: Steps between two samplings.
    """

    def __init__(self, make: Callable[[], list[dict[str, Any]]], every: int) -> None:
        self.make = make
        self.every = every

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        if state.is_world_process_zero:
            _rewind(Path(args.output_dir) / "samples.jsonl", state.global_step)
            if state.global_step == 0:
                self._write(args, state)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        if state.is_world_process_zero and state.global_step % self.every == 0:
            self._write(args, state)

    def _write(self, args: TrainingArguments, state: TrainerState) -> None:
        rows = [{"step": state.global_step, **row} for row in self.make()]
        with (Path(args.output_dir) / "samples.jsonl").open("a") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        for row in rows[:2]:
            last = row["messages"][-1]["content"] if row["messages"] else ""
            logger.info("sample at step %d: %r -> %r", state.global_step, last, row["response"])


class PrecisionGuard(TrainerCallback):
    """Refuse to train parameters in half precision: the fp16 gradient scaler cannot, and bf16 loses small updates."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model=None, **kwargs
    ) -> None:
        wrong = {
            f"{name} ({parameter.dtype})"
            for name, parameter in model.named_parameters()
            if parameter.requires_grad and parameter.dtype.itemsize < 4
        }
        if wrong:
            raise TypeError(
                f"{len(wrong)} trainable parameters are not float32, for example {min(wrong)}. Call "
                "`rlhf.model.trainable_to_fp32(model)` after the trainer is built and after every load."
            )


class RanksAgree(TrainerCallback):
    """Stop when the ranks hold different weights: a gradient that is not shared raises no error of its own.

    (https://github.com/jingyaogong/minimind/issues/853)
    """

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model=None, **kwargs
    ) -> None:
        self._compare(model)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model=None, **kwargs
    ) -> None:
        self._compare(model)

    def _compare(self, model: nn.Module) -> None:
        digest = hashlib.sha256()
        for _, parameter in sorted(model.named_parameters()):
            if parameter.requires_grad:
                digest.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        digests = gather_object([digest.hexdigest()[:16]])
        logger.info("hash of the trainable weights, by rank: %s", " ".join(digests))
        if len(set(digests)) > 1:
            raise RuntimeError(
                f"The ranks have drifted apart: their trainable weights hash to {', '.join(digests)}. One rank alone is "
                "saved, and it was trained on its own part of the data only. Something forwards past the DDP wrapper."
            )


def _rewind(path: Path, step: int) -> None:
    """Drop the rows beyond `step`, all of them at the start of a training."""
    rows = read_jsonl(path) if path.is_file() and step else []
    write_jsonl(path, (row for row in rows if row["step"] <= step))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float)


def plot_curves(rows: list[dict[str, Any]], path: Path) -> None:
    """Loss by step, training and held-out, as a PNG; for PPO also the score and the KL to the reference."""
    panels = [
        ("loss", [("loss", "training"), ("eval_loss", "held out")]),
        ("score", [("objective/scores", "training"), ("eval_objective/scores", "held out")]),
        ("KL to the reference, nats a reply", [("objective/kl", "training"), ("eval_objective/kl", "held out")]),
    ]
    panels = [(title, curves) for title, curves in panels if any(key in row for key, _ in curves for row in rows)]
    if not panels:
        return
    figure = Figure(figsize=(5 * len(panels), 3.2), layout="constrained")
    for axis, (title, curves) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for key, label in curves:
            points = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
            if points:
                axis.plot(*zip(*points, strict=True), label=label, marker="." if len(points) < 30 else None)
        axis.set_xlabel("step")
        axis.set_title(title)
        axis.legend()
    figure.savefig(path, dpi=120)
