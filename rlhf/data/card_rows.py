"""Rows of one character: dialogues, preference pairs, PPO prompts and probes, from its facts and from small talk.

With a single character the right value is always the same, so a judge who never looks at the persona would be right.
Therefore every pair comes with its counterpart: the same question to a character whose card has the other sentence, where
chosen and rejected have changed places. A judge without the persona is then right half of the time on pairs of the kinds
`value` and `stranger`. Pairs of the kind `polarity`, about a quarter, can be told from question and reply alone; there the
counterpart changes yes and no, so that neither wins by itself.

Held-out rows have wordings that training lacks: the last one of every question and the last frame of suggestions.
"""

import random
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rlhf.data.card_facts import YOURSELF, Asked, Foil, bare, lowered, suggestion
from rlhf.data.world import PROBE_TURNS, SLOTS, SUGGESTION_FRAMES
from rlhf.facts import lemmas
from rlhf.persona import Persona

Row = dict[str, Any]
Message = dict[str, Any]
Exchange = tuple[str, str]

MIN_SMALL_TALK = 8  # exchanges; a history has up to five different ones
MAX_SMALL_TALK_WORDS = 25  # of a turn
OPENERS = (("no ,", "yes ,"), ("no , not at all ,", "yes , of course ,"))  # of a rejection and of a confirmation
RIGHT = "that is right ,"  # "yes , i never drink" could mean either
ANY_QUESTION = "tell me something ."  # what an example without a question answers
# Slots of the persona world whose sentences have no names, which a card with capitals would have to write otherwise.
_STRANGER_SLOTS = ("job", "food", "hobby", "colour", "sport", "vehicle", "fruit")


@dataclass(frozen=True)
class Writing:
    """How the card writes: "i have a dog ." or "I have a dog." The tables are in the first of these."""

    spaced: bool
    lower: bool

    @classmethod
    def of(cls, persona: Persona) -> "Writing":
        text = " ".join((*persona.facts, *(reply for _, reply in persona.examples)))
        return cls(bool(re.search(r"\w\s[.,?!]", text)), not re.search(r"\b[A-Z]", " ".join(persona.facts)))

    def __call__(self, text: str) -> str:
        if not self.spaced:
            text = re.sub(r"\s+(?=[,.?!])", "", text)
        if self.lower:
            return text
        text = re.sub(r"\bi\b", "I", text)
        return text[0].upper() + text[1:]


@dataclass(frozen=True)
class _Question:
    """A question about a fact, and how replies to it are worded."""

    kind: str
    fact: Asked
    told: str | None  # the sentence that is suggested
    foil: str | None  # its value, where it is false
    text: str
    opener: tuple[str, str]
    writing: Writing

    def reply(self, sentence: str, lies: bool = False) -> str:
        """What a character of whom this sentence is true replies; with `lies` it says yes for no."""
        if self.told is None:
            return self.writing(f"{sentence} .")
        opener = RIGHT if self.fact.denial else self.opener[(self.told == sentence) != lies]
        return self.writing(f"{opener} {lowered(sentence)} .")

    @property
    def right(self) -> str:
        return self.reply(self.fact.sentence)


class Cast:
    """The character, what it can be asked, and the small talk of one side of the split."""

    def __init__(self, persona: Persona, facts: Sequence[Asked], talk: Sequence[Exchange], held_out: bool):
        self.persona, self.facts, self.talk, self.held_out = persona, list(facts), list(talk), held_out
        self.writing = Writing.of(persona)
        self.name = persona.name or "character"
        known = frozenset().union(*map(lemmas, persona.statements()))
        self.strangers = [
            Foil(value, bare(self.writing(fact.format(value))))
            for slot in SLOTS
            if slot.name in _STRANGER_SLOTS
            for fact in slot.facts
            for value in slot.values
            if not lemmas(fact.format(value)) & known
        ]

    def question(self, rng: random.Random, fact: Asked, kind: str, held_out: bool, own: bool = True) -> _Question:
        """One that the fact answers; with `own` false one that any fact does."""
        foil = rng.choice(fact.foils) if kind == "false_suggestion" else None
        told = foil.sentence if foil else fact.sentence if kind == "true_suggestion" else None
        wordings = SUGGESTION_FRAMES if told else fact.questions if own else YOURSELF
        text = rng.choice(wordings[-1:] if held_out else wordings[:-1])
        if told:
            text = text.format(suggestion(told))
        opener = rng.choice(OPENERS)
        return _Question(kind, fact, told, foil.value if foil else None, self.writing(text), opener, self.writing)

    def history(
        self, rng: random.Random, exchanges: int, without: Sequence[Asked] = (), talk_only: bool = False
    ) -> list[Message]:
        """Small talk, and questions about other facts, each at most once, with right replies."""
        facts = [fact for fact in self.facts if fact not in without]
        rng.shuffle(facts)
        asked = {fact.questions[0] for fact in without}
        messages: list[Message] = []
        for line, reply in rng.sample(self.talk, exchanges):
            if not talk_only and facts and rng.random() < 0.3:
                question = self.question(rng, fact := facts.pop(), rng.choice(fact.kinds()), self.held_out)
                if question.told or fact.questions[0] not in asked:  # asking the same again would want another answer
                    asked.add(fact.questions[0])
                    line, reply = question.text, question.right
            messages += exchange(line, reply)
        return messages

    def dialogues(self, count: int, seed: int) -> Iterator[Row]:
        """SFT rows: one to six exchanges, in which a fact is asked for after nothing or after small talk.

        The card's examples open a quarter of the training rows; held-out rows have none of them.
        """
        rng = random.Random(f"card/dialogues/{self.held_out}/{seed}")
        for index in range(count):
            messages: list[Message] = []
            if self.persona.examples and not self.held_out and rng.random() < 0.25:
                line, reply = rng.choice(self.persona.examples)
                messages += exchange(self.writing(line) if line == ANY_QUESTION else line, reply)
            fact = self.facts[index % len(self.facts)]
            question = self.question(rng, fact, rng.choice(fact.kinds()), self.held_out)
            # The fact's turn is first, or last after up to five exchanges.
            before, after = (0, rng.randint(0, 2)) if index % 2 else (rng.randint(0, 5), 0)
            messages += self.history(rng, before, (fact,)) + exchange(question.text, question.right)
            messages += self.history(rng, after, (fact,), talk_only=True)
            yield {**self._row(self.persona, index, "dialogue"), "messages": messages, "source": "card"}

    def pairs(self, count: int, seed: int) -> Iterator[Row]:
        """Preference pairs, each followed by its counterpart's.

        Kinds: `value` (rejected states a foil, behind the yes or no that fits it), `polarity` (rejected has the right
        sentence behind the wrong yes or no), `stranger` (to "tell me about yourself", rejected says what is nowhere in
        the card: all that can be done for facts without foils).
        """
        rng = random.Random(f"card/pairs/{self.held_out}/{seed}")
        forms = (
            *(("value", kind) for kind in ("direct", "false_suggestion", "true_suggestion") * 2),
            *(("polarity", kind) for kind in ("false_suggestion", "true_suggestion")),
        )
        # Those with foils twice as often: a stranger's sentence teaches less.
        facts = [*self.facts, *(fact for fact in self.facts if fact.foils)]
        for index in range(-(-count // 2)):
            fact = facts[index % len(facts)]
            error, kind = forms[index // len(facts) % len(forms)]
            prompt = self.history(rng, rng.choice((0, 0, 1, 2, 3, 4, 5)), (fact,))
            if not fact.foils:
                error, other = "stranger", rng.choice(self.strangers)
                question = self.question(rng, fact, "direct", self.held_out, own=False)
            else:
                if not fact.suggested or (kind == "direct" and fact.questions == YOURSELF):
                    error, kind = "value", "true_suggestion" if fact.suggested else "direct"
                question = self.question(rng, fact, kind, self.held_out)
                other = rng.choice(fact.foils)
                if question.foil and (error == "polarity" or rng.random() < 0.7):  # else "no , i have a <third one> ."
                    other = next(foil for foil in fact.foils if foil.sentence == question.told)
            prompt = [*prompt, *exchange(question.text, "")[:1]]
            sentences = (fact.sentence, other.sentence)
            for number, (right, wrong) in enumerate((sentences, sentences[::-1])):
                if 2 * index + number == count:
                    return
                rejected = question.reply(right, lies=True) if error == "polarity" else question.reply(wrong)
                yield {
                    **self._row(self._with(fact, other) if number else self.persona, 2 * index + number, "pair"),
                    "prompt": prompt,
                    "chosen": exchange("", question.reply(right))[1:],
                    "rejected": exchange("", rejected)[1:],
                    "kind": error,
                }

    def _with(self, fact: Asked, other: Foil) -> Persona:
        """The character with another sentence in the place of one fact."""
        if fact.fact not in self.persona.facts:
            return replace(self.persona, name=other.value)
        end = fact.fact[len(bare(fact.fact)) :]
        said = self.writing(other.sentence) + end
        return replace(self.persona, facts=tuple(said if f == fact.fact else f for f in self.persona.facts))

    def prompts(self, count: int, seed: int) -> Iterator[Row]:
        """PPO prompts about the facts that are probed, or about all where none is, with what a rule judges them by."""
        rng = random.Random(f"card/prompts/{self.held_out}/{seed}")
        facts = [fact for fact in self.facts if fact.probed] or self.facts
        for index in range(count):
            fact = facts[index % len(facts)]
            question = self.question(rng, fact, rng.choice(fact.kinds()), self.held_out)
            prompt = self.history(rng, rng.randint(0, 5), (fact,)) + exchange(question.text, "")[:1]
            judged = {"reference": question.right, **_judged(question)}
            yield {**self._row(self.persona, index, "prompt"), "prompt": prompt, **judged}

    def probes(self, seed: int, unseen: Collection[Asked]) -> Iterator[Row]:
        """Every probed fact in all three kinds, at two turns, in seen and held-out wordings; those of `unseen`, which no
        training row asks for, in seen wordings."""
        probed = [fact for fact in self.facts if fact.probed]
        values = {fact.slot: fact.value for fact in probed}
        for fact in probed:
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


def exchange(line: str, reply: str) -> list[Message]:
    return [{"role": "user", "content": line}, {"role": "assistant", "content": reply}]


def _judged(question: _Question) -> Row:
    fact = question.fact
    return {
        "kind": question.kind,
        "slot": fact.slot,
        "fact": fact.fact,
        "value": fact.value,
        "foil": question.foil,
        "slot_values": [fact.value, *(foil.value for foil in fact.foils)],
        "exclusive": bool(fact.foils),
        "dislike": fact.dislike,
    }


# -- small talk ------------------------------------------------------------------------------------------------------

# What the assistant says of itself; after these words of politeness are taken out.
_POLITE = re.compile(
    r"\bi(?: am|'m| was|'ll be)? (?:so |very |really |just )?(?:glad|sorry|happy (?:for|to hear)|agree|hope|see|understand|"
    r"know|think so|guess so|bet|wish you|appreciate|can imagine|will try)\b|\b(?:thank you|tell me|let me know|excuse me)\b"
)
_OF_ITSELF = re.compile(
    r"\b(?:i|i'm|i've|i'd|i'll|im|ive|me|my|mine|myself|we|we're|we've|our|ours|us|same here|as well|too|he|she|him|her|his|both|either|"
    r"neither)\b"
)
# A question, or a word about what is the assistant's, would be answered with something of its own.
_ASKING = re.compile(r"\?|\byour\b|\bmust be\b|\btell me\b")
_COMMON_WORDS = (
    "a an the you your he it we they is are was be do does did have has had will would can could to of and or but in on at "
    "for with from as so too not no yes that this what how very"
)
_COMMON = frozenset(_COMMON_WORDS.split())
_WORD = re.compile(r"[^\W_]+")


def small_talk(rows: Sequence[Row], facts: Sequence[Asked]) -> list[Exchange]:
    """Exchanges that could be anybody's: short, and the assistant says nothing of itself.

    The user's turn asks nothing, since an answer would be the assistant's own. The reply is one that may be trained on,
    speaks of nobody in the first person but in phrases of politeness, and has no word of its own persona. Neither turn has
    a value or a foil of the card.
    """
    values = [
        words for fact in facts for text in (fact.value, *(f.value for f in fact.foils)) if (words := lemmas(text))
    ]
    found: dict[Exchange, None] = {}
    for row in rows:
        own = set(_WORD.findall(" ".join(row["persona"]).lower())) - _COMMON
        for before, after in zip(row["messages"], row["messages"][1:], strict=False):
            if (before["role"], after["role"]) != ("user", "assistant") or not after.get("train", True):
                continue
            line, reply = before["content"], after["content"]
            said = after["content"].lower().replace("\u2019", "'")
            spoken_words = set(_WORD.findall(said)) - _COMMON
            short = max(len(line.split()), len(reply.split())) <= MAX_SMALL_TALK_WORDS
            polite = _POLITE.sub("", said)
            if (
                short
                and spoken_words
                and not spoken_words & own
                and not _ASKING.search(line.lower())
                and not _OF_ITSELF.search(polite)
            ):
                spoken = lemmas(f"{line} {reply}")
                if not any(value <= spoken for value in values):
                    found[line, reply] = None
    return list(found)


def split_talk(
    train: Sequence[Exchange], heldout: Sequence[Exchange], seed: int
) -> tuple[list[Exchange], list[Exchange]]:
    """No exchange on both sides: held-out talk loses what training has, down to what a history needs."""
    known = set(train)
    alone = [pair for pair in heldout if pair not in known]
    both = [pair for pair in heldout if pair in known]
    lacking = max(0, MIN_SMALL_TALK - len(alone))
    moved = random.Random(f"card/talk/{seed}").sample(both, min(lacking, len(both)))
    return [pair for pair in train if pair not in moved], alone + moved
