"""The one inference path: chat, evaluation, PPO rollouts and the samples written during training all use it."""

import contextlib
import hashlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from rlhf.chat import Message, render_within, reply_text


def generation_config(
    tokenizer: PreTrainedTokenizerBase, max_new_tokens: int, temperature: float = 0.0, stop_ids: Sequence[int] = ()
) -> GenerationConfig:
    """Sampling from the full distribution at `temperature`, or greedy decoding at 0.

    The settings that ship with a model (Qwen's top-k, top-p and repetition penalty) are left out, here and by
    [`rlhf.model.load_base`]: they would make the log-probabilities of PPO those of another distribution, and the
    evaluation one of the settings.

    Args:
        tokenizer: Its stop token ends a reply.
        max_new_tokens: Longest reply.
        temperature: 0 for greedy decoding.
        stop_ids: Further ids that end a reply.
    """
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=temperature > 0,
        **({"temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature > 0 else {}),
        eos_token_id=[tokenizer.eos_token_id, *stop_ids],
        pad_token_id=tokenizer.pad_token_id,
        use_cache=True,
    )


def left_pad(
    ids: Sequence[Sequence[int]], pad_token_id: int, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """Ids `(batch, longest)` padded on the left, and their attention mask."""
    width = max(map(len, ids))
    input_ids = torch.tensor([[pad_token_id] * (width - len(row)) + list(row) for row in ids], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in ids], device=device)
    return input_ids, mask


def response_mask(responses: Tensor, stop_ids: int | Sequence[int]) -> Tensor:
    """1 up to and including the first stop token of each row of `(batch, length)`, 0 behind it.

    From the stop tokens alone, never from pad ids, which many tokenizers also use as a stop token.
    """
    stops = is_stop(responses, stop_ids).long()
    return (stops.cumsum(dim=1) - stops == 0).long()


def is_stop(responses: Tensor, stop_ids: int | Sequence[int]) -> Tensor:
    """Where a stop token stands."""
    ids = [stop_ids] if isinstance(stop_ids, int) else list(stop_ids)
    return torch.isin(responses, torch.tensor(ids, device=responses.device))


def sample_ids(
    model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor, config: GenerationConfig, **more: Any
) -> Tensor:
    """Replies to left-padded prompts, `(batch, at most max_new_tokens)`; behind a stop token stands the pad token."""
    output = model.generate(input_ids=input_ids, attention_mask=attention_mask, generation_config=config, **more)
    return output[:, input_ids.shape[1] :]


def sample_replies(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], config: GenerationConfig, batch_size: int
) -> Tensor:
    """Replies to prompts of any length, those to prompts of like length decoded together.

    Args:
        model: A causal model.
        prompts: Token ids.
        config: Of the decoding; its pad token fills the rows of the result.
        batch_size: Replies decoded together.

    Returns:
        `(prompts, longest reply)`, in the order of the prompts, on the model's device.
    """
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    replies: list[list[int]] = [[] for _ in prompts]
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        ids, mask = left_pad([prompts[row] for row in rows], config.pad_token_id, model.device)
        for row, reply in zip(rows, sample_ids(model, ids, mask, config).tolist(), strict=True):
            replies[row] = reply
    width = max(map(len, replies))
    return torch.tensor([row + [config.pad_token_id] * (width - len(row)) for row in replies], device=model.device)


@contextlib.contextmanager
def inference(model: PreTrainedModel) -> Iterator[None]:
    """Evaluation mode without gradients or gradient checkpointing, which would turn the key-value cache off.

    Afterwards every module is in the mode that it was in. The checkpointing flag is set module by module, since turning it off
    and on by the model's own methods would hang the input hooks of PEFT anew each time.
    """
    training = [(module, module.training) for module in model.modules()]
    checkpointed = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False)]
    for module in checkpointed:
        module.gradient_checkpointing = False
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in training:
            module.training = mode
        for module in checkpointed:
            module.gradient_checkpointing = True


class Reply(NamedTuple):
    """A reply, and whether the model ended it with its stop token rather than being cut off."""

    text: str
    finished: bool


class RowSampling(LogitsProcessor):
    """Draws each row's token from the full distribution at `temperature`, from a generator that is the row's own.

    The largest of logit / temperature + Gumbel noise is a draw from the softmax (Maddison, Tarlow and Minka 2014,
    https://arxiv.org/abs/1411.0030, section 2), so that decoding stays greedy and what is drawn for a row depends on
    nothing that is decoded beside it.
    """

    def __init__(self, seeds: Sequence[int], temperature: float, device: torch.device) -> None:
        self.generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]
        self.temperature = temperature

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        noise = torch.empty_like(scores)
        for row, generator in zip(noise, self.generators, strict=True):
            row.exponential_(generator=generator)  # its negative logarithm has Gumbel's distribution
        return scores / self.temperature - noise.log()


def prompt_limit(model: PreTrainedModel, max_length: int, max_new_tokens: int) -> int:
    """The longest prompt: `max_length`, or less where the model has no positions for it and a reply."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return min(max_length, positions - max_new_tokens) if positions else max_length


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Sequence[Message]],
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    batch_size: int = 64,
    max_length: int = 1024,
) -> list[str]:
    """Reply to each conversation: the text of the only reply of [`generate_several`]."""
    several = generate_several(
        model, tokenizer, conversations, 1, max_new_tokens, temperature, seed, batch_size, max_length
    )
    return [replies[0].text for replies in several]


def generate_several(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Sequence[Message]],
    num_generations: int,
    max_new_tokens: int,
    temperature: float,
    seed: int = 0,
    batch_size: int = 64,
    max_length: int = 1024,
    first: int = 0,
) -> list[list[Reply]]:
    """Reply to each conversation several times; its prompt is encoded once.

    A sampled reply depends on the seed, the number of its conversation and its own number, not on `batch_size` or on the
    other conversations (as far as padding leaves the logits alone, which it does up to rounding).

    Args:
        model: A causal model; a PEFT model replies with its active adapter.
        tokenizer: Its tokenizer (see [`rlhf.model.load_tokenizer`]).
        conversations: Messages, each list ending with a user turn.
        num_generations: Replies to each.
        max_new_tokens: Longest reply.
        temperature: 0 for greedy decoding.
        seed: Of the sampling. The global generator is not used.
        batch_size: Replies decoded together, those to prompts of like length.
        max_length: Longest prompt; older turns are dropped, as in training.
        first: Number of the first conversation, where these are a part of a longer list.

    Returns:
        The replies to each conversation, in their order, as [`rlhf.chat.reply_text`] reads them.
    """
    max_length = prompt_limit(model, max_length, max_new_tokens)
    prompts = [
        render_within(messages, tokenizer, max_length, add_generation_prompt=True)[0]["input_ids"]
        for messages in conversations
    ]
    config = generation_config(tokenizer, max_new_tokens)
    replies: list[list[Reply]] = [[] for _ in prompts]
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    size = max(1, batch_size // num_generations)
    with inference(model):
        for start in range(0, len(order), size):
            batch = order[start : start + size]
            input_ids, mask = left_pad([prompts[i] for i in batch], tokenizer.pad_token_id, model.device)
            more: dict[str, Any] = {}
            if temperature > 0:
                seeds = [_seed(seed, first + index, number) for index in batch for number in range(num_generations)]
                more["logits_processor"] = LogitsProcessorList([RowSampling(seeds, temperature, model.device)])
            if num_generations > 1:
                more["past_key_values"] = _encode(model, input_ids, mask, num_generations)
                input_ids, mask = (tensor.repeat_interleave(num_generations, dim=0) for tensor in (input_ids, mask))
            rows = sample_ids(model, input_ids, mask, config, **more).tolist()
            for place, row in enumerate(rows):
                reply = Reply(reply_text(row, tokenizer), tokenizer.eos_token_id in row)
                replies[batch[place // num_generations]].append(reply)
    return replies


def _encode(model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor, repeats: int) -> Any:
    """Keys and values of all but the last token of each prompt, `repeats` times; `generate` goes on from there."""
    position_ids = (attention_mask.cumsum(dim=1) - 1).clamp(min=0)
    cache = model(
        input_ids=input_ids[:, :-1],
        attention_mask=attention_mask[:, :-1],
        position_ids=position_ids[:, :-1],
        use_cache=True,
        logits_to_keep=1,
    ).past_key_values
    cache.batch_repeat_interleave(repeats)
    return cache


def _seed(seed: int, conversation: int, number: int) -> int:
    digest = hashlib.blake2b(f"{seed}/{conversation}/{number}".encode(), digest_size=4).digest()
    return int.from_bytes(digest)  # 32 bits: what torch's generator on a CPU takes of a seed
