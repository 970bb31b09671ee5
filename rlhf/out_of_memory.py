"""A batch that fits: what a stage was asked for, what it trains with, and how it goes on after an out-of-memory.

The effective batch never changes: what the batch of a device loses, gradient accumulation gains. So steps, rows of a
step, learning rate schedule and PPO's rollouts stay those that were asked for. What fits stands in `fitted_batch.json`
in the stage's folder, beside the configuration as it was asked for.
"""

import json
import logging
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate.utils.memory import should_reduce_batch_size

from rlhf.files import write_json

logger = logging.getLogger(__name__)

FILE = "fitted_batch.json"
EXIT_STATUS = 77  # of a rank that ran out of memory; any other error of a script ends with 2

TRAIN, ACCUMULATION = "per_device_train_batch_size", "gradient_accumulation_steps"
EVAL, GENERATION = "per_device_eval_batch_size", "generation_batch_size"
SIZES = (TRAIN, ACCUMULATION, EVAL, GENERATION)

# The function in which the memory ran out -> the size that it goes by; the innermost counts, any other is training.
BY_FUNCTION = {"sample_replies": GENERATION, "evaluation_loop": EVAL}

# What CUDA and cuBLAS say when torch's allocator is not the one that asks.
OF_LIBRARIES = ("CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")

Sizes = dict[str, int]


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether a device's memory ran out: torch's own error, those that accelerate knows, and of allocations past torch."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    if not isinstance(error, RuntimeError):
        return False
    return should_reduce_batch_size(error) or any(text in str(error) for text in OF_LIBRARIES)


def smaller(sizes: Mapping[str, int], key: str = TRAIN) -> Sizes | None:
    """The sizes with `key` halved, None where it is 1 already.

    A train batch becomes its largest divisor up to a half, and accumulation grows by the same factor, so that their
    product stays.
    """
    size = sizes[key]
    if size == 1:
        return None
    if key != TRAIN:
        return {**sizes, key: size // 2}
    half = next(part for part in range(size // 2, 0, -1) if size % part == 0)
    return {**sizes, TRAIN: half, ACCUMULATION: sizes[ACCUMULATION] * (size // half)}


def sizes_of(values: Mapping[str, Any]) -> Sizes:
    """Those of `SIZES` that a stage has."""
    return {key: values[key] for key in SIZES if key in values}


def remembered(folder: Path, asked: Mapping[str, int]) -> Sizes:
    """The sizes that a stage goes on with: what fitted before, if it was asked for the same as now."""
    state = _read(folder, asked)
    return state["in_use"] if state else dict(asked)


def remember(folder: Path, asked: Mapping[str, int], in_use: Mapping[str, int], reason: str) -> None:
    """Write down what fits, and why it is not what was asked for."""
    state = _read(folder, asked) or {"history": []}
    history = [*state["history"], {"reason": reason, "in_use": dict(in_use)}]
    write_json(folder / FILE, {"asked": dict(asked), "in_use": dict(in_use), "history": history})


def report(folder: Path, values: Mapping[str, Any], error: BaseException, rank: int) -> None:
    """Write down that a stage ran out of memory, and tell in a note of the error how to go on.

    Every rank may call it, at the same time as others: what they write differs in nothing that the next start reads
    but the part of the stage that it happened in.

    Args:
        folder: The stage's.
        values: Its settings as they were asked for.
        error: What was raised.
        rank: Whose memory it was.
    """
    asked = sizes_of(values)
    if TRAIN not in asked:
        if told := advice_of_sampling(values):
            error.add_note(told)
        return
    in_use, key = remembered(folder, asked), _size_to_blame(error, asked)
    state = _read(folder, asked) or {"asked": asked, "in_use": in_use, "history": []}
    write_json(folder / FILE, {**state, "out_of_memory": {"key": key, "rank": rank}})
    after = smaller(in_use, key)
    if after is None:
        error.add_note(advice(values, in_use, key))
    else:
        error.add_note(f"Started again, from its last checkpoint if there is one, it takes {_changed(in_use, after)}.")


def take_report(folder: Path, asked: Mapping[str, int]) -> str | None:
    """Turn a report into the sizes to go on with.

    Returns:
        What changed, None where there is no report or nothing is left to make smaller.
    """
    state = _read(folder, asked)
    found = state.pop("out_of_memory", None) if state else None
    if state is None or found is None:
        return None
    before, after = state["in_use"], smaller(state["in_use"], found["key"])
    if after is None:
        write_json(folder / FILE, state)
        return None
    remember(folder, asked, after, f"rank {found['rank']} ran out of memory")
    return _changed(before, after)


def advice(values: Mapping[str, Any], in_use: Mapping[str, int], key: str = TRAIN) -> str:
    """What is left to try when the smallest batch does not fit, in the order in which it costs least."""
    lines = [f"Out of memory with {', '.join(f'`{name}: {size}`' for name, size in in_use.items())}."]
    if key != TRAIN:
        lines.append(f"`{key}` is 1 already. What else takes memory, the cheapest remedy first:")
    else:
        lines.append("The batch cannot become smaller. What is left, the cheapest remedy first:")
    lengths = {name: values[name] for name in ("max_length", "response_length") if values.get(name)}
    # TRL's configurations call it so still; the Trainer reads `activation_checkpointing`, its newer name
    if not (values.get("gradient_checkpointing") or values.get("activation_checkpointing")):
        lines.append("- `gradient_checkpointing: true` (now false): activations are computed twice and not kept.")
    if values.get("load_in_4bit") is False:
        lines.append("- `load_in_4bit: true` (now false): a quarter of the memory for the frozen base.")
    for name, length in lengths.items():
        lines.append(f"- `{name}: {max(1, length // 2)}` (now {length}): activations shrink in proportion.")
    accumulation = in_use[ACCUMULATION]
    if accumulation > 1:
        lines.append(
            f"- `{ACCUMULATION}: {max(1, accumulation // 2)}` (now {accumulation}), last: no memory for activations is "
            "saved, but less waits to be computed; the effective batch is halved, so lower `learning_rate` too."
        )
    lines.append("- a smaller base in `model_name_or_path`, or a smaller `lora_r`.")
    return "\n".join(lines)


def advice_of_sampling(values: Mapping[str, Any]) -> str:
    """What to lower where a stage replies and trains nothing (`evaluate`, `pairs`); empty for any other."""
    if "max_new_tokens" not in values:
        return ""
    remedies = {  # with the least that each may be
        "batch_size": (1, "fewer replies at a time, which takes longer"),
        "max_length": (1, "shorter prompts: older turns are dropped"),
        "num_generations": (2, "all replies to a prompt are decoded together, however small `batch_size` is"),
    }
    lines = ["Out of memory. What to lower, the cheapest remedy first:"]
    for key, (least, why) in remedies.items():
        if (value := values.get(key, least)) > least:
            lines.append(f"- `{key}: {max(least, value // 2)}` (now {value}): {why}.")
    return "\n".join([*lines, "- a smaller base in `model_name_or_path`."])


def _size_to_blame(error: BaseException, asked: Mapping[str, int]) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    keys = (BY_FUNCTION[frame.name] for frame in reversed(frames) if frame.name in BY_FUNCTION)
    return next((key for key in keys if key in asked), TRAIN)


def _changed(before: Mapping[str, int], after: Mapping[str, int]) -> str:
    parts = [f"`{key}` {after[key]} instead of {before[key]}" for key in after if after[key] != before[key]]
    return " and ".join(parts)


def _read(folder: Path, asked: Mapping[str, int]) -> dict[str, Any] | None:
    """What was written for the same sizes; None where there is nothing, or others were asked for then."""
    path = folder / FILE
    if not path.is_file():
        return None
    state = json.loads(path.read_text(encoding="utf-8"))
    return state if state["asked"] == dict(asked) else None
