"""What a stage needs of each GPU, and for how long: the section "plan" of `rlhf check`. Nothing is loaded.

Activations and logits are counted in the stage's own step on tensors without data (`rlhf/meta_step.py`). What such a step
does not show is worked out by rules, and marked with a star: the optimiser's state, buckets of data parallelism, the attention kernel's
workspace, the cache of the rollout, the CUDA context and fragmentation; of the counted parts, 4-bit layers.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedConfig
from trl import ModelConfig

from rlhf.meta_step import T4, Device, Measured, StepShape, measure

GIB = 2**30

# What is left of a T4's 16 GB to torch (`torch.cuda.get_device_properties(0).total_memory` with error correction on; the
# number that its out-of-memory messages name).
T4_BYTES = int(14.74 * GIB)
CONTEXT_BYTES = int(0.45 * GIB)  # assumed: driver, kernels and cuBLAS' workspace of a process
FRAGMENTATION = 0.1  # assumed: of what comes and goes; the allocator rounds up and keeps holes
SHORTEST = 256  # no shorter `max_length` is proposed
# Bytes of state a trained weight, by the beginning of `optim`: two float32 averages where no other is known.
OPTIMISER_BYTES = {"adamw_8bit": 2, "adamw_bnb_8bit": 2, "paged_adamw_8bit": 2, "adafactor": 4, "sgd": 0}


@dataclass(frozen=True)
class Card:
    """A GPU, and how many of them share a step."""

    name: str = "T4"
    size: int = T4_BYTES
    number: int = 2
    here: bool = False


@dataclass(frozen=True)
class Setting:
    """What of a stage's configuration decides its memory; the names are those of the keys.

    Attributes:
        longest: tokens of the longest row where the data are there; `max_length` stands in for it.
        replies: tokens of the longest reply of PPO, on top of `max_length`.
        trained: tokens of a row that the loss is on; None is all.
    """

    stage: str
    per_device_train_batch_size: int
    gradient_accumulation_steps: int
    per_device_eval_batch_size: int
    max_length: int
    gradient_checkpointing: bool
    load_in_4bit: bool = False
    generation_batch_size: int = 0
    response_length: int = 0
    value_model: str = "head"
    reward_adapters: int = 0
    optim: str = "adamw_torch"
    longest: int | None = None
    trained: int | None = None

    @property
    def length(self) -> int:
        """Tokens of the longest row, reply included."""
        return min(self.max_length, self.longest or self.max_length) + self.response_length

    def shape(self) -> StepShape:
        """The size of a training step."""
        return StepShape(
            self.per_device_train_batch_size,
            self.length,
            min(self.response_length or self.trained or self.length, self.length),
            self.gradient_checkpointing,
            accumulates=self.gradient_accumulation_steps > 1,
            value_model=self.value_model,
            reward_adapters=self.reward_adapters,
            load_in_4bit=self.load_in_4bit,
        )

    def prompts(self, local_rollout: int | None = None) -> tuple[int, int] | None:
        """Number and tokens of the prompts that are replied to together."""
        if not self.generation_batch_size:
            return None
        return min(
            self.generation_batch_size, local_rollout or self.generation_batch_size
        ), self.length - self.response_length


@dataclass(frozen=True)
class Memory:
    """Bytes on each GPU when a stage needs most.

    Attributes:
        parts: by name; those that end in a star are worked out by a rule.
        phase: what the stage does then.
        measured: the counts that this was made of.
    """

    parts: Mapping[str, float]
    phase: str
    measured: Measured

    @property
    def total(self) -> float:
        return sum(self.parts.values())


def memory(
    setting: Setting,
    config: PreTrainedConfig,
    args: ModelConfig,
    device: Device = T4,
    gpus: int = 2,
    local_rollout: int | None = None,
    training_only: bool = False,
) -> Memory:
    """What a stage needs on each device, at most.

    Args:
        setting: Of the stage.
        config: Of its base.
        args: Of its adapters.
        device: What it runs on; on a CPU there is no context, workspace or fragmentation.
        gpus: Processes that share a step.
        local_rollout: Episodes of a rollout on one device, for PPO.
        training_only: Leave out held-out batches, and the check of a saved reward adapter.
    """
    prompts = setting.prompts(local_rollout)
    found = _measure(setting, config, args, device, prompts)
    shape = setting.shape()
    gradients = 4 * found.parts.trainable
    on_gpu = device.type == "cuda"
    # Without accumulation the step itself makes the gradients, and they are within its peak.
    activations = {"a training step": found.train.peak - (0 if shape.accumulates else gradients)}
    logits = {"a training step": found.train.logits}
    if not training_only:
        activations["a held-out batch"], logits["a held-out batch"] = found.evaluate.peak, found.evaluate.logits
    more: dict[str, dict[str, float]] = {}
    if prompts:
        activations["a rollout"], logits["a rollout"] = found.prefill.peak, found.prefill.logits
        tokens = prompts[0] * (prompts[1] + setting.response_length)
        more["a rollout"] = {"KV cache*": kv_cache_bytes(config, tokens, device.dtype)}
    if setting.stage == "reward" and not training_only:
        # The script loads the base once more, to see that the saved adapter scores as the trained one.
        activations["the check of the saved adapter"], logits["the check of the saved adapter"] = 0, 0
        more["the check of the saved adapter"] = {"a second copy*": found.parts.weights + found.parts.adapters}
    phase = max(activations, key=lambda name: activations[name] + sum(more.get(name, {}).values()))
    moving = max(0.0, activations[phase])
    parts: dict[str, float] = {
        "weights" + ("*" if setting.load_in_4bit else ""): found.parts.weights,
        "adapters": found.parts.adapters,
        "gradients": gradients,
        "DDP buckets*": gradients if gpus > 1 else 0,
        "optimiser*": optimiser_bytes(setting.optim) * found.parts.trainable,
        "activations": moving - min(moving, logits[phase]),
        "logits": min(moving, logits[phase]),
        "attention workspace*": _workspace(config, shape, setting.stage)
        if on_gpu and phase == "a training step"
        else 0,
        "KV cache*": 0,
        "a second copy*": 0,
        **more.get(phase, {}),
        "CUDA context*": CONTEXT_BYTES if on_gpu else 0,
    }
    comes_and_goes = ("activations", "logits", "attention workspace*", "KV cache*")
    parts["fragmentation*"] = FRAGMENTATION * sum(parts[name] for name in comes_and_goes) if on_gpu else 0
    return Memory(parts, phase, found)


_MEASURED: dict[Any, Measured] = {}


def _measure(
    setting: Setting, config: PreTrainedConfig, args: ModelConfig, device: Device, prompts: tuple[int, int] | None
) -> Measured:
    """As [`rlhf.meta_step.measure`], once for each question."""
    key = (setting.stage, setting.shape(), setting.per_device_eval_batch_size, prompts, device, config.to_json_string(),
           repr(args))  # fmt: skip
    if key not in _MEASURED:
        _MEASURED[key] = measure(
            setting.stage, config, args, setting.shape(), device, setting.per_device_eval_batch_size, prompts
        )
    return _MEASURED[key]


def kv_cache_bytes(config: PreTrainedConfig, tokens: int, dtype: torch.dtype) -> int:
    """Keys and values of so many tokens, in all layers: 2 x layers x heads for them x width of a head x tokens x bytes."""
    text = config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    return 2 * text.num_hidden_layers * heads * _head_width(text) * tokens * dtype.itemsize


def optimiser_bytes(optim: str) -> int:
    """Bytes of state a trained weight."""
    return OPTIMISER_BYTES.get(str(getattr(optim, "value", optim)), 8)


def _head_width(text: PreTrainedConfig) -> int:
    return getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads


def _workspace(config: PreTrainedConfig, shape: StepShape, stage: str) -> int:
    """Float32 sums of the three gradients of one layer's attention, which its backward kernel works in."""
    text = config.get_text_config()
    rows = shape.batch * (2 if stage in ("reward", "dpo") else 1)
    return 3 * 4 * rows * shape.length * text.num_attention_heads * _head_width(text)
