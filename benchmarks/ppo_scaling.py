"""Cost of PPO against the length of prompts, the length of replies, the batch and the vocabulary, as JSON on standard output.

    python benchmarks/ppo_scaling.py [--repeats 3] [--quick] [--output ppo_scaling.json]

One rollout with one update (two epochs) of a Llama-shaped policy with random weights, a head as critic and a reward that
reads nothing. One size grows at a time, the others stay at the first line of the table below. Seconds are of the processor,
the least of some repeats, so that another program on the machine changes them little. Each size runs in a process of its
own, forked behind the imports, so that its peak memory is its own; `own_gib` is what it takes above the memory that the
loaded model has taken.

The exponent is the slope of log cost over log size between the largest two sizes, where fixed costs weigh least. Attention
costs a square of the length, and nothing may grow faster: `limit` is 2 for lengths and 1 for batch and vocabulary, and
`within` says whether the exponents of the whole, in seconds and in memory, are at most 0.15 above it.
"""

import argparse
import json
import math
import multiprocessing
import platform
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rlhf.files import git_commit, write_text

START = {"prompt": 32, "response": 16, "batch": 8, "vocabulary": 2_000}
SIZES = {
    "prompt": (32, 128, 512, 1024), "response": (16, 64, 128, 256), "batch": (8, 16, 32, 64),
    "vocabulary": (2_000, 8_000, 32_000, 64_000),
}  # fmt: skip
LIMITS = {"prompt": 2.0, "response": 2.0, "batch": 1.0, "vocabulary": 1.0}
TOLERANCE = 0.15


def measure(prompt: int, response: int, batch: int, vocabulary: int, repeats: int) -> dict[str, float]:
    """Seconds of the rollout and of the update, and peak memory above that of the loaded model; in a process of its own."""
    sys.stdout = sys.stderr  # trainers and libraries print, and standard output is for the JSON
    import torch
    from datasets import Dataset
    from peft import get_peft_model
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    from trl import ModelConfig

    from rlhf.lora import lora_config
    from rlhf.ppo_trainer import PPOConfig, PPOTrainer

    torch.set_num_threads(1)
    torch.manual_seed(0)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel({"</s>": 0, "w1": 1}, unk_token="w1")),
        eos_token="</s>", pad_token="</s>", padding_side="left",
        chat_template="{% for m in messages %}{{ m['content'] + eos_token }}{% endfor %}",
    )  # fmt: skip
    base = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary, hidden_size=128, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=4, max_position_embeddings=2048, eos_token_id=0, pad_token_id=0, bos_token_id=0,
        )
    )  # fmt: skip
    adapter = lora_config(ModelConfig(lora_r=8, lora_alpha=16, lora_dropout=0.0), base)
    model = get_peft_model(base, adapter)
    model.add_adapter("reference", adapter)
    generator = random.Random(0)
    rows = [
        {"prompt_ids": [generator.randrange(1, vocabulary) for _ in range(prompt)], "row": '{"prompt": []}'}
        for _ in range(batch)
    ]
    with tempfile.TemporaryDirectory() as folder:
        trainer = PPOTrainer(
            model=model,
            args=PPOConfig(
                output_dir=folder, use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True,
                per_device_train_batch_size=batch, total_episodes=batch * (repeats + 1), num_ppo_epochs=2,
                response_length=response, gradient_checkpointing=False, logging_steps=1000, max_grad_norm=1.0,
            ),
            reward_functions=[lambda prompts, completions, **columns: [0.0] * len(prompts)],
            train_dataset=Dataset.from_list(rows), processing_class=tokenizer,
        )  # fmt: skip
        # Replies of full length: what is measured must not depend on when a random model happens to stop.
        trainer.generation_config.suppress_tokens = [0]
        rollout, spent, ends = trainer.rollout, [], []

        def timed(*args: Any, **kwargs: Any) -> Any:
            began = time.process_time()
            result = rollout(*args, **kwargs)
            ends.append(time.process_time())
            spent.append(ends[-1] - began)
            return result

        trainer.rollout = timed
        loaded, whole = _gib("VmRSS"), []
        own_step = trainer.training_step

        def step(*args: Any, **kwargs: Any) -> Any:
            began, made = time.process_time(), len(spent)
            result = own_step(*args, **kwargs)
            whole.append(time.process_time() - began - (spent[-1] if len(spent) > made else 0))
            return result

        trainer.training_step = step
        trainer.train()
    rollouts = spent[1:]  # the first warms up
    updates = [whole[i] + whole[i + 1] for i in range(2, len(whole), 2)]
    return {
        "rollout_seconds": round(min(rollouts), 3),
        "update_seconds": round(min(updates), 3),
        "seconds": round(min(a + b for a, b in zip(rollouts, updates, strict=True)), 3),
        "own_gib": round(_gib("VmHWM") - loaded, 3),
    }


def _gib(name: str) -> float:
    """`VmHWM`, the process's largest resident memory so far, or `VmRSS`, that of now; Linux alone."""
    return int(Path("/proc/self/status").read_text().split(f"{name}:")[1].split()[0]) / 2**20


def exponents(sizes: dict[int, dict[str, float]]) -> dict[str, float]:
    """Slope of log cost over log size between the largest two sizes."""
    (small, before), (large, after) = sorted(sizes.items())[-2:]
    return {
        name: round(math.log(max(after[name], 1e-3) / max(before[name], 1e-3)) / math.log(large / small), 2)
        for name in after
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="the middle two sizes, one repeat, for a trial")
    parser.add_argument("--output", type=Path, help="also write the JSON here")
    arguments = parser.parse_args()
    result: dict[str, Any] = {
        "commit": git_commit(), "machine": platform.platform(), "repeats": arguments.repeats, "start": START, "scaling": {},
    }  # fmt: skip
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["rlhf.ppo_trainer"])
    for name, sizes in SIZES.items():
        measured = {}
        for size in sizes[1:3] if arguments.quick else sizes:
            with context.Pool(1) as pool:
                values = (*{**START, name: size}.values(), 1 if arguments.quick else arguments.repeats)
                measured[size] = pool.apply(measure, values)
            print(name, size, measured[size], file=sys.stderr, flush=True)
        found = exponents(measured)
        within = all(found[cost] <= LIMITS[name] + TOLERANCE for cost in ("seconds", "own_gib"))
        result["scaling"][name] = {"sizes": measured, "exponents": found, "limit": LIMITS[name], "within": within}
    result["within"] = all(axis["within"] for axis in result["scaling"].values())
    text = json.dumps(result, indent=2) + "\n"
    if arguments.output:
        write_text(arguments.output, text)
    print(text, end="")


if __name__ == "__main__":
    main()
