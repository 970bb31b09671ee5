"""Reader of scripts: the lines of one character, and what was said before them."""

import difflib
import logging
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any, NamedTuple

from rlhf.data.records import (
    STAGE_DIRECTION,
    DataError,
    Record,
    Row,
    checked_facts,
    csv_records,
    needed_columns,
    read_text,
    reject,
    without_blanks,
)

logger = logging.getLogger(__name__)

# Names of columns as published files have them, the usual one first; compared without case.
SPEAKER_COLUMNS = ("speaker", "character", "name", "player", "character name")
LINE_COLUMNS = ("line", "text", "dialogue", "utterance", "quote", "playerline")

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


class UnknownCharacterError(DataError):
    """The script has nobody of that name; the message lists who speaks most often."""


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
    facts = checked_facts(persona)
    if Path(path).suffix.lower() == ".csv":
        columns, records = csv_records(path, rejected)
        turns = recorded_turns(columns, records, path, rejected)
    else:
        turns = _written_turns(read_text(path), path, rejected)
    yield from scene_dialogues(turns, character, facts, path, rejected)


def recorded_turns(
    columns: Sequence[str], records: Iterable[Record], path: str | Path, rejected: list[Row]
) -> list[_Turn]:
    speaker_column, line_column = needed_columns(columns, {"speaker": SPEAKER_COLUMNS, "words": LINE_COLUMNS}, path)
    scene_columns = [name for name in columns if _SCENE_COLUMN.search(name)]
    turns: list[_Turn] = []
    gaps = 0
    for line, record in records:
        speaker, text = (str(record.get(name) or "").strip() for name in (speaker_column, line_column))
        if speaker and text:
            scene = (gaps, *(record.get(name) for name in scene_columns))
            turns.append(_Turn(scene, line, speaker, " ".join(text.split())))
        elif speaker or text:
            reject(rejected, path, line, "no words" if speaker else "no speaker", "line", speaker or text)
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
        elif STAGE_DIRECTION.fullmatch(line):
            reject(rejected, path, number, "stage direction", "line", line)
        elif head:
            blocks.append((scene, number, head["name"], [line[head.end() :]]))
            speaking, in_block = True, head.end() == len(line)
        elif speaking:
            blocks[-1][3].append(line)
        else:
            reject(rejected, path, number, "no speaker", "line", line)
    turns = [_Turn(scene, line, speaker, " ".join(filter(None, words))) for scene, line, speaker, words in blocks]
    for turn in turns:
        if not turn.text:
            reject(rejected, path, turn.line, "no words", "line", turn.speaker)
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


def scene_dialogues(
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
                yield from without_blanks(row, path, [turn.line for turn in used], rejected)
    logger.info("%s: %d turns of others do not stand before a reply of %r and were left out.", path, unused, character)
