"""Messages to token ids and loss mask: the only code that touches a chat template.

A dialogue is rendered piece by piece: everything up to a reply (the prompt), then the reply with its stop token, then
what follows. Pieces are cut only at the borders of replies, and each is tokenised against the text before it. So the
ids of a prompt are a prefix of the ids of every dialogue that continues it, whatever the tokenizer merges, and a model
is asked at inference with exactly the ids it was trained on.
"""

from collections.abc import Sequence
from typing import TypedDict

from transformers import PreTrainedTokenizerBase

Message = dict[str, str]

TAGS = ("[PERSONA]", "[DIALOGUE]", "[SEP]", "[RESPONSE]")

# A base model without a chat template (GPT-2) is given the text form of rlhf.persona as its template. Two things are
# added to it: `[RESPONSE]` opens every reply, not the last one alone, so that a prompt stays a prefix of the dialogue;
# and the end-of-text token closes every reply, so that the model learns to stop.
PERSONA_TEMPLATE = (
    "{%- if messages[0]['role'] == 'system' -%}"
    "[PERSONA] {{ messages[0]['content'] | replace('\n', ' | ') }}{% set turns = messages[1:] -%}"
    "{%- else -%}[PERSONA]{% set turns = messages -%}{%- endif -%}"
    "{{ ' [DIALOGUE]' }}{% for message in turns -%}"
    "{%- if message['role'] == 'assistant' -%}{{ ' [RESPONSE] ' + message['content'] + eos_token + ' [SEP]' }}"
    "{%- else -%}{{ ' ' + message['content'] }}{%- endif -%}"
    "{%- endfor -%}{%- if add_generation_prompt -%}{{ ' [RESPONSE]' }}{%- endif -%}"
)


class Rendered(TypedDict):
    """Token ids of a dialogue and, at each position, 1 where an assistant's reply or its stop token stands."""

    input_ids: list[int]
    assistant_mask: list[int]


class ChatTemplateError(ValueError):
    """The tokenizer's chat template cannot render a dialogue so that its prompts are prefixes of it."""


def prepare_tokenizer(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Give `tokenizer` what chatting needs: a chat template, a pad token, and the stop token as its end of sequence.

    The stop token is found by rendering a reply, because the end-of-sequence token that ships with a model is often
    not the one that its template closes a turn with (https://github.com/huggingface/open-r1/issues/604).

    Returns:
        The same object, changed in place.

    Raises:
        ChatTemplateError: if the template does not close a reply with a token of its own.
    """
    if tokenizer.chat_template is None:
        tokenizer.chat_template = PERSONA_TEMPLATE
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(stop_token_id(tokenizer))
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def stop_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Id of the token with which the chat template closes a reply."""
    reply = "yes"
    question = [{"role": "user", "content": "hello"}]
    rendered = _template(tokenizer, [*question, {"role": "assistant", "content": reply}])
    tail = rendered[len(_template(tokenizer, question, add_generation_prompt=True)) :].split(reply, 1)[-1]
    ids = tokenizer(tail.lstrip(), add_special_tokens=False)["input_ids"]
    if not ids or ids[0] not in tokenizer.all_special_ids and ids[0] not in tokenizer.get_added_vocab().values():
        raise ChatTemplateError(
            f"The chat template closes a reply with {tail!r}, which does not begin with a special token, so a model "
            "cannot learn where to stop. Give the tokenizer a template that writes `eos_token` after each reply."
        )
    return ids[0]


def render(
    messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, add_generation_prompt: bool = False
) -> Rendered:
    """Token ids of a dialogue, with a mask over the assistant's replies and their stop tokens.

    The very first message is never a reply, whoever speaks it.

    Args:
        messages: Turns with `role` (system, user, assistant) and `content`.
        tokenizer: A tokenizer that went through [`prepare_tokenizer`].
        add_generation_prompt: Whether to end with the opening of a reply, to be continued by a model.

    Returns:
        `{"input_ids": [...], "assistant_mask": [...]}`, of equal length.

    Raises:
        ChatTemplateError: if the rendering of a prompt is not a prefix of the rendering of the dialogue.
    """
    messages = [{**message, "content": neutralise(message["content"], tokenizer)} for message in messages]
    input_ids: list[int] = []
    assistant_mask: list[int] = []
    text = ""

    def add(piece: str, trained: int) -> None:
        nonlocal text
        ids = _continuation_ids(tokenizer, text, piece)
        input_ids.extend(ids)
        assistant_mask.extend([trained] * len(ids))
        text += piece

    for index, message in enumerate(messages):
        if message["role"] != "assistant" or index == 0:
            continue  # with neither persona nor question before it, an opening line answers nothing: it is context
        prompt = _template(tokenizer, messages[:index], add_generation_prompt=True)
        whole = _template(tokenizer, messages[: index + 1])
        if not (prompt.startswith(text) and whole.startswith(prompt)):
            raise ChatTemplateError(
                f"The chat template renders the prompt of turn {index} differently once the reply is known: "
                f"{prompt[-60:]!r} is not how the whole dialogue {whole[: len(prompt)][-60:]!r} goes on. Use a "
                "template without parts that depend on later turns."
            )
        add(prompt[len(text) :], trained=0)
        reply = whole[len(prompt) :]
        end = reply.rindex(tokenizer.eos_token) + len(tokenizer.eos_token)
        add(reply[:end], trained=1)
        add(reply[end:], trained=0)
    rest = _template(tokenizer, messages, add_generation_prompt=add_generation_prompt)
    if not rest.startswith(text):
        raise ChatTemplateError("The chat template changes earlier turns when a later one is added.")
    add(rest[len(text) :], trained=0)
    return {"input_ids": input_ids, "assistant_mask": assistant_mask}


def render_within(
    messages: Sequence[Message],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    add_generation_prompt: bool = False,
    completion_length: int = 0,
) -> tuple[Rendered, int]:
    """[`render`], with whole exchanges dropped from the oldest on until the ids fit into `max_length`.

    The persona (system message) and the last turn always stay. Room for `completion_length` ids is left behind them.

    Returns:
        The rendering and the number of turns that were dropped.

    Raises:
        ValueError: if the persona and the last exchange alone are longer than `max_length`.
    """
    head = [message for message in messages[:1] if message["role"] == "system"]
    turns = list(messages[len(head) :])
    dropped = 0
    while True:
        rendered = render([*head, *turns], tokenizer, add_generation_prompt)
        length = len(rendered["input_ids"]) + completion_length
        if length <= max_length:
            return rendered, dropped
        # The next possible beginning is a later user turn: templates such as Llama's or Gemma's refuse another one.
        start = next((i for i, turn in enumerate(turns[1:], 1) if turn["role"] == "user"), None)
        if start is None:
            raise ValueError(
                f"`max_length` is {max_length}, but the persona and the last exchange alone take {length} tokens. "
                "Raise `max_length`, or shorten the persona."
            )
        turns, dropped = turns[start:], dropped + start


def neutralise(text: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """`text` with each special token of the tokenizer broken up by a space, so that data never becomes control."""
    tags = TAGS if tokenizer.chat_template == PERSONA_TEMPLATE else ()
    for token in (*tokenizer.get_added_vocab(), *tags):
        if len(token) > 1 and token in text:
            text = text.replace(token, f"{token[0]} {token[1:]}")
    return text


def _template(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], add_generation_prompt: bool = False
) -> str:
    # `enable_thinking` is known to Qwen3-like templates and ignored by the others.
    return tokenizer.apply_chat_template(
        list(messages), tokenize=False, add_generation_prompt=add_generation_prompt, enable_thinking=False
    )


def _continuation_ids(tokenizer: PreTrainedTokenizerBase, before: str, piece: str) -> list[int]:
    """Ids of `piece` as it stands after `before`; SentencePiece tokenizers would else put a space in front of it."""
    if not piece:
        return []
    anchor = tokenizer.eos_token if before.endswith(tokenizer.eos_token) else before[-1:]
    anchor_ids = tokenizer(anchor, add_special_tokens=False)["input_ids"] if anchor else []
    ids = tokenizer(anchor + piece, add_special_tokens=False)["input_ids"]
    if ids[: len(anchor_ids)] == anchor_ids:
        return ids[len(anchor_ids) :]
    return tokenizer(piece, add_special_tokens=False)["input_ids"]
