"""Messages to token ids and loss mask: the only code that touches a chat template.

A dialogue is rendered piece by piece: everything up to a reply (the prompt), then the reply with its stop token, then
what follows. Pieces are cut only at the borders of replies, and each is tokenised against the text before it. So the
ids of a prompt are a prefix of the ids of every dialogue that continues it, whatever the tokenizer merges, and a model
is asked at inference with exactly the ids it was trained on.

Every reply is rendered as one that a user's turn follows, and a prompt as what stands in front of such a reply. This
is how templates write history: the thinking blocks that Qwen3's adds to a prompt and to the last reply stay out. A
persona goes where the template has a place for it: its system message, or else the first turn of the user.
"""

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

Message = dict[str, Any]


# A base model without a chat template (GPT-2) is given the text form of rlhf.persona as its template. Two things are
# added to it: `[RESPONSE]` opens every reply, not the last one alone, so that a prompt stays a prefix of the dialogue;
# and the end-of-text token closes every reply, so that the model learns to stop.
PERSONA_TEMPLATE = (
    "{%- if messages[0]['role'] == 'system' -%}"
    "[PERSONA] {{ messages[0]['content'] | replace('|', '\\\\|') | replace('\n', ' | ') }}{% set turns = messages[1:] -%}"
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
    question, reply = {"role": "user", "content": "hello"}, {"role": "assistant", "content": _REPLY}
    tail = _template(tokenizer, [question, reply, _NEXT]).partition(_REPLY)[2]
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
        messages: Turns with `role` (system, user, assistant) and `content`. A reply with `"train": False` is context
            only: its ids are the same, its mask is 0.
        tokenizer: A tokenizer that went through [`prepare_tokenizer`].
        add_generation_prompt: Whether to end with the opening of a reply, to be continued by a model.

    Returns:
        `{"input_ids": [...], "assistant_mask": [...]}`, of equal length.

    Raises:
        ChatTemplateError: if the template refuses the dialogue, changes a reply, or renders a prompt that is not a
            prefix of the dialogue.
    """
    form = _form(tokenizer)
    messages = _with_place_for_persona(
        [{**message, "content": neutralise(message["content"], tokenizer)} for message in messages], form
    )
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
        prompt = _before_reply(tokenizer, messages[:index]).removesuffix(form.lead)
        whole = _template(tokenizer, [*messages[: index + 1], _NEXT])
        if not (prompt.startswith(text) and whole.startswith(prompt)):
            raise ChatTemplateError(
                f"The chat template renders the prompt of turn {index} differently once the reply is known: "
                f"{prompt[-60:]!r} is not how the whole dialogue {whole[: len(prompt)][-60:]!r} goes on. Use a "
                "template without parts that depend on later turns."
            )
        reply, stop, after = whole[len(prompt) :].partition(tokenizer.eos_token)  # its text holds no stop token
        if message["content"].strip() not in reply or not after.startswith(form.tail):
            raise ChatTemplateError(
                f"The chat template changes the text of turn {index}: {message['content'][:60]!r} becomes "
                f"{(reply + stop)[:60]!r}. Use a template that writes replies as they are."
            )
        add(prompt[len(text) :], trained=0)
        add(reply + stop, trained=int(message.get("train", True)))
        add(form.tail, trained=0)
    if add_generation_prompt:
        rest = _before_reply(tokenizer, messages).removesuffix(form.lead)
    elif len(messages) > 1 and messages[-1]["role"] == "assistant":
        rest = text
    else:
        rest = _template(tokenizer, messages)
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


def reply_ids(question: Message, reply: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids of a reply and its stop token, as they stand behind any prompt that ends with this turn.

    They follow from the last turn alone, since pieces are cut at the borders of replies.
    """
    rendered = render([question, {"role": "assistant", "content": reply}], tokenizer)
    return [id for id, mask in zip(rendered["input_ids"], rendered["assistant_mask"], strict=True) if mask]


def neutralise(text: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """`text` in which nothing is control any more, whatever the tokenizer and its template take for control.

    A space goes behind the first character of each special token and each tag of the template, again until none is
    left; a special token of a single character becomes U+FFFD, as does half a surrogate pair, which JSON can write and
    no tokenizer reads. Other text stays as it is.

    Raises:
        ChatTemplateError: if the tokenizer throws the spaces away, so that nothing can be broken up.
    """
    control, normalizer = _form(tokenizer).control, _normalizer(tokenizer)
    text = _SURROGATE.sub("\ufffd", text)
    for _ in range(_MAX_ROUNDS):
        if control.search(text):
            text = control.sub(lambda match: f"{match[0][0]} {match[0][1:]}" if len(match[0]) > 1 else "\ufffd", text)
        elif normalizer and control.search(normalised := normalizer.normalize_str(text)):
            text = normalised  # look-alikes that the tokenizer itself makes into a token or tag, such as "＜"
        else:
            return text
    raise ChatTemplateError(
        f"{text[:60]!r} still holds control tokens after {_MAX_ROUNDS} rounds of breaking them up."
    )


def reply_text(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """Text of a generated reply, without space around it.

    It ends at the stop token, or where a model that misses its stop begins another turn: at the first special token or
    tag of the template. So the other speaker's words never stand in a reply.
    """
    ids = list(ids)
    if tokenizer.eos_token_id in ids:
        ids = ids[: ids.index(tokenizer.eos_token_id)]
    return _form(tokenizer).control.split(tokenizer.decode(ids), maxsplit=1)[0].strip()


@dataclass(frozen=True)
class _Form:
    """What a chat template turns out to be when it is tried.

    Attributes:
        control: finds the strings that text must not hold: special tokens, added tokens that the template writes
            (Qwen3's `<think>`), and tags that it writes as plain text (Zephyr's `<|user|>`, `[SEP]`, `User:`).
        takes_system: whether a system message is rendered in front of the first turn.
        lead: what the template writes in front of a reply and not at the end of a prompt: the space that GPT-2's
            tokens begin with.
        tail: what the template writes behind a reply's stop token.
    """

    control: re.Pattern[str]
    takes_system: bool
    lead: str
    tail: str


# Private-use characters: stand-ins for a reply that is not known yet and for the parts of a trial dialogue.
_REPLY = "\ue000"
_SYSTEM, _USER = (
    {"role": role, "content": character} for role, character in (("system", "\ue001"), ("user", "\ue002"))
)
_NEXT = {"role": "user", "content": "\ue003"}
_MAX_ROUNDS = 1000
_SURROGATE = re.compile(r"[\ud800-\udfff]")


def _form(tokenizer: PreTrainedTokenizerBase) -> _Form:
    return _tried(tokenizer, tokenizer.chat_template, tokenizer.eos_token, len(tokenizer))


@functools.lru_cache(maxsize=8)
def _tried(tokenizer: PreTrainedTokenizerBase, template: str, eos_token: str, size: int) -> _Form:
    """The arguments behind the first one are what a form depends on, so that a changed tokenizer is tried anew."""
    reply = {"role": "assistant", "content": _REPLY}
    try:
        with_system = _template(tokenizer, [_SYSTEM, _USER, reply, _NEXT])
    except ChatTemplateError:  # as Gemma's
        with_system = ""
    # Some templates drop the system message, or put it before the last turn instead of the first.
    takes_system = -1 < with_system.find(_SYSTEM["content"]) < with_system.find(_USER["content"])
    trial = with_system if takes_system else _template(tokenizer, [_USER, reply, _NEXT])

    opening = _before_reply(tokenizer, [_USER])
    asked = _template(tokenizer, [_USER], add_generation_prompt=True)
    if not (asked.startswith(opening) or opening.startswith(asked)):
        raise ChatTemplateError(
            f"The chat template opens a reply with {asked[-60:]!r} in a prompt and with {opening[-60:]!r} in a "
            "dialogue. Use a template that does both alike."
        )
    added = tokenizer.added_tokens_decoder.values()
    tokens = {token.content for token in added if token.special or token.content in template}
    tokens |= set(tokenizer.all_special_tokens)
    controls = tokens | _tags(trial, tokens)
    if template == PERSONA_TEMPLATE:
        controls |= {"[NAME]", "[STYLE]"}  # tags of the text form that the template itself never writes
    if normalizer := _normalizer(tokenizer):  # text is compared as written and as the tokenizer will see it
        controls |= {normalizer.normalize_str(control) for control in controls}
    stripped = {control.strip(" \t\n▁") for control in controls} - {""}
    # One character that is no special token is a word, not control: `<` would else be broken out of every text.
    kept = sorted((c for c in stripped if len(c) > 1 or c in tokens), key=len, reverse=True)
    tail = _template(tokenizer, [_USER, reply]).rpartition(eos_token)[2]
    return _Form(re.compile("|".join(map(re.escape, kept))), takes_system, opening[len(asked) :], tail)


def _tags(trial: str, tokens: set[str]) -> set[str]:
    """What marks turns in a rendered dialogue and is plain text to the tokenizer: `<|user|>`, `[SEP]`, `User:`."""
    tags = set()
    for between in re.split("[\ue000-\ue003]", trial):
        for token in tokens:
            between = between.replace(token, " ")
        words = between.split()
        tags |= {word for word in words if re.fullmatch(r"[^\w\s].*\w.*[^\w\s]", word)}
        tags |= {word for word in words[-1:] if re.fullmatch(r"\w+:", word)}
    return tags


def _normalizer(tokenizer: PreTrainedTokenizerBase) -> Any:
    backend = getattr(tokenizer, "backend_tokenizer", None)  # none where the tokenizer is written in Python
    return backend.normalizer if backend is not None else None


def _with_place_for_persona(messages: list[Message], form: _Form) -> list[Message]:
    """Where the template takes no system message, its text opens the first turn of the user, or is that turn."""
    if form.takes_system or not messages or messages[0]["role"] != "system":
        return messages
    persona, turns = messages[0]["content"], messages[1:]
    if turns and turns[0]["role"] == "user":
        return [{**turns[0], "content": f"{persona}\n\n{turns[0]['content']}"}, *turns[1:]]
    return [{"role": "user", "content": persona}, *turns]


def _before_reply(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> str:
    """The text in front of a reply to `messages`, as it stands once the dialogue has gone on."""
    return _template(tokenizer, [*messages, {"role": "assistant", "content": _REPLY}, _NEXT]).rpartition(_REPLY)[0]


def _template(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], add_generation_prompt: bool = False
) -> str:
    turns = [{"role": message["role"], "content": message["content"]} for message in messages]
    try:
        return tokenizer.apply_chat_template(
            turns,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            enable_thinking=False,  # known to Qwen3-like templates and ignored by the others
            date_string="26 Jul 2024",  # Llama 3.2's template would write today's: another prompt every day
        )
    except TemplateError as error:
        roles = ", ".join(message["role"] for message in messages)
        raise ChatTemplateError(
            f"The chat template refuses a dialogue with the roles {roles}: {error}. Bring the turns into that order, "
            "or use another template."
        ) from error


def _continuation_ids(tokenizer: PreTrainedTokenizerBase, before: str, piece: str) -> Sequence[int]:
    """Ids of `piece` as it stands after `before`; SentencePiece tokenizers would else put a space in front of it."""
    if not piece:
        return ()
    anchor = tokenizer.eos_token if before.endswith(tokenizer.eos_token) else before[-1:]
    anchor_ids = _ids(tokenizer, anchor, len(tokenizer)) if anchor else ()
    ids = _ids(tokenizer, anchor + piece, len(tokenizer))
    if ids[: len(anchor_ids)] == anchor_ids:
        return ids[len(anchor_ids) :]
    return _ids(tokenizer, piece, len(tokenizer))


@functools.lru_cache(maxsize=1 << 14)
def _ids(tokenizer: PreTrainedTokenizerBase, text: str, size: int) -> tuple[int, ...]:
    """Remembered, since personas, questions and tags come again and again; `size` changes when a token is added."""
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
