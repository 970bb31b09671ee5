"""LoRA against full fine-tuning on the demo's SFT stage, both measured here, as JSON on standard output.

    python benchmarks/savings.py [--dataset runs/demo/prepare] [--output savings.json]

LoRA is trained as `recipes/demo/sft.yaml` says. Full fine-tuning trains every weight of the same base on the same rows in
the same order, with the same batch, steps and schedule; its learning rate is the best one of a short search, so that it is
given a fair chance. Held-out loss is that of the last 64 training dialogues, which neither side trains on: the dialogues
that `prepare` holds out lack the flaws which this stage is there to learn, so that their loss rises again.

Seconds are of the processor (one thread) in training steps alone, without evaluations, loading and saving, so that another
program on the machine changes them little. Each training has a process of its own, one at a time. `own_gb` is its peak
memory above what it held with the base loaded; Python and the libraries are 0.5 GB of the whole.

Full fine-tuning is here alone: the scripts of the project train adapters.
"""

import argparse
import json
import multiprocessing
import platform
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rlhf.files import write_text
from rlhf.savings import CARDS, Side, calculate_savings

RECIPE = Path(__file__).resolve().parents[1] / "recipes" / "demo"
HELD_OUT = 64
RATES = (3e-4, 1e-3, 3e-3, 1e-2)  # full fine-tuning's; the best is used
SEARCH_STEPS = 30
# Parts of the way from the first loss down to the one that both sides reach.
LEVELS = (0.5, 0.75, 0.9, 0.95, 1.0)


def measure(
    dataset: str, lora: bool, learning_rate: float | None = None, max_steps: int | None = None, eval_steps: int = 10
) -> dict[str, Any]:
    """Train one side in this process: curve, seconds, memory and bytes on disk."""
    sys.stdout = sys.stderr  # trainers and libraries print, and standard output is for the JSON
    import torch
    from transformers import set_seed

    from rlhf.config import parse
    from rlhf.data.columns import load_rows, sft_columns
    from rlhf.ledger import memory_gb, peak_memory_gb, reset_peak_memory
    from rlhf.lora import lora_config, save_adapter, trainable_parameters
    from rlhf.model import load_base, load_tokenizer, trainable_to_fp32
    from rlhf.pipeline import config_classes
    from rlhf.sft import PersonaSFTTrainer

    class TimedTrainer(PersonaSFTTrainer):
        """Notes the held-out loss against the seconds spent in training alone."""

        curve: list[tuple[float, float]]

        def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
            now = time.process_time()
            metrics = super().evaluate(*args, **kwargs)
            if not self.curve:
                self.began = time.process_time()
            self.curve.append((now - self.began if self.curve else 0.0, metrics["eval_loss"]))
            self.began += time.process_time() - now if len(self.curve) > 1 else 0.0
            return metrics

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        argv = [f"--config={RECIPE / 'sft.yaml'}", f"--dataset={dataset}", f"--output_dir={folder}", "--use_cpu=true"]
        argv += ["--eval_on_start=true", f"--eval_steps={eval_steps}", "--save_strategy=no", "--disable_tqdm=true"]
        argv += [f"--learning_rate={learning_rate}"] if learning_rate else []
        argv += [f"--max_steps={max_steps}"] if max_steps else []
        data_args, _, training_args, model_args = parse(config_classes("sft"), argv, "sft")
        set_seed(training_args.seed)
        tokenizer = load_tokenizer(model_args.model_name_or_path)
        model = load_base(model_args, tokenizer)
        rows = load_rows(Path(data_args.dataset) / "dialogues_train.jsonl")
        train, heldout = (
            sft_columns(part, tokenizer, training_args.max_length) for part in (rows[:-HELD_OUT], rows[-HELD_OUT:])
        )
        reset_peak_memory()
        loaded = memory_gb()
        trainer = TimedTrainer(
            model=model, args=training_args, train_dataset=train, eval_dataset=heldout, processing_class=tokenizer,
            peft_config=lora_config(model_args, model) if lora else None,
        )  # fmt: skip
        trainable_to_fp32(trainer.model)
        trainer.curve = []
        trainer.train()
        peak = peak_memory_gb()
        weights = Path(folder) / "weights"
        if lora:
            save_adapter(trainer.model, weights)
        else:
            trainer.model.save_pretrained(weights)
        return {
            "lora": lora,
            "learning_rate": training_args.learning_rate,
            "steps": training_args.max_steps,
            "batch": training_args.per_device_train_batch_size,
            "tokens": int(trainer._total_train_tokens),
            "trainable_parameters": trainable_parameters(trainer.model),
            "curve": trainer.curve,
            "seconds_per_step": trainer.curve[-1][0] / training_args.max_steps,
            "peak_memory_gb": peak,
            "own_gb": peak - loaded,
            "kept_bytes": sum(path.stat().st_size for path in weights.glob("*.safetensors")),
            "optimizer_bytes": sum(
                value.numel() * value.element_size()
                for state in trainer.optimizer.state.values()
                for value in state.values()
                if torch.is_tensor(value)
            ),
        }


def alone(*arguments: Any) -> dict[str, Any]:
    """[`measure`] in a process of its own, so that its memory and its seconds are its own."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["rlhf.sft", "rlhf.pipeline"])  # importing takes as long as some ten steps
    with context.Pool(1) as pool:
        result = pool.apply(measure, arguments)
    best = min(loss for _, loss in result["curve"])
    kind = "LoRA" if result["lora"] else "full"
    sys.stderr.write(
        f"{kind} at {result['learning_rate']:g}, {result['steps']} steps: {result['curve'][-1][0]:.0f} s, "
        f"best held-out loss {best:.4f}\n"
    )
    return result


def side(result: dict[str, Any], name: str) -> Side:
    return Side(name, result["curve"], result["peak_memory_gb"], result["kept_bytes"])


def report(lora: dict[str, Any], full: dict[str, Any], search: list[dict[str, Any]]) -> dict[str, Any]:
    """Savings at the loss that both reach, and at losses on the way there."""
    sides = side(lora, "LoRA"), side(full, "full")
    machine = f"one thread of a {platform.machine()} CPU"
    savings = calculate_savings(*sides, machine)
    first = max(result["curve"][0][1] for result in (lora, full))
    levels = []
    for part in LEVELS:
        at = calculate_savings(*sides, machine, target_loss=first + part * (savings.target_loss - first))
        levels.append(
            {"loss": at.target_loss, "lora": at.lora.seconds, "full": at.full.seconds, "less": at.time_reduction}
        )
    return {
        "machine": machine,
        "lora": lora,
        "full": full,
        "search": search,
        "levels": levels,
        "cards": [asdict(card) for card in CARDS],
        "savings": json.loads(savings.to_json()),
        "markdown": str(savings),
    }


def main() -> None:
    """Measure both sides, then print the comparison."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", help="a prepare stage of recipes/demo; made where none is given")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--quick", action="store_true", help="four steps a side and one learning rate, to try it out")
    arguments = parser.parse_args()
    steps, rates = (4, RATES[:1]) if arguments.quick else (None, RATES)
    with tempfile.TemporaryDirectory() as folder:
        dataset = arguments.dataset
        if dataset is None:
            from rlhf.pipeline import run

            run(RECIPE, until="prepare", output_dir=folder, say=lambda line: sys.stderr.write(line + "\n") and None)
            dataset = f"{folder}/prepare"
        lora = alone(dataset, True, None, steps)
        tried = steps or SEARCH_STEPS
        search = [alone(dataset, False, rate, tried, tried) for rate in rates]
        best = min(search, key=lambda result: result["curve"][-1][1])
        full = alone(dataset, False, best["learning_rate"], steps)
    shown = [{key: result[key] for key in ("learning_rate", "steps", "curve")} for result in search]
    result = json.dumps(report(lora, full, shown), indent=2)
    if arguments.output:
        write_text(arguments.output, result + "\n")
    print(result)


if __name__ == "__main__":
    main()
