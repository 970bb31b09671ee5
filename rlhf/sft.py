"""Supervised fine-tuning of a persona adapter on dialogues, with TRL's SFTTrainer.

accelerate launch --config_file accelerate_configs/two_t4.yaml rlhf/sft.py --config recipes/persona-chat/sft.yaml
"""

import logging
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from trl import ModelConfig, SFTConfig, SFTTrainer

from rlhf.callbacks import watch
from rlhf.check import preflight
from rlhf.checkpoints import train
from rlhf.config import DataConfig, PlanConfig, plan_of
from rlhf.data.columns import load_rows, sft_columns
from rlhf.files import folder_hash
from rlhf.generate import generate
from rlhf.lora import lora_config, save_adapter, trainable_parameters
from rlhf.model import load_base, load_tokenizer, trainable_to_fp32
from rlhf.nonfinite import NonFiniteGuard
from rlhf.persona import persona_and_dialogue, with_persona
from rlhf.record import check_world_size, launch, stage

logger = logging.getLogger(__name__)


class PersonaSFTTrainer(SFTTrainer):
    """SFTTrainer whose held-out loss is the mean over tokens, not over batches, so that its exponent is a perplexity."""

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        self._eval_sums = torch.zeros(2, dtype=torch.float64)
        output = super().evaluation_loop(*args, **kwargs)
        prefix = kwargs.get("metric_key_prefix", "eval")
        nll, tokens = self.accelerator.reduce(self._eval_sums.to(self.accelerator.device, torch.float32)).tolist()
        output.metrics[f"{prefix}_loss"] = nll / tokens
        output.metrics[f"{prefix}_perplexity"] = math.exp(nll / tokens)
        return output

    def prediction_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        tokens = (inputs["labels"][:, 1:] != -100).sum().item()
        loss, logits, labels = super().prediction_step(model, inputs, *args, **kwargs)
        self._eval_sums += torch.tensor([loss.item() * tokens, tokens], dtype=torch.float64)
        return loss, logits, labels


def main(data_args: DataConfig, plan_args: PlanConfig, training_args: SFTConfig, model_args: ModelConfig) -> None:
    """Train one adapter; everything it makes lies in `output_dir`."""
    check_world_size(training_args)
    with stage(
        "sft",
        training_args.output_dir,
        (data_args, plan_args, training_args, model_args),
        seed=training_args.seed,
        log_level=training_args.log_level,
        parents={"prepare": data_args.dataset},
        preflight=lambda: preflight("sft", (data_args, plan_args, training_args, model_args)),
    ) as record:
        if plan := plan_of((data_args, plan_args, training_args, model_args)):
            logger.info("The plan by size, for %d examples:\n%s", plan.num_examples, plan.table())
            record["plan"] = asdict(plan)

        # Tokenizer and base
        tokenizer = load_tokenizer(model_args.model_name_or_path)
        model = load_base(model_args, tokenizer)

        # Data
        dataset, share = Path(data_args.dataset), data_args.max_truncated_share
        train_rows = load_rows(dataset / "dialogues_train.jsonl", data_args.max_train_rows)
        eval_rows = load_rows(dataset / "dialogues_heldout.jsonl", data_args.max_eval_rows)

        # Trainer
        trainer = PersonaSFTTrainer(
            model=model,
            args=training_args,
            train_dataset=sft_columns(train_rows, tokenizer, training_args.max_length, share),
            eval_dataset=sft_columns(eval_rows, tokenizer, training_args.max_length, share),
            processing_class=tokenizer,
            peft_config=lora_config(model_args, model),
        )
        trainable_to_fp32(trainer.model)

        def samples() -> list[dict[str, Any]]:
            conversations = [with_persona(row)[:-1] for row in eval_rows[: data_args.num_samples]]
            replies = generate(trainer.model, tokenizer, conversations, max_new_tokens=40)
            told = map(persona_and_dialogue, eval_rows)
            return [
                {
                    "persona": persona,
                    "messages": messages[:-1],
                    "response": reply,
                    "reference": messages[-1]["content"],
                }
                for (persona, messages), reply in zip(told, replies, strict=False)
            ]

        NonFiniteGuard(trainer, data_args.max_skipped_steps)
        watch(trainer, samples, data_args.sample_steps)

        # Train
        train(trainer, record, data_args.save_minutes)

        # Save
        if trainer.is_world_process_zero():
            save_adapter(trainer.model, training_args.output_dir)
            tokenizer.save_pretrained(training_args.output_dir)
            record["result_hash"] = folder_hash(Path(training_args.output_dir))
        record["num_examples"] = len(train_rows)
        record["tokens"] = int(trainer._total_train_tokens)
        record["trainable_parameters"] = trainable_parameters(trainer.model)


if __name__ == "__main__":
    launch(main, (DataConfig, PlanConfig, SFTConfig, ModelConfig), "sft")
