"""A persona card, and the data that make one character of it: SFT rows, preference pairs, prompts and probes.

A card is a YAML or JSON file with `name`, `facts`, `style` and `examples`. Its facts are free English in the first
person. Each is taken apart by rule into a value and the sentence around it ("i work as a", "nurse", "."), and gets

- direct questions, by the topic of the fact (a table) or by its stem; facts that the same question would ask for are
  left to suggestions, since no question singles one of them out;
- foils, values that would be false: of the topic's table, or else those that the personas of the general dialogues
  have in the same slot;
- right replies in the card's own words and writing, behind several openings.

What no rule takes apart, what has no foil, and denials ("i do not drink .", which word rules cannot judge) stay in the
prompt and are asked about nowhere; `write` returns and logs each with its reason.

With a single character the right value is always the same, so a judge who never looks at the persona would be right.
Therefore every pair comes with its counterpart: the same question to a character whose card has the other value, where
chosen and rejected have changed places (or, where yes and no are confused, do so in the opposite direction). No judge
without the persona can then be right more than half of the time.

Held out from training: the last wording of every question, the last frame of suggestions, the dialogues that the small
talk comes from, and `heldout_facts` of the facts.
"""

import logging
import random
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rlhf.config import ConfigError, did_you_mean, load_yaml
from rlhf.data.sources import DataError
from rlhf.data.world import OPENERS, PROBE_TURNS, SLOT, SLOTS, SUGGESTION_FRAMES
from rlhf.data.world import Slot as Topic
from rlhf.facts import parse_fact, slot_values
from rlhf.files import write_jsonl
from rlhf.persona import Persona

logger = logging.getLogger(__name__)

Row = dict[str, Any]
Message = dict[str, Any]

GENERAL_SHARE = 0.4  # of the SFT rows: dialogues of other characters, so that the bot does not forget how to chat
MAX_FOILS = 16
MIN_SMALL_TALK = 8  # exchanges; a history has up to five different ones
MAX_SMALL_TALK_WORDS = 25  # of a turn

# -- the card --------------------------------------------------------------------------------------------------------

KEYS = ("name", "facts", "style", "examples")
ANY_QUESTION = "tell me something ."  # what an example without a question answers


def read(path: str | Path) -> Persona:
    """The persona of a card.

    `facts` is a list of sentences in the first person. An example is a line of the character, or a mapping
    `{user: ..., assistant: ...}` of what is said to it and its reply. `name`, `style` and `examples` may be left out.

    Raises:
        ConfigError: with every problem, each with its key, file and line.
    """
    values, lines = load_yaml(path)
    problems: list[str] = []

    def wrong(key: str, value: Any, what: str) -> None:
        where = lines.get(key, lines.get(key.rpartition(".")[0], lines.get(key.partition(".")[0], 1)))
        problems.append(f"`{key}`: {value!r} ({path}:{where}): {what}")

    def text(key: str, value: Any) -> str:
        if not isinstance(value, str) or not value.strip():
            quoted = "" if isinstance(value, str | Mapping | list) or value is None else "; quote it"
            wrong(key, value, f"must be text that is not blank{quoted}")
            return ""
        return " ".join(value.split())

    def items(key: str) -> list[Any]:
        value = values.get(key, [])
        if not isinstance(value, list) or not value and key in values:
            wrong(key, value, "must be a list, a line `- ...` for each")
            return []
        return value

    for key in values:
        if key not in KEYS:
            wrong(key, values[key], f"no such key{did_you_mean(key, KEYS)}; a card has {', '.join(KEYS)}")
    if "facts" not in values:
        problems.append(f"`facts` ({path}): is missing; a card needs the list of its facts")
    facts = [text(f"facts.{number}", fact) for number, fact in enumerate(items("facts"))]
    for fact, count in Counter(filter(None, facts)).items():
        if count > 1:
            wrong("facts", fact, f"is given {count} times; delete all but one")
    examples = []
    for number, example in enumerate(items("examples")):
        key = f"examples.{number}"
        if not isinstance(example, Mapping):
            examples.append((ANY_QUESTION, text(key, example)))
        elif set(example) != {"user", "assistant"}:
            odd = [name for name in example if name not in ("user", "assistant")]
            hint = did_you_mean(str(odd[0]), ("user", "assistant")) if odd else ""
            wrong(key, dict(example), f"must have the keys user and assistant{hint}")
        else:
            examples.append((text(f"{key}.user", example["user"]), text(f"{key}.assistant", example["assistant"])))
    name, style = (text(key, values[key]) if key in values else None for key in ("name", "style"))
    if problems:
        raise ConfigError(problems)
    return Persona(tuple(facts), name, style, tuple(examples))


# -- topics ----------------------------------------------------------------------------------------------------------


def _topic(name: str, values: str, facts: str, questions: str) -> Topic:
    parts = (tuple(part.strip() for part in text.split("|")) for text in (facts, questions))
    return Topic(name, tuple(values.split()), *parts)


# The persona world's slots, and what else cards tend to say. As there, the last question is held out.
TOPICS = (
    *SLOTS,
    _topic(
        "name",
        "anna robert clara henry alice victor emma oscar nora felix",
        "my name is {} . | i am called {} .",
        "what is your name ? | who are you ? | may i ask your name ? | what should i call you ? "
        "| by what name do people know you ?",
    ),
    _topic(
        "origin",
        " ".join(SLOT["city"].values),
        "i am from {} . | i come from {} .",
        "where are you from ? | where do you come from ? | which place are you from ? | tell me where you are from . "
        "| where are your roots ?",
    ),
    _topic(
        "workplace",
        "school hospital bank bakery library museum theatre restaurant factory farm shop hotel",
        "i work in a {} . | i work at a {} . | i work for a {} .",
        "where do you work ? | what place do you work at ? | tell me where you work . | where do you go to work ? "
        "| where could i find you during working hours ?",
    ),
    _topic(
        "age",
        "18 21 25 29 33 38 42 47 51 56 63 70",
        "i am {} years old .",
        "how old are you ? | what is your age ? | may i ask how old you are ? | tell me your age . "
        "| for how many years have you been around ?",
    ),
)
# "i am a vegetarian" is no job and "i have a headache" is no pet: here the value has to be a known one.
_NEEDS_KNOWN_VALUE = ("i am a {} .", "i have a {} .")
# Topics whose first wording follows from the others, so that it may stand in for the card's own.
_SAME = ("job", "city", "pet", "food", "hobby", "music", "sport", "instrument", "vehicle", "trip", "subject")
_NUMBERS = ("two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_DETERMINER = re.compile(r"(?:(?:in|at|from|to|as|for|with|on|of) )?(?:an? |the )?")
_NO_RULE = frozenset({"not", "no", "never", "neither", "nor", "without", "cannot", "nobody", "none", "can't", "don't"})
_WORD = re.compile(r"[^\W_]+")
_LIKED = (
    "like|love|enjoy|hate|dislike|prefer|want|need|play|practice|drive|ride|eat|drink|cook|read|write|watch|study|"
)
_LIKED += (
    "speak|teach|sing|paint|make|sell|grow|raise|collect|wear|own|buy|visit|believe in|listen to|dream of|run|go to"
)
_FAVOURITE = re.compile(r"my (?P<noun>[\w ]+?) (?:is|are|was|were) (?P<value>.+)")
_COUNTED = re.compile(rf"i have (?P<value>{'|'.join(_NUMBERS)}) (?P<noun>\w+)")
_VERB = re.compile(rf"i (?P<verb>{_LIKED}) (?P<value>.+)")
_NOUN_QUESTIONS = (
    "what {be} your {} ?", "tell me , what {be} your {} ?", "what would you say your {} {be} ?",
    "can you tell me what your {} {be} ?", "i wonder what your {} {be} ."
)  # fmt: skip
_COUNT_QUESTIONS = (
    "how many {} do you have ?", "do you have {} , and how many ?", "tell me , how many {} have you got ?",
    "what is the number of your {} ?"
)  # fmt: skip
_VERB_QUESTIONS = (
    "what do you {} ?", "tell me , what do you {} ?", "what is it that you {} ?", "can you tell me what you {} ?",
    "i wonder what you {} ."
)  # fmt: skip


def _recognised(text: str) -> tuple[str, str, tuple[str, ...], Topic | None] | None:
    """(slot, value, questions, topic) of a fact in lower case without its full stop; None where no table has it."""
    for topic in TOPICS:
        for fact in topic.facts:
            loose = re.escape(fact.removesuffix(" .").replace("favourite", "favorite")).replace(r"\ an?\ ", r"\ ")
            found = re.fullmatch(loose.replace(r"\{\}", "(?P<value>.+)").replace(r"\ a\ (", r"\ an?\ ("), text)
            if found and (fact not in _NEEDS_KNOWN_VALUE or found["value"].split()[-1] in topic.values):
                return topic.name, found["value"], topic.questions, topic
    if found := _COUNTED.fullmatch(text):
        return f"number of {found['noun']}", found["value"], _filled(_COUNT_QUESTIONS, found["noun"]), None
    if found := _FAVOURITE.fullmatch(text):
        be = "are" if re.search(r" (?:are|were) ", text) else "is"
        known = next((t for t in TOPICS if found["noun"] == f"favorite {t.name}"), None)
        noun = found["noun"].replace("favorite", "favourite")
        return noun, found["value"], tuple(q.format(noun, be=be) for q in _NOUN_QUESTIONS), known
    if found := _VERB.fullmatch(text):
        return f"i {found['verb']}", found["value"], _filled(_VERB_QUESTIONS, found["verb"]), None
    return None


def _filled(questions: Sequence[str], word: str) -> tuple[str, ...]:
    return tuple(question.format(word) for question in questions)


# -- facts -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Asked:
    """A fact of the card that can be asked about.

    Attributes:
        slot: names it among the card's facts.
        sentence: as the card writes it.
        value: what a reply has to name, without its article.
        wordings: sentences that state the fact, around the value: (before, after), without the full stop.
        foils: false values, never the card's.
        questions: direct ones, the last one held out; none where no question singles the fact out.
    """

    slot: str
    sentence: str
    value: str
    wordings: tuple[tuple[str, str], ...]
    foils: tuple[str, ...]
    questions: tuple[str, ...]

    def state(self, value: str, wording: int = 0) -> str:
        """The fact with this value, without its full stop."""
        before, after = self.wordings[wording]
        return _with_article(before, value) + value + after

    def contrast(self, value: str) -> str:
        """ "not a cat", with the article that the fact has before its value."""
        article = re.search(r"\b(?:an?|the) $", self.wordings[0][0], re.IGNORECASE)
        return "not " + _with_article(article[0].lower() if article else "", value) + value

    def suggest(self, value: str) -> str:
        """ "you have a cat" """
        return _second_person(self.state(value))


def _with_article(before: str, value: str) -> str:
    """ "i have a " before "owl" -> "i have an " """
    article = "an" if value[0].lower() in "aeiou" else "a"
    return re.sub(r"\b(a)n?( )$", lambda match: match[1] + article[1:] + match[2], before, flags=re.IGNORECASE)


_YOU = {
    "i am": "you are", "i was": "you were", "i'm": "you're", "i've": "you've", "i'd": "you'd", "i'll": "you'll",
    "i": "you", "am": "are", "my": "your", "mine": "yours", "me": "you", "myself": "yourself",
}  # fmt: skip
_ME = re.compile(rf"(?<![\w'])(?:{'|'.join(_YOU)})(?![\w'])", re.IGNORECASE)


def _second_person(text: str) -> str:
    return _ME.sub(lambda match: _YOU[match[0].lower()], text)


@dataclass(frozen=True)
class _Writing:
    """How the card writes: "i have a dog ." or "I have a dog." The tables are in the first of these."""

    spaced: bool
    lower: bool

    def __call__(self, text: str) -> str:
        if not self.spaced:
            text = re.sub(r"\s+(?=[,.?!])", "", text)
        if self.lower:
            return text
        text = re.sub(r"\bi\b", "I", text)
        return text[0].upper() + text[1:]


def _writing(persona: Persona) -> _Writing:
    text = " ".join((*persona.facts, *(reply for _, reply in persona.examples)))
    return _Writing(bool(re.search(r"\s[.,?!]", text)), not re.search(r"\b[A-Z]", " ".join(persona.facts)))


def asked_facts(persona: Persona, general: Sequence[Row]) -> tuple[list[Asked], dict[str, str]]:
    """The facts of a persona that can be asked about, and the others: {sentence: reason}.

    The name counts as a fact.

    Args:
        persona: Of the card.
        general: Rows whose personas give foils where no table does.
    """
    spoken = set(_WORD.findall(" ".join(persona.statements()).lower()))
    named = () if persona.name is None else persona.statements()[:1]
    values = slot_values(general)
    found: list[Asked] = []
    left: dict[str, str] = {}
    for sentence in (*named, *persona.facts):
        made = _asked(sentence, values, spoken)
        if isinstance(made, str):
            left[sentence] = made
        else:
            found.append(made)
    # Two facts that one question asks for: neither is its answer alone. Nor can they share a slot.
    often = Counter(fact.slot for fact in found)
    alone: list[Asked] = []
    for number, fact in enumerate(found, 1):
        if len(fact.foils) < 2:
            left[fact.sentence] = "no two other values of its kind are known, in the tables or the general dialogues"
            continue
        if often[fact.slot] > 1:
            fact = replace(fact, slot=f"{fact.slot} ({number})", questions=())
        alone.append(fact)
    return alone, left


def _asked(sentence: str, values: Mapping[Any, list[str]], spoken: set[str]) -> Asked | str:
    """The fact of a sentence, or why it cannot be asked about."""
    said = re.sub(r"[\s.!]+$", "", sentence.replace("\u2019", "'"))
    fact = parse_fact(sentence)
    text = f"{fact.stem} {fact.value}" if fact else re.sub(r"\s+", " ", said.casefold())
    text = text.replace("favourite", "favorite")
    if _NO_RULE & set(re.findall(r"[\w']+", text)) or "n't" in text:
        return "says what is not so, which word rules cannot judge"
    slot, value, questions, topic = _recognised(text) or ("", "", (), None)
    if not slot:
        if fact is None:
            return "no rule takes it apart"
        slot, value = fact.stem, fact.value
    value = value[len(_determiner(value)) :]
    words = r"\s+".join(map(re.escape, value.split()))
    place = list(re.finditer(rf"(?<![\w']){words}(?![\w'])", said, re.IGNORECASE))
    if not value or not re.fullmatch(r"[\w' -]+", value) or not place:
        return "its value cannot be judged by word rules"
    start, end = place[-1].span()
    value = said[start:end]
    foils: Sequence[str] = topic.values if topic else _NUMBERS if slot.startswith("number of ") else ()
    if not foils and fact:
        # Those with the same small words in front: "in a bank" for "in a school", not "the dark".
        lead = _determiner(fact.value)
        slot_foils = (other for other in values.get(fact.slot, ()) if _determiner(other) == lead)
        foils = [other[len(lead) :] for other in slot_foils]
    foils = [foil for foil in dict.fromkeys(foils) if not spoken & set(_WORD.findall(foil.lower()))]
    if topic and topic.name == "pet" and value.endswith("s") and value not in topic.values:
        foils = [f"{foil}s" for foil in foils]
    if value[:1].isupper():
        foils = [foil.title() for foil in foils]
    wordings = [(_decapitalised(said[:start]), said[end:])]
    if topic and topic.name in _SAME:
        before, _, after = topic.facts[0].removesuffix(" .").partition("{}")
        wordings.append((before, after))
    return Asked(slot, sentence, value, tuple(dict.fromkeys(wordings)), tuple(foils[:MAX_FOILS]), questions)


def _determiner(value: str) -> str:
    found = _DETERMINER.match(value)
    return found[0] if found else ""


def _decapitalised(text: str) -> str:
    return text if re.match(r"I\b|\W|$", text) else text[0].lower() + text[1:]


# -- exchanges -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Question:
    """A question about a fact, and how replies to it are worded."""

    kind: str
    fact: Asked
    suggested: str | None
    text: str
    wording: int
    opener: tuple[str, str]
    writing: _Writing
    contrast: bool = False

    def right(self, value: str, other: str = "", lies: bool = False) -> str:
        """What a character with this value replies; with `lies` it says yes for no. `other` is what it contrasts."""
        parts = [self.fact.state(value, self.wording)]
        if self.suggested is not None:
            parts[0] = f"{self.opener[(self.suggested == value) != lies]} {parts[0]}"
        if self.contrast:
            parts.append(f", {self.fact.contrast(other)}")
        return self.writing(" ".join([*parts, "."]))


class _Cast:
    """The character, what it can be asked, and the small talk of one side of the split."""

    def __init__(self, persona: Persona, facts: Sequence[Asked], talk: Sequence[tuple[str, str]], held_out: bool):
        self.persona, self.facts, self.talk, self.held_out = persona, list(facts), list(talk), held_out
        self.writing = _writing(persona)
        self.name = persona.name or "character"

    def question(
        self, rng: random.Random, fact: Asked, kind: str, held_out: bool, contrast: bool = False
    ) -> _Question:
        foil = rng.choice(fact.foils)
        suggested = {"direct": None, "false_suggestion": foil, "true_suggestion": fact.value}[kind]
        wordings = fact.questions if suggested is None else SUGGESTION_FRAMES
        text = rng.choice(wordings[-1:] if held_out else wordings[:-1])
        if suggested is not None:
            text = text.format(fact.suggest(suggested))
        wording, opener = rng.randrange(len(fact.wordings)), rng.choice(OPENERS)
        return _Question(kind, fact, suggested, self.writing(text), wording, opener, self.writing, contrast)

    def kind(self, rng: random.Random, fact: Asked) -> str:
        """Half of the questions are direct, where there are any."""
        return rng.choice(("direct", "direct", "false_suggestion", "true_suggestion")[0 if fact.questions else 2 :])

    def history(
        self, rng: random.Random, exchanges: int, without: Sequence[Asked] = (), talk_only: bool = False
    ) -> list[Message]:
        """Small talk, and questions about other facts, each at most once, with right replies."""
        facts = [fact for fact in self.facts if fact not in without]
        rng.shuffle(facts)
        messages: list[Message] = []
        for line, reply in rng.sample(self.talk, exchanges):
            if not talk_only and facts and rng.random() < 0.3:
                question = self.question(rng, fact := facts.pop(), self.kind(rng, fact), self.held_out)
                line, reply = question.text, question.right(fact.value)
            messages += _exchange(line, reply)
        return messages

    def dialogues(self, count: int, seed: int) -> Iterator[Row]:
        """SFT rows: one to five exchanges, in which facts are asked for after nothing or after small talk."""
        rng = random.Random(f"card/dialogues/{self.held_out}/{seed}")
        for index in range(count):
            messages: list[Message] = []
            if self.persona.examples and rng.random() < 0.25:
                messages += _exchange(*rng.choice(self.persona.examples))
            fact = self.facts[index % len(self.facts)]
            question = self.question(rng, fact, self.kind(rng, fact), self.held_out)
            # The fact's turn is first, or last after up to five exchanges.
            before, after = (0, rng.randint(0, 2)) if index % 2 else (rng.randint(0, 5), 0)
            told = (fact,)
            messages += self.history(rng, before, told) + _exchange(question.text, question.right(fact.value))
            messages += self.history(rng, after, told, talk_only=True)
            yield {**self._row(self.persona, index, "dialogue"), "messages": messages, "source": "card"}

    def pairs(self, count: int, seed: int) -> Iterator[Row]:
        """Preference pairs, each followed by its counterpart's.

        Kinds: `value` (rejected states another value, behind the yes or no that fits it), `denial` (the same, and both
        replies say of the other's value that it is not so), `polarity` (rejected has the right value behind the wrong
        yes or no).
        """
        rng = random.Random(f"card/pairs/{self.held_out}/{seed}")
        asked_as = ("direct", "false_suggestion", "true_suggestion")
        forms = [("value", kind) for kind in (*asked_as, *asked_as)]
        forms += [(error, kind) for error in ("polarity", "denial") for kind in asked_as[1:]]
        for index in range(-(-count // 2)):
            fact = self.facts[index % len(self.facts)]
            error, kind = forms[index // len(self.facts) % len(forms)]
            kind = kind if fact.questions or kind != "direct" else rng.choice(asked_as[1:])
            prompt = self.history(rng, rng.choice((0, 0, 1, 2, 3, 4, 5)), (fact,))
            question = self.question(rng, fact, kind, self.held_out, contrast=error == "denial")
            other = rng.choice([foil for foil in fact.foils if foil != question.suggested])
            if error != "value" or rng.random() < 0.7:  # else "no , i have a <third value> ."
                other = question.suggested if question.suggested not in (None, fact.value) else other
            prompt = [*prompt, *_exchange(question.text, "")[:1]]
            for number, (value, foil) in enumerate(((fact.value, other), (other, fact.value))):
                if 2 * index + number == count:
                    return
                chosen = question.right(value, foil)
                rejected = (
                    question.right(value, foil, lies=True) if error == "polarity" else question.right(foil, value)
                )
                yield {
                    **self._row(self._counterpart(fact, value), 2 * index + number, "pair"),
                    "prompt": prompt,
                    "chosen": _exchange("", chosen)[1:],
                    "rejected": _exchange("", rejected)[1:],
                    "kind": error,
                }

    def _counterpart(self, fact: Asked, value: str) -> Persona:
        """The character with another value of one fact."""
        if value == fact.value:
            return self.persona
        if self.persona.name is not None and fact.sentence == self.persona.statements()[0]:
            return replace(self.persona, name=value)
        end = fact.sentence[len(re.sub(r"[\s.!]+$", "", fact.sentence)) :]
        said = fact.state(value) + end
        said = said if self.writing.lower else said[0].upper() + said[1:]
        return replace(self.persona, facts=tuple(said if f == fact.sentence else f for f in self.persona.facts))

    def prompts(self, count: int, seed: int) -> Iterator[Row]:
        """PPO prompts, with what a rule needs to judge the reply."""
        rng = random.Random(f"card/prompts/{self.held_out}/{seed}")
        for index in range(count):
            fact = self.facts[index % len(self.facts)]
            question = self.question(rng, fact, self.kind(rng, fact), self.held_out)
            prompt = self.history(rng, rng.randint(0, 5), (fact,)) + _exchange(question.text, "")[:1]
            judged = {"reference": question.right(fact.value), **_judged(question)}
            yield {**self._row(self.persona, index, "prompt"), "prompt": prompt, **judged}

    def probes(self, seed: int, unseen: Sequence[Asked]) -> Iterator[Row]:
        """Every fact that a direct question singles out, in all three kinds, at two turns, in seen and held-out
        wordings; the facts of `unseen`, which were held out, in seen wordings."""
        values = {fact.slot: fact.value for fact in self.facts}
        for fact in (fact for fact in self.facts if fact.questions):
            rng = random.Random(f"card/probes/{fact.slot}/{seed}")
            for turn in PROBE_TURNS:
                history = self.history(rng, turn, talk_only=True)
                for split in ("held_out_slot",) if fact in unseen else ("seen", "held_out_wording"):
                    for kind in ("direct", "false_suggestion", "true_suggestion"):
                        question = self.question(rng, fact, kind, held_out=split == "held_out_wording")
                        yield {
                            "probe_id": f"{self.name}/{fact.slot}/{kind}/{turn}/{split}",
                            "persona_id": self.name,
                            "persona": list(self.persona.statements()),
                            "history": history,
                            "question": question.text,
                            "fact_id": f"{self.name}/{fact.slot}",
                            **_judged(question),
                            "persona_values": values,
                            "turn": turn,
                            "split": split,
                        }

    def _row(self, persona: Persona, index: int, what: str) -> Row:
        side = "heldout" if self.held_out else "train"
        return {"persona": list(persona.statements()), "dialogue_id": f"{self.name}/{side}-{what}-{index}"}


def _exchange(line: str, reply: str) -> list[Message]:
    return [{"role": "user", "content": line}, {"role": "assistant", "content": reply}]


def _judged(question: _Question) -> Row:
    fact = question.fact
    return {
        "kind": question.kind,
        "slot": fact.slot,
        "value": fact.value,
        "foil": question.suggested if question.kind == "false_suggestion" else None,
        "slot_values": [fact.value, *fact.foils],
    }


_CLAIM = re.compile(r"\b(?:my|mine|our|i have|i've|i had|i am an?|i'm an?|i work|i live|i own|i play|i like|i love)\b")
_COMMON = frozenset(
    _WORD.findall(
        "a an the i me my you your he she it we they is are am was were be been do does did have has had will would can "
        "to of and or but in on at for with from as so too not no yes that this what how very"
    )
)


def small_talk(rows: Sequence[Row], facts: Sequence[Asked]) -> list[tuple[str, str]]:
    """Exchanges that could be anybody's: of few words, in which the assistant claims nothing of itself.

    The reply has no "my", "i have" and the like and no word of its own persona, and neither turn has a value or a foil
    of the card.
    """
    values = {value.lower() for fact in facts for value in (fact.value, *fact.foils)}
    found: dict[tuple[str, str], None] = {}
    for row in rows:
        own = set(_WORD.findall(" ".join(row["persona"]).lower())) - _COMMON
        for before, after in zip(row["messages"], row["messages"][1:], strict=False):
            if (before["role"], after["role"]) != ("user", "assistant"):
                continue
            line, reply = before["content"], after["content"]
            said = set(_WORD.findall(reply.lower()))
            both = f" {' '.join(_WORD.findall(f'{line} {reply}'.lower()))} "
            short = max(len(line.split()), len(reply.split())) <= MAX_SMALL_TALK_WORDS
            anybodys = short and said and not said & own and not _CLAIM.search(reply.lower())
            if anybodys and not any(f" {value} " in both for value in values):
                found[line, reply] = None
    return list(found)


# -- files -----------------------------------------------------------------------------------------------------------


def write(
    folder: str | Path,
    persona: Persona,
    general: tuple[Sequence[Row], Sequence[Row]],
    seed: int,
    train_dialogues: int = 3000,
    heldout_dialogues: int = 200,
    train_pairs: int = 3000,
    heldout_pairs: int = 300,
    train_prompts: int = 3000,
    heldout_prompts: int = 200,
    heldout_facts: int = 1,
) -> dict[str, Any]:
    """Writes ``{dialogues,preferences,prompts}_{train,heldout}.jsonl`` and ``probes.jsonl`` into ``folder``.

    Args:
        folder: Of the stage.
        persona: Of the card.
        general: Training and held-out rows of dialogues between other people, which begin with the user.
        seed: Of every draw.
        train_dialogues: SFT rows; ``GENERAL_SHARE`` of them are general ones with their own personas, as far as there
            are so many.
        heldout_dialogues: The same, held out.
        train_pairs: Preference pairs; half of them are the counterparts'.
        heldout_pairs: The same, held out.
        train_prompts: For PPO.
        heldout_prompts: The same, held out.
        heldout_facts: Facts with a direct question that no training row asks for; they stand in the prompt alone.

    Returns:
        {"persona": the card, "facts": how each fact is used, "general_dialogues": {side: rows}, "small_talk":
        {side: exchanges}}.

    Raises:
        DataError: if the facts or the small talk of the general dialogues do not suffice.
    """
    folder = Path(folder)
    facts, left = asked_facts(persona, general[0])
    direct = [fact for fact in facts if fact.questions]
    if len(direct) <= heldout_facts:
        raise DataError(
            f"`facts`: {len(direct)} of the card's can be asked about by a question of their own, and `heldout_facts` "
            f"{heldout_facts} of them are held out, so none is left to train on. What stands against the others: {left}"
        )
    unseen = random.Random(f"card/facts/{seed}").sample(direct, heldout_facts)
    _log(facts, left, unseen)
    counts: dict[str, Any] = {
        "persona": asdict(persona),
        "facts": {
            "asked": [fact.sentence for fact in direct],
            "suggestions_only": [fact.sentence for fact in facts if not fact.questions],
            "held_out": [fact.sentence for fact in unseen],
            "left_out": left,
        },
        "general_dialogues": {},
        "small_talk": {},
    }
    sizes = ((train_dialogues, train_pairs, train_prompts), (heldout_dialogues, heldout_pairs, heldout_prompts))
    for held_out, rows, (dialogues, pairs, prompts) in zip((False, True), general, sizes, strict=True):
        side = "heldout" if held_out else "train"
        talk = small_talk(rows, facts)
        if len(talk) < MIN_SMALL_TALK:
            raise DataError(
                f"the {side} side of the general dialogues has {len(talk)} exchanges of small talk that could be "
                f"anybody's, fewer than {MIN_SMALL_TALK}. Give more general dialogues."
            )
        cast = _Cast(persona, facts if held_out else [fact for fact in facts if fact not in unseen], talk, held_out)
        rng = random.Random(f"card/general/{held_out}/{seed}")
        others = rng.sample(list(rows), min(len(rows), round(GENERAL_SHARE * dialogues)))
        mixed = [*others, *cast.dialogues(dialogues - len(others), seed)]
        rng.shuffle(mixed)
        write_jsonl(folder / f"dialogues_{side}.jsonl", mixed)
        write_jsonl(folder / f"preferences_{side}.jsonl", cast.pairs(pairs, seed))
        write_jsonl(folder / f"prompts_{side}.jsonl", cast.prompts(prompts, seed))
        counts["general_dialogues"][side], counts["small_talk"][side] = len(others), len(talk)
        if held_out:
            write_jsonl(folder / "probes.jsonl", cast.probes(seed, unseen))
    return counts


def _log(facts: Sequence[Asked], left: Mapping[str, str], unseen: Sequence[Asked]) -> None:
    only = [fact.sentence for fact in facts if not fact.questions]
    logger.info("%d facts of the card can be asked about, the name among them", len(facts))
    logger.info("%d held out from training: %s", len(unseen), "; ".join(fact.sentence for fact in unseen))
    if only:
        logger.warning("%d only by suggestions, since no question singles them out: %s", len(only), "; ".join(only))
    for sentence, reason in left.items():
        logger.warning("1 fact stands in the prompt alone: %r: %s", sentence, reason)
