"""The one inference path: chat, evaluation, PPO rollouts and the samples written during training all use it."""

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from rlhf.chat import Message, render_within, reply_text


def generation_config(
    tokenizer: PreTrainedTokenizerBase, max_new_tokens: int, temperature: float = 0.0
) -> GenerationConfig:
    """Sampling from the full distribution at `temperature`, or greedy decoding at 0.

    The settings that ship with a model (Qwen's top-k, top-p and repetition penalty) are left out, here and by
    [`rlhf.model.load_base`]: they would make the log-probabilities of PPO those of another distribution, and the
    evaluation one of the settings.
    """
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=temperature > 0,
        **({"temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature > 0 else {}),
        eos_token_id=tokenizer.eos_token_id,
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


def response_mask(responses: Tensor, stop_token_id: int) -> Tensor:
    """1 up to and including the first stop token of each row of `(batch, length)`, 0 behind it.

    From the stop token alone, never from pad ids, which many tokenizers also use as a stop token.
    """
    stops = (responses == stop_token_id).long()
    return (stops.cumsum(dim=1) - stops == 0).long()


def sample_ids(model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor, config: GenerationConfig) -> Tensor:
    """Replies to left-padded prompts, `(batch, at most max_new_tokens)`; behind a stop token stands the pad token."""
    output = model.generate(input_ids=input_ids, attention_mask=attention_mask, generation_config=config)
    return output[:, input_ids.shape[1] :]


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
    """Reply to each conversation.

    Args:
        model: A causal model; a PEFT model replies with its active adapter.
        tokenizer: Its tokenizer (see [`rlhf.model.load_tokenizer`]).
        conversations: Messages, each list ending with a user turn.
        max_new_tokens: Longest reply.
        temperature: 0 for greedy decoding.
        seed: Of the sampling. The global generator is left as it was.
        batch_size: Conversations decoded together, those of like length.
        max_length: Longest prompt; older turns are dropped, as in training.

    Returns:
        One reply a conversation, in their order, as [`rlhf.chat.reply_text`] reads it.
    """
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    max_length = min(max_length, positions - max_new_tokens) if positions else max_length
    prompts = [
        render_within(messages, tokenizer, max_length, add_generation_prompt=True)[0]["input_ids"]
        for messages in conversations
    ]
    config = generation_config(tokenizer, max_new_tokens, temperature)
    replies = [""] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    devices = [model.device] if model.device.type == "cuda" else []
    with inference(model), torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            input_ids, mask = left_pad([prompts[i] for i in batch], tokenizer.pad_token_id, model.device)
            responses = sample_ids(model, input_ids, mask, config)
            for index, row in zip(batch, responses.tolist(), strict=True):
                replies[index] = reply_text(row, tokenizer)
    return replies
