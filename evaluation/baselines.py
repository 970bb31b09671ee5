"""Published numbers to lay beside our own: read from `baselines.yaml`, ranked within one protocol only.

There is no p-value against them, since nobody published single replies. What can be said is whether the published value
lies outside our interval, and that only where definition and data are the same.
"""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, NamedTuple

import yaml
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

from evaluation import METRICS

FILE = Path(__file__).with_name("baselines.yaml")
Text = Annotated[str, StringConstraints(min_length=1, strip_whitespace=True)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class PublishedMetric(_Strict):
    """What a protocol's number is; `ours` names the metric of METRICS with the same definition."""

    unit: Text
    ours: Text | None = None
    scale: float = 1.0


class Protocol(_Strict):
    """What was measured on what."""

    data: Text
    note: Text
    metrics: dict[Text, PublishedMetric]


class PublishedSystem(_Strict):
    """One row of a published table."""

    system: Text
    protocol: Text
    source: Text
    verified: bool
    values: dict[Text, float] = Field(min_length=1)


class _File(_Strict):
    protocols: dict[Text, Protocol]
    systems: list[PublishedSystem]

    @model_validator(mode="after")
    def _names_are_known(self) -> "_File":
        problems = []
        for key, protocol in self.protocols.items():
            unknown = [metric.ours for metric in protocol.metrics.values() if metric.ours not in (None, *METRICS)]
            problems += [f"protocols.{key}: `ours` = {name!r} is no metric of METRICS" for name in unknown]
        seen = set()
        for number, row in enumerate(self.systems):
            where = f"systems.{number} ({row.system})"
            if row.protocol not in self.protocols:
                problems.append(f"{where}: `protocol` = {row.protocol!r}; known are {', '.join(self.protocols)}")
                continue
            for name, value in row.values.items():
                if name not in self.protocols[row.protocol].metrics:
                    problems.append(f"{where}: protocol {row.protocol} has no metric {name!r}; add it there")
                if not math.isfinite(value):
                    problems.append(f"{where}: `{name}` = {value} is no number")
            if (row.system, row.protocol) in seen:
                problems.append(f"{where}: is there twice for {row.protocol}")
            seen.add((row.system, row.protocol))
        if problems:
            raise ValueError("\n".join(problems))
        return self


class Baseline(NamedTuple):
    """One published number with all that decides whether another one may stand beside it."""

    system: str
    metric: str
    value: float
    unit: str
    protocol: str
    data: str
    note: str
    source: str
    verified: bool
    ours: str | None
    our_value: float
    """The value in our unit, where `ours` is given."""


class Verdict(NamedTuple):
    """Whether a published value lies outside our interval, or why that cannot be said."""

    outside: bool | None
    mismatch: str


def load_baselines(path: str | Path = FILE) -> list[Baseline]:
    """The published numbers of a file.

    Raises:
        ValueError: naming each unknown key, wrong type, unknown protocol or metric, and number that is there twice.
    """
    content = _File.model_validate(yaml.safe_load(Path(path).read_text(encoding="utf-8")))
    found = []
    for row in content.systems:
        protocol = content.protocols[row.protocol]
        for name, value in row.values.items():
            metric = protocol.metrics[name]
            found.append(
                Baseline(
                    row.system, name, value, metric.unit, row.protocol, protocol.data, protocol.note, row.source,
                    row.verified, metric.ours, value * metric.scale,
                )
            )  # fmt: skip
    return found


def by_protocol(baselines: Iterable[Baseline]) -> dict[tuple[str, str], list[Baseline]]:
    """Groups of numbers that compare, by (protocol, metric), each from the highest value to the lowest."""
    groups: dict[tuple[str, str], list[Baseline]] = {}
    for baseline in baselines:
        groups.setdefault((baseline.protocol, baseline.metric), []).append(baseline)
    return {key: sorted(group, key=lambda baseline: -baseline.value) for key, group in groups.items()}


def beside(metric: str, low: float | None, high: float | None, protocol: str | None, baseline: Baseline) -> Verdict:
    """What may be said of our interval of `metric` beside a published number.

    Args:
        low, high: of our 95 % interval, None where there is none.
        protocol: the protocol of `baselines.yaml` whose data and rules our replies kept to, None for none of them.
    """
    if baseline.ours != metric:
        return Verdict(None, f"another definition: {baseline.metric} ({baseline.unit})")
    if baseline.protocol != protocol:
        return Verdict(None, f"other data: {baseline.data}")
    if low is None or high is None:
        return Verdict(None, "no interval of ours")
    return Verdict(not low <= baseline.our_value <= high, "")
