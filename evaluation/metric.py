"""The row that describes a metric: what the number is, which way is better, where the definition comes from."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Metric:
    """One line of the table `evaluation.METRICS`."""

    name: str
    unit: str
    """What one unit of the value is, printed beside it."""
    low: float
    high: float
    """Range of possible values; `high` may be infinite."""
    higher_is_better: bool | None
    """None: descriptive, to be read on both sides of the human reference."""
    level: Literal["corpus", "reply", "fact"]
    """What the value is a number of: the whole corpus, the mean over replies, or the mean over facts."""
    source: str
    """Paper or upstream code of the definition."""
    protocol: str
    """What must be equal for two values to be comparable."""
    ordinal: bool = False
    """Single values are ranks rather than quantities: a difference of two is measured by Cliff's delta."""

    @property
    def is_rate(self) -> bool:
        """A share of yes-or-no cases: risk difference for its effect size."""
        return self.unit in ("share of replies", "share of facts")

    @property
    def is_share(self) -> bool:
        """A ratio of totals, or a mean, whose single values lie in the range: `intervals.bounded_together` applies."""
        return self.unit.startswith("share of ")
