"""The roles that share one base in PPO: the critic with its one forward pass, and a guard over the frozen ones.

The model that the Trainer holds stays a PeftModel: the base's own forward is extended by a keyword. So under DDP each
trainable parameter is used in every pass, and checkpoints are those of a PeftModel.
"""

import functools
import logging
import types
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from rlhf.lora import role_hash, use_adapter
from rlhf.rewards import RunningScale
from rlhf.token_logprobs import hidden_states, token_logprobs

logger = logging.getLogger(__name__)

VALUE_ADAPTER = "critic"


class RoleError(RuntimeError):
    """Something else than policy and critic is trained, or was changed."""


class PolicyOutput(NamedTuple):
    """What the policy says about given replies: `(batch, length - 1)` each, at t about token t + 1, zero outside."""

    logprobs: Tensor
    entropy: Tensor
    values: Tensor


def add_critic(model: PeftModel, value_model: str) -> None:
    """Give a causal model a critic, and a forward that returns log-probabilities and values in one pass.

    Called with `response_mask` the forward returns a PolicyOutput; without it, it is the model's own. `with_values`
    False leaves the critic out, and its values are zero.

    Args:
        model: A PeftModel. For "adapter" it has an adapter "critic" that carries a `score` head.
        value_model: "head", a linear layer on the policy's hidden states, or "adapter", a pass of its own.
    """
    base = model.get_base_model()
    own_forward = base.forward
    if value_model == "head":
        hidden_size = base.config.get_text_config().hidden_size
        base.value_head = nn.Linear(hidden_size, 1, dtype=torch.float32, device=base.device)
        nn.init.zeros_(base.value_head.weight)  # no opinion at first: advantages start as plain rewards
        nn.init.zeros_(base.value_head.bias)

    def values_of(base: PreTrainedModel, states: Tensor, inputs: dict[str, Tensor]) -> Tensor:
        if value_model == "head":
            return _in_float32(base.value_head, states)
        with use_adapter(model, VALUE_ADAPTER):
            return _in_float32(base.score, hidden_states(base, **inputs)[:, :-1])

    @functools.wraps(type(base).forward)  # `generate` checks its arguments against the signature
    def forward(
        self: PreTrainedModel,
        *args: Any,
        response_mask: Tensor | None = None,
        temperature: float = 1.0,
        with_values: bool = True,
        **kwargs: Any,
    ) -> Any:
        if response_mask is None:
            return own_forward(*args, **kwargs)
        inputs = {name: kwargs[name] for name in ("input_ids", "attention_mask", "position_ids")}
        states = hidden_states(self, **inputs)[:, :-1]
        mask, targets = response_mask[:, 1:], inputs["input_ids"][:, 1:]
        logprobs, entropy = token_logprobs(states, self.get_output_embeddings(), targets, mask, temperature)
        values = values_of(self, states, inputs) if with_values else torch.zeros_like(logprobs)
        return PolicyOutput(logprobs, entropy, torch.where(mask.bool(), values, 0))

    base.forward = types.MethodType(forward, base)


def critic_parameters(model: PeftModel) -> dict[str, nn.Parameter]:
    """The critic's weights by name: the head's, or the adapter's with its score head."""
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if ".value_head." in name or f".{VALUE_ADAPTER}." in name
    }


class PPOState(TrainerCallback, ExportableState):
    """What PPO carries from rollout to rollout beside weights; a checkpoint has it in `trainer_state.json`.

    Attributes:
        kl_coef: The adaptive coefficient; unused where it is fixed.
        scales: Of each reward, by name.
        tokens_generated: Of all replies sampled to train on, on all processes.
    """

    def __init__(self, kl_coef: float) -> None:
        self.kl_coef = kl_coef
        self.scales: dict[str, RunningScale] = defaultdict(RunningScale)
        self.tokens_generated = 0

    def state(self) -> dict[str, Any]:
        scales = {name: asdict(scale) for name, scale in self.scales.items()}
        attributes = {"saved_scales": scales, "tokens_generated": self.tokens_generated}
        return {"args": {"kl_coef": self.kl_coef}, "attributes": attributes}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        saved = state.stateful_callbacks[type(self).__name__]
        self.kl_coef = saved["args"]["kl_coef"]
        self.tokens_generated = saved["attributes"]["tokens_generated"]
        for name, scale in saved["attributes"]["saved_scales"].items():
            self.scales[name] = RunningScale(**scale)


class RoleGuard(TrainerCallback):
    """Nothing reaches the frozen roles.

    Args:
        model: Before it is wrapped.
        frozen: Names of the frozen adapters.
    """

    def __init__(self, model: PeftModel, frozen: Sequence[str]) -> None:
        self.model = model
        self.frozen = frozen
        self.hashes: dict[str, str] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.hashes = self._hashes()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._compare(state.global_step)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._compare(state.global_step)

    def _hashes(self) -> dict[str, str]:
        return {name: role_hash(self.model, name) for name in self.frozen}

    def _compare(self, step: int) -> None:
        now = self._hashes()
        logger.info("hash of the frozen adapters at step %d: %s", step, {n: h[:16] for n, h in now.items()})
        changed = [name for name, before in self.hashes.items() if now[name] != before]
        if changed:
            raise RoleError(
                f"The adapter {', '.join(changed)} is frozen, and its weights are no longer those that the training "
                f"began with (found at step {step}). Its scores and the KL since are worth nothing. Something switched "
                "adapters past `rlhf.lora.use_adapter`."
            )


def check_roles(model: PeftModel, roles: Sequence[str], rewards: Sequence[str], weights: Mapping[str, float]) -> None:
    if not rewards:
        raise ValueError("`reward_adapter` and `reward_functions` are both empty: there is nothing to learn from.")
    if twice := [name for name in rewards if rewards.count(name) > 1]:
        raise ValueError(
            f"Two rewards are called {twice[0]!r}, and the log has one place. Give one another `__name__`."
        )
    if unknown := [name for name in weights if name not in rewards]:
        raise ValueError(f"`reward_weights` names {unknown[0]!r}; the rewards are {', '.join(rewards)}.")
    for role in roles:
        if role not in model.peft_config:
            why = (
                " `value_model: adapter` starts it from the reward adapter's weights." if role == VALUE_ADAPTER else ""
            )
            raise ValueError(f"`model` has no adapter {role!r}; it has {', '.join(model.peft_config)}.{why}")


def dropouts(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """Where something is dropped: name, module and attribute. Many attentions hold their rate as a plain number."""
    for name, module in model.named_modules():
        for attribute, value in list(vars(module).items()):
            is_rate = attribute == "p" if isinstance(module, _DropoutNd) else "drop" in attribute
            if is_rate and isinstance(value, float) and value > 0:
                yield f"{name}.{attribute}", module, attribute


def _in_float32(head: nn.Module, states: Tensor) -> Tensor:
    with torch.autocast(states.device.type, enabled=False):
        return head(states.float()).squeeze(-1)
