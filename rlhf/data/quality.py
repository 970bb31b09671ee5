"""What makes a reply unfit to be trained on, and a score from 0 to 1, by the kind of source that it comes from.

What is noise in one source is content in another: markdown in small talk is a leftover, in an expert's answer it is
order. The 10 characters below which a line of a script says too little would take 1,138 of the 26,369 replies of
Synthetic-Persona-Chat's validation file ("Me too!", "Thanks."), 188 of 2,144 of the chatterbot corpus and 3 of 95
answers of two universities ("No.", "11 LPA."), which are right as they stand; ConvAI2 (7,801 replies) and the persona
world have none. So chat and short answers have no such bound. Generated worlds are not filtered at all: there, alike
and repeated replies are meant.

In a dialogue a bad reply is not cut out, for the next turns speak of it: it stays as context, marked `train: False`.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Row = dict[str, Any]

NO_GOOD_REPLY = "no good reply"  # why `mark_bad_replies` leaves a whole dialogue out
_WORDS_TO_REPEAT = 4  # "Thanks!" or "Me too." may come again; of five alike words in a row the second is noise
_TRIGRAM_WORDS = 12  # shorter texts have too few trigrams to tell whether they go round in circles
_MIN_DISTINCT = 0.5  # share of distinct trigrams; 76 of PandaLM's 1,998 model answers are below, no reply in a chat is

_CODE_BLOCK = re.compile(r"```.*?(?:```|\Z)", re.DOTALL)
_TAG = re.compile(r"<[^<>]*>")
_OTHER_SPEAKER = re.compile(r"^\W*(?:user|person|speaker|human|assistant|bot)\s*\d?\W*:", re.IGNORECASE | re.MULTILINE)
_CLOSED = re.compile(r"[.!?…:;)\]}\"'”’»`*>]$|[^\w\s]$")
_SOURCE_MENTION = re.compile(
    r"\btranscripts?\b|\bthe (?:text|passage|context|document)s? (?:above|provided|says?|states?)\b|"
    r"\bin (?:the|this) (?:video|episode|recording)\b",
    re.IGNORECASE,
)
_MARKDOWN = {
    "heading": re.compile(r"^#{1,6} ", re.MULTILINE),
    "list": re.compile(r"^\s*(?:[-*+]|\d+[.)]) ", re.MULTILINE),
    "emphasis": re.compile(r"\*\*\S.*?\*\*|(?<![\w*])\*[^\s*][^*\n]*\*(?![\w*])|__\S.*?__"),
    "code": re.compile(r"`[^`]+`"),
    "paragraphs": re.compile(r"\S[ \t]*\n[ \t]*\n\s*\S"),
}


@dataclass(frozen=True)
class Standard:
    """What is asked of a reply.

    Attributes:
        min_characters: shorter replies are rejected.
        max_asterisks: replies with more are rejected; None allows any number.
        characters: the range of lengths that scores 1; outside the score falls in proportion.
        weights: of the parts of the score ([`score_parts`]); they sum to 1.
        min_score: replies that score less are rejected.
    """

    min_characters: int
    max_asterisks: int | None
    characters: tuple[int, int]
    weights: Mapping[str, float]
    min_score: float


STANDARDS = {
    "chat": Standard(1, 2, (2, 300), {"variety": 0.4, "length": 0.3, "plain": 0.2, "complete": 0.1}, 0.7),
    "script": Standard(10, 2, (10, 500), {"variety": 0.4, "length": 0.3, "complete": 0.2, "plain": 0.1}, 0.7),
    "answers": Standard(1, None, (2, 1000), {"variety": 0.3, "own_words": 0.3, "length": 0.2, "complete": 0.2}, 0.7),
    # The weights and the threshold that a data set of 1,367 expert answers of 134 to 2,440 characters was made with.
    "expert": Standard(
        10, None, (134, 2440), {"formatting": 0.4, "length": 0.2, "complete": 0.2, "own_words": 0.2}, 0.7
    ),
}
# What the readers of sources.py give; "expert" only suits long, well ordered answers, and is asked for by name: it
# would reject all 95 of the two universities'.
KIND_OF_SOURCE = {
    "synthetic_persona_chat": "chat",
    "convai2": "chat",
    "jsonl": "chat",
    "messages": "chat",
    "script": "script",
    "question_answer": "answers",
    "preference": "answers",
}


def distinct_trigrams(text: str) -> float:
    """Share of different ones among the runs of three words; 1 for a text of less than three words."""
    words = text.casefold().split()
    trigrams = list(zip(words, words[1:], words[2:], strict=False))
    return len(set(trigrams)) / len(trigrams) if trigrams else 1.0


def score_parts(text: str, standard: Standard) -> dict[str, float]:
    """The parts of the score, each from 0 (bad) to 1.

    - length: 1 within the range of characters, else the ratio to its nearer end;
    - variety: distinct trigrams, so that a loop scores low;
    - complete: 1 if the text ends with a closing mark, else 0: a text that breaks off;
    - own_words: 0 if it speaks of the transcript, passage or video that it was made from, else 1;
    - formatting: kinds of markdown in it (heading, list, emphasis, code, paragraphs), two of which are full marks;
    - plain: 1 - formatting.
    """
    length, (low, high) = len(text.strip()), standard.characters
    formatting = min(1.0, sum(bool(pattern.search(text)) for pattern in _MARKDOWN.values()) / 2)
    return {
        "length": min(1.0, length / low, high / length if length else 0.0),
        "variety": distinct_trigrams(text),
        "complete": float(bool(_CLOSED.search(text.strip()))),
        "own_words": float(not _SOURCE_MENTION.search(text)),
        "formatting": formatting,
        "plain": 1.0 - formatting,
    }


def score(text: str, standard: Standard) -> float:
    """The weighted sum of [`score_parts`], from 0 to 1."""
    parts = score_parts(text, standard)
    return sum(weight * parts[name] for name, weight in standard.weights.items())


def faults(text: str, standard: Standard) -> list[str]:
    """Why a reply should not be trained on; empty if nothing speaks against it."""
    text = text.strip()
    prose = _CODE_BLOCK.sub("", text)  # 2 of the chatterbot corpus' answers have asterisks, all of them in code
    most = standard.max_asterisks
    if not re.search(r"\w", _TAG.sub("", text)):
        return ["no letter or digit"]  # "...", or a left-over such as "<noinput>"
    checks = {
        f"under {standard.min_characters} characters": len(text) < standard.min_characters,
        "begins with [ or ends with ]": text.startswith("[") or text.endswith("]"),
        f"more than {most} asterisks": most is not None and prose.count("*") > most,
        "goes round in circles": len(prose.split()) >= _TRIGRAM_WORDS and distinct_trigrams(prose) < _MIN_DISTINCT,
        "speaks for another": bool(_OTHER_SPEAKER.search(prose)),
        f"score under {standard.min_score}": score(text, standard) < standard.min_score,
    }
    return [reason for reason, found in checks.items() if found]


def mark_bad_replies(rows: Iterable[Row], standard: Standard, file: str | Path, rejected: list[Row]) -> Iterator[Row]:
    """Dialogue rows in which each bad reply carries `train: False`; a dialogue with none but bad ones is left out.

    A reply is bad by its [`faults`], or if it says again, in four words or more, what it said before in the dialogue or
    what the user has just said. An opening line, to which no user's turn leads, does not count as a reply that is left.

    Args:
        file: That the rows were read from, for `rejected`.
        rejected: Gets {"file", "dialogue_id", "turn" (from 1 on), "reason", "dropped", "text"} for each bad reply, where
            `dropped` is "training", and for each dialogue that is left out, where it is "dialogue".
    """
    for row in rows:
        messages: list[Row] = []
        own: set[str] = set()
        before = ""
        for turn, message in enumerate(row["messages"], 1):
            words = " ".join(message["content"].casefold().split())
            if message["role"] == "assistant" and message.get("train", True):
                reasons = faults(message["content"], standard)
                if words.count(" ") + 1 >= _WORDS_TO_REPEAT and words in {*own, before}:
                    reasons.append("said before in the dialogue")
                if reasons:
                    message = {**message, "train": False}
                    entry = {"file": str(file), "dialogue_id": row["dialogue_id"], "turn": turn}
                    entry |= {"reason": "; ".join(reasons), "dropped": "training", "text": message["content"]}
                    rejected.append(entry)
            if message["role"] == "assistant":
                own.add(words)
            before = words
            messages.append(message)
        if any(message["role"] == "assistant" and message.get("train", True) for message in messages[1:]):
            yield {**row, "messages": messages}
        else:
            entry = {"file": str(file), "dialogue_id": row["dialogue_id"], "turn": 1, "reason": NO_GOOD_REPLY}
            rejected.append(entry | {"dropped": "dialogue", "text": "\n".join(m["content"] for m in messages)})
