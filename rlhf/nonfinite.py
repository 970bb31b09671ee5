"""The one guard of every training against losses and gradients that are not finite, and against a loss that collapsed.

A step whose loss or gradient is not finite on any rank is skipped on all of them: its gradients are dropped before the
optimiser sees them, so that neither a weight nor one of AdamW's averages moves. What the fp16 scaler skips by itself,
an overflow of the scaled gradient, is told apart. After too many in a row the training stops, and a second pass over
the batch with hooks on every module finds where the first number went wrong.
"""

import functools
import logging
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import torch
from accelerate.utils import gather_object
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from rlhf.checkpoints import last_valid
from rlhf.model import float16_remedy

logger = logging.getLogger(__name__)

# With this loss scale or less it is the gradient itself that does not fit: torch's scaler begins at 65536 and halves.
SMALLEST_SCALE = 1.0
TINY_LOSS, TINY_LOGS = 1e-6, 3


class NonFiniteError(RuntimeError):
    """Too many steps in a row whose loss or gradient is not finite, or weights that are not."""


class CollapseError(RuntimeError):
    """Loss and gradient are exactly zero, step after step: nothing is learnt any more."""


@dataclass
class MicroBatch:
    """What a forward pass of this step was made of, and the loss that came out."""

    inputs: dict[str, Any]
    num_items: Any
    loss: Tensor


@dataclass
class Finding:
    """Where the first number that is not finite stood.

    Attributes:
        kind: "weight", "input", "output", "loss", "gradient", or "nothing" where a second pass was finite.
        where: Name of the weight, of the tensor of the batch, or of the module.
        rows: Numbers of the rows in the training data, from 0; empty where they are not known.
        rank: The process that found it.
    """

    kind: str
    where: str = ""
    rows: list[int] = field(default_factory=list)
    rank: int = 0


class NonFiniteGuard(TrainerCallback, ExportableState):
    """Skip what is not finite on all ranks, count it, and stop after too many in a row. Being made puts it in place.

    Under DeepSpeed the step is taken within the backward pass, so there the guard speaks through ZeRO's own check for
    overflows (stages 1 and 2), which drops the gradients of all ranks.

    Args:
        trainer: Before it trains.
        max_skipped_steps: Optimiser steps in a row that may be skipped; one more stops.
        zero_is_healthy: Whether a loss of exactly 0 without any gradient is a state that a good training may be in, as
            with DPO's hinge loss, or where all replies of a PPO rollout score the same. Then it is only warned of.

    Attributes:
        skipped: Optimiser steps skipped so far, their loss or gradient not being finite.
        skipped_in_a_row: Those since the last one that was.
        overflowed: Steps that the fp16 scaler skipped on top, which is normal now and then.
        zero_in_a_row: Steps up to now whose loss and gradient were exactly 0.
    """

    def __init__(self, trainer: Trainer, max_skipped_steps: int = 3, zero_is_healthy: bool = False) -> None:
        self.trainer = trainer
        self.max_skipped_steps = max_skipped_steps
        self.zero_is_healthy = zero_is_healthy
        self.skipped = self.skipped_in_a_row = self.overflowed = self.zero_in_a_row = 0
        self._tiny_logs = 0
        self._step: list[MicroBatch] = []
        self._zero: Any = None  # DeepSpeed's ZeRO optimiser
        trainer.args.logging_nan_inf_filter = False  # it would log the mean of the losses before in place of a NaN
        # No event of the Trainer has the batch or the loss, and `on_save` comes after the checkpoint is written.
        self._compute_loss, self._save_checkpoint = trainer.compute_loss, trainer._save_checkpoint
        vars(trainer).update(compute_loss=self._watched_loss, _save_checkpoint=self._checked_save)
        trainer.callback_handler.callbacks.insert(0, self)  # before trackers, which take the log as they find it

    def why_not_finite(self, model: nn.Module, inputs: dict[str, Tensor]) -> str:
        """Where the first number that is not finite stands in a forward pass, on this rank, and why: for a message."""
        with FirstNotFinite(model) as first:
            model(**inputs)
        rank, rows = self.trainer.args.process_index, self._rows_of(inputs, first.rows)
        if broken := self._broken_weights():
            found = Finding("weight", broken[0], rows, rank)
        else:
            found = Finding("output" if first.output else "nothing", first.output or "", rows, rank)
        return f"{self._told(found, self._save(inputs))} {self._last_checkpoint()}"

    # Events

    def state(self) -> dict[str, Any]:
        names = ("skipped", "skipped_in_a_row", "overflowed", "zero_in_a_row")
        return {"args": {}, "attributes": {name: getattr(self, name) for name in names}}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        saved = state.stateful_callbacks.get(type(self).__name__, {})  # an older checkpoint has none
        for name, value in saved.get("attributes", {}).items():
            setattr(self, name, value)
        if broken := self._broken_weights():
            raise NonFiniteError(
                f"Before the first step {len(broken)} weights are not finite, for example `{broken[0]}`. "
                f"{self._cause(Finding('weight', broken[0]))}"
            )
        if self.trainer.is_deepspeed_enabled:
            self._hook_into_zero()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._step = []

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """With the gradients in place, clipped and unscaled; under DeepSpeed, when it has stepped or skipped already.

        Raises:
            NonFiniteError: if this is one more in a row than may be skipped.
            CollapseError: if as many had neither loss nor gradient.
        """
        losses, norm = torch.stack([batch.loss for batch in self._step]), self._gradient_norm()
        mine = torch.stack([~losses.isfinite().all(), ~norm.isfinite(), losses.any(), norm != 0]).float()
        bad_loss, bad_gradient, some_loss, some_gradient = (
            count > 0 for count in self.trainer.accelerator.reduce(mine, reduction="sum").tolist()
        )
        if not (bad_loss or bad_gradient):
            self.skipped_in_a_row = 0
            self._note_zero(state.global_step, is_zero=not (some_loss or some_gradient))
            return
        if not bad_loss and (scale := self._loss_scale() or 0) > SMALLEST_SCALE:
            self.overflowed += 1
            logger.info("Step %d: the gradient times the loss scale %g overflowed; the scaler skips the step.",
                        state.global_step, scale)  # fmt: skip
            return
        for parameter in self.trainer.model.parameters():
            parameter.grad = None  # AdamW leaves such a weight alone, its averages too; a zero would still move both
        self.skipped += 1
        self.skipped_in_a_row += 1
        logger.warning(
            "The %s of step %d is not finite; it is skipped on all ranks (%d in a row, %d in all).",
            "loss" if bad_loss else "gradient", state.global_step, self.skipped_in_a_row, self.skipped,
        )  # fmt: skip
        if self.skipped_in_a_row > self.max_skipped_steps:
            raise NonFiniteError(
                f"{self.skipped_in_a_row} steps in a row had a {'loss' if bad_loss else 'gradient'} that is not finite "
                f"(`max_skipped_steps` {self.max_skipped_steps}). {self._explanation()} None of them reached the weights. "
                f"{self._last_checkpoint()}"
            )

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        if "loss" not in logs:
            return
        counts: dict[str, float] = {"skipped_steps": self.skipped}
        if (scale := self._loss_scale()) is not None:
            counts |= {"overflowed_steps": self.overflowed, "loss_scale": scale}
        logs.update(counts)
        state.log_history[-1].update(counts)
        if not math.isfinite(logs["loss"]):
            self.trainer._tr_loss.zero_()  # the Trainer subtracts it from itself, which leaves a NaN for ever
        self._tiny_logs = self._tiny_logs + 1 if 0 <= logs["loss"] < TINY_LOSS and not self.zero_is_healthy else 0
        if self._tiny_logs == TINY_LOGS:
            logger.warning(
                "The loss is below %g for %d logs: the training data are known by heart, or no more than the stop token "
                "is trained. Look at the held-out loss and at `rlhf check`, and train for fewer steps.",
                TINY_LOSS, TINY_LOGS,
            )  # fmt: skip

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._refuse_broken("no adapter is written")

    # What is watched

    def _watched_loss(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        result = self._compute_loss(model, inputs, *args, **kwargs)
        if self.trainer.model.training:
            loss = result[0] if isinstance(result, tuple) else result
            self._step.append(MicroBatch(inputs, kwargs.get("num_items_in_batch"), loss.detach().float()))
        return result

    def _checked_save(self, *args: Any, **kwargs: Any) -> None:
        self._refuse_broken("no checkpoint is written")
        self._save_checkpoint(*args, **kwargs)

    def _refuse_broken(self, consequence: str) -> None:
        if broken := self._broken_weights(trained=True):
            raise NonFiniteError(
                f"After step {self.trainer.state.global_step} {len(broken)} trained weights are not finite, for example "
                f"`{broken[0]}`; {consequence}. {self._cause(Finding('weight', broken[0]))} {self._last_checkpoint()}"
            )

    def _broken_weights(self, trained: bool = False) -> list[str]:
        """Names of the weights that are not finite; one look at all of them together, and at each only if need be."""
        weights = {
            name: parameter.detach()
            for name, parameter in self.trainer.model.named_parameters()
            if parameter.is_floating_point() and (parameter.requires_grad or not trained)
        }
        if _norm(weights.values()).isfinite():
            return []
        return [name for name, weight in weights.items() if not weight.isfinite().all()]

    def _gradient_norm(self) -> Tensor:
        """NaN or infinite where a gradient is, 0 where all are."""
        if self._zero is not None:  # the gradients are gone
            norm = math.inf if self._zero.overflow else self._zero._global_grad_norm
            return torch.tensor(1.0 if norm is None else float(norm), device=self.trainer.accelerator.device)
        gradients = [parameter.grad for parameter in self.trainer.model.parameters() if parameter.grad is not None]
        return _norm(gradients).to(self.trainer.accelerator.device)

    def _loss_scale(self) -> float | None:
        """The fp16 scaler's, which is 65536 at first; None without one."""
        if self._zero is not None:
            return self._zero.loss_scale if self._zero.dynamic_loss_scale else None
        scaler = self.trainer.accelerator.scaler
        return scaler.get_scale() if scaler is not None and scaler.is_enabled() else None

    def _hook_into_zero(self) -> None:
        engine_optimizer: Any = getattr(self.trainer.optimizer, "optimizer", None)
        if not hasattr(engine_optimizer, "check_grad_overflow"):
            logger.warning(
                "DeepSpeed steps within the backward pass, and only ZeRO stages 1 and 2 let a step be skipped there: a "
                "step that is not finite is counted, but it reaches the weights. Use `zero_stage` 2."
            )
            return
        self._zero = engine_optimizer
        has_overflow = engine_optimizer.has_overflow

        def not_finite_or_overflow(*args: Any, **kwargs: Any) -> bool:
            bad = ~torch.stack([batch.loss for batch in self._step]).isfinite().all()
            anywhere = self.trainer.accelerator.reduce(bad.float(), reduction="sum").item() > 0
            return anywhere or has_overflow(*args, **kwargs)

        engine_optimizer.check_grad_overflow = True  # off in float32
        engine_optimizer.has_overflow = not_finite_or_overflow

    def _note_zero(self, step: int, is_zero: bool) -> None:
        self.zero_in_a_row = self.zero_in_a_row + 1 if is_zero else 0
        if self.zero_in_a_row != self.max_skipped_steps + 1:
            return
        found = f"Loss and gradient were exactly 0 for {self.zero_in_a_row} steps in a row, up to step {step}"
        if self.zero_is_healthy:
            logger.warning("%s: nothing was learnt from them.", found)
            return
        first = self._step[0].inputs
        rows = self._rows_of(first)
        labels = first.get("labels")
        if labels is not None and (labels[..., 1:] == -100).all():
            cause = (
                "the batch has no token to train on, all its labels are -100: the replies were cut off or are marked as "
                "context. `rlhf check` shows a dialogue with its trained tokens; raise `max_length`, or prepare anew"
            )
        else:
            cause = (
                "every loss is rounded to 0: the scores or logits have run away. Lower `learning_rate`; a reward model "
                "is held back by `center_rewards_coefficient`"
            )
        raise CollapseError(
            f"{found}, so that nothing is learnt any more. The last batch {_named(rows, self._save(first))}. Probable "
            f"cause: {cause}. {self._last_checkpoint()}"
        )

    # The second pass

    def _explanation(self) -> str:
        """Where the first number that is not finite stands, on whichever rank, in which batch, and why."""
        index, mine = self._second_pass()
        path = self._save(self._step[index].inputs)
        found = next((f for f in gather_object([mine]) if f.kind != "nothing"), mine)
        saved = f"{path.stem.rpartition('_')[0]}_{found.rank}{path.suffix}"
        return self._told(found, path.with_name(saved))

    def _told(self, found: Finding, path: Path) -> str:
        where = {
            "weight": "The weight `{}` is not finite",
            "input": "`{}` of the batch is not finite",
            "output": "The first number that is not finite is in the output of `{}`",
            "gradient": "All outputs are finite; the first gradient that is not is that of `{}`",
            "loss": "The outputs of all layers are finite, the loss made of them is not",
            "nothing": "A second pass over the batch was finite",
        }[found.kind].format(found.where)
        return f"{where} (rank {found.rank}). The batch {_named(found.rows, path)}. {self._cause(found)}"

    def _second_pass(self) -> tuple[int, Finding]:
        """The first micro-batch of this step in which something is found; all are looked at, as their losses gather."""
        found = [self._look_at(batch) for batch in self._step]
        index = next((i for i, finding in enumerate(found) if finding.kind != "nothing"), 0)
        return index, found[index]

    def _look_at(self, batch: MicroBatch) -> Finding:
        trainer, tensors = self.trainer, _tensors_of(batch.inputs)
        rank, model = trainer.args.process_index, trainer.accelerator.unwrap_model(trainer.model)
        with FirstNotFinite(model) as first, trainer.compute_loss_context_manager():
            loss = self._compute_loss(model, batch.inputs, num_items_in_batch=batch.num_items)
            loss = loss[0] if isinstance(loss, tuple) else loss
        bad_inputs = [name for name, tensor in tensors.items() if not _is_finite(tensor)]
        if broken := self._broken_weights():
            return Finding("weight", broken[0], self._rows_of(batch.inputs, first.rows), rank)
        if bad_inputs:
            rows = _rows_not_finite(tensors[bad_inputs[0]])
            return Finding("input", bad_inputs[0], self._rows_of(batch.inputs, rows), rank)
        if first.output is not None:
            return Finding("output", first.output, self._rows_of(batch.inputs, first.rows), rank)
        if not loss.isfinite():
            return Finding("loss", "", self._rows_of(batch.inputs), rank)
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        # Not `backward`, whose hooks are DDP's and DeepSpeed's: other ranks may have no gradient to share.
        gradients = torch.autograd.grad(loss * (self._loss_scale() or 1.0), [*trained.values()], allow_unused=True)
        of_weights = [n for n, g in zip(trained, gradients, strict=True) if g is not None and not _is_finite(g)]
        if first.gradient or of_weights:
            where = first.gradient or of_weights[-1]  # the last layer's, which backward comes to first
            return Finding("gradient", where, self._rows_of(batch.inputs, first.rows), rank)
        return Finding("nothing", "", self._rows_of(batch.inputs), rank)

    def _rows_of(self, inputs: Mapping[str, Any], positions: list[int] | None = None) -> list[int]:
        """Numbers in the training data of the rows of a batch (those at `positions`), found again by their tokens."""
        tensors = _tensors_of(inputs)
        ids, mask, data = tensors.get("input_ids"), tensors.get("attention_mask"), self.trainer.train_dataset
        if ids is None or mask is None or ids.dim() != 2 or data is None or not hasattr(data, "column_names"):
            return []
        wanted = {
            tuple(row[keep.bool()].tolist())
            for number, (row, keep) in enumerate(zip(ids, mask, strict=True))
            if not positions or number in positions
        }
        columns = [name for name in data.column_names if name.endswith("_ids")]
        return [number for number, row in enumerate(data.select_columns(columns)) if _is_among(row, wanted)]

    def _save(self, inputs: Mapping[str, Any]) -> Path:
        path = Path(self.trainer.args.output_dir) / f"nonfinite_batch_{self.trainer.args.process_index}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: tensor.detach().contiguous().clone() for name, tensor in _tensors_of(inputs).items()}, path)
        return path

    def _cause(self, found: Finding) -> str:
        model, args = self.trainer.model, self.trainer.args
        weights = dict(model.named_parameters())
        half = args.fp16 or any(weight.dtype is torch.float16 for weight in weights.values())
        diverged = f"the training diverged; lower `learning_rate` (now {args.learning_rate:g}), or warm up for longer"
        if half:
            diverged = (
                "float16 overflowed, whose largest number is 65504, or the training diverged before that. "
                f"{float16_remedy(model)} If the loss rose before, lower `learning_rate` (now {args.learning_rate:g}), or "
                "warm up for longer"
            )
        match found.kind:
            case "weight" if found.where in weights and weights[found.where].requires_grad:
                cause = diverged
            case "weight":
                cause = "the file of the base is damaged, or its weights do not fit `dtype`; fetch it again, or set `dtype`"
            case "input" if found.where in ("advantages", "returns"):
                cause = "a reward is not finite, or far too large; look at `rewards/<name>/mean` in metrics.jsonl"
            case "input" if found.where in ("logprobs", "values"):
                cause = f"the policy was broken when it replied: {diverged}"
            case "input":
                cause = "the data; leave the rows out"
            case "output" | "gradient":
                cause = diverged
            case "loss":
                cause = f"numbers that are too far apart for this loss: {diverged}"
            case _:
                cause = f"something that chance decides, as dropout; else {diverged}"
        return f"Probable cause: {cause}."

    def _last_checkpoint(self) -> str:
        checkpoint, _ = last_valid(Path(self.trainer.args.output_dir))
        return "There is no checkpoint yet." if checkpoint is None else f"The last checkpoint is {checkpoint}."


class FirstNotFinite:
    """Hooks on all modules while it is entered: the first that gives out a number that is not finite, or its gradient.

    Attributes:
        output: Name of the module whose output is the first that is not finite, in the order of the forward pass.
        gradient: Likewise by the gradient of its output, in the order of the backward pass.
        rows: Positions in the batch where that is, where the first dimension is the batch.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.output: str | None = None
        self.gradient: str | None = None
        self.rows: list[int] = []
        self._handles: list[Any] = []

    def __enter__(self) -> Self:
        for name, module in self.model.named_modules():
            self._handles.append(module.register_forward_hook(functools.partial(self._after, name or "the model")))
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _after(self, name: str, module: nn.Module, args: Any, output: Any) -> None:
        for tensor in _tensors_in(output):
            if self.output is None and not _is_finite(tensor):
                self.output, self.rows = name, _rows_not_finite(tensor)
            if tensor.requires_grad:
                tensor.register_hook(functools.partial(self._of_gradient, name))

    def _of_gradient(self, name: str, gradient: Tensor) -> None:
        if self.gradient is None and not _is_finite(gradient):
            self.gradient, self.rows = name, _rows_not_finite(gradient)


def _norm(tensors: Iterable[Tensor]) -> Tensor:
    """The norm of all of them together, in one pass on a GPU: not finite where one is not, or where squares overflow."""
    return torch.nn.utils.get_total_norm([*tensors])


def _is_finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(tensor.isfinite().all())


def _rows_not_finite(tensor: Tensor) -> list[int]:
    if tensor.dim() < 2:
        return []
    return (~tensor.isfinite()).flatten(1).any(1).nonzero().flatten().tolist()


def _tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors_in(item)
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _tensors_in(item)


def _tensors_of(inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a batch by name; those of PPO's rollout, which is one entry, by their own."""
    named: dict[str, Any] = {}
    for name, value in inputs.items():
        named |= {name: value} if isinstance(value, Tensor) or not hasattr(value, "__dict__") else vars(value)
    return {name: value for name, value in named.items() if isinstance(value, Tensor)}


def _is_among(row: Mapping[str, list[int]], wanted: set[tuple[int, ...]]) -> bool:
    """Whether a row of the data is one of these sequences: as it is, as prompt and completion, or as a rollout's prompt."""
    prompt = tuple(row.get("prompt_ids") or ())
    wholes = [prompt + tuple(ids) for name, ids in row.items() if name not in ("prompt_ids", "reference_ids") and ids]
    if wholes:
        return not wanted.isdisjoint(wholes)
    return any(sequence[: len(prompt)] == prompt for sequence in wanted)


def _named(rows: list[int], path: Path) -> str:
    shown = ", ".join(map(str, rows[:8])) + (", …" if len(rows) > 8 else "")
    return f"{f'is of rows {shown} of the training data (from 0), and ' if rows else ''}is in {path}"
