"""The training plan for a data set of a given size: which settings, and why. Pure functions, no files and no GPU.

Small sets get a small adapter and many epochs, large ones a large adapter and few, so that the former are learned at all
and the latter not by heart. The bands are half-open, [1, 100), [100, 500) and [500, ...): the small plan is for
fewer than 100 examples, so 100 have the middle one, and by the same rule 500 have the large one.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

EFFECTIVE_BATCH = 8  # examples an optimiser step, over all GPUs
WARMUP_SHARE = 0.1  # warm-up steps for each example
MAX_WARMUP_STEPS = 50
KEYS = (
    "lora_r",
    "lora_alpha",
    "num_train_epochs",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "max_length",
    "warmup_steps",
)

_FIRST_MIDDLE, _FIRST_LARGE = 100, 500  # examples


@dataclass(frozen=True)
class Plan:
    """Settings of a training under TRL's names, each with its reason.

    Attributes:
        num_examples: training examples that the plan is for.
        num_gpus: processes that share a step.
        lora_r: rank of the adapter.
        lora_alpha: scale of the adapter, twice the rank.
        num_train_epochs: passes over the data.
        per_device_train_batch_size: examples in one forward pass of one GPU.
        gradient_accumulation_steps: forward passes of one GPU for an optimiser step.
        max_length: tokens of an example, prompt and reply.
        warmup_steps: optimiser steps until the learning rate is reached; it decays by a cosine from there.
        reasons: why each of the settings is what it is; one that was overridden says so.
    """

    num_examples: int
    num_gpus: int
    lora_r: int
    lora_alpha: int
    num_train_epochs: float
    per_device_train_batch_size: int
    gradient_accumulation_steps: int
    max_length: int
    warmup_steps: float
    reasons: Mapping[str, str]

    def settings(self) -> dict[str, Any]:
        """The settings alone, for a stage's configuration."""
        return {key: getattr(self, key) for key in KEYS}

    @property
    def effective_batch_size(self) -> int:
        """Examples an optimiser step, over all GPUs."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps * self.num_gpus

    def rows(self) -> list[tuple[str, str, str]]:
        """Key, value and reason of each setting; the effective batch is the last."""
        batch = self.effective_batch_size
        note = "" if batch == EFFECTIVE_BATCH else f", not the planned {EFFECTIVE_BATCH}"
        settings = [(key, str(value).removesuffix(".0"), self.reasons[key]) for key, value in self.settings().items()]
        return [*settings, ("effective batch", str(batch), f"on {_gpus(self.num_gpus)}{note}")]

    def table(self) -> str:
        """The rows in aligned columns, as a log shows them."""
        width = max(map(len, KEYS))
        return "\n".join(f"{key:<{width}}  {value:>5}  {reason}" for key, value, reason in self.rows())


def plan_by_size(num_examples: int, num_gpus: int = 1, overrides: Mapping[str, Any] | None = None) -> Plan:
    """The plan for so many training examples.

    Args:
        num_examples: At least 1.
        num_gpus: Of 8 examples a step, each GPU gets an equal part: accumulation shrinks first, then the batch.
        overrides: Settings to take instead of the planned ones, valid ones: `rlhf.config` checks them. Each changes what
            it names and no other value; one that says what the plan says is none.

    Raises:
        ValueError: for no examples, a number of GPUs that does not divide the effective batch (unless batch and
            accumulation are both overridden), and overrides of unknown keys; all faults at once.
    """
    overrides = dict(overrides or {})
    faults = _faults(num_examples, num_gpus, overrides)
    if faults:
        raise ValueError("; ".join(faults))

    if num_examples < _FIRST_MIDDLE:
        band, rank, epochs, batch, length = f"fewer than {_FIRST_MIDDLE}", 8, 10, 2, 512
    elif num_examples < _FIRST_LARGE:
        band, rank, epochs, batch, length = f"{_FIRST_MIDDLE} to {_FIRST_LARGE - 1}", 16, 5, 2, 640
    else:
        band, rank, epochs, batch, length = f"{_FIRST_LARGE} or more", 32, 3, 4, 768
    per_gpu = max(1, EFFECTIVE_BATCH // num_gpus)
    batch = min(batch, per_gpu)
    warmup = min(math.floor(WARMUP_SHARE * num_examples), MAX_WARMUP_STEPS)

    size = f"{num_examples} examples: {band}"
    share = f"{EFFECTIVE_BATCH} examples a step on {_gpus(num_gpus)}"
    planned = {
        "lora_r": (rank, f"{size}; the more examples, the larger an adapter they fill"),
        "lora_alpha": (2 * rank, f"twice the rank {rank}, so that the update's scale is 2 whatever the rank"),
        "num_train_epochs": (epochs, f"{size}; the fewer examples, the more often each is seen"),
        "per_device_train_batch_size": (batch, f"{share}; what a 16 GB GPU holds at this length"),
        "gradient_accumulation_steps": (per_gpu // batch, f"{share}, {batch} at a time"),
        "max_length": (length, f"{size}; tokens, longer examples are cut"),
        "warmup_steps": (warmup, f"{WARMUP_SHARE:g} x {num_examples} rounded down, at most {MAX_WARMUP_STEPS}"),
    }
    values = {key: overrides.get(key, value) for key, (value, _) in planned.items()}
    reasons = {
        key: f"overridden; the plan says {value}" if values[key] != value else reason
        for key, (value, reason) in planned.items()
    }
    if values["lora_r"] != rank and values["lora_alpha"] == 2 * rank:
        scale = values["lora_alpha"] / values["lora_r"]
        reasons["lora_alpha"] = (
            f"twice the planned rank {rank}; with `lora_r` {values['lora_r']} the update's scale is {scale:g}, not 2: "
            f"override it with {2 * values['lora_r']} to keep the scale"
        )
    return Plan(num_examples=num_examples, num_gpus=num_gpus, reasons=reasons, **values)


def _faults(num_examples: int, num_gpus: int, overrides: Mapping[str, Any]) -> list[str]:
    faults = []
    if num_examples < 1:
        faults.append(f"`num_examples` must be at least 1, got {num_examples}; add training data")
    by_hand = {"per_device_train_batch_size", "gradient_accumulation_steps"} <= set(overrides)
    if num_gpus < 1:
        faults.append(f"`num_gpus` must be at least 1, got {num_gpus}; a CPU counts as one")
    elif EFFECTIVE_BATCH % num_gpus and not by_hand:
        faults.append(
            f"`num_gpus` {num_gpus} does not divide the effective batch of {EFFECTIVE_BATCH}; use 1, 2, 4 or 8 GPUs, "
            "or override both `per_device_train_batch_size` and `gradient_accumulation_steps`"
        )
    faults += [f"`{key}` is no key of the plan; it has {', '.join(KEYS)}" for key in overrides if key not in KEYS]
    return faults


def _gpus(number: int) -> str:
    return "1 GPU" if number == 1 else f"{number} GPUs"
