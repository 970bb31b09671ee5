"""Before step 1 of a training: does this base compute right on this card, and which batch fits?

Both probes leave the training as they found it: they ask for gradients by `torch.autograd.grad`, which stores none, the
random generators are set back, and no rank waits for another within a forward pass, since one that runs out of memory
would never come.
"""

import contextlib
import copy
import gc
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer

from rlhf.generate import inference, left_pad
from rlhf.model import float16_remedy, overflows_in_float16, weights_dtype
from rlhf.nonfinite import FirstNotFinite
from rlhf.out_of_memory import (
    TRAIN,
    Sizes,
    is_out_of_memory,
    remember,
    remembered,
    sizes_of,
    smaller,
    take_report,
)
from rlhf.ppo_trainer import PPOTrainer
from rlhf.rollouts import Rollout, as_batch

logger = logging.getLogger(__name__)

PROBE_TOKENS = 64

# Root mean square of the difference between padded and unpadded logits over that of the logits' spread. Rounding alone
# gives about the type's epsilon (1e-7, 1e-3, 8e-3) times the square root of the number of layers; a mask or positions
# that are ignored give tens of percent. The limits lie between.
PADDING_LIMITS = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}


class StartError(RuntimeError):
    """The model does not compute right on this machine: padding changes it, or something is not finite."""


def prepare_training(trainer: Trainer) -> None:
    """Check the model and find the batch that fits; called when the trainer is built, before it trains."""
    check_start(trainer)
    fit_batch(trainer, probe=trainer.args.device.type == "cuda")


# Does it compute right?


def check_start(trainer: Trainer) -> None:
    """Two rows, one padded on the left, must give what they give alone; all of it finite, gradients too.

    Raises:
        StartError: naming the first layer whose output is not finite, and the remedy for this family of models.
    """
    model: PreTrainedModel = trainer.accelerator.unwrap_model(trainer.model)
    rows = _probe_rows(trainer.train_dataset)
    if _computes_in(trainer) is torch.float16 and overflows_in_float16(model):
        logger.warning("%s", _remedy(trainer))
    with _untouched(trainer), trainer.accelerator.autocast():
        with inference(model):
            together, alone = _together_and_alone(model, rows, trainer)
        if not all(logits.isfinite().all() for logits in [*together, *alone]):
            with inference(model), FirstNotFinite(model) as first:
                _together_and_alone(model, rows, trainer)
            raise StartError(f"The output of `{first.output}` is not finite. {_remedy(trainer)}")
        _compare(together, alone, _computes_in(trainer))
        _check_gradients(model, rows, trainer)


def _probe_rows(dataset: Dataset) -> list[list[int]]:
    """The beginning of a real row, and its first half."""
    row = dataset[0]
    ids = next(row[key] for key in ("input_ids", "prompt_ids", "chosen_ids") if row.get(key))[:PROBE_TOKENS]
    return [ids, ids[: max(1, len(ids) // 2)]]


def _together_and_alone(
    model: PreTrainedModel, rows: Sequence[Sequence[int]], trainer: Trainer
) -> tuple[list[Tensor], list[Tensor]]:
    return _logits(model, rows, trainer), [_logits(model, [row], trainer)[0] for row in rows]


def _logits(model: nn.Module, rows: Sequence[Sequence[int]], trainer: Trainer) -> list[Tensor]:
    """Logits at the real positions of each row, in float32; of a model with a score head, its scores."""
    ids, mask = left_pad(rows, trainer.processing_class.pad_token_id, trainer.args.device)
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)  # as in rollouts and in `generate`
    logits = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).logits.float()
    if logits.dim() == 2:
        return list(logits)
    return [logits[number, -len(row) :] for number, row in enumerate(rows)]


def _compare(together: list[Tensor], alone: list[Tensor], dtype: torch.dtype) -> None:
    difference = torch.cat([(a - b).flatten() for a, b in zip(together, alone, strict=True)])
    everything = torch.cat([logits.flatten() for logits in alone])
    # Scores may be few and alike, so that their own size is what a difference is held against.
    spread = max(everything.std().item() if everything.numel() > 2 else 0.0, everything.abs().mean().item(), 1e-6)
    relative = difference.square().mean().sqrt().item() / spread
    limit = PADDING_LIMITS[dtype]
    if not relative < limit:
        raise StartError(
            f"Padding on the left changes what the model computes: its logits are off by {relative:.2g} of their spread "
            f"(limit {limit:g} in {dtype}). Batches of this base would be wrong. Try `attn_implementation: "
            "eager`, or another release of transformers."
        )
    logger.info("start-up probe: padded and unpadded logits differ by %.2g of their spread", relative)


def _check_gradients(model: PreTrainedModel, rows: Sequence[Sequence[int]], trainer: Trainer) -> None:
    names, weights = zip(*((n, p) for n, p in model.named_parameters() if p.requires_grad), strict=True)
    logits = _logits(model, rows, trainer)
    if logits[0].dim() == 1:
        loss = torch.stack(logits).square().mean()
    else:
        ids = torch.tensor(rows[0], device=trainer.args.device)
        loss = nn.functional.cross_entropy(logits[0][:-1], ids[1:]) if len(ids) > 1 else logits[0].square().mean()
    gradients = torch.autograd.grad(loss, weights, allow_unused=True)
    wrong = [n for n, g in zip(names, gradients, strict=True) if g is not None and not g.isfinite().all()]
    if wrong:
        raise StartError(
            f"The loss is finite, and the gradients of {len(wrong)} of {len(names)} trainable weights are not, for "
            f"example that of `{wrong[-1]}`. {_remedy(trainer)}"
        )


def _remedy(trainer: Trainer) -> str:
    """What to do about values that are not finite, by the type in which they were computed."""
    if (dtype := _computes_in(trainer)) is not torch.float16:
        return (
            f"The base computes in {dtype}, whose range is not the cause: its weights are damaged, or its adapter's."
        )
    return float16_remedy(trainer.accelerator.unwrap_model(trainer.model))


def _computes_in(trainer: Trainer) -> torch.dtype:
    """The type of the products: that of autocast where it is on, else of the frozen weights."""
    if trainer.args.fp16 or trainer.args.bf16:
        return torch.float16 if trainer.args.fp16 else torch.bfloat16
    return weights_dtype(trainer.accelerator.unwrap_model(trainer.model))


# Which batch fits?


def fit_batch(trainer: Trainer, probe: bool) -> None:
    """Give the trainer the batch that fits: what fitted before, and what the longest rows leave room for.

    The effective batch stays (see [`rlhf.out_of_memory`]). All ranks take the smallest batch that fits on any.

    Args:
        trainer: Before it builds its dataloader.
        probe: Whether to try the longest rows. On a CPU it would cost time for nothing.

    Raises:
        torch.OutOfMemoryError: if a batch of one row does not fit.
    """
    args, folder = trainer.args, Path(trainer.args.output_dir)
    asked = sizes_of({key: getattr(args, key) for key in vars(args)})
    if trainer.is_world_process_zero() and (changed := take_report(folder, asked)):
        logger.warning("The stage ran out of memory before, so it takes %s. The effective batch stays.", changed)
    known = sizes = broadcast_object_list([remembered(folder, asked)])[0]
    while probe and not _everywhere(trainer, _fits(trainer, sizes[TRAIN])):
        after = smaller(sizes)
        if after is None:
            if trainer.is_world_process_zero():  # so that nobody takes a smaller batch for a remedy
                remember(folder, asked, sizes, "one of the longest rows does not fit")
            trainer.accelerator.wait_for_everyone()
            raise torch.OutOfMemoryError("Even a batch of one of the longest rows does not fit into memory.")
        logger.warning(
            "The longest rows do not fit with `%s` %d; %d is tried, the effective batch stays.",
            TRAIN, sizes[TRAIN], after[TRAIN],
        )  # fmt: skip
        sizes = after
    if sizes != known and trainer.is_world_process_zero():
        remember(folder, asked, sizes, "the longest rows did not fit with more")
    if sizes != asked:
        logger.info("batch that fits: %s (asked for: %s)", sizes, asked)
        _set_sizes(trainer, sizes)


def _fits(trainer: Trainer, batch_size: int) -> bool:
    try:
        _step_on_the_longest(trainer, batch_size)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return False
    finally:
        gc.collect()  # the failed graph hangs on the traceback
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()  # the record's peak is the training's
    return True


def _step_on_the_longest(trainer: Trainer, batch_size: int) -> None:
    """Forward and backward of the longest rows, with what else will be there at that moment."""
    weights = [p for p in trainer.model.parameters() if p.requires_grad]
    # Adam's two averages and the gradients of earlier micro-batches; DDP's buckets. All in float32, as the weights are.
    copies = 3 + (trainer.args.world_size > 1)
    _turn_checkpointing_on(trainer)
    with _untouched(trainer):
        reserve = torch.empty(copies * sum(p.numel() for p in weights), device=trainer.args.device)
        alone = copy.copy(trainer)  # what the loss writes down is written to this copy
        alone.accelerator = _Alone(trainer.accelerator)
        alone._metrics = copy.deepcopy(trainer._metrics)
        alone.model.train()
        with getattr(trainer, "maybe_activation_offload_context", contextlib.nullcontext()):
            with trainer.accelerator.autocast():
                loss = _loss(alone, longest_rows(trainer, batch_size))
            torch.autograd.grad(loss, weights, allow_unused=True)
        del reserve


def longest_rows(trainer: Trainer, count: int) -> list[dict[str, Any]]:
    """The `count` longest rows of the training data, with the columns that the collator gets."""
    lengths = row_lengths(trainer.train_dataset)
    order = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)[:count]
    dataset = trainer.train_dataset
    if not isinstance(trainer, PPOTrainer):  # which reads its rows itself
        dataset = trainer._remove_unused_columns(dataset, description="training")
    return [dataset[index] for index in order]


def row_lengths(dataset: Dataset) -> list[int]:
    """Ids that a row takes in a batch: of a pair, the prompt and the longer completion."""
    table = dataset.with_format("arrow")[:]

    def lengths(column: str) -> list[int]:
        if column not in table.column_names:
            return [0] * len(table)
        return table[column].combine_chunks().value_lengths().fill_null(0).to_pylist()

    if "input_ids" in table.column_names:
        return lengths("input_ids")
    prompts, chosen, rejected = map(lengths, ("prompt_ids", "chosen_ids", "rejected_ids"))
    return [p + max(c, r) for p, c, r in zip(prompts, chosen, rejected, strict=True)]


def _loss(trainer: Trainer, rows: list[dict[str, Any]]) -> Tensor:
    compute_loss = type(trainer).compute_loss  # the class's own: the guard's on an instance is that of the original
    if not isinstance(trainer, PPOTrainer):
        return compute_loss(trainer, trainer.model, trainer._prepare_inputs(trainer.data_collator(rows)))
    # Replies as long as they may become; what they say does not matter here.
    ids, mask = left_pad(
        [row["prompt_ids"] for row in rows], trainer.processing_class.pad_token_id, trainer.args.device
    )
    replies = ids[:, -1:].repeat(1, trainer.args.response_length)
    batch = as_batch(ids, mask, replies, torch.ones_like(replies))
    nothing = torch.zeros(ids.shape[0], batch["mask"].shape[1] - 1, device=ids.device)
    rollout = Rollout(**batch, **dict.fromkeys(("logprobs", "values", "advantages", "returns"), nothing))
    trainer._num_tokens = rollout.mask.sum()
    trainer._initial_global_step = -1  # no check of the ratio: no policy made these log-probabilities
    return compute_loss(trainer, trainer.model, {"batch": rollout})


class _Alone:
    """An accelerator whose exchanges between ranks give back what this rank has."""

    def __init__(self, accelerator: Any) -> None:
        self._accelerator = accelerator

    def __getattr__(self, name: str) -> Any:
        return getattr(self._accelerator, name)

    def gather(self, tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return tensor

    gather_for_metrics = reduce = gather


def _everywhere(trainer: Trainer, fits: bool) -> bool:
    mine = torch.tensor([int(fits)], device=trainer.args.device)
    return bool(trainer.accelerator.gather(mine).min())


def _set_sizes(trainer: Trainer, sizes: Sizes) -> None:
    for key, size in sizes.items():
        setattr(trainer.args, key, size)
    trainer._train_batch_size = trainer.args.train_batch_size
    if trainer.is_deepspeed_enabled:  # it was told when the trainer was built
        config = trainer.accelerator.state.deepspeed_plugin.deepspeed_config
        config["train_micro_batch_size_per_gpu"] = trainer.args.per_device_train_batch_size
        config["gradient_accumulation_steps"] = trainer.args.gradient_accumulation_steps


# Nothing is left behind


@contextlib.contextmanager
def _untouched(trainer: Trainer) -> Iterator[None]:
    """Random generators, modes, adapters and what requires gradients are afterwards as before."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    training = [(module, module.training) for module in model.modules()]
    trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    devices = [trainer.args.device] if trainer.args.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            for module, mode in training:
                module.training = mode
            for parameter, wanted in trainable:
                parameter.requires_grad_(wanted)


def _turn_checkpointing_on(trainer: Trainer) -> None:
    """Gradient checkpointing, as the Trainer turns it on itself when it begins to train."""
    model = trainer.model
    if trainer.args.activation_checkpointing and hasattr(model, "activation_checkpointing_enable"):
        kwargs = dict(trainer.args.activation_checkpointing_kwargs or {})
        own = {key: kwargs.pop(key) for key in ("every_n_layers", "offload") if key in kwargs}
        kwargs["use_reentrant"] = False  # the other kind knows no `torch.autograd.grad`
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=kwargs, **own)
