"""Our PPO against that of TRL 1.12, the last with one: episodes a second and peak memory, as JSON on standard output.

    python benchmarks/ppo_vs_trl.py [--trl FOLDER] [--rounds 5] [--threads 2] [--quick] [--output ppo_vs_trl.json]

Both train a LoRA adapter (r 8) of the same Llama-shaped base (4 layers of 256, a vocabulary of 50,000, random weights) on
the same random prompts of 60 to 180 tokens: rollouts of 32 replies of at most 32 tokens, each used for 4 epochs of one
optimiser step on all 32 replies. TRL has its roles as in its own example: a policy with an adapter, which is switched off
for the reference, and a value and a reward model of their own, the value model trained whole. Ours are adapters on one
base. Nothing is recomputed in either's update (`gradient_checkpointing` is off).

In each round each side runs in a process of its own, one after the other; its first rollout warms up, the rest are timed.
The ratios are medians over the rounds. Peak memory is the process's largest resident size, interpreter and libraries
included. `floor` is what the multiplications of one of our rollouts would take alone, with no padding, at the rate that
this machine multiplies matrices.

TRL 1.12.0 is looked for in --trl, then in the environment variable TRL_WITH_PPO (a folder that holds the unpacked wheel),
else fetched by pip into a temporary folder. It is imported by its own process alone.
"""

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
import types
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

TRL = "1.12.0"
BATCH, EPOCHS, RESPONSE = 32, 4, 32
PROMPT = (60, 180)
LAYERS, HIDDEN, VOCABULARY, RANK = 4, 256, 50_000, 8
PAD, STOP = 0, 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl", type=Path, help=f"folder with the unpacked wheel of TRL {TRL}")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--quick", action="store_true", help="one round, for a trial")
    parser.add_argument("--output", type=Path, help="also write the JSON here")
    parser.add_argument(
        "--side", help=argparse.SUPPRESS
    )  # what a child process is: a side, and the folder it works in
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        with silent():
            measured_here = measure(arguments.side, arguments.folder)
        print(json.dumps(measured_here))
        return
    with silent(), tempfile.TemporaryDirectory() as folder:
        trl = trl_with_ppo(Path(folder) / "trl", arguments.trl)
        write_models(Path(folder))
        sides = ["head", *(["adapter"] if has_value_adapter() else []), "trl"]
        rounds = 1 if arguments.quick else arguments.rounds
        measured = [
            {side: run_side(side, Path(folder), trl, arguments.threads) for side in sides} for _ in range(rounds)
        ]
        text = json.dumps(summary(measured, arguments.threads), indent=2) + "\n"
    if arguments.output:
        arguments.output.write_text(text)
    print(text, end="")


def trl_with_ppo(download_to: Path, folder: Path | None = None) -> Path:
    """The folder of TRL 1.12: the one given, that of the environment variable, or a new download.

    Raises:
        SystemExit: if it is not there and cannot be fetched.
    """
    folder = folder or (Path(os.environ["TRL_WITH_PPO"]) if "TRL_WITH_PPO" in os.environ else None)
    if folder is None:
        folder = download_to
        command = ["pip", "download", f"trl=={TRL}", "--no-deps", "--only-binary=:all:", "--dest", str(folder)]
        fetched = subprocess.run([sys.executable, "-m", *command], check=False, capture_output=True, text=True)
        if fetched.returncode:
            raise SystemExit(
                f"TRL {TRL}, the last with PPO, cannot be fetched: {fetched.stderr.strip().splitlines()[-1]}\n"
                "Unpack its wheel, and name the folder with --trl or in the environment variable TRL_WITH_PPO."
            )
        with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
            wheel.extractall(folder)
    if not (folder / "trl" / "experimental" / "ppo" / "ppo_trainer.py").is_file():
        raise SystemExit(
            f"{folder} holds no TRL with PPO (trl/experimental/ppo). Unpack the wheel of TRL {TRL} there."
        )
    return folder.resolve()


def run_side(side: str, folder: Path, trl: Path, threads: int) -> dict[str, Any]:
    """One side in a process of its own."""
    root = Path(__file__).parents[1]
    path = [str(trl)] if side == "trl" else []
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([*path, str(root), os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1",
    }  # fmt: skip
    command = [sys.executable, __file__, "--side", side, "--folder", str(folder)]
    done = subprocess.run(command, env=environment, check=False, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{side} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def summary(rounds: list[dict[str, dict[str, Any]]], threads: int) -> dict[str, Any]:
    """Medians over the rounds."""

    def median(side: str, *path: str) -> float:
        values: list[Any] = [found[side] for found in rounds]
        for key in path:
            values = [value[key] for value in values]
        return round(statistics.median(values), 3)

    sides = {}
    for side in rounds[0]:
        sides[side] = {
            "episodes_per_second": median(side, "episodes_per_second"),
            "cpu_seconds_a_rollout": median(side, "cpu_seconds_a_rollout"),
            "peak_gib": median(side, "peak_gib"),
            "peak_gib_after_imports": median(side, "peak_gib_after_imports"),
            "seconds": {phase: median(side, "seconds", phase) for phase in rounds[0][side]["seconds"]},
        }

    def against_trl(side: str) -> dict[str, float]:
        speed = [r[side]["episodes_per_second"] / r["trl"]["episodes_per_second"] for r in rounds]
        cpu = [r["trl"]["cpu_seconds_a_rollout"] / r[side]["cpu_seconds_a_rollout"] for r in rounds]
        memory = [r[side]["peak_gib"] / r["trl"]["peak_gib"] for r in rounds]
        return {
            "throughput": round(statistics.median(speed), 3),
            "throughput_by_cpu_time": round(statistics.median(cpu), 3),
            "memory": round(statistics.median(memory), 3),
        }

    import torch
    import transformers

    gflop = floor_gflop()
    rate = median("head", "gflop_per_second")
    return {
        "ratio": against_trl("head"),
        **({"ratio_of_adapter": against_trl("adapter")} if "adapter" in sides else {}),
        "sides": sides,
        "floor": {
            "gflop_a_rollout": round(gflop, 1),
            "gflop_per_second": rate,
            "seconds_a_rollout": round(gflop / rate, 2),
            "episodes_per_second": round(BATCH * rate / gflop, 2),
        },
        "rounds": len(rounds),
        "threads": threads,
        "machine": platform.platform(),
        "versions": {
            "trl": TRL, "torch": torch.__version__, "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
    }  # fmt: skip


def floor_gflop() -> float:
    """Multiply-adds of one of our rollouts with its update, at two operations each, in units of 1e9.

    Of the weights alone: attention itself, norms, the softmax over the vocabulary and the optimiser come on top. The base is
    frozen, so that a backward pass costs as much as a forward one.
    """
    block = 4 * HIDDEN * HIDDEN + 3 * HIDDEN * 4 * HIDDEN
    adapter = RANK * (4 * 2 * HIDDEN + 3 * 5 * HIDDEN)
    trunk, head = 2 * LAYERS * (block + adapter), 2 * HIDDEN * VOCABULARY
    tokens = sum(len(prompt) for prompt in prompts(BATCH)) + BATCH * RESPONSE
    replies = BATCH * RESPONSE
    rollout = tokens * trunk + replies * head
    scoring = 3 * tokens * trunk + 2 * replies * head  # old, reference and reward; the reward has no vocabulary
    update = EPOCHS * 2 * (tokens * trunk + replies * head)
    return (rollout + scoring + update) / 1e9


def has_value_adapter() -> bool:
    from rlhf.ppo_trainer import PPOConfig

    return "value_model" in {field.name for field in fields(PPOConfig)}


def prompts(count: int) -> list[list[int]]:
    """Random prompts whose lengths are spread evenly; both sides get the same in the same order."""
    generator = random.Random(0)
    lengths = [generator.randint(*PROMPT) for _ in range(count)]
    return [[generator.randrange(2, VOCABULARY) for _ in range(length)] for length in lengths]


def write_models(folder: Path) -> None:
    """Base, reward model, tokenizer and the policy's adapter, random and the same for both sides."""
    import torch
    from peft import get_peft_model
    from tokenizers import Tokenizer, models
    from transformers import (
        LlamaConfig,
        LlamaForCausalLM,
        LlamaForSequenceClassification,
        PreTrainedTokenizerFast,
    )
    from trl import ModelConfig

    from rlhf.lora import lora_config

    torch.manual_seed(0)
    words = {"<pad>": PAD, "</s>": STOP, **{f"w{number}": number for number in range(2, VOCABULARY)}}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<pad>")),
        pad_token="<pad>", eos_token="</s>", padding_side="left",
        chat_template="{% for m in messages %}{{ m['content'] + eos_token }}{% endfor %}",
    )  # fmt: skip
    tokenizer.save_pretrained(folder / "base")
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=4 * HIDDEN, num_hidden_layers=LAYERS,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=512, pad_token_id=PAD, eos_token_id=STOP,
        bos_token_id=STOP, num_labels=1,
    )  # fmt: skip
    base = LlamaForCausalLM(config)
    base.save_pretrained(folder / "base")
    LlamaForSequenceClassification(config).save_pretrained(folder / "reward")
    adapter = lora_config(ModelConfig(lora_r=RANK, lora_alpha=2 * RANK, lora_dropout=0.0), base)
    get_peft_model(base, adapter).save_pretrained(folder / "adapter")


# One side, in its own process


def measure(side: str, folder: Path) -> dict[str, Any]:
    """Train for one rollout that is not timed and one that is; speed, memory, and where the time goes."""
    import torch
    import transformers

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    transformers.utils.logging.disable_progress_bar()
    seconds: Counter[str] = Counter()
    trainer, steps = (trl_trainer if side == "trl" else our_trainer)(side, folder, seconds)
    imported = peak_gib("VmRSS")
    marks = clocks(steps, seconds)
    trainer.add_callback(marks)
    trainer.train()
    (wall, cpu, before), (wall_end, cpu_end, after) = marks.seen[0], marks.seen[-1]
    rollouts = len(marks.seen) - 1
    spent = {phase: (after[phase] - before[phase]) / rollouts for phase in after}
    total = (wall_end - wall) / rollouts
    return {
        "episodes_per_second": BATCH / total,
        "cpu_seconds_a_rollout": (cpu_end - cpu) / rollouts,
        "seconds": {**spent, "update": total - sum(spent.values())},
        "peak_gib": peak_gib("VmHWM"),
        "peak_gib_after_imports": imported,
        "gflop_per_second": matrix_rate(),
    }


def clocks(steps: int, seconds: Counter[str]) -> Any:
    """A callback that notes the time after each rollout's last optimiser step."""
    from transformers import TrainerCallback

    class Clocks(TrainerCallback):
        def __init__(self) -> None:
            self.seen: list[tuple[float, float, dict[str, float]]] = []

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step % steps == 0:
                self.seen.append((time.perf_counter(), time.process_time(), dict(seconds)))

    return Clocks()


def timed(function: Callable[..., Any], phase: str, seconds: Counter[str], condition: Callable[[], bool]) -> Any:
    """The function with its time added to `seconds[phase]`, less what phases inside it took themselves."""

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if not condition():
            return function(*args, **kwargs)
        began, inside = time.perf_counter(), sum(seconds.values())
        result = function(*args, **kwargs)
        seconds[phase] += time.perf_counter() - began - (sum(seconds.values()) - inside)
        return result

    return wrapper


def arguments_of(folder: Path) -> dict[str, Any]:
    return {
        "output_dir": str(folder / "out"), "use_cpu": True, "bf16": False, "report_to": "none", "save_strategy": "no",
        "per_device_train_batch_size": BATCH, "gradient_accumulation_steps": 1, "num_mini_batches": 1,
        "num_ppo_epochs": EPOCHS, "total_episodes": 2 * BATCH, "response_length": RESPONSE, "temperature": 1.0,
        "learning_rate": 1e-4, "gradient_checkpointing": False, "logging_steps": 1, "disable_tqdm": True,
    }  # fmt: skip


def our_trainer(side: str, folder: Path, seconds: Counter[str]) -> tuple[Any, int]:
    from datasets import Dataset
    from trl import ModelConfig

    from rlhf.lora import lora_config, with_adapter
    from rlhf.model import add_score_head, load_base, load_tokenizer
    from rlhf.ppo_trainer import PPOConfig, PPOTrainer

    tokenizer = load_tokenizer(str(folder / "base"))
    model_args = ModelConfig(
        model_name_or_path=str(folder / "base"), lora_r=RANK, lora_alpha=2 * RANK, lora_dropout=0.0
    )
    base = load_base(model_args, tokenizer)
    add_score_head(base)
    reward = lora_config(model_args, base, reward=True)
    model = with_adapter(base, folder / "adapter", "default", trainable=True)
    model = with_adapter(model, folder / "adapter", "reference")
    model.add_adapter("reward", reward)
    if side == "adapter":
        model.add_adapter("critic", reward)  # in use it starts from the reward's weights; the cost is the same
    row = json.dumps({"prompt": [{"role": "user", "content": "w2"}]})
    arguments = {**arguments_of(folder), **({"value_model": side} if has_value_adapter() else {})}
    trainer = PPOTrainer(
        model=model,
        args=PPOConfig(**arguments),
        reward_adapter="reward",
        train_dataset=Dataset.from_list([{"prompt_ids": ids, "row": row} for ids in prompts(BATCH)]),
        processing_class=tokenizer,
    )
    model.generate = timed(model.generate, "rollout", seconds, lambda: True)
    trainer.rollout = types.MethodType(timed(type(trainer).rollout, "scoring", seconds, lambda: True), trainer)
    return trainer, EPOCHS


def trl_trainer(side: str, folder: Path, seconds: Counter[str]) -> tuple[Any, int]:
    import torch
    import trl
    from datasets import Dataset
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    if trl.__version__ != TRL:
        raise SystemExit(f"this process imported TRL {trl.__version__} from {trl.__file__}, not {TRL}")
    from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    policy = AutoModelForCausalLM.from_pretrained(folder / "base")
    trainer = PPOTrainer(
        args=PPOConfig(**arguments_of(folder), stop_token="eos", num_sample_generations=0),
        processing_class=tokenizer,
        model=PeftModel.from_pretrained(policy, folder / "adapter", is_trainable=True),
        ref_model=None,
        reward_model=AutoModelForSequenceClassification.from_pretrained(folder / "reward", num_labels=1),
        value_model=AutoModelForSequenceClassification.from_pretrained(folder / "reward", num_labels=1),
        train_dataset=Dataset.from_list([{"input_ids": ids} for ids in prompts(BATCH)]),
    )
    ppo_trainer.batch_generation = timed(ppo_trainer.batch_generation, "rollout", seconds, lambda: True)
    for name in ("forward", "get_reward", "selective_log_softmax"):
        function = getattr(ppo_trainer, name)
        setattr(ppo_trainer, name, timed(function, "scoring", seconds, lambda: not torch.is_grad_enabled()))
    return trainer, 1  # it counts a rollout as one step


@contextmanager
def silent() -> Iterator[None]:
    """Standard output to standard error: trainers and libraries print, and standard output is for the JSON."""
    out, sys.stdout = sys.stdout, sys.stderr
    try:
        yield
    finally:
        sys.stdout = out


def peak_gib(name: str) -> float:
    """`VmHWM`, the process's largest resident memory so far, or `VmRSS`, that of now; Linux alone."""
    return int(Path("/proc/self/status").read_text().split(f"{name}:")[1].split()[0]) / 2**20


def matrix_rate() -> float:
    """1e9 operations a second of multiplying matrices of the shapes that most of the work has; the best of five."""
    import torch

    rates = []
    for rows, inner, columns in ((4096, HIDDEN, 4 * HIDDEN), (BATCH * RESPONSE, HIDDEN, VOCABULARY)):
        left, right = torch.randn(rows, inner), torch.randn(inner, columns)
        out, seconds = torch.empty(rows, columns), []
        for _ in range(5):
            began = time.perf_counter()
            torch.mm(left, right, out=out)
            seconds.append(time.perf_counter() - began)
        rates.append(2 * rows * inner * columns / min(seconds) / 1e9)
    return statistics.mean(rates)


if __name__ == "__main__":
    main()
