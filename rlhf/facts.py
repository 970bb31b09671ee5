"""Facts of persona sentences, taken apart by rule.

Persona sentences are free English. Two views of one sentence:

- [`parse_fact`]: subject, verb, object as they stand ("i have", "two dogs"), for putting another value in their place.
  Values that follow one stem and have equally many words can stand for each other.
- [`parse_claim`]: what is claimed: slot, polarity, value, content lemmas and numbers ("number of dogs", 2). It reaches
  further, since nothing has to be put back: greetings, adverbs and subordinate clauses are cut off.

Where no rule applies both say None, and whoever counts facts counts these as unscorable. No rule knows whether two
values exclude each other but those of `EXCLUSIVE` slots ("a dog" and "a cat" do not, two homes do).
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from nltk.stem.porter import PorterStemmer

Slot = tuple[str, str, int]

MAX_VALUE_WORDS = 5  # a longer object is a clause of its own more often than not

# -- words -----------------------------------------------------------------------------------------------------------

_UNITS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen twenty"
)
_TENS = "thirty forty fifty sixty seventy eighty ninety hundred"
NUMBERS = {word: number for number, word in enumerate(_UNITS.split())} | {
    word: 10 * number for number, word in enumerate(_TENS.split(), 3)
}
NUMBER = rf"(?:\d+|{'|'.join(NUMBERS)})"
_IRREGULAR = {
    "children": "child", "kids": "child", "kid": "child",
    "men": "man", "women": "woman", "wives": "wife", "feet": "foot",
    "mice": "mouse", "geese": "goose", "buses": "bus",
    "mom": "mother", "moms": "mother", "dad": "father", "dads": "father",
    "doggy": "dog", "puppy": "dog", "puppies": "dog", "kitten": "cat", "kittens": "cat", "colour": "color",
    "colours": "color", "automobile": "car", "bike": "bicycle", "bikes": "bicycle", "grey": "gray", "tv": "television",
    "films": "movie", "film": "movie", "nyc": "york", "us": "america", "usa": "america",
}  # fmt: skip
# Function words, and verbs so usual in persona sentences that they name no fact.
_FUNCTION_WORDS = """
    a an the of to and or in on for with at from as by about into is are am was were be been being do does did done
    have has had having will would can could should may might i me my mine myself we our us you your it its he him
    his she her they them their this that these those there here who which what when where how not no never so very
    really too also just only now still often always usually currently s t m ve re ll d some any many much more most
    all lot lots get got like likes love loves enjoy enjoys go goes going want wants favorite favourite thing things
    year years old every each own owns named called if then than because while but out up
"""
STOP_WORDS = frozenset(_FUNCTION_WORDS.split())
_STEMMER = PorterStemmer()
_WORD = re.compile(r"[^\W_]+")


@cache
def lemma(word: str) -> str:
    """A word without its endings (Porter 1980), numbers as digits, and common doubles as one ("kids", "child")."""
    if word in NUMBERS:
        return str(NUMBERS[word])
    if word in _IRREGULAR:
        return _IRREGULAR[word]
    return _STEMMER.stem(word) if len(word) > 3 else word


def lemmas(text: str) -> frozenset[str]:
    """The lemmas of the words that say something; numbers are among them, as digits."""
    return frozenset(lemma(word) for word in _WORD.findall(text.casefold()) if word not in STOP_WORDS)


_YOU = {
    "i am": "you are", "i was": "you were", "am i": "are you", "i'm": "you're", "i've": "you've", "i'd": "you'd",
    "i'll": "you'll", "i": "you", "am": "are", "my": "your", "mine": "yours", "me": "you", "myself": "yourself",
}  # fmt: skip
_ME = re.compile(rf"(?<![\w'])(?:{'|'.join(_YOU)})(?![\w'])", re.IGNORECASE)


def second_person(text: str) -> str:
    """ "i am a nurse" -> "you are a nurse" """
    return _ME.sub(lambda match: _YOU[match[0].lower()], text)


def as_usual(text: str) -> str:
    """ "yes , i have a dog ." -> "Yes, I have a dog." """
    text = re.sub(r"\bi\b", "I", re.sub(r" (?=[,.?!])", "", text))
    return re.sub(r"(?:^|(?<=[.?!] ))[a-z]", lambda start: start[0].upper(), text)


_CONTRACTIONS = (
    (r"\bi'?m\b", "i am"), (r"\bi'?ve\b", "i have"), (r"\bi'll\b", "i will"), (r"\bi'd\b", "i would"),
    (r"\b(?:can't|cannot|cant)\b", "can not"), (r"\bwon't\b", "will not"), (r"\bdont\b", "do not"),
    (r"\bdidnt\b", "did not"), (r"(?<=[a-z])n't\b", " not"),
    (r"(?<=\d)(?=[a-z]{3})", " "), (r"\bfavourite", "favorite"), (r"\bcolour", "color"),
)  # fmt: skip


def plain(sentence: str) -> str:
    """Lower case, contractions spelled out, one space between words, no full stop."""
    text = re.sub(r"\s+", " ", sentence.casefold().replace("\u2019", "'")).strip(" .!")
    for pattern, long in _CONTRACTIONS:
        text = re.sub(pattern, long, text)
    return text


# -- values that can be exchanged --------------------------------------------------------------------------------------

_VERBS = (
    "have|own|like|love|enjoy|hate|dislike|prefer|want|need|play|practice|drive|ride|eat|drink|cook|read|write|watch|"
    "study|speak|teach|sing|paint|make|sell|grow|raise|collect|wear|live|work|volunteer|come|go|run|listen|belong|"
    "attend|take|know|keep|believe|dream|suffer|spend|"
    "buy|visit|walk|dance|produce|compete|donate|dye|help|see"
)
_FORMS = tuple(
    re.compile(form)
    for form in (
        r"(?P<stem>my (?:\w+ ){1,4}?(?:is|are|was|were)(?: not)?) (?P<value>.+)",
        r"(?P<stem>i (?:am|was|can)(?: not)?) (?P<value>.+)",
        rf"(?P<stem>i (?:do not )?(?:{_VERBS})(?: (?:to|in|at|as|for|with|on|from|of))?) (?P<value>.+)",
    )
)
# "i have visited spain": the verb is another one; "i do not have no pets": denied twice.
_NO_VALUE = re.compile(r"(?:\w+ed|been|had|got|gone|always|never|no|not)\b")
# "blue is my favorite color"
_INVERTED = re.compile(r"(?P<value>.+?) (?P<verb>is|are) (?P<subject>my favorite \w+)")
_FILLERS = re.compile(
    r"(?<=^i )(?:also|really|currently|now|still|only|often|just|do(?! not)) |(?<=^i am )(?:also|currently|now) "
)
# A value with one of these is more than an object.
_CLAUSE = re.compile(r"\b(?:but|because|that|when|while|which|so|if|since|although|than|i|you|not|is|are)\b")
_EMPTY = frozenset(("a", "an", "the", "of", "to", "and", "in", "on", "for", "with", "at", "from", "as"))


@dataclass(frozen=True)
class Fact:
    """A persona sentence taken apart, in lower case, without contractions and punctuation: "i have", "two dogs"."""

    stem: str
    value: str

    @property
    def slot(self) -> Slot:
        """What the values that can stand for this one share: stem, a small word in front, number of words."""
        words = self.value.split()
        first = {"an": "a"}.get(words[0], words[0])
        return self.stem, first if first in _EMPTY else "", len(words)

    @property
    def negated(self) -> bool:
        """Whether it says what is not so: "i do not drink", "soda"."""
        return "not" in self.stem.split()

    def state(self, value: str) -> str:
        """The sentence with this value, without its full stop."""
        return f"{self.stem} {value}"

    def deny(self, value: str) -> str:
        """The opposite of [`state`]."""
        if self.negated:
            return f"{re.sub(r' (?:do )?not$| do not', '', self.stem)} {value}"
        if self.stem.startswith("my ") or self.stem in ("i am", "i was", "i can"):
            return f"{self.stem} not {value}"
        return f"i do not {self.stem.removeprefix('i ')} {value}"


def parse_fact(sentence: str) -> Fact | None:
    """The fact of a persona sentence, or None where no rule applies."""
    text = _FILLERS.sub("", plain(sentence))
    inverted = _INVERTED.fullmatch(text)
    if inverted:
        text = f"{inverted['subject']} {inverted['verb']} {inverted['value']}"
    for form in _FORMS:
        match = form.fullmatch(text)
        if match:
            words = match["value"].split()
            whole = all(re.fullmatch(r"[\w'-]+", word) for word in words)
            whole &= match["stem"] != "i have" or not _NO_VALUE.match(match["value"])
            if (
                whole
                and len(words) <= MAX_VALUE_WORDS
                and not _CLAUSE.search(match["value"])
                and content(match["value"])
            ):
                return Fact(match["stem"], match["value"])
    return None


def slot_values(rows: Iterable[Mapping[str, Any]]) -> dict[Slot, list[str]]:
    """The different values of the facts of all personas, by slot: each can stand for the others of its slot."""
    values: dict[Slot, dict[str, None]] = defaultdict(dict)
    for fact in map(parse_fact, dict.fromkeys(sentence for row in rows for sentence in row["persona"])):
        if fact:
            values[fact.slot][fact.value] = None
    return {slot: list(found) for slot, found in values.items()}


def content(text: str) -> frozenset[str]:
    """The words that say something, without the plural's "s"."""
    return frozenset(re.sub(r"(?<=\w\w)s$", "", word) for word in re.findall(r"\w+", text.casefold())) - _EMPTY


# -- claims ----------------------------------------------------------------------------------------------------------

# A person has one value of these at a time; "number of …" and "favorite …" too, see `Claim.exclusive`.
EXCLUSIVE = frozenset(
    ("name", "age", "birthplace", "origin", "childhood home", "home", "job", "job status", "marital status", "gender",
     "diet", "faith", "hair", "eyes", "school")
)  # fmt: skip


@dataclass(frozen=True)
class Claim:
    """What a sentence claims of its speaker.

    Attributes:
        slot: What it is about: "job", "home", "favorite color", "number of dog", "like", "have", "my mother", "drive".
        value: The words that answer a question for the slot, as they stand in the sentence but for contractions.
        positive: False for a denial ("i do not have a car") and for what is not liked ("i hate school").
        ask: How a question names what is asked for, where the slot alone does not: "to bake", "dogs".
    """

    slot: str
    value: str
    positive: bool = True
    ask: str = ""

    @property
    def lemmas(self) -> frozenset[str]:
        return lemmas(self.value)

    @property
    def numbers(self) -> frozenset[int]:
        return frozenset(int(word) for word in self.lemmas if word.isdigit())

    @property
    def exclusive(self) -> bool:
        """Whether a person has one value of the slot at a time."""
        return self.slot in EXCLUSIVE or self.slot.startswith(("number of ", "favorite "))


_JOB_WORDS = """
    accountant actor actress administrator agent analyst architect artist assistant astronaut attorney author baker
    banker barber barista bartender beautician biologist blogger bookkeeper builder butcher butler captain caregiver
    carpenter cashier chef chemist cleaner clerk coach comedian contractor cook cop custodian dancer dealer dentist
    designer detective developer director doctor dj drafter driver economist editor electrician engineer entertainer
    farmer firefighter fireman fisherman florist gardener geologist guard guide hairdresser hairstylist handyman
    historian host housekeeper hunter instructor inspector janitor jeweler journalist judge laborer landscaper
    lawyer lecturer librarian lifeguard locksmith logger magician maid mailman manager marine marketer mason
    masseuse mathematician mechanic midwife miner minister model musician nanny nurse nutritionist officer operator
    optometrist painter paralegal paramedic pastor pediatrician performer pharmacist photographer physician
    physicist pilot plumber poet policeman politician postman preacher president priest principal producer professor
    programmer psychiatrist psychologist ranger realtor receptionist reporter researcher roofer sailor salesman
    salesperson saleswoman scientist sculptor seamstress secretary security server sheriff singer soldier specialist
    stockbroker streamer stylist superintendent supervisor surgeon surveyor tailor teacher technician teller
    therapist trader trainer translator trucker tutor veterinarian vet waiter waitress weaver welder woodworker
    worker wrestler writer youtuber zookeeper
"""
JOBS = tuple(_JOB_WORDS.split())
_FAMILY = (
    "mother|mom|father|dad|parents|wife|husband|spouse|partner|boyfriend|girlfriend|fiance|fiancee|brothers?|sisters?|"
    "siblings|sons?|daughters?|kids?|child|children|family|grand(?:mother|father|ma|pa|parents|children|kids|"
    "son|daughter)|"
    "aunt|uncle|cousins?|twin|twins|best friend|friends?|dogs?|cats?|pets?|boss|roommates?"
)
_PETS = (
    "dog|cat|fish|goldfish|bird|parrot|hamster|rabbit|bunny|turtle|snake|lizard|horse|pony|cow|pig|ferret|gecko|poodle|"
    "shepherd|retriever|labrador|lab|husky|pug|terrier|bulldog|beagle|chihuahua|pitbull|iguana|puppy|kitten|pet|chicken"
)
_CHILDREN = "son|daughter|child|children|kid|kids|baby|toddler|twins|triplets|stepson|stepdaughter"
_SIBLINGS = "brother|sister|sibling|stepbrother|stepsister|twin"
_VEHICLES = "car|truck|motorcycle|bike|bicycle|van|suv|jeep|bmw|honda|toyota|ford|mustang|mustangs|prius|tesla|boat"
_FAITHS = (
    "christian|catholic|buddhist|muslim|jewish|jew|hindu|atheist|agnostic|mormon|baptist|lutheran|"
    "methodist|pagan|wiccan"
)
_DIETS = "vegan|vegetarian|omnivore|pescatarian|carnivore|kosher|halal|gluten free"
_PERFECT = re.compile(
    r"(?:been|had|gone|done|seen|met|won|lost|spoken|written|made|taken|traveled|always|never|not|to|just|\w+ed)\b"
    r"(?! hair| clothes| eyes)"
)
_PRESENT = """
    play practice drive ride eat drink cook bake read write watch study speak teach sing paint make sell grow raise
    collect wear volunteer run listen belong attend take know keep believe suffer spend buy visit walk dance produce
    compete donate dye help see use need prefer build design coach train travel fly hunt fish swim climb surf knit
    sew draw garden shop exercise lift hike camp feed breed care meditate pray bowl skate ski golf race run smoke
    start think wish hope plan try wake sleep stay move follow support hold shoot play throw win date babysit foster
    rescue repair fix restore create compose perform record blog program code learn talk sleep wake cut fantasize
    remember dress rent go do
"""
_PAST = {
    "won": "win", "met": "meet", "bought": "buy", "lost": "lose", "broke": "break", "wrote": "write", "built": "build",
    "taught": "teach", "saw": "see", "made": "make", "had": "have", "got": "get", "quit": "quit", "left": "leave",
    "sold": "sell", "served": "serve", "helped": "help", "married": "marry", "moved": "move", "visited": "visit",
    "played": "play", "worked": "work", "studied": "study", "graduated": "graduate", "designed": "design",
    "started": "start", "learned": "learn", "joined": "join", "adopted": "adopt", "spent": "spend", "went": "go",
    "failed": "fail", "dropped": "drop", "survived": "survive", "retired": "retire", "attended": "attend", "ran": "run",
    "been": "be", "traveled": "travel", "lived": "live", "written": "write", "seen": "see", "owned": "own",
}  # fmt: skip
_PREPOSITION = r"(?: (?:to|in|at|as|for|with|on|from|of|about|by|up|out|over|into|off|through|around))"

# What stands in front of the claim, between its words, and behind it.
_OPENING = re.compile(
    r"^(?:(?:hey|hi|hello|what'?s up|whats up|well|oh|yes|so)(?: there| everyone| all)?\s*[,.!]?\s*)+(?=(?:i|my)\b)"
    r"|^(?:in my (?:free|spare) time|(?:on|during) (?:the |my )?(?:weekends?|summers?|free time)|for (?:fun|vacation)|"
    r"now|currently|these days|right now|at home|as a hobby|when i am bored|sometimes|on occasion)"
    r"\s*,?\s*(?=(?:i|my)\b)"
)
_ADVERB = re.compile(
    r"(?<=^i )(?:(?:also|really|truly|currently|now|still|only|often|just|recently|always|usually|sometimes|"
    r"mostly|mainly|"
    r"absolutely|simply|actually|secretly|even|especially|generally|regularly|finally|proudly) )+"
    r"|(?<=^i am )(?:(?:also|currently|now|still|very|really|always|so|quite|just|recently|actually|"
    r"extremely|pretty|kind of|"
    r"a bit|a little|proud to be|such|totally|super) )+(?!years?|girl|boy)"
    r"|(?<=^i have )(?:(?:also|currently|really) )+|(?<=^i do not )(?:(?:really|usually|often|ever|even) )+"
)
_SECOND_CLAUSE = re.compile(
    r"(?:\s*[,;]\s*|\s+)(?:(?:and|or|but|so|then) )?(?:i|we|he|she|they|it) (?:am|is|are|was|were|do|can|"
    r"have|has|had|will|"
    r"would|love|like|enjoy|live|work|want|hate|also|never|always|really|just|own|just)\b.*"
    r"|\s+and (?:i|we|he|she|they) \w+.*"
    r"|\s+(?:because|since|although|though|while|when|whenever|until|unless|but|if|due to|so that|to pay|in "
    r"order to|as well)\b.*"
    rf"|\s+and (?:also )?(?:am|{_VERBS}|got|had|hope|plan|teach|still) \w.*"
)
_RELATIVE = re.compile(r"\s+(?:who|which|that|where|whose|named|called|(?:his|her|its) name is)\b.*")
_ADJUNCT = re.compile(
    r"\s+(?:every|each|once|twice|regularly|recently|daily|nightly|weekly|most days|most of|all day|all the "
    r"time|at all|at night|"
    r"at home|at my|in the (?!world)|on the (?=weekend)|on (?:weekends|saturdays|sundays|fridays)|for a "
    r"living|as a|as my|"
    r"for fun|occasionally|to (?:help|pay|pursue|support|relax|socialize)|very much|a lot(?! of)|a year|a "
    r"week|a day|a month|in a|in my|for my|on my|during|before|after|right now|"
    r"for (?:the|over|about|almost|\w+ years)|(?:three|several|many|a few) times|to each|too|together|again|"
    r"last|this|next (?:week|month|year|spring|summer|fall|winter)|and then|"
    rf"(?:about |over )?{NUMBER} (?:months?|years?|times?|days?|weeks?) (?:ago|a)|by myself|as often|in general)\b.*"
)
_TIME = re.compile(
    r"(?:the )?(?:weekends?|mornings?|evenings?|day|night|time)$|(?:every|each|once|twice|during|in my|a lot$)\b"
)
_LEADING = re.compile(r"^(?:(?:a|an|the|my|some|to|about|both|of|many|lots of|a lot of|being|getting|going|all) )+")
_NEGATIVE = r"(?P<neg>(?:do|did|does|can|could|will|have|am|was|is|are) not (?:have )?|never |no longer )?"

# (slot, form): `v` is the value, `n` completes the slot, `ask` a question, `neg` denies. The first that fits is taken.
_CLAIMS: tuple[tuple[str, re.Pattern[str]], ...] = tuple(
    (slot, re.compile(form))
    for slot, form in (
        ("name", r"my (?:first |full )?name is (?P<v>[\w']+(?: [\w']+)?)(?: and .*)?"),
        ("age", rf"i am (?:an? |about |almost |only )?(?P<v>{NUMBER}(?:[ -]{NUMBER})?)(?:[ -]years?[ -]olds?.*)?"),
        ("age", (r"i am in my (?:early |late |mid )?(?P<v>twenties|thirties|forties|fifties|sixties|seventies|"
                r"eighties)")),
        ("favorite {n}", (r"my (?:all time |absolute )?favorite (?P<n>[\w ]+?) (?:is|are|was|were|would be) "
                        r"(?P<neg>not )?(?P<v>.+)")),
        ("favorite {n}", r"(?P<v>.+?) (?:is|are) my (?:all time |absolute )?(?:favorite|preferred) (?P<n>[\w ]+)"),
        ("like", r"(?P<v>.+?) (?:is|are) my (?:all time |biggest )?(?:favorites?|passion|hobby|hobbies|life|thing)"),
        ("like", r"my (?:biggest |main |only )?(?:passion|hobby|hobbies) (?:is|are) (?P<v>.+)"),
        ("birthplace", r"i was born (?:and raised )?in (?P<v>(?!the (?:early|late|mid|\d)|\d|early|late).+)"),
        ("childhood home", r"i (?:grew up|was raised) (?:in|on|at) (?P<v>.+)"),
        ("origin", r"i (?:am|come|am originally|moved here|moved) from (?P<v>.+)"),
        ("home", r"i live (?:with .+ )?(?:in|at|on|near|by|is) (?P<v>.+)"),
        ("live with", r"i live with (?P<v>.+)"),
        ("live with", r"(?P<v>.+?) lives? with me"),
        ("job", r"i (?:work|am working|am employed|got a job|started a new job|have a job) as (?P<v>.+)"),
        ("job", r"i (?P<v>(?!do )\w.+?) for a living"),
        ("job", r"my (?:job|profession|occupation|work) is (?:to |being )?(?P<v>.+)"),
        ("job", r"i (?:work|am working) (?:at|in|for|from) .+? as (?P<v>.+)"),
        ("job", (r"i (?:have been working|am working|work|have) an? (?P<v>(?!new|part|full|second|good|great|"
                r"bad|nice)\w+(?: \w+)?) job\b.*")),
        ("job", r"i am in the (?P<v>(?:\w+ )?(?:army|navy|military|marines|air force))\b.*"),
        ("workplace", (rf"i {_NEGATIVE}(?:work|am working|am employed|(?:got|have|started) a (?:new |part "
                       rf"time |full time )?job(?: working)?)"
                      r"(?: part time| full time| full-time| fulltime)? (?:at|in|for|by|on) (?P<v>.+)")),
        ("job status", (r"i (?:am|have been|was) (?P<neg>not )?(?P<v>retired|unemployed|jobless|out of work|"
                       r"self employed|between jobs)\b.*")),
        ("school", (r"i (?:am|go) (?:in|to|attend) (?:my .+ (?:in|of) )?(?P<v>(?:\w+ )?(?:school|college|"
                   r"university|grade|kindergarten|preschool))\b.*")),
        ("school", r"i am an? (?P<v>(?:\w+ ){1,3}student|student|freshman|sophomore|junior|senior)\b.*"),
        ("study", r"i am an? (?P<v>(?:\w+ ){1,2})major\b.*"),
        ("study", (r"i (?:am studying|study|am majoring in|major in|am learning)(?: (?:to (?:be|become)|about|"
                  r"how to))? (?P<v>.+)")),
        ("marital status", (r"i (?:am|have been) (?P<neg>not )?(?:(?:getting|happily|newly|planning on getting "
                        r"an?|going through an?|recently|to be) )?"
                           r"(?P<v>married|single|divorced?|engaged|widowed|separated)(?! \w+ (?:child|parent))\b.*")),
        ("job", (rf"i (?:am|was) (?P<neg>not )?(?:an? |the )?(?P<v>(?:[\w']+ ){{0,3}}?(?:{'|'.join(JOBS)})|"
                rf"professional [\w ]+?)(?: (?:at|in|for|from|by|on|of|and|with|as) .*)?")),
        ("diet", rf"i (?:am|eat|follow|keep) (?P<neg>not )?(?:an? )?(?:strict )?(?P<v>{_DIETS})\b.*"),
        ("faith", rf"i (?:am|was raised|was born) (?P<neg>not )?(?:an? )?(?:devout |strict )?(?P<v>{_FAITHS})\b.*"),
        ("gender", (r"i am (?:an? )(?:\w+ ){0,3}?(?P<v>boy|girl|man|woman|male|female|guy|lady|dad|mom|father|"
                   r"mother|grandmother|grandfather)\b.*")),
        ("language", r"i (?:can )?(?:speak|am fluent in) (?P<v>.+)"),
        ("hair", r"i have (?:[\w ]+? (?:eyes|skin) (?:and|with) )?(?P<v>(?!my\b)\w+(?: \w+){0,3}?) hair\b.*"),
        ("hair", r"my hair is (?P<v>.+)"),
        ("eyes", r"i have (?P<v>\w+(?: \w+)?) eyes\b.*"),
        ("eyes", r"my eyes are (?P<v>.+)"),
        ("allergy", r"i (?:am|have an?) (?P<neg>not )?allerg(?:ic|y) to (?P<v>.+)"),
        ("fear", r"i (?:am|was) (?P<neg>not )?(?:\w+ )?(?:afraid|scared|terrified|frightened) (?:of|by) (?P<v>.+)"),
        ("fear", r"i fear (?P<v>.+)"),
        ("like", (r"i (?P<neg>hate|dislike|despise|detest|loathe|can not stand|do not (?:like|enjoy|love|"
                  r"care for)|am not (?:into|interested in|a fan of))"
                 rf"(?: (?P<ask>to \w+{_PREPOSITION}?|\w{{2,}}ing{_PREPOSITION}?)(?= (?!and |or |with |at |"
                 rf"in |for |on |out )\w))? (?P<v>.+)")),
        ("like", (r"i (?:love|like|enjoy|adore|am (?:\w+ )?(?:interested in|into|fond of|passionate about|"
                  r"obsessed with|crazy about|addicted to|an? (?:\w+ )?fan of)|"
                 r"have an? (?:\w+ )?(?:weakness|passion|love|thing) for|would rather|prefer)"
                 rf"(?: (?P<ask>to \w+{_PREPOSITION}?|(?!being|something|anything|everything|nothing|king|"
                 rf"morning|evening|spring|string|wedding)\w{{2,}}ing{_PREPOSITION}?)(?= (?!and |or |with |"
                 rf"at |in |for |on |out )\w))? (?P<v>.+)")),
        ("like", (r"i am an? (?:(?:huge|big|avid|total|true|real|massive) )*(?P<v>\w+(?: \w+)?) (?:lover|fan|"
                 r"enthusiast|addict|fanatic|junkie|buff)")),
        ("want", (r"i (?P<neg>do not )?(?:want|hope|wish|plan|would like|would love|aspire|am planning|am "
                 r"hoping|dream)(?: (?:to be|to become|of being|to|of|on|about|for))? (?P<v>.+)")),
        ("want", r"my (?:biggest )?(?:dream|goal)(?: in life| job)? is (?:to be |to |being )?(?P<v>.+)"),
        ("number of {n}", (rf"i (?:have|own|have got|got)(?: (?:about|over|around|only))? (?P<v>(?:{NUMBER})(?: "
                        rf"[\w-]+){{0,2}}? (?P<n>[\w-]+))(?: (?:in|at|from|on|by) .*)?")),
        ("have", (r"i (?P<neg>do not have|do not own|have no|have zero|have never had|never had|did not have)"
                 r"(?: any| an?)? (?P<v>.+)")),
        ("have", r"i (?:have|own|have got|got|keep) (?P<v>.+)"),
        ("did {n}", (rf"i have (?P<neg>never |not )?(?P<n>(?:visited|met|won|been(?: to)|traveled|lived|"
                    rf"written|seen|had|lost|owned){_PREPOSITION}?) (?P<v>(?!been)\w.*)")),
        ("can", r"i (?:can|am able to) (?P<neg>not )?(?P<v>.+)"),
        ("my {n}", (rf"my (?P<n>(?:(?:older|younger|little|big|late|favorite|ex|twin|best|step) )"
                   rf"*(?:{_FAMILY})) (?:is|are|was|were) (?P<neg>not )?(?P<v>.+)")),
        ("my {n}", (rf"my (?P<n>(?:(?:older|younger|little|big|late|ex|twin|best|step) )*(?:{_FAMILY})) "
                   rf"(?P<neg>(?:does|do|did) not |never )?(?P<v>(?!and )\w+ .+)")),
        ("my {n}", r"my (?P<n>(?!favorite)\w+(?: \w+)?) (?:is|are|was|were) (?P<neg>not )?(?P<v>.+)"),
        ("do", r"i do (?P<v>(?!not\b).+)"),
        ("be", r"i am (?P<neg>not )?(?P<v>(?!going|not|on my|here|the one)\w.*)"),
        ("{n}", rf"i {_NEGATIVE}(?P<n>(?:{'|'.join(sorted(set(_PRESENT.split())))}){_PREPOSITION}?) (?P<v>.+)"),
        ("did {n}", rf"i (?P<neg>did not |never )?(?P<n>(?:{'|'.join(_PAST)}){_PREPOSITION}?) (?P<v>.+)"),
        ("did {n}", rf"i did not (?P<n>(?:{'|'.join(sorted(set(_PAST.values())))}){_PREPOSITION}?)(?P<neg>) (?P<v>.+)"),
    )
)  # fmt: skip
_HAVE_TOPICS = (("pet", _PETS), ("child", _CHILDREN), ("sibling", _SIBLINGS), ("vehicle", _VEHICLES))


def core(sentence: str) -> str:
    """[`plain`], without greetings in front and adverbs behind the subject: "hey , i also work" -> "i work"."""
    return _ADVERB.sub("", _OPENING.sub("", plain(sentence)))


_NEXT = re.compile(
    r"\s*(?:[.,;!]\s|\s(?:and|but|so|while|because)\s)\s*"
    rf"(?=(?:i|my|am|{_VERBS})\s)"
)


def parse_claims(sentence: str) -> list[Claim]:
    """The claims of all clauses: "i like tea but hate coffee" makes two, each with "i" as its subject."""
    if sentence.rstrip().endswith("?"):
        return []
    first, *others = _NEXT.split(core(sentence))
    texts = [first, *(text if re.match(r"(?:i|my) ", text) else f"i {text}" for text in others)]
    return [claim for claim in map(parse_claim, texts) if claim is not None]


def parse_claim(sentence: str) -> Claim | None:
    """The claim of a sentence in the first person, or None where no rule applies: the first one of several.

    A question claims nothing.
    """
    if sentence.rstrip().endswith("?"):
        return None
    text = core(sentence)
    text = _SECOND_CLAUSE.sub("", re.sub(r"\s*[.!;]\s.*", "", text))
    relative = _RELATIVE.search(text)
    if relative:
        text = text[: relative.start()]
        # "i have no friends that i trust": what is left of a denial would deny too much
        if re.search(r"\b(?:no|not|never|zero|few)\b", text):
            return None
    for slot, form in _CLAIMS:
        match = form.fullmatch(text)
        if match:
            claim = _claim(slot, match)
            if claim is not None or slot not in ("have", "number of {n}"):
                return claim
    return None


def _claim(slot: str, match: re.Match[str]) -> Claim | None:
    groups = match.groupdict()
    value = groups["v"].strip(" ,")
    if slot == "have" and _PERFECT.match(value):
        return None
    if slot in ("like", "{n}", "did {n}") and _TIME.match(value):
        return None  # "i dance on weekends": the verb says it all
    value = _LEADING.sub("", _ADJUNCT.sub("", value).strip(" ,")).strip()
    if slot.startswith("did "):
        verb, *rest = groups["n"].split()
        groups["n"] = " ".join([_PAST.get(verb, verb), *rest])
    if slot == "number of {n}":
        groups["n"] = lemma(groups["n"])
    if slot == "favorite {n}":  # "my favorite colors are red and silver", "my favorite kind of movie"
        groups["n"] = re.sub(r"^(?:kind|type|sort|genre) of (?!.* to )| genre$|(?<=[^s])s$", "", groups["n"])
    if slot == "home":
        value = re.sub(r" with .*", "", value)  # "oslo with my cousin"
    positive = groups.get("neg") is None
    words = _WORD.findall(value)
    if not lemmas(value) or len(words) > MAX_VALUE_WORDS + 2 or words[0] in ("and", "or", "with", "at", "like", "to"):
        return None
    if slot == "have":
        known = (name for name, nouns in _HAVE_TOPICS if re.search(rf"\b(?:{nouns})s?$", value))
        slot = next(known, "have")
    return Claim(slot.format(n=groups.get("n", "")), value, positive, groups.get("ask") or _counted(slot, value))


def _counted(slot: str, value: str) -> str:
    """ "dogs", of "three dogs" """
    return value.partition(" ")[2] if slot.startswith("number of ") else ""


def claims(persona: Iterable[str]) -> Iterator[tuple[str, Claim]]:
    """Each sentence of a persona that a rule takes apart, with its claim."""
    for sentence in persona:
        claim = parse_claim(sentence)
        if claim is not None:
            yield sentence, claim


def claim_coverage(sentences: Iterable[str]) -> dict[str, float]:
    """How far [`parse_claim`] reaches.

    Returns:
        "facts": different sentences; "unscorable": those that no rule takes apart; "unscorable_share": 0 to 1.
    """
    different = set(sentences)
    unscorable = sum(parse_claim(sentence) is None for sentence in different)
    return {
        "facts": len(different),
        "unscorable": unscorable,
        "unscorable_share": unscorable / len(different) if different else 0.0,
    }
