"""An audit of preference pairs: what a judge reaches who cheats, who sees neither the persona nor the prompt.

A reward model that can tell chosen from rejected by length, by words or by the way that replies begin learns that, and
the policy then learns to please it (Gao et al. 2022, https://arxiv.org/abs/2210.10760, on such over-optimisation; Singhal
et al. 2023, https://arxiv.org/abs/2310.03716, on length). In a sound set the decision needs the persona, so each
cheater here must stay near one half on characters that it has not seen.
"""

import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.sparse import vstack
from scipy.stats import binomtest
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression

from rlhf.data.sources import DataError
from rlhf.data.split import split

logger = logging.getLogger(__name__)

Row = dict[str, Any]

HELD_OUT_SHARE = 0.3
MAX_ACCURACY = 0.6
PREFIX_WORDS = 2


@dataclass(frozen=True)
class Cheater:
    """A judge without persona and prompt, and how often it is right.

    Attributes:
        name: `longer_wins`, `shorter_wins`, `bag_of_words` or `reply_prefix`.
        accuracy: share of the held-out pairs in which it prefers the chosen reply; half a point where it cannot tell.
        low: lower end of the 95 % Wilson interval of `accuracy`.
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

    `longer_wins` and `shorter_wins` count words and need no training. `bag_of_words` is a logistic regression on the
    difference of the two replies' word counts, `reply_prefix` the same on their first two words together; both are
    trained on the other characters' pairs.

    Args:
        pairs: With `persona`, `dialogue_id`, and `chosen` and `rejected` as a list of messages.
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
    longer = np.array([len(_words(_reply(row, "chosen"))) - len(_words(_reply(row, "rejected"))) for row in heldout])
    return [
        _cheater("longer_wins", longer),
        _cheater("shorter_wins", -longer),
        _cheater("bag_of_words", _trained(train, heldout, _words)),
        _cheater("reply_prefix", _trained(train, heldout, _prefix)),
    ]


def check_audit(
    pairs: Sequence[Row], seed: int, heldout: Sequence[Row] | None = None, force: bool = False
) -> list[Cheater]:
    """The [`audit`], which must not find a cheater above 60 %.

    Args:
        pairs: As for [`audit`].
        seed: As for [`audit`].
        heldout: As for [`audit`].
        force: Warn instead of raising.

    Raises:
        AuditError: naming each cheater above 60 %, unless forced.
    """
    cheaters = audit(pairs, seed, heldout)
    # A few pairs exceed any bound by chance: what chance explains is no leak.
    caught = [cheater for cheater in cheaters if cheater.accuracy > MAX_ACCURACY and cheater.low > 0.5]
    if caught:
        found = ", ".join(f"`{c.name}` {c.accuracy:.1%} [{c.low:.1%}, {c.high:.1%}] of {c.n}" for c in caught)
        message = (
            f"preference pairs can be told apart without the persona, by more than {MAX_ACCURACY:.0%} of the held-out "
            f"ones: {found}. Balance the pairs (each length, word and opening chosen as often as rejected)"
        )
        if not force:
            raise AuditError(
                f"{message}, or force them to be used: `force_audit: true`, on the command line --set prepare.force_audit=true."
            )
        logger.warning("%s. They are used all the same, since that is forced.", message)
    return cheaters


def _cheater(name: str, margins: np.ndarray) -> Cheater:
    """From the score of each chosen less that of its rejected reply."""
    won = float((margins > 0).sum() + 0.5 * (margins == 0).sum())
    # The interval wants whole numbers; half a pair is nothing in a set large enough to say anything.
    interval = binomtest(int(won), len(margins)).proportion_ci(method="wilson")
    return Cheater(name, won / len(margins), float(interval.low), float(interval.high), len(margins))


def _trained(train: Sequence[Row], heldout: Sequence[Row], features: Callable[[str], list[str]]) -> np.ndarray:
    """Margins on `heldout` of a logistic regression on the difference of the replies' feature counts."""
    counter = CountVectorizer(analyzer=features)
    counter.fit(_reply(row, key) for row in train for key in ("chosen", "rejected"))

    def differences(rows: Sequence[Row]) -> Any:
        chosen, rejected = (counter.transform([_reply(row, key) for row in rows]) for key in ("chosen", "rejected"))
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


def _prefix(text: str) -> list[str]:
    return [" ".join(_words(text)[:PREFIX_WORDS])]
