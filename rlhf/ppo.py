"""Proximal policy optimisation of the SFT adapter against a reward, with our PPOTrainer.

accelerate launch --config_file accelerate_configs/two_t4.yaml rlhf/ppo.py --config recipes/persona-chat/ppo.yaml
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trl import ModelConfig

from rlhf.callbacks import watch
from rlhf.check import preflight
from rlhf.config import DataConfig
from rlhf.data.columns import load_rows, prompt_columns
from rlhf.files import folder_hash
from rlhf.generate import generate, inference
from rlhf.lora import save_adapter, trainable_parameters, use_adapter, with_adapter
from rlhf.model import add_score_head, load_base, load_tokenizer
from rlhf.persona import with_persona
from rlhf.ppo_trainer import PPOConfig, PPOTrainer
from rlhf.record import check_world_size, launch, stage
from rlhf.rewards import check_reward_card, load_reward_function


@dataclass
class ParentConfig:
    """The adapter that training starts from, and what rewards it."""

    sft_adapter: str = field(metadata={"help": "Folder of the SFT stage: start and frozen reference.", "path": True})
    reward_adapter: str | None = field(default=None, metadata={"help": "Folder of the reward stage.", "path": True})
    reward_function: str | None = field(
        default=None, metadata={"help": "`module:function`, added to the reward adapter's score."}
    )

    def __post_init__(self) -> None:
        if not (self.reward_adapter or self.reward_function):
            raise ValueError("`reward_adapter` and `reward_function` are both empty; set one of them")
        if self.reward_function:
            load_reward_function(self.reward_function)  # now, not after the stages before this one were trained


def main(data_args: DataConfig, parents: ParentConfig, training_args: PPOConfig, model_args: ModelConfig) -> None:
    """Train one adapter; everything it makes lies in `output_dir`."""
    check_world_size(training_args)
    functions = [load_reward_function(parents.reward_function)] if parents.reward_function else []
    folders = {"prepare": data_args.dataset, "sft": parents.sft_adapter, "reward": parents.reward_adapter}
    with stage(
        "ppo",
        training_args.output_dir,
        (data_args, parents, training_args, model_args),
        seed=training_args.seed,
        log_level=training_args.log_level,
        parents={name: folder for name, folder in folders.items() if folder},
        preflight=lambda: preflight("ppo", (data_args, parents, training_args, model_args)),
    ) as record:
        # Tokenizer and base
        tokenizer = load_tokenizer(model_args.model_name_or_path)
        model = load_base(model_args, tokenizer)
        add_score_head(model)

        # Data
        dataset, share = Path(data_args.dataset), data_args.max_truncated_share
        train_rows = load_rows(dataset / "prompts_train.jsonl", data_args.max_train_rows)
        eval_rows = load_rows(dataset / "prompts_heldout.jsonl", data_args.max_eval_rows)

        # Trainer
        model = with_adapter(model, parents.sft_adapter, "default", trainable=True)
        model = with_adapter(model, parents.sft_adapter, "reference")
        if parents.reward_adapter:
            model = with_adapter(model, parents.reward_adapter, "reward")
            with inference(model), use_adapter(model, "reward"):
                check_reward_card(model.get_base_model(), parents.reward_adapter)
        trainer = PPOTrainer(
            model=model,
            args=training_args,
            reward_adapter="reward" if parents.reward_adapter else None,
            reward_functions=functions,
            train_dataset=prompt_columns(train_rows, tokenizer, training_args.max_length, share),
            eval_dataset=prompt_columns(eval_rows, tokenizer, training_args.max_length, share),
            processing_class=tokenizer,
        )

        def samples() -> list[dict[str, Any]]:
            conversations = [with_persona(row) for row in eval_rows[: data_args.num_samples]]
            replies = generate(trainer.model, tokenizer, conversations, training_args.response_length)
            return [
                {"persona": row["persona"], "messages": row["prompt"], "response": reply,
                 "reference": row.get("reference")}
                for row, reply in zip(eval_rows, replies, strict=False)
            ]  # fmt: skip

        watch(trainer, samples, data_args.sample_steps)

        # Train
        trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)

        # Save
        if trainer.is_world_process_zero():
            save_adapter(trainer.model, training_args.output_dir)
            tokenizer.save_pretrained(training_args.output_dir)
            record["result_hash"] = folder_hash(Path(training_args.output_dir))
        record["num_examples"] = len(train_rows)
        record["episodes"] = training_args.total_episodes
        record["trainable_parameters"] = trainable_parameters(trainer.model)


if __name__ == "__main__":
    launch(main, (DataConfig, ParentConfig, PPOConfig, ModelConfig), "ppo")
