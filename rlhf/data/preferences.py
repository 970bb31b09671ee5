"""Preference pairs and prompts from real dialogues, and the judging of pairs by a person.

A pair is {"persona", "prompt", "chosen", "rejected", "dialogue_id", "kind"}. Its kinds:

- ``contradiction``: a reply of the dialogue that states a fact; rejected states a value that the fact rules out;
- ``true_suggestion``: the user asks whether a fact is so; rejected denies it;
- ``giving_in``: the user suggests a value that a fact rules out; rejected accepts it;
- ``other_persona``: a reply of the dialogue that speaks of its character; rejected is another's, to a similar turn.

Values are exchanged between two facts, and replies between two turns: what is right for one character is wrong for the
other, so each is chosen as often as rejected, and so are "yes" and "no". Few characters have few values to exchange, so
false ones may be borrowed from others, who get none in return. Nobody is asked about what rules nothing out ("so you
have a dog , right ?"): such a suggestion could not be false, and whoever reads the prompt would know the answer. In about
a quarter of the ``other_persona`` pairs the dialogue still tells which reply belongs to it.

Persona sentences are free English, taken apart by `rlhf.facts`: "i have two dogs ." has the stem "i have" and the value
"two dogs". Only values that rule each other out contradict: two ages, numbers of the same thing, favourites, jobs,
places, names, and what stands in `_GROUPS`. "I have a dog" rules out no cat, so nobody is made to deny one.
"""

import json
import random
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.feature_extraction.text import HashingVectorizer, TfidfTransformer
from sklearn.preprocessing import normalize

from rlhf.data.audit import overlap
from rlhf.data.split import characters
from rlhf.facts import (
    JOBS,
    NUMBER,
    Claim,
    Fact,
    as_usual,
    content,
    lemmas,
    parse_claim,
    parse_fact,
    second_person,
    slot_values,
)

Row = dict[str, Any]

CANDIDATES = 64  # values looked at for each pair, which keeps the work linear in the number of pairs
# Replies of other characters: 20,000 at most are compared, each with the 32 to the most similar turns.
POOL = 20_000
NEIGHBOURS = 32
MIN_SIMILARITY = 0.1  # of two turns; below it the dialogue tells which reply is its own
BEFORE = 0.5  # weight of the turn before the user's: "how about you ?" means what was said there
SAME_OPENING = 0.15  # what each of the first two words adds to the similarity if the replies share it
MAX_LENGTH_GAP = 0.3  # of the chosen reply's number of words
# Who begins with one of these answers or takes up what was just said, which the other reply must do with the same one.
_TAKES_UP = frozenset(
    [
        "yes",
        "yeah",
        "yep",
        "no",
        "nope",
        "not",
        "too",
        "also",
        "that",
        "that's",
        "thats",
        "this",
        "it",
        "its",
        "it's",
        "they",
        "they're",
        "them",
        "he",
        "he's",
        "she",
        "she's",
        "him",
        "her",
        "there",
        "those",
        "same",
        "thank",
        "thanks",
        "sure",
        "either",
        "neither",
        "sounds",
        "because",
    ]
)
FRAMES = ("so {} , right ?", "{} , is that right ?", "you told me that {} , did you not ?", "i heard that {} ?")
# How the wrong reply to a suggestion errs: another value, the fact itself denied, yes and no confused. Each is used
# equally often for true and for false suggestions, which balances "yes", "no", "not" and the lengths. Without the last,
# a model looks at the value alone and learns "yes , <right value>" as the answer to a false suggestion.
ERRORS = ("value", "denial", "polarity")
DECISIONS = ("a", "b", "undecided")

# Values of two different groups of a slot rule each other out.
_GROUPS = {
    "gender": ("boy man male guy dad father grandfather", "girl woman female lady mom mother grandmother"),
    "marital status": ("married", "single", "engaged"),
    "diet": ("vegan vegetarian pescatarian", "omnivore carnivore"),
    "faith": (
        "christian catholic mormon baptist lutheran methodist", "buddhist", "muslim", "jewish jew", "hindu",
        "atheist agnostic",
    ),
}  # fmt: skip
# What people are besides their job: a doctor may be a musician.
_SIDELINES = re.compile(
    r"\b(?:artist|author|blogger|comedian|cook|dancer|gardener|guide|host|hunter|magician|model|musician|painter|"
    r"performer|photographer|player|poet|singer|streamer|writer|youtuber)$"
)
_PLACES = ("home", "birthplace", "origin", "childhood home")
_KIND_OF_PLACE = re.compile(
    r"\b(?:a|an|the|my|home|house|apartment|flat|town|city|country|countryside|farm|woods|village|suburbs?|mountains|"
    r"area|school|college|dorms?|basement|poverty|cabin|mansion|trailer|rv|condo|studio|place|alone|north|south|east|"
    r"west|midwest)\b"
)
_NUMBER = re.compile(rf"\b{NUMBER}\b", re.IGNORECASE)
_ADVERBS = r"(?:\s+(?:also|really|still|just|currently|now|actually|only))*"
_DENIALS = frozenset(("not", "no", "never", "don", "dont", "t", "nor", "without"))


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

Key = tuple[Any, ...]


@dataclass(frozen=True)
class _Mention:
    """A fact of a row, and where the pair is asked: before message `turn`. `value` is how the text there writes it.

    Mentions with one `key` may exchange their values.
    """

    row: int
    turn: int
    fact: Fact
    value: str
    key: Key
    claim: Claim
    span: tuple[int, int] = (0, 0)

    def foil(self, other: "_Mention") -> str:
        """The value with what `other` has instead: of numbers the number alone, "two dogs" with "three cats" ->
        "three dogs".
        """
        if self.key[0] in ("number", "age"):
            return _NUMBER.sub(_NUMBER.findall(other.value)[0], self.value)
        return other.value


def persona_pairs(
    rows: Sequence[Row], count: int, seed: int, lenders: Sequence[Row] = ()
) -> tuple[list[Row], dict[str, float]]:
    """At most `count` pairs of all kinds: at most a third contradictions, at most half of the rest suggestions.

    Contradictions are rare, since real replies seldom repeat a fact's words, and similar turns of which both replies
    speak of their characters are not frequent either, so that there may be fewer pairs than asked for.

    Args:
        rows: Dialogues, whose characters the pairs are about.
        count: Of pairs.
        seed: Of every draw.
        lenders: Dialogues of other characters, whose values may stand as false ones where the characters of `rows` have
            none to exchange.

    Returns:
        The pairs in random order, and [`fact_coverage`] of the rows.
    """
    pairs = contradiction_pairs(rows, count // 3, seed, lenders)
    pairs += suggestion_pairs(rows, (count - len(pairs)) // 2, seed, lenders)
    pairs += other_persona_pairs(rows, count - len(pairs), seed)
    random.Random(f"pairs/{seed}").shuffle(pairs)
    return pairs, fact_coverage(rows)


def contradiction_pairs(rows: Sequence[Row], count: int, seed: int, lenders: Sequence[Row] = ()) -> list[Row]:
    """At most `count` pairs of a reply that states a fact, and the same reply with a value that the fact rules out.

    A reply states a fact where a sentence of it that is neither a question nor a denial has the fact's verb in the first
    person with the value behind it; a favourite where it has "my favorite" and the value.
    """
    rng = random.Random(f"contradictions/{seed}")
    all_rows = [*rows, *lenders]
    facts = [_exclusive_facts(row["persona"]) for row in all_rows]
    mentions = []
    for index, turn in _reply_turns(all_rows):
        text = all_rows[index]["messages"][turn]["content"]
        for fact, claim, key in facts[index]:
            span = _statement(text, fact, claim)
            if span:
                mentions.append(_Mention(index, turn, fact, text[slice(*span)], key, claim, span))
    pairs = []
    for mention, value in _exchanged(all_rows, len(rows), mentions, count, rng):
        row = rows[mention.row]
        text, (start, end) = row["messages"][mention.turn]["content"], mention.span
        pairs.append(_pair(row, mention.turn, text, text[:start] + value + text[end:], "contradiction"))
    return pairs


def suggestion_pairs(rows: Sequence[Row], count: int, seed: int, lenders: Sequence[Row] = ()) -> list[Row]:
    """At most `count` pairs of replies to a question about a fact, right or wrong, put at a random point of a dialogue.

    The kinds are `true_suggestion` and `giving_in`, equally many, about facts that rule other values out. Questions and
    replies are written as the dialogue is: in lower case with spaces around punctuation, or as usual.
    """
    rng = random.Random(f"suggestions/{seed}")
    all_rows = [*rows, *lenders]
    mentions: list[_Mention] = []
    for index, row in enumerate(all_rows):
        turns = [turn for turn, message in enumerate(row["messages"]) if message["role"] == "user"]
        for fact, claim, key in _exclusive_facts(row["persona"]) if turns else ():
            mentions.append(_Mention(index, rng.choice(turns), fact, fact.value, key, claim))
    found = _exchanged(all_rows, len(rows), mentions, count, rng)
    number = len(found) // 2
    false = [(False, error) for error in islice(cycle(ERRORS), number // 2)]
    true = [(True, error) for error in islice(cycle(ERRORS), number - len(false))]
    plan = rng.sample([*false, *true], number)
    # The two pairs of an exchange come one after the other and get the same suggestion.
    return [
        suggestion_pair(rows[mention.row], mention.turn, mention.fact, foil, *plan[place // 2], rng)
        for place, (mention, foil) in enumerate(found[: 2 * number])
    ]


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

    Two replies are exchanged, so that each is chosen once and rejected once and no reply is better by itself. Where
    neither is better in its dialogue either, the persona decides: each shares a word with its character's persona and
    none with the other's; they answer similar turns, and take up nothing that was said in one dialogue alone; they are of
    like length, and both ask or neither. The most similar turns and replies come first.
    """
    rng = random.Random(f"preferences/{seed}")
    answers = _telling(rows, rng)
    character = characters(rows)

    def echo(own: _Answer, other: _Answer) -> int:
        """-1, 0 or 1: whether the other reply or the true one repeats more of the prompt."""
        prompt = rows[own.row]["messages"][: own.turn]
        true, wrong = overlap(prompt, own.text), overlap(prompt, other.text)
        return (true > wrong) - (true < wrong)

    used: set[int] = set()
    pairs: list[Row] = []
    for places in _by_similarity(answers):
        if len(pairs) >= count:
            break
        left, right = (answers[place] for place in places)
        if (
            used.isdisjoint(places)
            and character[left.row] != character[right.row]
            and rows[left.row]["dialogue_id"] != rows[right.row]["dialogue_id"]
            and _alike(left, right)
            and left.may_be_answered_by(right)
            and right.may_be_answered_by(left)
            and abs(echo(left, right) + echo(right, left)) < 2
        ):
            used.update(places)
            for own, other in ((left, right), (right, left)):
                pairs.append(_pair(rows[own.row], own.turn, own.text, other.text, "other_persona"))
    return pairs[:count]


@dataclass(frozen=True)
class _Answer:
    """A reply, the two turns before it, and the words that say something: of the reply, those turns, and the persona."""

    row: int
    turn: int
    text: str
    asked: str
    before: str
    lemmas: frozenset[str]
    said: frozenset[str]
    known: frozenset[str]

    @property
    def opening(self) -> list[str]:
        return re.findall(r"[\w']+", self.text.casefold())[:3]

    def may_be_answered_by(self, other: "_Answer") -> bool:
        """Whether the other reply says nothing of this character, and takes up nothing that this dialogue has not."""
        return self.known.isdisjoint(other.lemmas) and not (other.lemmas & other.said) - self.said


def _telling(rows: Sequence[Row], rng: random.Random) -> list[_Answer]:
    """At most `POOL` replies, in random order, that share a word with their persona."""
    turns = _reply_turns(rows)
    rng.shuffle(turns)
    known: dict[int, frozenset[str]] = {}
    answers: list[_Answer] = []
    for index, turn in turns:
        before, asked, text = ["", *(message["content"] for message in rows[index]["messages"][: turn + 1])][-3:]
        if index not in known:
            known[index] = frozenset[str]().union(*map(lemmas, rows[index]["persona"]))
        words = lemmas(text)
        if not words.isdisjoint(known[index]):
            said = lemmas(f"{before} {asked}")
            answers.append(_Answer(index, turn, text, asked, before, words, said, known[index]))
        if len(answers) == POOL:
            break
    return answers


def _by_similarity(answers: Sequence[_Answer]) -> Iterator[tuple[int, int]]:
    """Pairs of places whose turns are similar, by the cosine of words and pairs of words; the most similar first."""
    if len(answers) < 2:
        return
    counter = HashingVectorizer(
        token_pattern=r"[\w']+|\?", ngram_range=(1, 2), norm=None, alternate_sign=False, dtype=np.float32
    )
    asked, before = (counter.transform([getattr(answer, key) for answer in answers]) for key in ("asked", "before"))
    weights = TfidfTransformer(sublinear_tf=True).fit(asked)
    vectors = normalize(weights.transform(asked) + BEFORE * weights.transform(before)).tocsr()
    openings = [answer.opening for answer in answers]
    found: dict[tuple[int, int], float] = {}
    for start in range(0, len(answers), 512):
        cosines = (vectors[start : start + 512] @ vectors.T).tocsr()
        for place, (begin, end) in enumerate(zip(cosines.indptr[:-1], cosines.indptr[1:], strict=True), start):
            near = cosines.data[begin:end] * (cosines.indices[begin:end] != place)
            similar = np.flatnonzero(near >= MIN_SIMILARITY)
            for at in similar[np.argsort(-near[similar], kind="stable")][:NEIGHBOURS]:
                other = int(cosines.indices[begin + at])
                same = sum(a == b for a, b in zip(openings[place][:2], openings[other][:2], strict=False))
                found[min(place, other), max(place, other)] = round(float(near[at]) + SAME_OPENING * same, 4)
    yield from sorted(found, key=lambda places: (-found[places], places))


def _alike(answer: _Answer, other: _Answer) -> bool:
    """Different texts of about the same length, of which both ask or neither, to a question both or neither."""
    words, others = len(answer.text.split()), len(other.text.split())
    return (
        abs(others - words) <= MAX_LENGTH_GAP * min(words, others)
        and other.text.strip().casefold() != answer.text.strip().casefold()
        and ("?" in answer.text) == ("?" in other.text)
        and ("?" in answer.asked) == ("?" in other.asked)
        and _TAKES_UP.intersection(answer.opening) == _TAKES_UP.intersection(other.opening)
    )


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


# -- facts that rule others out ----------------------------------------------------------------------------------------


def _exclusive_facts(persona: Iterable[str]) -> list[tuple[Fact, Claim, Key]]:
    """The facts whose value rules out others, with what those that may stand for it share."""
    return [found for sentence in persona if (found := _exclusive_fact(sentence))]


@cache
def _exclusive_fact(sentence: str) -> tuple[Fact, Claim, Key] | None:
    fact, claim = parse_fact(sentence), parse_claim(sentence)
    key = _key(fact, claim) if fact and claim else None
    return (fact, claim, key) if fact and claim and key else None


def _key(fact: Fact, claim: Claim) -> Key | None:
    """What facts share whose values rule each other out if they differ; None where no values do."""
    if not claim.exclusive or not claim.positive or fact.negated or claim.value not in fact.value:
        return None
    around = fact.value.replace(claim.value, "", 1).strip()
    if claim.slot == "age" or claim.slot.startswith("number of "):
        numbers = _NUMBER.findall(fact.value)
        if len(numbers) != 1 or claim.numbers <= {0, 1}:  # "one dogs"
            return None
        article = fact.value.split()[0] if fact.value.split()[0] in ("a", "an") else ""
        return ("age" if claim.slot == "age" else "number"), numbers[0].isdigit(), article
    if claim.slot in _GROUPS:
        return (claim.slot, fact.stem) if _group(claim) is not None else None
    if claim.slot == "job":
        plain = around in ("a", "an") and claim.value.split()[-1] in JOBS and "retired" not in claim.value
        sideline = _SIDELINES.search(claim.value)
        return ("job",) if plain and not sideline and fact.stem in ("i am", "i work as") else None
    if claim.slot in _PLACES:
        return None if _KIND_OF_PLACE.search(claim.value) else (claim.slot, fact.stem, around)
    if claim.slot == "name" or claim.slot.startswith("favorite "):
        return claim.slot, fact.stem, fact.slot[1]
    return None


def _group(claim: Claim) -> int | None:
    words = set(claim.value.split())
    found = [number for number, group in enumerate(_GROUPS[claim.slot]) if words & set(group.split())]
    return found[0] if len(found) == 1 else None


def _excludes(left: _Mention, right: _Mention) -> bool:
    """Whether one of the two facts rules the other out; they have one key."""
    if left.key[0] in ("number", "age"):
        return left.claim.numbers != right.claim.numbers
    if left.key[0] in _GROUPS:
        return _group(left.claim) != _group(right.claim)
    return not left.claim.lemmas & right.claim.lemmas


def _statement(text: str, fact: Fact, claim: Claim) -> tuple[int, int] | None:
    """Where a reply states a fact: the span of its value, or None."""
    stated, favorite = _stated(fact, claim), claim.slot.startswith("favorite ")
    for sentence in re.finditer(r"[^.!?]+[.!?]*", text):
        found = stated.search(sentence[0])
        spoken = set(re.findall(r"\w+", sentence[0].casefold()))
        if found is None or "?" in sentence[0] or spoken & _DENIALS:
            continue
        if not favorite or _says_favorite(sentence[0], claim.slot.removeprefix("favorite ")):
            return sentence.start() + found.start("value"), sentence.start() + found.end("value")
    return None


@cache
def _stated(fact: Fact, claim: Claim) -> re.Pattern[str]:
    words = r"\s+".join(map(re.escape, fact.value.split()))
    value = rf"(?<![\w'])(?P<value>{words})(?![\w'])"
    before = "" if claim.slot.startswith("favorite ") else rf"{_spoken(fact, claim)}{_ADVERBS}\s+"
    return re.compile(before + value, re.IGNORECASE)


def _spoken(fact: Fact, claim: Claim) -> str:
    """The pattern of a stem as people write it: "i am" is "i'm" too, and a job may have either verb."""
    am, have = rf"\b(?:i{_ADVERBS}\s+am|i'?m)", rf"\b(?:i{_ADVERBS}\s+have|i've)(?:\s+got)?"
    if claim.slot == "job":
        return rf"(?:{am}|\bi\s+work\s+as)"
    whole = {"i am": am, "i have": have, "i live in": rf"\bi{_ADVERBS}\s+live\s+in"}
    return whole.get(fact.stem, r"\b" + r"\s+".join(map(re.escape, fact.stem.split())))


def _says_favorite(sentence: str, noun: str) -> bool:
    """Whether a sentence has "my favorite", and behind it the noun or nothing that is named."""
    found = re.search(r"\bmy (?:\w+ )?favou?rites?\b(?P<rest>(?: \w+){0,3})", sentence.casefold())
    if found is None or re.search(r"\b(?:least|second|other|another)\b", sentence.casefold()):
        return False
    next_ = [*found["rest"].split(), ""][0]
    plain = next_ in ("", "is", "are", "was", "of", "so", "and", "too")
    return plain or bool(lemmas(found["rest"]) & lemmas(noun))


def _exchanged(
    rows: Sequence[Row], borrowers: int, mentions: list[_Mention], count: int, rng: random.Random
) -> list[tuple[_Mention, str]]:
    """At most `count` mentions of the first `borrowers` rows, each with a false value.

    Two and two of one key have each other's value; who finds nobody is given a value of the later rows.
    """
    character = characters(rows)
    known = [[content(fact) for fact in row["persona"]] for row in rows]

    def fits(left: _Mention, right: _Mention) -> bool:
        """The value of `right` is news to the character, the dialogue and the reply of `left`."""
        words = content(left.foil(right))
        reply = rows[left.row]["messages"][left.turn]["content"] if left.span[1] else ""
        return (
            character[left.row] != character[right.row]
            and left.value[0].isupper() == right.value[0].isupper()
            and not any(words <= fact for fact in [*known[left.row], content(reply)])
        )

    waiting: dict[Key, list[_Mention]] = defaultdict(list)
    found: list[tuple[_Mention, str]] = []
    own = [mention for mention in mentions if mention.row < borrowers]
    for mention in rng.sample(own, len(own)):
        if len(found) + 2 > count:
            break
        others = waiting[mention.key]
        partner = next(
            (
                other
                for other in others[:CANDIDATES]
                if _excludes(mention, other) and fits(mention, other) and fits(other, mention)
            ),
            None,
        )
        if partner is None:
            others.append(mention)
        else:
            others.remove(partner)
            found += [(mention, mention.foil(partner)), (partner, partner.foil(mention))]

    lent: dict[Key, list[_Mention]] = defaultdict(list)
    for mention in mentions[len(own) :]:
        lent[mention.key].append(mention)
    for mention in (mention for those in waiting.values() for mention in those):
        if len(found) >= count:
            break
        values = lent[mention.key]
        offered = rng.sample(values, min(len(values), CANDIDATES))
        lender = next((other for other in offered if _excludes(mention, other) and fits(mention, other)), None)
        if lender is not None:
            found.append((mention, mention.foil(lender)))
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
