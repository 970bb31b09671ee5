"""Does a statement contradict a fact? By rule, with the reason; no model.

Two sentences in the first person contradict each other

- in polarity: the same thing of the same slot is affirmed and denied, or liked and disliked;
- in an exclusive slot: another job, home, name, favourite; one has a single value of these at a time;
- in a trait that either may mention in passing: age (a range: who is retired is no pupil), gender, marital status,
  hair, eyes, numbers of relatives and pets;
- by what one of them implies, after a small table (a vegetarian eats no steak).

Slots are those of `rlhf.facts.parse_claim`. The score says how sure a hearer could be, from 0 to 1. It is an order,
not a probability; `benchmarks/contradiction.py` measures it on pairs of real sentences. What no rule takes apart
contradicts nothing: recall is limited, and silence is never found guilty.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import lru_cache
from itertools import product
from typing import NamedTuple

from rlhf.facts import JOBS, NUMBER, Claim, core, lemma, lemmas, parse_claims, plain

THRESHOLD = 0.5  # from here on a statement counts as a contradiction


class Verdict(NamedTuple):
    """How surely two statements contradict each other, in [0, 1], and why."""

    score: float
    reason: str = ""


NONE = Verdict(0.0)


@lru_cache(maxsize=65536)  # personas share sentences
def contradiction(fact: str, statement: str) -> Verdict:
    """The verdict on two sentences in the first person; the order does not matter."""
    left, right = _reading(fact), _reading(statement)
    if not (left.tells and right.tells):
        return NONE
    found = [*_traits_differ(left.texts[1], right.texts[1])]
    for ours, theirs in zip(left.implications, right.implications, strict=True):
        found += [*_implied(ours, theirs), *_implied(theirs, ours)]
    for mine, other in product(left.claims, right.claims):
        found += [
            _denied_whole(mine, other),
            _polarity(mine, other),
            _exclusive(mine, other),
            _two_jobs(mine, other, f"{left.texts[0]} {right.texts[0]}"),
        ]
    return max(found, key=lambda verdict: verdict.score, default=NONE)


class _Reading(NamedTuple):
    """What the rules find in one sentence: read once, though it is held against many others."""

    texts: tuple[str, str]  # plain, core
    claims: list[Claim]
    implications: tuple["_Implications", "_Implications"]  # of both texts
    tells: bool
    """False for a sentence in which no rule finds anything: it contradicts nothing."""


@lru_cache(maxsize=65536)
def _reading(sentence: str) -> _Reading:
    texts = plain(sentence), core(sentence)
    claims = parse_claims(sentence)
    implications = _implications(texts[0]), _implications(texts[1])
    traits = bool(_traits(texts[1])) or _age(texts[1]) != _ANY_AGE
    implies = _NEVER_OUT in texts[0] or any(any(found[1:]) for found in implications)
    return _Reading(texts, claims, implications, bool(claims) or traits or implies)


def contradicts(facts: Iterable[str], reply: str) -> Verdict:
    """The strongest contradiction between a fact and a sentence of the reply; the reply's questions are left out.

    Args:
        facts: sentences of the persona, or the [`statements`] of an earlier turn.
    """
    return max(
        (contradiction(fact, sentence) for fact in facts for sentence in statements(reply)),
        key=lambda verdict: verdict.score,
        default=NONE,
    )


@lru_cache(maxsize=65536)
def statements(text: str) -> list[str]:
    """The sentences of a text without its questions."""
    return [part for part in re.findall(r"[^.!?\n]+[.!?]*", text) if not part.rstrip().endswith("?")]


# -- claims ----------------------------------------------------------------------------------------------------------

# How surely two different values exclude each other: one may hold two jobs, but has one name.
_EXCLUSION = {
    "name": 0.95, "birthplace": 0.9, "childhood home": 0.7, "origin": 0.7, "home": 0.8, "job": 0.7, "faith": 0.9,
    "school": 0.6,
}  # fmt: skip
_FAVOURITE = 0.85
_PLACES = ("birthplace", "childhood home", "origin", "home")
_KINDS_OF_PLACE = lemmas(
    "house apartment flat city town country countryside farm suburbs suburb village community area island beach "
    "mountains cabin condo trailer state cloud ocean lake household family"
)
_IN_AMERICA = lemmas(
    "alabama alaska arizona arkansas california colorado connecticut delaware florida georgia hawaii idaho "
    "illinois indiana iowa kansas kentucky louisiana maine maryland massachusetts michigan minnesota mississippi "
    "missouri montana nebraska nevada ohio oklahoma oregon pennsylvania tennessee texas utah vermont virginia "
    "washington wisconsin wyoming manhattan chicago boston seattle york jersey carolina dakota"
)
_AMERICA = lemmas("united states america")
# "i have", in whatever wording: a denial of one is held against the others.
_HAVING = ("have", "pet", "child", "sibling", "vehicle", "number of ")
# Nobody does for pleasure, or calls a favourite, what he says he dislikes.
_LIKING_SLOTS = ("like", "favorite ", "eat", "drink", "listen to", "watch", "read", "play")


# What one is for a moment, of one thing: "i am sure you will", "i am not sure yet".
_PASSING = lemmas("sure glad sorry ready certain")


def _polarity(left: Claim, right: Claim) -> Verdict:
    left, right = _as_liking(left), _as_liking(right)
    alike = any(all(c.slot.startswith(slots) for c in (left, right)) for slots in (_HAVING, _LIKING_SLOTS))
    if left.positive == right.positive or not (left.slot == right.slot or alike):
        return NONE
    ours, theirs = (frozenset(word for word in claim.lemmas if not word.isdigit()) for claim in (left, right))
    if left.slot == "be" and ours & theirs & _PASSING:
        return NONE
    shared = len(ours & theirs) / min(len(ours), len(theirs)) if ours and theirs else 0.0
    return Verdict(shared if shared == 1 else 0.6 * shared, "affirms and denies the same") if shared else NONE


# What a denial of the whole denies of its parts: "i have no pets" rules out "i have two dogs".
_PARTS = {
    "pet": lemmas("dog cat fish bird parrot hamster rabbit turtle snake lizard horse pony poodle lab retriever pet"),
    "child": lemmas("son daughter child baby toddler"),
    "sibling": lemmas("brother sister sibling"),
    "famili": lemmas("brother sister mother father wife husband son daughter family"),
}


def _denied_whole(left: Claim, right: Claim) -> Verdict:
    """Having none of a kind against having one; not being able against doing."""
    if left.positive == right.positive:
        return NONE
    denial, other = (left, right) if right.positive else (right, left)
    if denial.slot == "can" and denial.value.split()[0] == other.slot.split()[0]:
        return Verdict(0.8, "cannot, and does")
    if not (denial.slot.startswith(_HAVING) or denial.slot == "can" and "have" in denial.value.split()):
        return NONE
    parts = frozenset().union(*(_PARTS.get(word, {word}) for word in denial.lemmas))
    if (
        other.slot.startswith(_HAVING)
        and parts & other.lemmas
        or other.slot.startswith("my ")
        and parts & lemmas(other.slot)
    ):
        return Verdict(0.9 if denial.lemmas & _PARTS.keys() else 0.6, "has none, and has one")
    return NONE


def _as_liking(claim: Claim) -> Claim:
    """What one is afraid of or allergic to is not liked."""
    return replace(claim, slot="like", positive=False) if claim.slot in ("fear", "allergy") else claim


_JOB = re.compile(rf"\b(?:{'|'.join(JOBS)})s?\b")
_ON_THE_SIDE = re.compile(r"\b(?:part time|second|side|also|used to|was|were|volunteer|freelance)\b")


def _two_jobs(left: Claim, right: Claim, text: str) -> Verdict:
    """A job and a place of work, two places of work, two jobs of one's father: mostly another job."""
    slots = {left.slot, right.slot}
    differ = not left.lemmas & right.lemmas and left.positive and right.positive
    if not differ or _ON_THE_SIDE.search(text) and not slots & set(_FATHERS):
        return NONE
    if slots == {"workplace"}:
        return Verdict(0.5, "another workplace")
    if slots == {"job", "workplace"}:
        return Verdict(0.4, "a job and a place of work")
    if all(claim.slot in _FATHERS and _JOB.search(claim.value) for claim in (left, right)):
        same = left.slot == right.slot or {_FATHERS[slot] for slot in slots} == {"father"}
        either = "parents" in {_FATHERS[slot] for slot in slots}
        return Verdict(0.7 if same else 0.5 if either else 0.0, "another job of a parent")
    return NONE


_FATHERS = {
    "my father": "father",
    "my dad": "father",
    "my mother": "mother",
    "my mom": "mother",
    "my parents": "parents",
}


def _exclusive(left: Claim, right: Claim) -> Verdict:
    slot = left.slot
    sure = _EXCLUSION.get(slot, _FAVOURITE if slot.startswith("favorite ") else 0.0)
    ours, theirs = left.lemmas, right.lemmas
    if slot != right.slot or not (left.positive and right.positive) or ours <= theirs or theirs <= ours:
        return NONE
    if slot == "job" and "retir" in ours | theirs:
        sure *= 0.5
    if slot in _PLACES:
        kinds = [bool(value & _KINDS_OF_PLACE) and not value & _AMERICA for value in (ours, theirs)]
        within = any(a & _IN_AMERICA and b & _AMERICA for a, b in ((ours, theirs), (theirs, ours)))
        if kinds[0] != kinds[1] or within:
            return Verdict(0.1, "a place, and a kind of place or one around it")
    return Verdict(sure * (0.6 if ours & theirs else 1.0), f"another {slot}")


# -- traits ----------------------------------------------------------------------------------------------------------

# What a sentence says of the speaker's age, in years, from and to.
_AGES = tuple(
    (re.compile(pattern), low, high)
    for pattern, low, high in (
        ((r"\bi am (?:a |just a |only a )?(?:little|small) (?:girl|boy|kid|child)|\b(?:kindergarten|preschool)"
         r"\b(?!.*teach)"), 0, 12),
        (r"\b(?:first|second|third|1st|2nd|3rd) grade\b", 5, 11),
        (r"\b(?:fourth|fifth|sixth|4th|5th|6th) grade\b", 8, 14),
        (r"\b(?:polyamorous|open relationship)", 17, 120),
        (r"\bi work from home|\bi work full ?-?time", 15, 120),
        (r"\b(?:elementary|middle) school(?!.*teach)(?!er)|\bgrader?\b(?!.*teach)", 5, 15),
        (r"\bwill graduate (?:from )?high school", 11, 17),
        (r"\b(?:in|attend|at|from) (?:junior )?high school(?!.*(?:teach|coach))|\bhigh schooler", 11, 19),
        (r"\bi am (?:a )?teen", 13, 19),
        (r"\b(?:in college|college student|at university)", 16, 60),
        (r"\bgraduate student", 20, 70),
        (r"\bretired\b", 38, 120),
        (r"\bgrand(?:children|kids|son|daughter)", 34, 120),
        (r"\bgrown (?:children|kids|sons|daughters)", 36, 120),
        (r"\bi remember when nobody|\bi am (?:too |getting )?old\b", 45, 120),
        (r"\bi am young\b", 0, 39),
        (r"\b(?:army|navy|marines|military)\b", 18, 120),
        (r"\bi (?:am|got|was) married|\bmy (?:wife|husband)|\bdivorc|\bsingle (?:mom|dad|mother|father)", 17, 120),
        (r"\bi am (?:pregnant|expecting)|\bi am (?:a )?(?:stay at home )?(?:mom|dad|mother|father|parent)\b", 15, 120),
        (r"\bi have (?:\w+ ){0,3}(?:children|kids|sons?|daughters?)\b", 15, 120),
        ((r"\bi (?:drive|own a car|smoke|(?:like to |love to )?drink (?:beer|wine|alcohol))|\b(?:wine|beer|"
         r"alcoholic)\b"), 15, 120),
        (r"\bi (?:just |recently )?bought a (?:house|home)|\bmy own (?:studio|business|company|house)", 18, 120),
        ((rf"\bi (?:am|work as) (?:an? )?(?:[\w']+ ){{0,3}}?(?:{'|'.join(JOBS)})\b|\bi (?:work|am employed) "
          rf"(?:at|for|in|by)\b|"
         r"\bfor a living|\bi hate my job"), 15, 120),
    )
)  # fmt: skip
_DECADES = {
    "twenties": 20, "thirties": 30, "forties": 40, "fifties": 50, "sixties": 60, "seventies": 70, "eighties": 80,
}  # fmt: skip
_YEARS = re.compile(
    rf"\bi am (?:an? |only |about |almost )?({NUMBER})(?:$| year| and\b|[,.])|({NUMBER}) years? old|\bmy "
    rf"({'|'.join(_DECADES)})"
)
_GENDERS = {
    "female": ((r"\bi am (?:an? )(?:\w+ ){0,3}?(?:girl|woman|lady|female|mom|mother|grandmother|wife)\b|"
               r"\bpregnant\b"), r"\bmy husband\b"),
    "male": (r"\bi am (?:an? )?(?:\w+ ){0,4}?(?:boy|man|guy|male|dad|father|grandfather|husband)\b", r"\bmy wife\b"),
}  # fmt: skip
_SINGLE = re.compile(
    r"\bi am (?:\w+ ){0,5}?single\b(?! parent)|\bi (?:do not|never) (?:have a (?:wife|husband)|married)"
)
_MARRIED = re.compile(r"\bi am (?:\w+ )?married\b|\bmy (?:wife|husband|spouse)\b|\bi married\b")
_HAIR = (
    ("hair colour", lemmas("black brown blonde blond red gray white blue green purple pink rainbow ginger brunette")),
    ("hair length", lemmas("short long bald waist")),
    ("hair form", lemmas("curly straight wavy")),
)
_COUNTED = "dogs?|cats?|horses?|fish|children|kids|sons?|daughters?|brothers?|sisters?|siblings|jobs|cars?|mustangs?"
_COUNT = re.compile(rf"\b({NUMBER}) ((?:\w+ )??)({_COUNTED})\b")


@lru_cache(maxsize=65536)
def _traits(text: str) -> dict[str, frozenset[str]]:
    """Traits of which one has a single value, each with the value's words."""
    found: dict[str, frozenset[str]] = {}
    for gender, (sure, likely) in _GENDERS.items():
        if re.search(sure, text):
            found["gender"] = frozenset([gender])
        elif re.search(likely, text):
            found["likely gender"] = frozenset([gender])
    if _SINGLE.search(text):
        found["marital status"] = frozenset(["single"])
    elif _MARRIED.search(text):
        found["marital status"] = frozenset(["married"])
    hair = re.search(
        r"(?:\b(?:have|is) )?((?:\w+ ){1,3})hair\b(?!.*color)(.*waist)?|\bi am an? (?:\w+ )?(blonde|brunette|redhead)",
        text,
    )
    if hair and " more " not in hair[0] and not text.startswith(("my mother", "my dog", "my cat")):
        words = lemmas(" ".join(group or "" for group in hair.groups()).replace("waist", "long"))
        found |= {name: words & kind for name, kind in _HAIR if words & kind}
    eyes = re.search(r"(\w+) eyes\b", text)
    if eyes and eyes[1] not in (
        "my",
        "big",
        "beautiful",
        "pretty",
        "bright",
        "dark",
        "the",
        "nice",
        "bad",
        "her",
        "his",
    ):
        found["eyes"] = frozenset([lemma(eyes[1])])
    for number, kind, noun in _COUNT.findall(text):
        found[f"number of {kind}{lemma(noun)}"] = frozenset([lemma(number)])
    return found


_SURE = {"gender": 0.9, "likely gender": 0.6, "marital status": 0.85, "hair colour": 0.9, "hair length": 0.8,
         "hair form": 0.8, "eyes": 0.9}  # fmt: skip
_A_COUNT = 0.85  # "i have one cat", "i have two cats"


def _traits_differ(left: str, right: str) -> Iterator[Verdict]:
    ours, theirs = _traits(left), _traits(right)
    for trait in ours.keys() & theirs.keys():
        if not ours[trait] & theirs[trait]:
            yield Verdict(_SURE.get(trait, _A_COUNT), f"another {trait}")
    for one, other in ((ours, theirs), (theirs, ours)):
        if "gender" in one and "likely gender" in other and one["gender"] != other["likely gender"]:
            yield Verdict(0.5, "another gender, likely")
    (low, high, told), (other_low, other_high, other_told) = _age(left), _age(right)
    if low > other_high or other_low > high:
        yield Verdict(0.95 if told and other_told else 0.8, "another age")


_ANY_AGE = (0, 150, False)


@lru_cache(maxsize=65536)
def _age(text: str) -> tuple[int, int, bool]:
    """From, to, and whether it is told in years."""
    text = re.sub(r"\b(?:since|when|until|before|after|as) (?:i (?:was|am|turned) )?.*", "", text)
    text = re.sub(r"(\bteach\w*)\b.*", r"\1", text)  # whom one teaches is of another age
    told = _YEARS.search(text)
    if told:
        number = told[1] or told[2]
        if number is None:
            return _DECADES[told[3]], _DECADES[told[3]] + 9, True
        return int(lemma(number)), int(lemma(number)), True
    ranges = [(low, high) for pattern, low, high in _AGES if pattern.search(text)]
    return (
        max((low for low, _ in ranges), default=_ANY_AGE[0]),
        min((high for _, high in ranges), default=_ANY_AGE[1]),
        False,
    )


# -- implications ------------------------------------------------------------------------------------------------------

_LIKING = r"(?:love|like|enjoy|eat|ate|need|want|crave|drink|favorite|cook|grill|weakness)"
_MEAT = (
    r"\b(?:meat|steaks?|chicken|beef|bacon|ham|pork|burgers?|cheeseburgers?|hamburgers?|bbq|ribs|turkey|"
    r"sausages?|fish and chips)\b"
)
_DAIRY = r"\b(?:cheese|ice cream|eggs?|milk|butter|yogurt|cheeseburgers?)\b"
_ALCOHOL = r"\b(?:alcohol|beers?|wine|whiskey|vodka|cocktails?)\b"
# (one statement, the other, score, reason), matched in plain words from the start.
_IMPLIED = tuple(
    (re.compile(one), re.compile(other), score, reason)
    for one, other, score, reason in (
        (
            r".*\b(?:vegan|vegetarian|only eat (?:raw|veg\w*|fruit\w*|plants?))\b",
            rf"(?!.*\bnot\b).*(?:{_LIKING}.*{_MEAT}|{_MEAT}.*favorite|omnivore|carnivore)",
            0.85,
            "eats no meat",
        ),
        (r".*\bvegan\b", rf"(?!.*\bnot\b).*{_LIKING}.*{_DAIRY}", 0.8, "eats nothing from animals"),
        (
            r"(?:.* )?i (?:do not|never) (?:like to )?drink(?: alcohol| or|$)",
            rf"(?!.*\b(?:not|recover\w+)\b).*{_LIKING}.*{_ALCOHOL}",
            0.85,
            "does not drink",
        ),
        (
            r"(?:.* )?(?:retired$|i am (?:retired|unemployed|out of work)|i have been retired)",
            r"(?:.* )?(?:i (?:work|am employed|am working)\b(?! out)|for a living|hate my job)",
            0.7,
            "does not work",
        ),
        (
            r"(?:.* )?(?:i am (?:retired|unemployed|out of work)|i have been retired)",
            rf"i am (?:an? )(?!retired)(?:[\w']+ ){{0,3}}?(?:{'|'.join(JOBS)})$",
            0.6,
            "does not work",
        ),
        (
            r"i am (?:currently )?looking for (?:a job|work)",
            (
                rf"i am an? (?:[\w']+ ){{0,3}}?(?:{'|'.join(JOBS)})$|i (?:\w+ )?work (?:at|as|for|in)"
                rf"|i started a new job"
            ),
            0.5,
            "has no job",
        ),
        (
            r".*\bi am a stay at home",
            r"(?:.* )?(?:i (?:work|am employed) (?:as|at|for|in)\b|for a living|hate my job)",
            0.6,
            "stays at home",
        ),
        (r".*\bi am a stay at home", rf"i am (?:an? )?(?:[\w']+ ){{0,3}}?(?:{'|'.join(JOBS)})$", 0.6, "stays at home"),
        (
            r".*\b(?:prison|jail|juvenile detention)",
            r"(?:.* )?i (?:work|am employed|own|live in)\b",
            0.5,
            "is in prison",
        ),
        (
            r".*\bi (?:broke up|am divorced|got divorced)|my (?:wife|husband) left",
            r"(?:.* )?(?:i am (?:happily )?married|my (?:wife|husband) (?:is|and))",
            0.5,
            "has lost the partner",
        ),
        (r"i do not (?:have|own) a (?:car|vehicle)", r"i drive|my (?:car|truck)", 0.6, "has no car"),
        (r".*\bkosher\b", r"(?!.*\bnot\b).*\b(?:bacon|pork|ham|cheeseburgers?|shrimp|lobster)\b", 0.7, "eats kosher"),
        (
            r"i live with my parents|.*move out .*parents",
            r"i (?:own|bought) a (?:house|home)|my own (?:house|home|apartment)",
            0.5,
            "lives with the parents",
        ),
        (r".*\bi am an only child", r"(?:.* )?(?:my|i have .*)\b(?:brother|sister|sibling)", 0.9, "has no siblings"),
        (
            r"my (?:mom|mother) (?:passed away|died|is dead)",
            r"my (?:mom|mother) (?:is (?!dead)|works|lives|keeps|loves|drives)",
            0.5,
            "is dead",
        ),
        (
            r"my (?:dad|father) (?:passed away|died|is dead)",
            r"my (?:dad|father) (?:is (?!dead)|works|lives|keeps|loves|drives)",
            0.5,
            "is dead",
        ),
        (
            r"i (?:am not a good swimmer|can not swim)",
            r"i (?:am a swim|love to swim|love swimming|like swimming)",
            0.7,
            "does not swim well",
        ),
        (
            r"i only listen to",
            (
                r"(?:my favorite (?:music|band|singer)|i (?:\w+ )?(?:love|like|enjoy|listen to|see) "
                r".*\b(?:music|stones|hip hop|rap|rock|songs))"
            ),
            0.5,
            "listens to nothing else",
        ),
    )
)


# Of "i am …": what is left of the bar rules out what is right of it.
_OPPOSITES = tuple(
    tuple(re.compile(rf"i am (?:not )?(?:an? )?(?:\w+ ){{0,2}}?(?:{words})\b(?! of)") for words in line.split(" | "))
    for line in (
        "tall | short", "overweight|fat|chubby|obese | thin|skinny|slim|underweight", "rich|wealthy | poor|broke",
        "shy|introvert|introverted|recluse | outgoing|extrovert|extroverted|social", 
        "happy|cheerful | unhappy|sad|depressed|miserable", "healthy|athlete|fit | sick|ill|unhealthy",
        "left handed | right handed", "lazy | hardworking|active|energetic",
        "republican|conservative | democrat|liberal",
        "morning person|early bird|early riser | night owl|night person", "neat|tidy|organized | messy|disorganized",
        "atheist | christian|religious|muslim|jewish|buddhist|catholic",
    )
)  # fmt: skip


_NEVER_OUT = "never been out of"
_ELSEWHERE = re.compile(rf"(?:.* )?{_NEVER_OUT} (\w+).* \| (?:.* )?i (?:live|work)(?: here| now)? in (?!\1)\w+")


class _Implications(NamedTuple):
    """Which rules of the two tables a text stands for, on their left and on their right."""

    text: str
    implies: frozenset[int]
    ruled_out: frozenset[int]
    is_one: frozenset[int]
    is_other: frozenset[int]


def _implications(text: str) -> _Implications:
    return _Implications(
        text,
        frozenset(place for place, rule in enumerate(_IMPLIED) if rule[0].match(text)),
        frozenset(place for place, rule in enumerate(_IMPLIED) if rule[1].match(text)),
        frozenset(place for place, (one, _) in enumerate(_OPPOSITES) if one.match(text)),
        frozenset(place for place, (_, other) in enumerate(_OPPOSITES) if other.match(text)),
    )


def _implied(left: _Implications, right: _Implications) -> Iterator[Verdict]:
    """What the left one says against the right one."""
    for place in sorted(left.implies & right.ruled_out):
        yield Verdict(*_IMPLIED[place][2:])
    if _NEVER_OUT in left.text and _ELSEWHERE.match(f"{left.text} | {right.text}"):
        yield Verdict(0.6, "was never there")
    if left.is_one & right.is_other and " not " not in f"{left.text} {right.text}":
        yield Verdict(0.6, "is the opposite")
