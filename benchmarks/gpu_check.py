"""What only a GPU can show, in one run of under 8 minutes, as one JSON object on standard output.

    python benchmarks/gpu_check.py [--output benchmarks/results] [--rehearse]

No network: models have random weights in the shapes of SmolLM2-360M, TinyLlama-1.1B, Qwen2.5-7B and Llama-3.1-8B, the
large ones in 4 bit, made a layer at a time on the card, under a cap of 15 GB. Everything runs in float16 with a gradient
scaler, as on a T4, also where the card has bfloat16. Each check says whether it passed, failed or was skipped, and why;
one that failed makes the exit status 1. `--rehearse` runs the same functions on a CPU, on tiny shapes in float32.
"""

import argparse
import copy
import gc
import importlib
import importlib.util
import json
import math
import platform
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Trainer,
)
from transformers.integrations import sdpa_attention
from trl import DPOConfig, ModelConfig, RewardConfig, SFTConfig

from rlhf.dpo import PersonaDPOTrainer
from rlhf.files import versions, write_json
from rlhf.lora import lora_config
from rlhf.model import _never_group, precision, trainable_to_fp32
from rlhf.ppo_trainer import PPOConfig, PPOTrainer
from rlhf.reward import PersonaRewardTrainer
from rlhf.rewards import pool_by_mask
from rlhf.sft import PersonaSFTTrainer
from rlhf.startup import prepare_training

CAP_BYTES = 15_000_000_000  # what is left of a T4's 16 GB beside the CUDA context, about
SECONDS = 420.0  # after which no further check is begun; the longest takes less than a minute
OFF_BY = 0.10  # how far the plan may be from the measured peak
STEPS = 3
PAD, EOS = 0, 1

# Sizes as the config.json of each model on the Hub has them (looked up 2026-11-21).
SHAPES: dict[str, PretrainedConfig] = {
    "SmolLM2-360M": LlamaConfig(
        vocab_size=49152, hidden_size=960, intermediate_size=2560, num_hidden_layers=32, num_attention_heads=15,
        num_key_value_heads=5, max_position_embeddings=8192, tie_word_embeddings=True,
    ),
    "TinyLlama-1.1B": LlamaConfig(
        vocab_size=32000, hidden_size=2048, intermediate_size=5632, num_hidden_layers=22, num_attention_heads=32,
        num_key_value_heads=4, max_position_embeddings=2048,
    ),
    "Qwen2.5-7B": Qwen2Config(
        vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28,
        num_key_value_heads=4, max_position_embeddings=32768,
    ),
    "Llama-3.1-8B": LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, max_position_embeddings=131072,
    ),
}  # fmt: skip
TINY = {"vocab_size": 300, "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 256}  # fmt: skip

# (shape, method, 4 bit, rows of a batch, tokens of a row): small models to see each method, large ones to see the limit.
TRAININGS = (
    ("SmolLM2-360M", "sft", False, 4, 512),
    ("TinyLlama-1.1B", "sft", True, 4, 512),
    ("TinyLlama-1.1B", "reward", True, 2, 512),
    ("TinyLlama-1.1B", "dpo", True, 2, 512),
    ("TinyLlama-1.1B", "ppo", True, 4, 384),
    ("Llama-3.1-8B", "sft", True, 1, 512),
    ("Llama-3.1-8B", "dpo", True, 1, 512),
    ("Qwen2.5-7B", "sft", True, 1, 512),
)
RESPONSE = 48
ADAPTER = ModelConfig(lora_r=16, lora_alpha=32, lora_dropout=0.0)


class Skipped(Exception):
    """A check that cannot run here, and why."""


class Machine:
    """Where the checks run: the card, or the CPU for a rehearsal."""

    def __init__(self, rehearse: bool) -> None:
        self.rehearse = rehearse
        self.device = torch.device("cpu" if rehearse else "cuda")
        self.dtype = torch.float32 if rehearse else torch.float16

    def shape(self, name: str) -> PretrainedConfig:
        config = copy.deepcopy(SHAPES[name])
        if self.rehearse:
            config = type(config)(**{**TINY, "tie_word_embeddings": config.tie_word_embeddings})
        config.pad_token_id, config.bos_token_id, config.eos_token_id = PAD, None, EOS
        return config

    def synchronise(self) -> None:
        if not self.rehearse:
            torch.cuda.synchronize()

    @contextmanager
    def peak(self) -> Iterator[dict[str, float]]:
        """The most memory that tensors took within, in GB; nothing on a CPU, whose memory torch does not count."""
        found: dict[str, float] = {}
        if not self.rehearse:
            torch.cuda.reset_peak_memory_stats()
        yield found
        if not self.rehearse:
            found["peak_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 3)
            found["reserved_gb"] = round(torch.cuda.max_memory_reserved() / 1e9, 3)


# Models


def tokenizer() -> PreTrainedTokenizerFast:
    """Of three words: the rows are random ids, which nobody reads."""
    words = {"<pad>": PAD, "</s>": EOS, "w": 2}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="w")), pad_token="<pad>", eos_token="</s>",
        chat_template="{% for m in messages %}{{ m['content'] + eos_token }}{% endfor %}",
    )  # fmt: skip


def base_model(machine: Machine, name: str, four_bit: bool, reward: bool = False) -> PreTrainedModel:
    """A base with random weights, made a layer at a time, so that no more than one is there in full.

    In 4 bit each linear layer of a block is quantised as it is made, as [`rlhf.model.load_base`] has it.
    """
    config = machine.shape(name)
    layers, config.num_hidden_layers = config.num_hidden_layers, 1
    auto = AutoModelForSequenceClassification if reward else AutoModelForCausalLM
    if reward:
        config.num_labels = 1
    with torch.device(machine.device):
        model = auto.from_config(config, dtype=machine.dtype, attn_implementation="sdpa")
        own, make = model.config, type(model.model.layers[0])
        own.num_hidden_layers = layers
        del model.model.layers[:]
        for number in range(layers):
            layer = make(own, number).to(machine.dtype)
            for module in layer.modules():
                if isinstance(module, nn.Linear):
                    nn.init.normal_(module.weight, std=0.02)
            model.model.layers.append(quantised(layer, machine) if four_bit else layer)
    model.requires_grad_(False)
    model.is_loaded_in_4bit = four_bit and not machine.rehearse  # PEFT and TRL go by it
    if reward:
        pool_by_mask(model)
    return model


def quantised(layer: nn.Module, machine: Machine) -> nn.Module:
    """The block with 4-bit linear layers; as it is in a rehearsal, since quantising takes a card."""
    if machine.rehearse:
        return layer
    import bitsandbytes

    for path, module in list(layer.named_modules()):
        if isinstance(module, nn.Linear):
            small = bitsandbytes.nn.Linear4bit(
                module.in_features, module.out_features, bias=module.bias is not None, compute_dtype=machine.dtype,
                compress_statistics=True, quant_type="nf4", device="meta",
            )  # fmt: skip
            small.weight = bitsandbytes.nn.Params4bit(
                module.weight.data, requires_grad=False, quant_type="nf4", compress_statistics=True
            ).to(machine.device)
            small.bias = module.bias
            layer.set_submodule(path, small)
    return layer


# Trainings


def ids(length: int, config: PretrainedConfig, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, config.vocab_size, (length,), generator=generator).tolist()


def build(machine: Machine, name: str, method: str, four_bit: bool, batch: int, length: int, folder: str) -> Trainer:
    """The project's own trainer for a method, on random rows that are all as long as allowed."""
    if machine.rehearse:
        length = 48
    response = 6 if machine.rehearse else RESPONSE
    model = base_model(machine, name, four_bit, reward=method == "reward")
    config = model.config
    common = {
        "output_dir": folder, "use_cpu": machine.rehearse, "fp16": not machine.rehearse, "bf16": False, "seed": 3,
        "per_device_train_batch_size": batch, "report_to": "none", "save_strategy": "no", "disable_tqdm": True,
        "logging_steps": 1, "learning_rate": 1e-4, "activation_checkpointing": True, "log_level": "error",
        "activation_checkpointing_kwargs": {"use_reentrant": False}, "logging_nan_inf_filter": False,
    }  # fmt: skip
    steps = {"max_steps": STEPS, "max_length": length}
    lora = lora_config(ADAPTER, model, reward=method == "reward")
    rows = range(batch * STEPS)
    words = tokenizer()
    if method == "sft":
        data = [{"input_ids": ids(length, config, row), "labels": ids(length, config, row)} for row in rows]
        trainer: Trainer = PersonaSFTTrainer(
            model=model, args=SFTConfig(**common, **steps), train_dataset=Dataset.from_list(data),
            processing_class=words, peft_config=lora,
        )  # fmt: skip
    elif method == "reward":
        data = [
            {"chosen_ids": ids(length, config, row), "rejected_ids": ids(length, config, -row - 1)} for row in rows
        ]
        trainer = PersonaRewardTrainer(
            model=model, args=RewardConfig(**common, **steps), train_dataset=Dataset.from_list(data),
            processing_class=words, peft_config=lora,
        )  # fmt: skip
    elif method == "dpo":
        half = length // 2
        data = [{"prompt_ids": ids(half, config, row), "chosen_ids": ids(half, config, row + 1000),
                 "rejected_ids": ids(half, config, row + 2000)} for row in rows]  # fmt: skip
        trainer = PersonaDPOTrainer(
            model=get_peft_model(model, lora), args=DPOConfig(**common, **steps),
            train_dataset=Dataset.from_list(data), processing_class=words,
        )  # fmt: skip
    else:
        policy = get_peft_model(model, lora)
        policy.add_adapter("reference", lora)
        data = [{"prompt_ids": ids(length - response, config, row), "row": '{"prompt": []}'} for row in rows]
        del common["activation_checkpointing"], common["activation_checkpointing_kwargs"]
        trainer = PPOTrainer(
            model=policy, train_dataset=Dataset.from_list(data), processing_class=words, reward_functions=[num_words],
            args=PPOConfig(**common, total_episodes=batch * 2, num_ppo_epochs=2, response_length=response,
                           max_length=length, gradient_checkpointing=True),
        )  # fmt: skip
    trainable_to_fp32(trainer.model)
    return trainer


def num_words(prompts: list[Any], completions: list[str], **columns: Any) -> list[float]:
    """A reward that costs nothing."""
    return [float(len(text)) for text in completions]


def train(machine: Machine, name: str, method: str, four_bit: bool, batch: int, length: int) -> dict[str, Any]:
    """A few steps under the cap: finite losses, no step dropped by the scaler but the first, float32 adapters."""
    if four_bit and not machine.rehearse and importlib.util.find_spec("bitsandbytes") is None:
        raise Skipped("bitsandbytes is not installed")
    with tempfile.TemporaryDirectory() as folder:
        with machine.peak() as building:
            trainer = build(machine, name, method, four_bit, batch, length, folder)
        loaded = {} if machine.rehearse else {"loaded_gb": round(torch.cuda.memory_allocated() / 1e9, 3)}
        prepare_training(trainer)  # as `watch` does: padding, gradients, the longest rows
        fitted = trainer.args.per_device_train_batch_size
        with machine.peak() as training:
            began = time.perf_counter()
            trainer.train()
            machine.synchronise()
            seconds = time.perf_counter() - began
        rows = [row for row in trainer.state.log_history if "loss" in row]
        scaler = trainer.accelerator.scaler
        numbers = {
            "batch": fitted, "tokens_per_row": length, "steps": trainer.state.global_step,
            "losses": [row["loss"] if math.isfinite(row["loss"]) else str(row["loss"]) for row in rows],
            "seconds": round(seconds, 2), "building": building, **loaded, **training,
            **({"scale": scaler.get_scale()} if scaler is not None else {}),
        }  # fmt: skip
        sides = 2 if method in ("reward", "dpo") else 1
        passes = trainer.args.gradient_accumulation_steps * trainer.state.global_step
        numbers["tokens_per_second"] = round(fitted * sides * length * passes / seconds, 1)
        if method == "ppo":
            numbers["ratio_variance"] = rows[0]["val/ratio_var"]  # PPOTrainer raises where a ratio is off by 1 %
        problems = []
        if not all(math.isfinite(row["loss"]) for row in rows):
            problems.append("a loss is not finite")
        if scaler is not None and scaler.get_scale() <= 65536 / 2**trainer.state.global_step:
            problems.append("the scaler dropped every step")
        if fitted != batch:
            problems.append(f"the batch of {batch} rows does not fit; {fitted} does")
        if not all(p.dtype is torch.float32 for p in trainer.model.parameters() if p.requires_grad):
            problems.append("a trainable weight is not float32")
        if problems:
            raise Failed("; ".join(problems), numbers)
        return numbers


class Failed(Exception):
    """A check that did not pass, with what it measured."""

    def __init__(self, reason: str, numbers: dict[str, Any]) -> None:
        super().__init__(reason)
        self.numbers = numbers


# Checks of the card itself


def check_precision(machine: Machine) -> dict[str, Any]:
    """float16 below capability 8.0, bfloat16 from there on."""
    here = precision()
    numbers = {"chosen": str(here.dtype), "reason": here.reason}
    if not machine.rehearse:
        capability = torch.cuda.get_device_capability()
        numbers["capability"] = ".".join(map(str, capability))
        if here.bf16 != (capability >= (8, 0)):
            raise Failed("the precision does not go by the capability", numbers)
    return numbers


def check_kernels(machine: Machine) -> dict[str, Any]:
    """Which SDPA kernel runs for grouped queries, as transformers has it and as rlhf has it below 8.0.

    `of a T4` leaves the kernels that a T4 has: the memory-efficient one and the math kernel.
    """
    upstream = sdpa_attention.use_gqa_in_sdpa
    numbers: dict[str, Any] = {}
    groups, heads, length, size = 2, 4, 64, 64
    module = nn.Module()
    module.num_key_value_groups, module.is_causal, module.training = groups, True, False
    shape = (2, heads, length, size)
    query = torch.randn(shape, device=machine.device, dtype=machine.dtype, requires_grad=True)
    key, value = (torch.randn(2, heads // groups, length, size, device=machine.device, dtype=machine.dtype)
                  for _ in range(2))  # fmt: skip
    causal = torch.ones(length, length, device=machine.device, dtype=torch.bool).tril()[None, None]
    of_a_t4 = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    everything = [SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, *of_a_t4]
    outputs = []
    try:
        for ours in (False, True):
            sdpa_attention.use_gqa_in_sdpa = _never_group if ours else upstream
            for kernels, backends in {"of this card": everything, "of a T4": of_a_t4}.items():
                for mask in (None, causal):
                    with sdpa_kernel(backends), profile(activities=[ProfilerActivity.CPU]) as profiled:
                        output, _ = sdpa_attention.sdpa_attention_forward(module, query, key, value, mask)
                        output.float().sum().backward()
                    name = f"{'repeat_kv' if ours else 'upstream'}, kernels {kernels}, {'no ' * (mask is None)}mask"
                    numbers[name] = _kernels(profiled)
                    outputs.append(output.detach().float())
    finally:
        sdpa_attention.use_gqa_in_sdpa = upstream
    numbers["largest_difference"] = max((output - outputs[0]).abs().max().item() for output in outputs)
    if numbers["largest_difference"] > (1e-2 if machine.dtype is torch.float16 else 1e-5):
        raise Failed("the kernels do not agree", numbers)
    if not machine.rehearse:
        math_kernel = [name for name, ran in numbers.items() if "repeat_kv" in name and any("math" in k for k in ran)]
        if math_kernel:
            raise Failed(f"the math kernel ran: {'; '.join(math_kernel)}", numbers)
    return numbers


def _kernels(profiled: profile) -> list[str]:
    names = {event.key.removeprefix("aten::_scaled_dot_product_") for event in profiled.key_averages()
             if event.key.startswith("aten::_scaled_dot_product_")}  # fmt: skip
    return sorted(name for name in names if not name.endswith("backward") and "fused_sdp_choice" not in name)


def check_plan(machine: Machine, measured: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What `rlhf.memory` plans for the trainings that ran, against the most that their tensors took.

    The CUDA context and fragmentation are no tensors, so they are left out of the plan.
    """
    if importlib.util.find_spec("rlhf.memory") is None:
        raise Skipped("rlhf.memory is not there")
    if not any("peak_gb" in numbers for numbers in measured.values()):
        raise Skipped("no peak was measured")
    planning = importlib.import_module("rlhf.memory")
    numbers = {}
    for name, method, four_bit, batch, length in TRAININGS:
        got = measured.get(f"{method} on {name}", {})
        if "peak_gb" not in got:
            continue
        setting = planning.Setting(
            stage=method, per_device_train_batch_size=got["batch"], gradient_accumulation_steps=batch // got["batch"],
            per_device_eval_batch_size=batch, max_length=length - (RESPONSE if method == "ppo" else 0),
            gradient_checkpointing=True, load_in_4bit=four_bit,
            **({"generation_batch_size": 64, "response_length": RESPONSE} if method == "ppo" else {}),
        )  # fmt: skip
        plan = planning.memory(setting, machine.shape(name), ADAPTER, gpus=1, local_rollout=batch, training_only=True)
        beside = sum(plan.parts.get(part, 0) for part in ("CUDA context*", "fragmentation*"))
        planned = round((plan.total - beside) / 1e9, 3)
        off_by = round(planned / got["peak_gb"] - 1, 3)
        numbers[f"{method} on {name}"] = {"planned_gb": planned, "peak_gb": got["peak_gb"], "off_by": off_by}
    if wrong := [name for name, row in numbers.items() if abs(row["off_by"]) > OFF_BY]:
        raise Failed(f"more than {OFF_BY:.0%} off: {', '.join(wrong)}", numbers)
    return numbers


# The run


def check(name: str, function: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """One result: name, status, reason, numbers."""
    began = time.perf_counter()
    result: dict[str, Any] = {"name": name, "status": "passed", "reason": "", "numbers": {}}
    try:
        result["numbers"] = function()
    except Skipped as error:
        result |= {"status": "skipped", "reason": str(error)}
    except Failed as error:
        result |= {"status": "failed", "reason": str(error), "numbers": error.numbers}
    except Exception as error:  # noqa: BLE001 - one check that breaks is a result, and the others still tell something
        where = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{Path(where.filename).name}:{where.lineno}"
        result |= {"status": "failed", "reason": f"{type(error).__name__}: {error} ({place})"[:1000]}
    result["check_seconds"] = round(time.perf_counter() - began, 2)
    if result["status"] != "skipped":
        gc.collect()  # the next check needs the memory of this one's model
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    print(f"{result['status']:8} {name} {result['reason']}", file=sys.stderr)
    return result


def run(rehearse: bool) -> dict[str, Any]:
    """All checks, in order; without a GPU, and not in a rehearsal, each is skipped by name."""
    machine = Machine(rehearse)
    no_gpu = None if rehearse or torch.cuda.is_available() else "no CUDA device"
    if not (rehearse or no_gpu):
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, CAP_BYTES / total))
    began = time.perf_counter()
    results: list[dict[str, Any]] = []
    measured: dict[str, dict[str, Any]] = {}

    def add(name: str, function: Callable[[], dict[str, Any]]) -> None:
        late = "no time is left" if time.perf_counter() - began > SECONDS else None

        def unless_skipped() -> dict[str, Any]:
            if reason := no_gpu or late:
                raise Skipped(reason)
            return function()

        results.append(check(name, unless_skipped))
        measured[name] = results[-1]["numbers"]

    add("precision", lambda: check_precision(machine))
    add("kernels", lambda: check_kernels(machine))
    for name, method, four_bit, batch, length in TRAININGS:
        add(
            f"{method} on {name}",
            lambda name=name, method=method, four_bit=four_bit, batch=batch, length=length: train(
                machine, name, method, four_bit, batch, length
            ),
        )
    add("plan against peak", lambda: check_plan(machine, measured))
    card = "CPU rehearsal" if rehearse else torch.cuda.get_device_name() if no_gpu is None else None
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"), "card": card, "machine": platform.machine(),
        "cap_gb": CAP_BYTES / 1e9, "seconds": round(time.perf_counter() - began, 1), "versions": versions(),
        "checks": results,
    }  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Print the JSON; 1 where a check failed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rehearse", action="store_true", help="on a CPU, with tiny shapes")
    parser.add_argument(
        "--output", type=Path, help="folder for a copy, named by date and card, where a card was there"
    )
    arguments = parser.parse_args(argv)
    out, sys.stdout = sys.stdout, sys.stderr  # trainers and libraries print, and standard output is for the JSON
    try:
        found = run(arguments.rehearse)
    finally:
        sys.stdout = out
    print(json.dumps(found, indent=2))
    if arguments.output and found["card"]:
        name = "-".join(found["card"].lower().split())
        write_json(arguments.output / f"gpu_check_{found['date']}_{name}.json", found)
    return int(any(result["status"] == "failed" for result in found["checks"]))


if __name__ == "__main__":
    raise SystemExit(main())
