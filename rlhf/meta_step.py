"""One step of a training stage on tensors without data, with its storage, arithmetic and traffic counted.

The model is built on torch's device "meta", where a tensor has a shape and a type and no memory, and goes through the code that
the scripts run: LoRA by `rlhf.lora`, the heads and losses of TRL's trainers and of PPO, gradient checkpointing. What the
real device does and "meta" cannot is put in its place, and nothing else is:

- attention: the kernel that is meant for the device, with what it keeps for its backward pass;
- autocast, which torch has not for "meta": inputs of matrix products are cast, on a GPU those of softmax and layer norm back;
- the Triton kernels of TRL's head, which allocate nothing;
- 4-bit layers: half a byte a weight, its scales, and one layer at a time in full;
- padding: a mask that is given whole, since its making asks for values.
"""

import contextlib
import copy
import functools
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple, dataclass, replace
from typing import Any
from unittest import mock

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map
from torch.utils.flop_counter import flop_registry
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.pytorch_utils import Conv1D
from trl import ModelConfig
from trl.trainer.utils import add_fused_lm_head, use_adapter

from rlhf.generate import inference
from rlhf.lora import checkpoint_activations, lora_config, set_trainable, trainable_parameters
from rlhf.model import add_score_head, trainable_to_fp32
from rlhf.ppo_math import policy_loss, value_loss
from rlhf.rewards import pool_by_mask
from rlhf.roles import VALUE_ADAPTER, add_critic, critic_parameters

# Of bitsandbytes' nf4: half a byte a weight, one scale for 64 weights, double-quantised to 8 bit with a float32 for each
# 256 of them (Dettmers et al. 2023, https://arxiv.org/abs/2305.14314, section 3).
BYTES_OF_4BIT = 0.5 + (1 + 4 / 256) / 64

_META = torch.device("meta")
_LOGITS_TILE = 32768  # the columns that TRL's head projects at a time (trl 1.16, trainer/utils.py)
_MATRIX_PRODUCTS = (
    F.linear, torch.matmul, torch.bmm, torch.mm, torch.addmm, torch.baddbmm, Tensor.matmul, Tensor.__matmul__,
    Tensor.bmm, Tensor.mm,
)  # fmt: skip
_FLOAT32_ON_GPUS = (F.layer_norm, F.softmax, F.log_softmax, torch.softmax, torch.log_softmax)


@dataclass(frozen=True)
class Device:
    """What a step runs on.

    Attributes:
        type: "cuda" or "cpu", which decides the attention kernel and how TRL's head works.
        dtype: of the frozen weights.
        autocast: what matrix products are computed in where that is another type than the adapters'; None without.
        flops_per_second: that matrix products reach.
        bytes_per_second: that everything else reaches.
    """

    type: str = "cuda"
    dtype: torch.dtype = torch.float16
    autocast: torch.dtype | None = torch.float16
    # NVIDIA's data sheet of the T4: 65 TFLOPS in float16, 320 GB/s, 70 W. The shares that are reached are assumed: the
    # power limit holds long matrix products far below their peak.
    flops_per_second: float = 0.4 * 65e12
    bytes_per_second: float = 0.8 * 320e9


T4 = Device()


@dataclass(frozen=True)
class StepShape:
    """The size of a step, on one device.

    Attributes:
        batch: rows, or pairs, or episodes.
        length: tokens of the longest, prompt and reply.
        trained: tokens of a row, or of each reply, that the loss is taken on.
        gradient_checkpointing: whether activations are computed again in the backward pass.
        accumulates: whether gradients of earlier steps are there already.
        value_model: of PPO, as `PPOConfig` has it.
        reward_adapters: of PPO.
        load_in_4bit: of the base.
    """

    batch: int
    length: int
    trained: int
    gradient_checkpointing: bool = True
    accumulates: bool = True
    value_model: str = "head"
    reward_adapters: int = 1
    load_in_4bit: bool = False


@dataclass
class Work:
    """What was counted while something ran on "meta".

    Attributes:
        peak: bytes, beyond what was there before.
        logits: bytes of logits within the peak.
        flops: multiplications and additions of matrix products.
        kernels: operations that compute something, views left out.
        seconds: of these operations one after another, each bound by arithmetic or by memory (the roofline model).
    """

    peak: float = 0
    logits: float = 0
    flops: float = 0
    kernels: float = 0
    seconds: float = 0


class StorageCounter(TorchDispatchMode):
    """Counts the storages of "meta" tensors that are alive; views share one, and what existed before counts nothing.

    Args:
        logits_widths: Last dimensions by which logits are told from other tensors.
        device: Whose speed the seconds are of.
    """

    def __init__(self, logits_widths: Sequence[int] = (), device: Device = T4) -> None:
        super().__init__()
        self.logits_widths = set(logits_widths)
        self.device = device
        self.work = Work()
        self._sizes: dict[int, int] = {}
        self._alive: Counter[bool] = Counter()
        self._kept: list[Any] = []

    def know(self, tensors: Iterator[Tensor]) -> None:
        """Take these as there before: weights."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            self._sizes[id(storage)] = 0
            self._kept.append(storage)  # so that no other storage gets its id

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if not _is_view(func):
            self._count(func, args, kwargs, out)
        for tensor in tree_iter(out):
            if isinstance(tensor, Tensor) and tensor.device == _META:
                self._track(tensor)
        return out

    def _track(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if id(storage) in self._sizes:
            return
        size, logits = storage.nbytes(), bool(tensor.dim()) and tensor.shape[-1] in self.logits_widths
        self._sizes[id(storage)] = size
        self._alive[logits] += size
        weakref.finalize(storage, self._free, id(storage), size, logits)
        if self._alive.total() > self.work.peak:
            self.work.peak, self.work.logits = self._alive.total(), self._alive[True]

    def _free(self, key: int, size: int, logits: bool) -> None:
        self._alive[logits] -= size
        self._sizes.pop(key, None)

    def _count(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        packet = func.overloadpacket
        flops = flop_registry[packet](*args, **kwargs, out_val=out) if packet in flop_registry else 0
        tensors = [t for t in tree_iter((args, kwargs, out)) if isinstance(t, Tensor) and t.device == _META]
        size = sum(t.numel() * t.element_size() for t in tensors)
        self.work.kernels += 1
        self.work.flops += flops
        self.work.seconds += max(flops / self.device.flops_per_second, size / self.device.bytes_per_second)


@functools.cache
def _is_view(func: Any) -> bool:
    """Whether what it returns is a view of what it is given, which costs nothing."""
    returns = [entry.alias_info for entry in func._schema.returns]
    return bool(returns) and all(info is not None and not info.is_write for info in returns)


# --- what stands in for the device ------------------------------------------------------------------------------------


class _StandIn(TorchFunctionMode):
    """Makes calls on "meta" tensors do what the device would do; see the head of this module."""

    def __init__(self, device: Device) -> None:
        super().__init__()
        self.device = device
        self.autocasts = device.autocast is not None
        self.chosen = 0  # positions that a mask without values stands for
        self._casts: dict[int, Tensor] = {}  # autocast casts a weight once in a forward pass

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.__getitem__ and args[0].device == _META and _is_mask(args[1]):
            return self._at_mask(*args)
        if func is F.scaled_dot_product_attention:
            return self._attention(*args, **kwargs)
        if self.autocasts and func in _MATRIX_PRODUCTS:
            return func(*map(self._lower, args), **{key: self._lower(value) for key, value in kwargs.items()})
        if self.autocasts and self.device.type == "cuda" and func in _FLOAT32_ON_GPUS:
            return func(*map(_in_float32, args), **{key: _in_float32(value) for key, value in kwargs.items()})
        mixed = {x.device for x in tree_iter((args, kwargs)) if isinstance(x, Tensor) and x.dim()}
        if _META in mixed and len(mixed) > 1 and func is not Tensor.__getitem__:
            args, kwargs = tree_map(_to_meta, (args, kwargs))
        return func(*args, **kwargs)

    def forget_casts(self) -> None:
        """As autocast does at its end."""
        self._casts.clear()

    def _lower(self, x: Any) -> Any:
        if not isinstance(x, Tensor) or not x.is_floating_point() or x.dtype is self.device.autocast:
            return x
        if not (x.is_leaf and x.requires_grad):
            return x.to(self.device.autocast)
        if id(x) not in self._casts:
            self._casts[id(x)] = x.to(self.device.autocast)
        return self._casts[id(x)]

    def _at_mask(self, tensor: Tensor, mask: Tensor) -> Tensor:
        number = self.chosen if mask.device == _META else int(mask.sum())
        places = torch.empty(number, dtype=torch.long, device=_META)
        return tensor.flatten(0, mask.dim() - 1).index_select(0, places)

    def _attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        if self.autocasts:
            query, key, value = map(self._lower, (query, key, value))
        bias = None
        if attn_mask is not None and attn_mask.stride(-1):
            # Both kernels take numbers, so that each layer makes them of the mask anew, and keeps them.
            bias = torch.zeros_like(attn_mask, dtype=query.dtype)
        if self.device.type == "cpu":
            return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                query, key, value, dropout_p, attn_mask is None or bias is None, attn_mask=bias, scale=scale
            )[0]
        if bias is not None:
            bias = bias.expand(*query.shape[:3], key.shape[2])
        return torch.ops.aten._scaled_dot_product_efficient_attention(
            query, key, value, bias, query.requires_grad, dropout_p, bias is None, scale=scale
        )[0]


def _is_mask(index: Any) -> bool:
    return isinstance(index, Tensor) and index.dtype is torch.bool


def _in_float32(x: Any) -> Any:
    return x.float() if isinstance(x, Tensor) and x.is_floating_point() else x


def _to_meta(x: Any) -> Any:
    return x.to(_META) if isinstance(x, Tensor) and x.dim() else x


def _in_backward_too(checkpoint: Callable[..., Any], stand_in: _StandIn) -> Callable[..., Any]:
    """A layer's checkpointing that has it under the stand-in when it runs again: a backward pass knows of no such mode."""

    def under(forward: Callable[..., Any], *args: Any) -> Any:
        def again(*inputs: Any) -> Any:
            if any(mode is stand_in for mode in _get_current_function_mode_stack()):
                return forward(*inputs)
            with stand_in:
                return forward(*inputs)

        return checkpoint(again, *args)

    return under


@contextlib.contextmanager
def _on(device: Device, model: nn.Module) -> Iterator[_StandIn]:
    """Run `model` on "meta" as `device` would."""
    stand_in = _StandIn(device)

    class Autocast(torch.autocast):
        """torch.autocast, which knows of no "meta"."""

        def __init__(self, device_type: str, *args: Any, enabled: bool = True, **kwargs: Any) -> None:
            self.on_meta, self.wanted = device_type == "meta", enabled
            super().__init__("cpu" if self.on_meta else device_type, *args, enabled=enabled and not self.on_meta)  # type: ignore[misc]

        def __enter__(self) -> Any:
            if self.on_meta:
                self.before, stand_in.autocasts = stand_in.autocasts, self.wanted and stand_in.autocasts
                return self
            return super().__enter__()

        def __exit__(self, *error: object) -> Any:
            if self.on_meta:
                stand_in.autocasts = self.before
                return None
            return super().__exit__(*error)

    enabled, lower = torch.is_autocast_enabled, torch.get_autocast_dtype
    kernels, on_gpu = "trl.kernels.chunked_logprob", device.type == "cuda"
    patches: list[contextlib.AbstractContextManager[Any]] = [
        mock.patch("torch.autocast", Autocast),
        mock.patch(
            "torch.is_autocast_enabled", lambda *a: stand_in.autocasts if a and a[0] == "meta" else enabled(*a)
        ),
        mock.patch("torch.get_autocast_dtype", lambda name: device.autocast if name == "meta" else lower(name)),
    ]
    if on_gpu:
        patches += [
            mock.patch("trl.trainer.utils._use_triton", lambda _: True),  # the head takes trained positions alone
            mock.patch(f"{kernels}._forward_tile", lambda *a, **k: None),
            mock.patch(f"{kernels}._backward_tile", lambda *a, **k: None),
            mock.patch(f"{kernels}._addmm_fp32", lambda acc, a, b: None),
        ]
    name = "_gradient_checkpointing_func"
    patches += [
        mock.patch.object(layer, name, _in_backward_too(getattr(layer, name), stand_in))
        for layer in model.modules()
        if hasattr(layer, name)
    ]
    with contextlib.ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        stack.enter_context(stand_in)
        yield stand_in


class _Layer4bit(nn.Module):
    """A frozen linear layer in 4 bit: the weight is made whole for each product, and dropped after it."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        shape = tuple(layer.get_parameter("weight").shape)
        self.shape = shape[::-1] if isinstance(layer, Conv1D) else shape
        self.register_buffer("packed", torch.empty(self._size(), dtype=torch.uint8, device=_META))
        self.bias = layer.bias

    def _size(self) -> int:
        return int(self.shape[0] * self.shape[1] * BYTES_OF_4BIT)

    def forward(self, x: Tensor) -> Tensor:
        out = _Product4bit.apply(x, self.packed, self.shape)
        return out if self.bias is None else out + self.bias


class _Product4bit(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: Tensor, shape: tuple[int, int]) -> Tensor:
        ctx.save_for_backward(packed)
        ctx.shape = shape
        return F.linear(x, x.new_empty(shape))

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None, None]:
        return upstream[0] @ upstream[0].new_empty(ctx.shape), None, None


def _quantise(model: nn.Module) -> None:
    """Put 4-bit layers in the place of linear ones, all but the heads, as `rlhf.model.load_base` has it."""
    for path, layer in list(model.named_modules()):
        parent, _, name = path.rpartition(".")
        if (
            isinstance(layer, nn.Linear | Conv1D)
            and "lora_" not in path
            and not {"lm_head", "score"} & {*path.split(".")}
        ):
            setattr(model.get_submodule(parent), name, _Layer4bit(layer))


# --- the models and steps of the stages -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Parts:
    """Bytes that lie in memory all through a stage, and what is trained.

    Attributes:
        weights: of the frozen base.
        adapters: of all roles, with heads.
        trainable: parameters, not bytes.
    """

    weights: float
    adapters: float
    trainable: float


def build(stage: str, config: PreTrainedConfig, args: ModelConfig, shape: StepShape, device: Device) -> PeftModel:
    """The model of a stage on "meta", with every role's adapter, ready for a step."""
    kwargs: dict[str, Any] = {"dtype": device.dtype, "attn_implementation": args.attn_implementation or "sdpa"}
    with _META:
        if stage == "reward":
            config.num_labels = 1
            base = AutoModelForSequenceClassification.from_config(config, **kwargs)
        else:
            base = AutoModelForCausalLM.from_config(config, **kwargs)
        _give_mask(base)
        lora = lora_config(args, base, reward=stage == "reward")
        if stage == "reward":
            pool_by_mask(base)
        if stage == "ppo":
            add_score_head(base)
        if stage in ("sft", "dpo"):
            more = ("mean_logits",) if stage == "dpo" else ()
            add_fused_lm_head(base, outputs=("log_probs", "entropy", "is_top1", *more))
        roles = [(name, lora_config(args, base, reward)) for name, reward in _other_roles(stage, shape)]
        model = get_peft_model(base, lora)
        for name, adapter in roles:
            model.add_adapter(name, adapter)
    if shape.load_in_4bit:
        _quantise(model)
    set_trainable(model, "default")
    if stage == "ppo":
        add_critic(model, shape.value_model)
        for parameter in critic_parameters(model).values():
            parameter.requires_grad_(True)
    trainable_to_fp32(model)
    if shape.gradient_checkpointing and stage == "ppo":
        checkpoint_activations(model)
    elif shape.gradient_checkpointing:
        model.get_base_model().activation_checkpointing_enable(
            activation_checkpointing_kwargs={"use_reentrant": False}
        )
        model.enable_input_require_grads()
    return model.train()


def _other_roles(stage: str, shape: StepShape) -> list[tuple[str, bool]]:
    """Names of the adapters beside "default", and whether they carry a score head."""
    if stage == "dpo":
        return [("ref", False)]
    if stage != "ppo":
        return []
    rewards = [(f"reward_{number}", True) for number in range(shape.reward_adapters)]
    return [("reference", False), *rewards, *([(VALUE_ADAPTER, True)] if shape.value_model == "adapter" else [])]


def _give_mask(base: PreTrainedModel) -> None:
    """Have the backbone take a mask of its own making: `(batch, 1, length, length)`, for one row of no extent."""
    backbone = base.base_model
    own_forward = backbone.forward

    @functools.wraps(own_forward)
    def forward(input_ids: Tensor, attention_mask: Any = None, position_ids: Any = None, **kwargs: Any) -> Any:
        batch, length = input_ids.shape
        places = torch.empty(batch, length, dtype=torch.long, device=_META)
        square = (batch, 1, length, length)
        if batch == 1:  # no padding, so the kernel is told of none
            mask = torch.empty(1, dtype=torch.bool, device=_META).expand(square)
        else:
            mask = torch.empty(square, dtype=torch.bool, device=_META)
        return own_forward(input_ids=places, attention_mask=mask, position_ids=places, **kwargs)

    backbone.forward = forward


def parts(model: PeftModel) -> Parts:
    """What lies in memory all through the stage."""
    sizes: Counter[bool] = Counter()
    seen = set()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.untyped_storage() in seen:
            continue
        seen.add(tensor.untyped_storage())
        own = any(word in name for word in ("lora_", ".modules_to_save.", "value_head", "score."))
        sizes[own] += tensor.numel() * tensor.element_size()
    return Parts(sizes[False], sizes[True], trainable_parameters(model))


def train_step(stage: str, model: PeftModel, shape: StepShape, device: Device) -> Work:
    """Forward and backward pass of one micro-batch."""
    counter = _counter(model, device)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if shape.accumulates:
        for parameter in trainable:
            parameter.grad = torch.empty_like(parameter)
        counter.know(iter([parameter.grad for parameter in trainable if parameter.grad is not None]))
    with _on(device, model) as stand_in, counter:
        stand_in.chosen = _rows(stage, shape) * shape.trained
        loss = _LOSSES[stage](model, shape)
        stand_in.forget_casts()
        torch.autograd.backward(loss)  # `loss.backward` would be a call that turns the stand-in off for its duration
    model.zero_grad(set_to_none=True)
    return counter.work


def eval_step(stage: str, model: PeftModel, shape: StepShape, device: Device) -> Work:
    """The forward pass of a held-out batch, or of a rollout being scored, without gradients."""
    counter = _counter(model, device)
    with inference(model), _on(device, model) as stand_in, counter:
        stand_in.chosen = _rows(stage, shape) * shape.trained
        _LOSSES[stage](model, shape)
    return counter.work


def prefill(model: PeftModel, batch: int, length: int, device: Device) -> Work:
    """The pass over the prompts before the first token of the replies; the cache that it fills is not counted."""
    counter = _counter(model, device)
    ids = torch.empty(batch, length, dtype=torch.long, device=_META)
    with inference(model), _on(device, model), counter:
        model(input_ids=ids, attention_mask=ids, position_ids=ids, use_cache=False, logits_to_keep=1)
    return counter.work


def _counter(model: PeftModel, device: Device) -> StorageCounter:
    counter = StorageCounter((model.config.get_text_config().vocab_size, _LOGITS_TILE), device)
    counter.know(iter([*model.parameters(), *model.buffers()]))
    return counter


def _rows(stage: str, shape: StepShape) -> int:
    return 2 * shape.batch if stage in ("reward", "dpo") else shape.batch


def _ids(rows: int, length: int) -> Tensor:
    return torch.zeros(rows, length, dtype=torch.long, device=_META)


def _sft_loss(model: PeftModel, shape: StepShape) -> Tensor:
    ids = _ids(shape.batch, shape.length)
    output = model(input_ids=ids, attention_mask=ids, labels=ids, use_cache=False, fused_lm_head=True)
    return -output.log_probs.sum() / output.label_mask.sum().clamp(min=1)


def _reward_loss(model: PeftModel, shape: StepShape) -> Tensor:
    rows = 2 * shape.batch
    mask = torch.ones(rows, shape.length, dtype=torch.long)  # with values: rows of like length go together
    scores = model(input_ids=torch.zeros_like(mask), attention_mask=mask, use_cache=False).logits
    chosen, rejected = scores.squeeze(-1).chunk(2)
    return -F.logsigmoid(chosen - rejected).mean() + ((chosen + rejected) ** 2).mean()


def _dpo_loss(model: PeftModel, shape: StepShape) -> Tensor:
    ids = _ids(2 * shape.batch, shape.length)
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": ids, "labels": ids, "use_cache": False}
    policy = model(**inputs, fused_lm_head=True).log_probs.sum(1)
    training = model.training
    with torch.no_grad(), _without_checkpointing(model), use_adapter(model, "ref"):
        reference = model(**inputs, fused_lm_head=True).log_probs.sum(1)
    model.train(training)
    chosen, rejected = (policy - reference).chunk(2)
    return -F.logsigmoid(chosen - rejected).mean()


def _ppo_loss(model: PeftModel, shape: StepShape) -> Tensor:
    mask = torch.ones(shape.batch, shape.length, dtype=torch.long)
    replied = mask.clone()
    replied[:, : shape.length - shape.trained] = 0
    inputs: dict[str, Any] = {"input_ids": mask, "attention_mask": mask, "position_ids": mask}
    output = model(**inputs, response_mask=replied, temperature=0.9)
    tokens = replied[:, 1:].to(_META)
    old = torch.empty(tokens.shape, device=_META)
    number = tokens.sum()
    of_policy = policy_loss(output.logprobs, old, old, tokens, 0.2, number)
    return of_policy + 0.1 * value_loss(output.values, old, old, tokens, 0.2, number)


@contextlib.contextmanager
def _without_checkpointing(model: nn.Module) -> Iterator[None]:
    layers = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False)]
    for layer in layers:
        layer.gradient_checkpointing = False  # type: ignore[assignment]
    try:
        yield
    finally:
        for layer in layers:
            layer.gradient_checkpointing = True  # type: ignore[assignment]


_LOSSES: dict[str, Callable[[PeftModel, StepShape], Tensor]] = {
    "sft": _sft_loss,
    "reward": _reward_loss,
    "dpo": _dpo_loss,
    "ppo": _ppo_loss,
}


# --- the whole of a stage ---------------------------------------------------------------------------------------------

_FEW_LAYERS = (2, 3)  # that are run; every layer adds as much as the one before it


@dataclass(frozen=True)
class Measured:
    """What the passes of a stage need: see [`measure`]."""

    parts: Parts
    train: Work
    evaluate: Work
    prefill: Work


def measure(
    stage: str,
    config: PreTrainedConfig,
    args: ModelConfig,
    shape: StepShape,
    device: Device = T4,
    eval_batch: int | None = None,
    prompts: tuple[int, int] | None = None,
) -> Measured:
    """Count a training step, a held-out batch and the reading of prompts.

    Layers are alike, so that two small models are run, and what the layers between them add is added for the others.

    Args:
        stage: sft, reward, dpo or ppo.
        config: Of the base.
        args: Of the adapters.
        shape: Of the training step.
        device: What it is to run on.
        eval_batch: Rows, pairs or episodes of a held-out batch; None is as many as in training.
        prompts: Number and tokens of the prompts that are replied to at once; None leaves them out.
    """
    layers = config.get_text_config().num_hidden_layers
    of_eval = replace(shape, batch=eval_batch or shape.batch)
    few = [number for number in _FEW_LAYERS if number < layers]
    found = []
    for number in few if len(few) > 1 else [layers]:
        model = build(stage, with_layers(config, number), args, shape, device)
        found.append(
            Measured(
                parts(model),
                train_step(stage, model, shape, device),
                eval_step(stage, model, of_eval, device),
                prefill(model, *prompts, device) if prompts else Work(),
            )
        )
    if len(found) == 1:
        return found[0]
    return Measured(
        *(_at(layers, few, *(getattr(each, name) for each in found)) for name in Measured.__dataclass_fields__)
    )


def with_layers(config: PreTrainedConfig, number: int) -> PreTrainedConfig:
    """The same model with another number of layers."""
    config = copy.deepcopy(config)
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:number]
    config.num_hidden_layers = number
    return config


def _at(layers: int, few: Sequence[int], low: Any, high: Any) -> Any:
    """The line through both, at the number of layers."""
    share = (layers - few[0]) / (few[1] - few[0])
    ends = zip(astuple(low), astuple(high), strict=True)
    return type(low)(*(start + share * (end - start) for start, end in ends))
