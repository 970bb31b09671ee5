"""What every training writes beside its weights: metrics, samples of its own replies, loss curves."""

import contextlib
import gc
import hashlib
import io
import json
import logging
import math
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import nn
from tqdm.contrib.logging import logging_redirect_tqdm
from transformers import (
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from rlhf.files import read_jsonl, write_bytes
from rlhf.out_of_memory import is_out_of_memory
from rlhf.startup import prepare_training

logger = logging.getLogger(__name__)


def watch(trainer: Trainer, samples: Callable[[], list[dict[str, Any]]], sample_steps: int) -> None:
    """Probe a trainer, and add what every training of ours has: metrics, samples, checks, a quiet progress bar.

    Args:
        trainer: Before it trains.
        samples: Makes the rows of one sampling (see [`Samples`]).
        sample_steps: Optimiser steps between two samplings.
    """
    check_trainable_dtype(trainer.model)
    prepare_training(trainer)
    trainer.remove_callback(PrinterCallback if trainer.args.disable_tqdm else ProgressCallback)
    of_trackers = trainer.callback_handler.callbacks
    own = (Tokens(trainer), MetricsFile(), PrecisionGuard(), RanksAgree(), Samples(samples, sample_steps, of_trackers))
    for callback in own:
        trainer.add_callback(callback)
    if not trainer.args.disable_tqdm:
        trainer.add_callback(Progress())


class Progress(ProgressCallback):
    """The Trainer's progress bar with the last reward and KL, or the loss; log lines stand above it, not in it."""

    def __init__(self) -> None:
        super().__init__()
        self._above_the_bar = contextlib.ExitStack()

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        if state.is_world_process_zero:
            self._above_the_bar.enter_context(logging_redirect_tqdm())

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        self._above_the_bar.close()
        super().on_train_end(args, state, control, **kwargs)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs=None, **kwargs
    ) -> None:
        shown = {"reward": "objective/scores", "KL": "objective/kl"}
        keys = shown if "objective/scores" in logs else {"loss": "loss"}
        text = ", ".join(f"{label} {logs[key]:.3g}" for label, key in keys.items() if key in logs)
        if text and self.training_bar is not None:
            self.training_bar.set_postfix_str(text)


class Tokens(TrainerCallback):
    """Go on counting the tokens trained on after a resume: TRL 1.16's trainers begin again at 0.

    The count is kept where a checkpoint has room for it, in the Trainer's state.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        if hasattr(self.trainer, "_total_train_tokens"):  # PPO counts in the state itself
            self.trainer._total_train_tokens = state.num_input_tokens_seen

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        if hasattr(self.trainer, "_total_train_tokens"):
            state.num_input_tokens_seen = int(self.trainer._total_train_tokens)


class MetricsFile(TrainerCallback):
    """Append each log event to `metrics.jsonl`, and plot the curves of the training when it ends.

    After a resume the rows beyond the checkpoint are dropped, so that each step stands there once.
    """

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        if state.is_world_process_zero:
            # By number: a killed process may have logged more at the step of its last checkpoint, behind it.
            _rewind(Path(args.output_dir) / "metrics.jsonl", state.global_step, len(state.log_history))

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
    """Write samples of the model's own output, at step 0 and each `every` steps.

    All of them go to `samples.jsonl`; a table of them, with what each reward gave, to the log and to Weights & Biases or
    TensorBoard, where the Trainer reports to one of them. They are for people: where memory does not do for them, the
    training goes on without those of that step.

    Args:
        make: Returns the rows of one sampling; called on the main process, between two optimiser steps.
        every: Steps between two samplings.
        of_trackers: The Trainer's callbacks, among which those of the trackers are.
    """

    def __init__(
        self, make: Callable[[], list[dict[str, Any]]], every: int, of_trackers: Sequence[TrainerCallback] = ()
    ) -> None:
        self.make = make
        self.every = every
        self.of_trackers = of_trackers
        self._warned = False

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        if state.is_world_process_zero:
            _rewind(Path(args.output_dir) / "samples.jsonl", state.global_step)
            if state.global_step == 0:
                self._write(args, state)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        if state.is_world_process_zero and state.global_step % self.every == 0:
            self._write(args, state)

    def _write(self, args: TrainingArguments, state: TrainerState) -> None:
        made = self._made(state.global_step)
        if made is None:
            return
        rows = [{"step": state.global_step, **row} for row in made]
        with (Path(args.output_dir) / "samples.jsonl").open("a") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        # As wide as the terminal, where there is one; the log file has the same lines.
        width = shutil.get_terminal_size((100, 24)).columns if sys.stderr.isatty() else 100
        logger.info("samples at step %d\n%s", state.global_step, sample_table(rows, width))
        _track_samples(self.of_trackers, rows, state.global_step)

    def _made(self, step: int) -> list[dict[str, Any]] | None:
        """The rows, None where memory ran out: a smaller train batch, as of any other place, would be no remedy."""
        try:
            return self.make()
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            remedy = "" if self._warned else ". The training goes on; lower `num_samples` to have them"
            level = logging.INFO if self._warned else logging.WARNING
            logger.log(level, "no samples at step %d: out of memory (%s)%s", step, error, remedy)
            self._warned = True
        gc.collect()  # the error is gone here, and what its frames held with it
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return None


def sample_cells(rows: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[Any]]]:
    """Samples as a table: the head, and for each its last message, its reply, and what each reward gave it."""
    rewards = [row.get("rewards", {key: row[key] for key in ("score",) if key in row}) for row in rows]
    names = list(dict.fromkeys(name for given in rewards for name in given))
    asked = [row["messages"][-1]["content"] if row["messages"] else "" for row in rows]
    cells = [
        [question, row["response"], *(given.get(name) for name in names)]
        for question, row, given in zip(asked, rows, rewards, strict=True)
    ]
    return ["prompt", "reply", *names], cells


def sample_table(rows: Sequence[dict[str, Any]], width: int) -> str:
    """[`sample_cells`] drawn for a terminal of `width` columns; long texts are folded, none is cut off."""
    head, cells = sample_cells(rows)
    table = Table(box=box.SIMPLE_HEAD, width=width, padding=(0, 1))
    for place, name in enumerate(head):
        if place < 2:
            table.add_column(name, ratio=1, overflow="fold")
        else:
            table.add_column(name, justify="right", overflow="fold", min_width=6, max_width=12)
    for row in cells:
        table.add_row(*(Text(_printable(cell) if isinstance(cell, str) else _number(cell)) for cell in row))
    drawn = io.StringIO()
    Console(file=drawn, width=width, color_system=None, force_terminal=False).print(table)
    return "\n".join(line.rstrip() for line in drawn.getvalue().splitlines() if line.strip())


def _printable(text: str) -> str:
    """A reply is a model's: control characters in it must not reach the terminal."""
    return "".join(c if c.isprintable() else " " if c.isspace() else "\ufffd" for c in text)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def _track_samples(callbacks: Sequence[TrainerCallback], rows: Sequence[dict[str, Any]], step: int) -> None:
    """The table for the trackers that the Trainer reports to; on the main process alone, which is the one that logs."""
    head, cells = sample_cells(rows)
    for callback in callbacks:
        match type(callback).__name__:
            case "TensorBoardCallback" if callback.tb_writer is not None:
                lines = [head, ["---"] * len(head), *cells]
                text = [" | ".join(_markdown(cell) for cell in line) for line in lines]
                callback.tb_writer.add_text("samples", "\n".join(f"| {line} |" for line in text), step)
            case "WandbCallback" if callback._wandb is not None:
                table = callback._wandb.Table(columns=head, data=cells)
                callback._wandb.log({"samples": table, "train/global_step": step})


def _markdown(cell: Any) -> str:
    return _printable(cell).replace("|", "\\|") if isinstance(cell, str) else _number(cell)


class PrecisionGuard(TrainerCallback):
    """Refuse to train parameters in half precision: the fp16 gradient scaler cannot, and bf16 loses small updates.

    DeepSpeed casts them itself: its optimizer has float32 copies, and scales the loss.
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model=None, **kwargs
    ) -> None:
        if args.deepspeed_plugin is None:  # which keeps its own float32 copies
            check_trainable_dtype(model)


def check_trainable_dtype(model: nn.Module) -> None:
    """Raise a TypeError that names trainable parameters in half precision, where there are any."""
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


def _rewind(path: Path, step: int, number: int | None = None) -> None:
    """Drop the rows beyond `step` and beyond the first `number`, all of them at the start of a training.

    Half a line, which a kill may leave, goes too.
    """
    lines = path.read_bytes().split(b"\n")[:-1] if path.is_file() and step else []
    write_bytes(path, b"".join(line + b"\n" for line in lines[:number] if json.loads(line)["step"] <= step))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float)


def plot_curves(rows: list[dict[str, Any]], path: Path) -> None:
    """Loss by step, training and held-out, as a PNG; for PPO also the score, the KL to the reference, and the probes."""
    probes = dict.fromkeys(key for row in rows for key in row if key.startswith("eval_probe/"))
    panels = [
        ("loss", [("loss", "training"), ("eval_loss", "held out")]),
        ("score", [("objective/scores", "training"), ("eval_objective/scores", "held out")]),
        ("KL to the reference, nats a reply", [("objective/kl", "training"), ("eval_objective/kl", "held out")]),
        ("held-out probes", [(key, key.removeprefix("eval_probe/")) for key in probes]),
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
