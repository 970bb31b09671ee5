"""Proximal policy optimisation of the SFT adapter against a reward, with our PPOTrainer.

accelerate launch --config_file accelerate_configs/two_t4.yaml rlhf/ppo.py --config recipes/persona-chat/ppo.yaml
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft import PeftModel
from trl import ModelConfig

from rlhf.callbacks import watch
from rlhf.chat import reply_ids
from rlhf.check import preflight
from rlhf.checkpoints import train
from rlhf.config import DataConfig
from rlhf.data.columns import load_rows, prompt_columns
from rlhf.files import folder_hash
from rlhf.generate import generate, inference, left_pad
from rlhf.lora import save_adapter, trainable_parameters, use_adapter, with_adapter
from rlhf.model import add_score_head, load_base, load_tokenizer
from rlhf.persona import persona_and_dialogue, with_persona
from rlhf.ppo_trainer import PPOConfig, PPOTrainer
from rlhf.record import check_world_size, launch, relative_to, stage
from rlhf.reward_watch import ProbeConfig, RewardWatch, load_probe
from rlhf.rewards import RewardFunction, RewardModel, check_reward_card, load_reward_function, reward_name
from rlhf.roles import VALUE_ADAPTER
from rlhf.rollouts import as_batch


@dataclass
class ParentConfig:
    """The adapter that training starts from, and what rewards it."""

    sft_adapter: str = field(metadata={"help": "Folder of the SFT stage: start and frozen reference.", "path": True})
    reward_adapter: str | None = field(default=None, metadata={"help": "Folder of the reward stage.", "path": True})
    reward_function: str | None = field(
        default=None, metadata={"help": "`module:function`, added to the reward adapter's score."}
    )
    rewards: dict[str, float] = field(
        default_factory=dict,
        metadata={
            "help": "Weight of each reward by its source: `module:function`, the folder of a reward adapter on this "
            "base, or folder (from `./`, `../`, `/` or `runs/`) or hub id of another reward model. `reward_adapter` and "
            "`reward_function` weigh 1 where it does not name them."
        },
    )

    def __post_init__(self) -> None:
        if not self.sources():
            raise ValueError("`reward_adapter`, `reward_function` and `rewards` are all empty; set one of them")
        for source in self.sources():
            if ":" in source or source == self.reward_function:
                load_reward_function(source)  # now, not after the stages before this one were trained

    def sources(self) -> dict[str, float]:
        """Every reward by where it comes from, with its weight."""
        named = [source for source in (self.reward_adapter, self.reward_function) if source]
        return {**dict.fromkeys(named, 1.0), **self.rewards}

    def adapters(self) -> dict[str, str]:
        """The folder of each reward adapter by its name on the model: "reward", "reward_2" and so on."""
        folders = [source for source in self.sources() if source == self.reward_adapter or _is_adapter(source)]
        return {f"reward_{place}" if place > 1 else "reward": folder for place, folder in enumerate(folders, 1)}


def main(
    data_args: DataConfig,
    parents: ParentConfig,
    probe_args: ProbeConfig,
    training_args: PPOConfig,
    model_args: ModelConfig,
) -> None:
    """Train one adapter; everything it makes lies in `output_dir`."""
    check_world_size(training_args)
    configs = (data_args, parents, probe_args, training_args, model_args)
    with stage(
        "ppo",
        training_args.output_dir,
        configs,
        seed=training_args.seed,
        log_level=training_args.log_level,
        parents={"prepare": data_args.dataset, "sft": parents.sft_adapter, **parents.adapters()},
        preflight=lambda: preflight("ppo", configs),
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
        adapters, functions, weights = add_rewards(model, parents)
        record["rewards"] = rewards_in_record(parents, weights, Path(training_args.output_dir))
        record["parents"] |= {
            f"reward model {name}": {"path": reward["source"], "hash": reward["hash"]}
            for name, reward in record["rewards"].items()
            if reward["hash"] and name not in adapters
        }
        if training_args.value_model == "adapter":
            model = with_adapter(model, start_of_critic(parents), VALUE_ADAPTER, trainable=True)
        trainer = PPOTrainer(
            model=model,
            args=training_args,
            reward_adapter=adapters,
            reward_functions=functions,
            reward_weights=weights,
            max_skipped_steps=data_args.max_skipped_steps,
            train_dataset=prompt_columns(train_rows, tokenizer, training_args.max_length, share),
            eval_dataset=prompt_columns(eval_rows, tokenizer, training_args.max_length, share),
            processing_class=tokenizer,
        )

        def samples() -> list[dict[str, Any]]:
            conversations = [with_persona(row) for row in eval_rows[: data_args.num_samples]]
            replies = generate(trainer.model, tokenizer, conversations, training_args.response_length)
            rewards = rewards_of(trainer, [trainer.eval_dataset[i] for i in range(len(replies))], replies)
            told = map(persona_and_dialogue, eval_rows)
            return [
                {"persona": persona, "messages": messages, "response": reply,
                 "reference": row.get("reference"), "rewards": given}
                for (persona, messages), row, reply, given in zip(told, eval_rows, replies, rewards, strict=False)
            ]  # fmt: skip

        watch(trainer, samples, data_args.sample_steps)
        reward_watch = None
        if probe_args.probe:
            probe = load_probe(probe_args.probe)(dataset, training_args.max_length, training_args.response_length)
            reward_watch = RewardWatch(trainer, probe, probe_args.probe_steps)
            trainer.add_callback(reward_watch)

        # Train
        train(trainer, record, data_args.save_minutes)

        # Save
        if trainer.is_world_process_zero():
            save_adapter(trainer.model, training_args.output_dir)
            trainer.save_critic(training_args.output_dir)
            tokenizer.save_pretrained(training_args.output_dir)
            record["result_hash"] = folder_hash(Path(training_args.output_dir))
        if reward_watch and trainer.is_world_process_zero():
            record["probes"] = reward_watch.summary()
        record["num_examples"] = len(train_rows)
        record["episodes"] = training_args.total_episodes
        record["tokens"] = trainer.state.num_input_tokens_seen
        record["tokens_generated"] = trainer.ppo_state.tokens_generated
        record["trainable_parameters"] = trainable_parameters(trainer.model)


def rewards_of(trainer: PPOTrainer, rows: Sequence[dict[str, Any]], replies: Sequence[str]) -> list[dict[str, float]]:
    """What each reward gives to replies as text, by name, each taken as ended by its stop token."""
    tokenizer, device = trainer.processing_class, trainer.accelerator.device
    asked = [with_persona(json.loads(row["row"])) for row in rows]
    said = [reply_ids(messages[-1], reply, tokenizer) for messages, reply in zip(asked, replies, strict=True)]
    prompt_ids, prompt_mask = left_pad([row["prompt_ids"] for row in rows], tokenizer.pad_token_id, device)
    backwards, mask = left_pad([ids[::-1] for ids in said], tokenizer.pad_token_id, device)
    responses, mask = backwards.flip(1), mask.flip(1)
    with inference(trainer.accelerator.unwrap_model(trainer.model)), trainer.accelerator.autocast():
        scores = trainer.score(list(rows), as_batch(prompt_ids, prompt_mask, responses, mask), responses, mask)
    return [{name: given[place].item() for name, given in scores.items()} for place in range(len(rows))]


def add_rewards(model: PeftModel, parents: ParentConfig) -> tuple[list[str], list[RewardFunction], dict[str, float]]:
    """Load what the recipe rewards with.

    Returns:
        Names of the reward adapters, now on the model; the callables; and the weight of each by its name, in the order
        of `parents.sources()`.
    """
    names = {folder: name for name, folder in parents.adapters().items()}
    adapters: list[str] = []
    functions: list[RewardFunction] = []
    weights: dict[str, float] = {}
    for source, weight in parents.sources().items():
        if ":" in source:
            functions.append(load_reward_function(source))
            name = reward_name(functions[-1])
        elif source in names:
            name = names[source]
            with_adapter(model, source, name)
            with inference(model), use_adapter(model, name):
                check_reward_card(model.get_base_model(), source)
            adapters.append(name)
        elif source.startswith(("runs/", "./", "../", "/")) and not (Path(source) / "config.json").is_file():
            raise FileNotFoundError(
                f"`rewards`: {source} holds neither a reward adapter (adapter_config.json) nor a model (config.json)."
            )
        else:
            functions.append(RewardModel(source))
            name = reward_name(functions[-1])
        weights[name] = weight
    return adapters, functions, weights


def start_of_critic(parents: ParentConfig) -> str:
    """The folder of the first reward adapter.

    Raises:
        ValueError: if there is none.
    """
    for folder in parents.adapters().values():
        return folder
    raise ValueError(
        "`value_model` is adapter, which starts from a reward adapter's weights, and there is none. Set "
        "`reward_adapter`, or `value_model: head`."
    )


def _is_adapter(source: str) -> bool:
    return (Path(source) / "adapter_config.json").is_file()


def rewards_in_record(parents: ParentConfig, names: Iterable[str], folder: Path) -> dict[str, dict[str, Any]]:
    """What a record in `folder` says of each reward, by its name: source, weight, and the hash of a folder's weights."""

    def entry(source: str, weight: float) -> dict[str, Any]:
        is_folder = Path(source).is_dir()
        return {
            "source": relative_to(source, folder) if is_folder else source,
            "weight": weight,
            "hash": folder_hash(source) if is_folder else None,
        }

    return {name: entry(*given) for name, given in zip(names, parents.sources().items(), strict=True)}


if __name__ == "__main__":
    launch(main, (DataConfig, ParentConfig, ProbeConfig, PPOConfig, ModelConfig), "ppo")
