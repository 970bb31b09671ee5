"""What a stage needs of each GPU, and for how long: the section "plan" of `rlhf check`. Nothing is loaded.

Activations and logits are counted in the stage's own step on tensors without data (`rlhf/meta_step.py`). What such a step
does not show is worked out by rules, and marked with a star: the optimiser's state, buckets of data parallelism, the attention kernel's
workspace, the cache of the rollout, the CUDA context and fragmentation; of the counted parts, 4-bit layers.
"""

import bisect
import itertools
import json
import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console, Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text
from transformers import AutoConfig, PreTrainedConfig, PreTrainedTokenizerBase
from trl import ModelConfig

from rlhf.check import FILES
from rlhf.config import values_of
from rlhf.data.columns import load_rows, preference_columns, prompt_columns, sft_columns
from rlhf.doctor import Finding, Status
from rlhf.hours import (
    RULE,
    WEEK_HOURS,
    Rows,
    evaluates,
    evaluation_hours,
    ppo_hours,
    token_seconds,
    training_hours,
)
from rlhf.meta_step import T4, Device, Measured, StepShape, measure
from rlhf.model import load_tokenizer
from rlhf.out_of_memory import ACCUMULATION, EVAL, GENERATION, TRAIN, smaller

GIB = 2**30

# What is left of a T4's 16 GB to torch (`torch.cuda.get_device_properties(0).total_memory` with error correction on; the
# number that its out-of-memory messages name).
T4_BYTES = int(14.74 * GIB)
CONTEXT_BYTES = int(0.45 * GIB)  # assumed: driver, kernels and cuBLAS' workspace of a process
FRAGMENTATION = 0.1  # assumed: of what comes and goes; the allocator rounds up and keeps holes
SHORTEST = 256  # no shorter `max_length` is proposed
SAMPLED, LONGEST = 200, 8  # rows whose tokens are counted: spread over the file, and of the most characters
ASSUMED_ROWS = 10_000  # where neither data nor recipe tell
ROWS_A_DIALOGUE = 4  # a conversation of two personas: two sides, in pieces (3.7 measured on Synthetic-Persona-Chat)
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

    @property
    def eval_batch(self) -> int:
        """Rows, pairs or episodes of a held-out forward pass; PPO takes the train batch there."""
        return self.per_device_train_batch_size if self.stage == "ppo" else self.per_device_eval_batch_size

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
        local_rollout: Episodes of the largest rollout on one device, held-out ones included, for PPO.
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
    key = (setting.stage, setting.shape(), setting.eval_batch, prompts, device, config.to_json_string(), repr(args))
    if key not in _MEASURED:
        try:
            _MEASURED[key] = measure(setting.stage, config, args, setting.shape(), device, setting.eval_batch, prompts)
        except (RuntimeError, NotImplementedError) as error:  # a branch on a value, which "meta" tensors have not
            raise PlanError(
                f"The stage {setting.stage!r} of a base of type {config.model_type} cannot be planned, since its step "
                f"asks for values: {error}. Its memory is seen when it runs; start with a batch of 1."
            ) from error
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


# --- bases and settings -----------------------------------------------------------------------------------------------


class PlanError(ValueError):
    """A stage cannot be planned: the configuration of its base is not at hand, or its step wants values."""


@cache
def published() -> dict[str, dict[str, Any]]:
    """The bases whose numbers are known offline, by every name that they have."""
    bases = yaml.safe_load((resources.files("rlhf") / "bases.yaml").read_text(encoding="utf-8"))
    return {name: entry for first, entry in bases.items() for name in (first, *entry.get("also", ()))}


def base_config(name_or_path: str) -> PreTrainedConfig:
    """The configuration of a base: of a folder its config.json, of a known name the published numbers.

    Raises:
        PlanError: if it is neither, nor in the cache of the Hub.
    """
    if not Path(name_or_path).is_dir() and name_or_path in published():
        fields = dict(published()[name_or_path]["config"])
        return AutoConfig.for_model(fields.pop("model_type"), **fields)
    try:
        return AutoConfig.from_pretrained(name_or_path, local_files_only=True)
    except (OSError, ValueError) as error:
        raise PlanError(
            f"`model_name_or_path`: the configuration of {name_or_path} is not at hand. Fetch it with `hf download "
            f"{name_or_path} config.json`, or name a folder that has it; known offline are {', '.join(published())}."
        ) from error


def access(name_or_path: str) -> str | None:
    """What a gated base asks for, and what does without; None for all others."""
    entry = published().get(name_or_path, {})
    if not entry.get("gated") or Path(name_or_path).is_dir():
        return None
    return (
        f"{name_or_path} is gated: accept its licence on {entry['page']}, then `hf auth login` with a token of "
        f"https://huggingface.co/settings/tokens (on Kaggle a secret HF_TOKEN). Without: {entry['ungated']}"
    )


def setting_of(stage: str, values: Mapping[str, Any], longest: int | None = None) -> Setting:
    """What of a stage's configuration decides its memory."""
    own = Setting.__dataclass_fields__
    setting = Setting(stage=stage, **{key: value for key, value in values.items() if key in own and key != "stage"})
    return replace(setting, longest=longest, reward_adapters=_reward_adapters(values))


def _reward_adapters(values: Mapping[str, Any]) -> int:
    """Those of PPO; what lies in no folder yet counts where `reward_adapter` names it."""
    named = {values.get("reward_adapter"), *(values.get("rewards") or {})} - {None}
    return sum(
        name == values.get("reward_adapter") or (Path(str(name)) / "adapter_config.json").is_file() for name in named
    )


def nearest(
    setting: Setting, config: PreTrainedConfig, args: ModelConfig, card: Card, local_rollout: int | None = None
) -> dict[str, Any] | None:
    """The changes that make a stage fit, as few as do; in the order batch, checkpointing, length, 4 bit.

    Returns:
        Keys with their new values, empty where it fits as it is, None where nothing helps.
    """

    def fits(changed: Mapping[str, Any]) -> bool:
        tried = _changed(setting, changed)
        return memory(tried, config, args, T4, card.number, local_rollout).total <= card.size

    if fits({}):
        return {}
    changes: dict[str, Any] = {}
    weights = memory(setting, config, args, T4, card.number, local_rollout).parts
    alone = sum(weights.get(name, 0) for name in ("weights", "adapters", "gradients", "DDP buckets*", "optimiser*"))
    if alone + CONTEXT_BYTES > card.size and not setting.load_in_4bit:
        changes = {"load_in_4bit": True}
    rungs = list(itertools.accumulate(_ladder(setting), operator.or_, initial=changes))
    lowest = bisect.bisect_left(rungs, True, key=fits)
    if lowest == len(rungs):
        return None
    changes = dict(rungs[lowest])
    for key in list(changes):  # what turned out not to be needed
        fewer = {other: value for other, value in changes.items() if other != key}
        if fits(fewer):
            changes = fewer
    if TRAIN in changes:
        changes[ACCUMULATION] = _changed(setting, changes).gradient_accumulation_steps
    return changes


def _ladder(setting: Setting) -> list[dict[str, Any]]:
    """One change after another, each on top of those before."""
    steps: list[dict[str, Any]] = []
    keys = [TRAIN, GENERATION if setting.generation_batch_size else EVAL]
    sizes = {key: getattr(setting, key) for key in (*keys, ACCUMULATION)}
    while any(sizes[key] > 1 for key in keys):
        for key in keys:
            sizes = smaller(sizes, key) or sizes
        steps.append({key: sizes[key] for key in keys})
    if not setting.gradient_checkpointing:
        steps.append({"gradient_checkpointing": True})
    length = setting.max_length
    while length // 2 >= SHORTEST:
        length //= 2
        steps.append({"max_length": length})
    if not setting.load_in_4bit:
        steps.append({"load_in_4bit": True})
    return steps


def _changed(setting: Setting, changes: Mapping[str, Any]) -> Setting:
    """The setting with these changes; where the batch shrinks to a divisor, an optimiser step keeps its number of rows."""
    factor = setting.per_device_train_batch_size // changes.get(TRAIN, setting.per_device_train_batch_size)
    return replace(setting, **{ACCUMULATION: setting.gradient_accumulation_steps * factor, **changes})


# --- what `rlhf check` shows ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StagePlan:
    """A stage's memory and time.

    Attributes:
        stage: Its name.
        memory: None where the stage is not planned (evaluate).
        fits: Whether it does.
        changes: What makes it fit; None where nothing does.
        hours: Estimated.
        rows: What the hours are for.
        left_out: What the stage loads beside this, and neither memory nor hours have.
    """

    stage: str
    memory: Memory | None
    fits: bool
    changes: Mapping[str, Any] | None
    hours: float
    rows: Rows
    left_out: str = ""


def visible_card() -> Card:
    """The GPUs of this machine, else two T4s."""
    if not torch.cuda.is_available():
        return Card()
    number, properties = torch.cuda.device_count(), torch.cuda.get_device_properties(0)
    return Card(properties.name, properties.total_memory, number, here=True)


def plan_stages(stages: Mapping[str, Sequence[Any]], card: Card) -> list[StagePlan]:
    """Plan the stages of a recipe, as far as they train or evaluate.

    Args:
        stages: The configurations of each stage. Those of prepare say how many rows there will be.
        card: What they are to run on.

    Raises:
        PlanError: if the base's configuration is not at hand.
    """
    values = {stage: {**values_of(configs), "stage": stage} for stage, configs in stages.items()}
    plans: list[StagePlan] = []
    for stage in FILES:
        if stage in stages:
            args = next(config for config in stages[stage] if isinstance(config, ModelConfig))
            plans.append(_plan_stage(stage, values[stage], args, values.get("prepare"), card))
    if "evaluate" in stages:
        args = next(config for config in stages["evaluate"] if isinstance(config, ModelConfig))
        plans.append(_plan_evaluation(values["evaluate"], args, values.get("prepare"), card))
    return plans


def _plan_stage(
    stage: str, values: dict[str, Any], args: ModelConfig, prepare: Mapping[str, Any] | None, card: Card
) -> StagePlan:
    config = base_config(values["model_name_or_path"])
    lengths = _lengths(stage, values)
    setting = setting_of(stage, values, lengths[1] if lengths else None)
    rows = _rows(stage, values, prepare, lengths)
    local = _largest_rollout(values, rows, card.number) if stage == "ppo" else None
    found = memory(setting, config, args, T4, card.number, local)
    changes = nearest(setting, config, args, card, local)
    if changes:  # the time is that of what would be run
        setting, values = _changed(setting, changes), {**values, **changes}
    work = memory(setting, config, args, T4, card.number, local).measured
    rows = replace(rows, mean=min(rows.mean, values["max_length"]))
    gpus, length = card.number, setting.length
    decode = _token_seconds(config, work, setting.prompts(local) or (4, length), values)
    if stage == "ppo":
        values = {**values, "reward_adapters": setting.reward_adapters}
        together = setting.prompts(local)
        values["generation_batch_size"] = together[0] if together else 1
        hours = ppo_hours(values, rows, work.train, work.evaluate, work.prefill, gpus, length, decode)
    else:
        hours = training_hours(values, rows, work.train, work.evaluate, gpus, length, decode)
    return StagePlan(stage, found, found.total <= card.size, changes, hours, rows, _left_out(values))


def _largest_rollout(values: Mapping[str, Any], rows: Rows, gpus: int) -> int:
    """Episodes on one GPU: of a rollout of PPO, or of all held-out prompts, where these are more."""
    local = values[TRAIN] * values[ACCUMULATION] * values["num_mini_batches"]
    heldout = math.ceil(rows.heldout / gpus) if evaluates(values) else 0
    return max(local, heldout)


def _left_out(values: Mapping[str, Any]) -> str:
    """Reward models of their own, which come with their own base."""
    known = {values.get("reward_adapter"), values.get("reward_function")}
    models = [
        source
        for source in map(str, values.get("rewards") or ())
        if ":" not in source and source not in known and not (Path(source) / "adapter_config.json").is_file()
    ]
    if not models:
        return ""
    return f"left out of memory and hours: {', '.join(models)} of `rewards`, a model of its own on each GPU"


def _plan_evaluation(
    values: dict[str, Any], args: ModelConfig, prepare: Mapping[str, Any] | None, card: Card
) -> StagePlan:
    config = base_config(values["model_name_or_path"])
    lengths = _lengths("sft", values)
    length = min(values["max_length"], lengths[1] if lengths else values["max_length"])
    setting = Setting(
        "ppo", 1, 1, 1, length, False, values["load_in_4bit"], values["batch_size"], values["max_new_tokens"],
        reward_adapters=0, optim="none", longest=length,
    )  # fmt: skip
    found = memory(setting, config, args, T4, card.number, values["batch_size"])
    rows = _rows("sft", values, prepare, lengths)
    prompts = (values["batch_size"], length)
    decode = _token_seconds(config, found.measured, prompts, values)
    hours = evaluation_hours(values, rows, found.measured.prefill, card.number, length, decode)
    return StagePlan("evaluate", None, True, {}, hours, rows)


def _token_seconds(
    config: PreTrainedConfig, work: Measured, prompts: tuple[int, int], values: Mapping[str, Any]
) -> float:
    cache_bytes = kv_cache_bytes(config, prompts[0] * prompts[1], torch.float16)
    kernels = (work.prefill.kernels or work.evaluate.kernels) * (0.5 if values["stage"] == "dpo" else 1)
    return token_seconds(work.parts.weights, cache_bytes, kernels)


def _lengths(stage: str, values: Mapping[str, Any]) -> tuple[float, int] | None:
    """Mean and longest tokens of the rows that are prepared, the mean of a sample; None where none are, or no tokenizer."""
    path = Path(values["dataset"]) / f"{FILES[stage]}_train.jsonl"
    try:
        rows = load_rows(path, values.get("max_train_rows"))
        tokenizer = load_tokenizer(values["model_name_or_path"])
        by_size = sorted(rows, key=lambda row: -len(json.dumps(row)))
        sizes = [
            [_tokens(stage, row, tokenizer) for row in some]
            for some in (rows[:: max(1, len(rows) // SAMPLED)], by_size[:LONGEST])
        ]
    except (OSError, ValueError):
        return None  # the pre-flight list says what is wrong with the rows
    every = [size for some in sizes for size in some]
    return (sum(sizes[0]) / len(sizes[0]), max(every)) if every else None


def _tokens(stage: str, row: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> int:
    """Of a whole row; for PPO of its prompt."""
    if stage == "sft":
        return len(sft_columns([row], tokenizer, 10**9)[0]["input_ids"])
    if stage == "ppo":
        return len(prompt_columns([row], tokenizer, 10**9)[0]["prompt_ids"])
    columns = preference_columns([row], tokenizer, 10**9)[0]
    return len(columns["prompt_ids"]) + max(len(columns["chosen_ids"]), len(columns["rejected_ids"]))


def _rows(
    stage: str, values: Mapping[str, Any], prepare: Mapping[str, Any] | None, lengths: tuple[float, int] | None
) -> Rows:
    """How many rows there are, or will be."""
    folder = Path(values["dataset"])
    numbers = []
    for side, limit in (("train", "max_train_rows"), ("heldout", "max_eval_rows")):
        path = folder / f"{FILES[stage]}_{side}.jsonl"
        number = sum(1 for line in path.open("rb") if line.strip()) if path.is_file() else None
        most = values.get(limit)
        numbers.append(number if number is None or most is None else min(number, most))
    mean = min(lengths[0], values["max_length"]) if lengths else float(values["max_length"])
    train, heldout = numbers
    if train is not None and heldout is not None:
        return Rows(train, heldout, mean, f"{train:,} rows" + (f" of {mean:.0f} tokens" if lengths else ""))
    train, heldout = _rows_of_recipe(stage, prepare or {})
    train, heldout = (min(n, values.get(k) or n) for n, k in ((train, "max_train_rows"), (heldout, "max_eval_rows")))
    return Rows(train, heldout, mean, f"about {train:,} rows, none prepared, each taken at `max_length`")


def _rows_of_recipe(stage: str, prepare: Mapping[str, Any]) -> tuple[int, int]:
    """Training and held-out rows by what the stage prepare is asked for."""
    if stage in ("reward", "dpo"):
        return prepare.get("train_pairs", ASSUMED_ROWS), prepare.get("heldout_pairs", ASSUMED_ROWS // 10)
    if stage == "ppo":
        return prepare.get("train_prompts", ASSUMED_ROWS), prepare.get("heldout_prompts", 200)
    if prepare.get("source") in ("world", "card"):
        return prepare["train_dialogues"], prepare["heldout_dialogues"]
    if not prepare.get("num_dialogues"):
        return ASSUMED_ROWS, ASSUMED_ROWS // 10
    rows = prepare["num_dialogues"] * ROWS_A_DIALOGUE
    heldout = prepare["heldout"] * rows if prepare["heldout"] < 1 else prepare["heldout"]
    return round(rows - heldout), round(heldout)


def plan_findings(stages: Mapping[str, Sequence[Any]], card: Card | None = None) -> list[Finding]:
    """The plan for programs: what does not fit fails on the GPUs of this machine; on a machine without, it warns."""
    card = card or visible_card()
    try:
        plans = plan_stages(stages, card)
    except ValueError as error:
        return [Finding("plan", "warn", str(error))]
    findings = []
    for plan in plans:
        needed = f"{plan.memory.total / GIB:.2f} of {card.size / GIB:.2f} GiB on each GPU, " if plan.memory else ""
        found = f"{needed}{plan.hours:.2f} hours on {card.number} T4, estimated"
        found += f"; {plan.left_out}" if plan.left_out else ""
        status: Status = "ok" if plan.fits else "fail" if card.here else "warn"
        findings.append(Finding(f"{plan.stage}: plan", status, found, "" if plan.fits else _remedy(plan)))
    return findings


def _remedy(plan: StagePlan) -> str:
    if plan.changes is None:
        return "No batch, length or precision makes it fit; take a smaller base"
    return "It fits with " + ", ".join(f"`{key}: {str(value).lower()}`" for key, value in plan.changes.items())


def show_plan(
    stages: Mapping[str, Sequence[Any]], console: Console | None = None, card: Card | None = None
) -> list[str]:
    """Print the section "plan": memory on each GPU, hours, and the nearest settings that fit.

    Returns:
        The stages that do not fit the GPUs of this machine; on a machine without, nothing is wrong yet.
    """
    console, card = console or Console(), card or visible_card()
    of_model = [values_of(configs) for stage, configs in stages.items() if stage in FILES]
    names = list(dict.fromkeys(values["model_name_or_path"] for values in of_model))
    try:
        plans = plan_stages(stages, card)
    except ValueError as error:  # of the plan, or of the adapter on this base
        console.print(Panel(Text(str(error), style="yellow"), title="plan", title_align="left", border_style="cyan"))
        return []
    trained = [plan for plan in plans if plan.memory is not None]
    lines = [
        Text(f"{plan.stage} does not fit. {_remedy(plan)}", style="bold red") for plan in trained if not plan.fits
    ]
    lines += [Text(f"{plan.stage}: {plan.left_out}", style="yellow") for plan in plans if plan.left_out]
    lines += [Text(text, style="yellow") for text in map(access, names) if text]
    total = sum(plan.hours for plan in plans)
    share = total / WEEK_HOURS
    lines.append(
        Text(
            f"training and evaluation: {total:.1f} hours on {card.number} T4, {share:.0%} of Kaggle's {WEEK_HOURS} hours "
            "a week",
            style="bold",
        )
    )
    unplanned = [stage for stage in stages if stage not in {plan.stage for plan in plans}]
    if unplanned:
        lines.append(Text(f"not in these hours: {', '.join(unplanned)}", style="dim"))
    lines += [Text(f"{plan.stage}: {plan.rows.said}", style="dim") for plan in plans]
    lines.append(
        Text("* by a rule, not counted in the step. memory: GiB on each GPU; float16, LoRA in float32", style="dim")
    )
    lines.append(Text(RULE, style="dim"))
    title = f"plan for {card.number} x {card.name} ({card.size / GIB:.1f} GiB each): {', '.join(names)}"
    content = [_table(trained, plans, card), Text(), *lines] if trained else lines
    console.print(Panel(Group(*content), title=title, title_align="left", border_style="cyan"))
    return [plan.stage for plan in trained if not plan.fits and card.here]


def _table(trained: Sequence[StagePlan], plans: Sequence[StagePlan], card: Card) -> Table:
    """A column a stage, a row a part."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("")
    for plan in plans:
        table.add_column(plan.stage, justify="right")
    found = [plan.memory for plan in trained if plan.memory is not None]
    blank = [""] * (len(plans) - len(trained))
    for name in dict.fromkeys(part for each in found for part in each.parts):
        sizes = [each.parts.get(name, 0) for each in found]
        if any(sizes):
            table.add_row(name, *(f"{size / GIB:.2f}" for size in sizes), *blank)
    table.add_row("total", *(f"{each.total / GIB:.2f}" for each in found), *blank, style="bold")
    table.add_row("at most in", *(each.phase.removeprefix("a ").removeprefix("the ") for each in found), *blank)
    marks = [Text("fits", style="green") if plan.fits else Text("NO", style="bold red") for plan in trained]
    table.add_row(f"of {card.size / GIB:.1f} GiB", *marks, *blank)
    table.add_row("hours, estimated", *(f"{plan.hours:.2f}" for plan in plans))
    table.add_row("of the week's quota", *(f"{plan.hours / WEEK_HOURS:.1%}" for plan in plans))
    return table
