"""Readers: one function a format, from a file to dialogue rows; what they leave out goes to `rejected` with a reason.

A row is {"persona": [facts], "messages": [{"role", "content"}, ...], "dialogue_id", "source"}; user and assistant
alternate. An entry of `rejected` is {"file", "line", "reason", "dropped", "text"}; `dropped` is "dialogue", or "turns"
or "line" when the rest of the dialogue is kept.
"""

import csv
import difflib
import io
import json
import logging
import re
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

Row = dict[str, Any]

PERSONA_COLUMNS = ("user 1 personas", "user 2 personas")
DIALOGUE_COLUMN = "Best Generated Conversation"
ROW_KEYS = ("persona", "messages", "dialogue_id", "source")

# "User 1: hi", "* User 1: hi *", "*User 1:* hi", "**USER 1** : hi", "User1: hi".
_SPEAKER = re.compile(
    r"(?P<open>\*+\s*)?user\s*(?P<user>[12])\s*(?P<close>\**)\s*:(?P<close_after>(?(open)\**))", re.IGNORECASE
)
_STAGE_DIRECTION = re.compile(r"\[.*\]|\(.*\)|\*.*\*")
# The model that wrote these conversations left blanks: "[User 1's name]", "(name)", "my name is User 1".
_PLACEHOLDER = re.compile(
    r"\[|\b(?:user|person) ?_?[12]\b|\((?:\w+ )?(?:names?|username|city|country|age|hometown|link)\)", re.IGNORECASE
)
_MIN_TURNS = 3  # gives each of the two speakers one reply


class DataError(ValueError):
    """A file or a set of rows that cannot be used; the message says which, what was expected and what was found."""


def _read(path: str | Path, tries: int = 3, pause_seconds: float = 2.0) -> str:
    """The text of a file. A failing read (a network drive, a mounted data set) is tried again after a pause.

    Raises:
        DataError: if there is no such file, it is not UTF-8, or the last try fails too.
    """
    for attempt in range(1, tries + 1):
        try:
            return Path(path).read_bytes().decode("utf-8-sig")
        except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
            raise DataError(f"`path`: cannot read {path} ({error.strerror}). Name a file that exists.") from error
        except UnicodeDecodeError as error:
            raise DataError(f"`path`: {path} is not UTF-8 at byte {error.start}. Convert it to UTF-8.") from error
        except OSError as error:
            if attempt == tries:
                raise DataError(f"`path`: cannot read {path} after {tries} tries: {error}") from error
            logger.warning(
                "Try %d of %d to read %s failed (%s); again in %g s.", attempt, tries, path, error, pause_seconds
            )
            time.sleep(pause_seconds)
    raise ValueError(f"`tries` must be at least 1, got {tries}")


def synthetic_persona_chat(path: str | Path, rejected: list[Row]) -> Iterator[Row]:
    """Rows of a CSV file of Synthetic-Persona-Chat (https://github.com/google-research-datasets/Synthetic-Persona-Chat).

    Each conversation gives two rows with the same `dialogue_id`, one for each user as the character: that user's turns
    are the assistant's, that user's facts alone are the persona. Consecutive turns of a speaker are joined; lines that
    are stage directions are left out. About 40 % of the conversations hold a placeholder ("[User 1's name]"), mostly
    in the greeting: of these the longest stretch of turns without one is kept.

    Raises:
        DataError: if the file cannot be read, is no CSV, or lacks a column.
    """
    lines = csv.reader(io.StringIO(_read(path), newline=""), strict=True)
    try:
        header = next(lines, [])
        wanted = (*PERSONA_COLUMNS, DIALOGUE_COLUMN)
        if any(header.count(name) != 1 for name in wanted):
            raise DataError(
                f"`path`: {path} needs the columns {', '.join(map(repr, wanted))}, once each; "
                f"found: {', '.join(map(repr, header)) or 'an empty file'}"
            )
        line = lines.line_num + 1
        for number, cells in enumerate(lines, 1):
            if cells:
                yield from _conversation(Path(path), number, line, header, cells, rejected)
            line = lines.line_num + 1
    except csv.Error as error:
        raise DataError(f"{path}:{lines.line_num} is not CSV: {error}") from error


def _conversation(
    path: Path, number: int, line: int, header: list[str], cells: list[str], rejected: list[Row]
) -> Iterator[Row]:
    """The two rows of the conversation whose record begins at `line`, or none."""

    def reject(at: int, reason: str, dropped: str, text: str) -> None:
        rejected.append({"file": str(path), "line": at, "reason": reason, "dropped": dropped, "text": text})

    if len(cells) != len(header):
        return reject(line, "wrong number of cells", "dialogue", f"{len(cells)} cells, {len(header)} columns")
    record = dict(zip(header, cells, strict=True))
    personas = [[fact.strip() for fact in record[name].splitlines() if fact.strip()] for name in PERSONA_COLUMNS]
    if not all(personas):
        return reject(line, "empty persona", "dialogue", record[DIALOGUE_COLUMN])

    # The cells before the conversation take up lines of the file too.
    line += sum(cell.count("\n") for cell in cells[: header.index(DIALOGUE_COLUMN)])
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

    breaks = [-1, *(index for index, turn in enumerate(turns) if _PLACEHOLDER.search(turn[1])), len(turns)]
    gaps = pairwise(breaks)
    start, end = max(((left + 1, right) for left, right in gaps), key=lambda span: span[1] - span[0])
    if end - start < _MIN_TURNS:
        reason = "placeholder" if len(breaks) > 2 else "fewer than 3 turns"
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
            "dialogue_id": f"{path.stem}-{number}",
            "source": "synthetic_persona_chat",
        }


def jsonl(path: str | Path, rejected: list[Row]) -> Iterator[Row]:
    """Rows of a JSON-lines file that are already dialogue rows; a row with any fault is rejected, all faults named.

    Raises:
        DataError: if the file cannot be read.
    """
    for number, line in enumerate(_read(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            faults = _faults(row)
        except json.JSONDecodeError as error:
            faults = [f"not JSON: {error.msg} at character {error.pos}"]
        if faults:
            reason = "; ".join(faults)
            rejected.append({"file": str(path), "line": number, "reason": reason, "dropped": "dialogue", "text": line})
        else:
            yield row


def _faults(row: Any) -> list[str]:
    if not isinstance(row, dict):
        return ["not a JSON object"]
    faults = [f"`{key}` is missing" for key in ROW_KEYS if key not in row]
    for key in row.keys() - set(ROW_KEYS):
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
        if not isinstance(message, dict) or set(message) != {"role", "content"}:
            return [*faults, f"message {number} has not exactly the keys role and content"]
        if message["role"] not in ("user", "assistant") or message["role"] == previous:
            faults.append(f"message {number}: user and assistant must alternate, got the role {message['role']!r}")
        if not _is_text(message["content"]):
            faults.append(f"message {number} has no text or is blank")
        previous = message["role"]
    return faults


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())
