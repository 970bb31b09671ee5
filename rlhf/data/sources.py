"""Readers: one function a format, from a file to rows; what they leave out goes to `rejected` with a reason.

A dialogue row is {"persona": [facts], "messages": [{"role", "content"}, ...], "dialogue_id", "source"}; user and
assistant alternate. Two keys may be there besides: `candidates` of a row, a list as long as `messages`, for each None
or the texts from which the reply is to be told (the reply among them); `train: False` of a message, a reply that is
context and not trained on. A preference row is as `preferences.py` makes it.

Rows that share a `dialogue_id` belong together: the split keeps them on one side. What an entry of `rejected` holds says
records.py; the reader `script` stands in scripts.py.
"""

import difflib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from rlhf.data.records import (
    BLANK,
    STAGE_DIRECTION,
    DataError,
    Fault,
    Record,
    Row,
    checked_facts,
    csv_records,
    find_column,
    is_text,
    json_lines,
    load_json,
    longest_without,
    needed_columns,
    read_records,
    read_text,
    reject,
    three_tries,
    without_blanks,
)
from rlhf.data.scripts import LINE_COLUMNS, SPEAKER_COLUMNS, recorded_turns, scene_dialogues
from rlhf.persona import PromptError, parse_prompt

PERSONA_COLUMNS = ("user 1 personas", "user 2 personas")
DIALOGUE_COLUMN = "Best Generated Conversation"
ROW_KEYS = ("persona", "messages", "dialogue_id", "source")

# Names of columns as published files have them, the usual one first; compared without case.
QUESTION_COLUMNS = ("question", "instruction", "prompt", "query")
ANSWER_COLUMNS = ("answer", "response", "output", "completion", "reply")
CHAT_COLUMNS = ("messages", "conversations")
PREFERENCE_COLUMNS = ("chosen", "rejected")
HUMAN_CHOICE_COLUMNS = ("instruction", "input", "response1", "response2")  # PandaLM's, beside annotator1, 2, ...

# "User 1: hi", "* User 1: hi *", "*User 1:* hi", "**USER 1** : hi", "User1: hi".
_SPEAKER = re.compile(
    r"(?P<open>\*+\s*)?user\s*(?P<user>[12])\s*(?P<close>\**)\s*:(?P<close_after>(?(open)\**))", re.IGNORECASE
)
# The model that wrote these conversations left blanks: "[User 1's name]", "(name)", "my name is User 1".
_PLACEHOLDER = re.compile(
    r"\[|\b(?:user|person) ?_?[12]\b|\((?:\w+ )?(?:names?|username|city|country|age|hometown|link)\)", re.IGNORECASE
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
    header, records = csv_records(path, rejected)
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
    record = {name: str(value or "") for name, value in record.items()}
    personas = [[fact.strip() for fact in record[name].splitlines() if fact.strip()] for name in PERSONA_COLUMNS]
    if not all(personas):
        return reject(rejected, path, line, "empty persona", "dialogue", record[DIALOGUE_COLUMN])

    # The cells before the conversation take up lines of the file too.
    line += sum(record[name].count("\n") for name in list(record)[: list(record).index(DIALOGUE_COLUMN)])
    turns: list[tuple[int, str, int]] = []  # speaker, text, line of the file
    for at, text in enumerate(record[DIALOGUE_COLUMN].split("\n"), line):
        text = text.strip()
        speaker = _SPEAKER.match(text)
        if not text:
            continue
        if speaker is None and STAGE_DIRECTION.fullmatch(text):
            reject(rejected, path, at, "stage direction", "line", text)
            continue
        content = "" if speaker is None else text[speaker.end() :].strip()
        if speaker and speaker["open"] and not (speaker["close"] or speaker["close_after"]):
            content = content.rstrip("* ")  # the emphasis spans the whole line
        if speaker is None or not content:
            return reject(rejected, path, at, "unparseable line", "dialogue", text)
        user = int(speaker["user"]) - 1
        if turns and turns[-1][0] == user:
            turns[-1] = (user, f"{turns[-1][1]} {content}", turns[-1][2])
        else:
            turns.append((user, content, at))

    start, end = longest_without([text for _, text, _ in turns], _PLACEHOLDER)
    if end - start < _MIN_TURNS:
        reason = "placeholder" if end - start < len(turns) else f"fewer than {_MIN_TURNS} turns"
        return reject(rejected, path, line, reason, "dialogue", record[DIALOGUE_COLUMN])
    for outside in (turns[:start], turns[end:]):
        if outside:
            reject(
                rejected,
                path,
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
    for number, line, row in json_lines(path, rejected):
        faults = _faults(row)
        if faults:
            reject(rejected, path, number, "; ".join(faults), "dialogue", line)
        else:
            yield row


def _faults(row: Row) -> list[str]:
    faults = [f"`{key}` is missing" for key in ROW_KEYS if key not in row]
    for key in row.keys() - {*ROW_KEYS, "candidates"}:
        close = difflib.get_close_matches(key, ROW_KEYS, 1)
        faults.append(f"unknown key `{key}`" + (f", did you mean `{close[0]}`?" if close else ""))
    faults += [
        f"`{key}` is no text or blank" for key in ("dialogue_id", "source") if key in row and not is_text(row[key])
    ]
    persona, messages = row.get("persona", ["-"]), row.get("messages", [])
    if not isinstance(persona, list) or not persona or not all(map(is_text, persona)):
        faults.append("`persona` is no list of facts, or empty, or has a blank fact")
    if not isinstance(messages, list) or "messages" in row and not messages:
        return [*faults, "`messages` is no list, or empty"]
    previous = None
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict) or message.keys() - {"train"} != {"role", "content"}:
            return [*faults, f"message {number} has not exactly the keys role and content, and perhaps train"]
        if message["role"] not in ("user", "assistant") or message["role"] == previous:
            faults.append(f"message {number}: user and assistant must alternate, got the role {message['role']!r}")
        if not is_text(message["content"]):
            faults.append(f"message {number} has no text or is blank")
        if "train" in message and (message["role"] != "assistant" or not isinstance(message["train"], bool)):
            faults.append(f"message {number}: `train` must be true or false, and of a reply, got {message['train']!r}")
        previous = message["role"]
    candidates = row.get("candidates")
    if candidates is not None and not (isinstance(candidates, list) and len(candidates) == len(messages)):
        faults.append("`candidates` is no list as long as `messages`")
    elif candidates and any(c is not None and not (isinstance(c, list) and all(map(is_text, c))) for c in candidates):
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
    lines = [(at, line) for at, line in enumerate(read_text(path).split("\n"), 1) if line.strip()]
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
            return reject(rejected, path, at, "unparseable line", "dialogue", f"{number} {text}"[:200])
        choices = [choice.strip() for choice in cells[3].split("|")] if len(cells) > 3 else None
        if choices is not None and cells[1] not in choices:
            return reject(rejected, path, at, "the reply is none of the candidates", "dialogue", cells[1])
        if cells[0] != "__SILENCE__":  # what ParlAI writes where the persona's owner opens the dialogue
            messages.append({"role": "user", "content": cells[0]})
            candidates.append(None)
            lines.append(at)
        messages.append({"role": "assistant", "content": cells[1]})
        candidates.append(choices)
        lines.append(at)
    if not persona or not all(persona):
        return reject(rejected, path, first, "empty persona", "dialogue", whole[:200])
    if any(left["role"] == right["role"] for left, right in pairwise(messages)):
        return reject(rejected, path, first, "silence within a dialogue", "dialogue", whole[:200])
    if partner:
        reject(rejected, path, first, "partner's persona", "line", "\n".join(partner))
    row = {"persona": persona, "messages": messages, "dialogue_id": f"{Path(path).stem}-{first}", "source": "convai2"}
    if any(choices is not None for choices in candidates):
        row["candidates"] = candidates
    yield from without_blanks(row, path, lines, rejected)


# -- questions and answers ---------------------------------------------------------------------------------------------


QUESTION_FILES = (".csv", ".json", ".jsonl", ".yml", ".yaml")


def question_answer(path: str | Path, rejected: list[Row], *, persona: Sequence[str]) -> Iterator[Row]:
    """Questions and answers, by the file's ending; a folder is read file by file, without the folders in it.

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
    facts = checked_facts(persona)
    if Path(path).is_dir():
        files = [file for file in sorted(Path(path).iterdir()) if file.suffix.lower() in QUESTION_FILES]
        if not files:
            below = sorted(
                {str(file.parent) for file in Path(path).rglob("*") if file.suffix.lower() in QUESTION_FILES}
            )
            where = f"; there are some in {', '.join(below[:8])}: name one of these" if below else ""
            raise DataError(f"`path`: no {', '.join(QUESTION_FILES)} file lies in {path}{where}")
        for file in files:
            yield from question_answer(file, rejected, persona=facts)
        return
    suffix = Path(path).suffix.lower()
    if suffix in (".yml", ".yaml"):
        yield from _yaml_conversations(path, rejected, facts)
        return
    if suffix == ".json" and isinstance(value := load_json(path, text := read_text(path)), dict):
        pairs = _intents(value, text, path, rejected) if "intents" in value else _mapping(value, text, path, rejected)
        for number, question, answer, dialogue_id in pairs:
            yield from _pair(question, answer, facts, dialogue_id, path, number, rejected)
        return
    columns, records = read_records(path, rejected)
    yield from _questions(columns, records, facts, path, rejected)


def _pair(
    question: Any, answer: Any, facts: list[str], dialogue_id: str, path: str | Path, line: int, rejected: list[Row]
) -> Iterator[Row]:
    if not is_text(question) or not is_text(answer):
        what = "question" if not is_text(question) else "answer"
        return reject(rejected, path, line, f"the {what} is no text or blank", "dialogue", f"{question}\n{answer}")
    messages = [{"role": "user", "content": question.strip()}, {"role": "assistant", "content": answer.strip()}]
    row = {"persona": facts, "messages": messages, "dialogue_id": dialogue_id, "source": "question_answer"}
    yield from without_blanks(row, path, [line, line], rejected)


def _questions(
    columns: Sequence[str], records: Iterable[Record], facts: list[str], path: str | Path, rejected: list[Row]
) -> Iterator[Row]:
    asked, answered = needed_columns(columns, {"question": QUESTION_COLUMNS, "answer": ANSWER_COLUMNS}, path)
    more = find_column(columns, ("input", "context"))
    for line, record in records:
        question, context = record.get(asked), record.get(more) if more else None
        if is_text(question) and is_text(context):
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
            reject(rejected, path, line, "the question stands twice as a key", "dialogue", f"{question}\n{answer}")
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
            reject(rejected, path, _line_of(text, tag), reason, "dialogue", json.dumps(intent, ensure_ascii=False))
            continue
        for index in range(max(len(patterns), len(responses))):
            pattern, response = patterns[index % len(patterns)], responses[index % len(responses)]
            yield _line_of(text, pattern), pattern, response, f"{Path(path).stem}-{tag}"


def _yaml_conversations(path: str | Path, rejected: list[Row], facts: list[str]) -> Iterator[Row]:
    try:  # nodes know their lines, and keep "1963" and "no" as they are written
        root = yaml.compose(read_text(path), Loader=yaml.SafeLoader)
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
        if not texts or len(texts) != len(turns) or not all(map(is_text, texts)):
            text = str(node.value) if isinstance(node, yaml.ScalarNode) else "\n".join(texts)
            reject(rejected, path, line, "not a list of texts, or one is blank", "dialogue", text)
            continue
        lines = [turn.start_mark.line + 1 for turn in turns]
        dialogue_id = f"{Path(path).stem}-{line}"
        if len(texts) > 2 and not talks:
            reason = f"more than one answer, or no category {_TALKS!r}"
            reject(rejected, path, lines[2], reason, "turns", "\n".join(texts[2:]))
            texts = texts[:2]
        messages = [
            {"role": "assistant" if index % 2 else "user", "content": text} for index, text in enumerate(texts)
        ]
        row = {"persona": facts, "messages": messages, "dialogue_id": dialogue_id, "source": "question_answer"}
        yield from without_blanks(row, path, lines, rejected)


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
    columns, records = read_records(path, rejected)
    yield from _chats(columns, records, checked_facts(persona, needed=False), path, rejected)


def _chats(
    columns: Sequence[str], records: Iterable[Record], facts: list[str], path: str | Path, rejected: list[Row]
) -> Iterator[Row]:
    (column,) = needed_columns(columns, {"dialogue": CHAT_COLUMNS}, path)
    for line, record in records:
        try:
            stated, turns = _chat(record.get(column), column)
            if not (stated or facts):
                raise Fault("no persona: no system message, and `persona` has no facts")
        except Fault as fault:
            reject(rejected, path, line, str(fault), "dialogue", json.dumps(record, default=str))
            continue
        id = record.get("dialogue_id") or record.get("id") or line
        row = {"persona": stated or facts, "messages": turns, "dialogue_id": f"{Path(path).stem}-{id}"}
        yield from without_blanks({**row, "source": "messages"}, path, [line] * len(turns), rejected)


def _chat(value: Any, field: str) -> tuple[list[str], list[Row]]:
    """Facts of the system message, and the turns, in which user and assistant alternate; raises Fault."""
    if not isinstance(value, list) or not value:
        raise Fault(f"`{field}` is no list of messages, or empty")
    facts: list[str] = []
    turns: list[Row] = []
    for number, message in enumerate(value, 1):
        if not isinstance(message, dict):
            raise Fault(f"message {number} is no object")
        role: Any = message.get("role", message.get("from"))
        content: Any = message.get("content", message.get("value"))
        role = {"human": "user", "gpt": "assistant"}.get(role, role)
        if not is_text(content):
            raise Fault(f"message {number} has no text or is blank")
        if role == "system" and number == 1:
            facts = [fact.strip() for fact in content.splitlines() if fact.strip()]
        elif role not in ("user", "assistant"):
            raise Fault(f"message {number}: the role must be user or assistant, or system at the start, got {role!r}")
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
    columns, records = read_records(path, rejected)
    yield from _preferences(columns, records, checked_facts(persona, needed=False), path, rejected)


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
        except Fault as fault:
            reject(rejected, path, line, str(fault), "dialogue", json.dumps(record, default=str))
            continue
        first = asked.setdefault(json.dumps(row["prompt"]), line)
        id = record.get("dialogue_id") or record.get("id") or first
        kind = "human" if voted else record.get("kind") or "given"
        yield {**row, "dialogue_id": f"{Path(path).stem}-{id}", "kind": str(kind)}


def _voted(record: Row) -> Row:
    """Prompt and replies of a record on which people voted; raises Fault unless one response has the majority."""
    votes = [value for name, value in record.items() if name.startswith("annotator")]
    winner = next((side for side in (1, 2) if 2 * votes.count(side) > len(votes)), None)
    if winner is None:
        raise Fault("no majority for one response")
    if not is_text(record.get("instruction")):
        raise Fault("`instruction` is no text or blank")
    if not (is_text(record.get("response1")) and is_text(record.get("response2"))):
        raise Fault(_NO_REPLY)
    prompt = record["instruction"].strip()
    if is_text(record.get("input")):
        prompt += f"\n\n{record['input'].strip()}"
    better, worse = (record[f"response{side}"].strip() for side in (winner, 3 - winner))
    return {"persona": [], "prompt": _user(prompt), "chosen": _assistant(better), "rejected": _assistant(worse)}


def _stated(record: Row) -> Row:
    """Prompt and replies of a record that names them; raises Fault."""
    (before, chosen), (other, rejected) = (_completion(record.get(name), name) for name in PREFERENCE_COLUMNS)
    if before != other:
        raise Fault("`chosen` and `rejected` differ before their last reply")
    persona, prompt = before
    stated = record.get("prompt")
    if isinstance(stated, str) and stated.lstrip().startswith("[PERSONA]"):
        try:
            parsed, turns = parse_prompt(stated)
        except PromptError as error:
            raise Fault(f"`prompt`: {error}") from error
        facts, given = list(parsed.facts), [dict(turn) for turn in turns]
    elif isinstance(stated, str) and stated.strip():
        facts, given = [], _user(stated.strip())
    elif stated is not None:
        facts, given = _chat(stated, "prompt")
    else:
        facts, given = [], []
    if prompt and given and prompt[-len(given) :] != given:
        raise Fault("`prompt` is not what `chosen` begins with")
    listed = record.get("persona") or []
    if not isinstance(listed, list) or not all(map(is_text, listed)):
        raise Fault("`persona` is no list of facts, or has a blank fact")
    return {"persona": listed or facts or persona, "prompt": prompt or given, "chosen": chosen, "rejected": rejected}


def _completion(value: Any, field: str) -> tuple[tuple[list[str], list[Row]], list[Row]]:
    """((facts, turns) before the last reply, that reply)."""
    if is_text(value):
        return ([], []), _assistant(value.strip())
    persona, turns = _chat(value, field)
    if not turns or turns[-1]["role"] != "assistant":
        raise Fault(f"`{field}` does not end with a reply")
    return (persona, turns[:-1]), turns[-1:]


def _check_pair(row: Row) -> None:
    prompt, better, worse = row["prompt"], row["chosen"][0]["content"], row["rejected"][0]["content"]
    if not row["persona"]:
        raise Fault("no persona: the record has none, and `persona` has no facts")
    if not prompt or prompt[-1]["role"] != "user":
        raise Fault("the prompt does not end with a turn of the user")
    if better == worse:
        raise Fault("chosen and rejected are the same")
    if any(BLANK.search(text) for text in (better, *(turn["content"] for turn in prompt))):
        raise Fault("placeholder")


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
        data = three_tries(lambda: datasets.load_dataset(path, split=split), path)
    except DataError:
        raise
    except (FileNotFoundError, IsADirectoryError, PermissionError, ValueError) as error:
        raise DataError(f"`path`: cannot load {path!r}, split {split!r}, from the hub: {error}") from error
    columns = list(data.column_names)
    records: Iterable[Record] = enumerate(data, 1)
    if {"chosen", "rejected"} <= set(columns) or {"response1", "response2"} <= set(columns):
        yield from _preferences(columns, records, checked_facts(persona, needed=False), path, rejected)
    elif {*PERSONA_COLUMNS, DIALOGUE_COLUMN} <= set(columns):
        yield from _conversations(records, path, rejected)
    elif find_column(columns, CHAT_COLUMNS):
        yield from _chats(columns, records, checked_facts(persona, needed=False), path, rejected)
    elif character is not None:
        turns = recorded_turns(columns, records, path, rejected)
        yield from scene_dialogues(turns, character, checked_facts(persona), path, rejected)
    elif find_column(columns, QUESTION_COLUMNS) and find_column(columns, ANSWER_COLUMNS):
        yield from _questions(columns, records, checked_facts(persona), path, rejected)
    else:
        known = [PREFERENCE_COLUMNS, (*PERSONA_COLUMNS, DIALOGUE_COLUMN), CHAT_COLUMNS[:1]]
        known += [(QUESTION_COLUMNS[0], ANSWER_COLUMNS[0]), (SPEAKER_COLUMNS[0], LINE_COLUMNS[0], "with `character`")]
        raise DataError(
            f"`path`: {path} needs the columns of one of the formats {'; '.join(', '.join(names) for names in known)}; "
            f"found: {', '.join(map(repr, columns)) or 'no columns'}"
        )
