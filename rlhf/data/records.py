"""What the readers of sources.py and scripts.py share: files with three tries, records with their lines, rejections.

An entry of `rejected` is {"file", "line", "reason", "dropped", "text"}; `dropped` is "dialogue", or "turns" or "line"
when the rest of the dialogue is kept.
"""

import csv
import io
import json
import logging
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

logger = logging.getLogger(__name__)

T = TypeVar("T")
Row = dict[str, Any]
Record = tuple[int, Row]  # line of the file, its columns

# Elsewhere a bracket is mostly none: stage directions, code, links. A blank is "[Name]", "[User 1's name]",
# "[insert topic]", "<your email>", "{{user}}" or "+91-XXXXXXXXXX".
BLANK = re.compile(
    r"(?<![\w\]])\[(?=[\w' ’/-]{1,40}\](?!\())[^\]]*\b(?:names?|username|city|country|state|location|address|date|age|"
    r"company|position|job|title|topic|interests?|hobby|hometown|school|university|phone|email|number|amount|link|your|"
    r"insert|enter)\b[^\]]*\]|<(?:your|insert|enter)\b[^<>\n]*>|\{\{\s*(?:user|char|name)\s*\}\}|(?-i:\bX{4,}\b)",
    re.IGNORECASE,
)
STAGE_DIRECTION = re.compile(r"\[.*\]|\(.*\)|\*.*\*")
_SURROGATE = re.compile(r"[\ud800-\udfff]")


class DataError(ValueError):
    """A file or a set of rows that cannot be used; the message says which, what was expected and what was found."""


class Fault(ValueError):
    """What is wrong with one record, which is then rejected."""


def three_tries(load: Callable[[], T], what: str, tries: int = 3, pause_seconds: float = 2.0) -> T:
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


def read_text(path: str | Path) -> str:
    """The text of a file.

    Raises:
        DataError: if there is no such file, it is not UTF-8, or three tries fail.
    """
    try:
        return three_tries(Path(path).read_bytes, str(path)).decode("utf-8-sig")
    except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
        raise DataError(f"`path`: cannot read {path} ({error.strerror}). Name a file that exists.") from error
    except UnicodeDecodeError as error:
        raise DataError(f"`path`: {path} is not UTF-8 at byte {error.start}. Convert it to UTF-8.") from error


def reject(rejected: list[Row], file: str | Path, line: int, reason: str, dropped: str, text: str) -> None:
    """Note in `rejected` what is left out, from which line of which file, and why."""
    rejected.append({"file": str(file), "line": line, "reason": reason, "dropped": dropped, "text": text})


def is_text(value: Any) -> bool:
    """Whether it is a string that is not blank, without half a surrogate pair, which JSON can write and UTF-8 cannot."""
    return isinstance(value, str) and bool(value.strip()) and not _SURROGATE.search(value)


def checked_facts(persona: Sequence[str], needed: bool = True) -> list[str]:
    """The keyword `persona`, checked."""
    if isinstance(persona, str) or not all(map(is_text, persona)) or (needed and not persona):
        raise DataError(
            f"`persona` must be a list of facts, none of them blank, got {persona!r}. This format says nothing of who "
            "replies; name at least one fact, such as 'my name is Romeo .'"
        )
    return list(persona)


def longest_without(texts: Sequence[str], pattern: re.Pattern[str]) -> tuple[int, int]:
    """Start and end of the longest stretch of turns in which the pattern does not occur."""
    breaks = [-1, *(index for index, text in enumerate(texts) if pattern.search(text)), len(texts)]
    return max(((left + 1, right) for left, right in pairwise(breaks)), key=lambda span: span[1] - span[0])


def without_blanks(row: Row, file: str | Path, lines: Sequence[int], rejected: list[Row]) -> Iterator[Row]:
    """The row, cut to its longest stretch of turns without a blank; or none, if no reply follows a user's turn in it.

    Args:
        lines: Where in the file each message stands.
    """
    messages = row["messages"]
    texts = [message["content"] for message in messages]
    start, end = longest_without(texts, BLANK)
    if all(message["role"] != "assistant" for message in messages[start + 1 : end]):
        cut = end - start < len(messages)
        reason = "placeholder" if cut else "no reply to a turn of the user"
        return reject(rejected, file, lines[0] if lines else 1, reason, "dialogue", "\n".join(texts))
    for left, right in ((0, start), (end, len(messages))):
        if left < right:
            reject(rejected, file, lines[left], "placeholder", "turns", "\n".join(texts[left:right]))
    row["messages"] = messages[start:end]
    if "candidates" in row:
        row["candidates"] = row["candidates"][start:end]
    yield row


def csv_records(path: str | Path, rejected: list[Row]) -> tuple[list[str], Iterator[Record]]:
    """Header and records of a CSV file, each with the line on which it begins; blank lines are left out.

    Raises:
        DataError: if the file cannot be read; on the way through the records, if it is no CSV.
    """
    reader = csv.reader(io.StringIO(read_text(path), newline=""), strict=True)

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
                reject(rejected, path, line, "wrong number of cells", "dialogue", text)
            elif cells:
                yield line, dict(zip(header, cells, strict=True))

    return header, records()


def json_lines(path: str | Path, rejected: list[Row]) -> Iterator[tuple[int, str, Row]]:
    """(line, its text, the object on it); a line that is no JSON object is rejected."""
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            reject(rejected, path, number, f"not JSON: {error.msg} at character {error.pos}", "dialogue", line)
            continue
        except RecursionError:
            reject(rejected, path, number, "not JSON: nested too deeply", "dialogue", line)
            continue
        if isinstance(value, dict):
            yield number, line, value
        else:
            reject(rejected, path, number, "not a JSON object", "dialogue", line)


def _json_array(path: str | Path, text: str, rejected: list[Row]) -> Iterator[Record]:
    """The objects of a JSON list, each with the line on which it begins."""
    decoder = json.JSONDecoder()
    gap = re.compile(r"[\s,]*")
    at, line = text.index("[") + 1, 1 + text.count("\n", 0, text.index("[") + 1)
    while not text.startswith("]", start := gap.match(text, at).end()):  # type: ignore[union-attr]
        line += text.count("\n", at, start)
        value, end = decoder.raw_decode(text, start)
        if isinstance(value, dict):
            yield line, value
        else:
            reject(rejected, path, line, "not a JSON object", "dialogue", text[start:end])
        line += text.count("\n", start, end)
        at = end


def load_json(path: str | Path, text: str) -> Any:
    """The value of a JSON text; raises DataError with the line on which it is none."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{error.lineno} is not JSON: {error.msg}. Name JSON lines *.jsonl.") from error
    except RecursionError as error:
        raise DataError(f"`path`: {path} is nested too deeply for JSON of any format here.") from error


def read_records(path: str | Path, rejected: list[Row]) -> tuple[list[str], Iterable[Record]]:
    """Columns and records of a file *.csv, *.json (a list of objects) or, by any other name, of JSON lines."""
    suffix = Path(path).suffix.lower()
    if suffix == ".csv":
        return csv_records(path, rejected)
    if suffix == ".json":
        text = read_text(path)
        if not isinstance(load_json(path, text), list):
            raise DataError(f"`path`: {path} must hold a list of objects; found another JSON value.")
        records = list(_json_array(path, text, rejected))
    else:
        records = [(line, record) for line, _, record in json_lines(path, rejected)]
    return list(dict.fromkeys(key for _, record in records for key in record)), records


def find_column(columns: Sequence[str], names: Sequence[str]) -> str | None:
    """The first of `names` among the columns, as it is spelled there."""
    spelled = {column.strip().casefold(): column for column in reversed(columns)}
    return next((spelled[name] for name in names if name in spelled), None)


def needed_columns(columns: Sequence[str], wanted: Mapping[str, Sequence[str]], path: str | Path) -> list[str]:
    """A column for each wanted thing.

    Raises:
        DataError: naming the expected and the found columns, if one is missing.
    """
    found = {what: find_column(columns, names) for what, names in wanted.items()}
    if None in found.values():
        expected = "; ".join(f"for the {what} one of {', '.join(map(repr, names))}" for what, names in wanted.items())
        raise DataError(
            f"`path`: {path} needs a column {expected}; found: {', '.join(map(repr, columns)) or 'no columns'}"
        )
    return [name for name in found.values() if name is not None]
