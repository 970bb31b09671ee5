"""PPO on transformers.Trainer's hooks: rollout, score, advantages, loss.

One frozen base carries every role. The policy is the adapter "default", the reference the frozen adapter "reference",
a learned reward the frozen adapter "reward" with its score head, and the critic a linear head on the policy's hidden
states. Whatever a training loop needs beside that (gradient accumulation, clipping, schedules, the fp16 scaler, DDP,
logging, checkpoints) is the Trainer's.

An item of the dataloader is one rollout batch of prompts, handed out once for each micro-batch that is made from it.
So the position in a rollout follows from `state.global_step` alone, and a resumed run needs no counter of ours.
"""

import functools
import json
import math
import types
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainingArguments,
)

from rlhf.chat import reply_text
from rlhf.config import ConfigError
from rlhf.generate import generation_config, inference, left_pad, response_mask, sample_ids
from rlhf.lora import set_trainable, use_adapter
from rlhf.model import trainable_to_fp32
from rlhf.persona import with_persona
from rlhf.ppo_math import (
    advantages_and_returns,
    kl_k3,
    kl_penalised_rewards,
    masked_mean,
    masked_whiten,
    policy_loss,
    probability_ratio,
    value_loss,
)
from rlhf.rewards import RewardFunction, reward_scores
from rlhf.token_logprobs import token_logprobs

VALUE_HEAD_FILE = "value_head.safetensors"


class RatioError(RuntimeError):
    """The update's forward does not reproduce the log-probabilities of the rollout: PPO would learn from noise."""


@dataclass
class PPOConfig(TrainingArguments):
    """Arguments of [`PPOTrainer`], beside those of `TrainingArguments`; the names are those of TRL 1.12's PPO.

    One rollout is `per_device_train_batch_size * gradient_accumulation_steps * num_mini_batches` episodes a process.
    It is used for `num_ppo_epochs * num_mini_batches` optimiser steps, and `save_steps` counts these.
    """

    learning_rate: float = field(default=1e-4, metadata={"help": "Initial learning rate of AdamW."})
    logging_steps: float = field(default=10, metadata={"help": "Optimiser steps between two logs."})
    lr_scheduler_type: str = field(default="linear", metadata={"help": "Learning rate schedule."})
    gradient_checkpointing: bool = field(default=True, metadata={"help": "Recompute activations in the update."})
    total_episodes: int = field(default=10_000, metadata={"help": "Replies sampled in the whole training."})
    num_ppo_epochs: int = field(default=4, metadata={"help": "Times that a rollout is trained on."})
    num_mini_batches: int = field(default=1, metadata={"help": "Optimiser steps in one pass over a rollout."})
    max_length: int = field(default=1024, metadata={"help": "Longest prompt, in tokens; older turns are dropped."})
    response_length: int = field(default=53, metadata={"help": "Longest reply, in tokens."})
    temperature: float = field(default=1.0, metadata={"help": "Sampling temperature of the rollouts."})
    kl_coef: float = field(default=0.05, metadata={"help": "Weight of the KL penalty inside the reward."})
    gamma: float = field(default=1.0, metadata={"help": "Discount."})
    lam: float = field(default=0.95, metadata={"help": "Lambda of the generalised advantage estimates."})
    cliprange: float = field(default=0.2, metadata={"help": "Clip range of the policy ratio."})
    cliprange_value: float = field(default=0.2, metadata={"help": "Clip range of the critic."})
    vf_coef: float = field(default=0.1, metadata={"help": "Weight of the critic's loss."})
    whiten_rewards: bool = field(default=False, metadata={"help": "Scale rewards to variance 1 in each rollout."})
    missing_eos_penalty: float | None = field(
        default=None, metadata={"help": "Taken off the score of a reply that was cut off before its stop token."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.ddp_find_unused_parameters = False
        problems = []
        for name, default in (("max_steps", -1), ("num_train_epochs", 3.0)):
            if getattr(self, name) != default:
                problems.append(
                    f"`{name}` is {getattr(self, name)}, but the length of PPO is given in replies. Delete it and set "
                    f"`total_episodes`: each {self.rollout_size} of them are a rollout, which lasts "
                    f"{self.steps_per_rollout} optimiser steps."
                )
        for name, strategy in (("save_steps", self.save_strategy), ("eval_steps", self.eval_strategy)):
            steps = getattr(self, name)
            if strategy == "steps" and steps and steps % self.steps_per_rollout:
                problems.append(
                    f"`{name}` is {steps}, but a rollout lasts {self.steps_per_rollout} optimiser steps "
                    "(num_ppo_epochs * num_mini_batches) and must not be cut in two. Set it to "
                    f"{max(1, round(steps / self.steps_per_rollout)) * self.steps_per_rollout}."
                )
        if problems:
            raise ConfigError(problems)

    @property
    def local_rollout_size(self) -> int:
        """Episodes of one rollout on this process."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps * self.num_mini_batches

    @property
    def rollout_size(self) -> int:
        """Episodes of one rollout over all processes."""
        return self.local_rollout_size * self.world_size

    @property
    def steps_per_rollout(self) -> int:
        """Optimiser steps that one rollout is used for."""
        return self.num_ppo_epochs * self.num_mini_batches

    @property
    def total_steps(self) -> int:
        """Optimiser steps of the whole training; the last rollout is a whole one."""
        return math.ceil(self.total_episodes / self.rollout_size) * self.steps_per_rollout


class PolicyOutput(NamedTuple):
    """What the policy says about given replies: `(batch, length - 1)` each, at t about token t + 1, zero outside."""

    logprobs: Tensor
    entropy: Tensor
    values: Tensor


@dataclass
class Rollout:
    """Replies with everything the update needs; the first dimension of each tensor is the episode.

    `input_ids`, `attention_mask`, `position_ids` and `mask` are `(episodes, length)`: prompts padded on the left,
    replies on the right, `mask` 1 on the reply. The others are `(episodes, length - 1)`, aligned as in PolicyOutput.
    """

    input_ids: Tensor
    attention_mask: Tensor
    position_ids: Tensor
    mask: Tensor
    logprobs: Tensor
    values: Tensor
    advantages: Tensor
    returns: Tensor

    def take(self, indices: Tensor) -> "Rollout":
        """The episodes at `indices`."""
        return Rollout(**{name: tensor[indices.to(tensor.device)] for name, tensor in vars(self).items()})


class RolloutSampler(Sampler[list[int]]):
    """Batches of row numbers, one a rollout and process, each repeated for every micro-batch made from it.

    The order is a permutation of (seed, epoch); a rest that fills no rollout waits for another epoch's order.
    """

    def __init__(self, num_rows: int, args: PPOConfig) -> None:
        if num_rows < args.rollout_size:
            raise ValueError(
                f"A rollout takes {args.rollout_size} prompts (per_device_train_batch_size * "
                f"gradient_accumulation_steps * num_mini_batches * processes), but the dataset has {num_rows}."
            )
        self.num_rows = num_rows
        self.args = args
        self.epoch = 0
        self.repeats = args.steps_per_rollout * args.gradient_accumulation_steps

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.num_rows // self.args.rollout_size * self.repeats

    def __iter__(self) -> Iterator[list[int]]:
        order = torch.randperm(self.num_rows, generator=_generator(self.args.seed, self.epoch)).tolist()
        size, local = self.args.rollout_size, self.args.local_rollout_size
        for start in range(0, self.num_rows - size + 1, size):
            mine = start + self.args.process_index * local
            for _ in range(self.repeats):
                yield order[mine : mine + local]


class _RolloutLoader(DataLoader):
    """A DataLoader that hands the epoch on to its batch sampler."""

    def set_epoch(self, epoch: int) -> None:
        sampler = self.batch_sampler
        assert isinstance(sampler, RolloutSampler)
        sampler.set_epoch(epoch)


class PPOTrainer(Trainer):
    """Train a policy adapter by PPO against rewards of its own replies.

    Args:
        model: A PeftModel whose adapter "default" is the policy and whose adapter "reference" is what the KL is
            measured against. A learned reward is one more adapter with a score head (see
            [`rlhf.model.add_score_head`]).
        args: The configuration.
        reward_adapter: Name of the reward adapter on the same base, or None.
        reward_functions: Callables `(prompts, completions, **columns) -> list[float]`. The score of a reply is the
            sum of the reward adapter's and theirs.
        train_dataset: Columns `prompt_ids` and `row` (see [`rlhf.data.columns.prompt_columns`]).
        eval_dataset: The same, held out; where `reference_ids` stand beside, their perplexity is measured too.
        processing_class: The tokenizer.
        callbacks: Of the Trainer.

    Raises:
        ValueError: if a role's adapter is missing, or there is nothing to reward with.
    """

    loss_is_scaled_for_ga = True  # each micro-batch's loss is already divided by the tokens of its whole minibatch

    def __init__(
        self,
        model: PeftModel,
        args: PPOConfig,
        train_dataset: Dataset,
        processing_class: PreTrainedTokenizerBase,
        reward_adapter: str | None = None,
        reward_functions: Sequence[RewardFunction] = (),
        eval_dataset: Dataset | None = None,
        callbacks: list[TrainerCallback] | None = None,
    ) -> None:
        if reward_adapter is None and not reward_functions:
            raise ValueError("`reward_adapter` and `reward_functions` are both empty: there is nothing to learn from.")
        for role in ("default", "reference", reward_adapter):
            if role is not None and role not in model.peft_config:
                raise ValueError(f"`model` has no adapter {role!r}; it has {', '.join(model.peft_config)}.")
        base = model.get_base_model()
        set_trainable(model, "default")
        add_value_head(base)
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0  # noise between rollout and update would be taken for a change of the policy
        if args.gradient_checkpointing:
            model.enable_input_require_grads()
        self.reward_adapter = reward_adapter
        self.reward_functions = list(reward_functions)
        args.max_steps = args.total_steps  # here, not in the configuration: it depends on the number of processes
        super().__init__(
            model=model,
            args=args,
            data_collator=lambda rows: rows,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
        )
        trainable_to_fp32(model)
        self.generation_config = generation_config(processing_class, args.response_length, args.temperature)
        self._metrics: dict[str, list[float]] = defaultdict(list)
        self._rollout: Rollout | None = None
        self._step = -1  # the optimiser step that `_micro_step` counts in
        self._micro_step = 0

    # Data

    def get_train_dataloader(self) -> DataLoader:
        """One item a micro-batch: the rows of the rollout that it belongs to, as a list."""
        sampler = RolloutSampler(len(self.train_dataset), self.args)
        return _RolloutLoader(self.train_dataset, batch_sampler=sampler, collate_fn=self.data_collator)

    # Rollout

    def rollout(self, rows: list[dict[str, Any]], log: dict[str, list[float]]) -> Rollout:
        """Reply to the prompts of `rows`, score the replies, and estimate the advantages.

        Args:
            rows: Rows of the dataset.
            log: Where the statistics of the rollout are appended, under TRL's names.
        """
        args, model = self.args, self.accelerator.unwrap_model(self.model)
        device = self.accelerator.device
        with inference(model), self.accelerator.autocast():
            prompt_ids, prompt_mask = left_pad(
                [row["prompt_ids"] for row in rows], self.processing_class.pad_token_id, device
            )
            responses = sample_ids(model, prompt_ids, prompt_mask, self.generation_config)
            mask = response_mask(responses, self.processing_class.eos_token_id)
            batch = _as_batch(prompt_ids, prompt_mask, responses, mask)
            policy = self._forward_in_parts(batch)
            with use_adapter(model, "reference"):
                reference = self._forward_in_parts(batch)
            scores = self.score(rows, batch, responses, mask)
        finished = ((responses == self.processing_class.eos_token_id) & mask.bool()).any(dim=1)
        if args.missing_eos_penalty is not None:
            scores = scores - args.missing_eos_penalty * (~finished)

        tokens = batch["mask"][:, 1:]
        rewards = kl_penalised_rewards(scores, policy.logprobs, reference.logprobs, tokens, args.kl_coef)
        if args.whiten_rewards:
            rewards = masked_whiten(rewards, tokens, shift_mean=False, all_sum=self._all_sum)
        advantages, returns = advantages_and_returns(rewards, policy.values, tokens, args.gamma, args.lam)
        explained = _explained_variance(policy.values, returns, tokens)
        advantages = masked_whiten(advantages, tokens, all_sum=self._all_sum)

        kl = ((policy.logprobs - reference.logprobs) * tokens).sum(1)
        statistics = {
            "objective/kl": kl.mean(),
            "objective/kl_k3": (kl_k3(policy.logprobs, reference.logprobs) * tokens).sum(1).mean(),
            "objective/entropy": (policy.entropy * tokens).sum(1).mean(),
            "objective/non_score_reward": (-args.kl_coef * kl).mean(),
            "objective/scores": scores.mean(),
            "objective/rlhf_reward": (scores - args.kl_coef * kl).mean(),
            "val/explained_variance": explained,
            "val/num_eos_tokens": finished.float().mean(),
            "val/response_length": mask.sum(1).float().mean(),
        }
        for name, value in statistics.items():
            log[name].append(self._mean(value))
        return Rollout(**batch, logprobs=policy.logprobs, values=policy.values, advantages=advantages, returns=returns)

    def score(self, rows: list[dict[str, Any]], batch: dict[str, Tensor], responses: Tensor, mask: Tensor) -> Tensor:
        """One score a reply, `(episodes,)`: the reward adapter's plus each reward function's."""
        scores = torch.zeros(len(rows), device=responses.device)
        if self.reward_adapter is not None:
            model = self.accelerator.unwrap_model(self.model)
            with use_adapter(model, self.reward_adapter):
                scores += reward_scores(model.get_base_model(), **_inputs(batch))
        if self.reward_functions:
            data = [json.loads(row["row"]) for row in rows]
            columns = {key: [row.get(key) for row in data] for key in data[0] if key not in ("prompt", "persona")}
            prompts = [with_persona(row) for row in data]
            ids = responses.masked_fill(mask == 0, self.processing_class.pad_token_id)
            completions = [reply_text(row, self.processing_class) for row in ids.tolist()]
            for function in self.reward_functions:
                scores += torch.tensor(function(prompts, completions, **columns), device=scores.device)
        return scores

    # Update

    def training_step(self, model: nn.Module, inputs: list[dict[str, Any]], num_items_in_batch=None) -> Tensor:
        """One micro-batch of the current rollout; the first of a rollout makes it.

        Raises:
            RatioError: on the first minibatch of a run, if the ratio of new to old probabilities is not 1.
        """
        args = self.args
        position = self.state.global_step % args.steps_per_rollout
        if self._step != self.state.global_step:
            self._step, self._micro_step = self.state.global_step, 0
            number = self.state.global_step // args.steps_per_rollout
            epoch, minibatch = divmod(position, args.num_mini_batches)
            if position == 0 or self._rollout is None:
                self._rollout = self.rollout(inputs, self._metrics)
            order = torch.randperm(args.local_rollout_size, generator=_generator(args.seed, number, epoch))
            size = args.per_device_train_batch_size * args.gradient_accumulation_steps
            self._minibatch = self._rollout.take(order[minibatch * size : (minibatch + 1) * size])
            self._num_tokens = self._all_sum(self._minibatch.mask.sum())
        size = args.per_device_train_batch_size
        batch = self._minibatch.take(torch.arange(self._micro_step * size, (self._micro_step + 1) * size))
        self._micro_step += 1
        return super().training_step(model, {"batch": batch}, num_items_in_batch)

    def _prepare_inputs(self, inputs: Any) -> Any:
        return inputs  # the rollout is on the device already

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Rollout], return_outputs=False, num_items_in_batch=None
    ):
        """Clipped policy loss plus `vf_coef` times the critic's, over the tokens of the whole minibatch."""
        args, batch = self.args, inputs["batch"]
        tokens = batch.mask[:, 1:]
        output = model(**_inputs(vars(batch)), response_mask=batch.mask, temperature=args.temperature)
        if self.state.global_step == self._initial_global_step:
            self._check_ratio(output.logprobs, batch)
        of_policy = policy_loss(
            output.logprobs, batch.logprobs, batch.advantages, tokens, args.cliprange, self._num_tokens
        )
        of_critic = value_loss(
            output.values, batch.values, batch.returns, tokens, args.cliprange_value, self._num_tokens
        )
        with torch.no_grad():
            ratio = probability_ratio(output.logprobs, batch.logprobs, tokens)
            clipped = ((ratio - 1).abs() > args.cliprange).float()
            log_ratio = output.logprobs - batch.logprobs
            parts = self.args.world_size * args.gradient_accumulation_steps
            statistics = {
                "loss/policy_avg": of_policy.detach() * parts,
                "loss/value_avg": of_critic.detach() * parts,
                "policy/approxkl_avg": masked_mean(0.5 * log_ratio**2, tokens),
                "policy/clipfrac_avg": masked_mean(clipped, tokens),
                "policy/entropy_avg": masked_mean(output.entropy, tokens),
                "val/ratio": masked_mean(ratio, tokens),
            }
            for name, value in statistics.items():
                self._metrics[name].append(self._mean(value))
        # DDP averages the gradients of the ranks, while the loss is a sum over all of them.
        return (of_policy + args.vf_coef * of_critic) * self.args.world_size

    def _check_ratio(self, logprobs: Tensor, batch: Rollout) -> None:
        ratio = probability_ratio(logprobs.detach(), batch.logprobs, batch.mask[:, 1:])
        furthest = self.accelerator.gather((ratio - 1).abs().max()).max().item()
        limit = 1e-2 if self.args.fp16 or self.args.bf16 else 1e-3
        if not furthest < limit:
            raise RatioError(
                f"On the first minibatch the new policy is the old one, so that every ratio must be 1, but one is off "
                f"by {furthest:.3g} (limit {limit:g}). Probable causes: dropout is on, the adapter of the update is not "
                "the one that sampled, or positions and padding differ between the two forwards."
            )

    # Forward passes

    def _forward_in_parts(self, batch: dict[str, Tensor], temperature: float | None = None) -> PolicyOutput:
        """The update's own forward, in pieces of the update's size, so that old and new log-probabilities agree."""
        model = self.accelerator.unwrap_model(self.model)
        temperature = self.args.temperature if temperature is None else temperature
        pieces = []
        for start in range(0, len(batch["mask"]), self.args.per_device_train_batch_size):
            part = {name: t[start : start + self.args.per_device_train_batch_size] for name, t in batch.items()}
            pieces.append(model(**_inputs(part), response_mask=part["mask"], temperature=temperature))
        return PolicyOutput(*(torch.cat(part) for part in zip(*pieces, strict=True)))

    # Evaluation

    def evaluate(
        self, eval_dataset: Dataset | None = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Reply to the held-out prompts; the scores and the KL, and the perplexity of the reference replies."""
        rows = list(eval_dataset if eval_dataset is not None else self.eval_dataset)
        rows = rows[: len(rows) // self.args.world_size * self.args.world_size]  # equal numbers, so equal collectives
        rows = rows[self.args.process_index :: self.args.world_size]
        if not rows:
            raise ValueError(f"The held-out prompts are fewer than the {self.args.world_size} processes. Add some.")
        size = self.args.per_device_eval_batch_size
        batches = [rows[start : start + size] for start in range(0, len(rows), size)]
        log: dict[str, list[float]] = defaultdict(list)
        devices = [self.accelerator.device] if self.accelerator.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(self.args.seed)
            for batch in batches:
                self.rollout(batch, log)
            metrics = {
                f"{metric_key_prefix}_{name}": sum(v * len(b) for v, b in zip(values, batches, strict=True))
                / len(rows)
                for name, values in log.items()
            }
            if all(row.get("reference_ids") for row in rows):
                nll = self._all_sum(torch.stack([self._reference_nll(batch) for batch in batches]).sum(0))
                metrics[f"{metric_key_prefix}_loss"] = (nll[0] / nll[1]).item()
                metrics[f"{metric_key_prefix}_perplexity"] = math.exp(metrics[f"{metric_key_prefix}_loss"])
        self.log(metrics)
        self.control: TrainerControl = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _reference_nll(self, rows: list[dict[str, Any]]) -> Tensor:
        """Summed negative log-likelihood of the reference replies, and their number of tokens."""
        model, device = self.accelerator.unwrap_model(self.model), self.accelerator.device
        pad = self.processing_class.pad_token_id
        with inference(model), self.accelerator.autocast():
            prompt_ids, prompt_mask = left_pad([row["prompt_ids"] for row in rows], pad, device)
            width = max(len(row["reference_ids"]) for row in rows)
            responses = torch.tensor(
                [row["reference_ids"] + [pad] * (width - len(row["reference_ids"])) for row in rows], device=device
            )
            lengths = torch.tensor([len(row["reference_ids"]) for row in rows], device=device)
            mask = (torch.arange(width, device=device) < lengths[:, None]).long()
            batch = _as_batch(prompt_ids, prompt_mask, responses, mask)
            logprobs = self._forward_in_parts(batch, temperature=1.0).logprobs
        return torch.stack([-logprobs.sum(), mask.sum().float()])

    # Log, save, load

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the means of PPO's own statistics since the last log."""
        if not any(key.startswith("eval_") for key in logs):
            logs = {**logs, **{name: sum(values) / len(values) for name, values in self._metrics.items() if values}}
            logs["episode"] = self.state.global_step // self.args.steps_per_rollout * self.args.rollout_size
            self._metrics.clear()
        super().log(logs, start_time)

    def floating_point_ops(self, inputs: Any) -> int:
        return 0  # the Trainer's count knows neither rollouts nor four roles

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """The policy as a plain adapter, the critic's head beside it; frozen roles have folders of their own."""
        folder = Path(output_dir or self.args.output_dir)
        model = self.accelerator.unwrap_model(self.model)
        model.save_pretrained(folder, selected_adapters=["default"], save_embedding_layers=False)
        save_file(model.get_base_model().value_head.state_dict(), folder / VALUE_HEAD_FILE)
        self.processing_class.save_pretrained(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        policy: PeftModel = self.accelerator.unwrap_model(model or self.model)
        value_head = policy.get_base_model().value_head
        value_head.load_state_dict(load_file(Path(resume_from_checkpoint) / VALUE_HEAD_FILE))
        set_trainable(policy, "default")
        value_head.requires_grad_(True)
        trainable_to_fp32(policy)

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(self.state.best_model_checkpoint, self.model)

    def _all_sum(self, tensor: Tensor) -> Tensor:
        return self.accelerator.reduce(tensor, reduction="sum")

    def _mean(self, value: Tensor) -> float:
        return self.accelerator.reduce(value.detach().float(), reduction="mean").item()


def add_value_head(base: PreTrainedModel) -> None:
    """Give a causal model a critic, and a forward that returns log-probabilities and values in one pass.

    Called with `response_mask` the forward returns a PolicyOutput; without it, it is the model's own. So the model
    that the Trainer holds stays a PeftModel, and under DDP every trainable parameter is used in every pass.
    """
    hidden_size = base.config.get_text_config().hidden_size
    base.value_head = nn.Linear(hidden_size, 1, dtype=torch.float32, device=base.device)
    nn.init.zeros_(base.value_head.weight)  # no opinion at first: advantages start as plain rewards
    nn.init.zeros_(base.value_head.bias)
    own_forward = base.forward

    @functools.wraps(type(base).forward)  # `generate` checks its arguments against the signature
    def forward(
        self: PreTrainedModel, *args: Any, response_mask: Tensor | None = None, temperature: float = 1.0, **kwargs: Any
    ) -> Any:
        if response_mask is None:
            return own_forward(*args, **kwargs)
        ids = kwargs["input_ids"]
        states = self.base_model(
            input_ids=ids,
            attention_mask=kwargs["attention_mask"],
            position_ids=kwargs["position_ids"],
            use_cache=False,
        ).last_hidden_state[:, :-1]
        mask = response_mask[:, 1:]
        logprobs, entropy = token_logprobs(states, self.get_output_embeddings(), ids[:, 1:], mask, temperature)
        with torch.autocast(states.device.type, enabled=False):
            values = self.value_head(states.float()).squeeze(-1)
        return PolicyOutput(logprobs, entropy, torch.where(mask.bool(), values, 0))

    base.forward = types.MethodType(forward, base)


def _as_batch(prompt_ids: Tensor, prompt_mask: Tensor, responses: Tensor, mask: Tensor) -> dict[str, Tensor]:
    attention_mask = torch.cat([prompt_mask, mask], dim=1)
    return {
        "input_ids": torch.cat([prompt_ids, responses], dim=1),
        "attention_mask": attention_mask,
        "position_ids": (attention_mask.cumsum(dim=1) - 1).clamp(min=0),
        "mask": torch.cat([torch.zeros_like(prompt_mask), mask], dim=1),
    }


def _inputs(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids")}


def _generator(*numbers: int) -> torch.Generator:
    """A generator seeded by several numbers, the same on every rank and machine."""
    seed = 0
    for number in numbers:
        seed = (seed * 1_000_003 + number + 1) % (2**63 - 1)
    return torch.Generator().manual_seed(seed)


def _explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    keep = mask.bool()
    spread = returns[keep].var() if keep.sum() > 1 else returns.new_tensor(0.0)
    return 1 - (returns - values)[keep].var() / spread if spread > 0 else returns.new_tensor(0.0)
