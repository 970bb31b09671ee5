"""The persona of a chatbot, and its two forms: a system message, and the text of a prompt.

Text form (one space on each side of a tag and of a bar; `[NAME] name` and `[STYLE] style` are optional)::

    [NAME] name [PERSONA] fact | fact [STYLE] style [DIALOGUE] turn [SEP] turn [RESPONSE]

Any text may be a fact or a turn: a tag inside it, and a bar inside a fact, gets one backslash more than it had in
front of it, and loses one again when it is parsed (the quoting of mboxrd). All other backslashes stand for themselves,
so `parse_prompt` and `render_prompt` are exact inverses, and text never becomes structure.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

Message = dict[str, Any]  # role, content, and `"train": False` where a reply is context only

_TAG = r"\[(?:NAME|PERSONA|STYLE|DIALOGUE|SEP|RESPONSE)\]"
_QUOTED_TAG = re.compile(rf"\\*{_TAG}")
_QUOTED_TAG_OR_BAR = re.compile(rf"\\*(?:{_TAG}|\|)")
_STRUCTURE = re.compile(rf"(?<!\\){_TAG}")
_SEPARATING_BAR = re.compile(r"(?<!\\)\|")
_FORM = "[PERSONA] fact | fact [DIALOGUE] turn [SEP] turn [RESPONSE]"
_OPTIONAL = ("[NAME]", "[STYLE]")
_ROLES = ("system", "user", "assistant")


class PromptError(ValueError):
    """A prompt, persona or row that is malformed; the message says what is missing and where."""


@dataclass(frozen=True)
class Persona:
    """Who the chatbot is; raises PromptError for a field that is blank or of another type.

    Attributes:
        facts: sentences in the first person.
        name: of the character.
        style: how it speaks, in words: "short and dry".
        examples: what a user says and how the character replies to it. They are for training: no prompt holds them,
            so they count neither in a comparison nor in the text form.
    """

    facts: tuple[str, ...]
    name: str | None = None
    style: str | None = None
    examples: tuple[tuple[str, str], ...] = field(default=(), compare=False)

    def __post_init__(self) -> None:
        if isinstance(self.facts, str) or not isinstance(self.facts, Sequence):
            raise PromptError(f"`facts` must be a tuple of strings, got {self.facts!r}")
        object.__setattr__(self, "facts", tuple(self.facts))
        for number, fact in enumerate(self.facts, 1):
            if not isinstance(fact, str) or not fact.strip():
                raise PromptError(f"`facts`: fact {number} must be text that is not blank, got {fact!r}")
        for key, value in (("name", self.name), ("style", self.style)):
            if value is not None and (not isinstance(value, str) or not value.strip()):
                raise PromptError(f"`{key}` must be None or text that is not blank, got {value!r}")
        for number, example in enumerate(self.examples, 1):
            blank = [text for text in example if not isinstance(text, str) or not text.strip()]
            if isinstance(example, str) or len(example) != 2 or blank:
                raise PromptError(f"`examples`: example {number} must be a user's turn and the reply, got {example!r}")

    def statements(self) -> tuple[str, ...]:
        """All that a prompt says of the character, in the first person: the name, the facts, the style.

        These are what a row of data carries as its `persona`: a list of sentences says the same to whatever reads it,
        and `Persona(persona.statements())` has the system message of `persona`.
        """
        name = () if self.name is None else (f"my name is {self.name}.",)
        style = () if self.style is None else (f"my style of speaking: {self.style}",)
        return (*name, *self.facts, *style)

    def system_message(self) -> str:
        """The statements, one a line."""
        return "\n".join(self.statements())


def _quote(text: str, pattern: re.Pattern[str]) -> str:
    return pattern.sub(lambda match: "\\" + match[0], text)


def _unquote(text: str, pattern: re.Pattern[str]) -> str:
    return pattern.sub(lambda match: match[0].removeprefix("\\"), text)


def _field(text: str, start: int, end: int, what: str) -> str:
    """text[start:end] without the one space on each side that belongs to the separators."""
    field = text[start:end]
    if not field.strip():
        raise PromptError(f"{what} is empty at character {start}")
    if not (field.startswith(" ") and field.endswith(" ")):
        where = start if not field.startswith(" ") else end
        raise PromptError(
            f"{what} needs one space on each side, missing at character {where}: "
            f"{text[max(0, where - 20) : where + 20]!r}; "
            "a tag or bar that is part of the text is written with a backslash in front"
        )
    return field[1:-1]


def parse_prompt(text: str) -> tuple[Persona, list[Message]]:
    """Take a prompt apart into its persona and the messages of its dialogue.

    Turns alternate and the last one is the user's, so a turn's role follows from its position counted from the end; a
    dialogue may begin with the assistant. Raises PromptError for a missing, misplaced or empty part.
    """
    if not isinstance(text, str):
        raise PromptError(f"`prompt` must be a string, got {type(text).__name__}")
    tags = [(match[0], match.start(), match.end()) for match in _STRUCTURE.finditer(text)]
    found = [tag for tag, _, _ in tags]
    for tag in ("[PERSONA]", "[DIALOGUE]", "[RESPONSE]"):
        if found.count(tag) != 1:
            fault = "is missing" if tag not in found else f"occurs {found.count(tag)} times"
            raise PromptError(f"{tag} {fault} in the prompt {text[:80]!r}; the form is {_FORM}")
    separators = found.count("[SEP]")
    has_name, has_style = (tag in found for tag in _OPTIONAL)
    expected = ["[NAME]"] * has_name + ["[PERSONA]"] + ["[STYLE]"] * has_style
    expected += ["[DIALOGUE]"] + ["[SEP]"] * separators + ["[RESPONSE]"]
    for (tag, start, _), wanted in zip(tags, expected, strict=False):
        if tag != wanted:
            raise PromptError(f"{tag} at character {start} where {wanted} is expected; the form is {_FORM}")
    if len(found) != len(expected):
        often = next(tag for tag in _OPTIONAL if found.count(tag) > 1)
        raise PromptError(f"{often} occurs {found.count(often)} times; the form is {_FORM}")
    if tags[0][1] != 0:
        raise PromptError(f"text before {found[0]}: {text[: tags[0][1]][:40]!r}; the form is {_FORM}")
    if tags[-1][2] != len(text):
        raise PromptError(f"text after [RESPONSE] at character {tags[-1][2]}: {text[tags[-1][2] :][:40]!r}; remove it")

    # spans[i] lies between tag i and tag i + 1.
    spans = [(left[2], right[1]) for left, right in pairwise(tags)]
    name = _unquote(_field(text, *spans.pop(0), "the name"), _QUOTED_TAG) if has_name else None
    start, end = spans.pop(0)
    bars = [match.start() for match in _SEPARATING_BAR.finditer(text, start, end)]
    fact_spans = zip([start, *(bar + 1 for bar in bars)], [*bars, end], strict=True)
    what = "the persona" if not bars else "fact {} of the persona"
    facts = [_field(text, *span, what.format(number)) for number, span in enumerate(fact_spans, 1)]
    style = _unquote(_field(text, *spans.pop(0), "the style"), _QUOTED_TAG) if has_style else None
    turns = [_field(text, *span, f"turn {number} of the dialogue") for number, span in enumerate(spans, 1)]
    messages = [
        {"role": "user" if (len(turns) - index) % 2 else "assistant", "content": _unquote(turn, _QUOTED_TAG)}
        for index, turn in enumerate(turns)
    ]
    return Persona(tuple(_unquote(fact, _QUOTED_TAG_OR_BAR) for fact in facts), name, style), messages


def render_prompt(persona: Persona, messages: Sequence[Mapping[str, Any]]) -> str:
    """The inverse of `parse_prompt`.

    Raises PromptError for what the form cannot hold: no facts, a blank turn, a system message, roles that do not
    alternate, a last turn that is not the user's.
    """
    if not persona.facts:
        raise PromptError("`persona` has no facts; the form needs at least one")
    messages = _checked(messages, "messages")
    if not messages:
        raise PromptError("`messages` is empty; the form needs at least the user's turn")
    for index, message in enumerate(messages):
        role = "user" if (len(messages) - index) % 2 else "assistant"
        if message["role"] != role:
            raise PromptError(
                f"`messages`: message {index + 1} of {len(messages)} has the role {message['role']!r} where {role!r} "
                "is expected (user and assistant alternate, the user is last, the persona takes the system's place)"
            )
        if not message["content"].strip():
            raise PromptError(f"`messages`: message {index + 1} of {len(messages)} is blank")
    name = "" if persona.name is None else f"[NAME] {_quote(persona.name, _QUOTED_TAG)} "
    facts = " | ".join(_quote(fact, _QUOTED_TAG_OR_BAR) for fact in persona.facts)
    style = "" if persona.style is None else f"[STYLE] {_quote(persona.style, _QUOTED_TAG)} "
    turns = " [SEP] ".join(_quote(message["content"], _QUOTED_TAG) for message in messages)
    return f"{name}[PERSONA] {facts} {style}[DIALOGUE] {turns} [RESPONSE]"


def _checked(messages: Any, field: str) -> list[Message]:
    """A copy of `messages`, each with a known role and text as content."""
    if isinstance(messages, str) or not isinstance(messages, Sequence):
        raise PromptError(f"`{field}` must be a list of messages, got {messages!r}")
    for number, message in enumerate(messages, 1):
        if not isinstance(message, Mapping) or set(message) - {"train"} != {"role", "content"}:
            raise PromptError(
                f"`{field}`: message {number} must have the keys role and content only (or train beside them), "
                f"got {message!r}"
            )
        if message["role"] not in _ROLES:
            raise PromptError(
                f"`{field}`: message {number} has the role {message['role']!r}; known: {', '.join(_ROLES)}"
            )
        if not isinstance(message["content"], str):
            raise PromptError(f"`{field}`: message {number} must have text as content, got {message['content']!r}")
        if not isinstance(message.get("train", True), bool):
            raise PromptError(f"`{field}`: message {number} has `train` {message['train']!r}; use true or false")
    return [dict(message) for message in messages]


def with_persona(row: Mapping[str, Any]) -> list[Message]:
    """The messages of a row, the persona's system message first (none when the row has no persona).

    The row holds `prompt` or `messages`, and `persona` (a list of facts, or of a persona's [`Persona.statements`]) or
    none; a `prompt` that is a string in the text form carries its own persona. Raises PromptError when the row says two different things, or holds neither.
    """
    if ("prompt" in row) == ("messages" in row):
        raise PromptError(f"a row needs either `prompt` or `messages`, got the columns {sorted(row)}")
    field = "prompt" if "prompt" in row else "messages"
    facts = row.get("persona")
    persona = Persona(() if facts is None else facts)
    if isinstance(row[field], str):
        parsed, messages = parse_prompt(row[field])
        if persona.facts and persona.facts not in (parsed.facts, parsed.statements()):
            raise PromptError(f"`persona` is {persona.facts} but the text of `{field}` says {parsed.facts}; keep one")
        persona = parsed
    else:
        messages = _checked(row[field], field)
    system = persona.system_message()
    if not system:
        return messages
    if any(message["role"] == "system" for message in messages):
        raise PromptError(f"`{field}` holds a system message beside `persona`; keep one of the two")
    return [{"role": "system", "content": system}, *messages]


def persona_and_dialogue(row: Mapping[str, Any]) -> tuple[list[str], list[Message]]:
    """The statements of a row's persona, whichever form the row has, and the messages behind it."""
    messages = with_persona(row)
    if messages and messages[0]["role"] == "system":
        return messages[0]["content"].split("\n"), messages[1:]
    return [], messages


def as_messages(reply: str | list[Message]) -> list[Message]:
    """A reply of a preference row, which is text or a list of messages, as messages."""
    return [{"role": "assistant", "content": reply}] if isinstance(reply, str) else reply
