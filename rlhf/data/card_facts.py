"""What can be asked about the facts of a persona card: questions, and sentences that would be false.

A fact is a whole sentence of the card, and so is everything that stands against it: the same sentence with another
number, name, place or value of the persona world, with the opposite verb of liking, or, for a job or a place of work,
a sentence of another one. Replies quote these sentences, so none is put together from parts that may not fit.

Such a sentence is a *foil* only where it rules the fact out: one has a single name, age, home, job and favourite food,
and nobody hates what he likes. What somebody owns or can do rules nothing out, and is never denied, but for the sentences
of the persona world, in which one has a single pet and plays a single instrument. Facts without foils are asked for and
confirmed, but not probed.
"""

import re
from collections import Counter
from dataclasses import dataclass, replace
from functools import cache
from itertools import product

from rlhf.data.world import SLOT, SLOTS
from rlhf.facts import JOBS, NUMBERS, Claim, as_usual, lemma, lemmas, parse_claim, plain, second_person
from rlhf.persona import Persona

MAX_FOILS = 16
MAX_WORDS = 25  # of a sentence that is suggested to the character

# -- questions: the last wording of each is held out from training ---------------------------------------------------


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


def _table(text: str) -> dict[str, tuple[str, ...]]:
    rows = (line.split(" > ") for line in text.strip().split("\n"))
    return {name.strip(): tuple(part.strip() for part in wordings.split("|")) for name, wordings in rows}


# By the slot of the claim; `{}` is what the slot or the sentence names. In lower case, as the persona world writes.
_QUESTIONS = _table("""
name > what is your name ? | who are you ? | may i ask your name ? | what should i call you ? | who am i talking to ?
age > how old are you ? | what is your age ? | may i ask how old you are ? | for how many years have you been around ?
birthplace > where were you born ? | what is your place of birth ? | where did your life begin ?
childhood home > where did you grow up ? | where were you raised ? | where did you spend your childhood ?
origin > where are you from ? | where do you come from ? | which place are you from ? | where are your roots ?
home > where do you live ? | where is your home ? | tell me where you live . | where could i come and visit you ?
live with > who do you live with ? | who else is in your home ? | with whom do you share your home ?
job > what do you do for a living ? | what is your job ? | what kind of work do you do ? | what is your profession ?
workplace > where do you work ? | tell me where you work . | where do you go to work ? | where do you earn your money ?
job status > what is your work situation ? | do you work at the moment ? | how do things stand with your work ?
school > where do you go to school ? | do you go to school ? | how far are you with your education ?
study > what do you study ? | what is your subject ? | what are you learning these days ?
marital status > are you married ? | what is your marital status ? | are you single or married ?
diet > what is your diet ? | which diet do you follow ? | what should i know before i cook for you ?
faith > what is your religion ? | do you have a faith ? | what do you believe in ?
gender > are you a man or a woman ? | what is your gender ? | are you male or female ?
language > which languages do you speak ? | what languages do you know ? | in which language could we talk ?
hair > what is your hair like ? | what kind of hair do you have ? | how would you describe your hair ?
eyes > what colour are your eyes ? | what kind of eyes do you have ? | how would you describe your eyes ?
pet > do you have a pet ? | what pet do you have ? | which animal is at home with you ?
child > do you have children ? | tell me about your children . | are you a parent ?
sibling > do you have brothers or sisters ? | tell me about your brothers and sisters . | who grew up with you ?
vehicle > what vehicle do you have ? | do you have a vehicle ? | how do you get around ?
allergy > are you allergic to anything ? | do you have any allergies ? | is there something you must avoid ?
fear > what are you afraid of ? | what scares you ? | is there something that you fear ?
want > what do you want ? | what is your dream ? | what do you hope for ?
like to > what do you like to do ? | what do you enjoy ? | what do you love to do ?
dislike to > what do you hate to do ? | what do you not like to do ? | what do you dislike ?
favorite > what is your favorite {} ? | do you have a favorite {} ? | which {} do you like best ?
number of > how many {} do you have ? | do you have {} , and how many ? | what is the number of your {} ?
how many > how many {} ? | tell me , how many {} ? | i wonder , how many {} ?
feeling > how do you feel about {} ? | what do you think of {} ? | what is your opinion of {} ?
called > what is your {} called ? | what is the name of your {} ? | what do you call your {} ?
my > what can you tell me about your {} ? | tell me about your {} . | i would like to hear about your {} .
my number > what is your {} ? | can you tell me what your {} is ? | i would like to know your {} .
did > what did you {} ? | tell me , what did you {} ? | i wonder , what did you {} ?
what > what do you {} ? | can you tell me what you {} ? | i would like to know what you {} .
where > where do you {} ? | can you tell me where you {} ? | i would like to know where you {} .
""")
# What any fact answers; for those without a question of their own.
YOURSELF = (
    "tell me about yourself .", "tell me something about you .", "what should i know about you ?",
    "what can you tell me about yourself ?", "what would you say about yourself ?",
)  # fmt: skip
# "what do you go ?" is no question; of these verbs the object is asked for.
_ASKED_VERBS = _words(
    "play drive ride eat drink cook bake read write watch study speak teach sing paint make sell grow raise collect wear "
    "build design coach train hunt breed"
) | {"listen to", "believe in", "dream of", "suffer from", "belong to", "volunteer at", "volunteer in"}
_ASKED_DEEDS = _words("win meet buy lose write build make sell design learn adopt visit study break")


# -- foils -----------------------------------------------------------------------------------------------------------

_PLACE_SLOTS = ("home", "birthplace", "childhood home", "origin")
_CITIES = SLOT["city"].values
# Who lives in one of these may live in the city.
_AROUND = {
    "london": "england britain uk", "paris": "france", "berlin": "germany", "madrid": "spain", "rome": "italy",
    "vienna": "austria", "oslo": "norway", "dublin": "ireland", "prague": "czechia", "lisbon": "portugal",
    "athens": "greece georgia", "warsaw": "poland", "helsinki": "finland", "zurich": "switzerland",
    "boston": "massachusetts", "chicago": "illinois",
}  # fmt: skip
_CONTINENTS = _words("europe america usa us states earth africa asia eu")
# In lower case nothing else tells a place from "school".
_KNOWN_PLACES = frozenset(
    (*_CITIES, *SLOT["trip"].values, *" ".join(_AROUND.values()).split())
) | _words("alabama alaska arizona arkansas california colorado connecticut delaware florida hawaii idaho indiana iowa kansas "
    "kentucky louisiana maine maryland michigan minnesota mississippi missouri montana nebraska nevada ohio oklahoma "
    "oregon pennsylvania tennessee texas utah vermont virginia wisconsin wyoming seattle denver dallas houston atlanta "
    "miami phoenix portland toronto montreal sydney melbourne london moscow tokyo delhi cairo scotland wales sweden "
    "denmark australia russia turkey")  # fmt: skip
_PLACE = re.compile(
    r"(?P<before>.*\b(?:in|from)) (?P<v>[\w'-]+(?: [A-Z][\w'-]+)*)"
    r"(?P<after>|\s+(?:with|since|now|for|in the year|in \d)\b.*)",
    re.DOTALL,
)
_WORKPLACES = ("school", "hospital", "bank", "bakery", "library", "museum", "theatre", "restaurant", "factory", "farm")
_KNOWN_WORKPLACES = frozenset(_WORKPLACES) | _words(
    "shop store supermarket hotel cafe office bar pub mill mine garage gym zoo pharmacy laboratory university college "
    "castle kitchen bookstore bookshop diner salon"
)
# Callings that the lists of jobs of today leave out.
_CALLINGS = "|".join(
    sorted(
        _words(
            "knight squire king queen prince princess pirate monk nun priest priestess merchant blacksmith innkeeper warrior thief "
            "bard archer peasant shepherd miller sorcerer wizard witch alchemist healer emperor empress lord count duke jester "
            "herald spy assassin mercenary gladiator samurai viking cowboy bandit shopkeeper"
        )
    )
)
_CALLING = re.compile(rf"(?:[\w']+ ){{0,3}}?(?P<v>{_CALLINGS})(?: (?:of|in|at|for|from|who|with|and)\b.*)?")
_NAMES = ("anna", "robert", "clara", "henry", "alice", "victor", "emma", "oscar", "nora", "felix")
_PET_NAMES = ("comet", "bramble", "biscuit", "shadow", "willow", "rusty", "juniper", "pepper", "echo", "clover")
_FAMILY = re.compile(
    r"\b(?:mother|mom|father|dad|wife|husband|partner|boyfriend|girlfriend|brother|sister|son|daughter|child|baby|"
    r"aunt|uncle|cousin|friend|boss|teacher|master|king|queen|grandmother|grandfather)$"
)
_FAVOURITES = {
    "food": SLOT["food"].values, "drink": SLOT["drink"].values, "music": SLOT["music"].values,
    "color": SLOT["colour"].values, "sport": SLOT["sport"].values, "hobby": SLOT["hobby"].values,
    "fruit": SLOT["fruit"].values, "subject": SLOT["subject"].values, "instrument": tuple(
        f"the {value}" for value in SLOT["instrument"].values
    ), "season": ("spring", "summer", "autumn", "winter"), "animal": tuple(f"the {v}" for v in SLOT["pet"].values),
}  # fmt: skip
_CUISINES = _words("italian mexican chinese indian japanese thai french greek spanish american asian meat")
# Single words of which a sentence has one at a time, by slot.
_CLASSES = {
    "hair": ("black", "brown", "blonde", "red", "grey", "white"),
    "eyes": ("blue", "green", "brown", "grey", "hazel"),
    "marital status": ("single", "married", "divorced", "widowed"),
    "faith": ("christian", "muslim", "buddhist", "hindu"),
    "gender": ("man", "woman"),
}
_SWAPPED = {"boy": "girl", "girl": "boy", "man": "woman", "woman": "man", "male": "female", "female": "male"}
_HATE, _LOVE = ("hate", "dislike", "despise", "detest", "loathe"), ("like", "love", "enjoy", "adore")
_LIKING = re.compile(
    rf"(?P<before>i (?:really |truly |absolutely |also )?)(?P<verb>{'|'.join((*_LOVE, *_HATE))}) (?P<object>.+)",
    re.IGNORECASE,
)
_CALLED = re.compile(
    r"(?P<head>(?:my (?P<mine>[\w ]+?)(?:'s name is| is (?:called|named))"
    r"|.*\b(?:an?|my|the) (?P<thing>[\w ]+?) (?:called|named))) (?P<v>[^\W\d]\w+)",
    re.IGNORECASE,
)
_NUMBER_WORDS = tuple(word for word, number in NUMBERS.items() if number > 1)
_NUMBER = re.compile(
    rf"(?<![\w.,:/$-])(?:(?P<digits>\d{{1,4}})|(?P<word>{'|'.join(_NUMBER_WORDS)}))(?![\w:/%-]|[.,]\d)", re.IGNORECASE
)
_ANY_NUMBER = re.compile(
    rf"\d[\d.,:/-]*|\b(?:{'|'.join((*_NUMBER_WORDS, 'thousand', 'million', 'half'))})\b", re.IGNORECASE
)
_NOT_NOW = re.compile(
    r"\b(?:used to|was|were|also|part[ -]time|sometimes|once|second|want|hope|will|would|on the side)\b"
)

_PAST = re.compile(r"\bi (?:was|used to|want|hope|will|would|had)\b", re.IGNORECASE)
_OF_THE_PAST = ("birthplace", "childhood home", "want", "faith")
_DENIED = re.compile(
    r"\b(?:not|no|never|neither|nor|without|nobody|none|nothing|cannot|hardly|\w+n't)\b", re.IGNORECASE
)
_FIRST_PERSON = re.compile(r"\b(?:i|i'm|my|me|mine|myself|im|i've|i'd|i'll)\b", re.IGNORECASE)
_OTHERS = re.compile(r"\b(?:we|our|ours|us|you|your|yours|we're|we've)\b", re.IGNORECASE)
_GREETING = re.compile(r"(?:hi|hello|hey|well|oh|so|yes|no|ok|okay|but|and|because)\b", re.IGNORECASE)
_TWO_SENTENCES = re.compile(r"(?<!\bmr)(?<!\bmrs)(?<!\bdr)(?<!\bst)(?<!\bms)[.!?;]+\s+\w", re.IGNORECASE)
_LOWERED = _words("my the a an in on at when for with every each most sometimes during once after before as")


# -- facts -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Foil:
    """A false value, and the sentence that says it."""

    value: str
    sentence: str


@dataclass(frozen=True)
class Asked:
    """A fact of the card that can be asked about.

    Attributes:
        slot: names it among the card's facts.
        fact: as the card writes it, or the statement of its name.
        sentence: the same without its full stop.
        value: what a reply has to name.
        foils: sentences that would rule it out; often none.
        questions: direct ones, the last one held out; `YOURSELF` where it has none of its own.
        suggested: the sentence may be put to the character: "so you have a cat , right ?".
        denial: it says what is not so.
        dislike: it says what is not liked.
        reason: why it is not probed; empty where it is.
    """

    slot: str
    fact: str
    sentence: str
    value: str
    foils: tuple[Foil, ...] = ()
    questions: tuple[str, ...] = YOURSELF
    suggested: bool = True
    denial: bool = False
    dislike: bool = False
    reason: str = ""

    @property
    def probed(self) -> bool:
        """Whether all three kinds of probes can be asked of it."""
        return not self.reason

    def kinds(self) -> tuple[str, ...]:
        """How it is asked for, half of the time directly."""
        suggestions = ("false_suggestion",) * bool(self.foils) + ("true_suggestion",)
        return ("direct", "direct", *(suggestions if self.suggested else ()))


def suggestion(sentence: str) -> str:
    """ "I have a cat" -> "you have a cat" """
    return second_person(lowered(sentence))


def lowered(sentence: str) -> str:
    """The sentence as it stands behind "yes ,": "My dog is old" -> "my dog is old"."""
    first = sentence.split(maxsplit=1)[0]
    return sentence[0].lower() + sentence[1:] if first.lower() in _LOWERED else sentence


def bare(sentence: str) -> str:
    """The sentence without its full stop, with straight apostrophes."""
    return re.sub(r"[\s.!]+$", "", sentence.replace("\u2019", "'"))


def asked_facts(persona: Persona) -> tuple[list[Asked], dict[str, str]]:
    """The facts of a card that can be asked about, its name first, and the others: {sentence: reason}."""
    left: dict[str, str] = {}
    found: list[Asked] = []
    spoken = frozenset().union(*map(lemmas, (*persona.facts, persona.name or "")))
    cased = any(re.search(r"[A-Z]", fact) for fact in persona.facts)
    own_name = [fact for fact in persona.facts if (claim := parse_claim(fact)) and claim.slot == "name"]
    if persona.name is not None:
        found.append(_named(persona, cased))
        left |= dict.fromkeys(own_name, "says what `name` says; delete one of them")
    for fact in (fact for fact in persona.facts if fact not in left):
        reason = _unfit(fact)
        if reason:
            left[fact] = reason
        else:
            asked = _asked(fact, spoken, cased)
            found.append(replace(asked, reason=asked.reason or _why_not_probed(asked)))
    # What two facts answer singles out neither; nor can two share a slot.
    often = Counter(asked.questions[0] for asked in found)
    shared = "its question asks for other facts of the card too"
    found = [replace(a, reason=a.reason or shared) if often[a.questions[0]] > 1 else a for a in found]
    slots: Counter[str] = Counter()
    numbered = []
    for asked in found:
        slots[asked.slot] += 1
        numbered.append(replace(asked, slot=f"{asked.slot} ({slots[asked.slot]})") if slots[asked.slot] > 1 else asked)
    return numbered, left


def _unfit(fact: str) -> str:
    """Why no reply can quote the sentence; empty where one can."""
    said = bare(fact)
    if fact.rstrip().endswith("?"):
        return "is a question"
    if not _FIRST_PERSON.search(said):
        return "does not speak of the character (i, my, me)"
    if _GREETING.match(said):
        return "begins with a greeting or a filler; leave it out"
    if _TWO_SENTENCES.search(said):
        return "has more than one sentence; give each its own line"
    if len(said.split()) > MAX_WORDS:
        return f"has more than {MAX_WORDS} words; give each thing its own line"
    return ""


def _why_not_probed(asked: Asked) -> str:
    if asked.denial:
        return "says what is not so, which word rules cannot judge"
    if not asked.suggested:
        return "speaks of we or you, which a question would turn around"
    if not asked.foils:
        return "nothing is known that would rule it out"
    return "no question asks for it alone" if asked.questions == YOURSELF else ""


def _named(persona: Persona, cased: bool) -> Asked:
    fact = persona.statements()[0]
    name = str(persona.name)
    own = lemmas(name)
    names = [other.title() if cased or name[0].isupper() else other for other in _NAMES if not lemmas(other) & own]
    foils = tuple(Foil(other, f"my name is {other}") for other in names)
    return Asked("name", fact, f"my name is {name}", name, foils, _QUESTIONS["name"])


def _asked(fact: str, spoken: frozenset[str], cased: bool) -> Asked:
    """The fact with its question and foils, as far as rules know them."""
    said = bare(fact)
    claim = parse_claim(fact)
    asked = Asked("fact", fact, said, claim.value if claim else said, suggested=not _OTHERS.search(said))
    if claim:
        asked = replace(asked, slot=claim.slot)
    if _DENIED.search(said):
        return replace(asked, denial=True)
    for rule in (_of_the_world, _called, _liking, _by_slot, _numbered):
        found = rule(asked, claim, spoken, cased)
        if found is not None:
            return found
    return replace(asked, questions=_questions(claim, said))


def _of_the_world(asked: Asked, claim: Claim | None, spoken: frozenset[str], cased: bool) -> Asked | None:
    """A sentence of the persona world has the questions and the other values of its slot."""
    known = _world().get(plain(asked.sentence))
    if known is None:
        return None
    slot, value = known
    # "i enjoy eating pizza", "i like jazz music": liking one rules out no other
    one_only = not re.match(r"i (?:enjoy|could|drink a lot|am fond|like|want|buy|snack|once)\b", plain(asked.sentence))
    others = [other for other in SLOT[slot].values if not lemmas(other) & spoken] if one_only else []
    written = [other.title() if cased and slot in ("city", "trip") else other for other in others]
    foils = tuple(Foil(other, _exchanged(asked.sentence, value, other)) for other in written)
    return replace(asked, slot=slot, value=value, foils=foils[:MAX_FOILS], questions=SLOT[slot].questions)


@cache
def _world() -> dict[str, tuple[str, str]]:
    """Slot and value of each sentence of the persona world."""
    return {
        plain(fact.format(value)): (slot.name, value)
        for slot in SLOTS
        for fact, value in product(slot.facts, slot.values)
    }


def _exchanged(sentence: str, value: str, other: str) -> str:
    return re.sub(rf"(?<![\w'-]){re.escape(value)}(?![\w'-])", lambda _: other, sentence, count=1, flags=re.IGNORECASE)


def _called(asked: Asked, claim: Claim | None, spoken: frozenset[str], cased: bool) -> Asked | None:
    """ "my sword is called dawn": one thing, one name."""
    found = _CALLED.fullmatch(asked.sentence)
    if not found or cased and not found["v"][0].isupper():
        return None
    thing = (found["mine"] or found["thing"]).lower()
    if len(thing.split()) > 3:
        return None
    names = [name for name in (_NAMES if _FAMILY.search(thing) else _PET_NAMES) if not lemmas(name) & spoken]
    written = [name.title() if found["v"][0].isupper() else name for name in names]
    foils = tuple(Foil(name, f"{found['head']} {name}") for name in written)
    return replace(asked, slot=f"name of {thing}", value=found["v"], foils=foils, questions=_filled("called", thing))


def _liking(asked: Asked, claim: Claim | None, spoken: frozenset[str], cased: bool) -> Asked | None:
    """Nobody hates what he likes."""
    found = _LIKING.fullmatch(asked.sentence)
    if not found or re.search(r",|\b(?:but|because|when|if|that|so|than|and i)\b", asked.sentence.lower()):
        return None
    verb, thing = found["verb"].lower(), found["object"]
    dislike = verb in _HATE
    value = claim.value if claim and claim.slot == "like" else re.sub(r"^(?:to|the|an?|my) ", "", thing.lower())
    opposite = "love" if dislike else "hate"
    foil = Foil(f"{opposite} {value}", f"{found['before']}{opposite} {thing}")
    if re.match(r"(?:to|it|how|being|doing)\b", thing.lower()):
        questions = _QUESTIONS["dislike to" if dislike else "like to"]
    else:
        questions = _filled("feeling", second_person(thing))
    return replace(asked, slot=f"like {value}", value=value, foils=(foil,), questions=questions, dislike=dislike)


def _by_slot(asked: Asked, claim: Claim | None, spoken: frozenset[str], cased: bool) -> Asked | None:
    """Foils of the slots of which one has a single value."""
    if claim is None or not claim.positive:
        return None
    said, slot = asked.sentence, claim.slot
    calling = _CALLING.fullmatch(claim.value) if slot == "be" and re.match(r"i(?: a|')m an? ", said.lower()) else None
    if calling:
        slot, claim = "job", replace(claim, slot="job", value=calling["v"])
    foils: list[Foil] = []
    value = claim.value
    if slot == "job" and not _NOT_NOW.search(said.lower()):
        value = _job(claim.value)
        jobs = [job for job in SLOT["job"].values if not lemmas(job) & spoken]
        foils = [Foil(job, _as_the_card(f"i work as a {job}", cased)) for job in jobs]
    elif slot == "workplace" and not _NOT_NOW.search(said.lower()):
        place = next((word for word in claim.value.split() if word in _KNOWN_WORKPLACES), None)
        if place:
            places = [other for other in _WORKPLACES if not lemmas(other) & spoken]
            foils = [Foil(other, _as_the_card(f"i work in a {other}", cased)) for other in places]
            value = place
    elif slot in _PLACE_SLOTS:
        value, foils = _places(said, value, spoken, cased)
    elif slot.startswith("favorite "):
        foils = _favourites(said, slot.removeprefix("favorite "), spoken)
    elif slot in _CLASSES:
        value, foils = _of_a_class(said, slot, value)
    if not foils:
        return None
    questions = _QUESTIONS[slot] if slot in _QUESTIONS else _questions(claim, said)
    return replace(asked, slot=slot, value=value, foils=tuple(foils[:MAX_FOILS]), questions=questions)


def _job(value: str) -> str:
    """ "nurse", of "retired army nurse" """
    words = value.split()
    return next((word for word in reversed(words) if word in JOBS), value)


def _as_the_card(sentence: str, cased: bool) -> str:
    return as_usual(sentence) if cased else sentence


def _places(said: str, value: str, spoken: frozenset[str], cased: bool) -> tuple[str, list[Foil]]:
    """Other cities in the place of one that is named; a house or a village is no such place."""
    found = _PLACE.fullmatch(said)
    if not found:
        return value, []
    place = found["v"]
    around = {word for word in re.findall(r"\w+", place.lower())}
    named = place[0].isupper() if cased else place in _KNOWN_PLACES
    if not named or around & _CONTINENTS or "united" in around:
        return value, []
    cities = [city for city in _CITIES if not lemmas(city) & spoken and not around & set(_AROUND[city].split())]
    written = [city.title() if cased else city for city in cities]
    return place, [Foil(city, f"{found['before']} {city}{found['after']}") for city in written]


def _favourites(said: str, noun: str, spoken: frozenset[str]) -> list[Foil]:
    found = re.fullmatch(
        r"(?P<before>my (?:\w+ )*?favou?rite [\w ]+? (?:is|are)) (?P<v>[\w' -]+)", said, re.IGNORECASE
    )
    inverted = re.fullmatch(
        r"(?P<v>[\w' -]+?) (?:is|are) (?P<mine>my (?:\w+ )*?favou?rite [\w ]+)", said, re.IGNORECASE
    )
    match = found or inverted
    if not match or len(match["v"].split()) > 3 or re.search(r"\b(?:and|or|any|all|but)\b", match["v"].lower()):
        return []
    if _CUISINES & set(match["v"].lower().split()):
        return []  # "italian" is pasta too
    before = found["before"] if found else f"{match['mine'].replace('My', 'my')} is"
    before = re.sub(r" are$", " is", before)
    others = [value for value in _FAVOURITES.get(noun, ()) if not lemmas(value) & spoken]
    return [Foil(value.removeprefix("the "), f"{before} {value}") for value in others]


def _of_a_class(said: str, slot: str, value: str) -> tuple[str, list[Foil]]:
    """ "i have red hair" -> "i have brown hair" """
    words = [word.lower() for word in re.findall(r"\w+", said)]
    if slot == "gender":
        own = [word for word in words if word in _SWAPPED]
        return (
            (own[0], [Foil(_SWAPPED[own[0]], _exchanged(said, own[0], _SWAPPED[own[0]]))])
            if len(own) == 1
            else (value, [])
        )
    own = [word for word in words if word in _CLASSES[slot]]
    if len(own) != 1 or slot == "marital status" and words[-1] != own[0]:
        return value, []
    others = [other for other in _CLASSES[slot] if other != own[0]]
    upper = re.search(rf"\b{own[0].title()}\b", said) is not None
    return own[0], [Foil(o, _exchanged(said, own[0], o.title() if upper else o)) for o in others]


def _numbered(asked: Asked, claim: Claim | None, spoken: frozenset[str], cased: bool) -> Asked | None:
    """The same sentence with another number, where it has a single one."""
    numbers = list(_NUMBER.finditer(asked.sentence))
    if len(numbers) != 1 or len(_ANY_NUMBER.findall(asked.sentence)) != 1 or numbers[0][0] == "1":
        return None
    number = numbers[0]
    start, end = number.span()
    foils = tuple(
        Foil(other, asked.sentence[:start] + other + asked.sentence[end:])
        for other in _other_numbers(number[0], spoken)
    )
    return replace(
        asked, value=number[0].lower(), foils=foils, questions=_number_questions(asked.sentence, claim, number[0])
    )


def _other_numbers(own: str, spoken: frozenset[str]) -> list[str]:
    """The nearest ones, written alike, without those that the card has elsewhere."""
    if not own.isdigit():
        highest = 10 if NUMBERS[own.lower()] <= 10 else 20
        pool = [word for word, number in NUMBERS.items() if 1 < number <= highest]
    else:
        reach = min(int(own) // 2 + 6, 60)
        pool = [str(n) for n in range(max(2, int(own) - reach), int(own) + reach) if len(str(n)) == len(own)]
    pool = [other for other in pool if not lemmas(other) & spoken]
    return sorted(pool, key=lambda other: abs(int(lemma(other)) - int(lemma(own.lower()))))[:MAX_FOILS]


def _number_questions(said: str, claim: Claim | None, number: str) -> tuple[str, ...]:
    """What asks for the number, and not for what else the sentence says."""
    text = plain(said)
    if claim and claim.slot == "age":
        return _QUESTIONS["age"]
    if claim and claim.slot.startswith("number of "):
        return _filled("number of", claim.ask or claim.slot.removeprefix("number of "))
    mine = re.fullmatch(rf"my (?P<n>\w+(?: \w+)?) is {number.lower()}", text)
    if mine:
        return _filled("my number", mine["n"])
    deed = re.match(rf"i (?P<verb>\w+) {number.lower()} (?P<n>\w+s)\b", text)
    if deed and claim and claim.slot.startswith("did "):
        return _filled("how many", f"{deed['n']} did you {claim.slot.removeprefix('did ')}")
    if deed and (deed["verb"] in _ASKED_VERBS or deed["verb"] == "earn"):
        return _filled("how many", f"{deed['n']} do you {deed['verb']}")
    return YOURSELF


def _questions(claim: Claim | None, said: str) -> tuple[str, ...]:
    """Wordings of the question that the claim answers; what any fact answers where there is none."""
    if claim is None or not claim.positive:
        return YOURSELF
    slot = claim.slot
    if slot not in _OF_THE_PAST and not slot.startswith("did ") and _PAST.search(said):
        return YOURSELF  # "i was a nurse" is no answer to "what is your job ?"
    if slot.startswith("number of "):
        return _filled("number of", claim.ask or slot.removeprefix("number of "))
    if slot.startswith("favorite "):
        noun = slot.removeprefix("favorite ")
        british = re.search(r"favourite|colour", said, re.IGNORECASE)
        return tuple(
            re.sub("favorite", "favourite", question).replace("color", "colour") if british else question
            for question in _filled("favorite", noun)
        )
    if slot.startswith("my "):
        return _filled("my", slot.removeprefix("my "))
    if slot.removeprefix("did ") in _ASKED_DEEDS and slot.startswith("did "):
        return _filled("did", slot.removeprefix("did "))
    if slot in _ASKED_VERBS:
        place = re.search(r" (?:at|in)$", slot)
        if place and slot != "believe in":
            return _filled("where", slot[: place.start()])
        return _filled("what", slot)
    return _QUESTIONS.get(slot, YOURSELF)


def _filled(key: str, word: str) -> tuple[str, ...]:
    return tuple(wording.format(word) for wording in _QUESTIONS[key])
