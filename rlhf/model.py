"""Precision by compute capability, the base model, the tokenizer. The only code that loads a base model."""

import logging
import platform
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import PartialState
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.integrations import sdpa_attention
from trl import ModelConfig

from rlhf.chat import prepare_tokenizer

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Precision:
    """What the machine computes in: the dtype of frozen weights, and the Trainer's mixed-precision flags."""

    dtype: torch.dtype
    fp16: bool
    bf16: bool
    reason: str


def precision() -> Precision:
    """The precision of this machine, by compute capability.

    `torch.cuda.is_bf16_supported()` cannot be asked: it says yes on a T4 (capability 7.5), where bf16 is emulated and
    several times slower (https://github.com/pytorch/pytorch/issues/124996).
    """
    if not torch.cuda.is_available():
        return Precision(torch.float32, fp16=False, bf16=False, reason="no CUDA device: float32")
    major, minor = torch.cuda.get_device_capability()
    name = f"{torch.cuda.get_device_name()} (compute capability {major}.{minor})"
    if (major, minor) >= (8, 0):
        return Precision(torch.bfloat16, fp16=False, bf16=True, reason=f"{name}: bfloat16")
    return Precision(torch.float16, fp16=True, bf16=False, reason=f"{name} has no bfloat16 units: float16")


def machine_defaults() -> dict[str, bool]:
    """`use_cpu`, `fp16` and `bf16` as this machine wants them, for the keys that a recipe leaves open.

    They must be known before a TRL configuration is built: its `__post_init__` turns bf16 on unless fp16 is given, and
    refuses bf16 on a CPU. On Apple silicon the CPU is used unless a recipe says `use_cpu: false`, since the trainers
    are not tested on its GPU.
    """
    here = precision()
    if torch.backends.mps.is_available():
        logger.info("Apple silicon: training on the CPU. Set `use_cpu: false` to try the GPU.")
    return {"use_cpu": not torch.cuda.is_available(), "fp16": here.fp16, "bf16": here.bf16}


def attention_problem(attn_implementation: str | None) -> str | None:
    """Why this machine cannot run FlashAttention (its GPUs' capability is below 8.0), None where it can or need not."""
    if not (attn_implementation or "").startswith("flash_attention"):
        return None
    if torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0):
        return None
    return "needs a GPU of compute capability 8.0 or higher (a T4 has 7.5); use sdpa"


def repeat_kv_below_8_0() -> None:
    """Have transformers repeat keys and values for grouped-query models where torch's own grouping is slow.

    Below capability 8.0 flash attention and cuDNN are missing, and the memory-efficient kernel cannot group, so that
    `enable_gqa` leaves the math kernel: scores of length x length, in float32
    (https://github.com/huggingface/transformers/issues/48633). transformers 5.23 asks its predicate `use_gqa_in_sdpa`
    at each call, and takes the repeating path, which it takes for padded batches anyway, where that says no.
    Elsewhere nothing is changed.
    """
    if torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 0):
        sdpa_attention.use_gqa_in_sdpa = _never_group


def _never_group(attention_mask: torch.Tensor | None, key: torch.Tensor, value: torch.Tensor) -> bool:
    return False


# Families that overflow in float16, whose largest number is 65504: with which attention (None: with any), and a thread
# that shows it, all read on 2026-11-21. Qwen2 and Qwen2.5 are "qwen2"; of training them see also
# https://github.com/QwenLM/Qwen3/issues/670. T5 and Pegasus overflow too, but no stage trains an encoder with a decoder.
OVERFLOWS_IN_FLOAT16: dict[str, tuple[str | None, str]] = {
    "gemma": (None, "https://github.com/google/gemma_pytorch/issues/24"),
    "gemma2": (None, "https://github.com/huggingface/transformers/issues/32390"),
    "gemma3_text": (None, "https://github.com/huggingface/transformers/issues/36822"),
    "gpt_neo": (None, "https://github.com/huggingface/transformers/issues/11076"),
    "qwen2": ("eager", "https://github.com/huggingface/transformers/pull/33317"),
}


def overflows_in_float16(model: nn.Module) -> bool:
    """Whether models of this family are known to overflow in float16 with the attention that this one has."""
    family, attention = _family(model)
    return family in OVERFLOWS_IN_FLOAT16 and OVERFLOWS_IN_FLOAT16[family][0] in (None, attention)


def float16_remedy(model: nn.Module) -> str:
    """What is known of a model's family in float16, and what to do about numbers that are not finite there."""
    family, attention = _family(model)
    # Weights in float32 help even under autocast: only the products are float16 then, and the sum of the layers is not.
    change = "`fp16: false`, which is slower" if weights_dtype(model) is torch.float32 else "`dtype: float32`"
    other = f"set {change}, train on a card with bfloat16 (compute capability 8.0 or newer), or take another base"
    if family not in OVERFLOWS_IN_FLOAT16:
        return (
            f"Nothing is known here of the family {family!r} in float16. If the base was trained in bfloat16, its values "
            f"may be too large for it: {other}."
        )
    needed, source = OVERFLOWS_IN_FLOAT16[family]
    known = f"Models of the family {family!r} are known to overflow in float16"
    if needed is None:
        return f"{known} ({source}): {other}."
    if needed == attention:
        return (
            f"{known} with `attn_implementation: {needed}` ({source}): set it to sdpa. If that does not help, {other}."
        )
    return f"{known} with `attn_implementation: {needed}` alone ({source}), and this is {attention}: {other}."


def _family(model: nn.Module) -> tuple[str, str | None]:
    """The model's type by its configuration (of one that reads images too, that of its text part), and its attention."""
    config = getattr(model, "config", None)
    if not isinstance(config, PreTrainedConfig):
        return type(model).__name__, None
    text = config.get_text_config()
    return text.model_type, text._attn_implementation


def weights_dtype(model: nn.Module) -> torch.dtype:
    """The type of most frozen weights; a 4-bit layer holds integers, and computes in the type of the others."""
    types = (torch.float32, torch.float16, torch.bfloat16)
    dtypes = [p.dtype for p in model.parameters() if not p.requires_grad and p.dtype in types]
    return max(set(dtypes), key=dtypes.count) if dtypes else torch.float32


def load_tokenizer(name_or_path: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a model, ready for chatting (see [`rlhf.chat.prepare_tokenizer`])."""
    return prepare_tokenizer(AutoTokenizer.from_pretrained(name_or_path))


def load_base(args: ModelConfig, tokenizer: PreTrainedTokenizerBase, reward: bool = False) -> PreTrainedModel:
    """The frozen base model, in this machine's precision and on this process' GPU where it has one.

    Args:
        args: `model_name_or_path`, `dtype`, `attn_implementation` and the 4-bit flags are read.
        tokenizer: Whose stop and pad tokens the model is told.
        reward: Whether to load it with a score head of one output, for TRL's RewardTrainer.

    Raises:
        ValueError: if the attention implementation cannot run on this card.
    """
    if problem := attention_problem(args.attn_implementation):
        raise ValueError(f"`attn_implementation`: {args.attn_implementation!r} {problem}.")
    repeat_kv_below_8_0()
    here = precision()
    dtype = here.dtype if args.dtype in (None, "auto") else getattr(torch, args.dtype)
    if dtype is torch.bfloat16 and here.fp16:
        raise ValueError(f"`dtype` is bfloat16, but {here.reason}. Leave `dtype` out, or set it to float16.")
    kwargs: dict[str, Any] = {"dtype": dtype}
    if args.attn_implementation is not None:
        kwargs["attn_implementation"] = args.attn_implementation
    if args.load_in_4bit:
        # The library's default compute dtype is float32, which is silent and slow
        # (https://github.com/bitsandbytes-foundation/bitsandbytes/issues/2077). The score head must stay out of the
        # quantiser, also where a checkpoint brings a skip list of its own.
        kwargs["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=args.bnb_4bit_quant_type,
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
            llm_int8_skip_modules=["lm_head", "score"],
        )
        kwargs["device_map"] = {"": PartialState().local_process_index}  # a whole copy per GPU, never layer by layer
    if reward:
        model = AutoModelForSequenceClassification.from_pretrained(args.model_name_or_path, num_labels=1, **kwargs)
    else:
        model = AutoModelForCausalLM.from_pretrained(args.model_name_or_path, **kwargs)
        # A new one: `generate` fills what a caller leaves open from here, so that a repetition penalty which ships
        # with the model would reach PPO's rollouts and the evaluation.
        model.generation_config = GenerationConfig(
            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
        )
    if not args.load_in_4bit and PartialState().device.type == "cuda":
        model.to(PartialState().device)  # trainers would do this, evaluation and chat have nobody else for it
    model.config.eos_token_id = tokenizer.eos_token_id
    model.config.pad_token_id = tokenizer.pad_token_id
    logger.info("Base model %s: %s", args.model_name_or_path, here.reason)
    return model


def add_score_head(model: PreTrainedModel) -> None:
    """Give a causal model the `score` module that a reward adapter carries weights for.

    It has to be there before PEFT wraps the model: else the head of a reward adapter is dropped without a word when
    the adapter is loaded.
    """
    hidden_size = model.config.get_text_config().hidden_size
    model.score = nn.Linear(hidden_size, 1, bias=False, dtype=torch.float32, device=model.device)
    model.score.requires_grad_(False)


def trainable_to_fp32(model: nn.Module) -> int:
    """Cast every trainable parameter to float32, in place.

    TRL casts the adapters of a quantised model to bfloat16 while its trainer is built, whatever precision was chosen,
    and the fp16 gradient scaler then dies at the first step
    (https://github.com/MakazhanAlpamys/Soup/issues/425). So this is called after the trainer exists.

    Returns:
        How many parameters had to be cast.
    """
    cast = [p for p in model.parameters() if p.requires_grad and p.dtype is not torch.float32]
    for parameter in cast:
        parameter.data = parameter.data.float()
    return len(cast)


def positions_problem(config: PreTrainedConfig, max_length: int, response_length: int) -> str | None:
    """Why prompts and replies of these lengths, in tokens, are more than a model has positions; None where they fit."""
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    if positions is None or max_length + response_length <= positions:
        return None
    return (
        f"Prompts of `max_length` {max_length} and replies of {response_length} tokens (`response_length`, or a held-out "
        f"`reference`) make {max_length + response_length}, but the model has {positions} positions. Set `max_length` to "
        f"{max(0, positions - response_length)} or less, or shorten the replies."
    )


def hardware() -> dict[str, Any]:
    """What this process runs on, for the run's record."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {"machine": platform.machine(), "threads": torch.get_num_threads(), "gpus": gpus}
