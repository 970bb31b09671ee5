"""What every training writes beside its weights: metrics, samples of its own replies, loss curves."""

import json
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

logger = logging.getLogger(__name__)


class MetricsFile(TrainerCallback):
    """Append each log event to `metrics.jsonl`, and plot the curves of the training when it ends.

    After a resume the rows beyond the checkpoint are dropped, so that each step stands there once.
    """

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        if state.is_world_process_zero:
            path = Path(args.output_dir) / "metrics.jsonl"
            rows = read_jsonl(path) if path.is_file() else []
            kept = [row for row in rows if row["step"] <= state.global_step] if state.global_step else []
            path.write_text("".join(json.dumps(row) + "\n" for row in kept))

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs=None, **kwargs
    ) -> None:
        if not state.is_world_process_zero:
            return
        row = {"step": state.global_step, **{key: value for key, value in logs.items() if key != "total_flos"}}
        with (Path(args.output_dir) / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
        shown = {key: round(value, 4) for key, value in row.items() if isinstance(value, int | float)}
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
        if state.global_step == 0 and state.is_world_process_zero:
            (Path(args.output_dir) / "samples.jsonl").write_text("")
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
                f"{len(wrong)} trainable parameters are not float32, for example {sorted(wrong)[0]}. Call "
                "`rlhf.model.trainable_to_fp32(model)` after the trainer is built and after every load."
            )


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSON-lines file."""
    return [json.loads(line) for line in path.read_text().splitlines() if line]


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
            points = [(row["step"], row[key]) for row in rows if key in row and math.isfinite(row[key])]
            if points:
                axis.plot(*zip(*points, strict=True), label=label, marker="." if len(points) < 30 else None)
        axis.set_xlabel("step")
        axis.set_title(title)
        axis.legend()
    figure.savefig(path, dpi=120)
