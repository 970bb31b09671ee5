"""Rollouts as tensors: which prompts one takes, its replies with all that the update needs, and pieces without padding.

Notation: a rollout has `episodes` rows, prompts padded on the left and replies on the right. Tensors of the forward
pass are `(episodes, length)`; what is said about tokens is `(episodes, length - 1)`, at t about token t + 1.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler


class Sizes(Protocol):
    """What the order of the prompts depends on; [`rlhf.ppo_trainer.PPOConfig`] has it."""

    seed: int
    process_index: int
    gradient_accumulation_steps: int

    @property
    def rollout_size(self) -> int: ...

    @property
    def local_rollout_size(self) -> int: ...

    @property
    def steps_per_rollout(self) -> int: ...


@dataclass
class Rollout:
    """Replies with everything the update needs; the first dimension of each tensor is the episode.

    `input_ids`, `attention_mask`, `position_ids` and `mask` are `(episodes, length)`: prompts padded on the left,
    replies on the right, `mask` 1 on the reply. The others are `(episodes, length - 1)`, at t about token t + 1.
    """

    input_ids: Tensor
    attention_mask: Tensor
    position_ids: Tensor
    mask: Tensor
    logprobs: Tensor
    values: Tensor
    advantages: Tensor
    returns: Tensor

    def take(self, indices: Tensor) -> "Rollout":
        """The episodes at `indices`."""
        return Rollout(**{name: tensor[indices.to(tensor.device)] for name, tensor in vars(self).items()})

    def by_length(self) -> "Rollout":
        """The same episodes, the longest first, so that pieces of it need little padding."""
        return self.take(self.attention_mask.sum(1).argsort(descending=True, stable=True))

    def trimmed(self) -> "Rollout":
        """Without the columns that are padding in every episode."""
        start, stop = _used_columns(self.attention_mask)
        width = self.attention_mask.shape[1]
        return Rollout(
            **{
                name: tensor[:, start : stop if tensor.shape[1] == width else stop - 1]
                for name, tensor in vars(self).items()
            }
        )


class Piece(NamedTuple):
    """Some episodes of a batch without their common padding: `batch` is `whole[rows, start:stop]`."""

    rows: Tensor
    start: int
    stop: int
    batch: dict[str, Tensor]


def pieces(batch: dict[str, Tensor], size: int) -> Iterator[Piece]:
    """Pieces of `size` episodes of like length, the longest first, trimmed: what a forward pass without gradients runs on."""
    order = batch["attention_mask"].sum(1).argsort(descending=True, stable=True)
    for rows in order.split(size):
        start, stop = _used_columns(batch["attention_mask"][rows])
        yield Piece(rows, start, stop, {name: tensor[rows, start:stop] for name, tensor in batch.items()})


def _used_columns(attention_mask: Tensor) -> tuple[int, int]:
    used = torch.nonzero(attention_mask.any(dim=0)).squeeze(1)
    return int(used[0]), int(used[-1]) + 1


def as_batch(prompt_ids: Tensor, prompt_mask: Tensor, responses: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Left-padded prompts and right-padded replies as the inputs of a forward pass, with the mask of the replies.

    Position ids count real tokens alone, so that they do not depend on what stands beside an episode in its batch.
    """
    attention_mask = torch.cat([prompt_mask, mask], dim=1)
    return {
        "input_ids": torch.cat([prompt_ids, responses], dim=1),
        "attention_mask": attention_mask,
        "position_ids": (attention_mask.cumsum(dim=1) - 1).clamp(min=0),
        "mask": torch.cat([torch.zeros_like(prompt_mask), mask], dim=1),
    }


def inputs_of(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """What a model's own forward takes of a batch."""
    return {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids")}


class RolloutSampler(Sampler[list[int]]):
    """Batches of row numbers, one a rollout and process, each repeated for every micro-batch made from it.

    The order is a permutation of (seed, epoch); a rest that fills no rollout waits for another epoch's order.
    """

    def __init__(self, num_rows: int, args: Sizes) -> None:
        if num_rows < args.rollout_size:
            raise ValueError(
                f"A rollout takes {args.rollout_size} prompts (per_device_train_batch_size * "
                f"gradient_accumulation_steps * num_mini_batches * processes), but the dataset has {num_rows}."
            )
        self.num_rows = num_rows
        self.args = args
        self.epoch = 0
        self.repeats = args.steps_per_rollout * args.gradient_accumulation_steps

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.num_rows // self.args.rollout_size * self.repeats

    def __iter__(self) -> Iterator[list[int]]:
        order = torch.randperm(self.num_rows, generator=generator_of(self.args.seed, self.epoch)).tolist()
        size, local = self.args.rollout_size, self.args.local_rollout_size
        for start in range(0, self.num_rows - size + 1, size):
            mine = start + self.args.process_index * local
            for _ in range(self.repeats):
                yield order[mine : mine + local]


class RolloutLoader(DataLoader):
    """A DataLoader that hands the epoch on to its batch sampler."""

    def set_epoch(self, epoch: int) -> None:
        sampler = self.batch_sampler
        assert isinstance(sampler, RolloutSampler)
        sampler.set_epoch(epoch)


def generator_of(*numbers: int) -> torch.Generator:
    """A generator seeded by several numbers, the same on every rank and machine."""
    seed = 0
    for number in numbers:
        seed = (seed * 1_000_003 + number + 1) % (2**63 - 1)
    return torch.Generator().manual_seed(seed)
