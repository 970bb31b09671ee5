"""Readers: one function a format, from a file to rows; what they leave out goes to `rejected` with a reason.

A dialogue row is {"persona": [facts], "messages": [{"role", "content"}, ...], "dialogue_id", "source"}; user and
assistant alternate. Two keys may be there besides: `candidates` of a row, a list as long as `messages`, for each None
or the texts from which the reply is to be told (the reply among them); `train: False` of a message, a reply that is
context and not trained on. A preference row is as `preferences.py` makes it.

An entry of `rejected` is {"file", "line", "reason", "dropped", "text"}; `dropped` is "dialogue", or "turns" or "line"
when the rest of the dialogue is kept. Rows that share a `dialogue_id` belong together: the split keeps them on one side.
"""

import csv
import difflib
import io
import json
import logging
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import yaml

from rlhf.persona import PromptError, parse_prompt

logger = logging.getLogger(__name__)

T = TypeVar("T")
Row = dict[str, Any]
Record = tuple[int, Row]  # line of the file, its columns

PERSONA_COLUMNS = ("user 1 personas", "user 2 personas")
DIALOGUE_COLUMN = "Best Generated Conversation"
ROW_KEYS = ("persona", "messages", "dialogue_id", "source")

# Names of columns as published files have them, the usual one first; compared without case.
SPEAKER_COLUMNS = ("speaker", "character", "name", "player", "character name")
LINE_COLUMNS = ("line", "text", "dialogue", "utterance", "quote", "playerline")
QUESTION_COLUMNS = ("question", "instruction", "prompt", "query")
ANSWER_COLUMNS = ("answer", "response", "output", "completion", "reply")
CHAT_COLUMNS = ("messages", "conversations")
PREFERENCE_COLUMNS = ("chosen", "rejected")
HUMAN_CHOICE_COLUMNS = ("instruction", "input", "response1", "response2")  # PandaLM's, beside annotator1, 2, ...

# "User 1: hi", "* User 1: hi *", "*User 1:* hi", "**USER 1** : hi", "User1: hi".
_SPEAKER = re.compile(
    r"(?P<open>\*+\s*)?user\s*(?P<user>[12])\s*(?P<close>\**)\s*:(?P<close_after>(?(open)\**))", re.IGNORECASE
)
_STAGE_DIRECTION = re.compile(r"\[.*\]|\(.*\)|\*.*\*")
# The model that wrote these conversations left blanks: "[User 1's name]", "(name)", "my name is User 1".
_PLACEHOLDER = re.compile(
    r"\[|\b(?:user|person) ?_?[12]\b|\((?:\w+ )?(?:names?|username|city|country|age|hometown|link)\)", re.IGNORECASE
)
# Elsewhere a bracket is mostly none: stage directions, code, links. A blank is "[Name]", "[User 1's name]",
# "[insert topic]", "<your email>", "{{user}}" or "+91-XXXXXXXXXX".
_BLANK = re.compile(
    r"(?<![\w\]])\[(?=[\w' ’/-]{1,40}\](?!\())[^\]]*\b(?:names?|username|city|country|state|location|address|date|age|"
    r"company|position|job|title|topic|interests?|hobby|hometown|school|university|phone|email|number|amount|link|your|"
    r"insert|enter)\b[^\]]*\]|<(?:your|insert|enter)\b[^<>\n]*>|\{\{\s*(?:user|char|name)\s*\}\}|(?-i:\bX{4,}\b)",
    re.IGNORECASE,
)
_MIN_TURNS = 3  # gives each of the two speakers one reply
_NO_REPLY = "a model gave no reply"
_TALKS = "conversations"  # the category of a YAML file whose longer lists are conversations

# Reasons for which a dialogue is left out although it is well-formed: they do not tell that a file is not what its reader
# takes it for.
FILTERED = frozenset(
    (
        "placeholder",
        "no reply to a turn of the user",
        f"fewer than {_MIN_TURNS} turns",
        "no majority for one response",
        "chosen and rejected are the same",
        _NO_REPLY,
    )
)

# "ROMEO:", "First Citizen:", "DUKE OF YORK:", "Rick (to Morty): hi"; a sentence that ends in a colon is no name.
_SCRIPT_NAME = re.compile(
    r"(?P<name>(?:[^\W\d_]|\d)[\w.'’&-]*(?: +(?:of|the|and|to|in|young|murderer|[A-Z0-9#&][\w.,'’&-]*)){0,4})"
    r"\s*(?:\([^()]*\)|\[[^\[\]]*\])?\s*:(?:\s+|$)"
)
_BLOCK_NAME = re.compile(r"(?P<name>[^\W_][^:.!?]{0,39}):")  # alone on the first line of a paragraph: "Senators, &C:"
_SCENE_HEADING = re.compile(
    r"\[?(?i:act|scene|episode|chapter)(?:\s+(?:\d+|[IVXLC]+)\b|\s*:).*|(?:INT|EXT)\..*|[-*=_#~ ]{3,}"
)
_SCENE_COLUMN = re.compile(r"\b(?:scene|episode|season|act|chapter|movie|film|play)\b", re.IGNORECASE)
_MAX_GAP = 4  # turns of others between two replies of the character; behind more of them another dialogue begins
_CLOSE_NAME = 0.85  # difflib's ratio from which a name that is not in the script is taken for one that is


class DataError(ValueError):
    """A file or a set of rows that cannot be used; the message says which, what was expected and what was found."""


class UnknownCharacterError(DataError):
    """The script has nobody of that name; the message lists who speaks most often."""


class _Fault(ValueError):
    """What is wrong with one record, which is then rejected."""


def _three_tries(load: Callable[[], T], what: str, tries: int = 3, pause_seconds: float = 2.0) -> T:
    """The value of `load`, tried again after a pause: a network drive or the hub may be away for a moment.

    Raises:
        DataError: if the last try fails too.
        FileNotFoundError, IsADirectoryError, PermissionError, ValueError: at once; waiting does not help.
    """
    for attempt in range(1, tries + 1):
        try:
            return load()
        except (FileNotFoundError, IsADirectoryError, PermissionError, ValueError):
            raise
        except Exception as error:  # the hub's client raises its HTTP library's own errors, of no common class
            if attempt == tries:
                raise DataError(f"`path`: cannot read {what} after {tries} tries: {error}") from error
            logger.warning(
                "Try %d of %d to read %s failed (%s); again in %g s.", attempt, tries, what, error, pause_seconds
            )
            time.sleep(pause_seconds)
    raise ValueError(f"`tries` must be at least 1, got {tries}")


def _read(path: str | Path) -> str:
    """The text of a file.

    Raises:
        DataError: if there is no such file, it is not UTF-8, or three tries fail.
    """
    try:
        return _three_tries(Path(path).read_bytes, str(path)).decode("utf-8-sig")
    except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
        raise DataError(f"`path`: cannot read {path} ({error.strerror}). Name a file that exists.") from error
    except UnicodeDecodeError as error:
        raise DataError(f"`path`: {path} is not UTF-8 at byte {error.start}. Convert it to UTF-8.") from error


def _reject(rejected: list[Row], file: str | Path, line: int, reason: str, dropped: str, text: str) -> None:
    rejected.append({"file": str(file), "line": line, "reason": reason, "dropped": dropped, "text": text})


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _facts(persona: Sequence[str], needed: bool = True) -> list[str]:
    """The keyword `persona`, checked."""
    if isinstance(persona, str) or not all(map(_is_text, persona)) or (needed and not persona):
        raise DataError(
            f"`persona` must be a list of facts, none of them blank, got {persona!r}. This format says nothing of who "
            "replies; name at least one fact, such as 'my name is Romeo .'"
        )
    return list(persona)


def _longest_without(texts: Sequence[str], pattern: re.Pattern[str]) -> tuple[int, int]:
    """Start and end of the longest stretch of turns in which the pattern does not occur."""
    breaks = [-1, *(index for index, text in enumerate(texts) if pattern.search(text)), len(texts)]
    return max(((left + 1, right) for left, right in pairwise(breaks)), key=lambda span: span[1] - span[0])


def _dialogue(row: Row, file: str | Path, lines: Sequence[int], rejected: list[Row]) -> Iterator[Row]:
    """The row, cut to its longest stretch of turns without a blank; or none, if no reply follows a user's turn in it.

    Args:
        lines: Where in the file each message stands.
    """
    messages = row["messages"]
    texts = [message["content"] for message in messages]
    start, end = _longest_without(texts, _BLANK)
    if all(message["role"] != "assistant" for message in messages[start + 1 : end]):
        cut = end - start < len(messages)
        reason = "placeholder" if cut else "no reply to a turn of the user"
        return _reject(rejected, file, lines[0] if lines else 1, reason, "dialogue", "\n".join(texts))
    for left, right in ((0, start), (end, len(messages))):
        if left < right:
            _reject(rejected, file, lines[left], "placeholder", "turns", "\n".join(texts[left:right]))
    row["messages"] = messages[start:end]
    if "candidates" in row:
        row["candidates"] = row["candidates"][start:end]
    yield row


# -- records of CSV, JSON and JSON lines -------------------------------------------------------------------------------


def _csv_records(path: str | Path, rejected: list[Row]) -> tuple[list[str], Iterator[Record]]:
    """Header and records of a CSV file, each with the line on which it begins; blank lines are left out.

    Raises:
        DataError: if the file cannot be read; on the way through the records, if it is no CSV.
    """
    reader = csv.reader(io.StringIO(_read(path), newline=""), strict=True)

    def rows() -> Iterator[tuple[int, list[str]]]:
        line = 1
        try:
            for cells in reader:
                yield line, cells
                line = reader.line_num + 1
        except csv.Error as error:
            raise DataError(f"{path}:{reader.line_num} is not CSV: {error}") from error

    lines = rows()
    _, header = next(lines, (1, []))

    def records() -> Iterator[Record]:
        for line, cells in lines:
            if cells and len(cells) != len(header):
                text = f"{len(cells)} cells, {len(header)} columns"
                _reject(rejected, path, line, "wrong number of cells", "dialogue", text)
            elif cells:
                yield line, dict(zip(header, cells, strict=True))

    return header, records()


def _json_lines(path: str | Path, rejected: list[Row]) -> Iterator[tuple[int, str, Row]]:
    """(line, its text, the object on it); a line that is no JSON object is rejected."""
    for number, line in enumerate(_read(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            _reject(rejected, path, number, f"not JSON: {error.msg} at character {error.pos}", "dialogue", line)
            continue
        if isinstance(value, dict):
            yield number, line, value
        else:
            _reject(rejected, path, number, "not a JSON object", "dialogue", line)


def _json_array(path: str | Path, text: str, rejected: list[Row]) -> Iterator[Record]:
    """The objects of a JSON list, each with the line on which it begins."""
    decoder = json.JSONDecoder()
    gap = re.compile(r"[\s,]*")
    at, line = text.index("[") + 1, 1 + text.count("\n", 0, text.index("[") + 1)
    while text[(start := gap.match(text, at).end()) :][:1] not in ("]", ""):  # type: ignore[union-attr]
        line += text.count("\n", at, start)
        value, end = decoder.raw_decode(text, start)
        if isinstance(value, dict):
            yield line, value
        else:
            _reject(rejected, path, line, "not a JSON object", "dialogue", text[start:end])
        line += text.count("\n", start, end)
        at = end


def _load_json(path: str | Path, text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{error.lineno} is not JSON: {error.msg}. Name JSON lines *.jsonl.") from error


def _records(path: str | Path, rejected: list[Row]) -> tuple[list[str], Iterable[Record]]:
    """Columns and records of a file *.csv, *.json (a list of objects) or, by any other name, of JSON lines."""
    suffix = Path(path).suffix.lower()
    if suffix == ".csv":
        return _csv_records(path, rejected)
    if suffix == ".json":
        text = _read(path)
        if not isinstance(_load_json(path, text), list):
            raise DataError(f"`path`: {path} must hold a list of objects; found another JSON value.")
        records = list(_json_array(path, text, rejected))
    else:
        records = [(line, record) for line, _, record in _json_lines(path, rejected)]
    return list(dict.fromkeys(key for _, record in records for key in record)), records


def _column(columns: Sequence[str], names: Sequence[str]) -> str | None:
    """The first of `names` among the columns, as it is spelled there."""
    spelled = {column.strip().casefold(): column for column in reversed(columns)}
    return next((spelled[name] for name in names if name in spelled), None)


def _needed(columns: Sequence[str], wanted: Mapping[str, Sequence[str]], path: str | Path) -> list[str]:
    """A column for each wanted thing.

    Raises:
        DataError: naming the expected and the found columns, if one is missing.
    """
    found = {what: _column(columns, names) for what, names in wanted.items()}
    if None in found.values():
        expected = "; ".join(f"for the {what} one of {', '.join(map(repr, names))}" for what, names in wanted.items())
        raise DataError(
            f"`path`: {path} needs a column {expected}; found: {', '.join(map(repr, columns)) or 'no columns'}"
        )
    return [name for name in found.values() if name is not None]


# -- Synthetic-Persona-Chat -------------------------------------------------------------------------------------------


def synthetic_persona_chat(path: str | Path, rejected: list[Row]) -> Iterator[Row]:
    """Rows of a CSV file of Synthetic-Persona-Chat (https://github.com/google-research-datasets/Synthetic-Persona-Chat).

    Each conversation gives two rows with the same `dialogue_id`, one for each user as the character: that user's turns
    are the assistant's, that user's facts alone are the persona. Consecutive turns of a speaker are joined; lines that
    are stage directions are left out. About 40 % of the conversations hold a placeholder ("[User 1's name]"), mostly
    in the greeting: of these the longest stretch of turns without one is kept.

    Raises:
        DataError: if the file cannot be read, is no CSV, or lacks a column.
    """
    header, records = _csv_records(path, rejected)
    wanted = (*PERSONA_COLUMNS, DIALOGUE_COLUMN)
    if any(header.count(name) != 1 for name in wanted):
        raise DataError(
            f"`path`: {path} needs the columns {', '.join(map(repr, wanted))}, once each; "
            f"found: {', '.join(map(repr, header)) or 'an empty file'}"
        )
    yield from _conversations(records, path, rejected)


def _conversations(records: Iterable[Record], path: str | Path, rejected: list[Row]) -> Iterator[Row]:
    for number, (line, record) in enumerate(records, 1):
        yield from _conversation(path, number, line, record, rejected)


def _conversation(path: str | Path, number: int, line: int, record: Row, rejected: list[Row]) -> Iterator[Row]:
    """The two rows of the conversation whose record begins at `line`, or none."""

    def reject(at: int, reason: str, dropped: str, text: str) -> None:
        _reject(rejected, path, at, reason, dropped, text)

    record = {name: str(value or "") for name, value in record.items()}
    personas = [[fact.strip() for fact in record[name].splitlines() if fact.strip()] for name in PERSONA_COLUMNS]
    if not all(personas):
        return reject(line, "empty persona", "dialogue", record[DIALOGUE_COLUMN])

    # The cells before the conversation take up lines of the file too.
    line += sum(record[name].count("\n") for name in list(record)[: list(record).index(DIALOGUE_COLUMN)])
    turns: list[tuple[int, str, int]] = []  # speaker, text, line of the file
    for at, text in enumerate(record[DIALOGUE_COLUMN].split("\n"), line):
        text = text.strip()
        speaker = _SPEAKER.match(text)
        if not text:
            continue
        if speaker is None and _STAGE_DIRECTION.fullmatch(text):
            reject(at, "stage direction", "line", text)
            continue
        content = "" if speaker is None else text[speaker.end() :].strip()
        if speaker and speaker["open"] and not (speaker["close"] or speaker["close_after"]):
            content = content.rstrip("* ")  # the emphasis spans the whole line
        if speaker is None or not content:
            return reject(at, "unparseable line", "dialogue", text)
        user = int(speaker["user"]) - 1
        if turns and turns[-1][0] == user:
            turns[-1] = (user, f"{turns[-1][1]} {content}", turns[-1][2])
        else:
            turns.append((user, content, at))

    start, end = _longest_without([text for _, text, _ in turns], _PLACEHOLDER)
    if end - start < _MIN_TURNS:
        reason = "placeholder" if end - start < len(turns) else f"fewer than {_MIN_TURNS} turns"
        return reject(line, reason, "dialogue", record[DIALOGUE_COLUMN])
    for outside in (turns[:start], turns[end:]):
        if outside:
            reject(
                outside[0][2],
                "placeholder",
                "turns",
                "\n".join(f"User {user + 1}: {text}" for user, text, _ in outside),
            )
    for character in (0, 1):
        yield {
            "persona": personas[character],
            "messages": [
                {"role": "assistant" if user == character else "user", "content": text}
                for user, text, _ in turns[start:end]
            ],
            "dialogue_id": f"{Path(path).stem}-{number}",
            "source": "synthetic_persona_chat",
        }


# -- dialogue rows -----------------------------------------------------------------------------------------------------


def jsonl(path: str | Path, rejected: list[Row]) -> Iterator[Row]:
    """Rows of a JSON-lines file that are already dialogue rows; a row with any fault is rejected, all faults named.

    Raises:
        DataError: if the file cannot be read.
    """
    for number, line, row in _json_lines(path, rejected):
        faults = _faults(row)
        if faults:
            _reject(rejected, path, number, "; ".join(faults), "dialogue", line)
        else:
            yield row


def _faults(row: Row) -> list[str]:
    faults = [f"`{key}` is missing" for key in ROW_KEYS if key not in row]
    for key in row.keys() - {*ROW_KEYS, "candidates"}:
        close = difflib.get_close_matches(key, ROW_KEYS, 1)
        faults.append(f"unknown key `{key}`" + (f", did you mean `{close[0]}`?" if close else ""))
    faults += [
        f"`{key}` is no text or blank" for key in ("dialogue_id", "source") if key in row and not _is_text(row[key])
    ]
    persona, messages = row.get("persona", ["-"]), row.get("messages", [])
    if not isinstance(persona, list) or not persona or not all(map(_is_text, persona)):
        faults.append("`persona` is no list of facts, or empty, or has a blank fact")
    if not isinstance(messages, list) or "messages" in row and not messages:
        return [*faults, "`messages` is no list, or empty"]
    previous = None
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict) or message.keys() - {"train"} != {"role", "content"}:
            return [*faults, f"message {number} has not exactly the keys role and content, and perhaps train"]
        if message["role"] not in ("user", "assistant") or message["role"] == previous:
            faults.append(f"message {number}: user and assistant must alternate, got the role {message['role']!r}")
        if not _is_text(message["content"]):
            faults.append(f"message {number} has no text or is blank")
        if "train" in message and (message["role"] != "assistant" or not isinstance(message["train"], bool)):
            faults.append(f"message {number}: `train` must be true or false, and of a reply, got {message['train']!r}")
        previous = message["role"]
    candidates = row.get("candidates")
    if candidates is not None and not (isinstance(candidates, list) and len(candidates) == len(messages)):
        faults.append("`candidates` is no list as long as `messages`")
    elif candidates and any(c is not None and not (isinstance(c, list) and all(map(_is_text, c))) for c in candidates):
        faults.append("`candidates` holds something that is neither null nor a list of texts")
    return faults


# -- ConvAI2 -----------------------------------------------------------------------------------------------------------


def convai2(path: str | Path, rejected: list[Row]) -> Iterator[Row]:
    """Rows of a text file of ConvAI2 / PersonaChat, in the format of ParlAI (https://parl.ai, task `convai2`).

    A line is numbered, from 1 on in each dialogue: "1 your persona: FACT", or the partner's text, the reply, a reward
    and the candidates joined by "|", with tabs between. The persona's owner is the assistant. The row has
    `candidates`, where the file has them: for each reply the texts to choose from (the reply is one of them, in the
    published files the last), None for the user's turns. The partner's persona, if stated, is left out. The published
    training files hold each dialogue twice, once from either side and one behind the other: the two share a
    `dialogue_id`.

    Raises:
        DataError: if the file cannot be read, or no line of it is numbered.
    """
    lines = [(at, line) for at, line in enumerate(_read(path).split("\n"), 1) if line.strip()]
    numbered = [(at, *line.partition(" ")[::2]) for at, line in lines]
    if not any(number.isdigit() for _, number, _ in numbered):
        raise DataError(f"`path`: {path} needs lines such as '1 your persona: i ski .'; found {lines[:1]}")
    episodes: list[list[tuple[int, str, str]]] = []
    for at, number, text in numbered:
        if number == "1" or not episodes:
            episodes.append([])
        episodes[-1].append((at, number, text.rstrip("\r")))
    previous: tuple[str, set[str]] = ("", set())  # dialogue_id and texts
    for episode in episodes:
        for row in _episode(episode, path, rejected):
            texts = {message["content"] for message in row["messages"]}
            if 2 * len(texts & previous[1]) > len(texts):
                row["dialogue_id"] = previous[0]
            previous = (row["dialogue_id"], texts)
            yield row


def _episode(episode: Sequence[tuple[int, str, str]], path: str | Path, rejected: list[Row]) -> Iterator[Row]:
    first, whole = episode[0][0], "\n".join(f"{number} {text}" for _, number, text in episode)
    persona: list[str] = []
    messages: list[Row] = []
    candidates: list[list[str] | None] = []
    lines: list[int] = []
    partner: list[str] = []
    for at, number, text in episode:
        owner, colon, fact = text.partition("persona:")
        if colon and owner.strip() in ("your", "partner's"):
            (persona if owner.strip() == "your" else partner).append(fact.strip())
            continue
        cells = [cell.strip() for cell in text.split("\t")]
        if not number.isdigit() or len(cells) < 2 or not cells[0] or not cells[1]:
            return _reject(rejected, path, at, "unparseable line", "dialogue", f"{number} {text}"[:200])
        choices = [choice.strip() for choice in cells[3].split("|")] if len(cells) > 3 else None
        if choices is not None and cells[1] not in choices:
            return _reject(rejected, path, at, "the reply is none of the candidates", "dialogue", cells[1])
        if cells[0] != "__SILENCE__":  # what ParlAI writes where the persona's owner opens the dialogue
            messages.append({"role": "user", "content": cells[0]})
            candidates.append(None)
            lines.append(at)
        messages.append({"role": "assistant", "content": cells[1]})
        candidates.append(choices)
        lines.append(at)
    if not persona or not all(persona):
        return _reject(rejected, path, first, "empty persona", "dialogue", whole[:200])
    if any(left["role"] == right["role"] for left, right in pairwise(messages)):
        return _reject(rejected, path, first, "silence within a dialogue", "dialogue", whole[:200])
    if partner:
        _reject(rejected, path, first, "partner's persona", "line", "\n".join(partner))
    row = {"persona": persona, "messages": messages, "dialogue_id": f"{Path(path).stem}-{first}", "source": "convai2"}
    if any(choices is not None for choices in candidates):
        row["candidates"] = candidates
    yield from _dialogue(row, path, lines, rejected)


# -- scripts -----------------------------------------------------------------------------------------------------------


class _Turn(NamedTuple):
    scene: Any
    line: int
    speaker: str
    text: str


def script(path: str | Path, rejected: list[Row], *, character: str, persona: Sequence[str]) -> Iterator[Row]:
    """Dialogues of one character of a script: whoever speaks before the character is the user.

    A file *.csv has a column for the speaker and one for the words (`SPEAKER_COLUMNS`, `LINE_COLUMNS`); a scene ends
    where a column such as "episode" or "scene" changes and at a record with neither speaker nor words. Any other file
    is text: blocks "Speaker:" with the words on the lines below, up to a blank line, or lines "Speaker: words", which
    may go on on the next line; a scene ends at a heading (SCENE, ACT, INT., ---). Consecutive turns of a speaker are
    joined. A dialogue is a run of replies in one scene with at most `_MAX_GAP` turns of others between two of them,
    of which the last is the user's; the others are left out, and their number logged.

    Args:
        character: Compared without case, spaces, punctuation and what is in brackets; a name that is not in the script
            stands for the one nearest to it, from a difflib ratio of 0.85 on.
        persona: Facts of the character, for every row.

    Raises:
        DataError: if the file cannot be read, lacks a column, or has no speakers.
        UnknownCharacterError: if nobody of that name speaks; lists those who speak most often.
    """
    facts = _facts(persona)
    if Path(path).suffix.lower() == ".csv":
        columns, records = _csv_records(path, rejected)
        turns = _recorded_turns(columns, records, path, rejected)
    else:
        turns = _written_turns(_read(path), path, rejected)
    yield from _scenes(turns, character, facts, path, rejected)


def _recorded_turns(
    columns: Sequence[str], records: Iterable[Record], path: str | Path, rejected: list[Row]
) -> list[_Turn]:
    speaker_column, line_column = _needed(columns, {"speaker": SPEAKER_COLUMNS, "words": LINE_COLUMNS}, path)
    scene_columns = [name for name in columns if _SCENE_COLUMN.search(name)]
    turns: list[_Turn] = []
    gaps = 0
    for line, record in records:
        speaker, text = (str(record.get(name) or "").strip() for name in (speaker_column, line_column))
        if speaker and text:
            scene = (gaps, *(record.get(name) for name in scene_columns))
            turns.append(_Turn(scene, line, speaker, " ".join(text.split())))
        elif speaker or text:
            _reject(rejected, path, line, "no words" if speaker else "no speaker", "line", speaker or text)
        else:
            gaps += 1
    return turns


def _written_turns(text: str, path: str | Path, rejected: list[Row]) -> list[_Turn]:
    """Turns of a text in blocks or lines; what is between them (narration, stage directions) is rejected."""
    blocks: list[tuple[int, int, str, list[str]]] = []  # scene, line, speaker, words
    scene = 0
    speaking = in_block = False  # both end with the paragraph
    for number, line in enumerate(map(str.strip, text.split("\n")), 1):
        # Within a block a line that begins like "Speaker: words" is part of the speech.
        head = None if in_block else _SCRIPT_NAME.match(line) or (not speaking and _BLOCK_NAME.fullmatch(line)) or None
        if not line:
            speaking = in_block = False
        elif _SCENE_HEADING.fullmatch(line):
            scene, speaking, in_block = scene + 1, False, False
        elif _STAGE_DIRECTION.fullmatch(line):
            _reject(rejected, path, number, "stage direction", "line", line)
        elif head:
            blocks.append((scene, number, head["name"], [line[head.end() :]]))
            speaking, in_block = True, head.end() == len(line)
        elif speaking:
            blocks[-1][3].append(line)
        else:
            _reject(rejected, path, number, "no speaker", "line", line)
    turns = [_Turn(scene, line, speaker, " ".join(filter(None, words))) for scene, line, speaker, words in blocks]
    for turn in turns:
        if not turn.text:
            _reject(rejected, path, turn.line, "no words", "line", turn.speaker)
    return [turn for turn in turns if turn.text]


def _name_key(name: str) -> str:
    return re.sub(r"\(.*?\)|\[.*?\]|[\W_]", "", name).casefold()


def _find_character(turns: Sequence[_Turn], character: str, path: str | Path) -> str:
    """The key of the character's name in the script."""
    spoken = Counter(_name_key(turn.speaker) for turn in turns)
    wanted = _name_key(character)
    if wanted in spoken:
        return wanted
    close = difflib.get_close_matches(wanted, spoken, 1, _CLOSE_NAME)
    spelled = {_name_key(turn.speaker): turn.speaker for turn in reversed(turns)}
    if not close:
        frequent = ", ".join(f"{spelled[key]} ({count})" for key, count in spoken.most_common(10))
        raise UnknownCharacterError(
            f"`character`: nobody in {path} is called {character!r}. Most frequent: {frequent or 'no speaker at all'}."
        )
    logger.warning("`character` %r is not in %s; taken for %r.", character, path, spelled[close[0]])
    return close[0]


def _scenes(
    turns: Sequence[_Turn], character: str, facts: list[str], path: str | Path, rejected: list[Row]
) -> Iterator[Row]:
    key = _find_character(turns, character, path)
    unused = 0
    for _, scene in groupby(turns, lambda turn: turn.scene):
        joined: list[_Turn] = []
        for turn in scene:
            if joined and _name_key(joined[-1].speaker) == _name_key(turn.speaker):
                joined[-1] = joined[-1]._replace(text=f"{joined[-1].text} {turn.text}")
            else:
                joined.append(turn)
        replies = [index for index, turn in enumerate(joined) if _name_key(turn.speaker) == key]
        starts = [0, *(i for i in range(1, len(replies)) if replies[i] - replies[i - 1] - 1 > _MAX_GAP), len(replies)]
        unused += len(joined)
        for run in (replies[left:right] for left, right in pairwise(starts)):
            used = [joined[i] for reply in run for i in (reply - 1, reply) if i >= 0]
            unused -= len(used)
            messages = [
                {"role": "assistant" if _name_key(turn.speaker) == key else "user", "content": turn.text}
                for turn in used
            ]
            row = {"persona": facts, "messages": messages, "source": "script"}
            if used:
                row["dialogue_id"] = f"{Path(path).stem}-{used[0].line}"
                yield from _dialogue(row, path, [turn.line for turn in used], rejected)
    logger.info("%s: %d turns of others do not stand before a reply of %r and were left out.", path, unused, character)


# -- questions and answers ---------------------------------------------------------------------------------------------


def question_answer(path: str | Path, rejected: list[Row], *, persona: Sequence[str]) -> Iterator[Row]:
    """Questions and answers, by the file's ending; a folder is read file by file.

    - *.csv, *.jsonl, *.json with a list: a column for the question and one for the answer (`QUESTION_COLUMNS`,
      `ANSWER_COLUMNS`); what stands in a column "input" or "context" beside them goes below the question;
    - *.json with {question: answer};
    - *.json with {"intents": [{"tag", "patterns", "responses"}]}: each pattern is a question, the responses answer
      them in turn, and none is left out. The rows of an intent share a `dialogue_id`, as they say the same;
    - *.yml, *.yaml with "conversations", a list of lists of turns (https://github.com/gunthercox/chatterbot-corpus). A
      list of more than two is a conversation where `categories` names "conversations". Elsewhere in that corpus some are
      conversations and more are several answers to the first turn, which nothing tells apart: there the first answer is
      used.

    Args:
        persona: Facts of whoever answers, for every row.

    Raises:
        DataError: if the file cannot be read or is of none of these shapes.
    """
    facts = _facts(persona)
    if Path(path).is_dir():
        for file in sorted(Path(path).iterdir()):
            if file.suffix.lower() in (".csv", ".json", ".jsonl", ".yml", ".yaml"):
                yield from question_answer(file, rejected, persona=facts)
        return
    suffix = Path(path).suffix.lower()
    if suffix in (".yml", ".yaml"):
        yield from _yaml_conversations(path, rejected, facts)
        return
    if suffix == ".json" and isinstance(value := _load_json(path, text := _read(path)), dict):
        pairs = _intents(value, text, path, rejected) if "intents" in value else _mapping(value, text, path, rejected)
        for number, question, answer, dialogue_id in pairs:
            yield from _pair(question, answer, facts, dialogue_id, path, number, rejected)
        return
    columns, records = _records(path, rejected)
    yield from _questions(columns, records, facts, path, rejected)


def _pair(
    question: Any, answer: Any, facts: list[str], dialogue_id: str, path: str | Path, line: int, rejected: list[Row]
) -> Iterator[Row]:
    if not _is_text(question) or not _is_text(answer):
        what = "question" if not _is_text(question) else "answer"
        return _reject(rejected, path, line, f"the {what} is no text or blank", "dialogue", f"{question}\n{answer}")
    messages = [{"role": "user", "content": question.strip()}, {"role": "assistant", "content": answer.strip()}]
    row = {"persona": facts, "messages": messages, "dialogue_id": dialogue_id, "source": "question_answer"}
    yield from _dialogue(row, path, [line, line], rejected)


def _questions(
    columns: Sequence[str], records: Iterable[Record], facts: list[str], path: str | Path, rejected: list[Row]
) -> Iterator[Row]:
    asked, answered = _needed(columns, {"question": QUESTION_COLUMNS, "answer": ANSWER_COLUMNS}, path)
    more = _column(columns, ("input", "context"))
    for line, record in records:
        question, context = record.get(asked), record.get(more) if more else None
        if _is_text(question) and _is_text(context):
            question = f"{question}\n\n{context}"
        yield from _pair(question, record.get(answered), facts, f"{Path(path).stem}-{line}", path, line, rejected)


def _line_of(text: str, value: Any) -> int:
    """The line on which a value of a JSON text first stands; 1 if it is not written as expected."""
    found = (text.find(json.dumps(value, ensure_ascii=ascii_only)) for ascii_only in (False, True))
    return 1 + text.count("\n", 0, max(0, *found))


def _mapping(value: Row, text: str, path: str | Path, rejected: list[Row]) -> Iterator[tuple[int, str, Any, str]]:
    if any(isinstance(answer, dict | list) for answer in value.values()):
        raise DataError(
            f"`path`: {path} must be {{question: answer}}, {{'intents': [...]}} or a list of objects; "
            f"found the keys {', '.join(map(repr, list(value)[:8]))} with other values"
        )
    seen: set[str] = set()
    for question, answer in json.loads(text, object_pairs_hook=list):
        line = _line_of(text, question)
        if question in seen:  # of two equal keys an ordinary reader keeps the last, and says nothing
            _reject(rejected, path, line, "the question stands twice as a key", "dialogue", f"{question}\n{answer}")
        else:
            yield line, question, answer, f"{Path(path).stem}-{len(seen) + 1}"
        seen.add(question)


def _intents(value: Row, text: str, path: str | Path, rejected: list[Row]) -> Iterator[tuple[int, Any, Any, str]]:
    if not isinstance(value["intents"], list):
        raise DataError(f"`path`: {path} must have a list of intents, got {type(value['intents']).__name__}")
    for number, intent in enumerate(value["intents"], 1):
        tag = intent.get("tag", number) if isinstance(intent, dict) else number
        patterns, responses = (
            intent.get(key) if isinstance(intent, dict) else None for key in ("patterns", "responses")
        )
        if not (isinstance(patterns, list) and isinstance(responses, list) and patterns and responses):
            reason = "an intent needs lists `patterns` and `responses`, neither empty"
            _reject(rejected, path, _line_of(text, tag), reason, "dialogue", json.dumps(intent, ensure_ascii=False))
            continue
        for index in range(max(len(patterns), len(responses))):
            pattern, response = patterns[index % len(patterns)], responses[index % len(responses)]
            yield _line_of(text, pattern), pattern, response, f"{Path(path).stem}-{tag}"


def _yaml_conversations(path: str | Path, rejected: list[Row], facts: list[str]) -> Iterator[Row]:
    try:  # nodes know their lines, and keep "1963" and "no" as they are written
        root = yaml.compose(_read(path), Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        raise DataError(f"`path`: {path} is not YAML: {error}") from error
    keys = {key.value: node for key, node in root.value} if isinstance(root, yaml.MappingNode) else {}
    if not isinstance(keys.get("conversations"), yaml.SequenceNode):
        raise DataError(
            f"`path`: {path} needs a list `conversations`; found: {', '.join(map(repr, keys)) or 'no keys'}"
        )
    categories = keys.get("categories")
    talks = isinstance(categories, yaml.SequenceNode) and _TALKS in [node.value for node in categories.value]
    for node in keys["conversations"].value:
        line = node.start_mark.line + 1
        turns = node.value if isinstance(node, yaml.SequenceNode) else []
        texts = [turn.value.strip() for turn in turns if isinstance(turn, yaml.ScalarNode)]
        if not texts or len(texts) != len(turns) or not all(texts):
            text = str(node.value) if isinstance(node, yaml.ScalarNode) else "\n".join(texts)
            _reject(rejected, path, line, "not a list of texts, or one is blank", "dialogue", text)
            continue
        lines = [turn.start_mark.line + 1 for turn in turns]
        dialogue_id = f"{Path(path).stem}-{line}"
        if len(texts) > 2 and not talks:
            reason = f"more than one answer, or no category {_TALKS!r}"
            _reject(rejected, path, lines[2], reason, "turns", "\n".join(texts[2:]))
            texts = texts[:2]
        messages = [
            {"role": "assistant" if index % 2 else "user", "content": text} for index, text in enumerate(texts)
        ]
        row = {"persona": facts, "messages": messages, "dialogue_id": dialogue_id, "source": "question_answer"}
        yield from _dialogue(row, path, lines, rejected)


# -- chat messages -----------------------------------------------------------------------------------------------------


def messages(path: str | Path, rejected: list[Row], *, persona: Sequence[str] = ()) -> Iterator[Row]:
    """Dialogues of a JSON-lines file of chat messages: {"messages": [{"role", "content"}, ...]} on a line.

    A system message at the start becomes the persona, one fact a line. `conversations` with {"from": "human" | "gpt",
    "value"} is read too. Consecutive turns of a role are joined.

    Args:
        persona: Facts for a dialogue without a system message; without them it is rejected.

    Raises:
        DataError: if the file cannot be read, or no record has such a column.
    """
    columns, records = _records(path, rejected)
    yield from _chats(columns, records, _facts(persona, needed=False), path, rejected)


def _chats(
    columns: Sequence[str], records: Iterable[Record], facts: list[str], path: str | Path, rejected: list[Row]
) -> Iterator[Row]:
    (column,) = _needed(columns, {"dialogue": CHAT_COLUMNS}, path)
    for line, record in records:
        try:
            stated, turns = _chat(record.get(column), column)
            if not (stated or facts):
                raise _Fault("no persona: no system message, and `persona` has no facts")
        except _Fault as fault:
            _reject(rejected, path, line, str(fault), "dialogue", json.dumps(record, default=str))
            continue
        id = record.get("dialogue_id") or record.get("id") or line
        row = {"persona": stated or facts, "messages": turns, "dialogue_id": f"{Path(path).stem}-{id}"}
        yield from _dialogue({**row, "source": "messages"}, path, [line] * len(turns), rejected)


def _chat(value: Any, field: str) -> tuple[list[str], list[Row]]:
    """Facts of the system message, and the turns, in which user and assistant alternate; raises _Fault."""
    if not isinstance(value, list) or not value:
        raise _Fault(f"`{field}` is no list of messages, or empty")
    facts: list[str] = []
    turns: list[Row] = []
    for number, message in enumerate(value, 1):
        if not isinstance(message, dict):
            raise _Fault(f"message {number} is no object")
        role: Any = message.get("role", message.get("from"))
        content: Any = message.get("content", message.get("value"))
        role = {"human": "user", "gpt": "assistant"}.get(role, role)
        if not _is_text(content):
            raise _Fault(f"message {number} has no text or is blank")
        if role == "system" and number == 1:
            facts = [fact.strip() for fact in content.splitlines() if fact.strip()]
        elif role not in ("user", "assistant"):
            raise _Fault(f"message {number}: the role must be user or assistant, or system at the start, got {role!r}")
        elif turns and turns[-1]["role"] == role:
            turns[-1] = {"role": role, "content": f"{turns[-1]['content']}\n{content.strip()}"}
        else:
            turns.append({"role": role, "content": content.strip()})
    return facts, turns


# -- preferences -------------------------------------------------------------------------------------------------------


def preference(path: str | Path, rejected: list[Row], *, persona: Sequence[str] = ()) -> Iterator[Row]:
    """Preference rows {"persona", "prompt", "chosen", "rejected", "dialogue_id", "kind"} of a JSON or JSON-lines file.

    - `prompt`, `chosen`, `rejected`: texts or lists of messages. Where `chosen` and `rejected` are whole dialogues, what
      is before their last reply must be the same in both, and is the prompt if there is no other. A prompt in the text
      form [PERSONA] ... is taken apart. The kind is the record's, or "given".
    - `instruction`, `input`, `response1`, `response2`, `annotator1`, ...: people's votes (0 tie, 1, 2), as in PandaLM's
      test set. More than half of them must agree on one response. The kind is "human".

    The persona is the record's list `persona`, or the system message, one fact a line. Records with the same prompt and
    no id of their own share a `dialogue_id`.

    Args:
        persona: Facts for a record without a persona; without them it is rejected.

    Raises:
        DataError: if the file cannot be read, or lacks the columns of both shapes.
    """
    columns, records = _records(path, rejected)
    yield from _preferences(columns, records, _facts(persona, needed=False), path, rejected)


def _preferences(
    columns: Sequence[str], records: Iterable[Record], facts: list[str], path: str | Path, rejected: list[Row]
) -> Iterator[Row]:
    voted = set(HUMAN_CHOICE_COLUMNS) <= set(columns) and any(name.startswith("annotator") for name in columns)
    if not voted and not set(PREFERENCE_COLUMNS) <= set(columns):
        shapes = f"{(*PREFERENCE_COLUMNS, 'prompt')} or {(*HUMAN_CHOICE_COLUMNS, 'annotator1', '...')}"
        found = ", ".join(map(repr, columns)) or "no columns"
        raise DataError(f"`path`: {path} needs the columns {shapes}; found: {found}")
    asked: dict[str, int] = {}  # the line of each prompt's first record: its pairs belong together
    for line, record in records:
        try:
            row = _voted(record) if voted else _stated(record)
            row["persona"] = row["persona"] or facts
            _check_pair(row)
        except _Fault as fault:
            _reject(rejected, path, line, str(fault), "dialogue", json.dumps(record, default=str))
            continue
        first = asked.setdefault(json.dumps(row["prompt"]), line)
        id = record.get("dialogue_id") or record.get("id") or first
        kind = "human" if voted else record.get("kind") or "given"
        yield {**row, "dialogue_id": f"{Path(path).stem}-{id}", "kind": str(kind)}


def _voted(record: Row) -> Row:
    """Prompt and replies of a record on which people voted; raises _Fault unless one response has the majority."""
    votes = [value for name, value in record.items() if name.startswith("annotator")]
    winner = next((side for side in (1, 2) if 2 * votes.count(side) > len(votes)), None)
    if winner is None:
        raise _Fault("no majority for one response")
    if not _is_text(record.get("instruction")):
        raise _Fault("`instruction` is no text or blank")
    if not (_is_text(record.get("response1")) and _is_text(record.get("response2"))):
        raise _Fault(_NO_REPLY)
    prompt = record["instruction"].strip()
    if _is_text(record.get("input")):
        prompt += f"\n\n{record['input'].strip()}"
    better, worse = (record[f"response{side}"].strip() for side in (winner, 3 - winner))
    return {"persona": [], "prompt": _user(prompt), "chosen": _assistant(better), "rejected": _assistant(worse)}


def _stated(record: Row) -> Row:
    """Prompt and replies of a record that names them; raises _Fault."""
    (before, chosen), (other, rejected) = (_completion(record.get(name), name) for name in PREFERENCE_COLUMNS)
    if before != other:
        raise _Fault("`chosen` and `rejected` differ before their last reply")
    persona, prompt = before
    stated = record.get("prompt")
    if isinstance(stated, str) and stated.lstrip().startswith("[PERSONA]"):
        try:
            parsed, turns = parse_prompt(stated)
        except PromptError as error:
            raise _Fault(f"`prompt`: {error}") from error
        facts, given = list(parsed.facts), [dict(turn) for turn in turns]
    elif isinstance(stated, str) and stated.strip():
        facts, given = [], _user(stated.strip())
    elif stated is not None:
        facts, given = _chat(stated, "prompt")
    else:
        facts, given = [], []
    if prompt and given and prompt[-len(given) :] != given:
        raise _Fault("`prompt` is not what `chosen` begins with")
    listed = record.get("persona") or []
    if not isinstance(listed, list) or not all(map(_is_text, listed)):
        raise _Fault("`persona` is no list of facts, or has a blank fact")
    return {"persona": listed or facts or persona, "prompt": prompt or given, "chosen": chosen, "rejected": rejected}


def _completion(value: Any, field: str) -> tuple[tuple[list[str], list[Row]], list[Row]]:
    """((facts, turns) before the last reply, that reply)."""
    if _is_text(value):
        return ([], []), _assistant(value.strip())
    persona, turns = _chat(value, field)
    if not turns or turns[-1]["role"] != "assistant":
        raise _Fault(f"`{field}` does not end with a reply")
    return (persona, turns[:-1]), turns[-1:]


def _check_pair(row: Row) -> None:
    prompt, better, worse = row["prompt"], row["chosen"][0]["content"], row["rejected"][0]["content"]
    if not row["persona"]:
        raise _Fault("no persona: the record has none, and `persona` has no facts")
    if not prompt or prompt[-1]["role"] != "user":
        raise _Fault("the prompt does not end with a turn of the user")
    if better == worse:
        raise _Fault("chosen and rejected are the same")
    if any(_BLANK.search(text) for text in (better, *(turn["content"] for turn in prompt))):
        raise _Fault("placeholder")


def _user(content: str) -> list[Row]:
    return [{"role": "user", "content": content}]


def _assistant(content: str) -> list[Row]:
    return [{"role": "assistant", "content": content}]


# -- the hub -----------------------------------------------------------------------------------------------------------


def hub(
    path: str,
    rejected: list[Row],
    *,
    split: str = "train",
    persona: Sequence[str] = (),
    character: str | None = None,
) -> Iterator[Row]:
    """Rows of a data set of the Hugging Face hub, read as the format that its columns are of.

    In this order: [`preference`], Synthetic-Persona-Chat, [`messages`], a script (with `character`), questions and
    answers. The line of a rejected entry is the number of the record. Three tries, 2 s apart.

    Args:
        path: Id of the data set, such as "google/Synthetic-Persona-Chat".
        split: As `datasets.load_dataset` takes it, such as "train" or "train[:1000]".
        persona: As for the format.
        character: Whose lines of a script are the replies.

    Raises:
        DataError: if it cannot be loaded, or its columns are of no known format; names expected and found columns.
    """
    import datasets  # heavy, and no other reader needs it

    try:
        data = _three_tries(lambda: datasets.load_dataset(path, split=split), path)
    except DataError:
        raise
    except (FileNotFoundError, IsADirectoryError, PermissionError, ValueError) as error:
        raise DataError(f"`path`: cannot load {path!r}, split {split!r}, from the hub: {error}") from error
    columns = list(data.column_names)
    records: Iterable[Record] = enumerate(data, 1)
    if {"chosen", "rejected"} <= set(columns) or {"response1", "response2"} <= set(columns):
        yield from _preferences(columns, records, _facts(persona, needed=False), path, rejected)
    elif {*PERSONA_COLUMNS, DIALOGUE_COLUMN} <= set(columns):
        yield from _conversations(records, path, rejected)
    elif _column(columns, CHAT_COLUMNS):
        yield from _chats(columns, records, _facts(persona, needed=False), path, rejected)
    elif character is not None:
        turns = _recorded_turns(columns, records, path, rejected)
        yield from _scenes(turns, character, _facts(persona), path, rejected)
    elif _column(columns, QUESTION_COLUMNS) and _column(columns, ANSWER_COLUMNS):
        yield from _questions(columns, records, _facts(persona), path, rejected)
    else:
        known = [PREFERENCE_COLUMNS, (*PERSONA_COLUMNS, DIALOGUE_COLUMN), CHAT_COLUMNS[:1]]
        known += [(QUESTION_COLUMNS[0], ANSWER_COLUMNS[0]), (SPEAKER_COLUMNS[0], LINE_COLUMNS[0], "with `character`")]
        raise DataError(
            f"`path`: {path} needs the columns of one of the formats {'; '.join(', '.join(names) for names in known)}; "
            f"found: {', '.join(map(repr, columns)) or 'no columns'}"
        )
