"""Guards: a persona score is easily bought with replies that nobody wants, so these must stay near a yardstick.

The yardstick are people, in dialogues other than those scored (`evaluation/human_band.py`). Where no replies of people
were given it is the reference system of the same run, or else SFT; copying, facts a reply and uptake then go unguarded,
since SFT may be what copies, or is deaf to the user.
"""

import math
from collections.abc import Mapping
from typing import Literal, NamedTuple


class Guard(NamedTuple):
    """A metric's limits on both sides of the yardstick's value."""

    metric: str
    label: str
    how: Literal["ratio", "difference"]  # shares are compared by difference, quantities by ratio
    low: float
    high: float


# METRICS of people have values of their own here: of `copy_rate` the 95th percentile of samples as large as the one
# scored, of `ead` the mean of samples with as many words.
GUARDS = (
    Guard("copy_rate", "copy rate above the human 95th percentile", "difference", -math.inf, 0.0),
    Guard("fact_density", "facts a reply ratio", "ratio", 0.5, 2.0),
    Guard("length_words", "length ratio", "ratio", 0.5, 2.0),
    Guard("ead", "EAD ratio", "ratio", 0.8, math.inf),
    Guard("repetition", "repetition change", "difference", -math.inf, 0.03),
    Guard("question_rate", "question rate change", "difference", -0.2, 0.2),
    # Of the user's words: a policy deaf to them takes up a fifth of what people do, an echo several times as much.
    Guard("uptake", "uptake of the user's words ratio", "ratio", 0.5, 2.0),
    # SFT's own is 0; broken policies have had 7 and more.
    Guard("kl_reference", "KL to SFT", "difference", -math.inf, 5.0),
)
WITHOUT_PEOPLE = ("length_words", "ead", "repetition", "question_rate")


class Check(NamedTuple):
    """How far a metric is from the yardstick's, and whether that is within the limits; None where one is absent."""

    label: str
    measured: float | None
    passed: bool | None


def check(metrics: Mapping[str, float], yardstick: Mapping[str, float | None]) -> list[Check]:
    """The guards of a system.

    Args:
        metrics: values of the system; without `kl_reference` (the base is no policy) its guard is left out.
        yardstick: values to stay near, None for one that is not known; guards of other metrics are left out.
    """
    checks = []
    for guard in GUARDS:
        own, other = metrics.get(guard.metric), yardstick.get(guard.metric)
        if guard.metric == "kl_reference":
            if own is None:
                continue
            other = 0.0
        elif guard.metric not in yardstick:
            continue
        if own is None or other is None or (guard.how == "ratio" and other == 0):
            checks.append(Check(guard.label, None, None))
        else:
            measured = own / other if guard.how == "ratio" else own - other
            checks.append(Check(guard.label, measured, guard.low <= measured <= guard.high))
    return checks


def verdict(checks: list[Check]) -> tuple[str, str]:
    """("NOT COMPARABLE", the broken guards), or ("not checked", the unknown ones), or ("all pass", "")."""
    for text, wanted in (("NOT COMPARABLE", False), ("not checked", None)):
        labels = [label for label, _, passed in checks if passed is wanted]
        if labels:
            return text, ", ".join(labels)
    return "all pass", ""
