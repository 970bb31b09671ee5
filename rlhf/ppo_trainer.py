"""PPO on transformers.Trainer's hooks: rollout, score, advantages, loss.

One frozen base carries every role. The policy is the adapter "default", the reference the frozen adapter "reference",
a learned reward a frozen adapter with a score head, and the critic a linear head on the policy's hidden states or the
adapter "critic". Whatever a training loop needs beside that (gradient accumulation, clipping, schedules, the fp16
scaler, DDP, logging, checkpoints) is the Trainer's.

An item of the dataloader is one rollout batch of prompts, handed out once for each micro-batch that is made from it.
So the position in a rollout follows from `state.global_step` alone, and a resumed run needs no counter of ours.
"""

import copy
import json
import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import (
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import get_last_checkpoint

from rlhf.chat import reply_text
from rlhf.checkpoints import run_epoch_unless_done
from rlhf.config import ConfigError
from rlhf.files import write_bytes
from rlhf.generate import generation_config, inference, is_stop, left_pad, response_mask, sample_replies
from rlhf.lora import checkpoint_activations, set_trainable, use_adapter
from rlhf.model import positions_problem, trainable_to_fp32
from rlhf.nonfinite import NonFiniteError, NonFiniteGuard
from rlhf.persona import with_persona
from rlhf.ppo_math import (
    adapted_kl_coef,
    advantages_and_returns,
    explained_variance,
    kl_k3,
    kl_penalised_rewards,
    masked_whiten,
    policy_loss,
    probability_ratio,
    value_loss,
)
from rlhf.rewards import RewardFunction, call_reward, reward_name, reward_scores
from rlhf.roles import (
    VALUE_ADAPTER,
    PolicyOutput,
    PPOState,
    RoleError,
    RoleGuard,
    add_critic,
    check_roles,
    critic_parameters,
    dropouts,
)
from rlhf.rollouts import Rollout, RolloutLoader, RolloutSampler, as_batch, generator_of, inputs_of, pieces

logger = logging.getLogger(__name__)

VALUE_HEAD_FILE = "value_head.safetensors"
VALUE_ADAPTER_FILE = "value_adapter.safetensors"
BEST_ADAPTER_FILE = "best_adapter.safetensors"  # of a checkpoint: the one of best held-out score then


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
    generation_batch_size: int = field(
        default=64, metadata={"help": "Replies decoded together, to prompts of like length.", "range": "[1, inf)"}
    )
    temperature: float = field(default=1.0, metadata={"help": "Sampling temperature of the rollouts."})
    stop_tokens: list[str] = field(
        default_factory=list, metadata={"help": "Tokens that end a reply, beside the chat template's own."}
    )
    value_model: str = field(
        default="head",
        metadata={
            "help": "The critic: a linear head on the policy's hidden states, or an adapter started from the reward's.",
            "choices": ("head", "adapter"),
        },
    )
    kl_coef: float = field(default=0.05, metadata={"help": "Weight of the KL penalty inside the reward."})
    kl_target: float | None = field(
        default=None,
        metadata={"help": "KL in nats a reply that `kl_coef` is adapted to; unset, it is fixed.", "range": "(0, inf)"},
    )
    kl_horizon: int = field(
        default=10_000, metadata={"help": "Replies over which an adaptive `kl_coef` moves.", "range": "[1, inf)"}
    )
    gamma: float = field(default=1.0, metadata={"help": "Discount."})
    lam: float = field(default=0.95, metadata={"help": "Lambda of the generalised advantage estimates."})
    cliprange: float = field(default=0.2, metadata={"help": "Clip range of the policy ratio."})
    cliprange_value: float = field(default=0.2, metadata={"help": "Clip range of the critic."})
    vf_coef: float = field(default=0.1, metadata={"help": "Weight of the critic's loss."})
    normalize_rewards: bool = field(
        default=False, metadata={"help": "Each reward to mean 0 and variance 1 of all its scores so far."}
    )
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
        if self.kl_target is not None and self.kl_coef == 0:
            problems.append(
                f"`kl_target` is {self.kl_target:g} and `kl_coef` 0, which is multiplied and so stays 0. Begin with a "
                "`kl_coef` such as 0.05, or leave `kl_target` out."
            )
        if self.kl_target is not None and 0.2 * self.rollout_size >= self.kl_horizon:
            problems.append(
                f"`kl_horizon` is {self.kl_horizon}, but a rollout has {self.rollout_size} replies and moves `kl_coef` by "
                f"up to 0.2 * {self.rollout_size} / `kl_horizon`, so that it would turn 0 or negative. Set it to "
                f"{self.rollout_size} or more."
            )
        if self.enable_jit_checkpoint:
            problems.append(
                "`enable_jit_checkpoint` writes a checkpoint at once, and a rollout must not be cut in two. Delete it: "
                "what is killed goes on from the last rollout that was saved (`save_steps`)."
            )
        if self.ignore_data_skip:
            problems.append(
                "`ignore_data_skip` is on, and a resumed run would begin the prompts of its epoch anew. Delete it: "
                "skipped prompts are not replied to."
            )
        if self.deepspeed_plugin is not None and self.deepspeed_plugin.zero_stage == 3:
            problems.append(
                "DeepSpeed ZeRO-3 (`zero_stage` 3) shards the base over the ranks, while each replies to its own "
                "prompts and ends after another number of tokens. Use ZeRO-2 or plain data parallelism."
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


class PPOTrainer(Trainer):
    """Train a policy adapter by PPO against rewards of its own replies.

    Args:
        model: A PeftModel whose adapter "default" is the policy and whose adapter "reference" is what the KL is
            measured against. A learned reward is one more adapter with a score head (see
            [`rlhf.model.add_score_head`]); with `value_model` "adapter", so is the critic, under the name "critic".
        args: The configuration.
        reward_adapter: Name of the reward adapter on the same base, or several, or None.
        reward_functions: Callables `(prompts, completions, **columns) -> list[float]`.
        reward_weights: Weight of a reward by its name: the adapter's, or the function's `__name__`. 1 where it is
            not named; with 0 a reward is only logged. The score of a reply is the weighted sum.
        max_skipped_steps: Of the [`rlhf.nonfinite.NonFiniteGuard`] that it trains under.
        train_dataset: Columns `prompt_ids` and `row` (see [`rlhf.data.columns.prompt_columns`]).
        eval_dataset: The same, held out; where `reference_ids` stand beside, their perplexity is measured too.
        processing_class: The tokenizer.
        callbacks: Of the Trainer.

    Raises:
        ValueError: if a role's adapter is missing, there is nothing to reward with, two rewards have one name, a
            weight names no reward, a stop token is not in the vocabulary, or the model has too few positions.
    """

    loss_is_scaled_for_ga = True  # each micro-batch's loss is already divided by the tokens of its whole minibatch

    def __init__(
        self,
        model: PeftModel,
        args: PPOConfig,
        train_dataset: Dataset,
        processing_class: PreTrainedTokenizerBase,
        reward_adapter: str | Sequence[str] | None = None,
        reward_functions: Sequence[RewardFunction] = (),
        eval_dataset: Dataset | None = None,
        callbacks: list[TrainerCallback] | None = None,
        reward_weights: Mapping[str, float] | None = None,
        max_skipped_steps: int = 3,
    ) -> None:
        adapters = [reward_adapter] if isinstance(reward_adapter, str) else list(reward_adapter or ())
        names = [*adapters, *map(reward_name, reward_functions)]
        critic = [VALUE_ADAPTER] if args.value_model == "adapter" else []
        check_roles(model, ["default", "reference", *adapters, *critic], names, reward_weights or {})
        _check_positions(model, args, train_dataset, args.response_length)
        if eval_dataset is not None:
            references = eval_dataset["reference_ids"] if "reference_ids" in eval_dataset.column_names else []
            longest = max((len(ids) for ids in references if ids), default=0)
            _check_positions(model, args, eval_dataset, max(longest, args.response_length))
        args = copy.copy(args)
        args.max_steps = args.total_steps  # here, not in the configuration: it depends on the number of processes
        set_trainable(model, "default")
        add_critic(model, args.value_model)
        for parameter in critic_parameters(model).values():
            parameter.requires_grad_(True)
        for _, module, attribute in dropouts(model):
            setattr(module, attribute, 0.0)  # its noise would be taken for a change of the policy
        if args.gradient_checkpointing:
            checkpoint_activations(model, **(args.gradient_checkpointing_kwargs or {}))
            args.activation_checkpointing = args.gradient_checkpointing = (
                False  # the Trainer would do it over, plainly
            )
        self.reward_adapters = adapters
        self.reward_functions = list(reward_functions)
        self.reward_weights = {name: (reward_weights or {}).get(name, 1.0) for name in names}
        super().__init__(
            model=model,
            args=args,
            data_collator=lambda rows: rows,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=[*(callbacks or ()), PPOState(args.kl_coef)],
        )
        self.add_callback(RoleGuard(model, ["reference", *adapters]))
        self.guard = NonFiniteGuard(self, max_skipped_steps, zero_is_healthy=True)
        trainable_to_fp32(model)
        stop_ids = _ids_of(args.stop_tokens, processing_class)
        self.stop_ids = [processing_class.eos_token_id, *stop_ids]
        self.generation_config = generation_config(processing_class, args.response_length, args.temperature, stop_ids)
        self._metrics: dict[str, list[float]] = {}
        self.resumed_from: Path | None = None  # the checkpoint, for callbacks with files beside it
        self.best_adapter: Path | None = None  # the weights that each checkpoint has a copy of
        self._rollout: Rollout | None = None
        self._rollout_rows: list[dict[str, Any]] = []  # what it replies to, for those who read the replies
        self._step = -1  # the optimiser step that `_micro_step` counts in
        self._micro_step = 0
        self._put_off: set[str] = set()  # what was asked of `control` within the rollout

    @property
    def ppo_state(self) -> PPOState:
        """The KL coefficient and the scales of the rewards."""
        return next(callback for callback in self.callback_handler.callbacks if isinstance(callback, PPOState))

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The Trainer's optimiser, for the weights of policy and critic by name.

        Raises:
            RoleError: if other weights require gradients, or some of these do not.
        """
        own = self.accelerator.unwrap_model(self.model)
        declared = {name for name, _ in own.named_parameters() if ".default." in name} | critic_parameters(own).keys()
        trainable = {name for name, parameter in own.named_parameters() if parameter.requires_grad}
        if wrong := sorted(declared ^ trainable):
            raise RoleError(
                f"Policy and critic have {len(declared)} trainable weights, and {len(wrong)} are frozen that should not "
                f"be, or the other way round, for example {wrong[0]}. Switch adapters with `rlhf.lora.use_adapter` alone."
            )
        return super().create_optimizer(model)

    # Data

    def get_train_dataloader(self) -> DataLoader:
        """One item a micro-batch: the rows of the rollout that it belongs to, as a list."""
        sampler = RolloutSampler(len(self.train_dataset), self.args)
        return RolloutLoader(self.train_dataset, batch_sampler=sampler, collate_fn=self.data_collator)

    # Rollout

    def rollout(self, rows: list[dict[str, Any]], log: dict[str, list[float]], held_out: bool = False) -> Rollout:
        """Reply to the prompts of `rows`, score the replies, and estimate the advantages.

        Args:
            rows: Rows of the dataset.
            log: Where the statistics of the rollout are appended, under TRL's names.
            held_out: Whether to measure alone: by the configured `kl_coef` and unnormalised scores, which are the same
                throughout a training, and without a change of either's state.
        """
        args, model = self.args, self.accelerator.unwrap_model(self.model)
        with inference(model), self.accelerator.autocast():
            prompts = [row["prompt_ids"] for row in rows]
            prompt_ids, prompt_mask = left_pad(prompts, self.processing_class.pad_token_id, self.accelerator.device)
            began = time.perf_counter()
            responses = sample_replies(model, prompts, self.generation_config, args.generation_batch_size)
            mask = response_mask(responses, self.stop_ids)
            speed = mask.sum() / (time.perf_counter() - began)
            batch = as_batch(prompt_ids, prompt_mask, responses, mask)
            policy = self._forward_in_parts(batch)
            with use_adapter(model, "reference"):
                reference = self._forward_in_parts(batch, with_values=False)
            by_reward = self.score(rows, batch, responses, mask)
        scores = self._weigh(by_reward, normalise=args.normalize_rewards and not held_out)
        finished = (is_stop(responses, self.stop_ids) & mask.bool()).any(dim=1)
        if args.missing_eos_penalty is not None:
            scores = scores - args.missing_eos_penalty * (~finished)

        kl_coef = args.kl_coef if held_out or args.kl_target is None else self.ppo_state.kl_coef
        tokens = batch["mask"][:, 1:]
        rewards = kl_penalised_rewards(scores, policy.logprobs, reference.logprobs, tokens, kl_coef)
        if args.whiten_rewards:
            rewards = masked_whiten(rewards, tokens, shift_mean=False, all_sum=self._all_sum)
        advantages, returns = advantages_and_returns(rewards, policy.values, tokens, args.gamma, args.lam)
        explained = explained_variance(policy.values, returns, tokens, self._all_sum)
        advantages = masked_whiten(advantages, tokens, all_sum=self._all_sum)

        kl = ((policy.logprobs - reference.logprobs) * tokens).sum(1)
        statistics = {
            "objective/kl": kl.mean(),
            "objective/kl_k3": (kl_k3(policy.logprobs, reference.logprobs) * tokens).sum(1).mean(),
            "objective/entropy": (policy.entropy * tokens).sum(1).mean(),
            "objective/non_score_reward": (-kl_coef * kl).mean(),
            "objective/scores": scores.mean(),
            "objective/rlhf_reward": (scores - kl_coef * kl).mean(),
            "val/explained_variance": explained,
            "val/num_eos_tokens": finished.float().mean(),
            "val/response_length": mask.sum(1).float().mean(),
        }
        if not held_out:
            statistics["rollout/tokens_per_second"] = speed * args.world_size  # ranks sample side by side
        means = self._mean(statistics)
        for name, raw in by_reward.items():
            everyone = self.accelerator.gather(raw)
            means[f"rewards/{name}/mean"] = everyone.mean().item()
            means[f"rewards/{name}/std"] = everyone.std().item() if len(everyone) > 1 else 0.0
        _append(log, {**means, "objective/kl_coef": kl_coef})
        if args.kl_target is not None and not held_out:
            self.ppo_state.kl_coef = adapted_kl_coef(
                kl_coef, means["objective/kl"], args.kl_target, args.rollout_size, args.kl_horizon
            )
        return Rollout(**batch, logprobs=policy.logprobs, values=policy.values, advantages=advantages, returns=returns)

    def score(
        self, rows: list[dict[str, Any]], batch: dict[str, Tensor], responses: Tensor, mask: Tensor
    ) -> dict[str, Tensor]:
        """What each reward gives each reply, `(episodes,)` by name, neither weighted nor normalised."""
        model = self.accelerator.unwrap_model(self.model)
        scores = {}
        for adapter in self.reward_adapters:
            scores[adapter] = torch.zeros(len(rows), device=responses.device)
            with use_adapter(model, adapter):
                for piece in pieces(batch, self.args.per_device_train_batch_size):
                    scores[adapter][piece.rows] = reward_scores(model.get_base_model(), **inputs_of(piece.batch))
            if not scores[adapter].isfinite().all():
                raise ValueError(
                    f"The reward adapter {adapter!r} gave a score that is not finite. In float16 its base may overflow: "
                    "load it in another `dtype`; else train the reward model again."
                )
        if self.reward_functions:
            data = [json.loads(row["row"]) for row in rows]
            keys = dict.fromkeys(key for row in data for key in row if key not in ("prompt", "persona"))
            columns = {key: [row.get(key) for row in data] for key in keys}
            prompts = [with_persona(row) for row in data]
            ids = responses.masked_fill(mask == 0, self.processing_class.pad_token_id)
            completions = [reply_text(row, self.processing_class) for row in ids.tolist()]
            for function in self.reward_functions:
                given = call_reward(function, prompts, completions, columns)
                scores[reward_name(function)] = torch.tensor(given, device=responses.device)
        return scores

    def _weigh(self, by_reward: dict[str, Tensor], normalise: bool) -> Tensor:
        total = torch.zeros_like(next(iter(by_reward.values())))
        for name, scores in by_reward.items():
            if normalise:
                scale = self.ppo_state.scales[name]
                scale.add(scores, self._all_sum)
                scores = scale.normalised(scores)
            total += self.reward_weights[name] * scores
        return total

    # Update

    def training_step(self, model: nn.Module, inputs: list[dict[str, Any]], num_items_in_batch=None) -> Tensor:
        """One micro-batch of the current rollout; the first of a rollout makes it.

        Raises:
            RatioError: on the first minibatch of a run, if the ratio of new to old probabilities is not 1.
        """
        if self._step != self.state.global_step:
            self._begin_step(inputs)
        size = self.args.per_device_train_batch_size
        rows = torch.arange(self._micro_step * size, (self._micro_step + 1) * size)
        self._micro_step += 1
        return super().training_step(model, {"batch": self._minibatch.take(rows).trimmed()}, num_items_in_batch)

    def _begin_step(self, inputs: list[dict[str, Any]]) -> None:
        args = self.args
        self._step, self._micro_step = self.state.global_step, 0
        number, position = divmod(self.state.global_step, args.steps_per_rollout)
        if position == 0 or self._rollout is None:
            self._rollout, self._rollout_rows = self._rollout_or_why_not(inputs), inputs
            self.ppo_state.tokens_generated += int(self._all_sum(self._rollout.mask.sum()))
        self._minibatch = self._rollout.take(self.minibatch(number, *divmod(position, args.num_mini_batches)))
        self._minibatch = self._minibatch.by_length()  # so that its micro-batches need little padding
        self._num_tokens = self._all_sum(self._minibatch.mask.sum())
        self.state.num_input_tokens_seen += int(self._all_sum(self._minibatch.attention_mask.sum()))

    def _rollout_or_why_not(self, rows: list[dict[str, Any]]) -> Rollout:
        try:
            return self.rollout(rows, self._metrics)
        except RuntimeError as error:
            if "probability tensor" not in str(error):  # torch.multinomial's words, on a CPU
                raise
            prompts, model = [row["prompt_ids"] for row in rows], self.accelerator.unwrap_model(self.model)
            ids, mask = left_pad(prompts, self.processing_class.pad_token_id, self.accelerator.device)
            with inference(model), self.accelerator.autocast():
                why = self.guard.why_not_finite(model, {"input_ids": ids, "attention_mask": mask})
            raise NonFiniteError(f"The policy's probabilities are not finite, so it cannot reply. {why}") from error

    def minibatch(self, number: int, epoch: int, minibatch: int) -> Tensor:
        """The episodes of a minibatch, on this process: a part of the permutation of (seed, rollout, epoch)."""
        order = torch.randperm(self.args.local_rollout_size, generator=generator_of(self.args.seed, number, epoch))
        size = self.args.per_device_train_batch_size * self.args.gradient_accumulation_steps
        return order[minibatch * size : (minibatch + 1) * size]

    def _prepare_inputs(self, inputs: Any) -> Any:
        return inputs  # the rollout is on the device already

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Rollout], return_outputs=False, num_items_in_batch=None
    ):
        """Clipped policy loss plus `vf_coef` times the critic's, over the tokens of the whole minibatch."""
        args, batch = self.args, inputs["batch"]
        tokens = batch.mask[:, 1:]
        output = model(**inputs_of(vars(batch)), response_mask=batch.mask, temperature=args.temperature)
        of_policy = policy_loss(
            output.logprobs, batch.logprobs, batch.advantages, tokens, args.cliprange, self._num_tokens
        )
        of_critic = value_loss(
            output.values, batch.values, batch.returns, tokens, args.cliprange_value, self._num_tokens
        )
        loss = of_policy + args.vf_coef * of_critic
        statistics = self._statistics(output, batch, of_policy, of_critic)
        sums = self._all_sum(torch.stack([(~loss.isfinite()).float(), *statistics.values()])).tolist()
        if sums[0] > 0:  # on any rank: the guard skips this step, and its statistics would be no numbers
            return loss
        if self.state.global_step == self._initial_global_step:
            self._check_ratio(output.logprobs, batch)
        # Sums of parts of a mean over the minibatch: the log averages over micro-batches.
        _append(
            self._metrics,
            {n: s * args.gradient_accumulation_steps for n, s in zip(statistics, sums[1:], strict=True)},
        )
        # DDP averages the gradients of the ranks, while the loss is a sum over all of them.
        return loss * args.world_size

    @torch.no_grad()
    def _statistics(
        self, output: PolicyOutput, batch: Rollout, of_policy: Tensor, of_critic: Tensor
    ) -> dict[str, Tensor]:
        """This micro-batch's part of means over the tokens of the whole minibatch, under TRL's names."""
        args, keep = self.args, batch.mask[:, 1:].bool()
        ratio = probability_ratio(output.logprobs, batch.logprobs, keep)
        moved = (output.values - batch.values).abs() > args.cliprange_value
        by_token = {
            "policy/approxkl_avg": 0.5 * (output.logprobs - batch.logprobs) ** 2,
            "policy/clipfrac_avg": (ratio - 1).abs() > args.cliprange,
            "policy/entropy_avg": output.entropy,
            "val/clipfrac_avg": moved,
            "val/ratio": ratio,
            "val/ratio_var": (ratio - 1) ** 2,
        }
        means = {name: torch.where(keep, x.float(), 0).sum() / self._num_tokens for name, x in by_token.items()}
        return {"loss/policy_avg": of_policy.detach(), "loss/value_avg": of_critic.detach(), **means}

    def _check_ratio(self, logprobs: Tensor, batch: Rollout) -> None:
        ratio = probability_ratio(logprobs.detach(), batch.logprobs, batch.mask[:, 1:])
        furthest = self.accelerator.gather((ratio - 1).abs().max()).max().item()
        limit = 1e-2 if self.args.fp16 or self.args.bf16 else 1e-3
        if not furthest < limit:
            raise RatioError(
                f"On the first minibatch the new policy is the old one, so that every ratio must be 1, but one is off "
                f"by {furthest:.3g} (limit {limit:g}). Probable cause: {self._probable_cause()}."
            )

    def _probable_cause(self) -> str:
        model = self.accelerator.unwrap_model(self.model)
        if model.active_adapter != "default":
            return f"the adapter of the update, {model.active_adapter!r}, is not the one that sampled, 'default'"
        for name, module, attribute in dropouts(model):
            return f"dropout is on: `{name}` drops {getattr(module, attribute):g}"
        return (
            "positions and padding differ between the two forwards, the weights changed between them, or the kernels "
            "are too coarse (try `attn_implementation: eager`, or float32)"
        )

    # Forward passes

    def _forward_in_parts(
        self, batch: dict[str, Tensor], temperature: float | None = None, with_values: bool = True
    ) -> PolicyOutput:
        """The update's own forward, in pieces of the update's size, so that old and new log-probabilities agree."""
        model = self.accelerator.unwrap_model(self.model)
        temperature = self.args.temperature if temperature is None else temperature
        shape = (len(batch["mask"]), batch["mask"].shape[1] - 1)
        whole = PolicyOutput(*(torch.zeros(shape, device=batch["mask"].device) for _ in PolicyOutput._fields))
        for rows, start, stop, piece in pieces(batch, self.args.per_device_train_batch_size):
            output = model(
                **inputs_of(piece), response_mask=piece["mask"], temperature=temperature, with_values=with_values
            )
            for into, part in zip(whole, output, strict=True):
                into[rows, start : stop - 1] = part.float()
        return whole

    # Evaluation

    def evaluate(
        self, eval_dataset: Dataset | None = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Reply to the held-out prompts; the scores and the KL, and the perplexity of the reference replies.

        All prompts are one rollout, so that deviations and variances are over all of them and depend on no batch size.
        """
        rows = list(eval_dataset if eval_dataset is not None else self.eval_dataset)
        rows = rows[: len(rows) // self.args.world_size * self.args.world_size]  # means of equal numbers a rank
        if not rows:
            raise ValueError(f"The held-out prompts are fewer than the {self.args.world_size} processes. Add some.")
        num_references = sum(bool(row.get("reference_ids")) for row in rows)  # before the split: all ranks go one way
        mine = rows[self.args.process_index :: self.args.world_size]
        log: dict[str, list[float]] = {}
        devices = [self.accelerator.device] if self.accelerator.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            self._seed()
            self.rollout(mine, log, held_out=True)
            metrics = {f"{metric_key_prefix}_{name}": value for name, (value,) in log.items()}
            if 0 < num_references < len(rows):
                logger.warning(
                    "The held-out loss and perplexity are of %d of %d rows; the others have no `reference`.",
                    num_references, len(rows),
                )  # fmt: skip
            if num_references:
                nll = self._all_sum(self._reference_nll([row for row in mine if row.get("reference_ids")]))
                metrics[f"{metric_key_prefix}_loss"] = (nll[0] / nll[1]).item()
                metrics[f"{metric_key_prefix}_perplexity"] = math.exp(metrics[f"{metric_key_prefix}_loss"])
        self.log(metrics)
        self.control: TrainerControl = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _reference_nll(self, rows: list[dict[str, Any]]) -> Tensor:
        """Summed negative log-likelihood of the reference replies, and their number of tokens."""
        model, device = self.accelerator.unwrap_model(self.model), self.accelerator.device
        if not rows:
            return torch.zeros(2, device=device)
        pad = self.processing_class.pad_token_id
        with inference(model), self.accelerator.autocast():
            prompt_ids, prompt_mask = left_pad([row["prompt_ids"] for row in rows], pad, device)
            width = max(len(row["reference_ids"]) for row in rows)
            responses = torch.tensor(
                [row["reference_ids"] + [pad] * (width - len(row["reference_ids"])) for row in rows], device=device
            )
            lengths = torch.tensor([len(row["reference_ids"]) for row in rows], device=device)
            mask = (torch.arange(width, device=device) < lengths[:, None]).long()
            batch = as_batch(prompt_ids, prompt_mask, responses, mask)
            logprobs = self._forward_in_parts(batch, temperature=1.0, with_values=False).logprobs
        return torch.stack([-logprobs.sum(), mask.sum().float()])

    # Log, save, load

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """As the Trainer's; a checkpoint that would not go on where it stopped is refused.

        Raises:
            ValueError: if the checkpoint is not whole, or was written by other numbers of processes or episodes.
        """
        if resume_from_checkpoint is True:  # as the Trainer does, which tells nobody which one it took
            resume_from_checkpoint = get_last_checkpoint(self.args.output_dir) or True
        if isinstance(resume_from_checkpoint, str | Path):
            self.resumed_from = Path(resume_from_checkpoint)
            self._check_checkpoint(self.resumed_from)
        else:
            self._seed()
        return super().train(resume_from_checkpoint, **kwargs)

    def _seed(self) -> None:
        """Random numbers of this rank's own: the Trainer seeds all alike, so that equal prompts got equal replies."""
        torch.manual_seed(generator_of(self.args.seed, self.args.process_index).initial_seed())

    def _check_checkpoint(self, folder: Path) -> None:
        """What this trainer cannot do without, since it also runs without `rlhf.checkpoints`, which knows more.

        Behind the check of a manifest only the rollouts are left to differ. Without one, the Trainer itself would go on
        with other random numbers where the processes are not as many as before, and say so in a log line alone.
        """
        try:
            state = TrainerState.load_from_json(str(folder / TRAINER_STATE_NAME))
        except (OSError, ValueError) as error:
            raise ValueError(
                f"`resume_from_checkpoint`: {folder} is not whole: its {TRAINER_STATE_NAME} cannot be read. Name the "
                "checkpoint before; `rlhf run` does."
            ) from error
        ranks = len(list(folder.glob("rng_state*.pth")))
        if ranks != self.args.world_size:
            raise ValueError(
                f"`resume_from_checkpoint`: {folder} has the random numbers of {ranks} processes, and this launch has "
                f"{self.args.world_size}. Start as many."
            )
        said = next((row for row in reversed(state.log_history) if "episode" in row), None)
        if said is None:
            return
        there, here = said["episode"], self._episode(said["step"])
        if there != here or state.global_step % self.args.steps_per_rollout:
            raise ValueError(
                f"`resume_from_checkpoint`: at step {said['step']} {folder} had seen {there} episodes, and by these "
                f"settings it would be {here}, a rollout being {self.args.rollout_size} episodes and "
                f"{self.args.steps_per_rollout} steps. Set batch size, accumulation, `num_mini_batches` and "
                "`num_ppo_epochs` as they were, or start anew."
            )

    def _episode(self, step: int) -> int:
        return step // self.args.steps_per_rollout * self.args.rollout_size

    _run_epoch = run_epoch_unless_done

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """As the Trainer's; what is asked for within a rollout, by whichever callback, waits for its end.

        A rollout is in no checkpoint, so that one from its middle could not go on with it.
        """
        left = -self.state.global_step % self.args.steps_per_rollout
        asked = [
            name for name in ("should_save", "should_evaluate", "should_training_stop") if getattr(self.control, name)
        ]
        if left and (new := sorted({*asked} - self._put_off)):
            logger.warning(
                "`%s` was asked for at step %d, within a rollout; it is done at the end of the rollout, at step %d.",
                "`, `".join(new), self.state.global_step, self.state.global_step + left,
            )  # fmt: skip
        self._put_off.update(asked)
        for name in self._put_off:
            setattr(self.control, name, not left)
        if not left:
            self._put_off.clear()
        # Means since the last log are in no checkpoint either: a kill would leave a row half of them.
        self.control.should_log |= self.control.should_save
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the means of PPO's own statistics since the last log."""
        if not any(key.startswith("eval_") for key in logs):
            logs = {**logs, **{name: sum(values) / len(values) for name, values in self._metrics.items() if values}}
            logs["episode"] = self._episode(self.state.global_step)
            self._metrics.clear()
        super().log(logs, start_time)

    def floating_point_ops(self, inputs: Any) -> int:
        return 0  # the Trainer's count knows neither rollouts nor four roles

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """The policy as a plain adapter, the critic beside it; frozen roles have folders of their own."""
        if not self.args.should_save:
            return  # DeepSpeed has every rank come here
        folder = Path(output_dir or self.args.output_dir)
        # Written last, it says that the checkpoint is whole: what is written over one that was there is none.
        (folder / TRAINER_STATE_NAME).unlink(missing_ok=True)
        model = self.accelerator.unwrap_model(self.model)
        model.save_pretrained(folder, selected_adapters=["default"], save_embedding_layers=False)
        self.save_critic(folder)
        if self.best_adapter is not None:  # a file, and now: the Trainer loads each folder with an adapter as one more
            write_bytes(folder / BEST_ADAPTER_FILE, self.best_adapter.read_bytes())
        self.processing_class.save_pretrained(folder)

    def save_critic(self, folder: str | Path) -> None:
        """Write the critic's weights to a file in `folder`: no one needs it to chat, but a training that goes on does."""
        model, folder = self.accelerator.unwrap_model(self.model), Path(folder)
        if self.args.value_model == "head":
            save_file(model.get_base_model().value_head.state_dict(), folder / VALUE_HEAD_FILE)
        else:  # no folder of its own: the Trainer would load that in place of the policy
            weights = get_peft_model_state_dict(model, adapter_name=VALUE_ADAPTER, save_embedding_layers=False)
            save_file(weights, folder / VALUE_ADAPTER_FILE)

    def _save_rng_state(self, output_dir: str) -> None:
        """Of every rank, before the main process writes the last file, which makes the checkpoint a whole one."""
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        policy: PeftModel = self.accelerator.unwrap_model(model or self.model)
        folder = Path(resume_from_checkpoint)
        if self.args.value_model == "head":
            policy.get_base_model().value_head.load_state_dict(load_file(folder / VALUE_HEAD_FILE))
        else:
            set_peft_model_state_dict(policy, load_file(folder / VALUE_ADAPTER_FILE), adapter_name=VALUE_ADAPTER)
        set_trainable(policy, "default")
        for parameter in critic_parameters(policy).values():
            parameter.requires_grad_(True)
        trainable_to_fp32(policy)

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(self.state.best_model_checkpoint, self.model)

    def _all_sum(self, tensor: Tensor) -> Tensor:
        return self.accelerator.reduce(tensor, reduction="sum")

    def _mean(self, values: dict[str, Tensor]) -> dict[str, float]:
        """Means over the ranks, in one exchange."""
        stacked = torch.stack([value.detach().float() for value in values.values()])
        return dict(zip(values, self.accelerator.reduce(stacked, reduction="mean").tolist(), strict=True))


def _check_positions(model: PeftModel, args: PPOConfig, dataset: Dataset, reply: int) -> None:
    """Refuse prompts that leave a reply of so many tokens no place: an index error, or nonsense, in mid-run."""
    if problem := positions_problem(model.config, args.max_length, reply):
        longest = max(map(len, dataset["prompt_ids"]), default=0)
        if positions_problem(model.config, longest, reply):
            raise ConfigError([problem])


def _ids_of(tokens: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    vocabulary = tokenizer.get_vocab()
    if unknown := [token for token in tokens if token not in vocabulary]:
        raise ValueError(f"`stop_tokens` has {unknown[0]!r}, which is no token of the tokenizer. Leave it out.")
    return [vocabulary[token] for token in tokens]


def _append(log: dict[str, list[float]], values: Mapping[str, float]) -> None:
    for name, value in values.items():
        log.setdefault(name, []).append(value)
