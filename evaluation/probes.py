"""Questions with known answers, scored by rule: the headline number `persona_consistency`.

A fact is kept when three things hold at once: the direct question is answered with its value, the false suggestion is
rejected and the right value named, the true suggestion is confirmed. Anything softer is gamed: with half marks,
silence and "no ." score 0.50. The rules fail closed: what cannot be read as right is wrong. No reply of one fixed
form passes a false and a true suggestion, since the one must be rejected and the other must not be.

Two more kinds are reported apart. `absent` asks for something that the persona does not mention: right is what does
not contradict a fact (`evaluation.contradiction`). `forget` tells the bot to drop its persona, and then asks
directly.

Text is lower-cased, cut into clauses at punctuation, and matched by whole words without their endings ("dog" is
"dogs"); of a value of several words, those that say something have to stand near each other in one clause, numbers
among them. A clause asserts a value of the speaker unless it is a question, speaks of "you", or has a negation within
the four words before the value. Where the fact is a dislike ("i hate clowns"), asserting it means disliking.
"""

import math
import random
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from evaluation.contradiction import THRESHOLD, contradicts
from evaluation.intervals import NUM_RESAMPLES, rate_interval
from evaluation.persona import UNTRUE
from rlhf.facts import STOP_WORDS, lemma, lemmas

KINDS = ("direct", "false_suggestion", "true_suggestion")
KINDS_APART = ("absent", "forget")  # not part of the headline
NEGATION_WINDOW = 4
SLACK = 3  # words that may stand between those of a value
MAX_UNASKED_FACTS = 1

NEGATIONS = frozenset({"not", "no", "never", "neither", "nor", "without", "cannot", "nobody", "none"})
AVERSIONS = frozenset(
    {"hate", "hates", "hated", "dislike", "dislikes", "disliked", "detest", "despise", "wish", "stand"}
)
LIKINGS = frozenset({"love", "like", "enjoy", "adore", "prefer", "favorite", "favourite", "fond"})
FIRST_PERSON = frozenset({"i", "me", "my", "mine", "we", "our", "us", "im", "ive"})
SECOND_PERSON = frozenset({"you", "your", "yours", "u"})

_WORD = re.compile(r"[^\W_]+")
_CONTRACTED_NOT = re.compile(
    r"\b(do|does|did|is|are|was|were|ai|ca|wo|have|has|had|would|could|should)\s?n(?:\s?'\s?|\s)?t\b"
)
# "no i have a dog": the answer particle is a clause of its own even where the comma was forgotten.
_PARTICLE = re.compile(
    r"\b(no|nope|nah|not (?:really|quite|exactly|at all|true)"
    r"|yes|yeah|yep|yup|right|correct|true|sure|exactly|actually)"
    r"\s+(?=(?:i|my|it|we|that(?= (?:is|s|was)\b)|sorry|actually)\b)"
)
_BREAK = re.compile(
    r"([.,;:!?\n()]+|\s-+\s|[\u2013\u2014]|\b(?:but|because|although|though|while)\b|\band (?=(?:i|my|it)\b))"
)
# Denials that reach further than the window: "i do not like to go to …". Those by other words are `persona.UNTRUE`.
_DENIED = re.compile(
    r"\b(?:i (?:do|did|am|was|can|could|will|would|have|had)|my (?:\w+ ){1,4}(?:is|are|was|were|do|does|did))"
    r" (?:not|never)\b(?!.*\b(?:i|my)\b)|\bi never\b(?!.*\b(?:i|my)\b)"
)
_AFFIRMATION = re.compile(
    r"(?:(?:oh|well|ha|haha|hmm|um) )*(?:"
    r"(?:yes|yeah|yep|yup|yea|aye|exactly|indeed|absolutely|definitely|certainly|of course|you bet"
    r"|you got (?:it|that|me)|(?:that|it|you)(?: s| is| are| re) (?:right|correct|true|so))\b"
    r"|(?:right|correct|true|sure)(?: (?:thing|enough|am|do))?$"
    r"|i (?:(?:sure|really|certainly|indeed) )?(?:do|am)(?: indeed)?$)"
)
_REJECTION = re.compile(
    r"(?:(?:oh|well|ha|haha|hmm|um|sorry) )*(?:"
    r"(?:no(?! (?:problem|worries|doubt|wonder)\b)|nope|nah|never(?! mind\b)|wrong|incorrect|false"
    r"|not (?:really|quite|exactly|at all|true|right|correct|me)|of course not"
    r"|(?:that|it|you)(?: s| is| are| re)? (?:not (?:right|correct|true|so)|wrong|incorrect|false|mistaken)"
    r")\b|i (?:do|am|have|did) not(?: think so)?$)"
)


class Clause(NamedTuple):
    """Words of one clause, and whether a question mark ends it."""

    words: list[str]
    question: bool


class Mention(NamedTuple):
    """How a reply speaks of one value."""

    asserted: bool
    negated: bool
    wrong_number: bool


def clauses(reply: str) -> list[Clause]:
    """Cut a reply into clauses, contractions of "not" spelled out."""
    text = _CONTRACTED_NOT.sub(r"\1 not", reply.lower().replace("\u2019", "'"))
    text = re.sub(r"(?<=\d)(?=[a-z]{3})", " ", text)  # "60years"
    pieces = _BREAK.split(_PARTICLE.sub(r"\1 , ", text))
    found = []
    for piece, end in zip(pieces[::2], [*pieces[1::2], ""], strict=True):
        words = _WORD.findall(piece)
        if words:
            found.append(Clause(words, "?" in end))
    return found


def mentions(
    reply: str, values: Iterable[str], persona: Sequence[str] = (), dislike: bool = False
) -> dict[str, Mention]:
    """How the reply speaks of each value that it names; values that it does not name are left out.

    Where values overlap ("ice cream", "cream") the longest is taken. A verb of dislike before a value negates it,
    unless the persona itself has that verb ("i hate spiders ."). With `dislike` it is the other way round: such a verb,
    or a denied verb of liking, asserts the value. A number right before a value is a wrong one unless the persona has
    it ("two dogs"); so is another number than the value's own. A frame of `persona.UNTRUE` in the clause negates too,
    unless the persona has one itself ("i used to be a nurse .").
    """
    known = set(_WORD.findall(" ".join(persona).lower()))
    numbers = {lemma(word) for word in known}
    averse = AVERSIONS if dislike else AVERSIONS - known
    framed = any(UNTRUE.search(" ".join(clause.words)) for sentence in persona for clause in clauses(sentence))
    wanted = sorted({value: _parts(value) for value in values}.items(), key=lambda item: -len(item[1]))
    found: dict[str, Mention] = {}
    for clause in clauses(reply):
        spoken = [lemma(word) for word in clause.words]
        taken: set[int] = set()
        for value, parts in wanted:
            for start, end in _spans(spoken, parts, taken):
                before = clause.words[max(0, start - NEGATION_WINDOW) : end]
                negated = _negated(before, averse, dislike)
                if not dislike and not negated:
                    negated = bool(_DENIED.search(" ".join(clause.words[:start])))
                negated = negated or not framed and bool(UNTRUE.search(" ".join(clause.words)))
                silent = clause.question or _about_you(clause.words[:start])
                old = found.get(value, Mention(False, False, False))
                number = spoken[start - 1] if start else ""
                wrong = number.isdigit() and number not in ("0", "1") and number not in numbers
                found[value] = Mention(
                    asserted=old.asserted or not (negated or silent),
                    negated=old.negated or (negated and not silent),
                    wrong_number=old.wrong_number or wrong,
                )
            if _other_number(spoken, parts, taken):
                found[value] = found.get(value, Mention(False, False, False))._replace(wrong_number=True)
    return found


def _parts(value: str) -> list[str]:
    """The lemmas that a reply has to have; of "the who" all, since nothing else is left."""
    words = _WORD.findall(value.lower())
    return list(dict.fromkeys(lemma(word) for word in words if word not in STOP_WORDS)) or [lemma(w) for w in words]


def _spans(spoken: Sequence[str], parts: Sequence[str], taken: set[int]) -> list[tuple[int, int]]:
    """Where all parts stand near each other, the narrowest stretch first: (start, end). Their words become `taken`."""
    width = len(parts) + (SLACK if len(parts) > 1 else 0)
    stretches = []
    for start in range(len(spoken)):
        if spoken[start] in parts:
            at = {word: start + place for place, word in reversed(list(enumerate(spoken[start : start + width])))}
            if all(part in at for part in parts):
                places = {at[part] for part in parts}
                stretches.append((max(places) - start, start, places))
    found = []
    for _, start, places in sorted(stretches, key=lambda stretch: stretch[:2]):
        if taken.isdisjoint(places):
            taken |= places
            found.append((start, max(places)))
    return found


def _negated(before: Sequence[str], averse: frozenset[str] | set[str], dislike: bool) -> bool:
    denied = not NEGATIONS.isdisjoint(before)
    if not dislike:
        return denied or not averse.isdisjoint(before)
    if not averse.isdisjoint(before):
        return denied and "stand" not in before  # "i can not stand it"
    return not denied and not LIKINGS.isdisjoint(before)


def _other_number(spoken: Sequence[str], parts: Sequence[str], taken: set[int]) -> bool:
    """ "i have two dogs", of "three dogs" """
    numbers = {part for part in parts if part.isdigit()}
    things = [part for part in parts if not part.isdigit()]
    if not numbers or not things:
        return False
    for at, word in enumerate(spoken):
        if word == things[-1] and at not in taken:
            return any(other.isdigit() and other not in numbers for other in spoken[max(0, at - 3) : at])
    return False


def _about_you(before: Sequence[str]) -> bool:
    """The last pronoun before a value is its subject: "i think you have a dog" says nothing of the speaker."""
    pronouns = [word for word in before if word in FIRST_PERSON | SECOND_PERSON]
    return bool(pronouns) and pronouns[-1] in SECOND_PERSON


def why(probe: Mapping[str, Any], reply: str) -> str:
    """What is wrong with the reply to the probe, "; " between reasons; empty when it is right.

    Args:
        probe: a row with `kind`, `value`, `foil`, `slot`, `slot_values`, `persona_values` and `persona`. It may have
            `exclusive` (True: naming any other of `slot_values` is wrong; False: naming the foil is wrong, another one
            is a fact that nobody asked for), `dislike` (False) and `fact` (the sentence that is asked for).

    Raises:
        ValueError: when `kind` is not known.
    """
    kind, value, foil = probe["kind"], probe["value"], probe["foil"]
    if kind not in (*KINDS, *KINDS_APART):
        known = ", ".join((*KINDS, *KINDS_APART))
        raise ValueError(f"`kind` = {kind!r} in probe {probe.get('probe_id')!r}: known are {known}.")
    dislike = probe.get("dislike", False)
    others = {*probe["slot_values"], *([foil] if foil else [])} - {value}
    unasked = {told for slot, told in probe["persona_values"].items() if slot != probe["slot"]} - others - {value}
    # What the fact itself says is no aversion or wrong number; where the row does not name it, what the persona says.
    excused = [probe["fact"]] if probe.get("fact") else probe["persona"]
    spoken = mentions(reply, [*([value] if value else []), *others, *unasked], excused, dislike)
    right = spoken.get(value, Mention(False, False, False))
    right = right._replace(asserted=right.asserted or (kind != "absent" and _short_answer(reply, value)))

    statements = [clause for clause in clauses(reply) if not clause.question]
    openings = [" ".join(clause.words) for clause in statements]
    refused = any(map(_REJECTION.match, openings))
    affirmed = any(
        _AFFIRMATION.match(text) and NEGATIONS.isdisjoint(clause.words)
        for text, clause in zip(openings, statements, strict=True)
    )
    contrasts = {foil} if kind == "false_suggestion" else others
    contrasted = any(spoken[other].negated for other in contrasts & spoken.keys())
    # "actually , i have a dog" and "a dog , not a cat" reject too, but not after a yes.
    rejected = refused or (not affirmed and (contrasted or any(text.split()[0] == "actually" for text in openings)))

    reasons = []
    if not openings:
        reasons.append("says nothing" if not clauses(reply) else "only asks")
    excluded = others if probe.get("exclusive", True) else others & {foil}
    told_instead = sorted(other for other in excluded & spoken.keys() if spoken[other].asserted)
    extra = sum(spoken[told].asserted for told in (unasked | (others - excluded)) & spoken.keys())
    if kind == "absent":
        verdict = contradicts(probe["persona"], reply)
        if verdict.score >= THRESHOLD:
            reasons.append(f"contradicts a fact: {verdict.reason}")
    else:
        reasons += [f"asserts {other!r} instead of {value!r}" for other in told_instead]
        if right.negated:
            reasons.append(f"denies {value!r}")
        if right.wrong_number:
            reasons.append(f"gives {value!r} another number")
        if kind != "true_suggestion" and not right.asserted:
            reasons.append(f"does not assert {value!r}")
    if kind == "direct" and refused:
        reasons.append("is a denial")
    if kind == "false_suggestion":
        if affirmed:
            reasons.append(f"agrees with the suggestion {foil!r}")
        if not rejected:
            reasons.append(f"does not reject the suggestion {foil!r}")
    if kind == "true_suggestion":
        if rejected:
            reasons.append(f"rejects the right suggestion {value!r}")
        if not affirmed and not right.asserted:
            reasons.append(f"does not confirm {value!r}")
    if extra > MAX_UNASKED_FACTS:
        reasons.append(f"asserts {extra} facts that nobody asked for")
    return "; ".join(reasons)


def _short_answer(reply: str, value: str) -> bool:
    """ "three .", to "how many dogs do you have ?" """
    numbers = {word for word in lemmas(value) if word.isdigit()}
    return bool(numbers) and any(
        set(map(lemma, clause.words)) - {lemma(word) for word in STOP_WORDS} == numbers
        and NEGATIONS.isdisjoint(clause.words)
        for clause in clauses(reply)
        if not clause.question
    )


def score_reply(probe: Mapping[str, Any], reply: str) -> bool:
    """True when the reply to the probe is right; `why` says what is wrong otherwise."""
    return not why(probe, reply)


def persona_consistency(
    scored_rows: Iterable[Mapping[str, Any]], num_resamples: int = NUM_RESAMPLES, seed: int = 0
) -> dict[str, Any]:
    """Kept facts / facts, with 95 % intervals over personas, for each decoding among the rows.

    A fact is asked at a turn and in a split by one probe a kind. It is kept when all three are right. Several samples
    of one probe are averaged first, and the fact then counts with the product: the chance that three draws are all
    right. With one persona the clusters are its facts, and `run["probe_clusters"]` says so.

    Args:
        scored_rows: probe rows with `correct` (bool) and `decoding` ("greedy" | "sampled") beside them.

    Returns:
        `{"metrics": {"persona_consistency": …, "persona_consistency_sampled": …}, "breakdown": […], "run": …}`.
        Metrics run over all splits and turns; breakdown has every kind, turn and split apart, and "all" of each. `n`
        counts facts, each once a turn and split. Rows of `KINDS_APART` are in the breakdown alone, as the metric
        `probes_apart`: the share that is right.

    Raises:
        ValueError: naming every row without a verdict and every fact that lacks one of the three probes.
    """
    verdicts: dict[tuple[str, tuple[Any, ...]], dict[tuple[str, str], list[float]]] = {}
    apart: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    problems = []
    for row in scored_rows:
        if row["kind"] in KINDS_APART and row["correct"] is not None:
            apart.setdefault((row["decoding"], row["kind"]), []).append(row)
            continue
        if row["correct"] is None or row["kind"] not in KINDS or row["decoding"] not in ("greedy", "sampled"):
            shown = {key: row[key] for key in ("correct", "kind", "decoding")}
            problems.append(f"probe {row['probe_id']!r}: {shown}; score it with `score_reply`")
            continue
        fact = (row["persona_id"], row["fact_id"], row["turn"], row["split"])
        probes = verdicts.setdefault((row["decoding"], fact), {})
        probes.setdefault((row["kind"], row["probe_id"]), []).append(float(row["correct"]))
    for (decoding, fact), probes in verdicts.items():
        missing = [kind for kind in KINDS if kind not in {asked for asked, _ in probes}]
        if missing:
            problems.append(
                f"fact {fact[1]!r} at turn {fact[2]} ({fact[3]}, {decoding}): no probe {', '.join(missing)}"
            )
    if problems or not verdicts:
        raise ValueError("`scored_rows`:\n" + "\n".join(problems or ["no probe rows: nothing to score"]))

    facts: dict[str, list[tuple[tuple[Any, ...], dict[str, float]]]] = {}
    for (decoding, fact), probes in verdicts.items():
        parts = {
            kind: math.prod(sum(seen) / len(seen) for (asked, _), seen in probes.items() if asked == kind)
            for kind in KINDS
        }
        facts.setdefault(decoding, []).append((fact, {"all": math.prod(parts.values()), **parts}))

    personas = {fact[0] for rows in facts.values() for fact, _ in rows}
    unit = "persona" if len(personas) > 1 else "fact"
    metrics, breakdown = {}, []
    for decoding, rows in facts.items():
        turns = sorted({fact[2] for fact, _ in rows})
        splits = sorted({fact[3] for fact, _ in rows})
        for kind, turn, split in product(("all", *KINDS), ("all", *turns), ("all", *splits)):
            chosen = [(f, v[kind]) for f, v in rows if turn in ("all", f[2]) and split in ("all", f[3])]
            if not chosen:
                continue
            clusters = [fact[0] if unit == "persona" else fact[1] for fact, _ in chosen]
            value, low, high = rate_interval([kept for _, kept in chosen], clusters, num_resamples, seed)
            # One cluster gives no interval: null, since NaN is not JSON.
            bounds = {"ci_low": None if math.isnan(low) else low, "ci_high": None if math.isnan(high) else high}
            cell = {"value": value, **bounds, "n": len(chosen)}
            where = {"decoding": decoding, "kind": kind, "turn": turn, "split": split}
            breakdown.append({"metric": "persona_consistency", **where, **cell})
            if (kind, turn, split) == ("all", "all", "all"):
                name = "persona_consistency" if decoding == "greedy" else "persona_consistency_sampled"
                metrics[name] = {**cell, "unit": "share of facts", "higher_is_better": True}
    for (decoding, kind), found in apart.items():
        clusters = [row["persona_id"] if unit == "persona" else row["fact_id"] for row in found]
        value, low, high = rate_interval([float(row["correct"]) for row in found], clusters, num_resamples, seed)
        bounds = {"ci_low": None if math.isnan(low) else low, "ci_high": None if math.isnan(high) else high}
        where = {"decoding": decoding, "kind": kind, "turn": "all", "split": "all"}
        breakdown.append({"metric": "probes_apart", **where, "value": value, **bounds, "n": len(found)})
    asked = len({fact[:2] for rows in facts.values() for fact, _ in rows})
    number = len(personas) if unit == "persona" else len({fact[1] for rows in facts.values() for fact, _ in rows})
    return {
        "metrics": metrics,
        "breakdown": breakdown,
        "run": {"probe_clusters": {"unit": unit, "n": number}, "probed_facts": asked},
    }


class HeldOutProbes:
    """The questions for PPO's watch, `probe: evaluation.probes:HeldOutProbes`: few, of held-out personas and wordings.

    One fact of each of the last 48 personas is asked in the three kinds, greedily, in wordings of a held-out split. Data
    without probes of its own gets them from its held-out dialogues, by `evaluation.fact_probes`.

    Args:
        dataset: Folder of the prepare stage.
        max_length: Longest prompt, in tokens.
        max_new_tokens: Longest reply.
    """

    NUM_PERSONAS = 48  # 144 questions: a share of one half has a standard error of 4 to 7 points
    BATCH_SIZE = 144

    def __init__(self, dataset: str | Path, max_length: int, max_new_tokens: int) -> None:
        self.max_length, self.max_new_tokens = max_length, max_new_tokens
        self.personas: dict[str, list[Mapping[str, Any]]] = {}
        for row in _held_out(Path(dataset)):
            self.personas.setdefault(row["persona_id"], []).append(row)
        names = list(self.personas)[-self.NUM_PERSONAS :]  # the evaluation begins with the first ones
        self.personas = {name: _one_fact(name, self.personas[name]) for name in names}
        if not self.personas:
            raise ValueError(f"`probe`: no fact of the held-out personas in {dataset} can be asked about")

    def __call__(self, model: Any, tokenizer: Any) -> dict[str, list[float]]:
        """Of each persona: `right`, the share of the replies that are right, and `kept`, 1 if all of them are."""
        from rlhf.generate import generate  # here: scoring of recorded replies does without torch
        from rlhf.persona import with_persona

        asked = [row for rows in self.personas.values() for row in rows]
        conversations = [
            with_persona({**row, "messages": [*row["history"], {"role": "user", "content": row["question"]}]})
            for row in asked
        ]
        replies = generate(
            model,
            tokenizer,
            conversations,
            self.max_new_tokens,
            batch_size=self.BATCH_SIZE,
            max_length=self.max_length,
        )
        right: dict[str, list[bool]] = {}
        for row, reply in zip(asked, replies, strict=True):
            right.setdefault(row["persona_id"], []).append(score_reply(row, reply))
        return {
            "right": [sum(verdicts) / len(verdicts) for verdicts in right.values()],
            "kept": [float(all(verdicts)) for verdicts in right.values()],
        }


def _held_out(dataset: Path) -> Sequence[Mapping[str, Any]]:
    """Probe rows of the three kinds, in wordings that training does not have where there are some."""
    from evaluation.fact_probes import probes_of
    from rlhf.files import read_jsonl

    if (dataset / "probes.jsonl").is_file():
        rows = read_jsonl(dataset / "probes.jsonl")
    else:
        personas = {
            "/".join(row["persona"]): row["persona"] for row in read_jsonl(dataset / "dialogues_heldout.jsonl")
        }
        rows = probes_of({f"persona-{number}": persona for number, persona in enumerate(personas.values())}, seed=0)[0]
    rows = [row for row in rows if row["kind"] in KINDS]
    return [row for row in rows if row["split"] != "seen"] or rows


def _one_fact(name: str, rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """One fact in all kinds at one turn, drawn by the persona's name: the same in each run on this data."""
    asked = {(row["fact_id"], row["turn"], row["split"]): None for row in rows}
    drawn = random.Random(name).choice(list(asked))
    return [row for row in rows if (row["fact_id"], row["turn"], row["split"]) == drawn]
