"""How long this session still lasts, and what stops in time.

`rlhf run --session_budget` sets the end in the environment, where every process of a launch finds it.
"""

import contextlib
import math
import os
import re
import time
from collections.abc import Iterator

from rlhf.config import ConfigError

ENDS = "RLHF_SESSION_ENDS"  # seconds since 1970
STATUS = "stopped"  # of a stage that stopped in time and goes on in the next session
EXIT_STATUS = 75  # of `rlhf run`: EX_TEMPFAIL of sysexits.h, "not an error; the same command again goes on"
UNITS = {"h": 3600.0, "m": 60.0, "s": 1.0}


class SessionEnded(RuntimeError):
    """The session's budget is used up, and what was made of the stage is kept."""


def now() -> float:
    """Seconds since 1970: the one clock of what is decided by time."""
    return time.time()


def seconds_of(budget: str) -> float:
    """The seconds of "11h", "90m" or "3600s".

    Raises:
        ConfigError: if it is written otherwise, or is not above 0.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([hms])", budget.strip())
    if not found or float(found[1]) == 0:
        raise ConfigError([f"`session_budget`: {budget!r}: write a number with its unit, as 11h, 90m or 3600s"])
    return float(found[1]) * UNITS[found[2]]


@contextlib.contextmanager
def session(budget: str | None) -> Iterator[None]:
    """What runs inside ends within the budget, counted from here; without one nothing changes."""
    before = os.environ.get(ENDS)
    if budget is not None:
        os.environ[ENDS] = str(now() + seconds_of(budget))
    try:
        yield
    finally:
        if budget is not None:
            os.environ.pop(ENDS)
            os.environ.update({} if before is None else {ENDS: before})


def seconds_left() -> float:
    """Until the session ends; infinite where it has no budget."""
    ends = os.environ.get(ENDS)
    return math.inf if ends is None else float(ends) - now()


class Pace:
    """Says when to stop: when the time left would not do for one more turn and for saving what was made.

    A turn is the longest one so far, whatever was done in it; saving counts twice, since a disk may be slower next time.
    """

    def __init__(self, save_seconds: float = 0.0) -> None:
        self.save_seconds = save_seconds
        self.longest = 0.0
        self._last: float | None = None

    def over(self) -> bool:
        """Whether this turn has to be the last one; called once a turn."""
        at = now()
        if self._last is not None:
            self.longest = max(self.longest, at - self._last)
        self._last = at
        return seconds_left() <= self.longest + 2 * self.save_seconds
