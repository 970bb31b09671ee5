"""Preference pairs and prompts from real dialogues, and the judging of pairs by a person.

A pair is {"persona", "prompt", "chosen", "rejected", "dialogue_id", "kind"}. Its kinds:

- ``contradiction``: a reply of the dialogue that states a fact; rejected states another value in the same words;
- ``true_suggestion``: the user asks whether a fact is so; rejected denies it;
- ``giving_in``: the user suggests another value; rejected accepts it;
- ``other_persona``: a reply of the dialogue; rejected is another character's, of about the same length.

Only the persona tells chosen from rejected. Therefore values are exchanged between two facts: what is right for one
character is wrong for the other, so each value is chosen as often as rejected, and so are "yes", "no" and "not".

Persona sentences are free English, taken apart by `rlhf.facts`: "i have two dogs ." has the stem "i have" and the value
"two dogs". Values that follow one stem and have equally many words can stand for each other. No rule knows whether two
of them exclude each other ("a dog" and "a cat" do not): a value that the persona does not state counts as false, as a
persona is all that is known of a character.
"""

import json
import random
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf.data.split import characters
from rlhf.facts import Fact, Slot, as_usual, content, parse_fact, second_person, slot_values

Row = dict[str, Any]

CANDIDATES = 64  # replies looked at for each pair: enough for a length match, and linear in the number of pairs
MAX_LENGTH_GAP = 0.3  # of the chosen reply's number of words
FRAMES = ("so {} , right ?", "{} , is that right ?", "you told me that {} , did you not ?", "i heard that {} ?")
# A suggestion and how the wrong reply to it errs: another value, the fact itself denied, yes and no confused. Each is
# used equally often, which balances "yes", "no", "not" and the lengths. Without the last, a model looks at the value
# alone and learns "yes , <right value>" as the answer to a false suggestion.
SUGGESTIONS = tuple((true, error) for error in ("value", "denial", "polarity") for true in (True, False))
DECISIONS = ("a", "b", "undecided")


def fact_coverage(rows: Sequence[Row]) -> dict[str, float]:
    """How far the rules reach.

    Returns:
        "facts": different persona sentences; "without_rule": those that no rule takes apart; "without_swap": those with
        a value that no other can stand for; "unusable_share": of both, 0 to 1.
    """
    facts = [parse_fact(sentence) for sentence in {fact for row in rows for fact in row["persona"]}]
    values = slot_values(rows)
    without_rule = facts.count(None)
    without_swap = sum(fact is not None and len(values[fact.slot]) == 1 for fact in facts)
    return {
        "facts": len(facts),
        "without_rule": without_rule,
        "without_swap": without_swap,
        "unusable_share": (without_rule + without_swap) / len(facts) if facts else 0.0,
    }


# -- pairs -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Mention:
    """A fact of a row, and where the pair is asked: before message `turn`. `value` is how the text there writes it."""

    row: int
    turn: int
    fact: Fact
    value: str
    span: tuple[int, int] = (0, 0)


def persona_pairs(rows: Sequence[Row], count: int, seed: int) -> tuple[list[Row], dict[str, float]]:
    """At most `count` pairs of all kinds, about a third each of contradictions, suggestions and other personas.

    Contradictions are the rarest, since real replies seldom repeat a fact's words; the other kinds make up for them.

    Returns:
        The pairs in random order, and [`fact_coverage`] of the rows.
    """
    pairs = contradiction_pairs(rows, count // 3, seed)
    pairs += suggestion_pairs(rows, (count - len(pairs)) // 2, seed)
    pairs += other_persona_pairs(rows, count - len(pairs), seed)
    random.Random(f"pairs/{seed}").shuffle(pairs)
    return pairs, fact_coverage(rows)


def contradiction_pairs(rows: Sequence[Row], count: int, seed: int) -> list[Row]:
    """At most `count` pairs of a reply that states a fact, and the same reply with another character's value.

    A reply states a fact where a sentence of it that is neither a question nor a denial speaks of the speaker and has
    the fact's value, word for word.
    """
    rng = random.Random(f"contradictions/{seed}")
    facts = [[fact for fact in map(parse_fact, row["persona"]) if fact] for row in rows]
    mentions = []
    for index, turn in _reply_turns(rows):
        text = rows[index]["messages"][turn]["content"]
        for fact in facts[index]:
            span = _statement(text, fact)
            if span:
                mentions.append(_Mention(index, turn, fact, text[slice(*span)], span))
    pairs = []
    for mention, value in _exchanged(rows, mentions, count, rng):
        row = rows[mention.row]
        text, (start, end) = row["messages"][mention.turn]["content"], mention.span
        pairs.append(_pair(row, mention.turn, text, text[:start] + value + text[end:], "contradiction"))
    return pairs


def suggestion_pairs(rows: Sequence[Row], count: int, seed: int) -> list[Row]:
    """At most `count` pairs of replies to a question about a fact, right or wrong, put at a random point of a dialogue.

    The kinds are `true_suggestion` and `giving_in`. Questions and replies are written as the dialogue is: in lower case
    with spaces around punctuation, or as usual.
    """
    rng = random.Random(f"suggestions/{seed}")
    mentions = []
    for index, row in enumerate(rows):
        turns = [turn for turn, message in enumerate(row["messages"]) if message["role"] == "user"]
        for fact in map(parse_fact, row["persona"]):
            if fact and turns:
                mentions.append(_Mention(index, rng.choice(turns), fact, fact.value))
    pairs = []
    exchanged = _exchanged(rows, mentions, count, rng)
    # The two pairs of an exchange come one after the other and get the same suggestion.
    for number, (mention, foil) in enumerate(exchanged):
        true, error = SUGGESTIONS[number // 2 % len(SUGGESTIONS)]
        pairs.append(suggestion_pair(rows[mention.row], mention.turn, mention.fact, foil, true, error, rng))
    return pairs


def suggestion_pair(row: Row, turn: int, fact: Fact, foil: str, true: bool, error: str, rng: random.Random) -> Row:
    """The pair for a suggestion in place of the user's message `turn`.

    Args:
        row: The dialogue.
        turn: Of a user.
        fact: Of the row's persona.
        foil: The false value.
        true: The user suggests the fact rather than the foil.
        error: Of the rejected reply: "value" (states the foil), "denial" (denies a true fact, or accepts a false one
            that the chosen reply denies), "polarity" (the chosen reply with yes and no confused).
        rng: Draws the question's wording.
    """
    right, wrong = ("yes", "no") if true else ("no", "yes")
    chosen = rejected = fact.state(fact.value)
    if error == "value":
        rejected = fact.state(foil)
    elif error == "denial" and true:
        rejected = fact.deny(fact.value)
    elif error == "denial":
        chosen, rejected = fact.deny(foil), fact.state(foil)
    asked = fact.state(fact.value if true else foil)
    plain = not any(char.isupper() for message in row["messages"] for char in message["content"])
    question = rng.choice(FRAMES).format(second_person(asked))
    texts = [question, f"{right} , {chosen} .", f"{wrong} , {rejected} ."]
    question, good, bad = texts if plain else map(as_usual, texts)
    pair = _pair(row, turn, good, bad, "true_suggestion" if true else "giving_in")
    return {**pair, "prompt": [*pair["prompt"], {"role": "user", "content": question}]}


def other_persona_pairs(rows: Sequence[Row], count: int, seed: int) -> list[Row]:
    """At most `count` pairs: the true reply is chosen, one of another character from another dialogue is rejected.

    The rejected reply is the one nearest in length (words) among a random sample, so that length does not tell which
    one is better. A turn with no other reply within 30 % of its length gives no pair.
    """
    rng = random.Random(f"preferences/{seed}")
    turns = _reply_turns(rows)
    rng.shuffle(turns)
    character = characters(rows)
    pairs: list[Row] = []
    for index, turn in turns:
        if len(pairs) == count:
            break
        row, chosen = rows[index], rows[index]["messages"][turn]["content"]
        words = len(chosen.split())
        candidates = [
            rows[other]["messages"][at]["content"]
            for other, at in rng.sample(turns, min(CANDIDATES, len(turns)))
            if character[other] != character[index] and rows[other]["dialogue_id"] != row["dialogue_id"]
        ]
        candidates = [text for text in candidates if text.strip().casefold() != chosen.strip().casefold()]
        rejected = min(candidates, key=lambda text: abs(len(text.split()) - words), default=None)
        if rejected is None or abs(len(rejected.split()) - words) > MAX_LENGTH_GAP * words:
            continue
        pairs.append(_pair(row, turn, chosen, rejected, "other_persona"))
    return pairs


# -- prompts ---------------------------------------------------------------------------------------------------------


def prompts(rows: Sequence[Row], count: int, seed: int) -> list[Row]:
    """At most `count` dialogues, each cut off before a random reply, which is its `reference`."""
    turns = _reply_turns(rows)
    random.Random(f"prompts/{seed}").shuffle(turns)
    return [
        {**_prompt(rows[index], turn), "reference": rows[index]["messages"][turn]["content"]}
        for index, turn in turns[:count]
    ]


def _reply_turns(rows: Sequence[Row]) -> list[tuple[int, int]]:
    """(row, message) of every reply that follows a user's turn and may be trained on."""
    return [
        (index, turn)
        for index, row in enumerate(rows)
        for turn, message in enumerate(row["messages"])
        if turn and message["role"] == "assistant" and message.get("train", True)
    ]


def _prompt(row: Row, turn: int) -> Row:
    return {"persona": row["persona"], "prompt": row["messages"][:turn], "dialogue_id": row["dialogue_id"]}


def _pair(row: Row, turn: int, chosen: str, rejected: str, kind: str) -> Row:
    return {
        **_prompt(row, turn),
        "chosen": [{"role": "assistant", "content": chosen}],
        "rejected": [{"role": "assistant", "content": rejected}],
        "kind": kind,
    }


def _statement(text: str, fact: Fact) -> tuple[int, int] | None:
    """Where a reply states a fact: the span of its value, or None.

    The value has to follow the stem's last word, unless it is a noun by its look: otherwise "i eat donuts" would become
    "i eat shopping" for the stem "i like".
    """
    last, first = fact.stem.split()[-1], fact.value.split()[0]
    noun = fact.stem.startswith("my favorite") or last in ("in", "at", "from") or first in ("a", "an", "the")
    verb = {"am": r"\bam|'m", "have": r"\bhave|'ve"}.get(last, rf"\b{last}")
    before = r"(?<![\w'])" if noun else rf"(?:{verb})(?: also| really| still)?\s+"
    words = r"\s+".join(map(re.escape, fact.value.split()))
    stated = re.compile(rf"{before}(?P<value>{words})(?![\w'])", re.IGNORECASE)
    for sentence in re.finditer(r"[^.!?]+[.!?]*", text):
        found = stated.search(sentence[0])
        spoken = set(re.findall(r"\w+", sentence[0].casefold()))
        denied = bool(spoken & {"not", "no", "never", "don", "t", "nor"})
        if found and "?" not in sentence[0] and spoken & {"i", "my", "me"} and denied == fact.negated:
            return sentence.start() + found.start("value"), sentence.start() + found.end("value")
    return None


def _exchanged(
    rows: Sequence[Row], mentions: list[_Mention], count: int, rng: random.Random
) -> list[tuple[_Mention, str]]:
    """At most `count` mentions, two and two of one slot, each with the other's value."""
    character = characters(rows)
    known = [[content(fact) for fact in row["persona"]] for row in rows]

    def fits(left: _Mention, right: _Mention) -> bool:
        """The value of `right` is news to the character, the dialogue and the reply of `left`."""
        words = content(right.value)
        reply = rows[left.row]["messages"][left.turn]["content"] if left.span[1] else ""
        return (
            character[left.row] != character[right.row]
            and left.value[0].isupper() == right.value[0].isupper()
            and not any(words <= fact for fact in [*known[left.row], content(reply)])
        )

    waiting: dict[Slot, list[_Mention]] = defaultdict(list)
    found: list[tuple[_Mention, str]] = []
    for mention in rng.sample(mentions, len(mentions)):
        if len(found) + 2 > count:
            break
        others = waiting[mention.fact.slot]
        partner = next((other for other in others[:CANDIDATES] if fits(mention, other) and fits(other, mention)), None)
        if partner is None:
            others.append(mention)
        else:
            others.remove(partner)
            found += [(mention, partner.value), (partner, mention.value)]
    return found


# -- judging by a person ---------------------------------------------------------------------------------------------


def review_rows(pairs: Iterable[Row], seed: int = 0) -> list[Row]:
    """What a person is given to judge: each pair's replies as `reply_a` and `reply_b` in random order.

    Nothing in a row says which one the rules prefer. The judge writes "a", "b" or "undecided" as `decision`.
    """
    rng = random.Random(f"review/{seed}")
    rows = []
    for pair in pairs:
        replies = [pair["chosen"][0]["content"], pair["rejected"][0]["content"]]
        rng.shuffle(replies)
        rows.append(
            {**{key: pair[key] for key in ("persona", "prompt", "dialogue_id")},
             "reply_a": replies[0], "reply_b": replies[1], "decision": ""}
        )  # fmt: skip
    return rows


def import_review(path: str | Path, given: Sequence[Row], rejected: list[Row]) -> list[Row]:
    """The pairs that a person decided, of kind `reviewed`, in the order of the file.

    Args:
        path: The JSON-lines file of the rows `given` that came back, with decisions; further keys are let be.
        given: What [`review_rows`] gave out.
        rejected: Gets {"file", "line", "reason", "dropped", "text"} for each line without a decision or that is not one of
            those given out, and for each of these that has no line.

    Raises:
        FileNotFoundError: if there is no such file.
    """
    waiting: dict[str, list[Row]] = defaultdict(list)
    for row in given:
        waiting[_identity(row)].append(row)
    pairs = []

    def reject(line: int | None, reason: str, text: str) -> None:
        rejected.append({"file": str(path), "line": line, "reason": reason, "dropped": "pair", "text": text})

    for number, line in enumerate(Path(path).read_text(encoding="utf-8").split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            reject(number, f"not JSON: {error.msg} at character {error.pos}", line)
            continue
        if not isinstance(row, dict) or not waiting[_identity(row)]:
            reject(number, "not a row that was given out, or there twice", line)
            continue
        waiting[_identity(row)].pop()
        decision = row.get("decision")
        if decision not in ("a", "b"):
            known = decision in ("", *DECISIONS)
            fault = f"`decision` must be one of {', '.join(DECISIONS)} or empty, got {decision!r}"
            reject(number, "undecided" if known else fault, line)
            continue
        chosen, other = ("reply_a", "reply_b") if decision == "a" else ("reply_b", "reply_a")
        pairs.append(
            {**{key: row[key] for key in ("persona", "prompt", "dialogue_id")},
             "chosen": [{"role": "assistant", "content": row[chosen]}],
             "rejected": [{"role": "assistant", "content": row[other]}],
             "kind": "reviewed"}
        )  # fmt: skip
    for row in (row for rows in waiting.values() for row in rows):
        reject(None, "missing from the file", json.dumps(row))
    return pairs


def _identity(row: Row) -> str:
    """A review row without what the person adds to it."""
    return json.dumps([row.get(key) for key in ("persona", "prompt", "dialogue_id", "reply_a", "reply_b")])
