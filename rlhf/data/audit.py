"""An audit of preference pairs: what a judge reaches who cheats, who does not see the persona.

A reward model that can tell chosen from rejected by length, by words, by the way that replies begin, end or are written,
by repeating the prompt or by fitting it learns that, and the policy then learns to please it (Gao et al. 2022,
https://arxiv.org/abs/2210.10760, on such over-optimisation; Singhal et al. 2023, https://arxiv.org/abs/2310.03716, on
length). In a sound set the decision needs the persona, so each cheater here must stay near one half on characters that
it has not seen. Each looks at one thing: two of them together may still do better.
"""

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.sparse import vstack
from scipy.stats import binomtest
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression

from rlhf.data.sources import DataError
from rlhf.data.split import characters, split

logger = logging.getLogger(__name__)

Row = dict[str, Any]

HELD_OUT_SHARE = 0.3
MAX_ACCURACY = 0.6
END_WORDS = 2  # at either end of a reply
OVERLAP_TURNS = 4  # of the prompt, the last ones


FITTING = "turn_and_reply"


@dataclass(frozen=True)
class Cheater:
    """A judge without persona, and how often it is right.

    Attributes:
        name: As [`audit`] lists them.
        accuracy: share of the held-out pairs in which it prefers the chosen reply; half a point where it cannot tell.
        low: lower end of the 95 % Wilson interval of `accuracy`. Pairs of one character are alike, so it is that of as many
            independent pairs as they are worth (Kish 1965: n divided by the design effect).
        high: upper end.
        n: held-out pairs.
    """

    name: str
    accuracy: float
    low: float
    high: float
    n: int


class AuditError(DataError):
    """Preference pairs that can be told apart without the persona."""


def audit(pairs: Sequence[Row], seed: int, heldout: Sequence[Row] | None = None) -> list[Cheater]:
    """The accuracy of each cheater on the pairs of held-out characters.

    Without training: `longer_wins` and `shorter_wins` count words, `more_letters_wins` and `fewer_letters_wins`
    characters; `echo_wins` and `novelty_wins` take the reply whose [`overlap`] with the prompt is larger or smaller.

    Trained on the other characters' pairs, each a logistic regression on the difference of the two replies' counts:
    `bag_of_words` of words; `reply_prefix` and `reply_suffix` of the first and the last two words together, all without
    case; `writing` of capitals, digits, marks and line breaks, whatever the words are; `turn_and_reply` of each word of
    the reply together with each of the user's last turn, which tells what usually answers what.

    Args:
        pairs: With `persona`, `prompt`, `dialogue_id`, and `chosen` and `rejected` as a list of messages.
        seed: Of the split of `pairs`, where there is no `heldout`.
        heldout: Pairs of other characters, made apart from `pairs`; None holds out 30 % of `pairs` by [`split`]. Prefer
            to give them: if wrong values were drawn from all characters before a split, a value that is right for
            a character of one side is wrong on the other, which pushes cheaters below one half and can hide one.

    Raises:
        DataError: if the pairs are of too few characters to hold some out.
    """
    train = pairs
    if heldout is None:
        train, heldout, _ = split(pairs, HELD_OUT_SHARE, seed)
    held = heldout

    group_of = characters(held)
    if len(set(group_of)) == 1:
        group_of = np.unique([row["dialogue_id"] for row in held], return_inverse=True)[1].tolist()

    def more(measure: Callable[[Row, str], float]) -> np.ndarray:
        return np.array([measure(row, _reply(row, "chosen")) - measure(row, _reply(row, "rejected")) for row in held])

    words = more(lambda _, text: len(_words(text)))
    letters = more(lambda _, text: len(text))
    echo = more(lambda row, text: overlap(row["prompt"], text))
    margins = {
        "longer_wins": words,
        "shorter_wins": -words,
        "more_letters_wins": letters,
        "fewer_letters_wins": -letters,
        "echo_wins": echo,
        "novelty_wins": -echo,
        "bag_of_words": _trained(train, held, lambda _, text: _words(text)),
        "reply_prefix": _trained(train, held, lambda _, text: [" ".join(_words(text)[:END_WORDS])]),
        "reply_suffix": _trained(train, held, lambda _, text: [" ".join(_words(text)[-END_WORDS:])]),
        "writing": _trained(train, held, lambda _, text: _writing(text)),
        "turn_and_reply": _trained(train, held, _turn_and_reply),
    }
    return [_cheater(name, values, group_of) for name, values in margins.items()]


def overlap(prompt: Sequence[Mapping[str, Any]], reply: str) -> float:
    """Share of a reply's different words that stand in the last four turns of its prompt, 0 to 1."""
    said = {word for message in prompt[-OVERLAP_TURNS:] for word in _words(message["content"])}
    words = set(_words(reply))
    return len(words & said) / len(words) if words else 0.0


def check_audit(
    pairs: Sequence[Row], seed: int, heldout: Sequence[Row] | None = None, force: bool = False
) -> list[Cheater]:
    """The [`audit`], passed on to [`refuse_cheaters`]."""
    cheaters = audit(pairs, seed, heldout)
    refuse_cheaters(cheaters, force)
    return cheaters


def refuse_cheaters(cheaters: Sequence[Cheater], force: bool = False) -> None:
    """Stop where a cheater is above 60 %, unless chance explains it.

    `turn_and_reply` is warned of alone: of real replies the better one may well fit its turn better.

    Args:
        cheaters: What [`audit`] found.
        force: Warn instead of raising.

    Raises:
        AuditError: naming each cheater above 60 %, unless forced.
    """
    # A few pairs exceed any bound by chance: what chance explains is no leak.
    above = [cheater for cheater in cheaters if cheater.accuracy > MAX_ACCURACY and cheater.low > 0.5]
    shown = {c.name: f"`{c.name}` {c.accuracy:.1%} [{c.low:.1%}, {c.high:.1%}] of {c.n}" for c in above}
    if fitting := shown.pop(FITTING, None):
        logger.warning("preference pairs can partly be told apart by which reply fits its turn: %s", fitting)
    if not shown:
        return
    found = ", ".join(shown.values())
    message = (
        f"preference pairs can be told apart without the persona, by more than {MAX_ACCURACY:.0%} of the held-out "
        f"ones: {found}. Balance the pairs (each length, word, opening and ending chosen as often as rejected)"
    )
    if not force:
        raise AuditError(
            f"{message}, or force them to be used: `force_audit: true` in this stage's file, or on the command line "
            "`--force_audit true` (of `rlhf run`: `--set force_audit=true`)."
        )
    logger.warning("%s. They are used all the same, since that is forced.", message)


def _cheater(name: str, margins: np.ndarray, group_of: Sequence[int]) -> Cheater:
    """From the score of each chosen less that of its rejected reply, and the group of each pair."""
    won = (margins > 0) + 0.5 * (margins == 0)
    off = won - won.mean()
    alone, together = (off**2).sum(), (np.bincount(group_of, weights=off) ** 2).sum()
    worth = min(1.0, float(alone / together)) if alone and together else 1.0  # of a pair
    # The interval wants whole numbers; half a pair is nothing in a set large enough to say anything.
    right, of = (int(worth * number + 1e-6) for number in (won.sum(), len(won)))
    interval = binomtest(right, max(of, 1)).proportion_ci(method="wilson")
    return Cheater(name, float(won.mean()), float(interval.low), float(interval.high), len(won))


def _trained(train: Sequence[Row], heldout: Sequence[Row], features: Callable[[Row, str], list[str]]) -> np.ndarray:
    """Margins on `heldout` of a logistic regression on the difference of the replies' feature counts."""
    counter = CountVectorizer(analyzer=lambda pair: features(*pair))
    counter.fit((row, _reply(row, key)) for row in train for key in ("chosen", "rejected"))

    def differences(rows: Sequence[Row]) -> Any:
        chosen, rejected = (
            counter.transform((row, _reply(row, key)) for row in rows) for key in ("chosen", "rejected")
        )
        return (chosen - rejected).astype(float)

    # Both orders of each pair and no intercept, so that nothing depends on which reply comes first.
    seen = differences(train)
    model = LogisticRegression(fit_intercept=False, max_iter=1000)
    model.fit(vstack([seen, -seen]), [1] * len(train) + [0] * len(train))
    # Rounded, since two replies with the same features must tie, whatever the order of summation.
    return np.round(model.decision_function(differences(heldout)), 9)


def _reply(row: Row, key: str) -> str:
    return " ".join(message["content"] for message in row[key])


def _words(text: str) -> list[str]:
    """Words and punctuation marks, without case; an apostrophe belongs to its word."""
    return re.findall(r"[\w']+|[^\w\s]", text.casefold())


def _turn_and_reply(row: Row, text: str) -> list[str]:
    asked = set(_words(row["prompt"][-1]["content"]))
    return [f"{word} {said}" for said in sorted(set(_words(text))) for word in sorted(asked)]


def _writing(text: str) -> list[str]:
    """The forms of the words ("Xx" for "Oslo"), the marks and the line breaks; those of the first and last one apart."""
    tokens = re.findall(r"\n|[\w']+|[^\w\s]", text)
    forms = [re.sub(r"\d+", "9", re.sub(r"[^\W\d_]", _case, token)) for token in tokens]
    forms = [re.sub(r"(.)\1+", r"\1", form) for form in forms]
    return [*forms, *(f"first {form}" for form in forms[:1]), *(f"last {form}" for form in forms[-1:])]


def _case(letter: re.Match[str]) -> str:
    return "X" if letter[0].isupper() else "x"
